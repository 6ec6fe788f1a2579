"""Waits for descriptors, and moves bytes between rings and descriptors meanwhile, without the interpreter lock.

Bytes plane: no policy. Whether bytes may move is said by Flow.start() and stop(), and a queue that stops takes it back.
"""

from collections.abc import Callable
from typing import Self, final

from vsport._ring import DeviceQueue, Status

__all__ = ["Flow", "Poller"]

@final
class Poller:
    """Waits for descriptors (epoll, level triggered), and lets flows move bytes meanwhile. For one thread."""

    def __new__(cls) -> Self:
        """Raises OSError."""
    spin_max: int
    """For how many nanoseconds a wait may look instead of sleep at most, while that pays; 0, the default: never.

    It does after a wait that was no longer than that, and while a ring that was drained lingers with its kicks off. So
    it costs at most as much as it has just proved to be worth, and an idle poller sleeps. Raises ValueError for a
    negative time.
    """
    @property
    def sleeps(self) -> int:
        """How often it went to sleep."""
    @property
    def spins(self) -> int:
        """How often it looked for a while instead."""
    def watch(self, fd: int, events: int) -> None:
        """poll() says from now on when one of ``events``, or a hang-up, is ready at ``fd``; a later call replaces them.

        Raises PermissionError for a descriptor that epoll cannot wait for, OSError.
        """
    def watch_kick(self, fd: int, queue: DeviceQueue) -> None:
        """As watch() for reading; but a flow of ``queue`` that may move goes on, and reads ``fd``, by itself."""
    def ignore(self, fd: int) -> None:
        """poll() says nothing of ``fd`` any more; what flows through it goes on."""
    def unwatch(self, fd: int) -> None:
        """Forgets ``fd``, and whatever flows through it stands still; call it before closing the descriptor."""
    def poll(self, timeout: float | None) -> tuple[list[tuple[int, int]], list[Flow]]:
        """Moves bytes until something is ready that was asked for, a flow has news, or ``timeout`` seconds are over.

        The descriptors that are ready with their events, and the flows whose ``callback`` is to be called. Both may be
        empty before the time is over. Raises OSError, and what a signal handler raises.
        """
    def close(self) -> None:
        """Gives back its own descriptor; nothing that was watched is closed."""

@final
class Flow:
    """One direction of one port: what a queue's chains hold is drained into, or filled from, a descriptor.

    Bytes may move between start() and stop(), or the end of the run of its queue, whichever comes first. It has a turn
    when the driver kicks (Poller.watch_kick) and when the descriptor is ready: kicks are off while it is busy, and the
    driver is interrupted once a turn. A turn moves at most a megabyte.

    The callback is called after a turn that is of interest: the descriptor has failed or ended, a rule was broken, the
    guest is to be interrupted and has no call descriptor, or the descriptor takes no more (if ``tells_blocked``).
    result() says which.
    """

    def __new__(cls, poller: Poller, queue: DeviceQueue, callback: Callable[[], None], *, fills: bool) -> Self:
        """Raises ValueError if ``queue`` has a flow already."""
    @property
    def callback(self) -> Callable[[], None] | None:
        """None after close()."""
    def start(self, fd: int, log_fd: int = -1, *, tells_blocked: bool = False) -> None:
        """Bytes may move from now on. ``fd`` is non-blocking, and unwatch() comes before it is closed.

        What is drained into ``fd`` is also written to ``log_fd``. Raises OSError, ValueError.
        """
    def stop(self) -> None:
        """No byte moves from now on, until start()."""
    def close(self) -> None:
        """The end: its queue may have another flow. Safe to call twice."""
    @property
    def moves(self) -> bool:
        """Whether bytes may move."""
    @property
    def waiting(self) -> bool:
        """Whether it waits for the descriptor to take more (drain), or for the guest to give buffers (fill)."""
    def wake(self) -> None:
        """What it waits for may be there: it looks when it has its turn."""
    def run(self) -> Status:
        """A turn now; comes back as DeviceQueue.drain() or fill() does, with their errors."""
    def result(self) -> Status:
        """What the last turn came to; comes back as DeviceQueue.drain() or fill() does, with their errors."""
