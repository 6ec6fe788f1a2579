"""JSON that comes out of a file or from another process: read field by field, each by type and range.

What is wrong is said with the place where it stands, as ``snapshot.ports[3]: name is missing``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

from vsport.errors import VsportError

__all__ = ["DocumentError", "Fields"]

_T = TypeVar("_T")


class DocumentError(VsportError):
    """A document that cannot be used, and where in it the trouble is."""


class Fields:
    """An object of a document: each field is taken once, and none may be left over."""

    def __init__(self, where: str, value: object) -> None:
        if not isinstance(value, dict):
            raise DocumentError(f"{where}: an object belongs here")
        self.where = where
        self._left: dict[str, Any] = dict(value)

    @classmethod
    def parse(cls, where: str, data: bytes) -> Fields:
        """The object that ``data`` is, in JSON; raises DocumentError."""
        try:
            return cls(where, json.loads(data))
        except (ValueError, RecursionError) as exc:
            raise DocumentError(f"{where}: this is no JSON: {exc}") from None

    def _take(self, name: str, kind: type[_T]) -> _T:
        if name not in self._left:
            raise DocumentError(f"{self.where}: {name} is missing")
        value = self._left.pop(name)
        if type(value) is not kind:  # a bool is an int to isinstance(), and not here
            raise DocumentError(f"{self.where}: {name} is {type(value).__name__}, not {kind.__name__}")
        return value

    def integer(self, name: str, low: int, high: int) -> int:
        value = self._take(name, int)
        if not low <= value <= high:
            raise DocumentError(f"{self.where}: {name} is not in {low} to {high}")
        return value

    def boolean(self, name: str) -> bool:
        return self._take(name, bool)

    def text(self, name: str) -> str:
        return self._take(name, str)

    def bytes(self, name: str) -> bytes:
        """Bytes, which a document has in hexadecimal."""
        try:
            return bytes.fromhex(self.text(name))
        except ValueError:
            raise DocumentError(f"{self.where}: {name} is not hexadecimal") from None

    def object(self, name: str) -> Fields:
        """An object within this one."""
        return Fields(f"{self.where}.{name}", self._take(name, dict))

    def each(self, name: str, most: int, read: Callable[[str, Any], _T]) -> tuple[_T, ...]:
        """A list of at most ``most`` things, each read by ``read(where, value)``."""
        values = self._take(name, list)
        if len(values) > most:
            raise DocumentError(f"{self.where}: {name} has {len(values)} entries, more than {most}")
        return tuple(read(f"{self.where}.{name}[{at}]", value) for at, value in enumerate(values))

    def end(self) -> None:
        """Nothing else may be there; raises DocumentError."""
        if self._left:
            names = ", ".join(repr(name[:40]) for name in sorted(self._left)[:3])
            raise DocumentError(f"{self.where}: {names} is not known")
