"""Notices that somebody opened a path: how a back end without a listening socket learns of its peer."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

from vsport.loop import READ, Loop, Timer

__all__ = ["OpenWatch"]

POLL_SECONDS = 1.0
_IN_OPEN = 0x20  # inotify(7)
_libc = ctypes.CDLL(None, use_errno=True)


class OpenWatch:
    """Calls ``opened()`` after each open of ``path``, as a hint: look what the state is.

    Without an inotify instance (128 for each user by default) or the right to read ``path``, which a watch needs,
    it calls every second, which is what QEMU does.
    """

    def __init__(self, loop: Loop, path: str, opened: Callable[[], None]) -> None:
        self._loop = loop
        self._opened = opened
        self._timer: Timer | None = None
        self._fd = _watch_opens(path)
        if self._fd >= 0:
            loop.watch(self._fd, READ, self._event)
        else:
            self._timer = loop.call_later(POLL_SECONDS, self._tick)

    @property
    def polling(self) -> bool:
        """Whether it has to look by itself, because the kernel does not tell."""
        return self._timer is not None

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._fd >= 0:
            self._loop.unwatch(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _event(self, _ready: int) -> None:
        os.read(self._fd, 4096)  # what is in the events says no more than that they came
        self._opened()

    def _tick(self) -> None:
        self._timer = self._loop.call_later(POLL_SECONDS, self._tick)
        self._opened()


def _watch_opens(path: str) -> int:
    fd: int = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if fd >= 0 and _libc.inotify_add_watch(fd, os.fsencode(path), _IN_OPEN) < 0:
        os.close(fd)
        return -1
    return fd
