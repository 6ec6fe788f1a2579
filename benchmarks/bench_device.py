"""How fast are bytes between a simulated guest and a Unix socket? Floor: the same bytes through a socketpair."""

import contextlib
import socket
import sys
from pathlib import Path

import pytest
from floors import compare

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from worlds import World, generic_port, unix_chardev, unix_client

TOTAL = 1 << 22


@pytest.fixture
def joined(tmp_path):
    """(world, the guest's open port, the host's socket)."""
    world = World([unix_chardev(1, tmp_path / "1")], [generic_port(1)], queue_size=256)
    with contextlib.closing(world), unix_client(tmp_path / "1") as host:
        port = world.port("org.test.1")
        port.open()
        world.wait(lambda: port.host_connected)
        host.setblocking(False)
        yield world, port, host


def pump(sender, receiver, loop, size):
    """Moves TOTAL bytes in pieces of ``size``; both ends never block."""
    piece, sent, received = bytes(size), 0, 0
    while received < TOTAL:
        with contextlib.suppress(BlockingIOError):
            while sent < TOTAL:
                sent += sender(piece)
        loop()
        with contextlib.suppress(BlockingIOError):
            while received < TOTAL and (data := receiver()):
                received += len(data)
    assert received == TOTAL


def through_a_socketpair(size):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        pump(ours.send, lambda: theirs.recv(1 << 18), lambda: None, size)


@pytest.mark.parametrize("size", [64, 4096, 32768])
def test_guest_to_host(benchmark, joined, size):
    world, port, host = joined
    compare(
        benchmark,
        lambda: pump(port.write, lambda: host.recv(1 << 18), lambda: world.loop.run_once(0), size),
        lambda: through_a_socketpair(size),
        rounds=5,
        bytes_per_round=TOTAL,
    )


@pytest.mark.parametrize("size", [4096, 32768])
def test_host_to_guest(benchmark, joined, size):
    world, port, host = joined
    compare(
        benchmark,
        lambda: pump(host.send, lambda: port.read(1 << 18), lambda: world.loop.run_once(0), size),
        lambda: through_a_socketpair(size),
        rounds=5,
        bytes_per_round=TOTAL,
    )
