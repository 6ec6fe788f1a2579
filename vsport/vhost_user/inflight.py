"""In-flight descriptors: what the front end keeps for the back end that comes after a crash of this one (R-VU-85)."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from vsport._ring import Inflight, Memory, Region
from vsport.constants import QUEUE_SIZE_MAX
from vsport.document import Fields
from vsport.errors import FrontEndError
from vsport.parcel import Delivery, Parcel
from vsport.vhost_user.edge import Edge
from vsport.vhost_user.message import InflightArea
from vsport.vhost_user.share import Share

__all__ = ["InflightRegion", "layout"]

_ALIGNMENT = 8
"""Of the numbers in it, which are read and written whole."""
_FRESH = bytes(16)
"""What a queue's region begins with before it is used: version 0."""


def layout(asked: InflightArea, queues: int) -> InflightArea:
    """What GET_INFLIGHT_FD asks for, with the size that it takes. Raises FrontEndError (R-VU-28, R-VU-86)."""
    _check(asked, queues)
    return replace(asked, mmap_size=asked.num_queues * Inflight.footprint(asked.queue_size), mmap_offset=0)


def _check(area: InflightArea, queues: int) -> None:
    if not 1 <= area.num_queues <= queues:
        raise FrontEndError("R-VU-28", "no such number of queues", asked=area.num_queues, queues=queues)
    if not 1 <= area.queue_size <= QUEUE_SIZE_MAX or area.queue_size & (area.queue_size - 1):
        raise FrontEndError("R-RING-01", "a queue's size is a power of two, at most 32768", size=area.queue_size)


class InflightRegion:
    """SET_INFLIGHT_FD: one region for each of the first ``num_queues`` queues, one behind the other (R-VU-86).

    Takes ``share`` over, also if it raises FrontEndError.
    """

    def __init__(self, area: InflightArea, share: Share, queues: int) -> None:
        self._area = area
        self._share = share
        try:
            _check(area, queues)
            self._stride = Inflight.footprint(area.queue_size)
            if area.num_queues * self._stride > area.mmap_size:
                raise FrontEndError("R-VU-86", "the queues' regions do not fit", size=area.mmap_size)
            if area.mmap_offset % _ALIGNMENT:
                raise FrontEndError("R-VU-86", "the regions are misaligned", offset=hex(area.mmap_offset))
        except FrontEndError:
            share.close()
            raise

    def of(self, index: int, size: int) -> Inflight | None:
        """The region of queue ``index``, None if it has none; raises FrontEndError if the queue is too long for it.

        A guest may have made its queues shorter than the front end said.
        """
        if index >= self._area.num_queues:
            return None
        if size > self._area.queue_size:
            what = "the queue is longer than its in-flight region"
            raise FrontEndError("R-VU-86", what, queue=index, size=size, region=self._area.queue_size)
        return Inflight(self._share.buffer, self._share.start + index * self._stride, size)

    def forget(self) -> None:
        """Nothing is in flight any more: the guest has begun anew. No queue may have its region now."""
        # As guest memory, because that survives a front end which makes the file shorter (R-RING-82).
        memory = Memory([Region(0, self._share.size, 0, self._share.buffer, self._share.start)])
        for index in range(self._area.num_queues):
            memory.write(index * self._stride, _FRESH)

    def close(self) -> None:
        self._share.close()

    # -- handover ------------------------------------------------------------------------------------------------------

    def give(self, parcel: Parcel) -> dict[str, Any]:
        """The region as a document, its descriptor in ``parcel``."""
        return {**asdict(self._area), "fd": self._share.give(parcel)}

    @classmethod
    def take(cls, edge: Edge, fields: Fields, delivery: Delivery, queues: int) -> InflightRegion:
        """What give() described. Raises DocumentError, FrontEndError, and keeps nothing."""
        area = InflightArea(
            mmap_size=fields.integer("mmap_size", 1, 2**64 - 1),
            mmap_offset=fields.integer("mmap_offset", 0, 2**64 - 1),
            num_queues=fields.integer("num_queues", 1, queues),
            queue_size=fields.integer("queue_size", 1, QUEUE_SIZE_MAX),
            padded=fields.boolean("padded"),
        )
        return cls(area, Share.take(edge, fields, delivery, area.mmap_offset, area.mmap_size), queues)
