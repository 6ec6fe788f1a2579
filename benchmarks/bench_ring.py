"""What does a buffer cost in a ring? Floors: writev(), readv() and memcpy of the same bytes.

The device's side only is timed here: what the driver's side does before and after is left out. Bytes go from guest
memory to a descriptor (drain), from a descriptor to guest memory (fill), or from a program's bytes to guest memory
(copy), in batches of chains with one buffer each.
"""

import mmap
import os
import time
from typing import NamedTuple

import pytest
from floors import in_turns, record_ratio

from vsport._ring import DeviceQueue, DriverQueue, Memory, Region

SIZE = 256
"""Of the ring."""
DATA = 1 << 20
"""Where buffers begin in guest memory; the ring is before them."""
LAYOUTS = ["split", "packed"]


class Ring(NamedTuple):
    """Both sides of a ring, and the guest's memory."""

    device: DeviceQueue
    driver: DriverQueue
    buffer: memoryview

    def offer(self, count, size, *, writable):
        """Offers ``count`` chains with a buffer of ``size`` bytes each."""
        for number in range(count):
            element = [(DATA + number * size, size)]
            self.driver.add(writable=element) if writable else self.driver.add(readable=element)
        self.driver.publish()

    def collect(self, count):
        """The device has to have used as many."""
        assert sum(1 for _ in iter(self.driver.collect, None)) == count

    def pieces(self, count, size):
        """The same buffers, without a ring."""
        return [self.buffer[DATA + number * size : DATA + (number + 1) * size] for number in range(count)]


@pytest.fixture
def ring(layout):
    buffer = mmap.mmap(-1, DATA + (SIZE << 16))
    memory = Memory([Region(0, len(buffer), 0, buffer, 0)])
    features = {"event_idx": True, "packed": layout == "packed"}
    driver = DriverQueue(memory, 0, SIZE, **features)
    device = DeviceQueue(0)
    device.start(memory, SIZE, driver.desc, driver.avail, driver.used, **features)
    yield Ring(device, driver, memoryview(buffer))
    device.stop()


def seconds_of(function):
    """How long a call takes, and what it returned."""
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def measure(benchmark, ring, work, floor, *, against, batch=SIZE, size, writable):
    """``work`` is what the device does with ``batch`` chains; ``floor`` returns how many bytes it moved."""

    def ours():
        ring.offer(batch, size, writable=writable)
        moved = -ring.device.bytes_moved
        seconds, _ = seconds_of(work)
        moved += ring.device.bytes_moved
        assert moved == batch * size
        ring.collect(batch)
        return seconds

    def theirs():
        seconds, moved = seconds_of(floor)
        assert moved == batch * size
        return seconds

    found = in_turns(benchmark, 300, theirs=theirs, ours=ours)
    record_ratio(
        benchmark, "time of the device's side", found["ours"], found["theirs"], against=against, better="lower"
    )


@pytest.mark.parametrize("size", [64, 4096, 32768])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_drain(benchmark, ring, layout, size):
    null = os.open("/dev/null", os.O_WRONLY)
    pieces = ring.pieces(SIZE, size)
    try:
        measure(
            benchmark,
            ring,
            lambda: ring.device.drain(null, budget=1 << 30),
            lambda: os.writev(null, pieces),
            against="writev",
            size=size,
            writable=False,
        )
    finally:
        os.close(null)


@pytest.mark.parametrize("size", [64, 4096, 32768])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fill(benchmark, ring, layout, size):
    zero = os.open("/dev/zero", os.O_RDONLY)
    pieces = ring.pieces(SIZE, size)
    try:
        measure(
            benchmark,
            ring,
            lambda: ring.device.fill(zero, budget=1 << 30),
            lambda: os.readv(zero, pieces),
            against="readv",
            size=size,
            writable=True,
        )
    finally:
        os.close(zero)


@pytest.mark.parametrize("size", [64, 4096])
@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_copy(benchmark, ring, layout, batch, size):
    data = bytes(batch * size)
    target = ring.buffer[DATA : DATA + len(data)]

    def memcpy():
        target[:] = data
        return len(data)

    measure(
        benchmark,
        ring,
        lambda: ring.device.fill_from(data),
        memcpy,
        against="memcpy",
        batch=batch,
        size=size,
        writable=True,
    )
