"""What QEMU wrote about its own virtio-serial devices: the virtio-console sections of a migration file.

A migration file is a sequence of sections that say what they are but not how long they are (R-MIG-01 to 05). Guest RAM
comes first and is most of the file; devices follow; a description in JSON, which knows the length of each device's
section, ends the file unless QEMU was told to leave it out. So the search goes backwards from the end: it meets the
devices before the RAM, in which look-alikes may lie.

Everything in the file is untrusted. Nothing is read by a length that the file claims before it is known to be there,
and every loop has a bound of its own. What is no migration file, or holds no section that can be decoded, raises
StreamError; what can be decoded but contradicts itself is returned with a Finding, because somebody who looks into a
broken file wants to see the rest. Numbers are big endian, but for one structure (R-MIG-14).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple, Protocol

from vsport.constants import queue_count
from vsport.errors import VsportError
from vsport.qemu_device import (
    QUEUES_MAX,
    SEGMENTS_MAX,
    Finding,
    PackedState,
    QemuBus,
    QemuDevice,
    QemuElement,
    QemuPort,
    QemuQueue,
    QemuStream,
    Segment,
    Severity,
    Status,
    inconsistencies,
)

__all__ = ["MAGIC", "BytesImage", "Image", "StreamError", "read_stream"]

MAGIC = b"QEVM"
VERSION = 3
"""R-MIG-01; QEMU has written no other since 2006."""

_NEEDLE = b"virtio-console"
"""What the id string of each section ends with (R-MIG-10)."""
_DESCRIPTION_MAX = 2 << 20
"""Bytes of JSON; what QEMU 11.1 writes for a q35 machine is 66 KiB."""
_MATCHES_MAX = 1 << 14
"""Places that say "virtio-console": a guest's RAM may hold thousands."""
_ATTEMPTS_MAX = 256
"""Of them, those that look like the start of a section and are decoded."""
_RESYNC_MAX = 1 << 20
"""How far behind something unknown the end of its section is looked for."""
_CHUNK = 1 << 20
_PARTS_MAX = 64
"""Subsections in one section; QEMU has about a dozen."""


class StreamError(VsportError):
    """The file is not what QEMU writes: ``offset`` in bytes, what was ``expected`` there, what was ``found``."""

    def __init__(self, offset: int, expected: str, found: str) -> None:
        super().__init__(f"at byte {offset}: expected {expected}, found {found}")
        self.offset = offset
        self.expected = expected
        self.found = found


class Image(Protocol):
    """A file that is read in pieces, so that gigabytes of RAM never become memory of ours."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes, or fewer where the file ends."""


