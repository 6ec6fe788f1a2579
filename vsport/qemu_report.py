"""What is in QEMU's migration files, told to people and to programs, and what it means for each port after a move."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vsport.qemu_device import Finding, QemuDevice, QemuElement, QemuPort, QemuStream, Severity, Status
from vsport.report import Report, facts, meanings, paragraph, size, table

__all__ = ["qemu_report"]


def qemu_report(path: Path, stream: QemuStream) -> Report:
    """What is in QEMU's migration file ``path``, and what that means for each port after a move."""
    return Report("\n".join(_text(path, stream)), list(_objects(path, stream)))


def _objects(path: Path, stream: QemuStream) -> Iterator[dict[str, object]]:
    """The file, then each device with its ports, then what was found."""
    file = stream.as_dict()
    devices, findings = file.pop("devices"), file.pop("findings")
    yield {"type": "file", "format": "qemu-migration", "path": str(path), **file}
    assert isinstance(devices, list)
    assert isinstance(findings, list)
    found = [(None, finding) for finding in findings]
    for device in devices:
        ports, own = device.pop("ports"), device.pop("findings")
        found += [(device["idstr"], finding) for finding in own]
        yield {"type": "device", **device}
        for port in ports:
            yield {"type": "port", "device": device["idstr"], **port}
    for idstr, finding in found:
        yield {"type": "finding", "device": idstr, **finding}


def _text(path: Path, stream: QemuStream) -> Iterator[str]:
    machine = f"a virtual machine of type {stream.machine}" if stream.machine else "a virtual machine of unknown type"
    yield from paragraph(f"{path}: a migration file of QEMU, {size(stream.size)}: {machine} at the moment it stopped.")
    if stream.capabilities:
        yield f"It was made with: {', '.join(stream.capabilities)}."
    if not stream.devices:
        yield from ("", "It has no virtio-serial device.")
    for device in stream.devices:
        yield ""
        yield from _device_text(device)
    yield ""
    yield from _findings_text(stream)


def _device_text(device: QemuDevice) -> Iterator[str]:
    yield f"virtio-serial device {_place(device)}"
    ready = "is running" if device.status & Status.DRIVER_OK else "is not running: nothing in the guest uses the device"
    live = sum(1 for queue in device.queues if queue.desc)
    layout = "packed" if device.packed else "split"
    yield from facts(
        ("driver", ready),
        ("features", " ".join(device.feature_names) or "none"),
        ("queues", f"{len(device.queues)}, of which the driver has set up {live} ({layout})"),
        ("ports", f"{len(device.ports)} of {device.max_ports}; their names are not in the file"),
        ("section", f"{device.size} bytes at byte {device.offset}, version {device.version}"),
    )
    if device.ports:
        yield ""
        yield from table([("port", "guest", "host", "waiting for the host"), *map(_row, device.ports)], indent=2)
        yield ""
        yield from meanings((port.id, meaning) for port in device.ports for meaning in _meanings(port))


def _place(device: QemuDevice) -> str:
    where = device.idstr.removesuffix("virtio-console").removesuffix("/") or "at an unnamed place"
    return f"{where} ({device.bus.kind.upper()})"


def _row(port: QemuPort) -> tuple[str, str, str, str]:
    return (
        str(port.id),
        "open" if port.guest_connected else "closed",
        "connected" if port.host_connected else "absent",
        f"{port.element.bytes_left} of {port.element.bytes_total} bytes" if port.element else "-",
    )


_MEANINGS = {
    (True, True): (
        "open in the guest, and the host was connected. After the move the new back end has to be told that the guest "
        "has it open: it did not see that happen, and otherwise stays silent (the bug of 2011)."
    ),
    (True, False): (
        "open in the guest, no host at save time. After the move the back end has to be told that the guest has it "
        "open, so that whoever connects is served at once (the bug of 2011)."
    ),
    (False, True): (
        "closed in the guest, the host was connected. If the host is not there after the move, the guest has to be "
        "told so."
    ),
    (False, False): "nobody at either end. There is nothing to bring over.",
}
"""What (guest_connected, host_connected) mean for the move (R-MIG-20)."""


def _meanings(port: QemuPort) -> Iterator[str]:
    yield _MEANINGS[port.guest_connected, port.host_connected]
    if port.element:
        yield _throttled(port.element)


def _throttled(element: QemuElement) -> str:
    at = "" if element.resumes_at is None else f", from guest address {element.resumes_at:#x} on"
    return (
        f"throttled: the host had stopped reading, {element.bytes_taken} bytes into a chain of {element.bytes_total}. "
        f"The {element.bytes_left} bytes that are left have to follow exactly once{at}."
    )


def _findings_text(stream: QemuStream) -> Iterator[str]:
    found = [("", finding) for finding in stream.findings]
    found += [(f"{_place(device)}: ", finding) for device in stream.devices for finding in device.findings]
    if not found:
        yield "Nothing in it contradicts itself."
    for where, finding in sorted(found, key=lambda item: list(Severity).index(item[1].severity)):
        yield from paragraph(f"{finding.severity.value}: {where}{_sentence(finding)}", indent=2)
    if not stream.consistent:
        yield "Do not restore a device from this file."


def _sentence(finding: Finding) -> str:
    return finding.what + (f" (at byte {finding.offset})" if finding.offset is not None else "")
