"""``stdio``: the daemon's own standard input and output."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import stat
import struct
import termios
from collections.abc import Mapping
from typing import Any, ClassVar

from vsport.chardev.base import COMMON_OPTIONS, AlwaysConnected, Ends, LogFile
from vsport.document import DocumentError, Fields
from vsport.errors import HostError
from vsport.option_table import Option, on_off
from vsport.parcel import Delivery, Parcel

__all__ = ["Stdio"]

_STDIN, _STDOUT = 0, 1
_CC = 6  # of the list that tcgetattr() returns, as are the numbers in _make_raw()
_MODES = struct.Struct("<6I32B")
"""That list, with the control characters at its end."""


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
    KEPT: ClassVar[Mapping[str, int]] = {"input": os.O_RDONLY, "output": os.O_WRONLY}
    _holder: ClassVar[Stdio | None] = None

    def __init__(self, id: str, *, signal: bool = True, log: LogFile | None = None) -> None:
        super().__init__(id, log=log)
        self.signal = signal
        self._made_nonblocking: list[str] = []
        self._modes: list[Any] | None = None

    def claims(self) -> list[str]:
        return [*super().claims(), "standard input and output"]

    def _start(self) -> None:
        if Stdio._holder is not self:
            self._take_streams()
        if not _is_read(self._held("output")):
            raise HostError("nobody reads standard output")
        self._connected()

    def _ends(self) -> Ends:
        return self._held("input"), self._held("output")

    def _take_streams(self) -> None:
        if Stdio._holder is not None:
            raise HostError(f"standard input and output are used by chardev {Stdio._holder.id}")
        Stdio._holder = self
        if not _allows(_STDOUT, os.O_WRONLY):
            raise HostError("standard output is not open for writing")
        self._keep_private("output", _STDOUT, os.O_WRONLY)
        if _allows(_STDIN, os.O_RDONLY):  # nohup gives a standard input that cannot be read
            self._keep_private("input", _STDIN, os.O_RDONLY)
            self._make_raw()

    def _keep_private(self, name: str, fd: int, mode: int) -> None:
        """Keeps a descriptor of our own for the same file that does not block.

        O_NONBLOCK belongs to the open file, and that is shared with the shell and with our own standard error. So a
        terminal or a pipe is opened anew; only what cannot be (a socket) gets the flag, until close().
        """
        what = os.fstat(fd).st_mode
        if stat.S_ISCHR(what) or stat.S_ISFIFO(what):
            with contextlib.suppress(OSError):
                flags = mode | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
                self._keep(name, os.open(f"/proc/self/fd/{fd}", flags))
                return
        own = self._keep(name, os.dup(fd))
        if not stat.S_ISREG(what) and os.get_blocking(own):
            os.set_blocking(own, False)
            self._made_nonblocking.append(name)

    def _make_raw(self) -> None:
        """Lets the guest's terminal do what a terminal does: echo, line editing, CR and LF."""
        terminal = self._held("input")
        if not os.isatty(terminal):
            return
        self._modes = termios.tcgetattr(terminal)
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
        termios.tcsetattr(terminal, termios.TCSANOW, raw)

    def _rearm(self) -> None:
        if _is_read(self._held("output")):  # otherwise it is over: no other reader can come
            super()._rearm()

    def _put_back(self) -> None:
        for name in self._made_nonblocking:
            os.set_blocking(self._held(name), True)
        if self._modes is not None:
            with contextlib.suppress(termios.error):  # the terminal is gone
                termios.tcsetattr(self._held("input"), termios.TCSADRAIN, self._modes)

    def _stop(self) -> None:
        self._made_nonblocking.clear()
        self._modes = None
        if Stdio._holder is self:
            Stdio._holder = None

    # What has to be put back goes along: the last one who has the streams does it.

    def _give(self, parcel: Parcel) -> dict[str, Any]:
        return {"blocking": list(self._made_nonblocking), "modes": _encode_modes(self._modes).hex()}

    def _take(self, state: Fields, delivery: Delivery) -> None:
        if self._held("output") < 0:
            raise DocumentError(f"{state.where}: output is missing")
        made_nonblocking = state.each("blocking", len(self.KEPT), self._read_name)
        modes = _decode_modes(state, "modes")
        if modes is not None and not os.isatty(self._held("input")):
            raise DocumentError(f"{state.where}: modes are there, and no terminal that they belong to")
        self._made_nonblocking, self._modes = list(made_nonblocking), modes
        Stdio._holder = self

    def _read_name(self, where: str, value: object) -> str:
        if not isinstance(value, str) or self._held(value) < 0:
            raise DocumentError(f"{where}: there is no such descriptor")
        return value


def _encode_modes(modes: list[Any] | None) -> bytes:
    return (
        b"" if modes is None else _MODES.pack(*modes[:_CC], *(c if isinstance(c, int) else ord(c) for c in modes[_CC]))
    )


def _decode_modes(state: Fields, name: str) -> list[Any] | None:
    data = state.bytes(name)
    if not data:
        return None
    if len(data) != _MODES.size:
        raise DocumentError(f"{state.where}: {name} are not a terminal's")
    values = _MODES.unpack(data)
    return [*values[:_CC], [bytes([value]) for value in values[_CC:]]]


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
