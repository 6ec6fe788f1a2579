"""One contract (vsport/chardev/base.py) for every kind of chardev, on real sockets, terminals, FIFOs and files."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import inspect
import os
import socket
import stat
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from chardev_peers import HOSTS, Host, Rig, open_descriptors, shipped
from hypothesis import given, settings
from hypothesis import strategies as st

from vsport.chardev import KINDS, inotify, make
from vsport.chardev.base import AlwaysConnected
from vsport.document import DocumentError
from vsport.errors import HostError, UsageError
from vsport.loop import WRITE
from vsport.parcel import Delivery, Parcel

BULK = os.urandom(300_000)


@pytest.fixture(params=HOSTS)
def host_class(request: pytest.FixtureRequest) -> type[Host]:
    return HOSTS[request.param]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Milliseconds in the place of the seconds that a chardev waits before it tries or looks again."""
    monkeypatch.setattr(AlwaysConnected, "retry_seconds", 0.01)
    monkeypatch.setattr(inotify, "POLL_SECONDS", 0.01)


@pytest.fixture
def rig(host_class: type[Host], monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    if host_class.polled:
        monkeypatch.setattr(inotify, "_watch_opens", lambda path: -1)
    with Rig(host_class) as rig:
        yield rig


def where(condition: Callable[[type[Host]], bool]) -> pytest.MarkDecorator:
    """Runs a test on those hosts only in whose nature it is."""
    names = [name for name, host in HOSTS.items() if condition(host)]
    return pytest.mark.parametrize("host_class", [HOSTS[name] for name in names], ids=names)


def test_every_kind_is_in_the_suite() -> None:
    assert {host.kind for host in HOSTS.values()} == set(KINDS)


# -- connection ----------------------------------------------------------------------------------------------------


@where(lambda host: host.leaves and host.returns)
def test_is_not_connected_without_a_peer(rig: Rig) -> None:
    rig.open()
    rig.wire.settle()
    assert rig.wire.events == []
    assert not rig.wire.chardev.connected


@where(lambda host: host.leaves)
def test_connects_and_disconnects_in_turns(rig: Rig) -> None:
    rig.open()
    times = 10 if rig.host.returns else 1
    for _ in range(times):
        rig.connect()
        rig.leave()
        rig.wire.settle()
    assert rig.wire.events == ["connected", "disconnected"] * times


@where(lambda host: host.leaves)
def test_with_each_session_it_is_another_edition(rig: Rig) -> None:
    """Who was given its descriptors has to know whether they are still those: numbers come again."""
    rig.open()
    editions = []
    for _ in range(3 if rig.host.returns else 1):
        rig.connect()
        editions.append(rig.wire.chardev.edition)
        rig.leave()
        rig.wire.settle()
        editions.append(rig.wire.chardev.edition)
    assert editions == sorted(set(editions))


@where(lambda host: host.leaves)
def test_notices_that_the_peer_left_though_nobody_reads(rig: Rig) -> None:
    rig.wire.reads = False
    rig.start()
    rig.host.send(b"unread")
    rig.leave()
    assert rig.wire.events == ["connected", "disconnected"]


@where(lambda host: issubclass(KINDS[host.kind], AlwaysConnected))
def test_an_always_connected_kind_is_connected_by_open(rig: Rig) -> None:
    rig.open()
    assert rig.wire.events == ["connected"]


def test_disconnect_ends_the_session_and_the_next_one_comes(rig: Rig) -> None:
    rig.start()
    wire = rig.wire
    wire.chardev.disconnect()
    assert wire.events == ["connected", "disconnected"]
    wire.chardev.disconnect()  # it is over already
    assert wire.events == ["connected", "disconnected"]
    if rig.host.leaves and rig.host.returns:
        if rig.host.sees_the_end:
            assert rig.host.hear(wire, 1) == b""
        rig.host.leave()
        rig.connect()
    else:
        wire.until(lambda: wire.chardev.connected)
    assert wire.events[-1] == "connected"
    assert wire.events.count("connected") - wire.events.count("disconnected") == 1


# -- bytes ---------------------------------------------------------------------------------------------------------


@where(lambda host: host.hears)
def test_bytes_from_the_guest_arrive_equal(rig: Rig) -> None:
    rig.start()
    heard = bytearray()
    rig.wire.send(BULK, meanwhile=lambda: heard.extend(rig.host.receive() or b""))
    heard += rig.host.hear(rig.wire, len(BULK) - len(heard))
    assert bytes(heard) == BULK


@where(lambda host: host.sends)
def test_bytes_to_the_guest_arrive_equal(rig: Rig) -> None:
    if rig.host.leaves:
        rig.start()
    rest = BULK

    def all_sent() -> bool:
        nonlocal rest
        rest = rest[rig.host.send(rest) :]
        return not rest

    rig.wire.until(all_sent)
    if not rig.host.leaves:  # a file's content is there before
        rig.open()
    rig.wire.until(lambda: len(rig.wire.received) == len(BULK))
    assert bytes(rig.wire.received) == BULK


@where(lambda host: host.slow)
def test_a_slow_host_holds_the_guest_up_and_loses_nothing(rig: Rig) -> None:
    rig.start()
    sent = bytearray()
    room = [WRITE]
    rig.loop.watch(rig.wire.chardev.write_fd, WRITE, room.append)
    while room:
        while count := rig.wire.offer(BULK[len(sent) % 1000 :]):
            sent += BULK[len(sent) % 1000 :][:count]
            assert len(sent) < 64 << 20, "endless room"
        room.clear()  # write() said so; a terminal makes some by itself, as its bytes move on to the reader
        rig.loop.run_until(lambda: room, 0.05)
    assert rig.host.hear(rig.wire, len(sent)) == sent
    rig.wire.until(lambda: room)
    rig.wire.send(b"more")
    assert rig.host.hear(rig.wire, 4) == b"more"


@where(lambda host: host.leaves and KINDS[host.kind].eof_ends_session)
def test_what_the_host_said_before_it_left_is_read(rig: Rig) -> None:
    rig.start()
    rig.host.send(b"last words")
    rig.leave()
    assert rig.wire.received == b"last words"


@where(lambda host: host.leaves and host.returns)
def test_no_byte_of_one_session_reaches_the_next(rig: Rig) -> None:
    rig.wire.reads = False
    rig.start()
    rig.host.send(b"to the guest of old")
    rig.wire.send(b"to the host of old")
    rig.leave()
    rig.wire.reads = True
    rig.connect()
    rig.host.send(b"NEW")
    rig.wire.until(lambda: len(rig.wire.received) >= 3)
    assert rig.wire.received == b"NEW"
    rig.wire.send(b"new")
    assert rig.host.hear(rig.wire, 3) == b"new"


def test_the_log_gets_a_copy(host_class: type[Host]) -> None:
    with Rig(host_class) as outer:
        path = outer.directory / "log"
        path.write_bytes(b"old ")
        for logappend, expected in (("on", b"old hello"), ("off", b"hello")):
            with Rig(host_class, logfile=str(path), logappend=logappend) as rig:
                rig.start()
                rig.wire.send(b"hello")
                rig.wire.chardev.close()
            assert path.read_bytes() == expected


# -- descriptors and files -----------------------------------------------------------------------------------------


def test_descriptors_neither_block_nor_reach_children(rig: Rig) -> None:
    rig.start()
    for fd in {rig.wire.chardev.read_fd, rig.wire.chardev.write_fd} - {-1}:
        assert not os.get_inheritable(fd)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK


def test_making_one_touches_nothing(rig: Rig) -> None:
    before = sorted(os.listdir(rig.directory))
    make(rig.host.kind, "c1", {**rig.host.options(), "logfile": str(rig.directory / "log")})
    assert sorted(os.listdir(rig.directory)) == before


def test_close_leaves_nothing_and_tells_nobody(rig: Rig) -> None:
    rig.start()
    rig.wire.chardev.close()
    rig.wire.chardev.close()
    assert not rig.wire.chardev.connected
    assert rig.wire.events == ["connected"]
    rig.host.close()
    rig.wire.settle()
    assert set(os.listdir(rig.directory)) <= {"in", "out", "p.in", "p.out"}  # the user's own files


@pytest.mark.parametrize("event", ["connected", "disconnected"])
def test_may_be_closed_from_within_a_notification(rig: Rig, event: str) -> None:
    wire = rig.wire
    wire.then = lambda told: wire.chardev.close() if told == event else None
    rig.open()
    rig.host.connect()
    wire.until(lambda: wire.events)
    wire.chardev.disconnect()
    wire.settle()
    assert wire.events == ["connected", "disconnected"][: 1 + (event == "disconnected")]
    assert not wire.chardev.connected


def test_opens_after_it_failed_to_open(host_class: type[Host]) -> None:
    with Rig(host_class) as outer, Rig(host_class, logfile=str(outer.directory / "missing" / "log")) as rig:
        with pytest.raises(HostError, match=r"cannot open log file .*/missing/log: No such file or directory"):
            rig.open()
        (outer.directory / "missing").mkdir()
        rig.start()
        assert rig.wire.events == ["connected"]


def test_opens_again_after_close(rig: Rig) -> None:
    rig.open()
    rig.wire.chardev.close()
    rig.wire.events.clear()
    rig.start()
    assert rig.wire.events == ["connected"]


# -- going on in another process -------------------------------------------------------------------------------------


def converse(rig: Rig, word: bytes) -> None:
    """One word in each direction that the kind has."""
    if rig.host.hears:
        rig.wire.send(word)
        assert rig.host.hear(rig.wire, len(word)) == word
    if rig.host.sends:
        so_far = len(rig.wire.received)
        assert rig.host.send(word) == len(word)
        rig.wire.until(lambda: len(rig.wire.received) == so_far + len(word))
        assert rig.wire.received[so_far:] == word


@pytest.fixture
def started(rig: Rig) -> Rig:
    rig.start()
    rig.wire.settle()
    return rig


@where(lambda host: host.leaves)
def test_the_very_session_goes_on_after_a_handover(started: Rig) -> None:
    rig = started
    described = rig.wire.chardev.describe()
    for turn in range(5):
        converse(rig, b"turn %d" % turn)
        if rig.host.sends:
            rig.host.send(b"under way")
        rig.hand_over()
        assert rig.wire.chardev.connected
        assert rig.wire.chardev.describe() == described
        if rig.host.sends:
            rig.wire.until(lambda: rig.wire.received == b"under way")
        if rig.host.hears:
            assert rig.host.receive() is None  # no end of file
    converse(rig, b"still here")
    assert rig.wire.events == []


@where(lambda host: not host.leaves)
def test_a_handover_is_no_news_where_nobody_can_leave(started: Rig) -> None:
    rig = started
    for _ in range(3):
        rig.hand_over()
        rig.wire.settle()
        assert rig.wire.chardev.connected
        assert rig.wire.events == []
        if rig.host.kind == "ringbuf":
            rig.host.attach(rig.wire.chardev)
        if rig.host.hears:
            rig.wire.send(b"word")
            assert rig.host.hear(rig.wire, 4) == b"word"


@where(lambda host: host.leaves)
def test_a_peer_that_leaves_after_a_handover_is_noticed_and_the_next_one_too(started: Rig) -> None:
    rig = started
    rig.hand_over()
    rig.leave()
    assert rig.wire.events == ["disconnected"]
    if rig.host.returns:
        rig.connect()
        converse(rig, b"hello")
        assert rig.wire.events == ["disconnected", "connected"]


@where(lambda host: host.leaves)
def test_a_peer_that_leaves_meanwhile_is_noticed_by_the_successor(started: Rig) -> None:
    rig = started
    state, delivery = shipped(rig.wire.chardev)
    if rig.host.sends:
        rig.host.send(b"last words")
    rig.host.leave()
    old, rig.wire = rig.wire, rig.successor()
    rig.wire.take(state, delivery)
    old.chardev.release()
    assert rig.wire.chardev.connected
    rig.wire.resume()
    rig.wire.until(lambda: rig.wire.events)
    assert rig.wire.events == ["disconnected"]
    if rig.host.sends and KINDS[rig.host.kind].eof_ends_session:
        assert rig.wire.received == b"last words"
    assert old.events == ["connected"]


@where(lambda host: host.leaves and host.returns)
def test_without_a_peer_the_successor_waits_for_the_next_one(rig: Rig) -> None:
    rig.open()
    rig.wire.settle()
    for _ in range(2):
        rig.hand_over()
        rig.wire.settle()
        assert not rig.wire.chardev.connected
    rig.connect()
    converse(rig, b"hello")
    assert rig.wire.events == ["connected"]


@where(lambda host: host.leaves and host.returns)
def test_a_peer_that_comes_meanwhile_is_the_successors(rig: Rig) -> None:
    rig.open()
    rig.wire.settle()
    rig.host.connect()
    rig.hand_over()
    assert not rig.wire.chardev.connected
    rig.wire.until(lambda: rig.wire.chardev.connected)
    converse(rig, b"hello")


def test_a_session_that_has_just_ended_is_over_for_the_successor_too(started: Rig) -> None:
    rig = started
    rig.wire.chardev.disconnect()
    rig.hand_over()
    assert not rig.wire.chardev.connected
    if rig.host.leaves and rig.host.returns:
        rig.host.leave()
        rig.connect()
    else:
        rig.wire.until(lambda: rig.wire.chardev.connected)
    assert rig.wire.events[-1] == "connected"


def test_giving_changes_nothing(started: Rig) -> None:
    rig = started
    for _ in range(3):
        shipped(rig.wire.chardev)[1].close()
    taker = rig.successor()
    state, delivery = shipped(rig.wire.chardev)
    taker.take(state, delivery)
    taker.chardev.release()  # it had second thoughts
    taker.chardev.release()
    assert not taker.chardev.connected
    rig.wire.settle()
    assert rig.wire.events == ["connected"]
    if rig.host.leaves:
        converse(rig, b"as before")
        rig.leave()
        if rig.host.returns:
            rig.connect()


def test_files_belong_to_the_successor(rig: Rig) -> None:
    rig.open()
    before = sorted(os.listdir(rig.directory))
    for _ in range(2):
        old = rig.wire
        rig.hand_over()
        old.chardev.close()
        assert sorted(os.listdir(rig.directory)) == before
    rig.wire.chardev.close()
    assert set(os.listdir(rig.directory)) <= {"in", "out", "p.in", "p.out"}  # the user's own files


@where(lambda host: host.kind == "socket" and host.returns)
def test_who_gave_a_path_away_does_not_remove_it_later(rig: Rig) -> None:
    """Not even when it fails to listen there anew."""
    rig.open()
    old = rig.wire
    rig.hand_over()
    with contextlib.suppress(HostError):
        old.open()
    old.chardev.close()
    rig.connect()


def test_the_log_goes_on_in_another_process(host_class: type[Host]) -> None:
    with Rig(host_class) as outer:
        path = outer.directory / "log"
        with Rig(host_class, logfile=str(path)) as rig:
            rig.start()
            rig.wire.send(b"one ")
            rig.hand_over()
            rig.wire.send(b"two")
        assert path.read_bytes() == b"one two"


def wrong_states(state: Any) -> Iterator[Any]:
    """Every state with one thing in it wrong."""
    if isinstance(state, dict):
        yield {**state, "superfluous": 1}
        for name, value in state.items():
            yield {other: state[other] for other in state if other != name}
            yield from ({**state, name: wrong} for wrong in wrong_states(value))
            if name in ("session", "socket", "master") and value >= 0:
                yield {**state, name: -1}
    elif isinstance(state, list):
        for at, value in enumerate(state):
            yield from ([*state[:at], wrong, *state[at + 1 :]] for wrong in wrong_states(value))
    yield from (None, "?", 1.5, -2, 2**70, [[]], [{}])


def refuse(rig: Rig, state: Any, delivery: Delivery) -> None:
    """A successor does not take ``state``, and nothing stays open in its process."""
    taker = rig.successor()
    with pytest.raises(DocumentError) as refusal:
        taker.take(state, delivery)
    assert str(refusal.value).startswith("chardev")
    assert "\n" not in str(refusal.value)
    assert not taker.chardev.connected
    delivery.close()
    taker.loop.close()


def test_a_state_that_is_wrong_is_refused_and_nothing_is_left_open(started: Rig) -> None:
    rig = started
    good, delivery = shipped(rig.wire.chardev)
    delivery.close()
    before = open_descriptors()
    for wrong in wrong_states(good):
        refuse(rig, wrong, shipped(rig.wire.chardev)[1])
        assert open_descriptors() == before, wrong
    assert rig.wire.chardev.connected
    if rig.host.leaves:
        converse(rig, b"unharmed")


def test_the_state_of_another_kind_is_refused(started: Rig) -> None:
    for host in HOSTS.values():
        if host.kind != started.host.kind:
            with Rig(host) as other:
                refuse(other, *shipped(started.wire.chardev))


def test_descriptors_that_are_something_else_are_refused(started: Rig) -> None:
    rig = started
    parcel = Parcel()
    state = rig.wire.chardev.give(parcel)
    before = open_descriptors()
    for at, right in enumerate(parcel.fds):
        for wrong in unsuitable(right):
            fds = [os.dup(fd) for fd in parcel.fds]
            os.dup2(wrong, fds[at], inheritable=False)
            os.close(wrong)
            refuse(rig, copy.deepcopy(state), Delivery(fds))
            assert open_descriptors() == before


def unsuitable(right: int) -> Iterator[int]:
    """Descriptors that are not like ``right``: of another kind, for the other direction, such that block."""
    yield os.open("/", os.O_PATH)
    yield os.open("/dev/zero", os.O_RDWR)
    yield socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach()
    reading, writing = os.pipe2(os.O_NONBLOCK)
    direction = fcntl.fcntl(right, fcntl.F_GETFL) & os.O_ACCMODE
    os.close(writing if direction == os.O_WRONLY else reading)
    yield reading if direction == os.O_WRONLY else writing


# -- content -------------------------------------------------------------------------------------------------------


@where(lambda host: host.kind != "ringbuf")
def test_most_kinds_hold_nothing_that_has_to_be_saved(started: Rig) -> None:
    chardev = started.wire.chardev
    assert chardev.save() == b""
    chardev.check(b"")
    chardev.load(b"")
    with pytest.raises(DocumentError, match=f"chardev c0: a {chardev.kind} holds nothing"):
        chardev.check(b"x")


# -- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_of_options_is_the_constructor(kind: str) -> None:
    parameters = inspect.signature(KINDS[kind].__init__).parameters
    taken = {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY and name != "log"}
    table = {name: o for name, o in KINDS[kind].OPTIONS.items() if name not in ("logfile", "logappend")}
    assert set(taken) == {name.replace("-", "_") for name in table}
    for name, option in table.items():
        default = taken[name.replace("-", "_")].default
        assert default == (inspect.Parameter.empty if option.required else option.default)
        assert option.help
        assert option.placeholder


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_option_is_named_with_those_that_exist(kind: str) -> None:
    with pytest.raises(UsageError) as error:
        make(kind, "c0", {"pth": "/x"})
    line = str(error.value)
    assert line.startswith("chardev c0: unknown option 'pth'; known: ")
    assert all(name in line for name in KINDS[kind].OPTIONS)
    assert "\n" not in line


@pytest.mark.parametrize(
    ("kind", "options", "line"),
    [
        ("sokcet", {}, "unknown kind 'sokcet'; known: socket, pty, file, pipe, stdio, ringbuf, null"),
        ("file", {}, "needs path="),
        ("pipe", {}, "needs path="),
        ("file", {"path": "x", "append": "yes"}, "append='yes': must be on or off"),
        ("file", {"path": ""}, "path='': must be a non-empty text"),
        ("file", {"path": "a\0b"}, "must be a non-empty text"),
        ("ringbuf", {"size": "1x"}, "size='1x': must be a number of bytes, such as 65536 or 64K"),
        ("ringbuf", {"size": "3K"}, "size=3072: must be a power of two"),
        ("ringbuf", {"size": "0"}, "must be a power of two"),
        ("ringbuf", {"size": "2G"}, "at most 1G"),
        ("null", {"logappend": "on"}, "logappend=on needs logfile="),
        ("socket", {}, r"needs path= \(Unix\) or port= \(TCP\)"),
        ("socket", {"path": "x", "port": "1"}, "port= is for TCP"),
        ("socket", {"path": "x" * 108}, "longer than 107 bytes"),
        ("socket", {"path": "x", "nodelay": "on"}, "nodelay= is for TCP"),
        ("socket", {"path": "x", "wait": "off"}, "wait= is for a server"),
        ("socket", {"path": "x", "server": "on", "reconnect-ms": "9"}, "reconnect-ms= is for a client"),
        ("socket", {"path": "x", "reconnect": "1", "reconnect-ms": "9"}, "give one of them"),
        ("socket", {"path": "x", "reconnect": "99999999"}, "at most one day"),
        ("socket", {"port": "1"}, "a client needs host="),
        ("socket", {"host": "h", "port": "70000"}, "at most 65535"),
        ("socket", {"host": "h", "port": "-1"}, "port='-1': must be a number, 0 or more"),
        ("socket", {"port": "5", "to": "4", "server": "on"}, "to=4 is below port=5"),
        ("socket", {"port": "5", "host": "h", "to": "9"}, "to= is for a server"),
        ("socket", {"port": "5", "server": "on", "abstract": "on"}, "abstract= is for a Unix socket"),
        ("socket", {"port": "5", "server": "on", "ipv4": "off", "ipv6": "off"}, "leaves no address"),
    ],
)
def test_nonsense_gets_one_clear_line(kind: str, options: dict[str, str], line: str) -> None:
    with pytest.raises(UsageError, match=line) as error:
        make(kind, "c0", options)
    assert str(error.value).startswith("chardev c0: ")
    assert "\n" not in str(error.value)


@st.composite
def option_lists(draw: st.DrawFn) -> tuple[str, dict[str, str]]:
    kind = draw(st.sampled_from([*KINDS, "other"]))
    names = st.sampled_from([*KINDS[kind].OPTIONS, "bogus"]) if kind in KINDS else st.text()
    values = st.one_of(st.text(), st.sampled_from(["on", "off", "0", "1", "65535", "64K", "s", "localhost"]))
    return kind, draw(st.dictionaries(names, values, max_size=5))


@settings(deadline=None)  # the machine may be busy
@given(option_lists())
def test_any_options_make_a_chardev_or_a_usage_error(given: tuple[str, dict[str, str]]) -> None:
    kind, options = given
    try:
        line = make(kind, "c0", options).kind
    except UsageError as exc:
        line = str(exc)
    assert len(line.splitlines()) == 1
