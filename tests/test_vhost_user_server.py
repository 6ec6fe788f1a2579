"""The transport: the socket and its file, one front end after the other, messages in pieces, hostile descriptors."""

import contextlib
import gc
import logging
import os
import random
import resource
import socket
import struct
import subprocess
import sys
from array import array
from pathlib import Path

import pytest
from front_end import (
    USER,
    Bench,
    ConsoleDriver,
    Daemon,
    Disconnected,
    FrontEnd,
    Machine,
    Refused,
    open_fds,
)
from fuzz_vhost_user import Target
from hypothesis import given, settings
from hypothesis import strategies as st

from vsport.device import SerialDevice
from vsport.errors import HostError, UsageError
from vsport.loop import Loop
from vsport.vhost_user import server as server_module
from vsport.vhost_user.message import MemoryRegion, MemoryTable, Request, encode_request, encode_u64
from vsport.vhost_user.server import Server


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path)
    yield bench
    bench.close()


@pytest.fixture
def loop():
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def server(loop):
    server = Server(SerialDevice(max_ports=1), loop)
    yield server
    server.close()


def speak(server, loop, sock):
    """One question over ``sock``, and whether it was answered."""
    front_end = FrontEnd(sock, lambda: loop.run_once(0.01))
    return front_end.ask_u64(Request.GET_FEATURES) == server.device.features | 1 << 30 | 1 << 26


# -- the socket file ---------------------------------------------------------------------------------------------------


def test_the_socket_file_comes_and_goes(server, tmp_path):
    path = tmp_path / "vu.sock"
    server.listen(str(path))
    assert path.is_socket()
    server.close()
    assert not path.exists()
    server.close()


def test_a_socket_file_that_a_dead_process_left_is_replaced(server, loop, tmp_path):
    path = str(tmp_path / "vu.sock")
    code = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen()"
    subprocess.run([sys.executable, "-c", code, path], check=True)
    assert os.path.exists(path)
    server.listen(path)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        assert speak(server, loop, sock)


def test_a_path_that_is_served_already_is_left_alone(bench, server):
    for _ in range(12):  # also when the backlog is full
        with pytest.raises(HostError, match="another process listens there"):
            server.listen(bench.path)
    server.close()
    assert os.path.exists(bench.path)
    for _ in range(20):  # those that only knocked have gone
        bench.step()
    bench.connect(FrontEnd).barrier()


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_is_no_socket_is_never_removed(server, tmp_path, kind):
    path = tmp_path / "precious"
    path.write_text("data") if kind == "file" else path.mkdir()
    with pytest.raises(HostError, match="the path exists and is no socket"):
        server.listen(str(path))
    assert path.exists()


@pytest.mark.parametrize("path", ["/nowhere/vu.sock", "/tmp/" + "x" * 103])
def test_a_path_that_cannot_be_listened_on_is_named(server, path):
    with pytest.raises((HostError, UsageError), match=path):
        server.listen(path)


def test_a_socket_file_that_is_not_ours_any_more_stays(server, tmp_path):
    path = tmp_path / "vu.sock"
    server.listen(str(path))
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        server.close()
        assert path.exists()


def test_a_socket_file_that_somebody_removed_is_not_missed(server, tmp_path):
    path = tmp_path / "vu.sock"
    server.listen(str(path))
    path.unlink()
    server.close()


# -- inherited sockets -------------------------------------------------------------------------------------------------


