"""The pump: bytes between a port and its chardev, with real sockets, files and a simulated guest."""

import contextlib
import fcntl
import os
import random
import socket
import sys
import termios
import time

import pytest
from worlds import World, generic_port, unix_chardev, unix_client

from vsport.chardev.base import Chardev
from vsport.connection import State
from vsport.port import Whose
from vsport.pump import SETTLE_SECONDS, PortPump
from vsport.sim import HOSTILE, LINUX


@pytest.fixture
def world(request, tmp_path):
    """One port, org.test.1, behind a Unix socket; parametrise indirectly with a profile."""
    profile = getattr(request, "param", LINUX)
    with contextlib.closing(World([unix_chardev(1, tmp_path / "1")], [generic_port(1)], profile=profile)) as made:
        made.path = tmp_path / "1"
        yield made


@pytest.fixture
def joined(world):
    """(world, the guest's open port, the host's socket)."""
    port = world.port("org.test.1")
    port.open()
    with unix_client(world.path) as host:
        world.wait(lambda: port.host_connected)
        yield world, port, host


def host_is(world, port, connected):
    world.wait(lambda: port.host_connected is connected, f"host_connected is {connected}")


@pytest.mark.parametrize("world", [LINUX, HOSTILE], indirect=True, ids=lambda profile: profile.name)
def test_bytes_arrive_in_both_directions_whatever_the_framing(joined):
    """R-RING-07, R-CON-43."""
    world, port, host = joined
    data = random.Random(1).randbytes(300_000)
    host.setblocking(False)
    sent = received = 0
    back = bytearray()
    while received < len(data) or len(back) < len(data):
        with contextlib.suppress(BlockingIOError):
            sent += host.send(data[sent:]) if sent < len(data) else 0
        with contextlib.suppress(BlockingIOError):
            piece = port.read()
            assert piece == data[received : received + len(piece)]
            received += len(piece)
            world.write(port, piece)
        with contextlib.suppress(BlockingIOError):
            back += host.recv(65536)
        world.loop.run_once(0)
    assert bytes(back) == data


def test_a_slow_host_stops_its_own_port_and_nothing_else(tmp_path):
    """Back-pressure: the ring of a host that never reads fills up; its neighbour moves a megabyte meanwhile."""
    paths = {number: tmp_path / str(number) for number in (1, 2)}
    with contextlib.closing(
        World([unix_chardev(n, paths[n]) for n in paths], [generic_port(n) for n in paths])
    ) as world:
        stalled, lively = (world.port(f"org.test.{n}") for n in paths)
        with unix_client(paths[1]) as deaf, unix_client(paths[2]) as host:
            for port in (stalled, lively):
                port.open()
                host_is(world, port, True)
            written = 0
            with pytest.raises(BlockingIOError, match="full"):
                for _ in range(10_000):
                    written += stalled.write(b"x" * 4096)
                    world.loop.run_once(0)
            data = os.urandom(1 << 20)
            world.loop.call_soon(lambda: None)
            for at in range(0, len(data), 65536):
                world.write(lively, data[at : at + 65536])
                assert world.receive(host, 65536) == data[at : at + 65536]
            assert stalled.full
            # The deaf host begins to read: everything that was accepted comes, in order.
            assert world.receive(deaf, written) == b"x" * written
            assert stalled.unsent == 0


def test_a_guest_that_does_not_read_leaves_the_bytes_in_the_transport(joined):
    """State A with no buffers: nothing is read from the host that could not be delivered."""
    world, port, host = joined
    host.setblocking(False)
    sent = 0
    data = os.urandom(1 << 22)
    idle = 0
    while idle < 20:
        try:
            sent += host.send(data[sent : sent + 65536])
            idle = 0
        except BlockingIOError:
            idle += 1
        world.loop.run_once(0)
    assert sent < len(data)
    assert world.read(port, sent) == data[:sent]


