"""QEMU migration files for tests: a writer of our own, and the one that QEMU 11.1 wrote, without its RAM."""

import gzip
import json
import struct
from dataclasses import dataclass, field
from pathlib import Path

from vsport.constants import queue_count
from vsport.qemu_stream import BytesImage, read_stream

RECORDED = Path(__file__).parent / "data" / "qemu-11.1.migration.gz"
"""Made by cut_out() from a file of the lab's QEMU: see tests/data/README.md."""

INDIRECT, VERSION_1, PACKED = 1 << 28, 1 << 32, 1 << 34


def recorded():
    return gzip.decompress(RECORDED.read_bytes())


def cut_out(data):
    """The same file with nothing but its header, its virtio-console sections and their entries in the description."""
    stream = read_stream(BytesImage(data))
    description = json.loads(data[data.rindex(b'{"configuration": ') :])
    description["devices"] = [entry for entry in description["devices"] if entry["name"].endswith("virtio-console")]
    header = 8 + 5 + len(stream.machine)
    sections = [data[device.offset : end_of(device)] for device in stream.devices]
    return data[:header] + b"".join(sections) + b"\x00" + described(description)


def end_of(device):
    """Where the section of `device` ends, its footer included."""
    return device.offset + 1 + 4 + 1 + len(device.idstr) + 8 + device.size + 5


def described(description):
    text = json.dumps(description).encode()
    return b"\x06" + struct.pack(">I", len(text)) + text


# -- written here ------------------------------------------------------------------------------------------------------


@dataclass
class Chain:
    """A half-consumed chain."""

    head: int = 5
    segments: tuple = ((0x1000, 100), (0x5000, 200))
    iov_idx: int = 1
    iov_offset: int = 50
    in_num: int = 0
    descriptors: int = 2
    order: str = "<"

    def write(self, packed):
        numbers = struct.pack(">IQ", self.iov_idx, self.iov_offset)
        raw = bytearray(49168)
        struct.pack_into(f"{self.order}3I", raw, 0, self.head, len(self.segments), self.in_num)
        for i, (gpa, length) in enumerate(self.segments[:1024]):
            struct.pack_into(f"{self.order}Q", raw, 8208 + 8 * i, gpa)
            struct.pack_into(f"{self.order}QQ", raw, 32784 + 16 * i, 0, length)
        return numbers + (struct.pack(">I", self.descriptors) if packed else b"") + bytes(raw)


@dataclass
class Section:
    """A virtio-console section with ports as (id, guest_connected, host_connected, Chain or None)."""

    ports: tuple = ((1, 1, 1, None),)
    max_ports: int = 3
    said_ports: int = None
    idstr: str = "0000:00:04.0/virtio-console"
    id: int = 7
    version: int = 3
    features: int = VERSION_1 | INDIRECT | 2
    status: int = 15
    vectors: int = 2
    express: bool = False
    mmio: bool = False
    num: int = 128
    last_avail: int = 9
    ports_map: int = None
    packed: tuple = (9, True, 8, True, 1)
    subsections: tuple = ()
    footer: bool = True
    element_count: int = None
    pci: dict = field(default_factory=dict)

    def __bytes__(self):
        idstr = self.idstr.encode()
        header = struct.pack(">BIB", 4, self.id, len(idstr)) + idstr + struct.pack(">II", 0, self.version)
        return header + self.body + (b"\x7e" + struct.pack(">I", self.id) if self.footer else b"")

    @property
    def body(self):
        start = bytes(12) if self.mmio else self._pci_start()
        low = self.features & 0xFFFFFFFF
        common = struct.pack(">BBHII", self.status, 1, 2, low, 12) + bytes(12)
        console = self._console() + self._ports() if self.version >= 2 else b""
        return start + common + self._queues() + console + self._subsections()

    def _pci_start(self):
        config = bytearray(4096 if self.express else 256)
        config[:8] = struct.pack("<HHHH", 0x1AF4, 0x1003, 7, 0x10)
        at = 0x34
        if self.vectors:
            config[at], at = 0x98, 0x99
            config[0x98], config[0x9A] = 0x11, self.vectors - 1
        if self.express:
            config[at], at = 0x40, 0x41
            config[0x40] = 0x10
        for place, value in self.pci.items():
            config[place] = value
        tail = bytes(16 * self.vectors + (self.vectors + 7) // 8 + 2) if self.vectors else b""
        return struct.pack(">i", 2) + bytes(config) + bytes(16) + tail

    def _queues(self):
        data = struct.pack(">I", queue_count(self.max_ports))
        for index in range(queue_count(self.max_ports)):
            data += struct.pack(">I", self.num) + (struct.pack(">I", 4096) if self.mmio else b"")
            data += struct.pack(">QH", 0x10000 * (index + 1), self.last_avail)
            data += struct.pack(">H", 1) if self.vectors and not self.mmio else b""
        return data

    def _console(self):
        ports_map = self.ports_map
        if ports_map is None:
            ports_map = 1 | sum({1 << port[0] for port in self.ports})
        words = [ports_map >> shift & 0xFFFFFFFF for shift in range(0, self.max_ports, 32)]
        said = self.max_ports if self.said_ports is None else self.said_ports
        return struct.pack(f">HHI{len(words)}I", 80, 25, said, *words)

    def _ports(self):
        data = struct.pack(">I", len(self.ports) if self.element_count is None else self.element_count)
        for id, guest, host, chain in self.ports:
            data += struct.pack(">IBB", id, guest, host)
            if self.version >= 3:
                data += struct.pack(">I", chain is not None)
                data += chain.write(self.features & PACKED) if chain else b""
        return data

    def _subsections(self):
        parts = list(self.subsections)
        if self.features >> 32:
            parts.append(("virtio/64bit_features", struct.pack(">Q", self.features)))
        if self.features & PACKED:
            parts.append(("virtio/packed_virtqueues", struct.pack(">H?H?I", *self.packed) * 1024))
        return b"".join(subsection(*part) for part in parts)


def subsection(name, data):
    return struct.pack(">BB", 5, len(name)) + name.encode() + struct.pack(">I", 1) + data


def migration_file(*sections, machine="pc-test-1.0", before=b"", parts=b"", describe=True, sizes=None):
    """A file with these sections; `parts` go into its configuration, `before` in front of the first section."""
    name = machine.encode()
    head = b"QEVM" + struct.pack(">IBI", 3, 7, len(name)) + name + parts
    data = head + before + b"".join(map(bytes, sections)) + b"\x00"
    if not describe:
        return data
    sizes = sizes or [len(section.body) for section in sections]
    entries = [
        {
            "name": section.idstr,
            "instance_id": 0,
            "vmsd_name": "virtio-console",
            "version": section.version,
            "fields": [{"name": "virtio", "type": "virtio", "size": size}],
        }
        for section, size in zip(sections, sizes, strict=True)
    ]
    return data + described({"configuration": {}, "page_size": 4096, "devices": [{"name": "timer"}, *entries]})
