"""From a QEMU migration file to a device that goes on: what is converted, what is refused, what the host then gets."""

from dataclasses import replace

import pytest
from fuzz_qemu_stream import convert, decoded
from qemu_files import INDIRECT, PACKED, VERSION_1, Chain, GuestRam, Section, Target, migration_file, recorded

from vsport.connection import Cause, OnRestore, State
from vsport.constants import QUEUE_CONTROL_RX, Event
from vsport.control import Message
from vsport.document import DocumentError
from vsport.qemu_restore import FromQemu, QueueSetup, from_qemu
from vsport.qemu_stream import BytesImage, read_stream
from vsport.sim import Direct, SimulatedGuest
from vsport.snapshot import PortConfig, PortState, QueueState, Snapshot

MULTIPORT, EVENT_IDX = 2, 1 << 29
MEMORY = 2 << 20
TX = 5
"""The queue on which port 1 transmits."""


def stream_of(*sections, **options):
    return read_stream(BytesImage(migration_file(*sections, **options)))


def targets(*ids):
    return {id: PortConfig(id, f"org.test.{id}") for id in ids}


def converted(section, *ids, memory=None):
    ids = ids or [port[0] for port in section.ports]
    return from_qemu(stream_of(section), targets(*ids), memory=memory)


def states(snapshot):
    return {port.config.id: port.state for port in snapshot.ports}


# -- what comes out ----------------------------------------------------------------------------------------------------


def test_the_recorded_file():
    stream = read_stream(BytesImage(recorded()))
    device = stream.devices[0]
    moved = from_qemu(stream, targets(1, 2, 3, 4, 5), idstr=device.idstr)
    assert states(moved.snapshot) == {1: State.A, 2: State.C, 3: State.A, 4: State.D, 5: State.B}
    assert [port.session for port in moved.snapshot.ports] == [1, 1, 1, 0, 0]
    assert moved.snapshot.driver_ready
    assert moved.snapshot.waiting == ()
    assert (moved.snapshot.max_ports, moved.snapshot.cols, moved.snapshot.rows) == (31, 0, 0)
    assert moved.snapshot.features == MULTIPORT | INDIRECT | EVENT_IDX | VERSION_1  # and RING_RESET is the VMM's
    assert [queue.index for queue in moved.queues] == list(range(64))
    half = {queue.index: (queue.next_avail, queue.offset) for queue in moved.snapshot.queues if queue.offset}
    assert half == {9: (device.queues[9].last_avail - 1, device.ports[2].element.bytes_taken)}
    assert Snapshot.decode(moved.snapshot.encode()) == moved.snapshot


def test_a_file_that_was_written_here():
    chain = Chain(head=5, segments=((0x1000, 100), (0x5000, 200)), iov_idx=1, iov_offset=50)
    section = Section(ports=((2, 0, 1, None), (1, 1, 1, chain)), queues={4: {"desc": 0}}, size=(132, 43))
    assert converted(section) == FromQemu(
        Snapshot(
            max_ports=3,
            cols=132,
            rows=43,
            features=MULTIPORT | INDIRECT | VERSION_1,
            driver_ready=True,
            queues=tuple(
                QueueState(index, 128, *((8, 150) if index == TX else (9, 0))) for index in (0, 1, 2, 3, 5, 6, 7)
            ),
            ports=(
                PortState(PortConfig(1, "org.test.1"), State.A, added=True, session=1),
                PortState(PortConfig(2, "org.test.2"), State.C, added=True, session=1),
            ),
        ),
        tuple(
            QueueSetup(
                index,
                128,
                desc=0x10000 * (index + 1),
                avail=0x10000 * (index + 1) + 2048,
                used=0x10000 * (index + 1) + 4096,
                base=8 if index == TX else 9,
            )
            for index in (0, 1, 2, 3, 5, 6, 7)
        ),
    )


def test_an_index_before_the_first_one():
    """R-MIG-24: 16 bits, which wrap."""
    section = Section(ports=((1, 1, 1, Chain()),), queues={TX: {"last_avail": 0}})
    assert [queue.next_avail for queue in converted(section).snapshot.queues if queue.offset] == [65535]


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({}, False),
        ({"queues": {3: {"last_avail": 1}}}, True),
        ({"queues": {2: {"last_avail": 1}}}, True),
        ({"ports": ((1, 1, 0, None), (2, 0, 0, None))}, True),
        ({"last_avail": 7, "status": 3}, False),
    ],
)
def test_whether_the_driver_has_asked_for_its_ports(changes, asked):
    """By what went over the control queues. Each port counts as ready, then, and otherwise none."""
    section = Section(**{"ports": ((1, 0, 0, None), (2, 0, 1, None)), "last_avail": 0, **changes})
    snapshot = converted(section).snapshot
    assert (snapshot.driver_ready, {port.added for port in snapshot.ports}) == (asked, {asked})
    assert {port.state.device_ready for port in snapshot.ports} == {asked}


