"""What the virtqueue engine does with well-formed rings; each test names its rule."""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import pathlib
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from raw_ring import FRONT_END, HALF, NEXT, WRAP, WRITE, RawPacked, RawRing

from vsport._ring import DeviceQueue, DriverQueue, Memory, Region, Status
from vsport.errors import DeviceError, FrontEndError, GuestError

BUFFERS = 0x200000
"""Where the tests' buffers begin: above the largest queue."""
TABLES = 0x800000
RAM = 16 << 20

PATTERN = bytes(range(256)) * 256


@dataclass
class Pair:
    """A driver and a device on the same memory, and a pipe as the host side."""

    size: int = 8
    event_idx: bool = False
    indirect: bool = False
    packed: bool = False
    in_order: bool = False
    memory: Memory = field(init=False)
    driver: DriverQueue = field(init=False)
    device: DeviceQueue = field(init=False)
    read_fd: int = -1
    write_fd: int = -1

    def __post_init__(self) -> None:
        self.memory = Memory([Region(0, RAM, FRONT_END, mmap.mmap(-1, RAM), 0)])
        self.driver = DriverQueue(
            self.memory,
            0,
            self.size,
            event_idx=self.event_idx,
            indirect=self.indirect,
            packed=self.packed,
            in_order=self.in_order,
        )
        self.device = DeviceQueue(1)
        self.start()
        self.read_fd, self.write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def start(self, *, base: int = 0, reset: bool = True) -> None:
        self.device.start(
            self.memory,
            self.size,
            FRONT_END + self.driver.desc,
            FRONT_END + self.driver.avail,
            FRONT_END + self.driver.used,
            base=base,
            event_idx=self.event_idx,
            indirect=self.indirect,
            packed=self.packed,
            in_order=self.in_order,
            reset=reset,
        )

    def place(self, chains: int) -> int:
        """Where the device is after so many chains of one descriptor: in a packed ring the wrap counter begins as 1."""
        return chains % self.size | (~(chains // self.size) & 1) << 15 if self.packed else chains

    def send(self, data: bytes, *, at: int = BUFFERS, pieces: int = 1) -> int:
        """Offers a readable chain that holds ``data``, cut into ``pieces``."""
        self.memory.write(at, data)
        step = max(1, len(data) // pieces)
        cuts = [*(step * i for i in range(pieces)), len(data)]
        elements = [(at + start, end - start) for start, end in itertools.pairwise(cuts)]
        head = self.driver.add(elements, indirect_table=TABLES if self.indirect else 0)
        self.driver.publish()
        return head

    def receive(self, *sizes: int, at: int = BUFFERS) -> None:
        """Offers a writable chain of one buffer for each size; tables and buffers of each ``at`` are apart."""
        for size in sizes:
            table = TABLES + at // 256 if self.indirect else 0
            self.driver.add((), [(at, size)], indirect_table=table)
            at += 0x4000
        self.driver.publish()

    def collected(self) -> list[int]:
        """The lengths of all chains that came back."""
        lengths = []
        while (used := self.driver.collect()) is not None:
            lengths.append(used[1])
        return lengths

    def host_reads(self) -> bytes:
        try:
            return os.read(self.read_fd, 1 << 20)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        os.close(self.read_fd)
        os.close(self.write_fd)


MakePair = Callable[..., Pair]


@pytest.fixture
def make() -> Iterator[MakePair]:
    made: list[Pair] = []

    def make_pair(**options: int) -> Pair:
        made.append(Pair(**options))
        return made[-1]

    yield make_pair
    for pair in made:
        pair.close()


@pytest.fixture(params=[False, True], ids=["flags", "event_idx"])
def event_idx(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(params=[False, True], ids=["direct", "indirect"])
def indirect(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


LAYOUTS = {
    "split": {},
    "packed": {"packed": True},
    "split in order": {"in_order": True},
    "packed in order": {"packed": True, "in_order": True},
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(params=LAYOUTS)
def pair(request: pytest.FixtureRequest, make: MakePair, event_idx: bool, indirect: bool) -> Pair:
    return make(event_idx=event_idx, indirect=indirect, **LAYOUTS[request.param])


def fill(fd: int) -> None:
    """Fills a non-blocking pipe or socket to the last byte."""
    for step in (65536, 1):
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(fd, b"\0" * step)


def pipe_room(fd: int, room: int, read_fd: int) -> None:
    """Leaves exactly ``room`` bytes (a multiple of a page) of space in a pipe."""
    fill(fd)
    while room:
        room -= len(os.read(read_fd, room))


# -- guest memory (R-VU-60 to 62) --------------------------------------------------------------------------------------


def region(gpa: int = 0, size: int = 4096, front_end: int | None = None, offset: int = 0, length: int = 4096) -> Region:
    return Region(gpa, size, gpa if front_end is None else front_end, bytearray(length), offset)


@pytest.mark.parametrize(
    ("regions", "why"),
    [
        ([region(size=0)], "empty"),
        ([region(gpa=-1)], "negative"),
        ([region(offset=-1)], "negative"),
        ([region(gpa=2**64 - 4095)], "beyond 2\\*\\*64"),
        ([region(front_end=2**64 - 4095)], "beyond 2\\*\\*64"),
        ([region(offset=1)], "beyond its file"),
        ([region(size=4097)], "beyond its file"),
        ([region(), region(gpa=4095, front_end=8192)], "overlap"),
        ([region(), region(gpa=8192, front_end=4095)], "overlap"),
        ([region(gpa=4096 * i) for i in range(513)], "too many"),
    ],
)
def test_r_vu_62_an_unsound_table_of_regions_is_refused(regions: list[Region], why: str) -> None:
    with pytest.raises(FrontEndError, match=why) as caught:
        Memory(regions)
    assert caught.value.rule == "R-VU-62"


def test_a_region_may_end_where_the_address_space_ends() -> None:
    memory = Memory([region(gpa=2**64 - 4096)])
    memory.write(2**64 - 2, b"ab")
    assert memory.read(2**64 - 2, 2) == b"ab"


def test_memory_is_read_and_written_across_adjacent_regions_and_not_beyond() -> None:
    regions = [region(gpa=4096, offset=16, size=4080), region(gpa=4096 + 4080)]
    memory = Memory(reversed(regions))  # type: ignore[arg-type]
    memory.write(4096 + 4080 - 3, b"abcdef")
    assert memory.read(4096 + 4080 - 4, 8) == b"\0abcdef\0"
    assert bytes(regions[0].buffer)[-3:] == b"abc"
    end = 4096 + 4080 + 4096
    for gpa, size in ((end - 1, 2), (end, 1), (4095, 1), (0, 4096 + 8176), (2**64 - 1, 1), (2**64, 1), (-1, 1)):
        with pytest.raises(IndexError):
            memory.read(gpa, size)
    with pytest.raises(IndexError):
        memory.write(end - 1, b"zz")
    assert memory.read(end - 1, 1) == b"\0", "a refused write writes nothing"


def test_every_one_of_512_regions_is_found() -> None:
    memory = Memory([region(gpa=8192 * i, size=512 + i) for i in range(512)])
    for i in range(512):
        memory.write(8192 * i + 511 + i, bytes([i & 255]))
        with pytest.raises(IndexError):
            memory.read(8192 * i + 512 + i, 1)
    assert [memory.read(8192 * i + 511 + i, 1)[0] for i in range(512)] == [i & 255 for i in range(512)]


def test_memory_holds_its_mapping_as_long_as_it_lives() -> None:
    mapping = mmap.mmap(-1, 4096)
    memory = Memory([Region(0, 4096, 0, mapping, 0)])
    with pytest.raises(BufferError):
        mapping.close()
    assert memory.regions == (Region(0, 4096, 0, mapping, 0),)
    del memory
    mapping.close()


def test_memory_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(BufferError, match="writable"):
        Memory([Region(0, 4, 0, b"abcd", 0)])


# -- starting and stopping ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 3, 24, 32769, 65536, 1 << 40, -1])
def test_r_ring_01_a_size_that_is_no_power_of_two_is_refused(size: int) -> None:
    ring = RawRing(start=False)
    with pytest.raises(FrontEndError, match="R-RING-01"):
        ring.queue.start(ring.memory, size, FRONT_END, FRONT_END + ring.avail, FRONT_END + ring.used)
    assert not ring.queue.running


@pytest.mark.parametrize(("part", "by"), [("desc", 8), ("avail", 1), ("used", 2)])
def test_r_ring_09_misaligned_parts_are_refused(part: str, by: int) -> None:
    ring = RawRing(start=False)
    parts = {"desc": FRONT_END, "avail": FRONT_END + ring.avail, "used": FRONT_END + ring.used}
    parts[part] += by
    with pytest.raises(FrontEndError, match="R-RING-09"):
        ring.queue.start(ring.memory, ring.size, **parts)


@pytest.mark.parametrize("part", ["desc", "avail", "used"])
def test_r_ring_77_parts_outside_of_their_region_are_refused(part: str) -> None:
    ring = RawRing(start=False)
    parts = {"desc": FRONT_END, "avail": FRONT_END + ring.avail, "used": FRONT_END + ring.used}
    region_end = FRONT_END + len(ring.buffers[0])
    for address in (region_end - 16, region_end, FRONT_END - 16, 0, 2**64 - 16):
        with pytest.raises(FrontEndError, match="R-RING-77"):
            ring.queue.start(ring.memory, ring.size, **{**parts, part: address})
    assert ring.queue.drain(1) is Status.STOPPED


def test_a_base_of_more_than_16_bits_is_refused() -> None:
    ring = RawRing(start=False)
    with pytest.raises(FrontEndError, match="R-RING-04"):
        ring.queue.start(ring.memory, ring.size, FRONT_END, FRONT_END + ring.avail, FRONT_END + ring.used, base=65536)


def test_r_ring_26_a_queue_that_does_not_run_touches_nothing() -> None:
    ring = RawRing()
    ring.put(0, ring.data, 4)
    ring.offer(0)
    ring.queue.stop()
    before = [bytes(buffer) for buffer in ring.buffers]
    assert ring.queue.drain(1) is Status.STOPPED
    assert ring.queue.fill(0) is Status.STOPPED
    assert ring.queue.drain_into(len) is Status.STOPPED
    assert ring.queue.pop() is None
    assert (ring.queue.push(b"x"), ring.queue.kicks_on(), ring.queue.notify()) == (False, False, False)
    assert (ring.queue.discard(), ring.queue.return_partial(), ring.queue.pending()) == (0, 0, 0)
    assert ring.queue.fill_from(b"x") == 0
    ring.queue.kicks_off()
    assert [bytes(buffer) for buffer in ring.buffers] == before


def test_the_memory_is_free_after_stop() -> None:
    mapping = mmap.mmap(-1, 8192)
    queue = DeviceQueue(0)
    queue.start(Memory([Region(0, 8192, 0, mapping, 0)]), 8, 0, 256, 512)
    with pytest.raises(BufferError):
        mapping.close()
    assert queue.stop() == 0
    mapping.close()


# -- draining ----------------------------------------------------------------------------------------------------------


def test_r_ring_11_drained_chains_come_back_with_length_0(pair: Pair) -> None:
    pair.send(b"one", at=BUFFERS)
    assert pair.device.drain(pair.write_fd) is Status.EMPTY
    pair.send(b"two", at=BUFFERS + 100)
    assert pair.device.drain(pair.write_fd) is Status.EMPTY
    assert pair.host_reads() == b"onetwo"
    assert pair.collected() == [0, 0]
    assert (pair.device.bytes_moved, pair.device.chains) == (6, 2)


@layouts
@pytest.mark.parametrize("size", [1, 2, 256, 32768])
def test_r_ring_04_indices_wrap(make: MakePair, layout: str, size: int, event_idx: bool) -> None:
    pair = make(size=size, event_idx=event_idx, **LAYOUTS[layout])
    buffer = [(BUFFERS, 3)]
    offered = 0
    while offered < 65536 + size:
        for i in range(size):
            pair.memory.write(BUFFERS, b"abc")
            if i % 2:
                pair.driver.add((), buffer)
            else:
                pair.driver.add(buffer)
        pair.driver.publish()
        offered += size
        assert pair.device.pending() == size
        assert pair.device.discard() == 3 * ((size + 1) // 2)
        assert len(pair.collected()) == size
    assert pair.device.next_avail == pair.device.used_idx == pair.place(offered) & 0xFFFF


@pytest.mark.parametrize("size", [1, 2, 256, 32768])
def test_r_ring_04_bytes_flow_across_the_wrap(size: int) -> None:
    ring = RawRing(size, base=65535 if size == 1 else 65534)
    read_fd, write_fd = os.pipe()
    ring.memory.write(ring.data, b"abcd")
    for i in range(4):
        ring.put(i % size, ring.data + i, 1)
        ring.offer(i % size)
        assert ring.queue.drain(write_fd) is Status.EMPTY
    assert os.read(read_fd, 10) == b"abcd"
    assert ring.used_elements()[-1] == (3 % size, 0)
    assert ring.queue.used_idx == ring.avail_idx < 4
    os.close(read_fd)
    os.close(write_fd)


@pytest.mark.parametrize("pieces", [1, 2, 7, 8])
def test_r_ring_07_any_framing_is_the_same(pair: Pair, pieces: int) -> None:
    pair.send(b"abcdefgh", pieces=pieces)
    assert pair.device.drain(pair.write_fd) is Status.EMPTY
    assert pair.host_reads() == b"abcdefgh"


@layouts
@pytest.mark.parametrize("count", [511, 512, 513, 3000])
def test_r_ring_07_a_chain_of_more_pieces_than_a_batch_holds(make: MakePair, layout: str, count: int) -> None:
    pair = make(size=4, indirect=True, **LAYOUTS[layout])
    data = PATTERN[:count]
    pair.send(data, pieces=count)
    assert pair.device.drain(pair.write_fd) is Status.EMPTY
    assert pair.host_reads() == data
    pair.send(data, pieces=count)
    assert pair.device.pop() == data
    assert pair.collected() == [0, 0]


def test_r_ring_80_the_longest_chain_of_single_bytes_is_drained_in_one_go() -> None:
    ring = RawRing(size=32768)
    for i in range(32768):
        ring.put(i, ring.data + i, 1, NEXT if i < 32767 else 0, i + 1 & 32767)
    data = (PATTERN * 2)[:32768]
    ring.memory.write(ring.data, data)
    ring.offer(0)
    taken = bytearray()
    while ring.queue.drain_into(lambda view: taken.extend(view) or len(view)) is Status.MORE:
        pass
    assert bytes(taken) == data
    assert ring.used_elements() == [(0, 0)]


def test_r_ring_76_a_buffer_across_adjacent_regions_is_split() -> None:
    ring = RawRing()
    border = ring.data + HALF
    ring.memory.write(border - 3, b"abcdef")
    ring.put(0, border - 3, 6)
    ring.offer(0)
    pieces: list[bytes] = []
    assert ring.queue.drain_into(lambda view: pieces.append(bytes(view)) or len(view)) is Status.EMPTY
    assert pieces == [b"abc", b"def"]
    ring.put(1, border - 2, 5, WRITE)
    ring.offer(1)
    assert ring.queue.fill_from(b"VWXYZ") == 5
    assert ring.memory.read(border - 3, 7) == b"aVWXYZ\0"
    assert ring.used_elements() == [(0, 0), (1, 5)]


def test_r_ring_76_an_indirect_table_across_adjacent_regions_is_read() -> None:
    ring = RawRing()
    border = ring.data + HALF
    length = ring.put_pieces(border - 24, ring.data, [1, 2, 3])
    ring.memory.write(ring.data, b"abcdef")
    ring.put(0, border - 24, length, 4)
    ring.offer(0)
    assert ring.queue.pop() == b"abcdef"


def test_r_ring_32_33_normal_descriptors_lead_to_an_indirect_one() -> None:
    ring = RawRing()
    ring.memory.write(ring.data, b"abcdef")
    table = ring.put_pieces(ring.data + 64, ring.data + 2, [1, 3])
    ring.put(3, ring.data, 1, NEXT, 5)
    ring.put(5, ring.data + 1, 1, NEXT, 0)
    ring.put(0, ring.data + 64, table, 4 | WRITE)
    ring.offer(3)
    assert ring.queue.pop() == b"abcdef"
    assert ring.used_elements() == [(3, 0)]


def test_r_vu_89_a_half_consumed_chain_is_remembered(pair: Pair) -> None:
    pipe_room(pair.write_fd, 4096, pair.read_fd)
    data = PATTERN[:10000]
    pair.send(data, pieces=3)
    assert pair.device.drain(pair.write_fd) is Status.BLOCKED
    assert (pair.device.offset, pair.device.next_avail, pair.device.pending()) == (4096, pair.place(0), 1)
    assert pair.collected() == [], "it still belongs to the device"
    received = pair.host_reads()
    assert pair.device.drain(pair.write_fd) is Status.EMPTY
    received += pair.host_reads()
    assert received[-10000:] == data
    slots = 3 if pair.packed and not pair.indirect else 1
    assert (pair.device.offset, pair.device.next_avail) == (0, pair.place(slots))
    assert pair.collected() == [0]


@pytest.mark.parametrize("reset", [False, True])
def test_r_vu_20_a_stopped_queue_resumes_where_it_was(pair: Pair, reset: bool) -> None:
    pair.send(b"abcdefgh", pieces=2)
    assert pair.device.drain(pair.write_fd, budget=3) is Status.MORE
    base = pair.device.stop()
    assert (base, pair.device.offset) == (pair.place(0), 3)
    pair.start(base=base, reset=reset)
    assert pair.device.drain(pair.write_fd) is Status.EMPTY
    assert pair.host_reads() == (b"abcabcdefgh" if reset else b"abcdefgh")


def test_a_partial_chain_is_not_mistaken_for_another_one(make: MakePair) -> None:
    pair = make()
    pair.send(b"abcdef", at=BUFFERS)
    pair.send(b"ghijkl", at=BUFFERS + 64)
    pair.device.drain(pair.write_fd, budget=3)
    pair.device.stop()
    pair.start(base=1, reset=False)
    assert pair.device.offset == 0


def test_a_chain_that_the_driver_shortened_below_the_offset_completes() -> None:
    ring = RawRing()
    ring.put(0, ring.data, 100)
    ring.offer(0)
    assert ring.queue.drain_into(len, budget=50) is Status.MORE
    ring.put(0, ring.data, 20)
    assert ring.queue.drain_into(len) is Status.EMPTY
    assert ring.queue.bytes_moved == 50
    assert ring.used_elements() == [(0, 0)]


def test_forget_partial(make: MakePair) -> None:
    pair = make()
    pair.send(b"abcdef")
    pair.device.drain(pair.write_fd, budget=3)
    pair.device.forget_partial()
    assert pair.device.offset == 0


def test_a_restored_queue_goes_on_where_another_one_was(pair: Pair) -> None:
    pair.send(b"abcdef")
    assert pair.device.drain(pair.write_fd, budget=2) is Status.MORE
    where = pair.device.stop(), pair.device.offset
    pair.device = DeviceQueue(1)
    pair.device.restore(*where)
    assert (pair.device.next_avail, pair.device.offset) == (pair.place(0), 2)
    pair.start(base=where[0], reset=False)
    assert pair.device.drain(pair.write_fd) is Status.EMPTY
    assert pair.host_reads() == b"abcdef"
    assert pair.collected() == [0]


def test_a_restored_offset_is_of_one_chain_only(make: MakePair) -> None:
    pair = make()
    pair.device.stop()
    for base, reset, offset in ((65535, False, 7), (65535, True, 0), (0, False, 0)):
        pair.device.restore(65535, 7)
        pair.start(base=base, reset=reset)
        assert (pair.device.next_avail, pair.device.offset) == (base, offset)
        pair.device.stop()


def test_a_restored_offset_beyond_the_chain_completes_it(make: MakePair) -> None:
    """The guest has made its chain shorter, or the document lied: no byte is made up."""
    pair = make()
    pair.send(b"abc")
    pair.device.stop()
    pair.device.restore(0, 1 << 48)
    pair.start(reset=False)
    assert pair.device.drain(pair.write_fd) is Status.EMPTY
    assert (pair.host_reads(), pair.collected(), pair.device.offset) == (b"", [0], 0)


@pytest.mark.parametrize(
    ("next_avail", "offset"), [(-1, 0), (65536, 0), (0, -1), (0, (1 << 48) + 1), (1 << 70, 0), (0, 1 << 70)]
)
def test_what_no_queue_can_have_been_at_is_not_restored(make: MakePair, next_avail: int, offset: int) -> None:
    pair = make()
    pair.device.stop()
    pair.device.restore(9, 5)
    with pytest.raises(ValueError, match=str(next_avail or offset)):
        pair.device.restore(next_avail, offset)
    assert (pair.device.next_avail, pair.device.offset) == (9, 5)


def test_a_running_queue_is_not_restored(make: MakePair) -> None:
    pair = make()
    with pytest.raises(ValueError, match="running"):
        pair.device.restore(9, 5)
    assert (pair.device.next_avail, pair.device.offset) == (0, 0)


def test_a_budget_is_kept_to_the_byte(pair: Pair) -> None:
    for i in range(3):
        pair.send(b"abcdef", at=BUFFERS + 64 * i)
        if pair.indirect:  # send() has one table, so one chain at a time
            break
    assert pair.device.drain(pair.write_fd, budget=4) is Status.MORE
    assert pair.host_reads() == b"abcd"
    assert pair.device.drain(pair.write_fd) is Status.EMPTY
    with pytest.raises(ValueError, match="positive"):
        pair.device.drain(pair.write_fd, budget=0)


@pytest.mark.parametrize("kind", ["closed pipe", "bad descriptor"])
def test_a_failing_descriptor_is_an_os_error_and_loses_nothing(make: MakePair, kind: str) -> None:
    pair = make()
    pair.send(b"abcdef")
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    if kind == "bad descriptor":
        os.close(write_fd)
    with pytest.raises(OSError, match=r"Broken pipe|Bad file descriptor") as caught:
        pair.device.drain(write_fd)
    assert caught.value.errno == (errno.EBADF if kind == "bad descriptor" else errno.EPIPE)
    assert pair.device.drain(pair.write_fd) is Status.EMPTY
    assert pair.host_reads() == b"abcdef"
    if kind == "closed pipe":
        os.close(write_fd)


def test_the_log_gets_the_bytes_that_the_descriptor_took(make: MakePair, tmp_path) -> None:
    pair = make(indirect=True)
    log = os.open(tmp_path / "log", os.O_CREAT | os.O_RDWR)
    pipe_room(pair.write_fd, 8192, pair.read_fd)
    data = PATTERN[:20000]
    pair.send(data, pieces=7)
    assert pair.device.drain(pair.write_fd, log_fd=log) is Status.BLOCKED
    assert os.pread(log, 30000, 0) == data[:8192]
    pair.host_reads()
    assert pair.device.drain(pair.write_fd, log_fd=log) is Status.EMPTY
    assert os.pread(log, 30000, 0) == data
    os.close(log)


def test_a_log_that_is_full_does_not_hold_the_port_up(make: MakePair) -> None:
    pair, log = make(), make()
    pipe_room(log.write_fd, 4096, log.read_fd)
    data = PATTERN[:10000]
    pair.send(data, pieces=5)
    assert pair.device.drain(pair.write_fd, log_fd=log.write_fd) is Status.EMPTY
    assert pair.host_reads() == data
    assert log.host_reads()[-4096:] == data[:4096]


@pytest.mark.parametrize("log", ["/dev/full", "closed"])
def test_a_log_that_fails_does_not_harm_the_port(make: MakePair, log: str) -> None:
    pair = make()
    log_fd = 9999 if log == "closed" else os.open(log, os.O_WRONLY)
    pair.send(b"abc")
    assert pair.device.drain(pair.write_fd, log_fd=log_fd) is Status.EMPTY
    assert pair.host_reads() == b"abc"
    if log_fd != 9999:
        os.close(log_fd)


# -- draining into a sink ----------------------------------------------------------------------------------------------


def test_a_sink_takes_what_it_can(make: MakePair) -> None:
    pair = make()
    pair.send(b"abcdef", pieces=2)
    taken: list[bytes] = []

    def sink(view: memoryview) -> int:
        room = 5 - sum(map(len, taken))
        taken.append(bytes(view[: min(room, 2)]))
        return len(taken[-1])

    assert pair.device.drain_into(sink) is Status.BLOCKED
    assert (b"".join(taken), pair.device.offset, pair.device.bytes_moved) == (b"abcde", 5, 5)
    taken.clear()
    assert pair.device.drain_into(sink) is Status.EMPTY
    assert taken == [b"f"]
    assert pair.collected() == [0]


def test_an_exception_of_the_sink_passes_and_what_it_took_is_accounted_for(make: MakePair) -> None:
    pair = make()
    pair.send(b"abcdef", pieces=2)

    def sink(view: memoryview) -> int:
        if bytes(view) == b"def":
            raise LookupError
        return len(view)

    with pytest.raises(LookupError):
        pair.device.drain_into(sink)
    assert (pair.device.offset, pair.device.running) == (3, True)


@pytest.mark.parametrize("taken", [-1, 7])
def test_a_sink_that_took_more_than_there_was_is_refused(make: MakePair, taken: int) -> None:
    pair = make()
    pair.send(b"abcdef")
    with pytest.raises(ValueError, match="the sink took"):
        pair.device.drain_into(lambda view: taken)
    assert pair.device.offset == 0


def test_a_sink_cannot_write_to_guest_memory_and_its_views_hold_the_mapping() -> None:
    mapping = mmap.mmap(-1, 16384)
    memory = Memory([Region(0, 16384, 0, mapping, 0)])
    driver = DriverQueue(memory, 0, 8)
    queue = DeviceQueue(0)
    queue.start(memory, 8, driver.desc, driver.avail, driver.used)
    mapping[8192:8195] = b"abc"
    driver.add([(8192, 3)])
    driver.publish()
    kept: list[memoryview] = []
    queue.drain_into(lambda view: kept.append(view) or len(view))
    queue.stop()
    del memory, driver
    with pytest.raises(TypeError, match="read-only"):
        kept[0][0] = 0
    with pytest.raises(BufferError):
        mapping.close()
    assert bytes(kept[0]) == b"abc"
    kept.clear()
    mapping.close()


def test_regions_may_share_their_memory_on_the_host() -> None:
    shared = bytearray(16384)
    memory = Memory([Region(0, 8192, 0, shared, 0), Region(1 << 20, 16384, 1 << 20, shared, 0)])
    driver = DriverQueue(memory, 0, 8)
    queue = DeviceQueue(0)
    queue.start(memory, 8, driver.desc, driver.avail, driver.used)
    driver.add([((1 << 20) + 4000, 8000)])
    driver.publish()
    sizes: list[int] = []
    queue.drain_into(lambda view: sizes.append(len(view)) or len(view))
    assert sizes == [8000]


def test_a_sink_cannot_enter_its_own_queue(make: MakePair) -> None:
    pair = make()
    pair.send(b"abc")
    device = pair.device
    calls: list[Callable[[], object]] = [
        lambda: device.drain(pair.write_fd),
        lambda: device.drain_into(len),
        device.discard,
        device.return_partial,
        lambda: device.fill(pair.read_fd),
        lambda: device.fill_from(b"x"),
        lambda: device.push(b"x"),
        device.pop,
        device.pending,
        device.stop,
        device.forget_partial,
        device.kicks_off,
        device.kicks_on,
        device.notify,
        pair.start,
    ]

    def sink(view: memoryview) -> int:
        for call in calls:
            with pytest.raises(RuntimeError, match="queue 1 is busy"):
                call()
        return len(view)

    assert device.drain_into(sink) is Status.EMPTY
    assert pair.collected() == [0]
    assert device.stop() == 1


def test_another_thread_cannot_enter_a_queue_while_it_waits_in_a_system_call(make: MakePair) -> None:
    pair = make()
    pair.receive(4)
    read_fd, write_fd = os.pipe()  # blocking
    results: list[Status] = []
    thread = threading.Thread(target=lambda: results.append(pair.device.fill(read_fd, budget=4)))
    thread.start()
    with pytest.raises(RuntimeError, match="queue 1 is busy"):
        while thread.is_alive():
            pair.device.pending()
    os.write(write_fd, b"abcd")
    thread.join()
    assert results == [Status.MORE]
    assert pair.collected() == [4]
    os.close(read_fd)
    os.close(write_fd)


def test_a_signal_handlers_exception_ends_a_blocking_call(make: MakePair) -> None:
    pair = make()
    pair.receive(4)
    read_fd, write_fd = os.pipe()  # blocking, and nobody writes

    def handler(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    try:
        with pytest.raises(KeyboardInterrupt):
            pair.device.fill(read_fd)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert pair.device.pending() == 1, "the queue is not busy any more"
    os.close(read_fd)
    os.close(write_fd)


# -- returning chains unread -------------------------------------------------------------------------------------------


@layouts
def test_discard_returns_everything_and_counts_readable_bytes(make: MakePair, layout: str) -> None:
    pair = make(**LAYOUTS[layout])
    pair.send(b"abcdef", at=BUFFERS)
    pair.send(b"ghi", at=BUFFERS + 64)
    pair.receive(100)
    pair.device.drain(pair.write_fd, budget=2)
    assert pair.device.discard() == 7
    assert (pair.device.bytes_discarded, pair.device.bytes_moved, pair.device.offset) == (7, 2, 0)
    assert pair.collected() == [0, 0, 0]
    assert pair.device.discard() == 0


@layouts
def test_r_con_48_a_half_consumed_chain_is_returned_and_the_next_one_stays(make: MakePair, layout: str) -> None:
    pair = make(**LAYOUTS[layout])
    pair.send(b"abcdef", at=BUFFERS)
    pair.send(b"ghi", at=BUFFERS + 64)
    assert pair.device.return_partial() == 0, "nothing is half consumed"
    pair.device.drain(pair.write_fd, budget=2)
    assert pair.device.return_partial() == 4
    assert pair.collected() == [0]
    assert pair.device.drain(pair.write_fd) is Status.EMPTY
    assert pair.host_reads() == b"abghi"


# -- filling -----------------------------------------------------------------------------------------------------------


def test_r_ring_10_used_length_is_what_was_written(pair: Pair) -> None:
    pair.receive(8, 8, 8)
    os.write(pair.write_fd, b"abcdefghij")
    assert pair.device.fill(pair.read_fd) is Status.BLOCKED
    assert pair.collected() == [8, 2]
    assert pair.memory.read(BUFFERS, 8) == b"abcdefgh"
    assert pair.memory.read(BUFFERS + 0x4000, 8) == b"ij" + bytes(6)
    assert pair.device.bytes_moved == 10


def test_r_con_42_a_buffer_without_a_byte_stays_with_the_device(pair: Pair) -> None:
    pair.receive(8)
    assert pair.device.fill(pair.read_fd) is Status.BLOCKED
    assert pair.collected() == []
    assert pair.device.pending() == 1


@layouts
def test_fill_says_why_it_came_back(make: MakePair, layout: str) -> None:
    pair = make(**LAYOUTS[layout])
    os.write(pair.write_fd, b"abc")
    assert pair.device.fill(pair.read_fd) is Status.EMPTY
    pair.receive(2, 100, 100)
    assert pair.device.fill(pair.read_fd, budget=1) is Status.MORE
    assert pair.device.fill(pair.read_fd, budget=100) is Status.BLOCKED
    assert pair.collected() == [1, 2]
    os.close(pair.write_fd)
    assert pair.device.fill(pair.read_fd) is Status.EOF
    pair.write_fd = os.dup(pair.read_fd)
    assert pair.collected() == []
    directory = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    with pytest.raises(IsADirectoryError):
        pair.device.fill(directory)
    os.close(directory)


@pytest.mark.parametrize("size", [256, 32768])
@layouts
def test_fill_takes_more_and_more_as_long_as_there_is_more(make: MakePair, layout: str, size: int, tmp_path) -> None:
    pair = make(size=size, **LAYOUTS[layout])
    data = os.urandom(200 * 64)
    (tmp_path / "data").write_bytes(data)
    pair.driver.add((), [(BUFFERS, 10), (BUFFERS + 10, 54)])
    for i in range(1, 200):
        if pair.driver.free:
            pair.driver.add((), [(BUFFERS + 64 * i, 64)])
    pair.driver.publish()
    source = os.open(tmp_path / "data", os.O_RDONLY)
    assert pair.device.fill(source) is Status.EMPTY
    os.close(source)
    assert pair.collected() == [64] * 200
    assert pair.memory.read(BUFFERS, len(data)) == data


def test_fill_from_says_how_much_found_room(make: MakePair) -> None:
    pair = make()
    assert pair.device.fill_from(b"abc") == 0
    pair.receive(4, 4, 4)
    assert pair.device.fill_from(b"") == 0
    assert pair.device.fill_from(b"abcdef") == 6
    assert pair.device.fill_from(bytearray(b"ghijkl")) == 4
    assert pair.collected() == [4, 2, 4]
    assert pair.memory.read(BUFFERS + 0x8000, 4) == b"ghij"


# -- whole messages ----------------------------------------------------------------------------------------------------


def test_a_message_is_put_whole_into_one_chain(pair: Pair) -> None:
    assert not pair.device.push(b"12345678")
    pair.receive(4, 8, 16)
    assert pair.device.push(b"12345678")
    assert pair.collected() == [0, 8], "the chain that was too small came back empty (R-CON-29)"
    assert pair.device.push(b"abc")
    assert not pair.device.push(b"def")
    assert pair.collected() == [3]
    assert pair.memory.read(BUFFERS + 0x4000, 8) == b"12345678"


def test_a_message_is_cut_as_the_driver_wants(make: MakePair) -> None:
    pair = make()
    pair.driver.add((), [(BUFFERS + 2 * i, 1) for i in range(4)])
    pair.driver.publish()
    assert pair.device.push(b"abc")
    assert pair.memory.read(BUFFERS, 8) == b"a\0b\0c\0\0\0"
    assert pair.collected() == [3]


def test_pop_takes_one_chain_and_drops_what_is_beyond_its_limit(pair: Pair) -> None:
    assert pair.device.pop() is None
    pair.send(b"abcdefgh", pieces=3)
    assert pair.device.pop(limit=5) == b"abcde"
    assert pair.device.pop() is None
    assert pair.collected() == [0]


# -- notifications -----------------------------------------------------------------------------------------------------


def complete_one(pair: Pair) -> None:
    pair.send(b"x")
    assert pair.device.discard() == 1


def test_r_ring_20_22_the_first_completion_calls(pair: Pair) -> None:
    assert not pair.device.notify(), "nothing was completed"
    complete_one(pair)
    assert pair.device.notify()
    assert not pair.device.notify(), "once for each batch"
    assert pair.device.calls == 1


def test_r_ring_21_23_event_index_calls_once_where_it_was_asked_for() -> None:
    ring = RawRing(event_idx=True)
    ring.put(0, ring.data, 1)

    def complete(count: int) -> bool:
        for _ in range(count):
            ring.offer(0)
            ring.queue.discard()
        return ring.queue.notify()

    ring.set_used_event(3)
    assert complete(1), "whatever the event says after a start (R-RING-23)"
    assert [complete(1) for _ in range(5)] == [False, False, True, False, False]  # 1, 2, 3, 4, 5
    ring.set_used_event(8)
    assert [complete(2), complete(2)] == [False, True]  # 6-7, 8-9
    ring.set_used_event(9)
    assert not complete(1), "9 has passed; once more a turn later"
    assert complete(65536), "a whole turn passes every index"


def test_r_ring_23_a_call_that_was_due_when_the_queue_stopped_is_made_after_it_resumed(pair: Pair) -> None:
    complete_one(pair)
    pair.start(base=pair.device.stop(), reset=False)
    assert pair.device.notify()
    assert not pair.device.notify()


def test_a_queue_that_starts_afresh_has_nothing_to_call_for(pair: Pair) -> None:
    pair.start()
    assert not pair.device.notify()


def event(place: int, wish: int) -> bytes:
    """A packed ring's event structure: 0 always, 1 never, 2 at that place (R-RING-41)."""
    return place.to_bytes(2, "little") + wish.to_bytes(2, "little")


@pytest.mark.parametrize(
    ("asked", "calls"),
    [
        (event(0, 0), [True] * 6),
        (event(0, 1), [False] * 6),
        (event(0, 3), [True] * 6),
        (event(WRAP | 1, 2), [True, False, False, False, False, True]),
        (event(WRAP | 2, 2), [True, True, False, False, False, False]),
        (event(0, 2), [True, False, True, False, False, False]),
        (event(1, 2), [True, False, False, True, False, False]),
        (event(2, 2), [True, False, False, True, False, False]),
        (event(WRAP, 2), [True, False, False, False, False, True]),
    ],
)
def test_r_ring_48_a_packed_driver_is_called_when_its_slot_is_passed(asked: bytes, calls: list[bool]) -> None:
    """Six chains of two slots in a ring of five, so slots 0 to 11; the first one calls in any case (R-RING-23)."""
    ring = RawPacked(5, start=False)
    ring.start(event_idx=True)
    ring.memory.write(ring.avail, asked)
    ring.put(0, ring.data, 1, NEXT, 1)
    ring.put(1, ring.data, 1)
    called = []
    for _ in range(6):
        ring.offered.clear()
        ring.offer(0)
        assert ring.queue.discard() == 2
        called.append(ring.queue.notify())
    assert called == calls


def test_r_ring_41_a_packed_device_says_when_to_kick() -> None:
    ring = RawPacked()
    assert ring.memory.read(ring.used, 4) == event(0, 0)
    ring.queue.kicks_off()
    assert ring.memory.read(ring.used, 4) == event(0, 1)
    ring.start(event_idx=True)
    ring.put(0, ring.data, 1)
    ring.offer(0, 0, 0)
    assert ring.memory.read(ring.used, 4) == event(WRAP, 2)
    assert ring.queue.kicks_on()
    assert ring.memory.read(ring.used, 4) == event(WRAP | 3, 2), "behind what is there already"
    ring.queue.kicks_off()
    assert ring.memory.read(ring.used, 4) == event(WRAP | 3, 2), "it kicks once"


def test_r_ring_20_flags_suppress_calls_without_event_index() -> None:
    ring = RawRing()
    ring.put(0, ring.data, 1)
    ring.set_used_event(1000)
    ring.write16(ring.avail, 1)
    ring.offer(0)
    assert ring.queue.discard() == 1, "completion does not depend on a call being wanted (R-RING-25)"
    assert not ring.queue.notify()
    ring.write16(ring.avail, 0)
    ring.offer(0)
    ring.queue.discard()
    assert ring.queue.notify()


def test_r_ring_21_flags_mean_nothing_with_event_index() -> None:
    ring = RawRing(event_idx=True)
    ring.write16(ring.avail, 1)
    ring.put(0, ring.data, 1)
    ring.offer(0)
    ring.queue.discard()
    assert ring.queue.notify()
    ring.queue.kicks_off()
    assert ring.read16(ring.used) == 0, "the device's own flags are 0"


def test_r_ring_18_kicks_are_asked_for_and_nothing_is_missed(pair: Pair) -> None:
    assert not pair.device.kicks_on()
    pair.driver.add([(BUFFERS, 1)], indirect_table=TABLES if pair.indirect else 0)
    assert pair.driver.publish(), "a kick was asked for"
    assert pair.device.kicks_on(), "there is a chain already"
    pair.device.discard()
    assert not pair.device.kicks_on()
    pair.device.kicks_off()
    assert pair.collected() == [0]
    pair.driver.add([(BUFFERS, 1)], indirect_table=TABLES if pair.indirect else 0)
    assert pair.driver.publish() == pair.event_idx, "with event indices the driver still kicks once"
    assert pair.device.discard() == 1, "and without a kick the chain is there all the same"


def test_kicks_are_on_after_a_start_whatever_the_ring_said_before() -> None:
    for event_idx in (False, True):
        ring = RawRing(start=False, base=77)
        ring.write16(ring.used, 1)
        ring.start(event_idx=event_idx)
        assert ring.read16(ring.used) == 0
        assert not event_idx or ring.avail_event() == 77


def test_a_call_is_eight_bytes_to_an_eventfd(make: MakePair) -> None:
    pair = make()
    call = os.eventfd(0, os.EFD_NONBLOCK)
    pair.device.call_fd = call
    for _ in range(2):
        complete_one(pair)
        assert not pair.device.notify(), "delivered"
        pair.collected()
    assert os.eventfd_read(call) == 2
    os.eventfd_write(call, 2**64 - 2)
    complete_one(pair)
    assert not pair.device.notify(), "a full one has a call pending already"
    assert pair.device.calls == 3
    os.close(call)


def test_r_vu_98_a_call_over_a_socket_survives_a_full_and_a_closed_one(make: MakePair) -> None:
    pair = make()
    ours, theirs = socket.socketpair()
    pair.device.call_fd = ours.fileno()
    complete_one(pair)
    pair.device.notify()
    assert theirs.recv(100) == (1).to_bytes(8, sys.byteorder)
    pair.collected()
    ours.setblocking(False)
    fill(ours.fileno())
    ours.setblocking(True)  # as User Mode Linux leaves it: the call must not wait
    complete_one(pair)
    assert not pair.device.notify()
    theirs.close()
    pair.collected()
    complete_one(pair)
    assert not pair.device.notify()
    ours.close()


def test_r_vu_98_a_broken_call_socket_is_no_sigpipe() -> None:
    code = """
import signal, socket
from raw_ring import RawRing
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
ring = RawRing()
ring.put(0, ring.data, 1)
ring.offer(0)
ours, theirs = socket.socketpair()
theirs.close()
ring.queue.call_fd = ours.fileno()
ring.queue.discard()
ring.queue.notify()
print(ring.queue.calls)
"""
    assert run_python(code).stdout == "1\n"


def test_r_vu_55_after_a_swap_of_the_call_descriptor_the_last_call_is_repeated(pair: Pair) -> None:
    masked, unmasked = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
    pair.device.call_fd = masked
    complete_one(pair)
    pair.device.notify()
    pair.device.call_fd = unmasked
    pair.device.notify()
    assert os.eventfd_read(unmasked) == 1
    pair.device.notify()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(unmasked)
    os.close(masked)
    os.close(unmasked)


def test_what_was_completed_before_a_fault_is_still_called_for() -> None:
    ring = RawRing()
    ring.put(0, ring.data, 1)
    ring.offer(0, 99)
    with pytest.raises(GuestError, match="R-RING-71"):
        ring.queue.discard()
    assert ring.queue.notify()
    assert ring.used_elements() == [(0, 0)]
    ring.queue.stop()
    assert not ring.queue.notify()


# -- a front end that truncates its file (R-RING-82) -------------------------------------------------------------------


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)


@pytest.fixture
def truncatable() -> Iterator[tuple[int, Memory, DriverQueue, DeviceQueue]]:
    """A memfd as guest memory: the ring in its first pages, buffers in the last one."""
    file = os.memfd_create("guest")
    os.ftruncate(file, 16384)
    memory = Memory([Region(0, 16384, 0, mmap.mmap(file, 16384), 0)])
    driver = DriverQueue(memory, 0, 8)
    queue = DeviceQueue(0)
    queue.start(memory, 8, driver.desc, driver.avail, driver.used)
    yield file, memory, driver, queue
    os.close(file)


def operate(queue: DeviceQueue, name: str) -> object:
    """One operation on a queue, by its name, that would succeed."""
    with open("/dev/zero", "rb") as zeros, open(os.memfd_create("host"), "wb") as host:
        return {
            "drain": lambda: queue.drain(host.fileno()),
            "drain_into": lambda: queue.drain_into(lambda view: len(bytes(view))),
            "discard": queue.discard,
            "pending": queue.pending,
            "pop": queue.pop,
            "push": lambda: queue.push(b"x"),
            "fill_from": lambda: queue.fill_from(b"x"),
            "fill": lambda: queue.fill(zeros.fileno()),
        }[name]()


def ends_with_lost_memory(queue: DeviceQueue, operation: str) -> None:
    with pytest.raises(FrontEndError, match="R-RING-82: the file behind guest memory was truncated"):
        operate(queue, operation)
    assert isinstance(queue.fault, FrontEndError)
    assert not queue.running


@pytest.mark.parametrize("operation", ["drain", "drain_into", "discard", "pending", "pop", "push", "fill_from", "fill"])
def test_r_ring_82_the_ring_itself_is_gone(truncatable, operation: str) -> None:
    file, memory, driver, queue = truncatable
    driver.add([(12288, 4)])
    driver.publish()
    os.ftruncate(file, 0)
    ends_with_lost_memory(queue, operation)
    assert memory.lost
    assert memory.read(0, 16384) == bytes(16384)
    assert queue.drain(1) is Status.STOPPED
    with pytest.raises(FrontEndError, match="R-RING-82"):
        queue.start(memory, 8, driver.desc, driver.avail, driver.used)


@pytest.mark.parametrize("operation", ["drain", "drain_into", "discard", "pop", "push", "fill_from", "fill"])
def test_r_ring_82_chains_are_not_taken_from_a_table_that_is_gone(truncatable, operation: str) -> None:
    file, memory, driver, queue = truncatable
    queue.start(memory, 8, 12288, driver.avail, driver.used)
    driver.add([(8192, 4)])
    driver.publish()
    os.ftruncate(file, 12288)
    ends_with_lost_memory(queue, operation)
    assert queue.stop() == 0, "its zeros are no empty chain"
    assert memory.read(driver.used, 4) == bytes(4)


@pytest.mark.parametrize("operation", ["drain", "drain_into", "pop"])
def test_r_ring_82_a_readable_buffer_is_gone(truncatable, operation: str) -> None:
    file, _, driver, queue = truncatable
    driver.add([(12288, 4)])
    driver.publish()
    os.ftruncate(file, 12288)
    ends_with_lost_memory(queue, operation)


@pytest.mark.parametrize("operation", ["push", "fill_from", "fill"])
def test_r_ring_82_a_writable_buffer_is_gone(truncatable, operation: str) -> None:
    file, _, driver, queue = truncatable
    driver.add((), [(12288, 4)])
    driver.publish()
    os.ftruncate(file, 12288)
    ends_with_lost_memory(queue, operation)


@pytest.mark.parametrize("faulthandler", [False, True])
def test_r_ring_82_any_other_sigbus_goes_where_it_went_before(faulthandler: bool) -> None:
    code = f"""
import ctypes, faulthandler, mmap, os
from vsport._ring import Memory, Region
if {faulthandler}:
    faulthandler.enable()
guarded = Memory([Region(0, 4096, 0, bytearray(4096), 0)])
file = os.memfd_create("other")
os.ftruncate(file, 4096)
other = mmap.mmap(file, 4096)
address = ctypes.addressof(ctypes.c_char.from_buffer(other))
os.ftruncate(file, 0)
ctypes.string_at(address, 1)
"""
    result = run_python(code)
    assert result.returncode == -signal.SIGBUS
    assert ("Fatal Python error: Bus error" in result.stderr) is faulthandler


def test_r_ring_82_memory_that_is_gone_is_not_guarded_any_more() -> None:
    code = """
import mmap, os
from vsport._ring import Memory, Region
file = os.memfd_create("guest")
os.ftruncate(file, 4096)
mapping = mmap.mmap(file, 4096)
Memory([Region(0, 4096, 0, mapping, 0)])
os.ftruncate(file, 0)
mapping[0]
"""
    assert run_python(code).returncode == -signal.SIGBUS


# -- races, for real (R-RING-18, R-RING-81) ----------------------------------------------------------------------------


def wait_for(eventfd: int) -> None:
    ready, _, _ = select.select([eventfd], [], [], 20)
    assert ready, "a notification was lost: both sides sleep"
    os.eventfd_read(eventfd)


def be_device(pair: Pair, kick: int, rounds: int) -> None:
    while pair.device.chains < rounds:
        pair.device.kicks_off()
        pair.device.discard()
        pair.device.notify()
        if pair.device.chains < rounds and not pair.device.kicks_on():
            wait_for(kick)


def be_driver(pair: Pair, kick: int, call: int, rounds: int) -> None:
    added = collected = 0
    while collected < rounds:
        while pair.driver.free and added < rounds:
            pair.driver.add([(BUFFERS, 1)])
            added += 1
        if pair.driver.publish():
            os.eventfd_write(kick, 1)
        before = collected
        while pair.driver.collect() is not None:
            collected += 1
        if collected == before and not pair.driver.calls_on():
            wait_for(call)
        pair.driver.calls_off()


@layouts
@pytest.mark.parametrize("size", [1, 4])
def test_r_ring_18_no_wake_up_is_lost_in_either_direction(
    make: MakePair, layout: str, event_idx: bool, size: int
) -> None:
    """Two processes that sleep whenever the ring lets them: a lost notification would leave both asleep."""
    pair = make(size=size, event_idx=event_idx, **LAYOUTS[layout])
    kick, call = os.eventfd(0), os.eventfd(0)
    pair.device.call_fd = call
    rounds = 30000
    device = os.fork()
    if device == 0:
        try:
            be_device(pair, kick, rounds)
        finally:
            os._exit(0)
    try:
        be_driver(pair, kick, call, rounds)
    finally:
        os.kill(device, signal.SIGKILL)
        os.waitpid(device, 0)
        os.close(kick)
        os.close(call)


@pytest.mark.parametrize("change", ["addr", "len", "avail"])
def test_r_ring_81_a_rewritten_descriptor_is_one_snapshot_or_the_other(change: str) -> None:
    """Another process rewrites what the device reads: every result is one of the two, or a clean fault."""
    size = 4096 + 2 * HALF + 4096
    mapping = mmap.mmap(-1, size)
    memory = Memory([Region(0, size, 0, mapping, 0)])
    ring_size, data = 256, 8192
    avail, used = 4096, 4096 + 1024
    mapping[data : data + 16] = b"A" * 8 + b"B" * 8
    for head in (0, 1):
        mapping[16 * head : 16 * head + 16] = (data + 8 * head).to_bytes(8, "little") + b"\x08" + bytes(7)
    place, values = {
        "addr": (0, [data.to_bytes(8, "little"), (data + 8).to_bytes(8, "little")]),
        "len": (8, [(8).to_bytes(4, "little"), (0xFFFFFFFF).to_bytes(4, "little")]),
        "avail": (avail + 4, [b"\0\0", b"\1\0"]),
    }[change]
    parent = os.getpid()
    writer = os.fork()
    if writer == 0:
        while os.getppid() == parent:
            for _ in range(1000):
                mapping[place : place + len(values[0])] = values[0]
                mapping[place : place + len(values[0])] = values[1]
        os._exit(0)
    seen: set[bytes] = set()
    allowed = {"len": {b"A" * 8, b"R-RING-76"}}.get(change, {b"A" * 8, b"B" * 8})
    queue = DeviceQueue(0)
    rounds, deadline = 0, time.monotonic() + 20  # the other process may have to wait for a processor
    try:
        while rounds < 30000 or (seen < allowed and time.monotonic() < deadline):
            rounds += 1
            mapping[avail + 2 : avail + 4] = b"\1\0"
            mapping[used : used + 4] = bytes(4)
            queue.start(memory, ring_size, 0, avail, used)
            try:
                seen.add(queue.pop() or b"")
            except GuestError as exc:
                assert change == "len"
                seen.add(exc.rule.encode())
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
    assert seen == allowed


# -- the driver's side -------------------------------------------------------------------------------------------------


def test_the_driver_lays_its_queue_out_as_the_specification_wants() -> None:
    memory = Memory([Region(4096, 1 << 20, 0, bytearray(1 << 20), 0)])
    driver = DriverQueue(memory, 8192, 256)
    assert (driver.desc, driver.avail, driver.used) == (8192, 8192 + 4096, 8192 + 8192), "two pages are the driver's"
    assert [DriverQueue.footprint(size) for size in (1, 128, 32768)] == [8192, 8192, 860160]
    for gpa, error in ((8192 + 16, ValueError), (0, IndexError), ((1 << 20) + 4096, IndexError)):
        with pytest.raises(error):
            DriverQueue(memory, gpa, 8)
    for size in (0, 3, 65536):
        with pytest.raises(ValueError, match="power of two"):
            DriverQueue(memory, 8192, size)


@layouts
def test_the_driver_goes_on_in_a_copy_of_its_memory(make: MakePair, layout: str) -> None:
    pair = make(size=4, indirect=True, **LAYOUTS[layout])
    heads = [pair.send(b"one")]
    pair.device.discard()
    heads.append(pair.driver.add([(BUFFERS, 4)], indirect_table=TABLES))
    pair.memory = Memory([Region(0, RAM, FRONT_END, bytearray(pair.memory.regions[0].buffer), 0)])
    pair.driver.rebind(pair.memory)
    pair.start(base=pair.device.stop(), reset=False)
    heads.append(pair.driver.add([(BUFFERS, 2)], indirect_table=TABLES + 64))
    pair.driver.publish()
    assert pair.device.discard() == 6
    assert [pair.driver.collect() for _ in range(4)] == [*((head, 0) for head in heads), None]
    assert (pair.driver.free, pair.driver.in_flight) == (4, 0)


@pytest.mark.parametrize(
    ("regions", "error"),
    [
        ([], IndexError),
        ([region(length=4096)], IndexError),
        ([region(), region(gpa=4096)], IndexError),
        ([region(gpa=4096, size=8192, length=8192)], IndexError),
        ([region(size=8192, offset=8, length=8200)], ValueError),
    ],
)
def test_a_driver_that_cannot_move_stays_where_it_is(
    make: MakePair, regions: list[Region], error: type[Exception]
) -> None:
    pair = make()
    pair.send(b"abc")
    with pytest.raises(error):
        pair.driver.rebind(Memory(regions))
    assert pair.device.pop() == b"abc"
    assert pair.collected() == [0]


def test_a_driver_that_moves_leaves_the_memory_as_it_is(make: MakePair) -> None:
    pair = make()
    memory = Memory([Region(0, 8192, 0, bytearray(PATTERN[:8192]), 0)])
    pair.driver.rebind(memory)
    assert memory.read(0, 8192) == PATTERN[:8192]


@layouts
def test_the_driver_counts_its_descriptors(make: MakePair, layout: str) -> None:
    pair = make(size=4, indirect=True, **LAYOUTS[layout])
    with pytest.raises(ValueError, match="at least one element"):
        pair.driver.add()
    first = pair.driver.add([(BUFFERS, 1), (BUFFERS, 1)], [(BUFFERS + 8, 1)])
    assert (pair.driver.free, pair.driver.in_flight) == (1, 1)
    with pytest.raises(BufferError, match="2 descriptors are needed and 1 are free"):
        pair.driver.add([(BUFFERS, 1)] * 2)
    second = pair.driver.add([(BUFFERS, 1)] * 2, indirect_table=TABLES)
    assert (pair.driver.free, pair.driver.in_flight) == (0, 2)
    assert pair.device.pending() == 0, "not published"
    pair.driver.publish()
    assert not pair.driver.publish(), "nothing new"
    assert pair.device.discard() == 4
    assert [pair.driver.collect(), pair.driver.collect()] == [(first, 0), (second, 0)]
    assert pair.driver.collect() is None
    assert (pair.driver.free, pair.driver.in_flight) == (4, 0)


def test_the_driver_refuses_an_indirect_table_that_was_not_negotiated(make: MakePair) -> None:
    pair = make()
    with pytest.raises(ValueError, match="not negotiated"):
        pair.driver.add([(BUFFERS, 1)], indirect_table=TABLES)


def test_a_refused_element_costs_no_descriptor(make: MakePair) -> None:
    pair = make()
    for bad in ((BUFFERS, -1), (BUFFERS, 1 << 32), (-1, 1), (1 << 64, 1)):
        with pytest.raises(OverflowError):
            pair.driver.add([(BUFFERS, 1), bad])
    assert (pair.driver.free, pair.driver.in_flight) == (8, 0)


@pytest.mark.parametrize(
    ("used", "why"),
    [
        ((8, 0), "did not have"),
        ((0xFFFFFFFF, 0), "did not have"),
        ((1, 0), "did not have"),
        ((0, 5), "more than there was room for"),
    ],
)
def test_r_ring_84_a_device_that_returns_nonsense_breaks_the_queue(make: MakePair, used, why: str) -> None:
    pair = make()
    pair.driver.add([(BUFFERS, 100)], [(BUFFERS + 200, 4)])
    pair.driver.publish()
    pair.memory.write(pair.driver.used + 4, used[0].to_bytes(4, "little") + used[1].to_bytes(4, "little"))
    pair.memory.write(pair.driver.used + 2, b"\1\0")
    with pytest.raises(DeviceError, match=f"R-RING-84: .*{why}"):
        pair.driver.collect()
    assert pair.driver.broken
    for call in (pair.driver.collect, pair.driver.publish, lambda: pair.driver.add([(0, 1)])):
        with pytest.raises(DeviceError, match="the queue is broken"):
            call()


def test_r_ring_84_a_used_index_that_jumps_breaks_the_queue(make: MakePair) -> None:
    pair = make()
    pair.memory.write(pair.driver.used + 2, b"\x09\0")
    with pytest.raises(DeviceError, match="ahead by more"):
        pair.driver.collect()


def test_r_ring_15_the_driver_takes_completions_in_any_order(make: MakePair) -> None:
    pair = make()
    heads = [pair.driver.add((), [(BUFFERS, 4)] * 2) for _ in range(4)]
    pair.driver.publish()
    order = [heads[i] for i in (2, 0, 3, 1)]
    for i, head in enumerate(order):
        pair.memory.write(pair.driver.used + 4 + 8 * i, head.to_bytes(4, "little") + bytes(4))
    pair.memory.write(pair.driver.used + 2, b"\4\0")
    assert [pair.driver.collect() for _ in range(5)] == [*((head, 0) for head in order), None]
    assert sorted(pair.driver.add((), [(BUFFERS, 4)] * 2) for _ in range(4)) == sorted({*heads})


@pytest.mark.parametrize("packed", [False, True])
def test_r_ring_51_a_driver_takes_skipped_chains_as_full_ones(make: MakePair, packed: bool) -> None:
    pair = make(packed=packed, in_order=True)
    heads = [pair.driver.add((), [(BUFFERS, 4)] * (1 + i % 2)) for i in range(4)]
    pair.driver.publish()
    used(pair, heads[2], 3)
    assert [pair.driver.collect() for _ in range(3)] == [(heads[0], 4), (heads[1], 8), (heads[2], 3)]
    assert (pair.driver.collect(), pair.driver.free, pair.driver.in_flight) == (None, 6, 1)
    assert not pair.driver.all_used()


def used(pair: Pair, head: int, length: int) -> None:
    """Writes the first used entry by hand; it is for the first three chains."""
    if pair.packed:
        entry = length.to_bytes(4, "little") + head.to_bytes(2, "little") + (0x8082).to_bytes(2, "little")
        pair.memory.write(pair.driver.desc + 8, entry)
    else:
        pair.memory.write(pair.driver.used + 4, head.to_bytes(4, "little") + length.to_bytes(4, "little"))
        pair.memory.write(pair.driver.used + 2, b"\3\0")


@pytest.mark.parametrize("packed", [False, True])
def test_r_ring_52_a_driver_in_order_uses_descriptors_one_after_the_other(make: MakePair, packed: bool) -> None:
    pair = make(size=8, packed=packed, in_order=True)
    heads = []
    for _ in range(6):
        heads += [pair.driver.add([(BUFFERS, 1)] * 3), pair.driver.add([(BUFFERS, 1)])]
        pair.driver.publish()
        pair.device.discard()
        pair.collected()
    assert heads == ([0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3] if packed else [0, 3, 4, 7] * 3), "ids, or heads"


@pytest.mark.parametrize(
    ("used", "why"),
    [((8, 0x8080), "did not have"), ((1, 0x8080), "did not have"), ((0, 0x8082), "more than there was room for")],
)
def test_r_ring_84_a_packed_device_that_returns_nonsense_breaks_the_queue(
    make: MakePair, used: tuple[int, int], why: str
) -> None:
    pair = make(packed=True)
    pair.driver.add([(BUFFERS, 100)], [(BUFFERS + 200, 4)])
    pair.driver.publish()
    id, flags = used
    pair.memory.write(pair.driver.desc + 8, (5).to_bytes(4, "little") + (id | flags << 16).to_bytes(4, "little"))
    with pytest.raises(DeviceError, match=f"R-RING-84: .*{why}"):
        pair.driver.collect()
    assert pair.driver.broken


def test_r_ring_45_a_used_length_without_the_write_flag_means_nothing(make: MakePair) -> None:
    pair = make(packed=True)
    pair.driver.add((), [(BUFFERS, 4)])
    pair.driver.publish()
    pair.memory.write(pair.driver.desc + 8, (5).to_bytes(4, "little") + (0x8080 << 16).to_bytes(4, "little"))
    assert pair.collected() == [0]


def test_a_driver_that_wants_calls_gets_one_for_each_batch(pair: Pair) -> None:
    for _ in range(3):
        complete_one(pair)
        assert pair.device.notify()
        assert pair.collected() == [0]


def test_r_ring_18_the_driver_asks_for_calls_and_misses_none(pair: Pair) -> None:
    complete_one(pair)
    assert pair.device.notify()
    assert pair.driver.calls_on(), "there is one already"
    assert pair.collected() == [0]
    assert not pair.driver.calls_on()
    complete_one(pair)
    assert pair.device.notify()
    pair.driver.calls_off()
    complete_one(pair)
    assert not pair.device.notify()
    assert pair.collected() == [0, 0], "and without a call they are there all the same"


# -- the source itself -------------------------------------------------------------------------------------------------


def test_the_bytes_plane_imports_nothing_of_vsport_but_its_errors() -> None:
    """The import rules of the linter do not see Cython."""
    package = pathlib.Path(__file__).parent.parent / "vsport"
    source = "\n".join(path.read_text() for path in (package / "_ring.pyx", *package.glob("ring/*.pxi")))
    imports = re.findall(r"^\s*(?:from|c?import)\s+(vsport\S*|guest_tools\S*|\.\S*)", source, re.MULTILINE)
    assert imports == ["vsport.errors"]
