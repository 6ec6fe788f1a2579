"""The poller: bytes that move while it waits, with real rings, sockets, files and eventfds."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from vsport._poll import Flow, Poller
from vsport._ring import DeviceQueue, DriverQueue, Memory, Region, Status
from vsport.errors import FrontEndError, GuestError

PATIENCE = 10.0
SIZE = 64
BUFFERS = 1 << 20
STEP = 1 << 16
READ, WRITE, HUP, RDHUP = select.EPOLLIN, select.EPOLLOUT, select.EPOLLHUP, select.EPOLLRDHUP


class Rig(contextlib.ExitStack):
    """One queue with its driver, its kick and call descriptors, a flow, and the socket that the flow is about."""

    def __init__(
        self, poller: Poller | None = None, *, fills: bool = False, event_idx: bool = True, packed: bool = False
    ) -> None:
        super().__init__()
        self.poller = Poller() if poller is None else poller
        self.memory = Memory([Region(0, 16 << 20, 0, mmap.mmap(-1, 16 << 20), 0)])
        self.options = {"event_idx": event_idx, "packed": packed}
        self.driver = DriverQueue(self.memory, 0, SIZE, **self.options)
        self.queue = DeviceQueue(0)
        self.kick_fd, self.call_fd = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2))
        self.start_queue()
        self.queue.call_fd = self.call_fd
        self.ours, self.host = socket.socketpair()
        for end in (self.ours, self.host):
            end.setblocking(False)
            self.enter_context(end)
        self.calls: list[str] = []
        self.flow = Flow(self.poller, self.queue, lambda: self.calls.append("news"), fills=fills)
        self.poller.watch_kick(self.kick_fd, self.queue)
        self.offered = 0

    def start_queue(self) -> None:
        rings = self.driver.desc, self.driver.avail, self.driver.used
        base = self.queue.next_avail
        self.queue.start(self.memory, SIZE, *rings, base=base, reset=False, **self.options)

    def __exit__(self, *details: Any) -> None:
        self.flow.close()
        self.poller.unwatch(self.ours.fileno())
        self.poller.unwatch(self.kick_fd)
        for fd in (self.kick_fd, self.call_fd):
            os.close(fd)
        super().__exit__(*details)

    def start(self, **options: Any) -> None:
        self.flow.start(self.ours.fileno(), **options)

    def send(self, data: bytes) -> bool:
        """The guest sends a chain, and kicks if it is to; says whether it was."""
        where = BUFFERS + STEP * (self.offered % SIZE)
        self.memory.write(where, data)
        self.driver.add([(where, len(data))])
        return self.show()

    def give(self, size: int, count: int = 1) -> bool:
        """The guest gives buffers."""
        for _ in range(count):
            self.driver.add((), [(BUFFERS + STEP * (self.offered % SIZE), size)])
            self.offered += 1
        return self.show()

    def show(self) -> bool:
        self.offered += 1
        wanted = self.driver.publish()
        if wanted:
            os.eventfd_write(self.kick_fd, 1)
        return wanted

    def look(self) -> tuple[list[tuple[int, int]], list[Flow]]:
        """One pass; what Python hears of it."""
        return self.poller.poll(0)

    def until(self, condition: Callable[[], object]) -> None:
        """Waits, with nothing for Python to hear of."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline
            assert self.poller.poll(0.01) == ([], [])

    def called(self) -> bool:
        """Whether the guest has been interrupted since it was asked last."""
        try:
            return os.eventfd_read(self.call_fd) > 0
        except BlockingIOError:
            return False

    def collect(self) -> list[int]:
        lengths = []
        while (used := self.driver.collect()) is not None:
            lengths.append(used[1])
        return lengths

    def host_reads(self, size: int = 1 << 20) -> bytes:
        try:
            return self.host.recv(size)
        except BlockingIOError:
            return b""


@pytest.fixture(params=[False, True], ids=["split", "packed"])
def packed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def drain(packed: bool) -> Iterator[Rig]:
    with Rig(packed=packed) as rig:
        rig.look()
        rig.queue.notify()  # every start ends in an interrupt
        rig.called()
        yield rig


@pytest.fixture
def fill(packed: bool) -> Iterator[Rig]:
    with Rig(fills=True, packed=packed) as rig:
        rig.look()
        rig.queue.notify()
        rig.called()
        yield rig


