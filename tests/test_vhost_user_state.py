"""A device's state over a real socket and real pipes: saved, loaded, refused, slow, absent, and never in the way."""

import contextlib
import fcntl
import os
import random
import socket
import struct
import zlib

import pytest
from front_end import VIRTIO_FEATURES, Bench, ConsoleDriver, Daemon, Disconnected, FrontEnd, Machine, Refused, open_fds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vsport.constants import Event
from vsport.control import Message
from vsport.loop import Loop
from vsport.port import PortConfig
from vsport.snapshot import SIZE_MAX, Snapshot
from vsport.vhost_user import state_file
from vsport.vhost_user import transfer as transfer_module
from vsport.vhost_user.message import (
    DeviceState,
    Direction,
    ProtocolFeature,
    Request,
    VringState,
    encode_request,
    encode_u64,
)
from vsport.vhost_user.state_file import StateReader, StateWriter

SAVE, LOAD = DeviceState(Direction.SAVE, 0).encode(), DeviceState(Direction.LOAD, 0).encode()
ACCEPTED, REFUSED = 0x100, 0x101


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path)
    yield bench
    bench.close()


@pytest.fixture
def large(tmp_path):
    """A device whose state is larger than a pipe."""
    bench = Bench(tmp_path, max_ports=120)
    for number in range(2, 120):
        bench.device.add_port(PortConfig(number, f"{number}" + "x" * 1000))
    assert len(bench.device.snapshot().encode()) > 1 << 16
    yield bench
    bench.close()


@pytest.fixture
def front_end(bench):
    return connect(bench)


def connect(bench):
    front_end = bench.connect(FrontEnd)
    front_end.negotiate()
    return front_end


def start(front_end, memory):
    """A driver whose rings are live, and whose port 1 is open."""
    front_end.share(memory)
    driver = ConsoleDriver(front_end, memory)
    front_end.resume()
    driver.open_port()
    return driver


def begin(front_end, payload, fd):
    return front_end.ask_u64(Request.SET_DEVICE_STATE_FD, payload, [fd])


# -- there and back ----------------------------------------------------------------------------------------------------


def test_a_state_is_saved_and_loaded(bench, tmp_path):
    """R-VU-37, R-VU-91: the guest, whose memory it shares, goes on with another back end, and notices nothing."""
    (tmp_path / "other").mkdir()
    other = Bench(tmp_path / "other")
    source, target = connect(bench), connect(other)
    memory = bench.make_memory()
    driver = start(source, memory)
    source.pause()
    state = source.save()
    assert Snapshot.decode(state) == bench.device.snapshot()
    target.share(memory)
    target.load(state)
    for index, ring in source.rings.items():
        target.add_ring(index, ring.driver, ring.base)
    target.set_features(VIRTIO_FEATURES)
    target.resume()
    driver.front_end = target
    assert other.device.ports[1].state.guest_connected
    assert driver.hear() == []
    driver.say(Message(1, Event.PORT_OPEN, 0))
    target.until(lambda: not other.device.ports[1].state.guest_connected)
    assert bench.device.ports[1].state.guest_connected
    other.close()


@pytest.fixture
def daemons(tmp_path, request):
    """Two that listen: where a machine is, and where it goes."""
    daemons = []
    for name in ("0", "1"):
        daemons.append(Daemon(tmp_path, name, getattr(request, "param", "virtio-serial")))
        daemons[-1].listen()
    yield daemons
    for daemon in daemons:
        daemon.close()


def fill(machine, port):
    """As many writes as the ring takes, at once; more than the host's socket takes while nobody reads there."""
    with contextlib.suppress(BlockingIOError):
        while True:
            port.write(b"x" * 30001)
    machine.run_until(lambda: port.unsent < machine.guest.queue_size)


def drained(host):
    """What the host can read without waiting."""
    data = bytearray()
    with contextlib.suppress(BlockingIOError):
        while piece := host.recv(1 << 20):
            data += piece
    return bytes(data)