class BytesImage:
    """An Image of bytes that are in memory anyway."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def size(self) -> int:
        return len(self._data)

    def read(self, offset: int, size: int) -> bytes:
        return self._data[offset : offset + size]


# -- reading -----------------------------------------------------------------------------------------------------------


class _Cursor:
    """Reads forwards through an image, never past ``end``."""

    def __init__(self, image: Image, offset: int, end: int) -> None:
        self.image = image
        self.offset = offset
        self.end = end

    def take(self, size: int, what: str) -> bytes:
        """The next ``size`` bytes, which are ``what``; raises StreamError if there are fewer."""
        left = self.end - self.offset
        data = self.image.read(self.offset, size) if size <= left else b""
        if len(data) != size:
            raise StreamError(self.offset, f"{what}, {size} bytes", f"the end after {max(left, 0)}")
        self.offset += size
        return data

    def peek(self, size: int) -> bytes:
        """The next ``size`` bytes, or fewer at the end."""
        return self.image.read(self.offset, max(0, min(size, self.end - self.offset)))

    def unpack(self, layout: str, what: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))

    def number(self, layout: str, what: str) -> int:
        value: int = self.unpack(layout, what)[0]
        return value

    def text(self, what: str) -> str:
        """A string behind a byte with its length."""
        return _printable(self.take(self.number(">B", f"the length of {what}"), what))

    def bounded(self, layout: str, most: int, what: str) -> int:
        """A number that says how much follows; raises StreamError beyond ``most``."""
        at = self.offset
        if (value := self.number(layout, what)) > most:
            raise StreamError(at, f"{what}, {most} at most", str(value))
        return value

    def subsection(self) -> str | None:
        """Steps behind the header of a subsection and returns its name; None if there is none here (R-MIG-17)."""
        if self.peek(1) != b"\x05":
            return None
        self.offset += 1
        name = self.text("a subsection's name")
        self.take(4, "a subsection's version")
        return name


def _printable(data: bytes) -> str:
    """Text that does no harm to a terminal."""
    text = data.decode("ascii", "backslashreplace")
    return "".join(sign if sign.isprintable() else f"\\x{ord(sign):02x}" for sign in text)


def read_stream(image: Image) -> QemuStream:
    """Decodes every virtio-serial device in a migration file.

    Raises StreamError if it is no migration file, or is cut short or damaged so that no device can be decoded. A
    machine that has no virtio-serial device gives a stream without devices.
    """
    machine, capabilities, findings = _read_preamble(image)
    description = _read_description(image, findings)
    devices = _find_devices(image, description, findings)
    return QemuStream(
        size=image.size,
        machine=machine,
        capabilities=capabilities,
        page_size=description.page_size if description else None,
        described=description is not None,
        devices=tuple(sorted(devices, key=lambda device: device.offset)),
        findings=tuple(findings),
    )


def _error(what: str, rule: str, offset: int | None = None) -> Finding:
    return Finding(Severity.ERROR, what, rule, offset)


# -- the start of the file: R-MIG-01, R-MIG-02 -------------------------------------------------------------------------


def _read_preamble(image: Image) -> tuple[str | None, tuple[str, ...], list[Finding]]:
    """The machine's name and the capabilities that the migration was made with."""
    cursor = _Cursor(image, 0, image.size)
    magic, version = cursor.unpack(">4sI", "the header of a QEMU migration file")
    if magic != MAGIC:
        raise StreamError(0, f"{MAGIC!r}, with which QEMU's migration files begin", repr(magic))
    if version != VERSION:
        raise StreamError(4, f"version {VERSION} of the format", f"version {version}")
    if cursor.peek(1) != b"\x07":
        return None, (), []
    try:
        return *_read_configuration(cursor), []
    except StreamError as exc:
        return None, (), [_error(f"the machine's name cannot be read: {exc}", "R-MIG-02", exc.offset)]


def _read_configuration(cursor: _Cursor) -> tuple[str, tuple[str, ...]]:
    cursor.take(1, "the configuration")
    length = cursor.bounded(">I", 255, "the length of the machine's name")
    machine = _printable(cursor.take(length, "the machine's name"))
    capabilities: list[str] = []
    for _ in range(_PARTS_MAX):
        match cursor.subsection():
            case "configuration/capabilities":
                number = cursor.bounded(">I", 255, "the number of capabilities")
                capabilities += [cursor.text("a capability's name") for _ in range(number)]
            case "configuration/target-page-bits":
                cursor.take(4, "the page bits")
            case "configuration/uuid":
                cursor.take(16, "the UUID")
            case _:
                break
    return machine, tuple(capabilities)


# -- the end of the file: R-MIG-04, R-MIG-05 ---------------------------------------------------------------------------


class _Key(NamedTuple):
    """What makes a section unique."""

    idstr: str
    instance: int

    def __str__(self) -> str:
        return self.idstr + (f" (instance {self.instance})" if self.instance else "")


class _Description(NamedTuple):
    """The JSON at the end: where it begins, and the length of each virtio-console section's body."""

    offset: int
    page_size: int | None
    sizes: Mapping[_Key, int]


