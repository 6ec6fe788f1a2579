"""A port: its two rings, its connection, and what a back end has to be.

The port decides nothing by itself: ``feed`` looks a cause up in the connection table and carries out what stands there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Protocol

from vsport._ring import DeviceQueue
from vsport.connection import LETS_THROUGH, TABLE, Cause, Effect, OnRestore, Policy, Refused, State, Transition
from vsport.constants import Event
from vsport.control import Message
from vsport.document import DocumentError
from vsport.errors import FrontEndError, GuestError, UsageError
from vsport.snapshot import PortConfig, PortState

__all__ = ["Away", "BackEnd", "Counters", "Links", "Log", "Manners", "Port", "PortConfig", "Whose"]

Log = logging.Logger | logging.LoggerAdapter[logging.Logger]
"""Where a device's lines go; an adapter says whose they are."""


class BackEnd:
    """What a port drives: not only a character device, but any object that has these. None of them has to be there.

    It knows of the guest what it is told here, and nothing else: a back end that was made anew after a move and is not
    told that the guest holds the port open is the dead mouse of 2011. A port that has none of its own has this one,
    whose host never connects.

    It says itself when its host comes and goes: ``port.feed(Cause.HOST_CONNECT)`` and ``HOST_DISCONNECT``.
    """

    def tx_ready(self) -> None:
        """The transmit ring may have chains, or may be taken from again: look."""

    def rx_ready(self) -> None:
        """The receive ring may have buffers: look."""

    def guest_connected(self, connected: bool, cause: Cause) -> None:
        """The guest's end is open or closed, and why it is said now: it happened (GUEST_OPEN, GUEST_CLOSE, RESET,
        UNPLUG), or it has been so since before this back end was made (RESTORE, HANDOVER)."""

    def guest_told(self) -> None:
        """The guest has taken all that there was to say about the port, or has forgotten everything (RESET)."""

    def halt(self) -> None:
        """The port is unplugged: nothing of its rings may be touched any more."""

    def emergency_write(self, byte: int) -> None:
        """One byte from a guest that can do no better (emerg_wr, R-CON-07)."""

    def announce_host(self, port: Port) -> None:
        """The guest has been told that the host of before is gone. This back end's host is there: say so."""
        port.feed(Cause.HOST_CONNECT)

    def save(self) -> bytes:
        """What a back end in its place shall know after a move, in words of its own."""
        return b""

    def check(self, state: bytes) -> None:
        """Whether load() can do with ``state``, which comes from a file: raises DocumentError if not."""
        if state:
            raise DocumentError(f"the back end has a state of {len(state)} bytes, and this one takes none")

    def load(self, state: bytes) -> None:
        """Takes over what save() gave before the move, and check() found good."""


class Links(Protocol):
    """What a port needs of its device."""

    log: Log

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
        """The port's state is another one now, or has come from elsewhere (RESTORE, HANDOVER)."""

    def dropped(self, port: Port, count: int, whose: Whose) -> None:
        """``count`` bytes of the guest or of the host reach nobody."""


class Away(Enum):
    """What becomes of bytes for a side that is not there."""

    QEMU = "qemu"
    """As QEMU does it: what the guest sends is dropped, what the host sends waits in its transport (R-CON-44)."""
    DISCARD = "discard"
    """Dropped, both ways."""
    HOLD = "hold"
    """Both wait: the guest's bytes in its ring, until a host comes."""


@dataclass(frozen=True, slots=True)
class Manners:
    """How a port treats its two sides. The host's choice, so no part of what moves with the guest.

    Raises UsageError for a console that shall hold: its guest spins until its bytes are taken (R-CON-45).
    """

    away: Away = Away.QEMU
    restore: Policy = Policy.RECONNECT
    on_restore: OnRestore = OnRestore.AUTO


class Whose(Enum):
    """Whose bytes were dropped."""

    GUEST = "guest"
    HOST = "host"


@dataclass(slots=True)
class Counters:
    """What happened to a port since it was added."""

    guest_opens: int = 0
    host_connects: int = 0
    bytes_discarded: int = 0
    """Bytes of the guest that no host took."""
    host_bytes_dropped: int = 0
    """Bytes of hosts that the guest does not get."""
    refused: int = 0
    """Messages of the guest that broke a rule and were dropped."""


