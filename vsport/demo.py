"""`vsport demo`: the main job in a minute, as a story with a timeline.

The story is the same on every Stage: a guest opens its port, bytes flow both ways, the host leaves and returns, the
guest closes. Only the guest differs: simulated here, or a real Linux kernel in vsport.lab.demo.

`vsport demo --migrate` is the other story, that of 2011: an agent in the guest holds its port open while its machine is
moved to another host, whose back end was made a moment ago and knows nothing of the guest.
"""

from __future__ import annotations

import json
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from vsport.chardev.base import Chardev
from vsport.connection import Cause, Policy, State
from vsport.errors import HostError
from vsport.host import Host
from vsport.loop import Loop
from vsport.options import parse_configuration
from vsport.port import Port
from vsport.pump import PortPump
from vsport.sim import Direct, GuestPort, SimulatedGuest
from vsport.snapshot import Snapshot

__all__ = [
    "PATIENCE",
    "PORT_NAME",
    "Happening",
    "HostProgram",
    "Outcome",
    "SimulatedStage",
    "Stage",
    "Timeline",
    "configure",
    "run",
    "run_moves",
    "simulated",
    "tell",
    "tell_moves",
    "teller",
]

PORT_NAME = "org.vsport.demo.0"
PATIENCE = 10.0
"""Seconds that any one step may take."""
PACE = 0.15
"""Seconds between two steps, so that somebody can follow them, and the timeline has room."""
SILENCE = 1.0
"""Seconds after which the host gives up on an agent that does not answer. One that does needs a hundredth of that."""
_WIDTH = 60
_ASCII = str.maketrans("█·─", "#.-")


def configure(socket_path: Path) -> tuple[list[str], list[str]]:
    """The story's --chardev and --device options."""
    return (
        [f"socket,id=c0,path={str(socket_path).replace(',', ',,')},server=on,wait=off"],
        [f"virtserialport,chardev=c0,name={PORT_NAME},id=p0"],
    )


@dataclass(slots=True)
class Happening:
    """One thing that happened: seconds since the start, who did it, what it was."""

    at: float
    who: str
    what: str


@dataclass(slots=True)
class Timeline:
    """What happened when, and since when each side was connected."""

    start: float = field(default_factory=time.monotonic)
    happenings: list[Happening] = field(default_factory=list)
    changes: list[tuple[float, State]] = field(default_factory=list)

    def note(self, who: str, what: str) -> Happening:
        happening = Happening(time.monotonic() - self.start, who, what)
        self.happenings.append(happening)
        return happening

    def transition(self, port: Port, cause: Cause, before: State) -> None:
        """For SerialDevice.on_transition."""
        self.changes.append((time.monotonic() - self.start, port.state))

    def draw(self) -> str:
        """Two bars over time: the guest's program, and the host's."""
        end = time.monotonic() - self.start
        states = [self._state_at(end * (column + 0.5) / _WIDTH) for column in range(_WIDTH)]
        guest = "".join("█" if state.guest_connected else "·" for state in states)
        host = "".join("█" if state.host_connected else "·" for state in states)
        scale = f"0 {'':─<{_WIDTH - 4 - len(f'{end:.2f} s')}}> {end:.2f} s"
        return f"  guest  {guest}\n  host   {host}\n         {scale}"

    def _state_at(self, moment: float) -> State:
        return next((state for at, state in reversed(self.changes) if at <= moment), State.B_UNREADY)


class Stage(Protocol):
    """A guest with the story's port, attached to a running device whose chardev listens on ``socket_path``."""

    socket_path: Path
    timeline: Timeline

    def describe(self) -> str:
        """What the guest is, in a few words."""

    def wait(self, condition: Callable[[], object], what: str) -> None:
        """Lets time pass until ``condition()``; raises HostError, with ``what``, if that takes too long."""

    def rest(self, seconds: float) -> None:
        """Lets time pass."""

    def guest_opens(self) -> None: ...
    def guest_says(self, data: bytes) -> None: ...
    def guest_heard(self) -> bytes:
        """Everything that the program in the guest has read so far."""

    def guest_sees_host(self) -> bool:
        """Whether the program in the guest sees the host connected."""

    def guest_closes(self) -> None: ...


