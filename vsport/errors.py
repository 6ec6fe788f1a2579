"""Every exception of vsport: its type says whose fault it was, and so what has to happen.

=================  ===========================================  ==========================================
type               who broke a rule                             what vsport does
=================  ===========================================  ==========================================
``GuestError``     the driver in the guest                      stops that one queue, the rest goes on
``FrontEndError``  the VMM at the other end of vhost-user       refuses the message or ends the connection
``BackEndError``   the back end (as seen by our front end)      gives up what it was about to do
``DeviceError``    the device (as seen by a simulated guest)    marks that queue broken
``HostError``      the host: a chardev, a path, a descriptor    reports it; the guest is not to blame
``UsageError``     the user's command line or configuration     one line, exit code 2
=================  ===========================================  ==========================================

``rule`` names what was broken: a section of the virtio specification (``"2.7.5.2"``) or a line of the
conformance list (``"R-RING-71"``).
"""

from __future__ import annotations

__all__ = [
    "BackEndError",
    "DeviceError",
    "FrontEndError",
    "GuestError",
    "HostError",
    "PeerError",
    "UsageError",
    "VsportError",
]


class VsportError(Exception):
    """The root of all exceptions that vsport raises on purpose."""


class PeerError(VsportError):
    """A peer broke a rule; ``rule`` says which one, ``context`` with what values."""

    def __init__(self, rule: str, what: str, **context: object) -> None:
        details = ", ".join(f"{name}={value!r}" for name, value in context.items())
        super().__init__(f"{rule}: {what}" + (f" ({details})" if details else ""))
        self.rule = rule
        self.what = what
        self.context = context


class GuestError(PeerError):
    """The guest's driver broke the specification: its queue stops."""


class FrontEndError(PeerError):
    """The vhost-user front end broke the protocol."""


class BackEndError(PeerError):
    """The vhost-user back end broke the protocol, refused a request, or does not answer: what a front end raises."""


class DeviceError(PeerError):
    """The device broke the specification: what a simulated guest raises (R-RING-84)."""


class HostError(VsportError):
    """The host cannot do what was asked for: a path, a socket, a device file."""


class UsageError(VsportError):
    """A command line or a configuration value is wrong."""
