"""``ringbuf``: keeps the newest bytes of the guest in memory."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import ClassVar

from vsport.chardev.base import COMMON_OPTIONS, AlwaysConnected, LogFile
from vsport.document import DocumentError, Fields
from vsport.errors import UsageError
from vsport.option_table import Option, size
from vsport.parcel import Delivery

__all__ = ["RingBuf"]

DEFAULT_SIZE = 64 << 10
MAX_SIZE = 1 << 30
SAVED_MAX = 16 << 20
"""Of a larger one, so much of the newest bytes moves along with the device."""
_SAVED = struct.Struct("<Q")  # the bytes overwritten so far; what can be read follows


class RingBuf(AlwaysConnected):
    """``--chardev ringbuf[,size=SIZE]``: the last ``size`` bytes, read by ``read()``; it never blocks the guest."""

    kind = "ringbuf"
    summary = "keeps the newest bytes in memory"
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "size": Option(size, DEFAULT_SIZE, "how many bytes are kept, a power of two"),
        **COMMON_OPTIONS,
    }

    def __init__(self, id: str, *, size: int = DEFAULT_SIZE, log: LogFile | None = None) -> None:
        super().__init__(id, log=log)
        if size < 1 or size & (size - 1) or size > MAX_SIZE:
            raise UsageError(f"chardev {id}: size={size}: must be a power of two, at most 1G")
        self.size = size
        self.overwritten = 0
        """Bytes that nobody read before newer ones took their place, since open()."""
        self._buffer = bytearray()
        self._produced = self._consumed = 0  # total bytes; the difference is what can be read

    def _start(self) -> None:
        if not self._buffer:
            self._allocate()
        self._connected()

    def _allocate(self) -> None:
        self._buffer = bytearray(self.size)
        self._produced = self._consumed = self.overwritten = 0

    def _stop(self) -> None:
        self._buffer = bytearray()
        self._consumed = self._produced

    def _take(self, state: Fields, delivery: Delivery) -> None:
        """What it holds comes by load()."""
        self._allocate()

    def __len__(self) -> int:
        """How many bytes can be read."""
        return self._produced - self._consumed

    def write(self, data: memoryview) -> int:
        if self.log is not None:
            self.log.write(data)
        newest = data[-self.size :]
        self._produced += len(data) - len(newest)
        at = self._produced & (self.size - 1)
        first = min(len(newest), self.size - at)
        self._buffer[at : at + first] = newest[:first]
        self._buffer[: len(newest) - first] = newest[first:]
        self._produced += len(newest)
        self._drop(self._produced - self.size)
        return len(data)

    def _drop(self, oldest: int) -> None:
        """Forgets what was written before byte number ``oldest``."""
        if oldest > self._consumed:
            self.overwritten += oldest - self._consumed
            self._consumed = oldest

    def read(self, limit: int) -> bytes:
        """Takes the oldest bytes, at most ``limit`` of them; there may be none."""
        data = self._peek(self._consumed, min(limit, len(self)))
        self._consumed += len(data)
        return data

    def _peek(self, start: int, count: int) -> bytes:
        """``count`` bytes from byte number ``start`` on, which are there."""
        at = start & (self.size - 1)
        return bytes(self._buffer[at : at + count] + self._buffer[: max(0, at + count - self.size)])

    def save(self) -> bytes:
        count = min(len(self), SAVED_MAX)
        return _SAVED.pack(self.overwritten + len(self) - count) + self._peek(self._produced - count, count)

    def check(self, state: bytes) -> None:
        if state and not _SAVED.size <= len(state) <= _SAVED.size + SAVED_MAX:
            raise DocumentError(f"chardev {self.id}: this is not what a ringbuf saved: it has {len(state)} bytes")
        if state and _SAVED.unpack_from(state)[0] >= 2**63:
            raise DocumentError(f"chardev {self.id}: this is not what a ringbuf saved: it lost more than there can be")

    def load(self, state: bytes) -> None:
        """Content that is larger than this ring loses its oldest bytes, as if it had been written here."""
        saved = memoryview(state or _SAVED.pack(0))
        content = saved[_SAVED.size :]
        newest = content[-self.size :]
        (overwritten,) = _SAVED.unpack_from(saved)
        self._buffer[: len(newest)] = newest
        self._produced, self._consumed = len(newest), 0
        self.overwritten = overwritten + len(content) - len(newest)
