"""Chains in flight are known to the device that comes after a crash: none is lost (R-VU-85 to R-VU-89)."""

from __future__ import annotations

import mmap
import os
import random
import signal
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule
from raw_ring import FLIGHT_ENTRY, FLIGHT_HEAD, USED, WRITE, RawFlight, RawRing
from test_ring_model import QueueModel, Receive, Transmit

from vsport._ring import DeviceQueue, DriverQueue, Inflight, Memory, Region, Status
from vsport.errors import FrontEndError

# -- the region --------------------------------------------------------------------------------------------------------


def test_r_vu_85_86_the_size_of_a_region() -> None:
    assert (FLIGHT_HEAD.size, FLIGHT_ENTRY.size) == (16, 16)
    assert [Inflight.footprint(size) for size in (1, 2, 4, 8, 128, 32768)] == [64, 64, 128, 192, 2112, 524352]


@pytest.mark.parametrize(
    ("offset", "desc_num", "rule"),
    [
        (0, 0, "R-VU-85"),
        (0, -1, "R-VU-85"),
        (0, 32769, "R-VU-85"),
        (64, 8, "R-VU-86"),
        (0, 16, "R-VU-86"),
        (-64, 1, "R-VU-86"),
        (1 << 64, 1, "R-VU-86"),
        (4, 1, "R-VU-86"),
    ],
)
def test_r_vu_86_a_region_that_does_not_fit_is_refused(offset: int, desc_num: int, rule: str) -> None:
    with pytest.raises(FrontEndError) as caught:
        Inflight(bytearray(Inflight.footprint(8)), offset, desc_num)
    assert caught.value.rule == rule


def test_a_region_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(BufferError, match="writable"):
        Inflight(bytes(64), 0, 1)


def test_the_region_is_free_when_no_queue_has_it() -> None:
    mapping = mmap.mmap(-1, 4096)
    queue = DeviceQueue(0)
    queue.inflight = region = Inflight(mapping, 64, 8)
    assert (queue.inflight, region.desc_num) == (region, 8)
    del region
    with pytest.raises(BufferError):
        mapping.close()
    queue.inflight = None
    mapping.close()


# -- what is written while the device works (R-VU-87) ------------------------------------------------------------------


class FlightRing:
    """A raw ring of eight, its region, and the queue with both."""

    def __init__(self, base: int = 0) -> None:
        self.raw = RawRing(8, base=base, start=False)
        self.flight = RawFlight(8)
        self.queue = self.raw.queue
        self.queue.inflight = self.flight.region

    def offer(self, *heads: int, flags: int = 0, size: int = 4) -> None:
        for head in heads:
            self.raw.put(head, self.raw.data + 16 * head, size, flags)
        self.raw.offer(*heads)

    def start(self, **options: bool) -> None:
        self.raw.start(**options)

    def crash(self) -> None:
        """Another process, which knows nothing but what it is given, and not where the queue was."""
        self.queue = self.raw.queue = DeviceQueue(5)
        self.queue.inflight = Inflight(self.flight.memory, 0, 8)

    def used_idx(self) -> int:
        return self.raw.read16(self.raw.used + 2)


@pytest.fixture
def ring() -> FlightRing:
    ring = FlightRing()
    ring.start()
    return ring


def test_r_vu_85_a_fresh_region_is_made_ready_and_the_queue_starts_at_its_base() -> None:
    ring = FlightRing(base=65530)
    ring.flight.memory[16:] = os.urandom(len(ring.flight.memory) - 16)
    ring.flight.put_head(features=5, version=0, desc_num=9, last=7, used_idx=3)
    assert ring.flight.region.fresh
    ring.start()
    assert ring.flight.head == (0, 1, 8, 0, 65530)
    assert ring.flight.in_flight() == []
    assert not RawFlight(8, ring.flight.memory).region.fresh
    assert ring.queue.next_avail == 65530


def test_r_vu_87_a_chain_is_in_flight_while_its_bytes_are_taken(ring: FlightRing) -> None:
    seen: list[tuple[list[int], int]] = []

    def sink(view: memoryview) -> int:
        seen.append((ring.flight.in_flight(), ring.flight.head[4]))
        return len(view)

    ring.offer(3, 1)
    assert ring.queue.drain_into(sink) is Status.EMPTY
    assert seen == [([3], 0), ([1], 1)]
    assert (ring.flight.in_flight(), ring.flight.head) == ([], (0, 1, 8, 1, 2))
    assert [ring.flight.entry(head)[2] for head in (3, 1)] == [0, 1], "each has its number"


