"""The device: features, configuration space, queues, ports, and the conversation on the control queues.

Pure state: it is told what happened (a kick, a queue that started, a host that came) and works on the rings at once.
What it cannot do itself it asks of the hooks ``on_*``, set by whoever attaches it to a front end or a simulated guest.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Container

from vsport._ring import DeviceQueue
from vsport.connection import Cause, State
from vsport.constants import (
    BAD_PORT_ID,
    CONFIG_EMERG_WR,
    CONFIG_LAYOUT,
    CONFIG_SIZE,
    PORTS_DEFAULT,
    PORTS_MAX,
    QUEUE_CONTROL_RX,
    QUEUE_CONTROL_TX,
    Event,
    Feature,
    queue_count,
    rx_queue,
    tx_queue,
)
from vsport.control import Message, Outbox
from vsport.document import DocumentError
from vsport.errors import FrontEndError, GuestError, UsageError
from vsport.port import BackEnd, Log, Manners, Port, PortConfig, Whose
from vsport.snapshot import QueueState, Snapshot

__all__ = ["SerialDevice"]

log = logging.getLogger("vsport.device")

_MULTIPORT = int(Feature.MULTIPORT)
_RING_OPTIONS = {
    "event_idx": int(Feature.EVENT_IDX),
    "indirect": int(Feature.INDIRECT_DESC),
    "packed": int(Feature.RING_PACKED),
    "in_order": int(Feature.IN_ORDER),
}
"""A plain number: looking at an IntFlag takes longer than all the rest of a kick."""
_CONTROL_TURN = 256
"""Control messages handled in one turn, so that a guest that never stops sending cannot keep the loop for itself."""


def _nothing(*_: object) -> None:
    """A hook that nobody has set."""


class SerialDevice:
    """A virtio-serial device with up to ``max_ports`` ports (1 to 127).

    ``queues`` are its virtqueues, by index (R-CON-02). Whoever attaches the device starts and stops them and says so by
    queue_started() and queue_stopped(). ``packed`` and ``in_order`` offer the guest these ways to use a ring. Raises
    UsageError if a value is out of range.
    """

    OFFERED = (
        Feature.SIZE
        | Feature.MULTIPORT
        | Feature.EMERG_WRITE
        | Feature.INDIRECT_DESC
        | Feature.EVENT_IDX
        | Feature.VERSION_1
    )
    config_size = CONFIG_SIZE

    def __init__(
        self,
        *,
        max_ports: int = PORTS_DEFAULT,
        cols: int = 80,
        rows: int = 25,
        packed: bool = False,
        in_order: bool = False,
        name: str = "",
    ) -> None:
        if not 1 <= max_ports <= PORTS_MAX:
            raise UsageError(f"max_ports={max_ports} is not in 1 to {PORTS_MAX}: vhost-user has 256 queues at most")
        self.max_ports = max_ports
        self.log: Log = logging.LoggerAdapter(log, {"whose": f"{name}: "}) if name else log
        """For all that is said about this device, also by its front end's session: ``whose`` is what it begins with."""
        self.cols, self.rows = cols, rows
        self.features = int(self.OFFERED)
        if packed:
            self.features |= Feature.RING_PACKED
        if in_order:
            self.features |= Feature.IN_ORDER
        self.negotiated = 0
        self.queues = tuple(DeviceQueue(index) for index in range(queue_count(max_ports)))
        self.ports: dict[int, Port] = {}
        self.driver_ready = False
        """Whether the driver has asked for its ports (DEVICE_READY 1) since the last reset."""
        self.refused = 0
        """Control messages that broke a rule and were dropped (R-CON-30)."""
        self.running = False
        """Whether a queue runs; else the machine is paused, or has not begun."""
        self._outbox = Outbox()
        self._sizes: dict[int, int] = {}
        """Of the queues that have been started since the last reset."""
        self.on_call: Callable[[int], None] = _nothing
        """(queue index) The guest wants an interrupt, and the queue has no call descriptor."""
        self.on_backlog: Callable[[int], None] = _nothing
        """(queue index) Call kick(index) again soon: there is more than fits into one turn."""
        self.on_fault: Callable[[int, GuestError | FrontEndError], None] = _nothing
        """(queue index, error) The queue has stopped, because a peer broke a rule."""
        self.on_config_change: Callable[[], None] = _nothing
        """The configuration space has changed."""
        self.on_transition: Callable[[Port, Cause, State], None] = _nothing
        """(port, cause, state before) A port's state is another one now, or has come from elsewhere."""
        self.on_drop: Callable[[Port, int, Whose], None] = _nothing
        """(port, count, whose) So many bytes of the guest or of the host reach nobody."""

    # -- features and configuration space ----------------------------------------------------------------------------

    @property
    def multiport(self) -> bool:
        """Whether control queues and ports other than port 0 exist for the driver (R-CON-03)."""
        return bool(self.negotiated & _MULTIPORT)

    @property
    def ring_options(self) -> dict[str, bool]:
        """How queues are used, as DeviceQueue.start() wants to be told."""
        return {option: bool(self.negotiated & bit) for option, bit in _RING_OPTIONS.items()}

    def negotiate(self, features: int) -> None:
        """The driver has accepted these features; raises FrontEndError if some of them were not offered."""
        unknown = features & ~self.features
        if unknown:
            raise FrontEndError("6.1", "feature bits acknowledged that were not offered", bits=hex(unknown))
        self.negotiated = features

    def read_config(self, offset: int, size: int) -> bytes:
        """Bytes of the configuration space; raises FrontEndError beyond its end. emerg_wr reads as 0 (R-CON-07)."""
        if offset < 0 or size < 0 or offset + size > CONFIG_SIZE:
            raise FrontEndError("5.3.4", "read beyond the configuration space", offset=offset, size=size)
        return struct.pack(CONFIG_LAYOUT, self.cols, self.rows, self.max_ports, 0)[offset : offset + size]

    def write_config(self, offset: int, data: bytes) -> None:
        """The guest wrote to the configuration space: only emerg_wr counts (R-CON-09). Raises FrontEndError."""
        if offset < 0 or offset + len(data) > CONFIG_SIZE:
            raise FrontEndError("5.3.4", "write beyond the configuration space", offset=offset, size=len(data))
        position = CONFIG_EMERG_WR - offset
        if 0 <= position < len(data) and data[position]:  # 0 is no character, but a field written along (R-CON-08)
            self._emergency_write(data[position])

    def _emergency_write(self, byte: int) -> None:
        """To the first console port, as in QEMU (R-CON-08)."""
        console = next((port for port in self._in_order() if port.console), None)
        if console is not None:
            console.back_end.emergency_write(byte)

    # -- ports -------------------------------------------------------------------------------------------------------

    def free_port_id(self, *, console: bool) -> int:
        """The lowest id for a new port; port 0 is kept for a console (R-CON-51). Raises UsageError if all are taken."""
        for candidate in range(0 if console else 1, self.max_ports):
            if candidate not in self.ports:
                return candidate
        raise UsageError(f"all {self.max_ports} ports of the device are taken (max_ports)")

    def add_port(self, config: PortConfig, manners: Manners = Manners()) -> Port:  # noqa: B008 - it is frozen
        """Plugs a port, also while a guest is running. Raises UsageError (R-CON-21, R-CON-52)."""
        self._check_free(config)
        port = Port(config, self.queues[rx_queue(config.id)], self.queues[tx_queue(config.id)], self, manners)
        self.ports[config.id] = port
        if self.driver_ready:
            self._tell_of(port)
        self._begin_single_port(port)
        return port

    def attach(self, port: Port, back_end: BackEnd) -> None:
        """Gives ``port`` the back end that it drives from now on."""
        port.back_end = back_end

    def _check_free(self, config: PortConfig) -> None:
        if not 0 <= config.id < self.max_ports:
            raise UsageError(f"port number {config.id} is not in 0 to {self.max_ports - 1} (max_ports)")
        if config.id in self.ports:
            raise UsageError(f"port number {config.id} is taken")
        if config.name and any(config.name == port.name for port in self.ports.values()):
            raise UsageError(f"port name {config.name!r} is taken: names are unique, udev makes a link of each")

    def remove_port(self, id: int) -> None:
        """Unplugs a port; its chains go back first (R-CON-49). Raises UsageError if there is none."""
        if id not in self.ports:
            raise UsageError(f"there is no port {id} to remove")
        port = self.ports[id]
        port.feed(Cause.UNPLUG)
        del self.ports[id]
        port.back_end.halt()
        port.back_end = BackEnd()
        if port.added:
            self.tell(Message(id, Event.PORT_REMOVE, 1))

    def resize(self, id: int, cols: int, rows: int) -> None:
        """A console port's terminal has another size (R-CON-11, R-CON-25). Raises UsageError."""
        port = self.ports.get(id)
        if port is None or not port.console:
            raise UsageError(f"port {id} is no console port: only a console has a size")
        port.resize(cols, rows)
        if id == 0:
            self.cols, self.rows = cols, rows
            self.on_config_change()

    def _in_order(self) -> list[Port]:
        return [self.ports[id] for id in sorted(self.ports)]

    def _port_of(self, index: int) -> Port | None:
        """The port that queue ``index`` belongs to, if it is plugged and visible to the driver."""
        if index < QUEUE_CONTROL_RX:
            return self.ports.get(0)
        return self.ports.get(index // 2 - 1) if self.multiport else None

    # -- what happens to queues --------------------------------------------------------------------------------------

    def queue_started(self, index: int) -> None:
        """Queue ``index`` runs. Its backlog is looked at without waiting for a kick (R-VU-53)."""
        self._sizes[index] = self.queues[index].size
        if not self.running:
            self.running = True
            self._feed_all(Cause.RESUME)
        port = self._port_of(index)
        if port is not None:
            self._begin_single_port(port)
        self.kick(index)

    def queue_stopped(self, index: int) -> None:
        """Queue ``index`` has stopped; nothing is forgotten, it may be a pause (R-MIG-25)."""
        if self.running and not any(queue.running for queue in self.queues):
            self.running = False
            self._feed_all(Cause.PAUSE)

    def _feed_all(self, cause: Cause) -> None:
        for port in self._in_order():
            port.feed(cause)

    def kick(self, index: int) -> None:
        """The driver may have offered something on queue ``index``. Never raises for what a guest did."""
        if index == QUEUE_CONTROL_TX:
            self._hear()
        elif index == QUEUE_CONTROL_RX:
            self._flush()
        else:
            self._kick_port(index)

    def _kick_port(self, index: int) -> None:
        port = self._port_of(index)
        if port is None:
            return
        if index == port.tx.index:
            port.tx_ready()
        else:
            port.back_end.rx_ready()

    def _begin_single_port(self, port: Port) -> None:
        """Without MULTIPORT nobody says that port 0 is ready and open: it is as soon as its queues run (R-CON-37)."""
        if port.id == 0 and not self.multiport and port.tx.running and not port.state.device_ready:
            port.feed(Cause.PORT_READY)
            port.feed(Cause.GUEST_OPEN)

    def reset(self) -> None:
        """The guest starts anew: its state is forgotten, the host's side stays as it is (R-CON-38)."""
        for queue in self.queues:
            queue.stop()
            queue.forget_partial()
        self._outbox.clear()
        self._sizes.clear()
        self.running = self.driver_ready = False
        for port in self._in_order():
            port.added = port.stale = False
            port.feed(Cause.RESET)
            port.back_end.guest_told()

    # -- moving ------------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """All that the guest and the back ends can notice, while the machine is paused; nothing changes by it.

        Raises UsageError while a queue runs: what would be written down could be over before it is read.
        """
        if self.running:
            raise UsageError("the device runs: stop its queues before its state is saved")
        return self.preview()

    def preview(self) -> Snapshot:
        """What snapshot() would say just now, of a device that may run: its queues are elsewhere already."""
        return Snapshot(
            max_ports=self.max_ports,
            cols=self.cols,
            rows=self.rows,
            features=self.negotiated,
            driver_ready=self.driver_ready,
            queues=tuple(self._queue_state(index, size) for index, size in sorted(self._sizes.items())),
            ports=tuple(port.save() for port in self._in_order()),
            waiting=self._outbox.messages,
        )

    def _queue_state(self, index: int, size: int) -> QueueState:
        queue = self.queues[index]
        return QueueState(index, size, queue.next_avail, queue.offset)

    def restore(self, snapshot: Snapshot, *, carried: Container[int] | None = None) -> None:
        """Goes on where ``snapshot`` ends, on another machine or in another process; its queues are started later.

        A host that is there already is told of the guest as its port's manners say (Policy), and the guest of the host
        (OnRestore). ``carried`` makes it a handover: the numbers of the ports whose host's session came along.
        Raises DocumentError or UsageError, and then nothing has changed.
        """
        self.check(snapshot)
        self.negotiated, self.driver_ready = snapshot.features, snapshot.driver_ready
        self.cols, self.rows = snapshot.cols, snapshot.rows
        self._outbox.replace(snapshot.waiting)
        self._restore_queues(snapshot)
        cause = Cause.RESTORE if carried is None else Cause.HANDOVER
        for saved in snapshot.ports:
            id = saved.config.id
            self.ports[id].restore(saved, cause, carried=carried is not None and id in carried)

    def _restore_queues(self, snapshot: Snapshot) -> None:
        self._sizes = {saved.index: saved.size for saved in snapshot.queues}
        positions = {saved.index: (saved.next_avail, saved.offset) for saved in snapshot.queues}
        for queue in self.queues:
            queue.restore(*positions.get(queue.index, (0, 0)))

    def check(self, snapshot: Snapshot) -> None:
        """Whether ``snapshot`` fits this device; raises DocumentError, or UsageError while a queue runs."""
        if self.running:
            raise UsageError("the device runs: stop its queues before it is restored")
        if snapshot.max_ports != self.max_ports:
            raise DocumentError(f"the snapshot has max_ports={snapshot.max_ports}, this device {self.max_ports}")
        if unknown := snapshot.features & ~self.features:
            raise DocumentError(f"the snapshot's guest uses features that this device has not: {unknown:#x}")
        if self.negotiated not in {0, snapshot.features}:
            raise DocumentError(
                f"the snapshot's guest uses features {snapshot.features:#x}, this device's {self.negotiated:#x}"
            )
        for saved in snapshot.ports:
            if saved.config.id in self.ports:
                self.ports[saved.config.id].check(saved)
        self._check_same_ports({saved.config.id for saved in snapshot.ports})

    def _check_same_ports(self, theirs: set[int]) -> None:
        """R-MIG-19, R-VU-92: a port that is there on one side only is a mistake of the configuration."""
        missing, extra = sorted(theirs - self.ports.keys()), sorted(self.ports.keys() - theirs)
        if missing or extra:
            numbers = ", ".join([*(f"{id} is missing here" for id in missing), *(f"{id} is too much" for id in extra)])
            raise DocumentError(f"the snapshot's ports are not this device's: {numbers}; give it the same ports")

    # -- the conversation on the control queues (5.3.6.2, R-CON-20 to 39) ---------------------------------------------

    def tell(self, message: Message) -> None:
        """Sends a control message, or keeps it in order until the guest has a buffer for it (R-CON-35)."""
        if self.multiport:
            self._outbox.put(message)
            self._flush()

    @property
    def waiting_messages(self) -> int:
        """How many control messages wait for the guest."""
        return len(self._outbox)

    def _flush(self) -> None:
        queue = self.queues[QUEUE_CONTROL_RX]
        heard_of: set[int] = set()
        try:
            while (message := self._outbox.peek()) is not None and queue.push(message.encode()):
                self._outbox.sent()
                heard_of.add(message.port)
                self.log.debug("to guest: %s", message)
            # Asking for the kick comes after the failed push, so a buffer that came in between is seen here.
            if queue.kicks_on() and len(self._outbox):
                self.backlog(QUEUE_CONTROL_RX)
            if queue.notify():
                self.on_call(QUEUE_CONTROL_RX)
        except (GuestError, FrontEndError) as exc:
            self.fault(QUEUE_CONTROL_RX, exc)
        for id in sorted(heard_of & self.ports.keys()):
            if not self._outbox.has_for(id):
                self.ports[id].back_end.guest_told()

    def _hear(self) -> None:
        """Takes what the driver says, at once and whatever it is: Linux spins until it is taken (R-CON-47)."""
        if not self.multiport:
            return
        queue = self.queues[QUEUE_CONTROL_TX]
        try:
            for _ in range(_CONTROL_TURN):
                data = queue.pop()
                if data is not None:
                    self._heard(data)
                elif not queue.kicks_on():
                    break
            else:
                self.backlog(QUEUE_CONTROL_TX)
            if queue.notify():
                self.on_call(QUEUE_CONTROL_TX)
        except (GuestError, FrontEndError) as exc:
            self.fault(QUEUE_CONTROL_TX, exc)

    def _heard(self, data: bytes) -> None:
        try:
            message = Message.decode(data)
            self.log.debug("from guest: %s", message)
            self._act_on(message)
        except GuestError as exc:
            self.refused += 1
            self.log.info("control message dropped: %s", exc)

    def _act_on(self, message: Message) -> None:
        match message.event:
            case Event.DEVICE_READY:
                self._driver_ready(bool(message.value))
            case Event.PORT_READY:
                self._port_ready(self._known_port(message), bool(message.value))
            case Event.PORT_OPEN:
                self._port_open(self._known_port(message), bool(message.value))
            case _:
                raise GuestError("R-CON-30", "only a device sends this", event=message.event.name, port=message.port)

    def _known_port(self, message: Message) -> Port:
        port = self.ports.get(message.port)
        if port is None:
            raise GuestError("R-CON-30", "no such port", event=message.event.name, port=message.port)
        return port

    def _driver_ready(self, ok: bool) -> None:
        """DEVICE_READY: the driver is told of every port. 0 says that it cannot go on (R-CON-32)."""
        if not ok:
            raise GuestError("R-CON-32", "the guest's driver could not set up the device", port=BAD_PORT_ID)
        self.driver_ready = True
        for port in self._in_order():
            if not port.added:
                self._tell_of(port)

    def _tell_of(self, port: Port) -> None:
        port.added = True
        self.tell(Message(port.id, Event.PORT_ADD, 1))

    def _port_ready(self, port: Port, ok: bool) -> None:
        """PORT_READY; also without a PORT_ADD since the reset: a guest that slept knows its ports (R-CON-34)."""
        if not ok:
            raise GuestError("R-CON-32", "the guest's driver could not set up the port", port=port.id)
        self.driver_ready = True
        port.added = True
        port.feed(Cause.PORT_READY)

    def _port_open(self, port: Port, opened: bool) -> None:
        """PORT_OPEN. Bytes sent before a close go out before it is acted on (R-CON-39)."""
        if not opened:
            port.tx_ready()
        port.feed(Cause.GUEST_OPEN if opened else Cause.GUEST_CLOSE)

    # -- what ports ask for (port.Links) -----------------------------------------------------------------------------

    def call(self, index: int) -> None:
        self.on_call(index)

    def backlog(self, index: int) -> None:
        self.on_backlog(index)

    def waiting(self, port: int) -> bool:
        return self._outbox.has_for(port)

    def fault(self, index: int, error: GuestError | FrontEndError) -> None:
        self.log.warning("queue %d stopped: %s", index, error)
        self.on_fault(index, error)

    def transition(self, port: Port, cause: Cause, before: State) -> None:
        self.log.debug("port %d: %s -> %s by %s", port.id, before.name, port.state.name, cause.value)
        self.on_transition(port, cause, before)

    def dropped(self, port: Port, count: int, whose: Whose) -> None:
        self.log.info("port %d: %d bytes of the %s dropped", port.id, count, whose.value)
        self.on_drop(port, count, whose)
