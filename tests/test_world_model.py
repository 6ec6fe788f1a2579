"""A port in every order of events that hypothesis can think of, held against a model: who said what to whom, and when.

The machine is a simulated guest, the device, and real sockets of host programs. The model knows nothing of rings: it
has a stream of bytes for the guest and one for each session of the host, and says what may arrive where.
"""

import contextlib
import random
import shutil
import socket
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from worlds import World, generic_port, unix_chardev, unix_client

from vsport import pump
from vsport.connection import Cause
from vsport.constants import rx_queue, tx_queue
from vsport.sim import HOSTILE, LINUX

NUMBER = 1
SETTLE = 0.002
QUIET = 5 * SETTLE
ROUNDS = 50
EVERYTHING = 1 << 30
SIZES = st.sampled_from([1, 7, 500, 4096, 20_000, 300_000])
GUEST = 0
_PERIOD = 65537
_BLOCK = random.Random(1).randbytes(_PERIOD) * 6


def words(speaker, start, size):
    """``size`` bytes of what ``speaker`` says, from byte number ``start`` on: no two speakers say the same."""
    at = (start + 7919 * speaker) % _PERIOD
    assert at + size <= len(_BLOCK)
    return _BLOCK[at : at + size]


class Session:
    """One connection of a host program."""

    def __init__(self, number, path):
        self.number = number
        self.sock = unix_client(path)
        self.sock.setblocking(False)
        self.sent = 0
        self.speaks = self.listens = True
        self.over = False
        """Whether the port was taken from under it."""
        self.due = [[0, 0]]
        """Parts [first, end] of the guest's stream: what it has to hear, in this order."""
        self.heard = 0

    @property
    def due_size(self):
        return sum(end - start for start, end in self.due)

    def hears(self, data):
        """``data`` is what it is to hear next."""
        at = self.heard
        self.heard += len(data)
        for start, end in self.due:
            if at < end - start and data:
                count = min(len(data), end - start - at)
                assert data[:count] == words(GUEST, start + at, count), "not what the guest wrote for this session"
                data, at = data[count:], 0
            else:
                at = max(0, at - (end - start))
        assert not data, f"{len(data)} bytes that the guest did not write in this session"


class Delivery:
    """What the guest's kernel gets: each session's stream from its first byte on, in the order of the sessions.

    A session may end at any byte, so there can be several places where the stream may be.
    """

    def __init__(self):
        self.places = {(0, 0)}

    def take(self, data, sessions):
        starts = self.places | {(s.number, 0) for s in sessions if s.number > min(self.places)[0]}
        self.places = {
            (number, at + len(data))
            for number, at in starts
            if number and words(number, at, min(len(data), sessions[number - 1].sent - at)) == data
        }
        assert self.places, f"{len(data)} bytes that no host can have said now"


