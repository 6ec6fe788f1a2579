"""How long does a device stand still when another process takes over? Floor: its descriptors sent to a process."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributions import tell
from floors import record_ratio

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from daemons import PATIENCE, Conversation, Machine, connect, daemon, descriptors, running, wait_for

HANDOVERS = int(os.environ.get("HANDOVERS", "20"))
PORTS = 4
PAUSED = re.compile(rb"the device was paused for ([\d.]+) ms")

TAKER = """
import os, socket, sys
sock = socket.socket(fileno=int(sys.argv[1]))
while True:
    data, fds, _, _ = socket.recv_fds(sock, 1, 253)
    if not data:
        break
    sock.send(b"%d " % len(fds))
    for fd in fds:
        os.close(fd)
"""
"""Takes descriptors and says how many."""


class Served(contextlib.ExitStack):
    """A device that goes from process to process, while programs in a guest and on the host talk through a port."""

    def __init__(self, directory):
        super().__init__()
        self.offer = directory / "offer"
        self.options = ["--socket-path", directory / "vm", "--handover", self.offer]
        for number in range(1, PORTS + 1):
            self.options += ["--chardev", f"socket,id=c{number},path={directory}/{number},server=on,wait=off"]
            self.options += ["--device", f"virtserialport,chardev=c{number},name=org.test.{number}"]
        self.directory = directory
        self.pauses = []

    def __enter__(self):
        self.process = self.enter_context(daemon(*self.options))
        wait_for(self.offer.exists, "the daemon offers its device")
        machine = self.enter_context(Machine(self.directory / "vm"))
        hosts = [self.enter_context(connect(self.directory / str(number))) for number in range(1, PORTS + 1)]
        ports = [machine.port(f"org.test.{number}") for number in range(1, PORTS + 1)]
        self.talk = Conversation(machine, ports[0], hosts[0])
        return self

    def hand_over(self):
        """The next process has the device when this returns; its pause, in milliseconds, is one more of ``pauses``."""
        before = self.process
        arguments = ["--takeover", self.offer, "--handover", self.offer, "--log-level", "info"]
        self.process = self.enter_context(daemon(*arguments))
        self.talk.until(lambda: before.poll() is not None)
        assert before.returncode == 0
        told = next(found for line in iter(self.process.stderr.readline, b"") if (found := PAUSED.search(line)))
        self.pauses.append(float(told[1]))


@contextlib.contextmanager
def sending(count):
    """A function that sends ``count`` descriptors to another process, which says that it has them: milliseconds."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-c", TAKER, str(theirs.fileno())]
    with ours, running(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL):
        theirs.close()
        ours.settimeout(PATIENCE)

        def send():
            started = time.monotonic_ns()
            socket.send_fds(ours, [b"+"], [ours.fileno()] * count)
            assert ours.recv(10) == b"%d " % count
            return (time.monotonic_ns() - started) / 1e6

        yield send


@pytest.mark.timeout(60 + 3 * HANDOVERS)
def test_handover(benchmark, tmp_path):
    """The time of a round is that of a whole handover, with the start of its process; the pauses are in extra_info."""
    with Served(tmp_path) as served, sending(count := descriptors(served.process)) as send:
        floors = []

        def pair():
            floors.append(send())
            served.hand_over()

        pair()  # warms both up
        floors.clear()
        served.pauses.clear()
        benchmark.pedantic(pair, rounds=HANDOVERS)
        served.talk.check()
    tell(benchmark, "pause", served.pauses)
    record_ratio(benchmark, "pause", served.pauses, floors, against=f"sending {count} descriptors", better="lower")
