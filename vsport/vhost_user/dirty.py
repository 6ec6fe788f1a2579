"""Dirty logging: which writes to guest memory the front end wants to hear of, and where they are marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from vsport._ring import DeviceQueue, DirtyLog
from vsport.document import Fields
from vsport.parcel import Delivery, Parcel
from vsport.vhost_user.edge import Edge
from vsport.vhost_user.message import LogBase, VringAddress
from vsport.vhost_user.share import Share

__all__ = ["DirtyLogging"]

_U64 = 2**64 - 1


class DirtyLogging:
    """The log of one front end (R-VU-80, R-VU-81)."""

    def __init__(self, edge: Edge) -> None:
        self.data = False
        """Whether writes to buffers are logged (LOG_ALL in SET_FEATURES)."""
        self._edge = edge
        self._log: DirtyLog | None = None
        self._share: Share | None = None
        self._base = LogBase(0, 0)
        self._signal_fd = -1
        self._seen = 0

    def set_base(self, base: LogBase, fds: list[int]) -> None:
        """SET_LOG_BASE: another log. Keeps the descriptor; raises FrontEndError, and the old log stays (R-VU-16)."""
        share = Share(self._edge, fds[0], base.offset, base.size)
        self._log = DirtyLog(share.buffer, share.start, base.size)
        if self._share is not None:
            self._share.close()
        self._base, self._share = base, share
        fds.clear()

    def apply(self, queue: DeviceQueue, address: VringAddress | None) -> None:
        """Has ``queue`` log what is wanted of it now, also while it runs.

        A queue whose used ring alone is to be logged logs its buffers, too: a page too many is copied once more, and
        that is all.
        """
        used = address is not None and address.logs_used
        if self._log is None or not (self.data or used):
            queue.log_to(None)
        else:
            queue.log_to(self._log, address.log if address is not None and used else -1)

    # -- SET_LOG_FD ----------------------------------------------------------------------------------------------------

    def set_signal(self, fds: list[int]) -> None:
        """A descriptor to be written to when the log changes (R-VU-17). Keeps it; raises FrontEndError."""
        self._edge.make_nonblocking(fds[0])
        self._close_signal()
        self._signal_fd = fds.pop()

    @property
    def logs(self) -> bool:
        """Whether there is a log."""
        return self._log is not None

    @property
    def signals(self) -> bool:
        """Whether somebody waits for the log to change."""
        return self._signal_fd >= 0 and self._log is not None

    def look(self, queues: Sequence[DeviceQueue]) -> None:
        """Signals if a queue has moved since the last look: the log may be another one then."""
        moved = sum(queue.chains + queue.bytes_moved for queue in queues)
        if moved != self._seen:
            self._seen = moved
            self._edge.signal(self._signal_fd)

    def _close_signal(self) -> None:
        if self._signal_fd >= 0:
            self._edge.close_fd(self._signal_fd)
            self._signal_fd = -1

    # -- the end, and handover -----------------------------------------------------------------------------------------

    def close(self) -> None:
        """Gives the log up; the queues have to have let go of it by log_to(None)."""
        self._close_signal()
        if self._share is not None:
            self._share.close()
        self._share = self._log = None
        self.data = False

    def give(self, parcel: Parcel) -> dict[str, Any]:
        """The log as a document, its descriptors in ``parcel``."""
        logs = [] if self._share is None else [{**asdict(self._base), "fd": self._share.give(parcel)}]
        return {"data": self.data, "signal": parcel.add(self._signal_fd), "log": logs}

    def take(self, fields: Fields, delivery: Delivery) -> None:
        """Becomes what give() described; raises DocumentError, FrontEndError. close() undoes what was done by then."""
        self._signal_fd = delivery.take(fields, "signal")
        self.data = fields.boolean("data")
        for state in fields.each("log", 1, Fields):
            self._base = base = LogBase(state.integer("size", 1, _U64), state.integer("offset", 0, _U64))
            self._share = share = Share.take(self._edge, state, delivery, base.offset, base.size)
            self._log = DirtyLog(share.buffer, share.start, base.size)
        fields.end()
