"""How fast are bytes between a simulated guest and a Unix socket? Floor: the same bytes through a socketpair.

What is counted are the bytes of programs: each side hands over ``bytes`` in writes of one size, and the other side has
them as ``bytes`` again. All of them, and the loop of the device between them, take turns in one thread: so do the two
ends of the floor's socketpair.
"""

import contextlib
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from floors import at_least, compare, record_point

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from worlds import World, generic_port, unix_chardev, unix_client

TOTAL = 1 << 22
READ = 1 << 18
"""What a program asks for when it reads."""
SIZES = [64, 1024, 4096, 32768, 131072, 1 << 20]
FLOOR = "socketpair"


class Lane(NamedTuple):
    """A way for bytes; both ends raise BlockingIOError instead of waiting."""

    send: Callable[[bytes], int]
    receive: Callable[[], bytes]


@contextlib.contextmanager
def device(directory, ports):
    """The lanes from the guest to the host, those back, and what makes a turn of the device."""
    numbers = range(1, ports + 1)
    chardevs = [unix_chardev(number, directory / str(number)) for number in numbers]
    devices = [f"virtio-serial,max_ports={ports + 1}", *(generic_port(number) for number in numbers)]
    world = World(chardevs, devices, queue_size=128)
    with contextlib.ExitStack() as stack:
        stack.callback(world.close)
        hosts = [stack.enter_context(unix_client(directory / str(number))) for number in numbers]
        guests = [world.port(f"org.test.{number}") for number in numbers]
        for guest, host in zip(guests, hosts, strict=True):
            guest.open()
            world.wait(lambda guest=guest: guest.host_connected)
            host.setblocking(False)
        there = [
            Lane(guest.write, lambda host=host: host.recv(READ)) for guest, host in zip(guests, hosts, strict=True)
        ]
        back = [
            Lane(host.send, lambda guest=guest: guest.read(READ)) for guest, host in zip(guests, hosts, strict=True)
        ]
        yield there, back, lambda: world.loop.run_once(0)


@contextlib.contextmanager
def socketpairs(count):
    """The floor's lanes."""
    with contextlib.ExitStack() as stack:
        lanes = []
        for _ in range(count):
            ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
            ours.setblocking(False)
            theirs.setblocking(False)
            lanes.append(Lane(ours.send, lambda theirs=theirs: theirs.recv(READ)))
        yield lanes


def pump(lanes, size, turn=lambda: None):
    """Moves TOTAL bytes through each lane's share, in pieces of ``size``."""
    share, piece = TOTAL // len(lanes), bytes(size)
    sent, received = [0] * len(lanes), [0] * len(lanes)
    while sum(received) < share * len(lanes):
        for number, lane in enumerate(lanes):
            with contextlib.suppress(BlockingIOError):
                while sent[number] < share:
                    sent[number] += lane.send(piece)
        turn()
        for number, lane in enumerate(lanes):
            with contextlib.suppress(BlockingIOError):
                while received[number] < sent[number] and (data := lane.receive()):
                    received[number] += len(data)
    assert received == sent


def measure(benchmark, lanes, size, turn, *, goal=None):
    """The speeds by contender; the ratio is recorded."""
    with socketpairs(len(lanes)) as floor:
        return compare(
            benchmark,
            lambda: pump(lanes, size, turn),
            lambda: pump(floor, size),
            against=FLOOR,
            rounds=7,
            work=TOTAL,
            goal=goal,
        )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("direction", ["guest to host", "host to guest"])
def test_write_size(benchmark, tmp_path, direction, size):
    with device(tmp_path, 1) as (there, back, turn):
        lanes = there if direction == "guest to host" else back
        speeds = measure(benchmark, lanes, size, turn, goal=at_least(0.8) if size >= 32768 else None)
    record_point(benchmark, series=direction, x=size, x_label="bytes in a write", y=speeds, y_label="bytes per second")


@pytest.mark.parametrize("ports", [1, 4, 8, 16, 31])
@pytest.mark.parametrize("direction", ["guest to host", "host to guest"])
def test_ports(benchmark, tmp_path, direction, ports):
    with device(tmp_path, ports) as (there, back, turn):
        lanes = there if direction == "guest to host" else back
        speeds = measure(benchmark, lanes, 4096, turn)
    record_point(
        benchmark,
        series=f"{direction}, 4 KiB writes",
        x=ports,
        x_label="busy ports",
        y=speeds,
        y_label="bytes per second",
    )
