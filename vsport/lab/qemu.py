"""Booting Debian's cloud kernel in QEMU, by TCG, with the lab's disk image as its root file system."""

from __future__ import annotations

from vsport.lab.cpio import Archive
from vsport.lab.machine import Machine

__all__ = ["command_line"]

_VIRTQUEUE_SIZE = 128
_CONFIG_SIZE = 12
_CONSOLE_PORT = 3
"""The virtio device id of a console."""


def command_line(machine: Machine) -> list[str]:
    """What starts this guest. Makes the first file system, which carries what this run brings along."""
    initramfs = machine.directory / "initramfs"
    initramfs.write_bytes(bytes(_initramfs(machine)))
    root = f"if=none,id=root,format=raw,readonly=on,file={machine.tree_link}/vsport/root.ext4"
    return [
        *machine.tree.program("usr/bin/qemu-system-x86_64"),
        *("-L", f"{machine.tree.root}/usr/share/qemu", "-L", f"{machine.tree.root}/usr/share/seabios"),
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", f"{machine.memory_mib}M"),
        *("-kernel", str(machine.tree.kernel), "-initrd", str(initramfs)),
        *("-append", "console=ttyS0 quiet panic=-1 mitigations=off rdinit=/init"),
        *("-serial", "stdio"),
        *("-chardev", f"socket,id=vsport-lab,fd={machine.channel_fd}", "-serial", "chardev:vsport-lab"),
        # NVMe is built into that kernel, which spares it loading a module for its disk.
        *("-drive", root, "-device", "nvme,drive=root,serial=root"),
        *_device(machine),
        *machine.extra_args,
    ]


def _device(machine: Machine) -> list[str]:
    """The generic vhost-user device as a console (R-VU-104), and the shared memory that it needs (R-VU-64)."""
    if machine.socket_path is None:
        return []
    queues = 2 * machine.max_ports + 2
    device = f"vhost-user-test-device-pci,chardev=vsport,virtio-id={_CONSOLE_PORT},num_vqs={queues}"
    return [
        *("-object", f"memory-backend-memfd,id=memory,size={machine.memory_mib}M,share=on"),
        *("-numa", "node,memdev=memory"),
        *("-chardev", f"socket,id=vsport,path={machine.socket}"),
        *("-device", f"{device},config_size={_CONFIG_SIZE},vq_size={_VIRTQUEUE_SIZE}"),
    ]


def _initramfs(machine: Machine) -> Archive:
    archive = Archive()
    for name in "bin", "dev", "root", "mnt":
        archive.directory(name)
    busybox = (machine.tree.root / "usr/bin/busybox").read_bytes()
    archive.file("bin/busybox", busybox, 0o755)
    archive.file("init", (machine.payload / "vsport/init-qemu").read_bytes(), 0o755)
    archive.tree(machine.payload, "mnt")
    if machine.share is not None:
        archive.tree(machine.share, "mnt/share")
    return archive
