"""The wait loop: descriptors, timers and signals of one thread; while it waits, a Poller moves the bytes of flows.

asyncio is not used here on purpose: while bytes just move nobody wakes the interpreter at all, and what does wake it
costs one callback, not a trip through a scheduler.
"""

from __future__ import annotations

import heapq
import itertools
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from vsport._poll import Flow, Poller
from vsport._ring import DeviceQueue

__all__ = ["HUP", "RDHUP", "READ", "WRITE", "Loop", "Timer"]

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
RDHUP = select.EPOLLRDHUP
"""The peer of a stream socket will send nothing more."""
HUP = select.EPOLLHUP | select.EPOLLERR
"""Always reported, asked for or not."""

_FEW_TIMERS = 64


class Timer:
    """A call that is due once; ``cancel()`` forgets it."""

    __slots__ = ("callback", "due")

    def __init__(self, due: float, callback: Callable[[], None]) -> None:
        self.due = due
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Loop:
    """Waits for what was asked for and calls back, all in the thread that calls run().

    After a wait of less than ``poll_max_ns`` nanoseconds, and if a guest has sent something, the next one looks for so
    long before it sleeps (0: never).
    An exception of a callback ends the round and passes through run(); nothing that is due gets lost by it.
    """

    def __init__(self, *, poll_max_ns: int = 0) -> None:
        self._poller = Poller()
        self._poller.spin_max = poll_max_ns
        self._watched: dict[int, tuple[Any, ...]] = {}
        """By descriptor: what is called, and with which arguments before the events."""
        self._timers: list[tuple[float, int, Timer]] = []
        self._sweep_at = _FEW_TIMERS
        self._order = itertools.count()
        self._soon: deque[Callable[[], None]] = deque()
        self._signals: dict[int, Callable[[], None]] = {}
        self._old_handlers: dict[int, Any] = {}
        self._old_wakeup = -1
        self._wakeup: tuple[socket.socket, socket.socket] | None = None
        self._stopped = False

    # -- descriptors -----------------------------------------------------------------------------------------------

    def watch(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """Calls ``callback(ready)`` while one of ``events``, or HUP, is ready at ``fd`` (level triggered).

        A second call for the same ``fd`` replaces the first. Raises PermissionError if ``fd`` is always ready
        (a regular file): epoll cannot wait for those.
        """
        self._poller.watch(fd, events)
        self._watched[fd] = (callback,)

    def watch_kick(self, fd: int, queue: DeviceQueue, callback: Callable[[int, int, int], None]) -> None:
        """Calls ``callback(queue.index, fd, ready)`` for kicks of ``queue`` that no flow of it sees to by itself."""
        self._poller.watch_kick(fd, queue)
        self._watched[fd] = (callback, queue.index, fd)

    def unwatch(self, fd: int) -> None:
        """Forgets ``fd``, and what flows through it; call it before closing the descriptor. Unknown ones are fine."""
        self._watched.pop(fd, None)
        self._poller.unwatch(fd)

    def ignore(self, fd: int) -> None:
        """Does not call back for ``fd`` any more; what flows through it goes on."""
        self._watched.pop(fd, None)
        self._poller.ignore(fd)

    # -- bytes -----------------------------------------------------------------------------------------------------

    def drain(self, queue: DeviceQueue, callback: Callable[[], None]) -> Flow:
        """A flow, which has to be started, from ``queue`` into a descriptor."""
        return Flow(self._poller, queue, callback, fills=False)

    def fill(self, queue: DeviceQueue, callback: Callable[[], None]) -> Flow:
        """A flow, which has to be started, from a descriptor into ``queue``."""
        return Flow(self._poller, queue, callback, fills=True)

    # -- time ------------------------------------------------------------------------------------------------------

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        """Calls back once, ``delay`` seconds from now, in a later round than the present one."""
        timer = Timer(time.monotonic() + delay, callback)
        if len(self._timers) >= self._sweep_at:
            self._sweep()
        heapq.heappush(self._timers, (timer.due, next(self._order), timer))
        return timer

    def _sweep(self) -> None:
        """Drops cancelled timers: those that are due in an hour would pile up until then."""
        self._timers = [entry for entry in self._timers if entry[2].callback is not None]
        heapq.heapify(self._timers)
        self._sweep_at = max(_FEW_TIMERS, 2 * len(self._timers))

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Calls back at the end of this round, or of the next one if this one has come to such calls."""
        self._soon.append(callback)

    # -- signals ---------------------------------------------------------------------------------------------------

    def on_signal(self, signum: int, callback: Callable[[], None]) -> None:
        """Calls back in the loop after ``signum`` arrived; undone by close().

        Raises ValueError outside the main thread, OSError for a signal that cannot be caught.
        """
        # The handler itself does nothing: the interpreter writes the number to the wake-up descriptor.
        old = signal.signal(signum, lambda *_: None)
        self._old_handlers.setdefault(signum, signal.SIG_DFL if old is None else old)
        self._signals[signum] = callback
        if self._wakeup is None:
            self._open_wakeup()

    def _open_wakeup(self) -> None:
        self._wakeup = socket.socketpair()
        for end in self._wakeup:
            end.setblocking(False)
        self._old_wakeup = signal.set_wakeup_fd(self._wakeup[1].fileno(), warn_on_full_buffer=False)
        self.watch(self._wakeup[0].fileno(), READ, self._signal_arrived)

    def _signal_arrived(self, _ready: int) -> None:
        assert self._wakeup is not None
        for signum in dict.fromkeys(self._wakeup[0].recv(4096)):  # each once, in the order of arrival
            if signum in self._signals:
                self._signals[signum]()

    # -- running ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Runs until stop() is called; returns at once if it was called since the last run()."""
        while not self._stopped:
            self.run_once(None)
        self._stopped = False

    def run_until(self, condition: Callable[[], object], timeout: float | None) -> bool:
        """Runs until ``condition()`` is true, ``timeout`` seconds have passed (None: no limit), or stop() was called.

        Says whether the condition is true. A stop() stays in force for the run() that follows.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not condition():
            left = None if deadline is None else deadline - time.monotonic()
            if self._stopped or (left is not None and left <= 0):
                return False
            self.run_once(left)
        return True

    def stop(self) -> None:
        """Makes run() return after the present round."""
        self._stopped = True

    def run_once(self, timeout: float | None) -> None:
        """One round: waits at most ``timeout`` seconds (None: for ever) for something to do, and does it."""
        ready, flows = self._poller.poll(self._patience(timeout))
        # A callback may unwatch, close and reuse the descriptor of a later one: whoever was not watching it when it
        # became ready is not called.
        for fd, events, watched in [(fd, events, self._watched.get(fd)) for fd, events in ready]:
            if watched is not None and self._watched.get(fd) is watched:
                watched[0](*watched[1:], events)
        for flow in flows:
            if flow.callback is not None:  # or an earlier one has closed it
                flow.callback()
        self._run_timers(time.monotonic())
        for _ in range(len(self._soon)):  # what these add waits for the next round
            self._soon.popleft()()

    def _patience(self, timeout: float | None) -> float | None:
        """How long to wait, in seconds; None is for ever, as in epoll.poll()."""
        if self._soon:
            return 0
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        if self._timers:
            due = max(0.0, self._timers[0][0] - time.monotonic())
            return due if timeout is None else min(due, timeout)
        return timeout

    def _run_timers(self, now: float) -> None:
        while self._timers and self._timers[0][0] <= now:
            callback = heapq.heappop(self._timers)[2].callback
            if callback is not None:
                callback()

    def close(self) -> None:
        """Gives back the signals and the loop's own descriptors; nothing that was watched is closed."""
        for signum, handler in self._old_handlers.items():
            signal.signal(signum, handler)
        self._old_handlers.clear()
        if self._wakeup is not None:
            signal.set_wakeup_fd(self._old_wakeup)
            for end in self._wakeup:
                end.close()
            self._wakeup = None
        self._watched.clear()
        self._timers.clear()
        self._soon.clear()
        self._poller.close()
