"""Who opens and closes a device node, as it happens: Linux's inotify, for which Python has no module.

It works for every port of every kernel, unlike debugfs, and tells of openings too short to be seen by looking.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Iterator

__all__ = ["OpenWatch", "parse_events"]

# linux/inotify.h
IN_CLOSE_WRITE = 0x08
IN_CLOSE_NOWRITE = 0x10
IN_OPEN = 0x20
EVENT = struct.Struct("=iIII")  # watch descriptor, mask, cookie, length of the name that follows
BUFFER_SIZE = 16 * 1024


def parse_events(data: bytes) -> Iterator[tuple[int, int]]:
    """The watch descriptor and the mask of each event that the kernel wrote. What is cut off is left out."""
    offset = 0
    while offset + EVENT.size <= len(data):
        watch, mask, _, length = EVENT.unpack_from(data, offset)
        yield watch, mask
        offset += EVENT.size + length


class OpenWatch:
    """Watches device nodes for being opened and closed. Owns a descriptor, which poll can wait for.

    Raises OSError when the user's inotify instances are used up.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._paths: dict[int, str] = {}
        self._fd = -1
        self._fd = self._check(self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))

    def fileno(self) -> int:
        return self._fd

    def add(self, path: str) -> None:
        """Watch this node until it is removed. Raises OSError, for instance if this user may not read it."""
        mask = ctypes.c_uint32(IN_OPEN | IN_CLOSE_WRITE | IN_CLOSE_NOWRITE)
        self._paths[self._check(self._libc.inotify_add_watch(self._fd, os.fsencode(path), mask))] = path

    def take(self) -> list[tuple[str, bool]]:
        """What happened since the last call: the node, and whether it was opened (else closed)."""
        data = b""
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._fd, BUFFER_SIZE)
        events = [event for event in parse_events(data) if event[0] in self._paths]
        known = IN_OPEN | IN_CLOSE_WRITE | IN_CLOSE_NOWRITE
        return [(self._paths[watch], bool(mask & IN_OPEN)) for watch, mask in events if mask & known]

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    @staticmethod
    def _check(result: int) -> int:
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result
