"""How soon does a program on the host hear from the guest again after a move? Peer: QEMU's live migration.

The same guest program, the same kernel where it is a real one, and always a byte that waits for the guest to go on:

- peer: QEMU's own device, a live migration from process to process; from RESUME, which both ends stamp by one clock;
- ours: a real guest whose device goes from process to process, from when the new process goes on with it;
- ours: a simulated guest that moves by vhost-user's device state, from when its rings are started at the target.
"""

import contextlib
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
from distributions import tell
from floors import Figure, at_most, record, record_distribution
from kernels import ECHO, PATIENCE, Succession, lab_tree

from vsport.lab import Guest, Tree
from vsport.lab.machine import Machine
from vsport.lab.qemu import command_line
from vsport.lab.run import tied_to_us

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from test_move import Place, Traveller

from vsport.move import move
from vsport.vhost_user.frontend import FrontEnd

MOVES = int(os.environ.get("MOVES", "20"))
MIGRATIONS = int(os.environ.get("MIGRATIONS", "5"))
NAME = "org.test.1"
GOAL = 0.2
MEMORY_MIB = 256


class Monitor:
    """QEMU's monitor: commands, and events with the time when they happened, in seconds since the epoch."""

    def __init__(self, path):
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while not connects(self._sock, path):
            assert time.monotonic() < deadline, "QEMU listens"
            time.sleep(0.02)
        self._lines = self._sock.makefile("rw")
        self.events = []
        assert "QMP" in json.loads(self._lines.readline())
        self.ask("qmp_capabilities")

    def ask(self, command, **arguments):
        self._lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._lines.flush()
        while "return" not in (answer := self._read()):
            assert "error" not in answer, answer
        return answer["return"]

    def _read(self):
        answer = json.loads(self._lines.readline())
        if "event" in answer:
            stamp = answer["timestamp"]
            self.events.append((answer["event"], stamp["seconds"] + stamp["microseconds"] / 1e6))
        return answer

    def time_of(self, event):
        """When it happened, also if that is still to come."""
        while not (found := [at for name, at in self.events if name == event]):
            self._read()
        return found[0]

    def close(self):
        self._lines.close()
        self._sock.close()


def connects(sock, path):
    with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
        sock.connect(str(path))
        return True
    return False


