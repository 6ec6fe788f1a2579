"""QEMU's migration files: what is in them, and what is said about broken ones."""

import json
import random
import struct
import tracemalloc

import pytest
from fuzz_qemu_stream import CountingImage, decoded, qemu_stream_case
from hypothesis import given, settings
from hypothesis import strategies as st
from qemu_files import INDIRECT, PACKED, VERSION_1, Chain, Section, end_of, migration_file, recorded, subsection

from vsport.qemu_device import PackedState, Severity, Status
from vsport.qemu_stream import BytesImage, StreamError, read_stream


def read(data):
    return read_stream(BytesImage(data))


def device_of(section, **options):
    """The only device of a file with that section."""
    (device,) = read(migration_file(section, **options)).devices
    return device


def found(device):
    return [(finding.severity, finding.rule) for finding in device.findings]


ERROR, WARNING = Severity.ERROR, Severity.WARNING


@pytest.fixture(scope="module")
def real():
    """A file of QEMU 11.1, without its RAM."""
    return recorded()


# -- what QEMU wrote ---------------------------------------------------------------------------------------------------


def test_the_recorded_file(real):
    stream = read(real)
    assert (stream.machine, stream.page_size, stream.described, stream.consistent) == ("pc-q35-11.1", 4096, True, True)
    assert [device.idstr for device in stream.devices] == [
        "0000:00:02.0/virtio-console",
        "0000:00:03.0:00.0/virtio-console",
    ]
    assert [[port.id for port in device.ports] for device in stream.devices] == [[1, 2, 3, 4, 5], [0, 35]]
    assert [port.throttled for port in stream.devices[0].ports] == [False, False, True, False, False]


def test_queues_of_the_recorded_file(real):
    """R-MIG-12, R-MIG-17: a modern driver's addresses, of which every part is aligned and none is twice."""
    device = read(real).devices[0]
    assert [queue.num for queue in device.queues[:5]] == [128, 128, 32, 32, 128]
    parts = [part for queue in device.queues for part in (queue.desc, queue.avail, queue.used)]
    assert len(set(parts)) == 3 * 64
    assert all(queue.desc % 16 == queue.avail % 2 == queue.used % 4 == 0 for queue in device.queues)
    assert device.queues[3].last_avail > device.queues[4].last_avail == 0


def test_a_packed_queue_of_the_recorded_file(real):
    """R-MIG-15, R-MIG-17: one chain of the throttled port is in use."""
    device = read(real).devices[1]
    queue = device.queues[2 * 35 + 3]
    assert queue.packed == PackedState(queue.last_avail, True, queue.last_avail - 1, True, 1)
    assert device.queue_base(queue.index) == 0x8000 | queue.last_avail - 1


def test_as_dict_is_json(real):
    stream = read(real)
    assert json.loads(json.dumps(stream.as_dict()))["devices"][0]["ports"][2]["element"]["bytes_total"] == 30001


# -- what is written here ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectors", [0, 2, 33])
@pytest.mark.parametrize("express", [False, True])
def test_pci(vectors, express):
    """R-MIG-11."""
    bus = device_of(Section(vectors=vectors, express=express)).bus
    assert (bus.kind, bus.ids, bus.msix_vectors) == ("pci", (0x1AF4, 0x1003), vectors)
    assert len(bus.config) == (4096 if express else 256)


def test_mmio():
    """R-MIG-12."""
    device = device_of(Section(mmio=True, idstr="virtio-mmio@000000000a003e00/virtio-console"))
    assert (device.bus.kind, device.ports[0].guest_connected, device.findings) == ("mmio", True, ())


@pytest.mark.parametrize("max_ports", [1, 3, 31, 32, 33, 40, 511])
def test_the_map_of_ports_is_as_long_as_the_device_has_ports(max_ports):
    """R-MIG-13, R-MIG-19."""
    section = Section(max_ports=max_ports, ports=((max_ports - 1, 1, 0, None),))
    device = device_of(section)
    assert (device.max_ports, device.ports_map, device.findings) == (max_ports, 1 | 1 << max_ports - 1, ())
    assert device.ports[0].id == max_ports - 1


