"""Our device on a real kernel: its virtio_console driver, its /dev/vport*, and real programs at both ends."""

import contextlib
import hashlib
import itertools
import json
import os
import socket
import subprocess
import threading
import time

import pytest

from vsport.connection import State
from vsport.constants import Feature
from vsport.lab.run import PIPE, Guest
from vsport.lab.served import Served
from vsport.lab.tree import Tree
from vsport.options import parse_configuration

pytestmark = pytest.mark.lab
PATIENCE = 60.0
KINDS = ("uml", "qemu")
NUMBERS = (1, 2, 3)


class World:
    """A device in this process with org.test.1 to 3 and a console, a booted guest, and the sockets of its hosts."""

    def __init__(self, kind, tree, directory, *, bus="virtio-serial", **options):
        self.directory = directory
        self._undo = contextlib.ExitStack()
        chardevs = [f"socket,id=c{n},path={directory}/{n},server=on,wait=off" for n in (0, *NUMBERS)]
        ports = [bus, "virtconsole,chardev=c0,name=org.test.console"]
        ports += [f"virtserialport,chardev=c{n},name=org.test.{n},nr={n}" for n in NUMBERS]
        vm_socket = directory / "vm"
        self.served = self._undo.enter_context(Served(parse_configuration(chardevs, ports), vm_socket))
        try:
            self.guest = self._undo.enter_context(
                Guest(kind, tree=tree, socket_path=vm_socket, ports=[f"org.test.{n}" for n in NUMBERS], **options)
            )
        except BaseException:
            self.close()
            raise

    def close(self):
        self._undo.close()

    def connect(self, number):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(PATIENCE)
        sock.connect(str(self.directory / str(number)))
        return sock

    def python(self, program, *arguments, **options):
        """A program in the guest, with guest_tools."""
        return self.guest.popen(["python3", "-c", program, *map(str, arguments)], **options)

    def state(self, number):
        return self.served.call(lambda host: host.device.ports[number].state)

    def wait_for(self, condition, what):
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, what
            time.sleep(0.01)

    def wait_for_state(self, number, state):
        self.wait_for(lambda: self.state(number) is state, f"port {number} comes to {state}")


@pytest.fixture(scope="module", params=KINDS)
def world(request, lab_tree, tmp_path_factory):
    with contextlib.closing(World(request.param, lab_tree, tmp_path_factory.mktemp(request.param))) as made:
        made.kind = request.param
        yield made


def receive(sock, size):
    """The digest of exactly ``size`` bytes."""
    digest = hashlib.sha256()
    while size:
        data = sock.recv(min(size, 1 << 18))
        assert data, f"the port ended {size} bytes too early"
        digest.update(data)
        size -= len(data)
    return digest.hexdigest()


def send(sock, size):
    digest = hashlib.sha256()
    while size:
        data = os.urandom(min(size, 1 << 18))
        digest.update(data)
        sock.sendall(data)
        size -= len(data)
    return digest.hexdigest()


TRANSFER = """
import hashlib, os, sys
from guest_tools import open_port
size = int(sys.argv[1]) << 20
with open_port("org.test.1", wait_host=True) as channel:
    digest, left = hashlib.sha256(), size
    while left:
        data = os.urandom(min(left, 65536))
        digest.update(data)
        channel.write(data)
        left -= len(data)
    print(digest.hexdigest(), flush=True)
    digest, left = hashlib.sha256(), size
    while left:
        data = channel.read(left)
        assert data, "the host left"
        digest.update(data)
        left -= len(data)
    print(digest.hexdigest(), flush=True)
"""

STALL = """
import sys
from guest_tools import open_port
with open_port("org.test.2", wait_host=True) as channel:
    written = 0
    while (taken := channel.write_now(b"%08d" % written * 512)) or channel.refused:
        written += taken
    print(written, flush=True)
    sys.stdin.read()
"""

HAMMER = """
import time
from guest_tools import PortError, open_port
while True:
    try:
        with open_port("org.test.3") as channel:
            print("open", flush=True)
            while True:
                if channel.write_now(b"load" * 1024) == 0:
                    channel.wait(0.01)
                channel.read_now()
    except PortError as exc:
        print(type(exc).__name__, flush=True)
        time.sleep(0.01)
"""


