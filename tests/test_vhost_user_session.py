"""What vhost-user messages mean, through the real server over a real socket, with real shared memory."""

import os
import socket

import pytest
from front_end import (
    LAYOUTS,
    USER,
    VIRTIO_FEATURES,
    Bench,
    ConsoleDriver,
    Disconnected,
    FrontEnd,
    GuestMemory,
    Qemu,
    Refused,
    Uml,
    open_fds,
)

from vsport.constants import Event, Feature
from vsport.control import Message
from vsport.vhost_user import channel as channel_module
from vsport.vhost_user import memory as memory_module
from vsport.vhost_user.memory import MEM_SLOTS
from vsport.vhost_user.message import (
    BackEndRequest,
    Config,
    MemoryRegion,
    MemoryTable,
    ProtocolFeature,
    Request,
    VringAddress,
    VringFd,
    VringState,
    encode_reply,
    encode_request,
    encode_u64,
)
from vsport.vhost_user.session import OFFERED

layouts = pytest.mark.parametrize("bench", LAYOUTS.values(), ids=LAYOUTS, indirect=True)
"""Tests that are run with split rings, with packed ones, and in order."""


@pytest.fixture
def bench(tmp_path, request):
    bench = Bench(tmp_path, **getattr(request, "param", {}))
    yield bench
    bench.close()


@pytest.fixture
def front_end(bench):
    front_end = bench.connect(FrontEnd)
    front_end.negotiate(features=bench.features)
    return front_end


@pytest.fixture
def memory(bench):
    return bench.make_memory()


@pytest.fixture
def running(bench, front_end, memory):
    """A driver whose six rings are live, and whose port 1 is open."""
    front_end.share(memory)
    driver = ConsoleDriver(front_end, memory)
    for ring in front_end.rings.values():
        front_end.start(ring)
    driver.open_port()
    assert bench.device.ports[1].state.guest_connected
    return driver


def vring(index, num=0):
    return VringState(index, num).encode()


# -- acknowledgements --------------------------------------------------------------------------------------------------


def test_an_acknowledgement_is_given_also_without_reply_ack(bench):
    """R-VU-05: whoever sets the bit waits for the answer."""
    front_end = bench.connect(FrontEnd)
    front_end.tell(Request.SET_OWNER)


def test_the_message_that_turns_acknowledgements_on_is_acknowledged(bench):
    """R-VU-06."""
    front_end = bench.connect(FrontEnd)
    front_end.tell(Request.SET_PROTOCOL_FEATURES, encode_u64(ProtocolFeature.REPLY_ACK))


@pytest.mark.parametrize("request_number", [19, 20, 22, 23, 26, 27, 28, 29, 30, 33, 35, 41, 44, 999])
def test_an_unknown_request_is_refused(front_end, request_number):
    """R-VU-07, R-VU-39: and its descriptors are closed."""
    with open(os.devnull) as file:
        before = open_fds(settle=True)
        with pytest.raises(Refused):
            front_end.tell(request_number, bytes(8), [file.fileno()])
        front_end.barrier()
        assert open_fds() == before


def test_an_unknown_request_ends_the_connection_if_no_answer_is_wanted(front_end):
    """R-VU-07."""
    front_end.post(999)
    with pytest.raises(Disconnected):
        front_end.barrier()


def test_a_request_of_a_feature_that_is_not_negotiated_is_unknown(bench):
    front_end = bench.connect(FrontEnd)
    front_end.negotiate(ProtocolFeature.REPLY_ACK)
    with pytest.raises(Refused):
        front_end.tell(Request.RESET_DEVICE)


# -- features and queues -----------------------------------------------------------------------------------------------


def test_features_can_be_asked_for_at_any_time(bench):
    """R-VU-10; R-RING-27, R-RING-61, R-RING-64: and nothing is offered that does not work."""
    front_end = bench.connect(FrontEnd)
    offered = {front_end.ask_u64(Request.GET_FEATURES) for _ in range(3)}
    assert offered == {bench.device.features | Feature.PROTOCOL_FEATURES | Feature.LOG_ALL}
    assert offered.pop() & Feature.VERSION_1


def test_protocol_features_come_before_features(bench):
    """R-VU-12, R-VU-41."""
    front_end = bench.connect(FrontEnd)
    assert front_end.ask_u64(Request.GET_PROTOCOL_FEATURES) == OFFERED
    front_end.tell(Request.SET_PROTOCOL_FEATURES, encode_u64(OFFERED))


@pytest.mark.parametrize("bit", [10, 14, 17, 20, 63])
def test_a_protocol_feature_that_was_not_offered_is_refused(bench, bit):
    """R-VU-41, R-VU-42."""
    front_end = bench.connect(FrontEnd)
    with pytest.raises(Refused):
        front_end.tell(Request.SET_PROTOCOL_FEATURES, encode_u64(OFFERED | 1 << bit))


