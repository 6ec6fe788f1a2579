"""Rings that break the rules: the queue stops with the rule's name, and nothing else happens (R-RING-70 to 84)."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import fuzz
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_ring import (
    AVAIL,
    HALF,
    INDIRECT,
    NEXT,
    PACKED,
    TOP,
    USED_FLAG,
    WRAP,
    WRITE,
    RawFlight,
    RawPacked,
    RawRing,
)

from vsport._ring import DeviceQueue, Status
from vsport.errors import FrontEndError, GuestError

READING = {
    "drain": lambda queue, host: queue.drain(host),
    "drain_into": lambda queue, host: queue.drain_into(len),
    "discard": lambda queue, host: queue.discard(),
    "pop": lambda queue, host: queue.pop(),
}
WRITING = {
    "fill": lambda queue, host: queue.fill(host),
    "fill_from": lambda queue, host: queue.fill_from(bytes(100)),
    "push": lambda queue, host: queue.push(bytes(8)),
}
OPERATIONS = READING | WRITING

Operation = Callable[[DeviceQueue, int], object]


@dataclass(frozen=True)
class Case:
    """``spoil(ring, flag, head)`` makes a broken chain at ``head``; ``flag`` is the operation's direction."""

    rule: str
    spoil: Callable[[RawRing, int, int], object]
    indirect: bool = True
    packed: str = "the same"
    """The rule that a packed ring breaks with it; "": none."""

    def rule_of(self, layout: type[RawRing]) -> str:
        return self.rule if layout is RawRing or self.packed == "the same" else self.packed


def chain_of(*flags: int) -> Callable[[RawRing, int, int], None]:
    """Descriptors of these flags, linked, each with four bytes."""

    def spoil(ring: RawRing, flag: int, head: int) -> None:
        for i, its in enumerate(flags):
            more = NEXT if i + 1 < len(flags) else 0
            ring.put(head + i, ring.data + 4 * i, 4, its | more, head + i + 1)

    return spoil


def loop(length: int) -> Callable[[RawRing, int, int], None]:
    def spoil(ring: RawRing, flag: int, head: int) -> None:
        for i in range(length):
            ring.put(head + i, ring.data, 4, flag | NEXT, head + (i + 1) % length)

    return spoil


def table(*entries: tuple[int, int]) -> Callable[[RawRing, int, int], None]:
    """An indirect table; each entry is (its flags besides the direction, its next)."""

    def spoil(ring: RawRing, flag: int, head: int) -> None:
        data = [(ring.data, 4, flag | flags, following) for flags, following in entries]
        ring.put(head, ring.data + 256, ring.put_table(ring.data + 256, data), INDIRECT)

    return spoil


def table_at(where: Callable[[RawRing], int], length: int = 32, flags: int = 0) -> Callable[[RawRing, int, int], None]:
    return lambda ring, flag, head: ring.put(head, where(ring), length, INDIRECT | flags, 0)


def buffer_at(where: Callable[[RawRing], int], length: int) -> Callable[[RawRing, int, int], None]:
    return lambda ring, flag, head: ring.put(head, where(ring), length, flag)


def data(ring: RawRing) -> int:
    return ring.data


