"""A server gives its front end to another one: the guest and the front end notice nothing, whenever it happens."""

import contextlib
import json
import logging
import os
import random
import socket
from copy import deepcopy

import pytest
from front_end import (
    LAYOUT_FEATURES,
    LAYOUTS,
    USER,
    VIRTIO_FEATURES,
    ConsoleDriver,
    Disconnected,
    FrontEnd,
    GuestMemory,
    Qemu,
    Uml,
    open_fds,
)

from vsport.connection import Cause
from vsport.constants import Event, Feature
from vsport.control import Message
from vsport.device import SerialDevice
from vsport.document import DocumentError, Fields
from vsport.errors import FrontEndError, HostError
from vsport.loop import Loop
from vsport.parcel import Delivery, Parcel
from vsport.port import BackEnd, PortConfig
from vsport.snapshot import Snapshot
from vsport.vhost_user import channel as channel_module
from vsport.vhost_user.frontend import PageLog
from vsport.vhost_user.message import (
    BackEndRequest,
    DeviceState,
    Direction,
    InflightArea,
    MemoryTable,
    Request,
    VringState,
    encode_reply,
    encode_request,
    encode_u64,
)
from vsport.vhost_user.server import Server


class HostProgram(BackEnd):
    """The host's end of a port: takes what the guest sends as far as it has room, and gives what it was told to."""

    def __init__(self, port):
        self.port = port
        self.room = 1 << 30
        self.received = bytearray()
        self.to_send = b""

    def tx_ready(self):
        with self.port.blaming(self.port.tx):
            self.port.tx.drain_into(self._take)
            self.port.tx.kicks_on()
            self.port.notify(self.port.tx)

    def _take(self, view):
        size = min(len(view), self.room)
        self.received += view[:size]
        self.room -= size
        return size

    def rx_ready(self):
        with self.port.blaming(self.port.rx):
            self.to_send = self.to_send[self.port.rx.fill_from(self.to_send) :]
            self.port.rx.kicks_on()
            self.port.notify(self.port.rx)


class Side:
    """A process, so to say: a loop, a device whose port 1 has a host, a server."""

    def __init__(self, layout):
        self.loop = Loop()
        self.device = SerialDevice(max_ports=3, **layout)
        self.device.on_backlog = lambda index: self.loop.call_soon(lambda: self.device.kick(index))
        self.port = self.device.add_port(PortConfig(1, "org.test.0"))
        self.host = HostProgram(self.port)
        self.device.attach(self.port, self.host)
        self.server = Server(self.device, self.loop)

    def close(self):
        self.server.close()
        self.loop.close()


class World:
    """Two sides, one after the other the one that has the device; both loops run, and only one has anything to do."""

    def __init__(self, directory, layout):
        self.path = str(directory / "vu.sock")
        self.layout = layout
        self.sides = [Side(layout), Side(layout)]
        self.side.port.feed(Cause.HOST_CONNECT)
        self.front_ends = []
        self.memory = GuestMemory()

    @property
    def side(self):
        return self.sides[0]

    @property
    def device(self):
        return self.side.device

    @property
    def host(self):
        return self.side.host

    @property
    def session(self):
        return self.side.server._connection.session

    def step(self):
        self.sides[1].loop.run_once(0)
        self.side.loop.run_once(0.01)

    def connect(self, kind=FrontEnd):
        self.front_ends.append(kind.connect(self.path, self.step))
        return self.front_ends[-1]

    def give(self):
        """Suspends, and describes: a document as another process would read it, with descriptors of its own."""
        self.side.server.suspend()
        parcel = Parcel()
        document = json.loads(json.dumps(self.side.server.give(parcel)))
        return document, Delivery([os.dup(fd) for fd in parcel.fds])

    def take(self, document, delivery):
        giver, taker = self.sides
        snapshot = Snapshot.decode(giver.device.snapshot().encode())
        taker.host.received, taker.host.room, taker.host.to_send = (
            giver.host.received,
            giver.host.room,
            giver.host.to_send,
        )
        taker.device.restore(snapshot, carried={1})
        try:
            taker.server.take(Fields("server", document), delivery)
        finally:
            delivery.close()

    def hand_over(self):
        """All of it; ``side`` is the other one then, and the one before begins a new life."""
        self.take(*self.give())
        giver, taker = self.sides
        giver.server.release()
        giver.loop.run_once(0)
        giver.close()
        self.sides = [taker, Side(self.layout)]
        taker.server.resume()

    def close(self):
        for front_end in self.front_ends:
            front_end.close()
        for side in self.sides:
            side.close()
        self.memory.close()


layouts = pytest.mark.parametrize("world", LAYOUTS.values(), ids=LAYOUTS, indirect=True)


