"""Short turns are asked for where that is possible, and elsewhere nothing happens."""

import os
import platform
import struct
import subprocess
import sys

import pytest

SCHED_GETATTR = {"x86_64": 315, "aarch64": 275, "riscv64": 275}
ATTRIBUTES = struct.Struct("=IIQiIQQQ")


def run(prelude=""):
    """(policy, nice value, length of a turn in nanoseconds) of a process that has asked."""
    program = f"""
import ctypes, os, platform, sys
from vsport.turns import ask_for_short_turns
{prelude}
ask_for_short_turns()
attributes = ctypes.create_string_buffer({ATTRIBUTES.size})
assert not ctypes.CDLL(None).syscall({SCHED_GETATTR[os.uname().machine]}, 0, attributes, {ATTRIBUTES.size}, 0)
sys.stdout.buffer.write(attributes.raw)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    _, policy, _, nice, _, turn, _, _ = ATTRIBUTES.unpack(done.stdout)
    return policy, nice, turn


def kernel():
    return tuple(int(number) for number in platform.release().split("-")[0].split(".")[:2])


pytestmark = pytest.mark.skipif(os.uname().machine not in SCHED_GETATTR, reason="its numbers are not known here")


@pytest.mark.skipif(kernel() < (6, 12), reason="turns have had lengths since Linux 6.12")
def test_turns_are_short_and_the_rest_is_as_before():
    assert run() == (os.SCHED_OTHER, os.getpriority(os.PRIO_PROCESS, 0), 100_000)


def test_who_is_nice_stays_so():
    policy, nice, _ = run("os.nice(5)")
    assert (policy, nice) == (os.SCHED_OTHER, os.getpriority(os.PRIO_PROCESS, 0) + 5)


def test_another_policy_is_left_alone():
    assert run("os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))")[0] == os.SCHED_BATCH


def test_a_machine_whose_call_is_not_known_is_left_alone():
    before = run("ask_for_short_turns = lambda: None")
    assert run("platform.machine = lambda: 'pdp11'") == before


def test_a_call_that_is_forbidden_costs_nothing():
    """A sandbox answers EPERM; here it is a number that no kernel knows."""
    run(f"from vsport import turns; turns._SCHED_SETATTR = {{platform.machine(): {1 << 20}}}")
