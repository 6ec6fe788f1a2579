"""A device that QEMU has saved, as a Snapshot: what it takes to go on with its guest here (R-MIG-10 to 24).

What QEMU does not save is derived, so that a wrong guess is harmless:

- *Whether the driver has asked for its ports* (DEVICE_READY): it has if anything ever went over a control queue. Then
  QEMU has told it of every port, and each counts as called ready (PORT_READY). A driver that was just about to say so
  says it still and is answered; the other guess would leave a port that is in use dead.
- *The hosts' sessions*: a host that was there is in its first one.
- *Names and sizes of terminals*: they are the target's, which is therefore to be set up as QEMU's command line was
  (R-MIG-19). QEMU does not compare them either.
- *Control messages that wait*: there are none, QEMU drops what the guest has no buffer for (R-MIG-22).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from vsport.connection import State
from vsport.constants import PORTS_MAX, QUEUE_CONTROL_RX, QUEUE_CONTROL_TX, Feature
from vsport.device import SerialDevice
from vsport.document import DocumentError
from vsport.qemu_device import QemuDevice, QemuPort, QemuQueue, QemuStream, Status, feature_names
from vsport.snapshot import PortConfig, PortState, QueueState, Snapshot

__all__ = ["FromQemu", "GuestMemory", "QueueSetup", "from_qemu"]

_ANY_LAYOUT, _RING_RESET = 1 << 27, 1 << 40
_NOT_OURS = _ANY_LAYOUT | _RING_RESET
"""Features that a driver may go on to believe in: the first is always so here, the second is between it and the VMM."""


@dataclass(frozen=True, slots=True)
class QueueSetup:
    """Where the driver has put queue ``index``, and where the device goes on in it.

    ``desc``, ``avail`` and ``used`` are guest-physical. ``DeviceQueue.start(memory, size, desc, avail, used, base=base,
    reset=False, ...)`` wants them as front-end addresses, and comes after SerialDevice.restore().
    """

    index: int
    size: int
    desc: int
    avail: int
    used: int
    base: int

    @property
    def parts(self) -> tuple[int, int, int]:
        return self.desc, self.avail, self.used


@dataclass(frozen=True, slots=True)
class FromQemu:
    """What is to be given to SerialDevice.restore(), and the queues that are to be started then."""

    snapshot: Snapshot
    queues: tuple[QueueSetup, ...]


class GuestMemory(Protocol):
    """What a _ring.Memory can do, among others."""

    def read(self, gpa: int, size: int) -> bytes:
        """Raises IndexError if a part of it is not there."""


def from_qemu(
    stream: QemuStream,
    ports: Mapping[int, PortConfig],
    *,
    idstr: str | None = None,
    memory: GuestMemory | None = None,
) -> FromQemu:
    """Converts the device ``idstr`` of a migration file, which may be left out if there is one device only.

    ``ports`` are the target's, by id: the same as in the file. With the guest's ``memory``, where it is there already,
    the rings in it are checked, too (R-MIG-18); without, the start of each queue does that. Raises DocumentError, which
    says what is wrong with the file, or with the target, and what to do about it.
    """
    _check_consistent(stream)
    device = _choose(stream, idstr)
    try:
        _check_device(device)
        _check_ports(device, ports)
        queues = tuple(_setup(device, queue) for queue in _live_queues(device))
        if memory is not None:
            for setup in queues:
                _check_ring(device, setup, memory)
    except DocumentError as exc:
        raise DocumentError(f"{device.idstr}: {exc}") from None
    return FromQemu(_snapshot(device, ports, queues), queues)


# -- which device ------------------------------------------------------------------------------------------------------


def _check_consistent(stream: QemuStream) -> None:
    """A file that contradicts itself may also be wrong where nobody can see it."""
    for finding in stream.errors:
        raise DocumentError(f"the file contradicts itself: {finding.what} ({finding.rule}); let QEMU write it anew")


def _choose(stream: QemuStream, idstr: str | None) -> QemuDevice:
    names = ", ".join(device.idstr for device in stream.devices)
    if not names:
        raise DocumentError("there is no virtio-serial device in the file")
    if idstr is None and len(stream.devices) > 1:
        raise DocumentError(f"there are {len(stream.devices)} devices in the file, say which one: {names}")
    for device in stream.devices:
        if idstr in (None, device.idstr):
            return device
    raise DocumentError(f"there is no device {idstr!r} in the file, which has: {names}")


# -- what cannot be gone on with ---------------------------------------------------------------------------------------


def _check_device(device: QemuDevice) -> None:
    if device.version < 3:
        raise DocumentError(
            f"version {device.version} of its section does not say what was half sent; let a newer QEMU write it"
        )
    if device.max_ports > PORTS_MAX:
        raise DocumentError(f"it has max_ports={device.max_ports}, and {PORTS_MAX} are possible here (R-VU-22)")
    if device.broken or device.status & Status.DEVICE_NEEDS_RESET:
        raise DocumentError("QEMU has given it up as broken by its driver; reset it in the guest, and save again")
    if device.packed:
        raise DocumentError("its driver uses packed rings; start the guest with packed=off")
    if lacking := device.features & ~(int(SerialDevice.OFFERED) | _NOT_OURS):
        names = " ".join(feature_names(lacking))
        raise DocumentError(f"its driver uses features that are not there: {names}; start the guest without them")
    if not device.features & Feature.VERSION_1 and _speaks_big_endian(device):
        raise DocumentError("its driver is a legacy one of a big-endian guest, whose byte order is not known here")


def _speaks_big_endian(device: QemuDevice) -> bool:
    """QEMU keeps the configuration space as the driver read it: max_nr_ports in the guest's order (R-CON-05)."""
    field = device.config[4:8]
    return int.from_bytes(field, "big") == device.max_ports != int.from_bytes(field, "little")


