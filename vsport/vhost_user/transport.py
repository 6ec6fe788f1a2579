"""Unix stream sockets with descriptors, and files that are mapped: what the server and a front end both stand on.

Nothing here waits: sockets are non-blocking, and the loop says when to go on.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
from array import array
from collections.abc import Sequence
from typing import Any

from vsport.document import DocumentError, Fields
from vsport.errors import FrontEndError
from vsport.parcel import Delivery, Parcel
from vsport.vhost_user.edge import Mapping
from vsport.vhost_user.message import FDS_MAX, PAYLOAD_MAX

__all__ = ["BrokenConnection", "Stream", "make_shared", "map_shared", "send_some", "unix_stream"]


class BrokenConnection(Exception):
    """The socket to the peer is of no more use; the text says why, if that is worth a line in the log."""


class Stream:
    """The receiving half of a Unix stream socket: bytes and descriptors of the message that is coming in."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._data = b""
        self._fds: list[int] = []
        self.reads = 0
        """How often something has come in."""

    def receive(self, size: int) -> bool:
        """Whether ``size`` bytes are there by now. Raises BrokenConnection.

        Never reads more than that: descriptors that arrive belong to this message (R-VU-03).
        """
        while len(self._data) < size:
            try:
                data, fds, flags = _receive_with_fds(self.sock, size - len(self._data))
            except BlockingIOError:
                return False
            except OSError as exc:
                raise BrokenConnection(exc.strerror) from exc
            self.reads += 1
            self._fds += fds
            if flags & socket.MSG_CTRUNC or len(self._fds) > FDS_MAX:
                raise BrokenConnection("more descriptors in a message than can be taken (R-VU-03)")
            if not data:
                raise BrokenConnection("in the middle of a message" if self._data else "end of the connection")
            self._data += data
        return True

    def take_data(self) -> bytes:
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

    # -- handover ------------------------------------------------------------------------------------------------------

    def give(self, parcel: Parcel) -> dict[str, Any]:
        """The socket and the part of a message that has come in, as a document."""
        return {
            "socket": parcel.add(self.sock.fileno()),
            "data": self._data.hex(),
            "fds": [{"fd": parcel.add(fd)} for fd in self._fds],
        }

    @classmethod
    def take(cls, fields: Fields, delivery: Delivery) -> Stream:
        """What give() described. Raises DocumentError, and keeps nothing."""
        fd = delivery.take(fields, "socket")
        sock = unix_stream(fd)
        if sock is None:
            if fd >= 0:
                os.close(fd)
            raise DocumentError(f"{fields.where}: socket is no Unix stream socket")
        stream = cls(sock)
        try:
            stream._data = fields.bytes("data")
            for state in fields.each("fds", FDS_MAX, Fields):
                stream._fds.append(_take_fd(state, delivery))
            fields.end()
            if len(stream._data) > PAYLOAD_MAX:
                raise DocumentError(f"{fields.where}: data are longer than a message")
        except BaseException:
            stream.close()
            raise
        return stream


def _take_fd(fields: Fields, delivery: Delivery) -> int:
    fd = delivery.take(fields, "fd")
    if fd < 0:
        raise DocumentError(f"{fields.where}: fd is missing")
    return fd


def _receive_with_fds(sock: socket.socket, size: int) -> tuple[bytes, list[int], int]:
    """At most ``size`` bytes, the descriptors that came with them, and the flags of recvmsg(). Raises OSError."""
    fds = array("i")
    data, ancillary, flags, _ = sock.recvmsg(size, socket.CMSG_SPACE(FDS_MAX * fds.itemsize), socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return data, list(fds), flags


def send_some(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> int:
    """Sends what there is room for, ``fds`` with its first byte; says how many bytes. Raises BrokenConnection."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
    try:
        return sock.sendmsg([data], ancillary)
    except BlockingIOError:
        return 0
    except OSError as exc:
        raise BrokenConnection(exc.strerror) from exc


def unix_stream(fd: int) -> socket.socket | None:
    """A socket object that owns ``fd``; None, and ``fd`` stays the caller's, if that is no Unix stream socket."""
    try:
        sock = socket.socket(fileno=fd)
    except (OSError, ValueError, OverflowError):
        return None
    if (sock.family, sock.type) == (socket.AF_UNIX, socket.SOCK_STREAM):
        return sock
    sock.detach()
    return None


def map_shared(fd: int, offset: int, size: int) -> Mapping:
    """Maps a range. Raises FrontEndError, also if the file is shorter than it: touching the rest kills (R-VU-62)."""
    end = offset + size
    try:
        status = os.fstat(fd)
        if not size or end > status.st_size:
            raise FrontEndError("R-VU-62", "the file does not hold the range", end=hex(end), file=hex(status.st_size))
        # Ranges may start anywhere (R-VU-61). For files in huge pages st_blksize is the unit that mmap() wants.
        unit = max(mmap.PAGESIZE, status.st_blksize)
        start = offset // unit * unit
        length = min(-(-end // unit) * unit, status.st_size) - start
        buffer = mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=start)
    except (OSError, ValueError, OverflowError) as exc:
        raise FrontEndError("R-VU-61", f"cannot map the file: {exc}", offset=hex(offset), size=hex(size)) from exc
    return Mapping(buffer, offset - start)


def make_shared(name: str, size: int) -> int:
    """A new file of ``size`` zeros in memory, which nobody can make shorter. Raises OSError."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd
