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
def daemon(socket_path: Path, options: Sequence[str], *, within: float = 60.0) -> Iterator[subprocess.Popen[bytes]]:
    """Runs `vsport serve` with `options`, from when it listens on `socket_path` until the context is left, by SIGTERM.

    Its messages go to our standard error. Raises LabError if it does not listen `within` so many seconds. It is not
    tried by connecting: it serves one front end, and that would be it.
    """
    command = [sys.executable, "-m", "vsport", "serve", "--socket-path", str(socket_path), *options]
    with subprocess.Popen(tied_to_us(command), stdin=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            _wait_for(socket_path, process, time.monotonic() + within)
            yield process
        finally:
            _end(process)


def _wait_for(socket_path: Path, process: subprocess.Popen[bytes], deadline: float) -> None:
    while not socket_path.is_socket():
        if process.poll() is not None:
            raise LabError(f"the device did not start: vsport serve ended with exit code {process.returncode}")
        if time.monotonic() > deadline:
            raise LabError("the device did not start in time: vsport serve does not listen yet")
        time.sleep(_LOOK_AGAIN)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_ENDS_WITHIN)
    except subprocess.TimeoutExpired:
        process.kill()
