"""Damaged snapshots: each is made from a whole one and a seed, and has a right checksum."""

from __future__ import annotations

import random
import struct
import zlib
from pathlib import Path

from snapshot_files import EXAMPLE

from vsport.document import DocumentError
from vsport.snapshot import Snapshot
from vsport.snapshot_report import snapshot_report

_FRAME_SIZE = 20
_WHOLE = EXAMPLE.encode()


def snapshot_case(chance: random.Random) -> bool:
    """DocumentError in one line, or a snapshot that can be told and comes out as it went in; says whether it did."""
    frame, body = bytearray(_WHOLE[:_FRAME_SIZE]), bytearray(_WHOLE[_FRAME_SIZE:])
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(body))
        body[at] = chance.choice((chance.randrange(256), *b'0129-".,:{}[]\\ '))
    struct.pack_into("<I", frame, _FRAME_SIZE - 4, zlib.crc32(body))
    try:
        snapshot = Snapshot.decode(bytes(frame) + bytes(body))
    except DocumentError as exc:
        assert str(exc).isprintable(), str(exc)
        assert len(str(exc)) < 1000
        return False
    assert Snapshot.decode(snapshot.encode()) == snapshot
    report = snapshot_report(Path("file"), snapshot, len(_WHOLE))
    assert all(line.isprintable() for line in report.text.split("\n"))
    assert report.json_lines().isascii()
    return True
