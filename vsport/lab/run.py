"""A booted guest, and commands in it.

A guest is two things on the host: a process, User Mode Linux or QEMU, which the kernel kills when the thread that
started it ends, and a thread of ours, which reads what the agent in the guest says and hands it to the command that it
is for.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal, Self, cast

from vsport.lab import qemu, uml
from vsport.lab.machine import Machine
from vsport.lab.tree import LabError, Tree
from vsport.lab.wire import Channel, Frame, Incoming, Kind, Outgoing, Sink, Source

__all__ = ["DEVNULL", "PIPE", "Guest", "GuestKind", "GuestProcess", "tied_to_us"]

DEVNULL = subprocess.DEVNULL
PIPE = subprocess.PIPE

GuestKind = Literal["uml", "qemu"]

_COMMAND_LINES = {"uml": uml.command_line, "qemu": qemu.command_line}
_STDIN, _STDOUT, _STDERR = 0, 1, 2
_POWER_OFF_WITHIN = 5.0
_TAIL_LINES = 25
_LONGEST_DIRECTORY = 90
_UNQUOTABLE = frozenset(' \t\n",:')


def tied_to_us(command: Sequence[str]) -> list[str]:
    """A command line whose process is killed when the thread that starts it ends, in whatever way."""
    return ["setpriv", "--pdeathsig", "KILL", *command]


class GuestProcess:
    """A command in a guest, much like a subprocess.Popen. `stdin`, `stdout` and `stderr` are files where PIPE was
    asked for; `returncode` is None while it runs."""

    def __init__(self, guest: Guest, number: int, argv: Sequence[str], source: Source, sinks: Sequence[Sink]) -> None:
        self.args = list(argv)
        self.returncode: int | None = None
        self.stdin: BinaryIO | None = None
        self.stdout: BinaryIO | None = None
        self.stderr: BinaryIO | None = None
        self._guest = guest
        self._number = number
        self._ended = threading.Event()
        self._input = Outgoing(guest.channel, number, _STDIN, source)
        self._outputs = {
            stream: Incoming(guest.channel, number, stream, sink)
            for stream, sink in zip((_STDOUT, _STDERR), sinks, strict=True)
        }

    def start(self, request: Mapping[str, object]) -> None:
        self._guest.channel.send_request(self._number, json.dumps(request).encode())
        for thread in self._input, *self._outputs.values():
            thread.start()

    def handle(self, frame: Frame) -> None:
        """What the agent says about this command."""
        if frame.kind is Kind.EXIT:
            self.returncode = frame.code
            self._input.stop()
            self._ended.set()
        elif frame.kind in (Kind.DATA, Kind.EOF):
            self._outputs[frame.stream].feed(frame.payload)
        elif frame.kind is Kind.STOP:
            self._input.stop()
        else:
            self._input.credit(frame.number)

    def lost(self) -> None:
        """The guest has gone: there will be no more."""
        self._input.stop()
        for output in self._outputs.values():
            output.end()
        self._ended.set()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, negative for a signal; raises subprocess.TimeoutExpired, and LabError if the guest went."""
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        if self.returncode is None:
            raise self._guest.trouble(f"went away while {self.args[0]} was running")
        return self.returncode

    def drain(self, timeout: float | None = None) -> None:
        """Waits until the outputs have ended, and all of them has been delivered; raises as wait() does."""
        for output in self._outputs.values():
            output.join(timeout)
            if output.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)

    def send_signal(self, number: int) -> None:
        """To the command and what it started."""
        self._guest.channel.send(Kind.SIGNAL, self._number, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Kills the command if it still runs, and closes our ends of its pipes."""
        if not self._ended.is_set():
            self.kill()
        for file in self.stdin, self.stdout, self.stderr:
            if file is not None:
                file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Guest:
    """A real Linux kernel, from entering the context until leaving it.

    `kind` is "uml" or "qemu"; `tree` what build() made. `socket_path` is where a vhost-user back end already listens;
    without it the guest has no device of ours. Booting waits for the ports that `ports` names. `share` is a directory
    that the guest sees as /mnt/share: User Mode Linux sees and changes the host's files, QEMU's guest a copy made at
    boot. `device_args` are more arguments for QEMU or for User Mode Linux; `max_ports` is the device's, which QEMU
    has to be told. The thread that enters the context has to live as long as the guest does.
    """

    def __init__(
        self,
        kind: GuestKind,
        *,
        tree: Path,
        socket_path: Path | None = None,
        ports: Sequence[str] = (),
        share: Path | None = None,
        memory_mib: int = 256,
        max_ports: int = 31,
        device_args: Sequence[str] = (),
        boot_timeout: float = 60.0,
    ) -> None:
        self.kind = kind
        self._ports = ports
        self._boot_timeout = boot_timeout
        self._make_machine = partial(
            Machine,
            tree=Tree(tree),
            socket_path=socket_path,
            share=share,
            memory_mib=memory_mib,
            max_ports=max_ports,
            extra_args=device_args,
        )
        self._numbers = itertools.count(1)
        self._commands: dict[int, GuestProcess] = {}
        self._undo = contextlib.ExitStack()
        self._booted = self._gone = False
        self._ready: queue.SimpleQueue[list[str] | None] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        """Boots. Raises LabError with the end of the console if that takes too long."""
        with contextlib.ExitStack() as undo:
            self._start(undo)
            self._wait_until_booted()
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        """Switches the guest off; what it wrote to the share is there afterwards."""
        self._undo.close()

    def popen(
        self,
        argv: Sequence[str],
        *,
        stdin: int = DEVNULL,
        stdout: int = PIPE,
        stderr: int = PIPE,
        env: Mapping[str, str] | None = None,
        cwd: str = "/tmp",
    ) -> GuestProcess:
        """Starts a command; each stream is PIPE, DEVNULL or a descriptor of the host, which stays open. One that
        cannot be started says so on its standard error and ends with 127 or 126, as in a shell."""
        source, stdin_file = _source(stdin)
        sinks, files = zip(*map(_sink, (stdout, stderr)), strict=True)
        process = self._launch(argv, source, sinks, env, cwd)
        process.stdin, (process.stdout, process.stderr) = stdin_file, files
        return process

    def run(
        self,
        argv: Sequence[str],
        *,
        input: bytes = b"",
        timeout: float = 60.0,
        check: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: str = "/tmp",
    ) -> subprocess.CompletedProcess[bytes]:
        """Runs a command to its end, like subprocess.run() with its output captured, and raises what that raises."""
        out, err = bytearray(), bytearray()
        sinks = [Sink(out.extend, _nothing), Sink(err.extend, _nothing)]
        with self._launch(argv, Source(io.BytesIO(input).read, _nothing), sinks, env, cwd) as process:
            code = process.wait(timeout)
            process.drain(timeout)
        done = subprocess.CompletedProcess(process.args, code, bytes(out), bytes(err))
        if check:
            done.check_returncode()
        return done

    def trouble(self, what: str) -> LabError:
        """An error about this guest that shows the end of its console."""
        tail = "".join(f"\n  {line}" for line in self.console().splitlines()[-_TAIL_LINES:])
        return LabError(f"the {self.kind} guest {what}; the end of its console:{tail or ' nothing'}")

    def console(self) -> str:
        """What the kernel and the init script have said so far."""
        return self._machine.console.read_text(errors="replace").replace("\r", "")

    def _launch(
        self, argv: Sequence[str], source: Source, sinks: Sequence[Sink], env: Mapping[str, str] | None, cwd: str
    ) -> GuestProcess:
        number = next(self._numbers)
        process = self._commands[number] = GuestProcess(self, number, argv, source, sinks)
        process.start({"argv": list(argv), "env": dict(env or {}), "cwd": cwd})
        if self._gone:
            process.lost()
        return process

    def _start(self, undo: contextlib.ExitStack) -> None:
        """Starts the kernel's process and the thread that listens to it; `undo` will take everything away again."""
        directory = _run_directory()
        undo.callback(shutil.rmtree, directory, ignore_errors=True)
        ours, guests = socket.socketpair()
        undo.callback(ours.close)
        with guests:
            machine = self._machine = self._make_machine(directory=directory, channel_fd=guests.fileno())
            machine.tree.check()
            machine.prepare(self._ports)
            self._process = _spawn(machine, _COMMAND_LINES[self.kind](machine))
        self.channel = Channel(ours.fileno())
        undo.callback(self.channel.close)
        listener = threading.Thread(target=self._listen, daemon=True)
        listener.start()
        undo.callback(listener.join)
        undo.callback(ours.shutdown, socket.SHUT_RDWR)
        undo.callback(self._power_off)

    def _listen(self) -> None:
        for frame in self.channel.frames():
            if frame.kind is Kind.READY:
                self._ready.put(json.loads(frame.payload))
            elif (process := self._commands.get(frame.command)) is not None:
                process.handle(frame)
        self._ready.put(None)
        self._gone = True
        for process in list(self._commands.values()):
            process.lost()

    def _wait_until_booted(self) -> None:
        try:
            missing = self._ready.get(timeout=self._boot_timeout)
        except queue.Empty:
            raise self.trouble(f"did not boot within {self._boot_timeout:g} seconds") from None
        if missing is None:
            raise self.trouble("ended instead of booting")
        self._booted = True
        if missing:
            raise self.trouble(f"booted, but has no port named {' or '.join(missing)}")

    def _power_off(self) -> None:
        self.channel.send(Kind.POWEROFF)
        try:
            self._process.wait(_POWER_OFF_WITHIN if self._booted else 0)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _run_directory() -> Path:
    """Raises LabError where the name would break a kernel's command line, which knows no quoting, or make the path of
    a Unix socket too long."""
    directory = Path(tempfile.mkdtemp(prefix="vsport-lab-"))
    if _UNQUOTABLE.intersection(str(directory)) or len(bytes(directory)) > _LONGEST_DIRECTORY:
        directory.rmdir()
        raise LabError(f"a guest cannot be given the path {directory}: set TMPDIR to a shorter and simpler one")
    return directory


def _spawn(machine: Machine, command: Sequence[str]) -> subprocess.Popen[bytes]:
    with machine.console.open("wb") as console:
        try:
            return subprocess.Popen(
                tied_to_us(command),
                cwd=machine.tree.root,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                pass_fds=[machine.channel_fd],
                start_new_session=True,
            )
        except FileNotFoundError as exc:
            raise LabError(f"{exc.filename} is missing: on Debian, apt-get install util-linux") from exc


def _source(what: int) -> tuple[Source, BinaryIO | None]:
    """What a command reads, and the caller's end of it."""
    if what == DEVNULL:
        return Source(lambda most: b"", _nothing), None
    if what != PIPE:
        return Source.of(what, _nothing), None
    ours, callers = os.pipe()
    return Source.of(ours, partial(os.close, ours)), cast(BinaryIO, open(callers, "wb", buffering=0))


def _sink(what: int) -> tuple[Sink, BinaryIO | None]:
    """What a command writes to, and the caller's end of it."""
    if what == DEVNULL:
        return Sink(lambda data: None, _nothing), None
    if what != PIPE:
        return Sink.of(what, _nothing), None
    callers, ours = os.pipe()
    return Sink.of(ours, partial(os.close, ours)), open(callers, "rb")


def _nothing() -> None:
    """Nothing is to be closed."""
