"""The pipe chardev: who counts as the peer, and what is done about FIFOs that are missing."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from chardev_peers import HOSTS, Rig

from vsport.chardev import pipe
from vsport.errors import HostError


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig(HOSTS["pipe"]) as rig:
        yield rig


def write(path: Path, data: bytes) -> None:
    """As ``echo >PATH`` does: open, write, close."""
    fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    os.write(fd, data)
    os.close(fd)


def test_writers_come_and_go_without_ending_the_session(rig: Rig) -> None:
    rig.open()
    reader = os.open(rig.directory / "p.out", os.O_RDONLY | os.O_NONBLOCK)
    for number in range(3):
        write(rig.directory / "p.in", b"%d" % number)
        rig.wire.until(lambda number=number: len(rig.wire.received) == number + 1)  # type: ignore[misc]
    rig.wire.settle()
    assert rig.wire.events == ["connected"]
    os.close(reader)
    rig.wire.until(lambda: not rig.wire.chardev.connected)


def test_what_was_written_before_the_reader_came_is_part_of_its_session(rig: Rig) -> None:
    rig.open()
    write(rig.directory / "p.in", b"early")
    rig.wire.settle()
    assert rig.wire.events == []
    rig.host.connect()
    rig.wire.until(lambda: rig.wire.received == b"early")


def test_readers_that_wait_in_open_are_let_in(rig: Rig) -> None:
    """``cat p.out``, started before the daemon: its open() sleeps until somebody writes."""
    rig.host.prepare()
    rig.prepared = True
    with subprocess.Popen(["cat", rig.directory / "p.out"], stdout=subprocess.PIPE) as cat:
        rig.open()
        rig.wire.until(lambda: rig.wire.chardev.connected)
        rig.wire.send(b"hello")
        assert cat.stdout is not None
        assert cat.stdout.read(5) == b"hello"
        rig.wire.chardev.disconnect()
        assert cat.wait(10) == 0  # it saw the end


def test_a_second_reader_keeps_the_session(rig: Rig) -> None:
    rig.start()
    second = os.open(rig.directory / "p.out", os.O_RDONLY | os.O_NONBLOCK)
    rig.host.leave()
    rig.wire.settle()
    assert rig.wire.events == ["connected"]
    os.close(second)
    rig.wire.until(lambda: not rig.wire.chardev.connected)


def test_one_fifo_takes_the_guests_bytes_and_gives_none(rig: Rig) -> None:
    os.mkfifo(rig.directory / "one")
    wire = rig.make("pipe", path=str(rig.directory / "one"))
    wire.open()
    reader = os.open(rig.directory / "one", os.O_RDONLY | os.O_NONBLOCK)
    wire.until(lambda: wire.chardev.connected)
    assert wire.chardev.read_fd == -1
    wire.send(b"hello")
    assert os.read(reader, 100) == b"hello"
    os.close(reader)
    wire.until(lambda: not wire.chardev.connected)


@pytest.mark.parametrize("there", [[], ["p.in"], ["p.out"], ["p"]])
def test_missing_fifos_are_an_error_that_says_how_to_make_them(there: list[str]) -> None:
    with Rig() as rig:
        for name in there:
            os.mkfifo(rig.directory / name) if name != "p" else (rig.directory / name).touch()
        path = rig.directory / "p"
        with pytest.raises(HostError) as error:
            rig.make("pipe", path=str(path)).open()
        assert str(error.value) == f"chardev c0: no FIFOs there; make them: mkfifo {path}.in {path}.out"


def test_a_fifo_that_was_removed_may_come_back(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "_RETRY_SECONDS", 0.01)
    rig.start()
    (rig.directory / "p.out").unlink()
    rig.leave()
    rig.loop.run_until(lambda: False, pipe._REST_SECONDS + 0.05)  # it has looked, and found nothing
    os.mkfifo(rig.directory / "p.out")
    rig.wire.until(lambda: rig.wire.chardev._held("output") >= 0)
    rig.connect()
    assert rig.wire.events == ["connected", "disconnected", "connected"]


def test_a_pause_between_two_sessions_goes_on_in_another_process(rig: Rig) -> None:
    """A reader who stayed sees the end of the session that is over, whoever holds the FIFO by then."""
    rig.start()
    rig.wire.chardev.disconnect()
    rig.hand_over()
    assert rig.host.hear(rig.wire, 1) == b""
    rig.host.leave()
    rig.wire.settle()
    rig.connect()
    assert rig.wire.events == ["connected"]


def test_one_fifo_goes_on_in_another_process(rig: Rig) -> None:
    os.mkfifo(rig.directory / "one")
    wire = rig.make("pipe", path=str(rig.directory / "one"))
    wire.open()
    for _ in range(2):
        wire = rig.hand_over(wire)
        reader = os.open(rig.directory / "one", os.O_RDONLY | os.O_NONBLOCK)
        wire.until(lambda: wire.chardev.connected)  # noqa: B023
        wire = rig.hand_over(wire)
        wire.send(b"hello")
        assert os.read(reader, 100) == b"hello"
        os.close(reader)
        wire.until(lambda: not wire.chardev.connected)  # noqa: B023
