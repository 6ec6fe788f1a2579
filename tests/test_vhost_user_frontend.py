"""The library's front end: against a back end in another process, and against one that does not know how to behave."""

import contextlib
import os
import select
import socket
import struct
import time

import pytest
from front_end import DaemonProcess, Machine, open_fds

from vsport._ring import DriverQueue
from vsport.constants import Event, Feature
from vsport.control import Message
from vsport.errors import BackEndError, HostError
from vsport.loop import Loop
from vsport.snapshot import Snapshot
from vsport.vhost_user.frontend import (
    PAGE,
    Disconnected,
    FrontEnd,
    GuestMemory,
    PageLog,
    Refused,
)
from vsport.vhost_user.message import (
    BackEndRequest,
    Config,
    InflightArea,
    MemoryRegion,
    ProtocolFeature,
    Request,
    VringState,
    encode_reply,
    encode_request,
    encode_u64,
)

# -- a back end in another process -------------------------------------------------------------------------------------


class Elsewhere:
    """A daemon of its own, a host program at its chardev, a machine on it whose loop is in this process."""

    def __init__(self, directory, name):
        self.chardev_path = str(directory / f"c{name}.sock")
        chardev = f"socket,id=c0,path={self.chardev_path},server=on,wait=off"
        self.daemon = DaemonProcess(
            str(directory / f"vu{name}.sock"), chardev, "virtserialport,chardev=c0,name=org.test.0"
        )

    def connect(self):
        return FrontEnd.connect(self.daemon.path)

    def host_comes(self):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.chardev_path)
        sock.settimeout(10)
        return sock


@pytest.fixture
def loop():
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def elsewhere(tmp_path):
    elsewhere = [Elsewhere(tmp_path, name) for name in ("0", "1")]
    yield elsewhere
    for each in elsewhere:
        each.daemon.kill()


@pytest.fixture
def machine(elsewhere, loop):
    machine = Machine(elsewhere[0].connect(), loop, size=4 << 20, queue_size=16)
    yield machine
    machine.close()


def read(machine, port, size):
    data = bytearray()

    def complete():
        with contextlib.suppress(BlockingIOError):
            data.extend(port.read())
        return len(data) >= size

    machine.run_until(complete)
    return bytes(data)


def test_a_guest_talks_to_a_host_of_another_process(machine, elsewhere):
    """R-CON-47: the guest spins until its control messages are taken, however far away that is."""
    port = machine.boot()
    with elsewhere[0].host_comes() as host:
        machine.run_until(lambda: port.host_connected)
        port.open()
        for number in range(20):
            there, back = b"%d" % number * 500, b"%d" % number * 300
            port.write(there)
            assert host.recv(len(there), socket.MSG_WAITALL) == there
            host.send(back)
            assert read(machine, port, len(back)) == back
    machine.run_until(lambda: not port.host_connected)


def test_interrupts_come_by_the_loop(machine, elsewhere, loop):
    port = machine.boot()
    heard = []
    machine.guest.on_interrupt = lambda: heard.append(machine.guest.run())
    with elsewhere[0].host_comes():
        assert loop.run_until(lambda: port.host_connected, 10)
    assert heard


def test_a_reset_and_a_pause_are_told_apart(machine, elsewhere):
    """R-VU-71: by another process, too."""
    port = machine.boot()
    with elsewhere[0].host_comes() as host:
        machine.run_until(lambda: port.host_connected)
        port.open()
        for number in range(3):
            machine.attachment.pause()
            machine.attachment.resume()
            port.write(b"%d" % number)
            assert host.recv(10) == b"%d" % number
        machine.guest.reset()
        again = machine.boot()
        machine.run_until(lambda: again.host_connected)
        assert again.host_history == [True]


def test_a_machine_moves_to_another_back_end(machine, elsewhere):
    """R-VU-80, R-VU-91: its memory is copied while it runs, by the log; then its device's state; then it goes on."""
    source, target = elsewhere
    port = machine.boot()
    copy = GuestMemory([(region.gpa, region.size) for region in machine.memory.wire])
    log = PageLog(machine.memory.end)
    with source.host_comes() as host:
        machine.run_until(lambda: port.host_connected)
        port.open()
        machine.run_until(lambda: port.unsent == 0)
        machine.front_end.start_logging(log)
        assert machine.memory.copy_to(copy) == 4 << 20
        for number in range(5):  # only the device writes from here on: the guest has given buffers, and does not look
            host.send(b"%d" % number * 5000)
            machine.front_end.until(lambda: select.select([host], [host], [], 0))
            machine.memory.copy_to(copy, log.take())
        machine.front_end.pause()
        state = machine.front_end.save()
        pages = log.take()
        machine.memory.copy_to(copy, pages)
        for region in machine.memory.wire:
            assert copy.memory.read(region.gpa, region.size) == machine.memory.memory.read(region.gpa, region.size)
    move(machine, target.connect(), copy, state)
    assert read(machine, port, 25000) == b"".join(b"%d" % number * 5000 for number in range(5))
    machine.run_until(lambda: not port.host_connected)
    with target.host_comes() as host:
        machine.run_until(lambda: port.host_connected)
        port.write(b"from the copy")
        assert host.recv(100) == b"from the copy"
    assert port.host_history == [True, False, True]
    log.close()


