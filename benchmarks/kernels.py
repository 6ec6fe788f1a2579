"""A real kernel on a device that goes from process to process, and hosts that talk with a program in its guest."""

import contextlib
import itertools
import re
import select
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vsport.lab import Guest, LabError, Tree, default_directory
from vsport.lab.daemon import daemon
from vsport.lab.run import tied_to_us

PATIENCE = 60.0
ECHO = """
import os, select, sys
ports = {os.open(f"/dev/virtio-ports/{name}", os.O_RDWR | os.O_NONBLOCK): b"" for name in sys.argv[1:]}
poll = select.poll()
for fd in ports:
    poll.register(fd, select.POLLIN)
print("open", flush=True)
while True:
    for fd, ready in poll.poll():
        try:
            if ready & select.POLLIN and not ports[fd]:
                ports[fd] = os.read(fd, 65536)
            if ports[fd]:
                ports[fd] = ports[fd][os.write(fd, ports[fd]):]
        except BlockingIOError:
            pass
        poll.modify(fd, select.POLLOUT if ports[fd] else select.POLLIN)
"""
"""A guest's program: what it reads from a port goes back to that port."""
TAKER = """
import sys, time
from vsport import cli, handover

resume = handover.Cargo.resume

def timed(self):
    began = time.monotonic_ns()
    resume(self)
    print(f"resumed at {began}", file=sys.stderr, flush=True)

handover.Cargo.resume = timed
sys.exit(cli.main(["serve", *sys.argv[1:]]))
"""
"""The real thing, but that it says when it goes on: of the clock that all processes share, in nanoseconds."""
_SAYS = re.compile(r"resumed at (\d+)\n.*the device was paused for ([\d.]+) ms", re.S)
_PIECE = bytes(1 << 14)
_UNANSWERED_MAX = 1 << 17


def lab_tree():
    """The tree that guests boot from; skips the benchmark where there is none."""
    tree = default_directory() / "tree"
    try:
        Tree(tree).check()
    except LabError as exc:
        pytest.skip(str(exc))
    return tree


class Hosts(threading.Thread):
    """Programs on the host, one a port, that send and take what comes back.

    Each sends a byte and waits for it, again and again, or with ``flood`` as much as the port takes. ``answers``:
    when something came in, in nanoseconds of time.monotonic_ns().
    """

    def __init__(self, paths, *, flood):
        super().__init__(daemon=True)
        self.answers = []
        self.received = 0
        self.silent = False
        """Whether they only take what is still on its way."""
        self._piece = _PIECE if flood else b"!"
        self._most = _UNANSWERED_MAX if flood else 1
        self._unanswered = {}
        self._ending = False
        for path in paths:
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(str(path))
            sock.setblocking(False)
            self._unanswered[sock] = 0

    def run(self):
        poll = select.poll()
        by_fd = {sock.fileno(): sock for sock in self._unanswered}
        while not self._ending:
            for fd, sock in by_fd.items():
                sends = not self.silent and self._unanswered[sock] < self._most
                poll.register(fd, select.POLLIN | (select.POLLOUT if sends else 0))
            for fd, ready in poll.poll(10):
                if ready & select.POLLIN:
                    self._take(by_fd[fd])
                if ready & select.POLLOUT:
                    self._send(by_fd[fd])

    def _take(self, sock):
        data = sock.recv(1 << 18)
        assert data, "a handover was noticed"
        self.answers.append(time.monotonic_ns())
        self.received += len(data)
        self._unanswered[sock] -= len(data)

    def _send(self, sock):
        with contextlib.suppress(BlockingIOError):
            self._unanswered[sock] += sock.send(self._piece)

    def close(self):
        self._ending = True
        self.join()
        for sock in self._unanswered:
            sock.close()


class Succession(contextlib.ExitStack):
    """A guest whose device goes from process to process, with an echo in it.

    ``hosts`` is what its hosts do: "quiet", "talk" or "flood".
    """

    def __init__(self, kind, directory, hosts, ports=4):
        super().__init__()
        self.kind = kind
        self.directory = Path(directory)
        self.names = [f"org.test.{number}" for number in range(1, ports + 1)]
        self.what = hosts
        self.pauses = []
        """In milliseconds, as each process says."""
        self.answered = []
        """Milliseconds from when each process went on to the first answer."""
        self._numbers = itertools.count(1)

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self._begin(stack)
            self.push(stack.pop_all())
        return self

    def _begin(self, stack):
        tree = lab_tree()
        vm, self.offer = self.directory / "vm", self.directory / "offer"
        options = ["--handover", str(self.offer)]
        for number, name in enumerate(self.names, start=1):
            options += ["--chardev", f"socket,id=c{number},path={self.directory}/{number},server=on,wait=off"]
            options += ["--device", f"virtserialport,chardev=c{number},name={name}"]
        self._processes = stack.enter_context(contextlib.ExitStack())  # they outlive the guest
        self.process = self._processes.enter_context(daemon(vm, options, self.directory / "log0"))
        guest = stack.enter_context(Guest(self.kind, tree=tree, socket_path=vm, ports=self.names))
        program = stack.enter_context(guest.popen(["python3", "-c", ECHO, *self.names]))
        assert program.stdout.readline() == b"open\n", program.stderr.read()
        paths = [self.directory / str(number) for number in range(1, len(self.names) + 1)]
        self.hosts = Hosts(paths, flood=self.what == "flood")
        stack.callback(self.hosts.close)
        self.hosts.start()
        self._wait(lambda: self.hosts.received > 100, "the guest answers")
        self.hosts.silent = True

    def hand_over(self):
        """The next process has the device when this returns, and the one before has ended."""
        log = self.directory / f"log{next(self._numbers)}"
        self.hosts.silent = self.what == "quiet"
        arguments = ["--takeover", self.offer, "--handover", self.offer, "--log-level", "info"]
        before, self.process = self.process, self._start(arguments, log)
        self._wait(lambda: before.poll() is not None, "the process before ends")
        assert before.returncode == 0, log.read_text()
        self._wait(lambda: _SAYS.search(log.read_text()), "the new process says that it has taken over")
        resumed, paused = _SAYS.search(log.read_text()).groups()
        self.pauses.append(float(paused))
        if not self.hosts.silent:
            self._wait(lambda: self.hosts.answers[-1] > int(resumed), "the guest answers")
            first = next(at for at in self.hosts.answers if at > int(resumed))
            self.answered.append((first - int(resumed)) / 1e6)
            del self.hosts.answers[:-1]
            self.hosts.silent = True

    def _start(self, arguments, log):
        with log.open("wb") as output:
            process = subprocess.Popen(
                tied_to_us([sys.executable, "-c", TAKER, *map(str, arguments)]),
                stdin=subprocess.DEVNULL,
                stderr=output,
                start_new_session=True,
            )
        self._processes.callback(process.wait)
        self._processes.callback(process.terminate)
        return process

    def _wait(self, condition, what):
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, what
            time.sleep(0.005)
