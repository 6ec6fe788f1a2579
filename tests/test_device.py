"""The device as a guest sees it: conversation, configuration space, plugging, reset."""

import random
import struct
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vsport.connection import Cause, State
from vsport.constants import QUEUE_CONTROL_RX, QUEUE_CONTROL_TX, Event, Feature, rx_queue, tx_queue
from vsport.control import Message
from vsport.device import SerialDevice
from vsport.document import DocumentError
from vsport.errors import FrontEndError, GuestError, UsageError
from vsport.port import Away, BackEnd, Manners, PortConfig
from vsport.sim import HOSTILE, LINUX, Direct, SimulatedGuest
from vsport.snapshot import PortState, Snapshot


class Recorder(BackEnd):
    """A back end that takes notes, and takes what the guest sends up to ``room`` bytes."""

    def __init__(self, port, room=1 << 30):
        self.port = port
        self.room = room
        self.heard = []
        self.received = bytearray()
        self.emergency = bytearray()
        self.to_send = b""
        port.back_end = self

    def tx_ready(self):
        with self.port.blaming(self.port.tx):
            self.port.tx.drain_into(self._take)
            self.port.notify(self.port.tx)
            self.port.tx.kicks_on()

    def _take(self, data):
        taken = min(len(data), self.room)
        self.room -= taken
        self.received += data[:taken]
        return taken

    def rx_ready(self):
        if self.to_send and self.port.state is State.A:
            with self.port.blaming(self.port.rx):
                self.to_send = self.to_send[self.port.rx.fill_from(self.to_send) :]
                self.port.notify(self.port.rx)
                self.port.rx.kicks_on()

    def guest_connected(self, connected, cause):
        self.heard.append((connected, cause))

    def emergency_write(self, byte):
        self.emergency.append(byte)


def make(*configs, max_ports=4, profile=LINUX, features=None, queue_size=16, **layout):
    """A device with these ports and a guest that has booted; returns (device, guest)."""
    device = SerialDevice(max_ports=max_ports, **layout)
    for config in configs or (PortConfig(1, "org.test.0"),):
        Recorder(device.add_port(config))
    guest = SimulatedGuest(Direct(device), profile=profile, features=features, queue_size=queue_size)
    guest.boot()
    return device, guest


def connect(device, id=1):
    device.ports[id].feed(Cause.HOST_CONNECT)


# -- configuration space and features ----------------------------------------------------------------------------------


def test_configuration_space_is_columns_rows_ports_and_zero():
    """R-CON-05, R-CON-07."""
    device = SerialDevice(max_ports=5, cols=132, rows=43)
    assert struct.unpack("<HHII", device.read_config(0, 12)) == (132, 43, 5, 0)
    assert device.read_config(4, 4) == b"\x05\0\0\0"


@pytest.mark.parametrize(("offset", "size"), [(0, 13), (12, 1), (-1, 2), (4, 9)])
def test_reading_beyond_the_configuration_space_is_the_front_ends_fault(offset, size):
    with pytest.raises(FrontEndError, match=r"5\.3\.4"):
        SerialDevice().read_config(offset, size)


def test_features_that_were_not_offered_are_refused():
    device = SerialDevice()
    with pytest.raises(FrontEndError, match="not offered"):
        device.negotiate(device.features | 1 << 40)
    assert device.negotiated == 0


def test_no_transport_feature_is_offered_that_vhost_user_cannot_do():
    """R-RING-27, R-RING-61, R-RING-64."""
    offered = SerialDevice().features
    assert offered & Feature.VERSION_1
    for bit in (24, 30, 33, 37, 38, 39, 40, 41, 43):
        assert not offered >> bit & 1


@pytest.mark.parametrize("max_ports", [0, -1, 128])
def test_a_number_of_ports_that_vhost_user_cannot_wire_is_refused(max_ports):
    """R-VU-22."""
    with pytest.raises(UsageError, match="max_ports"):
        SerialDevice(max_ports=max_ports)


