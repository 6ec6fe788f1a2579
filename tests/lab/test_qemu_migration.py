"""Files of the lab's own QEMU: every bit of every port is where we say that it is."""

import contextlib
import gzip
import json
import os
import random
import socket
import subprocess
import time

import pytest
from qemu_files import RECORDED, GuestRam, Target, block_of_ram, cut_out, recorded

from vsport.connection import Cause, OnRestore, State
from vsport.constants import QUEUE_CONTROL_RX, Event, tx_queue
from vsport.control import Message
from vsport.document import DocumentError
from vsport.inspect import FileImage, describe
from vsport.lab.run import Guest, tied_to_us
from vsport.lab.tree import Tree
from vsport.qemu_device import Status
from vsport.qemu_restore import from_qemu
from vsport.qemu_stream import BytesImage, read_stream

pytestmark = pytest.mark.lab
PATIENCE = 60.0
WRITE = 30001
"""Bytes in one write of the guest: no multiple of a page, so that a full pipe takes a part of it."""

OPEN, CLOSED, HALF, ALONE, NOBODY = range(1, 6)
"""The ports of the first device."""
PACKED_CONSOLE, PACKED_HALF = 0, 35


class Qmp:
    """QEMU's monitor, asked one thing at a time."""

    def __init__(self, path):
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE)
        until(lambda: connects(self._socket, path), "QEMU listens")
        self._lines = self._socket.makefile("rw")
        assert "QMP" in json.loads(self._lines.readline())
        self.ask("qmp_capabilities")

    def ask(self, command, **arguments):
        self._lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._lines.flush()
        while "event" in (answer := json.loads(self._lines.readline())):
            pass
        return answer["return"]

    def migrate(self, uri):
        """Stops the machine and writes its state."""
        self.ask("stop")
        self.ask("migrate", uri=uri)
        status = until(lambda: self._ended(), "the migration ends")
        assert status == "completed"

    def _ended(self):
        status = self.ask("query-migrate").get("status")
        return status if status in ("completed", "failed", "cancelled") else None

    def close(self):
        self._lines.close()
        self._socket.close()


def connects(sock, path):
    with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
        sock.connect(str(path))
        return True
    return False


def until(condition, what):
    """Waits for something that has to happen."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
    return found


def read_file(path):
    with path.open("rb") as file:
        return read_stream(FileImage(file.fileno()))


def bits(device):
    """(guest_connected, host_connected, throttled) of each port."""
    return {port.id: (port.guest_connected, port.host_connected, port.throttled) for port in device.ports}


HOLD = (
    "import os, sys, time; os.open(sys.argv[1], os.O_RDWR | os.O_NONBLOCK); print('open', flush=True); time.sleep(9999)"
)
FILL = """
import os, random, select, sys, time
fd, size, written = os.open(sys.argv[1], os.O_RDWR | os.O_NONBLOCK), int(sys.argv[2]), 0
ready = select.poll()
ready.register(fd, select.POLLOUT)
text = random.Random(1).randbytes(5_000_000)
while any(event & select.POLLOUT for _, event in ready.poll(500)):
    try:
        written += os.write(fd, text[written : written + size])
    except BlockingIOError:
        pass
