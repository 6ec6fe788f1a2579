"""Snapshots for tests: one with a bit of everything, any at all, and documents with a right frame around anything."""

import json
import struct
import zlib

from hypothesis import strategies as st

from vsport.connection import State
from vsport.constants import Event, queue_count
from vsport.control import Message
from vsport.snapshot import MAGIC, PortConfig, PortState, QueueState, Snapshot

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


port_states = st.builds(
    PortState,
    st.builds(
        PortConfig, st.integers(0, 126), st.just(""), st.booleans(), st.integers(0, 65535), st.integers(0, 65535)
    ),
    st.sampled_from(State),
    st.just(True),
    st.booleans(),
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
