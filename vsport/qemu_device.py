"""QEMU's virtio-serial device as its migration stream has it: plain data, and what does not fit together in it.

qemu_stream reads it. A device that contradicts itself is still shown; a Finding says what is wrong with it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, IntFlag
from typing import Any, ClassVar, NamedTuple

from vsport.constants import queue_count, tx_queue

__all__ = [
    "QUEUES_MAX",
    "SEGMENTS_MAX",
    "Finding",
    "PackedState",
    "QemuBus",
    "QemuDevice",
    "QemuElement",
    "QemuPort",
    "QemuQueue",
    "QemuStream",
    "Segment",
    "Severity",
    "Status",
    "feature_names",
    "inconsistencies",
]

QUEUES_MAX = SEGMENTS_MAX = 1024
"""VIRTIO_QUEUE_MAX and VIRTQUEUE_MAX_SIZE (R-MIG-24)."""


_SEGMENT_MAX = (1 << 32) - 1
"""Bytes of one descriptor (2.7.5)."""


class _Plain:
    """What can be printed as JSON: its fields by name, then what is ``derived`` from them, without the ``hidden``."""

    __slots__ = ()
    derived: ClassVar[tuple[str, ...]] = ()
    hidden: ClassVar[tuple[str, ...]] = ()

    def as_dict(self) -> dict[str, object]:
        """Only dicts, lists, strings, numbers and None, with keys that stay."""
        names = [name for name in self.__dataclass_fields__ if name not in self.hidden]  # type: ignore[attr-defined]
        return {name: _plain(getattr(self, name)) for name in (*names, *self.derived)}


def _plain(value: Any) -> Any:
    if isinstance(value, _Plain):
        return value.as_dict()
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return value._asdict()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value.hex() if isinstance(value, bytes) else value


class Severity(Enum):
    """How much a Finding matters."""

    ERROR = "error"
    """The file contradicts itself: do not restore from it."""
    WARNING = "warning"
    """It can be read, but somebody may be surprised by it."""
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Finding(_Plain):
    """Something about a file that its reader should know; ``rule`` is the line of the conformance list."""

    severity: Severity
    what: str
    rule: str
    offset: int | None = None


class Status(IntFlag):
    """The device status field (2.1)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    DEVICE_NEEDS_RESET = 64
    FAILED = 128


_FEATURE_NAMES = {
    0: "SIZE",
    1: "MULTIPORT",
    2: "EMERG_WRITE",
    24: "NOTIFY_ON_EMPTY",
    27: "ANY_LAYOUT",
    28: "INDIRECT_DESC",
    29: "EVENT_IDX",
    30: "BAD_FEATURE",
    32: "VERSION_1",
    33: "ACCESS_PLATFORM",
    34: "RING_PACKED",
    35: "IN_ORDER",
    36: "ORDER_PLATFORM",
    37: "SR_IOV",
    38: "NOTIFICATION_DATA",
    39: "NOTIF_CONFIG_DATA",
    40: "RING_RESET",
}
"""5.3.3, 6, and the three that only QEMU and older specifications have."""
_MULTIPORT, _VERSION_1, _RING_PACKED = 1 << 1, 1 << 32, 1 << 34


def feature_names(features: int) -> tuple[str, ...]:
    """Features by name, lowest bit first; ``bit N`` for those that have none."""
    bits = (bit for bit in range(features.bit_length()) if features >> bit & 1)
    return tuple(_FEATURE_NAMES.get(bit, f"bit {bit}") for bit in bits)


class Segment(NamedTuple):
    """A piece of guest memory."""

    gpa: int
    length: int


@dataclass(frozen=True, slots=True)
class QemuElement(_Plain):
    """A transmit chain that the host has taken a part of: the port is throttled (R-MIG-14, R-MIG-21).

    ``head`` is its first descriptor (split) or its buffer id (packed); the host goes on at byte ``iov_offset`` of
    segment ``iov_idx``. ``descriptors`` is how many the chain has in a packed ring (R-MIG-15), None in a split one.
    """

    derived = ("bytes_total", "bytes_taken", "bytes_left", "resumes_at")

    head: int
    segments: tuple[Segment, ...]
    out_num: int
    in_num: int
    iov_idx: int
    iov_offset: int
    descriptors: int | None = None

    @property
    def bytes_total(self) -> int:
        return sum(segment.length for segment in self.segments)

    @property
    def bytes_taken(self) -> int:
        """What the host already has: a restored port skips that much of the chain."""
        return min(sum(segment.length for segment in self.segments[: self.iov_idx]) + self.iov_offset, self.bytes_total)

    @property
    def bytes_left(self) -> int:
        return self.bytes_total - self.bytes_taken

    @property
    def resumes_at(self) -> int | None:
        """The guest address of the first byte that the host has not; None if there is none."""
        return self.segments[self.iov_idx].gpa + self.iov_offset if self.iov_idx < len(self.segments) else None


