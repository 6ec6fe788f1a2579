"""Damaged migration files: each is made from a recorded one and a seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from qemu_files import recorded

from vsport.document import DocumentError
from vsport.qemu_device import QemuDevice, QemuStream
from vsport.qemu_report import qemu_report
from vsport.qemu_restore import from_qemu
from vsport.qemu_stream import BytesImage, StreamError, read_stream
from vsport.snapshot import PortConfig, Snapshot

LARGEST_READ = 1 << 20
"""The most that may be asked of a file at once, except for its description, which is looked for in its last 2 MiB."""
INTERESTING = (0, 1, 2, 4, 5, 6, 7, 0x7E, 0x7F, 0x80, 0xFF)


class CountingImage(BytesImage):
    """Sees to it that a damaged number never becomes a large read, and that the work ends."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.reads = 0

    def read(self, offset: int, size: int) -> bytes:
        assert 0 <= offset < 1 << 63, "not a place in a file"
        assert 0 <= size <= max(LARGEST_READ + 255, self.size), f"a read of {size} bytes"
        self.reads += 1
        assert self.reads < 20_000, "no end"
        return super().read(offset, size)


def decoded(data: bytes) -> QemuStream | None:
    """What is in the file; None if it was refused, which is the only other thing that may happen."""
    try:
        stream = read_stream(CountingImage(data))
    except StreamError as exc:
        assert 0 <= exc.offset <= len(data)
        assert len(str(exc)) < 1000
        return None
    report = qemu_report(Path("file"), stream)
    assert all(line.isprintable() for line in report.text.split("\n"))
    assert report.json_lines()
    for device in stream.devices:
        convert(stream, device)
    return stream


class SomeMemory:
    """Guest memory that is there in the lower 4 GiB, and has the same bytes everywhere."""

    def read(self, gpa: int, size: int) -> bytes:
        assert 0 <= size <= 16 << 10, f"a read of {size} bytes of guest memory"
        if gpa + size > 1 << 32:
            raise IndexError(gpa)
        return bytes(size)


def convert(stream: QemuStream, device: QemuDevice) -> Snapshot | None:
    """A snapshot that a live device could have made; None if the device was refused, in one line."""
    ports = {port.id: PortConfig(port.id, f"org.test.{port.id}") for port in device.ports}
    snapshot = None
    for memory in SomeMemory(), None:
        try:
            moved = from_qemu(stream, ports, idstr=device.idstr, memory=memory)
        except DocumentError as exc:
            assert str(exc).isprintable()
            assert len(str(exc)) < 1000
            continue
        assert stream.consistent
        snapshot = moved.snapshot
        assert Snapshot.decode(snapshot.encode()) == snapshot
        assert [(queue.index, queue.base) for queue in moved.queues] == [
            (queue.index, queue.next_avail) for queue in snapshot.queues
        ]
    return snapshot


def _truncate(chance: random.Random, data: bytearray) -> None:
    del data[chance.randrange(len(data) + 1) :]


def _place(chance: random.Random, data: bytearray) -> int:
    """Half of the time where a section or the description begins: most of the file is tables of zeros."""
    if chance.random() < 0.5 or not data:
        return chance.randrange(len(data) + 1)
    start = chance.choice([0, data.find(b"virtio-console"), data.rfind(b"\x7e"), data.rfind(b"\x06")])
    return min(max(start - 20, 0) + chance.randrange(2000), len(data))


def _change(chance: random.Random, data: bytearray) -> None:
    at = _place(chance, data)
    data[at : at + 1] = bytes([chance.choice((chance.randrange(256), chance.choice(INTERESTING)))])


def _change_number(chance: random.Random, data: bytearray) -> None:
    at, size = _place(chance, data), chance.choice((2, 4, 8))
    data[at : at + size] = chance.choice((b"\xff" * size, bytes(size), chance.randbytes(size)))


def _remove(chance: random.Random, data: bytearray) -> None:
    at = _place(chance, data)
    del data[at : at + chance.choice((1, 4, 100, 10_000))]


def _insert(chance: random.Random, data: bytearray) -> None:
    at = _place(chance, data)
    data[at:at] = chance.randbytes(chance.choice((1, 4, 100)))


def _repeat(chance: random.Random, data: bytearray) -> None:
    """A piece of the file comes again elsewhere: look-alikes."""
    start = _place(chance, data)
    at = _place(chance, data)
    data[at:at] = data[start : start + chance.choice((30, 1000, 100_000))]


DAMAGES: tuple[Callable[[random.Random, bytearray], None], ...] = (
    _truncate,
    _change,
    _change,
    _change_number,
    _remove,
    _insert,
    _repeat,
)
_intact: list[bytes] = []


def qemu_stream_case(chance: random.Random) -> None:
    """One damaged file: StreamError, or a device whose report can be printed; bounded reads, and an end."""
    if not _intact:
        _intact.append(recorded())
    data = bytearray(_intact[0])
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        chance.choice(DAMAGES)(chance, data)
    decoded(bytes(data))
