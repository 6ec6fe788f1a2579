"""Everything about a device that its guest or its back ends can notice, as a document (R-MIG-23, R-VU-92).

    offset  bytes  what
    0       8      magic, with the format's version: b"vsport\\0" and 1
    8       4      length of the header, little endian
    12      4      length of the payload
    16      4      CRC-32 of all that follows
    20             the header, JSON: what a person may want to read
                   the payload: bytes that only their owners understand

A snapshot is not trusted more than a live guest: decode() checks each value and their consistency, and gives a whole
Snapshot or raises DocumentError. It allocates nothing by a length that the file only claims.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from dataclasses import dataclass, replace
from typing import Any, Final

from vsport.connection import State
from vsport.constants import PORTS_MAX, QUEUE_SIZE_MAX, Feature, queue_count
from vsport.control import Message
from vsport.document import DocumentError, Fields
from vsport.errors import GuestError, UsageError

__all__ = [
    "MAGIC",
    "SIZE_MAX",
    "PortConfig",
    "PortState",
    "QueueState",
    "Snapshot",
]

MAGIC: Final = b"vsport\0\1"
_FRAME = struct.Struct("<8sIII")
_HEADER_MAX = 1 << 20
_PAYLOAD_MAX = 64 << 20
SIZE_MAX: Final = _FRAME.size + _HEADER_MAX + _PAYLOAD_MAX
"""Bytes of the largest document."""
_WAITING_MAX = 16 * PORTS_MAX
_POSITION = struct.Struct("<HQ")
"""Of a queue: the next chain, and how much of it was consumed."""
_OFFSET_MAX = QUEUE_SIZE_MAX << 32
_FEATURES = sum(int(feature) for feature in Feature)
_NAME_BYTES_MAX = 1024
"""A name travels in one control message, and a guest's control buffer is a page (R-GUEST-19)."""
_BAD_IN_NAME = re.compile(r"[/\x00-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class PortConfig:
    """What a user says about a port. Raises UsageError (R-CON-52) for a name that udev could not make a link of."""

    id: int
    name: str = ""
    console: bool = False
    cols: int = 80
    rows: int = 25
    rows_first: bool = False
    """Sizes are said as Linux before 6.15 reads them, which no device can find out (R-CON-26)."""

    def __post_init__(self) -> None:
        if _BAD_IN_NAME.search(self.name) or self.name in {".", ".."}:
            raise UsageError(f"port name {self.name!r}: udev makes a file of it: UTF-8, no '/', no control character")
        if len(self.name.encode()) > _NAME_BYTES_MAX:
            raise UsageError(f"port name {self.name[:20]!r}...: longer than {_NAME_BYTES_MAX} bytes")
        for word, value in (("cols", self.cols), ("rows", self.rows)):
            if not 0 <= value <= 0xFFFF:
                raise UsageError(f"port {self.id}: {word}={value} is not in 0 to 65535")


@dataclass(frozen=True, slots=True)
class QueueState:
    """Where the device was in one queue: the next chain, and how much of it was consumed already (R-VU-89)."""

    index: int
    size: int
    next_avail: int
    """As DeviceQueue has it: in a packed ring the slot, with the wrap counter in bit 15."""
    offset: int = 0


@dataclass(frozen=True, slots=True)
class PortState:
    """A port: what it is, its three bits, and whether the driver has been told of it."""

    config: PortConfig
    state: State
    added: bool
    stale: bool = False
    """Whether the transmit ring has what was meant for a host that left while the ring stood still."""
    session: int = 0
    """How many sessions its hosts have had: the number of the present one, or of the last."""
    back_end: bytes = b""
    """What its back end wanted to be kept, in the back end's own words."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A device at rest. encode() and decode() are inverse."""

    max_ports: int
    cols: int
    rows: int
    features: int
    driver_ready: bool
    queues: tuple[QueueState, ...] = ()
    ports: tuple[PortState, ...] = ()
    waiting: tuple[Message, ...] = ()
    """Control messages that the guest had no buffer for yet, in order (R-MIG-22)."""

    def moved_since(self, before: Snapshot) -> bytes | None:
        """Where the queues are, if nothing but that is different from ``before``; None if something is."""
        if replace(self, queues=before.queues) != before:
            return None
        rings, rings_before = ([(queue.index, queue.size) for queue in each.queues] for each in (self, before))
        if rings != rings_before:
            return None
        return b"".join(_POSITION.pack(queue.next_avail, queue.offset) for queue in self.queues)

    def move(self, positions: bytes) -> Snapshot:
        """The inverse: the same, with its queues there. Raises DocumentError."""
        if len(positions) != len(self.queues) * _POSITION.size:
            raise DocumentError(f"snapshot: {len(positions)} bytes do not say where {len(self.queues)} queues are")
        moved = [
            QueueState(queue.index, queue.size, *where)
            for queue, where in zip(self.queues, _POSITION.iter_unpack(positions), strict=True)
        ]
        if any(queue.offset > _OFFSET_MAX for queue in moved):
            raise DocumentError("snapshot: no chain is as long as is said to have been consumed")
        return replace(self, queues=tuple(moved))

    def encode(self) -> bytes:
        """The document."""
        header = json.dumps(self.as_dict(), separators=(",", ":")).encode()
        payload = b"".join(port.back_end for port in self.ports)
        body = header + payload
        return _FRAME.pack(MAGIC, len(header), len(payload), zlib.crc32(body)) + body

    def as_dict(self) -> dict[str, Any]:
        """The header; also what is shown to people."""
        return {
            "max_ports": self.max_ports,
            "cols": self.cols,
            "rows": self.rows,
            "features": self.features,
            "driver_ready": self.driver_ready,
            "queues": [
                {"index": q.index, "size": q.size, "next_avail": q.next_avail, "offset": q.offset} for q in self.queues
            ],
            "ports": [_port_as_dict(port) for port in self.ports],
            "waiting": [message.encode().hex() for message in self.waiting],
        }

    @classmethod
    def decode(cls, data: bytes) -> Snapshot:
        """Reads a document; raises DocumentError if it is truncated, inconsistent or not one of ours."""
        header, payload = _unframe(data)
        snapshot = _read_snapshot(Fields.parse("snapshot", header), _Payload(payload))
        _check_consistency(snapshot)
        return snapshot


# -- writing -----------------------------------------------------------------------------------------------------------


def _port_as_dict(port: PortState) -> dict[str, Any]:
    config = port.config
    return {
        "id": config.id,
        "name": config.name,
        "console": config.console,
        "cols": config.cols,
        "rows": config.rows,
        "rows_first": config.rows_first,
        "host_connected": port.state.host_connected,
        "device_ready": port.state.device_ready,
        "guest_connected": port.state.guest_connected,
        "added": port.added,
        "stale": port.stale,
        "session": port.session,
        "back_end_bytes": len(port.back_end),
    }


# -- reading -----------------------------------------------------------------------------------------------------------


def _unframe(data: bytes) -> tuple[bytes, bytes]:
    if len(data) < _FRAME.size or data[:6] != MAGIC[:6]:
        raise DocumentError("not a vsport snapshot: it does not begin like one")
    magic, header_size, payload_size, checksum = _FRAME.unpack_from(data)
    if magic != MAGIC:
        raise DocumentError(f"snapshot: format {magic[7]} is not known here; this vsport reads format {MAGIC[7]}")
    if header_size > _HEADER_MAX or payload_size > _PAYLOAD_MAX:
        raise DocumentError(f"snapshot: lengths beyond reason: header {header_size}, payload {payload_size}")
    body = data[_FRAME.size :]
    if len(body) != header_size + payload_size:
        raise DocumentError(
            f"snapshot: {len(body)} bytes where {header_size + payload_size} belong: cut short or longer"
        )
    if zlib.crc32(body) != checksum:
        raise DocumentError("snapshot: its checksum is wrong: it was changed on its way")
    return body[:header_size], body[header_size:]


class _Payload:
    """The payload, taken piece by piece by those to whom the header gives lengths."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            raise DocumentError("snapshot: the payload is shorter than the ports say")
        self._at += size
        return self._data[self._at - size : self._at]

    def end(self) -> None:
        if self._at != len(self._data):
            raise DocumentError("snapshot: the payload is longer than the ports say")


def _read_snapshot(fields: Fields, payload: _Payload) -> Snapshot:
    max_ports = fields.integer("max_ports", 1, PORTS_MAX)
    snapshot = Snapshot(
        max_ports=max_ports,
        cols=fields.integer("cols", 0, 0xFFFF),
        rows=fields.integer("rows", 0, 0xFFFF),
        features=fields.integer("features", 0, _FEATURES),
        driver_ready=fields.boolean("driver_ready"),
        queues=fields.each("queues", queue_count(max_ports), _read_queue),
        ports=fields.each("ports", max_ports, lambda where, value: _read_port(where, value, payload)),
        waiting=fields.each("waiting", _WAITING_MAX, _read_message),
    )
    fields.end()
    payload.end()
    return snapshot


def _read_queue(where: str, value: object) -> QueueState:
    fields = Fields(where, value)
    queue = QueueState(
        index=fields.integer("index", 0, queue_count(PORTS_MAX) - 1),
        size=fields.integer("size", 1, QUEUE_SIZE_MAX),
        next_avail=fields.integer("next_avail", 0, 0xFFFF),
        offset=fields.integer("offset", 0, _OFFSET_MAX),
    )
    fields.end()
    return queue


def _read_port(where: str, value: object, payload: _Payload) -> PortState:
    fields = Fields(where, value)
    try:
        config = PortConfig(
            id=fields.integer("id", 0, PORTS_MAX - 1),
            name=fields.text("name"),
            console=fields.boolean("console"),
            cols=fields.integer("cols", 0, 0xFFFF),
            rows=fields.integer("rows", 0, 0xFFFF),
            rows_first=fields.boolean("rows_first"),
        )
    except UsageError as exc:
        raise DocumentError(f"{where}: {exc}") from None
    bits = tuple(fields.boolean(name) for name in ("host_connected", "device_ready", "guest_connected"))
    port = PortState(
        config=config,
        state=_state(where, bits),
        added=fields.boolean("added"),
        stale=fields.boolean("stale"),
        session=fields.integer("session", 0, 2**63 - 1),
        back_end=payload.take(fields.integer("back_end_bytes", 0, _PAYLOAD_MAX)),
    )
    fields.end()
    return port


def _state(where: str, bits: tuple[bool, ...]) -> State:
    try:
        return State(bits)
    except ValueError:
        raise DocumentError(f"{where}: a port that is not ready cannot be open in the guest") from None


def _read_message(where: str, value: object) -> Message:
    try:
        if not isinstance(value, str):
            raise ValueError("text belongs here")
        return Message.decode(bytes.fromhex(value))
    except (ValueError, GuestError) as exc:
        raise DocumentError(f"{where}: no control message: {exc}") from None


def _check_consistency(snapshot: Snapshot) -> None:
    """What no single field shows."""
    count = queue_count(snapshot.max_ports)
    _check_unique("queue", [queue.index for queue in snapshot.queues], below=count)
    _check_unique("port", [port.config.id for port in snapshot.ports], below=snapshot.max_ports)
    names = [port.config.name for port in snapshot.ports if port.config.name]
    if len(set(names)) != len(names):
        raise DocumentError("snapshot: two ports have one name")
    if snapshot.features & ~_FEATURES:
        raise DocumentError(f"snapshot: features {snapshot.features:#x} are not all known")
    for queue in snapshot.queues:
        _check_queue(queue, packed=bool(snapshot.features & Feature.RING_PACKED))
    for port in snapshot.ports:
        multiport = snapshot.features & Feature.MULTIPORT
        if multiport and port.state.device_ready and not port.added:
            raise DocumentError(f"snapshot: port {port.config.id} is ready, and the driver was never told of it")


def _check_queue(queue: QueueState, *, packed: bool) -> None:
    if not packed and queue.size & (queue.size - 1):
        raise DocumentError(f"snapshot: queue {queue.index}: size {queue.size} is no power of two (R-RING-01)")
    if packed and queue.next_avail & 0x7FFF >= queue.size:
        raise DocumentError(
            f"snapshot: queue {queue.index}: next_avail {queue.next_avail:#x} is no slot of it (R-VU-18)"
        )


def _check_unique(what: str, numbers: list[int], *, below: int) -> None:
    if len(set(numbers)) != len(numbers):
        raise DocumentError(f"snapshot: a {what} is there twice")
    if any(number >= below for number in numbers):
        raise DocumentError(f"snapshot: {what} {max(numbers)} is beyond what max_ports allows")
