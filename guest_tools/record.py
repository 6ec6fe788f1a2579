"""Immutable values with named fields: what dataclasses makes, which takes longer to load than the list of ports takes.

dataclasses needs inspect, and that needs a compiler's half of the library; a guest can be slow.
"""

from __future__ import annotations

TYPE_CHECKING = False  # The typing module, too, is for those who check types.
if TYPE_CHECKING:
    from typing import Any, ClassVar

    from typing_extensions import Self, dataclass_transform
else:

    def dataclass_transform(**_):
        return lambda cls: cls


__all__ = ["Record"]


@dataclass_transform(frozen_default=True)
class Record:
    """A class that derives from this one has its annotations as fields, with what they are set to as defaults."""

    _fields: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        cls._fields = tuple(cls.__annotations__)

    def __init__(self, *values: Any, **named: Any) -> None:
        fields = self._fields
        given = {**dict(zip(fields, values)), **named}  # noqa: B905 - Python 3.9 has no strict=
        defaults = {name: getattr(type(self), name) for name in fields if hasattr(type(self), name)}
        complete = {**defaults, **given}.keys() == set(fields)
        if not complete or len(given) < len(values) + len(named):
            raise TypeError(f"{type(self).__name__} has the fields {', '.join(fields)}, each once")
        self.__dict__.update((name, given.get(name, defaults.get(name))) for name in fields)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} cannot be changed; replace() makes another one")

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)

    def __eq__(self, other: object) -> bool:
        return self.__dict__ == other.__dict__ if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self.__dict__.values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.__dict__.items())})"

    def replace(self, **changes: Any) -> Self:
        """The same with other values for some fields."""
        return type(self)(**{**self.__dict__, **changes})
