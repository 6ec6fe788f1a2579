"""The syntax of vhost-user messages: framing, payloads, and one table that says what each request looks like.

Nothing here knows a device or a socket. Every ``decode`` gives a value or raises FrontEndError, whatever the bytes.
Numbers are in host byte order (R-VU-01): both ends run on the same machine.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import astuple, dataclass
from enum import IntEnum, IntFlag
from typing import ClassVar, NamedTuple, Self

from vsport.errors import FrontEndError

__all__ = [
    "FDS_MAX",
    "HEADER_SIZE",
    "NO_FD",
    "PAYLOAD_MAX",
    "REQUESTS",
    "UNKNOWN",
    "BackEndRequest",
    "Config",
    "DeviceState",
    "Direction",
    "Header",
    "InflightArea",
    "LogBase",
    "MemoryRegion",
    "MemoryTable",
    "OneRegion",
    "Payload",
    "ProtocolFeature",
    "Request",
    "Row",
    "VringAddress",
    "VringFd",
    "VringState",
    "decode_reply",
    "decode_u64",
    "encode_reply",
    "encode_request",
    "encode_u64",
]

_VERSION = 1
_VERSION_MASK = 0x3
_REPLY = 0x4
_NEED_REPLY = 0x8

_HEADER = struct.Struct("=III")
_U64 = struct.Struct("=Q")
_TABLE_HEAD = struct.Struct("=II")
_CONFIG_HEAD = struct.Struct("=III")
_INFLIGHT = struct.Struct("=QQHH")
_INFLIGHT_PADDING = 4

HEADER_SIZE = _HEADER.size
FDS_MAX = 8
"""The most descriptors that one message carries: a memory table of eight regions (R-VU-15)."""
_CONFIG_DATA_MAX = 256
NO_FD = 0x100
"""Bit 8 of a number that a descriptor may come with: there is none (R-VU-21, R-VU-37)."""


class Request(IntEnum):
    """What a front end asks of us. Numbers that are missing mean nothing for a console (R-VU-39)."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    RESET_DEVICE = 34
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43


class BackEndRequest(IntEnum):
    """What we ask of the front end, on the channel of SET_BACKEND_REQ_FD (R-VU-95)."""

    CONFIG_CHANGE = 2


class ProtocolFeature(IntFlag):
    """Protocol features (R-VU-40) that this back end implements."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5
    CONFIG = 1 << 9
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    DEVICE_STATE = 1 << 19


class Direction(IntEnum):
    """Which way a device's state goes (R-VU-37)."""

    SAVE = 0
    LOAD = 1


# -- framing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Header:
    """The 12 bytes before every payload; ``size`` is the payload's alone (R-VU-01)."""

    request: int
    flags: int
    size: int

    @property
    def need_reply(self) -> bool:
        return bool(self.flags & _NEED_REPLY)

    @property
    def name(self) -> str:
        """The request as a word, or its number where we have no word for it."""
        return Request(self.request).name if self.request in REQUESTS else f"request {self.request}"

    def encode(self) -> bytes:
        return _HEADER.pack(self.request, self.flags, self.size)

    @classmethod
    def decode(cls, data: bytes) -> Header:
        """Reads a request's header. Raises FrontEndError (R-VU-04) if no payload can be expected to follow it."""
        if len(data) != HEADER_SIZE:
            raise FrontEndError("R-VU-01", "a header has 12 bytes", length=len(data))
        header = cls(*_HEADER.unpack(data))
        if header.flags & _VERSION_MASK != _VERSION:
            raise FrontEndError("R-VU-04", "unknown protocol version", flags=hex(header.flags))
        if header.flags & _REPLY:
            raise FrontEndError("R-VU-01", "a reply where a request was expected", request=header.name)
        if header.size > PAYLOAD_MAX:
            raise FrontEndError("R-VU-04", "payload too large", request=header.name, size=header.size)
        return header


def encode_request(request: int, payload: bytes = b"", *, need_reply: bool = False) -> bytes:
    """A whole request, for the back-end channel or for a front end."""
    flags = _VERSION | (_NEED_REPLY if need_reply else 0)
    return _HEADER.pack(request, flags, len(payload)) + payload


def encode_reply(request: int, payload: bytes) -> bytes:
    """A whole reply. Front ends compare its flags and size for equality (R-VU-02)."""
    return _HEADER.pack(request, _VERSION | _REPLY, len(payload)) + payload