def test_r_vu_87_a_batch_is_a_list_from_its_last_chain_on(ring: FlightRing) -> None:
    ring.offer(6, 2, 5)
    assert ring.queue.discard() == 12
    assert ring.flight.last_batch(3) == [5, 2, 6]
    ring.offer(0, 2)
    assert ring.queue.discard() == 8
    assert ring.flight.last_batch(2) == [2, 0]
    assert (ring.flight.in_flight(), ring.flight.head) == ([], (0, 1, 8, 2, 5))


def test_r_vu_87_a_half_consumed_chain_is_in_flight_until_its_end(ring: FlightRing) -> None:
    ring.offer(4, 2)
    host = os.memfd_create("host")
    assert ring.queue.drain(host, budget=6) is Status.MORE
    assert (ring.flight.in_flight(), ring.flight.head[4]) == ([2], 1)
    assert ring.queue.drain(host, budget=1) is Status.MORE
    assert ring.flight.entry(2) == (1, 0, 1), "it keeps its number"
    assert ring.queue.drain(host) is Status.EMPTY
    assert ring.flight.in_flight() == []
    os.close(host)


def test_r_vu_87_a_buffer_is_in_flight_before_a_byte_is_written_to_it(ring: FlightRing) -> None:
    read_fd, write_fd = os.pipe2(os.O_NONBLOCK)
    ring.offer(4, 2, flags=WRITE)
    assert ring.queue.fill(read_fd) is Status.BLOCKED
    assert ring.flight.in_flight() == [4], "no more than were needed (R-VU-89)"
    os.write(write_fd, b"abcd")
    assert ring.queue.fill(read_fd) is not Status.EMPTY
    assert ring.raw.used_elements() == [(4, 4)]
    assert 4 not in ring.flight.in_flight()
    os.close(read_fd)
    os.close(write_fd)


