"""QEMU's option syntax, as far as virtio-serial goes: what people have in their fingers is taken as they type it.

    --chardev socket,id=c0,path=/run/agent.sock,server=on,wait=off
    --device virtserialport,chardev=c0,name=org.example.0,id=p0,nr=1
    --device virtio-serial,max_ports=31

Pure: text in, a checked Configuration out, or UsageError with one line that says what is wrong with which option.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from vsport.constants import PORTS_DEFAULT, PORTS_MAX
from vsport.errors import UsageError

__all__ = ["ChardevOption", "Configuration", "PortOption", "parse_configuration", "split_options"]

_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
_FLAGS = {"server": ("server", "on"), "wait": ("wait", "on"), "nowait": ("wait", "off"), "append": ("append", "on")}
"""Words that QEMU has long taken without a value."""

_BUSES = ("virtio-serial", "virtio-serial-pci", "virtio-serial-device")
_PORTS = {"virtserialport": False, "virtconsole": True}
"""The devices that are ports, and whether they are consoles."""


@dataclass(frozen=True, slots=True)
class ChardevOption:
    """One ``--chardev``: its kind, its id, and the options that the kind itself will check."""

    kind: str
    id: str
    options: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class PortOption:
    """One ``--device virtserialport`` or ``virtconsole``."""

    console: bool
    id: str = ""
    """The user's name for it, for messages and the monitor."""
    chardev: str = ""
    name: str = ""
    nr: int | None = None
    """The port number, or None: the lowest free one."""
    cols: int = 80
    rows: int = 25
    rows_first: bool = False
    """For consoles of Linux before 6.15, which takes rows for columns (R-CON-26)."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """What a device is to be."""

    max_ports: int = PORTS_DEFAULT
    bus: str = ""
    """The user's name for the device, e.g. ``vs``: ports may say ``bus=vs.0``."""
    chardevs: tuple[ChardevOption, ...] = ()
    ports: tuple[PortOption, ...] = field(default=())


def split_options(text: str) -> tuple[str, dict[str, str]]:
    """Takes ``word,key=value,...`` apart; ``,,`` is a comma in a value. Raises UsageError."""
    first, *rest = _split_at_commas(text)
    options: dict[str, str] = {}
    for part in rest:
        key, equals, value = part.partition("=")
        if not equals:
            key, value = _FLAGS.get(key, ("", ""))
        if not key:
            raise UsageError(f"{text!r}: {part!r} is not key=value")
        if key in options:
            raise UsageError(f"{text!r}: {key}= is given twice")
        options[key] = value
    if not first or "=" in first:
        raise UsageError(f"{text!r}: the kind has to come first, e.g. socket,id=c0,...")
    return first, options


def _split_at_commas(text: str) -> list[str]:
    """Parts between single commas. A run of commas is read from the left in pairs, as QEMU does."""
    parts, part, at = [], "", 0
    while at < len(text):
        if text[at] != ",":
            part += text[at]
        elif text[at : at + 2] == ",,":
            part += ","
            at += 1
        else:
            parts.append(part)
            part = ""
        at += 1
    return [*parts, part]


def parse_configuration(chardevs: Iterable[str], devices: Iterable[str]) -> Configuration:
    """Reads all ``--chardev`` and ``--device`` options together, since they refer to each other. Raises UsageError."""
    parsed_chardevs = tuple(_parse_chardev(text) for text in chardevs)
    _check_unique("--chardev", [chardev.id for chardev in parsed_chardevs])
    configuration = _parse_devices(list(devices), parsed_chardevs)
    _check_unique("--device", [port.id for port in configuration.ports if port.id])
    _check_chardevs_of_ports(configuration)
    return configuration


def _parse_chardev(text: str) -> ChardevOption:
    kind, options = split_options(text)
    id = options.pop("id", "")
    if not id:
        raise UsageError(f"--chardev {text}: needs an id, e.g. {kind},id=c0")
    _check_id("--chardev", text, id)
    return ChardevOption(kind, id, options)