def test_bytes_for_a_guest_that_has_not_opened_wait_for_it(world):
    """State C, R-CON-41."""
    with unix_client(world.path) as host:
        port = world.port("org.test.1")
        host_is(world, port, True)
        host.sendall(b"are you there?")
        for _ in range(5):
            world.loop.run_once(0)
        port.open()
        assert world.read(port, 14) == b"are you there?"


def test_a_host_that_leaves_before_the_guest_opens_is_noticed_and_its_words_counted(world):
    with unix_client(world.path) as host:
        port = world.port("org.test.1")
        host_is(world, port, True)
        host.sendall(b"nobody hears this")
    host_is(world, port, False)
    port.open()
    assert port.read() == b""
    assert world.device.ports[1].counters.host_bytes_dropped == 17


def test_the_last_words_of_a_host_arrive_before_its_leaving(joined):
    world, port, host = joined
    words = os.urandom(500_000)
    host.settimeout(0)
    sent = 0
    received = bytearray()
    while sent < len(words):
        with contextlib.suppress(BlockingIOError):
            sent += host.send(words[sent:])
        world.loop.run_once(0)
        with contextlib.suppress(BlockingIOError):
            received += port.read()
    host.close()
    received += world.read(port, len(words) - len(received))
    assert bytes(received) == words
    host_is(world, port, False)
    assert port.read() == b""


def test_a_host_that_only_listens_no_more_still_has_its_say(joined):
    """The host shuts its receiving side: what it said before reaches the guest all the same."""
    world, port, host = joined
    host.sendall(b"last words")
    host.shutdown(socket.SHUT_RD)
    port.write(b"into the void")
    assert world.read(port, 10) == b"last words"
    host.close()
    host_is(world, port, False)
    assert port.unsent == 0


def test_what_nobody_takes_goes_back_to_the_guest(joined):
    """R-CON-44, R-CON-48: the host leaves with a full ring; every chain comes back, and is counted."""
    world, port, host = joined
    with pytest.raises(BlockingIOError, match="full"):
        for _ in range(10_000):
            port.write(b"y" * 32768)
            world.loop.run_once(0)
    host.close()
    host_is(world, port, False)
    assert port.unsent == 0
    assert world.device.ports[1].counters.bytes_discarded > 0


def test_a_hundred_leaves_and_returns_are_all_seen(world):
    port = world.port("org.test.1")
    port.open()
    for number in range(100):
        with unix_client(world.path) as host:
            host_is(world, port, True)
            host.sendall(b"%03d" % number)
            assert world.read(port, 3) == b"%03d" % number
        host_is(world, port, False)
    assert port.host_history == [True, False] * 100
    assert world.device.waiting_messages == 0


def test_a_host_stays_away_long_enough_to_be_missed(joined):
    """The next host is there at once; the guest still sees the close before the open, with time between."""
    world, port, host = joined
    host.close()
    with unix_client(world.path):
        host_is(world, port, False)
        left = time.monotonic()
        host_is(world, port, True)
        assert time.monotonic() - left > SETTLE_SECONDS / 2
    assert port.host_history == [True, False, True]


def test_a_port_is_unplugged_with_its_chardev_and_plugged_again_under_load(tmp_path):
    """R-CON-49, R-CON-50."""
    with contextlib.closing(World([unix_chardev(1, tmp_path / "1")], [generic_port(1)])) as world:
        for _ in range(5):
            port = world.port("org.test.1")
            port.open()
            with unix_client(tmp_path / "1") as host:
                host_is(world, port, True)
                with pytest.raises(BlockingIOError):
                    for _ in range(10_000):
                        port.write(b"load" * 1000)
                        world.loop.run_once(0)
                host.sendall(b"and input" * 1000)
                world.loop.run_once(0)
                world.host.unplug(1)
                world.wait(lambda gone=port: gone.unplugged)
                assert not (tmp_path / "1").exists()
            option = world.host.configuration.ports[0]
            world.host.plug(option)
            world.host.pumps[1].open()
            world.wait(lambda: 1 in world.guest.ports and world.guest.ports[1].name)
        port = world.port("org.test.1")
        port.open()
        with unix_client(tmp_path / "1") as host:
            host_is(world, port, True)
            world.write(port, b"still works")
            assert world.receive(host, 11) == b"still works"