OPERATIONS: dict[str, Callable[[DeviceQueue], object]] = {
    "discard": lambda queue: queue.discard(),
    "drain_into": lambda queue: queue.drain_into(len),
    "pop": lambda queue: [queue.pop() for _ in range(3)],
    "push": lambda queue: [queue.push(bytes(4)) for _ in range(3)],
    "fill_from": lambda queue: queue.fill_from(bytes(12)),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_r_vu_87_whatever_completes_a_chain_says_so(ring: FlightRing, operation: str) -> None:
    ring.offer(7, 0, 3, flags=WRITE if operation in ("push", "fill_from") else 0)
    OPERATIONS[operation](ring.queue)
    assert [head for head, _ in ring.raw.used_elements()] == [7, 0, 3]
    assert (ring.flight.in_flight(), ring.flight.head) == ([], (0, 1, 8, 3, 3))


def test_a_returned_partial_chain_is_not_in_flight(ring: FlightRing) -> None:
    ring.offer(4, 2)
    assert ring.queue.drain_into(len, budget=1) is Status.MORE
    assert ring.flight.in_flight() == [4]
    assert ring.queue.return_partial() == 3
    assert ring.flight.in_flight() == []


# -- starting again (R-VU-88) ------------------------------------------------------------------------------------------


def crashes(base: int) -> Iterator[tuple[FlightRing, int]]:
    """A ring as a crash leaves it after each single write of a device that begins four chains and completes three.

    Beside it, how many chains are begun. There was another batch before, whose chains stand in the list, too.
    """
    heads = (5, 2, 7, 0)
    begins = [(place, part) for place in range(4) for part in ("counter", "inflight")]
    lists = [(place, part) for place in range(3) for part in ("element", "next", "last")]
    clears = [(place, "clear") for place in range(3)]
    writes = [*begins, *lists, (3, "used.idx"), *clears, (3, "used_idx")]
    for count in range(len(writes) + 1):
        ring = FlightRing(base)
        ring.flight.put_head(last=2, used_idx=base)
        ring.flight.put_entry(2, next=7, counter=88)
        ring.flight.put_entry(7, next=2, counter=87)
        ring.offer(*heads, 6)
        for place, part in writes[:count]:
            write(ring, place, heads[place], part)
        yield ring, sum(part == "inflight" for _, part in writes[:count])


def write(ring: FlightRing, place: int, head: int, part: str) -> None:
    """One of a device's writes, to the region or to the used ring."""
    flight, raw = ring.flight, ring.raw
    inflight, following, counter = flight.entry(head)
    last, used_idx = flight.head[3:]
    match part:
        case "counter":
            flight.put_entry(head, inflight=inflight, next=following, counter=90 + place)
        case "inflight":
            flight.put_entry(head, inflight=1, next=following, counter=counter)
        case "element":
            raw.memory.write(raw.used + 4 + 8 * ((raw.base + place) % 8), USED.pack(head, 0))
        case "next":
            flight.put_entry(head, inflight=inflight, next=last, counter=counter)
        case "last":
            flight.put_head(last=head, used_idx=used_idx)
        case "used.idx":
            raw.write16(raw.used + 2, raw.base + place)
        case "clear":
            flight.put_entry(head, inflight=0, next=following, counter=counter)
        case "used_idx":
            flight.put_head(last=last, used_idx=raw.base + place)


@pytest.mark.parametrize("base", [0, 65533])
def test_r_vu_88_a_crash_after_any_write_loses_no_chain_and_returns_none_twice(base: int) -> None:
    heads = [5, 2, 7, 0, 6]
    for ring, begun in crashes(base):
        used = len(ring.raw.used_elements())
        ring.raw.base = 4711
        ring.start()
        assert ring.queue.next_avail == ring.used_idx() == (base + used) & 0xFFFF, "whatever base the front end says"
        assert ring.flight.in_flight() == heads[used:begun]
        assert ring.flight.head[4] == ring.used_idx()
        assert ring.queue.discard() == 4 * (5 - used)
        ring.raw.base = base
        assert [head for head, _ in ring.raw.used_elements()] == heads
        assert (ring.flight.in_flight(), ring.flight.head) == ([], (0, 1, 8, 6, (base + 5) & 0xFFFF))
        assert all(ring.flight.entry(head)[2] < 95 for head in heads)


def test_r_vu_88_a_chain_that_was_begun_is_repeated_after_a_crash(ring: FlightRing) -> None:
    ring.raw.memory.write(ring.raw.data, bytes(range(64)))
    ring.offer(0, 1, 2)
    host = os.memfd_create("host")
    ring.queue.drain(host, budget=6)
    ring.crash()
    ring.start(reset=False)
    assert (ring.queue.next_avail, ring.queue.offset) == (1, 0)
    assert ring.queue.drain(host) is Status.EMPTY
    assert os.pread(host, 100, 0) == bytes([0, 1, 2, 3, 16, 17, 16, 17, 18, 19, 32, 33, 34, 35])
    assert ring.raw.used_elements() == [(0, 0), (1, 0), (2, 0)]
    os.close(host)


def test_r_vu_89_a_pause_repeats_nothing(ring: FlightRing) -> None:
    ring.offer(0, 1)
    assert ring.queue.drain_into(len, budget=1) is Status.MORE
    before = bytes(ring.flight.memory)
    assert ring.queue.stop() == 0
    ring.start(reset=False)
    assert (ring.queue.offset, ring.flight.in_flight()) == (1, [0])
    assert bytes(ring.flight.memory) == before


def test_r_vu_89_whoever_knows_the_offset_repeats_nothing_either(ring: FlightRing) -> None:
    """A handover: another process, but not after a crash."""
    ring.raw.memory.write(ring.raw.data, b"abcd")
    ring.offer(0)
    host = os.memfd_create("host")
    ring.queue.drain(host, budget=3)
    where = ring.queue.stop(), ring.queue.offset
    ring.crash()
    ring.queue.restore(*where)
    ring.start(reset=False)
    assert ring.queue.drain(host) is Status.EMPTY
    assert os.pread(host, 100, 0) == b"abcd"
    os.close(host)


def test_r_vu_88_new_chains_are_numbered_after_those_that_were_found() -> None:
    ring = FlightRing()
    ring.offer(4, 3, 2)
    ring.flight.put_head()
    ring.flight.put_entry(4, inflight=1, counter=1000)
    ring.flight.put_entry(3, inflight=1, counter=1003)
    ring.start()
    assert ring.queue.discard() == 12
    assert [ring.flight.entry(head)[2] for head in (4, 3, 2)] == [1000, 1003, 1004]


# -- regions that cannot be true ---------------------------------------------------------------------------------------


def next_ones(*heads: int, counters: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8), value: int = 1) -> Callable[..., None]:
    """These heads in flight."""

    def spoil(ring: FlightRing) -> None:
        ring.flight.put_head()
        for head, counter in zip(heads, counters, strict=False):
            ring.flight.put_entry(head, inflight=value, counter=counter)

    return spoil