@pytest.mark.parametrize("status", [0, 3, 11])
def test_a_driver_that_does_not_run_has_no_queues(status):
    moved = converted(Section(ports=((1, 0, 1, None),), status=status))
    assert (moved.queues, moved.snapshot.queues) == ((), ())
    assert states(moved.snapshot) == {1: State.C_UNREADY}


@pytest.mark.parametrize(("opened", "state"), [(1, State.A), (0, State.C_UNREADY)])
def test_without_multiport_nobody_says_that_the_port_is_ready(opened, state):
    """R-CON-37."""
    section = Section(ports=((0, opened, 1, None), (1, 0, 0, None)), features=VERSION_1)
    snapshot = converted(section).snapshot
    assert states(snapshot) == {0: state, 1: State.B_UNREADY}
    assert not snapshot.driver_ready
    assert Snapshot.decode(snapshot.encode()) == snapshot


def test_a_legacy_driver_on_a_bus_without_pci():
    """R-MIG-12, 2.7.2: the rings lie behind each other, and any layout of chains was always fine."""
    section = Section(mmio=True, idstr="virtio-mmio@a003e00/virtio-console", features=MULTIPORT | 1 << 27)
    moved = converted(section)
    assert moved.snapshot.features == MULTIPORT
    assert [queue.parts for queue in moved.queues[:2]] == [(0x10000, 0x10800, 0x11000), (0x20000, 0x20800, 0x21000)]


def test_one_of_several_devices():
    first, second = Section(idstr="a/virtio-console", id=1), Section(idstr="b/virtio-console", id=2, max_ports=9)
    stream = stream_of(first, second)
    assert from_qemu(stream, targets(1), idstr="b/virtio-console").snapshot.max_ports == 9
    for idstr, says in [(None, "there are 2 devices in the file, say which one: a/"), ("c", "no device 'c' in the")]:
        with pytest.raises(DocumentError, match=says):
            from_qemu(stream, targets(1), idstr=idstr)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "says"),
    [
        (Section(ports_map=7), "contradicts itself: port 2 is in the map of ports but has no state (R-MIG-19)"),
        (Section(num=1025), "contradicts itself: queue 0: 1025 entries"),
        (Section(ports=((1, 1, 1, Chain(iov_idx=2)),)), "contradicts itself: port 1: it goes on in segment 2 of 2"),
        (Section(ports=((1, 1, 1, Chain(0, ((0, 1 << 32),), 0, 0)),)), "longer than a descriptor can say"),
        (Section(version=2), "version 2 of its section does not say what was half sent; let a newer QEMU write it"),
        (Section(max_ports=128), "it has max_ports=128, and 127 are possible here (R-VU-22)"),
        (Section(subsections=(("virtio/broken", b"\1"),)), "given it up as broken by its driver"),
        (Section(status=15 | 64), "given it up as broken by its driver"),
        (Section(features=MULTIPORT | VERSION_1 | PACKED), "packed rings; start the guest with packed=off"),
        (Section(features=MULTIPORT | VERSION_1 | 1 << 33), "not there: ACCESS_PLATFORM; start the guest without"),
        (Section(features=MULTIPORT | 1 << 24 | 1 << 30), "not there: NOTIFY_ON_EMPTY BAD_FEATURE;"),
        (Section(features=MULTIPORT | VERSION_1 | 1 << 50), "not there: bit 50;"),
        (Section(features=2, config=bytes.fromhex("00000000 00000003 00000000")), "of a big-endian guest"),
        (Section(queues={7: {"num": 96}}), "queue 7: size 96 is no power of two (R-RING-01)"),
        (Section(queues={7: {"desc": 0x10008}}), "queue 7: its descriptor table is at 0x10008, where none can be"),
        (Section(queues={7: {"desc": (1 << 64) - 4096}}), "queue 7: its used ring is at 0x10000000000000000"),
    ],
)
def test_what_cannot_be_gone_on_with(section, says):
    """R-MIG-24: one line that says what is wrong, and where it can be helped."""
    with pytest.raises(DocumentError) as caught:
        converted(section)
    assert says in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ((1,), "the target lacks port 2, which the file has; plug the same ports, by their nr"),
        ((0,), "the target lacks ports 1, 2, which the file has"),
        ((1, 2, 0, 9), "the target has ports 0, 9, which the file lacks; plug them after the restore"),
    ],
)
def test_ports_have_to_be_the_same_at_both_ends(ids, says):
    """R-MIG-19."""
    with pytest.raises(DocumentError, match=r"^0000:00:04\.0.virtio-console: ") as caught:
        converted(Section(ports=((1, 0, 0, None), (2, 0, 0, None))), *ids)
    assert says in str(caught.value)


