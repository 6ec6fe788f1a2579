"""Descriptors that go to another process, and the numbers by which the document beside them speaks of them."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vsport.document import DocumentError, Fields

__all__ = ["Delivery", "Parcel"]


class Parcel:
    """What is given away. Descriptors stay their owners': sending makes copies of them."""

    def __init__(self) -> None:
        self.fds: list[int] = []

    def add(self, fd: int) -> int:
        """Puts ``fd`` in; returns the number for the document. -1 (no descriptor) stays -1."""
        if fd < 0:
            return -1
        self.fds.append(fd)
        return len(self.fds) - 1

    def copies(self) -> list[int]:
        """A copy of each descriptor, the caller's own; raises OSError, and then there is none."""
        copies: list[int] = []
        try:
            copies.extend(os.dup(fd) for fd in self.fds)
        except OSError:
            Delivery(copies).close()
            raise
        return copies


class Delivery:
    """What has arrived: each descriptor is the taker's from then on, and close() closes those that nobody took."""

    def __init__(self, fds: Sequence[int]) -> None:
        self._fds: list[int | None] = list(fds)

    def take(self, fields: Fields, name: str) -> int:
        """The descriptor that field ``name`` is the number of, -1 if it is -1. Raises DocumentError."""
        number = fields.integer(name, -1, len(self._fds) - 1)
        if number < 0:
            return -1
        fd = self._fds[number]
        if fd is None:
            raise DocumentError(f"{fields.where}: {name} is a descriptor that was taken already")
        self._fds[number] = None
        return fd

    def close(self) -> None:
        for fd in self._fds:
            if fd is not None:
                os.close(fd)
        self._fds.clear()
