"""The control queue's messages (5.3.6.2): one codec for both directions.

``decode`` gives a message or raises GuestError, whatever the bytes; ``encode`` is its inverse.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from vsport.constants import CONTROL_LAYOUT, CONTROL_SIZE, RESIZE_LAYOUT, Event
from vsport.errors import GuestError

__all__ = ["Message", "Outbox"]

_HEADER = struct.Struct(CONTROL_LAYOUT)
_RESIZE = struct.Struct(RESIZE_LAYOUT)


@dataclass(frozen=True, slots=True)
class Message:
    """One control message: ``port`` id, ``event``, ``value``, and what follows the header (a name, a size)."""

    port: int
    event: Event
    value: int = 0
    tail: bytes = b""

    def encode(self) -> bytes:
        """The bytes on the queue, at least CONTROL_SIZE (R-CON-29)."""
        return _HEADER.pack(self.port, self.event, self.value) + self.tail

    @classmethod
    def decode(cls, data: bytes) -> Message:
        """Reads what a driver or a device sent; raises GuestError (R-CON-30) if it is too short or unknown."""
        if len(data) < CONTROL_SIZE:
            raise GuestError("R-CON-30", "a control message needs 8 bytes", length=len(data))
        port, event, value = _HEADER.unpack_from(data)
        try:
            return cls(port, Event(event), value, data[CONTROL_SIZE:])
        except ValueError:
            raise GuestError("R-CON-30", "unknown control event", event=event, port=port) from None

    @classmethod
    def resize(cls, port: int, cols: int, rows: int, *, rows_first: bool = False) -> Message:
        """RESIZE with its fields in the specification's order, or as older kernels read them (R-CON-25, R-CON-26)."""
        return cls(port, Event.RESIZE, 0, _RESIZE.pack(*((rows, cols) if rows_first else (cols, rows))))

    @classmethod
    def name(cls, port: int, name: str) -> Message:
        """PORT_NAME, without the NUL that the specification does not have (R-CON-28)."""
        return cls(port, Event.PORT_NAME, 1, name.encode())

    def size(self) -> tuple[int, int]:
        """(cols, rows) of a RESIZE; raises GuestError (R-CON-29) if it is cut short."""
        if len(self.tail) < _RESIZE.size:
            raise GuestError("R-CON-29", "a RESIZE needs 4 bytes behind its header", length=len(self.tail))
        cols, rows = _RESIZE.unpack_from(self.tail)
        return cols, rows


class Outbox:
    """Control messages that wait, in order, for the guest to offer a buffer: none is ever lost (R-CON-35).

    What a later message makes pointless is dropped (R-CON-36), so at most a handful wait for each port, however long a
    guest sleeps. A host that left and came back is two messages on purpose: one alone would hide from the program in
    the guest that the second session is not the first.
    """

    def __init__(self) -> None:
        self._waiting: list[Message] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, message: Message) -> None:
        """Appends ``message``, and takes out what it makes pointless."""
        match message.event:
            case Event.PORT_REMOVE:
                self._put_remove(message)
            case Event.PORT_OPEN if message.value:
                self._put_unless_last(message)
            case _:
                self._drop(lambda old: (old.port, old.event) == (message.port, message.event))
                self._waiting.append(message)

    def has_for(self, port: int) -> bool:
        """Whether a message about ``port`` waits."""
        return any(message.port == port for message in self._waiting)

    def peek(self) -> Message | None:
        """The message to be sent next."""
        return self._waiting[0] if self._waiting else None

    def sent(self) -> None:
        """The message last seen by peek() is with the guest."""
        del self._waiting[0]

    @property
    def messages(self) -> tuple[Message, ...]:
        """All that wait, the next one first."""
        return tuple(self._waiting)

    def replace(self, messages: Iterable[Message]) -> None:
        """Has ``messages`` wait, instead of those that do."""
        self._waiting = list(messages)

    def clear(self) -> None:
        self._waiting.clear()

    def _put_remove(self, message: Message) -> None:
        """A port that the guest has not heard of needs no goodbye; otherwise that is all there is to say about it."""
        never_seen = any((old.port, old.event) == (message.port, Event.PORT_ADD) for old in self._waiting)
        gone_before = any((old.port, old.event) == (message.port, Event.PORT_REMOVE) for old in self._waiting)
        self._drop(lambda old: old.port == message.port)
        if gone_before or not never_seen:
            self._waiting.append(message)

    def _put_unless_last(self, message: Message) -> None:
        """PORT_OPEN 1 stays behind a waiting PORT_OPEN 0; only a waiting PORT_OPEN 1 makes it pointless."""
        opens = [old for old in self._waiting if (old.port, old.event) == (message.port, Event.PORT_OPEN)]
        if not opens or not opens[-1].value:
            self._waiting.append(message)

    def _drop(self, pointless: Callable[[Message], bool]) -> None:
        self._waiting = [old for old in self._waiting if not pointless(old)]
