"""Many virtual machines at once, in processes of their own: each has booted, and is idle."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["grazing"]

_GUESTS_OF_A_PROCESS = 400
"""Each has some 20 descriptors, with all queues up to ten times as many."""
QUEUE_SIZE = 128
"""Of the queues of ports that do not exist: QEMU's for this device."""


@contextlib.contextmanager
def grazing(paths: Sequence[Path], *, all_queues: bool = False) -> Iterator[None]:
    """A virtual machine at each of the back ends that listen at ``paths``; all of them have opened their ports.

    With ``all_queues`` those of ports that do not exist run, too, as Linux has it.
    """
    guests = _GUESTS_OF_A_PROCESS // (10 if all_queues else 1)
    with contextlib.ExitStack() as stack:
        herds = [
            stack.enter_context(_process(paths[at : at + guests], all_queues)) for at in range(0, len(paths), guests)
        ]
        for herd in herds:
            assert herd.stdout is not None
            assert herd.stdout.readline() == b"ready\n", "a virtual machine did not boot"
        yield


@contextlib.contextmanager
def _process(paths: Sequence[Path], all_queues: bool) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, __file__, str(int(all_queues)), *map(str, paths)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def main(all_queues: bool, paths: Sequence[str]) -> None:
    """Boots a guest at each path, says that it is ready, and sleeps until its standard input ends."""
    from daemons import Machine

    from vsport._ring import DriverQueue

    with contextlib.ExitStack() as stack:
        for path in paths:
            machine = stack.enter_context(Machine(Path(path)))
            machine.until(lambda machine=machine: machine.guest.ports)  # type: ignore[misc]
            for port in machine.guest.ports.values():
                port.open()
            for index in range(machine.front_end.queue_count()) if all_queues else ():
                if index not in machine.front_end.rings:
                    gpa = machine.guest.allocate(DriverQueue.footprint(QUEUE_SIZE))
                    machine.attachment.start_queue(index, DriverQueue(machine.guest.memory, gpa, QUEUE_SIZE))
        print("ready", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1] == "1", sys.argv[2:])
