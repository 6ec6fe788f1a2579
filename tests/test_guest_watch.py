"""guest_tools.events and inotify, on files in the place of nodes. Real ports come and go in tests/lab."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_tools import events, inotify
from guest_tools import watch as watch_function
from guest_tools.errors import HostTimeout
from guest_tools.events import Event, wait_for_host, watch
from guest_tools.inotify import OpenWatch, parse_events
from guest_tools.ports import Port, PortState

PORT = Port("/dev/vport0p1", "vport0p1", "org.test.0", 1)


# inotify


@pytest.fixture
def node(tmp_path: Path) -> str:
    (tmp_path / "node").touch()
    return str(tmp_path / "node")


@pytest.fixture
def openings() -> Iterator[OpenWatch]:
    watch = OpenWatch()
    yield watch
    watch.close()


def test_opening_and_closing_a_node_is_told(openings: OpenWatch, node: str) -> None:
    openings.add(node)
    assert openings.take() == []
    with open(node, "r+"):
        assert openings.take() == [(node, True)]
    assert openings.take() == [(node, False)]
    open(node).close()
    assert openings.take() == [(node, True), (node, False)]


def test_what_else_happens_to_a_node_is_not(openings: OpenWatch, node: str) -> None:
    openings.add(node)
    os.chmod(node, 0o600)
    os.unlink(node)
    assert openings.take() == []


def test_a_node_that_is_not_there_cannot_be_watched(openings: OpenWatch, node: str) -> None:
    with pytest.raises(FileNotFoundError):
        openings.add(node + "-none")


def test_an_end_closes_once(openings: OpenWatch) -> None:
    openings.close()
    openings.close()


RECORDS = st.tuples(st.integers(1, 9), st.sampled_from([8, 16, 32, 0x8000]), st.integers(0, 40))


@given(st.lists(RECORDS), st.binary(max_size=15))
def test_every_whole_event_is_read_and_a_cut_off_one_is_not(records: list[tuple[int, int, int]], rest: bytes) -> None:
    data = b"".join(inotify.EVENT.pack(watch, mask, 0, size) + bytes(size) for watch, mask, size in records)
    assert list(parse_events(data + rest)) == [(watch, mask) for watch, mask, _ in records]


@given(st.binary())
def test_any_bytes_are_events(data: bytes) -> None:
    assert len(list(parse_events(data))) <= len(data) // inotify.EVENT.size


# Events


@pytest.fixture
def port(node: str, monkeypatch: pytest.MonkeyPatch) -> Port:
    """The only port of this machine, with a file for its node."""
    found = PORT.replace(device=node)
    monkeypatch.setattr(events, "list_ports", lambda: [found])
    return found


def test_what_there_is_comes_first_and_then_what_happens(port: Port) -> None:
    told = watch()
    first = next(told)
    assert (first.kind, first.port) == ("present", port)
    for _ in range(2):
        with open(port.device):
            assert next(told).kind == "opened"
        assert next(told).kind == "closed"


def test_the_host_is_told_where_debugfs_knows(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    states = iter([None, False, False, True, False, None, True])
    monkeypatch.setattr(events, "TICK", 0.001)
    monkeypatch.setattr(events, "list_ports", lambda: [port.replace(state=PortState(host_connected=False))])
    monkeypatch.setattr(events, "read_state", lambda sysname: PortState(host_connected=next(states)))
    monkeypatch.setattr(events._Watcher, "_sleep", lambda watcher: None)
    told = watch()
    assert [next(told).kind for _ in range(3)] == ["present", "host_connected", "host_left"]
    with pytest.raises(RuntimeError, match="StopIteration"):  # Nothing more while the states last.
        next(told)


def test_without_inotify_the_rest_goes_on(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> OpenWatch:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(events, "OpenWatch", fail)
    assert next(watch()).kind == "present"


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