@pytest.mark.parametrize(
    "daemons",
    ["virtio-serial", "virtio-serial-pci,packed=on", "virtio-serial,in_order=on,packed=on"],
    ids=["split", "packed", "packed in order"],
    indirect=True,
)
def test_a_machine_moves_while_its_port_is_half_consumed(daemons):
    """R-VU-89, R-VU-92: a chain that the host had begun to take is where it was, and the port works on."""
    source, target = daemons
    machine = Machine.on(source)
    port = machine.boot()
    with source.host_comes():
        machine.run_until(lambda: port.host_connected)
        port.open()
        fill(machine, port)
        tx = source.device.ports[1].tx
        where = tx.next_avail, tx.offset
        assert tx.offset
        machine.attachment.pause()
        state = machine.front_end.save()
    before, machine.front_end = machine.front_end, target.connect()
    machine.attachment.move_to(machine.front_end, machine.memory)
    machine.front_end.load(state)
    before.close()
    moved = target.device.ports[1].tx
    assert (moved.next_avail, moved.offset) == where
    machine.attachment.resume()
    machine.run_until(lambda: not port.host_connected)
    with target.host_comes() as host:
        machine.run_until(lambda: port.host_connected)
        machine.run_until(lambda: drained(host) == b"" and not port.unsent)
        port.write(b"to the new host")
        machine.run_until(lambda: not port.unsent)
        assert drained(host) == b"to the new host"
    machine.close()


def test_rings_go_on_where_the_saved_ones_were(bench, front_end):
    """R-VU-71: bases of 0 after a load are no sign of a reboot, though the session's own rings were further."""
    driver = start(front_end, bench.make_memory())
    front_end.pause()
    fresh = bench.device.snapshot()
    state = Snapshot(
        **{name: getattr(fresh, name) for name in ("max_ports", "cols", "rows", "features", "driver_ready", "ports")}
    )
    front_end.load(state.encode())
    for queue in bench.device.queues:
        queue.restore(0, 0)
    driver.memory.memory.write(0, bytes(0x10000))
    for index in driver.QUEUES:
        front_end.make_ring(index, driver.memory, index * 0x2000)
    bench.server._connection.session.state_loaded()
    front_end.resume()
    assert bench.device.ports[1].state.guest_connected


def test_a_state_may_be_saved_again_and_again(front_end):
    assert len({front_end.save() for _ in range(3)}) == 1


def test_a_device_that_nobody_has_used_is_saved_too(front_end, bench):
    assert Snapshot.decode(front_end.save()) == bench.device.snapshot()


# -- when it may be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("payload", [SAVE, LOAD], ids=["save", "load"])
def test_running_rings_are_not_moved(bench, front_end, payload):
    """R-VU-91: refused in the answer, and our copy of the descriptor is closed."""
    driver = start(front_end, bench.make_memory())
    ours, theirs = os.pipe()
    assert begin(front_end, payload, theirs) == REFUSED
    os.close(theirs)
    assert os.read(ours, 1) == b""
    os.close(ours)
    driver.say(Message(1, Event.PORT_OPEN, 0))
    front_end.until(lambda: not bench.device.ports[1].state.guest_connected)


def test_rings_that_are_started_before_a_state_is_there_win(bench, front_end, caplog):
    """R-VU-91."""
    driver = start(front_end, bench.make_memory())
    front_end.pause()
    state = front_end.save()
    ours, theirs = os.pipe()
    assert begin(front_end, LOAD, ours) == ACCEPTED
    os.close(ours)
    front_end.resume()
    os.write(theirs, state)
    os.close(theirs)
    assert front_end.ask_u64(Request.CHECK_DEVICE_STATE) == 1
    assert "rings were started" in caplog.text
    driver.say(Message(1, Event.PORT_OPEN, 0))
    front_end.until(lambda: not bench.device.ports[1].state.guest_connected)


@pytest.mark.parametrize(("direction", "phase"), [(2, 0), (0, 1), (1, 7), (2**32 - 1, 2**32 - 1)])
def test_an_unknown_direction_or_phase_is_refused(front_end, direction, phase):
    """R-VU-37."""
    before = open_fds(settle=True)
    with open(os.devnull) as file:
        assert begin(front_end, DeviceState(direction, phase).encode(), file.fileno()) == REFUSED
    assert open_fds() == before


