"""The snapshot document: whole and true, or refused in one line."""

import random
import struct
import tracemalloc
from dataclasses import replace

import pytest
from fuzz_snapshot import snapshot_case
from hypothesis import given
from hypothesis import strategies as st
from snapshot_files import EXAMPLE, framed, snapshots

from vsport.document import DocumentError
from vsport.snapshot import MAGIC, SIZE_MAX, Snapshot

PAYLOAD = EXAMPLE.ports[1].back_end


def header():
    return EXAMPLE.as_dict()


def test_a_snapshot_survives_its_document():
    assert Snapshot.decode(EXAMPLE.encode()) == EXAMPLE


@given(snapshots)
def test_every_snapshot_survives_its_document(snapshot):
    """R-MIG-23: half-consumed chains, waiting messages, all three bits."""
    assert Snapshot.decode(snapshot.encode()) == snapshot


@given(snapshots, st.randoms(use_true_random=False))
def test_what_has_moved_is_told_by_positions_alone(snapshot, rng):
    queues = tuple(
        replace(queue, next_avail=rng.randrange(1 << 16), offset=rng.randrange(1 << 20)) for queue in snapshot.queues
    )
    moved = replace(snapshot, queues=queues)
    assert snapshot.move(moved.moved_since(snapshot)) == moved


@pytest.mark.parametrize(
    "other",
    [
        replace(EXAMPLE, cols=EXAMPLE.cols + 1),
        replace(EXAMPLE, ports=EXAMPLE.ports[1:]),
        replace(EXAMPLE, waiting=()),
        replace(EXAMPLE, queues=EXAMPLE.queues[1:]),
        replace(EXAMPLE, queues=tuple(replace(queue, size=queue.size * 2) for queue in EXAMPLE.queues)),
    ],
)
def test_what_is_different_otherwise_is_told_as_a_whole(other):
    assert other != EXAMPLE
    assert other.moved_since(EXAMPLE) is None


def test_positions_that_cannot_be_are_refused():
    positions = EXAMPLE.moved_since(EXAMPLE)
    for bad in (positions[:-1], positions + b"\0", b"", b"\xff" * len(positions)):
        with pytest.raises(DocumentError):
            EXAMPLE.move(bad)


def test_truncated_at_every_byte_it_is_refused():
    document = EXAMPLE.encode()
    for end in range(len(document)):
        with pytest.raises(DocumentError):
            Snapshot.decode(document[:end])
    with pytest.raises(DocumentError):
        Snapshot.decode(document + b"\0")


def test_random_changes_are_refused_or_harmless():
    """With the checksum made right again, so that what is behind it is tried."""
    survived = sum(snapshot_case(random.Random(seed)) for seed in range(3000))
    assert 0 < survived < 3000


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data):
    with pytest.raises(DocumentError):
        Snapshot.decode(data)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*header()]), inner, max_size=8),
        max_leaves=12,
    )
)
def test_any_header_is_refused_in_one_line(value):
    with pytest.raises(DocumentError) as caught:
        Snapshot.decode(framed(value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda h: h.update(max_ports=128), "max_ports is not in 1 to 127"),
        (lambda h: h.update(max_ports=True), "max_ports is bool, not int"),
        (lambda h: h.update(max_ports=3), "beyond what max_ports allows"),
        (lambda h: h.update(extra=1), "'extra' is not known"),
        (lambda h: h.pop("rows"), "rows is missing"),
        (lambda h: h.update(features=1 << 40), "features"),
        (lambda h: h.update(queues=[0] * 999), "more than 10"),
        (lambda h: h["queues"].append(dict(h["queues"][0])), "a queue is there twice"),
        (lambda h: h["queues"][0].update(size=100), "no power of two"),
        (lambda h: h["queues"][0].update(next_avail=65536), "next_avail"),
        (lambda h: h["ports"][1].update(id=0), "a port is there twice"),
        (lambda h: h["ports"][2].update(name="org.test.1"), "two ports have one name"),
        (lambda h: h["ports"][1].update(name="a/b"), "port name"),
        (lambda h: h["ports"][1].update(name="\ud800"), "port name '\\ud800'"),
        (lambda h: h.update({"\x1b[2J\n" + "x" * 999: 1}), "'\\x1b[2J\\nxxx"),
        (lambda h: h["ports"][2].update(guest_connected=True), "not ready cannot be open"),
        (lambda h: h["ports"][1].update(added=False), "never told"),
        (lambda h: h["ports"][1].update(back_end_bytes=1 << 20), "payload is shorter"),
        (lambda h: h["ports"][1].update(back_end_bytes=0), "payload is longer"),
        (lambda h: h["waiting"].append("zz"), "no control message"),
        (lambda h: h["waiting"].append("00"), "no control message"),
        (lambda h: h["waiting"].append(5), "no control message"),
    ],
)
def test_what_is_inconsistent_is_named(change, says):
    changed = header()
    change(changed)
    with pytest.raises(DocumentError) as caught:
        Snapshot.decode(framed(changed, PAYLOAD))
    assert says in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200


def test_another_format_is_named():
    document = EXAMPLE.encode()
    with pytest.raises(DocumentError, match="format 9 is not known"):
        Snapshot.decode(document[:7] + b"\x09" + document[8:])
    with pytest.raises(DocumentError, match="not a vsport snapshot"):
        Snapshot.decode(b"QEVM\0\0\0\3" + bytes(100))


def test_a_document_of_the_largest_size_is_not_too_long():
    with pytest.raises(DocumentError, match="1048576, payload 67108865"):
        Snapshot.decode(struct.pack("<8sIII", MAGIC, 1 << 20, (64 << 20) + 1, 0))
    assert SIZE_MAX == 20 + (1 << 20) + (64 << 20)


def test_claimed_lengths_allocate_nothing():
    claims = struct.pack("<8sIII", MAGIC, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    deep = framed(b"[" * 100_000)
    tracemalloc.start()
    try:
        for document in (claims, deep):
            with pytest.raises(DocumentError):
                Snapshot.decode(document)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