@pytest.mark.parametrize(("guest", "host"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_the_bits_of_a_port(guest, host):
    port = device_of(Section(ports=((2, guest, host, None),))).ports[0]
    assert (port.id, port.guest_connected, port.host_connected, port.throttled) == (2, bool(guest), bool(host), False)


def test_a_half_consumed_chain():
    """R-MIG-14, R-MIG-21."""
    element = device_of(Section(ports=((1, 1, 1, Chain()),))).ports[0].element
    assert (element.head, element.segments) == (5, ((0x1000, 100), (0x5000, 200)))
    assert (element.bytes_total, element.bytes_taken, element.bytes_left) == (300, 150, 150)
    assert element.resumes_at == 0x5000 + 50


def test_a_chain_from_a_big_endian_host():
    """R-MIG-14."""
    element = device_of(Section(ports=((1, 1, 1, Chain(order=">")),))).ports[0].element
    assert (element.head, element.bytes_left, element.resumes_at) == (5, 150, 0x5000 + 50)


def test_a_chain_of_1024_segments():
    segments = tuple((0x1000 * n, n) for n in range(1024))
    chain = Chain(segments=segments, iov_idx=1023, iov_offset=0)
    element = device_of(Section(ports=((1, 1, 1, chain),))).ports[0].element
    assert (element.segments, element.bytes_left, element.resumes_at) == (segments, 1023, 0x1000 * 1023)


@pytest.mark.parametrize("features", [2 | VERSION_1 | INDIRECT, 2 | VERSION_1 | INDIRECT | PACKED])
@pytest.mark.parametrize("describe", [True, False])
def test_several_chains_with_and_without_their_length_in_front(features, describe):
    """R-MIG-15."""
    ports = ((0, 1, 1, None), (1, 1, 0, Chain(descriptors=2)), (2, 1, 1, Chain(head=6, descriptors=3)))
    device = device_of(Section(ports=ports, features=features), describe=describe)
    assert [(port.id, port.element and port.element.head) for port in device.ports] == [(0, None), (1, 5), (2, 6)]
    expected = [None, 2, 3] if features & PACKED else [None, None, None]
    assert [port.element and port.element.descriptors for port in device.ports] == expected
    assert found(device) == ([(WARNING, "R-MIG-15")] if features & PACKED else [])


@pytest.mark.parametrize(("version", "ports"), [(1, 0), (2, 1), (3, 1)])
@pytest.mark.parametrize("describe", [True, False])
def test_older_versions(version, ports, describe):
    """R-MIG-16."""
    device = device_of(Section(version=version, features=2), describe=describe)
    assert (device.version, len(device.ports)) == (version, ports)
    assert found(device) == ([(WARNING, "R-MIG-16")] if version < 3 else [])


def test_a_legacy_queue_has_its_rings_behind_its_table():
    """2.7.2."""
    queue = device_of(Section(features=2)).queues[1]
    assert (queue.desc, queue.avail, queue.used) == (0x20000, 0x20000 + 2048, 0x21000)


def test_subsections():
    """R-MIG-17."""
    parts = (
        ("virtio/virtqueues", struct.pack(">QQ", 0x111000, 0x222000) * 1024),
        ("virtio/ringsize", bytes(4096)),
        ("virtio/broken", b"\1"),
        ("virtio/started", b"\1"),
        ("virtio/disabled", b"\1"),
        ("virtio/128bit_features", struct.pack(">Q", 1)),
    )
    device = device_of(Section(subsections=parts))
    assert (device.queues[3].avail, device.queues[3].used) == (0x111000, 0x222000)
    assert (device.broken, device.started, device.disabled) == (True, True, True)
    assert device.feature_names == ("MULTIPORT", "INDIRECT_DESC", "VERSION_1", "bit 64")
    assert found(device) == [(WARNING, "R-MIG-17")]


@pytest.mark.parametrize("describe", [True, False])
def test_what_a_newer_qemu_adds_is_passed_over(describe):
    device = device_of(Section(subsections=(("virtio/news", bytes(77)),)), describe=describe)
    assert device.ports[0].guest_connected
    assert (WARNING, "R-MIG-17") in found(device)
    assert device.size == len(Section(subsections=(("virtio/news", bytes(77)),)).body)


def test_a_subsection_whose_name_is_noise_is_told_shortly():
    device = device_of(Section(subsections=(("\x90" * 100, bytes(7)),)))
    (finding,) = device.findings
    assert finding.what.isprintable()
    assert len(finding.what) < 120


def test_the_configuration_at_the_start():
    """R-MIG-02."""
    parts = subsection("configuration/capabilities", struct.pack(">IB", 1, 10) + b"mapped-ram")
    parts += subsection("configuration/target-page-bits", bytes(4)) + subsection("configuration/uuid", bytes(16))
    stream = read(migration_file(Section(), machine="pc-1.0", parts=parts))
    assert (stream.machine, stream.capabilities, stream.findings) == ("pc-1.0", ("mapped-ram",), ())


def test_a_machine_without_a_name():
    data = migration_file(Section())
    stream = read(data[:8] + data[data.index(b"\x04", 8) :])
    assert (stream.machine, len(stream.devices)) == (None, 1)


def test_no_virtio_serial_device_at_all():
    stream = read(migration_file())
    assert (stream.devices, stream.findings) == ((), ())


def test_control_characters_are_not_for_terminals():
    assert read(migration_file(Section(), machine="a\x1b[2J")).machine == "a\\x1b[2J"


chains = st.none() | st.builds(
    Chain,
    head=st.integers(0, 127),
    segments=st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(1, 1 << 20)), min_size=1, max_size=5).map(tuple),
    iov_idx=st.just(0),
    iov_offset=st.integers(0, 1),
    descriptors=st.integers(1, 5),
)


