"""A port on its own: what it says to its guest and its back end, and which names it may have."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsport._ring import DeviceQueue
from vsport.connection import TABLE, Cause, Refused, State
from vsport.constants import Event
from vsport.control import Message
from vsport.errors import GuestError, UsageError
from vsport.port import BackEnd, Port, PortConfig


class Notes(BackEnd):
    """Both what a port's device (Links) and what its back end hear."""

    def __init__(self):
        self.told = []
        self.heard = []
        self.looks = []
        self.drops = []
        self.moves = []

    def tell(self, message):
        self.told.append(message)

    def call(self, index): ...
    def backlog(self, index): ...
    def fault(self, index, error): ...

    def transition(self, port, cause, before):
        self.moves.append((before, cause, port.state))

    def tx_ready(self):
        self.looks.append("tx")

    def rx_ready(self):
        self.looks.append("rx")

    def guest_connected(self, connected, cause):
        self.heard.append((connected, cause))

    def dropped(self, port, count, whose):
        self.drops.append((count, whose))


def make(**config):
    notes = Notes()
    return Port(PortConfig(1, **config), DeviceQueue(4), DeviceQueue(5), notes, back_end=notes), notes


def test_a_ready_port_is_announced_in_order():
    """R-CON-31: what it is, its size, its name, then its host."""
    port, notes = make(name="org.test.0", console=True, cols=100, rows=30)
    port.feed(Cause.HOST_CONNECT)
    assert notes.told == []
    port.feed(Cause.PORT_READY)
    assert notes.told == [
        Message(1, Event.CONSOLE_PORT, 1),
        Message.resize(1, 100, 30),
        Message.name(1, "org.test.0"),
        Message(1, Event.PORT_OPEN, 1),
    ]


def test_sizes_can_be_said_as_old_kernels_read_them():
    """R-CON-26."""
    port, notes = make(console=True, cols=100, rows=30, rows_first=True)
    port.feed(Cause.PORT_READY)
    assert notes.told[1] == Message.resize(1, 30, 100)
    port.resize(132, 43)
    assert notes.told[-1].size() == (43, 132)


def test_a_port_without_a_name_says_none():
    port, notes = make()
    port.feed(Cause.PORT_READY)
    assert notes.told == []


def test_bytes_may_flow_when_both_are_there():
    port, notes = make()
    for cause in (Cause.PORT_READY, Cause.GUEST_OPEN, Cause.HOST_CONNECT):
        port.feed(cause)
    assert port.state is State.A
    assert notes.looks[-2:] == ["tx", "rx"]
    assert notes.heard == [(True, Cause.GUEST_OPEN)]


@given(st.lists(st.sampled_from(Cause), max_size=30))
def test_a_port_does_what_the_table_says_and_counts_it(causes):
    port, notes = make(name="n")
    refused = opens = 0
    for cause in causes:
        before, row = port.state, TABLE[port.state, cause]
        if isinstance(row, Refused):
            refused += 1
            with pytest.raises(GuestError, match=row.rule):
                port.feed(cause)
            assert port.state is before
        else:
            port.feed(cause)
            assert port.state is row.state
            opens += row.state.guest_connected and not before.guest_connected
    assert (port.counters.refused, port.counters.guest_opens) == (refused, opens)
    assert all(before is not after for before, _cause, after in notes.moves)


@pytest.mark.parametrize("name", ["a/b", "..", ".", "x\0", "tab\t", "del\x7f", "n" * 1025, "ü" * 600])
def test_names_that_udev_could_not_link_are_refused(name):
    """R-CON-52."""
    with pytest.raises(UsageError, match="name"):
        PortConfig(1, name)


@given(st.text(max_size=30))
def test_any_name_is_taken_or_refused(name):
    try:
        config = PortConfig(1, name)
    except UsageError as exc:
        assert "\n" not in str(exc)
    else:
        assert "/" not in config.name