class HostProgram:
    """The program on the host: a plain client of a Unix socket."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(str(path))
        self._socket.setblocking(False)
        self._heard = b""

    def says(self, data: bytes) -> None:
        self._socket.sendall(data)

    def heard(self) -> bytes:
        """Everything that it has read so far."""
        with suppress(BlockingIOError):
            self._heard += self._socket.recv(65536)
        return self._heard

    def leaves(self) -> None:
        self._socket.close()


class SimulatedStage:
    """The guest is vsport.sim's, in this process."""

    def __init__(self, socket_path: Path) -> None:
        self.socket_path = socket_path
        self.timeline = Timeline()
        self._loop = Loop()
        self._host = Host(self._loop, parse_configuration(*configure(socket_path)))
        self._host.device.on_transition = self.timeline.transition
        self._guest = SimulatedGuest(Direct(self._host.device))
        self._guest.on_interrupt = lambda: self._loop.call_soon(self._run_guest)
        self._heard = b""
        self._host.open()
        self._guest.boot()

    def close(self) -> None:
        self._host.close()
        self._loop.close()

    def describe(self) -> str:
        return "a simulated guest"

    @property
    def _port(self) -> GuestPort:
        return self._guest.port(PORT_NAME)

    def _run_guest(self) -> None:
        self._guest.run()
        with suppress(BlockingIOError):
            while self._port.is_open and (data := self._port.read()):
                self._heard += data

    def wait(self, condition: Callable[[], object], what: str) -> None:
        if not self._loop.run_until(condition, PATIENCE):
            raise HostError(f"this took longer than {PATIENCE:.0f} seconds: {what}")

    def rest(self, seconds: float) -> None:
        self._loop.run_until(lambda: False, seconds)

    def guest_opens(self) -> None:
        self._port.open()

    def guest_says(self, data: bytes) -> None:
        self._port.write(data)

    def guest_heard(self) -> bytes:
        return self._heard

    def guest_sees_host(self) -> bool:
        return self._port.host_connected

    def guest_closes(self) -> None:
        self._port.close()


def tell(stage: Stage, say: Callable[[Happening], None]) -> None:
    """The story. ``say`` is given each thing as it happens. Raises HostError if something does not happen."""

    def note(who: str, what: str) -> None:
        say(stage.timeline.note(who, what))
        stage.rest(PACE)

    def hears(what: str, heard: Callable[[], bytes], words: bytes) -> None:
        stage.wait(lambda: words in heard(), what)

    stage.guest_opens()
    note("guest", f"opens {PORT_NAME}; no host program is there yet")
    host = HostProgram(stage.socket_path)
    stage.wait(stage.guest_sees_host, "the guest sees the host connect")
    note("host", "connects to the Unix socket; the guest sees it at once")
    _talk(stage, host, note, hears, b"first session")

    host.leaves()
    note("host", "leaves")
    stage.wait(lambda: not stage.guest_sees_host(), "the guest sees the host leave")
    note("guest", "sees that its host is gone; its own side is still open")
    host = HostProgram(stage.socket_path)
    stage.wait(stage.guest_sees_host, "the guest sees the host return")
    note("host", "returns: for the guest a new session, on its open port")
    _talk(stage, host, note, hears, b"second session")

    stage.guest_says(b"goodbye")
    stage.guest_closes()
    hears("the host hears the last words", host.heard, b"goodbye")
    note("guest", "says goodbye and closes at once; the last words arrive")
    host.leaves()


def _talk(
    stage: Stage,
    host: HostProgram,
    note: Callable[[str, str], None],
    hears: Callable[[str, Callable[[], bytes], bytes], None],
    topic: bytes,
) -> None:
    question, answer = b"question of the " + topic + b"; ", b"answer of the " + topic + b"; "
    host.says(question)
    hears("the guest hears the host", stage.guest_heard, question)
    note("guest", f"hears {question.decode()!r}")
    stage.guest_says(answer)
    hears("the host hears the guest", host.heard, answer)
    note("host", f"hears {answer.decode()!r}")