def test_a_second_transfer_is_refused_while_one_is_under_way(front_end):
    ours, theirs = os.pipe()
    assert begin(front_end, LOAD, ours) == ACCEPTED
    assert begin(front_end, LOAD, ours) == REFUSED
    assert begin(front_end, SAVE, theirs) == REFUSED
    os.close(ours)
    os.close(theirs)
    assert front_end.ask_u64(Request.CHECK_DEVICE_STATE) == 1
    front_end.load(front_end.save())


def test_without_a_transfer_there_is_nothing_to_be_pleased_about(front_end):
    """R-VU-38."""
    with pytest.raises(Refused):
        front_end.check()


def test_state_needs_its_protocol_feature(bench):
    """R-VU-40."""
    front_end = bench.connect(FrontEnd)
    front_end.negotiate(ProtocolFeature.REPLY_ACK)
    with pytest.raises(Disconnected):
        front_end.check()


# -- wrong states ------------------------------------------------------------------------------------------------------


def framed(header, payload=b""):
    """A document with a good checksum."""
    body = header + payload
    return struct.pack("<8sIII", b"vsport\0\1", len(header), len(payload), zlib.crc32(body)) + body


def refuses(bench, front_end, state):
    """Whether ``state`` is refused, with the device as before, and a good one is loaded after it."""
    before = bench.device.snapshot()
    with pytest.raises(Refused):
        front_end.load(state)
    assert bench.device.snapshot() == before
    front_end.load(front_end.save())
    return True


def test_a_truncated_state_is_refused(bench, front_end, caplog):
    """R-VU-92: nonzero, a line in the log, nothing changed; the session goes on."""
    start(front_end, bench.make_memory())
    front_end.pause()
    state = front_end.save()
    for end in (0, 1, 19, 20, len(state) // 2, len(state) - 1):
        caplog.clear()
        assert refuses(bench, front_end, state[:end])
        assert [record.levelname for record in caplog.records if "state transfer failed" in record.message] == [
            "WARNING"
        ]


@pytest.mark.parametrize(
    "state",
    [
        b"x" * 100,
        bytes(1 << 17),
        framed(b"{}"),
        framed(b"[" * 100000),
        framed(b"not json"),
        struct.pack("<8sIII", b"vsport\0\1", 2**32 - 1, 2**32 - 1, 0),
        struct.pack("<8sIII", b"vsport\0\2", 0, 0, 0),
    ],
    ids=["letters", "zeros", "empty", "deep", "no json", "claims", "another version"],
)
def test_nonsense_is_refused(bench, front_end, state):
    """R-VU-92."""
    assert refuses(bench, front_end, state)


def test_a_state_of_another_device_is_refused(bench, front_end, tmp_path):
    """R-VU-92: other ports than these."""
    (tmp_path / "other").mkdir()
    other = Bench(tmp_path / "other", max_ports=4)
    assert refuses(bench, front_end, connect(other).save())
    other.close()


def test_something_after_the_state_is_refused(bench, front_end):
    assert refuses(bench, front_end, front_end.save() + b"\0")


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=64), st.integers(0, 2**32), st.integers(0, 2**32))
def test_any_change_of_a_state_is_refused_or_harmless(bench, data, start, length):
    """R-VU-92: also with a good checksum; the session always goes on."""
    front_end = bench.front_ends[0] if bench.front_ends else connect(bench)
    state = bytearray(bench.device.snapshot().encode())
    at = 20 + start % (len(state) - 20)
    state[at : at + length % 8] = data
    body = bytes(state[20:])
    changed = state[:8] + struct.pack("<III", len(body), 0, zlib.crc32(body)) + body
    with contextlib.suppress(Refused):
        front_end.load(bytes(changed))
    bench.device.reset()
    front_end.barrier()


def test_a_state_that_does_not_end_is_cut_off(bench, front_end, monkeypatch, caplog):
    """R-VU-92: a snapshot has a largest size, and more is never kept in memory."""
    assert SIZE_MAX < 100 << 20
    monkeypatch.setattr(transfer_module, "SIZE_MAX", 1 << 18)
    with pytest.raises(Refused):
        front_end.load(bytes(1 << 20))
    assert "no state is that long" in caplog.text
    with open("/dev/zero", "rb") as zeros:
        assert begin(front_end, LOAD, zeros.fileno()) == ACCEPTED
    assert front_end.ask_u64(Request.CHECK_DEVICE_STATE) == 1


