"""The rules that hold when a machine pauses, moves or is handed over, with real sockets; docs/moving.md tells them.

Everything on the host is made anew: the device, the back ends, the sockets. The guest's memory is what it takes along.
"""

import contextlib
import dataclasses
import os
import random
import re
import socket
from pathlib import Path

import pytest
from worlds import World, generic_port, unix_chardev, unix_client

from vsport import inspect
from vsport.connection import Cause, OnRestore, Policy, State
from vsport.constants import Feature
from vsport.document import DocumentError, Fields
from vsport.errors import UsageError
from vsport.host import Host
from vsport.options import parse_configuration
from vsport.parcel import Delivery, Parcel
from vsport.port import BackEnd, Whose
from vsport.sim import HOSTILE, LINUX
from vsport.snapshot import Snapshot

PAGE = Path(__file__).parents[1] / "docs" / "moving.md"
NAME = "org.test.1"
LEAVES, RETURNS = False, True
WRITE = 100_000
GREEDY = dataclasses.replace(LINUX, write_max=WRITE)
"""Its chains are longer than what a Unix socket takes at once, so that a host that is full has taken half of one."""


class Machine(World):
    """A machine with port 1 behind a Unix socket, or, with ``back_end``, behind what that makes of the port."""

    def __init__(self, directory, options="", *, ports=1, back_end=None, **how):
        self.directory = directory
        self.back_end = back_end
        self.dropped = []
        numbers = range(1, ports + 1)
        self.devices = [
            generic_port(n) if back_end is None else f"virtserialport,name=org.test.{n},nr={n}" for n in numbers
        ]
        self.options = options
        self.place = 0
        super().__init__(*self.configuration(), **{"profile": GREEDY} | how)
        self.settle_in()
        self.until_rest()

    def configuration(self, options=None):
        chardevs = [] if self.back_end else [unix_chardev(n, self.path(n)) for n in range(1, len(self.devices) + 1)]
        added = self.options if options is None else options
        return chardevs, [device + added for device in self.devices]

    def path(self, number=1):
        return self.directory / f"{self.place}.{number}"

    def settle_in(self):
        self.device = self.host.device
        self.device.on_drop = lambda port, count, whose: self.dropped.append((port.id, count, whose))
        if self.back_end:
            for port in self.device.ports.values():
                self.device.attach(port, self.back_end(port))

    def until_rest(self):
        """Until nobody has anything to do."""
        for _ in range(20):
            self.loop.run_once(0)

    @property
    def state(self):
        return self.device.ports[1].state

    def pause(self):
        self.guest.attachment.pause()

    def resume(self):
        self.guest.attachment.resume()

    def save(self):
        """The paused machine's document; what was here is closed."""
        document = self.device.snapshot().encode()
        self.host.close()
        return document

    def arrive(self, options=None):
        """Everything is made anew, elsewhere; nothing is restored yet."""
        self.place += 1
        self.host = Host(self.loop, parse_configuration(*self.configuration(options)))
        self.settle_in()
        self.host.open()

    def restore(self, document):
        self.device.restore(Snapshot.decode(document))
        self.guest.attachment.move_to(self.device)

    def client(self, number=1):
        """A host program, which the port knows of."""
        client = unix_client(self.path(number))
        self.wait(lambda: self.host.pumps[number].chardev.connected)
        return client

    def move(self, stack, options=None, *, client=True):
        """To another host, where a client is already, or nobody; the machine is still paused. Returns the client."""
        self.pause()
        document = self.save()
        self.arrive(options)
        there = stack.enter_context(self.client()) if client else None
        self.restore(document)
        return there

    def hand_over(self):
        """To another device of this process, hosts included, as `vsport serve --takeover` does; resumed."""
        self.pause()
        parcel = Parcel()
        state, document = self.host.give(parcel), self.device.snapshot().encode()
        before, self.host = self.host, Host(self.loop, parse_configuration(*self.configuration()))
        self.settle_in()
        self.host.take(Fields("state", state), Delivery([os.dup(fd) for fd in parcel.fds]))
        self.device.restore(Snapshot.decode(document), carried=self.host.with_peers())
        self.guest.attachment.move_to(self.device)
        before.release()
        self.resume()
        self.host.announce()


