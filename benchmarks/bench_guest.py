"""How fast is a port of a real Linux guest? Peer: QEMU's own virtio-serial device; floor: a null chardev.

One guest under QEMU (TCG) has our device and QEMU's own, so that the kernel, the processor and the memory are the same
and nothing idle takes any of them away; the devices have their turns. QEMU's own is there twice: as it is by default,
which is what the goals are about, and with ioeventfd=off and an interrupt vector for each queue, where the guest's
processor itself writes to the host's socket. Ours has the one interrupt line that QEMU gives to a generic vhost-user
device.

The programs are the same for all: dd and cat in the guest, which are as fast as such programs can be, and this process
on the host. User Mode Linux has no such device of its own; its floor is our device with a chardev that takes all at
once.
"""

import contextlib
import itertools
import re
import socket
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from floors import (
    OURS,
    Figure,
    at_least,
    at_most,
    in_turns,
    percentile,
    record,
    record_distribution,
    record_point,
    record_ratio,
)
from kernels import PATIENCE, lab_tree

from vsport.lab import Guest
from vsport.lab.daemon import daemon
from vsport.lab.run import DEVNULL

PEER, INLINE = "QEMU's device", "QEMU's device, ioeventfd=off"
CONTENDERS = {OURS: "ours", PEER: "qemu", INLINE: "inline"}
"""In pictures, and by the name of the port."""
NULL = "null chardev"
ROUNDS = 5
ROUND_TRIPS = 2000
SIZES = [64, 4096, 32768]
"""Bytes in a write, as the issue has them: more than 32 KiB is split by Linux."""

SEND = 'exec dd if=/dev/zero of="$1" bs="$2" count="$3"'
TAKE = """
exec 3<>"$1"
dd bs=1 count=1 status=none <&3 >&3
dd of=/dev/null bs="$2" count="$3" iflag=fullblock status=none <&3
exec echo >&3
"""
"""Says that it begins, and that it has it all."""
ECHO = 'exec cat <>"$1" >&0'
_SECONDS = re.compile(rb"copied, ([\d.e-]+) s")


class Port(NamedTuple):
    """A port of a guest; its host connects to ``path``."""

    guest: Guest
    name: str
    path: Path | None

    def command(self, program, *arguments):
        return ["sh", "-c", program, "sh", f"/dev/virtio-ports/{self.name}", *map(str, arguments)]

    @contextlib.contextmanager
    def talk(self, program, *arguments):
        """The host's socket while the program runs in the guest."""
        with socket.socket(socket.AF_UNIX) as host:
            host.settimeout(PATIENCE)
            host.connect(str(self.path))
            command = self.command(program, *arguments)
            with self.guest.popen(command, stdout=DEVNULL, stderr=DEVNULL) as process:
                yield host
                process.kill()
                process.wait(PATIENCE)


def from_guest(port, size, count):
    """Bytes per second, from the first that arrive."""
    buffer = bytearray(1 << 18)
    with port.talk(SEND, size, count) as host:
        first = received = host.recv_into(buffer)
        began = time.perf_counter()
        while received < size * count:
            received += host.recv_into(buffer)
        return (received - first) / (time.perf_counter() - began)


def to_guest(port, size, count):
    """Bytes per second, until the guest's program has them all."""
    piece = bytes(size)
    with port.talk(TAKE, size, count) as host:
        host.sendall(b"!")
        assert host.recv(1) == b"!"
        began = time.perf_counter()
        for _ in range(count):
            host.sendall(piece)
        assert host.recv(1) == b"\n"
        return size * count / (time.perf_counter() - began)