@dataclass(frozen=True, slots=True)
class QemuPort(_Plain):
    """A port that was plugged in: its two connections, and a half-consumed chain if it is throttled."""

    derived = ("throttled",)

    id: int
    guest_connected: bool
    host_connected: bool
    element: QemuElement | None = None

    @property
    def throttled(self) -> bool:
        return self.element is not None


class PackedState(NamedTuple):
    """What a packed queue has beside last_avail: in a split one it is in guest memory (R-MIG-17, R-MIG-18)."""

    last_avail: int
    avail_wrap: bool
    used: int
    used_wrap: bool
    in_use: int


@dataclass(frozen=True, slots=True)
class QemuQueue(_Plain):
    """A virtqueue: size, guest addresses of its three parts (0: not set up), the next avail entry to be looked at.

    In a packed ring ``avail`` and ``used`` are the driver's and the device's event suppression areas.
    """

    index: int
    num: int
    desc: int
    avail: int
    used: int
    last_avail: int
    vector: int | None = None
    packed: PackedState | None = None


@dataclass(frozen=True, slots=True)
class QemuBus(_Plain):
    """What the device is plugged into: ``kind`` is "pci" or "mmio", the rest is PCI's (R-MIG-11)."""

    derived = ("ids",)
    hidden = ("config",)

    kind: str
    config: bytes = b""
    intx: tuple[int, ...] = ()
    msix_vectors: int = 0
    msix_pending: bytes = b""
    config_vector: int | None = None

    @property
    def ids(self) -> tuple[int, int]:
        """(vendor, device) of the PCI function."""
        vendor, device = struct.unpack_from("<HH", self.config) if self.config else (0, 0)
        return vendor, device


@dataclass(frozen=True, slots=True)
class QemuDevice(_Plain):
    """One virtio-serial device. ``offset`` is its section's in the file, ``size`` that of the section's body, bytes.

    ``config`` is the configuration space as the guest read it last, so all zeros if it never did. ``ports_map`` has a
    bit for each plugged port, and bit 0 always (R-MIG-19). ``started`` is None where QEMU did not say.
    """

    derived = ("feature_names",)

    idstr: str
    instance: int
    version: int
    section_id: int
    offset: int
    size: int
    bus: QemuBus
    status: Status
    isr: int
    queue_sel: int
    features: int
    config: bytes
    queues: tuple[QemuQueue, ...]
    cols: int
    rows: int
    max_ports: int
    ports_map: int
    ports: tuple[QemuPort, ...]
    broken: bool
    disabled: bool
    started: bool | None
    findings: tuple[Finding, ...] = ()

    @property
    def packed(self) -> bool:
        return bool(self.features & _RING_PACKED)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The negotiated features by name."""
        return feature_names(self.features)

    def half_sent(self, index: int) -> QemuElement | None:
        """The chain that QEMU has taken from queue ``index`` and not given back; None if there is none."""
        return next((port.element for port in self.ports if tx_queue(port.id) == index), None)

    def queue_base(self, index: int) -> int:
        """Where another device has to take queue ``index`` up, as vhost-user's SET_VRING_BASE has it (R-MIG-24).

        The chain of a throttled port is to be fetched again, so the base is the one before it. In a packed ring bit 15
        is the wrap counter and a chain is as long as its descriptors. Raises IndexError if there is no such queue.
        """
        queue = self.queues[index]
        element = self.half_sent(index)
        if queue.packed is None:
            return (queue.last_avail - (element is not None)) & 0xFFFF
        position, wrap = queue.packed.last_avail, queue.packed.avail_wrap
        if element is not None and (position := position - (element.descriptors or 1)) < 0:
            position, wrap = position + queue.num, not wrap
        return position | wrap << 15


@dataclass(frozen=True, slots=True)
class QemuStream(_Plain):
    """A migration file: its machine (None if it does not say), and every virtio-serial device, in the file's order.

    ``described`` tells whether the file ended with the description that each section was checked against.
    """

    derived = ("consistent",)

    size: int
    machine: str | None
    capabilities: tuple[str, ...]
    page_size: int | None
    described: bool
    devices: tuple[QemuDevice, ...]
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What contradicts itself, in the file or in a device."""
        everything = [*self.findings, *(finding for device in self.devices for finding in device.findings)]
        return tuple(finding for finding in everything if finding.severity is Severity.ERROR)

    @property
    def consistent(self) -> bool:
        """There is no such thing: it may be restored from."""
        return not self.errors


# -- what does not fit together: R-MIG-15, R-MIG-18, R-MIG-19, R-MIG-24 ------------------------------------------------


