"""How fast does a back end know of the guest after a move? Floor: reading the same snapshot, with nobody told.

And over vhost-user, from a document's first byte on its way to another process until that says that it has taken it.
"""

import contextlib
import itertools
import sys
import time
from pathlib import Path

import pytest
from distributions import tell
from floors import compare

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from front_end import DaemonProcess
from worlds import World, generic_port, unix_chardev

from vsport.connection import Cause
from vsport.device import SerialDevice
from vsport.port import BackEnd, PortConfig
from vsport.snapshot import Snapshot
from vsport.vhost_user.frontend import FrontEnd

TIMES = 20
ALONE = 1000
"""Restores that are timed one by one."""
GOAL_MS = 1.0


class Listener(BackEnd):
    """Counts how often it hears that the guest holds its port open."""

    def __init__(self):
        self.opened = 0

    def guest_connected(self, connected, cause):
        assert cause is Cause.RESTORE
        self.opened += connected

    def check(self, state):
        """A pump's, which is of no interest here."""


def snapshot(directory, ports):
    """Of a paused machine all of whose ports are open."""
    numbers = range(1, ports + 1)
    world = World([unix_chardev(n, directory / str(n)) for n in numbers], [generic_port(n) for n in numbers])
    with contextlib.closing(world):
        for number in numbers:
            world.port(f"org.test.{number}").open()
        world.guest.attachment.pause()
        return world.device.snapshot().encode()


@pytest.mark.parametrize("ports", [1, 8])
def test_from_restore_to_back_ends_told(benchmark, tmp_path, ports):
    state = snapshot(tmp_path, ports)
    saved = Snapshot.decode(state)
    device = SerialDevice(max_ports=saved.max_ports)
    listeners = [Listener() for _ in saved.ports]
    for port, listener in zip(saved.ports, listeners, strict=True):
        device.attach(device.add_port(PortConfig(port.config.id, port.config.name)), listener)

    def restore():
        for _ in range(TIMES):
            device.restore(Snapshot.decode(state))

    def read():
        for _ in range(TIMES):
            Snapshot.decode(state)

    compare(benchmark, restore, read, against="reading it only", rounds=20, work=TIMES * len(state))
    times = timed(lambda: device.restore(Snapshot.decode(state)), ALONE if benchmark.enabled else 1)
    tell(benchmark, "restore to all back ends told", times, p99_at_most=GOAL_MS)
    told = {listener.opened for listener in listeners}
    assert len(told) == 1, "every back end is told as often as the others"
    assert told.pop() >= TIMES


def timed(act, times):
    """How long each of so many calls takes, in milliseconds."""
    stamps = [time.perf_counter()]
    for _ in range(times):
        act()
        stamps.append(time.perf_counter())
    return [(after - before) * 1e3 for before, after in itertools.pairwise(stamps)]


def test_from_a_state_on_its_way_to_back_ends_told(benchmark, tmp_path):
    """The front end hears that its document was taken when every back end has been told (R-VU-38, R-VU-91)."""
    state = snapshot(tmp_path, 1)
    chardev = f"socket,id=c0,path={tmp_path}/c0,server=on,wait=off"
    process = DaemonProcess(str(tmp_path / "vm"), chardev, "virtserialport,chardev=c0,name=org.test.1,nr=1")
    try:
        with FrontEnd.connect(process.path) as front_end:
            front_end.negotiate(features=Snapshot.decode(state).features)
            benchmark.pedantic(lambda: front_end.load(state), rounds=ALONE if benchmark.enabled else 1)
    finally:
        process.kill()
    if benchmark.enabled:
        times = [seconds * 1e3 for seconds in benchmark.stats.stats.data]
        tell(benchmark, "a state on its way, until told", times, p99_at_most=GOAL_MS)
