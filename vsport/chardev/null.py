"""``null``: takes everything, has nothing."""

from __future__ import annotations

import os

from vsport.chardev.base import AlwaysConnected, open_file

__all__ = ["Null"]


class Null(AlwaysConnected):
    """``--chardev null``: /dev/null, and connected. (QEMU's never is, so that a guest that writes to it hangs.)"""

    kind = "null"
    summary = "takes everything and has nothing"
    PASSING = os.O_WRONLY

    def _start(self) -> None:
        self._connected(open_file(os.devnull, os.O_WRONLY, "the null device"))