@st.composite
def sections(draw):
    max_ports = draw(st.integers(1, 70))
    ids = draw(st.lists(st.integers(0, max_ports - 1), unique=True, max_size=4))
    ports = tuple((id, draw(st.integers(0, 1)), draw(st.integers(0, 1)), draw(chains)) for id in ids)
    features = draw(st.sampled_from([2, 2 | INDIRECT, 2 | VERSION_1, 2 | VERSION_1 | INDIRECT | PACKED]))
    transport = draw(st.sampled_from([{"vectors": 0}, {}, {"express": True}]))
    return Section(ports=ports, max_ports=max_ports, features=features, **transport)


@given(sections(), st.booleans())
@settings(deadline=None, max_examples=60)
def test_what_is_written_is_read(section, describe):
    device = device_of(section, describe=describe)
    assert device.size == len(section.body)
    assert (device.features, device.max_ports) == (section.features, section.max_ports)
    for port, (id, guest, host, chain) in zip(device.ports, section.ports, strict=True):
        assert (port.id, port.guest_connected, port.host_connected) == (id, guest, host)
        assert (port.element and port.element.segments) == (chain and chain.segments)
    assert not [finding for finding in device.findings if finding.severity is ERROR]


# -- finding the section -----------------------------------------------------------------------------------------------


def test_the_last_of_two_with_one_name_counts():
    """R-MIG-05: guest memory may hold an old copy, and comes first."""
    old, new = Section(ports=((1, 0, 0, None),)), Section(ports=((1, 1, 1, None),))
    for describe in True, False:
        (device,) = read(migration_file(new, before=bytes(old) + bytes(999), describe=describe)).devices
        assert device.ports[0].guest_connected