@pytest.fixture
def world(tmp_path, request):
    world = World(tmp_path, getattr(request, "param", {}))
    world.side.server.listen(world.path)
    yield world
    world.close()


@pytest.fixture
def running(world):
    """A driver whose rings are live, and whose port 1 is open, with a host."""
    front_end = world.connect()
    front_end.negotiate(features=VIRTIO_FEATURES | Feature(world.device.features & LAYOUT_FEATURES))
    front_end.share(world.memory)
    driver = ConsoleDriver(front_end, world.memory)
    front_end.resume()
    open_port(world, driver)
    return driver


def open_port(world, driver):
    """The whole conversation, until a program in the guest has port 1 open, whose host is there."""
    driver.wait_for(Event.PORT_ADD)
    driver.say(Message(1, Event.PORT_READY, 1))
    driver.wait_for(Event.PORT_NAME, Event.PORT_OPEN)
    driver.say(Message(1, Event.PORT_OPEN, 1))
    driver.front_end.until(lambda: world.device.ports[1].state.guest_connected)


class Sender:
    """The guest's program: numbered lines, as fast as its ring takes them; and a reader of what the host sends."""

    def __init__(self, driver):
        self.driver = driver
        self.tx = driver.front_end.rings[driver.PORT_TX]
        self.rx = driver.front_end.rings[driver.PORT_RX]
        self.sent = bytearray()
        self.read = bytearray()
        self._busy = {}
        self._buffers = {}
        for slot in range(8):
            self._post(0x40000 + 0x1000 * slot)

    def send(self):
        """Fills the ring."""
        while (used := self.tx.driver.collect()) is not None:
            del self._busy[used[0]]
        while self.tx.driver.free >= 2:
            slot = next(slot for slot in range(8) if slot not in self._busy.values())
            data = b"%d " % len(self.sent) * (1 + len(self.sent) % 300)
            gpa = 0x50000 + 0x1000 * slot
            self.driver.memory.memory.write(gpa, data)
            cut = len(data) // 3
            pieces = [(gpa, cut), (gpa + cut, len(data) - cut)] if cut else [(gpa, len(data))]
            self._busy[self.tx.driver.add(readable=pieces)] = slot
            self.sent += data
        if self.tx.driver.publish():
            self.tx.kick()

    def receive(self):
        """Empties the ring, and offers the buffers again."""
        while (used := self.rx.driver.collect()) is not None:
            gpa = self._buffers.pop(used[0])
            self.read += self.driver.memory.memory.read(gpa, used[1])
            self._post(gpa)

    def _post(self, gpa):
        self._buffers[self.rx.driver.add(writable=[(gpa, 0x1000)])] = gpa
        if self.rx.driver.publish():
            self.rx.kick()


def vring(index, num=0):
    return VringState(index, num).encode()


# -- sockets -----------------------------------------------------------------------------------------------------------


def test_a_listener_goes_over_with_its_socket_file(world):
    """The file stays when the giver ends, and goes when the taker does."""
    world.hand_over()
    assert os.path.exists(world.path)
    world.connect().barrier()
    world.hand_over()
    world.front_ends[0].barrier()
    world.side.server.close()
    assert not os.path.exists(world.path)


@pytest.mark.parametrize("kind", ["listening", "connected"])
def test_inherited_sockets_go_over(tmp_path, kind):
    """R-VU-103: a listener's file is not ours; after a connection nobody can come."""
    world = World(tmp_path, {})
    with socket.socket(socket.AF_UNIX) as listener:
        if kind == "listening":
            listener.bind(world.path)
            listener.listen()
            world.side.server.adopt(os.dup(listener.fileno()))
            front_end = world.connect()
        else:
            ours, theirs = socket.socketpair()
            world.side.server.adopt(theirs.detach())
            front_end = FrontEnd(ours, world.step)
            world.front_ends.append(front_end)
        front_end.barrier()
        for _ in range(3):
            world.hand_over()
            front_end.barrier()
            assert world.side.server.listening is (kind == "listening")
            assert world.side.server.connected
        world.close()
        assert os.path.exists(world.path) is (kind == "listening")


def test_who_knocks_meanwhile_is_let_in_by_the_other_side(world):
    document, delivery = world.give()
    front_end = world.connect()
    front_end.post(Request.GET_FEATURES)
    world.step()
    assert not world.side.server.connected
    world.take(document, delivery)
    world.sides[0].server.release()
    world.sides.reverse()
    world.side.server.resume()
    front_end.reply(Request.GET_FEATURES)


