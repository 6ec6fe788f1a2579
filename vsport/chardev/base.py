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
import fcntl
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

from vsport.document import DocumentError, Fields
from vsport.errors import HostError
from vsport.loop import Loop, Timer
from vsport.option_table import Option, on_off, text
from vsport.parcel import Delivery, Parcel

__all__ = ["COMMON_OPTIONS", "AlwaysConnected", "Chardev", "ChardevOwner", "LogFile", "open_file"]

COMMON_OPTIONS: Mapping[str, Option] = {
    "logfile": Option(text, None, "a file that gets a copy of what the guest sends"),
    "logappend": Option(on_off, False, "keep what the log file already has"),
}


Ends = tuple[int, int]
"""What the host's bytes are read from, and what the guest's are written to; -1 where there is none."""


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

    Or it goes on in another process, with the very same session: there it is made from the same options and opened by
    ``take()`` with what ``give()`` said here; then ``release()`` takes the place of ``close()`` here.

    A kind implements ``_start()`` and, where it needs them, ``_wipe()``, ``_rearm()``, ``_put_back()`` and ``_stop()``;
    it says ``_connected()`` when its peer is there. For another process it has ``_ends()`` and, where it needs them,
    ``_give()``, ``_take()`` and ``_resume()``. Order and cleaning up are kept here, once for all kinds.
    """

    kind: ClassVar[str]
    """The word after ``--chardev``."""

    summary: ClassVar[str]
    """The kind in one line, for help texts."""

    OPTIONS: ClassVar[Mapping[str, Option]] = COMMON_OPTIONS
    """What the kind accepts on a command line; names as QEMU has them, ``-`` is ``_`` in the constructor."""

    eof_ends_session: ClassVar[bool] = True
    """Whether end of file on ``read_fd`` means that the host left (a file that was read to its end did not leave)."""

    KEPT: ClassVar[Mapping[str, int]] = {}
    """Descriptors that it may keep open from session to session: names, and how they are open (os.O_RDONLY ...)."""

    PASSING: ClassVar[int | None] = None
    """How the descriptor is open that comes and goes with a session; None if a session has none of its own."""

    waits_for_peer: bool = False
    """Whether the daemon shall not serve its guest before a first peer is there (``wait=on``)."""

    def __init__(self, id: str, *, log: LogFile | None = None) -> None:
        self.id = id
        self.log = log
        self.connected = False
        self.edition = 0
        """Another number whenever give() may say something else."""
        self.read_fd = -1
        self.write_fd = -1
        self._loop: Loop | None = None
        self._owner: ChardevOwner | None = None
        self._timer: Timer | None = None
        self._kept: dict[str, int] = {}
        self._passing = -1

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
        self._wipe()
        self._drop_session()
        self._owner.host_disconnected()
        if self._loop is not None:  # the owner may have closed it
            self._rearm()

    def close(self) -> None:
        """Gives up everything, socket files and the log included, without telling the owner."""
        if self._loop is None:
            return
        if self.connected:
            self._wipe()
        self._put_back()
        self._let_go()

    def _let_go(self) -> None:
        """Closes whatever is open. Nobody else sees a change if another process has it all open, too."""
        self.connected = False
        if self._timer is not None:
            self._timer.cancel()
        self._drop_session()
        self._stop()
        for fd in self._kept.values():
            os.close(fd)
        self._kept.clear()
        if self.log is not None:
            self.log.close()
        self._loop = self._owner = self._timer = None

    def _drop_session(self) -> None:
        """Closes the session's descriptors that are not kept."""
        for fd in {self.read_fd, self.write_fd} - {-1}:
            self.loop.unwatch(fd)
        if self._passing >= 0:
            os.close(self._passing)
        self.read_fd = self.write_fd = self._passing = -1
        self.edition += 1

    def describe(self) -> str:
        """As QEMU's query-chardev shows it, e.g. ``disconnected:unix:/run/x.sock,server=on``."""
        return self.kind

    def claims(self) -> list[str]:
        """What it cannot share with another chardev, as far as that can be said before open(): paths, addresses."""
        return [] if self.log is None or self.log.append else [os.path.abspath(self.log.path)]

    def write(self, data: memoryview) -> int:
        """Takes bytes of the guest where there is no ``write_fd``; returns how many (0: none now)."""
        raise AssertionError(f"chardev {self.kind} is written to through its descriptor")

    # -- going on in another process -------------------------------------------------------------------------------

    def give(self, parcel: Parcel) -> dict[str, Any]:
        """What take() needs in another process, while open. Changes nothing: what is not taken goes on here."""
        assert self._loop is not None, f"chardev {self.id} is closed"
        return {
            "kind": self.kind,
            "connected": self.connected,
            "session": parcel.add(self._passing),
            "kept": {name: parcel.add(self._held(name)) for name in self.KEPT},
            "log": parcel.add(self.log_fd),
            **self._give(parcel),
        }

    def take(self, loop: Loop, owner: ChardevOwner, state: Fields, delivery: Delivery) -> None:
        """Opens it with what give() said in another process, and goes on with the session that it had there.

        The owner is not told of that session: ``connected`` says whether there is one. Raises DocumentError, OSError,
        and then nothing is left open. Until the loop runs, nobody else sees a change; release() is the way back.
        """
        assert self._loop is None, f"chardev {self.id} is open"
        self._loop, self._owner = loop, owner
        try:
            self._take_all(state, delivery)
        except BaseException:
            self.release()
            raise

    def _take_all(self, state: Fields, delivery: Delivery) -> None:
        kind = state.text("kind")
        if kind != self.kind:
            raise DocumentError(f"{state.where}: this is a {kind}, and chardev {self.id} is a {self.kind}")
        self.connected = state.boolean("connected")
        self._take_descriptors(state, delivery)
        self._take(state, delivery)
        state.end()
        if self.connected:
            self.read_fd, self.write_fd = self._ends()
        else:
            self._resume()

    def _take_descriptors(self, state: Fields, delivery: Delivery) -> None:
        kept = state.object("kept")
        for name, mode in self.KEPT.items():
            fd = delivery.take(kept, name)
            if fd >= 0:
                _check_descriptor(kept.where, name, self._keep(name, fd), mode)
        kept.end()
        self._passing = delivery.take(state, "session")
        _check_descriptor(state.where, "session", self._passing, self.PASSING if self.connected else None)
        if self.log is None:
            state.integer("log", -1, -1)
        else:
            self.log.fd = delivery.take(state, "log")
            _check_descriptor(state.where, "log", self.log.fd, os.O_WRONLY)

    def release(self) -> None:
        """Another process has it now: closes what is open here, and leaves the session and all files alone."""
        if self._loop is not None:
            self._let_go()

    # -- content ---------------------------------------------------------------------------------------------------

    def save(self) -> bytes:
        """What it holds itself, and has to hold after a move: for most kinds nothing."""
        return b""

    def check(self, state: bytes) -> None:
        """Whether load() can do with ``state``; raises DocumentError if not."""
        if state:
            raise DocumentError(f"chardev {self.id}: a {self.kind} holds nothing, and here is something")

    def load(self, state: bytes) -> None:  # noqa: B027 - a kind may have nothing to do here
        """Holds what save() gave, and check() has found good; while open."""

    # -- what a kind implements ------------------------------------------------------------------------------------

    @abstractmethod
    def _start(self) -> None:
        """Makes the host side available, raises HostError; ends with ``_connected()`` if the peer is there already."""

    def _wipe(self) -> None:  # noqa: B027 - a kind may have nothing to do here
        """The session ends: nothing that is still on its way, in the transport, shall reach the next one."""

    def _rearm(self) -> None:  # noqa: B027 - as above
        """Gets ready for the next peer, without telling the owner of one before the loop's next round."""

    def _put_back(self) -> None:  # noqa: B027 - as above
        """Undoes what others can see: socket files, links, terminal modes; however far ``_start()`` came."""

    def _stop(self) -> None:  # noqa: B027 - as above
        """Closes what ``_start()`` opened, and nobody else sees it."""

    def _ends(self) -> Ends:
        """The two ends of the present session."""
        return -1, self._passing

    def _give(self, parcel: Parcel) -> dict[str, Any]:
        """What this kind has more than others."""
        return {}

    def _take(self, state: Fields, delivery: Delivery) -> None:  # noqa: B027 - a kind may have nothing more
        """The counterpart: kept descriptors are there by now. Raises DocumentError, and nobody else sees a change."""

    def _resume(self) -> None:
        """There was no session: waits for the next peer from the loop's next round on."""
        self._rearm()

    # -- what a kind uses ------------------------------------------------------------------------------------------

    @property
    def loop(self) -> Loop:
        """The loop, while open."""
        assert self._loop is not None, f"chardev {self.id} is closed"
        return self._loop

    def _connected(self, passing: int = -1) -> None:
        """The peer is there, with this passing descriptor if the kind has one.

        Nothing may follow this call: the owner may have closed the chardev in it.
        """
        assert self._owner is not None
        assert not self.connected
        self.edition += 1
        self._passing = passing
        self.read_fd, self.write_fd = self._ends()
        self.connected = True
        self._owner.host_connected()

    def _keep(self, name: str, fd: int) -> int:
        """Keeps ``fd`` open from session to session, until close()."""
        self.edition += 1
        self._kept[name] = fd
        return fd

    def _held(self, name: str) -> int:
        """The kept descriptor of this name, or -1."""
        return self._kept.get(name, -1)

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
            self._rearm()


def _check_descriptor(where: str, name: str, fd: int, mode: int | None) -> None:
    """Raises DocumentError unless ``fd`` is open for ``mode`` and never blocks, or is -1 if ``mode`` is None."""
    if (fd >= 0) is not (mode is not None):
        raise DocumentError(f"{where}: {name}: a descriptor {'belongs here' if fd < 0 else 'does not belong here'}")
    if fd < 0:
        return
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_ACCMODE not in (mode, os.O_RDWR):
        raise DocumentError(f"{where}: {name}: the descriptor is not open for this direction")
    if not flags & os.O_NONBLOCK and not stat.S_ISREG(os.fstat(fd).st_mode):
        raise DocumentError(f"{where}: {name}: the descriptor is one that blocks")