# -- a machine is moved ------------------------------------------------------------------------------------------------


class _WitnessedPump(PortPump):
    """A back end that remembers what it is told of the guest."""

    def __init__(self, loop: Loop, port: Port, chardev: Chardev) -> None:
        super().__init__(loop, port, chardev)
        self.told: list[str] = []

    def guest_connected(self, connected: bool, cause: Cause) -> None:
        self.told.append("open" if connected else "closed")
        super().guest_connected(connected, cause)

    def load(self, state: bytes) -> None:
        self.told.append("what it saved")
        super().load(state)


class _Home:
    """A host where the machine is, or where it goes to; its back end is made from nothing."""

    def __init__(self, loop: Loop, socket_path: Path, policy: Policy | None = None) -> None:
        self.socket_path = socket_path
        chardevs, (device,) = configure(socket_path)
        if policy is not None:
            device += f",restore={policy.value}"
        self._host = Host(loop, parse_configuration(chardevs, [device]))
        self.device = self._host.device
        (id,) = self._host.pumps
        self._host.pumps.pop(id).close()
        port = self.device.ports[id]
        self.pump = self._host.pumps[id] = _WitnessedPump(loop, port, self._host.chardevs["c0"])
        self.device.attach(port, self.pump)
        self._host.open()

    def close(self) -> None:
        self._host.close()


class _MovingMachine:
    """A simulated machine in which an agent holds the port open and answers each question, wherever the machine is."""

    def __init__(self, loop: Loop, home: _Home) -> None:
        self._loop = loop
        self.home = home
        self._attachment = Direct(home.device)
        self._guest = SimulatedGuest(self._attachment)
        self._guest.on_interrupt = lambda: loop.call_soon(self._run)
        self._guest.boot()
        self._port = self._wait_for_port()
        self._port.open()

    def _wait_for_port(self) -> GuestPort:
        if not self._loop.run_until(lambda: any(port.name for port in self._guest.ports.values()), PATIENCE):
            raise HostError("the guest does not find its port")
        return self._guest.port(PORT_NAME)

    def _run(self) -> None:
        self._guest.run()
        with suppress(BlockingIOError):
            while question := self._port.read():
                self._port.write(question.replace(b"question", b"answer"))

    def move_to(self, home: _Home) -> None:
        """Stops, and goes on at ``home`` with what a stream between the two would bring there."""
        self._attachment.pause()
        state = self.home.device.snapshot().encode()
        home.device.restore(Snapshot.decode(state))
        self._attachment.move_to(home.device)
        self._attachment.resume()
        self.home.close()
        self.home = home

    def asked(self, number: int) -> float | None:
        """Seconds until a host program that comes now has the agent's answer; None if it gives up."""
        program = HostProgram(self.home.socket_path)
        start = time.monotonic()
        program.says(b"question %d; " % number)
        answered = self._loop.run_until(lambda: b"answer %d; " % number in program.heard(), SILENCE)
        seconds = time.monotonic() - start
        program.leaves()
        return seconds if answered else None


@dataclass(slots=True)
class Outcome:
    """What a policy led to."""

    policy: str
    """As it is given to restore=; "default" stands for nothing given."""
    told: list[str]
    """What the back end on the new host was told of the guest, in order."""
    answered: bool
    as_expected: bool


_EXPECTED: dict[Policy | None, tuple[list[str], bool]] = {
    Policy.SILENT: ([], False),
    Policy.REPLAY: (["open"], True),
    Policy.BACKEND: (["what it saved"], True),
    Policy.RECONNECT: (["what it saved", "closed", "open"], True),
    None: (["what it saved", "closed", "open"], True),
}
"""What each policy has the new back end told, and whether the host has its answer after that."""


