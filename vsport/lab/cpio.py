"""A cpio archive, the form in which Linux takes its first file system (the kernel's `newc` format)."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

__all__ = ["Archive"]

_MAGIC = "070701"


class Archive:
    """Collects files, all of which belong to root; `bytes(archive)` is the archive."""

    def __init__(self) -> None:
        self._entries: list[bytes] = []

    def directory(self, name: str) -> None:
        self._add(name, stat.S_IFDIR | 0o755, b"")

    def file(self, name: str, content: bytes, mode: int = 0o644) -> None:
        self._add(name, stat.S_IFREG | mode, content)

    def tree(self, top: Path, name: str) -> None:
        """Everything below `top`; a link stays a link, and what is neither file nor directory is left out."""
        for path in _walk(top):
            mode = path.lstat().st_mode
            inside = f"{name}/{path.relative_to(top)}"
            if stat.S_ISDIR(mode):
                self._add(inside, mode, b"")
            elif stat.S_ISREG(mode):
                self._add(inside, mode, path.read_bytes())
            elif stat.S_ISLNK(mode):
                self._add(inside, mode, os.readlink(path).encode())

    def __bytes__(self) -> bytes:
        return b"".join(self._entries) + _entry("TRAILER!!!", 0, 0, b"")

    def _add(self, name: str, mode: int, content: bytes) -> None:
        self._entries.append(_entry(name, len(self._entries) + 1, mode, content))


def _walk(top: Path) -> Iterator[Path]:
    """Directories before what is in them."""
    for path in sorted(top.iterdir()):
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)


def _entry(name: str, inode: int, mode: int, content: bytes) -> bytes:
    # inode, mode, uid, gid, links, mtime, size, device (2), special device (2), length of name, checksum
    numbers = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name.encode()) + 1, 0)
    head = _MAGIC + "".join(f"{number:08x}" for number in numbers) + name + "\0"
    return _padded(head.encode()) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
