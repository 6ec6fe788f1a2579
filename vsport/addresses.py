"""Where stream sockets listen and connect to: Unix paths and TCP ports; what goes wrong there is said in one line."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

from vsport.document import DocumentError, Fields
from vsport.errors import HostError, UsageError
from vsport.parcel import Delivery, Parcel

__all__ = ["TcpAddress", "UnixAddress", "stream_socket"]

_MAX_PATH = 107  # sun_path of sockaddr_un holds 108 bytes, the last one is a NUL
_BACKLOG = 16
_ADDRESSES_MAX = 64
"""Of one host name: more than any name has."""

Target = tuple[socket.AddressFamily, Any]
"""What socket() and connect() want: a family and an address of that family."""


class UnixAddress:
    """A socket file, or with ``abstract`` a name that is no file. Raises UsageError if the path is too long.

    ``mode`` are the rights of the file that listen() makes, as far as the umask lets them; None: all of them.
    """

    def __init__(self, path: str, *, abstract: bool = False, mode: int | None = None) -> None:
        if len(os.fsencode(path)) > _MAX_PATH:
            raise UsageError(f"the socket path {path!r} is longer than {_MAX_PATH} bytes")
        self.path = path
        self.abstract = abstract
        self.mode = mode
        self._file: tuple[int, int] | None = None

    def __str__(self) -> str:
        return f"unix:{self.path}"

    @property
    def _name(self) -> str:
        return f"\0{self.path}" if self.abstract else self.path

    def claims(self) -> list[str]:
        """What nobody else can listen on."""
        return [f"@{self.path}" if self.abstract else os.path.abspath(self.path)]

    def targets(self) -> list[Target]:
        """What to connect to."""
        return [(socket.AF_UNIX, self._name)]

    def listen(self) -> list[socket.socket]:
        """A listening socket, in a list; a dead process's socket file makes way. Raises HostError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            if self.mode is not None:
                os.fchmod(sock.fileno(), self.mode)  # bind() makes the file with the socket's own
            self._bind(sock)
            sock.listen(_BACKLOG)
        except BaseException as exc:
            sock.close()
            self.forget()
            if isinstance(exc, OSError):
                raise HostError(f"cannot listen on {self}: {exc.strerror}") from exc
            raise
        return [sock]

    def _bind(self, sock: socket.socket) -> None:
        try:
            sock.bind(self._name)
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE or self.abstract:
                raise
            self._remove_stale()
            sock.bind(self._name)
        if not self.abstract:
            self._file = _identity(self.path)

    def _remove_stale(self) -> None:
        """Removes the socket file if no process has it any more; raises HostError if it is anything else."""
        found = os.lstat(self.path)
        if not stat.S_ISSOCK(found.st_mode):
            raise HostError(f"cannot listen on {self}: the path exists and is no socket; remove it or use another")
        if not _is_dead(self.path):
            raise HostError(f"cannot listen on {self}: another process listens there; stop it or use another path")
        if _identity(self.path) == (found.st_dev, found.st_ino):
            os.unlink(self.path)

    def forget(self) -> None:
        """Removes the socket file that listen() made, if it is still the same one."""
        with contextlib.suppress(OSError):
            if self._file is not None and _identity(self.path) == self._file:
                os.unlink(self.path)
        self._file = None

    def disown(self) -> None:
        """The socket file is another process's now: forget() leaves it alone."""
        self._file = None

    def give(self, listeners: Sequence[socket.socket], parcel: Parcel) -> dict[str, Any]:
        """What another process needs to listen in our place; ``listeners`` are those of listen(), or none."""
        device, inode = self._file or (0, 0)
        return {"listeners": _give(listeners, parcel), "device": device, "inode": inode}

    def take(self, state: Fields, delivery: Delivery) -> list[socket.socket]:
        """The listening sockets of the process whose give() said ``state``, and with them its socket file.

        Raises DocumentError, and then nothing is taken.
        """
        device, inode = state.integer("device", 0, 2**64 - 1), state.integer("inode", 0, 2**64 - 1)
        listeners = _take(state, delivery, {socket.AF_UNIX})
        name = os.fsencode(self._name)
        if any(os.fsencode(sock.getsockname()) != name for sock in listeners):
            _close(listeners)
            raise DocumentError(f"{state.where}: a listening socket is not that of {self}")
        self._file = (device, inode) if inode else None
        return listeners


