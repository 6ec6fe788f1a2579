"""A real kernel's device goes from process to process, again and again: its programs and the hosts' notice nothing."""

import concurrent.futures
import contextlib
import inspect
import itertools
import json
import random
import re
import socket
import struct
import threading
import time
import zlib

import pytest

from vsport.lab.daemon import daemon, successor

pytestmark = pytest.mark.lab
PATIENCE = 60.0
HANDOVERS = 200
PORTS = [f"org.test.{number}" for number in range(1, 5)]
QUIET = "org.test.quiet"
AGENT = "org.qemu.guest_agent.0"


class Line:
    """A guest on a device that goes from process to process, and the hosts' sockets."""

    def __init__(self, directory, boot, running, names, manners=""):
        self.directory = directory
        self.offer = directory / "offer"
        self.options = ["--handover", str(self.offer), "--log-level", "info"]
        self._processes = running.enter_context(contextlib.ExitStack())  # they outlive the guest
        self._numbers = itertools.count(1)
        self._pauses = []
        devices = []
        for number, name in enumerate(names, start=1):
            devices += ["--chardev", f"socket,id=c{number},path={directory}/{number},server=on,wait=off"]
            devices += ["--device", f"virtserialport,chardev=c{number},name={name}{manners}"]
        socket_path = directory / "vm"
        log = directory / "log0"
        self.process = self._processes.enter_context(daemon(socket_path, [*devices, *self.options], log))
        self.guest = boot("uml", socket_path=socket_path, ports=names)

    def hand_over(self):
        """The next process has the device when this returns, and the one before has ended with exit code 0."""
        log = self.directory / f"log{next(self._numbers)}"
        self.process = self._processes.enter_context(successor(self.process, self.offer, self.options, log))
        self._pauses.append(log)

    def pauses(self):
        """How long the device stood still, in milliseconds, as the processes themselves tell."""
        said = [re.search(r"the device was paused for ([\d.]+) ms", log.read_text()) for log in self._pauses]
        return [float(found[1]) for found in said]

    def connect(self, number):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE)
        sock.connect(str(self.directory / str(number)))
        return sock


@pytest.fixture
def line(short_path, boot, running):
    """Makes a Line with ports of these names, and with these options more on each."""
    return lambda names, manners="": Line(short_path, boot, running, names, manners)


# -- many bytes ----------------------------------------------------------------------------------------------------


class Records:
    """What goes one way through one port: 64 KiB each, which tell their number and whether they are the last, and have
    a check sum, begun with the way's own ``key``. The guest's program has this class too."""

    SIZE = 1 << 16
    HEADER = struct.Struct("<QII")

    def __init__(self, key):
        self.key = key
        self.count = 0
        self.ended = False
        self._bytes = random.Random(key).randbytes(2 * self.SIZE)
        self._data = bytearray()

    def make(self, last=False):
        """The next record."""
        at = self.count * 977 % self.SIZE
        body = self._bytes[at : at + self.SIZE - self.HEADER.size]
        record = self.HEADER.pack(self.count, last, self._sum(body, last)) + body
        self.count += 1
        self.ended = last
        return record

    def take(self, data):
        """Whatever has arrived: a byte that is missing, or there twice, or elsewhere, makes a wrong number or sum."""
        self._data += data
        while len(self._data) >= self.SIZE:
            number, last, told = self.HEADER.unpack_from(self._data)
            assert not self.ended, "there is more behind the last record"
            assert number == self.count, f"record {number} in place of record {self.count}"
            assert told == self._sum(self._data[self.HEADER.size : self.SIZE], last), f"record {number} is not whole"
            del self._data[: self.SIZE]
            self.count += 1
            self.ended = bool(last)
        assert not (self.ended and self._data), "there is more behind the last record"

    def _sum(self, body, last):
        return zlib.crc32(body, self.key << 24 ^ self.count << 1 ^ last & 1)


STREAM = f"""
import json, random, struct, sys, zlib
from guest_tools import open_port

{inspect.getsource(Records)}

name, *keys = sys.argv[1:]
up, down = map(Records, map(int, keys))
with open_port(name, wait_host=True) as channel:
    print("open", flush=True)
    rest = memoryview(b"")
    while rest or not up.ended or not down.ended:
        data = channel.read_now()
        assert data != b"", "the host has left"
        down.take(data or b"")
        if not rest and not up.ended:
            rest = memoryview(up.make(last=down.ended))
        written = channel.write_now(rest) if rest else 0
        rest = rest[written:]
        if data is None and not written:
            assert channel.host_connected, "the host has left"
            channel.wait(0.01 if channel.refused else None)
print(json.dumps([up.count, down.count]), flush=True)
"""