@pytest.mark.parametrize("bit", [24, 33, 34, 40, 63])
def test_a_feature_that_was_not_offered_is_refused(front_end, bit):
    with pytest.raises(Refused):
        front_end.set_features(VIRTIO_FEATURES | 1 << bit)


def test_without_protocol_features_rings_are_enabled_at_once(bench, memory):
    """R-VU-11."""
    front_end = bench.connect(FrontEnd)
    front_end.post(Request.SET_FEATURES, encode_u64(VIRTIO_FEATURES))
    front_end.share(memory)
    ring = front_end.make_ring(3, memory, 0)
    front_end.configure(ring)
    front_end.set_fd(Request.SET_VRING_KICK, 3, ring.kick_fd)
    assert bench.device.queues[3].running


def test_features_do_not_change_under_running_rings(running):
    with pytest.raises(Refused):
        running.front_end.set_features(VIRTIO_FEATURES & ~Feature.EVENT_IDX)
    running.front_end.set_features(VIRTIO_FEATURES)


def test_owner_messages_change_nothing(bench, running):
    """R-VU-13, R-VU-14."""
    running.front_end.tell(Request.SET_OWNER)
    running.front_end.tell(Request.RESET_OWNER)
    assert bench.device.ports[1].state.guest_connected
    assert bench.device.queues[5].running


def test_queues_are_counted_not_pairs(front_end):
    """R-VU-23, R-CON-13: two for each of three ports and two for control."""
    assert front_end.ask_u64(Request.GET_QUEUE_NUM) == 8


@pytest.mark.parametrize("index", [8, 255, 2**32 - 1])
def test_a_queue_that_does_not_exist_is_refused(front_end, index):
    """R-VU-22."""
    with pytest.raises(Refused):
        front_end.enable(index, True)
    with pytest.raises(Refused):
        front_end.set_fd(Request.SET_VRING_KICK, index & 0xFF, -1)
    front_end.post(Request.SET_VRING_NUM, vring(index, 8))
    with pytest.raises(Disconnected):
        front_end.barrier()


# -- configuration space and status ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 8, 12])
def test_the_configuration_space_is_read_from_its_start(front_end, size):
    """R-VU-26: QEMU reads all of it, User Mode Linux as far as the field that it wants."""
    assert front_end.get_config(size) == bytes.fromhex("5000 1900 03000000 00000000")[:size]


def test_a_read_beyond_the_configuration_space_gets_an_empty_answer(front_end):
    """R-VU-26."""
    assert front_end.ask(Request.GET_CONFIG, Config(4, 0, bytes(12)).encode()) == b""


def test_a_write_of_the_whole_configuration_space_is_accepted(front_end):
    """R-VU-27, R-CON-09: stale bytes in read-only fields do not matter, in neither kind of write."""
    for flags in (0, 1):
        front_end.tell(Request.SET_CONFIG, Config(0, flags, b"\xff" * 8 + b"A\0\0\0").encode())
    assert front_end.get_config() == bytes.fromhex("5000 1900 03000000 00000000")


@pytest.mark.parametrize(("offset", "size", "flags"), [(8, 8, 0), (8, 8, 1), (0, 12, 2)])
def test_a_write_that_makes_no_sense_is_refused(front_end, offset, size, flags):
    """R-VU-27."""
    with pytest.raises(Refused):
        front_end.tell(Request.SET_CONFIG, Config(offset, flags, bytes(size)).encode())


def test_a_status_sticks(front_end):
    """R-VU-35, R-VU-36."""
    front_end.post(Request.SET_STATUS, encode_u64(8))
    assert front_end.ask_u64(Request.GET_STATUS) == 8
    with pytest.raises(Refused):
        front_end.tell(Request.SET_STATUS, encode_u64(256))