def test_a_console_never_waits_for_its_host(tmp_path):
    """R-CON-45: the sender spins with a lock held, so what a full host does not take is dropped, and counted."""
    with (
        contextlib.closing(
            World([unix_chardev(1, tmp_path / "1")], ["virtconsole,chardev=c1,name=org.test.console"])
        ) as world,
        unix_client(tmp_path / "1"),
    ):
        world.wait(lambda: world.guest.ports[0].console and world.guest.ports[0].host_connected)
        console = world.guest.ports[0]
        for _ in range(3000):
            console.write(b"z" * 4096)
            world.loop.run_once(0)
        world.wait(lambda: console.unsent == 0)
        assert world.device.ports[0].counters.bytes_discarded > 0


def test_an_emergency_character_reaches_the_host_of_a_console(tmp_path):
    """R-CON-07."""
    with (
        contextlib.closing(World([unix_chardev(1, tmp_path / "1")], ["virtconsole,chardev=c1"])) as world,
        unix_client(tmp_path / "1") as host,
    ):
        world.device.write_config(8, b"!\0\0\0")
        world.wait(lambda: world.device.ports[0].state.host_connected)
        world.device.write_config(8, b"?\0\0\0")
        assert world.receive(host, 1) == b"?"


@pytest.mark.parametrize("kind", ["file", "ringbuf", "null"])
def test_back_ends_without_a_peer_take_everything(kind, tmp_path):
    options = {"file": f"file,id=c1,path={tmp_path}/out", "ringbuf": "ringbuf,id=c1,size=64K", "null": "null,id=c1"}
    with contextlib.closing(World([options[kind]], [generic_port(1)])) as world:
        port = world.port("org.test.1")
        port.open()
        host_is(world, port, True)
        data = os.urandom(200_000)
        world.write(port, data)
        world.wait(lambda: port.unsent == 0)
        if kind == "file":
            assert (tmp_path / "out").read_bytes() == data
        if kind == "ringbuf":
            assert world.host.chardevs["c1"].read(1 << 20) == data[-65536:]


def test_a_file_is_read_into_the_guest_and_its_end_is_no_leaving(tmp_path):
    data = os.urandom(300_000)
    (tmp_path / "in").write_bytes(data)
    with contextlib.closing(
        World([f"file,id=c1,path={tmp_path}/out,input-path={tmp_path}/in"], [generic_port(1)])
    ) as world:
        port = world.port("org.test.1")
        port.open()
        assert world.read(port, len(data)) == data
        world.write(port, b"thanks")
        world.wait(lambda: (tmp_path / "out").read_bytes() == b"thanks")
        assert world.device.ports[1].state is State.A


class Sentence(Chardev):
    """A back end whose input is a pipe that has ended already, and whose output goes on: like a shell's `echo x |`."""

    kind = "sentence"
    eof_ends_session = False

    def _start(self):
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        os.write(writer, b"a sentence")
        os.close(writer)
        self._keep("input", reader)
        self._connected(os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC))

    def _ends(self):
        return self._held("input"), self._passing


def test_input_that_ended_before_the_guest_opened_is_kept_for_it():
    with contextlib.closing(World([], ["virtserialport,name=org.test.1"])) as world:
        pump = PortPump(world.loop, world.device.ports[1], Sentence("c0"))
        world.device.attach(world.device.ports[1], pump)
        pump.open()
        port = world.port("org.test.1")
        host_is(world, port, True)
        port.open()
        assert world.read(port, 10) == b"a sentence"
        world.loop.run_until(lambda: False, 0.02)
        assert port.host_connected
        pump.close()


