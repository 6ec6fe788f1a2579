"""A machine moves from process to process while its port is in use: no page is missed, no session runs into another."""

import contextlib
import random
import socket

import pytest
from daemons import PATIENCE
from front_end import VIRTIO_FEATURES, DaemonProcess, Refused

from vsport.loop import Loop
from vsport.move import FEW_PAGES, PASSES, move
from vsport.sim import SimulatedGuest
from vsport.vhost_user.frontend import PAGE, FrontEnd, GuestMemory, OverVhostUser

MOVES = 200
BYTES = 40_000
"""At least so many arrive on each side between two moves."""
SIZE = 4 << 20


class Place:
    """A host to be moved to: a back end in a process of its own."""

    def __init__(self, directory, number, name="org.test.0"):
        self.path, self.host_path = (str(directory / f"{kind}{number}.sock") for kind in ("vu", "host"))
        chardev = f"socket,id=c0,path={self.host_path},server=on,wait=off"
        self.process = DaemonProcess(self.path, chardev, f"virtserialport,chardev=c0,name={name}")

    def host_comes(self):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.host_path)
        sock.setblocking(False)
        return sock


class Flow:
    """The bytes of one session that go one way: what arrives has to be how that session, and no other, begins."""

    def __init__(self, seed):
        self._random = random.Random(seed)
        self._next = b""
        self.sent, self.received = bytearray(), bytearray()

    def send(self, write):
        self._next = self._next or self._random.randbytes(self._random.choice((1, 100, 5000, 60000)))
        with contextlib.suppress(BlockingIOError):
            count = write(self._next)
            self.sent += self._next[:count]
            self._next = self._next[count:]

    def receive(self, read):
        with contextlib.suppress(BlockingIOError):
            self.received += read(1 << 16)

    def check(self):
        assert self.sent.startswith(self.received)