def test_an_emergency_character_goes_to_the_first_console():
    """R-CON-07 to 09: also when every field of the space is written along, and 0 is no character."""
    device, _guest = make(PortConfig(1, "a"), PortConfig(0, console=True), PortConfig(2, console=True))
    device.write_config(8, b"!\0\0\0")
    device.write_config(0, struct.pack("<HHII", 0, 0, 0, ord("?")))
    device.write_config(0, bytes(12))
    device.write_config(0, b"\1\2")
    assert device.ports[0].back_end.emergency == b"!?"
    assert device.ports[2].back_end.emergency == b""


def test_an_emergency_character_without_a_console_is_dropped():
    device, _guest = make()
    device.write_config(8, b"!\0\0\0")
    with pytest.raises(FrontEndError):
        device.write_config(8, bytes(5))


# -- conversation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", [LINUX, HOSTILE], ids=lambda profile: profile.name)
@pytest.mark.parametrize("features", [None, ~Feature.EVENT_IDX, ~Feature.INDIRECT_DESC], ids=["all", "flags", "direct"])
@pytest.mark.parametrize("layout", [{}, {"packed": True}, {"in_order": True}, {"packed": True, "in_order": True}])
def test_a_guest_learns_of_every_port(profile, features, layout):
    """R-CON-31, R-CON-07; with a driver of bad manners too."""
    configs = [PortConfig(0, console=True, cols=100, rows=30), PortConfig(1, "a.0"), PortConfig(3, "b.0")]
    device, guest = make(*configs, profile=profile, features=features, **layout)
    connect(device, 3)
    guest.run()
    assert {port.id: port.name for port in guest.ports.values()} == {0: None, 1: "a.0", 3: "b.0"}
    assert guest.ports[0].console
    assert guest.ports[0].size == (100, 30)
    assert [port.host_connected for port in guest.ports.values()] == [False, False, True]
    assert device.waiting_messages == 0
    assert (device.refused > 0) is (profile is HOSTILE)


def test_a_name_that_fits_no_control_buffer_waits_and_hurts_nobody_else():
    """R-CON-29: never cut short. The guest that offers such buffers has itself to blame, and only itself."""
    device, guest = make(PortConfig(1, "n" * 100), PortConfig(2, "b.0"), profile=HOSTILE)
    assert sorted(guest.ports) == [1, 2]
    assert guest.ports[1].name is None
    assert device.waiting_messages > 0
    guest.reset()
    assert device.waiting_messages == 0


def test_a_port_that_the_driver_does_not_call_ready_hears_nothing():
    """R-CON-31, R-CON-32."""
    device = SerialDevice(max_ports=2)
    device.add_port(PortConfig(1, "a.0"))
    guest = SimulatedGuest(Direct(device), queue_size=16)
    guest.attachment.negotiate(guest.features)
    control = guest.ring(QUEUE_CONTROL_RX, 64)
    control.post()
    said = guest.ring(QUEUE_CONTROL_TX, 64)
    said.send(Message(0xFFFFFFFF, Event.DEVICE_READY, 1).encode())
    connect(device)
    assert Message.decode(control.take()) == Message(1, Event.PORT_ADD, 1)
    assert control.take() is None
    said.send(Message(1, Event.PORT_READY, 0).encode())
    assert control.take() is None
    said.send(Message(1, Event.PORT_READY, 1).encode())
    assert Message.decode(control.take()) == Message.name(1, "a.0")
    assert Message.decode(control.take()) == Message(1, Event.PORT_OPEN, 1)


def test_a_device_that_the_driver_gave_up_has_no_ports():
    """R-CON-32."""
    device, guest = make()
    guest.reset()
    guest.attachment.negotiate(guest.features)
    guest.ring(QUEUE_CONTROL_RX, 64).post()
    guest.ring(QUEUE_CONTROL_TX, 64)
    guest.say(Message(0xFFFFFFFF, Event.DEVICE_READY, 0))
    assert not device.driver_ready
    assert not device.ports[1].added


