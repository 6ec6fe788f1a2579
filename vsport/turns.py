"""How the scheduler treats a process that mostly waits, and should go on at once when there is something to do."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct

__all__ = ["ask_for_short_turns"]

_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274, "riscv64": 274}
"""The number of the system call, for which the C library has no function before 2.41."""
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")
"""struct sched_attr: size, policy, flags, nice, priority, runtime, deadline, period."""
_TURN_NANOSECONDS = 100_000
"""The shortest turn that there is."""


def ask_for_short_turns() -> None:
    """Has this thread run in turns of 0.1 ms, which come the sooner, for the same share of the processor.

    Nobody needs a right for that, and nobody gets less by it. Linux before 6.12 takes no notice; elsewhere, and for
    those who were given another policy than the usual one, nothing happens.
    """
    number = _SCHED_SETATTR.get(platform.machine())
    if number is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    wanted = _ATTRIBUTES.pack(_ATTRIBUTES.size, os.SCHED_OTHER, 0, nice, 0, _TURN_NANOSECONDS, 0, 0)
    with contextlib.suppress(OSError):  # a sandbox may forbid the call
        ctypes.CDLL(None).syscall(number, 0, wanted, 0)