def test_the_ports_are_there_by_name(world):
    listed = world.guest.run(["vsport-open", "--list", "--json"], check=True).stdout
    ports = {port["name"]: port for port in map(json.loads, listed.splitlines())}
    assert {name: port["id"] for name, port in ports.items()} == {
        "org.test.console": 0,
        "org.test.1": 1,
        "org.test.2": 2,
        "org.test.3": 3,
    }
    links = world.guest.run(["ls", "/dev/virtio-ports"], check=True).stdout.split()
    assert set(links) == {name.encode() for name in ports}


def test_much_data_beside_a_stalled_port_and_one_that_comes_and_goes(world):
    """100 MiB each way arrive whole, while port 2's host never reads and port 3 is unplugged and plugged under load."""
    mebibytes = 100 if world.kind == "uml" else 8
    with contextlib.ExitStack() as stack:
        deaf = stack.enter_context(world.connect(2))
        stalled = stack.enter_context(world.python(STALL, stdin=PIPE))
        written = int(stalled.stdout.readline())
        assert written > 0

        replugs, ending = [], threading.Event()
        replugger = threading.Thread(target=replug, args=(world, 3, replugs, ending))
        hammer = stack.enter_context(world.python(HAMMER))
        assert hammer.stdout.readline() == b"open\n"
        replugger.start()
        try:
            host = stack.enter_context(world.connect(1))
            transfer = stack.enter_context(world.python(TRANSFER, mebibytes))
            digest = receive(host, mebibytes << 20)
            assert transfer.stdout.readline().decode().strip() == digest
            digest = send(host, mebibytes << 20)
            assert transfer.stdout.readline().decode().strip() == digest
            assert transfer.wait(PATIENCE) == 0
        finally:
            ending.set()
            replugger.join()
        assert len(replugs) >= 3
        heard = [hammer.stdout.readline().strip() for _ in range(2 * len(replugs))]
        assert heard.count(b"PortUnplugged") >= 3

        # The host that never read begins to: all that was written before comes, in order.
        expected = b"".join(b"%08d" % at * 512 for at in itertools.chain([0], range(4096, written, 4096)))
        assert receive(deaf, written) == hashlib.sha256(expected[:written]).hexdigest()
        hammer.kill()
        stalled.stdin.close()
        assert stalled.wait(PATIENCE) == 0
    world.wait_for(lambda: not world.state(3).guest_connected, "the guest's programs have closed their ports")


def replug(world, number, replugs, ending):
    """Unplugs a port and plugs it again, with a host that reads what comes, until ``ending``, at least three times."""
    option = next(port for port in world.served.host.configuration.ports if port.nr == number)

    def plug(host):
        host.plug(option)
        host.pumps[number].open()

    while not ending.is_set() or len(replugs) < 3:
        with world.connect(number) as host:
            world.wait_for_state(number, State.A)
            for _ in range(50):
                host.recv(65536)
            world.served.call(lambda host: host.unplug(number))
            world.served.call(plug)
            replugs.append(time.monotonic())


def test_each_leave_and_return_of_the_host_is_seen(world):
    """A hundred sessions: the guest sees the end of each and the beginning of the next, and vsport-open says so."""
    said = world.guest.popen(["vsport-open", "--hold", "org.test.1", "--json"])

    def next_event():
        return json.loads(said.stdout.readline())["event"]

    with said:
        assert next_event() == "waiting"
        for _ in range(100):
            with world.connect(1) as host:
                assert next_event() == "host_connected"
                host.sendall(b"words of this session")
            assert next_event() == "host_left"
        assert world.served.call(lambda host: host.device.waiting_messages) == 0
        said.send_signal(2)
        assert said.wait(PATIENCE) == -2
    world.wait_for_state(1, State.B)


def test_the_host_returns_at_once_and_the_leave_is_still_seen(world):
    """No splice: the next client is connected before the guest could have looked."""
    with world.guest.popen(["vsport-open", "--hold", "org.test.1", "--json"]) as said:
        events = [json.loads(said.stdout.readline())["event"]]
        for _ in range(10):
            with world.connect(1):
                events.append(json.loads(said.stdout.readline())["event"])
            with world.connect(1):
                events += [json.loads(said.stdout.readline())["event"] for _ in range(2)]
            events.append(json.loads(said.stdout.readline())["event"])
        assert events == ["waiting"] + ["host_connected", "host_left"] * 20
    world.wait_for_state(1, State.B)