def test_who_leaves_meanwhile_is_missed_by_the_other_side(world, running):
    document, delivery = world.give()
    world.front_ends.pop().close()
    world.step()
    world.take(document, delivery)
    world.sides[0].server.release()
    world.sides.reverse()
    world.side.server.resume()
    assert world.side.loop.run_until(lambda: not world.side.server.connected, 10)
    assert not world.device.ports[1].state.guest_connected
    world.connect().barrier()


def test_hooks_are_called_for_what_happens_here(world, running):
    """A taker is not told of a front end that was there before; it is told when that leaves."""
    heard = []
    taker = world.sides[1].server
    taker.on_connected = lambda: heard.append("came")
    taker.on_disconnected = lambda: heard.append("left")
    world.side.server.on_disconnected = lambda: heard.append("wrong")
    world.hand_over()
    assert heard == []
    world.front_ends.pop().close()
    assert world.side.loop.run_until(lambda: heard, 10)
    assert heard == ["left"]


# -- rings -------------------------------------------------------------------------------------------------------------


@layouts
@pytest.mark.parametrize("seed", range(8))
def test_no_byte_is_lost_or_doubled_under_traffic(world, running, seed):
    """R-VU-20, R-VU-53, R-VU-89: chains half consumed by a slow host, kicks on their way, full and empty rings."""
    rng = random.Random(seed)
    sender, to_guest = Sender(running), bytearray()
    for _ in range(60):
        match rng.randrange(6):
            case 0:
                world.hand_over()
            case 1:
                world.host.room = rng.choice((0, 1, 100, 2000, 1 << 30))
                world.host.tx_ready()
            case 2:
                data = rng.randbytes(rng.choice((1, 5000, 60000)))
                to_guest += data
                world.host.to_send += data
                world.host.rx_ready()
            case 3:
                sender.receive()
            case _:
                sender.send()
        world.step()
    world.host.room = 1 << 30
    world.host.tx_ready()
    running.front_end.until(lambda: sender.receive() or len(sender.read) == len(to_guest))
    running.front_end.until(lambda: len(world.host.received) == len(sender.sent))
    assert world.host.received == sender.sent
    assert sender.read == to_guest
    assert world.device.ports[1].state.guest_connected
    assert running.hear() == []


@layouts
def test_a_half_consumed_chain_goes_on_where_it_was(world, running):
    world.host.room = 5
    running.offer(running.PORT_TX, b"hello world")
    running.front_end.until(lambda: world.host.received == b"hello")
    world.hand_over()
    assert world.device.ports[1].tx.offset == 5
    world.host.room = 100
    world.host.tx_ready()
    assert world.host.received == b"hello world"
    assert running.front_end.rings[running.PORT_TX].driver.collect() is not None


def test_kicks_of_a_suspended_device_are_not_lost(world, running):
    document, delivery = world.give()
    running.offer(running.PORT_TX, b"in between")
    world.step()
    assert not world.host.received
    world.take(document, delivery)
    world.sides[0].server.release()
    world.sides.reverse()
    world.side.server.resume()
    running.front_end.until(lambda: world.host.received == b"in between")


def test_a_suspended_device_does_nothing(world, running):
    """R-VU-54: memory is as it was, nobody is called, nothing is asked; the giver's loop may run all the same."""
    front_end = running.front_end
    front_end.open_channel()
    front_end.set_fd(Request.SET_VRING_KICK, 5, -1)
    front_end.start_logging(log := PageLog(running.memory.end))
    document, delivery = world.give()
    for ring in front_end.rings.values():
        ring.called()
    log.take()
    front_end.post(Request.GET_FEATURES)
    running.offer(running.PORT_TX, b"in between")
    before = running.memory.memory.read(0, running.memory.end)
    world.device.on_config_change()
    world.take(document, delivery)
    for _ in range(5):
        world.step()
    assert running.memory.memory.read(0, running.memory.end) == before
    assert not any(ring.called() for ring in front_end.rings.values())
    assert front_end.take_request() is None
    assert log.take() == []
    with pytest.raises(BlockingIOError):
        front_end.sock.recv(1)
    world.sides[1].server.release()
    world.side.server.resume()
    front_end.reply(Request.GET_FEATURES)
    front_end.until(lambda: world.host.received == b"in between")
    front_end.until(lambda: front_end.take_request() == BackEndRequest.CONFIG_CHANGE)
    log.close()