def move(machine, front_end, memory, state):
    """The paused guest goes on at ``front_end``, in the copy of its memory."""
    before, old = machine.front_end, machine.memory
    machine.attachment.move_to(front_end, memory)
    front_end.load(state)
    machine.front_end, machine.memory = front_end, memory
    machine.attachment.resume()
    before.close()
    old.close()


def test_a_state_that_is_refused_elsewhere_is_refused_here(machine, elsewhere):
    machine.boot()
    machine.front_end.pause()
    state = machine.front_end.save()
    assert Snapshot.decode(state).driver_ready
    with elsewhere[1].connect() as other:
        other.negotiate(features=machine.front_end.features)
        with pytest.raises(Refused, match="R-VU-38"):
            other.load(state[:-1])
        other.load(state)


def test_a_state_of_running_rings_is_refused(machine):
    """R-VU-91."""
    machine.boot()
    with pytest.raises(Refused, match="R-VU-37"):
        machine.front_end.save()


def test_a_back_end_that_dies_is_missed_at_once(machine, elsewhere):
    """R-VU-75: not only when the time is over."""
    machine.boot()
    elsewhere[0].daemon.process.kill()
    began = time.monotonic()
    with pytest.raises(Disconnected):
        machine.front_end.until(lambda: False)
    with pytest.raises(Disconnected):
        machine.front_end.barrier()
    assert time.monotonic() - began < machine.front_end.timeout


def test_without_acknowledgements_there_are_barriers(elsewhere):
    """R-VU-58: as QEMU does it."""
    with elsewhere[0].connect() as front_end:
        front_end.negotiate(ProtocolFeature.MQ | ProtocolFeature.CONFIG)
        memory = GuestMemory()
        front_end.share(memory)
        ring = front_end.add_ring(3, DriverQueue(memory.memory, 0, 8))
        front_end.start(ring)
        memory.memory.write(0x10000, Message(0, Event.DEVICE_READY, 1).encode())
        ring.driver.add(readable=[(0x10000, 8)])
        ring.driver.publish()
        ring.kick()
        front_end.until(lambda: ring.driver.collect() is not None)
        assert front_end.get_base(3) == 1
        memory.close()


def test_more_regions_than_a_table_has_are_sent_one_by_one(elsewhere):
    """R-VU-15, R-VU-32."""
    memory = GuestMemory([(number << 20, 1 << 16) for number in range(20)])
    with elsewhere[0].connect() as front_end:
        front_end.negotiate()
        front_end.share(memory)
        front_end.start(front_end.add_ring(3, DriverQueue(memory.memory, 19 << 20, 8)))
    memory.close()


def test_the_configuration_space_has_an_end(elsewhere):
    """R-VU-26."""
    with elsewhere[0].connect() as front_end:
        front_end.negotiate()
        assert front_end.get_config()[4:8] == (31).to_bytes(4, "little")
        assert front_end.queue_count() == 64
        with pytest.raises(Refused, match="R-VU-26"):
            front_end.get_config(13)


def test_what_is_offered_is_what_a_guest_may_see(elsewhere):
    """R-RING-27: neither protocol features nor logging."""
    with elsewhere[0].connect() as front_end:
        assert not front_end.offered() & (Feature.PROTOCOL_FEATURES | Feature.LOG_ALL)
        assert front_end.offered() & Feature.VERSION_1


def test_nothing_stays_behind(elsewhere):
    before = open_fds(settle=True)
    for _ in range(3):
        memory, log = GuestMemory(), PageLog(1 << 20)
        with elsewhere[0].connect() as front_end:
            front_end.negotiate()
            front_end.share(memory)
            front_end.open_channel()
            front_end.start_logging(log)
            inflight = front_end.get_inflight(8, 8)
            front_end.set_inflight(inflight)
            front_end.start(front_end.add_ring(3, DriverQueue(memory.memory, 0, 8)))
            front_end.pause()
            front_end.load(front_end.save())
        for owned in (memory, log, inflight):
            owned.close()
            owned.close()
        del memory, log, inflight, front_end, owned
        assert open_fds(settle=True) == before


# -- a back end that does not know how to behave -----------------------------------------------------------------------


