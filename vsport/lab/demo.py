"""The demo's story on a real kernel: the guest's half is a program with guest_tools, in a guest of the lab."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from vsport.demo import PATIENCE, PORT_NAME, Stage, Timeline, configure
from vsport.errors import HostError
from vsport.lab.run import PIPE, Guest, GuestKind, GuestProcess
from vsport.lab.served import Served
from vsport.lab.tree import default_directory
from vsport.options import parse_configuration

__all__ = ["on_a_kernel"]

_LOOK_AGAIN_SECONDS = 0.002

_GUEST_PROGRAM = """
import json, os, select, sys
from guest_tools import open_port

def say(**what):
    print(json.dumps(what), flush=True)

with open_port(sys.argv[1]) as channel:
    waiting = select.poll()
    waiting.register(0, select.POLLIN)
    waiting.register(channel.edges.fileno(), select.POLLIN)
    host = None
    while True:
        while data := channel.read_now():
            say(heard=data.decode())
        if host is not channel.host_connected:
            host = not host
            say(host=host)
        ready = dict(waiting.poll())
        channel.wait(0)
        if 0 in ready:
            words = os.read(0, 65536)
            if not words:
                break
            channel.write(words)
"""
"""Opens the port, says on its output what it hears and whether the host is there; its input goes to the host."""


class _KernelStage:
    """A booted guest, attached to a device in this process."""

    def __init__(self, guest: Guest, served: Served, socket_path: Path) -> None:
        self.socket_path = socket_path
        self.timeline = Timeline()
        served.call(lambda host: setattr(host.device, "on_transition", self.timeline.transition))
        self._guest = guest
        self._program: GuestProcess | None = None
        self._heard = b""
        self._host = False

    def describe(self) -> str:
        release = self._guest.run(["uname", "-sr"], check=True).stdout.decode().strip()
        return f"{release} under {'User Mode Linux' if self._guest.kind == 'uml' else 'QEMU'}"

    def wait(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                raise HostError(f"this took longer than {PATIENCE:.0f} seconds: {what}")
            time.sleep(_LOOK_AGAIN_SECONDS)

    def rest(self, seconds: float) -> None:
        time.sleep(seconds)

    def guest_opens(self) -> None:
        self._program = self._guest.popen(["python3", "-c", _GUEST_PROGRAM, PORT_NAME], stdin=PIPE)
        reader = threading.Thread(target=self._listen, args=(self._program, started := threading.Event()), daemon=True)
        reader.start()
        if not started.wait(PATIENCE):
            raise HostError("the program in the guest does not start")

    def _listen(self, program: GuestProcess, started: threading.Event) -> None:
        assert program.stdout is not None
        for line in program.stdout:
            said = json.loads(line)
            self._heard += said.get("heard", "").encode()
            self._host = said.get("host", self._host)
            started.set()

    def guest_says(self, data: bytes) -> None:
        assert self._program is not None
        assert self._program.stdin is not None
        self._program.stdin.write(data)
        self._program.stdin.flush()

    def guest_heard(self) -> bytes:
        return self._heard

    def guest_sees_host(self) -> bool:
        return self._host

    def guest_closes(self) -> None:
        assert self._program is not None
        assert self._program.stdin is not None
        self._program.stdin.close()
        self._program.wait(PATIENCE)


def on_a_kernel(kind: GuestKind, directory: Path | None) -> Callable[[Path], AbstractContextManager[Stage]]:
    """What demo.run() is given: boots a guest of ``kind`` from the lab in ``directory`` (None: where it usually is)."""

    @contextmanager
    def set_up(socket_path: Path) -> Iterator[Stage]:
        tree = (directory or default_directory()) / "tree"
        vm_socket = socket_path.with_name("vm.sock")
        with (
            Served(parse_configuration(*configure(socket_path)), vm_socket) as served,
            Guest(kind, tree=tree, socket_path=vm_socket, ports=[PORT_NAME]) as guest,
        ):
            yield _KernelStage(guest, served, socket_path)

    return set_up
