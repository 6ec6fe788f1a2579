"""What happens to ports, for programs on the host: one JSON object a line, never in the way of the device.

    {"event": "port", "port": 1, "name": "org.example.0", "cause": "guest-open", "guest_connected": true,
     "host_connected": false, "device_ready": true, "session": 0}
    {"event": "dropped", "port": 1, "name": "org.example.0", "bytes": 4096, "of": "guest"}
    {"event": "lost", "lines": 12}       so many lines found no room, because nobody read them

A back end in this process hears the same, in its own words, by port.BackEnd.
"""

from __future__ import annotations

import json
import logging
import os

from vsport.chardev.base import open_file
from vsport.connection import Cause, State
from vsport.device import SerialDevice
from vsport.errors import HostError
from vsport.loop import Loop
from vsport.port import Port, Whose

__all__ = ["DROPS_SECONDS", "EventLog", "open_events"]

log = logging.getLogger("vsport.events")

DROPS_SECONDS = 0.1
"""Drops are added up for so long: a guest that sends to nobody must not make a line of each write."""


def open_events(path: str) -> int:
    """A descriptor to write events to: standard output for ``-``, else a file or a FIFO. Raises HostError."""
    if path == "-":
        return os.dup(1)
    try:
        return open_file(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, "event file")
    except HostError as exc:
        raise HostError(f"{exc}; a FIFO needs its reader first") from None


class EventLog:
    """Writes what happens to the ports of ``device`` to ``fd``, which it owns. Takes over two hooks of the device."""

    def __init__(self, loop: Loop, device: SerialDevice, fd: int) -> None:
        self._loop = loop
        self._fd = fd
        self._dropped: dict[tuple[int, str, Whose], int] = {}
        self._unwritten = b""
        self._lost = 0
        device.on_transition = self._moved
        device.on_drop = self._drop

    def _moved(self, port: Port, cause: Cause, before: State) -> None:
        self._flush_drops()
        state = port.state
        self._say(
            event="port",
            port=port.id,
            name=port.name,
            cause=cause.value,
            guest_connected=state.guest_connected,
            host_connected=state.host_connected,
            device_ready=state.device_ready,
            session=port.session,
        )

    def _drop(self, port: Port, count: int, whose: Whose) -> None:
        if not self._dropped:
            self._loop.call_later(DROPS_SECONDS, self._flush_drops)
        key = (port.id, port.name, whose)
        self._dropped[key] = self._dropped.get(key, 0) + count

    def _flush_drops(self) -> None:
        dropped, self._dropped = self._dropped, {}
        for (id, name, whose), count in dropped.items():
            self._say(event="dropped", port=id, name=name, bytes=count, of=whose.value)

    def _say(self, **event: object) -> None:
        if self._fd < 0:
            return
        if self._lost and not self._unwritten:
            self._unwritten = json.dumps({"event": "lost", "lines": self._lost}).encode() + b"\n"
            self._lost = 0
        line = json.dumps(event).encode() + b"\n"
        if self._write(self._unwritten):
            self._write(line)
        else:
            self._lost += 1

    def _write(self, data: bytes) -> bool:
        """Writes ``data``, or keeps what finds no room: half a line is finished before the next one begins."""
        try:
            written = os.write(self._fd, data) if data else 0
        except BlockingIOError:
            written = 0
        except OSError as exc:
            log.warning("events are not written any more: %s", exc.strerror)
            os.close(self._fd)
            self._fd = -1
            return True
        self._unwritten = data[written:]
        return not self._unwritten

    def close(self) -> None:
        """What was dropped last is still said; safe to call twice."""
        if self._fd >= 0:
            self._flush_drops()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
