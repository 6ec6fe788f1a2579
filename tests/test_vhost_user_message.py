"""The codec of vhost-user messages: exact bytes, round trips, and nothing but FrontEndError for anything else."""

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsport.errors import FrontEndError
from vsport.vhost_user.message import (
    PAYLOAD_MAX,
    REQUESTS,
    Config,
    Header,
    MemoryRegion,
    MemoryTable,
    OneRegion,
    ProtocolFeature,
    Request,
    VringAddress,
    VringFd,
    VringState,
    decode_reply,
    decode_u64,
    encode_reply,
    encode_request,
    encode_u64,
)
from vsport.vhost_user.session import OFFERED, Session

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
REGIONS = st.builds(MemoryRegion, U64, U64, U64, U64)


# -- framing -----------------------------------------------------------------------------------------------------------


def test_a_header_has_12_bytes_in_host_byte_order():
    """R-VU-01."""
    assert encode_request(15) == struct.pack("=III", 15, 1, 0)
    assert encode_request(2, bytes(8), need_reply=True)[:12] == struct.pack("=III", 2, 9, 8)
    header = Header.decode(struct.pack("=III", 2, 9, 8))
    assert (header.request, header.size, header.need_reply) == (2, 8, True)


def test_a_reply_has_flags_5_and_the_size_of_its_payload():
    """R-VU-02."""
    assert encode_reply(Request.GET_QUEUE_NUM, encode_u64(64)) == bytes.fromhex("11000000 05000000 08000000") + (
        b"\x40" + bytes(7)
    )


@pytest.mark.parametrize("flags", [0, 2, 3, 5])
def test_a_wrong_version_or_a_reply_is_no_request(flags):
    """R-VU-04."""
    with pytest.raises(FrontEndError):
        Header.decode(struct.pack("=III", 1, flags, 0))


def test_the_largest_payload_is_that_of_a_configuration_space():
    """R-VU-04."""
    assert PAYLOAD_MAX == 268
    assert Header.decode(struct.pack("=III", 99, 1, PAYLOAD_MAX)).size == PAYLOAD_MAX
    with pytest.raises(FrontEndError, match="too large"):
        Header.decode(struct.pack("=III", 5, 1, PAYLOAD_MAX + 1))


@given(st.binary(max_size=20))
def test_any_header_is_decoded_or_refused(data):
    try:
        Header.decode(data)
    except FrontEndError:
        pass
    else:
        assert len(data) == 12


@given(st.binary(max_size=24))
def test_any_reply_is_decoded_or_refused(data):
    try:
        request, number = decode_reply(data)
    except FrontEndError:
        pass
    else:
        assert data[:4] + data[12:] == struct.pack("=IQ", request, number)


# -- payloads ----------------------------------------------------------------------------------------------------------


def test_the_used_ring_comes_before_the_available_ring():
    """R-VU-19."""
    address = VringAddress(index=3, flags=1, desc=0x10, used=0x20, avail=0x30, log=2**64 - 1)
    assert address.encode() == struct.pack("=IIQQQQ", 3, 1, 0x10, 0x20, 0x30, 2**64 - 1)


@pytest.mark.parametrize(
    ("value", "index", "no_fd"), [(0, 0, False), (0xFF, 255, False), (0x100, 0, True), (0x103, 3, True)]
)
def test_bit_8_says_that_there_is_no_descriptor(value, index, no_fd):
    """R-VU-21."""
    payload = VringFd.decode(encode_u64(value))
    assert payload == VringFd(index, no_fd)
    assert payload.encode() == encode_u64(value)


def test_a_memory_table_with_one_region_has_40_bytes():
    """R-VU-15, R-VU-61: what User Mode Linux sends."""
    table = MemoryTable((MemoryRegion(0x60C3_4000, 0xF3C_C000, 0x60C3_4000, 0x60C3_4000),))
    assert len(table.encode()) == 40
    assert MemoryTable.decode(table.encode()) == table


@given(st.lists(REGIONS, max_size=8))
def test_memory_tables_go_round(regions):
    table = MemoryTable(tuple(regions))
    assert MemoryTable.decode(table.encode()) == table


