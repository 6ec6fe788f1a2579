"""``stdio``: the daemon's own standard input and output."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import stat
import termios
from collections.abc import Mapping
from typing import Any, ClassVar

from vsport.chardev.base import COMMON_OPTIONS, AlwaysConnected, LogFile
from vsport.errors import HostError
from vsport.option_table import Option, on_off

__all__ = ["Stdio"]

_STDIN, _STDOUT = 0, 1
_CC = 6  # of the list that tcgetattr() returns, as are the numbers in _make_raw()


class Stdio(AlwaysConnected):
    """``--chardev stdio[,signal=on|off]``: what is typed goes to the guest; with ``signal=off`` Ctrl-C does, too.

    Connected while somebody can read standard output. The end of standard input (``</dev/null``, ``echo ... |``) ends
    the input only: what the guest says is still shown.
    """

    kind = "stdio"
    summary = "standard input and output, for one chardev"
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "signal": Option(on_off, True, "Ctrl-C acts on this program, instead of being sent to the guest"),
        **COMMON_OPTIONS,
    }
    eof_ends_session = False
    _holder: ClassVar[Stdio | None] = None

    def __init__(self, id: str, *, signal: bool = True, log: LogFile | None = None) -> None:
        super().__init__(id, log=log)
        self.signal = signal
        self._input = self._output = -1
        self._made_nonblocking: list[int] = []
        self._modes: list[Any] | None = None

    def _start(self) -> None:
        if Stdio._holder is not self:
            self._take()
        if not _is_read(self._output):
            raise HostError("nobody reads standard output")
        self._connected(self._input, self._output)

    def _take(self) -> None:
        if Stdio._holder is not None:
            raise HostError(f"standard input and output are used by chardev {Stdio._holder.id}")
        Stdio._holder = self
        if not _allows(_STDOUT, os.O_WRONLY):
            raise HostError("standard output is not open for writing")
        self._output = self._keep(self._private(_STDOUT, os.O_WRONLY))
        if _allows(_STDIN, os.O_RDONLY):  # nohup gives a standard input that cannot be read
            self._input = self._keep(self._private(_STDIN, os.O_RDONLY))
            self._make_raw()

    def _private(self, fd: int, mode: int) -> int:
        """A descriptor of our own for the same file that does not block.

        O_NONBLOCK belongs to the open file, and that is shared with the shell and with our own standard error. So a
        terminal or a pipe is opened anew; only what cannot be (a socket) gets the flag, until close().
        """
        what = os.fstat(fd).st_mode
        if stat.S_ISCHR(what) or stat.S_ISFIFO(what):
            with contextlib.suppress(OSError):
                flags = mode | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
                return os.open(f"/proc/self/fd/{fd}", flags)
        if not stat.S_ISREG(what) and os.get_blocking(fd):
            os.set_blocking(fd, False)
            self._made_nonblocking.append(fd)
        return os.dup(fd)

    def _make_raw(self) -> None:
        """Lets the guest's terminal do what a terminal does: echo, line editing, CR and LF."""
        if not os.isatty(_STDIN):
            return
        self._modes = termios.tcgetattr(_STDIN)
        raw = [*self._modes[:_CC], list(self._modes[_CC])]
        raw[0] &= ~(
            termios.IGNBRK
            | termios.BRKINT
            | termios.PARMRK
            | termios.ISTRIP
            | termios.INLCR
            | termios.IGNCR
            | termios.ICRNL
            | termios.IXON
        )
        raw[2] = raw[2] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
        raw[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN)
        if not self.signal:
            raw[3] &= ~termios.ISIG
        raw[_CC][termios.VMIN], raw[_CC][termios.VTIME] = 1, 0
        termios.tcsetattr(_STDIN, termios.TCSANOW, raw)

    def _rearm(self) -> None:
        if _is_read(self._output):  # otherwise it is over: no other reader can come
            super()._rearm()

    def _stop(self) -> None:
        if Stdio._holder is not self:
            return
        Stdio._holder = None
        self._input = self._output = -1
        for fd in self._made_nonblocking:
            os.set_blocking(fd, True)
        self._made_nonblocking.clear()
        if self._modes is not None:
            with contextlib.suppress(termios.error):  # the terminal is gone
                termios.tcsetattr(_STDIN, termios.TCSADRAIN, self._modes)
            self._modes = None


def _allows(fd: int, mode: int) -> bool:
    """Whether ``fd`` is open in this mode or for both directions."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE in (mode, os.O_RDWR)
    except OSError:
        return False


def _is_read(output: int) -> bool:
    poll = select.poll()
    poll.register(output, 0)
    return not poll.poll(0)