class Traffic:
    """A program of the guest and a client of the host that send all that the port takes, both ways at once."""

    def __init__(self, line, number, name, ending, threads):
        self.sock = line.connect(number)
        self.up, self.down = Records(2 * number), Records(2 * number + 1)
        command = ["python3", "-c", STREAM, name, str(self.up.key), str(self.down.key)]
        self.program = line.guest.popen(command)
        assert self.program.stdout.readline() == b"open\n", self.program.stderr.read()
        self.work = [threads.submit(self._send, ending), threads.submit(self._receive)]

    def _send(self, ending):
        while not self.down.ended:
            self.sock.sendall(self.down.make(last=ending.is_set()))

    def _receive(self):
        while not self.up.ended:
            data = self.sock.recv(1 << 18)
            assert data, "the guest's side of the socket was closed"
            self.up.take(data)

    def goes_on(self, before):
        """Whether more has come and gone than ``before``. Raises what the threads have raised."""
        for future in self.work:
            if future.done():
                future.result()
        return self.up.count > before[0] and self.down.count > before[1]

    def counts(self):
        return [self.up.count, self.down.count]

    def check(self):
        """All that was sent has arrived, once, in order; and the socket is still open."""
        for future in self.work:
            future.result(PATIENCE)
        assert self.program.wait(PATIENCE) == 0, self.program.stderr.read().decode()
        assert json.loads(self.program.stdout.readline()) == self.counts()
        self.sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            self.sock.recv(1)

    def close(self):
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)  # ends the threads
        self.sock.close()
        self.program.close()


def event(holder):
    """The next thing that vsport-open tells: a host that has left and come back, however fast, is two."""
    return json.loads(holder.stdout.readline())["event"]


def wait_for(condition, what):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


@pytest.mark.timeout(600)
def test_two_hundred_handovers_under_load_lose_repeat_and_reorder_no_byte(line, running):
    """Each direction of each port gets further after each handover. A port without traffic has one session, too."""
    line = line([*PORTS, QUIET])
    holder = running.enter_context(line.guest.popen(["vsport-open", "--hold", QUIET, "--json"]))
    assert event(holder) == "waiting"
    quiet = running.enter_context(line.connect(len(PORTS) + 1))
    assert event(holder) == "host_connected"
    ending = threading.Event()
    threads = running.enter_context(concurrent.futures.ThreadPoolExecutor(2 * len(PORTS)))
    ports = []
    for number, name in enumerate(PORTS, start=1):
        ports.append(running.enter_context(contextlib.closing(Traffic(line, number, name, ending, threads))))
    moved = 0
    for turn in range(HANDOVERS):
        counts = [port.counts() for port in ports]
        line.hand_over()
        moved += sum(map(sum, (port.counts() for port in ports))) - sum(map(sum, counts))
        counts = [port.counts() for port in ports]
        for port, before in zip(ports, counts, strict=True):
            wait_for(lambda port=port, before=before: port.goes_on(before), f"traffic after handover {turn + 1}")
    ending.set()
    for port in ports:
        port.check()
    quiet.close()
    assert event(holder) == "host_left", "a handover was noticed"
    pauses = line.pauses()
    assert len(pauses) == HANDOVERS
    assert moved > HANDOVERS
    total = sum(map(sum, (port.counts() for port in ports)))
    longest = ", ".join(map(str, sorted(pauses)[-5:]))
    print(f"{total} records, {moved} of them while processes took over; the longest pauses: {longest} ms")


# -- an agent ------------------------------------------------------------------------------------------------------


class Agent:
    """The host's side of qemu-ga."""

    def __init__(self, sock):
        self._sock = sock
        self._lines = sock.makefile("rb")

    def ping(self, number):
        """Brings the agent into step, and has it answer."""
        self._say(b"\xff", "guest-sync-delimited", id=number)
        while not (answer := self._lines.readline()).startswith(b"\xff"):
            assert answer, "the agent's side was closed"  # else it complains of the mark, or answers the one before
        assert json.loads(answer[1:]) == {"return": number}
        self._say(b"", "guest-ping")
        assert json.loads(self._lines.readline()) == {"return": {}}

    def _say(self, mark, command, **arguments):
        request = {"execute": command, "arguments": arguments} if arguments else {"execute": command}
        self._sock.sendall(mark + json.dumps(request).encode() + b"\n")

    def close(self):
        self._lines.close()
        self._sock.close()


@pytest.mark.timeout(300)
def test_the_guest_agent_answers_over_the_same_socket_and_the_next_one(line):
    """A handover is no new session for qemu-ga, and a client that comes again is one (R-GUEST-07)."""
    line = line([AGENT])
    numbers = itertools.count(1)
    command = ["qemu-ga", "-m", "virtio-serial", "-p", f"/dev/virtio-ports/{AGENT}", "-t", "/tmp"]
    with line.guest.popen(command) as program:
        for _ in range(50):
            with contextlib.closing(Agent(line.connect(1))) as agent:
                agent.ping(next(numbers))
                line.hand_over()
                agent.ping(next(numbers))
            with contextlib.closing(Agent(line.connect(1))) as agent:
                agent.ping(next(numbers))
        assert program.poll() is None, program.stderr.read()
    assert next(numbers) == 151
    assert len(line.pauses()) == 50


def test_a_session_that_counts_as_new_closes_and_opens_the_port(line):
    """No splice: with on_restore=reopen the kernel's programs see the host leave and another one come."""
    line = line([QUIET], ",on_restore=reopen")
    with line.connect(1) as host, line.guest.popen(["vsport-open", "--hold", QUIET, "--json"]) as holder:
        assert event(holder) == "host_connected"
        for _ in range(5):
            line.hand_over()
            assert [event(holder), event(holder)] == ["host_left", "host_connected"]
        host.sendall(b"still the same socket")
