"""The other side of vhost-user: a front end that drives any back end for a console device, ours or another's.

with FrontEnd.connect("/run/vm.sock") as front_end:
    front_end.negotiate()
    memory = GuestMemory(((0, 64 << 20),))
    front_end.share(memory)
    ...                                       # a driver lays out its queues, e.g. vsport.sim over OverVhostUser
    front_end.pause()
    state = front_end.save()                  # the device's state, to be loaded by another back end

Everything waits until it is done, at most ``timeout`` seconds, and then raises BackEndError. A back end that lives in
the same thread works while the front end waits if ``idle`` steps its loop.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from vsport._ring import DirtyLog, DriverQueue, Memory, Region
from vsport.constants import PACKED_BEGINNING, QUEUE_CONTROL_TX, Feature
from vsport.errors import BackEndError, FrontEndError, HostError
from vsport.loop import READ, Loop
from vsport.vhost_user.message import (
    FDS_MAX,
    HEADER_SIZE,
    NO_FD,
    Config,
    DeviceState,
    Direction,
    Header,
    InflightArea,
    LogBase,
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
from vsport.vhost_user.transport import BrokenConnection, Stream, make_shared, send_some

__all__ = [
    "PAGE",
    "TIMEOUT_SECONDS",
    "USER",
    "Disconnected",
    "FrontEnd",
    "GuestMemory",
    "Inflight",
    "OverVhostUser",
    "PageLog",
    "Refused",
    "Ring",
]

PAGE = 4096
"""What a bit of a dirty log stands for, in bytes (R-VU-80)."""
TIMEOUT_SECONDS = 10.0
"""How long a back end may take for an answer, or for the next piece of its state."""
USER = 0x7F00_0000_0000
"""Where guest memory is for the front end. Not where the guest has it, so that mixing them up shows."""

_STATE_MAX = 1 << 30
_PIECE = 1 << 18
_SPINS = 200
_VIRTIO = (
    Feature.SIZE
    | Feature.MULTIPORT
    | Feature.EMERG_WRITE
    | Feature.INDIRECT_DESC
    | Feature.EVENT_IDX
    | Feature.VERSION_1
    | Feature.RING_PACKED
    | Feature.IN_ORDER
)
_NO_LOG = 2**64 - 1


class Refused(BackEndError):
    """The back end has answered that it cannot do what it was asked for."""


class Disconnected(BackEndError):
    """The back end has closed the connection."""


# -- what is shared ----------------------------------------------------------------------------------------------------


class GuestMemory:
    """Guest memory in one file in memory: chunks of (gpa, size), one behind the other in it from ``offset`` on.

    ``wire`` are its regions as messages have them, ``memory`` is what a driver works on.
    """

    def __init__(
        self, chunks: Sequence[tuple[int, int]] = ((0, 1 << 20),), *, offset: int = 0, user: int = USER
    ) -> None:
        self.user = user
        self.wire: list[MemoryRegion] = []
        for gpa, size in chunks:
            self.wire.append(MemoryRegion(gpa, size, user + gpa, offset))
            offset += size
        self.fd = os.memfd_create("guest-memory")
        os.ftruncate(self.fd, offset)
        buffer = mmap.mmap(self.fd, offset)
        self.memory = Memory([Region(w.gpa, w.size, w.front_end_addr, buffer, w.mmap_offset) for w in self.wire])

    @property
    def end(self) -> int:
        """The first guest-physical address behind all of it."""
        return max(region.gpa + region.size for region in self.wire)

    def pages(self) -> Iterator[int]:
        """The guest-physical address of every page."""
        for region in self.wire:
            yield from range(region.gpa // PAGE * PAGE, region.gpa + region.size, PAGE)

    def copy_to(self, other: GuestMemory, pages: Iterable[int] | None = None) -> int:
        """Copies pages, by default all of them, into memory of the same layout; says how many bytes.

        Pages that are no memory are left out: a log has bits for what lies between regions, too.
        """
        copied = 0
        for gpa, size in self._ranges(self.pages() if pages is None else pages):
            other.memory.write(gpa, self.memory.read(gpa, size))
            copied += size
        return copied

    def _ranges(self, pages: Iterable[int]) -> Iterator[tuple[int, int]]:
        """What there is of each page; the first and the last one of a region may be cut short."""
        for page in pages:
            for region in self.wire:
                start, end = max(page, region.gpa), min(page + PAGE, region.gpa + region.size)
                if start < end:
                    yield start, end - start

    def close(self) -> None:
        """Lets go of it; a back end that has mapped it keeps its own view. Safe to call twice."""
        self.memory = Memory()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class PageLog:
    """A dirty log for guest-physical addresses below ``end``: which pages a back end has written to (R-VU-80)."""

    def __init__(self, end: int) -> None:
        self.size = -(-end // (PAGE * 8))
        self.fd = make_shared("dirty-log", self.size)
        self._log = DirtyLog(mmap.mmap(self.fd, self.size), 0, self.size)

    def mark(self, gpa: int, size: int) -> None:
        """The guest itself has written there: a VMM's log has these pages, too."""
        self._log.mark(gpa, size)

    def take(self) -> list[int]:
        """The guest-physical addresses of the pages written to since the last time.

        Reading a page after that gives what was written before; what is written later is in the next take().
        """
        marks = self._log.take()
        return [(8 * at + bit) * PAGE for at, byte in enumerate(marks) if byte for bit in range(8) if byte & (1 << bit)]

    def close(self) -> None:
        """Safe to call twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@dataclass
class Inflight:
    """What a back end keeps its chains in flight in, for the one that comes after it (R-VU-85)."""

    area: InflightArea
    fd: int

    def close(self) -> None:
        """Safe to call twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _eventfd() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