def test_a_listening_socket_is_adopted(server, loop, tmp_path):
    """R-VU-103: front ends come one after the other; the file is not ours."""
    path = str(tmp_path / "vu.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        server.adopt(os.dup(listener.fileno()))
    for _ in range(2):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            assert speak(server, loop, sock)
        assert loop.run_until(lambda: not server.connected, 10)
    assert server.listening
    server.close()
    assert os.path.exists(path)


def test_a_connected_socket_is_adopted(server, loop):
    """R-VU-103: nobody can come after it, and the daemon has to know that."""
    left = []
    server.on_disconnected = lambda: left.append(server.listening)
    ours, theirs = socket.socketpair()
    server.adopt(theirs.detach())
    with ours:
        assert speak(server, loop, ours)
    assert loop.run_until(lambda: left, 10)
    assert left == [False]


@pytest.mark.parametrize("kind", ["file", "datagram", "tcp", "closed", "negative"])
def test_a_descriptor_that_is_no_unix_stream_socket_is_refused(server, kind):
    with open(os.devnull) as file, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as dgram, socket.socket() as tcp:
        fds = {"file": file.fileno(), "datagram": dgram.fileno(), "tcp": tcp.fileno(), "closed": 987, "negative": -1}
        with pytest.raises(HostError, match=f"descriptor {fds[kind]} is not a Unix stream socket"):
            server.adopt(fds[kind])
        assert file.read() == ""
        dgram.getsockname()


# -- front ends come and go --------------------------------------------------------------------------------------------


def converse(bench):
    """A whole conversation up to an open port, with everything that a front end hands over."""
    memory = bench.make_memory()
    front_end = bench.connect(FrontEnd)
    front_end.negotiate()
    front_end.share(memory)
    front_end.open_channel()
    driver = ConsoleDriver(front_end, memory)
    for ring in front_end.rings.values():
        front_end.start(ring)
    driver.open_port()
    assert bench.device.ports[1].state.guest_connected
    return front_end, memory


def test_after_a_front_end_everything_is_as_before(bench):
    """R-VU-75: descriptors and mappings are given back, and the next one finds a clean device."""
    for _ in range(3):
        before = open_fds(settle=True)
        front_end, memory = converse(bench)
        bench.disconnect(front_end)
        memory.close()
        bench.memories.clear()
        assert open_fds() == before
        assert "guest-memory" not in Path("/proc/self/maps").read_text()
        assert not any(queue.running for queue in bench.device.queues)
        assert not bench.device.ports[1].state.guest_connected
        assert not bench.device.driver_ready


def test_a_second_front_end_waits_until_the_first_has_gone(bench):
    """R-VU-75."""
    first, _ = converse(bench)
    second = bench.connect(FrontEnd)
    second.post(Request.GET_FEATURES)
    first.barrier()
    with pytest.raises(BlockingIOError):
        second.sock.recv(1)
    first.close()
    bench.front_ends.remove(first)
    assert second.reply(Request.GET_FEATURES)


def test_a_front_end_that_is_refused_makes_room_for_the_next(bench, caplog):
    first = bench.connect(FrontEnd)
    first.post(999)
    with pytest.raises(Disconnected):
        first.barrier()
    bench.connect(FrontEnd).barrier()
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "connection ended, the front end broke a rule: R-VU-07: not a request to a console (request=999)"
    ]


def test_a_front_end_that_cannot_be_accepted_now_is_accepted_later(bench, monkeypatch, caplog):
    monkeypatch.setattr(server_module, "_ACCEPT_AGAIN_SECONDS", 0.01)
    front_end = bench.connect(FrontEnd)
    front_end.post(Request.GET_FEATURES)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        front_end.until(lambda: "cannot accept a front end: Too many open files" in caplog.text)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    front_end.reply(Request.GET_FEATURES)


def test_closing_the_server_ends_the_connection(bench):
    front_end, _ = converse(bench)
    bench.server.close()
    with pytest.raises(Disconnected):
        front_end.barrier()


# -- messages in pieces ------------------------------------------------------------------------------------------------


def test_a_message_may_come_byte_by_byte(bench):
    """R-VU-03: the descriptors ride with the first byte."""
    memory = bench.make_memory()
    front_end = bench.connect(FrontEnd)
    data = encode_request(Request.SET_MEM_TABLE, MemoryTable(tuple(memory.wire)).encode(), need_reply=True)
    for at in range(len(data)):
        front_end.send(data[at : at + 1], [memory.fd] if at == 0 else [])
        bench.step()
    assert front_end.reply(Request.SET_MEM_TABLE) == encode_u64(0)


