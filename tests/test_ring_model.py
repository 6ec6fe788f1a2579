"""The engine's two sides against a model in plain Python that knows only what a queue is: chains in, chains out.

Split and packed, with and without IN_ORDER: a queue is the same. Two machines, one for each direction of a port. After
each step the shared memory itself is compared with the model, and whoever sleeps must have nothing to wake up for.
"""

from __future__ import annotations

import fcntl
import os
from collections import deque
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vsport._ring import DeviceQueue, DriverQueue, Memory, Region, Status

DATA = 1 << 20
TABLES = 3 << 20
RAM = 4 << 20
SIZES = st.lists(st.sampled_from([0, 1, 2, 7, 100, 1500, 5000]), min_size=1, max_size=6)
NOW = st.sampled_from([True, True, True, False])
BUDGETS = st.sampled_from([1, 3, 1000, 1 << 20])


@dataclass
class Chain:
    head: int
    gpa: int
    size: int
    slots: int
    written: int = 0


class QueueModel(RuleBasedStateMachine):
    """What both directions have in common: the driver's half, and notifications."""

    PACKED = st.booleans()

    def __init__(self) -> None:
        super().__init__()
        self.added: list[Chain] = []
        self.offered: deque[Chain] = deque()
        self.used: list[Chain] = []
        self.in_driver = 0
        self.next_gpa = DATA
        self.next_table = TABLES
        self.driver_sleeps = self.device_sleeps = False
        self.chains_before = 0
        self.read_fd, self.write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    @initialize(
        size=st.sampled_from([1, 2, 3, 7, 8]),
        event_idx=st.booleans(),
        indirect=st.booleans(),
        packed=st.runner().flatmap(lambda machine: machine.PACKED),
        in_order=st.booleans(),
    )
    def make(self, size: int, event_idx: bool, indirect: bool, packed: bool, in_order: bool) -> None:
        self.size = size if packed else {3: 4, 7: 8}.get(size, size)
        self.event_idx, self.indirect, self.packed, self.in_order = event_idx, indirect, packed, in_order
        self.memory = Memory(
            [Region(0, RAM // 2, RAM, bytearray(RAM // 2), 0), Region(RAM // 2, RAM // 2, 0, bytearray(RAM // 2), 0)]
        )
        self.driver = DriverQueue(
            self.memory, 0, self.size, event_idx=event_idx, indirect=indirect, packed=packed, in_order=in_order
        )
        self.device = self.make_device()
        self.start(0, reset=True)

    def make_device(self) -> DeviceQueue:
        return DeviceQueue(0)

    def start(self, base: int, *, reset: bool) -> None:
        ring = self.driver
        self.device.start(
            self.memory,
            self.size,
            RAM + ring.desc,
            RAM + ring.avail,
            RAM + ring.used,
            base=base,
            event_idx=self.event_idx,
            indirect=self.indirect,
            packed=self.packed,
            in_order=self.in_order,
            reset=reset,
        )

    def teardown(self) -> None:
        os.close(self.read_fd)
        os.close(self.write_fd)

    @rule()
    def move(self) -> None:
        """The guest goes on with a copy of its memory, on another device, which is told how far this one had come."""
        next_avail, offset = self.device.stop(), self.device.offset
        self.memory = Memory([region._replace(buffer=bytearray(region.buffer)) for region in self.memory.regions])
        self.driver.rebind(self.memory)
        self.device = self.make_device()
        self.device.restore(next_avail, offset)
        self.start(next_avail, reset=False)
        self.chains_before = len(self.used)
        self.device_sleeps = False

    # -- the driver ------------------------------------------------------------------------------------------------

    def add(self, sizes: list[int], *, writable: bool, indirect: bool) -> Chain | None:
        """Adds a chain of buffers one after the other, in memory that no other chain uses for long."""
        if self.next_gpa + sum(sizes) > TABLES:
            self.next_gpa = DATA
        elements, gpa = [], self.next_gpa
        for size in sizes:
            elements.append((gpa, size))
            gpa += size
        self.next_table = TABLES + (self.next_table + 256) % 16384  # far more than chains can be in flight
        table = self.next_table if indirect and self.indirect else 0
        needed = 1 if table else len(sizes)
        room = self.driver.free
        try:
            head = self.driver.add(*(((), elements) if writable else (elements, ())), indirect_table=table)
        except BufferError:
            assert needed > room
            return None
        assert self.driver.free == room - needed
        self.added.append(Chain(head, self.next_gpa, sum(sizes), needed))
        self.next_gpa = gpa
        return self.added[-1]

    @rule()
    def publish(self) -> None:
        kick = self.driver.publish()
        if self.added and self.device_sleeps:
            assert kick, "the device sleeps and is not woken"
            self.device_sleeps = False
        self.offered += self.added
        self.added = []

    @rule()
    def collect(self) -> None:
        assert self.driver.in_flight == len(self.used) - self.in_driver + len(self.offered) + len(self.added)
        used = self.driver.collect()
        if used is None:
            assert self.in_driver == len(self.used)
            return
        chain = self.used[self.in_driver]
        assert used == (chain.head, chain.written)
        self.in_driver += 1

    @rule()
    def driver_goes_to_sleep(self) -> None:
        waiting = self.in_driver < len(self.used)
        assert self.driver.calls_on() is waiting
        self.driver_sleeps = not waiting

    @rule()
    def driver_wants_no_calls(self) -> None:
        self.driver_sleeps = False
        self.driver.calls_off()

    # -- the device ------------------------------------------------------------------------------------------------

    def complete(self, written: int = 0) -> None:
        chain = self.offered.popleft()
        chain.written = written
        self.used.append(chain)

    @rule()
    def device_goes_to_sleep(self) -> None:
        waiting = bool(self.offered)
        assert self.device.kicks_on() is waiting
        self.device_sleeps = not waiting

    @rule()
    def device_wants_no_kicks(self) -> None:
        self.device_sleeps = False
        self.device.kicks_off()

    @rule()
    def notify(self) -> None:
        call = self.device.notify()
        if self.driver_sleeps and self.in_driver < len(self.used):
            assert call, "the driver sleeps and is not woken"
            self.driver_sleeps = False

    @invariant()
    def memory_says_the_same(self) -> None:
        assert self.device.pending() == len(self.offered)
        assert self.device.chains == len(self.used) - self.chains_before
        assert self.driver.all_used() is (not self.offered)
        if self.packed:
            self.packed_ring_says_the_same()
        else:
            self.split_ring_says_the_same()

    def split_ring_says_the_same(self) -> None:
        """The index fields and the used elements as bytes, read without the engine's help."""
        ring = self.driver
        assert self.read16(ring.used + 2) == len(self.used) & 0xFFFF == self.device.used_idx
        assert self.read16(ring.avail + 2) == (len(self.used) + len(self.offered)) & 0xFFFF
        assert self.device.next_avail == len(self.used) & 0xFFFF
        for i in range(max(0, len(self.used) - self.size), len(self.used) if not self.in_order else 0):
            element = self.memory.read(ring.used + 4 + 8 * (i % self.size), 8)
            assert element == self.used[i].head.to_bytes(4, "little") + self.used[i].written.to_bytes(4, "little")

    def packed_ring_says_the_same(self) -> None:
        """Where the device is, and what the flags of the heads that were offered and not used say (R-RING-42)."""
        passed = sum(chain.slots for chain in self.used)
        assert self.device.next_avail == self.device.used_idx == self.place(passed)
        for chain in self.offered:
            flags = self.read16(self.driver.desc + 16 * (passed % self.size) + 14)
            assert flags & 0x8080 == (0x80 if self.place(passed) >> 15 else 0x8000)
            passed += chain.slots
        flags = self.read16(self.driver.desc + 16 * (passed % self.size) + 14)
        assert flags & 0x8080 != (0x80 if self.place(passed) >> 15 else 0x8000)

    def place(self, slots: int) -> int:
        """Where a packed ring is after so many slots; its wrap counter begins with 1."""
        return slots % self.size | (~(slots // self.size) & 1) << 15

    def read16(self, gpa: int) -> int:
        return int.from_bytes(self.memory.read(gpa, 2), "little")


class Transmit(QueueModel):
    """The guest's bytes: each arrives once, in order, or is counted as dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = 0
        self.fresh = 0
        self.in_pipe = b""
        fcntl.fcntl(self.write_fd, fcntl.F_SETPIPE_SZ, 8192)

    def bytes_of(self, chain: Chain) -> bytes:
        return self.memory.read(chain.gpa, chain.size)

    def waiting(self) -> bytes:
        """All readable bytes that the device has not consumed."""
        return b"".join(map(self.bytes_of, self.offered))[self.offset :]

    def consume(self, count: int) -> None:
        """The device has taken ``count`` bytes: every chain that ends among them is complete."""
        count += self.offset
        while self.offered and self.offered[0].size <= count:
            count -= self.offered[0].size
            self.complete()
        self.offset = count
        assert self.device.offset == self.offset

    @rule(sizes=SIZES, indirect=st.booleans(), publish=NOW)
    def add_readable(self, sizes: list[int], indirect: bool, publish: bool) -> None:
        chain = self.add(sizes, writable=False, indirect=indirect)
        if chain is not None:
            self.fresh += 1
            self.memory.write(chain.gpa, bytes((self.fresh + i) % 251 for i in range(chain.size)))
        if publish:
            self.publish()

    @rule(budget=BUDGETS)
    def drain(self, budget: int) -> None:
        before, moved = self.waiting(), self.device.bytes_moved
        status = self.device.drain(self.write_fd, budget=budget)
        moved = self.device.bytes_moved - moved
        self.in_pipe += before[:moved]
        assert (status is Status.MORE) == (moved == budget)
        assert status is not Status.EMPTY or moved == len(before)
        assert status is not Status.BLOCKED or (moved < len(before) and self.in_pipe)
        self.consume(moved)

    @rule(budget=BUDGETS, room=st.sampled_from([0, 1, 5, 3000, 1 << 20]), bite=st.sampled_from([1, 1000, 1 << 20]))
    def drain_into(self, budget: int, room: int, bite: int) -> None:
        taken = bytearray()

        def sink(view: memoryview) -> int:
            some = view[: min(bite, room - len(taken))]
            taken.extend(some)
            return len(some)

        before = self.waiting()
        bite = max(bite, len(before) // 50)  # a step is not to take seconds
        status = self.device.drain_into(sink, budget=budget)
        assert bytes(taken) == before[: min(room, budget)]
        self.consume(len(taken))
        if len(taken) == budget:
            assert status is Status.MORE
        else:
            assert status is (Status.BLOCKED if self.offered else Status.EMPTY)

    @rule(count=st.sampled_from([1, 100, 1 << 20]))
    def host_reads(self, count: int) -> None:
        try:
            data = os.read(self.read_fd, count)
        except BlockingIOError:
            data = b""
        assert data == self.in_pipe[:count]
        self.in_pipe = self.in_pipe[count:]

    @rule()
    def discard(self) -> None:
        assert self.device.discard() == len(self.waiting())
        self.offset = 0
        while self.offered:
            self.complete()

    @rule()
    def return_partial(self) -> None:
        dropped = self.offered[0].size - self.offset if self.offset else 0
        assert self.device.return_partial() == dropped
        if self.offset:
            self.complete()
        self.offset = 0

    @rule(limit=st.sampled_from([1, 50, 1 << 16]))
    def pop(self, limit: int) -> None:
        message = self.device.pop(limit)
        if not self.offered:
            assert message is None
            return
        assert message == self.bytes_of(self.offered[0])[self.offset :][:limit]
        self.offset = 0
        self.complete()

    @rule(reset=st.booleans())
    def stop_and_start(self, reset: bool) -> None:
        self.start(self.device.stop(), reset=reset)
        if reset:
            self.offset = 0
        assert self.device.offset == self.offset
        self.device_sleeps = False


class Receive(QueueModel):
    """The host's bytes: they fill the buffers in order, none is lost, and no buffer comes back empty."""

    def __init__(self) -> None:
        super().__init__()
        self.in_pipe = b""
        self.fresh = 0

    def data(self, count: int) -> bytes:
        self.fresh += 1
        return bytes((self.fresh * 7 + i) % 251 for i in range(count))

    def expect(self, data: bytes) -> None:
        """``data`` has gone into the buffers in order; the last one may be half full."""
        while data:
            chain = self.offered[0]
            part, data = data[: chain.size], data[chain.size :]
            assert self.memory.read(chain.gpa, len(part)) == part
            self.complete(len(part))

    @rule(sizes=SIZES, indirect=st.booleans(), publish=NOW)
    def add_writable(self, sizes: list[int], indirect: bool, publish: bool) -> None:
        self.add([*sizes[:-1], sizes[-1] or 1], writable=True, indirect=indirect)
        if publish:
            self.publish()

    @rule(count=st.sampled_from([1, 99, 4000]))
    @precondition(lambda self: len(self.in_pipe) < 30000)
    def host_writes(self, count: int) -> None:
        data = self.data(count)
        assert os.write(self.write_fd, data) == count
        self.in_pipe += data

    @rule(budget=BUDGETS)
    def fill(self, budget: int) -> None:
        room = sum(chain.size for chain in self.offered)
        moved = min(budget, room, len(self.in_pipe))
        status = self.device.fill(self.read_fd, budget=budget)
        self.expect(self.in_pipe[:moved])
        self.in_pipe = self.in_pipe[moved:]
        if moved == budget:
            assert status is Status.MORE
        else:
            assert status is (Status.BLOCKED if self.offered else Status.EMPTY)

    @rule(count=st.sampled_from([0, 1, 99, 4000]))
    def fill_from(self, count: int) -> None:
        data = self.data(count)
        moved = self.device.fill_from(data)
        assert moved == min(count, sum(chain.size for chain in self.offered))
        self.expect(data[:moved])

    @rule(count=st.sampled_from([1, 8, 300]))
    def push(self, count: int) -> None:
        data = self.data(count)
        done = self.device.push(data)
        while self.offered and self.offered[0].size < count:
            self.complete(0)
        assert done is bool(self.offered)
        if done:
            chain = self.offered[0]
            assert self.memory.read(chain.gpa, count) == data
            self.complete(count)

    @rule()
    def stop_and_start(self) -> None:
        self.start(self.device.stop(), reset=False)
        self.device_sleeps = False


for machine in (Transmit, Receive):
    machine.TestCase.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)

TestTransmit = Transmit.TestCase
TestReceive = Receive.TestCase