@pytest.mark.parametrize("message", [(Request.SET_STATUS, encode_u64(0)), (Request.RESET_DEVICE, b"")])
def test_a_reset_stops_the_rings_and_forgets_the_guest(bench, running, message):
    """R-VU-30, R-VU-35, R-VU-72, R-RING-60: memory and connection stay."""
    running.front_end.tell(*message)
    assert not any(queue.running for queue in bench.device.queues)
    assert not bench.device.ports[1].state.guest_connected
    running.lay_out()
    for ring in running.front_end.rings.values():
        running.front_end.start(ring)
    running.open_port()


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wire",
    [
        [MemoryRegion(0, 0, USER, 0)],
        [MemoryRegion(0, 0x2000, USER, 0xFF000)],
        [MemoryRegion(0, 0x2000, USER, 2**64 - 0x1000)],
        [MemoryRegion(2**64 - 0x1000, 0x2000, USER, 0)],
        [MemoryRegion(0, 0x2000, 2**64 - 0x1000, 0)],
        [MemoryRegion(0, 0x2000, USER, 0), MemoryRegion(0x1000, 0x2000, USER + 0x10000, 0)],
        [MemoryRegion(0, 0x2000, USER, 0), MemoryRegion(0x10000, 0x2000, USER + 0x1000, 0)],
    ],
    ids=["empty", "short file", "offset wraps", "gpa wraps", "user wraps", "gpa overlaps", "user overlaps"],
)
def test_an_impossible_memory_table_is_refused(bench, front_end, memory, wire):
    """R-VU-62: and the old one stays, and no descriptor."""
    front_end.share(memory)
    before = open_fds(settle=True)
    with pytest.raises(Refused):
        front_end.tell(Request.SET_MEM_TABLE, MemoryTable(tuple(wire)).encode(), [memory.fd] * len(wire))
    front_end.barrier()
    assert open_fds() == before
    front_end.start(front_end.make_ring(3, memory, 0))


@pytest.mark.parametrize("kind", ["pipe", "socket", "null", "read-only"])
def test_memory_has_to_be_a_file_to_write_to(front_end, tmp_path, kind):
    """R-VU-62."""
    match kind:
        case "pipe":
            fds = os.pipe()
        case "socket":
            fds = tuple(end.detach() for end in socket.socketpair())
        case "null":
            fds = (os.open(os.devnull, os.O_RDWR),)
        case _:
            (tmp_path / "ram").write_bytes(bytes(0x2000))
            fds = (os.open(tmp_path / "ram", os.O_RDONLY),)
    with pytest.raises(Refused):
        front_end.tell(Request.SET_MEM_TABLE, MemoryTable((MemoryRegion(0, 0x1000, USER, 0),)).encode(), fds[:1])
    for fd in fds:
        os.close(fd)


def test_a_region_starts_anywhere_in_its_file(bench, front_end):
    """R-VU-60, R-VU-61: User Mode Linux's only region starts at the end of its kernel image."""
    memory = bench.make_memory((0x60C3_5000, 0x10000), offset=0x1230, user=0)
    front_end.share(memory)
    gpa = 0x60C3_5000
    ring = front_end.make_ring(3, memory, gpa)
    front_end.configure(ring)
    front_end.set_fd(Request.SET_VRING_KICK, 3, ring.kick_fd)
    front_end.enable(3, True)
    memory.memory.write(gpa + 0x4000, Message(0, Event.DEVICE_READY, 1).encode())
    ring.driver.add(readable=[(gpa + 0x4000, 8)])
    ring.driver.publish()
    ring.kick()
    front_end.until(lambda: ring.driver.collect() is not None)
    assert bench.device.driver_ready


def test_regions_come_and_go_one_by_one(bench, front_end):
    """R-VU-32, R-VU-33: a region is named by its addresses and size, its offset does not count."""
    assert front_end.ask_u64(Request.GET_MAX_MEM_SLOTS) == MEM_SLOTS
    memory = bench.make_memory((0, 0xA0000), (0xC0000, 0x40000))
    before = open_fds(settle=True)
    for region in memory.wire:
        front_end.add_region(region, memory.fd)
    with pytest.raises(Refused):
        front_end.add_region(memory.wire[0], memory.fd)
    first = memory.wire[0]
    with pytest.raises(Refused):
        front_end.remove_region(MemoryRegion(first.gpa, first.size - 1, first.front_end_addr, 0))
    front_end.remove_region(MemoryRegion(first.gpa, first.size, first.front_end_addr, 12345))
    front_end.remove_region(memory.wire[1])
    with pytest.raises(Refused):
        front_end.remove_region(memory.wire[1])
    assert open_fds() == before


def test_there_are_so_many_slots_and_no_more(bench, front_end, memory, monkeypatch):
    """R-VU-32."""
    monkeypatch.setattr(memory_module, "MEM_SLOTS", 2)
    for number in range(3):
        region = MemoryRegion(number * 0x1000, 0x1000, USER + number * 0x1000, number * 0x1000)
        if number == 2:
            with pytest.raises(Refused):
                front_end.add_region(region, memory.fd)
        else:
            front_end.add_region(region, memory.fd)


def test_a_descriptor_that_comes_with_a_removal_is_closed(bench, front_end, memory):
    """R-VU-33."""
    front_end.add_region(memory.wire[0], memory.fd)
    before = open_fds(settle=True)
    front_end.tell(Request.REM_MEM_REG, bytes(8) + memory.wire[0].encode(), [memory.fd])
    assert open_fds() <= before


