"""guest_tools.events: what is called an event. Real ports come and go in tests/lab."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_tools import watch as watch_function
from guest_tools.errors import HostTimeout
from guest_tools.ports import Port, PortState
from guest_tools.events import Event, flag_changes, wait_for_host, watch

PORT = Port("/dev/vport0p1", "vport0p1", "org.test.0", 1)
STATES = st.builds(PortState, *[st.sampled_from([None, False, True])] * 3)


def in_state(**flags: Any) -> Port:
    return replace(PORT, state=PortState(**flags))


@pytest.mark.parametrize(
    ("before", "after", "kinds"),
    [
        ({"guest_connected": False}, {"guest_connected": True}, ["opened"]),
        ({"guest_connected": True}, {"guest_connected": False}, ["closed"]),
        ({"host_connected": False}, {"host_connected": True}, ["host_connected"]),
        ({"host_connected": True}, {"host_connected": False}, ["host_left"]),
        ({"host_connected": None}, {"host_connected": True}, []),
        ({"host_connected": True}, {"host_connected": None}, []),
        ({}, {}, []),
    ],
)
def test_a_flag_that_changes_is_an_event(before: dict[str, bool], after: dict[str, bool], kinds: list[str]) -> None:
    assert flag_changes(in_state(**before), in_state(**after)) == kinds


@given(STATES)
def test_no_change_is_no_event(state: PortState) -> None:
    port = replace(PORT, state=state)
    assert flag_changes(port, port) == []


@given(STATES, STATES)
def test_what_was_not_known_before_is_no_event(before: PortState, after: PortState) -> None:
    kinds = flag_changes(replace(PORT, state=before), replace(PORT, state=after))
    assert len(kinds) <= 2
    for kind in kinds:
        flag = "host_connected" if kind.startswith("host") else "guest_connected"
        assert getattr(before, flag) is (not getattr(after, flag))


def test_an_events_json_is_the_ports_with_two_fields_more() -> None:
    event = Event("added", PORT, 12.3456789)
    assert event.as_dict() == {"event": "added", "time": 12.345679, **PORT.as_dict()}
    json.dumps(event.as_dict())


def test_the_package_has_the_function_and_not_the_module() -> None:
    assert watch_function is watch


@pytest.mark.parametrize("port", ["org.nobody.has.this.0", "/dev/vport99p99"])
def test_a_port_that_does_not_come_is_a_timeout(port: str) -> None:
    with pytest.raises(HostTimeout, match=r"waited 0\.05 seconds"):
        wait_for_host(port, 0.05)