@pytest.mark.parametrize("after", ["suspend", "give", "take", "failed take"])
def test_a_giver_that_keeps_it_goes_on_as_if_nothing_had_been(world, running, after):
    sender = Sender(running)
    world.host.room = 700
    for _ in range(3):
        sender.send()
        world.step()
        if after == "suspend":
            world.side.server.suspend()
            world.side.server.suspend()
        else:
            document, delivery = world.give()
            if after == "failed take":
                document["front_end"][0]["session"]["status"] = "none"
                with pytest.raises(DocumentError):
                    world.take(document, delivery)
            elif after == "take":
                world.take(document, delivery)
                world.sides[1].server.release()
            delivery.close()
        world.side.server.resume()
        world.side.server.resume()
        world.host.room += 700
        world.host.tx_ready()
    world.host.room = 1 << 20
    world.host.tx_ready()
    running.front_end.until(lambda: world.host.received == sender.sent)
    assert world.device.ports[1].state.guest_connected
    assert running.hear() == []


def test_rings_in_every_condition_go_over(world, running):
    """Disabled, never set up, stopped, polled, without call descriptor, broken."""
    front_end = running.front_end
    front_end.enable(0, False)
    base = front_end.get_base(1)
    front_end.enable(7, True)
    front_end.set_fd(Request.SET_VRING_KICK, running.PORT_RX, -1)
    front_end.set_fd(Request.SET_VRING_CALL, running.CONTROL_TX, -1)
    running.memory.memory.write(front_end.rings[running.PORT_TX].driver.avail + 2, b"\xff\x7f")
    front_end.rings[running.PORT_TX].kick()
    front_end.until(lambda: not world.device.queues[running.PORT_TX].running)
    world.hand_over()
    assert [queue.running for queue in world.device.queues] == [False, False, True, True, True, False, False, False]
    assert front_end.ask_u64(Request.GET_STATUS) == 0x40  # R-RING-63
    assert front_end.get_base(1) == base
    front_end.enable(0, True)
    assert world.device.queues[0].running
    running.say(Message(1, Event.PORT_OPEN, 0))
    front_end.until(lambda: not world.device.ports[1].state.guest_connected)
    front_end.share(running.memory)
    assert not world.device.queues[running.PORT_TX].running
    world.hand_over()
    assert front_end.rings[running.PORT_TX].failed() == 1


def test_error_and_call_descriptors_go_over(world, running):
    world.hand_over()
    front_end, ring = running.front_end, running.front_end.rings[running.PORT_TX]
    ring.called()
    running.offer(running.PORT_TX, b"hello")
    front_end.until(ring.called)
    running.memory.memory.write(ring.driver.avail + 2, b"\xff\x7f")
    ring.kick()
    front_end.until(lambda: ring.failed() == 1)


def test_a_paused_machine_goes_on_where_it_was(world):
    """R-VU-70, R-VU-71: also if it was handed over during the pause, and a reboot is still told from a pause."""
    front_end = world.connect(Qemu)
    front_end.attach(num_vqs=8)
    front_end.features = VIRTIO_FEATURES
    driver = ConsoleDriver(front_end, world.memory)
    front_end.resume(world.memory)
    open_port(world, driver)
    front_end.pause()
    world.hand_over()
    driver.offer(driver.PORT_TX, b"while it is paused")
    front_end.resume(world.memory)
    front_end.until(lambda: world.host.received == b"while it is paused")
    front_end.pause()
    world.hand_over()
    driver.lay_out()
    front_end.resume(world.memory)
    assert not world.device.ports[1].state.guest_connected
    driver.wait_for(Event.PORT_ADD)


def test_user_mode_linux_goes_over(world):
    """R-VU-44, R-VU-72: a lost connection would be the end of its device, so this is its only way to a new daemon."""
    memory = GuestMemory(((0x60C3_4000, 1 << 20),), offset=0x60C3_4000 & 0xFFFFF, user=0)
    front_end = world.connect(Uml)
    front_end.attach()
    front_end.features = VIRTIO_FEATURES
    driver = ConsoleDriver(front_end, memory)
    front_end.bind(memory)
    world.hand_over()
    driver.wait_for(Event.PORT_ADD)
    front_end.unbind()
    world.hand_over()
    driver.lay_out()
    front_end.bind(memory)
    driver.wait_for(Event.PORT_ADD)
    memory.close()


# -- messages ----------------------------------------------------------------------------------------------------------


def test_a_message_may_be_cut_anywhere(world):
    """Its header, its payload, its descriptors: R-VU-03."""
    front_end = world.connect()
    front_end.barrier()
    data = encode_request(Request.SET_MEM_TABLE, MemoryTable(tuple(world.memory.wire)).encode(), need_reply=True)
    for cut in range(len(data)):
        front_end.send(data[:cut], [world.memory.fd] if cut else [])
        world.step()
        world.step()
        world.hand_over()
        front_end.send(data[cut:], [] if cut else [world.memory.fd])
        assert front_end.reply(Request.SET_MEM_TABLE) == encode_u64(0)
    front_end.negotiate()
    front_end.start(front_end.make_ring(3, world.memory, 0))
    assert world.device.queues[3].running


