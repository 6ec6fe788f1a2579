"""The transport of vhost-user: the listening socket, one front end's connection, and every descriptor that it sends.

Nothing here waits: sockets are non-blocking, and the loop says when to go on.
"""

from __future__ import annotations

import functools
import logging
import mmap
import os
import socket
from array import array
from collections.abc import Callable

from vsport._ring import Region
from vsport.addresses import UnixAddress
from vsport.device import SerialDevice
from vsport.errors import FrontEndError, GuestError, HostError
from vsport.loop import READ, WRITE, Loop, Timer
from vsport.vhost_user.message import (
    FDS_MAX,
    HEADER_SIZE,
    Header,
    MemoryRegion,
    decode_reply,
    encode_u64,
)
from vsport.vhost_user.session import Session

__all__ = ["POLL_SECONDS", "REPLY_SECONDS", "Server"]

log = logging.getLogger("vsport.vhost_user")

REPLY_SECONDS = 5.0
"""How long a front end may leave our reply unread, or our request unanswered."""
POLL_SECONDS = 0.001
"""How often a ring without kick descriptor is looked at (R-VU-21)."""
_ACCEPT_AGAIN_SECONDS = 1.0
_SIGNAL = encode_u64(1)


class _BrokenConnection(Exception):
    """The socket to the front end is of no more use; the text says why, if that is worth a line in the log."""


