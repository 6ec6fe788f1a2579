"""One command line for many virtual machines: in every option, ``{vm}`` stands for the name of each.

    --vm web1 --vm web2 --socket-path /run/{vm}.sock --chardev socket,id=c0,path=/run/{vm}-agent.sock,server=on

Pure: texts in, one Plan for each virtual machine out, or UsageError.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from vsport.errors import UsageError

__all__ = ["PLACEHOLDER", "Plan", "check_names", "plans"]

PLACEHOLDER = "{vm}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What `vsport serve` is to do for one virtual machine: the texts of its options, None where one is not given."""

    vm: str = ""
    """Its name; empty if it is the only one, and has none."""
    socket_path: str | None = None
    fd: int | None = None
    """In place of a path: a socket that this process has inherited."""
    handover: str | None = None
    takeover: str | None = None
    events: str | None = None
    chardevs: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()


def plans(names: Sequence[str], template: Plan) -> list[Plan]:
    """``template`` for each of ``names``; without names it is the only plan. Raises UsageError."""
    if not names:
        for option, text in _texts(template):
            if PLACEHOLDER in text:
                raise UsageError(f"{option} {text}: {PLACEHOLDER} stands for a name, and none is given: add --vm NAME")
        return [template]
    if template.fd is not None:
        raise UsageError("--fd is the socket of one virtual machine: with --vm or --vms give --socket-path")
    check_names(names)
    return [_plan(name, template) for name in names]


def _texts(template: Plan) -> Iterator[tuple[str, str]]:
    for option in ("socket_path", "handover", "takeover", "events"):
        yield f"--{option.replace('_', '-')}", getattr(template, option) or ""
    for text in template.chardevs:
        yield "--chardev", text
    for text in template.devices:
        yield "--device", text


def check_names(names: Iterable[str]) -> None:
    """A name becomes a part of paths and of lines of text. Raises UsageError."""
    seen: set[str] = set()
    for name in names:
        if not name or "/" in name or name in {".", ".."} or not name.isprintable():
            raise UsageError(
                f"--vm {name!r}: a name becomes a part of a path: any text without '/' or control characters"
            )
        if name in seen:
            raise UsageError(f"--vm {name}: the name is given twice")
        seen.add(name)


def _plan(name: str, template: Plan) -> Plan:
    as_value = name.replace(",", ",,")  # as everywhere in QEMU's syntax
    return replace(
        template,
        vm=name,
        chardevs=tuple(text.replace(PLACEHOLDER, as_value) for text in template.chardevs),
        devices=tuple(text.replace(PLACEHOLDER, as_value) for text in template.devices),
        **{
            option: text.replace(PLACEHOLDER, name)
            for option in ("socket_path", "handover", "takeover", "events")
            if (text := getattr(template, option)) is not None
        },
    )