def fill_up(world, port):
    with pytest.raises(BlockingIOError, match="full"):
        for _ in range(10_000):
            port.write(b"old words")
            world.loop.run_once(0)


def fill_the_guest(world, host):
    """The host speaks until neither the guest nor the socket takes more."""
    host.setblocking(False)
    with pytest.raises(BlockingIOError):
        for _ in range(10_000):
            host.send(bytes(4096))
            world.loop.run_once(0)


def rounds_of_the_loop(world, seconds):
    rounds = 0

    def count():
        nonlocal rounds
        rounds += 1
        return False

    world.loop.run_until(count, seconds)
    return rounds


def test_a_host_that_leaves_is_noticed_though_the_guest_has_no_buffers(joined):
    """The receive ring is full, but the host has nothing more to say than that it leaves."""
    world, port, host = joined
    for _ in range(32):
        host.sendall(bytes(4096))
        world.wait(lambda: not unread(world))
    host.close()
    host_is(world, port, False)


def unread(world):
    pump = world.host.pumps[1]
    unread = bytearray(4)
    fcntl.ioctl(pump.chardev.read_fd, termios.FIONREAD, unread)
    return int.from_bytes(unread, sys.byteorder)


def test_last_words_wait_for_a_guest_without_buffers_and_cost_no_time(joined):
    """A hang-up is ready for ever: the loop must not look at it until the guest reads."""
    world, port, host = joined
    fill_the_guest(world, host)
    host.close()
    assert rounds_of_the_loop(world, 0.1) < 10
    port.write(b"into the void")
    assert port.unsent == 0
    while port.host_connected:
        with contextlib.suppress(BlockingIOError):
            port.read()
        world.loop.run_once(0.01)
    assert world.device.ports[1].counters.host_bytes_dropped == 0


def test_what_a_paused_guest_wrote_to_one_host_is_not_for_the_next(joined):
    """R-CON-48, R-MIG-25: the ring stands still when the host leaves; its chains go back when it runs again."""
    world, port, host = joined
    fill_up(world, port)
    port.close()
    world.guest.attachment.pause()
    host.close()
    world.wait(lambda: not world.device.ports[1].state.host_connected)
    with unix_client(world.path) as new:
        world.loop.run_until(lambda: False, 2 * SETTLE_SECONDS)
        world.guest.attachment.resume()
        host_is(world, port, False)
        host_is(world, port, True)
        port.open()
        world.write(port, b"new words")
        assert world.receive(new, 9) == b"new words"


def test_what_a_paused_guest_wrote_to_an_unplugged_port_is_not_for_the_next(joined):
    """R-CON-49, R-CON-50."""
    world, port, _host = joined
    fill_up(world, port)
    world.guest.attachment.pause()
    world.host.unplug(1)
    world.host.plug(world.host.configuration.ports[0])
    world.host.pumps[1].open()
    with unix_client(world.path) as new:
        world.loop.run_until(lambda: False, 2 * SETTLE_SECONDS)
        world.guest.attachment.resume()
        world.wait(lambda: port.unplugged and 1 in world.guest.ports)
        port = world.guest.ports[1]
        host_is(world, port, True)
        port.open()
        world.write(port, b"new words")
        assert world.receive(new, 9) == b"new words"


def test_a_host_that_waits_for_a_paused_guest_costs_nothing(joined):
    world, port, host = joined
    port.close()
    world.guest.attachment.pause()
    host.close()
    world.wait(lambda: not world.device.ports[1].state.host_connected)
    with unix_client(world.path):
        world.loop.run_until(lambda: False, SETTLE_SECONDS)
        before = world.loop._poller.sleeps
        world.loop.run_until(lambda: False, 10 * SETTLE_SECONDS)
        assert world.loop._poller.sleeps - before <= 1
        world.guest.attachment.resume()
        host_is(world, port, True)


