"""A simulated guest: a driver for our rings and the console conversation, without a virtual machine.

It behaves as Linux does (R-GUEST-01 to 23) where a back end or a test can tell the difference: a page for each receive
buffer, port id 0xffffffff in DEVICE_READY, input that stays in the ring until somebody reads, end of file that is not
sticky. ``HOSTILE`` is the same driver with bad manners (R-GUEST-24).
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from vsport._ring import DriverQueue, Memory, Region
from vsport.constants import (
    BAD_PORT_ID,
    QUEUE_CONTROL_RX,
    QUEUE_CONTROL_TX,
    Event,
    Feature,
    rx_queue,
    tx_queue,
)
from vsport.control import Message
from vsport.device import SerialDevice
from vsport.errors import DeviceError, GuestError

__all__ = ["HOSTILE", "LINUX", "Attachment", "Direct", "GuestPort", "Profile", "SimulatedGuest"]

PAGE = 4096
_CONTROL_MESSAGE_MAX = 64
_FRONT_END_BASE = 0x7F00_0000_0000
"""Front-end addresses differ from guest-physical ones, as they do in a real VMM, so that mixing them up shows."""


@dataclass(frozen=True, slots=True)
class Profile:
    """The manners of a driver."""

    name: str
    buffer_size: int = PAGE
    """Bytes of a receive buffer."""
    control_buffer_size: int = PAGE
    write_max: int = 32768
    """The most that one write() takes (R-GUEST-09)."""
    piece: int = 0
    """Cuts every buffer into descriptors of this many bytes; 0: one descriptor (R-RING-07)."""
    ready_late: bool = False
    """Says PORT_READY 0 first and 1 at the next chance (R-CON-32)."""
    noise: tuple[bytes, ...] = ()
    """Sent on the control queue before every honest message (R-CON-30)."""


LINUX = Profile("linux")
HOSTILE = Profile(
    "hostile",
    buffer_size=96,
    control_buffer_size=24,
    write_max=1000,
    piece=7,
    ready_late=True,
    noise=(
        b"",
        b"short",
        bytes(8),
        b"\xff" * 40,
        bytes.fromhex("2a000000 0300 0100"),
        bytes.fromhex("01000000 0100 0100"),
    ),
)


class Attachment(Protocol):
    """How a simulated guest reaches a device: directly, or through a vhost-user front end."""

    memory: Memory
    features: int
    """What the device offers."""

    def negotiate(self, features: int) -> None: ...
    def max_ports(self) -> int: ...
    def start_queue(self, index: int, queue: DriverQueue) -> None: ...
    def kick(self, index: int) -> None: ...
    def on_call(self, callback: Callable[[], None]) -> None:
        """``callback`` is called when the device interrupts; it must do no more than make a note."""

    def reset(self) -> None: ...


class Direct:
    """Attached to a device in this process: memory in two adjacent regions, kicks are calls."""

    def __init__(self, device: SerialDevice, *, memory_mib: int = 256) -> None:
        self.device = device
        self.features = device.features
        size = memory_mib << 20
        self._buffer = mmap.mmap(-1, size)
        half = size // 2
        self.memory = Memory(
            [
                Region(0, half, _FRONT_END_BASE, self._buffer, 0),
                Region(half, half, _FRONT_END_BASE + half, self._buffer, half),
            ]
        )
        self._queues: dict[int, DriverQueue] = {}

    def negotiate(self, features: int) -> None:
        self.device.negotiate(features)

    def max_ports(self) -> int:
        return int.from_bytes(self.device.read_config(4, 4), "little")

    def start_queue(self, index: int, queue: DriverQueue) -> None:
        self._queues[index] = queue
        self._start(index, base=0, reset=True)

    def _start(self, index: int, *, base: int, reset: bool) -> None:
        queue = self._queues[index]
        self.device.queues[index].start(
            self.memory,
            queue.size,
            *(_FRONT_END_BASE + gpa for gpa in (queue.desc, queue.avail, queue.used)),
            base=base,
            **self.device.ring_options,
            reset=reset,
        )
        self.device.queue_started(index)

    def pause(self) -> None:
        """The machine is stopped, and the guest with it: every queue stands where it is (R-MIG-25)."""
        for index in self._queues:
            self.device.queues[index].stop()
            self.device.queue_stopped(index)

    def resume(self) -> None:
        """The machine goes on."""
        for index in self._queues:
            self._start(index, base=self.device.queues[index].next_avail, reset=False)

    def move_to(self, device: SerialDevice) -> None:
        """The paused machine is on another host, whose ``device`` has been restored: resume() starts it there."""
        device.on_call, self.device = self.device.on_call, device

    def kick(self, index: int) -> None:
        self.device.kick(index)

    def on_call(self, callback: Callable[[], None]) -> None:
        self.device.on_call = lambda _index: callback()

    def reset(self) -> None:
        self.device.reset()
        self._queues.clear()


class _Ring:
    """One queue of the driver with its buffers: each is offered as one chain, as the profile likes its chains."""

    def __init__(self, guest: SimulatedGuest, index: int, buffer_size: int) -> None:
        self._attachment = guest.attachment
        self._guest = guest
        self._index = index
        size = guest.queue_size
        self._piece = guest.profile.piece or buffer_size
        self._indirect = bool(guest.features & Feature.INDIRECT_DESC) and buffer_size > self._piece
        self.buffer_size = buffer_size = buffer_size if self._indirect else min(buffer_size, size * self._piece)
        self._queue = DriverQueue(
            guest.memory,
            guest.allocate(DriverQueue.footprint(size)),
            size,
            event_idx=bool(guest.features & Feature.EVENT_IDX),
            indirect=bool(guest.features & Feature.INDIRECT_DESC),
            packed=bool(guest.features & Feature.RING_PACKED),
            in_order=bool(guest.features & Feature.IN_ORDER),
        )
        pieces = -(-buffer_size // self._piece)
        self._free = [guest.allocate(buffer_size) for _ in range(size if self._indirect else size // pieces)]
        self._tables = {gpa: guest.allocate(16 * pieces) for gpa in self._free} if self._indirect else {}
        self._busy: dict[int, int] = {}
        self._attachment.start_queue(index, self._queue)

    @property
    def in_flight(self) -> int:
        """Chains that the device has not given back yet."""
        return self._queue.in_flight

    def _pieces(self, gpa: int, size: int) -> list[tuple[int, int]]:
        return [(gpa + at, min(self._piece, size - at)) for at in range(0, size, self._piece)] or [(gpa, 0)]

    def _offer(self, gpa: int, size: int, *, writable: bool) -> None:
        elements, table = self._pieces(gpa, size), self._tables.get(gpa, 0)
        head = (
            self._queue.add(writable=elements, indirect_table=table)
            if writable
            else self._queue.add(readable=elements, indirect_table=table)
        )
        self._busy[head] = gpa
        if table:
            self._guest.on_write(table, 16 * len(elements))

    def _publish(self) -> None:
        kick = self._queue.publish()
        self._guest.on_write(self._queue.desc, 16 * self._queue.size)
        self._wrote_avail()
        if kick:
            self._attachment.kick(self._index)

    def _collect(self) -> tuple[int, int] | None:
        used = self._queue.collect()
        self._wrote_avail()
        return used

    def _wrote_avail(self) -> None:
        """Also who collects writes there: used_event."""
        self._guest.on_write(self._queue.avail, 6 + 2 * self._queue.size)

    # receiving

    def post(self) -> None:
        """Offers every free buffer to the device."""
        while self._free:
            self._offer(self._free.pop(), self.buffer_size, writable=True)
        self._publish()

    def take(self) -> bytes | None:
        """The bytes of the next filled buffer, which is offered again at once; None if there is none."""
        used = self._collect()
        if used is None:
            return None
        head, length = used
        gpa = self._busy.pop(head)
        data = self._guest.memory.read(gpa, length)
        self._offer(gpa, self.buffer_size, writable=True)
        self._publish()
        return data

    # sending

    def send(self, data: bytes) -> bool:
        """Offers ``data`` to the device in one buffer; False if all buffers are under way."""
        if not self.reclaim():
            return False
        gpa = self._free.pop()
        self._guest.memory.write(gpa, data)
        self._guest.on_write(gpa, len(data))
        self._offer(gpa, len(data), writable=False)
        self._publish()
        return True

    def reclaim(self) -> int:
        """Takes back what the device has consumed; says how many buffers are free."""
        while (used := self._collect()) is not None:
            self._free.append(self._busy.pop(used[0]))
        return len(self._free)


class GuestPort:
    """A port as a program in the guest has it: open, read, write, close, never blocking."""

    def __init__(self, guest: SimulatedGuest, id: int) -> None:
        self.guest = guest
        self.id = id
        self.name: str | None = None
        self.console = False
        self.size: tuple[int, int] | None = None
        self.host_connected = False
        self.host_history: list[bool] = []
        """Every PORT_OPEN that the guest heard, in order."""
        self.is_open = False
        self.unplugged = False
        self._rx = guest.ring(rx_queue(id), guest.profile.buffer_size)
        self._tx = guest.ring(tx_queue(id), guest.profile.write_max)
        self._unread = b""
        self._rx.post()

    def open(self) -> None:
        """Raises OSError: unplugged (ENXIO), or open already (EBUSY) (R-GUEST-04)."""
        if self.unplugged:
            raise OSError(6, "the port was unplugged")
        if self.is_open:
            raise OSError(16, "the port is open already")
        self.is_open = True
        self.guest.say(Message(self.id, Event.PORT_OPEN, 1))

    def close(self) -> None:
        """Input that was not read is thrown away (R-GUEST-05)."""
        if not self.is_open:
            return
        self.is_open = False
        self._unread = b""
        if not self.unplugged:
            self.guest.say(Message(self.id, Event.PORT_OPEN, 0))
            self.discard_input()

    def read(self, size: int = PAGE) -> bytes:
        """At most the rest of one buffer; b"" is end of file; raises BlockingIOError, OSError (R-GUEST-06, 07)."""
        self._check_plugged()
        self._unread = self._unread or self._rx.take() or b""
        if not self._unread and self.host_connected:
            raise BlockingIOError("nothing to read yet")
        data, self._unread = self._unread[:size], self._unread[size:]
        return data

    def write(self, data: bytes) -> int:
        """Queues ``profile.write_max`` bytes at most; raises BlockingIOError: the host is away, or the ring full."""
        self._check_plugged()
        if not self.host_connected:
            raise BlockingIOError("the host is not connected")
        data = data[: self._tx.buffer_size]
        if not self._tx.send(data):
            raise BlockingIOError("the ring is full")
        return len(data)

    @property
    def full(self) -> bool:
        """Whether a write would find no room (outvq_full)."""
        return not self._tx.reclaim()

    @property
    def unsent(self) -> int:
        """Writes that the device has not taken yet."""
        self._tx.reclaim()
        return self._tx.in_flight

    def discard_input(self) -> None:
        """What arrives while nobody has the port open is thrown away."""
        while self._rx.take() is not None:
            pass

    def _check_plugged(self) -> None:
        if self.unplugged:
            raise OSError(19, "the port was unplugged")


class SimulatedGuest:
    """A guest kernel with the virtio_console driver, and the programs that use it.

    Interrupts are passed on to ``on_interrupt``; ``run()`` handles them.
    """

    def __init__(
        self,
        attachment: Attachment,
        *,
        profile: Profile = LINUX,
        queue_size: int = 128,
        features: int | None = None,
    ) -> None:
        self.attachment = attachment
        self.profile = profile
        self.queue_size = queue_size
        self.features = attachment.features if features is None else attachment.features & features
        self.ports: dict[int, GuestPort] = {}
        self.on_interrupt: Callable[[], None] = lambda: None
        """Called when the device interrupts, e.g. to have run() called by a loop."""
        self.on_write: Callable[[int, int], None] = lambda _gpa, _size: None
        """Called after the guest itself has written to that much of its memory, as a hypervisor's dirty log sees it."""
        self._rings: dict[int, _Ring] = {}
        self._next_free = 0
        self._late: list[Message] = []

    @property
    def memory(self) -> Memory:
        """Where the attachment has it: a guest that was moved goes on in the copy."""
        return self.attachment.memory

    # -- life ----------------------------------------------------------------------------------------------------------

    def boot(self) -> None:
        """Sets the device up as Linux does and waits for nothing: the ports appear when run() hears of them."""
        self.attachment.on_call(lambda: self.on_interrupt())
        self.attachment.negotiate(self.features)
        if not self.features & Feature.MULTIPORT:
            self._add(0).host_connected = True
            return
        self.ring(QUEUE_CONTROL_RX, self.profile.control_buffer_size).post()
        self.ring(QUEUE_CONTROL_TX, _CONTROL_MESSAGE_MAX)
        self.say(Message(BAD_PORT_ID, Event.DEVICE_READY, 1))
        self.run()

    def reset(self) -> None:
        """A reboot: everything is forgotten, nothing is said (R-GUEST-15)."""
        self.attachment.reset()
        for port in self.ports.values():
            port.unplugged = True
        self.ports.clear()
        self._rings.clear()
        self._late.clear()
        self._next_free = 0

    def run(self) -> None:
        """Handles what the device has said since the last time."""
        control = self._rings.get(QUEUE_CONTROL_RX)
        returned_empty = 0  # buffers too small for the next message come back empty for as long as they are offered
        while control and returned_empty < self.queue_size and (data := control.take()) is not None:
            returned_empty = 0 if data else returned_empty + 1
            self._hear(data)
        for port in list(self.ports.values()):
            if not port.is_open:
                port.discard_input()

    def port(self, name: str) -> GuestPort:
        """The plugged port of that name; raises KeyError."""
        for port in self.ports.values():
            if port.name == name:
                return port
        raise KeyError(name)

    # -- the conversation ----------------------------------------------------------------------------------------------

    def say(self, message: Message) -> None:
        """Sends on the control queue; the device has to take it at once, as Linux spins until it has (R-CON-47)."""
        for noise in self.profile.noise:
            self._say_bytes(noise)
        self._say_bytes(message.encode())
        late, self._late = self._late, []
        for kept in late:
            self._say_bytes(kept.encode())

    def _say_bytes(self, data: bytes) -> None:
        control = self._rings[QUEUE_CONTROL_TX]
        sent = control.send(data)
        control.reclaim()
        if control.in_flight:  # a device that is at work has asked for no kick, and takes it soon
            self.attachment.kick(QUEUE_CONTROL_TX)
            control.reclaim()
        if not sent or control.in_flight:
            raise DeviceError("R-CON-47", "the device does not take control messages", message=data.hex())

    def _hear(self, data: bytes) -> None:
        try:
            message = Message.decode(data)
        except GuestError:
            return  # an undersized buffer comes back empty
        if message.event is Event.PORT_ADD:
            self._plug(message.port)
        elif message.port in self.ports:
            self._hear_of_port(self.ports[message.port], message)

    def _plug(self, id: int) -> None:
        if id not in self.ports:
            self._add(id)
        ready = Message(id, Event.PORT_READY, 1)
        if self.profile.ready_late:
            self._late.append(ready)
            ready = Message(id, Event.PORT_READY, 0)
        self.say(ready)

    def _add(self, id: int) -> GuestPort:
        port = self.ports[id] = GuestPort(self, id)
        return port

    def _hear_of_port(self, port: GuestPort, message: Message) -> None:
        match message.event:
            case Event.PORT_REMOVE:
                port.unplugged = True
                port.host_connected = False
                del self.ports[port.id]
            case Event.CONSOLE_PORT:
                port.console = True
                port.is_open = True
                self.say(Message(port.id, Event.PORT_OPEN, 1))
            case Event.RESIZE:
                port.size = message.size()
            case Event.PORT_OPEN:
                port.host_connected = bool(message.value)
                port.host_history.append(port.host_connected)
            case Event.PORT_NAME if port.name is None:  # only the first is kept (R-GUEST-22)
                port.name = message.tail.partition(b"\0")[0].decode(errors="replace")
            case _:
                pass

    # -- rings and buffers ---------------------------------------------------------------------------------------------

    def ring(self, index: int, buffer_size: int) -> _Ring:
        """The ring of queue ``index``: made and started the first time, later the same again (R-CON-50)."""
        if index not in self._rings:
            self._rings[index] = _Ring(self, index, buffer_size)
        return self._rings[index]

    def allocate(self, size: int) -> int:
        """Guest-physical address of ``size`` bytes, from a page boundary on."""
        gpa = self._next_free
        self._next_free += -(-size // PAGE) * PAGE
        return gpa
