"""A ring written by hand, split or packed, in which every field can be wrong; for tests and for fuzz.py."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from mmap import mmap

from vsport._ring import DeviceQueue, Inflight, Memory, Region

NEXT = 1
WRITE = 2
INDIRECT = 4
AVAIL = 1 << 7
USED_FLAG = 1 << 15
WRAP = 1 << 15

DESC = struct.Struct("<QIHH")
PACKED = struct.Struct("<QIHH")
"""addr, len, id, flags"""
USED = struct.Struct("<II")
U16 = struct.Struct("<H")
FLIGHT_HEAD = struct.Struct("=QHHHH")
FLIGHT_ENTRY = struct.Struct("=B5xHQ")

FRONT_END = 0x7F00_0000_0000
"""What the front end calls guest-physical address 0."""
HALF = 0x8000
"""The data area is two regions of this size, which are adjacent for the guest and far apart on the host."""
TOP = (1 << 64) - 0x1000
"""A third region ends where the address space ends."""

Descriptor = tuple[int, int, int, int]
"""(addr, len, flags, next)"""


def page_up(size: int) -> int:
    return (size + 4095) & ~4095


class RawRing:
    """Guest memory with one split ring and room for data, and the device queue that works on it."""

    packed = False

    def __init__(
        self, size: int = 8, *, event_idx: bool = False, indirect: bool = True, base: int = 0, start: bool = True
    ) -> None:
        self.size = size
        self.avail = 16 * size
        self.used = self.avail + 4 if self.packed else (self.avail + 6 + 2 * size + 3) & ~3
        self.data = page_up(self.used + 6 + 8 * size)
        self.end = self.data + 2 * HALF
        self.buffers = [bytearray(self.data + HALF), bytearray(HALF), bytearray(0x1000)]
        self.memory = Memory(
            [
                Region(0, self.data + HALF, FRONT_END, self.buffers[0], 0),
                Region(self.data + HALF, HALF, FRONT_END + (1 << 30), self.buffers[1], 0),
                Region(TOP, 0x1000, FRONT_END + (2 << 30), self.buffers[2], 0),
            ]
        )
        self.base = self.avail_idx = base
        self.clear()
        self.queue = DeviceQueue(5)
        if start:
            self.start(event_idx=event_idx, indirect=indirect)

    def clear(self) -> None:
        """A ring at its base, in which nothing is offered."""
        self.avail_idx = self.base
        self.write16(self.avail + 2, self.base)
        self.write16(self.used + 2, self.base)

    def start(
        self, *, event_idx: bool = False, indirect: bool = True, reset: bool = True, in_order: bool = False
    ) -> None:
        self.in_order, self.chains_before = in_order, self.queue.chains
        self.queue.start(
            self.memory,
            self.size,
            FRONT_END,
            FRONT_END + self.avail,
            FRONT_END + self.used,
            base=self.base,
            event_idx=event_idx,
            indirect=indirect,
            packed=self.packed,
            in_order=in_order,
            reset=reset,
        )

    def write16(self, gpa: int, value: int) -> None:
        self.memory.write(gpa, U16.pack(value & 0xFFFF))

    def read16(self, gpa: int) -> int:
        return int(U16.unpack(self.memory.read(gpa, 2))[0])

    def put(self, index: int, addr: int, length: int, flags: int = 0, next: int = 0) -> None:
        """Writes a descriptor of the ring's table."""
        self.memory.write(16 * index, DESC.pack(addr, length, flags, next))

    def put_table(self, gpa: int, entries: Iterable[Descriptor]) -> int:
        """Writes an indirect table; returns its length in bytes."""
        table = b"".join(self.encode_entry(entry) for entry in entries)
        self.memory.write(gpa, table)
        return len(table)

    def encode_entry(self, entry: Descriptor) -> bytes:
        """An entry of an indirect table."""
        return DESC.pack(*entry)

    def put_pieces(self, gpa: int, addr: int, sizes: Iterable[int], flags: int = 0) -> int:
        """Writes an indirect table of consecutive buffers from ``addr`` on; returns its length in bytes."""
        entries: list[Descriptor] = []
        for size in sizes:
            entries.append((addr, size, flags | NEXT, len(entries) + 1))
            addr += size
        last = entries.pop()
        entries.append((last[0], last[1], last[2] & ~NEXT, 0))
        return self.put_table(gpa, entries)

    def offer(self, *heads: int) -> None:
        """Publishes chains."""
        for head in heads:
            self.write16(self.avail + 4 + 2 * (self.avail_idx % self.size), head)
            self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        self.write16(self.avail + 2, self.avail_idx)

    def used_elements(self) -> list[tuple[int, int]]:
        """What the device returned since the base, as (id, len)."""
        count = (self.read16(self.used + 2) - self.base) & 0xFFFF
        return [
            USED.unpack(self.memory.read(self.used + 4 + 8 * ((self.base + i) % self.size), 8)) for i in range(count)
        ]

    def set_used_event(self, index: int) -> None:
        self.write16(self.avail + 4 + 2 * self.size, index)

    def avail_event(self) -> int:
        return self.read16(self.used + 4 + 8 * self.size)

    def image(self) -> bytes:
        """All of guest memory except for the used ring, which is the device's own."""
        low = bytes(self.buffers[0])
        return low[: self.used] + low[self.data :] + bytes(self.buffers[1]) + bytes(self.buffers[2])


