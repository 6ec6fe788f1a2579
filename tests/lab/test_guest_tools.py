"""vsport-open on real kernels: User Mode Linux with our device, and QEMU with its own.

QEMU's virtserialport is what the tools meet in most guests; what holds there and here is the driver's, not ours.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vsport.host import Host
from vsport.lab.run import PIPE, Guest, GuestProcess
from vsport.lab.served import Served
from vsport.options import parse_configuration

pytestmark = pytest.mark.lab
PATIENCE = 60.0
NUMBERS = (1, 2)
CHARDEV = "socket,id=c{0},path={1}/{0},server=on,wait=off"
CONSOLE = "virtconsole,chardev=c0,name=org.test.console,nr=0,id=p0"
PORT = "virtserialport,chardev=c{0},name=org.test.{0},nr={0},id=p{0}"


class OurDevice:
    """User Mode Linux with our device."""

    def __init__(self, tree: Path, directory: Path, undo: contextlib.ExitStack) -> None:
        chardevs = [CHARDEV.format(number, directory) for number in (0, *NUMBERS)]
        configuration = parse_configuration(chardevs, [CONSOLE, *map(PORT.format, NUMBERS)])
        self._served = undo.enter_context(Served(configuration, directory / "vm"))
        self.guest = undo.enter_context(Guest("uml", tree=tree, socket_path=directory / "vm", ports=NAMES))

    def unplug(self, number: int) -> None:
        self._served.call(lambda host: host.unplug(number))

    def plug(self, number: int) -> None:
        option = next(port for port in self._served.host.configuration.ports if port.nr == number)

        def plug(host: Host) -> None:
            host.plug(option)
            host.pumps[number].open()

        self._served.call(plug)


class QemusDevice:
    """QEMU with its own device, plugged and unplugged through its monitor."""

    def __init__(self, tree: Path, directory: Path, undo: contextlib.ExitStack) -> None:
        args = ["-qmp", f"unix:{directory}/qmp,server=on,wait=off", "-device", "virtio-serial-pci,id=vs"]
        for number in (0, *NUMBERS):
            args += ["-chardev", CHARDEV.format(number, directory)]
        for device in (CONSOLE, *map(PORT.format, NUMBERS)):
            args += ["-device", device]
        self.guest = undo.enter_context(Guest("qemu", tree=tree, ports=NAMES, device_args=args))
        monitor = undo.enter_context(socket.socket(socket.AF_UNIX))
        monitor.connect(f"{directory}/qmp")
        self._monitor = undo.enter_context(monitor.makefile("rw"))
        self._ask("qmp_capabilities")

    def unplug(self, number: int) -> None:
        self._ask("device_del", id=f"p{number}")

    def plug(self, number: int) -> None:
        driver, *options = PORT.format(number).split(",")
        self._ask("device_add", driver=driver, bus="vs.0", **dict(option.split("=") for option in options))

    def _ask(self, command: str, **arguments: str) -> None:
        arguments = {key: int(value) if key == "nr" else value for key, value in arguments.items()}  # type: ignore
        self._monitor.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._monitor.flush()
        while not (answer := json.loads(self._monitor.readline())).keys() & {"return", "error"}:
            pass
        assert "error" not in answer, answer


NAMES = [f"org.test.{number}" for number in NUMBERS]
DEVICES: dict[str, type[OurDevice] | type[QemusDevice]] = {"ours": OurDevice, "qemus": QemusDevice}


class World:
    """A guest with a console and two ports, and the host's ends of them."""

    def __init__(self, device: str, tree: Path, directory: Path, undo: contextlib.ExitStack) -> None:
        self._directory = directory
        self._device = DEVICES[device](tree, directory, undo)
        self.guest = self._device.guest
        self.unplug = self._device.unplug
        self.has_debugfs = self.guest.run(["test", "-d", "/sys/kernel/debug/virtio-ports"]).returncode == 0
        """R-GUEST-03. Debian's User Mode Linux has none: what only debugfs knows is not known there."""

    def connect(self, number: int) -> socket.socket:
        host = socket.socket(socket.AF_UNIX)
        host.settimeout(PATIENCE)
        host.connect(f"{self._directory}/{number}")
        return host

    def open(self, *args: str, **options: Any) -> GuestProcess:
        return self.guest.popen(["vsport-open", *args], **options)

    def run(self, *args: str, **options: Any) -> tuple[int, str, str]:
        done = self.guest.run(["vsport-open", *args], **options)
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    def python(self, program: str, **options: Any) -> GuestProcess:
        return self.guest.popen(["python3", "-c", program], **options)

    def ports(self) -> dict[str, Any]:
        _, out, _ = self.run("--list", "--json")
        return {port["name"]: port for port in map(json.loads, out.splitlines())}

    def plug(self, number: int) -> None:
        self._device.plug(number)
        link = f"/dev/virtio-ports/org.test.{number}"
        assert self.guest.run(["udevadm", "wait", "--timeout=30", link]).returncode == 0


