"""What does a buffer cost that goes from one core to another and back? Peer: Linux's ringtest. Floor: a shared counter.

Driver and device are two threads of this process, each on a core of its own. Both poll, below the GIL, and no bytes are
moved: so do the two threads of ringtest, whose rings are as large. ``virtio_ring_0_9`` is ringtest's split layout,
``ring`` its like of the packed one. In ping-pong there is one buffer under way; else the driver keeps the ring full and
publishes ``batch`` buffers together (ringtest knows batches only of notifications, of which there are none here).
"""

import mmap
import os
import shutil
import statistics
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ringtest
from floors import OURS, at_most, in_turns, record_point, record_ratio

from vsport._ring import DeviceQueue, DriverQueue, Memory, Region

SIZE = 256
"""Of the ring."""
CORES = (0, 1)
"""The device's, and the driver's."""
LINGER = 20_000_000
"""Nanoseconds without a buffer after which the device's thread looks whether it is still needed."""
ROUNDS = 7
PEERS = {"split": "virtio_ring_0_9", "packed": "ring"}
COUNTER = Path(__file__).with_name("shared_counter.c")


@pytest.fixture(scope="module", autouse=True)
def _two_cores():
    if not set(CORES) <= os.sched_getaffinity(0):
        pytest.skip("needs two cores, 0 and 1")


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """ringtest's, compiled; skips if it is not to be had."""
    try:
        return ringtest.build(tmp_path_factory.mktemp("ringtest"))
    except ringtest.Absent as absent:
        pytest.skip(str(absent))


@pytest.fixture(scope="module")
def shared_counter(tmp_path_factory):
    """A function that says how many nanoseconds a round trip between the cores takes, ``count`` times."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("no C compiler for the floor, shared_counter.c")
    program = tmp_path_factory.mktemp("counter") / COUNTER.stem
    subprocess.run([compiler, "-O2", "-pthread", COUNTER, "-o", program], check=True)

    def round_trip(count):
        arguments = [str(number) for number in (*CORES, count)]
        return float(subprocess.run([program, *arguments], check=True, capture_output=True, timeout=60).stdout)

    return round_trip


class CrossCore:
    """Both sides of a ring, on a core each."""

    def __init__(self, layout):
        features = {"event_idx": True, "packed": layout == "packed"}
        self.data = DriverQueue.footprint(SIZE)
        buffer = mmap.mmap(-1, self.data + mmap.PAGESIZE)
        memory = Memory([Region(0, len(buffer), 0, buffer, 0)])
        self.driver = DriverQueue(memory, 0, SIZE, **features)
        self.device = DeviceQueue(0)
        self.device.start(memory, SIZE, self.driver.desc, self.driver.avail, self.driver.used, **features)

    def run(self, count, *, outstanding=SIZE, batch=1):
        """Nanoseconds for each of ``count`` buffers."""
        done = threading.Event()
        with ThreadPoolExecutor(2) as threads:
            device = threads.submit(self._discard_until, done)
            driver = threads.submit(self._exchange, count, outstanding, batch)
            try:
                return driver.result() / count
            finally:
                done.set()
                device.result()

    def _discard_until(self, done):
        os.sched_setaffinity(0, {CORES[0]})  # of this thread only
        while not done.is_set():
            self.device.discard(linger_ns=LINGER)

    def _exchange(self, count, outstanding, batch):
        os.sched_setaffinity(0, {CORES[1]})
        offer = {"gpa": self.data, "length": 64, "outstanding": outstanding, "batch": batch}
        assert self.driver.exchange(SIZE, **offer) == SIZE  # until the device's side is there
        started = time.perf_counter_ns()
        assert self.driver.exchange(count, **offer) == count
        return time.perf_counter_ns() - started


def size_of(benchmark, count):
    """How many buffers: few where nothing is measured."""
    return count if benchmark.enabled else 1000


@pytest.mark.parametrize("batch", [1, 4, 16, 64])
@pytest.mark.parametrize("layout", PEERS)
def test_batches(benchmark, programs, layout, batch):
    ring, peer = CrossCore(layout), PEERS[layout]
    count = size_of(benchmark, 1_000_000)
    found = in_turns(
        benchmark,
        ROUNDS,
        theirs=lambda: ringtest.run(programs[peer], cycles=count, ring_size=SIZE, cores=CORES),
        ours=lambda: ring.run(count, batch=batch),
    )
    goal = at_most(1.0 if layout == "split" else 1.5) if batch == 64 else None
    record_ratio(benchmark, "time of a buffer", found["ours"], found["theirs"], against=peer, better="lower", goal=goal)
    record_point(
        benchmark,
        series=layout,
        x=batch,
        x_label="buffers published together",
        y={OURS: statistics.median(found["ours"]), f"ringtest, {peer}": statistics.median(found["theirs"])},
        y_label="ns a buffer",
    )


@pytest.mark.parametrize("layout", PEERS)
def test_ping_pong(benchmark, programs, shared_counter, layout):
    ring, peer = CrossCore(layout), PEERS[layout]
    count = size_of(benchmark, 300_000)
    found = in_turns(
        benchmark,
        ROUNDS,
        counter=lambda: shared_counter(count),
        theirs=lambda: ringtest.run(programs[peer], outstanding=1, cycles=count, ring_size=SIZE, cores=CORES),
        ours=lambda: ring.run(count, outstanding=1),
    )
    goal = at_most(1.0) if layout == "split" else None
    record_ratio(benchmark, "round trip", found["ours"], found["theirs"], against=peer, better="lower", goal=goal)
    record_ratio(benchmark, "round trip", found["ours"], found["counter"], against="shared counter", better="lower")
