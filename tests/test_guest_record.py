"""Values with named fields, made without what dataclasses needs."""

from __future__ import annotations

import pytest

from guest_tools.record import Record


class Point(Record):
    x: int
    y: int = 2


def test_fields_are_given_in_order_or_by_name_and_may_have_defaults() -> None:
    assert (Point(1).x, Point(1).y) == (1, 2)
    assert Point(1, 3) == Point(y=3, x=1)


@pytest.mark.parametrize(("values", "named"), [((), {}), ((1, 2, 3), {}), ((1,), {"x": 1}), ((1,), {"z": 1})])
def test_each_field_has_one_value(values: tuple[int, ...], named: dict[str, int]) -> None:
    with pytest.raises(TypeError, match="Point has the fields x, y, each once"):
        Point(*values, **named)


def test_equal_ones_are_interchangeable() -> None:
    assert len({Point(1), Point(1, 2), Point(2)}) == 2
    assert Point(1) != (1, 2)


def test_it_cannot_be_changed_but_replaced() -> None:
    point = Point(1)
    with pytest.raises(AttributeError):
        point.x = 3  # type: ignore[misc]
    with pytest.raises(AttributeError):
        del point.x
    assert point.replace(x=3) == Point(3)
    assert point == Point(1)


def test_it_says_what_it_is() -> None:
    assert repr(Point(1)) == "Point(x=1, y=2)"
