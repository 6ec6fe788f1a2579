"""Malformed vhost-user conversations for the real server, as many as one likes: each is cheap, and made from a seed."""

from __future__ import annotations

import functools
import logging
import os
import random
import socket
from array import array

from vsport.device import SerialDevice
from vsport.loop import Loop
from vsport.port import PortConfig
from vsport.vhost_user.message import (
    FDS_MAX,
    HEADER_SIZE,
    REQUESTS,
    Config,
    DeviceState,
    InflightArea,
    LogBase,
    MemoryRegion,
    MemoryTable,
    OneRegion,
    Payload,
    Request,
    VringAddress,
    VringFd,
    VringState,
    encode_request,
    encode_u64,
)
from vsport.vhost_user.server import Server
from vsport.vhost_user.session import OFFERED

MEMORY_SIZE = 1 << 16
QUEUES = 4
EDGES = (0, 1, 2, 8, 0xFF, 0x100, 0xFFF, 0x1000, 0x7FFF, 0x8000, 0xFFFF, 2**31, 2**32 - 1, 2**63, 2**64 - 1)

LOGGING = (1 << 30, 1 << 30 | 1 << 26)
"""SET_FEATURES without dirty logging, and with it."""

Message = tuple[bytes, list[int]]
"""The bytes of a message and the descriptors that go with it."""


def vhost_user_case(rng: random.Random) -> None:
    """One conversation. Raises whatever the server lets out, and AssertionError if it is not as before afterwards."""
    _target().converse(rng)


@functools.cache
def _target() -> Target:
    return Target()


