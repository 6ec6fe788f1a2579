"""guest_tools.bridge, with a socket in the port's place; the real port is in tests/lab."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import threading
import tty
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guest_tools import errors
from guest_tools.bridge import Bridge, Ending, Outcome
from guest_tools.channel import Channel
from guest_tools.host_changes import HostWatch


class Setup:
    """A bridge between a port, whose other end is ``host``, and two pipes, whose other ends are these."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        guest, self.host = socket.socketpair()
        guest.setblocking(False)
        self.host.settimeout(20)
        self.channel = Channel(guest.detach(), "port")
        self.in_fd, self.input = os.pipe()
        self.output, self.out_fd = os.pipe()
        self._open = {self.in_fd, self.input, self.output, self.out_fd}
        self._pool = ThreadPoolExecutor()
        stack.callback(self._pool.shutdown)
        stack.callback(self._close_all)

    def start(self, *, close_on_eof: bool = False) -> Future[Outcome]:
        return self._pool.submit(Bridge(self.channel, self.in_fd, self.out_fd, close_on_eof=close_on_eof).run)

    def close(self, *fds: int) -> None:
        for fd in fds:
            self._open.remove(fd)
            os.close(fd)

    def read_output(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += os.read(self.output, size - len(data))
        return data

    def receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size and (piece := self.host.recv(size - len(data))):
            data += piece
        return data

    def _close_all(self) -> None:
        self.host.close()
        self.close(*self._open.copy())
        self.channel.close()


@pytest.fixture
def setup() -> Iterator[Setup]:
    with contextlib.ExitStack() as stack:
        yield Setup(stack)


def test_bytes_go_both_ways_and_the_hosts_leaving_ends_it(setup: Setup) -> None:
    running = setup.start()
    os.write(setup.input, b"to the host")
    assert setup.receive(11) == b"to the host"
    setup.host.sendall(b"to the guest")
    assert setup.read_output(12) == b"to the guest"
    setup.host.close()
    assert running.result(20) == Outcome(Ending.HOST_LEFT, sent=11, received=12, unsent=0)


def test_everything_that_the_host_sent_before_it_left_is_handed_over(setup: Setup) -> None:
    data = os.urandom(150_000)  # More than the pipe holds, less than the socket.
    setup.host.sendall(data)
    setup.host.close()
    running = setup.start()
    assert setup.read_output(len(data)) == data
    assert running.result(20).received == len(data)


def test_the_end_of_the_input_does_not_end_the_session(setup: Setup) -> None:
    running = setup.start()
    os.write(setup.input, b"question")
    setup.close(setup.input)
    assert setup.receive(8) == b"question"
    setup.host.sendall(b"answer")
    assert setup.read_output(6) == b"answer"
    assert not running.done()
    setup.host.close()
    assert running.result(20).ending is Ending.HOST_LEFT


def test_with_close_on_eof_it_does_once_all_is_queued(setup: Setup) -> None:
    running = setup.start(close_on_eof=True)
    data = os.urandom(1_000_000)
    writer = threading.Thread(target=os.write, args=(setup.input, data))
    writer.start()
    assert setup.receive(len(data)) == data
    writer.join()
    setup.close(setup.input)
    assert running.result(20) == Outcome(Ending.INPUT_ENDED, sent=len(data), received=0, unsent=0)


def test_with_close_on_eof_what_had_arrived_is_handed_over(setup: Setup) -> None:
    setup.host.sendall(b"early")
    setup.close(setup.input)
    assert setup.start(close_on_eof=True).result(20).received == 5
    assert setup.read_output(5) == b"early"


def test_an_empty_input_and_close_on_eof_ends_at_once(setup: Setup) -> None:
    setup.close(setup.input)
    assert setup.start(close_on_eof=True).result(20) == Outcome(Ending.INPUT_ENDED, 0, 0, 0)


def test_nobody_reads_the_output_any_more(setup: Setup) -> None:
    running = setup.start()
    setup.close(setup.output)
    setup.host.sendall(b"data")
    assert running.result(20).ending is Ending.OUTPUT_CLOSED


def test_a_slow_output_stops_the_host_and_nothing_else(setup: Setup) -> None:
    """Back-pressure: what is in flight is bounded by the kernel's buffers, not by memory of ours."""
    running = setup.start()
    setup.host.settimeout(0.2)
    sent = 0
    with contextlib.suppress(OSError):  # A timeout, which is not a TimeoutError before Python 3.10.
        while sent < 64 << 20:
            sent += setup.host.send(bytes(65536))
    assert sent < 4 << 20
    setup.host.settimeout(20)
    os.write(setup.input, b"still goes the other way")
    assert setup.receive(24) == b"still goes the other way"
    setup.host.close()
    assert setup.read_output(sent) == bytes(sent)
    assert running.result(20).received == sent


def test_a_slow_host_stops_the_input_and_nothing_else(setup: Setup) -> None:
    running = setup.start()
    os.set_blocking(setup.input, False)
    sent = 0
    deadline = threading.Event()
    threading.Timer(0.5, deadline.set).start()
    while not deadline.is_set():
        with contextlib.suppress(BlockingIOError):
            sent += os.write(setup.input, bytes(65536))
    assert sent < 4 << 20
    setup.host.sendall(b"still goes the other way")
    assert setup.read_output(24) == b"still goes the other way"
    assert setup.receive(sent) == bytes(sent)
    setup.host.close()
    assert running.result(20).sent == sent


def test_an_idle_session_takes_no_time(setup: Setup) -> None:
    """The loop sleeps: the processor time of an idle while is a small part of it."""
    running = setup.start()
    setup.close(setup.input)  # An input at its end stays readable for ever.
    os.write(setup.out_fd, bytes(1))
    before = resource.getrusage(resource.RUSAGE_SELF)
    assert not threading.Event().wait(1)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 0.5
    setup.host.close()
    running.result(20)


def test_the_descriptors_stay_blocking(setup: Setup) -> None:
    setup.host.close()
    setup.start().result(20)
    assert os.get_blocking(setup.in_fd)
    assert os.get_blocking(setup.out_fd)


def test_input_and_output_may_be_files(setup: Setup, tmp_path: Path) -> None:
    data = os.urandom(300_000)
    (tmp_path / "in").write_bytes(data)
    with (tmp_path / "in").open("rb") as source, (tmp_path / "out").open("wb") as sink:
        bridge = Bridge(setup.channel, source.fileno(), sink.fileno())
        with ThreadPoolExecutor() as pool:
            running = pool.submit(bridge.run)
            assert setup.receive(len(data)) == data
            setup.host.sendall(data)
            setup.host.close()
            assert running.result(20) == Outcome(Ending.HOST_LEFT, len(data), len(data), 0)
    assert (tmp_path / "out").read_bytes() == data


def test_input_and_output_may_be_one_terminal(setup: Setup) -> None:
    leader, follower = os.openpty()
    tty.setraw(follower)
    with ThreadPoolExecutor() as pool:
        running = pool.submit(Bridge(setup.channel, follower, follower).run)
        os.write(leader, b"typed")
        assert setup.receive(5) == b"typed"
        setup.host.sendall(b"shown")
        assert os.read(leader, 100) == b"shown"
        setup.host.close()
        assert running.result(20) == Outcome(Ending.HOST_LEFT, 5, 5, 0)
    os.close(leader)
    os.close(follower)


def test_an_output_that_somebody_made_non_blocking_loses_nothing(setup: Setup) -> None:
    os.set_blocking(setup.out_fd, False)
    os.set_blocking(setup.in_fd, False)
    data = os.urandom(150_000)
    setup.host.sendall(data)
    setup.host.close()
    running = setup.start()
    assert setup.read_output(len(data)) == data
    assert running.result(20).received == len(data)


def test_an_unplugged_port_is_an_error_and_what_it_gave_is_handed_over(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R-GUEST-14; no socket says ENODEV."""
    answers = iter([b"last ", b"words"])

    def read(fd: int, size: int) -> bytes:
        for answer in answers:
            return answer
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    with monkeypatch.context() as patch, pytest.raises(errors.PortUnplugged):
        patch.setattr(os, "read", read)
        Bridge(setup.channel, setup.in_fd, setup.out_fd).run()
    assert setup.read_output(10) == b"last words"


def test_a_watched_session_ends_like_any_other(setup: Setup) -> None:
    setup.host.sendall(bytes(100_000))
    setup.host.close()
    sink = os.open(os.devnull, os.O_WRONLY)
    with HostWatch(setup.channel) as watch:
        outcome = Bridge(setup.channel, setup.in_fd, sink, watch=watch).run()
    os.close(sink)
    assert outcome == Outcome(Ending.HOST_LEFT, 0, 100_000, 0)


class Leaves:
    """A host watch that has seen the host leave and return."""

    patience = None

    def collect(self) -> int:
        return 0

    def count_buffers(self, count: int) -> None: ...

    def changes(self) -> list[bool]:
        return [False, True]


def test_a_host_that_left_and_is_back_already_has_ended_the_session(setup: Setup) -> None:
    setup.host.sendall(b"of the old session")
    bridge = Bridge(setup.channel, setup.in_fd, setup.out_fd, watch=Leaves())  # type: ignore[arg-type]
    assert bridge.run() == Outcome(Ending.HOST_LEFT, 0, 18, 0)
    assert setup.read_output(18) == b"of the old session"


PIECES = st.lists(st.binary(min_size=1, max_size=9000), max_size=12)


@settings(max_examples=60, deadline=None)
@given(PIECES, PIECES)
def test_any_traffic_arrives_as_it_was(to_host: list[bytes], to_guest: list[bytes]) -> None:
    with contextlib.ExitStack() as stack:
        setup = Setup(stack)
        running = setup.start()
        for data in to_guest:
            setup.host.sendall(data)
        writer = threading.Thread(target=lambda: [os.write(setup.input, data) for data in to_host])
        writer.start()
        assert setup.receive(sum(map(len, to_host))) == b"".join(to_host)
        writer.join()
        setup.host.shutdown(socket.SHUT_RDWR)
        assert setup.read_output(sum(map(len, to_guest))) == b"".join(to_guest)
        assert running.result(20).unsent == 0
