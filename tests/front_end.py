"""vhost-user front ends for the tests: as recorded from QEMU 11.1 and UML 7.2, and a bench with a server for them.

The server usually runs in the same thread: ``idle`` steps its loop while the front end waits.
"""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from vsport._ring import DriverQueue
from vsport.constants import BAD_PORT_ID, Event, Feature
from vsport.control import Message
from vsport.device import SerialDevice
from vsport.host import Host
from vsport.loop import Loop
from vsport.options import parse_configuration
from vsport.port import PortConfig
from vsport.sim import GuestPort, SimulatedGuest
from vsport.vhost_user import frontend
from vsport.vhost_user.frontend import (
    TIMEOUT_SECONDS,
    USER,
    Disconnected,
    GuestMemory,
    OverVhostUser,
    Refused,
    Ring,
)
from vsport.vhost_user.message import MemoryRegion, ProtocolFeature, Request, VringState, encode_u64
from vsport.vhost_user.server import Server

__all__ = [
    "LAYOUTS",
    "LAYOUT_FEATURES",
    "USER",
    "VIRTIO_FEATURES",
    "Bench",
    "ConsoleDriver",
    "Daemon",
    "DaemonProcess",
    "Disconnected",
    "FrontEnd",
    "GuestMemory",
    "Machine",
    "OverVhostUser",
    "Qemu",
    "Refused",
    "Ring",
    "Uml",
    "open_fds",
]

F = TypeVar("F", bound="FrontEnd")

VIRTIO_FEATURES = Feature.VERSION_1 | Feature.SIZE | Feature.MULTIPORT | Feature.INDIRECT_DESC | Feature.EVENT_IDX


LAYOUT_FEATURES = Feature.RING_PACKED | Feature.IN_ORDER
LAYOUTS: dict[str, dict[str, bool]] = {
    "split": {},
    "packed": {"packed": True},
    "in order": {"in_order": True},
    "packed in order": {"packed": True, "in_order": True},
}
"""How a device can be made to offer its rings."""


def open_fds(*, settle: bool = False) -> int:
    """How many descriptors this process has; ``settle``: without those of garbage that earlier tests left."""
    if settle:
        gc.collect()
    return len(os.listdir("/proc/self/fd"))


class FrontEnd(frontend.FrontEnd):
    """A front end that wants everything acknowledged, negotiated or not (R-VU-05), and negotiates what a test says."""

    tell = frontend.FrontEnd.demand

    def negotiate(
        self, protocol_features: ProtocolFeature | None = None, features: int | None = VIRTIO_FEATURES
    ) -> None:
        super().negotiate(protocol_features, features)

    def set_protocol_features(self, features: ProtocolFeature) -> None:
        self.tell(Request.SET_PROTOCOL_FEATURES, encode_u64(features))
        self.protocol_features = ProtocolFeature(features)

    def make_ring(self, index: int, memory: GuestMemory, gpa: int, size: int = 8) -> Ring:
        """A driver's ring at ``gpa``, not yet shown to the back end."""
        return self.add_ring(
            index,
            DriverQueue(
                memory.memory,
                gpa,
                size,
                event_idx=bool(self.features & Feature.EVENT_IDX),
                indirect=bool(self.features & Feature.INDIRECT_DESC),
                packed=bool(self.features & Feature.RING_PACKED),
                in_order=bool(self.features & Feature.IN_ORDER),
            ),
        )


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
        self.user = memory.user
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
            self._set_up(ring)
        for ring in self.rings.values():
            self.set_fd(Request.SET_VRING_KICK, ring.index, ring.kick_fd)
            self.enable(ring.index, True)

    def _set_up(self, ring: Ring) -> None:
        if ring.index in self.calls:
            self.calls[ring.index].close()
        self.calls[ring.index], theirs = socket.socketpair()
        with theirs:
            self.set_fd(Request.SET_VRING_CALL, ring.index, theirs.fileno())
        self.tell(Request.SET_VRING_NUM, VringState(ring.index, ring.driver.size).encode())
        self.tell(Request.SET_VRING_BASE, VringState(ring.index, 0).encode())
        self.tell(Request.SET_VRING_ADDR, self.address(ring))

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

    def __init__(self, directory: Path, max_ports: int = 3, *, packed: bool = False, in_order: bool = False) -> None:
        self.loop = Loop()
        self.device = SerialDevice(max_ports=max_ports, packed=packed, in_order=in_order)
        self.device.on_backlog = lambda index: self.loop.call_soon(lambda: self.device.kick(index))
        self.device.add_port(PortConfig(1, "org.test.0"))
        self.features = VIRTIO_FEATURES | Feature(self.device.features & LAYOUT_FEATURES)
        """What its drivers use: VIRTIO_FEATURES, with the layout of the rings that the device was made for."""
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
        assert self.loop.run_until(lambda: not self.server.connected, TIMEOUT_SECONDS)

    def close(self) -> None:
        for front_end in self.front_ends:
            front_end.close()
        self.server.close()
        for memory in self.memories:
            memory.close()
        self.loop.close()