CASES = {
    "next beyond the table": Case(
        "R-RING-71", lambda ring, flag, head: ring.put(head, ring.data, 4, flag | NEXT, 16), packed=""
    ),
    "next far beyond": Case(
        "R-RING-71", lambda ring, flag, head: ring.put(head, ring.data, 4, flag | NEXT, 65535), packed=""
    ),
    "next beyond the indirect table": Case("R-RING-71", table((NEXT, 2), (0, 0)), packed=""),
    "loop of one": Case("R-RING-72", loop(1)),
    "loop of two": Case("R-RING-72", loop(2)),
    "loop of all": Case("R-RING-72", loop(14)),
    "loop in an indirect table": Case("R-RING-72", table((NEXT, 1), (NEXT, 0)), packed=""),
    "readable after writable": Case("R-RING-74", chain_of(0, WRITE, 0)),
    "readable in a table after writable": Case(
        "R-RING-74",
        lambda ring, flag, head: (
            ring.put(head, ring.data, 4, WRITE | NEXT, head + 1),
            ring.put(head + 1, ring.data + 256, ring.put_table(ring.data + 256, [(ring.data, 4, 0, 0)]), INDIRECT),
        ),
        packed="R-RING-46",
    ),
    "indirect, not negotiated": Case("R-RING-75", table((0, 0)), indirect=False),
    "indirect in a table": Case("R-RING-75", table((NEXT, 1), (INDIRECT, 0)), packed=""),
    "indirect with next": Case("R-RING-75", table_at(data, flags=NEXT)),
    "table of length 0": Case("R-RING-75", table_at(data, 0)),
    "table of length 15": Case("R-RING-75", table_at(data, 15)),
    "table of length 17": Case("R-RING-75", table_at(data, 17)),
    "table of 4 GiB": Case("R-RING-75", table_at(data, 0xFFFFFFF0)),
    "table of 32769 entries": Case("R-RING-75", table_at(data, 32769 * 16)),
    "table in no region": Case("R-RING-75", table_at(lambda ring: 1 << 40)),
    "table across the end of memory": Case("R-RING-75", table_at(lambda ring: ring.end - 16)),
    "table across the end of the address space": Case("R-RING-75", table_at(lambda ring: 2**64 - 16)),
    "buffer in no region": Case("R-RING-76", buffer_at(lambda ring: ring.end, 1)),
    "buffer into a hole": Case("R-RING-76", buffer_at(lambda ring: ring.end - 4, 5)),
    "buffer across two regions into a hole": Case("R-RING-76", buffer_at(lambda ring: ring.data + HALF - 1, HALF + 2)),
    "buffer across the end of the address space": Case("R-RING-76", buffer_at(lambda ring: 2**64 - 4, 5)),
    "buffer at the very end": Case("R-RING-76", buffer_at(lambda ring: 2**64 - 1, 0xFFFFFFFF)),
    "buffer of 4 GiB": Case("R-RING-76", buffer_at(data, 0xFFFFFFFF)),
}


@pytest.fixture
def host() -> Iterator[int]:
    """An endless file that takes everything."""
    fd = os.open("/dev/zero", os.O_RDWR)
    yield fd
    os.close(fd)


def breaks(ring: RawRing, operation: Operation, host: int, rule: str) -> GuestError:
    """The operation raises the rule once; then the queue stands still."""
    with pytest.raises(GuestError) as caught:
        operation(ring.queue, host)
    assert caught.value.rule == rule
    assert caught.value.context["queue"] == 5
    assert ring.queue.fault is caught.value
    assert not ring.queue.running
    assert operation(ring.queue, host) in (Status.STOPPED, None, False, 0)
    assert ring.queue.drain(host) is Status.STOPPED
    return caught.value


LAYOUTS = {"split": RawRing, "packed": RawPacked}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
BROKEN = [
    pytest.param(layout, name, id=f"{name}-{word}")
    for name, case in CASES.items()
    for word, layout in LAYOUTS.items()
    if case.rule_of(layout)
]


@pytest.mark.parametrize(("layout", "name"), BROKEN)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_broken_chain_stops_the_queue(operation: str, layout: type[RawRing], name: str, host: int) -> None:
    case = CASES[name]
    ring = layout(16, indirect=case.indirect)
    case.spoil(ring, WRITE if operation in WRITING else 0, 2)
    ring.offer(2)
    before = ring.image()
    fault = breaks(ring, OPERATIONS[operation], host, case.rule_of(layout))
    assert fault.context["head"] == (0 if ring.packed else 2), "the first slot, or the head"
    assert ring.used_elements() == []
    assert ring.image() == before


@pytest.mark.parametrize(
    ("layout", "name"),
    # A packed chain that is too long goes on in slots which have come back by then: it has an end.
    [case for case in BROKEN if case.values[0] is RawRing or "loop" not in str(case.values[1])],
)
@pytest.mark.parametrize("operation", ["drain", "drain_into", "discard", "fill", "fill_from"])
def test_what_was_offered_before_a_broken_chain_is_completed_first(
    operation: str, layout: type[RawRing], name: str, host: int
) -> None:
    case = CASES[name]
    ring = layout(16, indirect=case.indirect)
    flag = WRITE if operation in WRITING else 0
    for head in (0, 1):
        ring.put(head, ring.data + 1024, 4, flag)
    case.spoil(ring, flag, 2)
    ring.offer(1, 0, 2)
    breaks(ring, OPERATIONS[operation], host, case.rule_of(layout))
    length = 4 if operation in WRITING else 0
    assert ring.used_elements() == [(1, length), (0, length)]


def test_a_broken_chain_waits_until_what_is_before_it_was_written(host: int) -> None:
    ring = RawRing()
    ring.put(0, ring.data, 4)
    ring.offer(0, 0)
    for _ in range(3):
        assert ring.queue.drain_into(lambda view: 0) is Status.BLOCKED
    assert ring.queue.drain(host, budget=2) is Status.MORE
    read_fd, full = os.pipe2(os.O_NONBLOCK)
    os.write(full, bytes(65536))
    assert ring.queue.drain(full) is Status.BLOCKED
    os.close(read_fd)
    os.close(full)
    breaks(ring, READING["drain"], host, "R-RING-79")
    assert ring.used_elements() == [(0, 0)]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("by", [9, 10, 32768, 65535])
