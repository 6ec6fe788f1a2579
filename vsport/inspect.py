"""`vsport inspect`: files that hold a device's state, and the table of connections, told to people and to programs.

A kind of file is known by its first bytes. FORMATS has a reader for each, which makes a Report: text for one screen,
written for somebody who has never seen the code, and objects for ``--json``, one for each line.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vsport.connection import TABLE, Cause, Effect, Refused, State, Transition
from vsport.document import DocumentError
from vsport.errors import HostError
from vsport.qemu_report import qemu_report
from vsport.qemu_stream import MAGIC as QEMU_MAGIC
from vsport.qemu_stream import Image, StreamError, read_stream
from vsport.report import Report, table
from vsport.snapshot import MAGIC as SNAPSHOT_MAGIC
from vsport.snapshot import SIZE_MAX, Snapshot
from vsport.snapshot_report import snapshot_report

__all__ = ["FORMATS", "STATES_FORMATS", "FileImage", "describe", "states"]

_MAGIC_SIZE = 16


class FileImage:
    """An Image of an open file. It is not mapped: a file that shrinks meanwhile would end the process by a signal."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.size = os.lseek(fd, 0, os.SEEK_END)

    def read(self, offset: int, size: int) -> bytes:
        pieces = []
        while size > 0 and (piece := os.pread(self._fd, size, offset)):
            pieces.append(piece)
            offset, size = offset + len(piece), size - len(piece)
        return b"".join(pieces)


def describe(path: str | os.PathLike[str]) -> Report:
    """Reads a file of a kind that FORMATS knows. Raises HostError, with one line that says what is wrong with it."""
    path = Path(path)
    with _opened(path) as image:
        magic = image.read(0, _MAGIC_SIZE)
        for start, report in FORMATS.items():
            if magic.startswith(start):
                try:
                    return report(path, image)
                except StreamError as exc:
                    raise HostError(f"{path}: {exc}; the file is damaged or cut short") from exc
                except DocumentError as exc:
                    raise HostError(f"{path}: {exc}") from exc
    raise HostError(f"{path}: {_unknown(magic)}")


@contextmanager
def _opened(path: Path) -> Iterator[FileImage]:
    try:
        # Nothing hangs on a pipe that nobody writes to.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as exc:
        raise HostError(f"{path}: {getattr(exc, 'strerror', None) or exc}") from exc
    try:
        if not (stat.S_ISREG(mode := os.fstat(fd).st_mode) or stat.S_ISBLK(mode)):
            raise HostError(f"{path}: not a regular file; write what comes out of a pipe to a file first")
        yield FileImage(fd)
    except OSError as exc:
        raise HostError(f"{path}: cannot be read: {exc.strerror}") from exc
    finally:
        os.close(fd)


_COUSINS = {
    b"\x1f\x8b": "is compressed by gzip: unpack it first (gzip -dc)",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd: unpack it first (zstd -dc)",
    b"\xfd7zXZ": "is compressed by xz: unpack it first (xz -dc)",
    b"BZh": "is compressed by bzip2: unpack it first (bzip2 -dc)",
    b"LibvirtQemudSave": "is a save image of libvirt: QEMU's stream is behind libvirt's header; cut that off first",
    b"QFI\xfb": "is a qcow2 disk: its snapshots cannot be read here; use QEMU's migrate to make a file",
    b"\x7fELF": "is a memory dump or a program; use QEMU's migrate to make a file",
}
"""What people have in their hands instead."""


def _unknown(magic: bytes) -> str:
    if not magic:
        return "is empty"
    for start, what in _COUSINS.items():
        if magic.startswith(start):
            return what
    known = "neither a snapshot nor what QEMU writes with migrate file:PATH"
    return f"begins with {magic[:8]!r}, and is no file that vsport knows: {known}"


# -- kinds of files ----------------------------------------------------------------------------------------------------


def _read_qemu(path: Path, image: Image) -> Report:
    return qemu_report(path, read_stream(image))


def _read_snapshot(path: Path, image: Image) -> Report:
    """One byte more than the largest snapshot is enough to see that a file is none."""
    return snapshot_report(path, Snapshot.decode(image.read(0, SIZE_MAX + 1)), image.size)


FORMATS: dict[bytes, Callable[[Path, Image], Report]] = {QEMU_MAGIC: _read_qemu, SNAPSHOT_MAGIC[:6]: _read_snapshot}
"""The readers of files, by the bytes that these begin with. A reader raises StreamError or DocumentError."""


# -- the connection table ----------------------------------------------------------------------------------------------


def states(format: str = "table") -> str:
    """connection.TABLE as text: one of STATES_FORMATS. Raises KeyError for another."""
    return "\n".join(STATES_FORMATS[format]())


def _states_table() -> Iterator[str]:
    """Every pair of state and cause, and what follows from it."""
    yield "The states of a port: which of its three bits are set."
    bits = [(state.name, *_bits(state)) for state in State]
    yield from table([("state", "host_connected", "device_ready", "guest_connected"), *bits], indent=2)
    yield ""
    yield "What happens, and what is done about it, in this order."
    rows = [("state", "cause", "next state", "effects")]
    for state in State:
        rows += [_row(state, cause) for cause in Cause if (state, cause) in TABLE]
    yield from table(rows, indent=2)


def _bits(state: State) -> tuple[str, str, str]:
    host, ready, guest = (
        "yes" if bit else "-" for bit in (state.host_connected, state.device_ready, state.guest_connected)
    )
    return host, ready, guest


def _row(state: State, cause: Cause) -> tuple[str, str, str, str]:
    outcome = TABLE[state, cause]
    if isinstance(outcome, Refused):
        return state.name, cause.value, "refused", f"{outcome.what} ({outcome.rule})"
    following = "-" if outcome.state is state else outcome.state.name
    return state.name, cause.value, following, _effects(outcome.effects) or "-"


def _effects(effects: Iterable[Effect]) -> str:
    return ", ".join(effect.name.lower().replace("_", " ") for effect in effects)


def _arrows() -> Iterator[tuple[State, Cause, Transition]]:
    """The pairs that a diagram shows: those that change or do something."""
    for (state, cause), outcome in TABLE.items():
        if isinstance(outcome, Transition) and (outcome.state is not state or outcome.effects):
            yield state, cause, outcome


def _states_mermaid() -> Iterator[str]:
    yield "stateDiagram-v2"
    for state in State:
        yield f"    {state.name}: {_label(state, ' · ')}"
    for state, cause, outcome in _arrows():
        label = f"{cause.value} / {_effects(outcome.effects)}" if outcome.effects else cause.value
        yield f"    {state.name} --> {outcome.state.name}: {label}"


def _states_dot() -> Iterator[str]:
    yield "digraph connection {"
    yield "    node [shape=box, style=rounded];"
    for state in State:
        yield f'    {state.name} [label="{_label(state, chr(92) + "n")}"];'
    for state, cause, outcome in _arrows():
        label = "\\n".join(filter(None, (cause.value, _effects(outcome.effects))))
        yield f'    {state.name} -> {outcome.state.name} [label="{label}"];'
    yield "}"


def _label(state: State, separator: str) -> str:
    """The state's name and what is true in it."""
    bits = {"host": state.host_connected, "driver": state.device_ready, "guest": state.guest_connected}
    present = " ".join(name for name, is_set in bits.items() if is_set)
    return f"{state.name}{separator}{present or 'nobody'}"


STATES_FORMATS: dict[str, Callable[[], Iterator[str]]] = {
    "table": _states_table,
    "mermaid": _states_mermaid,
    "dot": _states_dot,
}
"""The forms that states() has."""
