"""QEMU migration files for tests: a writer of our own, and the one that QEMU 11.1 wrote, without its RAM. Then what the
new host has: the guest's memory, and a device that is to go on."""

import gzip
import json
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path

from vsport._ring import Memory, Region, Status
from vsport.connection import Cause, OnRestore
from vsport.constants import Feature, queue_count
from vsport.device import SerialDevice
from vsport.port import BackEnd, Manners, PortConfig
from vsport.qemu_restore import from_qemu
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
    queues: dict = field(default_factory=dict)
    """What is different about some queues, by index: "num", "desc", "last_avail"."""
    size: tuple = (80, 25)
    config: bytes = bytes(12)
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
        common = struct.pack(">BBHII", self.status, 1, 2, low, len(self.config)) + self.config
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
            desc = 0x10000 * (index + 1)
            queue = {"num": self.num, "desc": desc, "last_avail": self.last_avail} | self.queues.get(index, {})
            data += struct.pack(">I", queue["num"]) + (struct.pack(">I", 4096) if self.mmio else b"")
            data += struct.pack(">QH", queue["desc"], queue["last_avail"])
            data += struct.pack(">H", 1) if self.vectors and not self.mmio else b""
        return data

    def _console(self):
        ports_map = self.ports_map
        if ports_map is None:
            ports_map = 1 | sum({1 << port[0] for port in self.ports})
        words = [ports_map >> shift & 0xFFFFFFFF for shift in range(0, self.max_ports, 32)]
        said = self.max_ports if self.said_ports is None else self.said_ports
        return struct.pack(f">HHI{len(words)}I", *self.size, said, *words)

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


# -- guest memory ------------------------------------------------------------------------------------------------------

FRONT_END = 0x7F00_0000_0000
"""What the front end calls guest-physical address 0."""
_WRITE, _NEXT = 2, 1


class GuestRam:
    """The memory of a guest that was saved, as a device on the new host gets it: one region from address 0 on."""

    def __init__(self, image):
        self.memory = Memory([Region(0, len(image), FRONT_END, image, 0)])

    def start(self, device, queues):
        """Starts the queues of a device that was restored, as from_qemu() says."""
        for setup in queues:
            device.queues[setup.index].start(
                self.memory,
                setup.size,
                *(FRONT_END + gpa for gpa in setup.parts),
                base=setup.base,
                event_idx=bool(device.negotiated & Feature.EVENT_IDX),
                indirect=bool(device.negotiated & Feature.INDIRECT_DESC),
                reset=False,
            )
        for setup in queues:
            device.queue_started(setup.index)

    def offer(self, setup, *chains, writable=False):
        """Lays a queue out as its driver had it: each chain is its head and its pieces, (address, bytes)."""
        for number, (head, pieces) in enumerate(chains):
            for at, (gpa, data) in enumerate(pieces, head):
                flags = (_WRITE if writable else 0) | (_NEXT if at < head + len(pieces) - 1 else 0)
                self.memory.write(gpa, data)
                self.memory.write(setup.desc + 16 * at, struct.pack("<QIHH", gpa, len(data), flags, at + 1))
            self._write16(setup.avail + 4 + 2 * ((setup.base + number) % setup.size), head)
        self._write16(setup.avail + 2, setup.base + len(chains))
        self._write16(setup.used + 2, setup.base)

    def _write16(self, gpa, value):
        self.memory.write(gpa, struct.pack("<H", value & 0xFFFF))

    def returned(self, setup):
        """What the device has given back since it was started: (head, bytes written) of each chain."""
        (used_idx,) = struct.unpack("<H", self.memory.read(setup.used + 2, 2))
        slots = (setup.used + 4 + 8 * ((setup.base + i) % setup.size) for i in range((used_idx - setup.base) & 0xFFFF))
        return [struct.unpack("<II", self.memory.read(slot, 8)) for slot in slots]


def block_of_ram(path, name):
    """A block of guest memory, as it is in a file without capabilities (R-MIG-02, R-MIG-03, R-MIG-06)."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        (length,) = struct.unpack_from(">I", data, 9)
        reader = _RamReader(data, 13 + length, name)
        while reader.section():
            pass
        return reader.memory


class _RamReader:
    """Reads the sections that come before the devices: all of them are of guest memory."""

    def __init__(self, data, at, name):
        self._data = data
        self._at = at
        self._name = name
        self._block = None
        self.memory = None

    def _take(self, layout):
        values = struct.unpack_from(f">{layout}", self._data, self._at)
        self._at += struct.calcsize(f">{layout}")
        return values[0] if len(values) == 1 else values

    def _text(self):
        length = self._take("B")
        return self._take(f"{length}s").decode()

    def section(self):
        kind, id = self._take("BI")
        if kind == 1:
            assert (self._text(), self._take("II")) == ("ram", (0, 4))
        elif kind not in (2, 3):
            return False
        while self._record():
            pass
        assert self._take("BI") == (0x7E, id)
        return True

    def _record(self):
        word = self._take("Q")
        offset, flags = word & ~0xFFF, word & 0xFFF
        if flags & 0x04:
            self._blocks(offset)
        elif flags & 0x0A:
            if not flags & 0x20:
                self._block = self._text()
            page = self._take("4096s") if flags & 0x08 else self._take("B")
            if self._block == self._name and page:  # What is new is full of zeros already.
                self.memory[offset : offset + 4096] = page
        else:
            assert flags == 0x10, flags
            return False
        return True

    def _blocks(self, total):
        while total > 0:
            name, size = self._text(), self._take("Q")
            if name == self._name:
                self.memory = mmap.mmap(-1, size)
            total -= size


# -- the new host ------------------------------------------------------------------------------------------------------


class Taker(BackEnd):
    """A back end whose host takes everything, and which takes notes."""

    def __init__(self, port):
        self._port = port
        self.heard = []
        self.received = b""
        port.back_end = self

    def guest_connected(self, connected, cause):
        self.heard.append((connected, cause))

    def tx_ready(self):
        with self._port.blaming(self._port.tx):
            while self._port.tx.drain_into(self._take) is Status.MORE:
                pass
            self._port.notify(self._port.tx)

    def _take(self, data):
        self.received += data
        return len(data)


class Target:
    """A device with the ports of a saved one, whose back ends were made a moment ago; some have a host already."""

    def __init__(self, saved, *, hosts=(), on_restore=OnRestore.AUTO):
        self.device = SerialDevice(max_ports=saved.max_ports)
        self.configs = {port.id: PortConfig(port.id, f"org.test.{port.id}") for port in saved.ports}
        self.takers = {}
        for id, config in self.configs.items():
            port = self.device.add_port(config)
            port.manners = Manners(on_restore=on_restore)
            self.takers[id] = Taker(port)
            if id in hosts:
                port.feed(Cause.HOST_CONNECT)

    def restore(self, stream, saved, ram=None):
        """Brings the device `saved` of a file over; with guest memory, the queues run then."""
        moved = from_qemu(stream, self.configs, idstr=saved.idstr, memory=ram and ram.memory)
        self.device.restore(moved.snapshot)
        if ram is not None:
            ram.start(self.device, moved.queues)
        return moved

    def states(self):
        return {id: port.state for id, port in self.device.ports.items()}
