"""Making the tree: mmdebstrap installs Debian, and what the two kinds of guest need is made out of that.

The build is all or nothing: it happens in TREE.partial, which becomes TREE in the end. What was downloaded is kept
beside it, so that a build that was interrupted does not download again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO, TextIO

from vsport.lab.tree import PACKAGES, SUITE, LabError, Tree, check_machine, stamp

__all__ = ["Progress", "build", "explain", "install_command", "relocated"]

_TOOLS = {"mmdebstrap": "mmdebstrap", "tar": "tar", "setpriv": "util-linux"}
_TOOLS_OF_USERS = {"newuidmap": "uidmap", "newgidmap": "uidmap"}
"""Program -> Debian package. An ordinary user installs in a user namespace with user ids of its own."""

_PIPES = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
_STILL_AFTER = 15.0
_TICK = 0.5

_MOUNT_POINTS = ("dev", "proc", "sys", "run", "tmp", "mnt")
_OF_THE_HOST = ("boot", "vsport", "usr/bin/linux.uml", "usr/bin/qemu-system-x86_64", "usr/share/qemu")
_USELESS_IN_QEMU = ("usr/lib/modules", "usr/lib/uml", "var/cache", "var/lib/apt")
_NOT_IN_THE_IMAGE = frozenset([*_MOUNT_POINTS, *_OF_THE_HOST, *_USELESS_IN_QEMU])
_IMAGE_SIZE = "2G"
"""Sparse: what counts is what is in it."""

_UNPACK_KERNEL = """\
import struct, sys
from compression import zstd
image = open(sys.argv[1], "rb").read()
payload = (image[0x1F1] + 1) * 512
offset, length = struct.unpack_from("<II", image, 0x248)
data = image[payload + offset : payload + offset + length]
open(sys.argv[2], "wb").write(zstd.ZstdDecompressor().decompress(data))
"""
"""In the tree's Python, which knows zstd; the offsets are those of the Linux/x86 boot protocol 2.08."""


_EXPIRED = re.compile(r"(Release file for \S+ is expired)")

_STEPS = {
    "I: running apt-get update": "reading the package lists",
    "I: downloading packages with apt": "downloading the base system",
    "I: extracting archives": "unpacking the base system",
    "I: installing essential packages": "installing the base system",
    "vsport: ": "",
    "I: installing remaining packages": "installing User Mode Linux, QEMU, Linux and Python",
    "I: cleaning package lists": "cleaning up",
    "I: creating tarball": "copying the tree",
}
"""What mmdebstrap or a hook of ours says -> what we say; nothing stands for the rest of the line."""


class Progress:
    """Says what is going on and for how long: on one line of a terminal, otherwise in a line now and then."""

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._clock = clock
        self._terminal = out.isatty()
        self._began = self._said = clock()
        self._line_is_open = False
        self.current = ""

    def step(self, what: str) -> None:
        """Something new begins."""
        self.current = what
        self._say()

    def tick(self) -> None:
        """It still goes on; to be called often."""
        if self._terminal or self._clock() - self._said >= _STILL_AFTER:
            self._say()

    def done(self, what: str) -> None:
        self.current = what
        self._say()
        self.stop()

    def stop(self) -> None:
        """There will be no more, for whatever reason."""
        if self._line_is_open:
            self._out.write("\n")
            self._line_is_open = False

    def _say(self) -> None:
        self._said = self._clock()
        line = f"[{self._said - self._began:4.0f} s] {self.current}"
        self._out.write(f"\r\x1b[K{line}" if self._terminal else f"{line}\n")
        self._line_is_open = self._terminal
        self._out.flush()