@pytest.fixture
def make(tmp_path):
    """Makes machines, each with a directory of its own."""
    with contextlib.ExitStack() as stack:

        def make(*args, **how):
            directory = tmp_path / str(len(list(tmp_path.iterdir())))
            directory.mkdir()
            return stack.enter_context(contextlib.closing(Machine(directory, *args, **how)))

        yield make


@pytest.fixture
def stack():
    with contextlib.ExitStack() as made:
        yield made


def joined(machine, stack):
    """(the guest's open port, the host's socket)."""
    port = machine.port(NAME)
    port.open()
    host = stack.enter_context(machine.client())
    machine.wait(lambda: port.host_connected)
    return port, host


def history_is(machine, port, history):
    machine.wait(lambda: len(port.host_history) >= len(history), f"{history}, not {port.host_history}")
    machine.until_rest()
    assert port.host_history == history


class Recorder(BackEnd):
    """Notes what it is told; what it saves is whether the guest's end was open."""

    def __init__(self, port):
        self.told = []
        self.open = False

    def guest_connected(self, connected, cause):
        self.open = connected
        self.told.append(f"{'open' if connected else 'closed'} ({cause.value})")

    def save(self):
        return bytes([self.open])

    def check(self, state):
        pass

    def load(self, state):
        self.told.append("its own state")
        self.open = state == b"\1"


# -- truth ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_open", [True, False])
def test_truth(make, stack, is_open):
    """Before a byte flows the back end knows how the guest's end is, and since when it has been so."""
    order = []

    class Watcher(Recorder):
        def guest_connected(self, connected, cause):
            order.append((connected, cause))

        def tx_ready(self):
            order.append("bytes")

        rx_ready = tx_ready

    machine = make(back_end=Watcher)
    machine.device.ports[1].feed(Cause.HOST_CONNECT)
    if is_open:
        machine.port(NAME).open()
    order.clear()
    machine.move(stack, client=False)
    assert order == [(False, Cause.RESTORE), (True, Cause.RESTORE)][: 1 + is_open]
    machine.resume()
    machine.device.ports[1].feed(Cause.HOST_CONNECT)
    assert "bytes" in order[1 + is_open :]
    assert set(order[1 + is_open :]) == {"bytes"}


def test_truth_a_reset_is_no_close_by_the_guest(make):
    """The guest's bit is one of three: the cause says which of them moved."""
    machine = make(back_end=Recorder)
    machine.port(NAME).open()
    machine.guest.reset()
    assert machine.device.ports[1].back_end.told == ["open (guest-open)", "closed (reset)"]


# -- nothing slept through --------------------------------------------------------------------------------------------


def test_nothing_slept_through_a_client_that_leaves(make, stack):
    machine = make()
    port, host = joined(machine, stack)
    machine.pause()
    host.close()
    machine.wait(lambda: not machine.state.host_connected)
    assert port.host_connected
    machine.resume()
    history_is(machine, port, [True, LEAVES])


def test_nothing_slept_through_a_client_that_comes(make, stack):
    machine = make()
    port = machine.port(NAME)
    machine.pause()
    stack.enter_context(machine.client())
    assert machine.state.host_connected
    assert not port.host_connected
    machine.resume()
    history_is(machine, port, [True])


@pytest.mark.parametrize("elsewhere", [False, True])
def test_nothing_slept_through_a_client_that_leaves_and_another_that_comes(make, stack, elsewhere):
    """Two words for the guest, with time between them, also if the machine wakes up on another host."""
    machine = make()
    port, host = joined(machine, stack)
    machine.pause()
    host.close()
    machine.wait(lambda: not machine.state.host_connected)
    if elsewhere:
        machine.move(stack)
    else:
        stack.enter_context(machine.client())
    machine.resume()
    history_is(machine, port, [True, LEAVES, RETURNS])


def test_nothing_slept_through_a_client_that_waits_on_the_new_host(make, stack):
    machine = make()
    port = machine.port(NAME)
    port.open()
    host = machine.move(stack)
    machine.resume()
    history_is(machine, port, [True])
    host.sendall(b"hello")
    assert machine.read(port, 5) == b"hello"


# -- no splice --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", [LINUX, HOSTILE], ids=lambda profile: profile.name)
@pytest.mark.parametrize("on_restore", ["auto", "reopen"])
def test_no_splice(make, stack, on_restore, profile):
    """The program reads what the first session said, the end, and then the second session."""
    machine = make(f",on_restore={on_restore}", profile=profile)
    port, host = joined(machine, stack)
    host.sendall(b"half a li")
    machine.wait(lambda: machine.device.ports[1].rx.bytes_moved == 9)
    second = machine.move(stack)
    second.sendall(b"a line")
    machine.resume()
    assert machine.read(port, 9) == b"half a li"
    machine.wait(lambda: not port.host_connected, "the end of the first session")
    assert port.read() == b""
    assert machine.read(port, 6) == b"a line"
    assert port.host_history == [True, LEAVES, RETURNS]
    assert machine.device.ports[1].session == 2


def test_no_splice_without_a_client_on_the_new_host(make, stack):
    machine = make()
    port, _ = joined(machine, stack)
    machine.move(stack, client=False)
    machine.resume()
    history_is(machine, port, [True, LEAVES])
    stack.enter_context(machine.client())
    history_is(machine, port, [True, LEAVES, RETURNS])


def test_no_splice_what_the_old_host_did_not_take_is_not_for_the_new_one(make, stack):
    machine = make()
    port, _ = joined(machine, stack)
    sent = fill(machine, port, b"old")
    host = machine.move(stack)
    machine.resume()
    history_is(machine, port, [True, LEAVES])
    machine.wait(lambda: port.host_connected)
    assert port.unsent == 0
    machine.write(port, b"new")
    assert machine.receive(host, 3) == b"new"
    assert 0 < sum(count for _, count, whose in machine.dropped if whose is Whose.GUEST) < sent


def test_no_splice_in_two_moves_before_it_wakes_up(make, stack):
    """What the first move left to be done is part of what the second one moves."""
    machine = make(queue_size=8)
    port, _ = joined(machine, stack)
    fill(machine, port)
    machine.move(stack)
    host = machine.move(stack)
    machine.resume()
    history_is(machine, port, [True, LEAVES, RETURNS])
    assert port.unsent == 0
    machine.write(port, b"new")
    assert machine.receive(host, 3) == b"new"


def test_no_splice_last_words_that_came_in_the_pause(make, stack):
    """The guest reads what a host said before it left, and then hears that it has."""
    machine = make()
    port, host = joined(machine, stack)
    machine.pause()
    host.sendall(b"farewell")
    host.close()
    machine.until_rest()
    machine.resume()
    assert machine.read(port, 8) == b"farewell"
    history_is(machine, port, [True, LEAVES])


def test_no_splice_on_restore_resume_shows_the_guest_nothing(make, stack):
    """The host's side answers for it that its sessions go on: a half-consumed chain goes on where it was, too."""
    machine = make(",on_restore=resume")
    port, host = joined(machine, stack)
    sent = fill(machine, port, b"one stream")
    second = machine.move(stack)
    machine.resume()
    taken = bytearray()
    while piece := host.recv(1 << 20):
        taken += piece
    taken += machine.receive(second, sent - len(taken))
    assert bytes(taken) == pattern(b"one stream", sent)
    history_is(machine, port, [True])
    assert machine.device.ports[1].session == 2
    assert machine.dropped == []


def test_no_splice_on_restore_resume_with_nobody_there(make, stack):
    machine = make(",on_restore=resume")
    port, _ = joined(machine, stack)
    machine.move(stack, client=False)
    machine.resume()
    history_is(machine, port, [True, LEAVES])


@pytest.mark.parametrize(
    ("on_restore", "seen"), [("auto", []), ("resume", []), ("reopen", [LEAVES, RETURNS])], ids=lambda value: str(value)
)
def test_no_splice_a_session_that_was_carried_over_goes_on(make, stack, on_restore, seen):
    """The same socket in another device: nothing to see, unless on_restore=reopen asks for it."""
    machine = make(f",on_restore={on_restore}")
    port, host = joined(machine, stack)
    machine.hand_over()
    history_is(machine, port, [True, *seen])
    host.sendall(b"go on")
    assert machine.read(port, 5) == b"go on"
    machine.write(port, b"so do I")
    assert machine.receive(host, 7) == b"so do I"
    assert machine.device.ports[1].session == 1 + bool(seen)


# -- no lost word -----------------------------------------------------------------------------------------------------


