"""Where the lab is kept, what is in it, and whether it is the one that this version needs."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vsport.errors import HostError

__all__ = ["PACKAGES", "SUITE", "LabError", "Tree", "default_directory", "stamp"]

SUITE = "forky"
"""The first Debian whose User Mode Linux starts on processors with AMX, and whose QEMU has R-VU-104's device."""

PACKAGES = (
    "user-mode-linux",
    "qemu-system-x86",
    "linux-image-cloud-amd64",
    "python3",
    "python3-pyudev",
    "kmod",
    "udev",
    "busybox-static",
    "socat",
    "qemu-guest-agent",
    "e2fsprogs",
)

_RECIPE = 1
"""To be raised when build() makes something else out of the same packages."""

_TRIPLET = "x86_64-linux-gnu"


class LabError(HostError):
    """The lab cannot do what was asked for; the message says what to do."""


def default_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """$VSPORT_LAB, or `vsport/lab` in the user's cache directory."""
    if place := environment.get("VSPORT_LAB"):
        return Path(place)
    cache = environment.get("XDG_CACHE_HOME") or Path(environment.get("HOME") or Path.home(), ".cache")
    return Path(cache, "vsport", "lab")


def stamp() -> str:
    """Names the recipe that a tree was made by: another stamp, another tree."""
    recipe = "\n".join([str(_RECIPE), SUITE, *PACKAGES])
    return hashlib.sha256(recipe.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Tree:
    """A Debian tree that guests boot from; `root` is its top directory."""

    root: Path

    @property
    def own(self) -> Path:
        """What build() adds to the distribution's files."""
        return self.root / "vsport"

    @property
    def stamp_file(self) -> Path:
        """Written last of all."""
        return self.own / "stamp"

    @property
    def uml(self) -> Path:
        """User Mode Linux, which finds its loader below the current directory: see build.relocate()."""
        return self.own / "linux.uml"

    @property
    def kernel(self) -> Path:
        """The unpacked kernel that QEMU starts without firmware (PVH)."""
        return self.own / "vmlinux"

    @property
    def disk(self) -> Path:
        """The tree as an ext4 image, which QEMU's guest has as its root file system."""
        return self.own / "root.ext4"

    @property
    def libraries(self) -> Path:
        return self.root / "usr/lib" / _TRIPLET

    def program(self, path: str) -> list[str]:
        """The start of a command line that runs a program of the tree on this machine, with the tree's libraries."""
        loader = self.libraries / "ld-linux-x86-64.so.2"
        return [str(loader), "--library-path", str(self.libraries), str(self.root / path)]

    def is_current(self) -> bool:
        """Complete, and made by this version's recipe."""
        try:
            return self.stamp_file.read_text() == stamp()
        except OSError:
            return False

    def check(self) -> None:
        """Raises LabError, with the command that helps, unless guests can boot from this tree."""
        for trouble in self._troubles():
            raise LabError(f"{trouble}: run {self._remedy()}")

    def _troubles(self) -> Iterator[str]:
        check_machine()
        if not self.root.is_dir():
            yield f"there is no lab in {self.root.parent}"
        if not self.is_current():
            yield f"the lab in {self.root.parent} was made by another version of vsport"

    def _remedy(self) -> str:
        place = self.root.parent
        return "vsport lab build" + ("" if place == default_directory() else f" --dir {place}")


def check_machine() -> None:
    """Raises LabError where the lab's kernels cannot run at all."""
    if (system := (platform.system(), platform.machine())) != ("Linux", "x86_64"):
        raise LabError(f"the lab runs on Linux on x86-64 only, and this is {' on '.join(system)}")
