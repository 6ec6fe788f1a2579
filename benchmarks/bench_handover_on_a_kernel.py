"""How long does a real kernel's device stand still when another process takes over, and when is its host answered?"""

import contextlib
import os
import tempfile
from pathlib import Path

import pytest
from distributions import tell
from floors import record_distribution
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
    tell(benchmark, "pause", line.pauses, p99_at_most=GOAL_MS)
    if line.answered:
        tell(benchmark, "from going on to the first answer", line.answered)
    values = {"pause": line.pauses, **({"first answer": line.answered} if line.answered else {})}
    record_distribution(benchmark, series="handover of a live kernel", label=f"{hosts} (ms)", values=values)
