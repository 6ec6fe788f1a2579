"""guest_tools.channel and host_changes, on sockets that behave as a port does; the real port is in tests/lab."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_tools import channel as channel_module
from guest_tools import errors
from guest_tools.channel import MAX_WRITE, ZERO_WRITE_LIMIT, Channel, Deadline
from guest_tools.host_changes import HostTracker, HostWatch, SignalCount, hold
from guest_tools.ports import Port

Ends = tuple[Channel, socket.socket]
PORT = Port("/dev/null", "vport0p1", "org.test.0", 1)


def pair(kind: int = socket.SOCK_STREAM) -> tuple[Channel, socket.socket]:
    guest, host = socket.socketpair(socket.AF_UNIX, kind)
    guest.setblocking(False)
    host.settimeout(20)
    return Channel(guest.detach(), "port", timeout=20), host


@pytest.fixture
def ends() -> Iterator[tuple[Channel, socket.socket]]:
    channel, host = pair()
    with channel, host:
        yield channel, host


# Reading


def test_nothing_to_read_is_none_and_not_the_end(ends: Ends) -> None:
    assert ends[0].read_now() is None


def test_what_the_host_sent_before_it_left_is_read_first(ends: Ends) -> None:
    channel, host = ends
    host.sendall(b"last words")
    host.close()
    assert (channel.read(4), channel.read(), channel.read(), channel.read_now()) == (b"last", b" words", b"", b"")
    assert not channel.host_connected


def test_an_empty_buffer_is_not_the_end() -> None:
    """R-GUEST-08: a read of nothing is the end only if poll says that the host is away."""
    channel, host = pair(socket.SOCK_SEQPACKET)
    with channel, host:
        host.send(b"")
        assert channel.read_now() is None
        host.send(b"")
        host.send(b"data")
        assert channel.read() == b"data"


def test_a_reader_sleeps_until_data_comes(ends: Ends) -> None:
    channel, host = ends
    threading.Timer(0.05, host.sendall, [b"data"]).start()
    assert channel.read() == b"data"


def test_a_read_that_takes_too_long_is_a_timeout(ends: Ends) -> None:
    ends[0].timeout = 0.01
    with pytest.raises(errors.HostTimeout, match="port"):
        ends[0].read()


@pytest.mark.parametrize("size", [0, -1])
def test_a_read_of_no_bytes_would_look_like_the_end(ends: Ends, size: int) -> None:
    with pytest.raises(ValueError, match="read of"):
        ends[0].read(size)


# Writing


def test_one_write_is_32_kib_at_most(ends: Ends) -> None:
    """R-GUEST-09."""
    assert ends[0].write_now(bytes(100_000)) == MAX_WRITE


def test_a_long_write_waits_for_room_and_loses_nothing(ends: Ends) -> None:
    channel, host = ends
    data = os.urandom(3_000_000)
    writer = threading.Thread(target=channel.write, args=(data,))
    writer.start()
    received = bytearray()
    while len(received) < len(data):
        received += host.recv(65536)
    writer.join()
    assert bytes(received) == data


def test_a_write_that_finds_no_room_in_time_is_a_timeout(ends: Ends) -> None:
    ends[0].timeout = 0.01
    with pytest.raises(errors.HostTimeout):
        ends[0].write(bytes(10_000_000))


def test_a_write_that_takes_nothing_is_tried_again_but_not_for_ever(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R-GUEST-10: only a broken queue does it, which no socket can imitate."""
    calls = []

    def take_nothing(fd: int, data: memoryview) -> int:
        calls.append(fd)
        return 0

    monkeypatch.setattr(channel_module, "ZERO_WRITE_PAUSE", 0)
    monkeypatch.setattr(os, "write", take_nothing)
    with pytest.raises(errors.PortStuck):
        ends[0].write(b"data")
    assert len(calls) == ZERO_WRITE_LIMIT + 1
    assert ends[0].refused


def test_a_write_of_nothing_is_nothing(ends: Ends) -> None:
    for _ in range(2 * ZERO_WRITE_LIMIT):
        assert ends[0].write_now(b"") == 0
    ends[0].write(b"")


def test_a_write_tells_how_far_it_came_when_the_host_leaves() -> None:
    assert errors.HostLeft("port", 5).sent == 5


# The host, and the end


def test_waiting_for_a_host_that_is_there_returns(ends: Ends) -> None:
    ends[0].wait_host(0)


def test_waiting_for_a_host_that_is_away_times_out(ends: Ends) -> None:
    ends[1].close()
    with pytest.raises(errors.HostTimeout):
        ends[0].wait_host(0.01)


@pytest.fixture
def half_gone() -> Iterator[Channel]:
    """The end of an empty pipe: poll shows POLLHUP and nothing else, as it does for an unplugged port."""
    reader, writer = os.pipe()
    os.close(writer)
    with Channel(reader, "port") as channel:
        yield channel


def no_such_device(fd: int, size: int) -> bytes:
    raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))