def test_a_file_without_a_device():
    with pytest.raises(DocumentError, match="no virtio-serial device in the file"):
        from_qemu(stream_of(), {})


def test_a_mapping_that_is_none_of_ids():
    with pytest.raises(ValueError, match="the id of its port"):
        from_qemu(stream_of(Section()), {1: PortConfig(2)})


# -- with guest memory -------------------------------------------------------------------------------------------------

HALF = Section(ports=((1, 1, 1, Chain(5, ((0x180000, 100), (0x185000, 200)), 1, 50)),))
"""150 of 300 bytes have gone."""
CHAIN = (5, [(0x180000, bytes(range(100))), (0x185000, bytes(range(200)))])
NEXT_CHAIN = (9, [(0x190000, b"and what the guest wrote next")])


def laid_out(section, *chains):
    """Memory of the guest whose device `section` is, with these chains in the queue of port 1."""
    ram = GuestRam(bytearray(MEMORY))
    for setup in converted(section).queues:
        ram.offer(setup, *(chains if setup.index == TX else ()))
    return ram


def test_rings_that_are_as_the_file_says():
    ram = laid_out(HALF, CHAIN, NEXT_CHAIN)
    assert converted(HALF, memory=ram.memory) == converted(HALF)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        (
            "avail",
            9 + 129,
            "queue 5: it is at 9 of the available ring, which is at 138, the used ring at 8: this is",
        ),
        ("avail", 8, "the available ring, which is at 8, the used ring at 8: this is not the memory of that guest"),
        ("used", 10, "the available ring, which is at 10, the used ring at 10: this is not the memory of that guest"),
        ("used", (9 - 129) & 0xFFFF, "which is at 10, the used ring at 65416"),
        ("head", 6, "the half-sent chain begins at 5, and of 1 in use the last at 6: this is not the memory of"),
        ("used", 9, "the half-sent chain begins at 5, and of 0 in use"),
    ],
)
def test_rings_that_are_not(field, value, says):
    """R-MIG-18, R-MIG-24."""
    ram = laid_out(HALF, CHAIN, NEXT_CHAIN)
    (setup,) = (setup for setup in converted(HALF).queues if setup.index == TX)
    place = {"avail": setup.avail + 2, "used": setup.used + 2, "head": setup.avail + 4 + 2 * 8}[field]
    ram.memory.write(place, value.to_bytes(2, "little"))
    with pytest.raises(DocumentError) as caught:
        converted(HALF, memory=ram.memory)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("desc", "part"),
    [
        (MEMORY - 2032, "descriptor table"),
        (MEMORY - 2048 - 256, "available ring"),
        (MEMORY - 4096, "used ring"),
        (1 << 40, "descriptor table"),
    ],
)
def test_rings_outside_of_guest_memory(desc, part):
    """R-MIG-24."""
    ram = laid_out(HALF, CHAIN)
    section = replace(HALF, queues={7: {"desc": desc}})
    with pytest.raises(DocumentError, match=rf"queue 7: its {part} at 0x[0-9a-f]+ is not in guest memory"):
        converted(section, memory=ram.memory)


# -- a device that goes on ---------------------------------------------------------------------------------------------

EVERYTHING = bytes(range(100)) + bytes(range(200)) + NEXT_CHAIN[1][0][1]
CONTROL_BUFFERS = [(n, [(0x1A0000 + 64 * n, bytes(64))]) for n in range(8)]
HEARD_OPEN = [(False, Cause.RESTORE), (True, Cause.RESTORE)]


def moved(section, *chains, **options):
    """The device of a file, brought over with its guest's memory; returns (target, memory, queues by index)."""
    stream = stream_of(section)
    ram = laid_out(section, *chains)
    (control,) = (setup for setup in converted(section).queues if setup.index == QUEUE_CONTROL_RX)
    ram.offer(control, *CONTROL_BUFFERS, writable=True)
    target = Target(stream.devices[0], **options)
    queues = {setup.index: setup for setup in target.restore(stream, stream.devices[0], ram).queues}
    return target, ram, queues