def batch(count: int, last: int, **following: int) -> Callable[[FlightRing], None]:
    """A last batch of ``count`` chains, from ``last`` on; ``following``: which head leads to which."""

    def spoil(ring: FlightRing) -> None:
        ring.flight.put_head(last=last, used_idx=-count)
        for head, leads_to in following.items():
            ring.flight.put_entry(int(head[1:]), next=leads_to)

    return spoil


REFUSED: dict[str, tuple[str, Callable[[FlightRing], None]]] = {
    "version 2": ("R-VU-85", lambda ring: ring.flight.put_head(version=2)),
    "version 256": ("R-VU-85", lambda ring: ring.flight.put_head(version=256)),
    "features": ("R-VU-85", lambda ring: ring.flight.put_head(features=1)),
    "another size": ("R-VU-85", lambda ring: ring.flight.put_head(desc_num=4)),
    "no size": ("R-VU-85", lambda ring: ring.flight.put_head(desc_num=0)),
    "a flag of 2": ("R-VU-88", next_ones(5, value=2)),
    "a flag of 255": ("R-VU-88", next_ones(5, value=255)),
    "in flight and not offered": ("R-VU-88", next_ones(5, 2, 7, 0, counters=(1, 2, 3, 4))),
    "in flight and not next": ("R-VU-88", next_ones(2)),
    "in flight and somewhere else": ("R-VU-88", next_ones(1)),
    "in a wrong order": ("R-VU-88", next_ones(2, 5)),
    "twice the same number": ("R-VU-88", next_ones(5, 2, counters=(1, 1))),
    "no number left": ("R-VU-88", next_ones(5, counters=((1 << 64) - 1,))),
    "a last head beyond the table": ("R-VU-88", batch(1, 8)),
    "a last head far beyond": ("R-VU-88", batch(1, 65535)),
    "a list that leaves the table": ("R-VU-88", batch(3, 4, _4=1, _1=8)),
    "a list with a loop of one": ("R-VU-88", batch(2, 4, _4=4)),
    "a list with a loop of two": ("R-VU-88", batch(3, 4, _4=1, _1=4)),
    "a batch of more than all": ("R-VU-88", batch(9, 0, _0=1, _1=2, _2=3, _3=4, _4=5, _5=6, _6=7, _7=0)),
    "an index ahead of the ring's": ("R-VU-88", batch(-1, 0)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_r_vu_88_a_region_that_contradicts_the_ring_is_refused_as_it_is(name: str) -> None:
    rule, spoil = REFUSED[name]
    ring = FlightRing()
    ring.offer(5, 2, 7)
    spoil(ring)
    before = bytes(ring.flight.memory), ring.raw.image(), ring.raw.used_elements()
    with pytest.raises(FrontEndError) as caught:
        ring.start()
    assert (caught.value.rule, caught.value.context["queue"]) == (rule, 5)
    assert (bytes(ring.flight.memory), ring.raw.image(), ring.raw.used_elements()) == before
    assert not ring.queue.running
    assert ring.queue.drain_into(len) is Status.STOPPED
    assert not ring.queue.notify()
    ring.queue.inflight = RawFlight(8).region
    ring.start()
    assert ring.queue.discard() == 12


@pytest.mark.parametrize("version", [0, 1])
def test_r_vu_85_a_region_for_a_queue_of_another_size_is_refused(version: int) -> None:
    ring = FlightRing()
    flight = RawFlight(16)
    flight.put_head(version=version)
    ring.queue.inflight = flight.region
    with pytest.raises(FrontEndError, match="R-VU-85: an in-flight region for a queue of another size"):
        ring.start()
    assert not ring.queue.running


def test_r_ring_71_a_head_beyond_the_table_is_no_chain_in_flight() -> None:
    """The driver has changed the available ring under the device that crashed."""
    ring = FlightRing()
    ring.offer(5)
    ring.raw.offer(9)
    next_ones(5, 2)(ring)
    with pytest.raises(FrontEndError, match="R-VU-88"):
        ring.start()


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=144, max_size=144), st.integers(0, 3), st.booleans())
def test_no_region_does_more_than_be_refused(content: bytes, offered: int, plausible: bool) -> None:
    ring = FlightRing()
    ring.offer(*(5, 2, 7)[:offered])
    ring.flight.memory[:144] = content
    if plausible:
        ring.flight.put_head(last=content[0] % 9, used_idx=-(content[1] % 4))
    try:
        ring.start()
        assert ring.queue.next_avail == 0
        assert ring.queue.discard() == 4 * offered
    except FrontEndError as exc:
        assert exc.rule in ("R-VU-85", "R-VU-88")


