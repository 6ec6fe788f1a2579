"""Every leave and return of the host, also those that are over before anybody looked.

The level that poll shows is not enough: the guest's kernel can handle a close and the open after it in one go,
without any program running between (a virtual CPU that the host did not schedule for a while is enough). But the
driver sends SIGIO for each of them (R-GUEST-13), and a real-time signal in its place is queued, once for each.
So the signals are counted, and what they tell is set against what was seen.
"""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import threading
from collections.abc import Generator
from dataclasses import dataclass
from types import TracebackType

from guest_tools.channel import Channel

__all__ = ["HostChange", "HostTracker", "HostWatch", "SignalCount", "hold"]

SIGNAL = signal.SIGRTMIN + 2  # Any real-time signal would do; the first ones are the likeliest to be in use.
F_SETOWN_EX = 15  # linux/fcntl.h; Python has no name for it.
F_OWNER_TID = 0
READS_AT_A_TIME = 64  # Then the signals are collected: the kernel queues only some hundreds of them.
RECHECKS = 5
RECHECK_PAUSE = 0.01  # seconds


class HostTracker:
    """What happened, from what was seen and how many signals came. Pure bookkeeping.

    Each change of the host's state sends one signal. Arriving data does too: at most one for each buffer, and
    possibly less, so the data is given the benefit of the doubt. A change that nobody saw is one of a pair, as
    the state was the same before and after.
    """

    def __init__(self, connected: bool) -> None:
        self.connected = connected
        self._surplus = 0  # signals that no change explains
        self._buffers = 0  # signals that data may explain

    def feed(self, connected: bool, signals: int, buffers: int) -> list[bool]:
        """The host's state is ``connected`` now; since the last call so many signals came, buffers were read.

        To be called with everything read that there was. Returns the changes since then, in order.
        """
        changed = connected != self.connected
        self._surplus += signals - changed
        self._buffers += buffers
        pairs = max(0, self._surplus - self._buffers) // 2
        self._surplus -= 2 * pairs
        changes = [not self.connected, self.connected] * pairs + [connected] * changed
        self._settle(changed and not connected)
        self.connected = connected
        return changes

    def _settle(self, left: bool) -> None:
        """When the host leaves, all its data is here and all its signals with it: old doubts end."""
        if left and self._buffers:
            self._surplus = self._buffers = 0

    @property
    def unsettled(self) -> bool:
        """One signal is left over: it may be half of a pair."""
        return self._surplus - self._buffers == 1

    def drop_leftover(self) -> None:
        """The other half did not come: the host only said again what was known (QEMU does after a migration)."""
        if self.unsettled:
            self._surplus -= 1


class SignalCount:
    """Counts the signals that a descriptor sends, without a handler.

    The signal is blocked in the calling thread, to which alone it is sent, and collected from there. Use it in
    one thread only, and close it there.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        # Plain SIGIO comes instead when too many are queued; it must not end the process.
        self._signals = {SIGNAL, signal.SIGIO}
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        fcntl.fcntl(fd, F_SETOWN_EX, struct.pack("ii", F_OWNER_TID, threading.get_native_id()))
        fcntl.fcntl(fd, fcntl.F_SETSIG, SIGNAL)
        self._set_async(True)

    def take(self) -> int:
        """How many came since the last call."""
        count = 0
        while signal.sigtimedwait(self._signals, 0):
            count += 1
        return count

    def close(self) -> None:
        self._set_async(False)
        self.take()
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _set_async(self, wanted: bool) -> None:
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | os.O_ASYNC if wanted else flags & ~os.O_ASYNC)


class HostWatch:
    """Reports each change of the host's state of an open channel, in order. A context manager.

    For a loop of this kind: ``collect``, then read everything and ``count_buffers``, then ``changes``; then wait
    for the channel's next edge, at most ``patience`` seconds. One thread only.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._count = SignalCount(channel.fileno())
        try:
            self.restart()
        except BaseException:
            self._count.close()
            raise

    def restart(self) -> None:
        """Forget what was so far: the host's state now is the first. Raises PortUnplugged."""
        self._count.take()
        self._tracker = HostTracker(self._channel.host_connected)
        self._signals = self._buffers = self._rechecks = 0

    @property
    def connected(self) -> bool:
        """The host's state, as last reported."""
        return self._tracker.connected

    def collect(self) -> int:
        """Take the signals; how many there were. The signal for data always comes before the data can be read."""
        count = self._count.take()
        self._signals += count
        return count

    def count_buffers(self, count: int) -> None:
        """So many reads returned data: each may be what a signal was for."""
        self._buffers += count

    def changes(self) -> list[bool]:
        """True for each time the host came, False for each time it left. Raises PortUnplugged."""
        found = self._tracker.feed(self._channel.host_connected, self._signals, self._buffers)
        self._rechecks = self._rechecks + 1 if not (self._signals or found) else 0
        self._signals = self._buffers = 0
        if self._rechecks > RECHECKS:
            self._tracker.drop_leftover()
        return found

    @property
    def patience(self) -> float | None:
        """The longest sensible wait for the next edge, in seconds; None is for ever.

        The driver wakes sleepers first and sends the signal a moment later: when half a pair is known, the
        other half is looked for a few times.
        """
        return RECHECK_PAUSE if self._tracker.unsettled else None

    def close(self) -> None:
        self._count.close()

    def __enter__(self) -> HostWatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class HostChange:
    """The host came (``connected``) or left; ``discarded`` bytes of its data were thrown away since the last."""

    connected: bool
    discarded: int


def hold(channel: Channel) -> Generator[HostChange, None, None]:
    """Keep a port open and throw its input away: the host's state now, then each change, until PortUnplugged."""
    with HostWatch(channel) as watch:
        yield HostChange(watch.connected, 0)
        discarded = 0
        while True:
            discarded += _discard_all(channel, watch)
            for connected in watch.changes():
                yield HostChange(connected, discarded)
                discarded = 0
            channel.wait(watch.patience)


def _discard_all(channel: Channel, watch: HostWatch) -> int:
    """Read until there is nothing more; the number of bytes."""
    total = 0
    while True:
        watch.collect()
        for _ in range(READS_AT_A_TIME):
            data = channel.read_now()
            if not data:
                return total
            total += len(data)
            watch.count_buffers(1)
