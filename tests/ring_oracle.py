"""What a device may do with a ring that nobody changes meanwhile: the rules once more, in plain Python.

The engine is compared with it on well-formed and on malformed rings. It is written for reading, one chain at a time,
and shares nothing with the engine but the numbers of the rules.
"""

from __future__ import annotations

from collections.abc import Iterator

from raw_ring import AVAIL, DESC, INDIRECT, NEXT, PACKED, TOP, USED_FLAG, WRAP, WRITE, Descriptor, RawPacked, RawRing

Piece = tuple[int, int]
"""(gpa, size)"""


class Broken(Exception):
    """The driver broke a rule."""

    def __init__(self, rule: str) -> None:
        super().__init__(rule)
        self.rule = rule


class Oracle:
    """Reads a RawRing as a device would that has completed nothing since the ring's base."""

    def __init__(self, ring: RawRing, *, indirect: bool) -> None:
        self.ring = ring
        self.indirect = indirect
        self.low = bytes(ring.buffers[0]) + bytes(ring.buffers[1])
        self.top = bytes(ring.buffers[2])
        self.in_flight: set[int] = set()

    def read(self, gpa: int, size: int) -> bytes:
        return self.low[gpa : gpa + size] if gpa < TOP else self.top[gpa - TOP : gpa - TOP + size]

    def read16(self, gpa: int) -> int:
        return int.from_bytes(self.read(gpa, 2), "little")

    def mapped(self, gpa: int, size: int) -> bool:
        return gpa + size <= len(self.low) or TOP <= gpa <= gpa + size <= 1 << 64

    def chains(self, *, writable: bool) -> Iterator[tuple[int, list[Piece]]]:
        """Each offered chain as its head and its pieces of one direction; raises Broken."""
        ring = self.ring
        ahead = (self.read16(ring.avail + 2) - ring.base) & 0xFFFF
        if ahead > ring.size:
            raise Broken("R-RING-70")
        for i in range(ahead):
            head = self.read16(ring.avail + 4 + 2 * ((ring.base + i) % ring.size))
            if head >= ring.size:
                raise Broken("R-RING-71")
            yield head, list(self.pieces(head, writable))

    def pieces(self, head: int, writable: bool) -> Iterator[Piece]:
        after_writable = False
        for addr, length, flags, _ in self.descriptors(head):
            if flags & WRITE:
                after_writable = True
            elif after_writable:
                raise Broken("R-RING-74")
            if bool(flags & WRITE) is writable and length:
                if not self.mapped(addr, length):
                    raise Broken("R-RING-76")
                yield addr, length

    def descriptors(self, head: int) -> Iterator[Descriptor]:
        chain: set[int] = set()
        index = head
        while True:
            if index >= self.ring.size:
                raise Broken("R-RING-71")
            if index in chain:
                raise Broken("R-RING-72")
            if index in self.in_flight:
                raise Broken("R-RING-79")
            chain.add(index)
            self.in_flight.add(index)
            descriptor = self.descriptor(16 * index)
            _, _, flags, index = descriptor
            if flags & INDIRECT:
                yield from self.table(*descriptor)
                return
            yield descriptor
            if not flags & NEXT:
                return

    def table(self, addr: int, length: int, flags: int, _: int) -> Iterator[Descriptor]:
        entries = length // 16
        if not self.indirect or flags & NEXT or length % 16 or not 0 < entries <= 32768:
            raise Broken("R-RING-75")
        if not self.mapped(addr, length):
            raise Broken("R-RING-75")
        index = 0
        for _ in range(entries):
            if index >= entries:
                raise Broken("R-RING-71")
            descriptor = self.descriptor(addr + 16 * index)
            _, _, flags, index = descriptor
            if flags & INDIRECT:
                raise Broken("R-RING-75")
            yield descriptor
            if not flags & NEXT:
                return
        raise Broken("R-RING-71" if index >= entries else "R-RING-72")

    def descriptor(self, gpa: int) -> Descriptor:
        addr, length, flags, following = DESC.unpack(self.read(gpa, 16))
        return addr, length, flags, following


class PackedOracle(Oracle):
    """The same for a packed ring."""

    ring: RawPacked

    def chains(self, *, writable: bool) -> Iterator[tuple[int, list[Piece]]]:
        self.slots = 0
        self.ring.offered.clear()
        while self.slots < self.ring.size:
            place = self.ring.moved(self.ring.base, self.slots)
            if self.slot(place)[2] & (AVAIL | USED_FLAG) != (AVAIL if place & WRAP else USED_FLAG):
                return
            before, pieces = self.slots, list(self.pieces(place, writable))
            self.ring.offered.append(self.slots - before)
            yield self.id, pieces

    def slot(self, place: int) -> Descriptor:
        return self.descriptor(16 * (place & ~WRAP))

    def descriptors(self, head: int) -> Iterator[Descriptor]:
        place = head
        while True:
            descriptor = self.slot(place)
            _, _, flags, self.id = descriptor
            self.slots += 1
            if flags & INDIRECT:
                if place != head:
                    raise Broken("R-RING-46")
                yield from self.table(*descriptor)
                return
            yield descriptor
            if not flags & NEXT:
                return
            if self.slots == self.ring.size:
                raise Broken("R-RING-72")
            place = self.ring.moved(place, 1)

    def table(self, addr: int, length: int, flags: int, _: int) -> Iterator[Descriptor]:
        if not self.indirect or flags & NEXT or length % 16 or not 0 < length // 16 <= 32768:
            raise Broken("R-RING-75")
        if not self.mapped(addr, length):
            raise Broken("R-RING-75")
        for index in range(length // 16):
            yield self.descriptor(addr + 16 * index)

    def descriptor(self, gpa: int) -> Descriptor:
        addr, length, id, flags = PACKED.unpack(self.read(gpa, 16))
        return addr, length, flags, id