@pytest.fixture(scope="module", params=DEVICES)
def world(request: pytest.FixtureRequest, lab_tree: Path, tmp_path_factory: Any) -> Iterator[World]:
    with contextlib.ExitStack() as undo:
        yield World(request.param, lab_tree, tmp_path_factory.mktemp(request.param), undo)


@pytest.fixture
def without_debugfs(world: World) -> Iterator[None]:
    """As for everybody but root: what the host does is only known to who has the port open."""
    if world.has_debugfs:
        world.guest.run(["umount", "/sys/kernel/debug"], check=True)
    yield
    if world.has_debugfs:
        world.guest.run(["mount", "-t", "debugfs", "debugfs", "/sys/kernel/debug"], check=True)


def eventually(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def line(stream: Any) -> str:
    text: str = stream.readline().decode()
    return text.rstrip("\n")


def receive(host: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = host.recv(size - len(data))
        assert piece, f"the port ended after {len(data)} bytes"
        data += piece
    return bytes(data)


HOLDER = "import guest_tools, sys; c = guest_tools.open_port('org.test.1'); print(flush=True); sys.stdin.read()"


@contextlib.contextmanager
def held(world: World) -> Iterator[GuestProcess]:
    """Another program has port 1 open."""
    with world.python(HOLDER, stdin=PIPE) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"\n"
        yield holder
        assert holder.stdin
        holder.stdin.close()
        assert holder.wait(PATIENCE) == 0


# Looking


def test_a_port_that_nobody_has_open(world: World) -> None:
    port = world.ports()["org.test.1"]
    assert re.fullmatch("/dev/vport[0-9]p1", port.pop("device"))
    known = {"kind": "generic", "host_connected": False, "guest_connected": False}
    state = known if world.has_debugfs else dict.fromkeys(known)
    assert port == {"name": "org.test.1", "id": 1, "holders": [], **state}


def test_a_port_that_both_have_open(world: World) -> None:
    with world.connect(1), held(world):
        if world.has_debugfs:
            eventually(lambda: world.ports()["org.test.1"]["host_connected"], "the host is there")
        port = world.ports()["org.test.1"]
        (holder,) = port["holders"]
        assert port["guest_connected"] in (True, None)
        assert (holder["user"], holder["command"].startswith("python3 -c import guest_tools")) == ("root", True)
        _, table, _ = world.run("--list")
        row = next(row for row in table.splitlines() if "org.test.1" in row)
        assert re.search(rf" 1 +(generic +connected|[?] +[?]) +python3 -c .*\(pid {holder['pid']}, user root\)$", row)


def test_a_busy_port_names_its_holder(world: World) -> None:
    """R-GUEST-04."""
    with held(world):
        for args in ["org.test.1"], ["--hold", "org.test.1"]:
            code, out, err = world.run(*args)
            assert (code, out, err.count("\n")) == (4, "", 1)
            assert re.search(r"held open by python3 -c .* \(pid \d+, user root\)", err)


def test_a_console_port_is_the_kernels(world: World) -> None:
    """R-GUEST-17."""
    if world.has_debugfs:
        port = world.ports()["org.test.console"]
        assert (port["kind"], port["guest_connected"]) == ("console", True)
    code, _, err = world.run("org.test.console")
    assert (code, err.count("\n")) == (4, 1)
    assert "/dev/hvc" in err


def test_a_user_who_is_not_root_is_told_so(world: World) -> None:
    copy = "cp -r /mnt/vsport/guest_tools /tmp/ && chmod -R a+rX /tmp/guest_tools && cd /tmp"
    drop = "PYTHONPATH=/tmp exec setpriv --reuid 65534 --clear-groups python3 -m guest_tools"

    def run(args: str) -> Any:
        return world.guest.run(["sh", "-c", f"{copy} && {drop} {args}"])

    done = run("org.test.1")
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)
    assert b"permission denied" in done.stderr
    with held(world):
        port = next(port for port in map(json.loads, run("--list --json").stdout.splitlines()) if port["id"] == 1)
    assert {port[key] for key in ("kind", "host_connected", "guest_connected", "holders")} == {None}


# A session


def test_a_session_from_waiting_for_the_host_to_its_leaving(world: World) -> None:
    with world.open("-v", "org.test.1", stdin=PIPE) as session:
        assert session.stdin
        assert session.stdout
        assert line(session.stderr).startswith("vsport-open: waiting for the host")
        with world.connect(1) as host:
            assert line(session.stderr).startswith("vsport-open: connected")
            session.stdin.write(b"question")
            assert receive(host, 8) == b"question"
            host.sendall(b"answer\n")
            assert session.stdout.readline() == b"answer\n"
        assert session.wait(PATIENCE) == 0
        assert line(session.stderr) == "vsport-open: host left; 8 bytes sent, 7 received"


def test_the_end_of_the_input_leaves_time_for_the_answer(world: World) -> None:
    with world.connect(1) as host, world.open("org.test.1", stdin=PIPE) as session:
        assert session.stdin
        assert session.stdout
        session.stdin.write(b"question")
        session.stdin.close()
        assert receive(host, 8) == b"question"
        host.sendall(b"answer\n")
        assert session.stdout.readline() == b"answer\n"
        host.close()
        assert session.wait(PATIENCE) == 0


def test_with_close_on_eof_a_file_is_sent_and_the_port_closed(world: World) -> None:
    send = "head -c 5000000 /dev/urandom > /tmp/data; sha256sum < /tmp/data; vsport-open -N org.test.1 < /tmp/data"
    with world.connect(1) as host, world.guest.popen(["sh", "-c", send]) as session:
        data = receive(host, 5_000_000)
        assert session.wait(PATIENCE) == 0
        assert line(session.stdout).split()[0] == hashlib.sha256(data).hexdigest()
        assert not world.ports()["org.test.1"]["holders"]


def test_much_data_both_ways_at_once(world: World) -> None:
    data = os.urandom(4 << 20)
    program = "head -c 4194304 /dev/urandom > /tmp/up; vsport-open org.test.1 < /tmp/up > /tmp/down"
    with world.connect(1) as host, world.guest.popen(["sh", "-c", program]) as session:
        host.setblocking(False)
        up, down = bytearray(), memoryview(data)
        deadline = time.monotonic() + PATIENCE
        while (down or len(up) < len(data)) and time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                up += host.recv(1 << 16)
            with contextlib.suppress(BlockingIOError):
                down = down[host.send(down[: 1 << 16]) :]
        # QEMU throws away what it has not read when a host leaves: leave once all of it is there.
        size = ["stat", "-c", "%s", "/tmp/down"]
        eventually(lambda: int(world.guest.run(size).stdout) == len(data), "all of it is in the guest")
        host.close()
        assert session.wait(PATIENCE) == 0
        sums = world.guest.run(["sha256sum", "/tmp/up", "/tmp/down"], check=True).stdout.decode().split()[::2]
        assert sums == [hashlib.sha256(bytes_).hexdigest() for bytes_ in (up, data)]


TICKS = """
import subprocess, sys, time
def start(args, stdin):
    command = ["vsport-open", "-v", *args, "org.test.1"]
    process = subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdout.readline()
    return process
def ticks(process):
    return sum(map(int, open(f"/proc/{process.pid}/stat").read().rpartition(")")[2].split()[11:13]))
def ticks_of_a_second(process):
    before = ticks(process)
    time.sleep(1)
    return ticks(process) - before
"""


def test_a_host_that_leaves_without_reading_is_told(world: World) -> None:
    """What the ring cannot take any more is not lost silently: exit code 7. And a full ring costs no time."""
    program = """
process = start([], open("/dev/zero"))
while ticks_of_a_second(process) > 10:
    pass
print("asleep", flush=True)
print(process.wait(), process.stdout.read().decode())
"""
    with world.connect(1) as host, world.python(TICKS + program) as session:
        assert line(session.stdout) == "asleep"
        host.close()
        assert line(session.stdout).startswith("7 vsport-open: host left")
        assert re.fullmatch(r"vsport-open: the host left before it took the last \d+ bytes.*", line(session.stdout))


def test_a_host_that_is_back_at_once_begins_another_session(world: World) -> None:
    """No splice: the leave cannot be seen any more, but the driver has signalled it (R-GUEST-13)."""
    host = world.connect(1)
    with world.open("-v", "org.test.1", stdin=PIPE) as session:
        assert "connected" in line(session.stderr)
        host.close()
        with world.connect(1):
            assert session.wait(PATIENCE) == 0


def test_an_unplugged_port_ends_the_session(world: World) -> None:
    """R-GUEST-14."""
    with world.connect(1), world.open("-v", "org.test.1", stdin=PIPE) as session:
        assert "connected" in line(session.stderr)
        world.unplug(1)
        try:
            assert session.wait(PATIENCE) == 6
            assert "was unplugged" in line(session.stderr)
        finally:
            world.plug(1)


def test_a_timeout_ends_waiting_for_the_host(world: World) -> None:
    code, out, err = world.run("org.test.1", "--timeout", "0.1")
    assert (code, out, err.count("\n")) == (5, "", 1)


@pytest.mark.parametrize("args", [["-v", "org.test.1"], ["--hold", "org.test.1"], ["--watch"]], ids=str)
def test_ctrl_c_is_quiet(world: World, args: list[str]) -> None:
    with world.open(*args, stdin=PIPE) as process:
        line(process.stderr if "-v" in args else process.stdout)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == -signal.SIGINT
        assert process.stderr
        assert process.stderr.read() == b""


def test_nothing_spins_while_the_host_is_away(world: World) -> None:
    """R-GUEST-12: the host's being away is a level that never goes by itself."""
    program = """
for args in [], ["--hold"]:
    process = start(args, subprocess.DEVNULL)
    print(ticks_of_a_second(process), flush=True)
    process.kill()
    process.wait()
"""
    with world.python(TICKS + program) as measured:
        for _ in range(2):
            assert int(line(measured.stdout)) < 20  # of 100


# Waiting and watching


def test_wait_until_the_host_is_there(world: World) -> None:
    with world.open("--wait", "org.test.1", "--json") as waiting:
        assert json.loads(line(waiting.stderr))["event"] == "waiting"
        with world.connect(1):
            ready = json.loads(line(waiting.stdout))
            assert waiting.wait(PATIENCE) == 0
        assert (ready["event"], ready["name"], ready["host_connected"]) == ("ready", "org.test.1", True)
        assert not ready["guest_connected"]


def test_wait_until_the_port_is_there(world: World) -> None:
    world.unplug(2)
    try:
        eventually(lambda: "org.test.2" not in world.ports(), "the port is gone")
        with (
            world.connect(2) if False else contextlib.nullcontext(),
            world.open("-v", "--wait", "org.test.2") as waiting,
        ):
            assert "waiting" in line(waiting.stderr)
            world.plug(2)
            with world.connect(2):
                assert waiting.wait(PATIENCE) == 0
    finally:
        if "org.test.2" not in world.ports():
            world.plug(2)


@pytest.mark.usefixtures("without_debugfs")
def test_without_debugfs_an_open_port_tells(world: World) -> None:
    assert world.ports()["org.test.1"]["host_connected"] is None
    assert world.run("--wait", "org.test.1", "--timeout", "0.2")[0] == 5
    with world.connect(1):
        assert world.run("--wait", "org.test.1", "--timeout", "30")[0] == 0


@pytest.mark.usefixtures("without_debugfs")
def test_without_debugfs_a_busy_port_keeps_its_secret(world: World) -> None:
    with held(world):
        code, _, err = world.run("--wait", "org.test.1", "--timeout", "30")
        assert (code, err.count("\n")) == (4, 1)


def test_watch_tells_everything(world: World) -> None:
    with world.open("--watch", "--json") as watching:

        def event() -> tuple[str, str]:
            record = json.loads(line(watching.stdout))
            return record["event"], record["name"]

        present = {event() for _ in range(3)}
        assert present == {("present", name) for name in ("org.test.console", *NAMES)}
        if world.has_debugfs:
            with world.connect(2):
                assert event() == ("host_connected", "org.test.2")
            assert event() == ("host_left", "org.test.2")
        with held(world):
            opened = json.loads(line(watching.stdout))
            assert (opened["event"], opened["holders"][0]["user"]) == ("opened", "root")
        assert event() == ("closed", "org.test.1")
        world.unplug(2)
        assert event() == ("removed", "org.test.2")
        world.plug(2)
        assert event()[0] == "added"


# The library


def test_a_channel_outlives_the_hosts_sessions(world: World) -> None:
    """R-GUEST-06, 07: the end is not sticky; and a write to a host that is away does not sleep."""
    program = """
from guest_tools import HostLeft, open_port
with open_port("org.test.1", timeout=60) as channel:
    for session in range(3):
        channel.wait_host()
        channel.write(b"hello %d" % session)
        while data := channel.read():
            print(data.decode(), flush=True)
        print("end", channel.host_connected, flush=True)
        try:
            channel.write(b"x")
        except HostLeft as left:
            print(left.sent, flush=True)
"""
    with world.python(program) as talking:
        for session in range(3):
            with world.connect(1) as host:
                assert receive(host, 7) == b"hello %d" % session
                host.sendall(b"words")
                assert line(talking.stdout) == "words"
            assert line(talking.stdout) == "end False"
            assert line(talking.stdout) == "0"
        assert talking.wait(PATIENCE) == 0
