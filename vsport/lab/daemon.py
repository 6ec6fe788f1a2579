"""`vsport serve` as a child process, for guests to attach to, and the processes that take over from it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vsport.lab.run import tied_to_us
from vsport.lab.tree import LabError

__all__ = ["daemon", "successor"]

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
    process = _start(["--socket-path", str(socket_path), *options], log)
    try:
        if not _listens(socket_path, process, time.monotonic() + within):
            raise LabError(f"the device did not start: {_last_line(log) or 'vsport serve does not listen yet'}")
        yield process
    finally:
        _end(process)


@contextmanager
def successor(
    before: subprocess.Popen[bytes], offer: Path, options: Sequence[str], log: Path, *, within: float = 60.0
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a `vsport serve` that takes over from `before`, which offers its device at `offer`, from when `before` has
    ended until the context is left, by SIGTERM.

    What it says goes to the file `log`. Raises LabError if `before` does not end well `within` so many seconds.
    """
    process = _start(["--takeover", str(offer), *options], log)
    try:
        if not _ends_well(before, process, time.monotonic() + within):
            raise LabError(f"the device was not handed over: {_last_line(log) or 'nobody says why'}")
        yield process
    finally:
        _end(process)


def _start(options: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            tied_to_us([sys.executable, "-m", "vsport", "serve", *options]),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _ends_well(before: subprocess.Popen[bytes], process: subprocess.Popen[bytes], deadline: float) -> bool:
    while before.poll() is None:
        if process.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_AGAIN)
    return before.returncode == 0


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
