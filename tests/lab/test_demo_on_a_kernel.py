"""`vsport demo --guest uml|qemu` tells the simulated guest's story on a real kernel, word for word."""

import json
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
