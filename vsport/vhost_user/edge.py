"""What a session asks of whoever owns its sockets and descriptors: it does no I/O itself."""

from __future__ import annotations

from collections.abc import Callable
from mmap import mmap
from typing import NamedTuple, Protocol

__all__ = ["Edge", "Mapping"]


class Mapping(NamedTuple):
    """A range of a file, mapped to be written to; it lasts as long as somebody has ``buffer``."""

    buffer: mmap
    start: int
    """Where in ``buffer`` the range begins, in bytes."""


class Edge(Protocol):
    """What a session cannot do itself. No method closes or keeps an ``fd`` unless it says so."""

    def map_shared(self, fd: int, offset: int, size: int) -> Mapping:
        """Maps ``size`` bytes of ``fd``, which may be closed afterwards. Raises FrontEndError (R-VU-61, R-VU-62)."""

    def make_shared(self, size: int) -> int:
        """A new file of ``size`` zeros in memory, for a front end to map; raises FrontEndError."""

    def close_fd(self, fd: int) -> None:
        """Closes a descriptor that came with a message."""

    def make_nonblocking(self, fd: int) -> None:
        """Raises FrontEndError if ``fd`` cannot be written to or read from at all."""

    def signal(self, fd: int) -> None:
        """Writes 8 bytes to a call or error descriptor; never fails, never waits (R-VU-98)."""

    def watch_kick(self, index: int, fd: int) -> None:
        """From now on kicked(index) is called whenever ``fd`` says so. Raises FrontEndError if it never can."""

    def unwatch_kick(self, fd: int) -> None:
        """Ends watch_kick()."""

    def poll_ring(self, index: int, on: bool) -> None:
        """Starts or stops to call kicked(index) by the clock."""

    def poll_log(self, on: bool) -> None:
        """Starts or stops to call log_due() by the clock."""

    def open_channel(self, fd: int) -> None:
        """Keeps ``fd`` as the back-end channel, in place of an older one. Raises FrontEndError without keeping it."""

    def send_request(self, data: bytes, *, need_reply: bool) -> None:
        """Sends a request on the channel; channel_free() is called when the next one may follow, if ``need_reply``."""

    def send_reply(self, data: bytes) -> None:
        """Sends the reply that handle() still owed."""

    def write_state(self, fd: int, data: bytes, done: Callable[[str], None]) -> None:
        """Writes ``data`` to ``fd`` in its own time and closes it; ``done(what went wrong, or "")`` is called later."""

    def read_state(self, fd: int, limit: int, done: Callable[[bytes, str], None]) -> None:
        """Reads ``fd`` to its end, at most ``limit`` bytes, and closes it; ``done(bytes, what went wrong)``, later."""
