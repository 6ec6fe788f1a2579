"""What both kinds of guest are booted from: the run's own directory, and the files that the guest finds in /mnt."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from vsport.lab.tree import LabError, Tree

__all__ = ["Machine"]

_MODULES = ("wire.py",)
_PROGRAMS = ("vsport-open",)
_DATA = ("agent.py", "init", "init-qemu", "fstab")


@dataclass(frozen=True)
class Machine:
    """One guest that is to be booted. `directory` is the run's own, short and without spaces or commas."""

    tree: Tree
    directory: Path
    memory_mib: int
    channel_fd: int
    """One end of a stream socket, which becomes a serial line of the guest."""
    socket_path: Path | None
    """Where a vhost-user back end listens; None for a guest without our device."""
    share: Path | None
    max_ports: int
    extra_args: Sequence[str]

    @property
    def payload(self) -> Path:
        """What the guest sees as /mnt."""
        return self.directory / "mnt"

    @property
    def console(self) -> Path:
        """The kernel's messages."""
        return self.directory / "console.log"

    @property
    def socket(self) -> Path:
        """The back end's socket under a name that is short enough for a kernel's command line."""
        return self.directory / "device.sock"

    @property
    def tree_link(self) -> Path:
        return self.directory / "tree"

    @property
    def share_link(self) -> Path:
        return self.directory / "share"

    def prepare(self, ports: Sequence[str]) -> None:
        """Makes the directory's files; the guest waits for `ports`. Raises LabError."""
        self.tree_link.symlink_to(self.tree.root.absolute())
        if self.socket_path is not None:
            self.socket.symlink_to(self.socket_path.absolute())
        if self.share is not None:
            self.share_link.symlink_to(self.share.absolute())
        self._fill(self.payload / "vsport", ports)

    def _fill(self, top: Path, ports: Sequence[str]) -> None:
        (top / "bin").mkdir(parents=True)
        (self.payload / "share").mkdir()
        package = resources.files("vsport.lab")
        for place, names in (top, _DATA), (top / "bin", _PROGRAMS):
            for name in names:
                target = place / name
                target.write_bytes(package.joinpath("guest", name).read_bytes())
                target.chmod(0o755)
        for name in _MODULES:
            (top / name).write_bytes(package.joinpath(name).read_bytes())
        (top / "ports.json").write_text(json.dumps(list(ports)))
        shutil.copytree(guest_tools(), top / "guest_tools", ignore=shutil.ignore_patterns("__pycache__"))


def guest_tools() -> Path:
    """Where the package of that name is; it is found without being imported. Raises LabError."""
    spec = importlib.util.find_spec("guest_tools")
    if spec is None or spec.origin is None:
        raise LabError("the package guest_tools is not installed beside vsport: pip install vsport")
    return Path(spec.origin).parent
