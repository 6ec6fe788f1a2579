"""What happens to the ports of this machine, as it happens.

udev tells when a port comes, goes or gets its name; inotify, when a program opens or closes it. That the host does
sends no event to anybody who has not the port open: debugfs knows, where the kernel has it and this user may read
it, and is looked at a few times a second.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from guest_tools.channel import Deadline, open_port
from guest_tools.errors import HostTimeout, PortNotFound, PortUnplugged
from guest_tools.inotify import OpenWatch
from guest_tools.ports import Port, find_port, list_ports, read_state, refresh, udev_context

__all__ = ["Event", "wait_for_host", "watch"]

TICK = 0.1  # seconds between two looks at debugfs
HOLDER_PAUSES = (0.001, 0.002, 0.005, 0.01, 0.02)  # seconds
UDEV_CONTROL = "/run/udev/control"


@dataclass(frozen=True)
class Event:
    """Something happened to a port.

    ``kind``: "present" (was there when the watch began), "added", "removed", "named"; "opened" and "closed" by
    a program in this guest; "host_connected" and "host_left". ``port`` is as it was right after that. ``time``
    is in seconds since 1970.
    """

    kind: str
    port: Port
    time: float = field(default_factory=time.time)

    def as_dict(self) -> dict[str, Any]:
        """The event as one JSON object; a stable format."""
        return {"event": self.kind, "time": round(self.time, 6), **self.port.as_dict()}


def watch() -> Iterator[Event]:
    """The ports that there are, then what happens, for ever. Raises Unsupported.

    Opening and closing is told where this user may read the node. The host's coming and leaving is told where
    debugfs can be read; what lasts less than 100 ms can be missed there (``hold`` misses nothing).
    """
    return _Watcher().events()


class _Watcher:
    """The ports that are known, and the three sources of what happens to them."""

    def __init__(self) -> None:
        self._known: dict[str, Port] = {}
        self._monitor = _monitor()
        self._openings: OpenWatch | None = None
        with contextlib.suppress(OSError):  # Too many watchers: then openings are not told.
            self._openings = OpenWatch()

    def events(self) -> Iterator[Event]:
        yield from self._look_for_new("present")
        while True:
            self._sleep()
            yield from self._from_udev()
            yield from self._from_inotify()
            yield from self._from_debugfs()

    def _sleep(self) -> None:
        poller = select.poll()
        poller.register(self._monitor, select.POLLIN)
        if self._openings:
            poller.register(self._openings, select.POLLIN)
        host_is_known = any(port.host_connected is not None for port in self._known.values())
        poller.poll(TICK * 1000 if host_is_known else None)

    def _from_udev(self) -> Iterator[Event]:
        while (device := self._monitor.poll(0)) is not None:
            if device.action != "remove":
                yield from self._look_for_new("added")
            elif port := self._known.pop(device.sys_name, None):
                yield Event("removed", port)

    def _look_for_new(self, kind: str) -> Iterator[Event]:
        self._watch_openings()
        for port in list_ports():
            before = self._known.get(port.sysname)
            if before is None:
                self._known[port.sysname] = port
                yield Event(kind, port)
            elif before.name != port.name:
                self._known[port.sysname] = port.replace(state=before.state)
                yield Event("named", port)

    def _watch_openings(self) -> None:
        """Before the ports are looked at: who opens one in between is told twice rather than never."""
        if self._openings is None:
            return
        for port in list_ports():
            if port.sysname not in self._known:
                with contextlib.suppress(OSError):
                    self._openings.add(port.device)

    def _from_inotify(self) -> Iterator[Event]:
        happened = self._openings.take() if self._openings else []
        for port in list(self._known.values()):
            mine = [opened for node, opened in happened if node == port.device]
            for opened in mine[:-1]:  # That is over.
                yield Event("opened" if opened else "closed", refresh(port))
            for opened in mine[-1:]:
                yield Event("opened", _with_holder(port)) if opened else Event("closed", refresh(port))

    def _from_debugfs(self) -> Iterator[Event]:
        for sysname, before in self._known.items():
            state = read_state(sysname)
            if state.host_connected == before.host_connected:
                continue
            self._known[sysname] = before.replace(state=state)
            if None not in (state.host_connected, before.host_connected):
                yield Event("host_connected" if state.host_connected else "host_left", refresh(before))


def _with_holder(port: Port) -> Port:
    """A port that was opened just now: the kernel tells so a moment before the process has its descriptor."""
    for pause in HOLDER_PAUSES:
        now = refresh(port)
        if now.holders != ():
            break
        time.sleep(pause)
    return now


def wait_for_host(name_or_path: str, timeout: float | None = None) -> Port:
    """Wait until that port exists and the host has its end open; the port as it was then.

    Where debugfs can be read, nothing is opened. Elsewhere only an open port can tell, so it is opened for that
    time: the host notices, and what it sends meanwhile is lost (R-GUEST-05).

    Raises HostTimeout, PortBusy (only where debugfs cannot be read), PortForbidden, Unsupported.
    """
    deadline = Deadline(timeout)
    monitor = _monitor()
    while True:
        port = None
        try:
            port = find_port(name_or_path)
            if _host_is_there(port, deadline):
                return port.replace(state=port.state.replace(host_connected=True))
            problem = f"the host has not opened {port}"
        except (PortNotFound, PortUnplugged) as exc:
            problem = str(exc)
        if deadline.passed:
            raise HostTimeout(f"waited {timeout:g} seconds: {problem}")
        monitor.poll(deadline.left(at_most=TICK if port else None))


def _host_is_there(port: Port, deadline: Deadline) -> bool:
    if port.host_connected is not None:
        return port.host_connected
    with open_port(port, timeout=deadline.left()) as channel:
        channel.wait_host()
    return True


def _monitor() -> Any:
    """Events of the ports, from now on. Where no udev runs (an initial RAM disk), the kernel's own."""
    context = udev_context()
    import pyudev

    source = "udev" if os.path.exists(UDEV_CONTROL) else "kernel"
    monitor = pyudev.Monitor.from_netlink(context, source)
    monitor.filter_by("virtio-ports")
    monitor.start()
    return monitor