def test_many_messages_may_come_at_once(bench):
    front_end = bench.connect(FrontEnd)
    front_end.send(encode_request(Request.GET_FEATURES) * 20 + encode_request(Request.SET_OWNER, need_reply=True))
    for _ in range(20):
        front_end.reply(Request.GET_FEATURES)
    front_end.reply(Request.SET_OWNER)


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("=III", 1, 0, 0),
        struct.pack("=III", 1, 2, 0),
        struct.pack("=III", 1, 5, 0),
        struct.pack("=III", 5, 1, 2**32 - 1),
        struct.pack("=III", 2, 9, 4) + bytes(4),
        struct.pack("=III", 1, 9, 8) + bytes(8),
    ],
    ids=["no version", "version 2", "reply", "oversize", "short payload", "payload where none belongs"],
)
def test_bad_syntax_ends_the_connection(bench, data):
    """R-VU-04: also if an answer was asked for; descriptors that came along are closed."""
    front_end = bench.connect(FrontEnd)
    front_end.barrier()
    before = open_fds(settle=True)
    with open(os.devnull) as file:
        front_end.send(data, [file.fileno()] * 3)
    with pytest.raises(Disconnected):
        front_end.barrier()
    assert open_fds() == before - 1


@pytest.mark.parametrize("count", [9, 20, 253])
def test_more_descriptors_than_a_message_may_carry_end_the_connection(bench, count):
    """R-VU-03: MSG_CTRUNC is fatal, and what did arrive is closed."""
    front_end = bench.connect(FrontEnd)
    front_end.barrier()
    before = open_fds(settle=True)
    with open(os.devnull) as file:
        front_end.send(encode_request(Request.GET_FEATURES), [file.fileno()] * count)
    with pytest.raises(Disconnected):
        front_end.barrier()
    assert open_fds() == before - 1


def test_descriptors_of_a_message_that_never_ends_are_closed(bench):
    front_end = bench.connect(FrontEnd)
    front_end.barrier()
    before = open_fds(settle=True)
    data = encode_request(Request.SET_MEM_TABLE, bytes(40))
    with open(os.devnull) as file:
        front_end.send(data[:20], [file.fileno()] * 8)
        front_end.send(data[20:30], [])
    bench.step()
    bench.disconnect(front_end)
    assert open_fds() == before - 2


def test_received_descriptors_do_not_reach_child_processes(bench):
    """R-VU-03: MSG_CMSG_CLOEXEC."""
    front_end = bench.connect(FrontEnd)
    front_end.negotiate()
    known = set(os.listdir("/proc/self/fd"))
    with open(os.devnull, "w") as file:
        front_end.set_fd(Request.SET_VRING_ERR, 0, file.fileno())
        new = {int(fd) for fd in os.listdir("/proc/self/fd")} - {int(fd) for fd in known} - {file.fileno()}
        received = [fd for fd in new if os.path.exists(f"/proc/self/fd/{fd}")]
        assert len(received) == 1
        assert not os.get_inheritable(received[0])


def test_a_front_end_that_does_not_read_its_replies_is_not_waited_for_forever(bench, monkeypatch):
    monkeypatch.setattr(server_module, "REPLY_SECONDS", 0.05)
    front_end = bench.connect(FrontEnd)
    questions = encode_request(Request.GET_FEATURES) * 300
    with contextlib.suppress(BlockingIOError, Disconnected):
        while bench.server.connected:
            front_end.send(questions)
            bench.step()
    assert bench.loop.run_until(lambda: not bench.server.connected, 10)
    front_end.close()
    bench.front_ends.remove(front_end)
    bench.connect(FrontEnd).barrier()


def test_a_front_end_that_reads_its_replies_late_gets_them_all(bench):
    front_end = bench.connect(FrontEnd)
    asked = 0
    while bench.server._connection is None or not bench.server._connection._unsent.data:
        front_end.send(encode_request(Request.GET_FEATURES))
        asked += 1
        bench.step()
    for _ in range(asked):
        front_end.reply(Request.GET_FEATURES)
    front_end.barrier()


def test_a_front_end_may_leave_without_reading_its_replies(bench):
    front_end = bench.connect(FrontEnd)
    while bench.server._connection is None or not bench.server._connection._unsent.data:
        front_end.send(encode_request(Request.GET_FEATURES))
        bench.step()
    bench.disconnect(front_end)
    bench.connect(FrontEnd).barrier()


