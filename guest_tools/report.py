"""What ``vsport-open`` prints: lines for people, or one JSON object a line."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Sequence

from guest_tools.ports import Port, printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["Reporter", "clock", "holders_text", "port_table", "write_line"]

STDOUT, STDERR = 1, 2


class Reporter:
    """Writes results to standard output and messages to standard error, each line at once.

    Straight to the descriptors: a buffer that cannot be flushed would complain once more at exit.
    """

    def __init__(self, *, as_json: bool, verbose: bool) -> None:
        self._as_json = as_json
        self._talkative = verbose or as_json or os.isatty(STDERR)

    def result(self, text: str, record: dict[str, Any]) -> None:
        """A line of standard output. Raises OSError."""
        write_line(STDOUT, self._line(text, record))

    def note(self, text: str, record: dict[str, Any]) -> None:
        """What goes on, on standard error: only for a terminal, --verbose or --json."""
        if self._talkative:
            self._message(text, record)

    def warning(self, text: str, record: dict[str, Any]) -> None:
        """As note, but for everybody."""
        self._message(text, record)

    def error(self, text: str, code: int) -> None:
        self._message(text, {"error": text, "code": code})

    def _message(self, text: str, record: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # There is nobody left to tell.
            write_line(STDERR, self._line(f"vsport-open: {text}", record))

    def _line(self, text: str, record: dict[str, Any]) -> str:
        if not self._as_json:
            return text
        import json  # Takes a while to load.

        return json.dumps(record)


def write_line(fd: int, text: str) -> None:
    """Raises OSError."""
    rest = memoryview(text.encode("utf-8", "backslashreplace") + b"\n")
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:  # Another process made a shared terminal or pipe non-blocking.
            room = select.poll()
            room.register(fd, select.POLLOUT)
            room.poll()


def clock(seconds: float) -> str:
    """A moment as people read it: local time, with milliseconds."""
    return time.strftime("%H:%M:%S", time.localtime(seconds)) + f".{int(seconds % 1 * 1000):03d}"


# The table of --list

COLUMNS = ("PORT", "NAME", "ID", "KIND", "HOST", "HOLDER")
HOST = {True: "connected", False: "away", None: "?"}


def port_table(ports: Sequence[Port]) -> list[str]:
    """Aligned lines, the header first. "?" stands for what this user cannot know."""
    rows = [COLUMNS, *map(_row, ports)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    line = "  ".join(f"{{:{width}}}" for width in widths)
    return [line.format(*row).rstrip() for row in rows]


def _row(port: Port) -> tuple[str, ...]:
    name = "-" if port.name is None else printable(port.name)
    kind, host = port.kind or "?", HOST[port.host_connected]
    return port.device, name, str(port.id), kind, host, holders_text(port)


def holders_text(port: Port) -> str:
    """Who has it open, for people."""
    if port.holders:
        return ", ".join(map(str, port.holders))
    if port.is_console:
        return "kernel"  # R-GUEST-17: its console driver opens the port itself.
    return "?" if port.holders is None else "-"
