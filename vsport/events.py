"""What happens to ports, for programs on the host: one JSON object a line, never in the way of the device.

    {"event": "port", "port": 1, "name": "org.example.0", "cause": "guest-open", "guest_connected": true,
     "host_connected": false, "device_ready": true, "session": 0}
    {"event": "dropped", "port": 1, "name": "org.example.0", "bytes": 4096, "of": "guest"}
    {"event": "lost", "lines": 12}       so many lines found no room, because nobody read them

Where one process serves many virtual machines, "vm" says whose port it is. A back end in this process hears the same,
in its own words, by port.BackEnd.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping

from vsport.chardev.base import open_file
from vsport.connection import Cause, State
from vsport.device import SerialDevice
from vsport.errors import HostError
from vsport.loop import Loop
from vsport.port import Port, Whose

__all__ = ["DROPS_SECONDS", "EventLog", "Journal", "open_events"]

log = logging.getLogger("vsport.events")

DROPS_SECONDS = 0.1
"""Drops are added up for so long: a guest that sends to nobody must not make a line of each write."""


def open_events(path: str) -> Journal:
    """Where events are written to: standard output for ``-``, else a file or a FIFO. Raises HostError."""
    if path == "-":
        return Journal(os.dup(1))
    try:
        return Journal(open_file(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, "event file"))
    except HostError as exc:
        raise HostError(f"{exc}; a FIFO needs its reader first") from None


class Journal:
    """Lines in ``fd``, which it owns: of one device, or of many. A reader that does not read costs lines, not time."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._unwritten = b""
        self._lost = 0

    def say(self, event: Mapping[str, object]) -> None:
        """Writes ``event`` as a line, if there is room for it."""
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
            self.close()
            return True
        self._unwritten = data[written:]
        return not self._unwritten

    def close(self) -> None:
        """Safe to call twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class EventLog:
    """Writes what happens to the ports of ``device`` to a journal. Takes over two hooks of the device."""

    def __init__(self, loop: Loop, device: SerialDevice, journal: Journal, vm: str = "") -> None:
        self._loop = loop
        self._journal = journal
        self._whose = {"vm": vm} if vm else {}
        self._dropped: dict[tuple[int, str, Whose], int] = {}
        device.on_transition = self._moved
        device.on_drop = self._drop

    def _moved(self, port: Port, cause: Cause, before: State) -> None:
        self.flush()
        state = port.state
        self._say(
            "port",
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
            self._loop.call_later(DROPS_SECONDS, self.flush)
        key = (port.id, port.name, whose)
        self._dropped[key] = self._dropped.get(key, 0) + count

    def flush(self) -> None:
        """Says what was dropped since the last time: now, and not when the drops are due."""
        dropped, self._dropped = self._dropped, {}
        for (id, name, whose), count in dropped.items():
            self._say("dropped", port=id, name=name, bytes=count, of=whose.value)

    def _say(self, event: str, **what: object) -> None:
        self._journal.say({"event": event, **self._whose, **what})
