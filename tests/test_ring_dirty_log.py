"""The dirty log: every page that the device has written to is marked, after it was, and no other (R-VU-80, R-VU-81)."""

from __future__ import annotations

import mmap
import os
import signal
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_ring import HALF, NEXT, TOP, WRITE, RawRing
from test_ring_model import RAM, Chain, QueueModel, Receive, Transmit

from vsport._ring import DeviceQueue, DirtyLog, DriverQueue, Memory, Region, Status
from vsport.errors import FrontEndError

PAGE = 4096


def pages(gpa: int, size: int) -> set[int]:
    """The pages of a range, which may be empty."""
    return set(range(gpa // PAGE, (gpa + size - 1) // PAGE + 1)) if size else set()


def marked(bitmap: bytes) -> set[int]:
    """The pages whose bits are set: bit p % 8 of byte p // 8."""
    return {8 * at + bit for at, byte in enumerate(bitmap) if byte for bit in range(8) if byte >> bit & 1}


# -- the bitmap --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1, 13])
def test_r_vu_80_the_bit_of_a_page_is_where_the_front_end_looks_for_it(offset: int) -> None:
    buffer = bytearray(32)
    log = DirtyLog(buffer, offset, 8)
    assert log.size == 8
    log.mark(9 * PAGE + 5, 1)
    assert buffer[offset + 1] == 0b10
    log.mark(10 * PAGE - 1, 2)
    assert buffer[offset + 1] == 0b110, "what was marked stays"
    assert log.take() == bytes([0, 0b110, 0, 0, 0, 0, 0, 0])
    assert buffer == bytes(32), "what was taken is gone"


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.integers(0, 100 * PAGE), st.integers((1 << 64) - 3 * PAGE, (1 << 64) - 1)),
            st.one_of(st.integers(0, 70 * PAGE), st.sampled_from([1 << 32, (1 << 64) - 1])),
        ),
        max_size=4,
    ),
    st.integers(0, 9),
)
def test_r_vu_81_any_range_is_marked_as_far_as_the_log_goes(ranges: list[tuple[int, int]], size: int) -> None:
    buffer = bytearray(b"\xa5" * 16)
    buffer[3 : 3 + size] = bytes(size)
    log = DirtyLog(buffer, 3, size)
    for gpa, length in ranges:
        log.mark(gpa, length)
    spans = [(gpa // PAGE, (gpa + length - 1) // PAGE) for gpa, length in ranges if length]
    expected = {page for page in range(8 * size) if any(first <= page <= last for first, last in spans)}
    assert marked(bytes(buffer[3 : 3 + size])) == expected
    assert buffer[:3] + buffer[3 + size :] == b"\xa5" * (16 - size), "nothing beside the log is touched"


@pytest.mark.parametrize(("offset", "size"), [(0, 17), (16, 1), (17, 0), (-1, 4), (0, -1), (1 << 64, 1), (0, 1 << 64)])
def test_r_vu_81_a_log_beyond_its_file_is_refused(offset: int, size: int) -> None:
    with pytest.raises(FrontEndError, match="R-VU-81: a dirty log reaches beyond its file"):
        DirtyLog(bytearray(16), offset, size)


def test_a_log_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(BufferError, match="writable"):
        DirtyLog(bytes(16), 0, 16)


@pytest.mark.parametrize(("gpa", "length"), [(-1, 1), (0, -1), (1 << 64, 1)])
def test_a_range_that_no_memory_has_is_a_mistake_of_the_caller(gpa: int, length: int) -> None:
    log = DirtyLog(bytearray(1), 0, 1)
    with pytest.raises(OverflowError):
        log.mark(gpa, length)
    assert log.take() == b"\0"


def test_the_log_is_free_when_nobody_uses_it() -> None:
    mapping = mmap.mmap(-1, PAGE)
    queue = DeviceQueue(0)
    queue.log_to(DirtyLog(mapping, 0, 8))
    with pytest.raises(BufferError):
        mapping.close()
    queue.log_to(None)
    mapping.close()


# -- what is marked ----------------------------------------------------------------------------------------------------

LOGGED_AT = 0x300000
"""Where the log has the used ring, which is elsewhere in guest memory."""


class LoggedRing:
    """A large raw ring, whose used ring has elements on five pages, and its log."""

    SIZE = 2048

    def __init__(self, *, event_idx: bool = False, used_gpa: int = LOGGED_AT) -> None:
        self.raw = RawRing(self.SIZE, event_idx=event_idx)
        self.log = DirtyLog(bytearray(256), 0, 256)
        self.raw.queue.log_to(self.log, used_gpa)

    def offer(self, *sizes: int) -> None:
        """Writable chains, one page apart."""
        for number, size in enumerate(sizes):
            self.raw.put(number, self.raw.data + PAGE * number, size, WRITE)
        self.raw.offer(*range(len(sizes)))

    def marks(self) -> set[int]:
        return marked(self.log.take())

    def used(self, offset: int, size: int) -> set[int]:
        return pages(LOGGED_AT + offset, size)


def test_r_vu_81_data_is_marked_and_the_used_element_and_the_index() -> None:
    ring = LoggedRing()
    ring.offer(10, 20)
    assert ring.raw.queue.fill_from(b"x" * 10) == 10
    assert ring.marks() == pages(ring.raw.data, 10) | ring.used(0, 16)
    assert ring.raw.queue.push(b"y" * 20)
    assert ring.marks() == pages(ring.raw.data + PAGE, 20) | ring.used(0, 16)


def test_r_vu_80_only_bytes_that_were_written_are_marked() -> None:
    """A chain of three pages gets one byte more than one page."""
    ring = LoggedRing()
    ring.offer(3 * PAGE)
    assert ring.raw.queue.fill_from(b"x" * (PAGE + 1)) == PAGE + 1
    assert ring.marks() == pages(ring.raw.data, 2 * PAGE) | ring.used(0, 16)


def test_r_ring_76_a_buffer_across_regions_is_marked_in_both() -> None:
    ring = LoggedRing()
    border = ring.raw.data + HALF
    ring.raw.put(0, border - 3, PAGE + 4, WRITE)
    ring.raw.offer(0)
    assert ring.raw.queue.fill_from(b"x" * (PAGE + 4)) == PAGE + 4
    assert ring.marks() == {border // PAGE - 1, border // PAGE, border // PAGE + 1} | ring.used(0, 12)


def test_bytes_that_are_skipped_are_not_marked() -> None:
    ring = LoggedRing()
    ring.offer(3 * PAGE)
    ring.raw.queue.stop()
    ring.raw.queue.restore(0, PAGE + 5)
    ring.raw.start(reset=False)
    ring.marks()
    assert ring.raw.queue.fill_from(b"xy") == 2
    assert ring.raw.memory.read(ring.raw.data + PAGE + 5, 2) == b"xy"
    assert ring.marks() == pages(ring.raw.data + PAGE, 7) | ring.used(0, 12)


def test_r_vu_81_each_used_element_is_marked_where_it_is() -> None:
    ring = LoggedRing()
    for number in range(ring.SIZE):
        ring.raw.offer(number)
        ring.raw.queue.discard()
        assert ring.marks() == ring.used(2, 2) | ring.used(4 + 8 * number, 8), number
    ring.raw.offer(*range(2000))
    ring.raw.queue.discard()
    ring.marks()
    ring.raw.offer(*range(48 + 600))
    ring.raw.queue.discard()
    assert ring.marks() == ring.used(0, 4 + 8 * 600) | ring.used(4 + 8 * 2000, 8 * 48), "across the ring's end"


def test_r_vu_81_the_words_for_the_driver_are_marked() -> None:
    for event_idx, word in ((False, 0), (True, 4 + 8 * LoggedRing.SIZE)):
        ring = LoggedRing(event_idx=event_idx)
        ring.raw.queue.kicks_on()
        assert ring.marks() == ring.used(word, 2)
        ring.raw.queue.kicks_off()
        assert ring.marks() == (set() if event_idx else ring.used(0, 2)), "with event indices nothing is written"
        ring.raw.queue.stop()
        assert ring.marks() == set()
        ring.raw.start(event_idx=event_idx)
        assert ring.marks() == ring.used(0, 2) | ring.used(word, 2), "the log stays over a stop"


def test_what_writes_nothing_marks_nothing() -> None:
    """A port that waits for its host is not copied again and again."""
    ring = LoggedRing()
    queue = ring.raw.queue
    read_fd, write_fd = os.pipe2(os.O_NONBLOCK)
    ring.offer(10)
    assert queue.fill(read_fd) is Status.BLOCKED
    assert queue.fill_from(b"") == 0
    os.close(write_fd)
    assert queue.fill(read_fd) is Status.EOF
    os.close(read_fd)
    assert queue.discard() == 0
    assert ring.marks() == ring.used(2, 10)
    ring.raw.put(1, ring.raw.data, 10)
    ring.raw.offer(1)
    assert queue.drain_into(lambda view: 0) is Status.BLOCKED
    assert queue.pending() == 1
    assert queue.notify()
    assert ring.marks() == set()


def test_r_vu_80_without_an_address_the_used_ring_is_not_marked() -> None:
    ring = LoggedRing(used_gpa=-1)
    ring.offer(10)
    ring.raw.queue.kicks_off()
    assert ring.raw.queue.fill_from(b"x" * 10) == 10
    assert ring.marks() == pages(ring.raw.data, 10)


def test_r_vu_80_logging_begins_and_ends_while_the_queue_runs() -> None:
    ring = LoggedRing()
    ring.offer(*[1] * 6)
    queue, other = ring.raw.queue, DirtyLog(bytearray(256), 0, 256)
    queue.fill_from(b"x")
    assert ring.marks()
    queue.log_to(None)
    queue.fill_from(b"x")
    queue.kicks_off()
    assert ring.marks() == set()
    queue.log_to(other)
    queue.fill_from(b"x")
    assert (ring.marks(), marked(other.take())) == (set(), {ring.raw.data // PAGE + 2})


@pytest.mark.parametrize("used_gpa", [-2, 1 << 64])
def test_an_address_of_the_used_ring_that_cannot_be_is_refused(used_gpa: int) -> None:
    ring = LoggedRing()
    with pytest.raises(ValueError, match="64 bits"):
        ring.raw.queue.log_to(None, used_gpa)
    ring.raw.queue.kicks_off()
    assert ring.marks() == ring.used(0, 2), "and all is as before"


@pytest.mark.parametrize("used_gpa", [8 * 256 * PAGE, (1 << 64) - 1, (1 << 64) - 3, (1 << 64) - 8000])
def test_r_vu_81_a_used_ring_beyond_the_log_is_not_marked(used_gpa: int) -> None:
    """Its parts do not come back at the bottom of the address space either."""
    ring = LoggedRing(used_gpa=used_gpa)
    ring.raw.offer(*range(ring.SIZE))
    ring.raw.queue.discard()
    ring.raw.queue.kicks_off()
    assert ring.marks() == set()


def test_r_vu_81_a_log_that_is_too_small_is_not_left() -> None:
    raw = RawRing()
    buffer = bytearray(b"\x5a" + bytes(1) + b"\x5a" * 100)
    raw.queue.log_to(DirtyLog(buffer, 1, 1), 0)
    for head, gpa in enumerate((raw.data + 4 * PAGE, TOP + 8, raw.data + 8 * PAGE)):
        raw.put(head, gpa, 8, WRITE)
    raw.offer(0, 1, 2)
    assert raw.queue.fill_from(b"z" * 24) == 24
    assert buffer == b"\x5a" + bytes([1 | 1 << raw.data // PAGE + 4]) + b"\x5a" * 100
    assert raw.memory.read(TOP + 8, 8) == b"z" * 8


def test_r_ring_78_readable_parts_of_a_writable_chain_are_not_marked() -> None:
    ring = LoggedRing()
    ring.raw.put(0, ring.raw.data, 100, NEXT, 1)
    ring.raw.put(1, ring.raw.data + PAGE, 100, WRITE)
    ring.raw.offer(0)
    ring.raw.queue.fill_from(b"x")
    assert ring.marks() == pages(ring.raw.data + PAGE, 1) | ring.used(0, 12)


# -- a front end that truncates the log (R-RING-82) --------------------------------------------------------------------

OPERATIONS: dict[str, Callable[[DeviceQueue], object]] = {
    "discard": lambda queue: queue.discard(),
    "pop": lambda queue: queue.pop(),
    "push": lambda queue: queue.push(b"x"),
    "fill_from": lambda queue: queue.fill_from(b"x"),
    "drain_into": lambda queue: queue.drain_into(len),
}


@pytest.fixture
def file() -> Iterator[int]:
    fd = os.memfd_create("log")
    os.ftruncate(fd, PAGE)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_r_ring_82_a_log_that_is_gone_stops_the_queue(file: int, operation: str) -> None:
    raw = RawRing()
    raw.put(0, raw.data, 8, WRITE)
    raw.offer(0)
    log = DirtyLog(mmap.mmap(file, PAGE), 0, PAGE)
    raw.queue.log_to(log, 0)
    os.ftruncate(file, 0)
    with pytest.raises(FrontEndError, match="R-RING-82: the file behind the dirty log was truncated"):
        OPERATIONS[operation](raw.queue)
    assert not raw.queue.running
    assert isinstance(raw.queue.fault, FrontEndError)
    with pytest.raises(FrontEndError, match="R-RING-82"):
        raw.start()
    assert not raw.queue.running
    raw.queue.log_to(None)
    raw.base = raw.avail_idx
    raw.start()
    assert raw.queue.running


# -- any work of a device, against guest memory ------------------------------------------------------------------------

USED_AT = RAM + 8 * PAGE - 6
"""Where the log has the used ring: on a page that it leaves with its first element."""


class Watched:
    """A queue with a log, each of whose operations is compared with what it did to guest memory."""

    def __init__(self, machine: QueueModel) -> None:
        self.machine = machine
        self.queue = DeviceQueue(0)
        size = RAM // PAGE // 8 + 2
        self.log = DirtyLog(bytearray(size), 0, size)
        self.queue.log_to(self.log, USED_AT)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.queue, name)
        return self.watched(name, value) if callable(value) else value

    def watched(self, name: str, call: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*arguments: object, **options: object) -> object:
            before, chains = self.image(), self.queue.chains
            try:
                return call(*arguments, **options)
            finally:
                self.check(before, self.queue.chains - chains, speaks=name in ("start", "kicks_on", "kicks_off"))

        return wrapped

    def image(self) -> list[bytes]:
        return [bytes(region.buffer) for region in self.machine.memory.regions]

    def check(self, before: list[bytes], completed: int, *, speaks: bool) -> None:
        """The marks are exactly the written pages' ones; those of the used ring are at its own address."""
        machine, driver, marks = self.machine, self.machine.driver, marked(self.log.take())
        used_size = 4 if machine.packed else 6 + 8 * driver.size
        written = set().union(*(self.written(number) for number in range(completed)))
        if machine.packed and completed:
            written |= pages(driver.desc, 16)  # the descriptors are all on one page
        assert {page for page in marks if page < RAM // PAGE} == written
        assert self.changed(before) - pages(driver.used, used_size) <= written
        marks -= written
        after = self.machine.memory.read(driver.used, used_size)
        changed = {i for i in range(used_size) if after[i] != before[0][driver.used + i]}
        assert {(USED_AT + i) // PAGE for i in changed} <= marks <= pages(USED_AT, used_size)
        assert bool(marks) <= (speaks or completed > 0)

    def written(self, number: int) -> set[int]:
        """The pages that were written to of the chain that was the ``number``-th to be completed."""
        machine, driver = self.machine, self.machine.driver
        chain, slots = machine.offered[number], sum(machine.offered[i].slots for i in range(number))
        used_idx = len(machine.used) + number
        if not isinstance(machine, Receive):
            return set()
        if machine.packed:
            slots += sum(used.slots for used in machine.used)
            length, head, flags = struct.unpack(
                "<IHH", machine.memory.read(driver.desc + 16 * (slots % driver.size) + 8, 8)
            )
            length = length if flags & WRITE else 0
        else:
            head, length = struct.unpack("<II", machine.memory.read(driver.used + 4 + 8 * (used_idx % driver.size), 8))
        assert head == chain.head
        return pages(chain.gpa, length)

    def changed(self, before: list[bytes]) -> set[int]:
        """The pages whose content is another one than before."""
        changed: set[int] = set()
        for region, old in zip(self.machine.memory.regions, before, strict=True):
            if region.buffer != old:
                new = bytes(region.buffer)
                starts = [at for at in range(0, region.size, PAGE) if new[at : at + PAGE] != old[at : at + PAGE]]
                changed |= {(region.gpa + at) // PAGE for at in starts}
        return changed


BORDER = RAM // 2 - 100
"""A little before the border of the two regions."""


class LoggedTransmit(Transmit):
    def make_device(self) -> DeviceQueue:
        return Watched(self)  # type: ignore[return-value]


class LoggedReceive(Receive):
    def __init__(self) -> None:
        super().__init__()
        self.next_gpa = BORDER

    def make_device(self) -> DeviceQueue:
        return Watched(self)  # type: ignore[return-value]

    def add(self, sizes: list[int], *, writable: bool, indirect: bool) -> Chain | None:
        if self.next_gpa > BORDER + 20000:
            self.next_gpa = BORDER
        return super().add(sizes, writable=writable, indirect=indirect)


for machine in (LoggedTransmit, LoggedReceive):
    machine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)

TestLoggedTransmit = LoggedTransmit.TestCase
TestLoggedReceive = LoggedReceive.TestCase


# -- others at the same log meanwhile ----------------------------------------------------------------------------------


def test_r_vu_80_two_who_mark_at_the_same_time_lose_no_mark() -> None:
    """Another process marks the page beside ours, whose bit is in the same byte."""
    mapping = mmap.mmap(-1, PAGE)
    log = DirtyLog(mapping, 0, 1)
    parent = os.getpid()
    other = os.fork()
    if other == 0:
        while os.getppid() == parent:
            for _ in range(1000):
                log.mark(PAGE, 1)
        os._exit(0)
    try:
        lost = theirs = 0
        for _ in range(200_000):
            log.mark(0, 1)
            lost += not mapping[0] & 1
            theirs += log.take()[0] >> 1
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
    assert theirs, "they did meet"
    assert lost == 0


class Copy:
    """The other side's copy of guest memory: a process that reads what is marked again, as long as the guest runs."""

    def __init__(self, memory: Memory, log: DirtyLog) -> None:
        self.memory = memory
        self.log = log
        self.image = mmap.mmap(-1, memory.regions[0].size)
        self.image[:] = memory.read(0, len(self.image))
        self.rounds = mmap.mmap(-1, PAGE)  # the number of the round that is asked for, and of the last one done
        self.parent = os.getpid()
        self.process = os.fork()
        if self.process == 0:
            self.run()

    def run(self) -> NoReturn:
        try:
            while os.getppid() == self.parent:
                asked = self.rounds[0]
                self.follow()
                self.rounds[1] = asked
        finally:
            os._exit(0)

    def follow(self) -> None:
        for page in sorted(marked(self.log.take()), reverse=True):  # the last ones are written last, and read first
            self.image[page * PAGE : (page + 1) * PAGE] = self.memory.read(page * PAGE, PAGE)

    def catch_up(self, number: int) -> None:
        """Waits for a round that began after all was written."""
        self.rounds[0] = number
        deadline = time.monotonic() + 20
        while self.rounds[1] != number:
            assert time.monotonic() < deadline
            os.sched_yield()

    def end(self) -> None:
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)


@pytest.mark.parametrize("operation", ["fill_from", "fill"])
def test_r_vu_80_a_copy_that_follows_the_marks_is_the_same_in_the_end(operation: str) -> None:
    """A mark that came before its write would be taken together with the old bytes."""
    size, data, count, piece = 16 << 20, 1 << 20, 64, 25 * PAGE
    memory = Memory([Region(0, size, 0, mmap.mmap(-1, size), 0)])
    driver, queue = DriverQueue(memory, 0, count), DeviceQueue(0)
    log = DirtyLog(mmap.mmap(-1, PAGE), 0, size // PAGE // 8)
    queue.log_to(log, driver.used)
    queue.start(memory, count, driver.desc, driver.avail, driver.used)
    copy = Copy(memory, log)
    host = os.memfd_create("host")
    try:
        for turn in range(1, 51):
            for number in range(count):
                driver.add((), [(data + number * (piece + PAGE) + turn, piece)])
            driver.publish()
            os.pwrite(host, bytes([turn]) * (count * piece), 0)
            os.lseek(host, 0, os.SEEK_SET)
            if operation == "fill":
                queue.fill(host, budget=count * piece)
            else:
                queue.fill_from(bytes([turn]) * (count * piece))
            copy.catch_up(turn)
            assert all(used is not None and used[1] == piece for used in (driver.collect() for _ in range(count)))
            for start, end in ((driver.used, driver.used + 6 + 8 * count), (data, size)):
                assert copy.image[start:end] == memory.read(start, end - start), turn
    finally:
        copy.end()
        os.close(host)
