"""The wait loop, on real descriptors and real signals."""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from chardev_peers import open_descriptors

from vsport.loop import HUP, RDHUP, READ, WRITE, Loop


@pytest.fixture
def loop() -> Iterator[Loop]:
    gc.collect()  # what an earlier test has left to the collector shall not be gone in between
    before = open_descriptors()
    loop = Loop()
    yield loop
    loop.close()
    assert open_descriptors() == before


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected sockets, not blocking."""
    a, b = socket.socketpair()
    a.setblocking(False)
    b.setblocking(False)
    with a, b:
        yield a, b


# -- descriptors ---------------------------------------------------------------------------------------------------


def test_calls_back_for_as_long_as_a_descriptor_is_ready(loop: Loop, pair: tuple[socket.socket, ...]) -> None:
    a, b = pair
    calls: list[int] = []
    loop.watch(a.fileno(), READ, calls.append)
    loop.run_once(0)
    assert calls == []
    b.send(b"x")
    loop.run_once(0)
    loop.run_once(0)  # level triggered: it was not read
    assert calls == [READ, READ]
    a.recv(1)
    loop.run_once(0)
    assert calls == [READ, READ]


def test_a_second_watch_replaces_the_first(loop: Loop, pair: tuple[socket.socket, ...]) -> None:
    a, b = pair
    b.send(b"x")
    old: list[int] = []
    new: list[int] = []
    loop.watch(a.fileno(), READ, old.append)
    loop.watch(a.fileno(), WRITE, new.append)
    loop.run_once(0)
    assert (old, new) == ([], [WRITE])
    loop.watch(a.fileno(), WRITE, old.append)  # the same events, another callback
    loop.run_once(0)
    assert (old, new) == ([WRITE], [WRITE])


def test_a_hang_up_comes_without_being_asked_for(loop: Loop, pair: tuple[socket.socket, ...]) -> None:
    a, b = pair
    calls: list[int] = []
    loop.watch(a.fileno(), 0, calls.append)
    b.shutdown(socket.SHUT_WR)
    loop.run_once(0)
    assert calls == []  # half closed: RDHUP has to be asked for
    loop.watch(a.fileno(), RDHUP, calls.append)
    loop.run_once(0)
    assert calls == [RDHUP]
    b.close()
    loop.run_once(0)
    assert calls[-1] & HUP


def test_unwatch_forgets_and_takes_what_it_does_not_know(loop: Loop, pair: tuple[socket.socket, ...]) -> None:
    a, _ = pair
    calls: list[int] = []
    loop.watch(a.fileno(), WRITE, calls.append)
    loop.unwatch(a.fileno())
    loop.unwatch(a.fileno())
    loop.unwatch(12345)
    loop.run_once(0)
    assert calls == []


def test_unwatched_by_an_earlier_callback_of_the_round_is_not_called(loop: Loop) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    ends = [pair[0].fileno() for pair in pairs]
    calls: list[int] = []

    def called(fd: int) -> None:
        calls.append(fd)
        for other in ends:
            loop.unwatch(other)

    for fd in ends:
        loop.watch(fd, WRITE, lambda _ready, fd=fd: called(fd))  # type: ignore[misc]
    loop.run_once(0)
    assert len(calls) == 1
    for a, b in pairs:
        a.close()
        b.close()


def test_a_reused_descriptor_does_not_get_the_events_of_the_one_before(loop: Loop) -> None:
    """Two are ready in one round; the first callback closes the other one, and a new one gets its number."""
    pairs = [socket.socketpair() for _ in range(2)]
    events: list[str] = []
    idle: list[socket.socket] = []

    def first_called(index: int) -> None:
        events.append("called")
        victim = pairs[1 - index][0]
        number = victim.fileno()
        loop.unwatch(number)
        victim.close()
        idle.extend(socket.socketpair())  # both ends stay silent
        assert idle[0].fileno() == number
        loop.watch(number, READ, lambda _ready: events.append("stale"))
        loop.unwatch(pairs[index][0].fileno())

    for index, (a, b) in enumerate(pairs):
        b.send(b"x")
        loop.watch(a.fileno(), READ, lambda _ready, index=index: first_called(index))  # type: ignore[misc]
    loop.run_once(0)
    assert events == ["called"]
    loop.unwatch(idle[0].fileno())
    for sock in [*idle, *pairs[0], *pairs[1]]:
        sock.close()


def test_what_a_callback_watches_is_served_in_the_next_round(loop: Loop, pair: tuple[socket.socket, ...]) -> None:
    a, b = pair
    calls: list[str] = []

    def first(_ready: int) -> None:
        calls.append("a")
        loop.unwatch(a.fileno())
        loop.watch(b.fileno(), WRITE, lambda _ready: calls.append("b"))

    loop.watch(a.fileno(), WRITE, first)
    loop.run_once(0)
    assert calls == ["a"]
    loop.run_once(0)
    assert calls == ["a", "b"]


@pytest.mark.parametrize("path", ["regular", os.devnull])
def test_what_is_always_ready_is_refused(loop: Loop, tmp_path: os.PathLike[str], path: str) -> None:
    fd = os.open(os.path.join(tmp_path, path), os.O_RDWR | os.O_CREAT)
    with pytest.raises(PermissionError):
        loop.watch(fd, READ, lambda _ready: None)
    loop.unwatch(fd)  # it is not watched: closing it is all that is left to do
    os.close(fd)


# -- time ----------------------------------------------------------------------------------------------------------


def test_timers_come_in_the_order_of_their_time(loop: Loop) -> None:
    calls: list[str] = []
    for name, delay in (("c", 0.02), ("a", 0.0), ("b", 0.01), ("b2", 0.01)):
        loop.call_later(delay, lambda name=name: calls.append(name))  # type: ignore[misc]
    assert loop.run_until(lambda: len(calls) == 4, 10)
    assert calls == ["a", "b", "b2", "c"]


def test_a_timer_is_never_early(loop: Loop) -> None:
    start = time.monotonic()
    came: list[float] = []
    loop.call_later(0.03, lambda: came.append(time.monotonic()))
    assert loop.run_until(lambda: came, 10)
    assert came[0] - start >= 0.03


def test_a_cancelled_timer_does_not_come(loop: Loop) -> None:
    calls: list[str] = []
    timers = [loop.call_later(0, lambda name=name: calls.append(name)) for name in "ab"]  # type: ignore[misc]
    timers[0].cancel()
    timers[0].cancel()
    assert loop.run_until(lambda: calls, 10)
    assert calls == ["b"]


def test_a_timer_may_cancel_one_that_is_due_at_once(loop: Loop) -> None:
    calls: list[str] = []

    def first() -> None:
        calls.append("first")
        second.cancel()

    loop.call_later(0, first)
    second = loop.call_later(0, lambda: calls.append("second"))
    loop.call_later(0.01, lambda: calls.append("last"))
    assert loop.run_until(lambda: "last" in calls, 10)
    assert calls == ["first", "last"]


def test_a_timer_that_sets_itself_again_does_not_starve_descriptors(
    loop: Loop, pair: tuple[socket.socket, ...]
) -> None:
    ticks: list[int] = []
    calls: list[int] = []

    def tick() -> None:
        ticks.append(1)
        assert len(ticks) < 1000, "a round never ends"
        loop.call_later(0, tick)

    loop.call_later(0, tick)
    loop.watch(pair[0].fileno(), WRITE, calls.append)
    assert loop.run_until(lambda: len(ticks) >= 3, 10)
    assert len(calls) >= 3


def test_cancelled_timers_do_not_pile_up(loop: Loop) -> None:
    for _ in range(10_000):
        loop.call_later(3600, lambda: None).cancel()
    assert len(loop._timers) < 1000
    kept = [loop.call_later(3600, lambda: None) for _ in range(500)]
    assert {id(entry[2]) for entry in loop._timers} >= {id(timer) for timer in kept}


def test_call_soon_comes_once_and_those_that_it_adds_come_a_round_later(loop: Loop) -> None:
    calls: list[str] = []

    def first() -> None:
        calls.append("first")
        loop.call_soon(lambda: calls.append("second"))

    loop.call_soon(first)
    loop.run_once(None)  # it does not wait for anything else
    assert calls == ["first"]
    loop.run_once(None)
    assert calls == ["first", "second"]


# -- running -------------------------------------------------------------------------------------------------------


def test_run_until_says_whether_the_condition_came_true(loop: Loop) -> None:
    assert loop.run_until(lambda: True, 0)
    assert not loop.run_until(lambda: False, 0)
    assert not loop.run_until(lambda: False, 0.01)
    flag: list[int] = []
    loop.call_later(0.005, lambda: flag.append(1))
    assert loop.run_until(lambda: flag, None)


def test_run_runs_until_stop(loop: Loop) -> None:
    loop.call_later(0.001, loop.stop)
    loop.run()
    loop.call_later(0.001, loop.stop)
    loop.run()


def test_a_stop_while_waiting_for_a_condition_is_not_forgotten(loop: Loop) -> None:
    """A daemon that waits for its first client (wait=on) is told to end: it neither waits on, nor runs afterwards."""
    loop.call_soon(loop.stop)
    assert not loop.run_until(lambda: False, None)
    loop.run()


def test_an_exception_of_a_callback_comes_out_and_loses_nothing(loop: Loop, pair: tuple[socket.socket, ...]) -> None:
    calls: list[str] = []

    def fail(_ready: int) -> None:
        loop.unwatch(pair[0].fileno())
        raise ZeroDivisionError

    loop.watch(pair[0].fileno(), WRITE, fail)
    loop.call_later(0, lambda: calls.append("timer"))
    loop.call_soon(lambda: calls.append("soon"))
    with pytest.raises(ZeroDivisionError):
        loop.run_once(0)
    loop.run_once(0)
    assert calls == ["timer", "soon"]


# -- signals -------------------------------------------------------------------------------------------------------


def test_a_signal_calls_back_in_the_loop(loop: Loop) -> None:
    calls: list[str] = []
    loop.on_signal(signal.SIGUSR1, lambda: calls.append("usr1"))
    loop.on_signal(signal.SIGUSR2, lambda: calls.append("usr2"))
    os.kill(os.getpid(), signal.SIGUSR2)
    assert calls == []  # not in the middle of anything
    os.kill(os.getpid(), signal.SIGUSR1)
    assert loop.run_until(lambda: len(calls) == 2, 10)
    assert calls == ["usr2", "usr1"]


def test_a_signal_wakes_a_loop_that_sleeps(loop: Loop) -> None:
    loop.on_signal(signal.SIGUSR1, loop.stop)
    main = threading.main_thread().ident
    assert main is not None
    killer = threading.Timer(0.01, signal.pthread_kill, (main, signal.SIGUSR1))
    killer.start()
    loop.run()
    killer.join()


def test_many_signals_are_one_call_and_do_not_block(loop: Loop) -> None:
    calls: list[int] = []
    loop.on_signal(signal.SIGUSR1, lambda: calls.append(1))
    for _ in range(5000):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert loop.run_until(lambda: calls, 10)
    for _ in range(5):
        loop.run_once(0)
    assert 1 <= len(calls) <= 5


def test_the_last_callback_for_a_signal_counts(loop: Loop) -> None:
    calls: list[str] = []
    loop.on_signal(signal.SIGUSR1, lambda: calls.append("old"))
    loop.on_signal(signal.SIGUSR1, lambda: calls.append("new"))
    os.kill(os.getpid(), signal.SIGUSR1)
    assert loop.run_until(lambda: calls, 10)
    assert calls == ["new"]


def test_close_gives_the_signals_back() -> None:
    calls: list[str] = []
    handler = signal.signal(signal.SIGUSR1, lambda *_: calls.append("own"))
    a, b = socket.socketpair()
    b.setblocking(False)
    old_wakeup = signal.set_wakeup_fd(b.fileno())
    try:
        loop = Loop()
        for _ in range(2):
            loop.on_signal(signal.SIGUSR1, lambda: calls.append("loop"))
        loop.close()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert calls == ["own"]
        assert signal.set_wakeup_fd(old_wakeup) == b.fileno()
    finally:
        signal.signal(signal.SIGUSR1, handler)
        a.close()
        b.close()


def test_signals_are_refused_outside_the_main_thread_and_leave_nothing(loop: Loop) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            loop.on_signal(signal.SIGUSR1, lambda: None)
        except ValueError as exc:
            errors.append(exc)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(errors) == 1


def test_a_signal_that_cannot_be_caught_is_an_error(loop: Loop) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        loop.on_signal(signal.SIGKILL, lambda: None)
