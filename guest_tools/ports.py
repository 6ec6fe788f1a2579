"""Which ports there are, and who holds them: from udev, sysfs, debugfs and /proc.

Nothing here opens a port: looking must not be noticed by the host.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterable, Mapping

from guest_tools.errors import PortNotFound, Unsupported
from guest_tools.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = [
    "Holder",
    "Port",
    "PortState",
    "find_port",
    "list_ports",
    "parse_state",
    "printable",
    "refresh",
    "why_no_ports",
]

DEBUGFS = "/sys/kernel/debug/virtio-ports"
PROC = "/proc"
VIRTIO_DEVICES = "/sys/bus/virtio/devices"
CONSOLE_DEVICE_ID = 3  # virtio specification, section 5

SYSNAME = re.compile(r"vport(\d+)p(\d+)")  # device index and port id (R-GUEST-01)
PLATFORM: str = sys.platform


class Holder(Record):
    """A process that has a port open."""

    pid: int
    command: str
    user: str

    def __str__(self) -> str:
        command = printable(self.command)
        shown = command if len(command) <= 60 else command[:59] + "…"
        return f"{shown} (pid {self.pid}, user {self.user})"

    def as_dict(self) -> dict[str, Any]:
        return {"pid": self.pid, "command": printable(self.command), "user": self.user}


class PortState(Record):
    """What debugfs tells about a port (R-GUEST-03). ``None``: not known, debugfs is for root only."""

    guest_connected: bool | None = None
    host_connected: bool | None = None
    is_console: bool | None = None


class Port(Record):
    """One virtio-serial port, as it was at one moment. ``None`` stands for "not known" everywhere.

    ``holders`` are the processes that have it open; ``()`` means that nobody does. ``number`` is the device
    number of the node.
    """

    device: str
    sysname: str
    name: str | None
    id: int
    number: int = 0
    state: PortState = PortState()
    holders: tuple[Holder, ...] | None = None

    @property
    def host_connected(self) -> bool | None:
        return self.state.host_connected

    @property
    def guest_connected(self) -> bool | None:
        return self.state.guest_connected

    @property
    def is_console(self) -> bool | None:
        return self.state.is_console

    @property
    def kind(self) -> str | None:
        """``"console"``, ``"generic"``, or ``None`` when not known."""
        return {True: "console", False: "generic", None: None}[self.is_console]

    def __str__(self) -> str:
        return f"{self.device} ({printable(self.name)})" if self.name else self.device

    def as_dict(self) -> dict[str, Any]:
        """The port as one JSON object; a stable format."""
        return {
            "device": self.device,
            "name": None if self.name is None else printable(self.name),
            "id": self.id,
            "kind": self.kind,
            "host_connected": self.host_connected,
            "guest_connected": self.guest_connected,
            "holders": None if self.holders is None else [holder.as_dict() for holder in self.holders],
        }


def list_ports() -> list[Port]:
    """Every port of this machine, in the order of device and port id.

    Raises Unsupported when this is not Linux or pyudev is missing.
    """
    found = [_identify(device) for device in udev_context().list_devices(subsystem="virtio-ports")]
    ports = sorted((port for port in found if port), key=_order)
    holders, complete = scan_holders({port.number for port in ports}) if ports else ({}, True)
    return [_with_state(port, holders, complete) for port in ports]


def refresh(port: Port) -> Port:
    """The same port as it is now."""
    return _with_state(port, *scan_holders({port.number}))


def find_port(name_or_path: str) -> Port:
    """The port with that name, that path (any link to the node) or that kernel name (``vport0p1``).

    Raises PortNotFound; its text says what there is instead.
    """
    ports = list_ports()
    found = [port for port in ports if _is_called(port, name_or_path)]
    if len(found) == 1:
        return found[0]
    if found:
        paths = ", ".join(port.device for port in found)
        raise PortNotFound(f"more than one port is named {name_or_path!r}; use a path: {paths}")
    raise PortNotFound(_not_found(name_or_path, ports))


def why_no_ports() -> str:
    """One sentence on why this machine has no port at all, with the likely remedy."""
    devices = list(_console_devices())
    if not devices:
        return (
            "no virtio-serial ports: this machine has no virtio-serial device; add one on the host"
            " (QEMU: -device virtio-serial-pci -device virtserialport,chardev=ID,name=NAME)"
        )
    if not any(os.path.exists(os.path.join(device, "driver")) for device in devices):
        return "no virtio-serial ports: there is a device but no driver for it; load it: modprobe virtio_console"
    return "no virtio-serial ports: the device is there but the host has given it none (QEMU: -device virtserialport)"


def printable(text: str | None) -> str:
    """Text that came from outside, made safe for a terminal and for JSON: one line, no control characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text or "")


def udev_context() -> Any:
    """A pyudev context. Raises Unsupported with the package to install."""
    if not PLATFORM.startswith("linux"):
        raise Unsupported(f"virtio-serial ports are a matter of a Linux guest; this is {PLATFORM}")
    try:
        import pyudev  # Here and not above: it takes longer to load than all the rest.

        return pyudev.Context()
    except ImportError as exc:  # Also raised by Context() when libudev itself is missing.
        reason = f"pyudev does not work here ({exc})"
        raise Unsupported(f"{reason}; install it: apt install python3-pyudev, or pip install pyudev") from exc


# What debugfs says


