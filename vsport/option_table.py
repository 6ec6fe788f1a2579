"""Options of chardevs and devices as tables: what parses ``name=value,...`` also prints the help for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vsport.errors import UsageError

__all__ = ["Option", "between", "choice", "help_lines", "integer", "on_off", "parse", "size", "text"]

_PLACEHOLDERS: dict[Callable[[str], Any], str] = {}
"""By reader: what stands behind the ``=`` in a help text."""
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Option(NamedTuple):
    """One option: how its text is read, what it is when it is not given, and what it is for."""

    read: Callable[[str], Any]
    """Turns the text into a value; raises ValueError with what would be right."""
    default: Any
    help: str
    required: bool = False

    @property
    def placeholder(self) -> str:
        """What stands behind the ``=`` in a help text: ``on|off``, ``PATH``, ``N`` ..."""
        return _PLACEHOLDERS.get(self.read, "N")


def text(value: str) -> str:
    """Any text that a file name or a host name can be."""
    if not value or "\0" in value:
        raise ValueError("must be a non-empty text")
    return value


def on_off(value: str) -> bool:
    """QEMU's boolean."""
    if value not in ("on", "off"):
        raise ValueError("must be on or off")
    return value == "on"


def integer(value: str) -> int:
    """A decimal number, 0 or more."""
    if not (value.isascii() and value.isdigit() and len(value) <= 18):
        raise ValueError("must be a number, 0 or more")
    return int(value)


def between(low: int, high: int) -> Callable[[str], int]:
    """Reads a decimal number from ``low`` to ``high``."""

    def read(value: str) -> int:
        if not (value.isascii() and value.isdigit() and len(value) <= 18 and low <= int(value) <= high):
            raise ValueError(f"must be a number from {low} to {high}")
        return int(value)

    return read


def choice(*words: str) -> Callable[[str], str]:
    """Reads one of ``words``."""

    def read(value: str) -> str:
        if value not in words:
            raise ValueError(f"must be one of {', '.join(words)}")
        return value

    _PLACEHOLDERS[read] = "|".join(words)
    return read


def size(value: str) -> int:
    """A number of bytes, with QEMU's suffixes K, M, G."""
    unit = _UNITS.get(value[-1:].upper(), 1)
    try:
        return integer(value if unit == 1 else value[:-1]) * unit
    except ValueError:
        raise ValueError("must be a number of bytes, such as 65536 or 64K") from None


_PLACEHOLDERS.update({text: "TEXT", on_off: "on|off", integer: "N", size: "SIZE"})


def parse(table: Mapping[str, Option], given: Mapping[str, str], who: str) -> dict[str, Any]:
    """Reads ``given`` by ``table``: a value for each option of the table, its default where it is not given.

    Raises UsageError, beginning with ``who``, for an unknown option, a missing one, or a value that does not read.
    """
    for name in given:
        if name not in table:
            raise UsageError(f"{who}: unknown option {name!r}; known: {', '.join(sorted(table))}")
    missing = [name for name, option in table.items() if option.required and name not in given]
    if missing:
        raise UsageError(f"{who}: needs {', '.join(f'{name}=' for name in missing)}")
    return {name: _read(option, name, given, who) for name, option in table.items()}


def _read(option: Option, name: str, given: Mapping[str, str], who: str) -> Any:
    if name not in given:
        return option.default
    try:
        return option.read(given[name])
    except ValueError as exc:
        raise UsageError(f"{who}: {name}={given[name]!r}: {exc}") from None


def help_lines(table: Mapping[str, Option]) -> list[str]:
    """A line for each option: how it is written, what it is for, what it is when it is not given."""
    written = {name: f"{name}={option.placeholder}" for name, option in table.items()}
    width = max(map(len, written.values()), default=0)
    return [f"  {written[name]:<{width}}  {option.help}{_remark(option)}" for name, option in table.items()]


def _remark(option: Option) -> str:
    if option.required:
        return " (needed)"
    if option.default in (None, ""):
        return ""
    default = {True: "on", False: "off"}.get(option.default, option.default)
    return f" (default: {default})"