def decode_reply(data: bytes) -> tuple[int, int]:
    """(request, number) of a reply that is a u64; raises FrontEndError if it is anything else."""
    if len(data) != HEADER_SIZE + _U64.size:
        raise FrontEndError("R-VU-95", "a reply to the back end has 20 bytes", length=len(data))
    request, flags, size = _HEADER.unpack_from(data)
    if size != _U64.size or flags & ~_NEED_REPLY != _VERSION | _REPLY:
        raise FrontEndError("R-VU-95", "malformed reply to the back end", flags=hex(flags), size=size)
    return request, decode_u64(data[HEADER_SIZE:])


# -- payloads ----------------------------------------------------------------------------------------------------------


def _unpack(layout: struct.Struct, data: bytes) -> tuple[int, ...]:
    if len(data) != layout.size:
        raise FrontEndError("R-VU-04", "payload has the wrong size", got=len(data), expected=layout.size)
    return layout.unpack(data)


def decode_empty(data: bytes) -> None:
    """A request without payload."""
    if data:
        raise FrontEndError("R-VU-04", "payload where none belongs", size=len(data))


def decode_u64(data: bytes) -> int:
    """One number: features, a status, a count."""
    return _unpack(_U64, data)[0]


def encode_u64(number: int) -> bytes:
    return _U64.pack(number)


@dataclass(frozen=True, slots=True)
class _Fixed:
    """A payload of fixed layout: its fields, in order."""

    layout: ClassVar[struct.Struct]

    @classmethod
    def decode(cls, data: bytes) -> Self:
        return cls(*_unpack(cls.layout, data))

    def encode(self) -> bytes:
        return self.layout.pack(*astuple(self))


@dataclass(frozen=True, slots=True)
class VringState(_Fixed):
    """A queue and a number: its size, its next available index, enabled or not."""

    layout: ClassVar = struct.Struct("=II")
    index: int
    num: int


@dataclass(frozen=True, slots=True)
class VringAddress(_Fixed):
    """Where a ring's parts are, as front-end addresses; the used ring comes before the available ring (R-VU-19)."""

    layout: ClassVar = struct.Struct("=IIQQQQ")
    index: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int
    """Where the used ring is in the dirty log, as a guest-physical address (R-VU-80)."""

    @property
    def logs_used(self) -> bool:
        """Whether writes to the used ring are to be logged: bit 0 of ``flags`` (R-VU-80)."""
        return bool(self.flags & 1)


@dataclass(frozen=True, slots=True)
class LogBase(_Fixed):
    """SET_LOG_BASE: where in the file that came along the dirty log is, in bytes (R-VU-16)."""

    layout: ClassVar = struct.Struct("=QQ")
    size: int
    offset: int


@dataclass(frozen=True, slots=True)
class DeviceState(_Fixed):
    """SET_DEVICE_STATE_FD: a Direction, and the phase of the migration, 0: stopped (R-VU-37)."""

    layout: ClassVar = struct.Struct("=II")
    direction: int
    phase: int


@dataclass(frozen=True, slots=True)
class MemoryRegion(_Fixed):
    """A range of guest memory, and where it is in the file that came along (R-VU-60)."""

    layout: ClassVar = struct.Struct("=QQQQ")
    gpa: int
    size: int
    front_end_addr: int
    mmap_offset: int


@dataclass(frozen=True, slots=True)
class InflightArea:
    """What the in-flight descriptors of ``num_queues`` queues of ``queue_size`` are kept in (R-VU-28).

    QEMU adds four bytes of padding, the specification has none: both are read, and answered as they came.
    """

    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int
    padded: bool = True

    @classmethod
    def decode(cls, data: bytes) -> InflightArea:
        padded = len(data) == _INFLIGHT.size + _INFLIGHT_PADDING
        size, offset, num_queues, queue_size = _unpack(_INFLIGHT, data[: _INFLIGHT.size] if padded else data)
        return cls(size, offset, num_queues, queue_size, padded)

    def encode(self) -> bytes:
        area = _INFLIGHT.pack(self.mmap_size, self.mmap_offset, self.num_queues, self.queue_size)
        return area + bytes(_INFLIGHT_PADDING if self.padded else 0)


