"""The stdio chardev: a terminal's modes, flags that others share, and standard streams that are unusual."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import termios
import tty
from collections.abc import Iterator
from typing import Any

import pytest
from chardev_peers import HOSTS, Rig, Wire, readiness, shipped

from vsport.document import DocumentError
from vsport.errors import HostError


@contextlib.contextmanager
def standard_streams(stdin: int, stdout: int) -> Iterator[None]:
    """Puts descriptors in the place of 0 and 1."""
    saved = os.dup(0), os.dup(1)
    os.dup2(stdin, 0)
    os.dup2(stdout, 1)
    try:
        yield
    finally:
        for number, fd in enumerate(saved):
            os.dup2(fd, number)
            os.close(fd)


@contextlib.contextmanager
def on_a_terminal() -> Iterator[tuple[int, int]]:
    """A terminal as standard input and output; gives its master, and the terminal itself."""
    master, terminal = os.openpty()
    os.set_blocking(master, False)
    try:
        with standard_streams(terminal, terminal):
            yield master, terminal
    finally:
        os.close(master)
        os.close(terminal)


@pytest.fixture
def pipes() -> Iterator[list[int]]:
    """stdin's reading end, its writing end, stdout's reading end, its writing end; a test sets what it closes to -1."""
    fds = [*os.pipe(), *os.pipe()]
    yield fds
    for fd in fds:
        if fd >= 0:
            os.close(fd)


def nonblocking(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK)


@pytest.mark.parametrize("signal", ["on", "off"])
def test_a_terminal_is_made_raw_and_gets_its_modes_back(signal: str) -> None:
    with on_a_terminal() as (master, terminal), Rig() as rig:
        before: list[Any] = termios.tcgetattr(terminal)
        wire = rig.make("stdio", signal=signal)
        wire.open()
        raw = termios.tcgetattr(terminal)
        assert not raw[tty.LFLAG] & (termios.ECHO | termios.ICANON)
        assert bool(raw[tty.LFLAG] & termios.ISIG) is (signal == "on")
        os.write(master, b"typed\r")
        wire.until(lambda: wire.received == b"typed\r")
        wire.send(b"shown")
        wire.until(lambda: readiness(master) & 1)
        assert os.read(master, 100) == b"shown"  # and no echo
        wire.chardev.close()
        assert termios.tcgetattr(terminal) == before


def test_a_terminal_gets_its_modes_back_from_the_last_one_who_has_it() -> None:
    with on_a_terminal() as (master, terminal), Rig() as rig:
        before: list[Any] = termios.tcgetattr(terminal)
        wire = rig.make("stdio", signal="off")
        wire.open()
        raw = termios.tcgetattr(terminal)
        assert raw != before
        for _ in range(2):
            wire = rig.hand_over(wire)
            assert termios.tcgetattr(terminal) == raw
        os.write(master, b"typed\r")
        wire.until(lambda: wire.received == b"typed\r")
        wire.chardev.close()
        assert termios.tcgetattr(terminal) == before


def test_a_terminal_that_was_raw_before_stays_so() -> None:
    """What VMIN and VTIME are then, tcgetattr() gives as numbers."""
    with on_a_terminal() as (_, terminal), Rig() as rig:
        tty.setraw(terminal)
        before: list[Any] = termios.tcgetattr(terminal)
        wire = rig.make("stdio")
        wire.open()
        rig.hand_over(wire).chardev.close()
        assert termios.tcgetattr(terminal) == before


@pytest.mark.parametrize("modes", ["00", "00" * 55, "00" * 57])
def test_modes_that_are_no_terminals_are_refused(modes: str) -> None:
    with on_a_terminal(), Rig() as rig:
        wire = rig.make("stdio")
        wire.open()
        state, delivery = shipped(wire.chardev)
        with pytest.raises(DocumentError, match="modes are not a terminal's"):
            rig.successor(wire).take({**state, "modes": modes}, delivery)
        delivery.close()


def test_modes_without_a_terminal_are_refused(pipes: list[int]) -> None:
    with standard_streams(pipes[0], pipes[3]), Rig() as rig:
        wire = rig.make("stdio")
        wire.open()
        state, delivery = shipped(wire.chardev)
        with pytest.raises(DocumentError, match="no terminal that they belong to"):
            rig.successor(wire).take({**state, "modes": "00" * 56}, delivery)
        delivery.close()


def test_a_successor_needs_no_standard_streams_of_its_own(pipes: list[int]) -> None:
    with Rig() as rig:
        with standard_streams(pipes[0], pipes[3]):
            wire = rig.make("stdio")
            wire.open()
        wire = rig.hand_over(wire)
        wire.send(b"heard")
        assert os.read(pipes[2], 100) == b"heard"
        os.write(pipes[1], b"said")
        wire.until(lambda: wire.received == b"said")


def test_a_terminal_that_others_use_keeps_blocking() -> None:
    """Its open file is that of standard error and of the shell."""
    with on_a_terminal() as (_, terminal), Rig() as rig:
        wire = rig.make("stdio")
        wire.open()
        assert nonblocking(wire.chardev.read_fd)
        assert nonblocking(wire.chardev.write_fd)
        assert not nonblocking(terminal)
        assert not nonblocking(1)


def test_pipes_keep_blocking_for_others(pipes: list[int]) -> None:
    with standard_streams(pipes[0], pipes[3]), Rig() as rig:
        wire = rig.make("stdio")
        wire.open()
        assert nonblocking(wire.chardev.write_fd)
        assert not nonblocking(1)


def test_a_socket_cannot_be_opened_anew_and_gets_its_flag_back() -> None:
    here, there = socket.socketpair()
    with here, there, standard_streams(here.fileno(), here.fileno()), Rig() as rig:
        wire = rig.make("stdio")
        wire.open()
        assert nonblocking(here.fileno())
        there.send(b"in")
        wire.until(lambda: wire.received == b"in")
        wire.send(b"out")
        assert there.recv(10) == b"out"
        wire = rig.hand_over(wire)
        assert nonblocking(here.fileno())
        wire.chardev.close()
        assert not nonblocking(here.fileno())


def test_output_to_a_file_goes_on_where_the_file_ends(tmp_path: os.PathLike[str], pipes: list[int]) -> None:
    """``vsport serve ... >>log``: opened anew, it would be overwritten from its beginning."""
    path = os.path.join(tmp_path, "log")
    with open(path, "ab", buffering=0) as log, standard_streams(pipes[0], log.fileno()), Rig() as rig:
        log.write(b"old ")
        wire = rig.make("stdio")
        wire.open()
        wire.send(b"new")
    with open(path, "rb") as log_again:
        assert log_again.read() == b"old new"


def test_the_end_of_standard_input_does_not_end_the_session(pipes: list[int]) -> None:
    with standard_streams(pipes[0], pipes[3]), Rig() as rig:
        os.write(pipes[1], b"all")
        os.close(pipes[1])
        pipes[1] = -1
        wire = rig.make("stdio")
        wire.open()
        wire.until(lambda: wire.received == b"all")
        wire.settle()
        assert wire.chardev.connected
        wire.send(b"still heard")
        assert os.read(pipes[2], 100) == b"still heard"


def test_a_standard_input_that_cannot_be_read_is_left_alone(pipes: list[int]) -> None:
    """nohup opens it for writing."""
    null = os.open(os.devnull, os.O_WRONLY)
    with standard_streams(null, pipes[3]), Rig() as rig:
        wire = rig.make("stdio")
        wire.open()
        assert wire.chardev.read_fd == -1
        wire.send(b"heard")
        assert os.read(pipes[2], 100) == b"heard"
    os.close(null)


def test_when_the_reader_has_left_it_is_over(pipes: list[int]) -> None:
    with standard_streams(pipes[0], pipes[3]), Rig() as rig:
        wire = rig.make("stdio")
        wire.open()
        os.close(pipes[2])
        pipes[2] = -1
        wire.until(lambda: not wire.chardev.connected)
        wire.settle()
        assert not rig.loop._timers
        wire.chardev.close()
        with pytest.raises(HostError, match="c0: nobody reads standard output"):
            wire.open()


def test_a_standard_output_that_cannot_be_written_to_is_an_error(pipes: list[int]) -> None:
    with standard_streams(pipes[0], pipes[2]), Rig() as rig:
        wire = rig.make("stdio")
        with pytest.raises(HostError, match="standard output is not open for writing"):
            wire.open()


def test_a_closed_standard_output_is_an_error(pipes: list[int]) -> None:
    with standard_streams(pipes[0], pipes[3]), Rig() as rig:
        os.close(1)
        try:
            wire = rig.make("stdio")
            with pytest.raises(HostError, match="standard output is not open for writing"):
                wire.open()
        finally:
            os.dup2(pipes[3], 1)


def test_there_is_one_for_each_process() -> None:
    with Rig(HOSTS["stdio"]) as rig:
        rig.start()
        second: Wire = rig.make("stdio")
        with pytest.raises(HostError, match="standard input and output are used by chardev c0"):
            second.open()
        rig.wire.send(b"unharmed")
        assert rig.host.hear(rig.wire, 8) == b"unharmed"
        rig.wire.chardev.close()
        second.open()
        assert second.events == ["connected"]
        second.chardev.close()