@pytest.mark.parametrize("describe", [True, False])
def test_an_old_copy_does_not_stand_in_for_a_damaged_section(describe):
    """R-MIG-05."""
    data = migration_file(Section(element_count=9), before=bytes(Section()), describe=describe)
    with pytest.raises(StreamError, match="expected a number of ports, 3 at most, found 9"):
        read(data)


def test_guest_memory_full_of_names():
    """R-MIG-05."""
    noise = b"".join(bytes([4, 0, 0, 0, n % 256, 27]) + b"0000:00:04.0/virtio-console" for n in range(2000))
    stream = read(migration_file(Section(), before=noise))
    assert [device.ports[0].guest_connected for device in stream.devices] == [True]


def test_a_section_across_the_pieces_in_which_a_file_is_read():
    for gap in range((1 << 20) - 60, (1 << 20) + 10):
        section = Section()
        behind = bytes(gap - len(bytes(section)) + 40)
        data = migration_file(section, describe=False) + behind
        assert len(read(data).devices) == 1


def test_two_devices_in_the_order_of_the_file():
    first, second = Section(idstr="b/virtio-console", id=1), Section(idstr="a/virtio-console", id=2, express=True)
    for describe in True, False:
        stream = read(migration_file(first, second, describe=describe))
        assert [device.section_id for device in stream.devices] == [1, 2]


def test_without_a_description_the_reader_says_so():
    stream = read(migration_file(Section(), describe=False))
    assert (stream.described, stream.consistent, len(stream.devices)) == (False, True, 1)
    assert "suppress-vmdesc" in stream.findings[0].what


def test_a_file_cut_short_in_its_description():
    data = migration_file(Section())
    stream = read(data[:-10])
    assert (stream.described, stream.consistent, len(stream.devices)) == (False, False, 1)
    assert stream.findings[0].what == "the file is cut short: 10 bytes of its end are missing"


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"{}",
        b'{"devices": 1}',
        b'{"devices": [{}]}',
        b'{"devices": [{"name": 5}]}',
        b'{"devices": [{"name": "virtio-console", "instance_id": [], "fields": [{"size": 100}]}]}',
        b'{"devices": [{"name": "virtio-console", "instance_id": 0, "fields": [{"size": -1}]}]}',
        b'{"devices": [{"name": "virtio-console", "instance_id": 0, "fields": [{"size": 1e999}]}]}',
        b'{"devices": [{"name": "\\u001bvirtio-console", "instance_id": 0, "fields": [{"size": 9}]}]}',
        b'{"a":' * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"\xff": 1}',
    ],
)
def test_a_damaged_description_is_done_without(text):
    data = migration_file(Section(), describe=False) + b"\x06" + struct.pack(">I", len(text)) + text
    stream = read(data)
    assert (stream.described, stream.consistent, len(stream.devices)) == (False, False, 1)
    assert "is damaged" in stream.findings[0].what
    assert stream.findings[0].what.isprintable()


def test_a_description_that_is_wrong_about_a_length():
    section = Section()
    (device,) = read(migration_file(section, sizes=[len(section.body) - 1])).devices
    assert device.ports[0].guest_connected
    assert found(device) == [(ERROR, "R-MIG-05")]


def test_a_described_device_that_is_not_there():
    """What can be read of the others is."""
    first, second = Section(idstr="a/virtio-console", id=1), Section(idstr="b/virtio-console", id=2)
    data = migration_file(first, second).replace(b"\x10a/virtio-console", b"\x10a/virtio-consolx", 1)
    stream = read(data)
    assert ([device.idstr for device in stream.devices], stream.consistent) == (["b/virtio-console"], False)
    assert "a/virtio-console cannot be read: its section is not in the file" in stream.findings[0].what


def test_no_footers():
    """R-MIG-03: so it was before 2015."""
    first, second = Section(idstr="a/virtio-console", footer=False), Section(idstr="b/virtio-console", footer=False)
    for describe in True, False:
        stream = read(migration_file(first, second, describe=describe))
        severity = WARNING if describe else ERROR
        assert [found(device) for device in stream.devices] == [[(severity, "R-MIG-03")]] * 2