def parse_state(text: str) -> PortState:
    """The lines of a port's debugfs file. Anything unknown or malformed is left out, never an error.

    The name is printed first and is the host's to choose: later lines win, so a name with a line end in it
    cannot pose as one of the flags.
    """
    pairs = dict(line.split(": ", 1) for line in text.split("\n") if ": " in line)
    return PortState(
        guest_connected=_FLAGS.get(pairs.get("guest_connected", "")),
        host_connected=_FLAGS.get(pairs.get("host_connected", "")),
        is_console=_FLAGS.get(pairs.get("is_console", "")),
    )


_FLAGS = {"0": False, "1": True, "no": False, "yes": True}


def read_state(sysname: str, debugfs: str = DEBUGFS) -> PortState:
    """A port's state from debugfs; nothing is known where that cannot be read."""
    try:
        with open(os.path.join(debugfs, sysname), encoding="utf-8", errors="surrogateescape") as file:
            return parse_state(file.read())
    except OSError:
        return PortState()


# Who has it open


def scan_holders(numbers: set[int], proc: str = PROC) -> tuple[dict[int, tuple[Holder, ...]], bool]:
    """The processes that have one of these device numbers open, and whether all processes could be looked at."""
    found: dict[int, tuple[Holder, ...]] = {}
    pids = [entry for entry in _entries(proc) if entry.isdigit()]
    complete = bool(pids)
    for pid in pids:
        try:
            held = _held_by(os.path.join(proc, pid), numbers)
        except PermissionError:
            complete = False
            continue
        except OSError:  # It ended while we looked.
            continue
        for number in held:
            found[number] = (*found.get(number, ()), _holder(os.path.join(proc, pid)))
    return found, complete


def _held_by(process: str, numbers: set[int]) -> set[int]:
    directory = os.path.join(process, "fd")
    held = {_port_number(os.path.join(directory, fd)) for fd in os.listdir(directory)}
    return {number for number in held if number in numbers}


def _port_number(link: str) -> int | None:
    """The device number behind a link of /proc/PID/fd, if it is a port's.

    The name is looked at first: a stat of somebody's file on a dead network share would hang. A node that
    was removed (" (deleted)") is a port of the past (R-GUEST-14).
    """
    try:
        is_called_so = SYSNAME.fullmatch(os.path.basename(os.readlink(link)))
    except OSError:
        return None
    return _device_number(link) if is_called_so else None


def _device_number(path: str) -> int | None:
    """The number of the character device at that path, if there is one."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a zero byte in the path.
        return None
    return status.st_rdev if stat.S_ISCHR(status.st_mode) else None


def _holder(process: str) -> Holder:
    import pwd  # Only when there is somebody to name.

    try:
        uid = os.stat(process).st_uid
        command = parse_command(_slurp(os.path.join(process, "cmdline")), _slurp(os.path.join(process, "comm")))
    except OSError:
        uid, command = -1, "?"
    try:
        user = pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        user = str(uid)
    return Holder(int(os.path.basename(process)), command, user)


def parse_command(cmdline: bytes, comm: bytes) -> str:
    """A process's command line, or its short name in brackets if it has none (a kernel thread, a zombie)."""
    words = os.fsdecode(cmdline).rstrip("\0").replace("\0", " ").strip()
    return words or f"[{os.fsdecode(comm).strip()}]"


def _slurp(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(4096)


# Putting a port together


def _identify(device: Any) -> Port | None:
    """A udev device as a port, without its state; None if it is none, or vanished while we looked."""
    match = SYSNAME.fullmatch(device.sys_name)
    if not match:
        return None
    try:
        name = device.attributes.get("name")
        node = device.device_node or f"/dev/{device.sys_name}"
        return Port(node, device.sys_name, parse_name(name), int(match[2]), device.device_number)
    except (KeyError, OSError):
        return None


def parse_name(attribute: bytes | None) -> str | None:
    """The sysfs attribute ``name``: the name and a line end. It exists only once a name came (R-GUEST-02)."""
    if attribute is None:
        return None
    text = os.fsdecode(attribute)
    return text[:-1] if text.endswith("\n") else text


def _with_state(port: Port, holders: Mapping[int, tuple[Holder, ...]], complete: bool) -> Port:
    state = read_state(port.sysname)
    found = holders.get(port.number)
    # Debugfs knows better than /proc: another container's process holds it, or the kernel its console.
    nobody = state.guest_connected is False or (complete and not state.guest_connected)
    return port.replace(state=state, holders=found or (() if nobody else None))


def _order(port: Port) -> tuple[int, ...]:
    match = SYSNAME.fullmatch(port.sysname)
    return tuple(map(int, match.groups())) if match else ()


def _is_called(port: Port, wanted: str) -> bool:
    if "/" in wanted:
        return wanted == port.device or _device_number(wanted) == port.number
    return wanted in (port.name, port.sysname)


def _not_found(wanted: str, ports: Iterable[Port]) -> str:
    what = f"no virtio-serial port {'at' if '/' in wanted else 'is named'} '{printable(wanted)}'"
    known = ", ".join(str(port) for port in ports)
    return f"{what}; there are: {known}" if known else f"{what}; {why_no_ports()}"


def _console_devices() -> Iterable[str]:
    for device in sorted(_entries(VIRTIO_DEVICES)):
        path = os.path.join(VIRTIO_DEVICES, device)
        try:
            if int(_slurp(os.path.join(path, "device")), 16) == CONSOLE_DEVICE_ID:
                yield path
        except (OSError, ValueError):
            continue


def _entries(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []
