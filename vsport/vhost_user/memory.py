"""Guest memory as the front end shares it: regions of files that are mapped here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vsport._ring import Memory, Region
from vsport.document import Fields
from vsport.errors import FrontEndError
from vsport.parcel import Delivery, Parcel
from vsport.vhost_user.edge import Edge
from vsport.vhost_user.message import MemoryRegion
from vsport.vhost_user.share import Share

__all__ = ["MEM_SLOTS", "SharedMemory"]

MEM_SLOTS = 512
"""As many regions as a Memory takes, and as QEMU asks for at most (R-VU-32)."""
_U64 = 2**64 - 1


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """A region of the table."""

    wire: MemoryRegion
    share: Share

    @property
    def region(self) -> Region:
        wire = self.wire
        return Region(wire.gpa, wire.size, wire.front_end_addr, self.share.buffer, self.share.start)


class SharedMemory:
    """The table of regions that is in force. ``table`` is never changed, but replaced as a whole."""

    def __init__(self, edge: Edge) -> None:
        self.table = Memory()
        self._edge = edge
        self._parts: list[_Part] = []

    def replace(self, wires: Sequence[MemoryRegion], fds: list[int]) -> None:
        """A whole new table (R-VU-15). Keeps ``fds`` and empties the list, or raises FrontEndError (R-VU-62)."""
        self._use([self._map(wire, fd) for wire, fd in zip(wires, fds, strict=True)])
        fds.clear()

    def add(self, wire: MemoryRegion, fds: list[int]) -> None:
        """One more region; keeps its descriptor, as replace() does. Raises FrontEndError."""
        if len(self._parts) >= MEM_SLOTS:
            raise FrontEndError("R-VU-32", "more memory regions than there are slots", slots=MEM_SLOTS)
        self._use([*self._parts, self._map(wire, fds[0])])
        fds.clear()

    def remove(self, gone: MemoryRegion) -> None:
        """Raises FrontEndError if there is no such region."""
        kept = [part for part in self._parts if not _same_range(part.wire, gone)]
        if len(kept) == len(self._parts):
            raise FrontEndError("R-VU-33", "no such memory region", gpa=hex(gone.gpa), size=hex(gone.size))
        self._use(kept)

    def clear(self) -> None:
        """Gives all of it up; a queue that still runs keeps its own view."""
        self._use([])

    def _map(self, wire: MemoryRegion, fd: int) -> _Part:
        return _Part(wire, Share(self._edge, fd, wire.mmap_offset, wire.size))

    def _use(self, parts: list[_Part]) -> None:
        self.table = Memory([part.region for part in parts])
        gone = [part for part in self._parts if part not in parts]
        self._parts = parts
        for part in gone:
            part.share.close()

    # -- front-end addresses -------------------------------------------------------------------------------------------

    def holds(self, start: int, length: int) -> bool:
        """Whether ``length`` bytes from front-end address ``start`` on are in one region."""
        return self._region_of(start, length) is not None

    def number_at(self, start: int) -> int | None:
        """The 16 bits at a front-end address; None if it is in no region."""
        region = self._region_of(start, 2)
        if region is None:
            return None
        return int.from_bytes(self.table.read(region.gpa + start - region.front_end_addr, 2), "little")

    def _region_of(self, start: int, length: int) -> Region | None:
        for region in self.table.regions:
            if region.front_end_addr <= start <= region.front_end_addr + region.size - length:
                return region
        return None

    # -- handover ------------------------------------------------------------------------------------------------------

    def give(self, parcel: Parcel) -> list[dict[str, Any]]:
        """The table as a document, its descriptors in ``parcel``."""
        return [{**asdict(part.wire), "fd": part.share.give(parcel)} for part in self._parts]

    def take(self, fields: Fields, name: str, delivery: Delivery) -> None:
        """Maps what give() described, for field ``name``. Raises DocumentError, FrontEndError, and keeps nothing."""
        parts: list[_Part] = []
        try:
            for state in fields.each(name, MEM_SLOTS, Fields):
                parts.append(self._take_part(state, delivery))
            self._use(parts)
        except BaseException:
            for part in parts:
                part.share.close()
            raise

    def _take_part(self, fields: Fields, delivery: Delivery) -> _Part:
        names = ("gpa", "size", "front_end_addr", "mmap_offset")
        wire = MemoryRegion(*(fields.integer(name, 0, _U64) for name in names))
        return _Part(wire, Share.take(self._edge, fields, delivery, wire.mmap_offset, wire.size))


def _same_range(region: MemoryRegion, gone: MemoryRegion) -> bool:
    """Where in its file the region starts does not count (R-VU-33)."""
    return (region.gpa, region.size, region.front_end_addr) == (gone.gpa, gone.size, gone.front_end_addr)