# -- what does not fit together ----------------------------------------------------------------------------------------

LONG = ((0, 1),) * 129
TOO_LONG = ((0, 1),) * 1025
HUGE = ((0, 1 << 32),)
TOP = (((1 << 64) - 1, 9),)


@pytest.mark.parametrize(
    ("section", "rule", "words"),
    [
        (Section(num=1025), "R-MIG-24", "queue 0: 1025 entries"),
        (Section(num=0), "R-MIG-24", "queue 0: 0 entries"),
        (Section(features=VERSION_1 | PACKED, packed=(9, True, 8, True, 129)), "R-MIG-18", "129 of 128 entries"),
        (Section(features=VERSION_1 | PACKED, packed=(128, True, 8, True, 1)), "R-MIG-18", "point outside its 128"),
        (Section(ports=((3, 0, 0, None),)), "R-MIG-19", "port 3 on a device with 3 ports"),
        (Section(ports=((1, 0, 0, None),) * 2, ports_map=3), "R-MIG-19", "port 1 is there twice"),
        (Section(ports_map=7), "R-MIG-19", "port 2 is in the map of ports but has no state"),
        (Section(ports_map=1), "R-MIG-19", "port 1 is not in the map of ports"),
        (Section(ports_map=2), "R-MIG-19", "port 0 is not in the map of ports"),
        (Section(ports_map=3 | 8), "R-MIG-19", "goes beyond the 3"),
        (Section(ports=((1, 2, 1, None),)), "R-MIG-13", "have to be 0 or 1"),
        (Section(said_ports=4), "R-MIG-13", "8 queues are for 3 ports, but the number of ports is 4"),
        (Section(status=3), "R-MIG-13", "open in a guest that has no driver"),
        (Section(features=VERSION_1), "R-CON-37", "port 1 is open in a guest that knows port 0 only"),
        (Section(ports=((1, 1, 1, Chain(0, HUGE, 0, 0)),)), "R-MIG-24", "longer than a descriptor can say"),
        (Section(ports=((1, 1, 1, Chain(iov_idx=2)),)), "R-MIG-24", "goes on in segment 2 of 2"),
        (Section(ports=((1, 1, 1, Chain(iov_offset=201)),)), "R-MIG-24", "behind the end of segment 1"),
        (Section(ports=((1, 1, 1, Chain(head=128)),)), "R-MIG-24", "begins at descriptor 128 of 128"),
        (Section(ports=((1, 1, 1, Chain()),), queues={5: {"desc": 0}}), "R-MIG-24", "in queue 5, which is not set up"),
        (Section(ports=((1, 1, 1, Chain(in_num=1)),)), "R-MIG-24", "for the device to write"),
        (Section(ports=((1, 1, 1, Chain(0, TOP, 0, 0)),)), "R-MIG-24", "64 bits"),
        (Section(ports=((1, 1, 1, Chain(0, TOO_LONG, 0, 0)),)), "R-MIG-24", "a chain of 1025"),
        (Section(ports=((1, 1, 1, Chain(0, LONG, 0, 0)),), features=2), "R-MIG-24", "129 segments"),
        (Section(pci={0: 0x86}), "R-CON-01", "PCI calls it 1a86:1003"),
    ],
)
def test_contradictions_are_found_and_the_rest_is_shown(section, rule, words):
    stream = read(migration_file(section))
    (device,) = stream.devices
    assert not stream.consistent
    assert any(finding.rule == rule and words in finding.what for finding in device.findings), device.findings
    assert len(device.ports) == len(section.ports)


def test_features_that_are_not_the_same_twice():
    parts = (("virtio/64bit_features", struct.pack(">Q", VERSION_1 | 1)),)
    device = device_of(Section(features=2, subsections=parts))
    assert (ERROR, "R-MIG-17") in found(device)


