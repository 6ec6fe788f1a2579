"""`vsport inspect`: files that hold a device's state, and the table of connections, told to people and to programs.

A kind of file is known by its first bytes. FORMATS has a reader for each, which makes a Report: text for one screen,
written for somebody who has never seen the code, and objects for ``--json``, one for each line.
"""

from __future__ import annotations

import json
import os
import stat
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vsport.connection import TABLE, Cause, Effect, Refused, State, Transition
from vsport.errors import HostError
from vsport.qemu_device import Finding, QemuDevice, QemuElement, QemuPort, QemuStream, Severity, Status
from vsport.qemu_stream import MAGIC as QEMU_MAGIC
from vsport.qemu_stream import Image, StreamError, read_stream

__all__ = ["FORMATS", "STATES_FORMATS", "FileImage", "Report", "describe", "qemu_report", "states"]

_WIDTH = 100
_MAGIC_SIZE = 16


@dataclass(frozen=True, slots=True)
class Report:
    """What a file holds: for people, and one JSON object for each thing in it, the file itself first."""

    text: str
    objects: Sequence[dict[str, object]]

    def json_lines(self) -> str:
        """One object a line; ``type`` says of what, and keys are never renamed."""
        return "\n".join(json.dumps(item) for item in self.objects)


class FileImage:
    """An Image of an open file. It is not mapped: a file that shrinks meanwhile would end the process by a signal."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.size = os.lseek(fd, 0, os.SEEK_END)

    def read(self, offset: int, size: int) -> bytes:
        pieces = []
        while size > 0 and (piece := os.pread(self._fd, size, offset)):
            pieces.append(piece)
            offset, size = offset + len(piece), size - len(piece)
        return b"".join(pieces)


def describe(path: str | os.PathLike[str]) -> Report:
    """Reads a file of a kind that FORMATS knows. Raises HostError, with one line that says what is wrong with it."""
    path = Path(path)
    with _opened(path) as image:
        magic = image.read(0, _MAGIC_SIZE)
        for start, report in FORMATS.items():
            if magic.startswith(start):
                try:
                    return report(path, image)
                except StreamError as exc:
                    raise HostError(f"{path}: {exc}; the file is damaged or cut short") from exc
    raise HostError(f"{path}: {_unknown(magic)}")


@contextmanager
def _opened(path: Path) -> Iterator[FileImage]:
    try:
        # Nothing hangs on a pipe that nobody writes to.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as exc:
        raise HostError(f"{path}: {getattr(exc, 'strerror', None) or exc}") from exc
    try:
        if not (stat.S_ISREG(mode := os.fstat(fd).st_mode) or stat.S_ISBLK(mode)):
            raise HostError(f"{path}: not a regular file; write what comes out of a pipe to a file first")
        yield FileImage(fd)
    except OSError as exc:
        raise HostError(f"{path}: cannot be read: {exc.strerror}") from exc
    finally:
        os.close(fd)


_COUSINS = {
    b"\x1f\x8b": "is compressed by gzip: unpack it first (gzip -dc)",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd: unpack it first (zstd -dc)",
    b"\xfd7zXZ": "is compressed by xz: unpack it first (xz -dc)",
    b"BZh": "is compressed by bzip2: unpack it first (bzip2 -dc)",
    b"LibvirtQemudSave": "is a save image of libvirt: QEMU's stream is behind libvirt's header; cut that off first",
    b"QFI\xfb": "is a qcow2 disk: its snapshots cannot be read here; use QEMU's migrate to make a file",
    b"\x7fELF": "is a memory dump or a program; use QEMU's migrate to make a file",
}
"""What people have in their hands instead."""


def _unknown(magic: bytes) -> str:
    if not magic:
        return "is empty"
    for start, what in _COUSINS.items():
        if magic.startswith(start):
            return what
    return f"begins with {magic[:8]!r}, and is no file that vsport knows (such as QEMU writes with migrate file:PATH)"


# -- QEMU's migration files --------------------------------------------------------------------------------------------


def _read_qemu(path: Path, image: Image) -> Report:
    return qemu_report(path, read_stream(image))


def qemu_report(path: Path, stream: QemuStream) -> Report:
    """What is in QEMU's migration file ``path``, and what that means for each port after a move."""
    return Report("\n".join(_qemu_text(path, stream)), list(_qemu_objects(path, stream)))


def _qemu_objects(path: Path, stream: QemuStream) -> Iterator[dict[str, object]]:
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


def _qemu_text(path: Path, stream: QemuStream) -> Iterator[str]:
    machine = f"a virtual machine of type {stream.machine}" if stream.machine else "a virtual machine of unknown type"
    yield from _paragraph(
        f"{path}: a migration file of QEMU, {_bytes(stream.size)}: {machine} at the moment it stopped."
    )
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
    yield f"  driver     {ready}"
    yield from _paragraph("  features   " + (" ".join(device.feature_names) or "none"), indent=13)
    live = sum(1 for queue in device.queues if queue.desc)
    layout = "packed" if device.packed else "split"
    yield f"  queues     {len(device.queues)}, of which the driver has set up {live} ({layout})"
    yield f"  ports      {len(device.ports)} of {device.max_ports}; their names are not in the file"
    yield f"  section    {device.size} bytes at byte {device.offset}, version {device.version}"
    if device.ports:
        yield ""
        yield from _ports_text(device)


def _place(device: QemuDevice) -> str:
    where = device.idstr.removesuffix("virtio-console").removesuffix("/") or "at an unnamed place"
    return f"{where} ({device.bus.kind.upper()})"


