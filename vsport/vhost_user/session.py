"""What the messages of one front end mean: features, guest memory, rings, and when the guest began anew.

Pure state. Descriptors are numbers here; what has to be done with them is asked of an Edge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vsport.constants import PACKED_BEGINNING, QUEUE_SIZE_MAX, Feature
from vsport.device import SerialDevice
from vsport.document import DocumentError, Fields
from vsport.errors import FrontEndError
from vsport.parcel import Delivery, Parcel
from vsport.vhost_user.dirty import DirtyLogging
from vsport.vhost_user.edge import Edge
from vsport.vhost_user.inflight import InflightRegion, layout
from vsport.vhost_user.memory import MEM_SLOTS, SharedMemory
from vsport.vhost_user.message import (
    NO_FD,
    REQUESTS,
    UNKNOWN,
    BackEndRequest,
    Config,
    DeviceState,
    Header,
    InflightArea,
    LogBase,
    MemoryTable,
    OneRegion,
    Payload,
    ProtocolFeature,
    Request,
    Row,
    VringAddress,
    VringFd,
    VringState,
    encode_reply,
    encode_request,
    encode_u64,
)
from vsport.vhost_user.share import Share
from vsport.vhost_user.transfer import StateTransfer
from vsport.vhost_user.vring import Vring, places

__all__ = ["OFFERED", "Reply", "Session"]

OFFERED = int(
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
    | ProtocolFeature.DEVICE_STATE
)
"""QEMU acknowledges whatever is offered, so only what works is (R-VU-41). A plain number: ``~`` of an IntFlag has only
the bits that the flag knows, and would let unknown ones pass."""
_NOT_VIRTIO = int(Feature.PROTOCOL_FEATURES | Feature.LOG_ALL)
"""Bits that front end and back end have for themselves, among those of the guest's driver."""

_STATUS_NEEDS_RESET = 0x40
_PACKED_FLAGS, _PACKED_USED = 14, 0x8000
"""In a packed descriptor (R-RING-40)."""
_CONFIG_WRITE_BY_GUEST, _CONFIG_WRITE_BY_MIGRATION = 0, 1


class Reply(NamedTuple):
    """What is sent to the front end, and a descriptor that goes with it and is closed then; -1: none."""

    data: bytes
    fd: int = -1