def test_a_new_table_under_live_rings_is_followed(bench, running):
    """R-VU-63: the rings go on in the new mapping of the same file."""
    running.front_end.share(running.memory)
    running.offer(running.PORT_TX, b"after")
    tx = running.front_end.rings[running.PORT_TX].driver
    running.front_end.until(lambda: tx.collect() is not None)
    assert bench.device.ports[1].counters.bytes_discarded == len(b"after")


def test_a_ring_that_a_new_table_leaves_out_stops_with_an_error(bench, running):
    """R-VU-63, R-RING-77: the message itself is fine."""
    other = bench.make_memory((0x100_0000, 0x1000))
    front_end = running.front_end
    front_end.share(other)
    assert not any(queue.running for queue in bench.device.queues)
    assert all(ring.failed() == 1 for ring in front_end.rings.values())
    front_end.share(running.memory)
    for ring in front_end.rings.values():
        ring.base = bench.device.queues[ring.index].next_avail
        front_end.start(ring)
    running.say(Message(1, Event.PORT_OPEN, 0))
    front_end.until(lambda: not bench.device.ports[1].state.guest_connected)


# -- ring layout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 3, 100, 65536, 2**31])
def test_a_queue_size_that_is_no_power_of_two_is_refused(front_end, size):
    """R-VU-18, R-RING-01."""
    with pytest.raises(Refused):
        front_end.tell(Request.SET_VRING_NUM, vring(3, size))


def test_a_base_has_16_bits(front_end):
    """R-VU-18."""
    front_end.tell(Request.SET_VRING_BASE, vring(3, 65535))
    with pytest.raises(Refused):
        front_end.tell(Request.SET_VRING_BASE, vring(3, 65536))


@pytest.mark.parametrize(
    ("desc", "avail", "used"),
    [
        (8, 0x1000, 0x2000),
        (0, 0x1001, 0x2000),
        (0, 0x1000, 0x2002),
        (0x100000, 0x1000, 0x2000),
        (0xFFFF0, 0x1000, 0x2000),
        (0, 0xFFFFE, 0x2000),
        (0, 0x1000, 0xFFFC0),
    ],
)
def test_a_ring_that_is_misaligned_or_outside_memory_is_refused(front_end, memory, desc, avail, used):
    """R-VU-19, R-RING-09, R-RING-77."""
    front_end.share(memory)
    front_end.tell(Request.SET_VRING_NUM, vring(3, 8))
    bad = VringAddress(3, 0, USER + desc, USER + used, USER + avail, 0)
    with pytest.raises(Refused):
        front_end.tell(Request.SET_VRING_ADDR, bad.encode())


def test_a_bad_ring_whose_refusal_nobody_wants_costs_the_ring_not_the_connection(bench, front_end, memory):
    """R-VU-58: QEMU passes on what its guest chose, without asking for an answer; a guest's reboot heals it."""
    front_end.share(memory)
    ring = front_end.make_ring(3, memory, 0)
    front_end.set_fd(Request.SET_VRING_ERR, 3, ring.err_fd)
    front_end.post(Request.SET_VRING_NUM, vring(3, 100))
    front_end.post(Request.SET_VRING_ADDR, VringAddress(3, 0, USER + 1, USER, USER, 0).encode())
    front_end.barrier()
    assert ring.failed() == 2
    front_end.enable(3, True)
    front_end.set_fd(Request.SET_VRING_KICK, 3, ring.kick_fd)
    assert not bench.device.queues[3].running
    front_end.start(ring)
    assert bench.device.queues[3].running


def test_logging_flags_alone_do_not_stop_a_ring(bench, running):
    """R-VU-57: QEMU sends SET_VRING_ADDR for that while the guest runs."""
    ring = running.front_end.rings[5]
    running.front_end.tell(Request.SET_VRING_ADDR, running.front_end.address(ring, flags=1))
    assert bench.device.queues[5].running


# -- live or not -------------------------------------------------------------------------------------------------------


def test_a_ring_waits_for_kick_enable_and_layout(bench, front_end, memory):
    """R-VU-24, R-VU-50: in any order."""
    front_end.share(memory)
    ring = front_end.make_ring(3, memory, 0)
    running = [bench.device.queues[3].running]
    front_end.enable(3, True)
    running.append(bench.device.queues[3].running)
    front_end.set_fd(Request.SET_VRING_KICK, 3, ring.kick_fd)
    running.append(bench.device.queues[3].running)
    front_end.configure(ring)
    front_end.barrier()
    running.append(bench.device.queues[3].running)
    front_end.set_fd(Request.SET_VRING_KICK, 3, ring.kick_fd)
    running.append(bench.device.queues[3].running)
    assert running == [False, False, False, False, True]