def told(ram, control):
    """What the device has told the guest since."""
    used = ram.returned(control)
    return [Message.decode(ram.memory.read(0x1A0000 + 64 * head, length)) for head, length in used]


@pytest.mark.parametrize("guest", [0, 1])
@pytest.mark.parametrize("was_there", [0, 1])
@pytest.mark.parametrize("is_there", [False, True])
def test_the_bits_of_a_restored_port(guest, was_there, is_there):
    """R-MIG-20: the back end hears that the guest is there, the guest hears what is different about the host."""
    target, ram, queues = moved(Section(ports=((1, guest, was_there, None),)), hosts=[1] if is_there else [])
    assert target.states() == {1: State((is_there, True, bool(guest)))}
    assert target.takers[1].heard == HEARD_OPEN[: 1 + guest]
    says = [0] * was_there + [1] * is_there
    assert told(ram, queues[QUEUE_CONTROL_RX]) == [Message(1, Event.PORT_OPEN, value) for value in says]


@pytest.mark.parametrize("features", [0, EVENT_IDX])
def test_a_throttled_port_goes_on_at_the_right_byte(features):
    """R-MIG-21, R-MIG-24."""
    section = replace(HALF, features=HALF.features | features)
    target, ram, queues = moved(section, CHAIN, NEXT_CHAIN, hosts=[1], on_restore=OnRestore.RESUME)
    assert target.states() == {1: State.A}
    assert target.takers[1].received == EVERYTHING[150:]
    assert ram.returned(queues[TX]) == [(5, 0), (9, 0)]
    assert told(ram, queues[QUEUE_CONTROL_RX]) == []


@pytest.mark.parametrize(("segment", "offset"), [(0, 0), (0, 1), (0, 99), (0, 100), (1, 0), (1, 1), (1, 199), (1, 200)])
def test_wherever_the_host_stopped(segment, offset):
    """R-MIG-21: also between two segments, which can be said in two ways, and at the end."""
    chain = replace(HALF.ports[0][3], iov_idx=segment, iov_offset=offset)
    section = replace(HALF, ports=((1, 1, 1, chain),))
    target, ram, queues = moved(section, CHAIN, NEXT_CHAIN, hosts=[1], on_restore=OnRestore.RESUME)
    assert target.takers[1].received == EVERYTHING[100 * segment + offset :]
    assert ram.returned(queues[TX]) == [(5, 0), (9, 0)]


@pytest.mark.parametrize("hosts", [(), (1,)])
def test_what_was_meant_for_a_host_that_stayed_behind_reaches_no_other(hosts):
    """R-CON-48: the chains go back to the guest, and then it hears."""
    target, ram, queues = moved(HALF, CHAIN, NEXT_CHAIN, hosts=hosts)
    assert target.takers[1].received == b""
    assert ram.returned(queues[TX]) == [(5, 0), (9, 0)]
    assert target.device.ports[1].counters.bytes_discarded == len(EVERYTHING) - 150


def test_a_driver_that_has_not_begun_hears_of_its_ports_when_it_does():
    section = Section(ports=((1, 0, 1, None),), status=0, features=0)
    target = Target(stream_of(section).devices[0], hosts=[1])
    target.restore(stream_of(section), stream_of(section).devices[0])
    guest = SimulatedGuest(Direct(target.device))
    guest.boot()
    assert guest.port("org.test.1").host_connected


# -- damaged files -----------------------------------------------------------------------------------------------------


def test_cut_short_at_any_byte():
    """Nothing is converted, or all: a file may lack what comes behind its last device (R-MIG-04)."""
    data = migration_file(Section())
    whole = converted(Section()).snapshot
    outcomes = []
    for size in range(len(data)):
        stream = decoded(data[:size])
        outcomes += [convert(stream, device) for device in stream.devices] if stream else [None]
    assert [snapshot for snapshot in outcomes if snapshot not in (None, whole)] == []
    assert outcomes.count(whole) < 10


def test_any_byte_changed():
    """Whatever comes out could have come from a live device."""
    data = migration_file(Section())
    outcomes = [decoded(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]) for at in range(len(data))]
    assert any(stream and not stream.consistent for stream in outcomes)
    assert any(stream and stream.consistent for stream in outcomes)
