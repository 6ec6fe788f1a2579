"""What the messages of one front end mean: features, guest memory, rings, and when the guest began anew.

Pure state. Descriptors are numbers here; what has to be done with them is asked of an Edge.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vsport._ring import Memory, Region
from vsport.constants import QUEUE_SIZE_MAX, Feature
from vsport.device import SerialDevice
from vsport.errors import FrontEndError
from vsport.vhost_user.message import (
    REQUESTS,
    UNKNOWN,
    BackEndRequest,
    Config,
    Header,
    MemoryRegion,
    MemoryTable,
    OneRegion,
    Payload,
    ProtocolFeature,
    Row,
    VringAddress,
    VringFd,
    VringState,
    encode_reply,
    encode_request,
    encode_u64,
)

__all__ = ["MEM_SLOTS", "OFFERED", "Edge", "Session", "Vring"]

log = logging.getLogger("vsport.vhost_user")

OFFERED = int(
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)
"""QEMU acknowledges whatever is offered, so only what works is (R-VU-41). A plain number: ``~`` of an IntFlag has only
the bits that the flag knows, and would let unknown ones pass."""
_PROTOCOL_FEATURES = int(Feature.PROTOCOL_FEATURES)
MEM_SLOTS = 512
"""As many regions as a Memory takes, and as QEMU asks for at most (R-VU-32)."""

_STATUS_NEEDS_RESET = 0x40
_CONFIG_WRITE_BY_GUEST, _CONFIG_WRITE_BY_MIGRATION = 0, 1


class Edge(Protocol):
    """What a session cannot do itself. No method closes or keeps an ``fd`` unless it says so."""

    def map_region(self, region: MemoryRegion, fd: int) -> Region:
        """Maps a part of ``fd``, which may be closed afterwards. Raises FrontEndError (R-VU-62)."""

    def close_fd(self, fd: int) -> None:
        """Closes a descriptor that came with a message."""

    def make_nonblocking(self, fd: int) -> None:
        """Raises FrontEndError if ``fd`` cannot be written to or read from at all."""

    def signal(self, fd: int) -> None:
        """Writes 8 bytes to a call or error descriptor; never fails, never waits (R-VU-98)."""

    def watch_kick(self, index: int, fd: int) -> None:
        """From now on kicked(index) is called whenever ``fd`` says so. Raises FrontEndError if it never can."""

    def unwatch_kick(self, fd: int) -> None:
        """Ends watch_kick()."""

    def poll_ring(self, index: int, on: bool) -> None:
        """Starts or stops to call kicked(index) by the clock."""

    def open_channel(self, fd: int) -> None:
        """Keeps ``fd`` as the back-end channel, in place of an older one. Raises FrontEndError without keeping it."""

    def send_request(self, data: bytes, *, need_reply: bool) -> None:
        """Sends a request on the channel; channel_free() is called when the next one may follow, if ``need_reply``."""


@dataclass(slots=True)
class Vring:
    """What the front end has said about one queue."""

    size: int = 0
    address: VringAddress | None = None
    base: int = 0
    """The next available index: set by the front end, or where the ring was stopped."""
    rewound: bool = False
    """Whether the front end has set ``base`` back to 0 on a ring that had got further."""
    kick_fd: int = -1
    call_fd: int = -1
    err_fd: int = -1
    polled: bool = False
    """Whether there is no kick descriptor on purpose (R-VU-21)."""
    started: bool = False
    enabled: bool = False
    live: bool = False
    """Whether the ring is in use: the device's queue has been started."""

    @property
    def configured(self) -> bool:
        return self.size > 0 and self.address is not None

    @property
    def wanted(self) -> bool:
        """Whether the ring has to be live. A disabled ring is left alone: what is in it waits (R-VU-51, R-VU-52)."""
        return self.started and self.enabled and self.configured