def test_r_ring_70_an_index_too_far_ahead_or_behind(operation: str, by: int, host: int) -> None:
    ring = RawRing(base=65530)
    ring.write16(ring.avail + 2, 65530 + by)
    fault = breaks(ring, OPERATIONS[operation], host, "R-RING-70")
    assert (fault.context["next_avail"], fault.context["size"]) == (65530, 8)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_r_ring_70_a_packed_chain_cannot_be_taken_back(operation: str, host: int) -> None:
    ring = RawPacked()
    for head in range(3):
        ring.put(head, ring.data, 4, WRITE if operation in WRITING else 0)
    ring.offer(0, 1, 2)
    assert ring.queue.pending() == 3
    ring.clear()
    assert breaks(ring, OPERATIONS[operation], host, "R-RING-70").context["head"] == 0


def test_r_ring_47_a_packed_chain_is_taken_when_its_head_is_there(host: int) -> None:
    """Slots behind a head that is not available mean nothing, whatever they say (R-RING-43)."""
    ring = RawPacked()
    for head in range(3):
        ring.put(head, ring.data, 4)
    ring.offer(0, 1, 2)
    head = ring.memory.read(0, 16)
    ring.memory.write(0, bytes(16))
    for operation in ("drain", "drain_into", "discard"):
        assert READING[operation](ring.queue, host) in (Status.EMPTY, 0)
    assert ring.queue.pending() == 0
    ring.memory.write(0, head)
    assert (ring.queue.pending(), ring.queue.discard()) == (3, 12)


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("base", [0, WRAP])
def test_r_ring_42_a_packed_chain_across_the_end_of_the_ring(size: int, base: int) -> None:
    """Its slots before the end have one wrap counter, those behind it the other."""
    ring = RawPacked(size, base=base | size - 1)
    ring.memory.write(ring.data, b"abcdefgh")
    for index in range(size):
        ring.put(index, ring.data + index, 1, NEXT if index + 1 < size else 0, index + 1)
    ring.offer(0)
    assert ring.queue.pop() == b"abcdefgh"[:size]
    assert ring.queue.next_avail == ring.moved(base | size - 1, size) == (base ^ WRAP | size - 1)
    assert ring.used_elements() == [(0, 0)]


@pytest.mark.parametrize(("in_order", "ids"), [(False, [5, 3, 4]), (True, [4])])
def test_r_ring_50_one_used_entry_stands_for_a_batch(in_order: bool, ids: list[int]) -> None:
    """It has the id of the last chain, in the first one's place; the slots between are left as they were."""
    ring = RawPacked(start=False)
    ring.start(in_order=in_order)
    for head in (5, 3, 4):
        ring.put(head, ring.data, 4)
    ring.offer(5, 3, 4)
    assert ring.queue.discard() == 12
    slots = [PACKED.unpack(ring.memory.read(16 * slot, 16)) for slot in range(3)]
    assert [id for _, _, id, flags in slots if flags == AVAIL | USED_FLAG] == ids
    assert slots[0][2] == ids[0]
    assert ring.queue.next_avail == WRAP | 3


@pytest.mark.parametrize("in_order", [False, True])
def test_r_ring_50_one_used_element_stands_for_a_batch(in_order: bool) -> None:
    ring = RawRing(start=False)
    ring.start(in_order=in_order)
    for head in (5, 3, 4):
        ring.put(head, ring.data, 4)
    ring.offer(5, 3, 4)
    assert ring.queue.discard() == 12
    assert ring.used_elements() == ([(4, 0), (0, 0), (0, 0)] if in_order else [(5, 0), (3, 0), (4, 0)])


@layouts
def test_r_ring_51_no_batch_has_a_chain_that_the_device_may_write_to(layout: type[RawRing]) -> None:
    """A driver takes those that a batch skips for full ones."""
    ring = layout(start=False)
    ring.start(in_order=True)
    for head, flag in enumerate((0, WRITE, WRITE, 0)):
        ring.put(head, ring.data, 4, flag)
    ring.offer(0, 1, 2, 3)
    assert ring.queue.discard() == 8
    assert ring.used_elements() == [(0, 0), (1, 0), (2, 0), (3, 0)]


@pytest.mark.parametrize("size", [0, 32769])
def test_r_ring_40_a_packed_size_out_of_range_is_refused(size: int) -> None:
    ring = RawPacked(start=False)
    ring.size = size
    with pytest.raises(FrontEndError, match="R-RING-40"):
        ring.start()