def test_a_disabled_ring_waits_and_its_backlog_is_taken_when_it_is_enabled(bench, running):
    """R-VU-51, R-VU-52, R-VU-53: no kick is needed then."""
    front_end, tx = running.front_end, running.front_end.rings[3].driver
    front_end.enable(3, False)
    running.say(Message(1, Event.PORT_OPEN, 0))
    front_end.barrier()
    while tx.collect() is not None:
        pass
    assert tx.in_flight == 1
    assert bench.device.ports[1].state.guest_connected
    front_end.enable(3, True)
    front_end.until(lambda: tx.collect() is not None)
    assert not bench.device.ports[1].state.guest_connected


def test_a_ring_is_enabled_or_not(front_end):
    """R-VU-24."""
    with pytest.raises(Refused):
        front_end.tell(Request.SET_VRING_ENABLE, vring(3, 2))


def test_get_vring_base_stops_a_ring_and_says_where(bench, running):
    """R-VU-20, R-VU-51: a late kick does not start it again."""
    front_end = running.front_end
    assert front_end.get_base(3) == 3
    running.say(Message(1, Event.PORT_OPEN, 0))
    front_end.barrier()
    assert bench.device.ports[1].state.guest_connected
    ring = front_end.rings[3]
    ring.base = 3
    front_end.start(ring)
    front_end.until(lambda: not bench.device.ports[1].state.guest_connected)
    assert front_end.get_base(3) == 4


packed = pytest.mark.parametrize("bench", [LAYOUTS["packed"]], ids=["packed"], indirect=True)


@packed
def test_a_packed_ring_has_two_places_which_are_one(running):
    """R-VU-18, R-VU-20: where the device would take a chain is where it would return it; each has its wrap counter."""
    front_end = running.front_end
    ring = front_end.rings[running.CONTROL_TX]
    assert front_end.get_base(ring.index) == 0x8003_8003
    for num in (0x8003_8002, 0x8003_0003, 0x0003_8003, 3, 0x8000_0000):
        with pytest.raises(Refused):
            front_end.tell(Request.SET_VRING_BASE, vring(ring.index, num))
    ring.base = 0x8003_8003
    front_end.start(ring)
    for _ in range(6):  # and a turn further
        running.say(Message(1, Event.PORT_OPEN, 1))
        front_end.until(ring.driver.all_used)
    assert front_end.get_base(ring.index) == 0x0001_0001


@packed
def test_a_packed_ring_that_begins_beyond_its_end_does_not_start(bench, front_end, memory):
    """R-VU-18, R-RING-40: 7 slots are a ring, and slot 7 is none of them."""
    front_end.share(memory)
    ring = front_end.make_ring(3, memory, 0, size=7)
    ring.base = 0x8007_8007
    with pytest.raises(Refused):
        front_end.start(ring)
    ring.base = 0x8006_8006
    front_end.start(ring)
    assert bench.device.queues[3].size == 7


@packed
def test_chains_in_flight_are_not_kept_for_packed_rings(bench, front_end):
    """R-VU-90."""
    inflight = front_end.get_inflight(8, 8)
    with pytest.raises(Refused):
        front_end.set_inflight(inflight)
    inflight.close()


def test_a_kick_of_a_ring_that_is_not_live_is_ignored(bench, front_end, memory):
    """R-RING-83: with nothing set up, and with nothing new."""
    ring = front_end.make_ring(3, memory, 0)
    front_end.set_fd(Request.SET_VRING_KICK, 3, ring.kick_fd)
    ring.kick()
    front_end.barrier()
    front_end.share(memory)
    front_end.start(ring)
    for _ in range(100):
        ring.kick()
        front_end.barrier()
    assert bench.device.queues[3].running


def test_a_ring_without_kick_descriptor_is_polled(bench, running):
    """R-VU-21."""
    running.front_end.set_fd(Request.SET_VRING_KICK, 3, -1)
    tx = running.front_end.rings[3].driver
    running.say(Message(1, Event.PORT_OPEN, 0))
    running.front_end.until(lambda: not bench.device.ports[1].state.guest_connected)
    running.front_end.until(lambda: tx.collect() is not None or not tx.in_flight)
    running.front_end.set_fd(Request.SET_VRING_KICK, 3, running.front_end.rings[3].kick_fd)
    running.say(Message(1, Event.PORT_OPEN, 1))
    running.front_end.until(lambda: bench.device.ports[1].state.guest_connected)


def test_a_ring_without_call_descriptor_works(bench, running):
    """R-VU-21: the driver polls."""
    for index in running.QUEUES:
        running.front_end.set_fd(Request.SET_VRING_CALL, index, -1)
    running.say(Message(1, Event.PORT_OPEN, 0))
    running.front_end.until(lambda: not bench.device.ports[1].state.guest_connected)