def _read_description(image: Image, findings: list[Finding]) -> _Description | None:
    begin = max(0, image.size - _DESCRIPTION_MAX)
    tail = image.read(begin, image.size - begin)
    at = len(tail)
    # JSON holds no control characters, so the last byte 6 of the file is the description's type or in its length.
    for _ in range(5):
        if (at := tail.rfind(b"\x06", 0, at)) < 0:
            break
        if tail[at + 5 : at + 6] != b"{":
            continue
        claimed, left = int.from_bytes(tail[at + 1 : at + 5], "big"), len(tail) - at - 5
        if claimed == left:
            return _parse_description(begin + at, tail[at + 5 :], findings)
        if claimed > left:
            findings.append(
                _error(f"the file is cut short: {claimed - left} bytes of its end are missing", "R-MIG-05", begin + at)
            )
            return None
    findings.append(
        Finding(
            Severity.WARNING,
            "the file has no description at its end: QEMU was told to leave it out (suppress-vmdesc), or the file is "
            "cut short or damaged; the devices were found by their looks",
            "R-MIG-05",
        )
    )
    return None


def _parse_description(offset: int, text: bytes, findings: list[Finding]) -> _Description | None:
    try:
        document = json.loads(text)
        page_size = document.get("page_size")
        sizes = dict(_described_sizes(document["devices"], offset))
    # RecursionError is how the parser limits the depth.
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as exc:
        why = f"{type(exc).__name__}: {exc}"
        findings.append(_error(f"the description at the end of the file is damaged: {why}", "R-MIG-05", offset))
        return None
    return _Description(offset, page_size if isinstance(page_size, int) else None, sizes)


def _described_sizes(entries: Any, most: int) -> Iterator[tuple[_Key, int]]:
    """The length of each virtio-console section; raises whatever an entry that is not as it should be leads to."""
    for entry in entries:
        name = entry["name"]
        if not name.endswith(_NEEDLE.decode()):
            continue
        size = entry["fields"][0]["size"]
        if len(name) > 255 or not name.isprintable() or not 0 < size < most:
            raise ValueError(f"a device {name[:99]!r} of {size} bytes")
        yield _Key(name, int(entry["instance_id"])), int(size)


# -- finding sections: R-MIG-03, R-MIG-05, R-MIG-10 --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Header:
    """The header of a section; its body begins at ``body``."""

    offset: int
    body: int
    section_id: int
    key: _Key
    version: int

    @property
    def footer(self) -> bytes:
        return b"\x7e" + self.section_id.to_bytes(4, "big")


def _find_devices(image: Image, description: _Description | None, findings: list[Finding]) -> list[QemuDevice]:
    """Every device of the file. Of several sections with one name the last one counts, even if it is damaged: what
    comes before it is an old copy in RAM."""
    end = description.offset if description else image.size
    sizes = dict(description.sizes) if description else {}
    found: dict[_Key, QemuDevice] = {}
    failed: dict[_Key, StreamError] = {}
    for header in islice(_find_headers(image, end), _ATTEMPTS_MAX):
        key = header.key
        if key in found or key in failed or (description and key not in sizes):
            continue
        try:
            found[key] = _read_section(image, header, end, sizes.get(key))
        except StreamError as exc:
            failed[key] = exc
        if description and found.keys() | failed.keys() >= sizes.keys():
            break
    lost = {key: failed.get(key) for key in (sizes or failed) if key not in found}
    _report_lost(image, lost, nothing_else=not found and not (description and not sizes), findings=findings)
    return list(found.values())


def _report_lost(
    image: Image, lost: Mapping[_Key, StreamError | None], *, nothing_else: bool, findings: list[Finding]
) -> None:
    """Devices that cannot be decoded: findings beside others that can, otherwise StreamError."""
    if nothing_else:
        raise next(filter(None, lost.values()), None) or StreamError(
            image.size, "a virtio-console section", "the end of the file"
        )
    for key, exc in lost.items():
        why = str(exc) if exc else "its section is not in the file"
        findings.append(_error(f"the device {key} cannot be read: {why}", "R-MIG-05", exc.offset if exc else None))