class Server:
    """Offers ``device`` to front ends, one at a time: others wait in the backlog until it has gone (R-VU-75).

    Takes over the device's hooks ``on_fault`` and ``on_config_change``.
    """

    def __init__(self, device: SerialDevice, loop: Loop) -> None:
        self.device = device
        self.loop = loop
        self.on_connected: Callable[[], None] = lambda: None
        """A front end has come."""
        self.on_disconnected: Callable[[], None] = lambda: None
        """The front end has gone, and everything that came from it."""
        self._listener: socket.socket | None = None
        self._address: UnixAddress | None = None
        self._connection: Connection | None = None
        device.on_fault = self._on_fault
        device.on_config_change = self._on_config_change

    @property
    def connected(self) -> bool:
        """Whether a front end is there."""
        return self._connection is not None

    @property
    def listening(self) -> bool:
        """Whether another front end can come after this one."""
        return self._listener is not None

    # -- sockets -----------------------------------------------------------------------------------------------------

    def listen(self, path: str) -> None:
        """Listens on a Unix socket at ``path``, in place of one that a dead process left behind. Raises HostError."""
        self._address = UnixAddress(path)
        (listener,) = self._address.listen()
        self._listen_on(listener)

    def adopt(self, fd: int) -> None:
        """Takes over an inherited Unix stream socket, listening or connected (R-VU-103). Raises HostError."""
        inherited = _stream_socket(fd)
        if inherited is None:
            raise HostError(f"descriptor {fd} is not a Unix stream socket")
        os.set_inheritable(fd, False)
        if inherited.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            self._listen_on(inherited)
        else:
            self._connect(inherited)

    def _listen_on(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._accept_when_free()

    def _accept_when_free(self) -> None:
        if self._listener is not None and self._connection is None:
            self.loop.watch(self._listener.fileno(), READ, self._accept)

    def _accept(self, _ready: int) -> None:
        assert self._listener is not None
        self.loop.unwatch(self._listener.fileno())
        try:
            accepted, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            self._accept_when_free()
        except OSError as exc:  # no descriptors or no memory: the peer stays in the backlog
            log.error("cannot accept a front end: %s", exc.strerror)
            self.loop.call_later(_ACCEPT_AGAIN_SECONDS, self._accept_when_free)
        else:
            self._connect(accepted)

    def _connect(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._connection = Connection(sock, self.device, self.loop, self._disconnected)
        log.info("front end connected")
        self.on_connected()

    def _disconnected(self) -> None:
        self._connection = None
        self._accept_when_free()
        self.on_disconnected()

    def close(self) -> None:
        """Ends the connection, stops listening, and removes the socket file if it is still ours."""
        if self._listener is not None:
            self.loop.unwatch(self._listener.fileno())
            self._listener.close()
            self._listener = None
        if self._connection is not None:
            self._connection.close("closing")
        if self._address is not None:
            self._address.forget()
            self._address = None

    # -- hooks of the device -----------------------------------------------------------------------------------------

    def _on_fault(self, index: int, error: GuestError | FrontEndError) -> None:
        """A guest that broke a rule loses one queue; a front end that took guest memory away has ended its session."""
        if self._connection is None:
            return
        self._connection.session.queue_failed(index)
        if isinstance(error, FrontEndError):  # R-RING-82; not at once, as the session may be what is running
            self.loop.call_soon(functools.partial(self._give_up, self._connection, str(error)))

    def _give_up(self, connection: Connection, why: str) -> None:
        if self._connection is connection:
            log.warning("connection ended, the front end broke a rule: %s", why)
            connection.close("refused")

    def _on_config_change(self) -> None:
        if self._connection is not None:
            self._connection.session.config_changed()


class Connection:
    """One front end: its socket, its session, and the descriptors that it sent. The session's Edge."""

    def __init__(self, sock: socket.socket, device: SerialDevice, loop: Loop, on_closed: Callable[[], None]) -> None:
        self.loop = loop
        self.session = Session(device, self)
        self._stream = _Stream(sock)
        self._on_closed = on_closed
        self._header: Header | None = None
        self._unsent = b""
        self._patience: Timer | None = None
        self._channel: _Channel | None = None
        self._polled: set[int] = set()
        self._poll_timer: Timer | None = None
        loop.watch(sock.fileno(), READ, self._readable)

    # -- messages ----------------------------------------------------------------------------------------------------

    def _readable(self, _ready: int) -> None:
        """Goes on with the message that is being received; at most one in a turn, so that others get theirs."""
        try:
            if self._header is None and self._stream.receive(HEADER_SIZE):
                self._header = Header.decode(self._stream.take())
            if self._header is not None and self._stream.receive(self._header.size):
                self._handle(self._header)
        except _BrokenConnection as exc:
            self.close(str(exc))
        except FrontEndError as exc:
            log.warning("connection ended, the front end broke a rule: %s", str(exc))
            self.close("refused")

    def _handle(self, header: Header) -> None:
        self._header = None
        payload, fds = self._stream.take(), self._stream.take_fds()
        log.debug("%s, %d bytes, %d descriptors", header.name, len(payload), len(fds))
        reply = self.session.handle(header, payload, fds)
        if reply is not None:
            self._send(reply)

    def _send(self, reply: bytes) -> None:
        """Raises _BrokenConnection. While a reply is not out, nothing is read: who does not read gets no further."""
        sock = self._stream.sock
        self._unsent = reply[_send_some(sock, reply) :]
        if self._unsent:
            self._patience = self.loop.call_later(REPLY_SECONDS, lambda: self.close("does not read its replies"))
            self.loop.watch(sock.fileno(), WRITE, self._writable)

    def _writable(self, _ready: int) -> None:
        sock = self._stream.sock
        try:
            self._unsent = self._unsent[_send_some(sock, self._unsent) :]
        except _BrokenConnection as exc:
            self.close(str(exc))
            return
        if not self._unsent:
            _cancel(self._patience)
            self.loop.watch(sock.fileno(), READ, self._readable)

    def close(self, why: str) -> None:
        """Ends the connection and gives everything back that came through it."""
        log.info("front end disconnected: %s", why)
        self.loop.unwatch(self._stream.sock.fileno())
        _cancel(self._patience)
        _cancel(self._poll_timer)
        self.session.close()
        self._drop_channel()
        self._stream.close()
        self._on_closed()

    # -- Edge: memory and descriptors ----------------------------------------------------------------------------------

    def map_region(self, region: MemoryRegion, fd: int) -> Region:
        return _map(region, fd)

    def close_fd(self, fd: int) -> None:
        os.close(fd)

    def make_nonblocking(self, fd: int) -> None:
        try:
            os.set_blocking(fd, False)
        except OSError as exc:
            raise FrontEndError("R-VU-21", f"unusable descriptor: {exc.strerror}") from exc

    def signal(self, fd: int) -> None:
        try:
            os.write(fd, _SIGNAL)
        except OSError as exc:  # full: there is a signal in it already; gone: nobody listens
            log.debug("signal to descriptor %d: %s", fd, exc)

    # -- Edge: kicks ---------------------------------------------------------------------------------------------------

    def watch_kick(self, index: int, fd: int) -> None:
        self.make_nonblocking(fd)
        try:
            self.loop.watch(fd, READ, functools.partial(self._kicked, index, fd))
        except OSError as exc:
            raise FrontEndError("R-VU-21", f"cannot wait for kicks on this descriptor: {exc.strerror}") from exc

    def unwatch_kick(self, fd: int) -> None:
        self.loop.unwatch(fd)

    def _kicked(self, index: int, fd: int, ready: int) -> None:
        try:
            alive = bool(os.read(fd, len(_SIGNAL)))
        except BlockingIOError:  # somebody else has read it, or it is only an error that is ready
            alive = bool(ready & READ)
        except OSError:
            alive = False
        if alive:
            self.session.kicked(index)
        else:
            log.warning("queue %d: its kick descriptor is broken, so its kicks are not heard any more", index)
            self.loop.unwatch(fd)

    def poll_ring(self, index: int, on: bool) -> None:
        if on:
            self._polled.add(index)
            if self._poll_timer is None:
                self._poll_timer = self.loop.call_later(POLL_SECONDS, self._poll)
        else:
            self._polled.discard(index)

    def _poll(self) -> None:
        self._poll_timer = None
        for index in sorted(self._polled):
            self.session.kicked(index)
        if self._polled:
            self._poll_timer = self.loop.call_later(POLL_SECONDS, self._poll)

    # -- Edge: back-end channel ----------------------------------------------------------------------------------------

    def open_channel(self, fd: int) -> None:
        sock = _stream_socket(fd)
        if sock is None:
            raise FrontEndError("R-VU-25", "the back-end channel is not a Unix stream socket")
        self._drop_channel()
        self._channel = _Channel(sock, self.loop, self.session)

    def send_request(self, data: bytes, *, need_reply: bool) -> None:
        if self._channel is not None:
            self._channel.send(data, need_reply)

    def _drop_channel(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None


def _cancel(timer: Timer | None) -> None:
    if timer is not None:
        timer.cancel()


class _Channel:
    """The back-end channel: our requests go out, their answers come in whenever they come (R-VU-97)."""

    def __init__(self, sock: socket.socket, loop: Loop, session: Session) -> None:
        sock.setblocking(False)
        self._stream = _Stream(sock)
        self._loop = loop
        self._session = session
        self._timer: Timer | None = None
        loop.watch(sock.fileno(), READ, self._readable)

    def send(self, data: bytes, need_reply: bool) -> None:
        """Sends a request. If there is no room for it, the front end has requests of ours to read as it is."""
        try:
            sent = _send_some(self._stream.sock, data)
        except _BrokenConnection as exc:
            self._lost(str(exc))
            return
        if 0 < sent < len(data):
            self._lost("half a request fitted in")
        elif need_reply:
            self._timer = self._loop.call_later(REPLY_SECONDS, self._unanswered)

    def _unanswered(self) -> None:
        log.warning("the front end has not answered on the back-end channel for %g s", REPLY_SECONDS)
        self._timer = None
        self._session.channel_free()

    def _readable(self, _ready: int) -> None:
        try:
            if self._stream.receive(HEADER_SIZE + len(_SIGNAL)):
                self._answered()
        except _BrokenConnection as exc:
            self._lost(str(exc))
        except FrontEndError as exc:
            log.warning("the front end broke a rule on the back-end channel: %s", str(exc))
            self._lost("refused")

    def _answered(self) -> None:
        self._stream.drop_fds()
        request, result = decode_reply(self._stream.take())
        if result:
            log.warning("the front end refused request %d of ours: %d", request, result)
        if self._timer is not None:  # else it is an answer that came too late, or to no question
            self._timer.cancel()
            self._timer = None
            self._session.channel_free()

    def _lost(self, why: str) -> None:
        log.info("back-end channel closed: %s", why)
        self._session.channel_lost()
        self.close()

    def close(self) -> None:
        """Safe to call twice."""
        _cancel(self._timer)
        self._timer = None
        if self._stream.sock.fileno() >= 0:
            self._loop.unwatch(self._stream.sock.fileno())
            self._stream.close()


class _Stream:
    """The receiving half of a Unix stream socket: bytes and descriptors of the message that is coming in."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._data = b""
        self._fds: list[int] = []

    def receive(self, size: int) -> bool:
        """Whether ``size`` bytes are there by now. Raises _BrokenConnection.

        Never reads more than that: descriptors that arrive belong to this message (R-VU-03).
        """
        while len(self._data) < size:
            try:
                data, fds, flags = _receive_with_fds(self.sock, size - len(self._data))
            except BlockingIOError:
                return False
            except OSError as exc:
                raise _BrokenConnection(exc.strerror) from exc
            self._fds += fds
            if flags & socket.MSG_CTRUNC or len(self._fds) > FDS_MAX:
                raise _BrokenConnection("more descriptors in a message than can be taken (R-VU-03)")
            if not data:
                raise _BrokenConnection("in the middle of a message" if self._data else "end of the connection")
            self._data += data
        return True

    def take(self) -> bytes:
        """What has been received; the next receive() begins anew."""
        data, self._data = self._data, b""
        return data

    def take_fds(self) -> list[int]:
        """The descriptors that came along; they are the caller's from now on."""
        fds, self._fds = self._fds, []
        return fds

    def drop_fds(self) -> None:
        for fd in self.take_fds():
            os.close(fd)

    def close(self) -> None:
        self.drop_fds()
        self.sock.close()


def _receive_with_fds(sock: socket.socket, size: int) -> tuple[bytes, list[int], int]:
    """At most ``size`` bytes, the descriptors that came with them, and the flags of recvmsg(). Raises OSError."""
    fds = array("i")
    data, ancillary, flags, _ = sock.recvmsg(size, socket.CMSG_SPACE(FDS_MAX * fds.itemsize), socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return data, list(fds), flags


def _send_some(sock: socket.socket, data: bytes) -> int:
    """Sends what there is room for; says how many bytes. Raises _BrokenConnection."""
    try:
        return sock.send(data)
    except BlockingIOError:
        return 0
    except OSError as exc:
        raise _BrokenConnection(exc.strerror) from exc


def _stream_socket(fd: int) -> socket.socket | None:
    """A socket object that owns ``fd``; None, and ``fd`` stays the caller's, if that is no Unix stream socket."""
    try:
        sock = socket.socket(fileno=fd)
    except (OSError, ValueError, OverflowError):
        return None
    if (sock.family, sock.type) == (socket.AF_UNIX, socket.SOCK_STREAM):
        return sock
    sock.detach()
    return None


# -- guest memory ------------------------------------------------------------------------------------------------------


def _map(region: MemoryRegion, fd: int) -> Region:
    """Maps a region. Raises FrontEndError, also if the file is shorter than it: touching the rest kills (R-VU-62)."""
    end = region.mmap_offset + region.size
    try:
        status = os.fstat(fd)
        if not region.size or end > status.st_size:
            raise FrontEndError("R-VU-62", "the file does not hold the region", end=hex(end), file=hex(status.st_size))
        # Regions may start anywhere (R-VU-61). For files in huge pages st_blksize is the unit that mmap() wants.
        unit = max(mmap.PAGESIZE, status.st_blksize)
        start = region.mmap_offset // unit * unit
        length = min(-(-end // unit) * unit, status.st_size) - start
        buffer = mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=start)
    except (OSError, ValueError, OverflowError) as exc:
        raise FrontEndError("R-VU-61", f"cannot map the region: {exc}", gpa=hex(region.gpa)) from exc
    return Region(region.gpa, region.size, region.front_end_addr, buffer, region.mmap_offset - start)
