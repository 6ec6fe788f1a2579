"""The simulated guest behaves as Linux does where it matters."""

import contextlib

import pytest
from worlds import World, generic_port, unix_chardev, unix_client

from vsport.errors import DeviceError
from vsport.sim import LINUX


@pytest.fixture
def world(tmp_path):
    with contextlib.closing(World([unix_chardev(1, tmp_path / "1")], [generic_port(1)])) as made:
        made.path = tmp_path / "1"
        yield made


def test_a_port_has_one_opener(world):
    """R-GUEST-04."""
    port = world.port("org.test.1")
    port.open()
    with pytest.raises(OSError, match="open already"):
        port.open()
    port.close()
    port.open()


def test_without_a_host_reading_is_the_end_and_writing_waits(world):
    """R-GUEST-06, R-GUEST-09."""
    port = world.port("org.test.1")
    port.open()
    assert port.read() == b""
    with pytest.raises(BlockingIOError, match="not connected"):
        port.write(b"x")


def test_end_of_file_is_not_sticky(world):
    """R-GUEST-07."""
    port = world.port("org.test.1")
    port.open()
    for words in (b"one", b"two"):
        with unix_client(world.path) as host:
            world.wait(lambda: port.host_connected)
            with pytest.raises(BlockingIOError, match="nothing to read"):
                port.read()
            host.sendall(words)
            assert world.read(port, 3) == words
        world.wait(lambda: not port.host_connected)
        assert port.read() == b""


def test_a_read_gives_the_rest_of_one_buffer_and_a_write_takes_32_kib(world):
    """R-GUEST-07, R-GUEST-09."""
    port = world.port("org.test.1")
    port.open()
    with unix_client(world.path) as host:
        world.wait(lambda: port.host_connected)
        assert port.write(bytes(100_000)) == LINUX.write_max
        host.sendall(b"abc" * 3000)
        assert world.read(port, 10) == b"abcabcabca"
        assert len(port.read(100_000)) == 4086


def test_closing_throws_away_what_was_not_read(world):
    """R-GUEST-05."""
    port = world.port("org.test.1")
    port.open()
    with unix_client(world.path) as host:
        world.wait(lambda: port.host_connected)
        host.sendall(b"old news")
        assert world.read(port, 3) == b"old"
        port.close()
        port.open()
        host.sendall(b"fresh")
        assert world.read(port, 5) == b"fresh"


def test_a_device_that_does_not_take_control_messages_is_found_out(world):
    """R-CON-47: Linux would spin here for ever."""
    port = world.port("org.test.1")
    for queue in world.device.queues:
        queue.stop()
    with pytest.raises(DeviceError, match="R-CON-47"):
        port.open()


def test_a_reset_guest_boots_again(world):
    for _ in range(3):
        world.port("org.test.1").open()
        world.guest.reset()
        world.guest.boot()
    assert not world.port("org.test.1").is_open
