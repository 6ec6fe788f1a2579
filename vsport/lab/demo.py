"""The demo's stories on a real kernel: the guest's half is a program with guest_tools, in a guest of the lab."""

from __future__ import annotations

import json
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from vsport.demo import PATIENCE, PORT_NAME, Happening, HostProgram, Stage, Timeline, configure, teller
from vsport.errors import HostError
from vsport.lab.daemon import daemon, successor
from vsport.lab.run import PIPE, Guest, GuestKind, GuestProcess
from vsport.lab.served import Served
from vsport.lab.tree import default_directory
from vsport.options import parse_configuration

__all__ = ["on_a_kernel", "run_handover"]

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


_AGENT = """
import sys
from guest_tools import open_port

with open_port(sys.argv[1]) as channel:
    print("open", flush=True)
    while question := channel.read():
        channel.write(question.replace(b"question", b"answer"))
"""
"""Answers each question of the host; ends when the host leaves."""

_PAUSED = re.compile(r"the device was paused for ([\d.]+) ms")


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
        return _describe(self._guest)

    def wait(self, condition: Callable[[], object], what: str) -> None:
        _wait(condition, what)

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


def _wait(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise HostError(f"this took longer than {PATIENCE:.0f} seconds: {what}")
        time.sleep(_LOOK_AGAIN_SECONDS)


def _describe(guest: Guest) -> str:
    release = guest.run(["uname", "-sr"], check=True).stdout.decode().strip()
    return f"{release} under {'User Mode Linux' if guest.kind == 'uml' else 'QEMU'}"


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


# -- the device goes to another process --------------------------------------------------------------------------------


def run_handover(kind: GuestKind, directory: Path | None, *, as_json: bool) -> int:
    """A live guest of ``kind`` keeps its host while its device goes to another process.

    Returns the exit code; raises HostError if it does not go as told.
    """
    tree = (directory or default_directory()) / "tree"
    with tempfile.TemporaryDirectory(prefix="vsport-demo-") as name:
        vm_socket, offer, log = (Path(name, each) for each in ("vm.sock", "handover", "second.log"))
        (chardev,), (device,) = configure(Path(name, "host.sock"))
        options = ["--chardev", chardev, "--device", device, "--handover", str(offer)]
        with (
            ExitStack() as ends_last,
            daemon(vm_socket, options, Path(name, "first.log")) as first,
            Guest(kind, tree=tree, socket_path=vm_socket, ports=[PORT_NAME]) as guest,
        ):
            if not as_json:
                print(f"\nAn agent in {_describe(guest)}, whose device goes to another process:\n", flush=True)
            story = _Handover(guest, HostProgram(Path(name, "host.sock")), teller(as_json=as_json))
            story.begins()
            ends_last.enter_context(successor(first, offer, ["--log-level", "info"], log))
            story.ends(log)
        if not as_json:
            print()
    return 0


class _Handover:
    """The story: one program in the guest, one on the host, each with the very same open port or socket all the time.

    ``say`` is given each thing as it happens. Raises HostError if something does not happen.
    """

    def __init__(self, guest: Guest, host: HostProgram, say: Callable[[Happening], None]) -> None:
        self._host = host
        self._say = say
        self._timeline = Timeline()
        self._agent = guest.popen(["python3", "-c", _AGENT, PORT_NAME])

    def begins(self) -> None:
        """Until the device can be handed over."""
        assert self._agent.stdout is not None
        if self._agent.stdout.readline() != b"open\n":
            raise HostError("the agent in the guest does not start")
        self._note("guest", f"an agent opens {PORT_NAME}; its host is there")
        self._ask(1)
        self._note("vmm", "goes on as it is; a second `vsport serve` comes and takes over")

    def ends(self, log: Path) -> None:
        """From when the first process has ended; ``log`` is what the second one says."""
        self._note("host", "the first process has ended")
        _wait(lambda: _PAUSED.search(log.read_text()), "the second process says that it has taken over")
        paused = _PAUSED.search(log.read_text())
        assert paused is not None
        self._note("host", f"the second one has the device, which was paused for {paused[1]} ms")
        self._ask(2)
        self._host.leaves()
        if self._agent.wait(PATIENCE) != 0:
            raise HostError("the agent in the guest does not end well")
        self._note("guest", "sees that its host leaves, for the first time, and ends")

    def _ask(self, number: int) -> None:
        start = time.monotonic()
        self._host.says(b"question %d; " % number)
        _wait(lambda: b"answer %d; " % number in self._host.heard(), f"the agent's answer {number}")
        milliseconds = (time.monotonic() - start) * 1000
        self._note("host", f"asks on its open socket, and is answered after {milliseconds:.1f} ms")

    def _note(self, who: str, what: str) -> None:
        self._say(self._timeline.note(who, what))
