"""Guest tools: the virtio-serial ports of this machine, for people, shells and programs.

    from guest_tools import list_ports, open_port, watch

    with open_port("org.example.0", wait_host=True) as channel:
        channel.write(b"hello")
        answer = channel.read()

Needs Linux and pyudev, and nothing of the host's half of vsport.
"""

from __future__ import annotations

TYPE_CHECKING = False  # As in guest_tools.record: the typing module is not for those who run this.
if TYPE_CHECKING:
    from typing import Any

    from guest_tools.bridge import Bridge as Bridge
    from guest_tools.bridge import Ending as Ending
    from guest_tools.bridge import Outcome as Outcome
    from guest_tools.channel import Channel as Channel
    from guest_tools.channel import open_port as open_port
    from guest_tools.errors import HostLeft as HostLeft
    from guest_tools.errors import HostTimeout as HostTimeout
    from guest_tools.errors import PortBusy as PortBusy
    from guest_tools.errors import PortError as PortError
    from guest_tools.errors import PortForbidden as PortForbidden
    from guest_tools.errors import PortIsConsole as PortIsConsole
    from guest_tools.errors import PortNotFound as PortNotFound
    from guest_tools.errors import PortStuck as PortStuck
    from guest_tools.errors import PortUnplugged as PortUnplugged
    from guest_tools.errors import Unsupported as Unsupported
    from guest_tools.events import Event as Event
    from guest_tools.events import wait_for_host as wait_for_host
    from guest_tools.events import watch as watch
    from guest_tools.host_changes import HostChange as HostChange
    from guest_tools.host_changes import HostWatch as HostWatch
    from guest_tools.host_changes import hold as hold
    from guest_tools.ports import Holder as Holder
    from guest_tools.ports import Port as Port
    from guest_tools.ports import PortState as PortState
    from guest_tools.ports import find_port as find_port
    from guest_tools.ports import list_ports as list_ports

__version__ = "0.1.0"

# Where each name lives. It is loaded when first used: a guest can be slow, and a list needs little of this.
_HOMES = {
    "bridge": ("Bridge", "Ending", "Outcome"),
    "channel": ("Channel", "open_port"),
    "errors": (
        "HostLeft",
        "HostTimeout",
        "PortBusy",
        "PortError",
        "PortForbidden",
        "PortIsConsole",
        "PortNotFound",
        "PortStuck",
        "PortUnplugged",
        "Unsupported",
    ),
    "events": ("Event", "wait_for_host", "watch"),
    "host_changes": ("HostChange", "HostWatch", "hold"),
    "ports": ("Holder", "Port", "PortState", "find_port", "list_ports"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


if not TYPE_CHECKING:  # A type checker has the imports above, and finds a misspelt name by them.

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        return value
