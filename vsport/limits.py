"""How many descriptors this process may have."""

from __future__ import annotations

import contextlib
import resource

__all__ = ["raise_descriptor_limit"]


def raise_descriptor_limit(needed: int) -> int:
    """Raises the soft limit to the hard one if ``needed`` is more than it allows; returns what is allowed then.

    The default of 1024 is for programs with select(), which has no larger numbers; here is none.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed:
        with contextlib.suppress(OSError, ValueError):  # what a sandbox forbids is no reason not to try
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
