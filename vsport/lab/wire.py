"""Commands in a guest over one byte channel: frames, and what flows in them.

Both ends run this file: the lab on the host, and the agent in the guest, so it uses the standard library only.

A frame is a header of eight bytes (kind, stream, length, number of the command) and a payload:

=========  =========  ==================================================================================
kind       direction  meaning
=========  =========  ==================================================================================
READY      guest      once: the guest has booted; payload: JSON list of ports that did not appear
REQUEST    host       a piece of the JSON that says what to run; an empty piece ends it
DATA       both       bytes of a stream: 0 standard input, 1 standard output, 2 standard error
EOF        both       the sender's stream has ended
CREDIT     both       the receiver has disposed of so many bytes (u32) of the stream
STOP       both       the receiver wants no more of the stream: its reader has gone
SIGNAL     host       send signal number `stream` to the command's process group
EXIT       guest      the command has ended; payload: return code (i32), negative for a signal
ACK        guest      so many bytes (u32) of the channel itself have arrived
POWEROFF   host       write everything back and switch the guest off
=========  =========  ==================================================================================

Two windows keep it safe. Each stream has at most STREAM_WINDOW bytes under way, so one that nobody reads delays no
other. And towards the guest at most CHANNEL_WINDOW bytes of any kind are under way: there the channel is a serial line,
whose line discipline holds 4095 bytes, and User Mode Linux forgets to go on after it had to throttle.
"""

from __future__ import annotations

import enum
import os
import queue
import struct
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

__all__ = ["Channel", "Frame", "Incoming", "Kind", "Outgoing", "Sink", "Source"]

STREAM_WINDOW = 64 << 10
CHANNEL_WINDOW = 3 << 10
_ACK_AFTER = 1 << 10
_PIECE = 1 << 10

_HEADER = struct.Struct("<BBHI")
_COUNT = struct.Struct("<I")
_CODE = struct.Struct("<i")


class Kind(enum.IntEnum):
    READY = 1
    REQUEST = 2
    DATA = 3
    EOF = 4
    CREDIT = 5
    STOP = 6
    SIGNAL = 7
    EXIT = 8
    ACK = 9
    POWEROFF = 10


class Frame(NamedTuple):
    kind: Kind
    stream: int
    command: int
    payload: bytes

    @property
    def number(self) -> int:
        """Of CREDIT and ACK."""
        return int(_COUNT.unpack(self.payload)[0])

    @property
    def code(self) -> int:
        """Of EXIT."""
        return int(_CODE.unpack(self.payload)[0])


