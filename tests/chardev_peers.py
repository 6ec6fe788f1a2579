"""The host side of each kind of chardev, and a small owner that does for one what the pump does for a port."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from vsport.chardev import Chardev, make
from vsport.chardev.ringbuf import RingBuf
from vsport.document import Fields
from vsport.loop import HUP, RDHUP, READ, Loop
from vsport.parcel import Delivery, Parcel

TIMEOUT = 10.0
"""Seconds after which a test gives up; no test waits that long when it passes."""


class Wire:
    """An owner: keeps what it is told in ``events``, and what the host sends in ``received``."""

    def __init__(self, chardev: Chardev, loop: Loop, again: Callable[[], Chardev] | None = None) -> None:
        self.chardev = chardev
        self.loop = loop
        self.again = again
        """Makes another chardev of the same options."""
        self.events: list[str] = []
        self.received = bytearray()
        self.reads = True
        """Whether the guest takes what the host sends."""
        self.then: Callable[[str], None] = lambda event: None

    def open(self) -> None:
        self.chardev.open(self.loop, self)

    def take(self, state: dict[str, Any], delivery: Delivery) -> None:
        """In the place of open(), with what given() said; nothing happens before resume()."""
        self.chardev.take(self.loop, self, Fields("chardev", state), delivery)

    def resume(self) -> None:
        if self.chardev.connected:
            self.watch()

    def host_connected(self) -> None:
        assert self.chardev.connected
        self.events.append("connected")
        self.watch()
        self.then("connected")

    def host_disconnected(self) -> None:
        assert not self.chardev.connected
        assert (self.chardev.read_fd, self.chardev.write_fd) == (-1, -1)
        self.events.append("disconnected")
        self.then("disconnected")

    def watch(self) -> None:
        read_fd, write_fd = self.chardev.read_fd, self.chardev.write_fd
        if write_fd not in (-1, read_fd):
            with contextlib.suppress(PermissionError):  # nobody who could leave
                self.loop.watch(write_fd, 0, lambda _ready: self.chardev.disconnect())
        if read_fd < 0 or not (self.reads or self.chardev.eof_ends_session):
            return
        try:
            self.loop.watch(read_fd, RDHUP | (READ if self.reads else 0), self._ready)
        except PermissionError:  # always ready
            self._read_to_the_end()

    def _read_to_the_end(self) -> None:
        while data := os.read(self.chardev.read_fd, 1 << 16):
            self.received += data

    def _ready(self, ready: int) -> None:
        if ready & READ and self.reads:
            with contextlib.suppress(BlockingIOError):
                self._read()
        elif ready & (HUP | RDHUP):
            self._over()

    def _read(self) -> None:
        try:
            data = os.read(self.chardev.read_fd, 1 << 16)
        except BlockingIOError:
            raise
        except OSError:
            return self.chardev.disconnect()
        self.received += data
        return None if data else self._over()

    def _over(self) -> None:
        """The end of what the host says."""
        if self.chardev.eof_ends_session:
            self.chardev.disconnect()
        else:
            self.loop.unwatch(self.chardev.read_fd)

    def offer(self, data: bytes) -> int:
        """What the guest writes: as much as the host takes at once."""
        if self.chardev.write_fd < 0:
            return self.chardev.write(memoryview(data))
        try:
            count = os.write(self.chardev.write_fd, data)
        except BlockingIOError:
            return 0
        if self.chardev.log_fd >= 0:
            os.write(self.chardev.log_fd, data[:count])
        return count

    def send(self, data: bytes, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Writes all of ``data`` as the host takes it; ``meanwhile`` is what the host does at that time."""
        rest = data

        def all_sent() -> bool:
            nonlocal rest
            rest = rest[self.offer(rest) :]
            meanwhile()
            return not rest

        self.until(all_sent)

    def until(self, condition: Callable[[], object]) -> None:
        """Runs the loop until ``condition()``; fails the test if it does not come true.

        The host's side is not in the loop: it is looked at every few milliseconds.
        """
        deadline = time.monotonic() + TIMEOUT
        while not self.loop.run_until(condition, 0.005):
            assert time.monotonic() < deadline, f"in vain after {self.events[-6:]}"

    def settle(self) -> None:
        """Runs what is ready by now, with nothing to wait for."""
        for _ in range(3):
            self.loop.run_once(0)