@dataclass(slots=True)
class Port:
    """One port of a device."""

    config: PortConfig
    rx: DeviceQueue
    tx: DeviceQueue
    links: Links
    manners: Manners = field(default_factory=Manners)
    back_end: BackEnd = field(default_factory=BackEnd)
    state: State = State.B_UNREADY
    added: bool = False
    """Whether the driver has been told of the port (PORT_ADD) since the last reset."""
    stale: bool = False
    """Whether the transmit ring has what was meant for a host that left while the ring stood still."""
    session: int = 0
    """How many sessions its hosts have had, on whatever machine: the number of the present one, or of the last."""
    counters: Counters = field(default_factory=Counters)
    _back_end_state: bytes = b""
    """Of the snapshot that the port was restored from."""

    def __post_init__(self) -> None:
        if self.console and self.manners.away is Away.HOLD:
            raise UsageError(f"port {self.id}: away=hold is not for a console: its guest would stand still (R-CON-45)")

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
        if self.state.host_connected and not before.host_connected:
            self.counters.host_connects += 1
            self.session += 1

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
                self._return_chains()
            case Effect.LOAD_BACK_END:
                self.back_end.load(self._back_end_state)
            case Effect.FLOW:
                self.tx_ready()
                self.back_end.rx_ready()

    # -- moving ------------------------------------------------------------------------------------------------------

    def save(self) -> PortState:
        """The port as it is now; nothing changes."""
        self.feed(Cause.SAVE)
        return PortState(
            config=self.config,
            state=self.state,
            added=self.added,
            stale=self.stale,
            session=self.session,
            back_end=self.back_end.save(),
        )

    def check(self, saved: PortState) -> None:
        """Whether restore() can do with ``saved``: raises DocumentError if not."""
        for what in ("name", "console"):
            was, is_ = getattr(saved.config, what), getattr(self.config, what)
            if was != is_:
                raise DocumentError(f"port {self.id}: {what} was {was!r} and is {is_!r} here; give it the same one")
        try:
            self.back_end.check(saved.back_end)
        except DocumentError as exc:
            raise DocumentError(f"port {self.id}: {exc}") from None

    def restore(self, saved: PortState, cause: Cause, *, carried: bool) -> None:
        """The port goes on where ``saved`` ends, which check() has found good; its rings stand still.

        ``cause`` is RESTORE or HANDOVER, and ``carried`` says that the host's session came along. If it did not, or if
        on_restore=reopen wants it so, the guest is told that its host has left, and if there is one here, that it has
        come: no splice.
        """
        here = self.state.host_connected
        before, self.state = self.state, saved.state
        if (self.config.cols, self.config.rows) != (saved.config.cols, saved.config.rows):
            self.config = replace(self.config, cols=saved.config.cols, rows=saved.config.rows)
        self.added, self.stale, self.session = saved.added, saved.stale, saved.session
        self.links.transition(self, cause, before)
        self._back_end_state = saved.back_end
        self._teach_back_end(cause)
        if self.state.host_connected and not (carried and self.manners.on_restore is not OnRestore.REOPEN):
            self._begin_session(here, cause)
        if here and not self.state.host_connected:
            self.back_end.announce_host(self)

    def _teach_back_end(self, cause: Cause) -> None:
        """What RESTORE or HANDOVER brings about, as far as the policy lets it."""
        row = TABLE[self.state, cause]
        assert isinstance(row, Transition)
        allowed = LETS_THROUGH[self.manners.restore if cause is Cause.RESTORE else Policy.RECONNECT]
        for effect in row.effects:
            if effect in allowed:
                self._carry_out(effect, cause)

    def _begin_session(self, here: bool, cause: Cause) -> None:
        """The guest was talking to a host that did not come along; ``here`` says that another one is there already."""
        if here and cause is Cause.RESTORE and self.manners.on_restore is OnRestore.RESUME:
            self.session += 1
        else:
            self.feed(Cause.HOST_DISCONNECT)

    # -- what it is --------------------------------------------------------------------------------------------------

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

    @property
    def holds(self) -> bool:
        """Whether bytes of the guest wait for a host. Those of a driver that is not ready are for nobody."""
        return self.manners.away is Away.HOLD and self.state.device_ready

    def tx_ready(self) -> None:
        """The guest may have sent something: it goes to the host, or nowhere if there is none.

        A driver that has not called the port ready has sent nothing yet: what is there is from before an unplugging.
        """
        if self.stale:
            self._return_chains()
        if self.stale:
            return
        if self.state.host_connected and self.state.device_ready:
            self.back_end.tx_ready()
        elif not self.holds:
            self.discard()

    def _return_chains(self) -> None:
        """What a host has left behind: all of it, or, if the next one shall have it, the chain of which it took half.

        A ring that stands still, as in a pause, keeps it until it runs.
        """
        self.give_up()
        if self.holds:
            self.stale = self.stale and not self.tx.running

    def give_up(self) -> None:
        """The host takes no more, or has gone: what it was to have is dropped, or waits for the next one (away=hold).

        The rest of a half-consumed chain is always dropped: no other host could make sense of it.
        """
        if self.holds:
            with self.blaming(self.tx):
                self.drop(self.tx.return_partial(), Whose.GUEST)
                self.notify(self.tx)
        else:
            self.discard()

    def discard(self) -> None:
        """Returns what the guest has sent, a half-consumed chain too, and counts the bytes (R-CON-44, R-CON-48)."""
        with self.blaming(self.tx):
            self.drop(self.tx.discard(), Whose.GUEST)
            self.notify(self.tx)
            more = self.tx.kicks_on()
            self.stale = self.stale and (more or not self.tx.running)
            if more:
                self.links.backlog(self.tx.index)

    def drop(self, count: int, whose: Whose) -> None:
        """Bytes reach nobody: that is counted, and said."""
        if not count:
            return
        if whose is Whose.GUEST:
            self.counters.bytes_discarded += count
        else:
            self.counters.host_bytes_dropped += count
        self.links.dropped(self, count, whose)

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