@pytest.fixture
def impostor():
    """A front end, and the other end of its socket, from which anything may come."""
    ours, theirs = socket.socketpair()
    front_end = FrontEnd(ours, timeout=0.2)
    front_end.protocol_features = ProtocolFeature.INFLIGHT_SHMFD | ProtocolFeature.DEVICE_STATE
    yield front_end, theirs
    front_end.close()
    theirs.close()


def test_a_silent_back_end_is_not_waited_for_forever(impostor):
    """R-VU-97."""
    front_end, _ = impostor
    with pytest.raises(BackEndError, match=r"has not answered within 0.2 s"):
        front_end.barrier()
    with pytest.raises(BackEndError, match=r"has not done it within 0.2 s"):
        front_end.until(lambda: False)
    with pytest.raises(BackEndError, match=r"has not answered"):
        front_end.send(bytes(1 << 24))


def test_half_an_answer_is_no_answer(impostor):
    front_end, theirs = impostor
    theirs.send(encode_reply(Request.GET_FEATURES, encode_u64(1))[:15])
    with pytest.raises(BackEndError, match="has not answered"):
        front_end.barrier()


@pytest.mark.parametrize(
    "answer",
    [
        encode_reply(Request.GET_QUEUE_NUM, encode_u64(1)),
        encode_request(Request.GET_FEATURES, encode_u64(1)),
        struct.pack("=III", Request.GET_FEATURES, 0xD, 8) + bytes(8),
        encode_reply(Request.GET_FEATURES, bytes(4)),
        encode_reply(Request.GET_FEATURES, b""),
    ],
    ids=["another request", "no reply", "flags", "short", "empty"],
)
def test_an_answer_that_is_none_is_refused(impostor, answer):
    """R-VU-02: to the bit."""
    front_end, theirs = impostor
    theirs.send(answer)
    with pytest.raises(BackEndError, match="R-VU-02"):
        front_end.offered()


@pytest.mark.parametrize(
    ("ask", "request_number", "payload", "rule"),
    [
        (lambda it: it.get_base(3), Request.GET_VRING_BASE, VringState(4, 0).encode(), "R-VU-20"),
        (lambda it: it.get_base(3), Request.GET_VRING_BASE, b"?", "R-VU-20"),
        (lambda it: it.get_config(), Request.GET_CONFIG, b"?", "R-VU-26"),
        (lambda it: it.get_config(), Request.GET_CONFIG, Config(0, 0, b"").encode() + b"?", "R-VU-26"),
        (lambda it: it.get_inflight(1, 8), Request.GET_INFLIGHT_FD, b"?", "R-VU-28"),
        (lambda it: it.get_inflight(1, 8), Request.GET_INFLIGHT_FD, InflightArea(64, 0, 1, 8).encode(), "R-VU-28"),
        (lambda it: it.save(), Request.SET_DEVICE_STATE_FD, encode_u64(0x101), "R-VU-37"),
        (lambda it: it.save(), Request.SET_DEVICE_STATE_FD, b"?", "R-VU-02"),
        (lambda it: it.load(b""), Request.SET_DEVICE_STATE_FD, encode_u64(7), "R-VU-37"),
        (lambda it: it.demand(Request.SET_OWNER), Request.SET_OWNER, encode_u64(1), "R-VU-05"),
    ],
)
def test_a_wrong_answer_is_named(impostor, ask, request_number, payload, rule):
    """And nothing stays open."""
    front_end, theirs = impostor
    before = open_fds(settle=True)
    theirs.send(encode_reply(request_number, payload))
    with pytest.raises(BackEndError, match=rule):
        ask(front_end)
    assert open_fds() == before


def test_descriptors_that_nobody_asked_for_are_closed(impostor):
    front_end, theirs = impostor
    before = open_fds(settle=True)
    with open(os.devnull) as file:
        for request in (Request.GET_FEATURES, Request.GET_INFLIGHT_FD, Request.SET_DEVICE_STATE_FD):
            payload = InflightArea(0, 0, 0, 0).encode() if request == Request.GET_INFLIGHT_FD else encode_u64(1)
            socket.send_fds(theirs, [encode_reply(request, payload)], [file.fileno()] * 3)
    front_end.offered()
    with pytest.raises(Refused):
        front_end.get_inflight(1, 8)
    with pytest.raises(Refused):
        front_end.save()
    assert open_fds() == before


def test_a_back_end_may_bring_its_own_pipe(impostor):
    """R-VU-37: then that is what the state comes through, and ours is closed."""
    front_end, theirs = impostor
    before = open_fds(settle=True)
    read, write = os.pipe()
    socket.send_fds(theirs, [encode_reply(Request.SET_DEVICE_STATE_FD, encode_u64(0))], [read])
    theirs.send(encode_reply(Request.CHECK_DEVICE_STATE, encode_u64(0)))
    os.write(write, b"the state")
    os.close(write)
    os.close(read)
    assert front_end.save() == b"the state"
    assert open_fds() == before