def test_a_new_call_descriptor_is_signalled_once_and_the_old_one_is_closed(bench, running):
    """R-VU-55."""
    ring = running.front_end.rings[3]
    ring.called()
    before = open_fds(settle=True)
    fresh = os.eventfd(0, os.EFD_NONBLOCK)
    running.front_end.set_fd(Request.SET_VRING_CALL, 3, fresh)
    assert os.eventfd_read(fresh) == 1
    assert ring.called() == 0
    assert open_fds() == before + 1
    os.close(fresh)


def test_a_call_descriptor_of_a_stopped_ring_is_not_signalled(front_end):
    """R-VU-54."""
    fresh = os.eventfd(0, os.EFD_NONBLOCK)
    front_end.set_fd(Request.SET_VRING_CALL, 3, fresh)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(fresh)
    os.close(fresh)


def test_a_call_descriptor_may_be_a_socket_and_may_break(bench, running):
    """R-VU-98: exactly 8 bytes are written, and a peer that has gone does no harm."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            running.front_end.set_fd(Request.SET_VRING_CALL, running.CONTROL_RX, theirs.fileno())
        assert len(ours.recv(100)) == 8
    running.say(Message(1, Event.PORT_READY, 1))
    running.wait_for(Event.PORT_NAME, Event.PORT_OPEN)


def test_a_kick_descriptor_can_be_exchanged_under_a_live_ring(bench, running):
    ring = running.front_end.rings[3]
    os.close(ring.kick_fd)
    ring.kick_fd = os.eventfd(0, os.EFD_NONBLOCK)
    running.front_end.set_fd(Request.SET_VRING_KICK, 3, ring.kick_fd)
    running.say(Message(1, Event.PORT_OPEN, 0))
    running.front_end.until(lambda: not bench.device.ports[1].state.guest_connected)


def test_a_broken_queue_is_reported_once_and_the_others_go_on(bench, running):
    """R-RING-63, R-RING-70 to 84: its error descriptor, and the status if the front end looks."""
    ring = running.front_end.rings[running.PORT_TX]
    assert running.front_end.ask_u64(Request.GET_STATUS) == 0
    running.memory.memory.write(ring.driver.avail + 2, b"\xff\x7f")
    for _ in range(3):
        ring.kick()
        running.front_end.barrier()
    running.front_end.until(lambda: not bench.device.queues[running.PORT_TX].running)
    assert ring.failed() == 1
    assert running.front_end.ask_u64(Request.GET_STATUS) == 0x40
    running.say(Message(1, Event.PORT_OPEN, 0))
    running.front_end.until(lambda: not bench.device.ports[1].state.guest_connected)


# -- the back-end channel ----------------------------------------------------------------------------------------------


CONFIG_CHANGE = encode_request(BackEndRequest.CONFIG_CHANGE, need_reply=True)
CONFIG_CHANGE_OK = encode_reply(BackEndRequest.CONFIG_CHANGE, encode_u64(0))


def received(front_end):
    try:
        return front_end.channel.recv(1000)
    except BlockingIOError:
        return b""


def test_a_change_of_the_configuration_is_told(bench, running):
    """R-VU-95."""
    running.front_end.open_channel()
    bench.device.on_config_change()
    assert received(running.front_end) == CONFIG_CHANGE


def test_changes_are_told_one_at_a_time(bench, running):
    """R-VU-97: what happens while a request is unanswered becomes one more, and messages go on meanwhile."""
    front_end = running.front_end
    front_end.open_channel()
    for _ in range(3):
        bench.device.on_config_change()
    front_end.barrier()
    assert received(front_end) == CONFIG_CHANGE
    front_end.channel.send(CONFIG_CHANGE_OK[:7])
    front_end.barrier()
    front_end.channel.send(CONFIG_CHANGE_OK[7:])
    front_end.until(lambda: received(front_end) == CONFIG_CHANGE)
    front_end.channel.send(CONFIG_CHANGE_OK)
    front_end.barrier()
    assert received(front_end) == b""


def test_both_sides_may_wait_for_each_other(bench, running):
    """R-VU-97: the front end wants its acknowledgement before it looks at our request."""
    front_end = running.front_end
    front_end.open_channel()
    front_end.send(encode_request(Request.SET_VRING_ENABLE, vring(5, 1), need_reply=True))
    bench.device.on_config_change()
    assert front_end.reply(Request.SET_VRING_ENABLE) == encode_u64(0)
    front_end.channel.send(CONFIG_CHANGE_OK)
    front_end.barrier()


def test_an_answer_that_does_not_come_is_not_waited_for_forever(bench, running, monkeypatch):
    """R-VU-97: later changes are told all the same, and an answer that comes too late is no harm."""
    monkeypatch.setattr(channel_module, "REPLY_SECONDS", 0.01)
    front_end = running.front_end
    front_end.open_channel()
    bench.device.on_config_change()
    bench.device.on_config_change()
    assert received(front_end) == CONFIG_CHANGE
    front_end.until(lambda: received(front_end) == CONFIG_CHANGE)
    for _ in range(3):
        front_end.channel.send(CONFIG_CHANGE_OK)
    front_end.barrier()


def test_a_refusal_on_the_channel_is_reported_and_descriptors_there_are_closed(bench, running, caplog):
    front_end = running.front_end
    front_end.open_channel()
    before = open_fds(settle=True)
    for _ in range(20):
        bench.device.on_config_change()
        assert received(front_end) == CONFIG_CHANGE
        refusal = encode_reply(BackEndRequest.CONFIG_CHANGE, encode_u64(1))
        socket.send_fds(front_end.channel, [refusal], [running.memory.fd])
        front_end.barrier()
    assert caplog.text.count("the front end refused request 2 of ours: 1") == 20
    assert open_fds() == before


def test_a_channel_whose_other_end_has_just_gone_is_closed(bench, running):
    running.front_end.open_channel()
    running.front_end.channel.close()
    bench.device.on_config_change()
    running.front_end.barrier()


def test_a_suspended_device_asks_for_nothing_until_it_runs_again(bench, running):
    """R-VU-54."""
    front_end = running.front_end
    front_end.open_channel()
    for index in running.QUEUES:
        front_end.enable(index, False)
    bench.device.on_config_change()
    front_end.barrier()
    assert received(front_end) == b""
    front_end.enable(3, True)
    assert received(front_end) == CONFIG_CHANGE


def test_without_reply_ack_no_answer_is_asked_for(bench, memory):
    front_end = bench.connect(FrontEnd)
    front_end.negotiate(OFFERED & ~ProtocolFeature.REPLY_ACK)
    front_end.share(memory)
    front_end.start(front_end.make_ring(3, memory, 0))
    front_end.open_channel()
    for _ in range(2):
        bench.device.on_config_change()
    assert received(front_end) == encode_request(BackEndRequest.CONFIG_CHANGE) * 2


@pytest.mark.parametrize(
    "answer",
    [b"", encode_request(2, bytes(8)), encode_reply(2, bytes(4)) + bytes(4)],
    ids=["end of file", "request", "wrong size"],
)
def test_a_channel_that_breaks_is_closed_and_nothing_else(bench, running, answer):
    front_end = running.front_end
    front_end.open_channel()
    before = open_fds(settle=True)
    front_end.channel.send(answer)
    if not answer:
        front_end.channel.shutdown(socket.SHUT_RDWR)
    front_end.until(lambda: open_fds() < before)
    bench.device.on_config_change()
    front_end.barrier()
    front_end.channel.close()
    front_end.open_channel()
    assert received(front_end) == CONFIG_CHANGE


def test_a_channel_has_to_be_a_stream_socket(front_end):
    """R-VU-25."""
    before = open_fds(settle=True)
    with open(os.devnull) as file, pytest.raises(Refused):
        front_end.tell(Request.SET_BACKEND_REQ_FD, b"", [file.fileno()])
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, pytest.raises(Refused):
        front_end.tell(Request.SET_BACKEND_REQ_FD, b"", [sock.fileno()])
    assert open_fds() == before


# -- as QEMU and User Mode Linux do it ---------------------------------------------------------------------------------


@pytest.fixture
def qemu(bench, memory):
    front_end = bench.connect(Qemu)
    front_end.attach(num_vqs=8)
    front_end.features = bench.features
    driver = ConsoleDriver(front_end, memory)
    front_end.resume(memory)
    driver.open_port()
    return driver


@pytest.fixture
def uml(bench):
    memory = bench.make_memory((0x60C3_4000, 1 << 20), offset=0x60C3_4000 & 0xFFFFF, user=0)
    front_end = bench.connect(Uml)
    front_end.attach()
    front_end.features = bench.features
    return front_end, memory


@layouts
def test_qemu_starts(bench, qemu):
    """R-VU-13, R-VU-34, R-VU-36, R-VU-43, R-VU-55, R-VU-57, R-VU-58."""
    assert bench.device.ports[1].state.guest_connected
    assert all(bench.device.queues[index].running for index in qemu.QUEUES)


@layouts
def test_a_paused_qemu_goes_on_where_it_was(bench, qemu):
    """R-VU-57, R-VU-70, R-VU-71, R-MIG-25: the port stays open, and nothing is lost."""
    opens = bench.device.ports[1].counters.guest_opens
    for _ in range(3):
        qemu.front_end.pause()
        assert not any(queue.running for queue in bench.device.queues)
        qemu.offer(qemu.PORT_TX, b"while it is paused")
        qemu.front_end.resume(qemu.memory)
        qemu.front_end.barrier()
    assert bench.device.ports[1].state.guest_connected
    assert bench.device.ports[1].counters.guest_opens == opens
    assert bench.device.ports[1].counters.bytes_discarded == 3 * len(b"while it is paused")
    assert qemu.hear() == []


@layouts
def test_a_rebooted_qemu_begins_anew(bench, qemu):
    """R-VU-70, R-VU-71, R-CON-38: rings that go back to 0 tell it from a pause; regions stay (R-VU-34)."""
    for _ in range(3):
        qemu.front_end.pause()
        assert bench.device.ports[1].state.guest_connected
        qemu.lay_out()
        qemu.front_end.resume(qemu.memory)
        assert not bench.device.ports[1].state.guest_connected
        qemu.open_port()
    assert bench.device.ports[1].counters.guest_opens == 4


@layouts
def test_a_reboot_into_a_driver_with_fewer_queues_begins_anew(bench, qemu):
    """R-VU-71: firmware may use the first two queues only."""
    qemu.front_end.pause()
    for index in (2, 3, 4, 5):
        qemu.front_end.rings.pop(index).close()
    for index in (0, 1):
        qemu.memory.memory.write(index * 0x2000, bytes(0x2000))
        qemu.front_end.make_ring(index, qemu.memory, index * 0x2000)
    qemu.front_end.resume(qemu.memory)
    assert bench.device.queues[1].running
    assert not bench.device.queues[3].running


@layouts
def test_a_ring_that_is_not_in_memory_any_more_says_nothing_about_a_reboot(bench, qemu):
    """R-VU-71: its used index cannot be read, so the rings that can be read decide."""
    front_end = qemu.front_end
    front_end.pause()
    for index in (2, 4):
        front_end.tell(Request.SET_VRING_BASE, vring(index, 0x8000_8000 if front_end.rings[index].driver.packed else 0))
    front_end.remove_region(qemu.memory.wire[0])
    other = bench.make_memory((0x100_0000, 0x10000))
    front_end.add_region(other.wire[0], other.fd)
    ring = front_end.make_ring(6, other, 0x100_0000)
    front_end.start(ring)
    assert bench.device.queues[6].running
    assert bench.device.ports[1].state.guest_connected


@layouts
def test_front_ends_that_start_rings_one_by_one_are_understood(bench, running):
    """R-VU-71: a pause stays a pause, a reboot a reboot, whichever ring comes first."""
    front_end = running.front_end
    for index in running.QUEUES:
        front_end.rings[index].base = front_end.get_base(index)
    for index in running.QUEUES:
        front_end.start(front_end.rings[index])
    assert bench.device.ports[1].state.guest_connected
    for index in running.QUEUES:
        front_end.get_base(index)
    running.lay_out()
    for index in running.QUEUES:
        front_end.start(front_end.rings[index])
    assert not bench.device.ports[1].state.guest_connected
    running.open_port()


def test_user_mode_linux_binds_its_driver_again_and_again(bench, uml):
    """R-VU-06, R-VU-19, R-VU-44, R-VU-56, R-VU-61, R-VU-72, R-VU-98: from 0, over rings that nobody stopped."""
    front_end, memory = uml
    assert front_end.queues == 8
    driver = ConsoleDriver(front_end, memory)
    for bound in range(1, 4):
        front_end.bind(memory)
        driver.open_port()
        assert bench.device.ports[1].counters.guest_opens == bound
        front_end.unbind()
        assert not any(queue.running for queue in bench.device.queues)
        driver.lay_out()


def test_a_broken_ring_stays_broken_under_a_new_table(bench, running):
    """R-VU-63: only the driver's or the front end's restart heals it."""
    ring = running.front_end.rings[running.PORT_TX]
    running.memory.memory.write(ring.driver.avail + 2, b"\xff\x7f")
    ring.kick()
    running.front_end.until(lambda: not bench.device.queues[running.PORT_TX].running)
    running.front_end.share(running.memory)
    assert not bench.device.queues[running.PORT_TX].running
    assert bench.device.queues[running.CONTROL_TX].running
    assert ring.failed() == 1


def test_a_guest_memory_of_its_own():
    """The front end's memory closes its descriptors, or the leak checks above would mean nothing."""
    before = open_fds(settle=True)
    memory = GuestMemory()
    memory.close()
    assert open_fds() == before


def test_kick_payload_names_the_queue(front_end):
    """R-VU-21: index and flag in one number."""
    front_end.tell(Request.SET_VRING_KICK, VringFd(2, True).encode())