def test_what_is_not_read_yet_is_answered_by_the_other_side(world):
    front_end = world.connect()
    front_end.send(encode_request(Request.GET_FEATURES) * 10)
    for _ in range(10):
        world.hand_over()
    for _ in range(10):
        front_end.reply(Request.GET_FEATURES)


def test_a_reply_that_is_not_out_yet_goes_over(world):
    """And so does the descriptor that has to go with it."""
    front_end = world.connect()
    front_end.negotiate()
    area = InflightArea(0, 0, 1, 1)
    asked = 0
    while not world.side.server._connection._unsent.data:
        front_end.send(encode_request(Request.GET_INFLIGHT_FD, area.encode()))
        asked += 1
        world.step()
    assert world.side.server._connection._unsent.fd >= 0
    world.hand_over()
    world.hand_over()
    for _ in range(asked):
        payload, fds = front_end._reply_with_fds(Request.GET_INFLIGHT_FD)
        assert InflightArea.decode(payload).mmap_size
        assert len(fds) == 1
        os.close(fds[0])
    front_end.barrier()


def test_features_and_memory_go_over(world, running):
    front_end = running.front_end
    front_end.tell(Request.SET_STATUS, encode_u64(7))
    world.hand_over()
    assert world.device.negotiated == VIRTIO_FEATURES
    assert world.session.protocol_features == front_end.protocol_features
    assert front_end.ask_u64(Request.GET_STATUS) == 7
    front_end.remove_region(running.memory.wire[0])
    assert not any(queue.running for queue in world.device.queues)


# -- the back-end channel ----------------------------------------------------------------------------------------------


def test_a_question_goes_over_with_half_an_answer(world, running):
    """R-VU-97: and what changed meanwhile is told when the answer is complete."""
    answer = encode_reply(BackEndRequest.CONFIG_CHANGE, encode_u64(0))
    front_end = running.front_end
    front_end.open_channel()
    for _ in range(2):
        world.device.on_config_change()
    assert front_end.channel.recv(12)
    front_end.channel.send(answer[:7])
    world.step()
    world.hand_over()
    with pytest.raises(BlockingIOError):
        front_end.channel.recv(12)
    front_end.channel.send(answer[7:])
    front_end.until(lambda: front_end.take_request() == BackEndRequest.CONFIG_CHANGE)
    front_end.channel.close()


def test_an_answer_that_does_not_come_is_not_waited_for_forever(world, running, monkeypatch):
    """R-VU-97: time begins anew after the handover, but it does begin."""
    front_end = running.front_end
    front_end.open_channel()
    for _ in range(2):
        world.device.on_config_change()
    assert front_end.channel.recv(12)
    monkeypatch.setattr(channel_module, "REPLY_SECONDS", 0.01)
    world.hand_over()
    front_end.until(lambda: front_end.take_request() == BackEndRequest.CONFIG_CHANGE)


def test_a_channel_that_is_closed_stays_closed(world, running):
    front_end = running.front_end
    front_end.open_channel()
    front_end.channel.close()
    world.device.on_config_change()
    world.step()
    world.hand_over()
    front_end.open_channel()
    world.device.on_config_change()
    assert front_end.take_request() == BackEndRequest.CONFIG_CHANGE


# -- dirty log, in-flight descriptors, state ---------------------------------------------------------------------------


def test_a_dirty_log_goes_over(world, running):
    """R-VU-80: switched on, it stays on; its descriptor is signalled by the other side."""
    front_end, log, changed = running.front_end, PageLog(running.memory.end), os.eventfd(0, os.EFD_NONBLOCK)
    front_end.start_logging(log)
    front_end.tell(Request.SET_LOG_FD, b"", [changed])
    world.hand_over()
    log.take()
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(changed)
    running.offer(running.PORT_TX, b"hello")
    front_end.until(lambda: world.host.received == b"hello")
    assert front_end.rings[running.PORT_TX].driver.used // 4096 * 4096 in log.take()

    def told():
        with contextlib.suppress(BlockingIOError):
            return os.eventfd_read(changed)

    front_end.until(told)
    front_end.stop_logging()
    log.take()
    running.offer(running.PORT_TX, b" world")
    front_end.until(lambda: world.host.received == b"hello world")
    assert log.take() == []
    os.close(changed)
    log.close()


