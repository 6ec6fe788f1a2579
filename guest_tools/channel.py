"""An open port: bytes in both directions, and what the host does at the other end.

The driver's rules that this file is built on: a read of nothing means either that the host is away or that it
sent an empty buffer, and only poll tells which (R-GUEST-08); the host's being away is a level that clears when
it comes back, so waiting for that level to go would spin (R-GUEST-12), and edges are waited for instead; a
write takes at most 32 KiB, returns once the bytes are queued, and may take none at all (R-GUEST-09, 10).
"""

from __future__ import annotations

import errno
import os
import select
import time
from types import TracebackType

from guest_tools.errors import (
    HostLeft,
    HostTimeout,
    PortBusy,
    PortForbidden,
    PortIsConsole,
    PortNotFound,
    PortStuck,
    PortUnplugged,
)
from guest_tools.ports import Port, find_port, refresh

__all__ = ["MAX_WRITE", "READ_SIZE", "ZERO_WRITE_LIMIT", "ZERO_WRITE_PAUSE", "Channel", "Deadline", "open_port"]

MAX_WRITE = 32 * 1024  # The driver copies no more in one call (R-GUEST-09).
READ_SIZE = 64 * 1024  # One read returns one buffer at most, which is a page (R-GUEST-07); a page can be 64 KiB.
LONGEST_SLEEP = 1e6  # seconds
ZERO_WRITE_LIMIT = 100
ZERO_WRITE_PAUSE = 0.01  # seconds


def open_port(which: str | Port, *, timeout: float | None = None, wait_host: bool = False) -> Channel:
    """Open a port by its name, its path or its kernel name, or one that was found before.

    ``timeout`` is the longest time in seconds that any call of the channel waits; None waits for ever. With
    ``wait_host`` the call returns once the host has opened its end too.

    Raises PortNotFound, PortBusy (which names the holder), PortIsConsole, PortForbidden, HostTimeout,
    Unsupported.
    """
    port = find_port(which) if isinstance(which, str) else which
    channel = Channel(_open_node(port), str(port), timeout=timeout)
    try:
        if wait_host:
            channel.wait_host()
    except BaseException:
        channel.close()
        raise
    return channel