def _ports_text(device: QemuDevice) -> Iterator[str]:
    """A line for each port; then each explanation once, since many ports are in the same state."""
    rows = [("port", "guest", "host", "waiting for the host")]
    rows += [(str(port.id), *_port_words(port)) for port in device.ports]
    yield from _table(rows, indent=2)
    yield ""
    meanings: dict[str, list[int]] = {}
    for port in device.ports:
        for meaning in _meanings(port):
            meanings.setdefault(meaning, []).append(port.id)
    for meaning, ids in meanings.items():
        yield from _paragraph(f"  {_ports(ids)}: {meaning}", indent=4)


def _port_words(port: QemuPort) -> tuple[str, str, str]:
    return (
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


def _ports(ids: Sequence[int]) -> str:
    return f"port {ids[0]}" if len(ids) == 1 else f"ports {', '.join(map(str, ids))}"


def _findings_text(stream: QemuStream) -> Iterator[str]:
    found = [("", finding) for finding in stream.findings]
    found += [(f"{_place(device)}: ", finding) for device in stream.devices for finding in device.findings]
    if not found:
        yield "Nothing in it contradicts itself."
    for where, finding in sorted(found, key=lambda item: list(Severity).index(item[1].severity)):
        yield from _paragraph(f"{finding.severity.value}: {where}{_sentence(finding)}", indent=2)
    if not stream.consistent:
        yield "Do not restore a device from this file."


def _sentence(finding: Finding) -> str:
    return finding.what + (f" (at byte {finding.offset})" if finding.offset is not None else "")


def _bytes(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB" if size >= 1 << 20 else f"{size} bytes"


FORMATS: dict[bytes, Callable[[Path, Image], Report]] = {QEMU_MAGIC: _read_qemu}
"""The readers of files, by the bytes that these begin with."""


# -- the connection table ----------------------------------------------------------------------------------------------


def states(format: str = "table") -> str:
    """connection.TABLE as text: one of STATES_FORMATS. Raises KeyError for another."""
    return "\n".join(STATES_FORMATS[format]())


def _states_table() -> Iterator[str]:
    """Every pair of state and cause, and what follows from it."""
    yield "The states of a port: which of its three bits are set."
    bits = [(state.name, *_bits(state)) for state in State]
    yield from _table([("state", "host_connected", "device_ready", "guest_connected"), *bits], indent=2)
    yield ""
    yield "What happens, and what is done about it, in this order."
    rows = [("state", "cause", "next state", "effects")]
    for state in State:
        rows += [_row(state, cause) for cause in Cause if (state, cause) in TABLE]
    yield from _table(rows, indent=2)


def _bits(state: State) -> tuple[str, str, str]:
    host, ready, guest = (
        "yes" if bit else "-" for bit in (state.host_connected, state.device_ready, state.guest_connected)
    )
    return host, ready, guest


def _row(state: State, cause: Cause) -> tuple[str, str, str, str]:
    outcome = TABLE[state, cause]
    if isinstance(outcome, Refused):
        return state.name, cause.value, "refused", f"{outcome.what} ({outcome.rule})"
    following = "-" if outcome.state is state else outcome.state.name
    return state.name, cause.value, following, _effects(outcome.effects) or "-"


def _effects(effects: Iterable[Effect]) -> str:
    return ", ".join(effect.name.lower().replace("_", " ") for effect in effects)


def _arrows() -> Iterator[tuple[State, Cause, Transition]]:
    """The pairs that a diagram shows: those that change or do something."""
    for (state, cause), outcome in TABLE.items():
        if isinstance(outcome, Transition) and (outcome.state is not state or outcome.effects):
            yield state, cause, outcome


def _states_mermaid() -> Iterator[str]:
    yield "stateDiagram-v2"
    for state in State:
        yield f"    {state.name}: {_label(state, ' · ')}"
    for state, cause, outcome in _arrows():
        label = f"{cause.value} / {_effects(outcome.effects)}" if outcome.effects else cause.value
        yield f"    {state.name} --> {outcome.state.name}: {label}"


def _states_dot() -> Iterator[str]:
    yield "digraph connection {"
    yield "    node [shape=box, style=rounded];"
    for state in State:
        yield f'    {state.name} [label="{_label(state, chr(92) + "n")}"];'
    for state, cause, outcome in _arrows():
        label = "\\n".join(filter(None, (cause.value, _effects(outcome.effects))))
        yield f'    {state.name} -> {outcome.state.name} [label="{label}"];'
    yield "}"


def _label(state: State, separator: str) -> str:
    """The state's name and what is true in it."""
    bits = {"host": state.host_connected, "driver": state.device_ready, "guest": state.guest_connected}
    present = " ".join(name for name, is_set in bits.items() if is_set)
    return f"{state.name}{separator}{present or 'nobody'}"


STATES_FORMATS: dict[str, Callable[[], Iterator[str]]] = {
    "table": _states_table,
    "mermaid": _states_mermaid,
    "dot": _states_dot,
}
"""The forms that states() has."""


# -- layout ------------------------------------------------------------------------------------------------------------


def _table(rows: Sequence[Sequence[str]], *, indent: int) -> Iterator[str]:
    """Aligned columns; the first row is their heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield " " * indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _paragraph(text: str, *, indent: int = 0) -> list[str]:
    """Broken into lines, which are indented from the second one on."""
    return textwrap.wrap(text, _WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
