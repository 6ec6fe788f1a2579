"""The file chardev: appending, failing disks, and what it reads."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from chardev_peers import Rig

from vsport.chardev.file import File
from vsport.errors import HostError


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setattr(File, "retry_seconds", 0.01)
    with Rig() as rig:
        yield rig


@pytest.mark.parametrize(("append", "expected"), [("on", "old new"), ("off", "new")])
def test_append_keeps_what_is_there(rig: Rig, append: str, expected: str) -> None:
    path = rig.directory / "out"
    path.write_text("old ")
    wire = rig.make("file", path=str(path), append=append)
    wire.open()
    wire.send(b"new")
    assert path.read_text() == expected


def test_a_second_session_goes_on_where_the_first_one_stopped(rig: Rig) -> None:
    (rig.directory / "in").write_bytes(b"once")
    wire = rig.make("file", path=str(rig.directory / "out"), input_path=str(rig.directory / "in"))
    wire.open()
    wire.send(b"one ")
    wire.chardev.disconnect()
    wire.until(lambda: wire.chardev.connected)
    wire.send(b"two")
    assert (rig.directory / "out").read_bytes() == b"one two"
    assert wire.received == b"once"


def test_a_full_disk_ends_the_session_and_it_is_tried_again(rig: Rig) -> None:
    wire = rig.make("file", path="/dev/full")
    wire.open()
    with pytest.raises(OSError, match="No space left on device"):
        wire.offer(b"x")
    wire.chardev.disconnect()  # as the pump does
    wire.until(lambda: wire.events == ["connected", "disconnected", "connected"])


def test_a_directory_that_went_away_may_come_back(rig: Rig) -> None:
    directory = rig.directory / "d"
    directory.mkdir()
    wire = rig.make("file", path=str(directory / "out"))
    wire.open()
    (directory / "out").unlink()
    directory.rmdir()
    wire.chardev.disconnect()
    rig.loop.run_until(lambda: False, 0.05)
    assert wire.events == ["connected", "disconnected"]
    directory.mkdir()
    wire.until(lambda: wire.chardev.connected)


def test_an_input_that_ended_is_not_a_host_that_left(rig: Rig) -> None:
    (rig.directory / "in").write_bytes(b"all there is")
    wire = rig.make("file", path=str(rig.directory / "out"), input_path=str(rig.directory / "in"))
    wire.open()
    wire.settle()
    assert wire.received == b"all there is"
    assert os.read(wire.chardev.read_fd, 1) == b""
    assert wire.chardev.connected
    assert not wire.chardev.eof_ends_session


def test_without_input_path_there_is_nothing_to_read(rig: Rig) -> None:
    wire = rig.make("file", path=str(rig.directory / "out"))
    wire.open()
    assert wire.chardev.read_fd == -1


def test_both_files_go_on_where_they_were_in_another_process(rig: Rig) -> None:
    (rig.directory / "in").write_bytes(b"0123456789")
    wire = rig.make("file", path=str(rig.directory / "out"), input_path=str(rig.directory / "in"))
    wire.open()
    os.lseek(wire.chardev.read_fd, 4, os.SEEK_SET)  # the guest has read so far
    wire.send(b"one ")
    wire = rig.hand_over(wire)
    wire.until(lambda: wire.received == b"456789")
    wire.send(b"two ")
    wire.chardev.disconnect()
    wire.until(lambda: wire.chardev.connected)
    wire.send(b"three")
    assert (rig.directory / "out").read_bytes() == b"one two three"


def test_a_file_that_cannot_be_opened_just_now_is_tried_again_by_the_successor(rig: Rig) -> None:
    (rig.directory / "d").mkdir()
    wire = rig.make("file", path=str(rig.directory / "d" / "out"))
    wire.open()
    (rig.directory / "d" / "out").unlink()
    (rig.directory / "d").rmdir()
    wire.chardev.disconnect()
    wire = rig.hand_over(wire)
    wire.loop.run_until(lambda: False, 0.05)
    assert wire.events == []
    (rig.directory / "d").mkdir()
    wire.until(lambda: wire.events == ["connected"])


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"path": "{}"}, "cannot open file .*: Is a directory"),
        ({"path": "{}/no/out"}, "cannot open file .*/no/out: No such file or directory"),
        ({"path": "{}/out", "input_path": "{}/no"}, "cannot open input file .*/no: No such file or directory"),
        ({"path": "{}/fifo"}, "cannot open file .*/fifo: No such device or address"),
    ],
)
def test_what_cannot_be_opened_is_one_clear_line(rig: Rig, options: dict[str, str], line: str) -> None:
    os.mkfifo(rig.directory / "fifo")  # that would be --chardev pipe; here it must not hang
    named = {name: value.format(rig.directory) for name, value in options.items()}
    with pytest.raises(HostError, match=f"^chardev c0: {line}$"):
        rig.make("file", **named).open()
