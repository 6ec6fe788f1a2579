"""Booting User Mode Linux: a kernel that is an ordinary program, with the host's files as its root file system."""

from __future__ import annotations

from vsport.lab.machine import Machine

__all__ = ["command_line"]

_INIT = "mount -t hostfs -o hostfs={payload} none /mnt && exec /mnt/vsport/init /dev/ttyS0"

_CONSOLE_PORT = 3
"""The virtio device id of a console."""


def command_line(machine: Machine) -> list[str]:
    """What starts this guest; its current directory has to be the tree. See R-VU-105 for the device."""
    if machine.share is not None:
        line = f"share /mnt/share hostfs hostfs={machine.share_link} 0 0\n"
        with (machine.payload / "vsport/fstab").open("a") as fstab:
            fstab.write(line)
    return [
        *("env", "-i", f"LD_LIBRARY_PATH={machine.tree.libraries}", f"HOME={machine.directory}"),
        str(machine.tree.uml),
        f"mem={machine.memory_mib}M",
        # Everything of the tree through one link: a kernel's command line has no way to quote spaces in a path.
        *("rootfstype=hostfs", f"rootflags={machine.tree_link}/", "ro"),
        *(f"virtio_uml.device={machine.socket}:{_CONSOLE_PORT}" for _ in [machine.socket_path] if _),
        *("con=null", "con0=null,fd:1", f"ssl0=fd:{machine.channel_fd}"),
        f"uml_dir={machine.directory}/",
        *machine.extra_args,
        *("init=/bin/sh", "--", "-c", f'"{_INIT.format(payload=machine.payload)}"'),
    ]