def _identity(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def _is_dead(path: str) -> bool:
    """Whether no process has the socket of this file.

    Asked with a datagram socket: a live stream socket says EPROTOTYPE, and is not bothered with a connection, which its
    guest would see as a session.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        return probe.connect_ex(path) == errno.ECONNREFUSED


class TcpAddress:
    """A host and a port; a server may take the first free port up to ``last_port``, or any with port 0.

    ``family`` AF_UNSPEC is IPv4 and IPv6. Names are looked up once, as a look-up blocks the loop.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        last_port: int | None = None,
        family: socket.AddressFamily = socket.AF_UNSPEC,
    ) -> None:
        self.host = host
        self.port = port
        self.last_port = port if last_port is None else last_port
        self.family = family
        self._found: list[Target] = []

    def __str__(self) -> str:
        return f"tcp:{endpoint(self.host, self.port)}"

    def claims(self) -> list[str]:
        """As above; who takes one of several ports, or any, can share them."""
        return [str(self)] if self.port and self.port == self.last_port else []

    def targets(self) -> list[Target]:
        """What to connect to, in the order of preference; raises HostError if the name is unknown."""
        if not self._found:
            self._found = self._look_up(0)
        return self._found

    def _look_up(self, flags: int) -> list[Target]:
        try:
            found = socket.getaddrinfo(self.host or None, self.port, self.family, socket.SOCK_STREAM, flags=flags)
        except (OSError, UnicodeError) as exc:
            raise HostError(f"cannot look up {self.host!r}: {getattr(exc, 'strerror', exc)}") from exc
        return [(family, address) for family, _, _, _, address in found]

    def listen(self) -> list[socket.socket]:
        """A listening socket for each address that the host name has, all on one port; raises HostError."""
        targets = self._look_up(socket.AI_PASSIVE)
        for port in range(self.port, self.last_port):
            with contextlib.suppress(HostError):
                return self._listen_all(targets, port)
        return self._listen_all(targets, self.last_port)

    def _listen_all(self, targets: list[Target], port: int) -> list[socket.socket]:
        socks: list[socket.socket] = []
        failure: OSError | None = None
        for family, address in targets:
            try:
                socks.append(_listen_tcp(family, (address[0], port, *address[2:])))
                port = port or socks[0].getsockname()[1]
            except OSError as exc:
                failure = exc
                if exc.errno == errno.EADDRINUSE:
                    break
        # A name may have addresses that this machine does not: ::1 without IPv6. A port in use is another matter.
        if not socks or (failure is not None and failure.errno == errno.EADDRINUSE):
            for sock in socks:
                sock.close()
            reason = failure.strerror if failure is not None else "it has no address"
            raise HostError(f"cannot listen on {self}: {reason}")
        self.port = port
        return socks

    def forget(self) -> None:
        """Nothing of a TCP listener stays behind."""

    def disown(self) -> None:
        """As above."""

    def give(self, listeners: Sequence[socket.socket], parcel: Parcel) -> dict[str, Any]:
        """What another process needs to listen or to connect in our place, without a look-up of its own."""
        found = [_target_as_dict(family, address) for family, address in self._found]
        return {"listeners": _give(listeners, parcel), "found": found}

    def take(self, state: Fields, delivery: Delivery) -> list[socket.socket]:
        """As in UnixAddress; the port is the one that the other process chose."""
        found = state.each("found", _ADDRESSES_MAX, _read_target)
        listeners = _take(state, delivery, {socket.AF_INET, socket.AF_INET6})
        ports = {sock.getsockname()[1] for sock in listeners}
        if len(ports) > 1 or not all(self._may_be(port) for port in ports):
            _close(listeners)
            raise DocumentError(f"{state.where}: a listening socket is not that of {self}")
        self._found = list(found)
        self.port = max(ports, default=self.port)
        return listeners

    def _may_be(self, port: int) -> bool:
        """Whether listen() could have chosen ``port``."""
        return self.port <= port <= self.last_port or self.port == self.last_port == 0


# -- sockets that go to another process ------------------------------------------------------------------------------


def stream_socket(where: str, fd: int, families: Collection[int], *, listening: bool) -> socket.socket:
    """``fd`` as the stream socket that it has to be. Raises DocumentError, and then ``fd`` is closed."""
    if fd < 0:
        raise DocumentError(f"{where}: a descriptor is missing")
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        os.close(fd)
        raise DocumentError(f"{where}: a descriptor is no socket") from None
    if (
        sock.family not in families
        or sock.type != socket.SOCK_STREAM
        or bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)) is not listening
    ):
        sock.close()
        raise DocumentError(f"{where}: a descriptor is another kind of socket")
    sock.setblocking(False)
    return sock


def _give(listeners: Sequence[socket.socket], parcel: Parcel) -> list[dict[str, int]]:
    return [{"socket": parcel.add(sock.fileno())} for sock in listeners]


def _take(state: Fields, delivery: Delivery, families: Collection[int]) -> list[socket.socket]:
    taken: list[socket.socket] = []
    try:
        state.each("listeners", _ADDRESSES_MAX, partial(_take_listener, taken, delivery, families))
        state.end()
    except DocumentError:
        _close(taken)
        raise
    return taken


def _take_listener(
    taken: list[socket.socket], delivery: Delivery, families: Collection[int], where: str, value: object
) -> None:
    fields = Fields(where, value)
    taken.append(stream_socket(where, delivery.take(fields, "socket"), families, listening=True))
    fields.end()


def _close(socks: Sequence[socket.socket]) -> None:
    for sock in socks:
        sock.close()


def _target_as_dict(family: socket.AddressFamily, address: Any) -> dict[str, Any]:
    host, port, flow, scope = (*address, 0, 0)[:4]
    return {"family": int(family), "host": host, "port": port, "flow": flow, "scope": scope}


def _read_target(where: str, value: object) -> Target:
    """An address to connect to. Its host has to be a number: a name would be looked up, and that blocks."""
    fields = Fields(where, value)
    family, host = fields.integer("family", 0, 0xFFFF), fields.text("host")
    port, flow, scope = (
        fields.integer(name, 0, most) for name, most in (("port", 0xFFFF), ("flow", 0xFFFFF), ("scope", 0xFFFFFFFF))
    )
    fields.end()
    try:
        socket.inet_pton(family, host.partition("%")[0])
    except (ValueError, OSError):
        raise DocumentError(f"{where}: this is no address") from None
    address = (host, port, flow, scope) if family == socket.AF_INET6 else (host, port)
    return socket.AddressFamily(family), address


def _listen_tcp(family: socket.AddressFamily, address: Any) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # IPv4 has a socket of its own
        sock.bind(address)
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def endpoint(host: str, port: int) -> str:
    """``host:port`` with the brackets that an IPv6 address needs."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
