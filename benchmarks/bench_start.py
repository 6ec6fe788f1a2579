"""How soon are the programs there? Floors: the import of numpy, and of pyudev, by the same interpreter.

`vsport serve` is ready when it answers its VMM's first message: that is in the socket, which it inherits, before it is
started. `vsport-open --list` is done when it ends; with a lab, once more in a guest.
"""

import importlib.util
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from floors import at_most, in_turns, record_distribution, record_ratio

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from daemons import GET_FEATURES, PATIENCE, daemon, wait_for

from vsport.lab import LabError, Tree, default_directory

ROUNDS = 15
IN_A_GUEST = """
import json, subprocess, sys, time

def took(*command):
    started = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started

contenders = {"ours": ["vsport-open", "--list"], "theirs": ["python3", "-c", "import pyudev"]}
turns = [{name: took(*command) for name, command in contenders.items()} for _ in range(8)]
print(json.dumps({name: [turn[name] for turn in turns[1:]] for name in contenders}))
"""


@pytest.fixture(autouse=True)
def compiled(monkeypatch, tmp_path):
    """As where it is installed: the first, uncounted round compiles modules, and nothing is compiled after that."""
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path / "bytecode"))


def ran(*command):
    subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)


def importing(module):
    """Left out where it is not installed."""
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    return lambda: ran("-c", f"import {module}")


def show(benchmark, found, what, against, goal=None):
    record_ratio(benchmark, what, found["ours"], found["theirs"], against=against, better="lower", goal=goal)
    values = {"vsport": found["ours"], against: found["theirs"]}
    record_distribution(benchmark, series=what, label="seconds", values=values)


def test_serve(benchmark, tmp_path):
    """A device with one port, from exec to the first answer."""
    numpy = importing("numpy")
    chardev = f"socket,id=c0,path={tmp_path}/c0,server=on,wait=off"

    def serve():
        ours, theirs = socket.socketpair()
        ours.settimeout(PATIENCE)
        options = ["--chardev", chardev, "--device", "virtserialport,chardev=c0,name=org.test.0"]
        with ours, theirs:
            ours.sendall(GET_FEATURES)
            started = time.perf_counter()
            with daemon("--fd", theirs.fileno(), *options, pass_fds=[theirs.fileno()]) as process:
                theirs.close()
                assert ours.recv(64)[:4] == GET_FEATURES[:4]
                ready = time.perf_counter() - started
                ours.close()
                assert process.wait(PATIENCE) == 0
        return ready

    found = in_turns(benchmark, ROUNDS, theirs=numpy, ours=serve)
    show(benchmark, found, "vsport serve, until it answers", "import numpy", at_most(3))


def test_serve_many(benchmark, tmp_path):
    """A thousand devices, from exec until the last one is there; for the record."""
    (tmp_path / "names").write_text("\n".join(f"vm{number}" for number in range(1000)))

    def serve(*names):
        started = time.perf_counter()
        options = ["--chardev", f"socket,id=c0,path={tmp_path}/{{vm}}-c0,server=on,wait=off"]
        options += ["--device", "virtserialport,chardev=c0,name=org.test.0", "--log-level", "error"]
        with daemon("--socket-path", tmp_path / "{vm}", *names, *options) as process:
            wait_for((tmp_path / "vm999").exists, "the last one is there")
            ready = time.perf_counter() - started
            process.terminate()
            assert process.wait(PATIENCE) == 0
        return ready

    found = in_turns(
        benchmark, 5, theirs=lambda: serve("--vm", "vm999"), ours=lambda: serve("--vms", tmp_path / "names")
    )
    show(benchmark, found, "vsport serve with 1,000 devices, until the last is there", "one device")


def test_list(benchmark):
    pyudev = importing("pyudev")
    found = in_turns(benchmark, ROUNDS, theirs=pyudev, ours=lambda: ran("-m", "guest_tools", "--list"))
    show(benchmark, found, "vsport-open --list", "import pyudev", at_most(1.5))


@pytest.mark.timeout(120)
def test_list_in_a_guest(benchmark):
    """User Mode Linux, and the interpreter that is there; for the record."""
    try:
        Tree(default_directory() / "tree").check()
    except LabError as exc:
        pytest.skip(str(exc))
    command = [sys.executable, "-m", "vsport", "lab", "run", "--guest", "uml", "--", "python3", "-c", IN_A_GUEST]
    told = []

    def run():
        told.append(subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=100).stdout)

    benchmark.pedantic(run, rounds=1)
    show(benchmark, json.loads(told[-1]), "vsport-open --list in a guest", "import pyudev")