def test_no_lost_word(make, stack):
    """R-CON-35: messages without buffers wait in order, are moved, and arrive in order; the guest hears every one."""
    machine = make(",on_restore=resume", ports=6, queue_size=4)
    ports = [machine.port(f"org.test.{n}") for n in range(1, 7)]
    machine.guest.on_interrupt = lambda: None
    for n in range(1, 7):
        stack.enter_context(machine.client(n))
    assert [port.host_history for port in ports] == [[]] * 6
    assert machine.device.waiting_messages == 2
    machine.pause()
    waiting = machine.device.snapshot().waiting
    assert [message.port for message in waiting] == [5, 6]
    document = machine.save()
    machine.arrive()
    for n in range(1, 7):
        stack.enter_context(machine.client(n))
    machine.restore(document)
    assert machine.device.snapshot().waiting == waiting
    machine.resume()
    machine.guest.run()
    machine.until_rest()
    machine.guest.run()
    assert [port.host_history for port in ports] == [[True]] * 6
    assert machine.device.waiting_messages == 0


# -- no stuck chain ---------------------------------------------------------------------------------------------------


def pattern(seed, size):
    return (random.Random(seed).randbytes(65537) * (size // 65537 + 1))[:size]


def fill(machine, port, seed=b"", most=1 << 30):
    """Writes until a host that does not read stops the ring; says how many bytes that took."""
    sent, quiet = 0, 0
    while sent < most and quiet < 20:
        quiet += 1
        machine.loop.run_once(0)
        with contextlib.suppress(BlockingIOError):
            sent += port.write(pattern(seed, sent + WRITE)[sent:])
            quiet = 0
    return sent


def test_no_stuck_chain(make, stack):
    """R-CON-48: 200 programs write to a host that does not read, and close. The 201st has a port that works."""
    machine = make(queue_size=8)
    port, host = joined(machine, stack)
    sent = fill(machine, port)
    assert port.full
    port.close()
    for _ in range(200):
        port.open()
        with pytest.raises(BlockingIOError, match="full"):
            port.write(b"no room")
        machine.loop.run_once(0)
        port.close()
        machine.loop.run_once(0)
    assert machine.receive(host, sent) == pattern(b"", sent)
    machine.wait(lambda: port.unsent == 0, "all chains are the guest's again")
    port.open()
    machine.write(port, b"still alive")
    assert machine.receive(host, 11) == b"still alive"
    assert machine.device.ports[1].counters.guest_opens == 202


def test_no_stuck_chain_after_a_move(make, stack):
    machine = make(queue_size=8)
    port, _ = joined(machine, stack)
    fill(machine, port)
    assert machine.device.ports[1].tx.offset > 0
    machine.move(stack)
    machine.resume()
    assert port.unsent == 0
    assert sum(count for _, count, _ in machine.dropped) == machine.device.ports[1].counters.bytes_discarded > 0


# -- all or nothing ---------------------------------------------------------------------------------------------------


def other_ports(snapshot):
    return dataclasses.replace(snapshot, ports=snapshot.ports[:1])


def another_name(snapshot):
    last = snapshot.ports[-1]
    renamed = dataclasses.replace(last, config=dataclasses.replace(last.config, name="org.other"))
    return dataclasses.replace(snapshot, ports=(*snapshot.ports[:-1], renamed))


def a_console(snapshot):
    last = snapshot.ports[-1]
    changed = dataclasses.replace(last, config=dataclasses.replace(last.config, console=True))
    return dataclasses.replace(snapshot, ports=(*snapshot.ports[:-1], changed))


def other_max_ports(snapshot):
    return dataclasses.replace(snapshot, max_ports=snapshot.max_ports + 1)


def other_features(snapshot):
    return dataclasses.replace(snapshot, features=snapshot.features | 1 << 60)


def a_back_end_of_another_kind(snapshot):
    last = dataclasses.replace(snapshot.ports[-1], back_end=b"\7 what is this")
    return dataclasses.replace(snapshot, ports=(*snapshot.ports[:-1], last))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (other_ports, "2 is too much"),
        (another_name, "name was 'org.other'"),
        (a_console, "console was True"),
        (other_max_ports, "max_ports=32"),
        (other_features, "features"),
        (a_back_end_of_another_kind, "port 2: "),
    ],
)
def test_all_or_nothing(make, stack, spoil, says):
    """R-MIG-19, R-VU-92. The port before the bad one has not heard of it either."""
    machine = make(ports=2)
    joined(machine, stack)
    machine.pause()
    document = machine.save()
    machine.arrive()
    stack.enter_context(machine.client())
    before, told = machine.device.snapshot(), []
    machine.device.on_transition = lambda *what: told.append(what)
    with pytest.raises(DocumentError, match=re.escape(says)):
        machine.device.restore(spoil(Snapshot.decode(document)))
    assert machine.device.snapshot() == before
    assert told == []
    machine.restore(document)
    assert machine.state is State.D