def test_r_vu_88_other_marks_appear_while_the_queue_runs_and_harm_nobody(ring: FlightRing) -> None:
    """The front end writes to the region that it has given away."""
    chance = random.Random(88)
    for _ in range(1000):
        ring.flight.memory[:] = chance.randbytes(len(ring.flight.memory))
        ring.offer(3, 1)
        assert ring.queue.discard() == 8
    assert ring.queue.next_avail == 2000


def test_a_driver_that_swaps_its_chains_harms_only_its_own_region(ring: FlightRing) -> None:
    """The mark is at the head that the driver took back, so the next device cannot trust the region."""
    ring.offer(4)
    ring.queue.drain_into(lambda view: 0)
    ring.offer(1)
    ring.raw.write16(ring.raw.avail + 4, 3)
    ring.raw.put(3, ring.raw.data, 4)
    assert ring.queue.discard() == 8
    assert ring.raw.used_elements() == [(3, 0), (1, 0)]
    ring.crash()
    with pytest.raises(FrontEndError, match="R-VU-88: more chains are in flight than are offered"):
        ring.start()


# -- setting it --------------------------------------------------------------------------------------------------------


def test_the_region_is_set_while_the_queue_is_stopped(ring: FlightRing) -> None:
    with pytest.raises(ValueError, match="running"):
        ring.queue.inflight = None
    ring.queue.stop()
    ring.queue.inflight = None
    before = bytes(ring.flight.memory)
    ring.start()
    ring.offer(1)
    ring.queue.discard()
    assert bytes(ring.flight.memory) == before
    with pytest.raises(TypeError):
        ring.queue.inflight = bytearray(192)  # type: ignore[assignment]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_r_ring_82_a_region_that_is_gone_stops_the_queue(operation: str) -> None:
    ring = FlightRing()
    file = os.memfd_create("inflight")
    os.ftruncate(file, 4096)
    ring.queue.inflight = Inflight(mmap.mmap(file, 4096), 0, 8)
    ring.start()
    os.ftruncate(file, 0)
    ring.offer(1, flags=WRITE if operation in ("push", "fill_from") else 0)
    with pytest.raises(FrontEndError, match="R-RING-82: the file behind the in-flight region was truncated"):
        OPERATIONS[operation](ring.queue)
    assert not ring.queue.running
    with pytest.raises(FrontEndError, match="R-RING-82"):
        ring.start()
    assert not ring.queue.running
    os.close(file)


def test_r_ring_82_a_region_that_is_gone_before_the_start() -> None:
    ring = FlightRing()
    file = os.memfd_create("inflight")
    os.ftruncate(file, 4096)
    ring.queue.inflight = Inflight(mmap.mmap(file, 4096), 0, 8)
    os.ftruncate(file, 0)
    with pytest.raises(FrontEndError, match="R-RING-82: the file behind the in-flight region was truncated"):
        ring.start()
    assert not ring.queue.running
    os.close(file)


# -- any work of a device, with a crash between any two operations -----------------------------------------------------


