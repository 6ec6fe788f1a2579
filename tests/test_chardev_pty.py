"""The pty chardev: its link, its modes, and how it learns of an open."""

from __future__ import annotations

import os
import resource
import termios
from collections.abc import Iterator

import pytest
from chardev_peers import HOSTS, Rig

from vsport.chardev import inotify
from vsport.errors import HostError
from vsport.loop import Loop

LOCAL_MODES = 3  # of the list that tcgetattr() returns


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig(HOSTS["pty"]) as rig:
        yield rig


def local_modes(fd: int) -> int:
    modes: int = termios.tcgetattr(fd)[LOCAL_MODES]
    return modes & (termios.ECHO | termios.ICANON | termios.ISIG)


# -- sessions ------------------------------------------------------------------------------------------------------


def test_bytes_of_one_who_was_there_between_two_rounds_are_not_lost(rig: Rig) -> None:
    """``echo hello >/dev/pts/N``"""
    rig.open()
    with open(rig.directory / "pty", "wb", buffering=0) as terminal:
        terminal.write(b"hello\n")
    rig.wire.until(lambda: len(rig.wire.events) == 2)
    assert rig.wire.events == ["connected", "disconnected"]
    assert rig.wire.received == b"hello\n"


def test_one_who_came_and_left_in_silence_is_not_noticed(rig: Rig) -> None:
    rig.open()
    os.close(os.open(rig.directory / "pty", os.O_RDWR | os.O_NOCTTY))
    rig.wire.settle()
    assert rig.wire.events == []


def test_stays_connected_until_the_last_one_has_left(rig: Rig) -> None:
    rig.start()
    second = os.open(rig.directory / "pty", os.O_RDWR | os.O_NOCTTY)
    rig.host.leave()
    rig.wire.settle()
    assert rig.wire.events == ["connected"]
    os.close(second)
    rig.wire.until(lambda: not rig.wire.chardev.connected)


def test_one_who_opens_it_while_the_last_session_ends_is_noticed(rig: Rig) -> None:
    rig.start()
    rig.host.leave()
    rig.wire.then = lambda event: rig.host.connect() if event == "disconnected" else None
    rig.wire.until(lambda: rig.wire.events == ["connected", "disconnected", "connected"])


def test_one_who_stays_after_a_disconnect_is_the_next_sessions_peer(rig: Rig) -> None:
    rig.start()
    rig.wire.settle()  # its open is no news any more
    rig.wire.chardev.disconnect()
    assert rig.wire.events == ["connected", "disconnected"]
    rig.wire.until(lambda: rig.wire.events == ["connected", "disconnected", "connected"])


def test_every_session_begins_raw(rig: Rig) -> None:
    rig.open()
    for _ in range(2):
        rig.connect()
        terminal = rig.host.source  # type: ignore[attr-defined]
        assert local_modes(terminal) == 0
        modes = termios.tcgetattr(terminal)
        modes[LOCAL_MODES] |= termios.ECHO | termios.ICANON
        termios.tcsetattr(terminal, termios.TCSANOW, modes)
        rig.leave()


# -- the link ------------------------------------------------------------------------------------------------------


def test_the_link_leads_to_the_terminal_and_goes_with_it(rig: Rig) -> None:
    link = rig.directory / "pty"
    rig.open()
    assert rig.wire.chardev.describe() == f"pty:{os.readlink(link)}"
    rig.wire.chardev.close()
    assert not os.path.lexists(link)


def test_without_path_there_is_no_link() -> None:
    with Rig() as rig:
        wire = rig.make("pty")
        assert wire.chardev.describe() == "pty"
        wire.open()
        assert wire.chardev.describe().startswith("pty:/dev/")
        assert os.listdir(rig.directory) == []


def test_a_link_that_leads_nowhere_is_replaced(rig: Rig) -> None:
    (rig.directory / "pty").symlink_to("/dev/pts/999999")
    rig.start()


def test_a_link_to_the_number_that_is_ours_now_is_replaced(rig: Rig) -> None:
    """The kernel gives numbers again: after a crash the old link may lead to the new terminal."""
    rig.open()
    terminal = os.readlink(rig.directory / "pty")
    rig.wire.chardev.close()
    (rig.directory / "pty").symlink_to(terminal)
    rig.open()
    assert os.readlink(rig.directory / "pty") == terminal


def test_anything_else_in_the_place_of_the_link_is_kept(rig: Rig) -> None:
    link = rig.directory / "pty"
    link.symlink_to("/dev/null")
    with pytest.raises(HostError, match=r"c0: cannot make the link .*/pty to /dev/.*: File exists"):
        rig.open()
    assert os.readlink(link) == "/dev/null"
    link.unlink()
    link.write_text("mine")
    with pytest.raises(HostError, match="File exists"):
        rig.open()
    assert link.read_text() == "mine"


def test_close_leaves_a_link_that_is_another_s_by_now(rig: Rig) -> None:
    link = rig.directory / "pty"
    rig.open()
    link.unlink()
    link.symlink_to("/dev/null")
    rig.wire.chardev.close()
    assert os.readlink(link) == "/dev/null"


# -- going on in another process -----------------------------------------------------------------------------------


def test_modes_that_the_host_set_are_kept_as_long_as_it_stays(rig: Rig) -> None:
    rig.start()
    terminal = rig.host.source  # type: ignore[attr-defined]
    modes = termios.tcgetattr(terminal)
    modes[LOCAL_MODES] |= termios.ISIG
    termios.tcsetattr(terminal, termios.TCSANOW, modes)
    rig.hand_over()
    assert local_modes(terminal) == termios.ISIG
    rig.leave()
    rig.connect()
    assert local_modes(rig.host.source) == 0  # type: ignore[attr-defined]


def test_a_link_that_it_did_not_make_is_not_removed_by_the_successor(rig: Rig) -> None:
    wire = rig.make("pty")
    wire.open()
    (rig.directory / "mine").symlink_to(wire.chardev.describe().removeprefix("pty:"))
    rig.hand_over(wire).chardev.close()
    assert os.path.islink(rig.directory / "mine")


# -- noticing opens ------------------------------------------------------------------------------------------------


def test_an_open_is_noticed_without_polling(rig: Rig) -> None:
    rig.open()
    opens = rig.wire.chardev._opens  # type: ignore[attr-defined]
    assert not opens.polling
    assert not rig.loop._timers


def test_without_inotify_it_looks_every_second(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit on inotify instances, 128 for each user, is reached by a few busy desktops."""
    monkeypatch.setattr(inotify, "POLL_SECONDS", 0.01)
    calls: list[int] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        watch = inotify.OpenWatch(rig.loop, "/dev/null", lambda: calls.append(1))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert watch.polling
    rig.wire.until(lambda: len(calls) == 3)
    watch.close()
    rig.wire.settle()
    assert not [entry for entry in rig.loop._timers if entry[2].callback is not None]


def test_a_path_that_cannot_be_watched_is_polled() -> None:
    loop = Loop()
    watch = inotify.OpenWatch(loop, "/nowhere", lambda: None)
    assert watch.polling
    watch.close()
    loop.close()