@dataclass(frozen=True, slots=True)
class VringFd:
    """A queue, and whether the message leaves its descriptor out (R-VU-21)."""

    index: int
    no_fd: bool

    @classmethod
    def decode(cls, data: bytes) -> VringFd:
        value = decode_u64(data)
        return cls(value & 0xFF, bool(value & NO_FD))

    def encode(self) -> bytes:
        return encode_u64(self.index | (NO_FD if self.no_fd else 0))

    @property
    def fds(self) -> int:
        return 0 if self.no_fd else 1


@dataclass(frozen=True, slots=True)
class MemoryTable:
    """SET_MEM_TABLE: the regions, and as many descriptors in the same order (R-VU-15)."""

    regions: tuple[MemoryRegion, ...]

    @classmethod
    def decode(cls, data: bytes) -> MemoryTable:
        head, rest = data[: _TABLE_HEAD.size], data[_TABLE_HEAD.size :]
        count, _padding = _unpack(_TABLE_HEAD, head)
        size = MemoryRegion.layout.size
        if count > FDS_MAX or len(rest) != count * size:
            raise FrontEndError("R-VU-15", "memory table does not fit its payload", regions=count, size=len(data))
        return cls(tuple(MemoryRegion.decode(rest[at : at + size]) for at in range(0, len(rest), size)))

    def encode(self) -> bytes:
        return _TABLE_HEAD.pack(len(self.regions), 0) + b"".join(region.encode() for region in self.regions)

    @property
    def fds(self) -> int:
        return len(self.regions)


@dataclass(frozen=True, slots=True)
class OneRegion:
    """ADD_MEM_REG and REM_MEM_REG: padding and a region (R-VU-33)."""

    region: MemoryRegion

    @classmethod
    def decode(cls, data: bytes) -> OneRegion:
        return cls(MemoryRegion.decode(data[_U64.size :]))

    def encode(self) -> bytes:
        return bytes(_U64.size) + self.region.encode()


@dataclass(frozen=True, slots=True)
class Config:
    """A range of the configuration space. ``flags``: 0 the guest writes, 1 a migration does (R-VU-26, R-VU-27)."""

    offset: int
    flags: int
    data: bytes

    @classmethod
    def decode(cls, data: bytes) -> Config:
        head, rest = data[: _CONFIG_HEAD.size], data[_CONFIG_HEAD.size :]
        offset, size, flags = _unpack(_CONFIG_HEAD, head)
        if size != len(rest):
            raise FrontEndError("R-VU-26", "configuration data do not fit their payload", size=size, got=len(rest))
        return cls(offset, flags, rest)

    def encode(self) -> bytes:
        return _CONFIG_HEAD.pack(self.offset, len(self.data), self.flags) + self.data


PAYLOAD_MAX = max(_TABLE_HEAD.size + FDS_MAX * MemoryRegion.layout.size, _CONFIG_HEAD.size + _CONFIG_DATA_MAX)
"""The largest payload of any request that we know (R-VU-04)."""


# -- the table ---------------------------------------------------------------------------------------------------------

Payload = (
    int
    | bytes
    | VringState
    | VringAddress
    | VringFd
    | MemoryTable
    | OneRegion
    | Config
    | LogBase
    | InflightArea
    | DeviceState
    | None
)
_NO_FDS = range(1)
_ONE_FD = range(1, 2)
_PERHAPS_ONE_FD = range(2)


class Row(NamedTuple):
    """What a request looks like. ``handler`` is the name of the method of Session that it is for."""

    handler: str
    decode: Callable[[bytes], Payload]
    fds: range = _NO_FDS
    """How many descriptors may come along; a payload that knows better (``fds``) narrows it."""
    feature: ProtocolFeature | None = None
    """The protocol feature that has to be negotiated for it."""
    replies: bool = False
    """Whether it has a reply of its own, instead of an acknowledgement."""
    acknowledged: bool = False
    """Whether it is acknowledged also if nobody asks for that."""

    def check(self, payload: bytes, fds: int) -> Payload:
        """Decodes ``payload`` and counts descriptors; raises FrontEndError (R-VU-04)."""
        decoded = self.decode(payload)
        if fds not in self.fds or (isinstance(decoded, VringFd | MemoryTable) and fds != decoded.fds):
            raise FrontEndError("R-VU-04", f"wrong number of descriptors for {self.handler}", got=fds)
        return decoded