def _find_headers(image: Image, end: int) -> Iterator[_Header]:
    """What looks like the header of a virtio-console section, from ``end`` backwards."""
    for at in islice(_find_backwards(image, _NEEDLE, end), _MATCHES_MAX):
        if header := _header_around(image, at + len(_NEEDLE), end):
            yield header


def _find_backwards(image: Image, needle: bytes, end: int) -> Iterator[int]:
    while end > 0:
        begin = max(0, end - _CHUNK)
        data = image.read(begin, end - begin + len(needle) - 1)
        at = len(data)
        while (at := data.rfind(needle, 0, at + len(needle) - 1)) >= 0:
            yield begin + at
        end = begin


def _header_around(image: Image, name_end: int, end: int) -> _Header | None:
    """The header whose id string ends at ``name_end``; its length tells where it begins."""
    begin = max(0, name_end - 255 - 6)
    data = image.read(begin, name_end - begin)
    for length in range(len(_NEEDLE), len(data) - 5):
        name = data[-length:]
        at = len(data) - length - 6
        if data[at + 5] == length and data[at] in (1, 4) and name.isascii() and name.decode().isprintable():
            tail = image.read(name_end, 8)
            if len(tail) < 8 or name_end + 8 > end:
                return None
            instance, version = struct.unpack(">II", tail)
            section_id = int.from_bytes(data[at + 1 : at + 5], "big")
            return _Header(begin + at, name_end + 8, section_id, _Key(name.decode(), instance), version)
    return None


def _read_section(image: Image, header: _Header, end: int, described: int | None) -> QemuDevice:
    """One section, from its body to its footer. If its description is right about its length, nothing else will do."""
    confirmed = described is not None and image.read(header.body + described, 5) == header.footer
    cursor = _Cursor(image, header.body, header.body + described if described and confirmed else end)
    findings: list[Finding] = []
    device = _read_body(cursor, header, findings, described=described is not None)
    size = cursor.offset - header.body
    if described is not None and size != described:
        what = f"the section is described as {described} bytes long, and is {size}"
        findings.append(_error(what, "R-MIG-05", header.offset))
    findings += inconsistencies(device)
    return replace(device, size=size, findings=tuple(findings))


# -- the body of a section ---------------------------------------------------------------------------------------------


def _read_body(cursor: _Cursor, header: _Header, findings: list[Finding], *, described: bool) -> QemuDevice:
    """The device; leaves ``cursor`` at the section's footer.

    Whether a number stands before a half-consumed chain depends on the ring's layout (R-MIG-15), which the body tells
    only behind it. So both are tried: what is wrong ends elsewhere, or has features that say so.
    """
    trouble: StreamError | None = None
    for packed in (False, True):
        said: list[Finding] = []
        cursor.offset = header.body
        try:
            device = _BodyReader(cursor, header, said, packed=packed).read()
            _check_footer(cursor, header, said, described=described)
        except StreamError as exc:
            trouble = trouble or exc
            continue
        if device.packed == packed or not any(port.throttled for port in device.ports):
            findings += said
            return device
    raise trouble or StreamError(cursor.offset, "chains as the negotiated features have them", "others")


def _check_footer(cursor: _Cursor, header: _Header, findings: list[Finding], *, described: bool) -> None:
    """Raises StreamError unless the section ends where its body does."""
    at = cursor.offset
    footer = cursor.image.read(at, 5)
    if footer == header.footer:
        return
    if not _follows_directly(cursor.image, at):
        raise StreamError(at, f"the footer of section {header.section_id}", footer.hex(" ") or "the end of the file")
    findings.append(_no_footer(at, described=described))


def _no_footer(at: int, *, described: bool) -> Finding:
    """A section that nothing else knows the length of may be the beginning of one, in a file that was cut short."""
    what = "the section has no footer: the machine is of a type of 2015 or before, or the file is damaged"
    if described:
        return Finding(Severity.WARNING, what, "R-MIG-03", at)
    return _error(f"{what}; without a description nothing says that it is whole", "R-MIG-03", at)


