"""In-flight descriptors over a real socket: a back end dies, the next one goes on, and no chain is lost (R-VU-85)."""

import contextlib
import os
import random
import re
import struct

import pytest
from front_end import VIRTIO_FEATURES, Bench, ConsoleDriver, DaemonProcess, FrontEnd, Refused, open_fds

from vsport._ring import DriverQueue, Inflight
from vsport.constants import Event, Feature
from vsport.control import Message
from vsport.vhost_user import frontend
from vsport.vhost_user.frontend import Disconnected, GuestMemory
from vsport.vhost_user.message import InflightArea, ProtocolFeature, Request


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path)
    yield bench
    bench.close()


@pytest.fixture
def front_end(bench):
    front_end = bench.connect(FrontEnd)
    front_end.negotiate()
    return front_end


@pytest.fixture
def memory(bench, front_end):
    memory = bench.make_memory()
    front_end.share(memory)
    return memory


@pytest.fixture
def inflight(front_end):
    inflight = front_end.get_inflight(8, 8)
    yield inflight
    inflight.close()


@pytest.fixture
def running(bench, front_end, memory, inflight):
    """A driver with port 1 open, on rings with in-flight descriptors."""
    front_end.set_inflight(inflight)
    driver = ConsoleDriver(front_end, memory)
    front_end.resume()
    driver.open_port()
    return driver


def regions(inflight, size=8):
    """(version, desc_num, used_idx, heads in flight) of each queue."""
    stride = Inflight.footprint(size)
    data = os.pread(inflight.fd, inflight.area.mmap_size, inflight.area.mmap_offset)
    for at in range(0, stride * inflight.area.num_queues, stride):
        _, version, desc_num, _, used_idx = struct.unpack_from("=QHHHH", data, at)
        yield version, desc_num, used_idx, [head for head in range(size) if data[at + 16 + 16 * head]]


def send(driver):
    """Some bytes of the guest's, until the device has given their buffer back."""
    driver.offer(driver.PORT_TX, b"bytes")
    tx = driver.front_end.rings[driver.PORT_TX].driver
    driver.front_end.until(lambda: tx.collect() is not None)


# -- what is asked for -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("queues", "size"), [(1, 1), (8, 8), (8, 32768), (2, 128)])
def test_a_region_has_room_for_every_queue(front_end, queues, size):
    """R-VU-28, R-VU-86: all zeros, so fresh; and nobody can make it shorter under us."""
    inflight = front_end.get_inflight(queues, size)
    assert inflight.area.mmap_size == queues * Inflight.footprint(size)
    assert inflight.area.mmap_offset == 0
    assert os.fstat(inflight.fd).st_size == inflight.area.mmap_size
    assert not any(os.pread(inflight.fd, 1 << 20, 0))
    with pytest.raises(PermissionError):
        os.ftruncate(inflight.fd, 0)
    inflight.close()


@pytest.mark.parametrize(("queues", "size"), [(0, 8), (9, 8), (65535, 8), (8, 0), (8, 3), (8, 65535)])
def test_a_region_for_impossible_queues_is_not_made(front_end, queues, size):
    """R-VU-28: the answer has a size of 0 and no descriptor, and the session goes on."""
    before = open_fds(settle=True)
    with pytest.raises(Refused):
        front_end.get_inflight(queues, size)
    front_end.barrier()
    assert open_fds() == before


def test_the_answer_is_as_long_as_the_question(front_end):
    """R-VU-28: the specification has no padding, QEMU has four bytes."""
    for padded in (False, True):
        asked = InflightArea(0, 0, 2, 8, padded).encode()
        assert len(asked) == (24 if padded else 20)
        assert len(front_end.ask(Request.GET_INFLIGHT_FD, asked)) == len(asked)


@pytest.mark.parametrize(
    "change",
    [
        {"num_queues": 9},
        {"num_queues": 0},
        {"queue_size": 3},
        {"queue_size": 16},
        {"mmap_size": 2**64 - 1},
        {"mmap_size": 0},
        {"mmap_offset": 4},
        {"mmap_offset": 8},
        {"mmap_offset": 2**64 - 8},
    ],
    ids=str,
)
def test_a_region_that_does_not_fit_is_refused(front_end, inflight, change):
    """R-VU-29, R-VU-86: and no descriptor stays."""
    before = open_fds(settle=True)
    area = inflight.area
    values = {"mmap_size": area.mmap_size, "mmap_offset": 0, "num_queues": 8, "queue_size": 8} | change
    with pytest.raises(Refused):
        front_end.tell(Request.SET_INFLIGHT_FD, InflightArea(**values).encode(), [inflight.fd])
    assert open_fds() == before


