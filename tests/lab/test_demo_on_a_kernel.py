"""`vsport demo --guest uml|qemu` tells the simulated guest's story on a real kernel, word for word."""

import json
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.lab


def story(*options):
    done = subprocess.run(
        [sys.executable, "-m", "vsport", "demo", "--json", *options],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [(thing["who"], thing["what"]) for thing in map(json.loads, done.stdout.splitlines())]


@pytest.mark.parametrize("kind", ["uml", "qemu"])
def test_the_story_is_the_same_on_a_real_kernel(lab_tree, kind):
    assert story("--guest", kind) == story()


def test_a_live_guest_keeps_its_host_while_its_device_goes_to_another_process(lab_tree):
    """R-MIG-23: the same agent answers on the same socket, and the pause is told."""
    told = [what for _, what in story("--migrate", "--guest", "uml")]
    assert sum("is answered after" in what for what in told) == 2
    (pause,) = filter(None, (re.search(r"was paused for ([\d.]+) ms", what) for what in told))
    assert 0 < float(pause[1]) < 1000
    assert told[-1] == "sees that its host leaves, for the first time, and ends"