class Qemus(contextlib.ExitStack):
    """A guest of QEMU's with QEMU's own device and an echo in it, that migrates from process to process."""

    def __init__(self, directory):
        super().__init__()
        self.directory = Path(directory)
        self._numbers = itertools.count()
        self.changed, self.answered = [], []
        """Milliseconds from RESUME to VSERPORT_CHANGE, and to the echoed byte."""

    def __enter__(self):
        self.tree = lab_tree()
        with contextlib.ExitStack() as stack:
            place = self._place()
            options = {"memory_mib": MEMORY_MIB, "device_args": self._device(place)}
            guest = stack.enter_context(Guest("qemu", tree=self.tree, **options))
            program = stack.enter_context(guest.popen(["python3", "-c", ECHO, NAME]))
            assert program.stdout.readline() == b"open\n", program.stderr.read()
            self.monitor = stack.enter_context(contextlib.closing(Monitor(place / "qmp")))
            self.host = self._connect(place)
            assert self._echoed(self.host)
            self._processes = stack.enter_context(contextlib.ExitStack())
            self.push(stack.pop_all())
        return self

    def _place(self):
        place = self.directory / str(next(self._numbers))
        place.mkdir()
        return place

    def _device(self, place):
        return [
            *("-qmp", f"unix:{place}/qmp,server=on,wait=off", "-device", "virtio-serial-pci"),
            *("-chardev", f"socket,id=host,path={place}/host,server=on,wait=off"),
            *("-device", f"virtserialport,id=port,chardev=host,name={NAME}"),
        ]

    def _connect(self, place):
        host = self.enter_context(socket.socket(socket.AF_UNIX))
        host.connect(str(place / "host"))
        host.settimeout(PATIENCE)
        return host

    def _echoed(self, host):
        host.sendall(b"?")
        return host.recv(1) == b"?"

    def migrate(self):
        """To a new process, where a host has said a byte already."""
        place = self._place()
        monitor = self._target(place)
        host = self._connect(place)
        host.sendall(b"!")
        self.monitor.ask("migrate-set-parameters", **{"max-bandwidth": 1 << 34})
        self.monitor.ask("migrate", uri=f"unix:{place}/move")
        assert host.recv(1) == b"!"
        answered = time.time()
        resumed = monitor.time_of("RESUME")
        self.changed.append((monitor.time_of("VSERPORT_CHANGE") - resumed) * 1e3)
        self.answered.append((answered - resumed) * 1e3)
        self.host.close()
        self.monitor = monitor
        self.host = host
        assert self._echoed(host)

    def _target(self, place):
        run = place / "run"
        run.mkdir()
        ours, guests = socket.socketpair()
        self._processes.enter_context(ours)
        with guests:
            arguments = [*self._device(place), "-incoming", f"unix:{place}/move"]
            machine = Machine(Tree(self.tree), run, MEMORY_MIB, guests.fileno(), None, None, 31, arguments)
            machine.prepare([])
            process = subprocess.Popen(
                tied_to_us(command_line(machine)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[guests.fileno()],
                start_new_session=True,
            )
        self._processes.callback(process.wait)
        self._processes.callback(process.kill)
        return self._processes.enter_context(contextlib.closing(Monitor(place / "qmp")))


class Travels(contextlib.ExitStack):
    """A simulated guest with an echo in it, that moves from process to process by vhost-user's device state.

    ``on_restore`` is what it is shown of a move; "resume", as with QEMU, is nothing.
    """

    def __init__(self, directory, on_restore):
        super().__init__()
        self.directory = Path(directory)
        self.name = f"org.test.0,on_restore={on_restore}"
        self._numbers = itertools.count()
        self.answered = []
        """Milliseconds from when the rings are about to be started to the echoed byte."""

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self._places = stack.enter_context(contextlib.ExitStack())
            self._guest = Traveller(self._place(self._places))
            stack.callback(self._guest.close)
            self.push(stack.pop_all())
        return self

    def _place(self, stack):
        place = Place(self.directory, next(self._numbers), self.name)
        stack.callback(place.process.kill)
        return place

    def migrate(self):
        """To a new process, where a host has said a byte already."""
        traveller = self._guest
        with contextlib.ExitStack() as stack:
            place = self._place(stack)
            host = place.host_comes()
            host.send(b"!")
            target = FrontEnd.connect(place.path)
            resumed = []
            resume = traveller.attachment.resume
            traveller.attachment.resume = lambda: (resumed.append(time.monotonic()), resume())
            move(traveller.guest, traveller.attachment, target)
            traveller.attachment.resume = resume
            before, traveller.front_end = traveller.front_end, target
            memory, traveller.memory = traveller.memory, traveller.attachment.guest_memory
            traveller.until(lambda: self._answers(host))
            self.answered.append((time.monotonic() - resumed[0]) * 1e3)
            before.close()
            memory.close()
            traveller.host.close()
            traveller.host = host
            self._places.close()
            self._places = self.enter_context(stack.pop_all())

    def _answers(self, host):
        """Whether the host has its byte back; the guest's program echoes what it reads."""
        with contextlib.suppress(BlockingIOError):
            self._guest.port.write(self._guest.port.read(1))
        with contextlib.suppress(BlockingIOError):
            return host.recv(1) == b"!"
        return False


@pytest.fixture
def times(benchmark):
    """How often to do a thing: as often as said, or twice where nothing is measured."""
    return lambda most: most if benchmark.enabled else 2


@pytest.fixture
def directory():
    """One whose name leaves room for a socket's."""
    with tempfile.TemporaryDirectory(prefix="vs-") as name:
        yield Path(name)


@pytest.mark.timeout(300)
def test_from_resume_to_the_first_answer(benchmark, directory, times):
    """A round is one migration of QEMU's, and then a move of each of ours."""
    with contextlib.ExitStack() as stack:

        def begin(kind, name, *arguments):
            (directory / name).mkdir()
            return stack.enter_context(kind(directory / name, *arguments))

        peer = begin(Qemus, "peer")
        kernels = {kind: begin(partial(Succession, kind), kind, "talk", 1) for kind in ("uml", "qemu")}
        travels = {how: begin(Travels, how, how) for how in ("resume", "auto")}

        def turn():
            peer.migrate()
            for _ in range(times(MOVES) // times(MIGRATIONS)):
                for ours in kernels.values():
                    ours.hand_over()
                for ours in travels.values():
                    ours.migrate()

        benchmark.pedantic(turn, rounds=times(MIGRATIONS))
    tell(benchmark, "QEMU, RESUME to VSERPORT_CHANGE", peer.changed)
    tell(benchmark, "QEMU, RESUME to the first answer", peer.answered)
    ours = {f"handover, {kind} guest": each.answered for kind, each in kernels.items()}
    ours |= {f"simulated guest, on_restore={how}": each.answered for how, each in travels.items()}
    for what, values in ours.items():
        tell(benchmark, what, values)
        ratio = statistics.median(values) / statistics.median(peer.answered)
        record(benchmark, Figure(what, ratio, "lower", "QEMU's live migration", goal=at_most(GOAL)))
    values = {"QEMU's live migration": peer.answered, **ours}
    record_distribution(benchmark, series="resume to the first answer", label="after a move (ms)", values=values)