def test_a_region_starts_anywhere_in_its_file(bench, front_end, memory):
    """R-VU-29: as long as its numbers are aligned."""
    fd = os.memfd_create("inflight")
    os.ftruncate(fd, 0x3000)
    with pytest.raises(Refused):
        front_end.set_inflight(frontend.Inflight(InflightArea(0x1000, 0x123C, 8, 8), fd))
    inflight = frontend.Inflight(InflightArea(0x1000, 0x1238, 8, 8), fd)
    front_end.set_inflight(inflight)
    ConsoleDriver(front_end, memory)
    front_end.resume()
    front_end.until(lambda: bench.device.driver_ready)
    assert not any(os.pread(fd, 0x1238, 0))
    assert [version for version, *_ in regions(inflight)] == [1] * 6 + [0] * 2
    inflight.close()


def test_a_region_needs_its_protocol_feature(bench):
    """R-VU-40."""
    front_end = bench.connect(FrontEnd)
    front_end.negotiate(ProtocolFeature.REPLY_ACK)
    with pytest.raises(Disconnected):
        front_end.ask(Request.GET_INFLIGHT_FD, InflightArea(0, 0, 8, 8).encode())


def test_running_rings_keep_their_region(front_end, inflight, running):
    with pytest.raises(Refused):
        front_end.set_inflight(inflight)
    front_end.pause()
    front_end.set_inflight(inflight)
    front_end.resume()


def test_a_ring_may_be_shorter_than_its_region_and_not_longer(bench, front_end, memory):
    """R-VU-86: front ends ask for one size, and the guest chooses another."""
    inflight = front_end.get_inflight(8, 16)
    front_end.set_inflight(inflight)
    front_end.start(front_end.make_ring(3, memory, 0, 8))
    assert bench.device.queues[3].running
    with pytest.raises(Refused):
        front_end.start(front_end.make_ring(5, memory, 0x10000, 32))
    assert not bench.device.queues[5].running
    inflight.close()


def test_regions_come_and_go_with_the_session(bench, front_end, inflight, running):
    """R-VU-75."""
    bench.disconnect(front_end)
    with open("/proc/self/maps") as maps:
        assert "vsport-inflight" not in maps.read()
    assert all(queue.inflight is None for queue in bench.device.queues)


# -- what is kept in it ------------------------------------------------------------------------------------------------


def test_queues_keep_account_of_what_they_used(front_end, inflight, running):
    """R-VU-85, R-VU-87."""
    send(running)
    queues = list(regions(inflight))
    assert queues[running.PORT_TX] == (1, 8, 1, [])
    assert queues[7] == (0, 0, 0, [])


def test_a_pause_changes_nothing(bench, front_end, inflight, running):
    """R-VU-71: the region and the rings agree, so they go on."""
    for _ in range(3):
        front_end.pause()
        front_end.resume()
        send(running)
    assert bench.device.ports[1].state.guest_connected


def test_a_guest_that_begins_anew_has_nothing_in_flight(bench, front_end, inflight, running):
    """R-VU-71: what the region says is about rings that are no more."""
    for _ in range(3):
        front_end.pause()
        running.lay_out()
        front_end.resume()
        running.open_port()
    assert list(regions(inflight))[running.CONTROL_TX][2] == 3  # DEVICE_READY, PORT_READY, PORT_OPEN


def test_a_reset_forgets_what_was_in_flight(front_end, inflight, running):
    """R-VU-30."""
    front_end.tell(Request.RESET_DEVICE)
    assert all(version == 0 for version, *_ in regions(inflight))
    running.lay_out()
    front_end.resume()
    running.open_port()


@pytest.mark.parametrize("seed", range(20))
def test_a_region_full_of_nonsense_stops_a_ring_at_most(bench, front_end, memory, seed):
    """R-VU-88: refused, or harmless, and another front end finds everything as ever."""
    rng = random.Random(seed)
    inflight = front_end.get_inflight(8, 8)
    data = bytearray(rng.randbytes(inflight.area.mmap_size))
    if seed % 2:  # of the right kind, and then wrong
        for at in range(0, len(data), Inflight.footprint(8)):
            data[at : at + 16] = struct.pack("=QHHHH", 0, 1, 8, rng.randrange(9), rng.choice((0, 1, 8, 0xFFFF)))
            for head in range(8):
                data[at + 16 + 16 * head] = rng.choice((0, 0, 1))
    os.pwrite(inflight.fd, data, 0)
    front_end.set_inflight(inflight)
    driver = ConsoleDriver(front_end, memory)
    for ring in front_end.rings.values():
        with contextlib.suppress(Refused):
            front_end.start(ring)
    driver.offer(driver.CONTROL_TX, Message(1, Event.PORT_OPEN, 0).encode())
    front_end.barrier()
    inflight.close()
    bench.disconnect(front_end)
    bench.connect(FrontEnd).barrier()


