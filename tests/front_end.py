"""A vhost-user front end for the tests: small, honest, synchronous, over a real socket and real shared memory.

It can behave as QEMU and as User Mode Linux do, message by message as recorded from QEMU 11.1 and UML 7.2, and it can
be what a simulated guest is attached to. The server usually runs in the same thread: ``idle`` steps its loop while the
front end waits.
"""

from __future__ import annotations

import gc
import mmap
import os
import select
import socket
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from vsport._ring import DriverQueue, Memory, Region
from vsport.constants import BAD_PORT_ID, Event, Feature
from vsport.control import Message
from vsport.device import SerialDevice
from vsport.loop import Loop
from vsport.port import PortConfig
from vsport.vhost_user.message import (
    Config,
    MemoryRegion,
    MemoryTable,
    OneRegion,
    ProtocolFeature,
    Request,
    VringAddress,
    VringFd,
    VringState,
    decode_u64,
    encode_reply,
    encode_request,
    encode_u64,
)
from vsport.vhost_user.server import Server

F = TypeVar("F", bound="FrontEnd")

TIMEOUT = 10.0
USER = 0x7F00_0000_0000
"""Front-end addresses differ from guest-physical ones, so that mixing them up shows."""
VIRTIO_FEATURES = Feature.VERSION_1 | Feature.SIZE | Feature.MULTIPORT | Feature.INDIRECT_DESC | Feature.EVENT_IDX


class Refused(Exception):
    """The back end answered a request with a nonzero acknowledgement."""


class Disconnected(Exception):
    """The back end has closed the connection."""


def open_fds(*, settle: bool = False) -> int:
    """How many descriptors this process has; ``settle``: without those of garbage that earlier tests left."""
    if settle:
        gc.collect()
    return len(os.listdir("/proc/self/fd"))


class GuestMemory:
    """Guest memory in one memfd: regions of (gpa, size), one behind the other in the file from ``offset`` on."""

    def __init__(
        self, chunks: Sequence[tuple[int, int]] = ((0, 1 << 20),), *, offset: int = 0, user: int = USER
    ) -> None:
        self.fd = os.memfd_create("guest-memory")
        self.wire: list[MemoryRegion] = []
        for gpa, size in chunks:
            self.wire.append(MemoryRegion(gpa, size, user + gpa, offset))
            offset += size
        os.ftruncate(self.fd, offset)
        self.user = user
        buffer = mmap.mmap(self.fd, offset)
        self.memory = Memory([Region(w.gpa, w.size, w.front_end_addr, buffer, w.mmap_offset) for w in self.wire])

    def close(self) -> None:
        self.memory = Memory()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@dataclass
class Ring:
    """A queue as the front end has it: the driver's side, and the descriptors."""

    index: int
    driver: DriverQueue
    base: int = 0
    kick_fd: int = field(default_factory=lambda: os.eventfd(0, os.EFD_NONBLOCK))
    call_fd: int = field(default_factory=lambda: os.eventfd(0, os.EFD_NONBLOCK))
    err_fd: int = field(default_factory=lambda: os.eventfd(0, os.EFD_NONBLOCK))

    def called(self) -> int:
        """How many interrupts have come since the last time."""
        return _count(self.call_fd)

    def failed(self) -> int:
        """How many times the error descriptor was signalled since the last time."""
        return _count(self.err_fd)

    def kick(self) -> None:
        os.eventfd_write(self.kick_fd, 1)

    def close(self) -> None:
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            os.close(fd)