class Crashing(QueueModel):
    """A device of which nothing is left now and then but its region."""

    PACKED = st.just(False)  # R-VU-90

    def make_device(self) -> DeviceQueue:
        assume(not self.packed)  # R-VU-90
        if not hasattr(self, "flight"):
            self.flight = RawFlight(self.size)
        device = DeviceQueue(0)
        device.inflight = self.flight.region
        return device

    @rule(base=st.integers(0, 65535), reset=st.booleans())
    def crash(self, base: int, reset: bool) -> None:
        self.chains_before = len(self.used)
        self.device = self.make_device()
        self.start(base, reset=reset)
        self.offset = 0
        self.device_sleeps = False

    @invariant()
    def the_region_knows_what_was_begun(self) -> None:
        """The chains in flight are the next ones, in their order; whatever bytes have moved, moved of these."""
        heads = self.flight.in_flight()
        assert heads == [chain.head for chain in self.offered][: len(heads)]
        assert heads or not self.device.offset
        assert self.flight.head[4] == self.device.used_idx


class CrashingTransmit(Crashing, Transmit):
    pass


class CrashingReceive(Crashing, Receive):
    pass


for machine in (CrashingTransmit, CrashingReceive):
    machine.TestCase.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)

TestCrashingTransmit = CrashingTransmit.TestCase
TestCrashingReceive = CrashingReceive.TestCase


# -- a device that is killed, at whatever instruction ------------------------------------------------------------------

NUMBER = struct.Struct("<Q")
SIZE = 64
DATA = 1 << 16


@dataclass
class Killed:
    """A driver that sends numbers, and a device in a process that is killed again and again."""

    memory: Memory = field(default_factory=lambda: Memory([Region(0, 1 << 17, 0, mmap.mmap(-1, 1 << 17), 0)]))
    flight: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, Inflight.footprint(SIZE)))
    sent: int = 0
    collected: int = 0

    def __post_init__(self) -> None:
        self.driver = DriverQueue(self.memory, 0, SIZE)
        self.read_fd, self.write_fd = os.pipe2(os.O_NONBLOCK)
        self.heads: list[int] = []

    def be_device(self) -> None:
        queue, driver = DeviceQueue(0), self.driver
        queue.inflight = Inflight(self.flight, 0, SIZE)
        queue.start(self.memory, SIZE, driver.desc, driver.avail, driver.used)
        while True:
            queue.drain(self.write_fd)

    def drive(self) -> None:
        """Offers as many numbers as there is room for, and takes back what was used, in order and once."""
        while self.driver.free:
            gpa = DATA + NUMBER.size * (self.sent % SIZE)
            self.memory.write(gpa, NUMBER.pack(self.sent))
            self.heads.append(self.driver.add([(gpa, NUMBER.size)]))
            self.sent += 1
        self.driver.publish()
        while (used := self.driver.collect()) is not None:
            assert used == (self.heads[self.collected], 0)
            self.collected += 1

    def read(self) -> bytes:
        try:
            return os.read(self.read_fd, 1 << 16)
        except BlockingIOError:
            return b""

    def life(self, chance: random.Random) -> list[int]:
        """The numbers that one device process let out before it was killed."""
        device = os.fork()
        if device == 0:
            try:
                self.be_device()
            finally:
                os._exit(1)
        data, enough = b"", chance.randrange(1, 2000) * NUMBER.size
        while len(data) < enough:
            assert os.waitpid(device, os.WNOHANG) == (0, 0), "it ended by itself"
            self.drive()
            data += self.read()
        os.kill(device, signal.SIGKILL)
        os.waitpid(device, 0)
        while more := self.read():
            data += more
        return [number for (number,) in NUMBER.iter_unpack(data)]

    def completed(self) -> int:
        """How many chains all devices together have completed."""
        used_idx = int.from_bytes(self.memory.read(self.driver.used + 2, 2), "little")
        return self.collected + ((used_idx - self.collected) & 0xFFFF)

    def close(self) -> None:
        os.close(self.read_fd)
        os.close(self.write_fd)


def test_r_vu_88_89_a_device_that_is_killed_loses_nothing_and_repeats_what_it_had_begun() -> None:
    world, chance = Killed(), random.Random(88)
    expected = repeated = 0
    for _ in range(60):
        first = world.completed()
        numbers = world.life(chance)
        assert numbers == list(range(first, first + len(numbers))), "in order, from the first that was not used on"
        assert first <= expected <= first + SIZE, "no more than a ring's worth is repeated, and nothing is left out"
        repeated += expected - first
        expected = numbers[-1] + 1
    world.drive()
    assert world.collected == world.completed() <= expected
    world.close()
