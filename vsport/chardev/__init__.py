"""The host's back ends of a port: one file for each kind, one contract (base.py), one table."""

from __future__ import annotations

from collections.abc import Mapping

from vsport.chardev.base import Chardev, ChardevOwner, LogFile
from vsport.chardev.file import File
from vsport.chardev.null import Null
from vsport.chardev.pipe import Pipe
from vsport.chardev.pty import Pty
from vsport.chardev.ringbuf import RingBuf
from vsport.chardev.socket import Socket
from vsport.chardev.stdio import Stdio
from vsport.errors import UsageError
from vsport.option_table import Option, parse

__all__ = ["KINDS", "Chardev", "ChardevOwner", "LogFile", "Option", "make"]

KINDS: dict[str, type[Chardev]] = {cls.kind: cls for cls in (Socket, Pty, File, Pipe, Stdio, RingBuf, Null)}


def make(kind: str, id: str, options: Mapping[str, str]) -> Chardev:
    """A chardev from the texts of ``--chardev KIND,id=ID,NAME=VALUE,...``; raises UsageError, and opens nothing."""
    who = f"chardev {id}"
    if kind not in KINDS:
        raise UsageError(f"{who}: unknown kind {kind!r}; known: {', '.join(KINDS)}")
    cls = KINDS[kind]
    values = {name.replace("-", "_"): value for name, value in parse(cls.OPTIONS, options, who).items()}
    return cls(id, log=_log(who, values.pop("logfile"), values.pop("logappend")), **values)


def _log(who: str, path: str | None, append: bool) -> LogFile | None:
    if path is None and append:
        raise UsageError(f"{who}: logappend=on needs logfile=")
    return None if path is None else LogFile(path, append=append)
