"""The control messages' codec, and the outbox in which they wait."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsport.constants import Event
from vsport.control import Message, Outbox
from vsport.errors import GuestError

messages = st.builds(
    Message, st.integers(0, 2**32 - 1), st.sampled_from(Event), st.integers(0, 2**16 - 1), st.binary(max_size=40)
)


def test_the_wire_format_is_little_endian_id_event_value():
    """5.3.6.2, R-CON-20."""
    assert Message(1, Event.PORT_OPEN, 1).encode().hex() == "0100000006000100"
    assert Message(0x01020304, Event.DEVICE_READY, 0x0506).encode().hex() == "0403020100000605"


def test_a_name_has_no_nul_behind_it():
    """R-CON-28."""
    assert Message.name(3, "org.test.0").encode() == bytes.fromhex("0300000007000100") + b"org.test.0"


def test_a_size_is_columns_first():
    """R-CON-25."""
    assert Message.resize(0, 80, 25).encode() == bytes.fromhex("0000000005000000 5000 1900")
    assert Message.resize(0, 132, 43).size() == (132, 43)


def test_a_size_cut_short_is_refused():
    """R-CON-29."""
    with pytest.raises(GuestError, match="R-CON-29"):
        Message(0, Event.RESIZE, 0, b"\x50\x00\x19").size()


@given(messages)
def test_decode_is_the_inverse_of_encode(message):
    assert Message.decode(message.encode()) == message


@given(st.binary(max_size=64))
def test_decode_gives_a_message_or_a_guest_error(data):
    """R-CON-30."""
    try:
        message = Message.decode(data)
    except GuestError as exc:
        assert exc.rule == "R-CON-30"
    else:
        assert message.encode() == data


# -- the outbox --------------------------------------------------------------------------------------------------------


def opened(value, port=1):
    return Message(port, Event.PORT_OPEN, value)


def add(port=1):
    return Message(port, Event.PORT_ADD, 1)


def remove(port=1):
    return Message(port, Event.PORT_REMOVE, 1)


def left_of(*put):
    """What waits after these were put in."""
    outbox = Outbox()
    for message in put:
        outbox.put(message)
    left = []
    while (message := outbox.peek()) is not None:
        left.append(message)
        outbox.sent()
    return left


@pytest.mark.parametrize(
    ("put", "left"),
    [
        ([0], [0]),
        ([1, 1], [1]),
        ([1, 0], [0]),
        ([0, 1], [0, 1]),
        ([0, 1, 0], [0]),
        ([0, 1, 0, 1], [0, 1]),
        ([1, 0, 1], [0, 1]),
    ],
)
def test_flaps_of_the_host_keep_the_last_leave_and_the_last_return(put, left):
    """R-CON-36, and no splice: a return never hides the leave before it."""
    assert left_of(*map(opened, put)) == list(map(opened, left))


def test_a_port_that_was_never_seen_needs_no_goodbye():
    assert left_of(add(), opened(1), remove()) == []


def test_a_port_that_the_guest_knows_is_taken_away_and_its_news_with_it():
    assert left_of(opened(1), remove()) == [remove()]


def test_remove_and_add_stay_in_order():
    """R-CON-36."""
    assert left_of(remove(), add(), opened(1)) == [remove(), add(), opened(1)]
    assert left_of(remove(), add(), opened(1), remove()) == [remove()]


def test_only_the_last_size_waits():
    assert left_of(Message.resize(0, 80, 25), Message.resize(0, 90, 30)) == [Message.resize(0, 90, 30)]


def test_ports_do_not_touch_each_other():
    assert left_of(opened(1, 1), opened(0, 2), remove(2)) == [opened(1, 1), remove(2)]


@given(st.lists(messages.filter(lambda message: message.port < 4), max_size=200))
def test_the_outbox_is_bounded_and_ends_in_the_truth(put):
    """At most two of a kind for each port wait, and the last word about a port's host is the last one said."""
    left = left_of(*put)
    kinds = [(message.port, message.event) for message in left]
    assert all(kinds.count(kind) <= 2 for kind in kinds)
    for port in range(4):
        said = [m.value > 0 for m in put if m.port == port and m.event is Event.PORT_OPEN]
        heard = [m.value > 0 for m in left if m.port == port and m.event is Event.PORT_OPEN]
        assert not heard or heard[-1] is said[-1]