class _Window:
    """Room for so many bytes; whoever wants to send more waits until the other side has given some back."""

    def __init__(self, size: int) -> None:
        self._room = size
        self._changed = threading.Condition()

    def take(self, most: int, least: int = 1) -> int:
        """Waits for `least` bytes of room, then takes up to `most` of it; less than `least` once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._room >= least or self._room < 0)
            taken = max(0, min(most, self._room))
            self._room -= taken
            return taken

    def give(self, count: int) -> None:
        with self._changed:
            if self._room >= 0:
                self._room += count
                self._changed.notify_all()

    def close(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self._room = -1
            self._changed.notify_all()


class Channel:
    """Frames over a descriptor. Any thread sends; one thread receives."""

    def __init__(self, fd: int, *, acknowledge: bool = False) -> None:
        """`acknowledge` is what the guest's end does, and what the host's end then waits for."""
        self._fd = fd
        self._lock = threading.Lock()
        self._acknowledge = acknowledge
        self._window = None if acknowledge else _Window(CHANNEL_WINDOW)
        self._unacknowledged = 0

    def send(self, kind: Kind, command: int = 0, stream: int = 0, payload: bytes = b"") -> None:
        """Sends one frame; nothing happens if the other end has gone: the receiver learns of that."""
        frame = _HEADER.pack(kind, stream, len(payload), command) + payload
        with self._lock:
            if self._window is not None and self._window.take(len(frame), least=len(frame)) < len(frame):
                return
            try:
                write_all(self._fd, frame)
            except OSError:
                return

    def send_count(self, kind: Kind, count: int, command: int = 0, stream: int = 0) -> None:
        self.send(kind, command, stream, _COUNT.pack(count))

    def send_exit(self, command: int, code: int) -> None:
        self.send(Kind.EXIT, command, payload=_CODE.pack(code))

    def send_request(self, command: int, request: bytes) -> None:
        for start in range(0, len(request), _PIECE):
            self.send(Kind.REQUEST, command, payload=request[start : start + _PIECE])
        self.send(Kind.REQUEST, command)

    def close(self) -> None:
        """Forgets the descriptor, which may belong to something else from now on."""
        with self._lock:
            self._fd = -1

    def frames(self) -> Iterator[Frame]:
        """Every frame until the other end has gone, or says what no end of ours would say."""
        buffer = bytearray()
        try:
            while piece := self._read():
                buffer += piece
                self._arrived(len(piece))
                yield from self._split(buffer)
        except (ValueError, struct.error):
            return
        finally:
            if self._window is not None:
                self._window.close()

    def _read(self) -> bytes:
        try:
            return os.read(self._fd, 1 << 16)
        except OSError:
            return b""

    def _arrived(self, count: int) -> None:
        self._unacknowledged += count
        if self._acknowledge and self._unacknowledged >= _ACK_AFTER:
            self.send_count(Kind.ACK, self._unacknowledged)
            self._unacknowledged = 0

    def _split(self, buffer: bytearray) -> Iterator[Frame]:
        while len(buffer) >= _HEADER.size:
            kind, stream, length, command = _HEADER.unpack_from(buffer)
            end = _HEADER.size + length
            if len(buffer) < end:
                return
            frame = Frame(Kind(kind), stream, command, bytes(buffer[_HEADER.size : end]))
            del buffer[:end]
            if frame.kind is not Kind.ACK:
                yield frame
            elif self._window is not None:
                self._window.give(frame.number)


class Source(NamedTuple):
    """Where a stream's bytes come from. `read` takes the most that it may give, blocks, and gives nothing at the end;
    `done` is called once, after that."""

    read: Callable[[int], bytes]
    done: Callable[[], None]

    @classmethod
    def of(cls, fd: int, done: Callable[[], None]) -> Source:
        """A terminal whose other side has gone counts as ended."""

        def read(most: int) -> bytes:
            try:
                return os.read(fd, most)
            except OSError:
                return b""

        return cls(read, done)


class Sink(NamedTuple):
    """Where a stream's bytes go to. `write` blocks at will, and raises OSError when nobody reads any more; `done` is
    called once, after its last call."""

    write: Callable[[bytes], object]
    done: Callable[[], None]

    @classmethod
    def of(cls, fd: int, done: Callable[[], None]) -> Sink:
        return cls(lambda data: write_all(fd, data), done)


class Outgoing(threading.Thread):
    """Sends what its source gives, until that ends or the other side has had enough."""

    def __init__(self, channel: Channel, command: int, stream: int, source: Source) -> None:
        super().__init__(daemon=True)
        self._channel = channel
        self._address = (command, stream)
        self._source = source
        self._window = _Window(STREAM_WINDOW)
        self.credit = self._window.give
        self.stop = self._window.close

    def run(self) -> None:
        try:
            while (room := self._window.take(_PIECE)) and (data := self._source.read(room)):
                self._channel.send(Kind.DATA, *self._address, data)
                self._window.give(room - len(data))
        finally:
            self._source.done()
            self._channel.send(Kind.EOF, *self._address)


class Incoming(threading.Thread):
    """Gives what arrives to its sink, and the room that this makes back to the sender."""

    def __init__(self, channel: Channel, command: int, stream: int, sink: Sink) -> None:
        super().__init__(daemon=True)
        self._channel = channel
        self._address = (command, stream)
        self._sink = sink
        self._arrived: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.feed = self._arrived.put

    def end(self) -> None:
        self.feed(b"")

    def run(self) -> None:
        try:
            while data := self._arrived.get():
                self._sink.write(data)
                self._channel.send_count(Kind.CREDIT, len(data), *self._address)
        except OSError:
            self._channel.send(Kind.STOP, *self._address)
        finally:
            self._sink.done()


def write_all(fd: int, data: bytes) -> None:
    """Raises OSError when the reader has gone."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