class Session:
    """One front end's connection to ``device``.

    ``handle`` takes a message, close() ends it all. In between, the edge calls kicked() and channel_free(), and whoever
    owns the device's hooks passes config_changed() and queue_failed() on.
    """

    def __init__(self, device: SerialDevice, edge: Edge) -> None:
        self.device = device
        self.edge = edge
        self.protocol_features = ProtocolFeature(0)
        self.status = 0
        self.memory = Memory()
        self.vrings = tuple(Vring() for _ in device.queues)
        self._has_channel = False
        self._channel_busy = False
        self._config_stale = False

    # -- messages ------------------------------------------------------------------------------------------------------

    def handle(self, header: Header, payload: bytes, fds: Sequence[int]) -> bytes | None:
        """Does what a message asks for, and gives the reply to be sent, if any. Owns ``fds`` from now on.

        A request whose meaning is wrong is refused, if the front end asked to hear of it. Raises FrontEndError if it
        did not, or if the syntax is wrong: the connection has to end (R-VU-04, R-VU-07).
        """
        unused = list(fds)
        try:
            return self._answer(header, payload, unused)
        finally:
            for fd in unused:
                self.edge.close_fd(fd)

    def _answer(self, header: Header, payload: bytes, fds: list[int]) -> bytes | None:
        row = REQUESTS.get(header.request, UNKNOWN)
        decoded = row.check(payload, len(fds))
        try:
            reply = self._perform(header, row, decoded, fds)
        except FrontEndError as exc:
            if row.replies or not (header.need_reply or self._shapes_a_ring(decoded)):
                raise
            # As text: whoever keeps the error keeps its traceback, and with it mappings that have to go.
            log.warning("front end's %s refused: %s", header.name, str(exc))
            return self._refuse(header, decoded)
        if reply is not None:
            return encode_reply(header.request, reply)
        # Asked here and not before: UML wants an acknowledgement of the message that negotiates it (R-VU-06).
        return encode_reply(header.request, encode_u64(0)) if header.need_reply else None

    def _perform(self, header: Header, row: Row, payload: Payload, fds: list[int]) -> bytes | None:
        if row is UNKNOWN:
            raise FrontEndError("R-VU-07", "not a request to a console", request=header.request)
        if row.feature and not row.feature & self.protocol_features:
            raise FrontEndError("R-VU-40", "its protocol feature is not negotiated", feature=row.feature.name)
        handler: Callable[[Any, list[int]], bytes | None] = getattr(self, row.handler)
        return handler(payload, fds)

    def _shapes_a_ring(self, payload: Payload) -> bool:
        """A ring's layout comes from the guest: a bad one costs that ring, not the connection (R-RING-70 to 84)."""
        return isinstance(payload, VringState | VringAddress) and payload.index < len(self.vrings)

    def _refuse(self, header: Header, payload: Payload) -> bytes | None:
        if header.need_reply:
            return encode_reply(header.request, encode_u64(1))
        if isinstance(payload, VringState | VringAddress):
            self.queue_failed(payload.index)
        return None

    # -- features and the like -----------------------------------------------------------------------------------------

    def get_features(self, _: None, __: list[int]) -> bytes:
        return encode_u64(self.device.features | _PROTOCOL_FEATURES)

    def set_features(self, features: int, _: list[int]) -> None:
        virtio = features & ~_PROTOCOL_FEATURES
        if virtio != self.device.negotiated and not self.suspended:
            raise FrontEndError("R-VU-11", "other features while rings run", features=hex(features))
        self.device.negotiate(virtio)
        if not features & _PROTOCOL_FEATURES:
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
            log.warning("front end's GET_CONFIG refused: %s", exc)
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
        broken = any(vring.live and queue.fault is not None for vring, queue in queues)
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
        self.device.reset()

    # -- memory --------------------------------------------------------------------------------------------------------

    def set_mem_table(self, table: MemoryTable, fds: list[int]) -> None:
        self._use_memory([self.edge.map_region(region, fd) for region, fd in zip(table.regions, fds, strict=True)])

    def get_max_mem_slots(self, _: None, __: list[int]) -> bytes:
        return encode_u64(MEM_SLOTS)

    def add_mem_reg(self, payload: OneRegion, fds: list[int]) -> None:
        if len(self.memory.regions) >= MEM_SLOTS:
            raise FrontEndError("R-VU-32", "more memory regions than there are slots", slots=MEM_SLOTS)
        self._use_memory([*self.memory.regions, self.edge.map_region(payload.region, fds[0])])

    def rem_mem_reg(self, payload: OneRegion, _: list[int]) -> None:
        gone = payload.region
        kept = [region for region in self.memory.regions if not _same_range(region, gone)]
        if len(kept) == len(self.memory.regions):
            raise FrontEndError("R-VU-33", "no such memory region", gpa=hex(gone.gpa), size=hex(gone.size))
        self._use_memory(kept)

    def _use_memory(self, regions: list[Region]) -> None:
        """Replaces the table, also under live rings: each is stopped, translated anew, and goes on (R-VU-63)."""
        self.memory = Memory(regions)
        for index, vring in enumerate(self.vrings):
            if vring.live and self.device.queues[index].running:  # a broken one stays broken
                self._move_ring(index, vring)

    def _move_ring(self, index: int, vring: Vring) -> None:
        vring.base = self.device.queues[index].stop()
        try:
            self._start_queue(index, vring)
        except FrontEndError as exc:
            log.warning("queue %d is not in the new memory: %s", index, str(exc))
            vring.started = vring.live = False
            self.device.queue_stopped(index)
            self.queue_failed(index)
        else:
            self.device.kick(index)

    # -- rings ---------------------------------------------------------------------------------------------------------

    def set_vring_num(self, state: VringState, _: list[int]) -> None:
        vring = self._reconfigure(state.index)
        if not 1 <= state.num <= QUEUE_SIZE_MAX or state.num & (state.num - 1):
            vring.size = 0
            raise FrontEndError("R-RING-01", "a queue's size is a power of two, at most 32768", size=state.num)
        vring.size = state.num

    def set_vring_base(self, state: VringState, _: list[int]) -> None:
        if state.num > 0xFFFF:
            raise FrontEndError("R-VU-18", "a split ring's base has 16 bits", base=hex(state.num))
        vring = self._reconfigure(state.index)
        vring.rewound = state.num == 0 and (vring.rewound or vring.base != 0)
        vring.base = state.num

    def set_vring_addr(self, address: VringAddress, _: list[int]) -> None:
        """Refused if a part is misaligned or outside memory (R-RING-09). Other ``flags`` alone do not stop a ring."""
        vring = self._vring(address.index)
        if _places(address) != _places(vring.address):
            vring = self._reconfigure(address.index)
        vring.address = None
        self._check_layout(address, vring.size)
        vring.address = address

    def get_vring_base(self, state: VringState, _: list[int]) -> bytes:
        """Stops the ring, kicks included: a late one must not start it, only SET_VRING_KICK may (R-VU-20)."""
        vring = self._reconfigure(state.index)
        self._replace_kick(state.index, vring, -1)
        return VringState(state.index, vring.base).encode()

    def set_vring_kick(self, payload: VringFd, fds: list[int]) -> None:
        """Starts the ring. Chains may be waiting already, so it is looked at without a kick (R-VU-50, R-VU-53)."""
        vring = self._vring(payload.index)
        if fds:
            self.edge.watch_kick(payload.index, fds[0])
        self._replace_kick(payload.index, vring, fds.pop() if fds else -1)
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
        parts = {
            "descriptor table": (address.desc, 16, 16 * size),
            "available ring": (address.avail, 2, 6 + 2 * size),
            "used ring": (address.used, 4, 6 + 8 * size),
        }
        for name, (start, alignment, length) in parts.items():
            if start % alignment:
                raise FrontEndError("R-RING-01", f"{name} is misaligned", queue=address.index, address=hex(start))
            if self._region_of(start, length) is None:
                raise FrontEndError("R-RING-09", f"{name} is outside memory", queue=address.index, address=hex(start))

    def _region_of(self, start: int, length: int) -> Region | None:
        """The region that has ``length`` bytes from front-end address ``start`` on."""
        for region in self.memory.regions:
            if region.front_end_addr <= start <= region.front_end_addr + region.size - length:
                return region
        return None

    # -- descriptors ---------------------------------------------------------------------------------------------------

    def _take_writable(self, fds: list[int]) -> int:
        """Takes over a call or error descriptor, -1 if there is none."""
        if not fds:
            return -1
        self.edge.make_nonblocking(fds[0])
        return fds.pop()

    def _replace_kick(self, index: int, vring: Vring, fd: int) -> None:
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
        return not any(vring.live for vring in self.vrings)

    def kicked(self, index: int) -> None:
        """The driver has kicked queue ``index``. A kick of a ring that is not live waits in the ring (R-RING-83)."""
        if self.vrings[index].live:
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
        if any(vring.rewound and self._used_index(vring) == 0 for vring in self.vrings):
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
        queue.start(
            self.memory,
            vring.size,
            vring.address.desc,
            vring.address.avail,
            vring.address.used,
            base=vring.base,
            event_idx=bool(self.device.negotiated & Feature.EVENT_IDX),
            indirect=bool(self.device.negotiated & Feature.INDIRECT_DESC),
            reset=vring.base != queue.next_avail,
        )

    def _used_index(self, vring: Vring) -> int | None:
        """The used index in memory of a ring that may not be started yet."""
        if vring.address is None:
            return None
        start = vring.address.used + 2
        region = self._region_of(start, 2)
        if region is None:
            return None
        return int.from_bytes(self.memory.read(region.gpa + start - region.front_end_addr, 2), "little")

    def _begin_anew(self) -> None:
        """The guest was reset, or its driver bound again.

        No front end says so; it looks like a pause (R-VU-70). But rings that go back to 0 do not after a pause
        (R-VU-71). User Mode Linux always sends base 0, and there a restart always is a reset (R-VU-72).
        """
        log.info("the guest's driver begins anew")
        live = [(index, vring) for index, vring in enumerate(self.vrings) if vring.live]
        for index, vring in live:
            self._leave(index, vring)
        for vring in self.vrings:
            vring.rewound = False
            if not vring.started:
                vring.base = 0  # the rings that follow one by one are not evidence of one more reset
        self.device.reset()
        for index, _ in live:
            self._settle(index)

    # -- the back-end channel ------------------------------------------------------------------------------------------

    def set_backend_req_fd(self, _: None, fds: list[int]) -> None:
        self.edge.open_channel(fds[0])
        fds.pop()
        self._has_channel, self._channel_busy = True, False
        self._tell_of_config()

    def config_changed(self) -> None:
        """The configuration space is another one: the front end is told, as soon as it may be."""
        self._config_stale = True
        self._tell_of_config()

    def channel_free(self) -> None:
        """The front end has answered the last request, or has had its time (R-VU-97)."""
        self._channel_busy = False
        self._tell_of_config()

    def channel_lost(self) -> None:
        """The front end has closed the channel, or broken its rules."""
        self._has_channel = False

    def _tell_of_config(self) -> None:
        """One request at a time: changes that come while it is under way become one more (R-VU-54, R-VU-97)."""
        if not self._config_stale or not self._has_channel or self._channel_busy or self.suspended:
            return
        need_reply = bool(self.protocol_features & ProtocolFeature.REPLY_ACK)
        self._config_stale, self._channel_busy = False, need_reply
        request = encode_request(BackEndRequest.CONFIG_CHANGE, need_reply=need_reply)
        self.edge.send_request(request, need_reply=need_reply)

    # -- the end -------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """The front end has gone: stops all rings, gives up its memory and descriptors, resets the device (R-VU-75)."""
        for index, vring in enumerate(self.vrings):
            if vring.live:
                self._leave(index, vring)
            self._replace_kick(index, vring, -1)
            self._close(vring.call_fd)
            self._close(vring.err_fd)
            self.device.queues[index].call_fd = -1
            self.vrings[index].call_fd = self.vrings[index].err_fd = -1
        self.memory = Memory()
        self.device.reset()


def _places(address: VringAddress | None) -> tuple[int, int, int] | None:
    return (address.desc, address.avail, address.used) if address is not None else None


def _same_range(region: Region, gone: MemoryRegion) -> bool:
    """Where in its file the region starts does not count (R-VU-33)."""
    return (region.gpa, region.size, region.front_end_addr) == (gone.gpa, gone.size, gone.front_end_addr)
