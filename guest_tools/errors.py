"""Every exception of the guest tools. Its text is one line that says what is wrong and what to do."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from guest_tools.ports import Holder

__all__ = [
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
]


class PortError(Exception):
    """The root of all exceptions that the guest tools raise on purpose."""


class Unsupported(PortError):
    """This machine cannot run the guest tools: no Linux, or no pyudev."""


class PortNotFound(PortError, LookupError):
    """No port has that name or path, or more than one has."""


class PortIsConsole(PortError):
    """A console port: the kernel itself holds it, programs use its terminal (R-GUEST-17)."""


class PortForbidden(PortError, PermissionError):
    """This user may not open the device node."""


class PortBusy(PortError):
    """Somebody has the port open already; a port has one opener at a time (R-GUEST-04)."""

    def __init__(self, port: str, holders: Sequence[Holder] | None) -> None:
        who = ", ".join(str(holder) for holder in holders or ()) or "a process that this user cannot see"
        super().__init__(f"{port} is held open by {who}; a port has one user at a time, stop that one first")
        self.holders = tuple(holders or ())


class PortUnplugged(PortError):
    """The port is gone while it was open; it can only be opened anew (R-GUEST-14)."""

    def __init__(self, port: str) -> None:
        super().__init__(f"{port} was unplugged; when the host plugs it in again, open it again")


class PortStuck(PortError):
    """The port's queue refuses data although it says that it has room (R-GUEST-10)."""

    def __init__(self, port: str) -> None:
        super().__init__(f"{port} takes no data although it has room: its queue is broken; replug the device")


class HostTimeout(PortError, TimeoutError):
    """The host did not do in time what was waited for."""


class HostLeft(PortError):
    """The host closed the port before it took everything; ``sent`` bytes were queued."""

    def __init__(self, port: str, sent: int) -> None:
        super().__init__(f"the host closed {port} after {sent} bytes of this write; wait until it is back")
        self.sent = sent