def _follows_directly(image: Image, at: int) -> bool:
    """Whether the next section begins here, or the end of all of them."""
    data = image.read(at, 6 + 255)
    if data[:1] in (b"\x01", b"\x04") and len(data) > 6:
        name = data[6 : 6 + data[5]]
        return len(name) == data[5] > 0 and name.isascii() and name.decode().isprintable()
    return data[:1] == b"\x00" and data[1:2] in (b"", b"\x06")


_SUBSECTIONS = {
    "virtio/device_endian": 1,
    "virtio/128bit_features": 8,
    "virtio/64bit_features": 8,
    "virtio/virtqueues": QUEUES_MAX * 16,
    "virtio/ringsize": QUEUES_MAX * 4,
    "virtio/broken": 1,
    "virtio/extra_state": 0,
    "virtio_pci/modern_state": 16 + QUEUES_MAX * 28,
    "virtio_pci/modern_state/features128": 8,
    "virtio_mmio/state": 8 + QUEUES_MAX * 27,
    "virtio/started": 1,
    "virtio/packed_virtqueues": QUEUES_MAX * 10,
    "virtio/disabled": 1,
}
"""The length of each (R-MIG-17). They follow each other; nested ones follow the one that they are in."""


class _Extras(dict[str, bytes]):
    """The subsections of one section, by name."""

    def number(self, name: str) -> int:
        return int.from_bytes(self.get(name, b""), "big")

    def adorn(self, queue: QemuQueue) -> QemuQueue:
        """The same queue with what is known of it here: a modern driver sets each address by itself."""
        if rings := self.get("virtio/virtqueues"):
            avail, used = struct.unpack_from(">QQ", rings, 16 * queue.index)
            if avail or used:
                queue = replace(queue, avail=avail, used=used)
        if packed := self.get("virtio/packed_virtqueues"):
            queue = replace(queue, packed=PackedState(*struct.unpack_from(">H?H?I", packed, 10 * queue.index)))
        return queue


_ELEMENT_SIZE = 49168
_OUT_ADDR, _OUT_SG = 8208, 32784
"""R-MIG-14: offsets in QEMU's structure of a chain, which has room for 1024 segments in each direction."""


