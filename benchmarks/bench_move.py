"""How fast does a back end know of the guest after a move? Floor: reading the same snapshot, with nobody told."""

import contextlib
import sys
from pathlib import Path

import pytest
from floors import compare

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from worlds import World, generic_port, unix_chardev

from vsport.connection import Cause
from vsport.device import SerialDevice
from vsport.port import BackEnd, PortConfig
from vsport.snapshot import Snapshot

TIMES = 20


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
    told = {listener.opened for listener in listeners}
    assert len(told) == 1, "every back end is told as often as the others"
    assert told.pop() >= TIMES