class Session:
    """One front end's connection to ``device``.

    ``handle`` takes a message, close() ends it all. In between, the edge calls kicked(), channel_free() and log_due(),
    and whoever owns the device's hooks passes config_changed() and queue_failed() on.
    """

    def __init__(self, device: SerialDevice, edge: Edge) -> None:
        self.device = device
        self.edge = edge
        self.protocol_features = ProtocolFeature(0)
        self.status = 0
        self.memory = SharedMemory(edge)
        self.vrings = tuple(Vring() for _ in device.queues)
        self.dirty = DirtyLogging(edge)
        self.inflight: InflightRegion | None = None
        self.transfer = StateTransfer(device, edge, self)
        self.owes_reply = False
        """Whether the last message is still to be answered (send_reply): none that comes behind it may be before."""
        self.channel_busy = False
        """Whether a request of ours on the back-end channel is unanswered."""
        self.edition = 0
        """Another number whenever give() may say something else, but for what give_rest() says."""
        self._held: frozenset[int] | None = None
        self._has_channel = False
        self._config_stale = False

    # -- messages ------------------------------------------------------------------------------------------------------

    def handle(self, header: Header, payload: bytes, fds: Sequence[int]) -> Reply | None:
        """Does what a message asks for, and gives the reply to be sent, if any. Owns ``fds`` from now on.

        A request whose meaning is wrong is refused, if the front end asked to hear of it. Raises FrontEndError if it
        did not, or if the syntax is wrong: the connection has to end (R-VU-04, R-VU-07).
        """
        self.edition += 1
        unused = list(fds)
        try:
            return self._answer(header, payload, unused)
        finally:
            for fd in unused:
                self.edge.close_fd(fd)

    def _answer(self, header: Header, payload: bytes, fds: list[int]) -> Reply | None:
        row = REQUESTS.get(header.request, UNKNOWN)
        decoded = row.check(payload, len(fds))
        wanted = header.need_reply or row.acknowledged
        try:
            reply = self._perform(header, row, decoded, fds)
        except FrontEndError as exc:
            if row.replies or not (wanted or self._shapes_a_ring(decoded)):
                raise
            # As text: whoever keeps the error keeps its traceback, and with it mappings that have to go.
            self.device.log.warning("front end's %s refused: %s", header.name, str(exc))
            return self._refuse(header, decoded, wanted)
        if reply is not None:
            return Reply(encode_reply(header.request, reply.data), reply.fd)
        if row.replies:
            self.owes_reply = True
            return None
        # UML wants an acknowledgement of the very message that negotiates it (R-VU-06).
        return Reply(encode_reply(header.request, encode_u64(0))) if wanted else None

    def _perform(self, header: Header, row: Row, payload: Payload, fds: list[int]) -> Reply | None:
        if row is UNKNOWN:
            raise FrontEndError("R-VU-07", "not a request to a console", request=header.request)
        if row.feature and not row.feature & self.protocol_features:
            raise FrontEndError("R-VU-40", "its protocol feature is not negotiated", feature=row.feature.name)
        handler: Callable[[Any, list[int]], bytes | Reply | None] = getattr(self, row.handler)
        reply = handler(payload, fds)
        return Reply(reply) if isinstance(reply, bytes) else reply

    def _shapes_a_ring(self, payload: Payload) -> bool:
        """A ring's layout comes from the guest: a bad one costs that ring, not the connection (R-RING-70 to 84)."""
        return isinstance(payload, VringState | VringAddress) and payload.index < len(self.vrings)

    def _refuse(self, header: Header, payload: Payload, wanted: bool) -> Reply | None:
        if wanted:
            return Reply(encode_reply(header.request, encode_u64(1)))
        if isinstance(payload, VringState | VringAddress):
            self.queue_failed(payload.index)
        return None

    # -- features and the like -----------------------------------------------------------------------------------------

    def get_features(self, _: None, __: list[int]) -> bytes:
        return encode_u64(self.device.features | _NOT_VIRTIO)

    def set_features(self, features: int, _: list[int]) -> None:
        """Also under running rings, if only logging is switched on or off (R-VU-11)."""
        virtio = features & ~_NOT_VIRTIO
        if virtio != self.device.negotiated and not self.suspended:
            raise FrontEndError("R-VU-11", "other features while rings run", features=hex(features))
        self.device.negotiate(virtio)
        self.dirty.data = bool(features & Feature.LOG_ALL)
        self._log_anew()
        if not features & Feature.PROTOCOL_FEATURES:
            for index, vring in enumerate(self.vrings):  # without the bit there is no SET_VRING_ENABLE (R-VU-11)
                vring.enabled = True
                self._settle(index)

    def get_protocol_features(self, _: None, __: list[int]) -> bytes:
        return encode_u64(OFFERED)

    def set_protocol_features(self, features: int, _: list[int]) -> None:
        if features & ~OFFERED:
            raise FrontEndError("R-VU-40", "protocol features that were not offered", features=hex(features))
        self.protocol_features = ProtocolFeature(features)

    def set_owner(self, _: None, __: list[int]) -> None:
        """Says nothing: QEMU sends it in the middle of a session (R-VU-13)."""

    def reset_owner(self, _: None, __: list[int]) -> None:
        """Deprecated; doing nothing is what every front end expects (R-VU-14)."""

    def get_queue_num(self, _: None, __: list[int]) -> bytes:
        return encode_u64(len(self.vrings))

    # -- configuration space, status, reset ----------------------------------------------------------------------------

    def get_config(self, config: Config, _: list[int]) -> bytes:
        try:
            data = self.device.read_config(config.offset, len(config.data))
        except FrontEndError as exc:
            self.device.log.warning("front end's GET_CONFIG refused: %s", exc)
            return b""  # how this message reports an error (R-VU-26)
        return Config(config.offset, config.flags, data).encode()

    def set_config(self, config: Config, _: list[int]) -> None:
        if config.flags == _CONFIG_WRITE_BY_GUEST:
            self.device.write_config(config.offset, config.data)
        elif config.flags == _CONFIG_WRITE_BY_MIGRATION:
            # Our values come from the host's options, not from where the guest was; emerg_wr must not be repeated.
            self.device.read_config(config.offset, len(config.data))
        else:
            raise FrontEndError("R-VU-27", "unknown flags of SET_CONFIG", flags=hex(config.flags))

    def get_status(self, _: None, __: list[int]) -> bytes:
        queues = zip(self.vrings, self.device.queues, strict=True)
        broken = any(vring.live and not queue.running for vring, queue in queues)
        return encode_u64(self.status | (_STATUS_NEEDS_RESET if broken else 0))  # R-RING-63

    def set_status(self, status: int, _: list[int]) -> None:
        """Only 0 means something: queues do not wait for DRIVER_OK, which QEMU never sends (R-VU-35, R-VU-36)."""
        if status > 0xFF:
            raise FrontEndError("R-VU-35", "a virtio status is one byte", status=hex(status))
        self.status = status
        if status == 0:
            self._reset()

    def reset_device(self, _: None, __: list[int]) -> None:
        self.status = 0
        self._reset()

    def _reset(self) -> None:
        """Rings and device as at the beginning; memory and descriptors stay (R-VU-30)."""
        for index, vring in enumerate(self.vrings):
            vring.started = vring.enabled = False
            self._settle(index)
            vring.base, vring.rewound = 0, False
        self._forget_inflight()
        self.device.reset()

    # -- memory --------------------------------------------------------------------------------------------------------

    def set_mem_table(self, table: MemoryTable, fds: list[int]) -> None:
        self.memory.replace(table.regions, fds)
        self._move_rings()

    def get_max_mem_slots(self, _: None, __: list[int]) -> bytes:
        return encode_u64(MEM_SLOTS)

    def add_mem_reg(self, payload: OneRegion, fds: list[int]) -> None:
        self.memory.add(payload.region, fds)
        self._move_rings()

    def rem_mem_reg(self, payload: OneRegion, _: list[int]) -> None:
        self.memory.remove(payload.region)
        self._move_rings()

    def _move_rings(self) -> None:
        """The table is another one, also under live rings: each is stopped, translated anew, goes on (R-VU-63)."""
        for index, vring in enumerate(self.vrings):
            if vring.live and self.device.queues[index].running:  # a broken one stays broken
                vring.base = self.device.queues[index].stop()
                if self._restart(index, vring):
                    self.device.kick(index)

    def _restart(self, index: int, vring: Vring) -> bool:
        """Starts the queue of a live ring again; a ring that is not in memory any more has failed."""
        try:
            self._start_queue(index, vring)
        except FrontEndError as exc:
            vring.started = vring.live = False
            self.device.queue_stopped(index)
            if self.memory.table.lost:
                self.device.fault(index, exc)  # which ends the session (R-RING-82)
            else:
                self.device.log.warning("queue %d is not in the new memory: %s", index, str(exc))
                self.queue_failed(index)
        return vring.live

    # -- dirty logging -------------------------------------------------------------------------------------------------

    def set_log_base(self, base: LogBase, fds: list[int]) -> None:
        """All that was written before this is answered is in the old log, all that comes after it in the new one."""
        self.dirty.set_base(base, fds)
        self._log_anew()

    def set_log_fd(self, _: None, fds: list[int]) -> None:
        self.dirty.set_signal(fds)
        self._log_anew()

    def _log_anew(self) -> None:
        """What has to be logged is something else now (R-VU-80): also under running rings."""
        for index, vring in enumerate(self.vrings):
            self.dirty.apply(self.device.queues[index], vring.address)
        self.edge.poll_log(self.dirty.signals)

    def log_due(self) -> None:
        """It is time to tell the front end, if its log has changed (R-VU-17)."""
        self.dirty.look(self.device.queues)

    # -- in-flight descriptors -----------------------------------------------------------------------------------------

    def get_inflight_fd(self, asked: InflightArea, _: list[int]) -> Reply:
        try:
            area = layout(asked, len(self.vrings))
            return Reply(area.encode(), self.edge.make_shared(area.mmap_size))
        except FrontEndError as exc:
            self.device.log.warning("front end's GET_INFLIGHT_FD refused: %s", exc)
            return Reply(InflightArea(0, 0, asked.num_queues, asked.queue_size, asked.padded).encode())

    def set_inflight_fd(self, area: InflightArea, fds: list[int]) -> None:
        if not self.suspended:
            raise FrontEndError("R-VU-85", "other in-flight descriptors while rings run")
        if self._packed:
            raise FrontEndError("R-VU-90", "chains in flight are not kept for packed rings")
        share = Share(self.edge, fds[0], area.mmap_offset, area.mmap_size)
        fds.clear()
        region = InflightRegion(area, share, len(self.vrings))
        self._drop_inflight()
        self.inflight = region

    def _forget_inflight(self) -> None:
        """The guest begins anew, and nothing that it had asked for before is still to be done."""
        self._detach_inflight()
        if self.inflight is not None:
            self.inflight.forget()

    def _detach_inflight(self) -> None:
        """Queues get their regions when they start."""
        for queue in self.device.queues:
            queue.inflight = None

    def _drop_inflight(self) -> None:
        self._detach_inflight()
        if self.inflight is not None:
            self.inflight.close()
            self.inflight = None

    # -- the device's state --------------------------------------------------------------------------------------------

    def set_device_state_fd(self, asked: DeviceState, fds: list[int]) -> bytes:
        try:
            self.transfer.begin(asked, fds)
        except FrontEndError as exc:
            self.device.log.warning("front end's SET_DEVICE_STATE_FD refused: %s", exc)
            return encode_u64(NO_FD | 1)
        return encode_u64(NO_FD)

    def check_device_state(self, _: None, __: list[int]) -> bytes | None:
        """Answered when the transfer is over (R-VU-38)."""
        return None if self.transfer.busy else encode_u64(self.transfer.failed)

    def transfer_over(self) -> None:
        """Who has asked how it went hears it now."""
        if self.owes_reply:
            self.owes_reply = False
            self.edge.send_reply(encode_reply(Request.CHECK_DEVICE_STATE, encode_u64(self.transfer.failed)))

    def state_loaded(self) -> None:
        """Rings go on where the device that was saved left them, unless the front end says something else."""
        for vring, queue in zip(self.vrings, self.device.queues, strict=True):
            vring.base, vring.rewound = queue.next_avail, False

    # -- rings ---------------------------------------------------------------------------------------------------------

    def set_vring_num(self, state: VringState, _: list[int]) -> None:
        vring = self._reconfigure(state.index)
        if not 1 <= state.num <= QUEUE_SIZE_MAX or (state.num & (state.num - 1) and not self._packed):
            vring.size = 0
            raise FrontEndError("R-RING-01", "a queue's size is a power of two, at most 32768", size=state.num)
        vring.size = state.num

    def set_vring_base(self, state: VringState, _: list[int]) -> None:
        base = self._read_base(state.num)
        vring = self._reconfigure(state.index)
        vring.rewound = self._is_beginning(base) and (vring.rewound or not self._is_beginning(vring.base))
        vring.base = base

    def _read_base(self, num: int) -> int:
        """A packed ring has two places, which are one here: no chain is taken before it can be returned (R-VU-18)."""
        if not self._packed:
            if num > 0xFFFF:
                raise FrontEndError("R-VU-18", "a split ring's base has 16 bits", base=hex(num))
            return num
        if num & 0xFFFF != num >> 16:
            what = "a packed ring whose chains were taken and not returned cannot go on here"
            raise FrontEndError("R-VU-18", what, base=hex(num))
        return num & 0xFFFF

    def _is_beginning(self, base: int) -> bool:
        """User Mode Linux says 0 for a packed ring, too (R-RING-49)."""
        return base == 0 or (self._packed and base == PACKED_BEGINNING)

    def set_vring_addr(self, address: VringAddress, _: list[int]) -> None:
        """Refused if a part is misaligned or outside memory (R-RING-09). Other ``flags`` alone do not stop a ring."""
        vring = self._vring(address.index)
        if places(address) != vring.places:
            vring = self._reconfigure(address.index)
        vring.address = None
        self._check_layout(address, vring.size)
        vring.address = address
        self.dirty.apply(self.device.queues[address.index], address)

    def get_vring_base(self, state: VringState, _: list[int]) -> bytes:
        """Stops the ring, kicks included: a late one must not start it, only SET_VRING_KICK may (R-VU-20)."""
        vring = self._reconfigure(state.index)
        self._replace_kick(vring, -1)
        return VringState(state.index, vring.base << 16 | vring.base if self._packed else vring.base).encode()

    def set_vring_kick(self, payload: VringFd, fds: list[int]) -> None:
        """Starts the ring. Chains may be waiting already, so it is looked at without a kick (R-VU-50, R-VU-53)."""
        vring = self._vring(payload.index)
        if fds:
            self.edge.watch_kick(payload.index, fds[0])
        self._replace_kick(vring, fds.pop() if fds else -1)
        vring.polled = payload.no_fd
        vring.started = True
        if vring.live:
            self.edge.poll_ring(payload.index, vring.polled)
            self.device.kick(payload.index)
        else:
            self._settle(payload.index)

    def set_vring_call(self, payload: VringFd, fds: list[int]) -> None:
        """Swaps the descriptor, and signals once: a call may have gone to the old one, unheard (R-VU-55)."""
        vring = self._vring(payload.index)
        new = self._take_writable(fds)
        self._close(vring.call_fd)
        vring.call_fd = self.device.queues[payload.index].call_fd = new
        if vring.live and new >= 0:
            self.edge.signal(new)

    def set_vring_err(self, payload: VringFd, fds: list[int]) -> None:
        vring = self._vring(payload.index)
        new = self._take_writable(fds)
        self._close(vring.err_fd)
        vring.err_fd = new

    def set_vring_enable(self, state: VringState, _: list[int]) -> None:
        """Also for queues that the guest never set up: that is remembered (R-VU-24)."""
        vring = self._vring(state.index)
        if state.num > 1:
            raise FrontEndError("R-VU-24", "a ring is enabled by 1 and disabled by 0", num=state.num)
        vring.enabled = bool(state.num)
        self._settle(state.index)

    @property
    def _packed(self) -> bool:
        return bool(self.device.negotiated & Feature.RING_PACKED)

    def _vring(self, index: int) -> Vring:
        if index >= len(self.vrings):
            raise FrontEndError("R-VU-22", "no such queue", index=index, queues=len(self.vrings))
        return self.vrings[index]

    def _reconfigure(self, index: int) -> Vring:
        """The ring's layout is about to change: it waits for the next SET_VRING_KICK (R-VU-56)."""
        vring = self._vring(index)
        vring.started = False
        self._settle(index)
        return vring

    def _check_layout(self, address: VringAddress, size: int) -> None:
        if self._packed:
            parts = {
                "descriptor ring": (address.desc, 16, 16 * size),
                "driver's event structure": (address.avail, 4, 4),
                "device's event structure": (address.used, 4, 4),
            }
        else:
            parts = {
                "descriptor table": (address.desc, 16, 16 * size),
                "available ring": (address.avail, 2, 6 + 2 * size),
                "used ring": (address.used, 4, 6 + 8 * size),
            }
        for name, (start, alignment, length) in parts.items():
            if start % alignment:
                raise FrontEndError("R-RING-01", f"{name} is misaligned", queue=address.index, address=hex(start))
            if not self.memory.holds(start, length):
                raise FrontEndError("R-RING-09", f"{name} is outside memory", queue=address.index, address=hex(start))

    # -- descriptors ---------------------------------------------------------------------------------------------------

    def _take_writable(self, fds: list[int]) -> int:
        """Takes over a call or error descriptor, -1 if there is none."""
        if not fds:
            return -1
        self.edge.make_nonblocking(fds[0])
        return fds.pop()

    def _replace_kick(self, vring: Vring, fd: int) -> None:
        if vring.kick_fd >= 0:
            self.edge.unwatch_kick(vring.kick_fd)
            self.edge.close_fd(vring.kick_fd)
        vring.kick_fd = fd

    def _close(self, fd: int) -> None:
        if fd >= 0:
            self.edge.close_fd(fd)

    # -- live or not ---------------------------------------------------------------------------------------------------

    @property
    def suspended(self) -> bool:
        """No ring is live: no memory is written, nobody is called, nothing is asked of the front end (R-VU-54)."""
        return self._held is not None or not any(vring.live for vring in self.vrings)

    def kicked(self, index: int) -> None:
        """The driver has kicked queue ``index``. A kick of a ring that is not live waits in the ring (R-RING-83)."""
        if self.vrings[index].live and self._held is None:
            self.device.kick(index)

    def queue_failed(self, index: int) -> None:
        """Queue ``index`` has stopped because somebody broke a rule: says so on its error descriptor."""
        if self.vrings[index].err_fd >= 0:
            self.edge.signal(self.vrings[index].err_fd)

    def _settle(self, index: int) -> None:
        """Makes queue ``index`` live or not, as its flags say. Raises FrontEndError if it cannot go live."""
        vring = self.vrings[index]
        if vring.wanted and not vring.live:
            self._go_live(index, vring)
        elif vring.live and not vring.wanted:
            self._leave(index, vring)

    def _go_live(self, index: int, vring: Vring) -> None:
        if any(vring.rewound and self._looks_unused(vring) for vring in self.vrings):
            self._begin_anew()
        self._start_queue(index, vring)
        vring.live = True
        self.edge.poll_ring(index, vring.polled)
        self.device.queue_started(index)
        self._tell_of_config()

    def _leave(self, index: int, vring: Vring) -> None:
        vring.live = False
        self.edge.poll_ring(index, False)
        vring.base = self.device.queues[index].stop()
        self.device.queue_stopped(index)

    def _start_queue(self, index: int, vring: Vring) -> None:
        """Starts a queue at its base; a half-consumed chain goes on only if that is where the queue stopped."""
        assert vring.address is not None
        queue = self.device.queues[index]
        queue.inflight = self.inflight.of(index, vring.size) if self.inflight is not None else None
        queue.start(
            self.memory.table,
            vring.size,
            vring.address.desc,
            vring.address.avail,
            vring.address.used,
            base=vring.base,
            **self.device.ring_options,
            reset=vring.base != queue.next_avail,
        )

    def _looks_unused(self, vring: Vring) -> bool:
        """Whether memory says that nothing was returned on a ring that may not be started yet (R-VU-71).

        A split ring has an index for that. A packed one has the flags of its first slot, which are USED for every other
        turn only: so this is said of a ring that has gone round, too.
        """
        if vring.address is None:
            return False
        if not self._packed:
            return self.memory.number_at(vring.address.used + 2) == 0
        flags = self.memory.number_at(vring.address.desc + _PACKED_FLAGS)
        return flags is not None and not flags & _PACKED_USED

    def _begin_anew(self) -> None:
        """The guest was reset, or its driver bound again.

        No front end says so; it looks like a pause (R-VU-70). But rings that go back to 0 do not after a pause
        (R-VU-71). User Mode Linux always sends base 0, and there a restart always is a reset (R-VU-72).
        """
        self.device.log.info("the guest's driver begins anew")
        live = [(index, vring) for index, vring in enumerate(self.vrings) if vring.live]
        for index, vring in live:
            self._leave(index, vring)
        for vring in self.vrings:
            vring.rewound = False
            if not vring.started:
                vring.base = (
                    PACKED_BEGINNING if self._packed else 0
                )  # the rings that follow one by one are not evidence of one more reset
        self._forget_inflight()
        self.device.reset()
        for index, _ in live:
            self._settle(index)

    # -- the back-end channel ------------------------------------------------------------------------------------------

    def set_backend_req_fd(self, _: None, fds: list[int]) -> None:
        self.edge.open_channel(fds[0])
        fds.pop()
        self._has_channel, self.channel_busy = True, False
        self._tell_of_config()

    def config_changed(self) -> None:
        """The configuration space is another one: the front end is told, as soon as it may be."""
        self._config_stale = True
        self.edition += 1
        self._tell_of_config()

    def channel_free(self) -> None:
        """The front end has answered the last request, or has had its time (R-VU-97)."""
        self.channel_busy = False
        self.edition += 1
        self._tell_of_config()

    def channel_lost(self) -> None:
        """The front end has closed the channel, or broken its rules."""
        self._has_channel = False
        self.edition += 1

    def _tell_of_config(self) -> None:
        """One request at a time: changes that come while it is under way become one more (R-VU-54, R-VU-97)."""
        if not self._config_stale or not self._has_channel or self.channel_busy or self.suspended:
            return
        need_reply = bool(self.protocol_features & ProtocolFeature.REPLY_ACK)
        self._config_stale, self.channel_busy = False, need_reply
        request = encode_request(BackEndRequest.CONFIG_CHANGE, need_reply=need_reply)
        self.edge.send_request(request, need_reply=need_reply)

    # -- handover ------------------------------------------------------------------------------------------------------

    def suspend(self) -> None:
        """Stops all queues, and does not say so: the front end's wishes are as they were. Safe to call twice."""
        if self._held is not None:
            return
        self._held = self._running()
        for index in sorted(self._held, reverse=True):  # the device looks for one that still runs from the first on
            self.edge.poll_ring(index, False)
            self.vrings[index].base = self.device.queues[index].stop()
            self.device.queue_stopped(index)
        self.edge.poll_log(False)

    def _running(self) -> frozenset[int]:
        """The rings that move; a live one whose queue does not run has been broken."""
        rings = zip(self.vrings, self.device.queues, strict=True)
        return frozenset(index for index, (vring, queue) in enumerate(rings) if vring.live and queue.running)

    def resume(self) -> None:
        """Goes on where suspend() stopped, here or in the process that took the session over."""
        if self._held is None:
            return
        held, self._held = sorted(self._held), None
        self.edition += 1
        if self.dirty.logs:
            self._log_anew()
        for index in [index for index in held if self._restart(index, self.vrings[index])]:
            self.edge.poll_ring(index, self.vrings[index].polled)
            self.device.queue_started(index)
        self._tell_of_config()

    def give(self, parcel: Parcel) -> dict[str, Any]:
        """The session as a document, its descriptors in ``parcel``; raises HostError if now is no time for it.

        The device's own state is not in it, nor the socket and the channel, which are the edge's. What it says of rings
        that run is out of date at once, and said by give_rest().
        """
        held = self._running() if self._held is None else self._held
        return {
            "transfer": self.transfer.give(),
            "protocol_features": int(self.protocol_features),
            "status": self.status,
            "regions": self.memory.give(parcel),
            "vrings": [vring.give(parcel) | {"held": at in held} for at, vring in enumerate(self.vrings)],
            "dirty": self.dirty.give(parcel),
            "inflight": [self.inflight.give(parcel)] if self.inflight is not None else [],
            "channel_busy": self.channel_busy,
            "config_stale": self._config_stale,
        }

    def take(self, fields: Fields, delivery: Delivery, *, has_channel: bool) -> None:
        """Becomes the session that give() described, suspended, and does not touch a ring before resume().

        Raises DocumentError, FrontEndError; release() undoes what was done until then.
        """
        self._held = frozenset()
        self.transfer.take(fields.object("transfer"))
        features = fields.integer("protocol_features", 0, OFFERED)
        if features & ~OFFERED:
            raise DocumentError(f"{fields.where}: protocol features {features:#x} are not all offered here")
        self.protocol_features = ProtocolFeature(features)
        self.status = fields.integer("status", 0, 0xFF)
        self.memory.take(fields, "regions", delivery)
        self._held = self._take_vrings(fields, delivery)
        self.dirty.take(fields.object("dirty"), delivery)
        for state in fields.each("inflight", 1, Fields):
            self.inflight = InflightRegion.take(self.edge, state, delivery, len(self.vrings))
        self._has_channel = has_channel
        self.channel_busy = fields.boolean("channel_busy")
        self._config_stale = fields.boolean("config_stale")
        fields.end()

    def give_rest(self) -> dict[str, Any]:
        """Which rings of a suspended session run as soon as it is resumed."""
        assert self._held is not None
        return {"held": sorted(self._held)}

    def take_rest(self, fields: Fields) -> None:
        """After take(), and when the device knows where its queues stand. Raises DocumentError."""
        assert self._held is not None
        held = frozenset(fields.each("held", len(self._held), _read_index))
        fields.end()
        if not held <= self._held:
            raise DocumentError(f"{fields.where}: a ring that did not run at the time of the draft")
        for index in held:
            self.vrings[index].base = self.device.queues[index].next_avail
        self._held = held

    def _take_vrings(self, fields: Fields, delivery: Delivery) -> frozenset[int]:
        """Takes all rings; says which of them have to run after resume()."""
        states = fields.each("vrings", len(self.vrings), Fields)
        if len(states) != len(self.vrings):
            raise DocumentError(f"{fields.where}: {len(states)} rings, but the device has {len(self.vrings)} queues")
        held = set()
        for index, (vring, state) in enumerate(zip(self.vrings, states, strict=True)):
            vring.take(index, state, delivery, packed=self._packed)
            self.device.queues[index].call_fd = vring.call_fd
            if state.boolean("held"):
                held.add(index)
            state.end()
            self._check_taken(index, vring, runs=index in held)
        return frozenset(held)

    def _check_taken(self, index: int, vring: Vring, *, runs: bool) -> None:
        """What a living front end would have been told of. Raises FrontEndError, DocumentError."""
        if runs and (not vring.live or vring.address is None):
            raise DocumentError(f"vring {index} runs without having been started")
        if runs and vring.address is not None:
            self._check_layout(vring.address, vring.size)
        if vring.kick_fd >= 0:  # it is waited for from now on: nothing is heard before the loop runs
            self.edge.watch_kick(index, vring.kick_fd)
        for fd in (vring.call_fd, vring.err_fd):
            if fd >= 0:
                self.edge.make_nonblocking(fd)

    # -- the end -------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """The front end has gone: stops all rings, gives everything back, resets the device (R-VU-75)."""
        for index, vring in enumerate(self.vrings):
            if vring.live:
                self._leave(index, vring)
        self.release()
        self.device.reset()

    def release(self) -> None:
        """Gives back what came from the front end, and leaves the device as it is. No ring may run."""
        for queue, vring in zip(self.device.queues, self.vrings, strict=True):
            queue.call_fd = -1
            queue.log_to(None)
            self._replace_kick(vring, -1)
            self._close(vring.call_fd)
            self._close(vring.err_fd)
            vring.call_fd = vring.err_fd = -1
        self.edge.poll_log(False)
        self._drop_inflight()
        self.dirty.close()
        self.memory.clear()


def _read_index(where: str, value: object) -> int:
    if type(value) is not int:
        raise DocumentError(f"{where}: the number of a queue belongs here")
    return value