def test_control_messages_wait_in_order_for_a_guest_without_buffers():
    """R-CON-35: no lost word. QEMU drops what finds no buffer."""
    device = SerialDevice(max_ports=8)
    for id in range(1, 8):
        device.add_port(PortConfig(id, f"org.test.{id}"))
    guest = SimulatedGuest(Direct(device), queue_size=1)
    guest.boot()
    assert [guest.ports[id].name for id in range(1, 8)] == [f"org.test.{id}" for id in range(1, 8)]
    for id in range(1, 8):
        connect(device, id)
    guest.run()
    assert all(port.host_history == [True] for port in guest.ports.values())


def test_a_host_that_flaps_while_the_guest_sleeps_is_seen_to_have_left():
    """R-CON-36 and no splice."""
    device, guest = make(queue_size=1)
    connect(device)
    guest.run()
    for _ in range(50):
        device.ports[1].feed(Cause.HOST_DISCONNECT)
        connect(device)
    assert device.waiting_messages <= 2
    guest.run()
    history = guest.ports[1].host_history
    assert history[0] is True
    assert False in history
    assert history[-1] is True


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        Message(9, Event.PORT_READY, 1).encode(),
        Message(1, Event.PORT_ADD, 1).encode(),
        Message(1, Event.PORT_REMOVE, 1).encode(),
        Message(1, Event.RESIZE, 1).encode(),
        struct.pack("<IHH", 1, 8, 0),
        struct.pack("<IHH", 2**32 - 1, 3, 1),
    ],
    ids=bytes.hex,
)
def test_a_control_message_that_makes_no_sense_is_taken_and_dropped(data):
    """R-CON-30, R-CON-47: the guest gets its buffer back, the device is as before."""
    device, guest = make()
    ring = guest.ring(QUEUE_CONTROL_TX, 4096)
    before = device.ports[1].state
    assert ring.send(data)
    ring.reclaim()
    assert ring.in_flight == 0
    assert device.refused == 1
    assert device.ports[1].state is before


@given(st.lists(st.binary(max_size=24), max_size=30))
@settings(max_examples=200, deadline=None)
def test_any_conversation_is_survived(datas):
    _device, guest = make(queue_size=4)
    ring = guest.ring(QUEUE_CONTROL_TX, 4096)
    for data in datas:
        assert ring.send(data)
        ring.reclaim()
    guest.run()
    guest.reset()
    guest.boot()
    assert guest.port("org.test.0").id == 1


def test_a_guest_that_slept_knows_its_ports():
    """R-CON-34: PORT_READY and PORT_OPEN after a reset, without DEVICE_READY."""
    device, guest = make()
    connect(device)
    guest.reset()
    guest.attachment.negotiate(guest.features)
    control = guest.ring(QUEUE_CONTROL_RX, 64)
    control.post()
    guest.ring(QUEUE_CONTROL_TX, 64)
    guest.say(Message(1, Event.PORT_READY, 1))
    guest.say(Message(1, Event.PORT_OPEN, 1))
    assert device.ports[1].state is State.A
    assert [Message.decode(control.take()).event for _ in range(2)] == [Event.PORT_NAME, Event.PORT_OPEN]


# -- opening and closing ---------------------------------------------------------------------------------------------


def test_the_back_end_hears_of_open_and_close_with_the_cause():
    device, guest = make()
    port = guest.port("org.test.0")
    port.open()
    port.close()
    port.open()
    guest.reset()
    assert device.ports[1].back_end.heard == [
        (True, Cause.GUEST_OPEN),
        (False, Cause.GUEST_CLOSE),
        (True, Cause.GUEST_OPEN),
        (False, Cause.RESET),
    ]


