"""How fast are bytes between a simulated guest and a Unix socket? Floor: the same bytes through a socketpair.

What is counted are the bytes of programs: each side hands over ``bytes`` in writes of one size, and the other side has
them as ``bytes`` again. All of them, and the loop of the device between them, take turns in one thread: so do the two
ends of the floor's socketpair. The guest's side does more than the floor's: it copies into and out of guest memory, as
a driver does.
"""

import contextlib
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from floors import at_least, compare, record_point

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from worlds import World, generic_port, unix_chardev, unix_client

from vsport.sim import PAGE

READ = {"guest to host": 1 << 18, "host to guest": PAGE}
"""What a program asks for when it reads. A guest's never gets more than one of the driver's buffers (R-GUEST-06)."""


class Lane(NamedTuple):
    """A way for bytes; both ends raise BlockingIOError instead of waiting."""

    send: Callable[[bytes], int]
    receive: Callable[[], bytes]


@contextlib.contextmanager
def device(directory, ports, direction):
    """The lanes of all ports in that direction, and what makes a turn of the device."""
    numbers = range(1, ports + 1)
    chardevs = [unix_chardev(number, directory / str(number)) for number in numbers]
    devices = [f"virtio-serial,max_ports={ports + 1}", *(generic_port(number) for number in numbers)]
    world = World(chardevs, devices, queue_size=128)
    with contextlib.ExitStack() as stack:
        stack.callback(world.close)
        lanes = []
        for number in numbers:
            host = stack.enter_context(unix_client(directory / str(number)))
            host.setblocking(False)
            guest = world.port(f"org.test.{number}")
            guest.open()
            world.wait(lambda guest=guest: guest.host_connected)
            send, receive = (guest.write, host.recv) if direction == "guest to host" else (host.send, guest.read)
            lanes.append(Lane(send, partial(receive, READ[direction])))
        yield lanes, lambda: world.loop.run_once(0)


@contextlib.contextmanager
def socketpairs(count, direction):
    """The floor's lanes, for programs that ask for as much."""
    with contextlib.ExitStack() as stack:
        lanes = []
        for _ in range(count):
            ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
            ours.setblocking(False)
            theirs.setblocking(False)
            lanes.append(Lane(ours.send, partial(theirs.recv, READ[direction])))
        yield lanes


def total(size):
    """How many bytes a round moves in writes of ``size``, so that it takes long enough to be timed."""
    return 1 << (22 if size < PAGE else 25)


def pump(lanes, size, turn=lambda: None):
    """Moves total(size) bytes, each lane an equal share of them, in pieces of ``size``."""
    share, piece = total(size) // len(lanes), bytes(size)
    sent, received = [0] * len(lanes), [0] * len(lanes)
    while sum(received) < share * len(lanes):
        for number, lane in enumerate(lanes):
            with contextlib.suppress(BlockingIOError):
                while sent[number] < share:
                    sent[number] += lane.send(piece)
        turn()
        for number, lane in enumerate(lanes):
            with contextlib.suppress(BlockingIOError):
                while received[number] < sent[number]:
                    received[number] += len(lane.receive())
    assert received == sent


def measure(benchmark, directory, direction, *, ports, size, goal=None):
    """The speeds by contender; the ratio is recorded."""
    with device(directory, ports, direction) as (lanes, turn), socketpairs(ports, direction) as floor:
        return compare(
            benchmark,
            lambda: pump(lanes, size, turn),
            lambda: pump(floor, size),
            against="socketpair",
            rounds=7,
            work=total(size),
            goal=goal,
        )


@pytest.mark.parametrize("size", [64, 1024, 4096, 32768, 131072, 1 << 20])
@pytest.mark.parametrize("direction", READ)
def test_write_size(benchmark, tmp_path, direction, size):
    goal = at_least(0.8) if direction == "guest to host" and size >= 32768 else None
    speeds = measure(benchmark, tmp_path, direction, ports=1, size=size, goal=goal)
    record_point(benchmark, series=direction, x=size, x_label="bytes in a write", y=speeds, y_label="bytes per second")


@pytest.mark.parametrize("ports", [1, 4, 8, 16, 31])
@pytest.mark.parametrize("direction", READ)
def test_ports(benchmark, tmp_path, direction, ports):
    speeds = measure(benchmark, tmp_path, direction, ports=ports, size=4096)
    record_point(
        benchmark,
        series=f"{direction}, 4 KiB writes",
        x=ports,
        x_label="busy ports",
        y=speeds,
        y_label="bytes per second",
    )