def test_in_flight_descriptors_go_over(world):
    """R-VU-85: with a chain half consumed, which is in flight, and goes on at its offset."""
    front_end = world.connect()
    front_end.negotiate()
    front_end.share(world.memory)
    inflight = front_end.get_inflight(8, 8)
    front_end.set_inflight(inflight)
    driver = ConsoleDriver(front_end, world.memory)
    front_end.resume()
    open_port(world, driver)
    for round in range(3):
        world.host.room = 5
        driver.offer(driver.PORT_TX, b"hello world")
        front_end.until(lambda: world.host.room == 0)
        world.hand_over()
        world.host.room = 100
        world.host.tx_ready()
        assert world.host.received == b"hello world" * (round + 1)
    assert world.session.inflight is not None
    inflight.close()


def test_how_a_transfer_went_goes_over(world):
    """R-VU-38."""
    front_end = world.connect()
    front_end.negotiate()
    assert front_end.ask_u64(Request.CHECK_DEVICE_STATE) == 1
    world.hand_over()
    assert front_end.ask_u64(Request.CHECK_DEVICE_STATE) == 1
    front_end.save()
    world.hand_over()
    assert front_end.ask_u64(Request.CHECK_DEVICE_STATE) == 0


def test_a_device_whose_state_is_on_its_way_is_not_given(world):
    """R-VU-91: it is refused, goes on, and can be given when that is done."""
    front_end = world.connect()
    front_end.negotiate()
    ours, theirs = os.pipe()
    payload = DeviceState(Direction.LOAD, 0).encode()
    assert front_end.ask_u64(Request.SET_DEVICE_STATE_FD, payload, [ours]) == 0x100
    with pytest.raises(HostError, match="try again"):
        world.give()
    world.side.server.resume()
    os.close(ours)
    os.close(theirs)
    assert front_end.ask_u64(Request.CHECK_DEVICE_STATE) == 1
    world.hand_over()
    front_end.barrier()


# -- what is not as it should be ---------------------------------------------------------------------------------------


def full_document(world, running):
    """A session that has everything, in the middle of everything, suspended and described."""
    front_end = running.front_end
    front_end.open_channel()
    front_end.pause()
    inflight = front_end.get_inflight(8, 8)
    front_end.set_inflight(inflight)
    inflight.close()
    front_end.resume()
    log = PageLog(running.memory.end)
    front_end.start_logging(log)
    front_end.tell(Request.SET_LOG_FD, b"", [front_end.rings[2].call_fd])
    log.close()
    data = encode_request(Request.SET_MEM_TABLE, MemoryTable(tuple(running.memory.wire)).encode())
    front_end.send(data[:20], [running.memory.fd])
    world.step()
    world.step()
    return world.give()


