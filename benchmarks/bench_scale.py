"""What do a thousand idle devices cost, and whom do they slow down? Floor: a daemon with one device alone.

One `vsport serve` has a device for each of many virtual machines; each machine is a front end of ours in another
process, with a simulated guest whose port is open, and then nothing happens. What is counted is memory that the daemon
alone has (Private_Dirty): guest memory is shared with the front end and belongs to the guest, the program and its
libraries are there for the first device already. DEVICES=N takes another number of them than a thousand.
"""

import contextlib
import os
import resource
import sys
import time
from pathlib import Path

import pytest
from floors import Figure, at_least, at_most, compare, record, record_point

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from daemons import Machine, connect, daemon, wait_for
from herd import grazing

from vsport.loop import READ

DEVICES = int(os.environ.get("DEVICES", "1000"))
DESCRIPTORS = 18
"""Of a device with a front end, four running queues, and a host."""
QUIET_SECONDS = 10
TOTAL = 1 << 27
PIECE = 32768
NAME = "org.test.0"


class Place:
    """The sockets of a daemon with ``count`` devices."""

    def __init__(self, directory, count):
        allowed = (resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 100) // DESCRIPTORS
        if count > allowed:
            pytest.skip(f"{count} devices have more descriptors than a process may have: ulimit -n")
        self.directory = directory
        self.directory.mkdir()
        self.names = [f"vm{number}" for number in range(count)]

    @contextlib.contextmanager
    def serving(self, max_ports=2):
        names = self.directory / "names"
        names.write_text("\n".join(self.names))
        with daemon(
            *("--vms", names, "--socket-path", self.directory / "{vm}", "--log-level", "error"),
            *("--chardev", f"socket,id=c0,path={self.directory}/{{vm}}-host,server=on,wait=off"),
            *("--device", f"virtio-serial,max_ports={max_ports}"),
            *("--device", f"virtserialport,chardev=c0,name={NAME}"),
        ) as process:
            wait_for(self.vms[-1].exists, "the last of them is served")
            wait_for(lambda: sleeps(process.pid), "it has nothing to do")
            yield process

    @property
    def vms(self):
        return [self.directory / name for name in self.names]

    @property
    def hosts(self):
        return [self.directory / f"{name}-host" for name in self.names]


def sleeps(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def private_kib(pid):
    """Memory that no other process has, in KiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:"))


def wake_ups(pid):
    """How often threads of a process have gone to sleep, or have been interrupted, since it began."""
    tasks = [(task / "status").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return sum(int(line.split()[1]) for task in tasks for line in task.splitlines() if "ctxt_switches" in line)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("max_ports", [2, 31])
@pytest.mark.parametrize("guests", [False, True], ids=["waiting", "running"])
def test_memory(benchmark, tmp_path, guests, max_ports):
    """A device that waits for its machine, and one with four running queues and an open port."""
    found = {}

    def measure():
        for count in (1, DEVICES):
            place = Place(tmp_path / str(count), count)
            with place.serving(max_ports) as process, contextlib.ExitStack() as stack:
                if guests:
                    stack.enter_context(grazing(place.vms))
                    wait_for(lambda pid=process.pid: sleeps(pid), "it has nothing to do")
                found[count] = private_kib(process.pid)

    benchmark.pedantic(measure, rounds=1)
    each = (found[DEVICES] - found[1]) / (DEVICES - 1)
    state = "with a running guest" if guests else "without a front end"
    what = f"memory of an idle device of {max_ports} ports {state}"
    record(benchmark, Figure(what, each, "lower", unit="KiB", goal=at_most(64)))
    record_point(
        benchmark, series=state, x=max_ports, x_label="ports", y={"vsport": each}, y_label="KiB for each idle device"
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize("guests", [False, True], ids=["waiting", "running"])
def test_sleep(benchmark, tmp_path, guests):
    """Who sleeps makes no system call."""
    place = Place(tmp_path / "many", DEVICES)
    with place.serving() as process, contextlib.ExitStack() as stack:
        if guests:
            stack.enter_context(grazing(place.vms))
            wait_for(lambda: sleeps(process.pid), "it has nothing to do")
        before = wake_ups(process.pid)
        benchmark.pedantic(time.sleep, args=[QUIET_SECONDS], rounds=1)
        count = wake_ups(process.pid) - before
    state = "with running guests" if guests else "without front ends"
    what = f"wake-ups of {DEVICES} devices {state} in {QUIET_SECONDS} s"
    record(benchmark, Figure(what, count, "lower", goal=at_most(0)))


class Busy(contextlib.ExitStack):
    """The first machine of a place, whose guest sends as fast as it can."""

    def __init__(self, place):
        super().__init__()
        self.place = place

    def __enter__(self):
        self.machine = self.enter_context(Machine(self.place.vms[0]))
        self.host = self.enter_context(connect(self.place.hosts[0]))
        self.host.setblocking(False)
        self.port = self.machine.port(NAME)
        self.machine.loop.watch(self.host.fileno(), READ, lambda _: None)
        return self

    def send(self):
        """TOTAL bytes to the host."""
        piece, sent, received = bytes(PIECE), 0, 0
        while received < TOTAL:
            with contextlib.suppress(BlockingIOError):
                while sent < TOTAL:
                    sent += self.port.write(piece)
            self.machine.loop.run_once(0.1)
            with contextlib.suppress(BlockingIOError):
                while received < sent:
                    received += len(self.host.recv(1 << 18))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("idle", [0, DEVICES // 10, DEVICES])
def test_a_busy_device_beside_idle_ones(benchmark, tmp_path, idle):
    with contextlib.ExitStack() as stack:
        contenders = []
        for place in (Place(tmp_path / "alone", 1), Place(tmp_path / "beside", 1 + idle)):
            stack.enter_context(place.serving())
            stack.enter_context(grazing(place.vms[1:]))
            contenders.append(stack.enter_context(Busy(place)))
        alone, beside = contenders
        speeds = compare(
            benchmark,
            beside.send,
            alone.send,
            against="alone",
            rounds=15,
            work=TOTAL,
            goal=at_least(0.95),
            what=f"speed of a busy device beside {idle} idle ones",
        )
    record_point(
        benchmark,
        series="a busy device beside idle ones",
        x=idle,
        x_label="idle devices",
        y=speeds,
        y_label="bytes per second",
    )
