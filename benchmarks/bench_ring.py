"""What does a chain cost between guest memory and a descriptor? Floor: the same writev() or readv() without a ring."""

import mmap
import os

import pytest
from floors import compare

from vsport._ring import DeviceQueue, DriverQueue, Memory, Region, Status

SIZE = 256
DATA = 1 << 20


@pytest.fixture
def rings():
    """(device side, driver side, memory): a ring of 256, with a megabyte for data behind it."""
    buffer = mmap.mmap(-1, DATA + (SIZE << 16))
    memory = Memory([Region(0, len(buffer), 0, buffer, 0)])
    driver = DriverQueue(memory, 0, SIZE, event_idx=True)
    device = DeviceQueue(0)
    device.start(memory, SIZE, driver.desc, driver.avail, driver.used, event_idx=True)
    yield device, driver, memoryview(buffer)
    device.stop()


def offer(driver, size, *, writable):
    for number in range(SIZE):
        element = [(DATA + number * size, size)]
        driver.add(writable=element) if writable else driver.add(readable=element)
    driver.publish()


def collect(driver):
    done = 0
    while driver.collect() is not None:
        done += 1
    return done


@pytest.mark.parametrize("size", [64, 4096, 32768])
def test_drain(benchmark, rings, size):
    device, driver, buffer = rings
    null = os.open("/dev/null", os.O_WRONLY)
    pieces = [buffer[DATA + number * size : DATA + (number + 1) * size] for number in range(SIZE)]

    def ours():
        offer(driver, size, writable=False)
        assert device.drain(null, budget=1 << 30) is Status.EMPTY
        assert collect(driver) == SIZE

    def floor():
        assert os.writev(null, pieces) == SIZE * size

    compare(benchmark, ours, floor, against="writev", rounds=200, work=SIZE * size)
    os.close(null)


@pytest.mark.parametrize("size", [64, 4096, 32768])
def test_fill(benchmark, rings, size):
    device, driver, buffer = rings
    zero = os.open("/dev/zero", os.O_RDONLY)
    pieces = [buffer[DATA + number * size : DATA + (number + 1) * size] for number in range(SIZE)]

    def ours():
        offer(driver, size, writable=True)
        assert device.fill(zero, budget=1 << 30) is Status.EMPTY
        assert collect(driver) == SIZE

    def floor():
        assert os.readv(zero, pieces) == SIZE * size

    compare(benchmark, ours, floor, against="readv", rounds=200, work=SIZE * size)
    os.close(zero)