def test_all_or_nothing_a_document_that_was_cut_short(make, stack):
    machine = make()
    joined(machine, stack)
    machine.pause()
    document = machine.save()
    for end in range(len(document)):
        with pytest.raises(DocumentError):
            Snapshot.decode(document[:end])


def test_all_or_nothing_a_device_that_runs_is_neither_saved_nor_restored(make, stack):
    machine = make()
    port, _ = joined(machine, stack)
    machine.pause()
    snapshot = machine.device.snapshot()
    machine.resume()
    for attempt in (machine.device.snapshot, lambda: machine.device.restore(snapshot)):
        with pytest.raises(UsageError, match="runs"):
            attempt()
    assert machine.state is State.A
    history_is(machine, port, [True])


# -- away -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elsewhere", [False, True])
def test_away_hold_keeps_what_no_host_began_to_take(make, stack, elsewhere):
    """The chain that the first host took half of is lost, and counted; the others are whole, and the next host's."""
    machine = make(",away=hold", queue_size=8)
    port, host = joined(machine, stack)
    sent = fill(machine, port)
    taken, chains = machine.device.ports[1].tx.offset, port.unsent
    assert 0 < taken < WRITE
    if elsewhere:
        second = machine.move(stack)
        machine.resume()
    else:
        host.close()
        history_is(machine, port, [True, LEAVES])
        assert port.unsent == chains - 1
        second = stack.enter_context(machine.client())
    kept = (chains - 1) * WRITE
    assert machine.receive(second, kept) == pattern(b"", sent)[-kept:]
    assert machine.dropped == [(1, WRITE - taken, Whose.GUEST)]
    assert machine.device.ports[1].counters.bytes_discarded == WRITE - taken
    history_is(machine, port, [True, LEAVES, RETURNS])


def test_away_hold_with_a_host_that_takes_no_more_but_goes_on_talking(make, stack):
    machine = make(",away=hold")
    port, host = joined(machine, stack)
    host.shutdown(socket.SHUT_RD)
    sent = fill(machine, port, most=3 * WRITE)
    host.sendall(b"more")
    assert machine.read(port, 4) == b"more"
    assert port.unsent == 3
    host.close()
    history_is(machine, port, [True, LEAVES])
    second = stack.enter_context(machine.client())
    assert machine.receive(second, sent) == pattern(b"", sent)
    assert machine.dropped == []


@pytest.mark.parametrize("elsewhere", [False, True])
def test_away_discard_drops_and_counts(make, stack, elsewhere):
    """Both ways: what the guest sends nobody, and what hosts say to nobody."""
    machine = make(",away=discard", queue_size=8)
    port, host = joined(machine, stack)
    fill(machine, port)
    port.close()
    if elsewhere:
        host = machine.move(stack)
        machine.resume()
        history_is(machine, port, [True, LEAVES, RETURNS])
    host.sendall(b"is anybody there?")
    machine.wait(lambda: machine.device.ports[1].counters.host_bytes_dropped == 17)
    host.close()
    machine.wait(lambda: not port.host_connected)
    assert port.unsent == 0
    counters = machine.device.ports[1].counters
    assert sum(count for _, count, whose in machine.dropped if whose is Whose.HOST) == 17
    assert sum(count for _, count, whose in machine.dropped if whose is Whose.GUEST) == counters.bytes_discarded > 0


def test_counters_are_a_devices_own_and_sessions_are_the_ports(make, stack):
    machine = make()
    port, _ = joined(machine, stack)
    port.close()
    port.open()
    counters = machine.device.ports[1].counters
    assert (counters.guest_opens, counters.host_connects, counters.refused) == (2, 1, 0)
    machine.move(stack)
    machine.resume()
    history_is(machine, port, [True, LEAVES, RETURNS])
    counters = machine.device.ports[1].counters
    assert (counters.guest_opens, machine.device.ports[1].session) == (0, 2)


# -- the four answers -------------------------------------------------------------------------------------------------


def without_words_of_back_ends(document):
    """As if a device whose back ends save nothing had written it: QEMU's."""
    snapshot = Snapshot.decode(document)
    return dataclasses.replace(
        snapshot, ports=tuple(dataclasses.replace(port, back_end=b"") for port in snapshot.ports)
    ).encode()


