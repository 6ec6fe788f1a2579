"""`vsport serve` as a process, and a virtual machine that uses it: a front end of ours with a simulated guest."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from vsport.loop import Loop
from vsport.sim import GuestPort, SimulatedGuest
from vsport.vhost_user.frontend import FrontEnd, GuestMemory, OverVhostUser

PATIENCE = 20.0
"""Seconds after which a test gives up; no test waits that long when it passes."""
GET_FEATURES = bytes.fromhex("01000000 01000000 00000000")


@contextlib.contextmanager
def daemon(*arguments: object, **options: object) -> Iterator[subprocess.Popen[bytes]]:
    """A running `vsport serve`, killed at the end if it has not ended before."""
    command = [sys.executable, "-m", "vsport", "serve", *map(str, arguments)]
    with running(command, **options) as process:
        yield process


@contextlib.contextmanager
def running(command: list[str], **options: object) -> Iterator[subprocess.Popen[bytes]]:
    """A process with its standard error at hand, killed at the end if it has not ended before."""
    process = subprocess.Popen(command, **{"stderr": subprocess.PIPE, **options})  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def connect(path: object) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(PATIENCE)
    try:
        sock.connect(str(path))
    except OSError:
        sock.close()
        raise
    return sock


def answers(sock: socket.socket) -> bool:
    """Whether a vhost-user back end is at the other end."""
    sock.sendall(GET_FEATURES)
    return sock.recv(64)[:4] == GET_FEATURES[:4]


def serves(path: object) -> bool:
    """Whether a back end answers at ``path`` now."""
    try:
        with connect(path) as front_end:
            return answers(front_end)
    except (FileNotFoundError, ConnectionRefusedError):
        return False


def descriptors(process: subprocess.Popen[bytes]) -> int:
    """How many a process has open."""
    return len(os.listdir(f"/proc/{process.pid}/fd"))


class Flow:
    """Bytes that go one way, in any number of pieces: what arrives has to be what was sent."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._next = b""
        self.sent = self.received = 0
        self._hashes = hashlib.sha256(), hashlib.sha256()

    def send(self, write: Callable[[bytes], int]) -> bool:
        """Offers one piece; says whether any of it was taken."""
        self._next = self._next or self._random.randbytes(self._random.choice((1, 100, 5000, 60000)))
        try:
            count = write(self._next)
        except BlockingIOError:
            return False
        self._hashes[0].update(self._next[:count])
        self._next = self._next[count:]
        self.sent += count
        return bool(count)

    def receive(self, read: Callable[[int], bytes]) -> bool:
        try:
            data = read(1 << 16)
        except BlockingIOError:
            return False
        assert data, "the other side has gone"
        self._hashes[1].update(data)
        self.received += len(data)
        return True

    @property
    def complete(self) -> bool:
        return self.sent == self.received

    def check(self) -> None:
        assert self.complete
        assert self._hashes[0].digest() == self._hashes[1].digest()


class Machine(contextlib.ExitStack):
    """A virtual machine at a back end's socket, its guest booted."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def __enter__(self) -> Machine:
        with contextlib.ExitStack() as stack:
            self.loop = Loop()
            stack.callback(self.loop.close)
            self.memory = GuestMemory(((0, 1 << 30),))
            stack.callback(self.memory.close)
            self.front_end = stack.enter_context(FrontEnd.connect(str(self.path), timeout=PATIENCE))
            self.attachment = OverVhostUser(self.front_end, self.loop, self.memory)
            stack.callback(self.attachment.close)
            self.guest = SimulatedGuest(self.attachment)
            self.guest.on_interrupt = self.guest.run
            self.guest.boot()
            self.push(stack.pop_all())
        return self

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self.loop.run_until(condition, 0.005):
            assert time.monotonic() < deadline, "in vain"

    def port(self, name: str) -> GuestPort:
        """The port of that name, open, and its host there."""
        self.until(lambda: any(port.name == name for port in self.guest.ports.values()))
        port = self.guest.port(name)
        port.open()
        self.until(lambda: port.host_connected)
        return port


class Conversation:
    """A program in the guest and one on the host talk through a port, both ways, as much as it takes."""

    def __init__(self, machine: Machine, port: GuestPort, host: socket.socket) -> None:
        host.setblocking(False)
        self.machine = machine
        self.port = port
        self.host = host
        self.up, self.down = Flow(1), Flow(2)

    def step(self, *, talk: bool = True) -> None:
        """Some bytes each way."""
        self.machine.loop.run_once(0)
        for _ in range(8):
            moved = talk and self.up.send(self.port.write)
            moved = (talk and self.down.send(self.host.send)) or moved
            moved = self.up.receive(self.host.recv) or moved
            moved = self.down.receive(self.port.read) or moved
            if not moved:
                self.machine.loop.run_once(0.001)

    def until(self, condition: Callable[[], object]) -> None:
        """Goes on until ``condition()``."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, "in vain"
            self.step()

    def flow(self, size: int = 100_000) -> None:
        """Goes on until ``size`` bytes more have arrived on both sides."""
        up, down = self.up.received + size, self.down.received + size
        self.until(lambda: self.up.received >= up and self.down.received >= down)

    def check(self) -> None:
        """Says no more, and waits until all has arrived: every byte, once, in order; and nobody saw an end."""
        deadline = time.monotonic() + PATIENCE
        while not (self.up.complete and self.down.complete):
            assert time.monotonic() < deadline, (self.up.sent, self.up.received, self.down.sent, self.down.received)
            self.step(talk=False)
        self.up.check()
        self.down.check()
        assert self.port.host_history == [True]
