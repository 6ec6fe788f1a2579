"""Documents are read whole and true, or refused with the place of the trouble."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsport.document import DocumentError, Fields

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


def fields(**values):
    return Fields("paper", values)


def test_each_field_is_taken_once():
    paper = fields(count=3, name="x", on=True, data="00ff", inner={"deep": 1}, list=[1, 2])
    assert (paper.integer("count", 0, 3), paper.text("name"), paper.boolean("on")) == (3, "x", True)
    assert paper.bytes("data") == b"\x00\xff"
    inner = paper.object("inner")
    assert inner.integer("deep", 0, 9) == 1
    inner.end()
    assert paper.each("list", 2, lambda where, value: (where, value)) == (("paper.list[0]", 1), ("paper.list[1]", 2))
    paper.end()
    with pytest.raises(DocumentError, match="paper: count is missing"):
        paper.integer("count", 0, 3)


@pytest.mark.parametrize(
    ("take", "message"),
    [
        (lambda paper: paper.integer("a", 0, 4), "paper: a is not in 0 to 4"),
        (lambda paper: paper.text("a"), "paper: a is int, not str"),
        (lambda paper: paper.integer("yes", 0, 4), "paper: yes is bool, not int"),
        (lambda paper: paper.bytes("word"), "paper: word is not hexadecimal"),
        (lambda paper: paper.object("word"), "paper: word is str, not dict"),
        (lambda paper: paper.each("list", 1, lambda where, value: value), "paper: list has 2 entries, more than 1"),
        (lambda paper: paper.text("gone"), "paper: gone is missing"),
        (lambda paper: paper.end(), "paper: 'a', 'list', 'word' is not known"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(take, message):
    with pytest.raises(DocumentError, match=message):
        take(fields(a=5, word="xyz", list=[1, 2], yes=True))


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_whatever_the_bytes_parse_raises_its_own_error_only(data):
    try:
        paper = Fields.parse("paper", data)
        paper.integer("a", 0, 1)
    except DocumentError as exc:
        assert "\n" not in str(exc)


def test_an_endless_nesting_is_no_document():
    with pytest.raises(DocumentError, match="this is no JSON"):
        Fields.parse("paper", b'{"a":' * 100_000)