def build(
    tree: Path,
    *,
    aptopts: Sequence[str] = (),
    mirror: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> bool:
    """Makes `tree` unless it is there and current, or in any case with `force`; says whether it did. A second build at
    the same time waits for the first.

    `aptopts` go to apt, e.g. 'Acquire::Check-Valid-Until "false"'; without `mirror` it is the machine's own, or
    Debian's. Raises LabError.
    """
    check_machine()
    progress = progress or Progress(sys.stderr)
    place = tree.absolute().parent
    try:
        place.mkdir(parents=True, exist_ok=True)
        with _locked(place, progress):
            if Tree(tree).is_current() and not force:
                return False
            _check_tools()
            _Build(tree.absolute(), progress).make(aptopts, mirror)
        progress.done(f"the lab is in {place}")
    except OSError as exc:
        raise LabError(f"the lab cannot be built in {place}: {exc}") from exc
    finally:
        progress.stop()
    return True


@contextlib.contextmanager
def _locked(place: Path, progress: Progress) -> Iterator[None]:
    with (place / "lock").open("w") as lock:
        if not _lock(lock):
            progress.step("another build of this lab is under way: waiting for it")
            while not _lock(lock):
                time.sleep(_TICK)
                progress.tick()
        yield


def _lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class _Build:
    """One build, from nothing to a tree with a stamp."""

    def __init__(self, tree: Path, progress: Progress) -> None:
        self._place = tree.parent
        self._tree = tree
        self._partial = Tree(tree.with_name(f"{tree.name}.partial"))
        self._progress = progress
        self._log = self._place / "build.log"
        self._isolation = _isolation()
        # unshare ignores anything less; without it, mmdebstrap is given the time to clean up.
        self._stop = signal.SIGKILL if self._isolation else signal.SIGTERM

    def make(self, aptopts: Sequence[str], mirror: str | None) -> None:
        self._clear()
        with self._log.open("wb") as log:
            self._install(log, aptopts, mirror)
            # An ordinary user could neither copy nor remove some of it, such as /etc/shadow-.
            self._run(log, ["chmod", "--recursive", "u+rwX", str(self._partial.root)])
            self._partial.own.mkdir()
            for step in self._user_mode_linux, self._kernel, self._disk:
                step(log)
        self._partial.stamp_file.write_text(stamp())
        self._put_in_place()

    def _clear(self) -> None:
        """What an interrupted build left behind, except for the packages."""
        for left in self._partial.root, self._temporary:
            shutil.rmtree(left, ignore_errors=True)
        for needed in self._partial.root, self._packages, self._temporary:
            needed.mkdir(exist_ok=True)

    @property
    def _packages(self) -> Path:
        return self._place / "packages"

    @property
    def _temporary(self) -> Path:
        return self._place / "temporary"

    def _install(self, log: BinaryIO, aptopts: Sequence[str], mirror: str | None) -> None:
        """Debian, by way of a tar stream: so every file belongs to us, also where mmdebstrap has to use other ids."""
        self._progress.step("starting")
        command = [*self._isolation, *install_command(self._packages, aptopts, mirror)]
        extract = ["tar", "--extract", "--no-same-owner", "--exclude=./dev/*", "--directory", str(self._partial.root)]
        with (
            self._started(command, **_PIPES) as source,
            self._started(extract, stdin=source.stdout, stderr=log) as sink,
        ):
            assert source.stdout
            assert source.stderr
            source.stdout.close()
            self._follow(source.stderr, log)
        if source.returncode or sink.returncode:
            raise LabError(f"{explain(self._log.read_text(errors='replace'))}; the whole story is in {self._log}")

    @contextlib.contextmanager
    def _started(self, command: Sequence[str], **streams: Any) -> Iterator[subprocess.Popen[bytes]]:
        """A process that is ended properly if we are interrupted."""
        environment = os.environ | {"INITRD": "No", "LC_ALL": "C.UTF-8"}
        if os.geteuid() == 0:
            # An ordinary user's other ids may not reach this place, so for those it stays the system's.
            environment["TMPDIR"] = str(self._temporary)
        tied_to_us = ["setpriv", "--pdeathsig", self._stop.name.removeprefix("SIG"), *command]
        process: subprocess.Popen[bytes] = subprocess.Popen(tied_to_us, env=environment, **streams)
        try:
            yield process
        except BaseException:
            process.send_signal(self._stop)
            raise
        finally:
            process.wait()

    def _follow(self, messages: IO[bytes], log: BinaryIO) -> None:
        """Keeps what mmdebstrap says, and tells what it means."""
        line = b""
        while True:
            if not select.select([messages], [], [], _TICK)[0]:
                self._progress.tick()
            elif piece := os.read(messages.fileno(), 1 << 16):
                log.write(piece)
                log.flush()
                *lines, line = (line + piece).split(b"\n")
                for complete in lines:
                    self._tell(complete.decode(errors="replace"))
            else:
                return

    def _tell(self, line: str) -> None:
        for begin, meaning in _STEPS.items():
            if line.startswith(begin):
                self._progress.step(meaning or line.removeprefix(begin))

    def _run(self, log: BinaryIO, command: Sequence[str], **environment: str) -> None:
        """Raises LabError if the command fails."""
        settings = [f"{name}={value}" for name, value in environment.items()]
        with self._started(["env", *settings, *command], stdout=log, stderr=log) as process:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_TICK)
                self._progress.tick()
        if process.returncode:
            raise LabError(f"making the lab failed at: {self._progress.current}; the whole story is in {self._log}")

    def _user_mode_linux(self, log: BinaryIO) -> None:
        tree = self._partial
        self._progress.step("preparing User Mode Linux")
        tree.uml.write_bytes(relocated((tree.root / "usr/bin/linux.uml").read_bytes()))
        tree.uml.chmod(0o755)
        for modules in (tree.root / "usr/lib/uml/modules").iterdir():
            (tree.root / "usr/lib/modules" / modules.name).symlink_to(f"../uml/modules/{modules.name}")

    def _kernel(self, log: BinaryIO) -> None:
        tree = self._partial
        self._progress.step("unpacking QEMU's kernel")
        [packed] = (tree.root / "boot").glob("vmlinuz-*")
        command = [*tree.program("usr/bin/python3"), "-S", "-c", _UNPACK_KERNEL, str(packed), str(tree.kernel)]
        self._run(log, command, PYTHONHOME=f"{tree.root}/usr")

    def _disk(self, log: BinaryIO) -> None:
        tree = self._partial
        self._progress.step("making QEMU's disk")
        content = tree.own / "root"
        shutil.copytree(tree.root, content, symlinks=True, copy_function=os.link, ignore=_left_out(tree.root))
        for name in _MOUNT_POINTS:
            (content / name).mkdir()
        options = ["-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d", str(content), str(tree.disk), _IMAGE_SIZE]
        self._run(log, [*tree.program("usr/sbin/mke2fs"), *options], MKE2FS_CONFIG=f"{tree.root}/etc/mke2fs.conf")
        shutil.rmtree(content)

    def _put_in_place(self) -> None:
        old = self._tree.with_name(f"{self._tree.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            self._tree.rename(old)
        self._partial.root.rename(self._tree)
        for left in old, self._temporary:
            shutil.rmtree(left, ignore_errors=True)


def _isolation() -> list[str]:
    """What takes away everything that mmdebstrap has mounted or started, if it is ended in the middle of its work.

    For an ordinary user mmdebstrap makes namespaces itself; and a root that may not make any may not mount either.
    """
    if os.geteuid() != 0:
        return []
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return command if subprocess.run([*command, "true"], capture_output=True).returncode == 0 else []


def install_command(packages: Path, aptopts: Sequence[str], mirror: str | None) -> list[str]:
    """mmdebstrap's command line; it writes the tree to its standard output as a tar stream."""
    kept = shlex.quote(str(packages))
    apt_get = 'APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-get --yes --download-only install'
    keep = f"sync-out /var/cache/apt/archives {kept}"
    hooks = [
        ("setup", 'mkdir -p "$1"/var/cache/apt/archives'),
        ("setup", f"sync-in {kept} /var/cache/apt/archives"),
        ("extract", keep),
    ]
    # The packages are downloaded some at a time, so that an interruption costs no more than some.
    for group in _in_groups(PACKAGES):
        names = " ".join(group)
        hooks += [("essential", f"echo 'vsport: downloading {names}' >&2; {apt_get} {names} >&2"), ("essential", keep)]
    return [
        "mmdebstrap",
        f"--mode={'root' if os.geteuid() == 0 else 'unshare'}",
        "--variant=minbase",
        "--format=tar",
        f"--include={','.join(PACKAGES)}",
        *(f"--aptopt={option}" for option in aptopts),
        *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "info", "locale", "man")),
        "--skip=essential/unlink",
        *(f"--{stage}-hook={command}" for stage, command in hooks),
        SUITE,
        "-",
        *([mirror] if mirror else []),
    ]