def test_the_last_bytes_before_a_close_arrive():
    """R-CON-39: data and close come on two queues."""
    device, guest = make()
    connect(device)
    guest.run()
    port = guest.port("org.test.0")
    port.open()
    device.queues[tx_queue(1)].kicks_off()
    ring = guest.ring(tx_queue(1), 4096)
    ring.send(b"famous last words")
    port.close()
    assert device.ports[1].back_end.received == b"famous last words"
    assert device.ports[1].state is State.C


def test_without_a_host_what_the_guest_sends_is_returned_and_counted():
    """R-CON-44."""
    device, guest = make()
    port = guest.port("org.test.0")
    port.open()
    assert guest.ring(tx_queue(1), 4096).send(b"x" * 1000)
    assert port.unsent == 0
    assert device.ports[1].counters.bytes_discarded == 1000


def test_a_host_that_leaves_in_the_middle_of_a_chain_leaves_no_stuck_chain():
    """R-CON-48: 300 times, and not one of 16 slots is lost."""
    device, guest = make()
    back_end = device.ports[1].back_end
    port = guest.port("org.test.0")
    port.open()
    for _ in range(300):
        back_end.room = 10
        connect(device)
        guest.run()
        port.write(b"y" * 100)
        assert device.queues[tx_queue(1)].offset == 10
        device.ports[1].feed(Cause.HOST_DISCONNECT)
        guest.run()
        assert port.unsent == 0
    assert device.ports[1].counters.bytes_discarded == 300 * 90


def test_a_throttled_port_opened_and_closed_200_times_goes_on_where_it_was():
    """No stuck chain: the guest's close keeps what is half consumed, and loses nothing of it."""
    device, guest = make()
    back_end = device.ports[1].back_end
    connect(device)
    guest.run()
    port = guest.port("org.test.0")
    sent = bytearray()
    for number in range(200):
        port.open()
        back_end.room = 3
        words = b"words %d;" % number
        sent += words
        port.write(words)
        port.close()
        back_end.room = 1 << 20
        device.kick(tx_queue(1))
    assert back_end.received == sent
    assert port.unsent == 0


def test_without_multiport_port_0_is_there_and_open():
    """R-CON-03, R-CON-37."""
    device, guest = make(PortConfig(0, console=True), features=~Feature.MULTIPORT)
    assert device.ports[0].state is State.D
    connect(device, 0)
    guest.ports[0].write(b"boot messages")
    assert device.ports[0].back_end.received == b"boot messages"
    assert device.waiting_messages == 0
    device.kick(QUEUE_CONTROL_TX)
    device.kick(rx_queue(2))


# -- plugging ----------------------------------------------------------------------------------------------------------


def test_a_port_is_plugged_unplugged_and_plugged_again_with_its_data():
    """R-CON-21, R-CON-22, R-CON-49, R-CON-50."""
    device, guest = make(PortConfig(1, "a.0"))
    for round_ in range(5):
        recorder = Recorder(device.add_port(PortConfig(2, "b.0")))
        guest.run()
        port = guest.port("b.0")
        port.open()
        connect(device, 2)
        guest.run()
        words = b"round %d" % round_
        port.write(words)
        recorder.to_send = words
        device.kick(rx_queue(2))
        assert port.read() == words
        assert recorder.received == words
        device.remove_port(2)
        guest.run()
        assert port.unplugged
        assert recorder.heard[-1] == (False, Cause.UNPLUG)
        with pytest.raises(OSError, match="unplugged"):
            port.read()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (PortConfig(1, "new"), "number 1 is taken"),
        (PortConfig(2, "org.test.0"), "'org.test.0' is taken"),
        (PortConfig(4, "new"), "not in 0 to 3"),
    ],
)
def test_ports_do_not_collide(config, says):
    """R-CON-21, R-CON-52."""
    device, _guest = make()
    with pytest.raises(UsageError, match=says):
        device.add_port(config)
    assert list(device.ports) == [1]


