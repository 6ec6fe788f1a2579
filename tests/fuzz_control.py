"""Malformed console conversations: each is cheap, and made from a seed."""

from __future__ import annotations

import logging
import random
import struct

from vsport.connection import Cause
from vsport.constants import QUEUE_CONTROL_RX, QUEUE_CONTROL_TX
from vsport.device import SerialDevice
from vsport.port import PortConfig
from vsport.sim import Direct, SimulatedGuest

PORTS = (0, 1, 2, 5, 0xFFFFFFFF)
MESSAGES = 12


class _Subject:
    """A device with three ports and a guest whose control queues are small. Reused: a case begins with a reset."""

    def __init__(self) -> None:
        logging.disable(logging.WARNING)
        self.device = SerialDevice(max_ports=3)
        for id, name in enumerate(("", "a.0", "b.0")):
            self.device.add_port(PortConfig(id, name, console=not name))
        self.guest = SimulatedGuest(Direct(self.device, memory_mib=4), queue_size=4)

    def begin(self) -> None:
        if 2 not in self.device.ports:
            self.device.add_port(PortConfig(2, "b.0"))
        self.guest.reset()
        self.guest.attachment.negotiate(self.guest.features)


_subjects: list[_Subject] = []


def _subject() -> _Subject:
    if not _subjects:
        _subjects.append(_Subject())
    return _subjects[0]


def _message(chance: random.Random) -> bytes:
    """Mostly a message that could be, often with something wrong about it."""
    data = struct.pack(
        "<IHH",
        chance.choice(PORTS),
        chance.choice((0, 3, 3, 6, 6, 6, 1, 2, 4, 5, 7, 8, 0xFFFF)),
        chance.choice((0, 1, 1, 2)),
    )
    data += chance.randbytes(chance.choice((0, 0, 0, 1, 40)))
    return data[: chance.choice((len(data), len(data), len(data), 7, 4, 0))]


def control_case(chance: random.Random) -> None:
    """One conversation: the device takes every message at once, and its ports stay in a state that exists.

    Hosts come and go meanwhile, a port is unplugged and plugged, and the guest has control buffers or has none.
    """
    subject = _subject()
    device, guest = subject.device, subject.guest
    subject.begin()
    said = guest.ring(QUEUE_CONTROL_TX, 64)
    heard = guest.ring(QUEUE_CONTROL_RX, chance.choice((8, 24, 64)))
    for _ in range(chance.randrange(1, MESSAGES)):
        action = chance.random()
        if action < 0.75:
            assert said.send(_message(chance))
            said.reclaim()
            assert said.in_flight == 0, "a control message was not taken at once"
        elif action < 0.85:
            device.ports[1].feed(chance.choice((Cause.HOST_CONNECT, Cause.HOST_DISCONNECT)))
        elif action < 0.9:
            _replug(device)
        else:
            heard.post()
            while chance.random() < 0.9 and heard.take() is not None:
                pass
    assert device.waiting_messages <= 8 * len(device.ports) + 2
    for port in device.ports.values():
        assert port.state.device_ready or not port.state.guest_connected


def _replug(device: SerialDevice) -> None:
    if 2 in device.ports:
        device.remove_port(2)
    else:
        device.add_port(PortConfig(2, "b.0"))
