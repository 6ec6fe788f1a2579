"""Couple a port and two descriptors, for instance standard input and output, for one session with the host.

At most some 64 KiB are held in each direction, and no more is read before they are gone: a slow reader on one side
slows the writer on the other side down, and nothing grows. The loop sleeps in poll, also while the host is away: it
waits for the port's edges (R-GUEST-12).
"""

from __future__ import annotations

import enum
import os
import select
import stat
from dataclasses import dataclass

from guest_tools.channel import MAX_WRITE, ZERO_WRITE_PAUSE, Channel
from guest_tools.errors import PortUnplugged
from guest_tools.host_changes import HostWatch

__all__ = ["Bridge", "Ending", "Outcome"]

BATCH = 64 * 1024  # What a pipe holds.


class Ending(enum.Enum):
    """Why a session ended."""

    HOST_LEFT = "host left"
    INPUT_ENDED = "input ended"
    OUTPUT_CLOSED = "output closed"


@dataclass(frozen=True)
class Outcome:
    """How a session ended: bytes queued for the host, bytes handed to the output, input bytes that were lost."""

    ending: Ending
    sent: int
    received: int
    unsent: int


class Bridge:
    """One session. ``run`` returns when it is over; raises PortUnplugged, PortStuck, OSError of the descriptors.

    The end of the input ends nothing by itself, since the host's answer may be on its way; with
    ``close_on_eof`` the session ends then, once all the input is queued and what had arrived is handed over.
    When the host leaves, everything that it sent before is handed over first. With ``watch`` a leave of the
    host is noticed even if it is back at once, so that two sessions do not run into each other.

    The descriptors stay open, and blocking if they are: other processes often share them. A terminal that is
    stopped (Ctrl-S) can therefore stop both directions.
    """

    def __init__(
        self,
        channel: Channel,
        in_fd: int,
        out_fd: int,
        *,
        close_on_eof: bool = False,
        watch: HostWatch | None = None,
    ) -> None:
        self._channel = channel
        self._in_fd = in_fd
        self._out_fd = out_fd
        self._close_on_eof = close_on_eof
        self._watch = watch
        self._piece = _write_size(out_fd)
        self._to_host = memoryview(b"")
        self._to_out = memoryview(b"")
        self._input_ended = self._host_left = self._output_closed = False
        self._port_readable = self._port_writable = True  # Until the port says otherwise.
        self._sent = self._received = 0

    def run(self) -> Outcome:
        pipe = _open_pipe_again(self._out_fd)
        if pipe is None:
            return self._run()
        self._out_fd, self._piece = pipe, BATCH
        try:
            return self._run()
        finally:
            os.close(pipe)

    def _run(self) -> Outcome:
        ending = self._ending()
        try:
            while ending is None:
                self._step(self._wait())
                ending = self._ending()
        except PortUnplugged:
            self._hand_over_rest()
            raise
        return Outcome(ending, self._sent, self._received, len(self._to_host))

    def _ending(self) -> Ending | None:
        if self._output_closed:
            return Ending.OUTPUT_CLOSED
        if self._to_out:
            return None
        if self._host_left:
            return Ending.HOST_LEFT
        finished = self._close_on_eof and self._input_ended and not self._to_host
        return Ending.INPUT_ENDED if finished and not self._port_readable else None

    def _wait(self) -> dict[int, int]:
        """Sleep until something can be done; the descriptors that poll names, with their events."""
        edges = self._channel.edges.fileno()
        poller = select.poll()
        for fd, events in self._interests().items():
            poller.register(fd, events)
        poller.register(edges, select.POLLIN)
        pause = None if self._can_go_on else self._pause()
        ready = dict(poller.poll(0 if self._can_go_on else pause and pause * 1000))
        if edges in ready or (pause and not ready):
            self._channel.wait(0)  # Takes the edge.
            self._port_readable = self._port_writable = True
        return ready

    def _interests(self) -> dict[int, int]:
        wanted = dict.fromkeys((self._in_fd, self._out_fd), 0)  # They can be one and the same.
        if self._wants_input:
            wanted[self._in_fd] |= select.POLLIN
        if self._to_out:
            wanted[self._out_fd] |= select.POLLOUT
        return {fd: events for fd, events in wanted.items() if events}

    @property
    def _wants_input(self) -> bool:
        return not (self._to_host or self._input_ended or self._host_left)

    @property
    def _can_read_port(self) -> bool:
        return self._port_readable and not self._to_out and not self._host_left

    @property
    def _can_write_port(self) -> bool:
        return self._port_writable and bool(self._to_host) and not self._host_left

    @property
    def _can_go_on(self) -> bool:
        return self._can_read_port or self._can_write_port

    def _pause(self) -> float | None:
        """How long to sleep at most, in seconds, when no edge may come although there is something to do."""
        if self._to_host and self._channel.refused:
            return ZERO_WRITE_PAUSE
        return self._watch.patience if self._watch else None

    def _step(self, ready: dict[int, int]) -> None:
        if self._to_out and ready.get(self._out_fd, 0) & ~select.POLLIN:
            self._write_out()
        if self._wants_input and ready.get(self._in_fd, 0) & ~select.POLLOUT:
            self._read_in()
        if self._can_read_port:
            self._read_port()
        if self._can_write_port:
            self._write_port()

    def _read_port(self) -> None:
        """Read until there is nothing more, or enough: one buffer is a page only (R-GUEST-07)."""
        pieces: list[bytes] = []
        data: bytes | None = b""
        try:
            while sum(map(len, pieces)) < BATCH and (data := self._channel.read_now()):
                pieces.append(data)
        finally:
            self._to_out = memoryview(b"".join(pieces))
        if self._watch:
            self._watch.count_buffers(len(pieces))
        if not data:
            self._port_is_empty(ended=data is not None)

    def _port_is_empty(self, *, ended: bool) -> None:
        if self._watch and self._watch.collect() and not ended:
            return  # More may have come with these signals: read first, then judge.
        self._port_readable = False
        changes = self._watch.changes() if self._watch else []
        self._host_left = ended or False in changes

    def _write_port(self) -> None:
        sent = self._channel.write_now(self._to_host)
        self._to_host = self._to_host[sent:]
        self._sent += sent
        self._port_writable = sent > 0

    def _read_in(self) -> None:
        try:
            data = os.read(self._in_fd, MAX_WRITE)
        except BlockingIOError:  # Somebody made it non-blocking and was faster than we.
            return
        self._to_host = memoryview(data)
        self._input_ended = not data

    def _write_out(self) -> None:
        try:
            written = os.write(self._out_fd, self._to_out[: self._piece])
        except BlockingIOError:
            return
        except (BrokenPipeError, ConnectionResetError):
            self._output_closed = True
            return
        self._received += written
        self._to_out = self._to_out[written:]

    def _hand_over_rest(self) -> None:
        while self._to_out and not self._output_closed:
            room = select.poll()
            room.register(self._out_fd, select.POLLOUT)
            room.poll()
            self._write_out()


def _write_size(fd: int) -> int:
    """How much can be written after poll has said that there is room, without waiting in write."""
    return BATCH if stat.S_ISREG(os.fstat(fd).st_mode) else select.PIPE_BUF


def _open_pipe_again(fd: int) -> int | None:
    """The same pipe, non-blocking for us alone: larger pieces can be written then. None if that does not work.

    To make the descriptor itself non-blocking would do the same to every process that shares it.
    """
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        return None
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