def _open_node(port: Port) -> int:
    # O_NONBLOCK: every wait of the channel has a time limit, and close must not hang behind a sleeping write.
    try:
        return os.open(port.device, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as exc:
        raise _open_error(port, exc) from exc


def _open_error(port: Port, exc: OSError) -> Exception:
    if exc.errno == errno.EBUSY:
        return PortBusy(str(port), refresh(port).holders)
    if exc.errno in (errno.EACCES, errno.EPERM):
        return PortForbidden(f"{port}: permission denied; run as root, or let a udev rule give you the node")
    if exc.errno == errno.ENXIO and os.path.exists(port.device):  # R-GUEST-04: or it is being removed just now.
        return PortIsConsole(f"{port} is a console port, which the kernel holds itself; use its terminal /dev/hvcN")
    if exc.errno in (errno.ENXIO, errno.ENODEV, errno.ENOENT):
        return PortNotFound(f"{port} is being unplugged, or its node in /dev is missing")
    return exc


class Deadline:
    """A point in time, ``seconds`` from now; None is never."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def left(self, at_most: float | None = None) -> float | None:
        """How long to sleep now, in seconds: until then, not longer than ``at_most``; None is for ever.

        Can be less than what is left, as the kernel counts its milliseconds in 31 bits.
        """
        if self._end is None:
            return at_most
        left = min(max(0.0, self._end - time.monotonic()), LONGEST_SLEEP)
        return left if at_most is None else min(left, at_most)

    @property
    def passed(self) -> bool:
        return self.left() == 0


class Channel:
    """An open port. Owns the descriptor. A context manager.

    ``read`` and ``write`` wait; ``read_now`` and ``write_now`` never do, for use in an event loop that waits
    for ``edges`` or with ``wait``. One session with the host ends when ``read`` returns b""; the channel stays
    usable, ``wait_host`` waits for the next one.
    """

    def __init__(self, fd: int, label: str, *, timeout: float | None = None) -> None:
        self.timeout = timeout
        self.label = label
        self._fd = fd
        self._level = select.poll()
        self._level.register(fd, select.POLLIN | select.POLLOUT)
        self._zero_writes = 0
        self.edges = select.epoll()
        self.edges.register(fd, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)

    def fileno(self) -> int:
        return self._fd

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def close(self) -> None:
        """Close the port: the host is told, and input that was not read is thrown away (R-GUEST-05)."""
        if not self.closed:
            self.edges.close()
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> Channel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # The host

    @property
    def host_connected(self) -> bool:
        """Whether the host has its end open, at this moment. Raises PortUnplugged."""
        level = self._poll()
        if level & select.POLLHUP and not level & select.POLLIN:
            self._check_plugged()
        return not level & select.POLLHUP

    def _check_plugged(self) -> None:
        """R-GUEST-12: POLLHUP alone is an unplugged port, or the host left while the driver put the answer together.

        A read of no bytes tells them apart, and takes nothing.
        """
        try:
            os.read(self._fd, 0)
        except OSError as exc:
            raise self._io_error(exc) from exc

    def wait_host(self, timeout: float | None = None) -> None:
        """Wait until the host has its end open. Raises HostTimeout, PortUnplugged."""
        deadline = Deadline(self.timeout if timeout is None else timeout)
        while not self.host_connected:
            if deadline.passed:
                raise HostTimeout(f"the host did not open {self.label} in time")
            self.wait(deadline.left())

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for an edge: something happened at the port since the last wait. False after ``timeout`` seconds.

        Look at the port before the first wait, and again after each: an edge does not say what changed, and
        the first wait after open may return at once.
        """
        return bool(self.edges.poll(timeout))

    def _poll(self) -> int:
        ready = self._level.poll(0)
        return ready[0][1] if ready else 0

    # Bytes

    def read(self, size: int = READ_SIZE) -> bytes:
        """The next bytes, at least one and at most ``size``; b"" when the host has closed its end.

        What the host sent before it closed is returned first. Raises HostTimeout, PortUnplugged.
        """
        deadline = Deadline(self.timeout)
        while True:
            data = self.read_now(size)
            if data is not None:
                return data
            if deadline.passed:
                raise HostTimeout(f"the host sent nothing to {self.label} in time")
            self.wait(deadline.left())

    def read_now(self, size: int = READ_SIZE) -> bytes | None:
        """As read, but None when there is nothing now. Raises PortUnplugged."""
        if size <= 0:
            raise ValueError(f"a read of {size} bytes")
        while True:
            try:
                data = os.read(self._fd, size)
            except BlockingIOError:
                return None
            except OSError as exc:
                raise self._io_error(exc) from exc
            if data or not self.host_connected:
                return data
            # An empty buffer, and not the end (R-GUEST-08): look at the next one.

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Queue all of it for the host; waits while the queue is full.

        Raises HostLeft (with ``sent``) when the host is away or leaves meanwhile, HostTimeout, PortUnplugged,
        PortStuck.
        """
        deadline = Deadline(self.timeout)
        rest = memoryview(data).cast("B")
        total = len(rest)
        while rest:
            sent = self.write_now(rest)
            rest = rest[sent:]
            if not sent:
                self._wait_for_room(deadline, total - len(rest))

    def _wait_for_room(self, deadline: Deadline, sent: int) -> None:
        if not self.host_connected:
            raise HostLeft(self.label, sent)
        if deadline.passed:
            raise HostTimeout(f"the host took nothing from {self.label} in time")
        # After a write of nothing no edge will come: that is not a full queue (R-GUEST-10).
        self.wait(deadline.left(at_most=ZERO_WRITE_PAUSE if self._zero_writes else None))

    def write_now(self, data: bytes | memoryview) -> int:
        """Queue as much as there is room for, 32 KiB at most; the number of bytes taken.

        0 means that the host is away, or that the queue is full. Raises PortUnplugged, PortStuck.
        """
        try:
            sent = os.write(self._fd, data[:MAX_WRITE])
        except BlockingIOError:
            return 0
        except OSError as exc:
            raise self._io_error(exc) from exc
        self._zero_writes = 0 if sent or not data else self._zero_writes + 1
        if self._zero_writes > ZERO_WRITE_LIMIT:
            raise PortStuck(self.label)
        return sent

    @property
    def refused(self) -> bool:
        """The last write took nothing although there was room: try again soon, no edge will tell when."""
        return self._zero_writes > 0

    def _io_error(self, exc: OSError) -> Exception:
        return PortUnplugged(self.label) if exc.errno == errno.ENODEV else exc
