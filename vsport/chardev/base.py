"""What every character device back end is to the rest of vsport: one contract, run by one test suite.

A chardev owns its descriptors and says when its host side comes and goes. It moves no bytes by itself: while it is
connected, the pump drains the port's transmit ring into ``write_fd`` and fills its receive ring from ``read_fd`` below
the GIL. A back end without a plain stream descriptor (``ringbuf``) sets ``write_fd = -1`` and takes memoryviews by
``write()`` instead.

How the host's leaving is noticed, for every kind:

* While the chardev is connected, the owner watches both descriptors for HUP, and ``read_fd`` for RDHUP too, whether or
  not the guest reads; an OSError on either one, or HUP on ``write_fd``, means that the peer has left. The owner reads
  what it can still use, and calls ``disconnect()``.
* Where ``eof_ends_session`` is true, end of file, RDHUP or HUP on ``read_fd`` mean the same. A pty says EIO where
  others say end of file. Where it is false, they only mean that there is nothing more to read: the owner stops watching
  ``read_fd`` and goes on writing.
* Either descriptor may be one that epoll refuses with PermissionError because it is always ready (a regular file,
  /dev/null), and both may be the same one.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol

from vsport.errors import HostError
from vsport.loop import Loop, Timer
from vsport.option_table import Option, on_off, text

__all__ = ["COMMON_OPTIONS", "AlwaysConnected", "Chardev", "ChardevOwner", "LogFile", "open_file"]

COMMON_OPTIONS: Mapping[str, Option] = {
    "logfile": Option(text, None, "a file that gets a copy of what the guest sends"),
    "logappend": Option(on_off, False, "keep what the log file already has"),
}


def open_file(path: str, flags: int, purpose: str) -> int:
    """Opens ``path`` without ever waiting; raises HostError that names ``purpose``."""
    try:
        return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, 0o666)
    except OSError as exc:
        raise HostError(f"cannot open {purpose} {path}: {exc.strerror}") from exc


class ChardevOwner(Protocol):
    """Whoever uses a chardev (the port's pump) is told these, always in turns, the first one first."""

    def host_connected(self) -> None:
        """A peer is there: ``read_fd``, ``write_fd`` or ``write()`` are usable from now on.

        May come from within ``open()``, never from within ``disconnect()``.
        """

    def host_disconnected(self) -> None:
        """The peer has gone; the descriptors are already unwatched and closed."""


class LogFile:
    """``logfile=PATH,logappend=on|off``: a copy of every byte that the guest sends and the host takes."""

    def __init__(self, path: str, *, append: bool = False) -> None:
        self.path = path
        self.append = append
        self.fd = -1

    def open(self) -> None:
        """Opens the file; raises HostError."""
        keep = os.O_APPEND if self.append else os.O_TRUNC
        self.fd = open_file(self.path, os.O_WRONLY | os.O_CREAT | keep, "log file")

    def write(self, data: memoryview) -> None:
        """Copies ``data``. A full disk loses the copy, never the port, as with a log that the ring writes."""
        with contextlib.suppress(OSError):
            os.write(self.fd, data)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Chardev(ABC):
    """A host back end of a port.

    Life: made (checks its options, raises UsageError, touches nothing) -> ``open()`` -> any number of connects and
    disconnects -> ``close()``, which is safe to call twice and at any time, also from within a notification.

    A kind implements ``_start()`` and, where it needs them, ``_hang_up()``, ``_rearm()`` and ``_stop()``; it says
    ``_connected()`` when its peer is there. Order and cleaning up are kept here, once for all kinds.
    """

    kind: ClassVar[str]
    """The word after ``--chardev``."""

    summary: ClassVar[str]
    """The kind in one line, for help texts."""

    OPTIONS: ClassVar[Mapping[str, Option]] = COMMON_OPTIONS
    """What the kind accepts on a command line; names as QEMU has them, ``-`` is ``_`` in the constructor."""

    eof_ends_session: ClassVar[bool] = True
    """Whether end of file on ``read_fd`` means that the host left (a file that was read to its end did not leave)."""

    waits_for_peer: bool = False
    """Whether the daemon shall not serve its guest before a first peer is there (``wait=on``)."""

    def __init__(self, id: str, *, log: LogFile | None = None) -> None:
        self.id = id
        self.log = log
        self.connected = False
        self.read_fd = -1
        self.write_fd = -1
        self._loop: Loop | None = None
        self._owner: ChardevOwner | None = None
        self._timer: Timer | None = None
        self._kept: set[int] = set()

    @property
    def log_fd(self) -> int:
        """The log's descriptor, or -1. ``write()`` copies to the log by itself; for ``write_fd`` the owner does."""
        return -1 if self.log is None else self.log.fd

    # -- what the owner calls --------------------------------------------------------------------------------------

    def open(self, loop: Loop, owner: ChardevOwner) -> None:
        """Makes the host side available. Raises HostError that names the chardev, and then nothing is left behind."""
        assert self._loop is None, f"chardev {self.id} is open"
        self._loop, self._owner = loop, owner
        try:
            if self.log is not None:
                self.log.open()
            self._start()
        except (HostError, OSError) as exc:
            self.close()
            raise HostError(f"chardev {self.id}: {exc}") from exc

    def disconnect(self) -> None:
        """Ends the peer's session (the pump saw EOF or an error), tells the owner, gets ready for the next peer.

        What the peer sent and nobody read is dropped: it is not part of the next session.
        """
        if not self.connected:
            return
        assert self._owner is not None
        self.connected = False
        self._hang_up()
        self._owner.host_disconnected()
        if self._loop is not None:  # the owner may have closed it
            self._rearm()

    def close(self) -> None:
        """Gives up everything, socket files and the log included, without telling the owner."""
        if self._loop is None:
            return
        self.connected = False
        if self._timer is not None:
            self._timer.cancel()
        self._hang_up()
        self._stop()
        for fd in self._kept:
            os.close(fd)
        self._kept.clear()
        if self.log is not None:
            self.log.close()
        self._loop = self._owner = self._timer = None

    def describe(self) -> str:
        """As QEMU's query-chardev shows it, e.g. ``disconnected:unix:/run/x.sock,server=on``."""
        return self.kind

    def write(self, data: memoryview) -> int:
        """Takes bytes of the guest where there is no ``write_fd``; returns how many (0: none now)."""
        raise AssertionError(f"chardev {self.kind} is written to through its descriptor")

    # -- what a kind implements ------------------------------------------------------------------------------------

    @abstractmethod
    def _start(self) -> None:
        """Makes the host side available, raises HostError; ends with ``_connected()`` if the peer is there already."""

    def _hang_up(self) -> None:
        """Closes the session's descriptors that are not kept; also called when there is no session."""
        for fd in {self.read_fd, self.write_fd} - {-1}:
            self.loop.unwatch(fd)
            if fd not in self._kept:
                os.close(fd)
        self.read_fd = self.write_fd = -1

    def _rearm(self) -> None:  # noqa: B027 - a kind may have nothing to do here
        """Gets ready for the next peer, without telling the owner of one before the loop's next round."""

    def _stop(self) -> None:  # noqa: B027 - as above
        """Gives up what ``_start()`` made, however far it came."""

    # -- what a kind uses ------------------------------------------------------------------------------------------

    @property
    def loop(self) -> Loop:
        """The loop, while open."""
        assert self._loop is not None, f"chardev {self.id} is closed"
        return self._loop

    def _connected(self, read_fd: int, write_fd: int) -> None:
        """The peer is there. Nothing may follow this call: the owner may have closed the chardev in it."""
        assert self._owner is not None
        assert not self.connected
        self.read_fd, self.write_fd, self.connected = read_fd, write_fd, True
        self._owner.host_connected()

    def _keep(self, fd: int) -> int:
        """Keeps ``fd`` open from session to session, until close()."""
        self._kept.add(fd)
        return fd

    def _later(self, delay: float, callback: Callable[[], None]) -> None:
        """The kind's one timer: calls back in ``delay`` seconds unless it is set again or closed before."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(delay, callback)


class AlwaysConnected(Chardev):
    """A kind whose peer cannot leave: it is connected by ``open()``, and soon again after a ``disconnect()``."""

    retry_seconds: ClassVar[float] = 1.0
    """How long it stays away after a disconnect: a full disk must not make the port flap at full speed."""

    def _rearm(self) -> None:
        self._later(self.retry_seconds, self._restart)

    def _restart(self) -> None:
        try:
            self._start()
        except HostError:
            self._hang_up()
            self._rearm()
