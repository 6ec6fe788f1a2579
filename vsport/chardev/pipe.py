"""``pipe``: two FIFOs that somebody made before, PATH.in and PATH.out."""

from __future__ import annotations

import contextlib
import os
import select
import stat
from collections.abc import Mapping
from typing import ClassVar

from vsport.chardev.base import COMMON_OPTIONS, Chardev, Ends, LogFile, open_file
from vsport.chardev.inotify import OpenWatch
from vsport.document import DocumentError, Fields
from vsport.errors import HostError
from vsport.option_table import Option, text
from vsport.parcel import Delivery

__all__ = ["Pipe"]

_REST_SECONDS = 0.1
"""How long nobody holds the writing end after a session: long enough that a reader who stayed sees end of file."""
_RETRY_SECONDS = 1.0


class Pipe(Chardev):
    """``--chardev pipe,path=PATH``: the guest's bytes go to PATH.out, and bytes from PATH.in go to the guest.

    Without these two, PATH itself is the FIFO, for the guest's bytes only: QEMU also reads from it, and so gets back
    what it wrote.

    Connected while somebody reads PATH.out. Who writes to PATH.in may come and go (``echo >PATH.in``): its reading end
    is held with a writing end of our own, so it never is at its end.
    """

    kind = "pipe"
    summary = "a pair of FIFOs, PATH.in and PATH.out"
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "path": Option(text, None, "the FIFOs' path, without .in and .out", required=True),
        **COMMON_OPTIONS,
    }
    eof_ends_session = False
    KEPT: ClassVar[Mapping[str, int]] = {"input": os.O_RDWR, "output": os.O_WRONLY}
    """The writing end of PATH.out is kept while there is no session."""
    PASSING = os.O_WRONLY

    def __init__(self, id: str, *, path: str, log: LogFile | None = None) -> None:
        super().__init__(id, log=log)
        self.path = path
        self._out_path = ""
        self._opens: OpenWatch | None = None

    def claims(self) -> list[str]:
        return [*super().claims(), os.path.abspath(self.path)]

    def _start(self) -> None:
        in_path, self._out_path = self._find()
        if in_path is not None:
            self._keep("input", open_file(in_path, os.O_RDWR, "FIFO"))
        self._offer()

    def _find(self) -> tuple[str | None, str]:
        in_path, out_path = f"{self.path}.in", f"{self.path}.out"
        if _is_fifo(in_path) and _is_fifo(out_path):
            return in_path, out_path
        if _is_fifo(self.path):
            return None, self.path
        raise HostError(f"no FIFOs there; make them: mkfifo {in_path} {out_path}")

    def _offer(self) -> None:
        """Holds the writing end: whoever opens the FIFO to read is not kept waiting, and its coming shows.

        Only with a reader the writing end opens at once, so there is one for that moment.
        """
        if not _is_fifo(self._out_path):
            raise HostError(f"{self._out_path} is no FIFO any more")
        reader = open_file(self._out_path, os.O_RDWR, "FIFO")
        try:
            self._keep("output", open_file(self._out_path, os.O_WRONLY, "FIFO"))
        finally:
            os.close(reader)
        self._opens = OpenWatch(self.loop, self._out_path, self._look)
        self._look()

    def _look(self) -> None:
        if self._opens is not None and _has_reader(self._held("output")):
            self._stop_looking()
            self._connected(self._kept.pop("output"))

    def _ends(self) -> Ends:
        return self._held("input"), self._passing

    def _wipe(self) -> None:
        """Drops what was written to PATH.in for the session that is over."""
        if self.read_fd < 0:
            return
        with contextlib.suppress(BlockingIOError):
            for _ in range(16):  # a pipe holds at most 1 MiB, unless its writer goes on meanwhile
                os.read(self.read_fd, 1 << 16)

    def _rearm(self) -> None:
        self._later(_REST_SECONDS, self._offer_again)

    def _offer_again(self) -> None:
        try:
            self._offer()
        except HostError:  # the FIFO was removed: perhaps it comes back
            self._later(_RETRY_SECONDS, self._offer_again)

    def _stop_looking(self) -> None:
        if self._opens is not None:
            self._opens.close()
            self._opens = None

    def _stop(self) -> None:
        self._stop_looking()

    def _take(self, state: Fields, delivery: Delivery) -> None:
        for fd in {*self._kept.values(), self._passing} - {-1}:
            if not stat.S_ISFIFO(os.fstat(fd).st_mode):
                raise DocumentError(f"{state.where}: a descriptor is no FIFO's")
        if self.connected and self._held("output") >= 0:
            raise DocumentError(f"{state.where}: output is kept only while there is no session")
        self._out_path = self.path if self._held("input") < 0 else f"{self.path}.out"

    def _resume(self) -> None:
        if self._held("output") < 0:  # it was about to be opened again
            self._rearm()
        else:
            self._opens = OpenWatch(self.loop, self._out_path, self._look)
            self._later(0, self._look)  # somebody may have come when nobody looked


def _is_fifo(path: str) -> bool:
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except OSError:
        return False


def _has_reader(output: int) -> bool:
    poll = select.poll()
    poll.register(output, 0)
    return not poll.poll(0)
