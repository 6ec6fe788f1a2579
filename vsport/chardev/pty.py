"""``pty``: a terminal that a program on the host opens, such as screen, minicom or cat."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import termios
import tty
from collections.abc import Mapping
from typing import Any, ClassVar

from vsport.chardev.base import COMMON_OPTIONS, Chardev, Ends, LogFile
from vsport.chardev.inotify import OpenWatch
from vsport.document import DocumentError, Fields
from vsport.errors import HostError
from vsport.option_table import Option, text
from vsport.parcel import Delivery, Parcel

__all__ = ["Pty"]

_libc = ctypes.CDLL(None)


class Pty(Chardev):
    """``--chardev pty[,path=LINK]``: connected while somebody has the terminal open.

    The master says HUP exactly while nobody does, and a close wakes whoever waits for that; an open wakes nobody, so it
    is noticed by inotify on the terminal's device file.
    """

    kind = "pty"
    summary = "a terminal that a program opens"
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "path": Option(text, None, "a symbolic link to make to the terminal, which has another name each time"),
        **COMMON_OPTIONS,
    }
    KEPT: ClassVar[Mapping[str, int]] = {"master": os.O_RDWR}

    def __init__(self, id: str, *, path: str | None = None, log: LogFile | None = None) -> None:
        super().__init__(id, log=log)
        self.link = path
        self.terminal = ""
        """The path of the terminal, while open."""
        self._linked = False
        self._opens: OpenWatch | None = None

    def claims(self) -> list[str]:
        return [*super().claims(), *([] if self.link is None else [os.path.abspath(self.link)])]

    def describe(self) -> str:
        return f"pty:{self.terminal}" if self.terminal else "pty"

    @property
    def _master(self) -> int:
        return self._held("master")

    def _start(self) -> None:
        self._make_terminal()
        self._make_link()
        self._opens = OpenWatch(self.loop, self.terminal, self._look)
        self._look()

    def _make_terminal(self) -> None:
        try:
            master, slave = os.openpty()
        except OSError as exc:
            raise HostError(f"cannot make a pty: {exc.strerror}; is /dev/pts mounted?") from exc
        self._keep("master", master)
        self.terminal = os.ttyname(slave)
        os.close(slave)
        os.set_blocking(self._master, False)
        self._clean()

    def _make_link(self) -> None:
        if self.link is None:
            return
        try:
            if _is_stale(self.link, self.terminal):
                os.unlink(self.link)
            os.symlink(self.terminal, self.link)
        except OSError as exc:
            raise HostError(f"cannot make the link {self.link} to {self.terminal}: {exc.strerror}") from exc
        self._linked = True

    def _look(self) -> None:
        """Connects if the terminal is open, or was for so short a time that only its bytes are left."""
        if not self.connected and self._master >= 0 and _readiness(self._master) != select.POLLHUP:
            self._connected()

    def _ends(self) -> Ends:
        return self._master, self._master

    def _wipe(self) -> None:
        self._clean()

    def _clean(self) -> None:
        """Makes the terminal raw and empty: neither bytes nor modes of one session reach the next one.

        Linux keeps both as long as the master is open. On the master, termios calls act on the terminal; the flush of
        ``tcsetattr`` empties what its reader had in front of it, ``tcflush`` what was still on the way, both ways.
        """
        termios.tcflush(self._master, termios.TCIOFLUSH)
        tty.setraw(self._master, termios.TCSAFLUSH)

    def _rearm(self) -> None:
        self._later(0, self._look)  # somebody may have opened it again, and that event is over

    def _put_back(self) -> None:
        if self._linked and self.link is not None:
            with contextlib.suppress(OSError):
                if os.readlink(self.link) == self.terminal:
                    os.unlink(self.link)

    def _stop(self) -> None:
        if self._opens is not None:
            self._opens.close()
            self._opens = None
        self._linked, self.terminal = False, ""

    def _give(self, parcel: Parcel) -> dict[str, Any]:
        return {"linked": self._linked}

    def _take(self, state: Fields, delivery: Delivery) -> None:
        self.terminal = _terminal_of(self._master)
        self._linked = state.boolean("linked")
        if not self.terminal:
            raise DocumentError(f"{state.where}: master is no pty's")
        self._opens = OpenWatch(self.loop, self.terminal, self._look)


def _terminal_of(master: int) -> str:
    """The path of the terminal that belongs to ``master``, or nothing if that is no pty's."""
    path = ctypes.create_string_buffer(128)
    return "" if _libc.ptsname_r(master, path, ctypes.c_size_t(len(path))) else os.fsdecode(path.value)


def _is_stale(link: str, terminal: str) -> bool:
    """Whether ``link`` is left over from a dead process: it leads nowhere, or to the terminal that is ours now."""
    return os.path.islink(link) and (not os.path.exists(link) or os.readlink(link) == terminal)


def _readiness(fd: int) -> int:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return sum(events for _, events in poll.poll(0))