def test_a_region_that_shrinks_ends_the_session_and_not_the_daemon(bench, front_end, memory):
    """R-RING-82: its owner may be the front end, which can do that."""
    fd = os.memfd_create("inflight")
    os.ftruncate(fd, 8 * Inflight.footprint(8))
    inflight = frontend.Inflight(InflightArea(8 * Inflight.footprint(8), 0, 8, 8), fd)
    front_end.set_inflight(inflight)
    driver = ConsoleDriver(front_end, memory)
    front_end.resume()
    driver.open_port()
    os.ftruncate(fd, 0)
    driver.offer(driver.PORT_TX, b"bytes")
    front_end.until(lambda: not bench.server.connected)
    inflight.close()
    bench.connect(FrontEnd).barrier()


def test_a_region_that_shrinks_before_a_reset_does_no_harm(bench, front_end, memory):
    fd = os.memfd_create("inflight")
    os.ftruncate(fd, 8 * Inflight.footprint(8))
    inflight = frontend.Inflight(InflightArea(8 * Inflight.footprint(8), 0, 8, 8), fd)
    front_end.set_inflight(inflight)
    os.ftruncate(fd, 0)
    front_end.tell(Request.RESET_DEVICE)
    inflight.close()


# -- a back end dies ---------------------------------------------------------------------------------------------------


class Crashing:
    """A back end in a process of its own that is killed, and a driver that goes on with the next one."""

    SIZE = 16
    BUFFER = 0x2000

    def __init__(self, directory):
        self.path, self.output = str(directory / "vu.sock"), directory / "output"
        self.memory = GuestMemory(((0, 1 << 20),))
        self.tx = DriverQueue(self.memory.memory, 0, self.SIZE, event_idx=True)
        self.rx = DriverQueue(self.memory.memory, 0x8000, self.SIZE, event_idx=True)
        self.inflight = None
        self.offered = 0
        self.under_way = {}
        self.given_back = []
        self.begin()

    def begin(self):
        self.daemon = DaemonProcess(self.path, f"file,id=c0,append=on,path={self.output}", "virtconsole,chardev=c0")
        self.front_end = frontend.FrontEnd.connect(self.path)
        self.front_end.negotiate(features=int(VIRTIO_FEATURES & ~Feature.MULTIPORT))
        self.front_end.share(self.memory)
        if self.inflight is None:
            self.inflight = self.front_end.get_inflight(2, self.SIZE)
        self.front_end.set_inflight(self.inflight)
        for index, driver in ((0, self.rx), (1, self.tx)):
            used = int.from_bytes(self.memory.memory.read(driver.used + 2, 2), "little")
            self.front_end.add_ring(index, driver, used)  # nobody has said a base: QEMU takes this then
        self.front_end.resume()

    def offer(self):
        """Fills the ring with records that are numbered, and takes back what was used."""
        while (used := self.tx.collect()) is not None:
            self.given_back.append(self.under_way.pop(used[0]))
        while self.tx.free:
            slot = next(slot for slot in range(self.SIZE) if slot not in {at for at, _ in self.under_way.values()})
            record = b"<%d:%s>" % (self.offered, b"x" * (self.offered * 37 % 3000))
            gpa = 0x10000 + slot * self.BUFFER
            self.memory.memory.write(gpa, record)
            self.under_way[self.tx.add(readable=[(gpa, len(record))])] = slot, self.offered
            self.offered += 1
        if self.tx.publish():
            self.front_end.rings[1].kick()

    def crash(self):
        self.daemon.kill()
        self.front_end.close()

    def records(self):
        """The numbers of the records that reached the host whole, in order, and how many bytes are left over."""
        data = self.output.read_bytes()
        whole = re.findall(rb"<(\d+):x*>", data)
        return [int(number) for number in whole], len(re.sub(rb"<\d+:x*>", b"", data))

    def close(self):
        self.crash()
        self.inflight.close()
        self.memory.close()


@pytest.fixture
def crashing(tmp_path):
    crashing = Crashing(tmp_path)
    yield crashing
    crashing.close()


def test_no_chain_is_lost_when_the_back_end_is_killed(crashing):
    """R-VU-88, R-VU-89: every chain comes back once; what it held has reached the host, some of it twice."""
    rng = random.Random(0)
    for _ in range(8):
        target = len(crashing.given_back) + rng.randrange(200)
        while len(crashing.given_back) < target:
            crashing.offer()
        crashing.crash()
        crashing.begin()
    last = crashing.offered
    while len(crashing.given_back) < last:
        crashing.offer()
    assert [number for _, number in crashing.given_back[:last]] == list(range(last))
    arrived, left_over = crashing.records()
    assert set(range(last)) <= set(arrived)
    assert len(arrived) - len(set(arrived)) <= 8 * crashing.SIZE
    assert left_over <= 8 * 3010