class RawPacked(RawRing):
    """The same with a packed ring: what put() wrote goes into the ring's slots when it is offered."""

    packed = True

    def __init__(
        self, size: int = 8, *, event_idx: bool = False, indirect: bool = True, base: int = WRAP, start: bool = True
    ) -> None:
        self.table: dict[int, Descriptor] = {}
        super().__init__(size, event_idx=event_idx, indirect=indirect, base=base, start=start)

    def clear(self) -> None:
        """Every slot is as it was left by a chain of one descriptor a turn ago (R-RING-42)."""
        self.place = self.base
        self.offered: list[int] = []
        for slots in range(self.size):
            flags = 0 if self.moved(self.base, slots) & WRAP else AVAIL | USED_FLAG
            self.memory.write(16 * (self.moved(self.base, slots) & ~WRAP), PACKED.pack(0, 0, 0, flags))

    def moved(self, place: int, slots: int) -> int:
        """The place that is so many slots further on."""
        slot = (place & ~WRAP) + slots
        return slot % self.size | (place ^ (slot // self.size << 15)) & WRAP

    def put(self, index: int, addr: int, length: int, flags: int = 0, next: int = 0) -> None:
        self.table[index] = (addr, length, flags, next)

    def encode_entry(self, entry: Descriptor) -> bytes:
        addr, length, flags, id = entry
        return PACKED.pack(addr, length, id, flags)

    def offer(self, *heads: int) -> None:
        """Writes chains into the next slots, with the head as id; at most as many descriptors as there is room for."""
        for head in heads:
            index, count, flags = head, 0, NEXT
            while flags & NEXT and sum(self.offered) + count < self.size:
                addr, length, flags, following = self.table.get(index, (0, 0, 0, 0))
                bits = AVAIL if self.place & WRAP else USED_FLAG
                self.memory.write(16 * (self.place & ~WRAP), PACKED.pack(addr, length, head, flags | bits))
                self.place = self.moved(self.place, 1)
                index, count = following, count + 1
            if count:
                self.offered.append(count)

    def used_elements(self) -> list[tuple[int, int]]:
        """What the device returned since the base, as (id, len), if it was the chains that were offered (R-RING-45)."""
        elements, place = [], self.base
        for slots in self.offered:
            _, length, id, flags = PACKED.unpack(self.memory.read(16 * (place & ~WRAP), 16))
            if flags & (AVAIL | USED_FLAG) != (AVAIL | USED_FLAG if place & WRAP else 0):
                break
            elements.append((id, length if flags & WRITE else 0))
            place = self.moved(place, slots)
        return elements


class RawFlight:
    """An in-flight region written and read by hand (R-VU-85), and what a queue takes of it."""

    def __init__(self, size: int, memory: bytearray | mmap | None = None) -> None:
        self.size = size
        self.memory = bytearray(Inflight.footprint(size)) if memory is None else memory
        self.region = Inflight(self.memory, 0, size)

    @property
    def head(self) -> tuple[int, int, int, int, int]:
        """features, version, desc_num, last_batch_head, used_idx"""
        features, version, desc_num, last_batch_head, used_idx = FLIGHT_HEAD.unpack_from(self.memory)
        return features, version, desc_num, last_batch_head, used_idx

    def put_head(
        self, *, features: int = 0, version: int = 1, desc_num: int = -1, last: int = 0, used_idx: int = 0
    ) -> None:
        FLIGHT_HEAD.pack_into(
            self.memory, 0, features, version, self.size if desc_num < 0 else desc_num, last, used_idx & 0xFFFF
        )

    def entry(self, head: int) -> tuple[int, int, int]:
        """inflight, next, counter"""
        inflight, following, counter = FLIGHT_ENTRY.unpack_from(self.memory, FLIGHT_HEAD.size * (1 + head))
        return inflight, following, counter

    def put_entry(self, head: int, *, inflight: int = 0, next: int = 0, counter: int = 0) -> None:
        FLIGHT_ENTRY.pack_into(self.memory, FLIGHT_HEAD.size * (1 + head), inflight, next, counter)

    def in_flight(self) -> list[int]:
        """The heads of the chains in flight in the order of their counters."""
        marked = [(self.entry(head)[2], head) for head in range(self.size) if self.entry(head)[0]]
        return [head for _, head in sorted(marked)]

    def last_batch(self, count: int) -> list[int]:
        """The last ``count`` chains of the list of batches, the latest first."""
        heads = [self.head[3]]
        while len(heads) < count:
            heads.append(self.entry(heads[-1])[1])
        return heads
