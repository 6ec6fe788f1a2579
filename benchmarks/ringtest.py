"""Linux's own ring benchmark, tools/virtio/ringtest, as a peer: found, compiled and run, if its source is installed.

Distributions ship the kernel's source as a package (on Debian: ``apt-get install linux-source``). Two threads play
driver and device: one adds buffers to a ring and takes them back, the other uses them as soon as they are there, and
no bytes are moved. ``virtio_ring_0_9`` has the layout of a split virtqueue, ``ring`` one like the packed one's.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

PACKAGED = Path("/usr/src")
DIRECTORY = "/tools/virtio/ringtest/"
PROGRAMS = ("virtio_ring_0_9", "ring")
FLAGS = ("-pthread", "-O2", "-flto", "-fwhole-program")
"""As its own Makefile has them."""
CYCLES = 2_000_000


class Absent(Exception):
    """The peer is not to be had here; says why, and what to do."""


def tarball() -> Path:
    """The newest kernel source that is installed; raises Absent."""
    found = sorted(PACKAGED.glob("linux-source-*.tar.xz"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise Absent(f"no {PACKAGED}/linux-source-*.tar.xz for ringtest (on Debian: apt-get install linux-source)")
    return found[-1]


def build(directory: Path) -> dict[str, Path]:
    """Unpacks and compiles the programs in ``directory``; their paths by name. Takes some seconds; raises Absent.

    Always compiled with the flags above, whatever CFLAGS are for us.
    """
    source, compiler = tarball(), shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise Absent("no C compiler for ringtest (on Debian: apt-get install gcc libc6-dev)")
    unpack(source, directory)
    for program in PROGRAMS:
        command = [compiler, *FLAGS, f"{program}.c", "main.c", "-o", program]
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
        if done.returncode:
            raise Absent(f"ringtest of {source} does not compile here: {done.stderr.strip().splitlines()[-1]}")
    return {program: directory / program for program in PROGRAMS}


def unpack(source: Path, directory: Path) -> None:
    """Writes ringtest's files, and no others, to ``directory``; raises Absent."""
    with tarfile.open(source, "r|xz") as archive:
        found = False
        for member in archive:
            if DIRECTORY in member.name and member.isfile():
                found = True
                (directory / Path(member.name).name).write_bytes(archive.extractfile(member).read())
            elif found:
                return  # a directory's files are one after the other
    raise Absent(f"{source} has no {DIRECTORY}")


def run(
    program: Path,
    *,
    outstanding: int | None = None,
    ring_size: int = 256,
    cycles: int = CYCLES,
    cores: tuple[int, int] = (0, 1),
) -> float:
    """Nanoseconds a buffer, both sides polling; ``cores`` are the device's and the driver's.

    ``outstanding`` is how many buffers the driver has under way at most: 1 is ping-pong. What starting the program
    takes is measured, too, and taken off. It says nothing itself, and fails if a buffer is lost.
    """
    arguments = ["--host-affinity", str(cores[0]), "--guest-affinity", str(cores[1]), "--ring-size", str(ring_size)]
    if outstanding is not None:
        arguments += ["--outstanding", str(outstanding)]

    def seconds(count):
        started = time.perf_counter()
        subprocess.run([program, *arguments, "--run-cycles", str(count)], check=True, timeout=60)
        return time.perf_counter() - started

    start = seconds(1)
    return (seconds(cycles + 1) - start) / cycles * 1e9


def main() -> str | None:
    """A look at it from the command line; returns what is wrong, for sys.exit()."""
    try:
        directory = Path(sys.argv[1])
        directory.mkdir(exist_ok=True)
        built = {name: directory / name for name in PROGRAMS}
        if not all(path.exists() for path in built.values()):
            built = build(directory)
    except IndexError:
        return f"usage: {sys.argv[0]} DIRECTORY (where ringtest is compiled, if it is not there yet)"
    except Absent as absent:
        return str(absent)
    for name, program in built.items():
        for outstanding in (1, 64, 256):
            print(f"{name:<16} {outstanding:>3} outstanding: {run(program, outstanding=outstanding):7.1f} ns a buffer")
    return None


if __name__ == "__main__":
    sys.exit(main())