def _parse_devices(texts: list[str], chardevs: tuple[ChardevOption, ...]) -> Configuration:
    bus: tuple[int, str] | None = None
    ports: list[tuple[str, PortOption, str]] = []
    for text in texts:
        kind, options = split_options(text)
        if kind in _BUSES:
            if bus is not None:
                raise UsageError(f"--device {text}: one vsport serve is one virtio-serial device")
            bus = _parse_bus(text, options)
        elif kind in _PORTS:
            ports.append((text, _parse_port(text, options, console=_PORTS[kind]), options.get("bus", "")))
        else:
            known = ", ".join([*_PORTS, *_BUSES])
            raise UsageError(f"--device {text}: unknown device {kind!r}; known are {known}")
    max_ports, bus_id = bus or (PORTS_DEFAULT, "")
    for text, _port, wanted in ports:
        if wanted and wanted.removesuffix(".0") != bus_id:
            raise UsageError(
                f"--device {text}: there is no bus {wanted!r}; give --device virtio-serial an id, or leave it"
            )
    return Configuration(max_ports, bus_id, chardevs, tuple(port for _text, port, _wanted in ports))


def _parse_bus(text: str, options: dict[str, str]) -> tuple[int, str]:
    _check_known(text, options, {"id", "max_ports"})
    max_ports = _number(text, options, "max_ports", 1, PORTS_MAX)
    return PORTS_DEFAULT if max_ports is None else max_ports, options.get("id", "")


def _parse_port(text: str, options: dict[str, str], *, console: bool) -> PortOption:
    known = {"id", "chardev", "name", "nr", "bus"} | ({"cols", "rows", "x-rows-first"} if console else set())
    _check_known(text, options, known)
    if "id" in options:
        _check_id("--device", text, options["id"])
    cols, rows = (_number(text, options, key, 0, 0xFFFF) for key in ("cols", "rows"))
    return PortOption(
        console,
        id=options.get("id", ""),
        chardev=options.get("chardev", ""),
        name=options.get("name", ""),
        nr=_number(text, options, "nr", 0, PORTS_MAX - 1),
        cols=80 if cols is None else cols,
        rows=25 if rows is None else rows,
        rows_first=_on_off(text, options, "x-rows-first"),
    )


def _check_known(text: str, options: dict[str, str], known: set[str]) -> None:
    for key in options:
        if key not in known:
            raise UsageError(f"--device {text}: unknown option {key}=; known are {', '.join(sorted(known))}")


def _number(text: str, options: dict[str, str], key: str, low: int, high: int) -> int | None:
    if key not in options:
        return None
    value = options[key]
    if not re.fullmatch(r"[0-9]{1,9}", value) or not low <= int(value) <= high:
        raise UsageError(f"--device {text}: {key}={value} is not a number from {low} to {high}")
    return int(value)


def _on_off(text: str, options: dict[str, str], key: str) -> bool:
    value = options.get(key, "off")
    if value not in {"on", "off"}:
        raise UsageError(f"--device {text}: {key}={value} is not on or off")
    return value == "on"


def _check_id(option: str, text: str, id: str) -> None:
    if not _ID.fullmatch(id):
        raise UsageError(f"{option} {text}: id={id!r}: letters, digits, '-', '.', '_', starting with a letter")


def _check_unique(option: str, ids: list[str]) -> None:
    for id in ids:
        if ids.count(id) > 1:
            raise UsageError(f"{option}: the id {id!r} is given to two of them")


def _check_chardevs_of_ports(configuration: Configuration) -> None:
    known = {chardev.id for chardev in configuration.chardevs}
    used: set[str] = set()
    for port in configuration.ports:
        if port.chardev and port.chardev not in known:
            raise UsageError(f"port {port.name or port.id!r}: there is no --chardev with id={port.chardev}")
        if port.chardev in used:
            raise UsageError(f"chardev {port.chardev!r} is used by two ports; each needs its own")
        used.update({port.chardev} - {""})