class Host(ABC):
    """The program on the host that uses a chardev: comes, talks, leaves."""

    kind: str
    leaves = True
    """Whether it can leave."""
    returns = True
    """Whether it can come again after that."""
    sends = True
    hears = True
    """Whether it can read what the guest sends."""
    slow = True
    """Whether it can hold the guest up by not reading."""
    polled = False
    """Whether the chardev has to look for it without inotify."""
    sees_the_end = True
    """Whether it notices a disconnect() of the other side."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @abstractmethod
    def options(self) -> dict[str, str]: ...

    def prepare(self) -> None:  # noqa: B027 - most have nothing to do
        """Before the chardev is opened."""

    def attach(self, chardev: Chardev) -> None:  # noqa: B027 - as above
        """After the chardev was opened."""

    @abstractmethod
    def connect(self) -> None: ...

    @abstractmethod
    def leave(self) -> None: ...

    def send(self, data: bytes) -> int:
        raise NotImplementedError

    def receive(self) -> bytes | None:
        """What is there: some bytes, b"" at the end of the session, None if there is nothing now."""
        raise NotImplementedError

    def close(self) -> None:
        self.leave()

    def hear(self, wire: Wire, size: int) -> bytes:
        """Reads ``size`` bytes, or less if the session ends before."""
        heard = bytearray()

        def done() -> bool:
            data = self.receive()
            if data:
                heard.extend(data)
            return data == b"" or len(heard) >= size

        wire.until(done)
        return bytes(heard)


class _DescriptorHost(Host):
    """One that reads and writes by descriptors; one may be both."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.source = self.sink = -1

    def send(self, data: bytes) -> int:
        try:
            return os.write(self.sink, data)
        except BlockingIOError:
            return 0

    def receive(self) -> bytes | None:
        try:
            return os.read(self.source, 1 << 16)
        except BlockingIOError:
            return None
        except OSError:  # reset
            return b""

    def leave(self) -> None:
        for fd in {self.source, self.sink} - {-1}:
            os.close(fd)
        self.source = self.sink = -1

    def take(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.source = self.sink = sock.detach()


class UnixClient(_DescriptorHost):
    kind = "socket"

    @property
    def path(self) -> str:
        return str(self.directory / "s")

    def options(self) -> dict[str, str]:
        return {"path": self.path, "server": "on", "wait": "off"}

    def connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.path)
        self.take(sock)


class AbstractClient(UnixClient):
    def options(self) -> dict[str, str]:
        return {"path": self.path, "abstract": "on", "server": "on", "wait": "off"}

    def connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(f"\0{self.path}")
        self.take(sock)


class TcpClient(_DescriptorHost):
    kind = "socket"

    def options(self) -> dict[str, str]:
        return {"host": "127.0.0.1", "port": "0", "server": "on", "wait": "off", "nodelay": "on"}

    def attach(self, chardev: Chardev) -> None:
        assert not chardev.connected
        self.port = int(chardev.describe().split(":")[-1].split(",")[0])

    def connect(self) -> None:
        self.take(socket.create_connection(("127.0.0.1", self.port)))


class UnixServer(_DescriptorHost):
    """The chardev is the client; "connect" is to let it in."""

    kind = "socket"
    listener: socket.socket | None = None

    def options(self) -> dict[str, str]:
        return {"path": str(self.directory / "s"), "reconnect-ms": "5"}

    def listen(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(self.directory / "s"))
        return sock

    def connect(self) -> None:
        self.listener = self.listen()
        self.listener.listen()
        self.listener.setblocking(False)

    def _accept(self) -> bool:
        """Takes the connection; the listener goes, so that the chardev finds nobody when this session is over."""
        if self.source < 0 and self.listener is not None:
            with contextlib.suppress(BlockingIOError):
                self.take(self.listener.accept()[0])
                self._stop_listening()
        return self.source >= 0

    def _stop_listening(self) -> None:
        if self.listener is not None:
            self.listener.close()
            self.listener = None
            (self.directory / "s").unlink(missing_ok=True)

    def send(self, data: bytes) -> int:
        return super().send(data) if self._accept() else 0

    def receive(self) -> bytes | None:
        return super().receive() if self._accept() else None

    def leave(self) -> None:
        self._accept()
        self._stop_listening()
        super().leave()