def test_free_port_numbers_keep_0_for_a_console():
    """R-CON-51."""
    device = SerialDevice(max_ports=3)
    assert device.free_port_id(console=False) == 1
    assert device.free_port_id(console=True) == 0
    for id in range(3):
        device.add_port(PortConfig(id))
    with pytest.raises(UsageError, match="all 3 ports"):
        device.free_port_id(console=True)


def test_only_a_port_that_is_there_can_be_removed():
    with pytest.raises(UsageError, match="no port 2"):
        make()[0].remove_port(2)


def test_a_console_hears_its_size():
    """R-CON-11, R-CON-25."""
    device, guest = make(PortConfig(0, console=True), PortConfig(1, "a.0"))
    changes = []
    device.on_config_change = lambda: changes.append(device.read_config(0, 4))
    device.resize(0, 132, 43)
    guest.run()
    assert guest.ports[0].size == (132, 43)
    assert changes == [struct.pack("<HH", 132, 43)]
    for id, cols in ((1, 80), (9, 80), (0, 65536)):
        with pytest.raises(UsageError):
            device.resize(id, cols, 25)


# -- reset and faults ------------------------------------------------------------------------------------------------


def test_a_reset_forgets_the_guest_and_keeps_the_host():
    """R-CON-38."""
    device, guest = make()
    connect(device)
    guest.run()
    port = guest.port("org.test.0")
    port.open()
    device.ports[1].back_end.room = 4
    port.write(b"half a chain")
    guest.reset()
    assert device.ports[1].state is State.C_UNREADY
    assert device.queues[tx_queue(1)].offset == 0
    assert not any(queue.running for queue in device.queues)
    guest.boot()
    assert guest.port("org.test.0").host_connected


def test_a_ring_that_the_guest_broke_stops_alone():
    """R-RING-70 and the policy: that queue, not the process, not its neighbours."""
    device, guest = make(PortConfig(1, "a.0"), PortConfig(2, "b.0"))
    faults = []
    device.on_fault = lambda index, error: faults.append((index, error.rule))
    for id in (1, 2):
        connect(device, id)
    guest.run()
    for port in guest.ports.values():
        port.open()
    ring = guest.ring(tx_queue(1), 4096)
    avail_idx = ring._queue.avail + 2
    guest.memory.write(avail_idx, struct.pack("<H", 999))
    device.kick(tx_queue(1))
    device.kick(tx_queue(1))
    assert faults == [(tx_queue(1), "R-RING-70")]
    guest.ports[2].write(b"still here")
    assert device.ports[2].back_end.received == b"still here"


def test_random_mischief_in_guest_memory_breaks_queues_at_most():
    """R-GUEST-24: overwrites ring memory at random while the device works on it."""
    rng = random.Random(1)
    for _ in range(60):
        device, guest = make(queue_size=8, profile=rng.choice([LINUX, HOSTILE]))
        connect(device)
        guest.run()
        for _ in range(20):
            guest.memory.write(rng.randrange(0, guest._next_free - 8), rng.randbytes(8))
            for index in range(len(device.queues)):
                device.kick(index)
        device.reset()
        assert device.ports[1].state is State.C_UNREADY


def test_errors_name_rule_and_values():
    error = GuestError("R-RING-71", "head outside of the ring", head=300, size=256)
    assert str(error) == "R-RING-71: head outside of the ring (head=300, size=256)"


# -- moving ------------------------------------------------------------------------------------------------------------


class Witness(BackEnd):
    """A back end that is no chardev, and remembers what it was told."""

    def __init__(self, state=b""):
        self.state = state
        self.heard = []

    def guest_connected(self, connected, cause):
        self.heard.append((connected, cause))

    def save(self):
        return self.state

    def check(self, state):
        if state[:1] == b"?":
            raise DocumentError("these are no words of mine")

    def load(self, state):
        self.state = state


