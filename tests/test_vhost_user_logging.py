"""Dirty logging over a real socket: every page of guest memory that the device changes is in the log, and when."""

import contextlib
import os
import random

import pytest
from front_end import USER, VIRTIO_FEATURES, Daemon, Machine, Refused, open_fds

from vsport.constants import Feature
from vsport.vhost_user.frontend import PAGE, Disconnected, PageLog
from vsport.vhost_user.message import LogBase, ProtocolFeature, Request, VringAddress, encode_request, encode_u64


@pytest.fixture
def daemon(tmp_path):
    daemon = Daemon(tmp_path)
    daemon.listen()
    yield daemon
    daemon.close()


@pytest.fixture
def machine(daemon):
    machine = Machine.on(daemon, size=2 << 20, queue_size=8)
    yield machine
    machine.close()


@pytest.fixture
def log(machine):
    log = PageLog(machine.memory.end)
    yield log
    log.close()


class Watcher:
    """Compares all guest memory before and after each round of the device's loop: the device has changed the rest.

    The guest runs in the same thread, between rounds. ``missed`` are pages that changed while logging was on and were
    not marked in that very round; ``marked`` are all that were.
    """

    def __init__(self, daemon, machine):
        self.daemon, self.machine = daemon, machine
        self.log = None
        self.changed, self.missed, self.marked = set(), set(), set()
        self._run_once = daemon.loop.run_once
        daemon.loop.run_once = self.run_once

    def on(self, log):
        self.machine.front_end.start_logging(log)
        self.log = log

    def off(self):
        self.log = None
        self.machine.front_end.stop_logging()

    def run_once(self, timeout):
        before = self._pages()
        self._run_once(timeout)
        changed = {page for page, data in self._pages().items() if data != before[page]}
        self.changed |= changed
        if self.log is not None:
            marked = set(self.log.take())
            self.missed |= changed - marked
            self.marked |= marked

    def _pages(self):
        pages = {}
        for region in self.machine.memory.wire:
            data = self.machine.memory.memory.read(region.gpa, region.size)
            pages |= {region.gpa + at: data[at : at + PAGE] for at in range(0, region.size, PAGE)}
        return pages


def exchange(daemon, machine, port, host, rng, rounds=30):
    """Bytes both ways, in pieces of any size, whatever there is room for."""
    for _ in range(rounds):
        with contextlib.suppress(BlockingIOError):
            match rng.randrange(4):
                case 0:
                    port.write(rng.randbytes(rng.choice((1, 100, 5000, 40000))))
                case 1:
                    port.read(rng.choice((1, 4096)))
                case 2:
                    host.send(rng.randbytes(rng.choice((1, 100, 5000, 40000))))
                case 3:
                    host.recv(rng.choice((1, 100000)))
        daemon.step()
        machine.guest.run()


def read_on(port):
    """What there is to read; b"" also if there is nothing yet."""
    with contextlib.suppress(BlockingIOError):
        return port.read()
    return b""