class TcpServer(UnixServer):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        with socket.create_server(("127.0.0.1", 0)) as sock:  # a port that is free, and refuses by then
            self.port: int = sock.getsockname()[1]

    def options(self) -> dict[str, str]:
        return {"host": "localhost", "port": str(self.port), "ipv6": "off", "reconnect-ms": "5"}

    def listen(self) -> socket.socket:
        return socket.create_server(("127.0.0.1", self.port))


class Terminal(_DescriptorHost):
    kind = "pty"
    sees_the_end = False

    def options(self) -> dict[str, str]:
        return {"path": str(self.directory / "pty")}

    def connect(self) -> None:
        link = self.directory / "pty"
        self.source = self.sink = os.open(link, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)


class Fifos(_DescriptorHost):
    kind = "pipe"

    def options(self) -> dict[str, str]:
        return {"path": str(self.directory / "p")}

    def prepare(self) -> None:
        for name in ("p.in", "p.out"):
            os.mkfifo(self.directory / name)

    def connect(self) -> None:
        # Nobody is kept waiting here: O_NONBLOCK without the chardev's own ends would raise ENXIO.
        self.sink = os.open(self.directory / "p.in", os.O_WRONLY | os.O_NONBLOCK)
        self.source = os.open(self.directory / "p.out", os.O_RDONLY | os.O_NONBLOCK)


class PolledTerminal(Terminal):
    polled = True


class PolledFifos(Fifos):
    polled = True


class StandardStreams(_DescriptorHost):
    """Pipes in the place of this process's descriptors 0 and 1.

    Only within one test: between a fixture and its test, pytest puts its own in their place.
    """

    kind = "stdio"
    returns = False

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._saved: tuple[int, int] | None = None

    def options(self) -> dict[str, str]:
        return {"signal": "off"}

    def prepare(self) -> None:
        self._saved = os.dup(0), os.dup(1)
        stdin, self.sink = os.pipe()
        self.source, stdout = os.pipe()
        for fd, number in ((stdin, 0), (stdout, 1)):
            os.dup2(fd, number, inheritable=False)
            os.close(fd)
        os.set_blocking(self.source, False)
        os.set_blocking(self.sink, False)

    def connect(self) -> None:
        assert self.source >= 0, "standard streams are there from the start, and only once"

    def close(self) -> None:
        super().close()
        if self._saved is not None:
            for number, fd in enumerate(self._saved):
                os.dup2(fd, number)
                os.close(fd)
            self._saved = None


class PlainFile(Host):
    kind = "file"
    leaves = False
    slow = False

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._at = 0

    def options(self) -> dict[str, str]:
        return {"path": str(self.directory / "out"), "input-path": str(self.directory / "in")}

    def prepare(self) -> None:
        (self.directory / "in").touch()

    def connect(self) -> None: ...

    def leave(self) -> None: ...

    def send(self, data: bytes) -> int:
        with open(self.directory / "in", "ab") as file:
            return file.write(data)

    def receive(self) -> bytes | None:
        data = (self.directory / "out").read_bytes()[self._at :]
        self._at += len(data)
        return data or None


class RingReader(Host):
    kind = "ringbuf"
    leaves = False
    sends = False
    slow = False

    def options(self) -> dict[str, str]:
        return {"size": "1M"}

    def attach(self, chardev: Chardev) -> None:
        assert isinstance(chardev, RingBuf)
        self.ring = chardev

    def connect(self) -> None: ...

    def leave(self) -> None: ...

    def receive(self) -> bytes | None:
        return self.ring.read(1000) or None


class Nobody(RingReader):
    kind = "null"
    hears = False

    def options(self) -> dict[str, str]:
        return {}

    def attach(self, chardev: Chardev) -> None: ...