# -- hostile descriptors -----------------------------------------------------------------------------------------------


KICKS = {
    "regular file": lambda: os.memfd_create("file"),
    "directory": lambda: os.open("/", os.O_RDONLY),
    "null": lambda: os.open(os.devnull, os.O_RDWR),
    "path only": lambda: os.open("/", os.O_PATH),
}


@pytest.mark.parametrize("kind", KICKS)
def test_a_kick_descriptor_that_cannot_be_waited_for_is_refused(bench, kind):
    front_end = bench.connect(FrontEnd)
    before = open_fds(settle=True)
    fd = KICKS[kind]()
    with pytest.raises(Refused):
        front_end.set_fd(Request.SET_VRING_KICK, 3, fd)
    os.close(fd)
    assert open_fds() <= before + 1  # the server's end of the connection


def test_a_kick_descriptor_that_breaks_is_not_listened_to_any_more(bench, caplog):
    """Otherwise its hang-up would keep the loop busy for ever."""
    memory = bench.make_memory()
    front_end = bench.connect(FrontEnd)
    front_end.negotiate()
    front_end.share(memory)
    ring = front_end.make_ring(3, memory, 0)
    front_end.start(ring)
    ends = {"pipe": os.pipe(), "socket": tuple(end.detach() for end in socket.socketpair())}
    for read, write in ends.values():
        front_end.set_fd(Request.SET_VRING_KICK, 3, read)
        os.write(write, bytes(8))
        front_end.barrier()
        os.close(write)
        front_end.until(lambda: "kick descriptor is broken" in caplog.text)
        front_end.barrier()
        assert caplog.text.count("kick descriptor is broken") == 1
        caplog.clear()
        os.close(read)
    assert bench.device.queues[3].running


@pytest.mark.parametrize("kind", ["listening socket", "unconnected socket", "write end", "datagram"])
def test_odd_kick_descriptors_do_no_harm(bench, kind):
    front_end = bench.connect(FrontEnd)
    front_end.negotiate()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM if kind == "datagram" else socket.SOCK_STREAM)
    read, write = os.pipe()
    if kind == "listening socket":
        sock.bind("")
        sock.listen()
    front_end.set_fd(Request.SET_VRING_KICK, 3, write if kind == "write end" else sock.fileno())
    if kind == "listening socket":
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(sock.getsockname())
            front_end.barrier()
    os.close(read)
    front_end.barrier()
    os.close(write)
    sock.close()
    front_end.barrier()


def test_a_call_descriptor_that_is_full_does_not_block(bench):
    """R-VU-98: it is made non-blocking, whatever the front end made it."""
    front_end, _ = converse(bench)
    read, write = os.pipe()
    os.set_blocking(write, False)
    try:
        while True:
            os.write(write, bytes(4096))
    except BlockingIOError:
        os.set_blocking(write, True)
    front_end.set_fd(Request.SET_VRING_CALL, 3, write)
    front_end.barrier()
    os.close(read)
    os.close(write)


def test_a_region_whose_file_shrinks_later_ends_the_session_and_not_the_daemon(bench):
    """R-RING-82: the pages read as zeros meanwhile; the next front end finds everything as it was."""
    front_end, memory = converse(bench)
    os.ftruncate(memory.fd, 0)
    os.eventfd_write(front_end.rings[5].kick_fd, 1)
    front_end.until(lambda: not bench.server.connected)
    with pytest.raises(Disconnected):
        front_end.barrier()
    bench.connect(FrontEnd).barrier()


def test_memory_in_a_file_of_odd_size_is_mapped(bench, tmp_path):
    """R-VU-61, R-VU-62: the last page may be cut short."""
    (tmp_path / "ram").write_bytes(bytes(0x3456))
    front_end = bench.connect(FrontEnd)
    with open(tmp_path / "ram", "r+b") as file:
        table = MemoryTable((MemoryRegion(0x1000, 0x3456 - 0x1234, USER, 0x1234),)).encode()
        front_end.tell(Request.SET_MEM_TABLE, table, [file.fileno()])
        too_long = MemoryTable((MemoryRegion(0x1000, 0x3457 - 0x1234, USER, 0x1234),)).encode()
        with pytest.raises(Refused):
            front_end.tell(Request.SET_MEM_TABLE, too_long, [file.fileno()])