def moved_pair(**manners):
    """A device whose port 1 is open in the guest and connected, paused; and one like it that has just been made."""
    source, target = SerialDevice(max_ports=4), SerialDevice(max_ports=4)
    for device in (source, target):
        port = device.add_port(PortConfig(1, "org.test.1"), Manners(**manners))
        device.attach(port, Witness(b"words" if device is source else b""))
    attachment = Direct(source, memory_mib=1)
    guest = SimulatedGuest(attachment, queue_size=8)
    guest.boot()
    guest.run()
    source.ports[1].feed(Cause.HOST_CONNECT)
    guest.run()
    guest.port("org.test.1").open()
    return source, target, guest


def test_a_running_device_is_neither_saved_nor_restored():
    """R-VU-91."""
    source, target, _guest = moved_pair()
    with pytest.raises(UsageError, match="the device runs"):
        source.snapshot()
    with pytest.raises(UsageError, match="the device runs"):
        source.restore(target.snapshot())


def test_what_is_saved_is_what_is_restored():
    """R-MIG-23: nothing that the guest can notice is left out, and saving changes nothing."""
    source, target, guest = moved_pair()
    guest.attachment.pause()
    snapshot = source.snapshot()
    assert snapshot == source.snapshot() == Snapshot.decode(snapshot.encode())
    target.restore(snapshot, carried={1})
    assert target.snapshot() == snapshot
    assert target.ports[1].state is State.A
    assert target.ports[1].back_end.state == b"words"
    assert target.ports[1].back_end.heard == [(True, Cause.HANDOVER)]


def test_a_restored_port_without_its_host_tells_both_sides():
    """The back end hears a close and an open; the guest will hear that the host of before is gone."""
    source, target, guest = moved_pair()
    guest.attachment.pause()
    moves = []
    target.on_transition = lambda port, cause, before: moves.append((before, cause, port.state))
    target.restore(source.snapshot())
    assert target.ports[1].back_end.heard == [(False, Cause.RESTORE), (True, Cause.RESTORE)]
    assert target.ports[1].state is State.D
    assert target.snapshot().waiting == (Message(1, Event.PORT_OPEN, 0),)
    assert moves == [
        (State.B_UNREADY, Cause.RESTORE, State.A),
        (State.A, Cause.HOST_DISCONNECT, State.D),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: replace(s, max_ports=5), "max_ports=5, this device 4"),
        (lambda s: replace(s, features=s.features | Feature.LOG_ALL), "features that this device has not"),
        (lambda s: replace(s, ports=()), "1 is too much"),
        (lambda s: replace(s, ports=(*s.ports, PortState(PortConfig(2), State.B, added=True))), "2 is missing here"),
        (
            lambda s: replace(s, ports=(replace(s.ports[0], config=PortConfig(1, "org.test.other")),)),
            "port 1: name was 'org.test.other' and is 'org.test.1' here",
        ),
        (
            lambda s: replace(s, ports=(replace(s.ports[0], config=PortConfig(1, "org.test.1", console=True)),)),
            "port 1: console was True and is False here",
        ),
        (lambda s: replace(s, ports=(replace(s.ports[0], back_end=b"?"),)), "port 1: these are no words of mine"),
    ],
)
def test_a_snapshot_that_does_not_fit_changes_nothing(change, message):
    """R-VU-92, all or nothing: one line says what is different."""
    source, target, guest = moved_pair()
    guest.attachment.pause()
    before = target.snapshot()
    with pytest.raises(DocumentError, match=message):
        target.restore(change(source.snapshot()))
    assert target.snapshot() == before
    assert target.ports[1].back_end.heard == []


def test_a_console_does_not_hold_what_nobody_takes():
    """R-CON-45."""
    with pytest.raises(UsageError, match="away=hold is not for a console"):
        SerialDevice().add_port(PortConfig(0, console=True), Manners(away=Away.HOLD))