class Target:
    """A server with its device, used again and again, and a box of descriptors to bother it with."""

    def __init__(self) -> None:
        logging.getLogger("vsport").setLevel(logging.CRITICAL)
        self.loop = Loop()
        self.device = SerialDevice(max_ports=1)
        self.device.on_backlog = lambda index: self.loop.call_soon(lambda: self.device.kick(index))
        self.device.add_port(PortConfig(0, "org.test.0"))
        self.server = Server(self.device, self.loop)
        self.memory = os.memfd_create("fuzz")
        os.ftruncate(self.memory, MEMORY_SIZE)
        self.kick = os.eventfd(0)
        self.states = [os.memfd_create("state"), os.memfd_create("bad state")]
        self.fds = [
            self.memory,
            self.kick,
            os.eventfd(0),
            os.open(os.devnull, os.O_RDWR),
            os.open("/", os.O_RDONLY | os.O_DIRECTORY),
            *os.pipe(),
            *(end.detach() for end in socket.socketpair()),
            *(end.detach() for end in socket.socketpair(type=socket.SOCK_DGRAM)),
        ]

    def close(self) -> None:
        self.server.close()
        self.loop.close()
        for fd in self.fds:
            os.close(fd)

    def converse(self, rng: random.Random) -> None:
        """A front end comes, says some things that make sense and some that do not, and goes."""
        ours, theirs = socket.socketpair()
        self.server.adopt(theirs.detach())
        with ours:
            ours.setblocking(False)
            self._fill_memory(rng)
            self._fill_states(rng)
            honest = self._honest_start(rng)[: rng.choice((0, 3, 99))]
            for data, fds in honest + [self._message(rng) for _ in range(rng.randrange(4))]:
                self._send(ours, data, fds)
            if rng.random() < 0.5:
                os.eventfd_write(self.kick, 1)
        while self.server.connected:
            self.loop.run_once(1)
        assert not any(queue.running for queue in self.device.queues)

    def _send(self, sock: socket.socket, data: bytes, fds: list[int]) -> None:
        try:
            sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else [])
        except (BlockingIOError, BrokenPipeError, ConnectionResetError):
            self.loop.run_once(0)

    def _fill_memory(self, rng: random.Random) -> None:
        """Rings of garbage, a little of it plausible: indices that are not far off, descriptors in range."""
        for at in range(0, QUEUES * 0x1000, 0x1000):
            entry = b"".join(
                rng.choice((0, 0x4000, 0xFFF0, 2**64 - 1)).to_bytes(8, "little")
                + rng.choice((0, 8, 16, 0x1000, 2**32 - 1)).to_bytes(4, "little")
                + rng.randrange(8).to_bytes(2, "little")
                + rng.randrange(10).to_bytes(2, "little")
                for _ in range(8)
            )
            heads = b"".join(rng.choice((0, 1, 2, 7, 8)).to_bytes(2, "little") for _ in range(8))
            offered = bytes(2) + rng.choice((0, 1, 3, 8, 9, 0x8000)).to_bytes(2, "little") + heads
            os.pwrite(self.memory, entry + offered + bytes(128), at)
        os.pwrite(self.memory, rng.randbytes(64), 0x4000)

    def _fill_states(self, rng: random.Random) -> None:
        """A state that can be loaded, and one with a byte changed; a save into any of the files is undone, too."""
        state = self.device.snapshot().encode()
        at = rng.randrange(len(state))
        for fd, data in zip(self.states, (state, state[:at] + rng.randbytes(1) + state[at + 1 :]), strict=True):
            os.ftruncate(fd, 0)
            os.pwrite(fd, data, 0)
        os.ftruncate(self.memory, MEMORY_SIZE)
        for fd in (self.memory, *self.states):
            os.lseek(fd, 0, os.SEEK_SET)

    def _honest_start(self, rng: random.Random) -> list[Message]:
        table = MemoryTable((MemoryRegion(0, MEMORY_SIZE, 0, 0),))
        messages: list[Message] = [
            (encode_request(Request.SET_PROTOCOL_FEATURES, encode_u64(OFFERED)), []),
            (encode_request(Request.SET_FEATURES, encode_u64(self.device.features | rng.choice(LOGGING))), []),
            (encode_request(Request.SET_MEM_TABLE, table.encode()), [self.memory]),
        ]
        if rng.random() < 0.3:
            messages.append((encode_request(Request.SET_LOG_BASE, LogBase(64, 0x8000).encode()), [self.memory]))
        if rng.random() < 0.3:  # over the garbage that rings and buffers are made of
            area = InflightArea(0x2000, rng.choice((0, 0x4000, 0xC000)), rng.randrange(1, 5), 8)
            messages.append((encode_request(Request.SET_INFLIGHT_FD, area.encode()), [self.memory]))
        for index in rng.sample(range(QUEUES), rng.randrange(1, 3)):
            desc = index * 0x1000
            address = VringAddress(index, rng.randrange(2), desc, desc + 256, desc + 128, desc)
            messages += [
                (encode_request(Request.SET_VRING_NUM, VringState(index, 8).encode()), []),
                (encode_request(Request.SET_VRING_BASE, VringState(index, 0).encode()), []),
                (encode_request(Request.SET_VRING_ADDR, address.encode()), []),
                (encode_request(Request.SET_VRING_CALL, VringFd(index, False).encode()), [rng.choice(self.fds)]),
                (encode_request(Request.SET_VRING_KICK, VringFd(index, False).encode()), [self.kick]),
                (encode_request(Request.SET_VRING_ENABLE, VringState(index, 1).encode()), []),
            ]
        return messages

    def _message(self, rng: random.Random) -> Message:
        request = rng.choice((*REQUESTS, rng.choice(EDGES) & 0xFFFFFFFF))
        row = REQUESTS.get(request)
        payload = self._payload(rng, request)
        count = rng.choice(row.fds) if row is not None and row.fds else 0
        data = encode_request(request, payload, need_reply=rng.random() < 0.7)
        if rng.random() < 0.1:
            count = rng.randrange(FDS_MAX + 4)
        if rng.random() < 0.1:
            data = self._spoil(rng, data)
        return data, [rng.choice(self.fds) for _ in range(count)]

    def _spoil(self, rng: random.Random, data: bytes) -> bytes:
        """Cuts, lengthens or changes a message."""
        match rng.randrange(3):
            case 0:
                return data[: rng.randrange(len(data))] or b"\0"
            case 1:
                return data + rng.randbytes(rng.randrange(1, 40))
            case _:
                at = rng.randrange(min(len(data), HEADER_SIZE + 8))
                return data[:at] + rng.randbytes(1) + data[at + 1 :]

    def _payload(self, rng: random.Random, request: int) -> bytes:
        """Of the right shape, with numbers from the edges of their ranges."""

        def number() -> int:
            return rng.choice(EDGES)

        def region() -> MemoryRegion:
            return MemoryRegion(number(), rng.choice((0x1000, number())), number(), rng.choice((0, 0x800, number())))

        index = rng.choice((*range(QUEUES), number() & 0xFFFFFFFF))
        payload: Payload
        match request:
            case Request.SET_FEATURES | Request.SET_PROTOCOL_FEATURES:
                payload = rng.choice((OFFERED, self.device.features, self.device.features | 1 << 30, number()))
            case Request.SET_STATUS:
                payload = number()
            case Request.SET_MEM_TABLE:
                return MemoryTable(tuple(region() for _ in range(rng.randrange(4)))).encode()
            case Request.ADD_MEM_REG | Request.REM_MEM_REG:
                return OneRegion(region()).encode()
            case Request.SET_VRING_ADDR:
                return VringAddress(index, rng.randrange(2), number(), number(), number(), number()).encode()
            case Request.SET_LOG_BASE:
                return LogBase(rng.choice((8, 64, number())), rng.choice((0, 0x8001, number()))).encode()
            case Request.GET_INFLIGHT_FD | Request.SET_INFLIGHT_FD:
                area = (number(), number(), number() & 0xFFFF, number() & 0xFFFF)
                return InflightArea(*rng.choice(((0x2000, 0, QUEUES, 8), area)), rng.random() < 0.5).encode()
            case Request.SET_DEVICE_STATE_FD:
                return DeviceState(rng.randrange(3), rng.choice((0, 0, 0, number() & 0xFFFFFFFF))).encode()
            case Request.SET_VRING_KICK | Request.SET_VRING_CALL | Request.SET_VRING_ERR:
                return VringFd(index & 0xFF, rng.random() < 0.2).encode()
            case Request.GET_CONFIG | Request.SET_CONFIG:
                return Config(number() & 0xFFFFFFFF, rng.randrange(3), rng.randbytes(rng.randrange(20))).encode()
            case _ if (row := REQUESTS.get(request)) is not None and row.decode == VringState.decode:
                return VringState(index, rng.choice((0, 1, number() & 0xFFFFFFFF))).encode()
            case _:
                return b""
        return encode_u64(payload)