def device_pages(guest):
    """The pages that a device may write to: used rings, and buffers for what it sends."""
    pages = set()
    for index, ring in guest._rings.items():
        pages.add(ring._queue.used // PAGE * PAGE)
        if index % 2 == 0:  # it receives
            buffers = (*ring._free, *ring._busy.values())
            pages |= {gpa + at for gpa in buffers for at in range(0, ring.buffer_size, PAGE)}
    return pages


@pytest.mark.parametrize("seed", range(6))
def test_every_page_that_the_device_changes_is_in_the_log(daemon, machine, log, seed):
    """R-VU-80, R-VU-81: data, control messages, used rings; also while logging goes on and off under traffic."""
    rng = random.Random(seed)
    watcher = Watcher(daemon, machine)
    port = machine.boot()
    with daemon.host_comes() as host:
        machine.run_until(lambda: port.host_connected)
        port.open()
        watcher.on(log)
        exchange(daemon, machine, port, host, rng)
        watcher.off()
        exchange(daemon, machine, port, host, rng)
        watcher.on(log)
        exchange(daemon, machine, port, host, rng)
        machine.front_end.pause()
        machine.front_end.share(machine.memory)
        machine.front_end.resume()
        exchange(daemon, machine, port, host, rng)
    machine.run_until(lambda: read_on(port) == b"" and not port.host_connected)
    assert len(watcher.marked) > 10
    assert not watcher.missed
    assert watcher.marked <= device_pages(machine.guest)


def test_nothing_is_logged_unless_it_is_asked_for(daemon, machine, log):
    """R-VU-80: a log alone is not enough, and what was switched off stays off."""
    front_end = machine.front_end
    port = machine.boot()
    front_end.post(Request.SET_LOG_BASE, LogBase(log.size, 0).encode(), [log.fd])
    front_end.reply(Request.SET_LOG_BASE)
    with daemon.host_comes():
        machine.run_until(lambda: port.host_connected)
        assert log.take() == []
        front_end.start_logging(log)
    machine.run_until(lambda: not port.host_connected)
    front_end.stop_logging()
    assert log.take()
    with daemon.host_comes():
        machine.run_until(lambda: port.host_connected)
    assert log.take() == []


def test_features_under_running_rings_may_differ_in_logging_alone(daemon, machine):
    """R-VU-11: the rings go on, and what the guest has negotiated is not touched."""
    machine.boot()
    front_end = machine.front_end
    for logging in (Feature.LOG_ALL, 0):
        front_end.tell(Request.SET_FEATURES, encode_u64(VIRTIO_FEATURES | Feature.PROTOCOL_FEATURES | logging))
        assert daemon.device.negotiated == VIRTIO_FEATURES
        assert daemon.device.queues[2].running
    changed = VIRTIO_FEATURES & ~Feature.EVENT_IDX
    with pytest.raises(Refused):
        front_end.tell(Request.SET_FEATURES, encode_u64(changed | Feature.PROTOCOL_FEATURES | Feature.LOG_ALL))


def test_a_log_is_acknowledged_though_nobody_asks_for_that(machine, log):
    """R-VU-16: also a refusal, and the connection goes on."""
    front_end = machine.front_end
    for size, result in ((log.size, 0), (log.size + 1, 1), (0, 1)):
        front_end.post(Request.SET_LOG_BASE, LogBase(size, 0).encode(), [log.fd])
        assert front_end.reply(Request.SET_LOG_BASE) == encode_u64(result)
    front_end.barrier()


@pytest.mark.parametrize(("size", "offset"), [(2**64 - 1, 2**64 - 1), (PAGE, 2**63), (2**63, 0)])
def test_a_log_that_is_not_in_its_file_is_refused(machine, log, size, offset):
    before = open_fds(settle=True)
    machine.front_end.post(Request.SET_LOG_BASE, LogBase(size, offset).encode(), [log.fd])
    assert machine.front_end.reply(Request.SET_LOG_BASE) == encode_u64(1)
    assert open_fds() == before


def test_a_log_starts_anywhere_in_its_file(daemon, machine):
    """R-VU-16: and nothing in front of it or behind it is touched."""
    port = machine.boot()
    size = PageLog(machine.memory.end)
    size.close()
    fd = os.memfd_create("log")
    os.ftruncate(fd, size.size + 0x3000)
    machine.front_end.post(Request.SET_LOG_BASE, LogBase(size.size, 0x1008).encode(), [fd])
    machine.front_end.reply(Request.SET_LOG_BASE)
    machine.front_end.tell(
        Request.SET_FEATURES, encode_u64(VIRTIO_FEATURES | Feature.PROTOCOL_FEATURES | Feature.LOG_ALL)
    )
    with daemon.host_comes():
        machine.run_until(lambda: port.host_connected)
    data = os.pread(fd, size.size + 0x3000, 0)
    os.close(fd)
    assert any(data[0x1008 : 0x1008 + size.size])
    assert not any(data[:0x1008])
    assert not any(data[0x1008 + size.size :])


def test_the_old_log_is_complete_when_the_new_one_is_acknowledged(daemon, machine, log):
    """R-VU-81: what is written before the answer is in the old one, what is written after it in the new one."""
    port = machine.boot()
    front_end = machine.front_end
    front_end.start_logging(log)
    other = PageLog(machine.memory.end)
    with daemon.host_comes() as host:
        machine.run_until(lambda: port.host_connected)
        port.open()
        assert log.take()
        host.send(b"to the old one")
        machine.run_until(lambda: daemon.device.ports[1].rx.bytes_moved)
        front_end.post(Request.SET_LOG_BASE, LogBase(other.size, 0).encode(), [other.fd])
        front_end.reply(Request.SET_LOG_BASE)
        assert log.take()
        assert other.take() == []
        host.send(b"to the new one")
        machine.run_until(lambda: daemon.device.ports[1].rx.bytes_moved == 28)
        assert log.take() == []
        assert other.take()
    other.close()


def test_a_used_ring_is_marked_where_the_front_end_says(daemon, machine, log):
    """R-VU-80: at its log address, not at its own; without data logging, too."""
    port = machine.boot()
    front_end, ring = machine.front_end, machine.front_end.rings[2]
    elsewhere = machine.memory.wire[1].gpa + 0x5000
    front_end.post(Request.SET_LOG_BASE, LogBase(log.size, 0).encode(), [log.fd])
    front_end.reply(Request.SET_LOG_BASE)
    driver = ring.driver
    address = VringAddress(2, 1, USER + driver.desc, USER + driver.used, USER + driver.avail, elsewhere)
    front_end.tell(Request.SET_VRING_ADDR, address.encode())
    assert daemon.device.queues[2].running
    with daemon.host_comes():
        machine.run_until(lambda: port.host_connected)
    marked = log.take()
    assert elsewhere in marked
    assert driver.used not in marked


def test_what_is_beyond_the_log_is_not_marked(daemon, machine):
    """R-VU-81: a log of one byte is for eight pages."""
    port = machine.boot()
    fd = os.memfd_create("log")
    os.ftruncate(fd, PAGE)
    machine.front_end.post(Request.SET_LOG_BASE, LogBase(1, 0).encode(), [fd])
    machine.front_end.reply(Request.SET_LOG_BASE)
    for ring in machine.front_end.rings.values():
        machine.front_end.tell(Request.SET_VRING_ADDR, machine.front_end.address(ring, flags=1))
    with daemon.host_comes():
        machine.run_until(lambda: port.host_connected)
    assert not any(os.pread(fd, PAGE, 0)[1:])
    os.close(fd)


def test_a_log_that_shrinks_costs_nothing_but_itself(daemon, machine):
    """R-RING-82: a file that its owner makes shorter must not kill us."""
    port = machine.boot()
    fd = os.memfd_create("log")
    os.ftruncate(fd, 1 << 16)
    machine.front_end.post(Request.SET_LOG_BASE, LogBase(1 << 16, 0).encode(), [fd])
    machine.front_end.reply(Request.SET_LOG_BASE)
    machine.front_end.tell(
        Request.SET_FEATURES, encode_u64(VIRTIO_FEATURES | Feature.PROTOCOL_FEATURES | Feature.LOG_ALL)
    )
    os.ftruncate(fd, 0)
    os.close(fd)
    with daemon.host_comes(), contextlib.suppress(Disconnected):
        machine.run_until(lambda: port.host_connected)


def test_a_log_needs_its_protocol_feature(daemon):
    """R-VU-40."""
    front_end = daemon.connect()
    front_end.negotiate(ProtocolFeature.REPLY_ACK)
    fd = os.memfd_create("log")
    os.ftruncate(fd, PAGE)
    with pytest.raises(Refused):
        front_end.tell(Request.SET_LOG_BASE, LogBase(PAGE, 0).encode(), [fd])
    os.close(fd)
    front_end.close()


def test_logs_come_and_go_with_the_session(daemon, machine, log):
    """R-VU-75: neither descriptors nor mappings stay, whichever log it was."""
    before = open_fds(settle=True)
    for _ in range(3):
        machine.front_end.start_logging(log)
    assert open_fds() == before + 2  # its descriptor, and the one that mmap() hides
    machine.close()
    assert daemon.loop.run_until(lambda: not daemon.server.connected, 10)
    with open("/proc/self/maps") as maps:
        assert maps.read().count("dirty-log") == 1  # the front end's own
    assert not any(queue.running for queue in daemon.device.queues)


# -- the log's own descriptor ------------------------------------------------------------------------------------------


def test_who_waits_for_changes_of_the_log_is_told(daemon, machine, log):
    """R-VU-17."""
    port = machine.boot()
    changed = os.eventfd(0, os.EFD_NONBLOCK)
    machine.front_end.tell(Request.SET_LOG_FD, b"", [changed])
    machine.front_end.start_logging(log)

    def told():
        with contextlib.suppress(BlockingIOError):
            return os.eventfd_read(changed)
        return 0

    machine.run_until(told)
    assert not told()
    with daemon.host_comes():
        machine.run_until(lambda: port.host_connected)
        machine.run_until(told)
    os.close(changed)


def test_a_log_descriptor_that_cannot_be_written_to_is_refused_or_harmless(daemon, machine, log):
    """R-VU-17: and is closed when another one comes."""
    port = machine.boot()
    before = open_fds(settle=True)
    read, write = os.pipe()
    machine.front_end.tell(Request.SET_LOG_FD, b"", [write])
    machine.front_end.tell(Request.SET_LOG_FD, b"", [read])
    machine.front_end.start_logging(log)
    os.close(read)
    os.close(write)
    with daemon.host_comes():
        machine.run_until(lambda: port.host_connected)
    machine.run_until(lambda: not port.host_connected)
    path = os.open("/", os.O_PATH)
    with pytest.raises(Refused):
        machine.front_end.tell(Request.SET_LOG_FD, b"", [path])
    os.close(path)
    assert open_fds() == before + 3  # the log, the one that mmap() hides, the last one to signal


def test_a_log_descriptor_has_to_be_there(machine):
    """R-VU-04."""
    machine.front_end.send(encode_request(Request.SET_LOG_FD, need_reply=True))
    with pytest.raises(Disconnected):
        machine.front_end.barrier()
