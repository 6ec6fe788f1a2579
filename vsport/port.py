"""A port: its two rings, its connection, and what a back end has to be.

The port decides nothing by itself: ``feed`` looks a cause up in the connection table and carries out what stands there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

from vsport._ring import DeviceQueue
from vsport.connection import TABLE, Cause, Effect, Refused, State
from vsport.constants import Event
from vsport.control import Message
from vsport.errors import FrontEndError, GuestError, UsageError

__all__ = ["BackEnd", "Counters", "Links", "Port", "PortConfig", "Unattached"]

_NAME_BYTES_MAX = 1024
"""A name travels in one control message, and a guest's control buffer is a page (R-GUEST-19)."""
_BAD_IN_NAME = re.compile(r"[/\x00-\x1f\x7f]")


class BackEnd(Protocol):
    """What a port drives: any object with these, not only a character device."""

    def tx_ready(self) -> None:
        """The transmit ring may have chains, or may be taken from again: look."""

    def rx_ready(self) -> None:
        """The receive ring may have buffers: look."""

    def guest_connected(self, connected: bool, cause: Cause) -> None:
        """The guest's end has opened or closed, and why."""

    def emergency_write(self, byte: int) -> None:
        """One byte from a guest that can do no better (emerg_wr, R-CON-07)."""


class Unattached:
    """The back end of a port that has none: its host never connects, so what the guest sends is dropped."""

    def tx_ready(self) -> None: ...
    def rx_ready(self) -> None: ...
    def guest_connected(self, connected: bool, cause: Cause) -> None: ...
    def emergency_write(self, byte: int) -> None: ...


class Links(Protocol):
    """What a port needs of its device."""

    def tell(self, message: Message) -> None:
        """Sends a control message to the guest, now or when it has a buffer for it."""

    def call(self, index: int) -> None:
        """Interrupts the guest for queue ``index``, which has no call descriptor."""

    def backlog(self, index: int) -> None:
        """There is more to do on queue ``index`` than fits into one turn: comes back as a kick."""

    def waiting(self, port: int) -> bool:
        """Whether the guest has yet to take a message that was sent to it about port number ``port``."""

    def fault(self, index: int, error: GuestError | FrontEndError) -> None:
        """Queue ``index`` has stopped because a peer broke a rule."""

    def transition(self, port: Port, cause: Cause, before: State) -> None:
        """The port's state is another one now."""


@dataclass(frozen=True, slots=True)
class PortConfig:
    """What a user says about a port. Raises UsageError (R-CON-52) for a name that udev could not make a link of."""

    id: int
    name: str = ""
    console: bool = False
    cols: int = 80
    rows: int = 25
    rows_first: bool = False
    """Sizes are said as Linux before 6.15 reads them, which no device can find out (R-CON-26)."""

    def __post_init__(self) -> None:
        if _BAD_IN_NAME.search(self.name) or self.name in {".", ".."}:
            raise UsageError(f"port name {self.name!r}: no '/' and no control characters: udev makes a file of it")
        if len(self.name.encode(errors="surrogateescape")) > _NAME_BYTES_MAX:
            raise UsageError(f"port name {self.name[:20]!r}...: longer than {_NAME_BYTES_MAX} bytes")
        for word, value in (("cols", self.cols), ("rows", self.rows)):
            if not 0 <= value <= 0xFFFF:
                raise UsageError(f"port {self.id}: {word}={value} is not in 0 to 65535")


@dataclass(slots=True)
class Counters:
    """What happened to a port since it was added."""

    guest_opens: int = 0
    host_connects: int = 0
    bytes_discarded: int = 0
    """Bytes of the guest that no host took."""
    host_bytes_dropped: int = 0
    """Bytes of a host that left before the guest opened the port."""
    refused: int = 0
    """Messages of the guest that broke a rule and were dropped."""


