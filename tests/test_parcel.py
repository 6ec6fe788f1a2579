"""Descriptors that go along with a document: each is taken once, and none is left over."""

import os

import pytest

from vsport.document import DocumentError, Fields
from vsport.parcel import Delivery, Parcel


@pytest.fixture
def pipe():
    ends = os.pipe()
    yield ends
    for fd in ends:
        try:
            os.close(fd)
        except OSError:
            continue


def is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_numbers_stand_for_descriptors_and_none_stays_none():
    parcel = Parcel()
    assert [parcel.add(7), parcel.add(-1), parcel.add(9)] == [0, -1, 1]
    assert parcel.fds == [7, 9]


def test_what_is_taken_is_the_takers_and_the_rest_is_closed(pipe):
    delivery = Delivery(pipe)
    state = Fields("state", {"read": 0, "none": -1})
    assert delivery.take(state, "read") == pipe[0]
    assert delivery.take(state, "none") == -1
    delivery.close()
    assert is_open(pipe[0])
    assert not is_open(pipe[1])
    delivery.close()  # a second time does nothing


@pytest.mark.parametrize(
    ("number", "message"), [(2, "fd is not in -1 to 1"), (-2, "fd is not in -1 to 1"), ("0", "fd is str, not int")]
)
def test_a_wrong_number_is_refused(pipe, number, message):
    with pytest.raises(DocumentError, match=message):
        Delivery(pipe).take(Fields("state", {"fd": number}), "fd")


def test_no_descriptor_is_taken_twice(pipe):
    delivery = Delivery(pipe)
    delivery.take(Fields("state", {"fd": 0}), "fd")
    with pytest.raises(DocumentError, match="taken already"):
        delivery.take(Fields("state", {"fd": 0}), "fd")
    delivery.close()