# -- slow and absent ---------------------------------------------------------------------------------------------------


def test_a_slow_reader_stops_nobody(large):
    """R-VU-91: any chunking, and messages are answered meanwhile."""
    front_end = connect(large)
    ours, theirs = os.pipe()
    os.set_blocking(ours, False)
    fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 4096)
    assert begin(front_end, SAVE, theirs) == ACCEPTED
    os.close(theirs)
    rng, state, piece = random.Random(0), bytearray(), b"?"
    while piece:
        front_end.barrier()
        with contextlib.suppress(BlockingIOError):
            piece = os.read(ours, rng.choice((1, 100, 5000)))
            state += piece
    os.close(ours)
    assert front_end.ask_u64(Request.CHECK_DEVICE_STATE) == 0
    assert Snapshot.decode(bytes(state)) == large.device.snapshot()


def test_a_slow_writer_stops_nobody(large):
    front_end = connect(large)
    state = front_end.save()
    ours, theirs = os.pipe()
    assert begin(front_end, LOAD, ours) == ACCEPTED
    os.close(ours)
    rng, at = random.Random(0), 0
    while at < len(state):
        at += os.write(theirs, state[at : at + rng.choice((1, 1000, 20000))])
        front_end.barrier()
    os.close(theirs)
    assert front_end.ask_u64(Request.CHECK_DEVICE_STATE) == 0


@pytest.mark.parametrize("payload", [SAVE, LOAD], ids=["reader", "writer"])
def test_who_does_nothing_is_not_waited_for_forever(large, monkeypatch, payload):
    """R-VU-91: the transfer fails, the session goes on, and the descriptor is closed."""
    monkeypatch.setattr(state_file, "STALL_SECONDS", 0.02)
    front_end = connect(large)
    ours, theirs = os.pipe() if payload is SAVE else os.pipe()[::-1]
    before = open_fds(settle=True)
    assert begin(front_end, payload, theirs) == ACCEPTED
    assert front_end.ask_u64(Request.CHECK_DEVICE_STATE) == 1
    assert open_fds() == before
    os.close(ours)
    os.close(theirs)
    front_end.load(front_end.save())


def test_a_reader_that_leaves_fails_the_transfer(large, caplog):
    front_end = connect(large)
    ours, theirs = os.pipe()
    assert begin(front_end, SAVE, theirs) == ACCEPTED
    os.close(theirs)
    large.step()
    assert os.read(ours, 100)
    os.close(ours)
    assert front_end.ask_u64(Request.CHECK_DEVICE_STATE) == 1
    assert "the front end did not take the state" in caplog.text


# -- the answer that has to wait ---------------------------------------------------------------------------------------


def test_the_check_is_answered_when_the_transfer_is_over(bench, front_end):
    """R-VU-38, R-VU-10: and what was asked behind it is answered behind it."""
    state = front_end.save()
    ours, theirs = os.pipe()
    assert begin(front_end, LOAD, ours) == ACCEPTED
    os.close(ours)
    front_end.send(encode_request(Request.CHECK_DEVICE_STATE) + encode_request(Request.GET_FEATURES))
    for byte in state:
        bench.step()
        os.write(theirs, bytes([byte]))
    with pytest.raises(BlockingIOError):
        front_end.sock.recv(1)
    os.close(theirs)
    assert front_end.reply(Request.CHECK_DEVICE_STATE) == encode_u64(0)
    front_end.reply(Request.GET_FEATURES)
    front_end.barrier()