# -- guest to host -----------------------------------------------------------------------------------------------------


def test_what_the_guest_sends_goes_out_and_nobody_is_woken(drain: Rig) -> None:
    drain.start()
    assert drain.send(b"hello")
    assert drain.look() == ([], [])
    assert drain.host_reads() == b"hello"
    assert drain.collect() == [0]
    assert drain.send(b"again"), "it sleeps, so it wants to be kicked (R-RING-18)"


def test_before_the_start_and_after_the_stop_a_kick_is_pythons(drain: Rig) -> None:
    drain.send(b"early")
    assert drain.look() == ([(drain.kick_fd, READ)], [])
    drain.start()
    assert drain.look() == ([], [])  # the kick was not read
    drain.flow.stop()
    drain.send(b"late")
    assert drain.look() == ([(drain.kick_fd, READ)], [])
    assert drain.host_reads() == b"early"


def test_a_flow_is_good_for_one_run_of_its_queue(drain: Rig) -> None:
    drain.start()
    drain.queue.stop()
    drain.start_queue()
    assert not drain.flow.moves
    drain.send(b"x")
    assert drain.look() == ([(drain.kick_fd, READ)], [])
    assert drain.host_reads() == b""


def test_sent_chains_are_given_back_without_hurry(drain: Rig) -> None:
    """An interrupt for each is what a guest has no use for: by then it may have fetched them."""
    drain.start()
    drain.send(b"1")
    drain.look()
    assert drain.host_reads() == b"1"
    assert not drain.called()
    drain.until(drain.called)


def test_who_has_fetched_its_chains_by_then_is_not_interrupted(drain: Rig) -> None:
    drain.start()
    drain.driver.calls_off()
    drain.send(b"1")
    drain.look()
    assert drain.collect() == [0]
    deadline = time.monotonic() + 0.05
    while time.monotonic() < deadline:
        assert drain.poller.poll(0.001) == ([], [])
    assert not drain.called()