def round_trips(port, count):
    """How many microseconds each took, of one byte to the guest's program and back."""
    taken = []
    with port.talk(ECHO) as host:
        for _ in range(count):
            began = time.perf_counter()
            host.sendall(b"!")
            assert host.recv(1) == b"!"
            taken.append((time.perf_counter() - began) * 1e6)
    return taken[count // 20 :]  # the first ones still wait for the program to start


def from_guest_by_its_clock(port, size, count):
    """Bytes per second, as dd in the guest has it, also where there is no host to look at a clock."""
    done = port.guest.run(port.command(SEND, size, count), check=True, timeout=PATIENCE)
    return size * count / float(_SECONDS.search(done.stderr)[1])


@contextlib.contextmanager
def reading(path, total):
    """A host that reads so many bytes, meanwhile."""
    with socket.socket(socket.AF_UNIX) as host:
        host.settimeout(PATIENCE)
        host.connect(str(path))
        thread = threading.Thread(target=read_all, args=[host, total])
        thread.start()
        try:
            yield
        finally:
            thread.join()


def read_all(host, total):
    buffer = bytearray(1 << 18)
    while total > 0 and (received := host.recv_into(buffer)):
        total -= received


@contextlib.contextmanager
def devices(kind, chardevs, others=lambda directory: []):
    """A guest with a device of ours that has these chardevs, and with what ``others`` adds; its ports are called as
    the chardevs are, and by ``path()`` their hosts are found."""
    tree = lab_tree()
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vs-")))
        options = []
        for name, chardev in chardevs.items():
            options += ["--chardev", f"{chardev.format(path=directory / name)},id={name}"]
            options += ["--device", f"virtserialport,chardev={name},name={name}"]
        stack.enter_context(daemon(directory / "vm", options, directory / "log"))
        arguments = others(directory)
        boot = {"socket_path": directory / "vm", "ports": list(chardevs), "device_args": arguments}
        guest = stack.enter_context(Guest(kind, tree=tree, **boot))
        yield lambda name: Port(guest, name, directory / name)


UNIX = "socket,path={path},server=on,wait=off"


def of_qemu(directory):
    """QEMU's own device, twice."""
    arguments = []
    for name, properties in ("qemu", ""), ("inline", ",ioeventfd=off,max_ports=2,vectors=9"):
        arguments += ["-device", f"virtio-serial-pci,id=of-{name}{properties}"]
        arguments += ["-chardev", f"{UNIX.format(path=directory / name)},id={name}"]
        arguments += ["-device", f"virtserialport,bus=of-{name}.0,chardev={name},name={name}"]
    return arguments


@pytest.fixture(scope="module")
def qemu():
    """The port of a contender, by its name: ``ours``, ``qemu`` or ``inline``."""
    with devices("qemu", {"ours": UNIX}, of_qemu) as port:
        yield port


@pytest.fixture(scope="module")
def uml():
    """The port of a contender, by its name: ``ours`` or ``null``."""
    with devices("uml", {"ours": UNIX, "null": "null"}) as port:
        yield port


def count(benchmark, size, seconds=0.5):
    """How many writes take about so many seconds; a few where nothing is measured."""
    per_second = 250e6 / (size + 1600)  # as seen once; all that depends on it is how long this takes
    return int(per_second * (seconds if benchmark.enabled else 0.02)) + 1


def in_qemu(benchmark, port, direction, move, size):
    """All contenders in turns; records the ratios."""
    writes = count(benchmark, size)
    names = ("qemu", "inline", "ours")
    measures = {name: lambda name=name: move(port(name), size, writes) for name in names}
    speeds = in_turns(benchmark, ROUNDS, **measures)
    for name, against, goal in ("qemu", PEER, at_least(1.0)), ("inline", INLINE, None):
        record_ratio(benchmark, "speed", speeds["ours"], speeds[name], against=against, better="higher", goal=goal)
    medians = {label: statistics.median(speeds[name]) for label, name in CONTENDERS.items()}
    record_point(benchmark, series=direction, x=size, x_label="bytes in a write", y=medians, y_label="bytes per second")


@pytest.mark.parametrize("size", SIZES)
def test_guest_to_host(benchmark, qemu, size):
    in_qemu(benchmark, qemu, "QEMU's guest to host", from_guest, size)


@pytest.mark.parametrize("size", SIZES)
def test_host_to_guest(benchmark, qemu, size):
    in_qemu(benchmark, qemu, "host to QEMU's guest", to_guest, size)


def echoes(benchmark, port, names):
    """By contender and round, how long round trips took."""
    each = ROUND_TRIPS if benchmark.enabled else 100
    found = {name: [] for name in names}

    def measure(name):
        found[name].append(round_trips(port(name), each))
        return statistics.median(found[name][-1])

    taken = in_turns(benchmark, ROUNDS, **{name: lambda name=name: measure(name) for name in names})
    return {name: rounds[-len(taken[name]) :] for name, rounds in found.items()}


def distribution(benchmark, series, rounds):
    values = {label: list(itertools.chain.from_iterable(found)) for label, found in rounds.items()}
    record_distribution(benchmark, series=series, label="round trip of one byte (us)", values=values)


def test_round_trip(benchmark, qemu):
    found = echoes(benchmark, qemu, ("qemu", "inline", "ours"))
    for name, against, goal in ("qemu", PEER, at_most(1.0)), ("inline", INLINE, None):
        for what, part in ("round trip, median", 0.5), ("round trip, p99", 0.99):
            ours, theirs = ([percentile(taken, part) for taken in found[who]] for who in ("ours", name))
            record_ratio(benchmark, what, ours, theirs, against=against, better="lower", goal=goal)
    distribution(benchmark, "QEMU's guest", {label: found[name] for label, name in CONTENDERS.items()})


@pytest.mark.parametrize("size", [64, 32768])
def test_user_mode_linux_to_host(benchmark, uml, size):
    """The host reads as fast as it can, in this process."""
    writes = count(benchmark, size, seconds=1.0)

    def ours():
        with reading(uml("ours").path, size * writes):
            return from_guest_by_its_clock(uml("ours"), size, writes)

    speeds = in_turns(benchmark, ROUNDS, null=lambda: from_guest_by_its_clock(uml("null"), size, writes), ours=ours)
    goal = at_least(0.8) if size == 32768 else None
    record_ratio(benchmark, "speed", speeds["ours"], speeds["null"], against=NULL, better="higher", goal=goal)
    medians = {OURS: statistics.median(speeds["ours"]), NULL: statistics.median(speeds["null"])}
    series = "User Mode Linux to host"
    record_point(benchmark, series=series, x=size, x_label="bytes in a write", y=medians, y_label="bytes per second")


def test_user_mode_linux_round_trip(benchmark, uml):
    found = echoes(benchmark, uml, ("ours",))["ours"]
    for what, part in ("round trip, median", 0.5), ("round trip, p99", 0.99):
        value = statistics.median(percentile(taken, part) for taken in found)
        record(benchmark, Figure(what, value, "lower", unit="us"))
    distribution(benchmark, "User Mode Linux", {OURS: found})