def test_socat_and_vsport_open_make_a_chat(world, lab_tree):
    socat = [*Tree(lab_tree).program("usr/bin/socat"), "-", f"UNIX-CONNECT:{world.directory}/1"]
    with (
        subprocess.Popen(socat, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as host,
        world.guest.popen(["vsport-open", "org.test.1"], stdin=PIPE) as guest,
    ):
        for words in (b"hello guest\n", b"still there?\n"):
            host.stdin.write(words)
            host.stdin.flush()
            assert guest.stdout.readline() == words
            guest.stdin.write(b"yes: " + words)
            guest.stdin.flush()
            assert host.stdout.readline() == b"yes: " + words
        host.stdin.close()
        assert guest.stdout.readline() == b""
        assert guest.wait(PATIENCE) == 0
        assert host.wait(PATIENCE) == 0


def test_what_is_written_before_a_close_arrives(world):
    """R-CON-39: `cat FILE > /dev/vport0p1` and nothing more; the close overtakes no byte, however slow the host is."""
    program = "open('/dev/virtio-ports/org.test.1', 'wb', buffering=0).write(b'x' * 32768)"
    with world.connect(1) as host:
        for _ in range(3):
            for _ in range(12):
                assert world.guest.run(["python3", "-c", program]).returncode == 0
            assert receive(host, 12 * 32768) == hashlib.sha256(b"x" * 12 * 32768).hexdigest()


def test_an_unplugged_port_ends_its_program(world):
    """R-GUEST-14."""
    with world.guest.popen(["vsport-open", "--hold", "org.test.3", "--json"]) as holder:
        holder.stdout.readline()
        world.served.call(lambda host: host.unplug(3))
        assert holder.wait(PATIENCE) == 6
    option = next(port for port in world.served.host.configuration.ports if port.nr == 3)

    def plug(host):
        host.plug(option)
        host.pumps[3].open()

    world.served.call(plug)
    assert world.guest.run(["udevadm", "wait", "--timeout=20", "/dev/virtio-ports/org.test.3"]).returncode == 0


def test_a_console_port_is_a_terminal(world):
    """R-CON-24, R-CON-25, R-GUEST-17."""
    with world.connect(0) as host:
        world.wait_for_state(0, State.A)
        # One open file for both: the last close resets the terminal.
        world.guest.run(["sh", "-c", "exec 3<>/dev/hvc0; stty raw -echo <&3; echo from the guest >&3"], check=True)
        assert receive(host, 15) == hashlib.sha256(b"from the guest\n").hexdigest()
        world.served.call(lambda host: host.device.resize(0, 132, 43))

        def size():
            return world.guest.run(["stty", "-F", "/dev/hvc0", "size"]).stdout.split()

        world.wait_for(lambda: size() == [b"43", b"132"], "the terminal has its new size")


def test_a_driver_that_is_unbound_and_bound_again_starts_anew(world):
    """R-GUEST-15, R-VU-56, R-VU-71, R-VU-72: a reset without a word; the host's side stays."""
    opens = "import time, guest_tools as g; c = g.open_port('org.test.1'); print('open', flush=True); time.sleep(99)"
    rebind = "cd /sys/bus/virtio/drivers/virtio_console && d=$(basename virtio*) && echo $d > unbind && echo $d > bind"
    with world.connect(1) as host, world.python(opens) as holder:
        holder.stdout.readline()
        world.wait_for_state(1, State.A)
        assert world.guest.run(["sh", "-c", rebind]).returncode == 0
        world.wait_for_state(1, State.C)
        holder.kill()
        assert world.guest.run(["udevadm", "wait", "--timeout=20", "/dev/virtio-ports/org.test.1"]).returncode == 0
        echo = "from guest_tools import open_port; c = open_port('org.test.1'); c.write(c.read())"
        with world.python(echo) as echoing:
            host.sendall(b"after the reset")
            assert receive(host, 15) == hashlib.sha256(b"after the reset").hexdigest()
            assert echoing.wait(PATIENCE) == 0


FILL = """
import sys
from guest_tools import open_port
for _ in range(int(sys.argv[1])):
    with open_port("org.test.2", wait_host=True) as channel:
        while channel.write_now(b"x" * 4096) or channel.refused:
            pass
        print("full", flush=True)
        sys.stdin.readline()
"""


def test_a_port_survives_two_hundred_sessions_that_end_half_way(world):
    """R-CON-48: no stuck chain. Each host leaves a ring that is full and throttled, and the guest closes and opens."""
    with world.python(FILL, 200, stdin=PIPE) as filler:
        for _ in range(200):
            with world.connect(2):
                assert filler.stdout.readline() == b"full\n"
            world.wait_for_state(2, State.D)
            filler.stdin.write(b"\n")
            filler.stdin.flush()
        assert filler.wait(PATIENCE) == 0
    echo = "from guest_tools import open_port; c = open_port('org.test.2', wait_host=True); c.write(c.read())"
    with world.connect(2) as host, world.python(echo) as echoing:
        host.sendall(b"after all that")
        assert receive(host, 14) == hashlib.sha256(b"after all that").hexdigest()
        assert echoing.wait(PATIENCE) == 0
    world.wait_for_state(2, State.B)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_uses_packed_rings(kind, lab_tree, tmp_path):
    """R-RING-40 to 52: bytes both ways, and the host leaves and returns; in order if the kernel knows that."""
    bus = "virtio-serial-pci,packed=on,in_order=on"
    with contextlib.closing(World(kind, lab_tree, tmp_path, bus=bus)) as world:
        negotiated = world.served.call(lambda host: host.device.negotiated)
        assert negotiated & Feature.RING_PACKED
        for size in (4, 1):
            with world.connect(1) as host, world.python(TRANSFER, size) as program:
                received = receive(host, size << 20)
                assert program.stdout.readline().decode().strip() == received
                sent = send(host, size << 20)
                assert program.stdout.readline().decode().strip() == sent
                assert program.wait(PATIENCE) == 0
            world.wait_for_state(1, State.B)


def test_a_host_that_leaves_while_the_vm_is_paused_is_not_slept_through(lab_tree, tmp_path):
    """Nothing slept through: QEMU 11.1 leaves its guest with a port that is open for ever."""
    monitor = ["-qmp", f"unix:{tmp_path}/qmp,server=on,wait=off"]
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(contextlib.closing(World("qemu", lab_tree, tmp_path, device_args=monitor)))
        holder = stack.enter_context(world.guest.popen(["vsport-open", "--hold", "org.test.1", "--json"]))
        qmp = stack.enter_context(socket.socket(socket.AF_UNIX))

        def event():
            return json.loads(holder.stdout.readline())["event"]

        assert event() == "waiting"
        qmp.connect(str(tmp_path / "qmp"))
        talk = qmp.makefile("rw")
        talk.readline()
        ask(talk, "qmp_capabilities")
        host = world.connect(1)
        assert event() == "host_connected"
        ask(talk, "stop")
        host.close()
        world.wait_for_state(1, State.D)
        ask(talk, "cont")
        assert event() == "host_left"

        host = world.connect(1)
        assert event() == "host_connected"
        ask(talk, "stop")
        host.close()
        world.wait_for_state(1, State.D)
        host = stack.enter_context(world.connect(1))
        ask(talk, "cont")
        assert [event(), event()] == ["host_left", "host_connected"]


def test_a_paused_vm_forgets_nothing(lab_tree, tmp_path):
    """R-VU-70, R-VU-71, R-MIG-25: QEMU's stop and cont look like a restart of every ring; the port stays open."""
    monitor = ["-qmp", f"unix:{tmp_path}/qmp,server=on,wait=off"]
    with contextlib.closing(World("qemu", lab_tree, tmp_path, device_args=monitor)) as world, world.connect(1) as host:
        echo = "from guest_tools import open_port; c = open_port('org.test.1')\nwhile d := c.read(): c.write(d)"
        with world.python(echo), socket.socket(socket.AF_UNIX) as qmp:
            world.wait_for_state(1, State.A)
            qmp.connect(str(tmp_path / "qmp"))
            talk = qmp.makefile("rw")
            talk.readline()
            for words in (b"one", b"two", b"three"):
                for command in ("qmp_capabilities", "stop"):
                    ask(talk, command)
                host.sendall(words)
                assert world.state(1) is State.A
                ask(talk, "cont")
                assert receive(host, len(words)) == hashlib.sha256(words).hexdigest()
            assert world.served.call(lambda host: host.device.ports[1].counters.guest_opens) == 1


def ask(talk, command):
    """One QMP command; events that come before its answer are passed over."""
    talk.write(json.dumps({"execute": command}) + "\n")
    talk.flush()
    while not {"return", "error"} & json.loads(talk.readline()).keys():
        pass