def _check_ports(device: QemuDevice, ports: Mapping[int, PortConfig]) -> None:
    """R-MIG-19: the same ports at both ends, by id."""
    if any(config.id != id for id, config in ports.items()):
        raise ValueError("ports: each key has to be the id of its port")
    here, there = set(ports), {port.id for port in device.ports}
    if missing := sorted(there - here):
        raise DocumentError(f"the target lacks {_ports(missing)}, which the file has; plug the same ports, by their nr")
    if surplus := sorted(here - there):
        raise DocumentError(f"the target has {_ports(surplus)}, which the file lacks; plug them after the restore")


def _ports(ids: list[int]) -> str:
    return f"port{'s' * (len(ids) > 1)} {', '.join(map(str, ids))}"


# -- queues ------------------------------------------------------------------------------------------------------------

_PARTS = (("descriptor table", 16, 0, 16), ("available ring", 2, 6, 2), ("used ring", 4, 6, 8))
"""Name, alignment, and size in bytes: fixed and for each entry (2.7, R-RING-04)."""


def _live_queues(device: QemuDevice) -> Iterator[QemuQueue]:
    """Those that the driver has set up. One that has not finished, or has given up, has none."""
    if device.status & Status.DRIVER_OK:
        yield from (queue for queue in device.queues if queue.desc)


def _setup(device: QemuDevice, queue: QemuQueue) -> QueueSetup:
    index, size = queue.index, queue.num
    if size & (size - 1):
        raise DocumentError(f"queue {index}: size {size} is no power of two (R-RING-01)")
    setup = QueueSetup(index, size, queue.desc, queue.avail, queue.used, device.queue_base(index))
    for (part, align, fixed, each), gpa in zip(_PARTS, setup.parts, strict=True):
        if gpa % align or gpa + fixed + each * size > 1 << 64:
            raise DocumentError(f"queue {index}: its {part} is at {gpa:#x}, where none can be (R-RING-04)")
    return setup


def _check_ring(device: QemuDevice, setup: QueueSetup, memory: GuestMemory) -> None:
    """What only guest memory shows: as many chains are on their way as fit, and the half-sent one is the next."""
    _, avail, used = (
        _read(memory, setup.index, part, gpa, fixed + each * setup.size)
        for (part, _, fixed, each), gpa in zip(_PARTS, setup.parts, strict=True)
    )
    avail_idx, used_idx = (int.from_bytes(ring[2:4], "little") for ring in (avail, used))
    last_avail = device.queues[setup.index].last_avail
    offered, in_use = (avail_idx - last_avail) & 0xFFFF, (last_avail - used_idx) & 0xFFFF
    if max(offered, in_use) > setup.size:
        at = f"{last_avail} of the available ring, which is at {avail_idx}, the used ring at {used_idx}"
        raise DocumentError(f"queue {setup.index}: it is at {at}: this is not the memory of that guest (R-MIG-18)")
    (head,) = struct.unpack_from("<H", avail, 4 + 2 * (setup.base % setup.size))
    element = device.half_sent(setup.index)
    if element is not None and (in_use == 0 or element.head != head):
        what = f"the half-sent chain begins at {element.head}, and of {in_use} in use the last at {head}"
        raise DocumentError(f"queue {setup.index}: {what}: this is not the memory of that guest (R-MIG-24)")


def _read(memory: GuestMemory, index: int, part: str, gpa: int, size: int) -> bytes:
    try:
        return memory.read(gpa, size)
    except IndexError:
        raise DocumentError(f"queue {index}: its {part} at {gpa:#x} is not in guest memory (R-MIG-24)") from None


# -- the snapshot ------------------------------------------------------------------------------------------------------


def _snapshot(device: QemuDevice, ports: Mapping[int, PortConfig], queues: tuple[QueueSetup, ...]) -> Snapshot:
    known = _known_ports(device)
    return Snapshot(
        max_ports=device.max_ports,
        cols=device.cols,
        rows=device.rows,
        features=device.features & ~_NOT_OURS,
        driver_ready=_has_asked(device),
        queues=tuple(_queue_state(device, setup) for setup in queues),
        ports=tuple(
            _port_state(port, ports[port.id], known=port.id in known)
            for port in sorted(device.ports, key=lambda port: port.id)
        ),
    )


def _queue_state(device: QemuDevice, setup: QueueSetup) -> QueueState:
    """The chain that QEMU has taken is taken once more, and what the host has of it is skipped (R-MIG-21, R-MIG-24)."""
    element = device.half_sent(setup.index)
    return QueueState(setup.index, setup.size, setup.base, element.bytes_taken if element else 0)


def _has_asked(device: QemuDevice) -> bool:
    """Whether the driver has said DEVICE_READY, by the traces that it leaves: its own message, or an answer."""
    if not (device.status & Status.DRIVER_OK and device.features & Feature.MULTIPORT):
        return False
    control = (device.queues[index].last_avail for index in (QUEUE_CONTROL_RX, QUEUE_CONTROL_TX))
    return any(control) or any(port.guest_connected for port in device.ports)


def _known_ports(device: QemuDevice) -> set[int]:
    """The ports that the driver has called ready. One without MULTIPORT never says so, and has port 0 (R-CON-37)."""
    if device.features & Feature.MULTIPORT:
        return {port.id for port in device.ports} if _has_asked(device) else set()
    return {port.id for port in device.ports if port.guest_connected}


def _port_state(port: QemuPort, config: PortConfig, *, known: bool) -> PortState:
    state = State((port.host_connected, known, port.guest_connected))
    return PortState(config, state, added=known, session=int(port.host_connected))
