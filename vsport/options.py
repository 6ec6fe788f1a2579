"""QEMU's option syntax, as far as virtio-serial goes: what people have in their fingers is taken as they type it.

    --chardev socket,id=c0,path=/run/agent.sock,server=on,wait=off
    --device virtserialport,chardev=c0,name=org.example.0,id=p0,nr=1
    --device virtio-serial,max_ports=31

Pure: text in, a checked Configuration out, or UsageError with one line that says what is wrong with which option.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vsport.connection import OnRestore, Policy
from vsport.constants import PORTS_DEFAULT, PORTS_MAX
from vsport.errors import UsageError
from vsport.option_table import Option, between, choice, on_off, parse, text
from vsport.port import Away, Manners

__all__ = ["DEVICES", "ChardevOption", "Configuration", "PortOption", "parse_configuration", "split_options"]

_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
_FLAGS = {"server": ("server", "on"), "wait": ("wait", "on"), "nowait": ("wait", "off"), "append": ("append", "on")}
"""Words that QEMU has long taken without a value."""

_BUS: Mapping[str, Option] = {
    "max_ports": Option(between(1, PORTS_MAX), PORTS_DEFAULT, "how many ports the guest can have at a time"),
    "id": Option(text, "", "a name, which ports may give as bus=ID.0"),
    "packed": Option(on_off, False, "offer packed rings; not for chains that have to survive a crash (inflight)"),
    "in_order": Option(on_off, False, "offer to use buffers in order, and to return them in batches"),
}
_PORT: Mapping[str, Option] = {
    "chardev": Option(text, "", "the id of the --chardev behind the port; without one, no host ever comes"),
    "name": Option(text, "", "what the guest sees in /dev/virtio-ports, by custom org.example.NAME.0"),
    "nr": Option(between(0, PORTS_MAX - 1), None, "the port's number; the lowest free one if it is not given"),
    "id": Option(text, "", "a name for messages"),
    "bus": Option(text, "", "the device that the port belongs to, ID.0"),
    "away": Option(
        choice(*(away.value for away in Away)),
        Away.QEMU.value,
        "bytes for a side that is away; qemu: the guest's are dropped, the host's wait",
    ),
    "restore": Option(
        choice(*(policy.value for policy in Policy)),
        Policy.RECONNECT.value,
        "what the host's side is told of the guest after a move",
    ),
    "on_restore": Option(
        choice(*(what.value for what in OnRestore)),
        OnRestore.AUTO.value,
        "what the guest is shown of a move; auto: its port closes and opens if the host is another one",
    ),
}
_CONSOLE: Mapping[str, Option] = {
    **_PORT,
    "cols": Option(between(0, 0xFFFF), 80, "columns of the terminal"),
    "rows": Option(between(0, 0xFFFF), 25, "rows of the terminal"),
    "x-rows-first": Option(on_off, False, "for a guest with Linux before 6.15, which takes rows for columns"),
}
DEVICES: Mapping[str, Mapping[str, Option]] = {
    "virtserialport": _PORT,
    "virtconsole": _CONSOLE,
    "virtio-serial": _BUS,
    "virtio-serial-pci": _BUS,
    "virtio-serial-device": _BUS,
}
"""What --device can be, and with which options."""


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
    manners: Manners = field(default_factory=Manners)


@dataclass(frozen=True, slots=True)
class Configuration:
    """What a device is to be."""

    max_ports: int = PORTS_DEFAULT
    packed: bool = False
    in_order: bool = False
    bus: str = ""
    """The user's name for the device, e.g. ``vs``: ports may say ``bus=vs.0``."""
    chardevs: tuple[ChardevOption, ...] = ()
    ports: tuple[PortOption, ...] = ()


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
    configuration = Configuration(chardevs=chardevs)
    parsed = [(given, *_parse_device(given)) for given in texts]
    buses = [(given, values) for given, kind, values in parsed if DEVICES[kind] is _BUS]
    ports = [(given, kind, values) for given, kind, values in parsed if DEVICES[kind] is not _BUS]
    if len(buses) > 1:
        raise UsageError(f"--device {buses[1][0]}: one vsport serve is one virtio-serial device")
    for _given, values in buses:
        configuration = replace(configuration, bus=values.pop("id"), **values)
    for given, _kind, values in ports:
        _check_bus(given, values.pop("bus"), configuration.bus)
    return replace(configuration, ports=tuple(_port(kind, values) for _given, kind, values in ports))


def _parse_device(given: str) -> tuple[str, dict[str, Any]]:
    kind, options = split_options(given)
    if kind not in DEVICES:
        raise UsageError(f"--device {given}: unknown device {kind!r}; known are {', '.join(DEVICES)}")
    values = parse(DEVICES[kind], options, f"--device {given}")
    if values["id"]:
        _check_id("--device", given, values["id"])
    return kind, values


def _check_bus(given: str, wanted: str, bus: str) -> None:
    if wanted and wanted.removesuffix(".0") != bus:
        raise UsageError(
            f"--device {given}: there is no bus {wanted!r}; give --device virtio-serial an id, or leave it"
        )


def _port(kind: str, values: dict[str, Any]) -> PortOption:
    manners = Manners(Away(values.pop("away")), Policy(values.pop("restore")), OnRestore(values.pop("on_restore")))
    if kind == "virtconsole" and manners.away is Away.HOLD:
        raise UsageError("virtconsole: away=hold would make its guest stand still (R-CON-45); use discard or qemu")
    names = {name: name.removeprefix("x-").replace("-", "_") for name in values}
    return PortOption(kind == "virtconsole", manners=manners, **{names[name]: values[name] for name in values})


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
