"""A range of a file that came from the front end: guest memory, a dirty log, in-flight descriptors."""

from __future__ import annotations

from typing import Self

from vsport.document import DocumentError, Fields
from vsport.parcel import Delivery, Parcel
from vsport.vhost_user.edge import Edge

__all__ = ["Share"]


class Share:
    """``size`` bytes of ``fd`` from ``offset`` on, mapped. Raises FrontEndError, and then ``fd`` is still the caller's.

    The descriptor is kept, though the mapping does not need it: a process that takes over will.
    """

    def __init__(self, edge: Edge, fd: int, offset: int, size: int) -> None:
        self.buffer, self.start = edge.map_shared(fd, offset, size)
        self.size = size
        self._edge = edge
        self._fd = fd

    def close(self) -> None:
        """Closes the descriptor; the mapping goes with the last user of ``buffer``."""
        self._edge.close_fd(self._fd)

    def give(self, parcel: Parcel) -> int:
        """What the document has as ``fd``."""
        return parcel.add(self._fd)

    @classmethod
    def take(cls, edge: Edge, fields: Fields, delivery: Delivery, offset: int, size: int) -> Self:
        """The share whose descriptor ``fields`` has as ``fd``, and nothing else by now.

        Raises DocumentError, FrontEndError, and keeps nothing.
        """
        fd = delivery.take(fields, "fd")
        if fd < 0:
            raise DocumentError(f"{fields.where}: fd is missing")
        try:
            fields.end()
            return cls(edge, fd, offset, size)
        except BaseException:
            edge.close_fd(fd)
            raise