REQUESTS: dict[int, Row] = {
    Request.GET_FEATURES: Row("get_features", decode_empty, replies=True),
    Request.SET_FEATURES: Row("set_features", decode_u64),
    Request.SET_OWNER: Row("set_owner", decode_empty),
    Request.RESET_OWNER: Row("reset_owner", decode_empty),
    Request.SET_MEM_TABLE: Row("set_mem_table", MemoryTable.decode, fds=range(FDS_MAX + 1)),
    Request.SET_LOG_BASE: Row(
        "set_log_base", LogBase.decode, fds=_ONE_FD, feature=ProtocolFeature.LOG_SHMFD, acknowledged=True
    ),
    Request.SET_LOG_FD: Row("set_log_fd", decode_empty, fds=_ONE_FD),
    Request.SET_VRING_NUM: Row("set_vring_num", VringState.decode),
    Request.SET_VRING_ADDR: Row("set_vring_addr", VringAddress.decode),
    Request.SET_VRING_BASE: Row("set_vring_base", VringState.decode),
    Request.GET_VRING_BASE: Row("get_vring_base", VringState.decode, replies=True),
    Request.SET_VRING_KICK: Row("set_vring_kick", VringFd.decode, fds=_PERHAPS_ONE_FD),
    Request.SET_VRING_CALL: Row("set_vring_call", VringFd.decode, fds=_PERHAPS_ONE_FD),
    Request.SET_VRING_ERR: Row("set_vring_err", VringFd.decode, fds=_PERHAPS_ONE_FD),
    Request.GET_PROTOCOL_FEATURES: Row("get_protocol_features", decode_empty, replies=True),
    Request.SET_PROTOCOL_FEATURES: Row("set_protocol_features", decode_u64),
    Request.GET_QUEUE_NUM: Row("get_queue_num", decode_empty, feature=ProtocolFeature.MQ, replies=True),
    Request.SET_VRING_ENABLE: Row("set_vring_enable", VringState.decode),
    Request.SET_BACKEND_REQ_FD: Row(
        "set_backend_req_fd", decode_empty, fds=_ONE_FD, feature=ProtocolFeature.BACKEND_REQ
    ),
    Request.GET_CONFIG: Row("get_config", Config.decode, feature=ProtocolFeature.CONFIG, replies=True),
    Request.SET_CONFIG: Row("set_config", Config.decode, feature=ProtocolFeature.CONFIG),
    Request.GET_INFLIGHT_FD: Row(
        "get_inflight_fd", InflightArea.decode, feature=ProtocolFeature.INFLIGHT_SHMFD, replies=True
    ),
    Request.SET_INFLIGHT_FD: Row(
        "set_inflight_fd", InflightArea.decode, fds=_ONE_FD, feature=ProtocolFeature.INFLIGHT_SHMFD
    ),
    Request.RESET_DEVICE: Row("reset_device", decode_empty, feature=ProtocolFeature.RESET_DEVICE),
    Request.GET_MAX_MEM_SLOTS: Row(
        "get_max_mem_slots", decode_empty, feature=ProtocolFeature.CONFIGURE_MEM_SLOTS, replies=True
    ),
    Request.ADD_MEM_REG: Row("add_mem_reg", OneRegion.decode, fds=_ONE_FD, feature=ProtocolFeature.CONFIGURE_MEM_SLOTS),
    Request.REM_MEM_REG: Row(
        "rem_mem_reg", OneRegion.decode, fds=_PERHAPS_ONE_FD, feature=ProtocolFeature.CONFIGURE_MEM_SLOTS
    ),
    Request.SET_STATUS: Row("set_status", decode_u64, feature=ProtocolFeature.STATUS),
    Request.GET_STATUS: Row("get_status", decode_empty, feature=ProtocolFeature.STATUS, replies=True),
    Request.SET_DEVICE_STATE_FD: Row(
        "set_device_state_fd", DeviceState.decode, fds=_ONE_FD, feature=ProtocolFeature.DEVICE_STATE, replies=True
    ),
    Request.CHECK_DEVICE_STATE: Row(
        "check_device_state", decode_empty, feature=ProtocolFeature.DEVICE_STATE, replies=True
    ),
}

UNKNOWN = Row("", bytes, fds=range(FDS_MAX + 1))
"""Any other request: whatever comes with it is taken, to be thrown away (R-VU-07)."""