def test_a_state_that_stops_coming_is_not_waited_for_forever(impostor):
    front_end, theirs = impostor
    read, write = os.pipe()
    socket.send_fds(theirs, [encode_reply(Request.SET_DEVICE_STATE_FD, encode_u64(0))], [read])
    os.write(write, b"the st")
    with pytest.raises(BackEndError, match="has not answered"):
        front_end.save()
    os.close(read)
    os.close(write)


def test_a_state_that_nobody_reads_is_not_pushed_forever(impostor):
    front_end, theirs = impostor
    theirs.send(encode_reply(Request.SET_DEVICE_STATE_FD, encode_u64(0x100)))
    with pytest.raises(BackEndError, match="has not answered"):
        front_end.load(bytes(1 << 20))


def test_a_channel_is_answered_and_checked():
    """R-VU-95: what makes no sense there is the back end's error."""
    ours, theirs = socket.socketpair()
    front_end = FrontEnd(ours)
    front_end.channel, channel = socket.socketpair()
    front_end.channel.setblocking(False)
    with theirs, channel:
        channel.send(encode_request(BackEndRequest.CONFIG_CHANGE, need_reply=True))
        assert front_end.take_request() == BackEndRequest.CONFIG_CHANGE
        assert channel.recv(100) == encode_reply(BackEndRequest.CONFIG_CHANGE, encode_u64(0))
        channel.send(encode_request(BackEndRequest.CONFIG_CHANGE))
        assert front_end.take_request() == BackEndRequest.CONFIG_CHANGE
        for nonsense in (b"?" * 12, encode_request(3, b"1234")[:12]):
            channel.send(nonsense)
            with pytest.raises(BackEndError, match="R-VU-95"):
                front_end.take_request()
    front_end.close()


def test_what_is_not_negotiated_is_not_tried(impostor):
    """R-VU-40: a back end would end the connection."""
    front_end, theirs = impostor
    front_end.protocol_features = ProtocolFeature(0)
    log = PageLog(PAGE)
    for attempt in (
        front_end.save,
        lambda: front_end.load(b""),
        lambda: front_end.get_inflight(1, 8),
        lambda: front_end.start_logging(log),
    ):
        with pytest.raises(Refused, match="R-VU-40"):
            attempt()
    log.close()
    theirs.setblocking(False)
    with pytest.raises(BlockingIOError):
        theirs.recv(1)


def test_a_path_where_nobody_listens_is_named(tmp_path):
    with pytest.raises(HostError, match="cannot connect to the back end at"):
        FrontEnd.connect(str(tmp_path / "nobody"))


# -- guest memory and its log ------------------------------------------------------------------------------------------


def test_memory_is_copied_page_by_page_where_there_is_some():
    """Regions may begin and end anywhere (R-VU-61), and a log has bits for what lies between."""
    chunks = ((0x1800, 0x2000), (0x10000, 0x1000))
    source, target = GuestMemory(chunks), GuestMemory(chunks)
    assert source.end == 0x11000
    assert list(source.pages()) == [0x1000, 0x2000, 0x3000, 0x10000]
    for gpa, size in chunks:
        source.memory.write(gpa, os.urandom(size))
    assert source.copy_to(target, [0x1000, 0x5000, 0x10000]) == 0x800 + 0x1000
    assert target.memory.read(0x1800, 0x800) == source.memory.read(0x1800, 0x800)
    assert not any(target.memory.read(0x2000, 0x1800))
    assert source.copy_to(target) == 0x3000
    for gpa, size in chunks:
        assert target.memory.read(gpa, size) == source.memory.read(gpa, size)
    source.close()
    target.close()


def test_a_log_says_each_page_once():
    log = PageLog(20 * PAGE)
    assert log.size == 3
    os.pwrite(log.fd, b"\x81\x00\x02", 0)
    assert log.take() == [0, 7 * PAGE, 17 * PAGE]
    assert log.take() == []
    log.close()


def test_regions_on_the_wire_follow_one_another_in_the_file():
    """R-VU-60."""
    memory = GuestMemory(((0, 0x1000), (0x8000, 0x2000)), offset=0x3000, user=0)
    assert memory.wire == [MemoryRegion(0, 0x1000, 0, 0x3000), MemoryRegion(0x8000, 0x2000, 0x8000, 0x4000)]
    memory.memory.write(0x8000, b"here")
    assert os.pread(memory.fd, 4, 0x4000) == b"here"
    memory.close()
