"""A device served from this process, for those who want to watch it and to change it while a guest runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from vsport.host import Host
from vsport.loop import Loop
from vsport.options import Configuration
from vsport.vhost_user.server import Server

__all__ = ["Served"]

_T = TypeVar("_T")
_TURN_SECONDS = 0.02
"""How long the loop sleeps at most before it looks for calls from other threads."""


class Served:
    """`vsport serve` in a thread: entered, it listens on ``socket_path``. Raises UsageError, HostError."""

    def __init__(self, configuration: Configuration, socket_path: Path) -> None:
        self.loop = Loop()
        self.host = Host(self.loop, configuration)
        self.server = Server(self.host.device, self.loop)
        self.socket_path = socket_path
        self._thread = threading.Thread(target=self._run, name="vsport-served", daemon=True)
        self._ending = threading.Event()

    def __enter__(self) -> Self:
        try:
            self.host.open()
            self.server.listen(str(self.socket_path))
        except BaseException:
            self._close()
            raise
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join()
        self._close()

    def call(self, what: Callable[[Host], _T]) -> _T:
        """Does ``what`` in the thread that the device belongs to, and gives back what it returns or raises."""
        done: Future[_T] = Future()

        def do() -> None:
            try:
                done.set_result(what(self.host))
            except BaseException as exc:
                done.set_exception(exc)

        self.loop.call_soon(do)
        return done.result()

    def _run(self) -> None:
        while not self._ending.is_set():
            self.loop.run_once(_TURN_SECONDS)

    def _close(self) -> None:
        self.server.close()
        self.host.close()
        self.loop.close()
