"""The lab: a real Linux guest in about two seconds, without KVM and without root.

`build` makes a Debian tree once; `Guest` boots a kernel out of it, User Mode Linux or QEMU, attached to a vhost-user
back end, and runs commands in it:

    with Guest("uml", tree=directory / "tree", socket_path=socket) as guest:
        guest.run(["vsport-open", "--list"], check=True)

Nothing of the tree runs in a chroot: both programs are started straight out of it with its own libraries, so that the
lab needs neither namespaces nor privileges, and works in a container as well.
"""

from vsport.lab.build import build
from vsport.lab.run import PIPE, Guest, GuestProcess
from vsport.lab.tree import LabError, Tree, default_directory

__all__ = ["PIPE", "Guest", "GuestProcess", "LabError", "Tree", "build", "default_directory"]
