"""Files of the lab's own QEMU: every bit of every port is where we say that it is."""

import contextlib
import gzip
import json
import os
import socket
import subprocess
import time

import pytest
from qemu_files import RECORDED, cut_out, recorded

from vsport.inspect import FileImage, describe
from vsport.lab.run import Guest, tied_to_us
from vsport.lab.tree import Tree
from vsport.qemu_device import Status
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
import os, select, sys, time
fd, written = os.open(sys.argv[1], os.O_RDWR | os.O_NONBLOCK), 0
ready = select.poll()
ready.register(fd, select.POLLOUT)
while any(event & select.POLLOUT for _, event in ready.poll(500)):
    try:
        written += os.write(fd, b"x" * int(sys.argv[2]))
    except BlockingIOError:
        pass
print(written, flush=True)
time.sleep(9999)
"""
"""Writes until the port has taken nothing for half a second."""


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
        for name in self.pipes:
            assert int(self._start(guest, FILL, name, WRITE)) > 100 * WRITE, "the port took what it has buffers for"
        with contextlib.closing(Qmp(directory / "qmp")) as qmp:
            qmp.migrate(f"file:{path}")
        # One look at each: QEMU writes on into a pipe that has room, even for a machine that is stopped.
        self.taken = {name: len(os.read(fd, 1 << 20)) % WRITE for name, fd in self.pipes.items()}

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
        assert (element.bytes_total, element.bytes_taken) == (WRITE, moved.taken[name])
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


@pytest.mark.parametrize("legacy", [True, False])
def test_virtio_mmio(migrated, legacy):
    """R-MIG-12."""
    modern = () if legacy else ("-global", "virtio-mmio.force-legacy=false")
    stream = migrated("microvm", *modern, "-device", "virtio-serial-device,max_ports=2")
    (device,) = stream.devices
    assert (stream.machine, stream.consistent, device.bus.kind) == ("microvm", True, "mmio")
    assert (device.max_ports, bits(device)) == (2, {1: (False, True, False)})
    assert device.findings == ()


def test_no_message_signalled_interrupts_and_no_modern_interface(migrated):
    (device,) = migrated("pc", "-device", "virtio-serial-pci,disable-modern=on,vectors=0").devices
    assert (device.bus.msix_vectors, device.bus.config_vector, device.queues[0].vector) == (0, None, None)
    assert device.findings == ()


def test_exec_writes_the_same(migrated):
    """R-MIG-07."""
    stream = migrated("pc", "-device", "virtio-serial-pci,max_ports=511", exec_cat=True)
    assert (stream.described, stream.consistent, stream.devices[0].max_ports) == (True, True, 511)


def test_without_a_description(migrated):
    """R-MIG-04, R-MIG-05."""
    stream = migrated("pc,suppress-vmdesc=on", "-device", "virtio-serial-pci", "-device", "virtio-serial-pci")
    assert (stream.described, stream.consistent) == (False, True)
    assert [finding.rule for finding in stream.findings] == ["R-MIG-05"]
    assert [len(device.ports) for device in stream.devices] == [0, 1]  # The bus that came last got the port.


@pytest.mark.parametrize("description", ["on", "off"])
def test_without_footers(migrated, description):
    """R-MIG-03."""
    options = ("-global", "migration.send-section-footer=off", "-device", "virtio-serial-pci")
    stream = migrated(f"pc,suppress-vmdesc={'off' if description == 'on' else 'on'}", *options)
    (device,) = stream.devices
    assert stream.described == stream.consistent == (description == "on")
    assert [finding.rule for finding in device.findings] == ["R-MIG-03"]
    assert bits(device) == {1: (False, True, False)}


@pytest.mark.parametrize("capability", ["mapped-ram", "multifd", "x-ignore-shared"])
def test_other_layouts_of_ram(migrated, capability):
    """R-MIG-02, R-MIG-06: the RAM is elsewhere, the devices are not."""
    capabilities = ["mapped-ram", "multifd"] if capability == "multifd" else [capability]
    stream = migrated("pc", "-device", "virtio-serial-pci", capabilities=capabilities)
    assert (stream.machine[:3], stream.described, stream.consistent) == ("pc-", True, True)
    assert set(capabilities) >= set(stream.capabilities)
    assert bits(stream.devices[0]) == {1: (False, True, False)}


def test_a_machine_without_the_device(migrated):
    stream = migrated("pc", port=False)
    assert (stream.devices, stream.findings, stream.described) == ((), (), True)
