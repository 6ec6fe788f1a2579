"""The ringbuf chardev, against a model that keeps everything."""

from __future__ import annotations

import pytest
from chardev_peers import Rig, Wire
from hypothesis import given, settings
from hypothesis import strategies as st

from vsport.chardev import ringbuf
from vsport.chardev.ringbuf import RingBuf
from vsport.document import DocumentError
from vsport.loop import Loop

OPERATIONS = st.lists(st.one_of(st.binary(max_size=40), st.integers(0, 20)), max_size=30)


@settings(deadline=None)  # the machine may be busy
@given(OPERATIONS, st.sampled_from([1, 2, 8, 16]))
def test_keeps_the_newest_bytes_and_counts_the_others(operations: list[bytes | int], size: int) -> None:
    loop = Loop()
    ring = RingBuf("r", size=size)
    ring.open(loop, Wire(ring, loop))
    kept, lost = b"", 0
    for operation in operations:
        if isinstance(operation, bytes):
            assert ring.write(memoryview(operation)) == len(operation)
            kept += operation
            lost += max(0, len(kept) - size)
            kept = kept[-size:]
        else:
            assert ring.read(operation) == kept[:operation]
            kept = kept[operation:]
        assert len(ring) == len(kept)
        assert ring.overwritten == lost
    assert ring.read(size) == kept
    ring.close()
    loop.close()


def test_does_not_hold_on_to_the_guests_memory() -> None:
    with Rig() as rig:
        wire = rig.make("ringbuf", size="16")
        wire.open()
        memory = bytearray(b"hello")
        with memoryview(memory) as view:
            wire.chardev.write(view)
        memory.extend(b"!")  # BufferError if a view were still held
        memory[:5] = b"XXXXX"
        assert isinstance(wire.chardev, RingBuf)
        assert wire.chardev.read(16) == b"hello"


def test_what_was_written_can_be_read_after_a_disconnect_but_not_after_close() -> None:
    with Rig() as rig:
        wire = rig.make("ringbuf")
        ring = wire.chardev
        assert isinstance(ring, RingBuf)
        wire.open()
        wire.send(b"hello world")
        ring.disconnect()
        assert ring.read(5) == b"hello"
        ring.close()
        assert ring.read(5) == b""
        assert len(ring) == 0


def test_a_log_that_cannot_be_written_costs_the_copy_only() -> None:
    with Rig() as rig:
        wire = rig.make("ringbuf", logfile="/dev/full")
        wire.open()
        wire.send(b"hello")
        assert isinstance(wire.chardev, RingBuf)
        assert wire.chardev.read(16) == b"hello"


def opened(rig: Rig, size: str) -> RingBuf:
    wire = rig.make("ringbuf", size=size)
    wire.open()
    assert isinstance(wire.chardev, RingBuf)
    return wire.chardev


@given(st.lists(st.binary(max_size=20), max_size=5), st.integers(0, 20), st.sampled_from([1, 4, 8, 64]))
def test_what_it_holds_moves_along_and_a_smaller_ring_keeps_the_newest(
    written: list[bytes], read: int, size: int
) -> None:
    with Rig() as rig:
        source, target = opened(rig, "8"), opened(rig, str(size))
        for data in written:
            source.write(memoryview(data))
        source.read(read)
        target.write(memoryview(b"its own"))
        lost, state = source.overwritten, source.save()
        target.check(state)
        target.load(state)
        held = source.read(8)
        assert target.overwritten == lost + max(0, len(held) - size)
        target.write(memoryview(b"+"))
        assert target.read(100) == (held + b"+")[-size:]


def test_of_a_large_one_the_newest_bytes_move_and_the_others_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ringbuf, "SAVED_MAX", 4)
    with Rig() as rig:
        source, target = opened(rig, "8"), opened(rig, "8")
        source.write(memoryview(b"1234567"))
        target.load(source.save())
        assert target.overwritten == 3
        assert target.read(100) == b"4567"
        with pytest.raises(DocumentError, match="chardev c0: this is not what a ringbuf saved: it has 13 bytes"):
            target.check(bytes(13))


def test_nothing_saved_is_nothing_held_and_half_a_header_is_refused() -> None:
    with Rig() as rig:
        ring = opened(rig, "8")
        ring.write(memoryview(b"old"))
        ring.check(b"")
        ring.load(b"")
        assert ring.read(100) == b""
        with pytest.raises(DocumentError, match="it has 7 bytes"):
            ring.check(bytes(7))
        with pytest.raises(DocumentError, match="it lost more than there can be"):
            ring.check(b"\xff" * 8)
