"""How long does a real kernel's device stand still when another process takes over, and when is its host answered?"""

import contextlib
import os
import tempfile
from pathlib import Path

import pytest
from distributions import tell
from kernels import Succession

HANDOVERS = int(os.environ.get("HANDOVERS", "100"))
GOAL_MS = 5.0


@pytest.mark.timeout(60 + 2 * HANDOVERS)
@pytest.mark.parametrize("hosts", ["quiet", "talk", "flood"])
def test_pause_of_a_live_kernel(benchmark, hosts):
    """``talk``: a host on each port asks and is answered all the time; ``flood``: both ways as much as goes through."""
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="vs-"))
        line = stack.enter_context(Succession("uml", Path(directory), hosts))
        benchmark.pedantic(line.hand_over, rounds=HANDOVERS if benchmark.enabled else 2)
    info = benchmark.extra_info
    tell(info, f"pause (p99 at most {GOAL_MS:g})", line.pauses)
    if line.answered:
        tell(info, "from going on to the first answer", line.answered)
    info["pauses longer than that"] = sum(pause > GOAL_MS for pause in line.pauses)