@pytest.mark.parametrize("base", [8, WRAP | 8, WRAP | 100])
def test_r_vu_18_a_packed_base_beyond_the_ring_is_refused(base: int) -> None:
    ring = RawPacked(start=False)
    ring.base = base
    with pytest.raises(FrontEndError, match="R-VU-18"):
        ring.start()


def test_r_vu_90_a_packed_queue_does_not_keep_what_is_in_flight() -> None:
    ring = RawPacked(start=False)
    ring.queue.inflight = RawFlight(8).region
    with pytest.raises(FrontEndError, match="R-VU-90"):
        ring.start()
    assert not ring.queue.running


def test_r_ring_49_base_0_of_a_fresh_ring_is_its_beginning(host: int) -> None:
    """User Mode Linux says 0, and its wrap counter is 1. A ring that has come round to 0 is no fresh one."""
    for base, flags, begins in ((0, 0, WRAP), (0, AVAIL | USED_FLAG, 0), (0, USED_FLAG, 0), (WRAP, 0, WRAP)):
        ring = RawPacked(start=False)
        ring.base = base
        ring.memory.write(0, PACKED.pack(0, 0, 0, flags))
        ring.start()
        assert ring.queue.next_avail == begins


def test_r_ring_70_offered_chains_cannot_be_taken_back(host: int) -> None:
    ring = RawRing()
    ring.offer(0, 1, 2)
    assert ring.queue.pending() == 3
    ring.write16(ring.avail + 2, 2)
    with pytest.raises(GuestError, match=r"R-RING-70: avail\.idx moved backwards"):
        ring.queue.pending()
    assert ring.queue.pending() == 0


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("head", [8, 9, 65535])
def test_r_ring_71_a_head_beyond_the_table(operation: str, head: int, host: int) -> None:
    ring = RawRing()
    ring.offer(head)
    assert breaks(ring, OPERATIONS[operation], host, "R-RING-71").context["head"] == head


@pytest.mark.parametrize("operation", ["drain", "drain_into", "discard", "pop"])
@layouts
def test_r_ring_73_empty_descriptors_are_empty_segments(layout: type[RawRing], operation: str, host: int) -> None:
    ring = layout()
    ring.put(0, 1 << 50, 0, NEXT, 1)
    ring.put(1, ring.data, 0)
    ring.offer(0)
    assert OPERATIONS[operation](ring.queue, host) in (Status.EMPTY, 0, b"")
    assert ring.used_elements() == [(0, 0)]


@layouts
def test_r_ring_73_empty_descriptors_between_others(layout: type[RawRing]) -> None:
    ring = layout()
    ring.memory.write(ring.data, b"abcd")
    for i, (addr, length) in enumerate([(0, 0), (ring.data, 2), (2**64 - 1, 0), (ring.data + 2, 2), (0, 0)]):
        ring.put(i, addr, length, NEXT if i < 4 else 0, i + 1)
    ring.offer(0)
    assert ring.queue.pop() == b"abcd"


@layouts
def test_r_ring_78_writable_parts_are_ignored_when_reading(layout: type[RawRing], host: int) -> None:
    ring = layout()
    chain_of(0, WRITE, WRITE)(ring, 0, 0)
    ring.memory.write(ring.data, b"abcdefghijkl")
    before = ring.image()
    ring.offer(0)
    assert ring.queue.pop() == b"abcd"
    chain_of(WRITE)(ring, 0, 3)
    ring.offer(3)
    assert ring.queue.drain(host) is Status.EMPTY
    assert ring.used_elements() == [(0, 0), (3, 0)]
    assert ring.image()[ring.used :] == before[ring.used :]


@pytest.mark.parametrize("operation", WRITING)
@layouts
def test_r_ring_78_readable_parts_are_ignored_when_writing(layout: type[RawRing], operation: str, host: int) -> None:
    ring = layout()
    ring.memory.write(ring.data, b"abcdefghijkl")
    chain_of(0, WRITE, WRITE)(ring, 0, 2)
    ring.put(0, ring.data + 100, 50)
    ring.offer(0, 2)
    OPERATIONS[operation](ring.queue, host)
    assert ring.memory.read(ring.data, 12) == b"abcd" + bytes(8)
    assert ring.used_elements() == [(0, 0), (2, 8)], "only written bytes count"