@dataclass
class Ring:
    """A queue as the front end has it: the driver's side, and the descriptors."""

    index: int
    driver: DriverQueue
    base: int = 0
    """Where the back end is to go on, as SET_VRING_BASE has it (R-VU-18)."""
    kick_fd: int = field(default_factory=_eventfd)
    call_fd: int = field(default_factory=_eventfd)
    err_fd: int = field(default_factory=_eventfd)

    def called(self) -> int:
        """How many interrupts have come since the last time."""
        return _count(self.call_fd)

    def failed(self) -> int:
        """How many times the back end has said that the ring is broken, since the last time."""
        return _count(self.err_fd)

    def kick(self) -> None:
        """Tells the back end that there is something in the ring."""
        os.eventfd_write(self.kick_fd, 1)

    def close(self) -> None:
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            os.close(fd)


def _count(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


# -- the connection ----------------------------------------------------------------------------------------------------


class FrontEnd:
    """A connection to a back end. Its replies are checked to the bit (R-VU-02).

    ``idle`` is called, again and again, while there is nothing to do but wait; without it the thread sleeps.
    """

    def __init__(
        self, sock: socket.socket, idle: Callable[[], None] | None = None, *, timeout: float = TIMEOUT_SECONDS
    ) -> None:
        self.sock = sock
        self.idle = idle
        self.timeout = timeout
        self.features = 0
        """The virtio features that were set."""
        self.protocol_features = ProtocolFeature(0)
        self.rings: dict[int, Ring] = {}
        self.log: PageLog | None = None
        """Where the back end marks what it writes, while it has to."""
        self.channel: socket.socket | None = None
        """Our end of the back-end channel, on which the back end asks."""
        self.user = USER
        self._stream = Stream(sock)

    @classmethod
    def connect(cls, path: str, idle: Callable[[], None] | None = None, *, timeout: float = TIMEOUT_SECONDS) -> Self:
        """Connects to the back end that listens at ``path``; raises HostError."""
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(path)
        except OSError as exc:
            sock.close()
            raise HostError(f"cannot connect to the back end at {path}: {exc.strerror or exc}") from exc
        return cls(sock, idle, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection and closes the rings' descriptors; memory, logs and Inflight stay their owners'."""
        self._stream.close()
        if self.channel is not None:
            self.channel.close()
        self.remove_rings()

    # -- waiting -------------------------------------------------------------------------------------------------------

    def until(self, condition: Callable[[], object]) -> None:
        """Lets the back end work until ``condition()`` holds. Raises Disconnected, BackEndError."""
        deadline = time.monotonic() + self.timeout
        spins = 0
        while not condition():
            spins += 1
            if time.monotonic() > deadline:
                raise BackEndError("R-VU-97", f"the back end has not done it within {self.timeout:g} s")
            if self.idle is not None:
                self.idle()
            elif self._ready(self.sock.fileno(), select.POLLRDHUP, 0 if spins < _SPINS else 0.001):
                raise Disconnected("R-VU-75", "the back end has closed the connection")

    def _wait(self, fd: int, events: int, deadline: float) -> None:
        """Returns when ``fd`` may be ready, or the back end may have done something."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise BackEndError("R-VU-97", f"the back end has not answered within {self.timeout:g} s")
        if self.idle is not None:
            self.idle()
        else:
            self._ready(fd, events, left)

    @staticmethod
    def _ready(fd: int, events: int, seconds: float) -> bool:
        poller = select.poll()
        poller.register(fd, events)
        return bool(poller.poll(seconds * 1000))

    # -- messages ------------------------------------------------------------------------------------------------------

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Sends raw bytes; the descriptors ride with the first of them (R-VU-03). Raises Disconnected."""
        deadline = time.monotonic() + self.timeout
        try:
            while data:
                sent = send_some(self.sock, data, fds)
                data = data[sent:]
                fds = () if sent else fds
                if data:
                    self._wait(self.sock.fileno(), select.POLLOUT, deadline)
        except BrokenConnection as exc:
            raise Disconnected("R-VU-75", f"the back end has closed the connection: {exc}") from exc

    def receive(self, size: int) -> bytes:
        """Exactly ``size`` bytes; raises Disconnected, BackEndError."""
        deadline = time.monotonic() + self.timeout
        try:
            while not self._stream.receive(size):
                self._wait(self.sock.fileno(), select.POLLIN, deadline)
        except BrokenConnection as exc:
            raise Disconnected("R-VU-75", f"the back end has closed the connection: {exc}") from exc
        return self._stream.take_data()

    def reply(self, request: int) -> bytes:
        """The payload of the reply to ``request``, the only thing that may come now. Raises BackEndError."""
        payload, fds = self._reply_with_fds(request)
        for fd in fds:
            os.close(fd)
        return payload

    def _reply_with_fds(self, request: int) -> tuple[bytes, list[int]]:
        head = self.receive(HEADER_SIZE)
        size = int.from_bytes(head[8:], "little")
        if head != encode_reply(request, bytes(size))[:HEADER_SIZE]:
            raise BackEndError("R-VU-02", "this is no reply to what was asked", request=request, got=head.hex())
        return self.receive(size), self._stream.take_fds()

    def ask(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """A request with a reply of its own."""
        self.send(encode_request(request, payload), fds)
        return self.reply(request)

    def ask_u64(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """The same, if the reply is a number."""
        return self._number(request, self.ask(request, payload, fds))

    def need(self, feature: ProtocolFeature) -> None:
        """Raises Refused if ``feature`` is not negotiated."""
        if not self.protocol_features & feature:
            raise Refused("R-VU-40", "the back end cannot do that", missing=feature.name)

    def tell(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """A request that is done when this returns; raises Refused, if the back end says so (REPLY_ACK, R-VU-58)."""
        if self.protocol_features & ProtocolFeature.REPLY_ACK:
            self.demand(request, payload, fds)
        else:
            self.post(request, payload, fds)
            self.barrier()

    def demand(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """A request that is acknowledged (R-VU-05); raises Refused."""
        self.send(encode_request(request, payload, need_reply=True), fds)
        self._acknowledged(request)

    def post(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """A request without any answer."""
        self.send(encode_request(request, payload), fds)

    def barrier(self) -> None:
        """Everything sent before has been dealt with when this returns (R-VU-10)."""
        self.ask(Request.GET_FEATURES)

    def _acknowledged(self, request: int) -> None:
        result = self._number(request, self.reply(request))
        if result:
            raise Refused("R-VU-05", "the back end refuses", request=_name(request), result=result)

    @staticmethod
    def _number(request: int, payload: bytes) -> int:
        try:
            return decode_u64(payload)
        except FrontEndError as exc:
            raise BackEndError("R-VU-02", "the reply is no number", request=_name(request)) from exc

    # -- features and configuration space ------------------------------------------------------------------------------

    def offered(self) -> int:
        """The virtio features that the device offers."""
        return self.ask_u64(Request.GET_FEATURES) & ~int(Feature.PROTOCOL_FEATURES | Feature.LOG_ALL)

    def negotiate(self, protocol_features: ProtocolFeature | None = None, features: int | None = None) -> None:
        """The start of a session. By default everything is used that both sides know; raises BackEndError."""
        offered = self.ask_u64(Request.GET_FEATURES)
        self.post(Request.SET_OWNER)
        if offered & Feature.PROTOCOL_FEATURES:
            known = sum(int(feature) for feature in ProtocolFeature)
            theirs = ProtocolFeature(self.ask_u64(Request.GET_PROTOCOL_FEATURES) & known)
            self.set_protocol_features(theirs if protocol_features is None else protocol_features)
        self.set_features(offered & int(_VIRTIO) if features is None else features)

    def set_protocol_features(self, features: ProtocolFeature) -> None:
        """Raises Refused, if it can be told."""
        self.post(Request.SET_PROTOCOL_FEATURES, encode_u64(features))
        self.barrier()
        self.protocol_features = features

    def set_features(self, features: int) -> None:
        """Virtio features; those of vhost-user are added as it has to be."""
        self.features = features
        logging = Feature.LOG_ALL if self.log is not None else 0
        self.tell(Request.SET_FEATURES, encode_u64(features | Feature.PROTOCOL_FEATURES | logging))

    def queue_count(self) -> int:
        """How many queues the back end has (MQ)."""
        return self.ask_u64(Request.GET_QUEUE_NUM)

    def get_config(self, size: int = 12) -> bytes:
        """The first bytes of the configuration space; raises Refused."""
        payload = self.ask(Request.GET_CONFIG, Config(0, 0, bytes(size)).encode())
        if not payload:
            raise Refused("R-VU-26", "the back end has no configuration space of that size", size=size)
        try:
            return Config.decode(payload).data
        except FrontEndError as exc:
            raise BackEndError("R-VU-26", "the reply is no configuration space") from exc

    # -- guest memory --------------------------------------------------------------------------------------------------

    def share(self, memory: GuestMemory) -> None:
        """Makes ``memory`` the guest's; raises Refused."""
        if len(memory.wire) <= FDS_MAX:
            self.tell(Request.SET_MEM_TABLE, MemoryTable(tuple(memory.wire)).encode(), [memory.fd] * len(memory.wire))
        else:
            for region in memory.wire:
                self.add_region(region, memory.fd)
        self.user = memory.user

    def add_region(self, region: MemoryRegion, fd: int) -> None:
        """One more region (CONFIGURE_MEM_SLOTS); raises Refused."""
        self.tell(Request.ADD_MEM_REG, OneRegion(region).encode(), [fd])

    def remove_region(self, region: MemoryRegion) -> None:
        """Raises Refused."""
        self.tell(Request.REM_MEM_REG, OneRegion(region).encode())

    # -- rings ---------------------------------------------------------------------------------------------------------

    def add_ring(self, index: int, driver: DriverQueue, base: int | None = None) -> Ring:
        """A driver's queue, not yet shown to the back end; in place of an older one its descriptors stay.

        Without ``base`` it begins at its beginning.
        """
        if base is None:
            base = PACKED_BEGINNING << 16 | PACKED_BEGINNING if driver.packed else 0
        if index in self.rings:
            self.rings[index].driver, self.rings[index].base = driver, base
        else:
            self.rings[index] = Ring(index, driver, base)
        return self.rings[index]

    def start(self, ring: Ring) -> None:
        """Everything for one ring, from its layout to ENABLE. Raises Refused."""
        self.configure(ring)
        self.set_fd(Request.SET_VRING_ERR, ring.index, ring.err_fd)
        self.set_fd(Request.SET_VRING_CALL, ring.index, ring.call_fd)
        self.set_fd(Request.SET_VRING_KICK, ring.index, ring.kick_fd)
        self.enable(ring.index, True)

    def configure(self, ring: Ring) -> None:
        """Size, base and addresses; no acknowledgement is asked for, as in QEMU (R-VU-58)."""
        self.post(Request.SET_VRING_NUM, VringState(ring.index, ring.driver.size).encode())
        self.post(Request.SET_VRING_BASE, VringState(ring.index, ring.base).encode())
        self.post(Request.SET_VRING_ADDR, self.address(ring, flags=int(self.log is not None)))

    def address(self, ring: Ring, flags: int = 0) -> bytes:
        """The payload of SET_VRING_ADDR; ``flags``: 1 if writes to the used ring are to be logged (R-VU-80)."""
        driver, user = ring.driver, self.user
        log = driver.used if flags & 1 else _NO_LOG
        return VringAddress(
            ring.index, flags, user + driver.desc, user + driver.used, user + driver.avail, log
        ).encode()

    def set_fd(self, request: int, index: int, fd: int) -> None:
        """SET_VRING_KICK, CALL or ERR; -1: no descriptor."""
        self.tell(request, VringFd(index, fd < 0).encode(), [fd] if fd >= 0 else [])

    def enable(self, index: int, on: bool) -> None:
        """Raises Refused."""
        self.tell(Request.SET_VRING_ENABLE, VringState(index, int(on)).encode())

    def get_base(self, index: int) -> int:
        """Stops a ring; says where the back end would go on (R-VU-20)."""
        try:
            state = VringState.decode(self.ask(Request.GET_VRING_BASE, VringState(index, 0).encode()))
        except FrontEndError as exc:
            raise BackEndError("R-VU-20", "the reply says no base", index=index) from exc
        if state.index != index:
            raise BackEndError("R-VU-20", "the reply is about another ring", index=index, got=state.index)
        return state.num

    def remove_rings(self) -> None:
        """The guest begins anew: it has no queues, until it adds them again. They have to be stopped."""
        for ring in self.rings.values():
            ring.close()
        self.rings.clear()

    def pause(self) -> None:
        """The machine stands still: every ring is disabled, then stopped (R-VU-57)."""
        for index in self.rings:
            self.enable(index, False)
        for index, ring in self.rings.items():
            ring.base = self.get_base(index)

    def resume(self) -> None:
        """The machine goes on: every ring at its base."""
        for ring in self.rings.values():
            self.start(ring)

    # -- dirty logging -------------------------------------------------------------------------------------------------

    def start_logging(self, log: PageLog) -> None:
        """From now on what the back end writes is marked in ``log``, in place of an older one. Raises Refused."""
        self.need(ProtocolFeature.LOG_SHMFD)
        self.post(Request.SET_LOG_BASE, LogBase(log.size, 0).encode(), [log.fd])
        self._acknowledged(Request.SET_LOG_BASE)
        self.log = log
        self._log_anew()

    def stop_logging(self) -> None:
        """Nothing is logged any more; the log stays its owner's."""
        self.log = None
        self._log_anew()

    def _log_anew(self) -> None:
        """Says it of data and of each ring; also while they run."""
        self.set_features(self.features)
        for ring in self.rings.values():
            self.tell(Request.SET_VRING_ADDR, self.address(ring, flags=int(self.log is not None)))

    # -- in-flight descriptors -----------------------------------------------------------------------------------------

    def get_inflight(self, queues: int, queue_size: int) -> Inflight:
        """Has the back end make what it keeps its chains in flight in. Raises Refused."""
        self.need(ProtocolFeature.INFLIGHT_SHMFD)
        asked = InflightArea(0, 0, queues, queue_size)
        self.send(encode_request(Request.GET_INFLIGHT_FD, asked.encode()))
        payload, fds = self._reply_with_fds(Request.GET_INFLIGHT_FD)
        try:
            area = InflightArea.decode(payload)
            if len(fds) == 1 and area.mmap_size:
                return Inflight(area, fds.pop())
        except FrontEndError as exc:
            raise BackEndError("R-VU-28", "the reply describes no in-flight descriptors") from exc
        finally:
            for fd in fds:
                os.close(fd)
        raise Refused("R-VU-28", "the back end makes no in-flight descriptors", queues=queues, queue_size=queue_size)

    def set_inflight(self, inflight: Inflight) -> None:
        """Has the back end use it, before rings are started: one that was used before says what was in flight."""
        self.tell(Request.SET_INFLIGHT_FD, inflight.area.encode(), [inflight.fd])

    # -- the device's state --------------------------------------------------------------------------------------------

    def save(self) -> bytes:
        """The state of the device, whose rings are stopped. Raises Refused, BackEndError."""
        self.need(ProtocolFeature.DEVICE_STATE)
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        try:
            ours = self._begin_transfer(Direction.SAVE, ours, theirs)
            data = self._read_all(ours)
        finally:
            os.close(ours)
        self.check()
        return data

    def load(self, state: bytes) -> None:
        """Gives the device, whose rings are stopped, the state of another one. Raises Refused, BackEndError."""
        self.need(ProtocolFeature.DEVICE_STATE)
        theirs, ours = os.pipe2(os.O_CLOEXEC)
        try:
            ours = self._begin_transfer(Direction.LOAD, ours, theirs)
            self._write_all(ours, state)
        finally:
            os.close(ours)
        self.check()

    def check(self) -> None:
        """Waits until the back end has processed what was transferred; raises Refused if it could not (R-VU-38)."""
        result = self.ask_u64(Request.CHECK_DEVICE_STATE)
        if result:
            raise Refused("R-VU-38", "the state was not transferred: the back end's log says why", result=result)

    def _begin_transfer(self, direction: Direction, ours: int, theirs: int) -> int:
        """Sends ``theirs``, and closes it. Returns what to use: ``ours``, or what the back end has in its place."""
        try:
            self.send(encode_request(Request.SET_DEVICE_STATE_FD, DeviceState(direction, 0).encode()), [theirs])
        finally:
            os.close(theirs)
        payload, fds = self._reply_with_fds(Request.SET_DEVICE_STATE_FD)
        result = self._number(Request.SET_DEVICE_STATE_FD, payload)
        chosen = fds.pop() if fds and not result & (NO_FD | 0xFF) else -1
        for fd in fds:
            os.close(fd)
        if result & 0xFF:
            raise Refused("R-VU-37", "the back end does not transfer its state", result=result & 0xFF)
        if chosen >= 0:
            os.close(ours)
            ours = chosen
        os.set_blocking(ours, False)
        return ours

    def _read_all(self, fd: int) -> bytes:
        data = bytearray()
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                piece = os.read(fd, _PIECE)
            except BlockingIOError:
                self._wait(fd, select.POLLIN, deadline)
                continue
            if not piece:
                return bytes(data)
            data += piece
            if len(data) > _STATE_MAX:
                raise BackEndError("R-VU-91", "the back end's state does not end", bytes=len(data))
            deadline = time.monotonic() + self.timeout

    def _write_all(self, fd: int, data: bytes) -> None:
        """A back end that has heard enough closes its end; why, it says when it is asked."""
        left = memoryview(data)
        deadline = time.monotonic() + self.timeout
        while left:
            try:
                left = left[os.write(fd, left[:_PIECE]) :]
            except BlockingIOError:
                self._wait(fd, select.POLLOUT, deadline)
            except BrokenPipeError:
                return
            else:
                deadline = time.monotonic() + self.timeout

    # -- the back-end channel ------------------------------------------------------------------------------------------

    def open_channel(self) -> None:
        """Gives the back end a channel to ask us on (BACKEND_REQ)."""
        self.channel, theirs = socket.socketpair()
        self.channel.setblocking(False)
        with theirs:
            self.tell(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])

    def take_request(self) -> int | None:
        """The next thing that the back end asks for on its channel, which is acknowledged; None: nothing (R-VU-95)."""
        if self.channel is None:
            return None
        try:
            data = self.channel.recv(HEADER_SIZE)
        except BlockingIOError:
            return None
        try:
            header = Header.decode(data)
        except FrontEndError as exc:
            raise BackEndError("R-VU-95", "the back end's request is malformed", got=data.hex()) from exc
        if header.size:
            raise BackEndError("R-VU-95", "not a request of a console's", request=header.request)
        if header.need_reply:
            self.channel.send(encode_reply(header.request, encode_u64(0)))
        return header.request


def _name(request: int) -> str:
    return Request(request).name if request in set(Request) else str(request)


# -- a simulated guest's way to the device -----------------------------------------------------------------------------


class OverVhostUser:
    """Attaches a vsport.sim.SimulatedGuest to the device behind a front end: its kicks, its calls (sim.Attachment).

    ``loop`` is the simulated guest's: interrupts come by it.
    """

    def __init__(self, front_end: FrontEnd, loop: Loop, memory: GuestMemory) -> None:
        self.front_end = front_end
        self.loop = loop
        self.guest_memory = memory
        self.memory = memory.memory
        self.features = front_end.offered()
        self._on_call: Callable[[], None] = lambda: None
        self._watched: set[int] = set()
        front_end.negotiate(features=0)
        front_end.share(memory)

    def negotiate(self, features: int) -> None:
        self.front_end.set_features(features)

    def max_ports(self) -> int:
        return int.from_bytes(self.front_end.get_config()[4:8], "little")

    def start_queue(self, index: int, queue: DriverQueue) -> None:
        ring = self.front_end.add_ring(index, queue)
        self._watch(ring)
        self.front_end.start(ring)

    def _watch(self, ring: Ring) -> None:
        if ring.call_fd not in self._watched:
            self._watched.add(ring.call_fd)
            self.loop.watch(ring.call_fd, READ, lambda _: self._called(ring))

    def _called(self, ring: Ring) -> None:
        ring.called()
        self._on_call()

    def kick(self, index: int) -> None:
        """On the queue on which Linux spins until the device has taken what it says, so does this (R-CON-47)."""
        ring = self.front_end.rings[index]
        ring.kick()
        if index == QUEUE_CONTROL_TX:
            self.front_end.until(ring.driver.all_used)

    def on_call(self, callback: Callable[[], None]) -> None:
        self._on_call = callback

    def reset(self) -> None:
        """As QEMU does it: all rings disabled, then stopped; the next start is from 0 (R-VU-71)."""
        self.front_end.pause()
        self._unwatch()
        self.front_end.remove_rings()

    def pause(self) -> None:
        """The machine stands still."""
        self.front_end.pause()

    def resume(self) -> None:
        """The machine goes on."""
        self.front_end.resume()

    def move_to(self, front_end: FrontEnd, memory: GuestMemory) -> None:
        """The guest, which is paused, is another back end's: ``memory`` is the copy, and resume() starts it there.

        The front end before is left as it is. Raises BackEndError.
        """
        before, features = self.front_end.rings, self.front_end.features
        self._unwatch()
        self.front_end, self.guest_memory, self.memory = front_end, memory, memory.memory
        front_end.negotiate(features=features)
        front_end.share(memory)
        for index, ring in before.items():
            ring.driver.rebind(memory.memory)
            self._watch(front_end.add_ring(index, ring.driver, ring.base))

    def _unwatch(self) -> None:
        for fd in self._watched:
            self.loop.unwatch(fd)
        self._watched.clear()

    def close(self) -> None:
        """Ends the attachment; the front end stays."""
        self._unwatch()