def _in_groups(names: Sequence[str], size: int = 3) -> Iterator[Sequence[str]]:
    for start in range(0, len(names), size):
        yield names[start : start + size]


def explain(log: str) -> str:
    """What went wrong, in one line, from what mmdebstrap and apt said."""
    if expired := _EXPIRED.search(log):
        return (
            f"{expired[1]}, as it is on a frozen copy of a mirror; to use it all the same: "
            "export VSPORT_LAB_APTOPT='Acquire::Check-Valid-Until \"false\"' (or pass that as --aptopt)"
        )
    if "No space left on device" in log:
        return "no space left on device: the lab needs 2 GB where it is kept, and 1 GB in $TMPDIR while it is made"
    errors = [line for line in log.splitlines() if line.startswith("E: ")] or log.split("\n")[-2:-1]
    return f"mmdebstrap failed: {errors[0].removeprefix('E: ') if errors else 'it said nothing'}"


def relocated(program: bytes) -> bytes:
    """A program that looks for its loader below the current directory instead of the root directory.

    User Mode Linux lays its memory out around its own image, so that the loader cannot start it, as it does the other
    programs of a tree whose C library is newer than the host's. Raises LabError.
    """
    absolute = b"/lib64/ld-linux-x86-64.so.2\0"
    if program.count(absolute) != 1:
        raise LabError("User Mode Linux does not name its loader where it should: this Debian is not supported")
    return program.replace(absolute, absolute[1:] + b"\0")