def _count(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


class FrontEnd:
    """The other side of the protocol: sends requests, checks replies to the bit (R-VU-02)."""

    def __init__(self, sock: socket.socket, idle: Callable[[], None] | None = None) -> None:
        self.sock = sock
        self.sock.setblocking(False)
        self.idle = idle or (lambda: select.select([self.sock], [], [], 0.05) and None)
        self.features = 0
        self.protocol_features = ProtocolFeature(0)
        self.rings: dict[int, Ring] = {}
        self.channel: socket.socket | None = None

    @classmethod
    def connect(cls: type[F], path: str, idle: Callable[[], None] | None = None) -> F:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(path)
        return cls(sock, idle)

    def close(self) -> None:
        self.sock.close()
        if self.channel is not None:
            self.channel.close()
        for ring in self.rings.values():
            ring.close()
        self.rings.clear()

    # -- messages ------------------------------------------------------------------------------------------------------

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Sends raw bytes; the descriptors ride with the first of them (R-VU-03)."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        try:
            sent = self.sock.sendmsg([data], ancillary)
        except (BrokenPipeError, ConnectionResetError) as exc:
            raise Disconnected from exc
        assert sent == len(data), "the server leaves its socket unread"

    def receive(self, size: int) -> bytes:
        """Exactly ``size`` bytes; raises Disconnected."""
        data = b""
        deadline = time.monotonic() + TIMEOUT
        while len(data) < size:
            assert time.monotonic() < deadline, f"no answer, only {data!r}"
            try:
                piece = self.sock.recv(size - len(data))
            except BlockingIOError:
                self.idle()
                continue
            except ConnectionResetError as exc:
                raise Disconnected from exc
            if not piece:
                raise Disconnected
            data += piece
        return data

    def reply(self, request: int) -> bytes:
        """The payload of the reply to ``request``, the only thing that may come now."""
        header = self.receive(12)
        size = int.from_bytes(header[8:], "little")
        payload = self.receive(size)
        assert header + payload == encode_reply(request, payload)
        return payload

    def ask(self, request: int, payload: bytes = b"") -> bytes:
        """A request with a reply of its own."""
        self.send(encode_request(request, payload))
        return self.reply(request)

    def ask_u64(self, request: int) -> int:
        return decode_u64(self.ask(request))

    def tell(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """A request that is acknowledged; raises Refused."""
        self.send(encode_request(request, payload, need_reply=True), fds)
        if decode_u64(self.reply(request)):
            raise Refused(Request(request).name if request in set(Request) else str(request))

    def post(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """A request without any answer."""
        self.send(encode_request(request, payload), fds)

    def barrier(self) -> None:
        """Everything sent before has been dealt with when this returns (R-VU-10)."""
        self.ask(Request.GET_FEATURES)

    def until(self, condition: Callable[[], object]) -> None:
        """Lets the server work until ``condition()`` holds."""
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < deadline, "the server did not do it"
            self.idle()

    # -- pieces of a conversation --------------------------------------------------------------------------------------

    def negotiate(self, protocol_features: ProtocolFeature | None = None, features: int = VIRTIO_FEATURES) -> None:
        """The shortest start that works: features, nothing else."""
        offered = self.ask_u64(Request.GET_PROTOCOL_FEATURES)
        self.protocol_features = ProtocolFeature(offered) if protocol_features is None else protocol_features
        self.tell(Request.SET_PROTOCOL_FEATURES, encode_u64(self.protocol_features))
        self.set_features(features)

    def set_features(self, features: int) -> None:
        self.features = features
        self.tell(Request.SET_FEATURES, encode_u64(features | Feature.PROTOCOL_FEATURES))

    def share(self, memory: GuestMemory) -> None:
        self.tell(Request.SET_MEM_TABLE, MemoryTable(tuple(memory.wire)).encode(), [memory.fd] * len(memory.wire))

    def add_region(self, region: MemoryRegion, fd: int) -> None:
        self.tell(Request.ADD_MEM_REG, OneRegion(region).encode(), [fd])

    def remove_region(self, region: MemoryRegion) -> None:
        self.tell(Request.REM_MEM_REG, OneRegion(region).encode())

    def make_ring(self, index: int, memory: GuestMemory, gpa: int, size: int = 8) -> Ring:
        """A driver's ring at ``gpa``, not yet shown to the back end."""
        driver = DriverQueue(
            memory.memory,
            gpa,
            size,
            event_idx=bool(self.features & Feature.EVENT_IDX),
            indirect=bool(self.features & Feature.INDIRECT_DESC),
        )
        if index in self.rings:
            self.rings[index].driver, self.rings[index].base = driver, 0
        else:
            self.rings[index] = Ring(index, driver)
        return self.rings[index]

    def address(self, ring: Ring, user: int = USER, flags: int = 0) -> bytes:
        driver = ring.driver
        return VringAddress(
            ring.index, flags, user + driver.desc, user + driver.used, user + driver.avail, 2**64 - 1
        ).encode()

    def configure(self, ring: Ring, user: int = USER) -> None:
        """Size, base and addresses; no acknowledgement is asked for, as in QEMU (R-VU-58)."""
        self.post(Request.SET_VRING_NUM, VringState(ring.index, ring.driver.size).encode())
        self.post(Request.SET_VRING_BASE, VringState(ring.index, ring.base).encode())
        self.post(Request.SET_VRING_ADDR, self.address(ring, user))

    def set_fd(self, request: int, index: int, fd: int) -> None:
        """SET_VRING_KICK, CALL or ERR; -1: no descriptor."""
        self.tell(request, VringFd(index, fd < 0).encode(), [fd] if fd >= 0 else [])

    def enable(self, index: int, on: bool) -> None:
        self.tell(Request.SET_VRING_ENABLE, VringState(index, int(on)).encode())

    def get_base(self, index: int) -> int:
        state = VringState.decode(self.ask(Request.GET_VRING_BASE, VringState(index, 0).encode()))
        assert state.index == index
        return state.num

    def start(self, ring: Ring) -> None:
        """Everything for one ring, from its layout to ENABLE."""
        self.configure(ring)
        self.set_fd(Request.SET_VRING_ERR, ring.index, ring.err_fd)
        self.set_fd(Request.SET_VRING_CALL, ring.index, ring.call_fd)
        self.set_fd(Request.SET_VRING_KICK, ring.index, ring.kick_fd)
        self.enable(ring.index, True)

    def get_config(self, size: int = 12) -> bytes:
        return Config.decode(self.ask(Request.GET_CONFIG, Config(0, 0, bytes(size)).encode())).data

    def open_channel(self) -> None:
        self.channel, theirs = socket.socketpair()
        self.channel.setblocking(False)
        with theirs:
            self.tell(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])


# -- as recorded -------------------------------------------------------------------------------------------------------


class Qemu(FrontEnd):
    """QEMU 11.1 with vhost-user-test-device-pci (R-VU-13, 34, 36, 41, 55, 57, 58)."""

    def attach(self, num_vqs: int) -> None:
        """What it sends when the virtual machine is made, before any guest code runs."""
        self.num_vqs = num_vqs
        self.shared: list[MemoryRegion] = []
        self.mask_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.masked_err_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.ask(Request.GET_FEATURES)
        self.protocol_features = ProtocolFeature(self.ask_u64(Request.GET_PROTOCOL_FEATURES))
        self.post(Request.SET_PROTOCOL_FEATURES, encode_u64(self.protocol_features))
        assert self.ask_u64(Request.GET_QUEUE_NUM) >= num_vqs
        assert self.ask_u64(Request.GET_MAX_MEM_SLOTS) >= 1
        self.open_channel()
        self.post(Request.SET_OWNER)
        self.ask(Request.GET_FEATURES)
        for index in range(num_vqs):
            self.set_fd(Request.SET_VRING_CALL, index, self.mask_fd)
            self.set_fd(Request.SET_VRING_ERR, index, self.masked_err_fd)

    def resume(self, memory: GuestMemory) -> None:
        """The guest's driver has set its queues up, or a paused machine goes on."""
        self.get_config()
        self.post(Request.SET_FEATURES, encode_u64(self.features | Feature.PROTOCOL_FEATURES))
        if not self.ask_u64(Request.GET_STATUS) & 8:
            self.post(Request.SET_STATUS, encode_u64(8))
        for region in memory.wire:
            if region not in self.shared:
                self.add_region(region, memory.fd)
                self.shared.append(region)
        for ring in self.rings.values():
            self.configure(ring)
            self.set_fd(Request.SET_VRING_KICK, ring.index, ring.kick_fd)
            self.set_fd(Request.SET_VRING_CALL, ring.index, ring.call_fd)
        for index in range(self.num_vqs):
            self.enable(index, True)
        for ring in self.rings.values():
            self.set_fd(Request.SET_VRING_CALL, ring.index, ring.call_fd)

    def pause(self) -> None:
        """The machine is stopped, the guest reboots, or its driver is unbound: all look like this (R-VU-70)."""
        for index in range(self.num_vqs):
            self.enable(index, False)
        for ring in self.rings.values():
            ring.base = self.get_base(ring.index)

    def close(self) -> None:
        super().close()
        os.close(self.mask_fd)
        os.close(self.masked_err_fd)


class Uml(FrontEnd):
    """User Mode Linux 7.2 (R-VU-06, 13, 19, 44, 56, 58, 61, 98): after SET_OWNER, what is no GET asks for an answer."""

    IMPLEMENTED = ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK | ProtocolFeature.BACKEND_REQ | ProtocolFeature.CONFIG

    def attach(self) -> None:
        self.post(Request.SET_OWNER)
        self.ask(Request.GET_FEATURES)
        self.protocol_features = ProtocolFeature(self.ask_u64(Request.GET_PROTOCOL_FEATURES)) & self.IMPLEMENTED
        self.tell(Request.SET_PROTOCOL_FEATURES, encode_u64(self.protocol_features))
        self.open_channel()
        self.queues = self.ask_u64(Request.GET_QUEUE_NUM)
        self.calls: dict[int, socket.socket] = {}

    def bind(self, memory: GuestMemory) -> None:
        """The driver is bound: features, memory, rings, always from base 0 (R-VU-72)."""
        self.set_features(self.features)
        assert self.get_config(8)[4:8] != bytes(4), "max_nr_ports (R-CON-12)"
        self.share(memory)
        for ring in self.rings.values():
            self._set_up(ring, memory.user)
        for ring in self.rings.values():
            self.set_fd(Request.SET_VRING_KICK, ring.index, ring.kick_fd)
            self.enable(ring.index, True)

    def _set_up(self, ring: Ring, user: int) -> None:
        if ring.index in self.calls:
            self.calls[ring.index].close()
        self.calls[ring.index], theirs = socket.socketpair()
        with theirs:
            self.set_fd(Request.SET_VRING_CALL, ring.index, theirs.fileno())
        self.tell(Request.SET_VRING_NUM, VringState(ring.index, ring.driver.size).encode())
        self.tell(Request.SET_VRING_BASE, VringState(ring.index, 0).encode())
        self.tell(Request.SET_VRING_ADDR, self.address(ring, user))

    def unbind(self) -> None:
        """No GET_VRING_BASE: only ENABLE 0 in reverse, and GET_FEATURES (R-VU-56)."""
        for index in sorted(self.rings, reverse=True):
            self.enable(index, False)
        self.barrier()

    def close(self) -> None:
        super().close()
        for call in self.calls.values():
            call.close()


# -- the other end -----------------------------------------------------------------------------------------------------


class Bench:
    """A device with port 1 and its server on a socket, in this thread, and the front ends that came."""

    def __init__(self, directory: Path, max_ports: int = 3) -> None:
        self.loop = Loop()
        self.device = SerialDevice(max_ports=max_ports)
        self.device.on_backlog = lambda index: self.loop.call_soon(lambda: self.device.kick(index))
        self.device.add_port(PortConfig(1, "org.test.0"))
        self.server = Server(self.device, self.loop)
        self.path = str(directory / "vu.sock")
        self.server.listen(self.path)
        self.front_ends: list[FrontEnd] = []
        self.memories: list[GuestMemory] = []

    def step(self) -> None:
        self.loop.run_once(0.01)

    def connect(self, kind: type[F]) -> F:
        front_end = kind.connect(self.path, self.step)
        self.front_ends.append(front_end)
        return front_end

    def make_memory(self, *chunks: tuple[int, int], offset: int = 0, user: int = USER) -> GuestMemory:
        self.memories.append(GuestMemory(chunks or ((0, 1 << 20),), offset=offset, user=user))
        return self.memories[-1]

    def disconnect(self, front_end: FrontEnd) -> None:
        """The front end goes, and the server notices."""
        front_end.close()
        self.front_ends.remove(front_end)
        assert self.loop.run_until(lambda: not self.server.connected, TIMEOUT)

    def close(self) -> None:
        for front_end in self.front_ends:
            front_end.close()
        self.server.close()
        for memory in self.memories:
            memory.close()
        self.loop.close()


class ConsoleDriver:
    """The driver of a console device with port 1 on a front end: rings of eight, and nothing that it does by itself."""

    QUEUES = range(6)
    CONTROL_RX, CONTROL_TX, PORT_RX, PORT_TX = 2, 3, 4, 5

    def __init__(self, front_end: FrontEnd, memory: GuestMemory) -> None:
        self.front_end = front_end
        self.memory = memory
        self._start = memory.wire[0].gpa
        self._buffers = self._start + 0x10000
        self.lay_out()

    def lay_out(self) -> None:
        """What a driver does when it is bound: fresh rings, buffers for control messages, DEVICE_READY."""
        for index in self.QUEUES:
            gpa = self._start + index * 0x1000
            self.memory.memory.write(gpa, bytes(0x1000))
            self.front_end.make_ring(index, self.memory, gpa)
        self._posted: dict[int, int] = {}
        for number in range(4):
            self._post(self._buffers + number * 0x100)
        self.say(Message(BAD_PORT_ID, Event.DEVICE_READY, 1))

    def _post(self, gpa: int) -> None:
        ring = self.front_end.rings[self.CONTROL_RX]
        self._posted[ring.driver.add(writable=[(gpa, 0x100)])] = gpa
        ring.driver.publish()
        ring.kick()

    def offer(self, index: int, data: bytes) -> None:
        """One chain with ``data`` on a queue, and a kick."""
        ring = self.front_end.rings[index]
        while ring.driver.collect() is not None:
            pass
        gpa = self._buffers + 0x1000 * (1 + index)
        self.memory.memory.write(gpa, data)
        ring.driver.add(readable=[(gpa, len(data))])
        ring.driver.publish()
        ring.kick()

    def say(self, message: Message) -> None:
        self.offer(self.CONTROL_TX, message.encode())

    def hear(self) -> list[Message]:
        """The control messages that have come since the last time."""
        messages = []
        while (used := self.front_end.rings[self.CONTROL_RX].driver.collect()) is not None:
            head, length = used
            gpa = self._posted.pop(head)
            messages.append(Message.decode(self.memory.memory.read(gpa, length)))
            self._post(gpa)
        return messages

    def wait_for(self, *events: Event) -> None:
        """Lets the device work until it has said exactly these."""
        heard: list[Event] = []

        def complete() -> bool:
            heard.extend(message.event for message in self.hear())
            return len(heard) >= len(events)

        self.front_end.until(complete)
        assert heard == list(events), heard

    def open_port(self) -> None:
        """The whole conversation, until a program in the guest holds port 1 open."""
        self.wait_for(Event.PORT_ADD)
        self.say(Message(1, Event.PORT_READY, 1))
        self.wait_for(Event.PORT_NAME)
        self.say(Message(1, Event.PORT_OPEN, 1))
        self.front_end.barrier()


# -- a simulated guest's way to the device -----------------------------------------------------------------------------


class OverVhostUser:
    """Attaches a vsport.sim.SimulatedGuest through a front end, its kicks and its calls (sim.Attachment)."""

    def __init__(self, front_end: FrontEnd, loop: Loop, memory: GuestMemory) -> None:
        self.front_end = front_end
        self.loop = loop
        self.guest_memory = memory
        self.memory = memory.memory
        self.features = front_end.ask_u64(Request.GET_FEATURES) & ~int(Feature.PROTOCOL_FEATURES)
        self._on_call: Callable[[], None] = lambda: None
        self._watched: set[int] = set()
        front_end.negotiate(features=0)
        front_end.share(memory)

    def negotiate(self, features: int) -> None:
        self.front_end.set_features(features)

    def max_ports(self) -> int:
        return int.from_bytes(self.front_end.get_config()[4:8], "little")

    def start_queue(self, index: int, queue: DriverQueue) -> None:
        rings = self.front_end.rings
        if index in rings:
            rings[index].driver, rings[index].base = queue, 0
        else:
            rings[index] = Ring(index, queue)
            self._watched.add(rings[index].call_fd)
            self.loop.watch(rings[index].call_fd, select.EPOLLIN, lambda _: self._called(rings[index]))
        self.front_end.start(rings[index])

    def _called(self, ring: Ring) -> None:
        ring.called()
        self._on_call()

    def kick(self, index: int) -> None:
        """The vCPU goes on when the device has had a look, which a real one need not wait for."""
        ring = self.front_end.rings[index]
        ring.kick()
        poll = select.poll()
        poll.register(ring.kick_fd, select.POLLIN)
        self.front_end.until(lambda: not poll.poll(0))

    def on_call(self, callback: Callable[[], None]) -> None:
        self._on_call = callback

    def reset(self) -> None:
        """As QEMU does it: all rings disabled, then stopped; the next start is from 0."""
        for ring in self.front_end.rings.values():
            self.front_end.enable(ring.index, False)
        for ring in self.front_end.rings.values():
            self.front_end.get_base(ring.index)

    def close(self) -> None:
        for fd in self._watched:
            self.loop.unwatch(fd)