HOSTS: dict[str, type[Host]] = {
    "unix-server": UnixClient,
    "abstract-server": AbstractClient,
    "tcp-server": TcpClient,
    "unix-client": UnixServer,
    "tcp-client": TcpServer,
    "pty": Terminal,
    "pty-polled": PolledTerminal,
    "pipe": Fifos,
    "pipe-polled": PolledFifos,
    "stdio": StandardStreams,
    "file": PlainFile,
    "ringbuf": RingReader,
    "null": Nobody,
}
"""Every kind, and every mode of the socket, by the name that test ids show."""


class Rig(contextlib.ExitStack):
    """A host, a chardev and its owner on one loop; leaving it proves that no descriptor stayed behind."""

    def __init__(self, host: type[Host] | None = None, **more: str) -> None:
        super().__init__()
        # Not tmp_path: a Unix socket's path has at most 107 bytes.
        self.directory = Path(self.enter_context(tempfile.TemporaryDirectory(prefix="vs")))
        before = open_descriptors()
        self.callback(lambda: _assert_same(before))
        self.loop = Loop()
        self.callback(self.loop.close)
        self.prepared = False
        if host is not None:
            self.host = host(self.directory)
            self.callback(self.host.close)
            self.wire = self.make(self.host.kind, **{**self.host.options(), **more})

    def make(self, kind: str, **options: str) -> Wire:
        """Another chardev with its owner, not open yet; ``_`` in names is ``-``."""
        named = {name.replace("_", "-"): value for name, value in options.items()}
        return self.adopt(make(kind, "c0", named), partial(make, kind, "c0", named))

    def adopt(self, chardev: Chardev, again: Callable[[], Chardev]) -> Wire:
        self.callback(chardev.close)
        return Wire(chardev, self.loop, again)

    def open(self) -> None:
        if not self.prepared:
            self.prepared = True
            self.host.prepare()
        self.wire.open()
        self.host.attach(self.wire.chardev)

    def start(self) -> None:
        """Opens the chardev and connects the host."""
        self.open()
        self.connect()

    def connect(self) -> None:
        self.host.connect()
        self.wire.until(lambda: self.wire.chardev.connected)

    def leave(self) -> None:
        self.host.leave()
        self.wire.until(lambda: not self.wire.chardev.connected)

    def successor(self, wire: Wire | None = None) -> Wire:
        """What another process makes of the same options, with a loop of its own; not open yet."""
        again = (wire or self.wire).again
        loop = Loop()
        self.callback(loop.close)
        chardev = again()
        self.callback(chardev.close)
        return Wire(chardev, loop, again)

    def hand_over(self, wire: Wire | None = None) -> Wire:
        """A successor takes the chardev over; in the place of ``self.wire``, if it was that one."""
        old, new = wire or self.wire, self.successor(wire)
        state, delivery = shipped(old.chardev)
        new.take(state, delivery)
        delivery.close()
        old.chardev.release()
        if wire is None:
            self.wire, self.loop = new, new.loop
        new.resume()
        return new


def shipped(chardev: Chardev) -> tuple[dict[str, Any], Delivery]:
    """What a chardev gives, as it is when it has come to another process."""
    parcel = Parcel()
    state = json.loads(json.dumps(chardev.give(parcel)))
    here, there = socket.socketpair()
    with here, there:
        socket.send_fds(here, [b"!"], parcel.fds)
        _, fds, _, _ = socket.recv_fds(there, 1, 64, socket.MSG_CMSG_CLOEXEC)
    return state, Delivery(fds)


def readiness(fd: int) -> int:
    """What poll() says at once."""
    poll = select.poll()
    poll.register(fd, select.POLLIN | select.POLLOUT)
    return sum(events for _, events in poll.poll(0))


def open_descriptors() -> dict[int, str]:
    """This process's descriptors and what each is open on."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one of listdir() itself
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def _assert_same(before: dict[int, str]) -> None:
    left = {fd: what for fd, what in open_descriptors().items() if before.get(fd) != what}
    assert not left, f"left open: {left}"


__all__ = ["HOSTS", "TIMEOUT", "Host", "Rig", "Wire", "open_descriptors", "readiness", "shipped"]
