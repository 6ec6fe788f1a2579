"""`vsport serve` as a child process, for guests to attach to."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vsport.lab.run import tied_to_us
from vsport.lab.tree import LabError

__all__ = ["daemon"]

_LOOK_AGAIN = 0.01
_ENDS_WITHIN = 5.0


@contextmanager
def daemon(
    socket_path: Path, options: Sequence[str], log: Path, *, within: float = 60.0
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs `vsport serve` with `options`, from when it listens on `socket_path` until the context is left, by SIGTERM.

    What it says goes to the file `log`. Raises LabError if it does not listen `within` so many seconds. That is not
    found out by connecting: it serves one front end, and this would be it.
    """
    command = [sys.executable, "-m", "vsport", "serve", "--socket-path", str(socket_path), *options]
    with log.open("wb") as output:
        process = subprocess.Popen(
            tied_to_us(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        if not _listens(socket_path, process, time.monotonic() + within):
            raise LabError(f"the device did not start: {_last_line(log) or 'vsport serve does not listen yet'}")
        yield process
    finally:
        _end(process)


def _listens(socket_path: Path, process: subprocess.Popen[bytes], deadline: float) -> bool:
    while not socket_path.is_socket():
        if process.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_AGAIN)
    return True


def _last_line(log: Path) -> str:
    return "".join(log.read_text(errors="replace").splitlines()[-1:])


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_ENDS_WITHIN)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
