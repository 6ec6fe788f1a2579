"""The snapshot document: whole and true, or refused in one line."""

import json
import random
import struct
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsport.connection import State
from vsport.constants import Event, queue_count
from vsport.control import Message
from vsport.port import PortConfig
from vsport.snapshot import MAGIC, PortState, QueueState, Snapshot, SnapshotError

EXAMPLE = Snapshot(
    max_ports=4,
    cols=80,
    rows=25,
    features=0x130000007,
    driver_ready=True,
    queues=(QueueState(2, 128, 7), QueueState(3, 128, 65535), QueueState(5, 256, 12, offset=4096)),
    ports=(
        PortState(PortConfig(0, console=True, cols=132, rows=43), State.C, added=True),
        PortState(PortConfig(1, "org.test.1"), State.A, added=True, session=7, back_end=b"\0\1its own words"),
        PortState(PortConfig(3, "org.test.3"), State.B_UNREADY, added=False),
    ),
    waiting=(Message(1, Event.PORT_OPEN, 0), Message.name(3, "org.test.3")),
)


def framed(header, payload=b""):
    """A document with a right frame around whatever header."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = header + payload
    return struct.pack("<8sIII", MAGIC, len(header), len(payload), zlib.crc32(body)) + body


def header():
    return EXAMPLE.as_dict()


PAYLOAD = EXAMPLE.ports[1].back_end

port_states = st.builds(
    PortState,
    st.builds(
        PortConfig, st.integers(0, 126), st.just(""), st.booleans(), st.integers(0, 65535), st.integers(0, 65535)
    ),
    st.sampled_from(State),
    st.just(True),
    st.integers(0, 2**63 - 1),
    st.binary(max_size=20),
)
snapshots = st.builds(
    Snapshot,
    st.just(127),
    st.integers(0, 65535),
    st.integers(0, 65535),
    st.sampled_from([0, 7, 0x130000007]),
    st.booleans(),
    st.lists(
        st.builds(
            QueueState,
            st.integers(0, queue_count(127) - 1),
            st.integers(0, 15).map(lambda bit: 1 << bit),
            st.integers(0, 65535),
            st.integers(0, 2**33),
        ),
        unique_by=lambda queue: queue.index,
        max_size=6,
    ).map(tuple),
    st.lists(port_states, unique_by=lambda port: port.config.id, max_size=4).map(tuple),
    st.lists(
        st.builds(Message, st.integers(0, 126), st.sampled_from(Event), st.integers(0, 1), st.binary(max_size=9)),
        max_size=4,
    ).map(tuple),
)


def test_a_snapshot_survives_its_document():
    assert Snapshot.decode(EXAMPLE.encode()) == EXAMPLE


@given(snapshots)
def test_every_snapshot_survives_its_document(snapshot):
    """R-MIG-23: half-consumed chains, waiting messages, all three bits."""
    assert Snapshot.decode(snapshot.encode()) == snapshot


def test_truncated_at_every_byte_it_is_refused():
    document = EXAMPLE.encode()
    for end in range(len(document)):
        with pytest.raises(SnapshotError):
            Snapshot.decode(document[:end])
    with pytest.raises(SnapshotError):
        Snapshot.decode(document + b"\0")


def test_random_changes_are_refused_or_harmless():
    """With the checksum made right again, so that what is behind it is tried."""
    rng, document = random.Random(1), EXAMPLE.encode()
    body = bytearray(document[20:])
    survived = 0
    for _ in range(3000):
        changed = bytearray(body)
        for _ in range(rng.randrange(1, 4)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        frame = bytearray(document[:20])
        frame[16:20] = struct.pack("<I", zlib.crc32(changed))
        try:
            survived += bool(Snapshot.decode(bytes(frame) + bytes(changed)))
        except SnapshotError as exc:
            assert "\n" not in str(exc)
    assert survived < 3000


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data):
    with pytest.raises(SnapshotError):
        Snapshot.decode(data)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*header()]), inner, max_size=8),
        max_leaves=12,
    )
)
def test_any_header_is_refused_in_one_line(value):
    with pytest.raises(SnapshotError) as caught:
        Snapshot.decode(framed(value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda h: h.update(max_ports=128), "max_ports is not in 1 to 127"),
        (lambda h: h.update(max_ports=True), "max_ports is bool, not int"),
        (lambda h: h.update(max_ports=3), "beyond what max_ports allows"),
        (lambda h: h.update(extra=1), "extra is not known"),
        (lambda h: h.pop("rows"), "rows is missing"),
        (lambda h: h.update(features=1 << 40), "features"),
        (lambda h: h.update(queues=[0] * 999), "more than 10"),
        (lambda h: h["queues"].append(dict(h["queues"][0])), "a queue is there twice"),
        (lambda h: h["queues"][0].update(size=100), "no power of two"),
        (lambda h: h["queues"][0].update(next_avail=65536), "next_avail"),
        (lambda h: h["ports"][1].update(id=0), "a port is there twice"),
        (lambda h: h["ports"][2].update(name="org.test.1"), "two ports have one name"),
        (lambda h: h["ports"][1].update(name="a/b"), "port name"),
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
    with pytest.raises(SnapshotError) as caught:
        Snapshot.decode(framed(changed, PAYLOAD))
    assert says in str(caught.value)


def test_another_format_is_named():
    document = EXAMPLE.encode()
    with pytest.raises(SnapshotError, match="format 9 is not known"):
        Snapshot.decode(document[:7] + b"\x09" + document[8:])
    with pytest.raises(SnapshotError, match="not a vsport snapshot"):
        Snapshot.decode(b"QEVM\0\0\0\3" + bytes(100))


def test_claimed_lengths_allocate_nothing():
    claims = struct.pack("<8sIII", MAGIC, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    deep = framed(b"[" * 100_000)
    tracemalloc.start()
    try:
        for document in (claims, deep):
            with pytest.raises(SnapshotError):
                Snapshot.decode(document)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