def inconsistencies(device: QemuDevice) -> Iterator[Finding]:
    """What a destination would refuse, or be surprised by."""
    for check in _device_troubles, _queue_troubles, _port_troubles, _map_troubles:
        for what, rule in check(device):
            yield Finding(Severity.ERROR, what, rule)
    if device.version < 3:
        what = f"version {device.version} of the section: current QEMU accepts only 3"
        yield Finding(Severity.WARNING, what, "R-MIG-16")
    if device.packed and any(port.throttled for port in device.ports):
        what = "a throttled port with packed rings: QEMU 10 and 11 die when they load such a file"
        yield Finding(Severity.WARNING, what, "R-MIG-15")
    if device.broken:
        yield Finding(Severity.WARNING, "QEMU has given this device up as broken by its driver", "R-MIG-17")


_Troubles = Iterator[tuple[str, str]]
"""What is wrong, and the rule."""


def _device_troubles(device: QemuDevice) -> _Troubles:
    if device.bus.kind == "pci" and device.bus.ids not in ((0x1AF4, 0x1003), (0x1AF4, 0x1043)):
        vendor, function = device.bus.ids
        yield f"PCI calls it {vendor:04x}:{function:04x}; a virtio console is 1af4:1003 or 1af4:1043", "R-CON-01"
    if len(device.queues) != queue_count(device.max_ports):
        yield f"{len(device.queues)} queues: there have to be two for each port and two for control", "R-MIG-12"
    if device.packed and not device.features & _VERSION_1:
        yield "packed rings need VERSION_1, which was not negotiated", "R-MIG-17"


def _queue_troubles(device: QemuDevice) -> _Troubles:
    for queue in device.queues:
        if not 0 < queue.num <= SEGMENTS_MAX:
            yield f"queue {queue.index}: {queue.num} entries, and 1 to {SEGMENTS_MAX} are possible", "R-MIG-24"
        elif queue.packed and queue.packed.in_use > queue.num:
            yield f"queue {queue.index}: {queue.packed.in_use} of {queue.num} entries are in use", "R-MIG-18"
        elif queue.packed and max(queue.packed.last_avail, queue.packed.used) >= queue.num:
            yield f"queue {queue.index}: its indices point outside its {queue.num} entries", "R-MIG-18"


def _port_troubles(device: QemuDevice) -> _Troubles:
    seen: set[int] = set()
    for port in device.ports:
        if port.id in seen:
            yield f"port {port.id} is there twice", "R-MIG-19"
        seen.add(port.id)
        if port.id >= device.max_ports:
            yield f"port {port.id} on a device with {device.max_ports} ports", "R-MIG-19"
        if port.guest_connected and not device.status & Status.DRIVER_OK:
            yield f"port {port.id} is open in a guest that has no driver for it", "R-MIG-13"
        if port.guest_connected and port.id and not device.features & _MULTIPORT:
            yield f"port {port.id} is open in a guest that knows port 0 only, without MULTIPORT", "R-CON-37"
        if port.element:
            yield from _element_troubles(device, port.id, port.element)


def _element_troubles(device: QemuDevice, id: int, element: QemuElement) -> _Troubles:
    queue = device.queues[tx_queue(id)] if tx_queue(id) < len(device.queues) else None
    if queue and not queue.desc and device.status & Status.DRIVER_OK:
        yield f"port {id}: it has a half-consumed chain in queue {queue.index}, which is not set up", "R-MIG-24"
    if queue and not device.packed and element.head >= queue.num:
        yield f"port {id}: its chain begins at descriptor {element.head} of {queue.num}", "R-MIG-24"
    if queue and element.out_num > queue.num > 0 and not device.features & 1 << 28:
        yield f"port {id}: its chain has {element.out_num} segments in a queue of {queue.num}", "R-MIG-24"
    if element.in_num:
        yield f"port {id}: {element.in_num} segments of its chain are for the device to write", "R-MIG-24"
    if element.iov_idx >= len(element.segments):
        yield f"port {id}: it goes on in segment {element.iov_idx} of {len(element.segments)}", "R-MIG-24"
    elif element.iov_offset > element.segments[element.iov_idx].length:
        yield f"port {id}: it goes on behind the end of segment {element.iov_idx}", "R-MIG-24"
    if any(segment.gpa + segment.length > 1 << 64 for segment in element.segments):
        yield f"port {id}: its chain does not lie in 64 bits of address space", "R-MIG-24"
    if any(segment.length > _SEGMENT_MAX for segment in element.segments):
        yield f"port {id}: its chain has a segment that is longer than a descriptor can say", "R-MIG-24"


def _map_troubles(device: QemuDevice) -> _Troubles:
    """Bit 0 is set whether or not there is a port 0."""
    if device.version < 2:
        return
    plugged = sum({1 << port.id for port in device.ports if port.id < device.max_ports}) | 1
    for id in range(device.max_ports):
        if (device.ports_map ^ plugged) >> id & 1:
            where = "in the map of ports but has no state" if device.ports_map >> id & 1 else "not in the map of ports"
            yield f"port {id} is {where}", "R-MIG-19"
    if device.ports_map >> device.max_ports:
        yield f"the map of ports goes beyond the {device.max_ports} that there are", "R-MIG-19"