@given(REGIONS)
def test_one_region_goes_round(region):
    """R-VU-33: 8 bytes of padding come first."""
    payload = OneRegion(region)
    assert len(payload.encode()) == 40
    assert OneRegion.decode(payload.encode()) == payload


@given(U32, U32)
def test_vring_states_go_round(index, num):
    assert VringState.decode(VringState(index, num).encode()) == VringState(index, num)


@given(st.builds(VringAddress, U32, U32, U64, U64, U64, U64))
def test_vring_addresses_go_round(address):
    assert VringAddress.decode(address.encode()) == address


@given(U32, U32, st.binary(max_size=256))
def test_configurations_go_round(offset, flags, data):
    """R-VU-26."""
    config = Config(offset, flags, data)
    assert config.encode()[4:8] == struct.pack("=I", len(data))
    assert Config.decode(config.encode()) == config


def test_a_memory_table_of_nine_regions_is_refused():
    with pytest.raises(FrontEndError, match="R-VU-15"):
        MemoryTable.decode(struct.pack("=II", 9, 0) + bytes(9 * 32))


def test_a_configuration_that_is_shorter_than_it_says_is_refused():
    with pytest.raises(FrontEndError, match="R-VU-26"):
        Config.decode(struct.pack("=III", 0, 12, 0) + bytes(11))


# -- the table ---------------------------------------------------------------------------------------------------------


@given(st.sampled_from(sorted(REQUESTS)), st.binary(max_size=PAYLOAD_MAX), st.integers(0, 9))
def test_any_payload_is_decoded_or_refused(request, payload, fds):
    """R-VU-04: also with any number of descriptors."""
    with contextlib.suppress(FrontEndError):
        REQUESTS[request].check(payload, fds)


@pytest.mark.parametrize("request_number", sorted(REQUESTS))
def test_every_request_has_a_row_and_a_handler(request_number):
    row = REQUESTS[request_number]
    assert row.handler == Request(request_number).name.lower()
    assert callable(getattr(Session, row.handler))
    assert row.feature is None or row.feature & OFFERED


def test_every_request_is_in_the_table():
    assert set(REQUESTS) == set(Request)


@pytest.mark.parametrize("request_number", sorted(set(range(64)) - set(Request)))
def test_what_is_not_for_a_console_is_unknown(request_number):
    """R-VU-39."""
    assert request_number not in REQUESTS
    assert Header(request_number, 1, 0).name == f"request {request_number}"


@pytest.mark.parametrize(
    ("request_number", "payload", "fds"),
    [
        (Request.GET_FEATURES, b"", 1),
        (Request.SET_MEM_TABLE, MemoryTable((MemoryRegion(0, 4096, 0, 0),)).encode(), 0),
        (Request.SET_MEM_TABLE, MemoryTable((MemoryRegion(0, 4096, 0, 0),)).encode(), 2),
        (Request.SET_VRING_KICK, VringFd(0, False).encode(), 0),
        (Request.SET_VRING_KICK, VringFd(0, True).encode(), 1),
        (Request.SET_VRING_CALL, VringFd(0, False).encode(), 2),
        (Request.SET_BACKEND_REQ_FD, b"", 0),
        (Request.ADD_MEM_REG, OneRegion(MemoryRegion(0, 4096, 0, 0)).encode(), 0),
        (Request.REM_MEM_REG, OneRegion(MemoryRegion(0, 4096, 0, 0)).encode(), 2),
    ],
)
def test_the_number_of_descriptors_has_to_fit(request_number, payload, fds):
    """R-VU-04, R-VU-21, R-VU-33."""
    with pytest.raises(FrontEndError, match="descriptors"):
        REQUESTS[request_number].check(payload, fds)


def test_only_what_works_is_offered():
    """R-VU-41: neither in-band notifications, nor descriptors on the back-end channel, nor Xen's mappings."""
    assert OFFERED == 0x9_B22B
    assert all(feature & OFFERED for feature in ProtocolFeature)


def test_u64_goes_round():
    assert decode_u64(encode_u64(2**64 - 1)) == 2**64 - 1