class _BodyReader:
    """Reads one body front to back (R-MIG-11 to 17); what is odd about it goes to ``findings``."""

    def __init__(self, cursor: _Cursor, header: _Header, findings: list[Finding], *, packed: bool) -> None:
        self._cursor = cursor
        self._header = header
        self._findings = findings
        self._packed = packed
        self._max_ports = 0

    def read(self) -> QemuDevice:
        """The device, of which nothing but the syntax has been checked; raises StreamError."""
        header, cursor = self._header, self._cursor
        if not 1 <= header.version <= 3:
            raise StreamError(header.body - 4, "a virtio-console section of version 1 to 3", f"{header.version}")
        bus = self._mmio() if "virtio-mmio@" in header.key.idstr else self._pci()
        status, isr, queue_sel, features, config_size = cursor.unpack(">BBHII", "the device's registers")
        if config_size > 256:
            raise StreamError(cursor.offset - 4, "a configuration space of 256 bytes at most", f"{config_size}")
        config = cursor.take(config_size, "the configuration space")
        queues = self._queues(bus)
        self._max_ports = max(len(queues) // 2 - 1, 0)
        cols, rows, ports_map = self._console() if header.version >= 2 else (0, 0, 0)
        ports = self._ports() if header.version >= 2 else ()
        extras = self._subsections()
        return QemuDevice(
            idstr=header.key.idstr,
            instance=header.key.instance,
            version=header.version,
            section_id=header.section_id,
            offset=header.offset,
            size=0,
            bus=bus,
            status=Status(status),
            isr=isr,
            queue_sel=queue_sel,
            features=self._features(features, extras),
            config=config,
            queues=tuple(map(extras.adorn, queues)),
            cols=cols,
            rows=rows,
            max_ports=self._max_ports,
            ports_map=ports_map,
            ports=ports,
            broken=bool(extras.number("virtio/broken")),
            disabled=bool(extras.number("virtio/disabled")),
            started=bool(extras.number("virtio/started")) if "virtio/started" in extras else None,
        )

    def _say(self, what: str, rule: str) -> None:
        self._findings.append(_error(what, rule, self._cursor.offset))

    def _mmio(self) -> QemuBus:
        self._cursor.take(12, "the registers of virtio-mmio")
        return QemuBus("mmio")

    def _pci(self) -> QemuBus:
        """R-MIG-11. Whether there is extended configuration space and MSI-X is told by the capabilities in it."""
        cursor = self._cursor
        at = cursor.offset
        if (version := cursor.number(">i", "the start of a PCI device")) != 2:
            raise StreamError(at, "a PCI device in version 2", f"version {version}")
        config = cursor.take(256, "PCI configuration space")
        capabilities = dict(_pci_capabilities(config))
        if _PCI_EXPRESS in capabilities:
            config += cursor.take(4096 - 256, "extended PCI configuration space")
        intx = cursor.unpack(">4I", "the state of the PCI interrupts")
        if (msix := capabilities.get(_PCI_MSIX)) is None:
            return QemuBus("pci", config, intx)
        vectors = (int.from_bytes(config[msix + 2 : msix + 4], "little") & 0x7FF) + 1
        cursor.take(16 * vectors, "the MSI-X table")
        pending = cursor.take((vectors + 7) // 8, "the pending MSI-X interrupts")
        return QemuBus("pci", config, intx, vectors, pending, cursor.number(">H", "the configuration vector"))

    def _queues(self, bus: QemuBus) -> list[QemuQueue]:
        cursor = self._cursor
        number = cursor.bounded(">I", QUEUES_MAX, "a number of queues")
        return [self._queue(index, bus) for index in range(number)]

    def _queue(self, index: int, bus: QemuBus) -> QemuQueue:
        what = f"queue {index}"
        num, align = self._cursor.number(">I", what), 4096
        if bus.kind == "mmio":
            align = self._cursor.number(">I", what)
        desc, last_avail = self._cursor.unpack(">QH", what)
        vector = self._cursor.number(">H", what) if bus.msix_vectors else None
        return QemuQueue(index, num, desc, *_legacy_layout(num, desc, align), last_avail, vector)

    def _console(self) -> tuple[int, int, int]:
        """R-MIG-13: columns, rows and the map of ports, whose length depends on the number of queues in QEMU too."""
        cols, rows, max_ports = self._cursor.unpack(">HHI", "the console's size")
        if max_ports != self._max_ports:
            queues = queue_count(self._max_ports)
            what = f"{queues} queues are for {self._max_ports} ports, but the number of ports is {max_ports}"
            self._say(what, "R-MIG-13")
        words = (self._max_ports + 31) // 32
        ports_map = 0
        for word, bits in enumerate(self._cursor.unpack(f">{words}I", "the map of ports")):
            ports_map |= bits << 32 * word
        return cols, rows, ports_map

    def _ports(self) -> tuple[QemuPort, ...]:
        number = self._cursor.bounded(">I", max(self._max_ports, 1), "a number of ports")
        return tuple(self._port() for _ in range(number))

    def _port(self) -> QemuPort:
        id, guest, host = self._cursor.unpack(">IBB", "a port")
        if guest > 1 or host > 1:
            self._say(f"port {id}: its connections are {guest} and {host}, and have to be 0 or 1", "R-MIG-13")
        return QemuPort(id, bool(guest), bool(host), self._element(id) if self._header.version >= 3 else None)

    def _element(self, port: int) -> QemuElement | None:
        cursor = self._cursor
        popped = cursor.bounded(">I", 1, "whether a chain is half consumed")
        if not popped:
            return None
        iov_idx, iov_offset = cursor.unpack(">IQ", "the place in a half-consumed chain")
        descriptors = cursor.number(">I", "the length of a chain") if self._packed else None
        data = cursor.take(_ELEMENT_SIZE, "a half-consumed chain")
        head, out_num, in_num, order = _element_counts(data)
        segments = _element_segments(data, out_num, order)
        if out_num > SEGMENTS_MAX:
            self._say(f"port {port}: a chain of {out_num} segments, and {SEGMENTS_MAX} are the most", "R-MIG-24")
        return QemuElement(head, segments, out_num, in_num, iov_idx, iov_offset, descriptors)

    def _subsections(self) -> _Extras:
        extras = _Extras()
        for _ in range(_PARTS_MAX):
            if (name := self._cursor.subsection()) is None:
                return extras
            if (size := _SUBSECTIONS.get(name)) is None:
                self._skip_unknown(name)
                return extras
            extras[name] = self._cursor.take(size, f"the subsection {name}")
        raise StreamError(self._cursor.offset, f"{_PARTS_MAX} subsections at most", "more")

    def _skip_unknown(self, name: str) -> None:
        """A newer QEMU may have more subsections; where they end only the footer tells."""
        cursor, called = self._cursor, f"'{name[:60]}'"  # It is printable already, and endless if the file is damaged.
        ahead = cursor.image.read(cursor.offset, min(_RESYNC_MAX, cursor.image.size - cursor.offset))
        if (distance := ahead.find(self._header.footer)) < 0:
            raise StreamError(cursor.offset, "the end of the section", f"an unknown subsection, {called}")
        what = f"what follows the unknown subsection {called} was not read"
        self._findings.append(Finding(Severity.WARNING, what, "R-MIG-17", cursor.offset))
        cursor.offset += distance

    def _features(self, low: int, extras: _Extras) -> int:
        """The lower half is there twice, if there is more than the lower half."""
        whole = extras.number("virtio/64bit_features")
        if "virtio/64bit_features" in extras and whole & 0xFFFFFFFF != low:
            self._say(f"the features are {low:#x} in one place and {whole:#x} in the other", "R-MIG-17")
        return low | whole | extras.number("virtio/128bit_features") << 64


_PCI_EXPRESS, _PCI_MSIX = 0x10, 0x11


def _pci_capabilities(config: bytes) -> Iterator[tuple[int, int]]:
    """(id, offset) of each capability in the list, which a damaged file may have made a circle."""
    if not config[6] & 0x10:  # The status register's bit that there is a list.
        return
    at = config[0x34] & 0xFC
    for _ in range(48):  # As many as fit between the header and byte 256.
        if not 0x40 <= at <= 0xFC:
            return
        yield config[at], at
        at = config[at + 1] & 0xFC


def _legacy_layout(num: int, desc: int, align: int) -> tuple[int, int]:
    """Where the avail and used rings of a legacy queue are: they have no addresses of their own (2.7.2)."""
    if not desc:
        return 0, 0
    avail = desc + 16 * num
    return avail, (avail + 4 + 2 * num + max(align, 1) - 1) // max(align, 1) * max(align, 1)


def _element_counts(data: bytes) -> tuple[int, int, int, str]:
    """Head, number of segments each way, and the byte order: it is that of the host that wrote it (R-MIG-14)."""
    for order in "<>":
        head, out_num, in_num = struct.unpack_from(f"{order}3I", data)
        if max(out_num, in_num) <= SEGMENTS_MAX:
            return head, out_num, in_num, order
    head, out_num, in_num = struct.unpack_from("<3I", data)
    return head, out_num, in_num, "<"


def _element_segments(data: bytes, out_num: int, order: str) -> tuple[Segment, ...]:
    """The segments that the guest wrote; what it can be read of if there are too many."""
    number = min(out_num, SEGMENTS_MAX)
    addresses = struct.unpack_from(f"{order}{number}Q", data, _OUT_ADDR)
    lengths = struct.unpack_from(f"{order}{2 * number}Q", data, _OUT_SG)[1::2]
    return tuple(map(Segment, addresses, lengths))
