"""Between a port's rings and its chardev: says whether bytes may move; how and when they do is _poll's business.

Each direction is a flow. It stands still on its own when one side has nothing, or no room, and goes on when a kick or
the descriptor says that this has changed. A slow host therefore stops its own port's transmit ring and nothing else,
and a guest without receive buffers leaves the host's bytes in the transport.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import termios
import time
from collections.abc import Callable

from vsport._ring import Status
from vsport.chardev.base import Chardev
from vsport.connection import Cause
from vsport.document import DocumentError
from vsport.loop import HUP, RDHUP, READ, Loop, Timer
from vsport.port import Away, BackEnd, Port, Whose

__all__ = ["SETTLE_SECONDS", "PortPump"]

SETTLE_SECONDS = 0.02
"""How long a host stays away at least, as the guest sees it.

Linux wakes a program that sleeps in read() when it hears PORT_OPEN 0, and the program looks at the port when it gets to
run. A PORT_OPEN 1 that overtakes it would hide the close, and with it the end of the session.
"""

_SCRATCH_BYTES = 65536
"""How much of what nobody hears is read in one turn."""


class PortPump(BackEnd):
    """The back end of a port, and the owner of its chardev (chardev.base.ChardevOwner)."""

    def __init__(self, loop: Loop, port: Port, chardev: Chardev) -> None:
        self.loop = loop
        self.port = port
        self.chardev = chardev
        self._guest_open = False
        """What this back end has been told of the guest. It is not looked up in the port: nobody told it so."""
        self._output = loop.drain(port.tx, self._output_has_news)
        self._input = loop.fill(port.rx, self._input_has_news)
        self._watched: dict[int, int] = {}
        self._host_is_deaf = False
        self._input_ended = False
        self._last_words_wait = False
        self._turns: set[int] = set()
        self._left_at = -SETTLE_SECONDS
        self._leave_untold = False
        """Whether the guest has yet to hear that a host left, e.g. because it is paused."""
        self._knocking = False
        """Whether the next host waits for that."""
        self._settling: Timer | None = None

    def open(self) -> None:
        """Opens the chardev; raises HostError."""
        self.chardev.open(self.loop, self)

    def close(self) -> None:
        """Lets go of the chardev, for good. What its host said and nobody read is lost with it, and counted."""
        self._drop_unread()
        self._forget_peer()
        self._output.close()
        self._input.close()
        self.chardev.close()

    # -- what the chardev says ---------------------------------------------------------------------------------------

    def host_connected(self) -> None:
        """A peer has come. The guest hears of it, but not before it could see that the one before has gone.

        A guest that is paused sees nothing: its time begins when it takes what it is told (R-CON-36).
        """
        if self._leave_untold:
            self._knocking = True
            return
        patience = self._left_at + SETTLE_SECONDS - time.monotonic()
        if patience > 0:
            self._settling = self.loop.call_later(patience, self.host_connected)
        else:
            self._settled()

    def _settled(self) -> None:
        self._settling = None
        self.port.feed(Cause.HOST_CONNECT)
        self._watch()

    def host_disconnected(self) -> None:
        """The peer has gone; its descriptors are closed already."""
        self._forget_peer()
        self._left_at = time.monotonic()
        self.port.feed(Cause.HOST_DISCONNECT)
        self._leave_untold = self.port.untold

    def _forget_peer(self) -> None:
        self._knocking = False
        if self._settling is not None:
            self._settling.cancel()
            self._settling = None
        for fd in self._watched:
            self.loop.unwatch(fd)
        self._watched.clear()
        self.halt()
        self._host_is_deaf = self._input_ended = self._last_words_wait = False

    def _end_session(self, why: str) -> None:
        self.port.links.log.info("port %d: host %s: %s", self.port.id, self.chardev.describe(), why)
        self._drop_unread()
        self._forget_peer()
        self.chardev.disconnect()

    def _drop_unread(self) -> None:
        """The session's input ends here, unless it is no part of the session (a file), and stays."""
        if self.chardev.read_fd >= 0 and self.chardev.eof_ends_session:
            self.port.drop(self._unread(), Whose.HOST)

    # -- what the port says (port.BackEnd) -----------------------------------------------------------------------------

    def tx_ready(self) -> None:
        """The guest has sent something. A host that is full is not asked again until it has room."""
        if self._host_is_deaf:
            self.port.give_up()
        elif not self._output.waiting:
            self._drain()

    def rx_ready(self) -> None:
        """The guest has given buffers, or may have."""
        self._input.wake()
        self._watch()

    def guest_told(self) -> None:
        """The guest has heard of everything; if that a host left was part of it, its time to see it begins now."""
        if not self._leave_untold:
            return
        self._leave_untold = False
        self._left_at = time.monotonic()
        if self._knocking:
            self._knocking = False
            self.host_connected()

    def halt(self) -> None:
        """The port is no more: what is in its rings is for nobody."""
        self._output.stop()
        self._input.stop()

    def guest_connected(self, connected: bool, cause: Cause) -> None:
        """The guest's end opened or closed: bytes of the host are read, or left in the transport."""
        self._guest_open = connected
        if self._host_is_deaf and not connected:
            self._end_session("takes no more, and nobody is left to hear it")
        else:
            self._watch()

    def emergency_write(self, byte: int) -> None:
        """Best effort, as the name says: one byte to the host, if there is one."""
        if not self.port.state.host_connected:
            return
        try:
            if self.chardev.write_fd >= 0:
                os.write(self.chardev.write_fd, bytes([byte]))
            else:
                self.chardev.write(memoryview(bytes([byte])))
        except OSError as exc:
            self.port.links.log.info("port %d: emergency byte lost: %s", self.port.id, exc)

    def announce_host(self, port: Port) -> None:
        """The guest was moved, and hears now that its host of before is gone: ours is another session."""
        self._forget_peer()
        self._left_at = time.monotonic()
        self._leave_untold = self.port.untold
        self.host_connected()

    def save(self) -> bytes:
        return bytes([self._guest_open]) + self.chardev.save()

    def check(self, state: bytes) -> None:
        if state[:1] not in {b"", b"\0", b"\1"}:
            raise DocumentError("the back end's state begins neither with 0 nor with 1")
        self.chardev.check(state[1:])

    def load(self, state: bytes) -> None:
        """A state that is empty comes from a device whose back ends save nothing, such as QEMU's."""
        self._guest_open = state[:1] == b"\1"
        self.chardev.load(state[1:])

    # -- guest to host -------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        chardev = self.chardev
        if chardev.write_fd < 0:
            self._settle_output(self._offer)
            return
        if not self._output.moves:
            self._output.start(chardev.write_fd, chardev.log_fd, tells_blocked=self.port.console)
        self._settle_output(self._output.run)

    def _output_has_news(self) -> None:
        self._settle_output(self._output.result)

    def _settle_output(self, turn: Callable[[], Status]) -> None:
        with self.port.blaming(self.port.tx):
            try:
                status = turn()
            except OSError as exc:
                self.port.notify(self.port.tx)
                self._output_failed(exc)
                return
            self.port.notify(self.port.tx)
            self._drained(status)

    def _output_failed(self, error: OSError) -> None:
        """The host takes no more. What it said before is still the guest's; the session ends when that is read."""
        if not self._reading():
            self._end_session(error.strerror or str(error))
            return
        self._host_is_deaf = True
        self._output.stop()
        self.port.give_up()
        self._watch()

    def _reading(self) -> bool:
        """Whether bytes of the host are for a guest that is there."""
        return self.chardev.read_fd >= 0 and self._guest_open and not self._input_ended

    def _offer(self) -> Status:
        """A turn of a chardev without descriptor: with kicks off, and then one more look (R-RING-18)."""
        tx = self.port.tx
        tx.kicks_off()
        status = tx.drain_into(self.chardev.write)
        if status is Status.EMPTY and tx.kicks_on():
            status = Status.MORE
        if status is Status.MORE:
            self.port.links.backlog(tx.index)
        return status

    def _drained(self, status: Status) -> None:
        if status is Status.BLOCKED and self.port.console:
            self.port.discard()  # the sender spins with a lock held until its bytes are taken (R-CON-45)

    # -- host to guest -------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        self._settle_input(self._input.run)

    def _input_has_news(self) -> None:
        self._settle_input(self._input.result)

    def _settle_input(self, turn: Callable[[], Status]) -> None:
        with self.port.blaming(self.port.rx):
            try:
                status = turn()
            except OSError as exc:
                self.port.notify(self.port.rx)
                self._end_session(exc.strerror or str(exc))
                return
            self.port.notify(self.port.rx)
            if status is Status.EOF:
                self._input_over()

    def _input_over(self) -> None:
        if self.chardev.eof_ends_session or self._host_is_deaf:
            self._end_session("left")
        else:
            self._input_ended = True
            self._watch()

    # -- what the loop is asked for ----------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Brings what the loop watches, and whether the input flows, in line with how things stand."""
        if not self.port.state.host_connected:
            return
        wanted = self._wanted()
        for fd in self._watched.keys() - wanted.keys():
            self.loop.ignore(fd)
            del self._watched[fd]
        for fd, events in wanted.items():
            if self._watched.get(fd) != events:
                self._watched[fd] = events
                self._watch_fd(fd, events)
        if not self._reading():
            self._input.stop()
        elif not self._input.moves:
            self._input.start(self.chardev.read_fd)

    def _wanted(self) -> dict[int, int]:
        """Events by descriptor. A guest that does not read is no reason to miss that the host leaves: RDHUP is on.

        But once the host has left last words for which the guest has no buffers, the hang-up, which epoll cannot be
        asked to keep to itself, is left alone by not watching at all. And where the end of the input does not end the
        session, it is not looked for before there is a guest to read it.
        """
        wanted: dict[int, int] = {}
        read_fd, write_fd = self.chardev.read_fd, self.chardev.write_fd
        if write_fd >= 0 and write_fd != read_fd:
            wanted[write_fd] = 0
        if read_fd >= 0 and (events := self._wanted_of_input()):
            wanted[read_fd] = wanted.get(read_fd, 0) | events
        return wanted

    def _wanted_of_input(self) -> int:
        reading = self._reading()
        if self._throwing_away():
            return READ | RDHUP
        waiting = self._last_words_wait if reading else self._input_ended
        return RDHUP if self.chardev.eof_ends_session and not waiting else 0

    def _watch_fd(self, fd: int, events: int) -> None:
        try:
            self.loop.watch(fd, events, lambda ready: self._on_ready(fd, ready))
        except PermissionError:  # a regular file: always ready, so epoll does not wait for it
            self._give_turn(fd)

    def _give_turn(self, fd: int) -> None:
        """A descriptor that is always ready has its turn in each round, once, however often it is asked for."""
        if fd not in self._turns:
            self._turns.add(fd)
            self.loop.call_soon(lambda: self._take_turn(fd))

    def _take_turn(self, fd: int) -> None:
        self._turns.remove(fd)
        self._on_ready(fd, self._watched.get(fd, 0) & READ)
        if self._watched.get(fd, 0) & READ:
            self._give_turn(fd)

    def _on_ready(self, fd: int, ready: int) -> None:
        hung_up = fd == self.chardev.write_fd and bool(ready & HUP)
        if hung_up and not self._host_is_deaf:
            self._drain()
        if hung_up and fd != self.chardev.read_fd:
            self._end_session("left")
        elif fd == self.chardev.read_fd and ready & (READ | RDHUP | HUP):
            self._on_input(ready)

    def _throwing_away(self) -> bool:
        """Whether what the host says while no program in the guest listens is read, and dropped (away=discard)."""
        guest_away = not self._guest_open and not self._input_ended
        return guest_away and self.port.manners.away is Away.DISCARD and self.port.state.device_ready

    def _throw_away(self) -> None:
        try:
            data = os.read(self.chardev.read_fd, _SCRATCH_BYTES)
        except BlockingIOError:
            return
        except OSError as exc:
            self._end_session(exc.strerror or str(exc))
            return
        self.port.drop(len(data), Whose.HOST)
        if not data:
            self._input_over()

    def _on_input(self, ready: int) -> None:
        if self._reading() and self._input.moves and not self._input.waiting:
            self._fill()
        elif self._throwing_away():
            self._throw_away()
        elif not ready & (RDHUP | HUP):
            return
        elif self._reading() and self._unread():
            self._last_words_wait = True
            self._watch()
        else:
            self._end_session("left")

    def _unread(self) -> int:
        """How many bytes of the host are in the transport."""
        unread = array.array("i", [0])
        with contextlib.suppress(OSError):
            fcntl.ioctl(self.chardev.read_fd, termios.FIONREAD, unread)
        return unread[0]