@pytest.mark.parametrize("operation", ["drain", "discard", "fill_from"])
def test_r_ring_79_a_head_twice_in_flight(operation: str, host: int) -> None:
    ring = RawRing()
    flag = WRITE if operation in WRITING else 0
    for head in (3, 4):
        ring.put(head, ring.data, 4, flag)
    ring.offer(4, 3, 3)
    fault = breaks(ring, OPERATIONS[operation], host, "R-RING-79")
    assert fault.context["head"] == 3
    assert [head for head, _ in ring.used_elements()] == [4, 3]


def test_r_ring_79_a_descriptor_in_two_chains(host: int) -> None:
    ring = RawRing()
    chain_of(0, 0)(ring, 0, 3)
    ring.put(5, ring.data, 4, NEXT, 4)
    ring.offer(3, 5)
    fault = breaks(ring, READING["drain"], host, "R-RING-79")
    assert (fault.context["head"], fault.context["index"]) == (5, 4)


@layouts
def test_a_head_may_come_again_once_it_was_returned(layout: type[RawRing], host: int) -> None:
    ring = layout()
    ring.put(3, ring.data, 4)
    for _ in range(20):
        ring.offer(3)
        assert ring.queue.drain(host) is Status.EMPTY


@pytest.mark.parametrize("operation", ["drain", "drain_into", "fill", "discard", "push", "pop"])
@layouts
def test_r_ring_80_a_driver_that_makes_work_gets_only_its_share_of_it(
    layout: type[RawRing], operation: str, host: int
) -> None:
    """32768 chains, all with the same table of 2047 empty entries: 67 million descriptors for one kick."""
    ring = layout(32768)
    length = ring.put_pieces(ring.data, ring.data, [0] * 2047)
    for head in range(32768):
        ring.put(head, ring.data, length, INDIRECT)
    ring.offer(*range(32768))
    assert OPERATIONS[operation](ring.queue, host) in (Status.MORE, 0, False, b"")
    assert 32768 - 256 < ring.queue.pending() < 32768


@layouts
def test_r_ring_80_huge_totals_allocate_nothing(layout: type[RawRing], host: int) -> None:
    """As many bytes as a ring can name; the memory for them is a few pages that every descriptor names again."""
    ring = layout(256)
    for i in range(256):
        ring.put(i, ring.data, 2 * HALF, NEXT if i < 255 else 0, i + 1)
    ring.offer(0)
    moved = 0
    while ring.queue.drain(host, budget=1 << 20) is Status.MORE:
        moved += 1 << 20
        assert ring.queue.bytes_moved == moved
    assert ring.queue.bytes_moved == 256 * 2 * HALF


@pytest.mark.parametrize("operation", OPERATIONS)
def test_r_ring_83_kicks_without_anything_new(operation: str, host: int) -> None:
    never_started = RawRing(start=False)
    assert OPERATIONS[operation](never_started.queue, host) in (Status.STOPPED, None, False, 0)
    ring = RawRing()
    before = ring.image()
    for _ in range(1000):
        assert OPERATIONS[operation](ring.queue, host) in (Status.EMPTY, None, False, 0)
    assert ring.image() == before
    assert ring.queue.running


def test_other_queues_go_on(host: int) -> None:
    broken, whole = RawRing(), RawRing()
    broken.offer(99)
    whole.put(0, whole.data, 4)
    whole.offer(0)
    breaks(broken, READING["drain"], host, "R-RING-71")
    assert whole.queue.drain(host) is Status.EMPTY


def test_a_broken_queue_starts_again(host: int) -> None:
    ring = RawRing()
    ring.offer(99)
    breaks(ring, READING["drain"], host, "R-RING-71")
    ring.put(0, ring.data, 4)
    ring.write16(ring.avail + 4, 0)
    ring.start()
    assert ring.queue.fault is None
    assert ring.queue.drain(host) is Status.EMPTY


@layouts
def test_regions_at_the_top_of_the_address_space_are_used(layout: type[RawRing]) -> None:
    ring = layout()
    ring.memory.write(TOP, b"abcd")
    ring.put(0, TOP, 4, NEXT, 1)
    ring.put(1, 2**64 - 3, 3)
    ring.offer(0)
    assert ring.queue.pop() == b"abcd\0\0\0"


@settings(max_examples=400, deadline=None)
@given(st.randoms(use_true_random=False))
def test_random_rings_are_read_as_the_rules_say(random: random.Random) -> None:
    fuzz.ring(random)


@settings(max_examples=400, deadline=None)
@given(st.randoms(use_true_random=False))
def test_random_packed_rings_are_read_as_the_rules_say(random: random.Random) -> None:
    fuzz.packed_ring(random)


def test_many_random_rings() -> None:
    chance = random.Random(20110711)
    for _ in range(5000):
        fuzz.ring(chance)
        fuzz.packed_ring(chance)
