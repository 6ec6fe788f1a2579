"""The agent in a guest: runs the commands that arrive on a serial line, many at once.

Started by the init script with the line's device node as its argument; when it ends, because the host says so or has
gone, the script switches the guest off.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import termios
import threading
import time
import tty
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vsport.lab.wire import Channel, Frame, Incoming, Kind, Outgoing, Sink, Source
else:
    from wire import Channel, Frame, Incoming, Kind, Outgoing, Sink, Source

HERE = os.path.dirname(os.path.abspath(__file__))
ENVIRONMENT = {
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PATH": f"{HERE}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin",
    "PYTHONPATH": HERE,
}
STDIN, STDOUT, STDERR = 0, 1, 2
NOT_EXECUTABLE, NOT_FOUND = 126, 127
PORTS_APPEAR_WITHIN = 10.0
LINKS = {"/dev/fd": "/proc/self/fd", "/dev/stdin": "fd/0", "/dev/stdout": "fd/1", "/dev/stderr": "fd/2"}
"""What a system's start-up adds to the kernel's device nodes."""


class Command:
    """One command, from its request to its exit."""

    def __init__(self, channel: Channel, number: int) -> None:
        self.channel = channel
        self.number = number
        self.request = b""
        self.process: subprocess.Popen[bytes] | None = None
        self.stdin: Incoming | None = None
        self.outputs: dict[int, Outgoing] = {}

    def handle(self, frame: Frame) -> None:
        """What the host says about this command."""
        if frame.kind is Kind.REQUEST:
            self._request(frame.payload)
        elif frame.kind is Kind.SIGNAL:
            self._signal(frame.stream)
        elif frame.kind in (Kind.DATA, Kind.EOF) and self.stdin is not None:
            self.stdin.feed(frame.payload)
        elif frame.stream in self.outputs:
            output = self.outputs[frame.stream]
            output.stop() if frame.kind is Kind.STOP else output.credit(frame.number)

    def _request(self, piece: bytes) -> None:
        self.request += piece
        if piece:
            return
        try:
            self._start(**json.loads(self.request))
        except OSError as exc:
            self._refuse(exc)

    def _start(self, argv: list[str], env: dict[str, str], cwd: str) -> None:
        self.process = process = subprocess.Popen(
            argv,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT | env,
            cwd=cwd,
            start_new_session=True,
        )
        assert process.stdin
        assert process.stdout
        assert process.stderr
        sink = Sink.of(process.stdin.fileno(), process.stdin.close)
        self.stdin = Incoming(self.channel, self.number, STDIN, sink)
        for stream, pipe in (STDOUT, process.stdout), (STDERR, process.stderr):
            source = Source.of(pipe.fileno(), pipe.close)
            self.outputs[stream] = Outgoing(self.channel, self.number, stream, source)
        for thread in self.stdin, *self.outputs.values(), threading.Thread(target=self._wait, daemon=True):
            thread.start()

    def _wait(self) -> None:
        assert self.process
        assert self.stdin
        self.channel.send_exit(self.number, self.process.wait())
        self.stdin.end()

    def _refuse(self, exc: OSError) -> None:
        """A command that cannot be started says so and ends as it would in a shell."""
        self.channel.send(Kind.DATA, self.number, STDERR, f"{exc.filename}: {exc.strerror}\n".encode())
        for stream in STDOUT, STDERR:
            self.channel.send(Kind.EOF, self.number, stream)
        self.channel.send_exit(self.number, NOT_FOUND if isinstance(exc, FileNotFoundError) else NOT_EXECUTABLE)

    def _signal(self, number: int) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)


def open_line(path: str) -> int:
    """Opens a serial line for bytes as they are, at the highest speed: QEMU's line is as slow as it is told."""
    fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
    tty.setraw(fd)
    attributes = termios.tcgetattr(fd)
    attributes[4] = attributes[5] = termios.B115200
    termios.tcsetattr(fd, termios.TCSANOW, attributes)
    return fd


def missing_ports(names: list[str]) -> list[str]:
    """Waits until udev has named every port; returns those that did not come."""
    deadline = time.monotonic() + PORTS_APPEAR_WITHIN
    while missing := [name for name in names if not os.path.exists(f"/dev/virtio-ports/{name}")]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    return missing


def main(line: str) -> None:
    for link, target in LINKS.items():
        os.symlink(target, link)
    fd = open_line(line)
    signal.signal(signal.SIGHUP, lambda *_: None)  # The commands would inherit SIG_IGN.
    with open(f"{HERE}/ports.json") as file:
        names = json.load(file)
    channel = Channel(fd, acknowledge=True)
    channel.send(Kind.READY, payload=json.dumps(missing_ports(names)).encode())
    commands: dict[int, Command] = {}
    for frame in channel.frames():
        if frame.kind is Kind.POWEROFF:
            return
        commands.setdefault(frame.command, Command(channel, frame.command)).handle(frame)


if __name__ == "__main__":
    main(sys.argv[1])
