"""What host programs hear of ports: every change with its cause, every dropped byte, and never at the guest's cost."""

import contextlib
import fcntl
import json
import os

import pytest
from worlds import World, generic_port, unix_chardev, unix_client

from vsport.errors import HostError
from vsport.events import EventLog, Journal, open_events


@pytest.fixture
def world(tmp_path):
    with contextlib.closing(World([unix_chardev(1, tmp_path / "s")], [generic_port(1)])) as made:
        yield made


def events(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_change_is_told_with_its_cause(world, tmp_path):
    journal = open_events(str(tmp_path / "log"))
    EventLog(world.loop, world.device, journal)
    world.port("org.test.1").open()
    with unix_client(tmp_path / "s"):
        world.wait(lambda: world.port("org.test.1").host_connected)
    world.wait(lambda: not world.port("org.test.1").host_connected)
    journal.close()
    told = [
        (event["cause"], event["guest_connected"], event["host_connected"], event["session"])
        for event in events(tmp_path / "log")
    ]
    assert told == [
        ("guest-open", True, False, 0),
        ("host-connect", True, True, 1),
        ("host-disconnect", True, False, 1),
    ]
    assert {event["name"] for event in events(tmp_path / "log")} == {"org.test.1"}


def test_every_dropped_byte_is_told_and_drops_are_added_up(world, tmp_path):
    journal = open_events(str(tmp_path / "log"))
    log = EventLog(world.loop, world.device, journal)
    port = world.port("org.test.1")
    port.open()
    with unix_client(tmp_path / "s"):
        world.wait(lambda: port.host_connected)
        port.guest.attachment.pause()
    for _ in range(3):
        port.write(b"for nobody")
    port.guest.attachment.resume()
    world.wait(lambda: not port.host_connected)
    world.wait(lambda: world.device.ports[1].counters.bytes_discarded == 30)
    log.flush()
    journal.close()
    (drop,) = [event for event in events(tmp_path / "log") if event["event"] == "dropped"]
    assert (drop["bytes"], drop["of"], drop["port"]) == (30, "guest", 1)


def test_a_reader_that_does_not_read_costs_lines_and_hears_how_many(world, tmp_path):
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    journal = Journal(writer)
    EventLog(world.loop, world.device, journal)
    port = world.port("org.test.1")
    for _ in range(50):
        port.open()
        port.close()
    heard = os.read(reader, 65536)
    port.open()
    port.close()
    heard += os.read(reader, 65536)
    journal.close()
    os.close(reader)
    lines = [json.loads(line) for line in heard.splitlines()]
    lost = [line["lines"] for line in lines if line["event"] == "lost"]
    assert len(lost) == 1
    assert len(lines) - 1 + lost[0] == 102


def test_a_reader_that_has_gone_stops_nothing(world, tmp_path):
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    journal = Journal(writer)
    EventLog(world.loop, world.device, journal)
    os.close(reader)
    world.port("org.test.1").open()
    assert world.device.ports[1].state.guest_connected
    journal.close()


def test_a_fifo_without_a_reader_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(HostError, match="a FIFO needs its reader first"):
        open_events(str(tmp_path / "fifo"))
