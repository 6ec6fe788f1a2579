"""Many virtual machines at once, in processes of their own: each has booted, and is idle."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["grazing"]

_GUESTS_OF_A_PROCESS = 400
"""Each has some 20 descriptors."""


@contextlib.contextmanager
def grazing(paths: Sequence[Path]) -> Iterator[None]:
    """A virtual machine at each of the back ends that listen at ``paths``; all of them have opened their ports."""
    with contextlib.ExitStack() as stack:
        herds = [
            stack.enter_context(_process(paths[at : at + _GUESTS_OF_A_PROCESS]))
            for at in range(0, len(paths), _GUESTS_OF_A_PROCESS)
        ]
        for herd in herds:
            assert herd.stdout is not None
            assert herd.stdout.readline() == b"ready\n", "a virtual machine did not boot"
        yield


@contextlib.contextmanager
def _process(paths: Sequence[Path]) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, __file__, *map(str, paths)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def main(paths: Sequence[str]) -> None:
    """Boots a guest at each path, says that it is ready, and sleeps until its standard input ends."""
    from daemons import Machine

    with contextlib.ExitStack() as stack:
        for path in paths:
            machine = stack.enter_context(Machine(Path(path)))
            machine.until(lambda machine=machine: machine.guest.ports)  # type: ignore[misc]
            for port in machine.guest.ports.values():
                port.open()
        print("ready", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1:])