def test_an_unplugged_port_is_told(half_gone: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    """R-GUEST-12, 14."""
    monkeypatch.setattr(os, "read", no_such_device)
    for action in half_gone.wait_host, half_gone.read, half_gone.read_now:
        with pytest.raises(errors.PortUnplugged):
            action()


def test_a_host_that_leaves_while_poll_looks_is_not_an_unplugged_port(half_gone: Channel) -> None:
    """The driver reads its state more than once for one answer, so that one can be POLLHUP alone as well."""
    assert not half_gone.host_connected


def test_a_channel_closes_once(ends: Ends) -> None:
    channel, host = ends
    fd = channel.fileno()
    channel.close()
    channel.close()
    assert channel.closed
    assert host.recv(1) == b""
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.EBUSY, errors.PortBusy),
        (errno.EACCES, errors.PortForbidden),
        (errno.ENXIO, errors.PortIsConsole),
        (errno.ENODEV, errors.PortNotFound),
        (errno.ENOENT, errors.PortNotFound),
        (errno.EMFILE, OSError),
    ],
)
def test_what_open_says_becomes_an_error_of_its_own(number: int, error: type[Exception]) -> None:
    """R-GUEST-04."""
    found = channel_module._open_error(PORT, OSError(number, os.strerror(number)))
    assert type(found) is error or (error is OSError and isinstance(found, OSError))


def test_a_console_port_that_has_no_node_any_more_is_being_removed() -> None:
    gone = Port("/dev/vport-none", "vport0p1", None, 1)
    assert isinstance(channel_module._open_error(gone, OSError(errno.ENXIO, "")), errors.PortNotFound)


@pytest.mark.parametrize("seconds", [0.0, 1e-9, 3.0, 1e300])
def test_a_deadline_is_never_negative_and_fits_the_kernel(seconds: float) -> None:
    left = Deadline(seconds).left()
    assert left is not None
    assert 0 <= left <= 1e6


def test_no_deadline_never_passes() -> None:
    assert Deadline(None).left() is None
    assert Deadline(None).left(at_most=3) == 3
    assert not Deadline(None).passed
    assert Deadline(0).passed


# Leaves and returns

STEPS = st.lists(st.sampled_from(["toggle", "data", "look"]), max_size=60)


@given(st.booleans(), STEPS, st.booleans())
def test_no_change_is_invented_and_without_data_none_is_missed(start: bool, steps: list[str], merged: bool) -> None:
    """R-GUEST-13, against a model of the driver: a signal for each change and for each interrupt with data."""
    tracker = HostTracker(start)
    connected, signals, buffers, reported, real, sent_data = start, 0, 0, [], 0, False
    for step in [*steps, "look"]:
        if step == "toggle":
            connected, signals, real = not connected, signals + 1, real + 1
        elif step == "data" and connected:
            buffers, sent_data = buffers + 1, True
            signals += 0 if merged and buffers > 1 else 1
        elif step == "look":
            reported += tracker.feed(connected, signals, buffers)
            signals = buffers = 0
    expected = [start ^ bool(n % 2) for n in range(1, len(reported) + 1)]
    assert reported == expected  # They alternate, starting from the state at the start.
    assert len(reported) <= real
    assert (len(reported) - real) % 2 == 0
    assert sent_data or len(reported) == real
    assert tracker.connected is connected


@pytest.mark.parametrize(
    ("looks", "reported"),
    [
        ([(True, 0, 0)], []),
        ([(False, 1, 0), (True, 1, 0)], [False, True]),
        ([(True, 2, 0)], [False, True]),
        ([(True, 4, 0)], [False, True, False, True]),
        ([(False, 3, 0)], [False, True, False]),
        ([(False, 0, 0), (False, 1, 0), (True, 1, 0)], [False, True]),  # The signal comes after the level.
        ([(True, 1, 0), (True, 1, 0)], [False, True]),  # Between the two halves of a pair.
        ([(True, 3, 3)], []),  # All data.
        ([(True, 3, 1)], [False, True]),
        ([(True, 1, 9), (False, 1, 0), (True, 1, 0), (True, 2, 0)], [False, True, False, True]),
    ],
)
def test_what_signals_and_looks_tell(looks: list[tuple[bool, int, int]], reported: list[bool]) -> None:
    tracker = HostTracker(True)
    assert [change for look in looks for change in tracker.feed(*look)] == reported


def test_a_signal_that_stays_alone_is_forgotten() -> None:
    tracker = HostTracker(True)
    for _ in range(5):
        assert tracker.feed(True, 1, 0) == []
        assert tracker.unsettled
        tracker.drop_leftover()
        assert not tracker.unsettled


def test_signals_are_counted_and_the_process_is_left_as_it_was(ends: Ends) -> None:
    channel, host = ends
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    count = SignalCount(channel.fileno())
    assert count.take() == 0
    for _ in range(5):
        host.send(b"x")
    assert count.take() == 5
    assert count.take() == 0
    host.send(b"x")
    count.close()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    assert not fcntl.fcntl(channel.fileno(), fcntl.F_GETFL) & os.O_ASYNC


def test_data_is_no_change_of_the_host(ends: Ends) -> None:
    channel, host = ends
    with HostWatch(channel) as watch:
        for _ in range(3):
            host.send(b"x")
        watch.collect()
        while channel.read_now(1):
            watch.count_buffers(1)
        assert (watch.changes(), watch.connected, watch.patience) == ([], True, None)


def test_holding_discards_input_and_tells_when_the_host_leaves(ends: Ends) -> None:
    channel, host = ends
    changes = hold(channel)
    assert next(changes).connected
    host.sendall(bytes(100_000))
    host.close()
    last = next(changes)
    assert (last.connected, last.discarded) == (False, 100_000)
    changes.close()
