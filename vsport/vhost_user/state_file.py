"""A device's state going out through a descriptor of the front end's, or coming in, in its own time.

The descriptor is a pipe as a rule, and can be anything. The other end may be slow, and may never come.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from vsport.loop import HUP, READ, WRITE, Loop

__all__ = ["STALL_SECONDS", "StateReader", "StateWriter"]

log = logging.getLogger("vsport.vhost_user")

STALL_SECONDS = 30.0
"""How long a transfer may stand still. A front end reads as fast as it gets rid of what it reads, over a network."""
_PIECE = 1 << 18


class _StateFile:
    """Owns ``fd`` until it is over; a subclass moves bytes whenever the descriptor is ready for that."""

    def __init__(self, loop: Loop, fd: int, events: int) -> None:
        self._loop = loop
        self._fd = fd
        self._moved = False
        self._always_ready = False
        self._timer = loop.call_later(STALL_SECONDS, self._look)
        try:
            os.set_blocking(fd, False)
            loop.watch(fd, events, self._ready)
        except PermissionError:  # a regular file: always ready, so epoll does not wait for it
            self._always_ready = True
            loop.call_soon(self._turn)
        except OSError as exc:
            self._fail_later(exc.strerror or str(exc))

    def _move(self) -> bool:
        """Moves a piece; says whether there may be more. Raises OSError."""
        raise NotImplementedError

    def _finish(self, failure: str) -> None:
        raise NotImplementedError

    def _ready(self, ready: int) -> None:
        if self._fd < 0:
            return
        try:
            more = self._move()
        except BlockingIOError:
            if ready & HUP:
                self._end("the other end has gone")
        except OSError as exc:
            self._end(exc.strerror or str(exc))
        else:
            self._moved = True
            if not more:
                self._end("")

    def _turn(self) -> None:
        """A descriptor that is always ready has its turn in each round."""
        self._ready(0)
        if self._fd >= 0:
            self._loop.call_soon(self._turn)

    def _look(self) -> None:
        """Has it moved since the last look?"""
        if self._moved:
            self._moved = False
            self._timer = self._loop.call_later(STALL_SECONDS, self._look)
        else:
            self._end(f"the other end does nothing for {STALL_SECONDS:g} s")

    def _fail_later(self, why: str) -> None:
        self._loop.call_soon(lambda: self._end(why))

    def _end(self, failure: str) -> None:
        if self._fd >= 0:
            self.close()
            self._finish(failure)

    def close(self) -> None:
        """Gives up, and says nothing; safe to call twice."""
        self._timer.cancel()
        if self._fd >= 0:
            self._loop.unwatch(self._fd)
            os.close(self._fd)
            self._fd = -1


class StateWriter(_StateFile):
    """Writes ``data`` and closes the descriptor, which is what tells the reader that this is all (R-VU-91)."""

    def __init__(self, loop: Loop, fd: int, data: bytes, done: Callable[[str], None]) -> None:
        self._left = memoryview(data)
        self._done = done
        super().__init__(loop, fd, WRITE)

    def _move(self) -> bool:
        self._left = self._left[os.write(self._fd, self._left[:_PIECE]) :]
        return bool(self._left)

    def _finish(self, failure: str) -> None:
        self._done(failure)


class StateReader(_StateFile):
    """Reads to the end, at most ``limit`` bytes."""

    def __init__(self, loop: Loop, fd: int, limit: int, done: Callable[[bytes, str], None]) -> None:
        self._data = bytearray()
        self._limit = limit
        self._done = done
        super().__init__(loop, fd, READ)

    def _move(self) -> bool:
        piece = os.read(self._fd, _PIECE)
        self._data += piece
        if len(self._data) > self._limit:
            self._end(f"more than {self._limit} bytes: no state is that long")
        return bool(piece)

    def _finish(self, failure: str) -> None:
        data, self._data = bytes(self._data), bytearray()
        self._done(data, failure)