class Traveller:
    """A machine whose port is open and in use, at one of several places."""

    def __init__(self, place):
        self.loop = Loop()
        self.memory = GuestMemory(((0, SIZE // 2), (1 << 30, SIZE // 2)))
        self.front_end = FrontEnd.connect(place.path)
        self.attachment = OverVhostUser(self.front_end, self.loop, self.memory)
        self.guest = SimulatedGuest(self.attachment, features=int(VIRTIO_FEATURES), queue_size=16)
        self.guest.boot()
        self.until(lambda: any(port.name for port in self.guest.ports.values()))
        self.port = self.guest.port("org.test.0")
        self.port.open()
        self.host = None
        self.sessions = 0
        self.random = random.Random(0)
        self.begin_session(place)

    def until(self, condition):
        def done():
            self.loop.run_once(0)
            self.guest.run()
            return condition()

        self.front_end.until(done)

    def begin_session(self, place):
        """A program of the host's comes; guest and host have seen the end of the session before."""
        self.host = place.host_comes()
        self.until(lambda: self.port.host_connected)
        self.sessions += 1
        self.up, self.down = Flow(self.sessions), Flow(-self.sessions)

    def work(self):
        """Some bytes each way, as both sides have room."""
        self.loop.run_once(0)
        self.guest.run()
        for _ in range(4):
            self.up.send(self.port.write)
            self.down.send(self.host.send)
            self.up.receive(self.host.recv)
            self.down.receive(self.port.read)

    def work_meanwhile(self):
        """Between two passes: little or much, so that there are few and many of them."""
        for _ in range(self.random.choice((1, 20))):
            self.work()

    def work_until_much_has_arrived(self):
        up, down = (len(flow.received) + BYTES for flow in (self.up, self.down))

        def done():
            self.work()
            return len(self.up.received) >= up and len(self.down.received) >= down

        self.front_end.until(done)

    def move_to(self, place):
        """Both ends of the old session hear its end, and have read it to that."""
        target = FrontEnd.connect(place.path)
        compared = []
        try:
            report = move(
                self.guest,
                self.attachment,
                target,
                work=self.work_meanwhile,
                stopped=lambda *memories: compared.append(differing_pages(*memories)),
            )
        except BaseException:
            target.close()
            raise
        assert compared == [[]]
        self.front_end.close()
        self.memory.close()
        self.front_end, self.memory = target, self.attachment.guest_memory
        self.until(lambda: not self.port.host_connected)
        while data := self.port.read():
            self.down.received += data
        self.read_to_the_end()
        self.up.check()
        self.down.check()
        self.begin_session(place)
        return report

    def read_to_the_end(self):
        """What the old host program still finds in its socket."""
        with self.host, contextlib.suppress(BlockingIOError, ConnectionResetError):
            while data := self.host.recv(1 << 20):
                self.up.received += data

    def close(self):
        self.host.close()
        self.attachment.close()
        self.front_end.close()
        self.memory.close()
        self.loop.close()


def differing_pages(one, other):
    if all(one.memory.read(r.gpa, r.size) == other.memory.read(r.gpa, r.size) for r in one.wire):
        return []
    return [hex(gpa) for gpa in one.pages() if one.memory.read(gpa, PAGE) != other.memory.read(gpa, PAGE)]


@pytest.fixture
def places(tmp_path):
    with contextlib.ExitStack() as stack:

        def make(*args, **options):
            place = Place(tmp_path, *args, **options)
            stack.callback(place.process.kill)
            return place

        yield make


@pytest.fixture
def home(places):
    return places(0)


@pytest.fixture
def traveller(home):
    traveller = Traveller(home)
    yield traveller
    traveller.close()


def test_it_moves_to_and_fro_under_load(places, home, traveller):
    """R-VU-80, R-VU-81, R-VU-91, R-MIG-23: each time its memory is the same there, and each session by itself."""
    here, there = home, places(1)
    passes = set()
    for _ in range(MOVES):
        report = traveller.move_to(there)
        traveller.work_until_much_has_arrived()
        passes.add(len(report.passes))
        assert report.passes[0] == SIZE // PAGE
        here, there = there, here
    assert min(passes) == 2
    assert 3 < max(passes) <= PASSES + 1
    assert traveller.port.host_history == [True, *[False, True] * MOVES]


def test_the_report_says_when_each_port_was_of_use_again(places, traveller):
    report = traveller.move_to(places(1))
    (id,) = report.ports
    traveller.work_until_much_has_arrived()
    report.answered(id)
    times = report.ports[id]
    assert 0 < times.told <= report.downtime < times.answered < PATIENCE


def test_few_pages_are_left_for_the_stop_of_an_idle_machine(places, traveller):
    traveller.work = lambda: None
    report = traveller.move_to(places(1))
    assert report.passes[-1] <= FEW_PAGES
    assert len(report.passes) < PASSES


def test_a_move_that_is_refused_costs_nothing(places, traveller):
    """R-VU-38, R-VU-91: the guest goes on where it was, in the same session, and can be moved elsewhere."""
    with pytest.raises(Refused, match="R-VU-38"):
        traveller.move_to(places(1, name="org.another.0"))
    traveller.work_until_much_has_arrived()
    assert traveller.port.host_history == [True]
    traveller.up.check()
    traveller.down.check()
    traveller.move_to(places(2))
    traveller.work_until_much_has_arrived()
    assert traveller.port.host_history == [True, False, True]


def test_a_move_that_is_given_up_while_the_guest_runs_costs_nothing(places, traveller):
    """And nothing is logged any more."""
    work, traveller.work = traveller.work, interrupted
    with pytest.raises(KeyboardInterrupt):
        traveller.move_to(places(1))
    traveller.work = work
    assert traveller.front_end.log is None
    traveller.work_until_much_has_arrived()
    assert traveller.port.host_history == [True]


def interrupted():
    raise KeyboardInterrupt