def test_a_paused_guest_has_time_to_see_that_its_host_left(joined):
    """The host left and another came during the pause: that is two messages, and time between them."""
    world, port, host = joined
    port.close()
    world.guest.attachment.pause()
    host.close()
    world.wait(lambda: not world.device.ports[1].state.host_connected)
    with unix_client(world.path):
        world.loop.run_until(lambda: False, 3 * SETTLE_SECONDS)
        world.guest.attachment.resume()
        host_is(world, port, False)
        left = time.monotonic()
        host_is(world, port, True)
        assert time.monotonic() - left > SETTLE_SECONDS / 2


def test_words_of_a_host_that_listens_no_more_are_counted_if_nobody_hears_them(world):
    """The guest wrote, closed, and the write fails: the session is over with what it had still to say."""
    port = world.port("org.test.1")
    port.open()
    with unix_client(world.path) as host:
        host_is(world, port, True)
        port.close()
        host.sendall(b"0123456789")
        host.shutdown(socket.SHUT_RD)
        port.write(b"into the void")
        host_is(world, port, False)
    assert world.device.ports[1].counters.host_bytes_dropped == 10
    assert world.device.ports[1].counters.bytes_discarded == 13


@pytest.mark.parametrize("reads_to_the_end", [True, False])
def test_a_full_disk_ends_the_session_when_the_input_is_read_or_nobody_reads_it(tmp_path, reads_to_the_end):
    (tmp_path / "in").write_bytes(bytes(1_000_000))
    with contextlib.closing(World([f"file,id=c1,path=/dev/full,input-path={tmp_path}/in"], [generic_port(1)])) as world:
        port = world.port("org.test.1")
        port.open()
        host_is(world, port, True)
        port.write(b"no room for this")
        if reads_to_the_end:
            world.read(port, 1_000_000)
        else:
            port.close()
        host_is(world, port, False)
        host_is(world, port, True)  # another try, a second later


def test_a_file_has_one_turn_in_each_round_however_often_the_guest_opens(tmp_path):
    (tmp_path / "in").write_bytes(bytes(5_000_000))
    with contextlib.closing(
        World([f"file,id=c1,path={tmp_path}/out,input-path={tmp_path}/in"], [generic_port(1)], queue_size=1024)
    ) as world:
        port = world.port("org.test.1")
        host_is(world, port, True)
        for _ in range(50):
            port.open()
            port.close()
        port.open()
        world.loop.run_once(0)
        assert world.device.ports[1].rx.bytes_moved == 1 << 20  # the guest has buffers for four times as many


def test_the_log_has_what_the_host_took(tmp_path):
    with (
        contextlib.closing(
            World([unix_chardev(1, tmp_path / "1") + f",logfile={tmp_path}/log"], [generic_port(1)])
        ) as world,
        unix_client(tmp_path / "1") as host,
    ):
        port = world.port("org.test.1")
        port.open()
        host_is(world, port, True)
        world.write(port, b"for the record")
        assert world.receive(host, 14) == b"for the record"
        assert (tmp_path / "log").read_bytes() == b"for the record"


def test_idle_ports_ask_for_nothing(joined):
    """A connected pair without traffic: the loop sleeps through, no descriptor is reported again and again."""
    world, port, host = joined
    host.sendall(b"one word")
    assert world.read(port, 8) == b"one word"
    world.loop.run_until(lambda: False, 0.05)
    assert rounds_of_the_loop(world, 0.2) < 5


def test_what_a_host_said_is_counted_if_the_port_is_unplugged_before_anybody_reads_it(tmp_path):
    """Nothing is dropped silently."""
    with contextlib.closing(World([unix_chardev(1, tmp_path / "s")], [generic_port(1)])) as world:
        drops = []
        world.device.on_drop = lambda port, count, whose: drops.append((port.id, count, whose))
        with unix_client(tmp_path / "s") as host:
            host_is(world, world.port("org.test.1"), True)
            host.sendall(b"to whom it may concern")
            world.host.unplug(1)
            assert drops == [(1, 22, Whose.HOST)]