class Daemon:
    """A host with a Unix socket chardev and a server for its device, on a loop that waiting front ends step."""

    def __init__(self, directory: Path, name: str = "0", bus: str = "virtio-serial") -> None:
        self.path = str(directory / f"vu{name}.sock")
        self.chardev_path = str(directory / f"c{name}.sock")
        self.loop = Loop()
        chardev = f"socket,id=c0,path={self.chardev_path},server=on,wait=off"
        self.host = Host(self.loop, parse_configuration([chardev], [bus, "virtserialport,chardev=c0,name=org.test.0"]))
        self.host.open()
        self.device = self.host.device
        self.server = Server(self.device, self.loop)

    def step(self) -> None:
        self.loop.run_once(0.01)

    def listen(self) -> None:
        self.server.listen(self.path)

    def connect(self) -> FrontEnd:
        return FrontEnd.connect(self.path, self.step)

    def host_comes(self) -> socket.socket:
        """A program of the host's at the chardev."""
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.chardev_path)
        sock.setblocking(False)
        return sock

    def close(self) -> None:
        self.server.close()
        self.host.close()
        self.loop.close()


class DaemonProcess:
    """A device with its chardevs and its server in a process of its own, where front ends have no loop to step."""

    CODE = """
import sys
from vsport.host import Host
from vsport.loop import Loop
from vsport.options import parse_configuration
from vsport.vhost_user.server import Server

path, chardev, device = sys.argv[1:]
loop = Loop()
host = Host(loop, parse_configuration([chardev], [device]))
host.open()
Server(host.device, loop).listen(path)
print("ready", flush=True)
loop.run()
"""

    def __init__(self, path: str, chardev: str, device: str) -> None:
        self.path = path
        arguments = [sys.executable, "-c", self.CODE, path, chardev, device]
        self.process = subprocess.Popen(arguments, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    def kill(self) -> None:
        """As a crash would."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


class Machine:
    """A virtual machine: guest memory, a front end, and a simulated guest that is attached by it."""

    def __init__(
        self, front_end: frontend.FrontEnd, loop: Loop, *, size: int = 64 << 20, queue_size: int = 128
    ) -> None:
        self.front_end = front_end
        self.memory = GuestMemory(((0, size // 2), (1 << 30, size // 2)))
        self.attachment = OverVhostUser(front_end, loop, self.memory)
        features = int(VIRTIO_FEATURES | LAYOUT_FEATURES)
        self.guest = SimulatedGuest(self.attachment, features=features, queue_size=queue_size)

    def run_until(self, condition: Callable[[], object]) -> None:
        def done() -> object:
            self.guest.run()
            return condition()

        self.front_end.until(done)

    @classmethod
    def on(cls, daemon: Daemon, **options: int) -> Machine:
        """With a front end at ``daemon``."""
        return cls(daemon.connect(), daemon.loop, **options)

    def boot(self) -> GuestPort:
        """Until the guest knows its port by name."""
        self.guest.boot()
        self.run_until(lambda: any(port.name for port in self.guest.ports.values()))
        return self.guest.port("org.test.0")

    def close(self) -> None:
        self.attachment.close()
        self.front_end.close()
        self.memory.close()


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
            gpa = self._start + index * 0x2000
            self.memory.memory.write(gpa, bytes(0x2000))
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