def places(value, path=()):
    """Where in a document something stands: the keys that lead to each value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def spoil(rng, document):
    """Changes, removes or adds one thing somewhere in the document."""
    changed = deepcopy(document)
    path = rng.choice([path for path in places(document) if path])
    at = changed
    for key in path[:-1]:
        at = at[key]
    values = (None, -1, 0, 1, 7, 2**16, 2**32, 2**63, 2**64, True, False, "", "00", "zz", [], {}, [{}], 1.5)
    match rng.randrange(6):
        case 0 if isinstance(at, dict):
            del at[path[-1]]
        case 1 if isinstance(at[path[-1]], dict):
            at[path[-1]]["unknown"] = 1
        case 2 if isinstance(at[path[-1]], list) and at[path[-1]]:
            at[path[-1]].append(deepcopy(at[path[-1]][0]))
        case _:
            at[path[-1]] = rng.choice(values)
    return changed


def twist(rng, document):
    """Changes some numbers and bits, to others of their kind: much of it makes sense to who reads it."""
    changed = deepcopy(document)
    for _ in range(rng.randrange(1, 4)):
        path = rng.choice([path for path in places(document) if type(value_at(document, path)) in {bool, int}])
        at = value_at(changed, path[:-1])
        old = at[path[-1]]
        near = (old ^ 1, old + 4096, old - 16, old * 2, 0, 1, 8, 0xFFFF)
        at[path[-1]] = not old if isinstance(old, bool) else rng.choice(near)
    return changed


def value_at(value, path):
    for key in path:
        value = value[key]
    return value


def test_any_change_of_the_document_is_refused_or_harmless(world, running):
    """Nothing but the three errors of the contract; no descriptor and no mapping stays; the giver goes on."""
    logging.getLogger("vsport").setLevel(logging.CRITICAL)
    rng = random.Random(1)
    document, delivery = full_document(world, running)
    fds = delivery._fds
    taker = world.sides[1]
    before = open_fds(settle=True)
    refused = 0
    for _ in range(1500):
        changed = spoil(rng, document)
        copy = Delivery([os.dup(fd) for fd in fds])
        try:
            taker.server.take(Fields("server", changed), copy)
        except (DocumentError, FrontEndError, HostError) as exc:
            assert "\n" not in str(exc)
            refused += 1
        copy.close()
        taker.server.release()
        assert open_fds() == before
    assert refused > 700
    delivery.close()
    logging.getLogger("vsport").setLevel(logging.NOTSET)
    with open("/proc/self/maps") as maps:
        assert maps.read().count("guest-memory") == 2  # the front end's, the giver's
    world.side.server.resume()
    running.offer(running.PORT_TX, b"still there")
    running.front_end.until(lambda: world.host.received == b"still there")


def put(document, value, *path):
    value_at(document, path[:-1])[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("path",), "/tmp/" + "x" * 110, "longer than 107 bytes"),
        (("path",), "/tmp/elsewhere", "a listening socket is not that of"),
        (("front_end", 0, "header"), "00" * 12, "unknown protocol version"),
        (("front_end", 0, "stream", "data"), "00" * 1000, "longer than a message"),
        (("front_end", 0, "stream", "socket"), -1, "no Unix stream socket"),
        (("front_end", 0, "unsent_fd"), 1, "without the reply"),
        (("front_end", 0, "session", "vrings"), [], "0 rings, but the device has 8 queues"),
        (("front_end", 0, "session", "vrings", 6, "held"), True, "vring 6 runs without having been started"),
        (("front_end", 0, "session", "vrings", 2, "size"), 7, "cannot be as it is described"),
        (("front_end", 0, "session", "vrings", 2, "started"), False, "cannot be as it is described"),
        (("front_end", 0, "session", "regions", 0, "fd"), -1, "fd is missing"),
        (("front_end", 0, "session", "regions", 0, "size"), 1 << 30, "does not hold the range"),
        (("front_end", 0, "session", "protocol_features"), 1 << 10, "not all offered here"),
        (("front_end", 0, "session", "inflight", 0, "queue_size"), 16, "regions do not fit"),
        (("front_end", 0, "session", "dirty", "log", 0, "size"), 1 << 40, "does not hold the range"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_what_is_wrong_with_a_document_is_named(world, running, path, value, says):
    """In one line, by its place; and nothing of it stays."""
    document, delivery = full_document(world, running)
    put(document, value, *path)
    before = open_fds(settle=True)
    copy = Delivery([os.dup(fd) for fd in delivery._fds])
    with pytest.raises((DocumentError, FrontEndError), match=says):
        world.sides[1].server.take(Fields("server", document), copy)
    copy.close()
    assert open_fds() == before
    assert not world.sides[1].server.connected
    assert not world.sides[1].server.listening
    delivery.close()
    world.side.server.resume()
    running.offer(running.PORT_TX, b"still there")
    running.front_end.until(lambda: world.host.received == b"still there")


def test_any_document_that_is_taken_can_be_run_and_closed(world, running):
    """Rings, memory and descriptors as a document of nonsense may have them: as harmless as a front end's nonsense."""
    logging.getLogger("vsport").setLevel(logging.CRITICAL)
    rng = random.Random(3)
    document, delivery = full_document(world, running)
    taker = world.sides[1]
    before = open_fds(settle=True)
    taken = 0
    for _ in range(300):
        copy = Delivery([os.dup(fd) for fd in delivery._fds])
        with contextlib.suppress(DocumentError, FrontEndError, HostError):
            taker.server.take(Fields("server", twist(rng, document)), copy)
            taken += 1
            taker.server.resume()
            for _ in range(3):
                taker.loop.run_once(0)
        copy.close()
        if rng.random() < 0.5:
            taker.server.suspend()
            taker.server.release()
        taker.server.close()
        taker.device.reset()
        assert open_fds() == before
    assert taken > 50
    delivery.close()
    logging.getLogger("vsport").setLevel(logging.NOTSET)