def told_after_a_move(make, stack, policy, *, is_open):
    machine = make(f",restore={policy.value}", back_end=Recorder)
    if is_open:
        machine.port(NAME).open()
    machine.move(stack, client=False)
    return ", ".join(machine.device.ports[1].back_end.told) or "nothing"


def agent_answers(make, stack, policy, change=lambda document: document, *, reopens=False):
    """Whether a program in the guest, which holds its port open all the time, hears a request after the move."""
    machine = make(f",restore={policy.value}")
    port, _ = joined(machine, stack)
    machine.pause()
    document = change(machine.save())
    machine.arrive()
    host = stack.enter_context(machine.client())
    machine.restore(document)
    machine.resume()
    history_is(machine, port, [True, LEAVES, RETURNS])
    if reopens:
        port.close()
        port.open()
    host.sendall(b"ping")
    machine.until_rest()
    if not machine.device.ports[1].rx.bytes_moved:
        return "no"
    machine.write(port, machine.read(port, 4))
    return "yes" if machine.receive(host, 4) == b"ping" else "no"


def four_answers(make, stack):
    columns = [
        "`restore=`",
        "a back end is told, port open",
        "a back end is told, port closed",
        "the agent answers",
        ".. after QEMU's file",
        ".. if it reopens",
    ]
    yield f"| {' | '.join(columns)} |"
    yield "| --- " * len(columns) + "|"
    for policy in Policy:
        cells = [
            f"`{policy.value}`",
            told_after_a_move(make, stack, policy, is_open=True),
            told_after_a_move(make, stack, policy, is_open=False),
            agent_answers(make, stack, policy),
            agent_answers(make, stack, policy, without_words_of_back_ends),
            agent_answers(make, stack, policy, reopens=True),
        ]
        yield f"| {' | '.join(cells)} |"


def section(name):
    """What docs/moving.md has between the markers of ``name``."""
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end of {name} -->", PAGE.read_text(), re.DOTALL)
    assert found, f"docs/moving.md has no {name}"
    return found[1]


def test_the_four_answers_are_what_the_page_says(make, stack):
    table = "\n".join(four_answers(make, stack))
    assert section("four answers") == table, f"put this into docs/moving.md:\n{table}"


# -- the page ---------------------------------------------------------------------------------------------------------


def test_the_diagram_is_the_table():
    diagram = f"```mermaid\n{inspect.states('mermaid')}\n```"
    assert section("states") == diagram, f"put this into docs/moving.md:\n{diagram}"


def test_every_rule_on_the_page_has_a_test_named_after_it():
    rules = re.findall(r"^- \*\*(.+?)\*\*", PAGE.read_text(), re.MULTILINE)
    assert rules == ["truth", "nothing slept through", "no splice", "no lost word", "no stuck chain", "all or nothing"]
    for rule in rules:
        name = f"test_{rule.replace(' ', '_')}"
        assert any(test.startswith(name) for test in globals()), name


def test_the_pages_options_are_all_there():
    text = PAGE.read_text()
    for option, values in (("restore", Policy), ("on_restore", OnRestore)):
        for value in values:
            assert re.search(rf"`({option}=)?{value.value}`", text), f"{option}={value.value}"


def test_the_back_end_of_the_page_survives_a_move(make, stack):
    """No chardev, no socket: an object that the port drives."""
    names = {}
    exec(re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1], names)

    def tally(port):
        port.feed(Cause.HOST_CONNECT)
        return names["Tally"](port)

    machine = make(",on_restore=resume", back_end=tally)
    port = machine.port(NAME)
    port.open()
    machine.wait(lambda: port.host_connected)
    machine.write(port, b"12345")
    assert machine.read(port, 2) == b"5\n"
    machine.move(stack, client=False)
    machine.resume()
    history_is(machine, port, [True])
    machine.write(port, b"678")
    assert machine.read(port, 2) == b"8\n"
    spoilt = dataclasses.replace(machine.device.ports[1].save(), back_end=b"123")
    with pytest.raises(DocumentError, match="port 1: a tally is 8 bytes, not 3"):
        machine.device.ports[1].check(spoilt)


def test_a_guest_without_multiport_moves_too(make, stack):
    """R-CON-37: it has no control queue to be told anything on."""
    machine = make(features=~int(Feature.MULTIPORT))
    machine.move(stack, client=False)
    machine.resume()
    assert machine.device.waiting_messages == 0