print(written, flush=True)
time.sleep(9999)
"""
"""Writes FILLING until the port has taken nothing for half a second."""
FILLING = random.Random(1).randbytes(5_000_000)


class Moved:
    """A guest whose ports are in every state, and the file that QEMU has made of it."""

    def __init__(self, tree, directory, path, undo):
        self.path = path
        self._directory = directory
        self._undo = undo
        self.pipes = {name: self._pipe(name) for name in ("half", "packed-half")}
        guest = undo.enter_context(Guest("qemu", tree=tree, device_args=self._arguments(), ports=["org.test.open"]))
        for name in ("open", "closed", "console"):
            client = undo.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(str(directory / name))
        for name in ("open", "alone"):
            self._start(guest, HOLD, name)
        self.written = {name: int(self._start(guest, FILL, name, WRITE)) for name in self.pipes}
        for written in self.written.values():
            assert 100 * WRITE < written < len(FILLING) - WRITE, "the port took what it has buffers for"
        with contextlib.closing(Qmp(directory / "qmp")) as qmp:
            qmp.migrate(f"file:{path}")
        # One look at each: QEMU writes on into a pipe that has room, even for a machine that is stopped.
        self.received = {name: os.read(fd, 1 << 20) for name, fd in self.pipes.items()}

    def _pipe(self, name):
        """Where a chardev of kind `pipe` writes to. Nobody reads."""
        for end in "in", "out":
            os.mkfifo(self._directory / f"{name}.{end}")
        fd = os.open(self._directory / f"{name}.out", os.O_RDONLY | os.O_NONBLOCK)
        self._undo.callback(os.close, fd)
        return fd

    def _start(self, guest, program, name, *arguments):
        path = f"/dev/virtio-ports/org.test.{name}"
        process = self._undo.enter_context(guest.popen(["python3", "-c", program, path, *map(str, arguments)]))
        return process.stdout.readline().strip()

    def _arguments(self):
        arguments = ["-qmp", f"unix:{self._directory}/qmp,server=on,wait=off"]
        for name in ("open", "closed", "alone", "nobody", "console"):
            arguments += ["-chardev", f"socket,id={name},path={self._directory}/{name},server=on,wait=off"]
        for name in self.pipes:
            arguments += ["-chardev", f"pipe,id={name},path={self._directory}/{name}"]
        arguments += ["-device", "virtio-serial-pci,id=split"]
        for number, name in enumerate(("open", "closed", "half", "alone", "nobody"), OPEN):
            arguments += port("split", number, name)
        # Behind a port of its own the device is a PCI Express one.
        arguments += ["-device", "pcie-root-port,id=root0,chassis=1"]
        arguments += ["-device", "virtio-serial-pci,id=packed,bus=root0,max_ports=40,packed=on"]
        arguments += ["-device", f"virtconsole,bus=packed.0,chardev=console,nr={PACKED_CONSOLE}"]
        return [*arguments, *port("packed", PACKED_HALF, "packed-half")]


def port(device, number, name):
    return ["-device", f"virtserialport,bus={device}.0,chardev={name},name=org.test.{name},nr={number}"]


@pytest.fixture(scope="module")
def moved(lab_tree, tmp_path_factory):
    """One move for all tests: they only read its file."""
    path = tmp_path_factory.mktemp("qemu") / "moved"
    with contextlib.ExitStack() as undo:
        undo.callback(path.unlink, missing_ok=True)  # It is as large as the guest's memory.
        directory = tmp_path_factory.mktemp("q")
        yield Moved(lab_tree, directory, path, undo)


def test_every_bit_of_every_port(moved):
    """R-MIG-10 to 14 and 17, with split rings on conventional PCI."""
    stream = read_file(moved.path)
    assert (stream.machine[:7], stream.described, stream.consistent, stream.findings) == ("pc-q35-", True, True, ())
    device = stream.devices[0]
    assert device.idstr.endswith("/virtio-console")
    assert bits(device) == {
        OPEN: (True, True, False),
        CLOSED: (False, True, False),
        HALF: (True, True, True),
        ALONE: (True, False, False),
        NOBODY: (False, False, False),
    }
    assert (device.version, device.max_ports, len(device.queues), device.ports_map) == (3, 31, 64, 0b111111)
    assert device.status == Status.ACKNOWLEDGE | Status.DRIVER | Status.DRIVER_OK | Status.FEATURES_OK
    assert {"MULTIPORT", "VERSION_1"} <= set(device.feature_names)
    assert (len(device.bus.config), device.bus.msix_vectors, device.started, device.findings) == (256, 2, True, ())


def test_packed_rings_on_pci_express(moved):
    """R-MIG-11, R-MIG-15: what stands before the chain does not shift it."""
    device = read_file(moved.path).devices[1]
    assert bits(device) == {PACKED_CONSOLE: (True, True, False), PACKED_HALF: (True, True, True)}
    assert (device.max_ports, len(device.queues), device.ports_map) == (40, 82, 1 | 1 << PACKED_HALF)
    assert (len(device.bus.config), device.packed) == (4096, True)
    assert [finding.rule for finding in device.findings] == ["R-MIG-15"]


def test_half_consumed_chains_go_on_where_the_host_stopped(moved):
    """R-MIG-21, R-MIG-24: what the file says has gone is what the host has got."""
    devices = read_file(moved.path).devices
    for device, id, name in (devices[0], HALF, "half"), (devices[1], PACKED_HALF, "packed-half"):
        element = next(port.element for port in device.ports if port.id == id)
        assert (element.bytes_total, element.bytes_taken) == (WRITE, len(moved.received[name]) % WRITE)
        assert 0 < element.bytes_taken < WRITE
        assert element.resumes_at == element.segments[0].gpa + element.bytes_taken
        queue = device.queues[2 * id + 3]
        popped = (queue.last_avail - device.queue_base(queue.index)) & (0x7FFF if device.packed else 0xFFFF)
        assert popped % queue.num == 1


def test_the_report_is_for_people(moved):
    text = describe(moved.path).text
    for words in ("(the bug of 2011)", "port 5: nobody at either end", "throttled: the host had stopped reading"):
        assert words in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 100


def test_a_file_without_its_ram_reads_the_same(moved):
    """What the recorded file of the other tests is; with VSPORT_RECORD=1 it is made anew."""
    whole = read_file(moved.path)
    cut = cut_out(moved.path.read_bytes())
    small = read_stream(BytesImage(cut))
    assert [placeless(device) for device in small.devices] == [placeless(device) for device in whole.devices]
    if os.environ.get("VSPORT_RECORD"):
        RECORDED.parent.mkdir(exist_ok=True)
        RECORDED.write_bytes(gzip.compress(cut, 9, mtime=0))


def test_the_recorded_file_is_still_what_qemu_writes(moved):
    old, new = read_stream(BytesImage(recorded())), read_file(moved.path)
    assert [(bits(device), device.size) for device in old.devices] == [
        (bits(device), device.size) for device in new.devices
    ]


def placeless(device):
    return {key: value for key, value in device.as_dict().items() if key != "offset"}


# -- a device that goes on ---------------------------------------------------------------------------------------------


@pytest.fixture
def ram(moved):
    """The guest's memory as the file has it, for one test to write to."""
    return GuestRam(block_of_ram(moved.path, "pc.ram"))