@pytest.mark.parametrize("waits", [False, True], ids=["transferring", "waiting for the check"])
def test_a_front_end_that_leaves_meanwhile_is_missed(bench, waits):
    """R-VU-75: at once, and nothing of the transfer stays."""
    before = open_fds(settle=True)
    front_end = connect(bench)
    ours, theirs = os.pipe()
    assert begin(front_end, LOAD, ours) == ACCEPTED
    if waits:
        front_end.post(Request.CHECK_DEVICE_STATE)
        for _ in range(3):
            bench.step()
    bench.disconnect(front_end)
    os.close(ours)
    with pytest.raises(BrokenPipeError):
        os.write(theirs, b"x")
    os.close(theirs)
    assert open_fds() == before
    connect(bench).load(bench.device.snapshot().encode())


# -- descriptors of any kind -------------------------------------------------------------------------------------------


def test_a_state_may_go_through_a_socket_or_a_file(front_end, tmp_path):
    """R-VU-91: a pipe is what front ends use, and what the other end is makes no difference."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            assert begin(front_end, SAVE, theirs.fileno()) == ACCEPTED
        assert front_end.ask_u64(Request.CHECK_DEVICE_STATE) == 0
        state = ours.recv(1 << 20)
        assert ours.recv(1) == b""
    path = tmp_path / "state"
    with path.open("wb") as file:
        assert begin(front_end, SAVE, file.fileno()) == ACCEPTED
        assert front_end.ask_u64(Request.CHECK_DEVICE_STATE) == 0
    assert path.read_bytes() == state
    with path.open("rb") as file:
        assert begin(front_end, LOAD, file.fileno()) == ACCEPTED
        assert front_end.ask_u64(Request.CHECK_DEVICE_STATE) == 0


DESCRIPTORS = {
    "read end": lambda: os.pipe(),
    "write end": lambda: os.pipe()[::-1],
    "directory": lambda: (os.open("/", os.O_RDONLY),),
    "path only": lambda: (os.open("/", os.O_PATH),),
    "unconnected socket": lambda: (socket.socket(socket.AF_UNIX).detach(),),
    "memory of a process": lambda: (os.open("/proc/self/mem", os.O_RDONLY),),
    "nothing": lambda: (os.open(os.devnull, os.O_RDWR),),
    "event": lambda: (os.eventfd(0),),
}
"""Each makes descriptors, the first of which is sent."""


@pytest.mark.parametrize("kind", DESCRIPTORS)
def test_a_descriptor_that_no_state_comes_from_fails_the_transfer(front_end, monkeypatch, kind):
    monkeypatch.setattr(state_file, "STALL_SECONDS", 0.02)
    fds = DESCRIPTORS[kind]()
    assert begin(front_end, LOAD, fds[0]) == ACCEPTED
    assert front_end.ask_u64(Request.CHECK_DEVICE_STATE) == 1
    for fd in fds:
        os.close(fd)
    front_end.barrier()


@pytest.mark.parametrize("kind", sorted(set(DESCRIPTORS) - {"write end", "nothing"}))
def test_a_descriptor_that_no_state_can_go_to_fails_the_transfer(front_end, monkeypatch, kind):
    monkeypatch.setattr(state_file, "STALL_SECONDS", 0.02)
    fds = DESCRIPTORS[kind]()
    assert begin(front_end, SAVE, fds[0]) == ACCEPTED
    assert front_end.ask_u64(Request.CHECK_DEVICE_STATE) == 1
    for fd in fds:
        os.close(fd)


def test_a_transfer_that_is_given_up_says_nothing(tmp_path):
    """And may be given up twice."""
    loop, heard = Loop(), []
    ours, theirs = os.pipe()
    for transfer in (
        StateReader(loop, os.dup(ours), 100, lambda *args: heard.append(args)),
        StateWriter(loop, os.dup(theirs), b"data", lambda *args: heard.append(args)),
        StateWriter(loop, os.open(tmp_path, os.O_RDONLY), b"data", lambda *args: heard.append(args)),
    ):
        transfer.close()
        transfer.close()
    loop.run_once(0)
    assert heard == []
    os.close(ours)
    os.close(theirs)
    loop.close()


def test_bases_that_the_front_end_says_count_after_a_load(bench, front_end):
    """R-VU-18: a snapshot says where the rings were, the front end where they are."""
    front_end.load(front_end.save())
    front_end.tell(Request.SET_VRING_BASE, VringState(3, 17).encode())
    assert front_end.get_base(3) == 17
