"""What happens to the ports of this machine, as it happens.

udev tells when a port comes, goes or gets its name. That a program opens or closes a port, or that the host
does, sends no event: debugfs knows, and is looked at a few times a second where this user may read it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from guest_tools.channel import Deadline, open_port
from guest_tools.errors import HostTimeout, PortNotFound, PortUnplugged
from guest_tools.ports import Port, find_port, list_ports, read_state, refresh, udev_context

__all__ = ["Event", "wait_for_host", "watch"]

TICK = 0.1  # seconds between two looks at debugfs
UDEV_CONTROL = "/run/udev/control"

# What a change of a port's flag from one look to the next is called.
FLAG_EVENTS = {
    ("guest_connected", True): "opened",
    ("guest_connected", False): "closed",
    ("host_connected", True): "host_connected",
    ("host_connected", False): "host_left",
}


@dataclass(frozen=True)
class Event:
    """Something happened to a port.

    ``kind``: "present" (was there when the watch began), "added", "removed", "named"; "opened" and "closed" by
    a program in this guest; "host_connected" and "host_left". ``time`` is in seconds since 1970.
    """

    kind: str
    port: Port
    time: float = field(default_factory=time.time)

    def as_dict(self) -> dict[str, Any]:
        """The event as one JSON object; a stable format."""
        return {"event": self.kind, "time": round(self.time, 6), **self.port.as_dict()}


def watch() -> Iterator[Event]:
    """The ports that there are, then what happens, for ever. Raises Unsupported.

    A port opened and closed between two looks (100 ms) can be missed; coming and going never is.
    """
    monitor = _monitor()
    known = {port.sysname: port for port in list_ports()}
    yield from [Event("present", port) for port in known.values()]
    while True:
        device = monitor.poll(TICK if _flags_are_known(known) else None)
        if device is not None and device.action == "remove":
            yield from _forget(known, device.sys_name)
        elif device is not None:
            yield from _look_for_new(known)
        yield from _look_at_flags(known)


def wait_for_host(name_or_path: str, timeout: float | None = None) -> Port:
    """Wait until that port exists and the host has its end open; the port as it is then.

    Where debugfs can be read, nothing is opened. Elsewhere only an open port can tell, so it is opened for that
    time: the host notices, and what it sends meanwhile is lost (R-GUEST-05).

    Raises HostTimeout, PortBusy (only where debugfs cannot be read), PortForbidden, Unsupported.
    """
    deadline = Deadline(timeout)
    monitor = _monitor()
    while True:
        try:
            port = find_port(name_or_path)
            if _host_is_there(port, deadline):
                return refresh(port)
        except (PortNotFound, PortUnplugged) as exc:
            port, problem = None, f"{exc}"
        else:
            problem = f"the host has not opened {port}"
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


def _flags_are_known(known: dict[str, Port]) -> bool:
    return any(port.guest_connected is not None for port in known.values())


def _forget(known: dict[str, Port], sysname: str) -> Iterator[Event]:
    port = known.pop(sysname, None)
    if port:
        yield Event("removed", port)


def _look_for_new(known: dict[str, Port]) -> Iterator[Event]:
    for port in list_ports():
        before = known.get(port.sysname)
        if before is None:
            known[port.sysname] = port
            yield Event("added", port)
        elif before.name != port.name:
            known[port.sysname] = replace(port, state=before.state, holders=before.holders)
            yield Event("named", known[port.sysname])


def _look_at_flags(known: dict[str, Port]) -> Iterator[Event]:
    for sysname, before in known.items():
        if read_state(sysname) == before.state:
            continue
        after = known[sysname] = refresh(before)
        yield from [Event(kind, after) for kind in flag_changes(before, after)]


def flag_changes(before: Port, after: Port) -> list[str]:
    """The kinds of event that lead from one look at a port to the next."""
    return [
        kind
        for (flag, value), kind in FLAG_EVENTS.items()
        if getattr(after, flag) is value and getattr(before, flag) is (not value)
    ]