class PortModel(RuleBasedStateMachine):
    @initialize(profile=st.sampled_from([LINUX, HOSTILE]))
    def begin(self, profile):
        self.directory = Path(tempfile.mkdtemp(prefix="vs"))  # not tmp_path: a socket's path has at most 107 bytes
        self.path = self.directory / "s"
        self.world = World([unix_chardev(NUMBER, self.path)], [generic_port(NUMBER)], profile=profile, queue_size=8)
        self.guest, self.device = self.world.guest, self.world.device
        self.device.on_transition = self.moved
        self.world.loop.run_once(0)  # the interrupts of the boot
        self.guest.on_interrupt = lambda: self.world.loop.call_soon(self.guest_is_interrupted)
        self.rx, self.tx = self.device.queues[rx_queue(NUMBER)], self.device.queues[tx_queue(NUMBER)]
        self.sessions = []
        self.met = 0
        self.host = None
        self.paused = False
        self.written = self.lost_by_reset = 0
        self.dropped_before = self.discarded_before = self.lost_by_unplug = 0
        self.delivery = Delivery()
        self.look_at_deliveries()
        self.host_comes()
        self.guest_opens_or_closes()
        self.everything_comes_to_rest()

    def teardown(self):
        if not hasattr(self, "world"):
            return
        try:
            self.everything_comes_to_rest()
            self.host_leaves()
            self.everything_comes_to_rest()
            assert sum(session.sent for session in self.sessions) == self.rx.bytes_moved + self.dropped()
        finally:
            for session in self.sessions:
                session.sock.close()
            self.world.close()
            shutil.rmtree(self.directory)

    # -- bookkeeping ---------------------------------------------------------------------------------------------------

    def look_at_deliveries(self):
        """Whatever the guest takes from the receive ring, to read it or to throw it away, is looked at."""
        ring = self.guest.ring(rx_queue(NUMBER), self.guest.profile.buffer_size)
        take = ring.take

        def taken():
            data = take()
            if data is not None:
                self.delivery.take(data, self.sessions)
            return data

        ring.take = taken

    def moved(self, _port, cause, _before):
        """The host that connects as the n-th is the n-th one that came: it hears what is written from now on."""
        if cause is Cause.HOST_CONNECT:
            self.sessions[self.met].due = [[self.written, self.written]]
            self.met += 1

    def dropped(self):
        """Bytes of hosts that the guest never gets, all of them counted or gone with the port."""
        return self.dropped_before + self.device.ports[NUMBER].counters.host_bytes_dropped + self.lost_by_unplug

    def wrote(self, size):
        self.written += size
        if self.met:
            self.sessions[self.met - 1].due[-1][1] = self.written

    def untaken(self):
        """Bytes that the guest has written and the device has neither passed on nor returned."""
        return self.written - self.lost_by_reset - self.tx.bytes_moved - self.tx.bytes_discarded

    @property
    def port(self):
        return self.guest.ports[NUMBER]

    def guest_is_interrupted(self):
        if not self.paused:
            self.guest.run()

    def guest_runs(self):
        return not self.paused and NUMBER in self.guest.ports

    def guest_talks(self):
        return self.guest_runs() and self.port.is_open

    def host_is_there(self):
        return self.host is not None

    # -- the guest -----------------------------------------------------------------------------------------------------

    @precondition(guest_runs)
    @rule()
    def guest_opens_or_closes(self):
        if self.port.is_open:
            self.port.close()
        else:
            self.port.open()

    @precondition(guest_talks)
    @rule(size=SIZES)
    def guest_writes(self, size):
        while size and self.port.host_connected and not self.port.full:
            data = words(GUEST, self.written, min(size, self.port._tx.buffer_size))
            self.wrote(len(data))  # before the kick, with which it may arrive
            assert self.port.write(data) == len(data)
            size -= len(data)

    @precondition(guest_talks)
    @rule()
    def guest_writes_until_the_ring_is_full(self):
        for _ in range(4):
            self.guest_writes(300_000)
            self.time_passes(1, 0)

    @precondition(guest_talks)
    @rule(size=SIZES)
    def guest_reads(self, size):
        with contextlib.suppress(BlockingIOError):
            while size and (data := self.port.read(size)):
                size -= len(data)

    # -- the host ------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.host is None)
    @rule()
    def host_comes(self):
        with contextlib.suppress(BlockingIOError):  # so many wait for their turn that this one does not get in
            self.host = Session(len(self.sessions) + 1, self.path)
            self.sessions.append(self.host)

    @precondition(host_is_there)
    @rule()
    def host_leaves(self):
        if self.host is not None:
            self.host.sock.close()
            self.host = None

    @precondition(host_is_there)
    @rule()
    def host_is_another_one(self):
        self.host_leaves()
        self.time_passes(4, SETTLE)
        self.host_comes()
        self.time_passes(4, SETTLE)

    @precondition(lambda self: self.host is not None and self.host.speaks)
    @rule(size=SIZES)
    def host_speaks(self, size):
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            while size:
                count = self.host.sock.send(words(self.host.number, self.host.sent, min(size, 65536)))
                self.host.sent += count
                size -= count

    @precondition(lambda self: self.host is not None and self.host.listens)
    @rule(size=SIZES)
    def host_listens(self, size):
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            while size and (data := self.host.sock.recv(min(size, 65536))):
                self.host.hears(data)
                size -= len(data)

    def host_says_no_more(self):
        if self.host is None:
            return
        self.host.speaks = False
        with contextlib.suppress(OSError):  # the other side has gone
            self.host.sock.shutdown(socket.SHUT_WR)

    def host_listens_no_more(self):
        if self.host is None:
            return
        self.host.listens = False
        with contextlib.suppress(OSError):
            self.host.sock.shutdown(socket.SHUT_RD)

    # -- the machine ---------------------------------------------------------------------------------------------------

    @rule(rounds=st.integers(1, 8), wait=st.sampled_from([0, 0, 0, SETTLE]))
    def time_passes(self, rounds, wait):
        for _ in range(rounds):
            self.world.loop.run_once(wait)

    @rule()
    def machine_stops_or_goes_on(self):
        self.paused = not self.paused
        if self.paused:
            self.guest.attachment.pause()
        else:
            self.guest.attachment.resume()
            self.guest.run()  # for an interrupt that came just before the pause

    @precondition(lambda self: self.host is not None and not self.paused)
    @rule()
    def host_is_another_one_when_the_machine_goes_on(self):
        self.machine_stops_or_goes_on()
        self.host_is_another_one()
        self.machine_stops_or_goes_on()

    def guest_is_reset(self):
        """Whatever was in the rings is lost."""
        if NUMBER in self.guest.ports:
            self.port.discard_input()
        untaken = self.untaken()
        self.lost_by_reset += untaken
        if self.met:
            due = self.sessions[self.met - 1].due
            due[-1][1] = self.written - untaken
            due.append([self.written, self.written])
        self.guest.reset()
        self.paused = False
        self.guest.boot()
        self.look_at_deliveries()

    def port_is_unplugged_and_plugged_again(self):
        """The host's session ends with the port, and so do those of hosts that waited for their turn."""
        self.dropped_before += self.device.ports[NUMBER].counters.host_bytes_dropped
        self.world.host.unplug(NUMBER)
        for session in self.sessions:
            session.over = True
        self.met = len(self.sessions)
        self.world.host.plug(self.world.host.configuration.ports[0])
        self.discarded_before = self.tx.bytes_discarded
        self.lost_by_unplug += sum(session.sent for session in self.sessions) - self.rx.bytes_moved - self.dropped()
        self.world.host.pumps[NUMBER].open()

    # -- what holds whenever nothing happens any more -----------------------------------------------------------------

    def everything_comes_to_rest(self):
        if self.paused:
            self.machine_stops_or_goes_on()
        self.run_until_quiet()
        assert self.device.waiting_messages == 0
        assert self.device.ports[NUMBER].state.guest_connected == self.port.is_open
        if self.host is None or self.host.listens:  # poll() does not say that the other side shut its receiving end
            assert self.port.unsent == self.untaken() == 0
        counters = self.device.ports[NUMBER].counters
        assert counters.bytes_discarded == self.tx.bytes_discarded - self.discarded_before
        self.the_guest_knows_the_truth()

    def the_guest_knows_the_truth(self):
        connected = self.device.ports[NUMBER].state.host_connected
        assert self.port.host_connected == connected
        host = self.host
        if host is None or host.listens:
            assert connected == (host is not None and host.speaks and not host.over)
        if connected and host.listens:
            assert host.heard == host.due_size

    def run_until_quiet(self):
        """Both sides take all that is there for them, until nothing moves; then the loop has nothing to do either."""
        give_up = time.monotonic() + 2
        seen, since, rounds = None, time.monotonic(), 0
        while time.monotonic() < since + QUIET:
            assert time.monotonic() < give_up, f"no rest: {seen}"
            if self.guest_talks():
                self.guest_reads(EVERYTHING)
            if self.host is not None and self.host.listens:
                self.host_listens(EVERYTHING)
            self.world.loop.run_once(QUIET)
            rounds += 1
            state = NUMBER in self.guest.ports and self.port.host_connected, self.device.ports[NUMBER].state
            now = (self.rx.bytes_moved, self.rx.next_avail, self.tx.bytes_moved, self.tx.bytes_discarded, state)
            if now != seen:
                seen, since, rounds = now, time.monotonic(), 0
        assert rounds < ROUNDS, f"{rounds} rounds for nothing"

    @rule(
        event=st.sampled_from(
            [
                guest_is_reset,
                port_is_unplugged_and_plugged_again,
                host_says_no_more,
                host_listens_no_more,
                everything_comes_to_rest,
            ]
        )
    )
    def something_rare_happens(self, event):
        """One rule for all that ends what was under way, so that something gets under way."""
        event(self)


def test_a_port_is_true_to_its_model_in_every_order_of_events(monkeypatch):
    monkeypatch.setattr(pump, "SETTLE_SECONDS", SETTLE)
    run_state_machine_as_test(
        PortModel,
        settings=settings(max_examples=100, stateful_step_count=50, suppress_health_check=list(HealthCheck)),
    )


@pytest.mark.parametrize(
    "story",
    [
        "guest_writes_until_the_ring_is_full guest_opens_or_closes host_is_another_one_when_the_machine_goes_on",
        "guest_writes_until_the_ring_is_full machine_stops_or_goes_on port_is_unplugged_and_plugged_again"
        " host_is_another_one",
        "guest_writes_until_the_ring_is_full machine_stops_or_goes_on guest_is_reset host_is_another_one",
        "host_listens_no_more guest_writes_until_the_ring_is_full host_leaves guest_is_reset guest_is_reset",
    ],
)
def test_stories_that_once_ended_badly(story, monkeypatch):
    """Chance takes long to find these."""
    monkeypatch.setattr(pump, "SETTLE_SECONDS", SETTLE)
    model = PortModel()
    try:
        model.begin(profile=LINUX)
        for step in story.split():
            getattr(model, step)()
    finally:
        model.teardown()