def test_who_may_run_out_of_chains_is_interrupted_at_once(drain: Rig) -> None:
    drain.start()
    for _ in range(SIZE // 2):
        drain.send(b"x")
    drain.look()
    assert drain.called()


def test_a_host_that_takes_no_more_is_waited_for(drain: Rig) -> None:
    drain.start()
    sent = 0
    while not drain.flow.waiting:
        drain.send(bytes(STEP))
        sent += STEP
        assert drain.look() == ([], [])
    received = 0
    deadline = time.monotonic() + PATIENCE
    while received < sent and time.monotonic() < deadline:
        received += len(drain.host_reads())
        assert drain.poller.poll(0.01) == ([], [])
    assert received == sent
    assert not drain.flow.waiting


def test_a_host_that_takes_no_more_can_be_news(drain: Rig) -> None:
    drain.start(tells_blocked=True)
    news: list[Flow] = []
    while not news:
        drain.send(bytes(STEP))
        ready, news = drain.look()
        assert ready == []
    assert news == [drain.flow]
    assert drain.flow.result() is Status.BLOCKED
    assert not drain.flow.waiting


def test_a_host_that_left_is_news(drain: Rig) -> None:
    drain.start()
    drain.host.close()
    drain.send(b"x")
    assert drain.look() == ([], [drain.flow])
    with pytest.raises(BrokenPipeError):
        drain.flow.result()
    assert not drain.flow.moves


def test_a_guest_that_breaks_a_rule_is_news(drain: Rig) -> None:
    """R-RING-76."""
    drain.start()
    drain.driver.add([(1 << 40, 8)])
    drain.show()
    assert drain.look() == ([], [drain.flow])
    with pytest.raises(GuestError, match="R-RING-76"):
        drain.flow.result()


def test_a_guest_that_python_has_to_interrupt_is_news(drain: Rig) -> None:
    drain.start()
    drain.queue.call_fd = -1
    drain.send(b"x")
    assert drain.look() == ([], [drain.flow])
    assert drain.flow.result() is Status.EMPTY
    assert drain.queue.notify()


def test_what_goes_out_is_logged(drain: Rig, tmp_path: Any) -> None:
    with open(tmp_path / "log", "wb", buffering=0) as log:
        drain.start(log_fd=log.fileno())
        drain.send(b"for the record")
        drain.look()
    assert (tmp_path / "log").read_bytes() == drain.host_reads() == b"for the record"


# -- host to guest -----------------------------------------------------------------------------------------------------


def test_what_the_host_says_comes_in_and_interrupts_at_once(fill: Rig) -> None:
    fill.give(4096, 2)
    fill.start()
    fill.host.send(b"hello")
    assert fill.look() == ([], [])
    assert fill.collect() == [5]
    assert fill.called()
    assert not fill.flow.waiting


def test_without_buffers_the_host_waits_until_a_kick(fill: Rig) -> None:
    fill.start()
    fill.host.send(b"hello")
    fill.until(lambda: fill.flow.waiting)
    sleeps = fill.poller.sleeps
    assert fill.poller.poll(0.05) == ([], [])
    assert fill.poller.sleeps <= sleeps + 2, "it sleeps, and is not woken by what it has no room for"
    assert fill.give(4096)
    assert fill.look() == ([], [])
    assert fill.collect() == [5]


def test_a_kick_for_buffers_is_wanted_when_there_are_many_again(fill: Rig) -> None:
    """Each one that a reading program gives back would be a kick otherwise."""
    fill.start()
    fill.give(16, SIZE)
    fill.host.send(bytes(16 * SIZE))
    assert fill.look() == ([], [])
    assert fill.flow.waiting
    assert len(fill.collect()) == SIZE
    kicks = [fill.give(16) for _ in range(SIZE // 2)]
    assert sum(kicks) == 1
    assert 0 < kicks.index(True) < SIZE // 4  # of as many as were seen at once


def test_a_driver_that_gives_back_fewer_buffers_than_before_is_not_forgotten(fill: Rig) -> None:
    fill.start()
    fill.give(16, SIZE)
    fill.host.send(bytes(16 * SIZE))
    fill.until(lambda: fill.flow.waiting)
    assert len(fill.collect()) == SIZE
    fill.host.send(b"more")
    if not fill.give(16):
        fill.until(lambda: fill.queue.chains == SIZE + 1)
    assert fill.poller.poll(0) == ([], [])
    assert fill.collect() == [4]


def test_a_guest_that_is_behind_gets_fuller_buffers(fill: Rig) -> None:
    fill.start()
    fill.give(4096, SIZE - 1)
    fill.driver.calls_on()  # which says how far it has looked
    for number in range(20):
        fill.host.send(b"%02d" % number)
        assert fill.look() == ([], [])
    fill.until(lambda: fill.queue.bytes_moved == 40)
    lengths = fill.collect()
    assert sum(lengths) == 40
    assert len(lengths) < 20


def test_the_end_of_the_input_is_news_after_the_last_byte(fill: Rig) -> None:
    fill.give(4096, 4)
    fill.start()
    fill.host.send(b"last words")
    fill.host.close()
    news: list[Flow] = []
    deadline = time.monotonic() + PATIENCE
    while not news and time.monotonic() < deadline:
        ready, news = fill.poller.poll(0.01)
        assert ready == []
    assert news == [fill.flow]
    assert fill.flow.result() is Status.EOF
    assert fill.collect() == [10]


def test_a_file_is_read_to_its_end(fill: Rig, tmp_path: Any) -> None:
    """epoll waits for no regular file."""
    (tmp_path / "in").write_bytes(bytes(range(256)) * 16)
    fill.give(512, 16)
    with open(tmp_path / "in", "rb", buffering=0) as file:
        fill.flow.start(file.fileno())
        assert fill.poller.poll(PATIENCE) == ([], [fill.flow])
        assert fill.flow.result() is Status.EOF
        assert fill.collect() == [512] * 8
        fill.poller.unwatch(file.fileno())


def test_a_queue_that_stopped_leaves_the_host_alone(fill: Rig) -> None:
    fill.start()
    fill.give(4096)
    assert fill.look() == ([], [])
    fill.queue.stop()
    fill.host.send(b"for later")
    sleeps = fill.poller.sleeps
    assert fill.poller.poll(0.05) == ([], [])
    assert fill.poller.sleeps <= sleeps + 2
    fill.start_queue()
    fill.start()
    assert fill.look() == ([], [])
    assert fill.collect() == [9]


# -- both of one descriptor, and Python beside them --------------------------------------------------------------------


def test_two_flows_share_a_socket_with_who_waits_for_its_end() -> None:
    poller = Poller()
    with Rig(poller) as out, Rig(poller, fills=True) as into:
        into.flow.start(out.ours.fileno())
        out.start()
        poller.watch(out.ours.fileno(), RDHUP)
        into.give(4096)
        out.host.send(b"question")
        out.send(b"answer")
        out.until(lambda: into.queue.bytes_moved and out.queue.bytes_moved)
        assert out.host_reads() == b"answer"
        assert into.collect() == [8]
        into.until(lambda: into.flow.waiting or into.give(1) is None)
        out.host.shutdown(socket.SHUT_WR)
        into.flow.stop()
        assert poller.poll(PATIENCE) == ([(out.ours.fileno(), RDHUP)], [])
        poller.ignore(out.ours.fileno())
        out.send(b"one more")
        assert poller.poll(0) == ([], [])
        assert out.host_reads() == b"one more"


def test_two_flows_of_one_direction_do_not_share_a_descriptor(drain: Rig) -> None:
    drain.start()
    with Rig(drain.poller) as other, pytest.raises(ValueError, match="has a flow in this direction already"):
        other.flow.start(drain.ours.fileno())


def test_a_queue_has_one_flow(drain: Rig) -> None:
    with pytest.raises(ValueError, match="queue 0 has a flow already"):
        Flow(drain.poller, drain.queue, lambda: None, fills=False)
    drain.flow.close()
    drain.flow.close()
    assert drain.flow.callback is None
    with pytest.raises(ValueError, match="closed"):
        drain.start()
    Flow(drain.poller, drain.queue, lambda: None, fills=False).close()


def test_a_descriptor_that_is_forgotten_is_not_touched(drain: Rig) -> None:
    drain.start()
    drain.poller.unwatch(drain.ours.fileno())
    drain.send(b"x")
    assert drain.look() == ([(drain.kick_fd, READ)], [])
    assert drain.host_reads() == b""
    drain.poller.unwatch(-1)
    drain.poller.unwatch(1 << 20)


def test_a_flow_that_ends_in_the_middle_of_things_leaves_nothing_behind() -> None:
    poller = Poller()
    with Rig(poller) as rig:
        rig.start()
        rig.send(b"x")
        poller.poll(0)  # an interrupt is owed
        rig.host.close()
        rig.send(b"y")
        rig.send(b"z")
        assert poller.poll(0) == ([], [rig.flow])
    del rig
    gc.collect()
    assert poller.poll(0.01) == ([], [])


def test_a_turn_now_is_a_drain(drain: Rig) -> None:
    drain.start()
    drain.send(b"now")
    assert drain.flow.run() is Status.EMPTY
    assert drain.host_reads() == b"now"
    assert drain.called(), "who asks for a turn waits for it"
    drain.queue.stop()
    assert drain.flow.run() is Status.STOPPED


def test_without_event_indices_it_works_the_same() -> None:
    with Rig(event_idx=False) as rig:
        rig.start()
        for number in range(5):
            assert rig.send(b"%d" % number)
            assert rig.poller.poll(0) == ([], [])
            assert rig.host_reads() == b"%d" % number
            assert rig.collect() == [0]
        rig.until(rig.called)


# -- threads, time -----------------------------------------------------------------------------------------------------


def test_while_it_waits_other_threads_cannot_touch_its_queues(drain: Rig) -> None:
    """Memory that it works on would be gone otherwise."""
    drain.start()
    woken, waker = socket.socketpair()
    with woken, waker:
        drain.poller.watch(woken.fileno(), READ)
        thread = threading.Thread(target=drain.poller.poll, args=(PATIENCE,))
        thread.start()
        deadline = time.monotonic() + PATIENCE
        refused = None
        while refused is None and time.monotonic() < deadline:
            try:
                drain.queue.kicks_off()
            except RuntimeError as exc:
                refused = str(exc)
        assert refused == "queue 0 is busy"
        for forbidden in (drain.queue.stop, drain.flow.stop, drain.flow.run, lambda: drain.poller.poll(0)):
            with pytest.raises(RuntimeError):
                forbidden()
        drain.send(b"meanwhile")
        waker.send(b"x")
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert drain.host_reads() == b"meanwhile"


def test_time_is_over_when_it_is_over_however_busy_it_was(drain: Rig) -> None:
    drain.start()
    drain.send(b"x")
    started = time.monotonic()
    assert drain.poller.poll(0.03) == ([], [])
    assert time.monotonic() - started >= 0.03


def test_polling_ends_when_the_traffic_does(drain: Rig) -> None:
    """It looks instead of sleeping only while that has proved worthwhile."""
    with pytest.raises(ValueError, match="negative"):
        drain.poller.spin_max = -1
    drain.poller.spin_max = 10_000_000
    drain.start()
    before = drain.poller.spins
    deadline = time.monotonic() + PATIENCE
    while drain.poller.spins == before and time.monotonic() < deadline:
        drain.send(b"x")
        drain.poller.poll(0.001)
        drain.collect()
        drain.host_reads()
    assert drain.poller.spins > before
    assert drain.poller.poll(0.2) == ([], [])
    spins, used = drain.poller.spins, time.process_time()
    assert drain.poller.poll(0.2) == ([], [])
    assert drain.poller.spins - spins <= 1
    assert time.process_time() - used < 0.1


def test_while_it_looks_no_kick_is_needed_and_afterwards_it_is(drain: Rig) -> None:
    """R-RING-18: the ring is looked at once more when kicks are asked for."""
    drain.poller.spin_max = 20_000_000
    drain.start()
    total = 0
    stop = threading.Event()

    def guest() -> None:
        while not stop.is_set():
            if drain.driver.free > 8:
                drain.send(b"x")
            while drain.driver.collect() is not None:
                pass
            drain.host_reads()

    thread = threading.Thread(target=guest)
    thread.start()
    deadline = time.monotonic() + PATIENCE
    while drain.queue.chains < 2000 and time.monotonic() < deadline:
        assert drain.poller.poll(0.01) == ([], [])
    stop.set()
    thread.join()
    total = drain.offered
    drain.until(lambda: drain.queue.chains == total)


@pytest.mark.parametrize("what", ["watch", "start"])
def test_what_is_no_descriptor_is_refused(drain: Rig, what: str) -> None:
    with pytest.raises(ValueError, match="no descriptor: -1"):
        drain.poller.watch(-1, READ) if what == "watch" else drain.flow.start(-1)
    with pytest.raises(OSError, match="Bad file descriptor"):
        drain.poller.watch(9999, READ)


def test_memory_that_is_truncated_is_news(tmp_path: Any) -> None:
    """R-RING-82."""
    with open(tmp_path / "ram", "w+b") as file, Rig() as rig:
        file.truncate(16 << 20)
        rig.memory = Memory([Region(0, 16 << 20, 0, mmap.mmap(file.fileno(), 16 << 20), 0)])
        rig.driver = DriverQueue(rig.memory, 0, SIZE, event_idx=True)
        rig.start_queue()
        rig.start()
        rig.send(b"before")
        assert rig.poller.poll(0) == ([], [])
        rig.send(b"after")
        file.truncate(1 << 16)
        assert rig.poller.poll(0) == ([], [rig.flow])
        with pytest.raises(FrontEndError, match="guest memory was truncated"):
            rig.flow.result()


def test_what_cannot_be_watched_is_no_burden_for_who_gets_its_number_next(tmp_path: Any) -> None:
    poller = Poller()
    number = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with pytest.raises(PermissionError):
            poller.watch(number, READ)
        os.dup2(ours.fileno(), number)
        poller.watch(number, READ)
        theirs.send(b"x")
        assert poller.poll(0) == ([(number, READ)], [])
        poller.unwatch(number)
        os.close(number)


def test_a_queue_that_stops_while_a_call_is_owed_calls_after_its_next_start(drain: Rig) -> None:
    drain.start()
    drain.send(b"1")
    drain.look()
    drain.queue.stop()
    deadline = time.monotonic() + 0.01
    while time.monotonic() < deadline:
        assert drain.poller.poll(0.001) == ([], [])
    assert not drain.called()
    drain.start_queue()
    drain.start()
    for number in range(3):
        drain.send(b"%d" % number)
        drain.look()
        drain.until(drain.called)
        drain.collect()