def _left_out(top: Path) -> Callable[[str, list[str]], set[str]]:
    def ignore(directory: str, names: list[str]) -> set[str]:
        inside = Path(directory).relative_to(top)
        return {name for name in names if str(inside / name) in _NOT_IN_THE_IMAGE}

    return ignore


def _check_tools() -> None:
    """Raises LabError that names what to install."""
    needed = _TOOLS if os.geteuid() == 0 else _TOOLS | _TOOLS_OF_USERS
    missing = [program for program in needed if shutil.which(program) is None]
    if missing:
        packages = " ".join(sorted({needed[program] for program in missing}))
        raise LabError(f"{', '.join(missing)} not found: on Debian, run as root: apt-get install {packages}")
    if os.geteuid() != 0:
        _check_ids()


def _check_ids() -> None:
    """An ordinary user needs other user ids, and a kernel that lets it use them. Raises LabError."""
    user = pwd.getpwuid(os.geteuid()).pw_name
    for kind in "uid", "gid":
        if not _has_ids(Path(f"/etc/sub{kind}"), user):
            raise LabError(
                f"{user} has no entry in /etc/sub{kind}: run as root: "
                f"usermod --add-sub{kind}s 100000-165535 {user}, or build the lab as root"
            )
    if subprocess.run(["unshare", "--user", "true"], capture_output=True).returncode:
        raise LabError("this system does not let ordinary users make user namespaces: build the lab as root")


def _has_ids(table: Path, user: str) -> bool:
    try:
        return any(line.startswith((f"{user}:", f"{os.geteuid()}:")) for line in table.read_text().splitlines())
    except OSError:
        return False