def told(ram, queue):
    """The control messages that the guest has been given, read as its driver would (R-GUEST-19)."""
    buffers = [(ram.memory.read(queue.desc + 16 * head, 8), length) for head, length in ram.returned(queue)]
    return [Message.decode(ram.memory.read(int.from_bytes(gpa, "little"), length)) for gpa, length in buffers]


def test_the_host_gets_exactly_the_bytes_that_were_missing(moved, ram):
    """R-MIG-18, R-MIG-20, R-MIG-21, R-MIG-24: file, memory, rings, host, and no byte lost or sent twice."""
    stream = read_file(moved.path)
    saved = stream.devices[0]
    target = Target(saved, hosts=[OPEN, CLOSED, HALF], on_restore=OnRestore.RESUME)
    queues = target.restore(stream, saved, ram).queues
    begin, end = len(moved.received["half"]), moved.written["half"]
    assert moved.received["half"] == FILLING[:begin]
    assert target.takers[HALF].received == FILLING[begin:end]
    assert len(ram.returned(queues[tx_queue(HALF)])) == -(-end // WRITE) - begin // WRITE
    assert target.states() == {OPEN: State.A, CLOSED: State.C, HALF: State.A, ALONE: State.D, NOBODY: State.B}
    opened = {id for id, taker in target.takers.items() if (True, Cause.RESTORE) in taker.heard}
    assert opened == {OPEN, HALF, ALONE}
    assert told(ram, queues[QUEUE_CONTROL_RX]) == []


def test_the_guest_is_told_in_its_own_memory_that_its_hosts_stayed_behind(moved, ram):
    """R-MIG-20."""
    stream = read_file(moved.path)
    saved = stream.devices[0]
    target = Target(saved, hosts=[HALF, NOBODY])
    queues = target.restore(stream, saved, ram).queues
    assert target.states() == {OPEN: State.D, CLOSED: State.B, HALF: State.A, ALONE: State.D, NOBODY: State.C}
    heard = told(ram, queues[QUEUE_CONTROL_RX])
    for id, values in {OPEN: [0], CLOSED: [0], HALF: [0, 1], ALONE: [], NOBODY: [1]}.items():
        assert [message for message in heard if message.port == id] == [
            Message(id, Event.PORT_OPEN, value) for value in values
        ]
    assert target.takers[HALF].received == b""
    left = moved.written["half"] - len(moved.received["half"])
    assert target.device.ports[HALF].counters.bytes_discarded == left


def test_packed_rings_are_refused(moved):
    stream = read_file(moved.path)
    with pytest.raises(DocumentError, match="packed=off"):
        from_qemu(stream, {}, idstr=stream.devices[1].idstr)


def test_memory_of_another_guest_is_refused(moved, ram):
    """R-MIG-18."""
    stream = read_file(moved.path)
    saved = stream.devices[0]
    ram.memory.write(saved.queues[QUEUE_CONTROL_RX].used + 2, b"\x55\x55")
    target = Target(saved)
    with pytest.raises(DocumentError, match=r"queue 2: .* not the memory of that guest"):
        target.restore(stream, saved, ram)
    assert set(target.states().values()) == {State.B_UNREADY}


# -- machines that have not been started: no kernel, a few MiB ---------------------------------------------------------


@pytest.fixture
def migrated(lab_tree, short_path, tmp_path, running):
    """Starts QEMU with a virtio-serial device in it and no CPU running, and returns what it wrote."""

    def start(machine, *arguments, capabilities=(), port=True, exec_cat=False):
        tree, path = Tree(lab_tree), tmp_path / "file"
        command = [
            *tree.program("usr/bin/qemu-system-x86_64"),
            *("-L", f"{tree.root}/usr/share/qemu", "-L", f"{tree.root}/usr/share/seabios"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-S", "-m", "16M", "-M", machine),
            *("-qmp", f"unix:{short_path}/qmp,server=on,wait=off", *arguments),
            *("-chardev", f"file,id=a,path={os.devnull}"),
            *(("-device", "virtserialport,chardev=a,nr=1") if port else ()),
        ]
        process = running.enter_context(subprocess.Popen(tied_to_us(command), stdin=subprocess.DEVNULL))
        running.callback(process.kill)
        with contextlib.closing(Qmp(short_path / "qmp")) as qmp:
            wanted = [{"capability": name, "state": True} for name in capabilities]
            qmp.ask("migrate-set-capabilities", capabilities=wanted)
            qmp.migrate(f"exec:cat > {path}" if exec_cat else f"file:{path}")
        return read_file(path)

    return start


def restored(stream):
    """The ports' states in a device for each one of the file, whose hosts are not there."""
    targets = [Target(saved) for saved in stream.devices]
    for target, saved in zip(targets, stream.devices, strict=True):
        target.restore(stream, saved)
    return [target.states() for target in targets]


@pytest.mark.parametrize("legacy", [True, False])
def test_virtio_mmio(migrated, legacy):
    """R-MIG-12."""
    modern = () if legacy else ("-global", "virtio-mmio.force-legacy=false")
    stream = migrated("microvm", *modern, "-device", "virtio-serial-device,max_ports=2")
    (device,) = stream.devices
    assert (stream.machine, stream.consistent, device.bus.kind) == ("microvm", True, "mmio")
    assert (device.max_ports, bits(device)) == (2, {1: (False, True, False)})
    assert device.findings == ()
    assert restored(stream) == [{1: State.B_UNREADY}]


def test_no_message_signalled_interrupts_and_no_modern_interface(migrated):
    stream = migrated("pc", "-device", "virtio-serial-pci,disable-modern=on,vectors=0")
    (device,) = stream.devices
    assert (device.bus.msix_vectors, device.bus.config_vector, device.queues[0].vector) == (0, None, None)
    assert device.findings == ()
    assert restored(stream) == [{1: State.B_UNREADY}]


def test_exec_writes_the_same(migrated):
    """R-MIG-07."""
    stream = migrated("pc", "-device", "virtio-serial-pci,max_ports=511", exec_cat=True)
    assert (stream.described, stream.consistent, stream.devices[0].max_ports) == (True, True, 511)
    with pytest.raises(DocumentError, match="max_ports=511, and 127 are possible here"):
        from_qemu(stream, {})


def test_without_a_description(migrated):
    """R-MIG-04, R-MIG-05."""
    stream = migrated("pc,suppress-vmdesc=on", "-device", "virtio-serial-pci", "-device", "virtio-serial-pci")
    assert (stream.described, stream.consistent) == (False, True)
    assert [finding.rule for finding in stream.findings] == ["R-MIG-05"]
    assert [len(device.ports) for device in stream.devices] == [0, 1]  # The bus that came last got the port.
    assert restored(stream) == [{}, {1: State.B_UNREADY}]


@pytest.mark.parametrize("description", ["on", "off"])
def test_without_footers(migrated, description):
    """R-MIG-03."""
    options = ("-global", "migration.send-section-footer=off", "-device", "virtio-serial-pci")
    stream = migrated(f"pc,suppress-vmdesc={'off' if description == 'on' else 'on'}", *options)
    (device,) = stream.devices
    assert stream.described == stream.consistent == (description == "on")
    assert [finding.rule for finding in device.findings] == ["R-MIG-03"]
    assert bits(device) == {1: (False, True, False)}
    if stream.consistent:
        assert restored(stream) == [{1: State.B_UNREADY}]
    else:
        with pytest.raises(DocumentError, match="without a description nothing says that it is whole"):
            restored(stream)


@pytest.mark.parametrize("capability", ["mapped-ram", "multifd", "x-ignore-shared"])
def test_other_layouts_of_ram(migrated, capability):
    """R-MIG-02, R-MIG-06: the RAM is elsewhere, the devices are not."""
    capabilities = ["mapped-ram", "multifd"] if capability == "multifd" else [capability]
    stream = migrated("pc", "-device", "virtio-serial-pci", capabilities=capabilities)
    assert (stream.machine[:3], stream.described, stream.consistent) == ("pc-", True, True)
    assert set(capabilities) >= set(stream.capabilities)
    assert bits(stream.devices[0]) == {1: (False, True, False)}
    assert restored(stream) == [{1: State.B_UNREADY}]


def test_a_machine_without_the_device(migrated):
    stream = migrated("pc", port=False)
    assert (stream.devices, stream.findings, stream.described) == ((), (), True)