def tell_moves(directory: Path, say: Callable[[Happening], None]) -> list[Outcome]:
    """The story of 2011, once for each policy, with its sockets in ``directory``. Raises HostError."""
    timeline = Timeline()

    def note(who: str, what: str) -> None:
        say(timeline.note(who, what))

    outcomes = []
    for number, policy in enumerate(_EXPECTED):
        with closing(Loop()) as loop:
            outcomes.append(_tell_move(loop, directory, number, policy, note))
    return outcomes


def _tell_move(
    loop: Loop, directory: Path, number: int, policy: Policy | None, note: Callable[[str, str], None]
) -> Outcome:
    source = _Home(loop, directory / f"{number}.old")
    with closing(source), closing(_Home(loop, directory / f"{number}.new", policy)) as target:
        machine = _MovingMachine(loop, source)
        if machine.asked(1) is None:
            raise HostError("the agent does not answer even before its machine is moved")
        note("host", "asks, and the agent in the guest answers; its port stays open")
        machine.move_to(target)
        name = policy.value if policy else "default"
        told = target.pump.told
        note("vmm", f"moves the machine, {f'restore={name}' if policy else 'nothing said of restore'}")
        note("host", f"the new back end is told: {', '.join(told) or 'nothing'}")
        seconds = machine.asked(2)
        if seconds is None:
            note("host", f"asks; no answer within {SILENCE} s: the agent is dead to it")
        else:
            note("host", f"asks, and is answered after {seconds * 1000:.1f} ms")
        return Outcome(name, told, seconds is not None, (told, seconds is not None) == _EXPECTED[policy])


def run_moves(*, as_json: bool) -> int:
    """Tells the story of 2011; returns the exit code: 0 if each policy led to what it stands for. Raises HostError."""
    if not as_json:
        print("\nA machine with an agent is moved to a host that knows nothing of it:\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="vsport-demo-") as directory:
        outcomes = tell_moves(Path(directory), teller(as_json=as_json))
    if as_json:
        for outcome in outcomes:
            print(json.dumps({"policy": outcome.policy, "told": outcome.told, "answered": outcome.answered}))
    else:
        print(f"\n{_table(outcomes)}\n")
    if wrong := [outcome.policy for outcome in outcomes if not outcome.as_expected]:
        raise HostError(f"this is not what restore={wrong[0]} stands for")
    return 0


def _table(outcomes: list[Outcome]) -> str:
    rows = [("restore=", "the back end was told", "the agent answered")]
    rows += [(each.policy, ", ".join(each.told) or "nothing", "yes" if each.answered else "no") for each in outcomes]
    return "\n".join(f"  {policy:<10} {told:<30} {answered}" for policy, told, answered in rows)


# -- on standard output ------------------------------------------------------------------------------------------------


@contextmanager
def simulated(socket_path: Path) -> Iterator[Stage]:
    """The stage without a virtual machine."""
    stage = SimulatedStage(socket_path)
    try:
        yield stage
    finally:
        stage.close()


def run(set_up: Callable[[Path], AbstractContextManager[Stage]], *, as_json: bool) -> int:
    """Tells the story on the stage that ``set_up`` makes; returns the exit code. Raises HostError."""
    with (
        tempfile.TemporaryDirectory(prefix="vsport-demo-") as directory,
        set_up(Path(directory, "host.sock")) as stage,
    ):
        if not as_json:
            print(f"\nA port between a host program and {stage.describe()}:\n", flush=True)
        tell(stage, teller(as_json=as_json))
        if not as_json:
            print(f"\nWho was connected when:\n\n{_drawable(stage.timeline.draw())}\n")
    return 0


def _drawable(drawing: str) -> str:
    """The drawing in characters that standard output has."""
    try:
        drawing.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        return drawing.translate(_ASCII)
    return drawing


def teller(*, as_json: bool) -> Callable[[Happening], None]:
    """What prints each thing as it happens."""
    return _say_json if as_json else _say


def _say(happening: Happening) -> None:
    print(f"  {happening.at * 1000:8.1f} ms  {happening.who:<5}  {happening.what}", flush=True)


def _say_json(happening: Happening) -> None:
    print(json.dumps({"seconds": round(happening.at, 6), "who": happening.who, "what": happening.what}), flush=True)