def test_a_chain_of_too_many_segments_is_read_as_far_as_it_goes():
    chain = Chain(segments=((0, 1),) * 5000, iov_idx=0, iov_offset=0)
    element = device_of(Section(ports=((1, 1, 1, chain),))).ports[0].element
    assert (element.out_num, len(element.segments)) == (5000, 1024)


# -- broken files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "at byte 0: expected the header of a QEMU migration file, 8 bytes, found the end after 0"),
        (b"QEVM\0\0\0", "found the end after 7"),
        (b"QEVX\0\0\0\3", "at byte 0: expected b'QEVM'"),
        (b"QEVM\0\0\0\2", "at byte 4: expected version 3 of the format, found version 2"),
        (b"QEVM\0\0\0\3", "at byte 8: expected a virtio-console section, found the end of the file"),
        (migration_file(Section(version=4)), "expected a virtio-console section of version 1 to 3, found 4"),
        (migration_file(Section(version=0)), "expected a virtio-console section of version 1 to 3, found 0"),
        (migration_file(Section(element_count=4)), "expected a number of ports, 3 at most, found 4"),
    ],
)
def test_what_cannot_be_read_is_said_with_its_place(data, message):
    with pytest.raises(StreamError) as caught:
        read(data)
    assert message in str(caught.value)


def places(data):
    """Where fields are rather than zeros, and every 997th byte of the rest."""
    stream = read(data)
    near = set(range(len(data) - 500, len(data))).union(range(0, len(data), 997))
    for device in stream.devices:
        near.update(range(device.offset - 8, device.offset + 400))
        registers = data.index(bytes([device.status, device.isr]), device.offset + 300)
        near.update(range(registers, registers + 60))
        near.update(range(end_of(device) - 60, end_of(device) + 8))
        for marker in b"virtio/64bit_features", b"virtio/started", b"virtio/extra_state":
            at = data.index(marker, device.offset)
            near.update(range(at - 20, at + 40))
    return sorted(near)


def test_truncated_anywhere(real):
    """An error, or what was there before the cut with a word about it: never silence."""
    whole = read(real).devices
    for size in places(real)[:-1]:
        stream = decoded(real[:size])
        assert stream is None or (stream.findings and not stream.described)
        if size < end_of(whole[0]):
            assert stream is None
        elif size < end_of(whole[1]):
            assert stream.devices[:1] == whole[:1]
            # What is left of the second may look like a whole one without its footer, but not like a sound one.
            assert len(stream.devices) == 1 or not stream.consistent
        else:
            assert stream.devices == whole


def test_any_byte_changed(real):
    for at in places(real)[:-1:3]:
        decoded(real[:at] + bytes([real[at] ^ 0xFF]) + real[at + 1 :])


def test_damaged_at_random():
    for seed in range(3000):
        qemu_stream_case(random.Random(seed))


@given(st.binary(max_size=300))
def test_noise_behind_the_header(data):
    decoded(b"QEVM\0\0\0\3" + data)


@given(st.binary(max_size=300), st.integers(0, 60))
def test_noise_in_a_section(noise, at):
    body = Section().body
    changed = body[:at] + noise + body[at:]
    data = migration_file(Section()).replace(body, changed)
    decoded(data)


def test_a_damaged_file_costs_no_memory():
    """Numbers that claim gigabytes, in a file that has none of them."""
    data = migration_file(Section(ports=((1, 1, 1, Chain()),)))
    tracemalloc.start()
    for at in range(8, 700, 3):
        decoded(data[:at] + b"\xff\xff\xff\xff" + data[at + 4 :])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20


def test_ten_thousand_headers_end_soon():
    """R-MIG-05: each of them looks right and none is."""
    header = bytes(Section())[:500]
    image = CountingImage(b"QEVM\0\0\0\3" + header * 10_000)
    with pytest.raises(StreamError):
        read_stream(image)


def test_status_bits_without_a_name():
    device = device_of(Section(status=0xFF))
    assert Status.FAILED in device.status
    assert device.as_dict()["status"] == 0xFF