def test_descriptors_of_the_wrong_kind_are_refused_or_harmless(world, running):
    """Also those that epoll cannot wait for, that cannot be mapped, or that are not there."""
    logging.getLogger("vsport").setLevel(logging.CRITICAL)
    rng = random.Random(2)
    document, delivery = full_document(world, running)
    fds = delivery._fds
    odd = [os.open("/", os.O_RDONLY), os.open(os.devnull, os.O_RDWR), os.memfd_create("odd"), os.open("/", os.O_PATH)]
    odd += [os.eventfd(0), *os.pipe(), socket.socket().detach()]
    before = open_fds(settle=True)
    for _ in range(300):
        count = rng.choice((len(fds), len(fds), len(fds) // 2))
        copy = Delivery([os.dup(rng.choice(odd) if rng.random() < 0.1 else fd) for fd in fds[:count]])
        with contextlib.suppress(DocumentError, FrontEndError, HostError):
            world.sides[1].server.take(Fields("server", document), copy)
        copy.close()
        world.sides[1].server.release()
        assert open_fds() == before
    for fd in odd:
        os.close(fd)
    delivery.close()
    logging.getLogger("vsport").setLevel(logging.NOTSET)
    world.side.server.resume()
    running.offer(running.PORT_TX, b"still there")
    running.front_end.until(lambda: world.host.received == b"still there")


@pytest.mark.parametrize(
    ("held", "says"),
    [
        ([7], "did not run"),
        ([0, 1, 2, 3, 4, 5, 6, 7, 8], "more than"),
        ([1 << 70], "did not run"),
        ([-1], "did not run"),
        ([True], "the number of a queue"),
        ([[]], "the number of a queue"),
        (5, "not list"),
    ],
)
def test_rings_that_did_not_run_do_not_run_afterwards(world, running, held, says):
    document, delivery = world.give()
    rest = world.side.server.give_rest()
    world.take(document, delivery)
    rest["rings"][0]["held"] = held
    with pytest.raises(DocumentError, match=says):
        world.sides[1].server.take_rest(Fields("state", rest))
    world.sides[1].server.release()
    world.side.server.resume()
    running.offer(running.PORT_TX, b"still there")
    running.front_end.until(lambda: world.host.received == b"still there")


def test_rings_without_a_front_end_are_refused(world):
    document, delivery = world.give()
    world.take(document, delivery)
    with pytest.raises(DocumentError, match="no front end"):
        world.sides[1].server.take_rest(Fields("state", {"rings": [{"held": []}]}))
    world.sides[1].server.release()
    world.side.server.resume()


def said(server):
    """What give() says that has to be the same as long as the edition is: where running rings stand is not."""
    document = json.loads(json.dumps(server.give(Parcel())))
    for front_end in document["front_end"]:
        for ring in front_end["session"]["vrings"]:
            del ring["base"], ring["held"]
    return document


def test_another_description_is_another_edition(world, running):
    """Whatever the front end does, and whatever is only half said."""
    server, front_end, rng = world.side.server, running.front_end, random.Random(4)
    front_end.open_channel()
    log = PageLog(running.memory.end)
    seen = {}

    def half_a_message():
        data = encode_request(Request.GET_FEATURES)
        front_end.send(data[:5])
        look()
        front_end.send(data[5:])
        front_end.reply(Request.GET_FEATURES)

    def look():
        for _ in range(3):
            world.step()
        assert seen.setdefault(server.edition, said(server)) == said(server)

    acts = [
        front_end.barrier,
        lambda: front_end.set_fd(Request.SET_VRING_CALL, 2, front_end.rings[2].call_fd),
        lambda: front_end.set_fd(Request.SET_VRING_ERR, 2, front_end.rings[2].err_fd),
        lambda: front_end.enable(4, rng.random() < 0.5),
        lambda: front_end.start_logging(log),
        front_end.stop_logging,
        lambda: world.device.on_config_change(),
        front_end.take_request,
        lambda: running.offer(running.PORT_TX, b"bytes"),
        lambda: (front_end.pause(), front_end.resume()),
        half_a_message,
    ]
    for _ in range(200):
        rng.choice(acts)()
        look()
    log.close()
    assert len(seen) > 50


def test_memory_that_was_cut_short_meanwhile_is_refused(world, running):
    """R-VU-62: and the giver, which has it mapped, finds out by itself."""
    document, delivery = world.give()
    os.ftruncate(running.memory.fd, 4096)
    with pytest.raises(FrontEndError, match="R-VU-62"):
        world.take(document, delivery)
    world.side.server.resume()
    running.front_end.until(lambda: not world.side.server.connected)


def test_a_ring_outside_memory_is_refused(world, running):
    """R-RING-09: what a front end could not have said."""
    document, delivery = world.give()
    document["front_end"][0]["session"]["vrings"][2]["address"][0]["desc"] = USER + (1 << 40)
    with pytest.raises(FrontEndError, match="R-RING-09"):
        world.take(document, delivery)
    world.side.server.resume()


def test_nothing_stays_behind(world, running):
    """Descriptors, mappings, watches: as before, after any number of handovers."""
    running.front_end.open_channel()
    world.hand_over()
    before = open_fds(settle=True)
    for _ in range(10):
        world.hand_over()
    assert open_fds(settle=True) == before
    with open("/proc/self/maps") as maps:
        assert maps.read().count("guest-memory") == 2
    running.say(Message(1, Event.PORT_OPEN, 0))
    running.front_end.until(lambda: not world.device.ports[1].state.guest_connected)
    world.side.server.close()
    with pytest.raises(Disconnected):
        running.front_end.barrier()