# -- anything at all ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def target():
    gc.collect()
    target = Target()
    yield target
    target.close()
    logging.getLogger("vsport").setLevel(logging.NOTSET)


@settings(deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=300), max_size=4))
def test_any_bytes_end_the_connection_at_worst(target, pieces):
    before = open_fds()
    ours, theirs = socket.socketpair()
    target.server.adopt(theirs.detach())
    with ours:
        for piece in pieces:
            try:
                ours.sendmsg([piece], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", target.fds[:2]))])
            except OSError:
                break
            target.loop.run_once(0)
    assert target.loop.run_until(lambda: not target.server.connected, 10)
    assert open_fds() == before


@settings(deadline=None)
@given(st.integers(0, 2**64))
def test_any_conversation_ends_without_a_trace(target, seed):
    """Framed messages with odd numbers and odd descriptors, on rings full of garbage: see fuzz_vhost_user."""
    before = open_fds()
    target.converse(random.Random(seed))
    assert open_fds() == before
    ours, theirs = socket.socketpair()
    target.server.adopt(theirs.detach())
    with ours:
        assert speak(target.server, target.loop, ours)
    assert target.loop.run_until(lambda: not target.server.connected, 10)


# -- all of it together ------------------------------------------------------------------------------------------------


@pytest.fixture
def daemon(tmp_path):
    daemon = Daemon(tmp_path)
    daemon.listen()
    yield daemon
    daemon.close()


@pytest.fixture
def machine(daemon):
    machine = Machine.on(daemon)
    yield machine
    machine.close()


def test_a_guest_talks_to_a_host_over_kicks_and_calls(daemon, machine):
    """DEVICE_READY to PORT_OPEN, bytes both ways, the host leaves and returns, the guest reboots."""
    port = machine.boot()
    assert machine.attachment.max_ports() == 31
    with daemon.host_comes() as host:
        machine.run_until(lambda: port.host_connected)
        port.open()
        assert port.write(b"from the guest") == 14
        machine.run_until(lambda: daemon.device.ports[1].tx.bytes_moved == 14)
        assert host.recv(100) == b"from the guest"
        host.send(b"from the host")
        machine.run_until(lambda: daemon.device.ports[1].rx.bytes_moved == 13)
        assert port.read() == b"from the host"
    machine.run_until(lambda: not port.host_connected)
    with daemon.host_comes() as host:
        machine.run_until(lambda: port.host_connected)
        assert port.host_history == [True, False, True]
        machine.guest.reset()
        again = machine.boot()
        machine.run_until(lambda: again.host_connected)
        assert not daemon.device.ports[1].state.guest_connected
        again.open()
        host.send(b"after the reboot")
        machine.run_until(lambda: daemon.device.ports[1].rx.bytes_moved == 13 + 16)
        assert again.read() == b"after the reboot"


def test_much_goes_both_ways_at_once(daemon, machine):
    port = machine.boot()
    data = random.Random(0).randbytes(1 << 20)
    to_guest, to_host = bytearray(), bytearray()
    sent_by_guest = sent_by_host = 0
    with daemon.host_comes() as host:
        machine.run_until(lambda: port.host_connected)
        port.open()
        while len(to_guest) < len(data) or len(to_host) < len(data):
            daemon.loop.run_once(0)
            machine.guest.run()
            with contextlib.suppress(BlockingIOError):
                sent_by_host += host.send(data[sent_by_host : sent_by_host + 65536])
            with contextlib.suppress(BlockingIOError):
                sent_by_guest += port.write(data[sent_by_guest:]) if sent_by_guest < len(data) else 0
            with contextlib.suppress(BlockingIOError):
                to_host += host.recv(65536)
            with contextlib.suppress(BlockingIOError):
                to_guest += port.read()
    assert bytes(to_guest) == bytes(to_host) == data
