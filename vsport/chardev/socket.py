"""``socket``: a Unix or TCP stream socket, as server or as client."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

from vsport.addresses import Target, TcpAddress, UnixAddress, endpoint, stream_socket
from vsport.chardev.base import COMMON_OPTIONS, Chardev, Ends, LogFile
from vsport.document import DocumentError, Fields
from vsport.errors import HostError, UsageError
from vsport.loop import READ, WRITE, Loop, Timer
from vsport.option_table import Option, integer, on_off, text
from vsport.parcel import Delivery, Parcel

__all__ = ["Socket"]

_CONNECT_SECONDS = 10.0
"""How long a client that does not reconnect may keep its start waiting."""
_ACCEPT_PAUSE_SECONDS = 1.0

Address = UnixAddress | TcpAddress
Adopt = Callable[[socket.socket], None]


class _Listener:
    """The server's side: takes one client at a time, the others wait in the backlog."""

    def __init__(self, loop: Loop, address: Address, adopt: Adopt) -> None:
        self._loop = loop
        self._address = address
        self._adopt = adopt
        self._timer: Timer | None = None
        self._socks: list[socket.socket] = []

    def start(self) -> None:
        self._socks = self._address.listen()
        self.rearm()

    def rearm(self) -> None:
        for sock in self._socks:
            self._loop.watch(sock.fileno(), READ, partial(self._accept, sock))

    def _accept(self, sock: socket.socket, _ready: int) -> None:
        try:
            connection, _ = sock.accept()
        except (BlockingIOError, ConnectionAbortedError):  # the client has left already
            return
        except OSError:  # no descriptor or memory is left: the client waits until there is
            self._pause()
            self._timer = self._loop.call_later(_ACCEPT_PAUSE_SECONDS, self.rearm)
            return
        self._pause()
        self._adopt(connection)

    def _pause(self) -> None:
        for sock in self._socks:
            self._loop.unwatch(sock.fileno())

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._pause()
        for sock in self._socks:
            sock.close()
        self._socks = []

    def give(self, parcel: Parcel) -> dict[str, Any]:
        return self._address.give(self._socks, parcel)

    def take(self, state: Fields, delivery: Delivery) -> None:
        """Raises DocumentError. The next client is accepted after rearm()."""
        self._socks = self._address.take(state, delivery)
        if not self._socks:
            raise DocumentError(f"{state.where}: no socket listens")

    def resume(self) -> None:
        self.rearm()


class _Connector:
    """The client's side: connects at once or fails, or, with ``retry``, tries for ever without blocking the loop."""

    def __init__(self, loop: Loop, address: Address, adopt: Adopt, retry: float) -> None:
        self._loop = loop
        self._address = address
        self._adopt = adopt
        self._retry = retry
        self._timer: Timer | None = None
        self._untried: list[Target] = []
        self._pending: socket.socket | None = None

    def start(self) -> None:
        targets = self._address.targets()
        if self._retry:
            self._begin()
        else:
            self._adopt(self._connect_now(targets))

    def _connect_now(self, targets: list[Target]) -> socket.socket:
        failure = OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        for family, target in targets:
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                sock.settimeout(_CONNECT_SECONDS)
                sock.connect(target)
                return sock
            except OSError as exc:
                sock.close()
                failure = exc
        raise HostError(
            f"cannot connect to {self._address}: {failure.strerror or failure}; "
            "start its server first, or add reconnect-ms=1000 to try again"
        ) from failure

    def rearm(self) -> None:
        if self._retry:
            self._timer = self._loop.call_later(self._retry, self._begin)

    def _begin(self) -> None:
        self._untried = list(self._address.targets())
        self._try_next()

    def _try_next(self) -> None:
        while self._untried:
            if self._try(*self._untried.pop(0)):
                return
        self.rearm()

    def _try(self, family: socket.AddressFamily, target: object) -> bool:
        """Begins to connect; False if this one has failed already."""
        try:
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError:  # no descriptor is left, or this kernel has no IPv6
            return False
        result = sock.connect_ex(target)  # type: ignore[arg-type]
        if result == errno.EINPROGRESS:
            self._pending = sock
            self._loop.watch(sock.fileno(), WRITE, self._finished)
        elif result == 0:
            self._adopt(sock)
        else:
            sock.close()
        return result in (0, errno.EINPROGRESS)

    def _finished(self, _ready: int) -> None:
        assert self._pending is not None
        sock, self._pending = self._pending, None
        self._loop.unwatch(sock.fileno())
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or _is_connected_to_itself(sock):
            sock.close()
            self._try_next()
        else:
            self._adopt(sock)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._pending is not None:
            self._loop.unwatch(self._pending.fileno())
            self._pending.close()
            self._pending = None

    def give(self, parcel: Parcel) -> dict[str, Any]:
        """A connect that is under way is not given: it begins anew."""
        return self._address.give([], parcel)

    def take(self, state: Fields, delivery: Delivery) -> None:
        """Raises DocumentError."""
        listeners = self._address.take(state, delivery)
        for sock in listeners:
            sock.close()
        if listeners:
            raise DocumentError(f"{state.where}: a client does not listen")

    def resume(self) -> None:
        if self._retry:
            self._timer = self._loop.call_later(0, self._begin)