@dataclass(slots=True)
class Port:
    """One port of a device."""

    config: PortConfig
    rx: DeviceQueue
    tx: DeviceQueue
    links: Links
    back_end: BackEnd = field(default_factory=Unattached)
    state: State = State.B_UNREADY
    added: bool = False
    """Whether the driver has been told of the port (PORT_ADD) since the last reset."""
    stale: bool = False
    """Whether the transmit ring has what was meant for a host that left while the ring stood still."""
    counters: Counters = field(default_factory=Counters)

    @property
    def id(self) -> int:
        return self.config.id

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def console(self) -> bool:
        return self.config.console

    @property
    def untold(self) -> bool:
        """Whether the guest has not heard yet of everything that happened to the port, e.g. because it is paused."""
        return self.links.waiting(self.id)

    # -- connection ------------------------------------------------------------------------------------------------

    def feed(self, cause: Cause) -> None:
        """Something happened: moves the port as the table says. Raises GuestError if the table refuses it."""
        row = TABLE[self.state, cause]
        if isinstance(row, Refused):
            self.counters.refused += 1
            raise GuestError(row.rule, row.what, port=self.id)
        before, self.state = self.state, row.state
        self._count(before)
        if before is not row.state:
            self.links.transition(self, cause, before)
        for effect in row.effects:
            self._carry_out(effect, cause)

    def _count(self, before: State) -> None:
        self.counters.guest_opens += self.state.guest_connected and not before.guest_connected
        self.counters.host_connects += self.state.host_connected and not before.host_connected

    def _carry_out(self, effect: Effect, cause: Cause) -> None:
        match effect:
            case Effect.ANNOUNCE:
                self._announce()
            case Effect.TELL_GUEST_OPEN:
                self.links.tell(Message(self.id, Event.PORT_OPEN, 1))
            case Effect.TELL_GUEST_CLOSED:
                self.links.tell(Message(self.id, Event.PORT_OPEN, 0))
            case Effect.TELL_BACK_END_OPEN:
                self.back_end.guest_connected(True, cause)
            case Effect.TELL_BACK_END_CLOSED:
                self.back_end.guest_connected(False, cause)
            case Effect.RETURN_CHAINS:
                self.stale = True
                self.discard()
            case Effect.FLOW:
                self.tx_ready()
                self.back_end.rx_ready()

    def resize(self, cols: int, rows: int) -> None:
        """The terminal behind a console port has another size (R-CON-25). Raises UsageError if it is out of range."""
        self.config = replace(self.config, cols=cols, rows=rows)
        if self.state.device_ready:
            self._tell_size()

    def _tell_size(self) -> None:
        config = self.config
        self.links.tell(Message.resize(self.id, config.cols, config.rows, rows_first=config.rows_first))

    def _announce(self) -> None:
        """What the port is, in the order that QEMU's guests are used to (R-CON-31)."""
        if self.console:
            self.links.tell(Message(self.id, Event.CONSOLE_PORT, 1))
            self._tell_size()
        if self.name:
            self.links.tell(Message.name(self.id, self.name))

    # -- rings -----------------------------------------------------------------------------------------------------

    def tx_ready(self) -> None:
        """The guest may have sent something: it goes to the host, or nowhere if there is none.

        A driver that has not called the port ready has sent nothing yet: what is there is from before an unplugging.
        """
        if self.state.host_connected and self.state.device_ready and not self.stale:
            self.back_end.tx_ready()
        else:
            self.discard()

    def discard(self) -> None:
        """Returns what the guest has sent, a half-consumed chain too, and counts the bytes (R-CON-44, R-CON-48).

        A ring that stands still, as in a pause, keeps it until it runs.
        """
        with self.blaming(self.tx):
            self.counters.bytes_discarded += self.tx.discard()
            self.notify(self.tx)
            more = self.tx.kicks_on()
            self.stale = self.stale and (more or not self.tx.running)
            if more:
                self.links.backlog(self.tx.index)

    def notify(self, queue: DeviceQueue) -> None:
        """Interrupts the guest for what was completed on ``queue``, if it wants that."""
        if queue.notify():
            self.links.call(queue.index)

    @contextmanager
    def blaming(self, queue: DeviceQueue) -> Iterator[None]:
        """Work on ``queue``: if the guest or the front end broke it, that is reported, and the rest goes on."""
        try:
            yield
        except (GuestError, FrontEndError) as exc:
            self.links.fault(queue.index, exc)
