"""What `vsport inspect` says about a file: text for people, objects for programs, and how both are laid out.

Files of all kinds are told in the same order: what it is; each device, with a line for each fact and each port; what
that means for the ports, each meaning once; what is wrong with it.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Report", "facts", "meanings", "paragraph", "ports", "shown", "size", "table"]

_WIDTH = 100
_FACT_INDENT = 13
_SHOWN_MAX = 60
_PLAIN = re.compile(r"[\w.:+@=-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Report:
    """What a file holds: for people, and one JSON object for each thing in it, the file itself first."""

    text: str
    objects: Sequence[dict[str, object]]

    def json_lines(self) -> str:
        """One object a line; ``type`` says of what, and keys are never renamed."""
        return "\n".join(json.dumps(item) for item in self.objects)


def facts(*rows: tuple[str, str]) -> Iterator[str]:
    """What there is to say about a device: a word, and what is true of it."""
    for word, fact in rows:
        yield from paragraph(f"  {word:<{_FACT_INDENT - 2}}{fact}", indent=_FACT_INDENT)


def meanings(told: Iterable[tuple[int, str]]) -> Iterator[str]:
    """Each explanation once, with the numbers of the ports that it is about: many are in the same state."""
    ids: dict[str, list[int]] = {}
    for id, meaning in told:
        ids.setdefault(meaning, []).append(id)
    for meaning, about in ids.items():
        yield from paragraph(f"  {ports(about)}: {meaning}", indent=4)


def ports(ids: Sequence[int]) -> str:
    """``port 1`` or ``ports 1, 2``."""
    return f"port {ids[0]}" if len(ids) == 1 else f"ports {', '.join(map(str, ids))}"


def table(rows: Sequence[Sequence[str]], *, indent: int) -> Iterator[str]:
    """Aligned columns; the first row is their heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield " " * indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def paragraph(text: str, *, indent: int = 0) -> list[str]:
    """Broken into lines, which are indented from the second one on."""
    return textwrap.wrap(text, _WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def size(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / (1 << 20):.1f} MiB" if count >= 1 << 20 else f"{count} bytes"


def shown(text: str) -> str:
    """A name out of a file: as it is if it is a plain word, otherwise quoted, escaped, and cut where it is endless."""
    if len(text) > _SHOWN_MAX:
        return repr(text[:_SHOWN_MAX]) + "..."
    return text if _PLAIN.fullmatch(text) else repr(text)