def _is_connected_to_itself(sock: socket.socket) -> bool:
    """TCP lets a client meet itself if it gets the very port that it calls, as a patient one on this host will."""
    try:
        return bool(sock.getsockname() == sock.getpeername())
    except OSError:  # the peer has left already; the session will show it
        return False


class Socket(Chardev):
    """``--chardev socket,path=PATH`` or ``,host=HOST,port=PORT``, each with ``server=on[,wait=off]`` or as client.

    A server takes one client at a time. A client without ``reconnect-ms`` connects in ``open()`` or fails, and when its
    server has left, stays disconnected.
    """

    kind = "socket"
    summary = "a Unix or TCP stream socket, server or client"
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "path": Option(text, None, "Unix: the socket file"),
        "abstract": Option(on_off, False, "Unix: the path is a name in the abstract namespace, not a file"),
        "host": Option(text, None, "TCP: name or address; a server without it listens on all"),
        "port": Option(integer, None, "TCP: port number; a server takes any free one for 0"),
        "to": Option(integer, None, "TCP server: take the first free port from port= to this one"),
        "ipv4": Option(on_off, None, "TCP: use IPv4 addresses"),
        "ipv6": Option(on_off, None, "TCP: use IPv6 addresses"),
        "nodelay": Option(on_off, None, "TCP: send small messages at once (off if not given)"),
        "server": Option(on_off, False, "listen, instead of connecting"),
        "wait": Option(on_off, None, "server: the guest waits until the first client is there (on if not given)"),
        "reconnect-ms": Option(integer, None, "client: try again after this many milliseconds"),
        "reconnect": Option(integer, None, "client: the same in seconds"),
        **COMMON_OPTIONS,
    }
    PASSING = os.O_RDWR

    def __init__(
        self,
        id: str,
        *,
        path: str | None = None,
        abstract: bool = False,
        host: str | None = None,
        port: int | None = None,
        to: int | None = None,
        ipv4: bool | None = None,
        ipv6: bool | None = None,
        nodelay: bool | None = None,
        server: bool = False,
        wait: bool | None = None,
        reconnect_ms: int | None = None,
        reconnect: int | None = None,
        log: LogFile | None = None,
    ) -> None:
        super().__init__(id, log=log)
        self.server = server
        self.nodelay = bool(nodelay)
        self.waits_for_peer = server and wait is not False
        self._reject("is for a server", {"wait": wait, "to": to}, unless=server)
        self._reject("is for a client", {"reconnect-ms": reconnect_ms, "reconnect": reconnect}, unless=not server)
        tcp = {"host": host, "port": port, "to": to, "ipv4": ipv4, "ipv6": ipv6, "nodelay": nodelay}
        self._reject("is for TCP, not for a Unix socket", tcp, unless=path is None)
        self._reject("is for a Unix socket", {"abstract": abstract or None}, unless=path is not None)
        if path is not None:
            self._address: Address = self._unix(path, abstract)
        else:
            self._address = self._tcp(host, port, to, _family(ipv4, ipv6))
        self._retry = self._retry_seconds(reconnect_ms, reconnect)
        self._side: _Listener | _Connector | None = None
        self._session = ""

    # -- options ---------------------------------------------------------------------------------------------------

    def _wrong(self, what: str) -> UsageError:
        return UsageError(f"chardev {self.id}: {what}")

    def _reject(self, why: str, options: Mapping[str, object], *, unless: bool) -> None:
        for name, value in options.items():
            if value is not None and not unless:
                raise self._wrong(f"{name}= {why}")

    def _unix(self, path: str, abstract: bool) -> UnixAddress:
        try:
            return UnixAddress(path, abstract=abstract)
        except UsageError as exc:
            raise self._wrong(str(exc)) from None

    def _tcp(
        self, host: str | None, port: int | None, to: int | None, family: socket.AddressFamily | None
    ) -> TcpAddress:
        if port is None:
            raise self._wrong("needs path= (Unix) or port= (TCP)")
        if host is None and not self.server:
            raise self._wrong("a client needs host=")
        if port > 65535 or (to or 0) > 65535:
            raise self._wrong("a port number is at most 65535")
        if to is not None and to < port:
            raise self._wrong(f"to={to} is below port={port}")
        if family is None:
            raise self._wrong("ipv4=off,ipv6=off leaves no address")
        return TcpAddress(host or "", port, last_port=to, family=family)

    def _retry_seconds(self, milliseconds: int | None, seconds: int | None) -> float:
        if milliseconds is not None and seconds is not None:
            raise self._wrong("reconnect-ms= and reconnect= are the same, give one of them")
        retry = (milliseconds or 0) / 1000 or float(seconds or 0)
        if retry > 86400:
            raise self._wrong("reconnect: at most one day")
        return retry

    # -- life ------------------------------------------------------------------------------------------------------

    def _make_side(self) -> _Listener | _Connector:
        if self.server:
            return _Listener(self.loop, self._address, self._adopt)
        return _Connector(self.loop, self._address, self._adopt, self._retry)

    def claims(self) -> list[str]:
        """What it listens on; where it connects to, others may, too."""
        return [*super().claims(), *(self._address.claims() if self.server else [])]

    def _start(self) -> None:
        self._side = self._make_side()
        self._side.start()

    def _adopt(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        if isinstance(self._address, TcpAddress):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, self.nodelay)
            self._session = _session(connection, self.server)
        self._connected(connection.detach())

    def _ends(self) -> Ends:
        return self._passing, self._passing

    def _rearm(self) -> None:
        if self._side is not None:
            self._side.rearm()

    def _put_back(self) -> None:
        self._address.forget()

    def _stop(self) -> None:
        if self._side is not None:
            self._side.stop()
            self._side = None
        self._address.disown()

    def _give(self, parcel: Parcel) -> dict[str, Any]:
        assert self._side is not None
        return {"address": self._side.give(parcel)}

    def _take(self, state: Fields, delivery: Delivery) -> None:
        self._side = self._make_side()
        self._side.take(state.object("address"), delivery)
        if self.connected:
            self._check_session(state.where)

    def _check_session(self, where: str) -> None:
        families = {socket.AF_UNIX} if isinstance(self._address, UnixAddress) else {socket.AF_INET, socket.AF_INET6}
        fd, self._passing = self._passing, -1
        connection = stream_socket(where, fd, families, listening=False)
        if isinstance(self._address, TcpAddress):
            self._session = _session(connection, self.server)
        self._passing = connection.detach()

    def _resume(self) -> None:
        if self._side is not None:
            self._side.resume()

    def describe(self) -> str:
        if self.connected and self._session:
            return self._session
        abstract = ",abstract=on" if isinstance(self._address, UnixAddress) and self._address.abstract else ""
        server = ",server=on" if self.server else ""
        return f"{'' if self.connected else 'disconnected:'}{self._address}{abstract}{server}"


def _family(ipv4: bool | None, ipv6: bool | None) -> socket.AddressFamily | None:
    """As in QEMU, naming one of the two excludes the other; None: both are excluded."""
    if ipv4 is False and ipv6 is False:
        return None
    if ipv4 == ipv6:
        return socket.AF_UNSPEC
    return socket.AF_INET if ipv4 or ipv6 is False else socket.AF_INET6


def _session(connection: socket.socket, server: bool) -> str:
    """Both ends of a TCP connection, QEMU's way."""
    here = endpoint(*connection.getsockname()[:2])
    try:
        there = endpoint(*connection.getpeername()[:2])
    except OSError:  # it has left already
        there = "?"
    return f"tcp:{here}{',server=on' if server else ''} <-> {there}"
