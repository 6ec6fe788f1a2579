"""A live device goes from process to process: guest and hosts notice a pause, and a taker that fails costs nothing."""

import contextlib
import gc
import json
import os
import re
import resource
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from daemons import (
    PATIENCE,
    Conversation,
    Machine,
    answers,
    connect,
    daemon,
    descriptors,
    running,
    serves,
    wait_for,
)
from hypothesis import given
from hypothesis import strategies as st

from vsport import handover
from vsport.document import DocumentError, Fields
from vsport.errors import HostError
from vsport.host import Host
from vsport.loop import Loop
from vsport.options import parse_configuration
from vsport.parcel import Delivery, Parcel
from vsport.vhost_user.server import Server

NAME = "org.test.0"

TAKER = """
import os, sys
from vsport import cli, handover

moment, number, *arguments = sys.argv[1:]
say, take, take_rest = handover.Takeover._say, handover.Cargo.take, handover.Cargo.take_rest

def at(here):
    if here == moment:
        os.kill(os.getpid(), int(number))

def saying(self, word, **fields):
    say(self, word, **fields)
    at(word)

def drafting(self, *given):
    at("draft")
    take(self, *given)
    at("drafted")

def taking(self, *given):
    at("received")
    take_rest(self, *given)
    at("taken")

handover.Takeover._say, handover.Cargo.take, handover.Cargo.take_rest = saying, drafting, taking
sys.exit(cli.main(["serve", "--takeover", *arguments]))
"""
"""The real thing, but that it sends itself a signal at one moment of the takeover."""

MOMENTS = ["hello", "prepared", "draft", "drafted", "arranged", "received", "taken"]
"""Until 'drafted' the device runs, from 'received' on it stands still."""


@contextlib.contextmanager
def taker(path, moment, number):
    """A process that sends itself signal ``number`` at a moment of its takeover."""
    with running([sys.executable, "-c", TAKER, moment, str(int(number)), str(path)]) as process:
        yield process


@contextlib.contextmanager
def stopped(path, moment):
    """A process that stands still in the middle of its takeover, until it gets SIGCONT."""
    with taker(path, moment, signal.SIGSTOP) as process:
        wait_for(lambda: state(process) == "T", moment)
        yield process


def state(process):
    """What the system says that a process does: "T" if it has been stopped."""
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def why(process):
    """The one line of a process that did not get the device."""
    assert process.wait(PATIENCE) == 1
    said = process.stderr.read().decode()
    assert len(said.splitlines()) == 1, said
    assert said.startswith("vsport serve: cannot take over from /")
    return said


class Setting(contextlib.ExitStack):
    """A daemon that offers its device, a machine that uses it, and two programs that talk through its port."""

    def __init__(self, directory, *more, **options):
        super().__init__()
        self.vm, self.offer, self.chardev = directory / "vm", directory / "handover", directory / "c0"
        self.options = [
            *("--socket-path", self.vm, "--handover", self.offer, "--log-level", "info"),
            *("--chardev", f"socket,id=c0,path={self.chardev},server=on,wait=off"),
            *("--device", f"virtserialport,chardev=c0,name={NAME}"),
            *more,
        ]
        self.process_options = options

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self.daemon = stack.enter_context(daemon(*self.options, **self.process_options))
            wait_for(self.offer.exists, "the daemon offers its device")
            self.machine = stack.enter_context(Machine(self.vm))
            self.host = stack.enter_context(connect(self.chardev))
            self.port = self.machine.port(NAME)
            self.talk = Conversation(self.machine, self.port, self.host)
            self.push(stack.pop_all())
        return self

    def take_over(self, *arguments, **options):
        """A new process takes over from the present one, while the two programs talk."""
        self.is_taken_by(self.enter_context(daemon("--takeover", self.offer, *arguments, **options)))

    def is_taken_by(self, successor):
        before, self.daemon = self.daemon, successor
        self.talk.until(lambda: before.poll() is not None)
        assert before.returncode == 0, before.stderr.read()

    def goes_on(self):
        """The present process has the device, and nobody has noticed a thing."""
        self.talk.flow()
        assert self.daemon.poll() is None

    def ends(self, number=signal.SIGTERM):
        """The present process is told to end: every byte has arrived by then, and no socket file stays behind."""
        self.talk.check()
        self.daemon.send_signal(number)
        assert self.daemon.wait(PATIENCE) == 0
        assert not any(path.exists() for path in (self.vm, self.offer, self.chardev))

    def settled_descriptors(self):
        """How many the present process has, when it has nothing to do but wait."""
        self.talk.check()
        self.talk.flow(1)
        self.talk.check()
        return descriptors(self.daemon)

    def read(self):
        """What the guest's program can read by now."""
        with contextlib.suppress(BlockingIOError):
            return self.port.read(1 << 16)
        return b""


@pytest.fixture
def setting(tmp_path):
    with Setting(tmp_path) as setting:
        yield setting


# -- it goes on ----------------------------------------------------------------------------------------------------


def test_twenty_handovers_in_a_row_lose_and_repeat_no_byte(setting):
    setting.take_over("--handover", setting.offer)
    count = setting.settled_descriptors()
    for _ in range(19):
        setting.take_over("--handover", setting.offer)
        setting.talk.flow(1000)
    assert setting.settled_descriptors() == count
    setting.ends()


def test_both_processes_tell_of_it(setting):
    before = setting.daemon
    setting.take_over("--log-level", "info")
    setting.goes_on()
    assert f"process {setting.daemon.pid} has taken over".encode() in before.stderr.read()
    setting.ends()
    assert re.search(rb"^vsport: taken over; the device was paused for \d+\.\d ms$", setting.daemon.stderr.read(), re.M)


def test_the_next_host_and_the_next_front_end_come_to_the_successor(setting):
    setting.take_over()
    setting.talk.check()
    setting.host.close()
    setting.machine.until(lambda: not setting.port.host_connected)
    with connect(setting.chardev) as host:
        setting.machine.until(lambda: setting.port.host_connected)
        host.sendall(b"hello")
        setting.machine.until(lambda: setting.read() == b"hello")
        assert setting.port.host_history == [True, False, True]
    setting.machine.close()
    wait_for(lambda: serves(setting.vm), "the successor serves the next front end")


def test_nothing_that_happens_in_the_pause_is_slept_through(setting):
    """A host that leaves and the next one that comes, and what the guest and both hosts say."""
    with stopped(setting.offer, "taken") as successor:
        setting.port.write(b"to the first host")
        setting.host.sendall(b"last words")
        setting.host.shutdown(socket.SHUT_WR)
        with connect(setting.chardev) as second:
            second.sendall(b"first words")
            successor.send_signal(signal.SIGCONT)
            setting.machine.until(lambda: setting.read() == b"last words")
            assert setting.host.recv(100) == b"to the first host"
            setting.machine.until(lambda: setting.port.host_history == [True, False, True])
            setting.machine.until(lambda: setting.read() == b"first words")
            setting.port.write(b"to the second host")
            assert second.recv(100) == b"to the second host"
        assert setting.daemon.wait(PATIENCE) == 0


def test_a_device_without_front_end_and_host_can_be_taken_over(tmp_path):
    vm, offer, chardev = tmp_path / "vm", tmp_path / "handover", tmp_path / "c0"
    options = ["--chardev", f"socket,id=c0,path={chardev},server=on,wait=off", "--device", "virtserialport,chardev=c0"]
    with daemon("--socket-path", vm, "--handover", offer, *options) as first:
        wait_for(offer.exists, "it offers its device")
        with daemon("--takeover", offer, "--handover", offer) as second:
            assert first.wait(PATIENCE) == 0
            with daemon("--takeover", offer) as third:
                assert second.wait(PATIENCE) == 0
                wait_for(lambda: not offer.exists(), "the last one does not offer it")
                assert serves(vm)
                connect(chardev).close()
                third.terminate()
                assert third.wait(PATIENCE) == 0
    assert not vm.exists()
    assert not chardev.exists()


def test_an_inherited_connection_goes_on_and_its_end_is_the_end(tmp_path):
    """--fd N: there is nothing to wait for after this front end."""
    ours, theirs = socket.socketpair()
    offer = tmp_path / "handover"
    with ours, theirs, daemon("--fd", theirs.fileno(), "--handover", offer, pass_fds=[theirs.fileno()]) as first:
        theirs.close()
        ours.settimeout(PATIENCE)
        wait_for(offer.exists, "it offers its device")
        with daemon("--takeover", offer) as second:
            assert first.wait(PATIENCE) == 0
            assert answers(ours)
            ours.close()
            assert second.wait(PATIENCE) == 0


def test_each_kind_of_chardev_goes_on(tmp_path):
    for name in ("p.in", "p.out"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "in").write_bytes(b"from a file")
    chardevs = [
        "socket,host=127.0.0.1,port=0,server=on,wait=off",
        f"pty,path={tmp_path}/pty",
        f"pipe,path={tmp_path}/p",
        f"file,path={tmp_path}/out,input-path={tmp_path}/in",
        f"stdio,logfile={tmp_path}/log",
        "null",
        "ringbuf",
    ]
    options = []
    for number, chardev in enumerate(chardevs, start=1):
        kind, _, rest = chardev.partition(",")
        options += ["--chardev", f"{kind},id=x{number},{rest}".rstrip(",")]
        options += ["--device", f"virtserialport,chardev=x{number},name=x{number}"]
    stdin, to_stdin = os.pipe()
    from_stdout, stdout = os.pipe()
    with Setting(tmp_path, *options, stdin=stdin, stdout=stdout) as setting:
        os.close(stdin)
        os.close(stdout)
        told = iter(setting.daemon.stderr.readline, b"")
        address = next(line for line in told if b"chardev x1 is tcp:" in line).split(b":")[-1].partition(b",")[0]
        tcp = setting.enter_context(socket.create_connection(("127.0.0.1", int(address))))
        terminal = os.open(tmp_path / "pty", os.O_RDWR | os.O_NOCTTY)
        fifos = os.open(tmp_path / "p.out", os.O_RDONLY | os.O_NONBLOCK), os.open(tmp_path / "p.in", os.O_WRONLY)
        os.set_blocking(fifos[0], True)
        ends = {
            "x1": (tcp.fileno(), tcp.fileno()),
            "x2": (terminal, terminal),
            "x3": fifos,
            "x5": (from_stdout, to_stdin),
        }
        ports = {f"x{number}": setting.machine.port(f"x{number}") for number in range(1, len(chardevs) + 1)}
        for turn in range(3):
            word = b"turn %d" % turn
            for port in ports.values():
                assert port.write(word) == len(word)
            for name, (source, sink) in ends.items():
                os.write(sink, word)
                assert os.read(source, 100) == word
                assert read(setting.machine, ports[name], len(word)) == word
            setting.take_over("--handover", setting.offer, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        assert read(setting.machine, ports["x4"], 11) == b"from a file"
        said = b"turn 0turn 1turn 2"
        setting.machine.until(lambda: (tmp_path / "out").read_bytes() == said)
        assert (tmp_path / "log").read_bytes() == said
        assert {name: port.host_history for name, port in ports.items()} == {name: [True] for name in ports}
        setting.ends()
        assert not (tmp_path / "pty").is_symlink()
        for fd in (terminal, *fifos, from_stdout, to_stdin):
            os.close(fd)


def read(machine, port, size):
    """What a program in the guest reads, waiting until it is ``size`` bytes."""
    data = bytearray()

    def enough():
        with contextlib.suppress(BlockingIOError):
            data.extend(port.read(1 << 16))
        return len(data) >= size

    machine.until(enough)
    return bytes(data)


def test_more_descriptors_go_along_than_fit_into_a_message(tmp_path):
    options = ["--device", "virtio-serial,max_ports=100"]
    for number in range(2, 100):
        options += ["--device", f"virtserialport,name=p{number}"]
    with Setting(tmp_path, *options) as setting:
        setting.machine.until(lambda: len(setting.machine.guest.ports) == 99)
        for _ in range(2):
            setting.take_over("--handover", setting.offer)
            setting.goes_on()
        assert descriptors(setting.daemon) > 600
        setting.ends()


def test_relative_paths_mean_the_same_in_another_directory(tmp_path):
    options = ["--chardev", "socket,id=c0,path=c0,server=on,wait=off", "--device", "virtserialport,chardev=c0"]
    (tmp_path / "elsewhere").mkdir()
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    with daemon("--socket-path", "vm", "--handover", "offer", *options, cwd=tmp_path, env=environment) as first:
        wait_for((tmp_path / "offer").exists, "it offers its device")
        arguments = ["--takeover", "../offer", "--handover", "offer"]
        with daemon(*arguments, cwd=tmp_path / "elsewhere", env=environment) as second:
            assert first.wait(PATIENCE) == 0
            wait_for((tmp_path / "elsewhere" / "offer").exists, "the second one offers it in its own directory")
            assert serves(tmp_path / "vm")
            second.terminate()
            assert second.wait(PATIENCE) == 0
            assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["elsewhere"]


def test_a_host_of_which_the_guest_has_not_heard_is_announced_by_the_successor(tmp_path):
    """It had come a moment before, and waited for its turn (R-CON-36)."""
    configuration = parse_configuration(
        [f"socket,id=c0,path={tmp_path}/c0,server=on,wait=off"], ["virtserialport,chardev=c0,nr=1"]
    )
    with contextlib.closing(Loop()) as loop:
        before, after = Host(loop, configuration), Host(loop, configuration)
        with contextlib.closing(before), contextlib.closing(after):
            before.open()
            with connect(tmp_path / "c0"):
                assert loop.run_until(before.with_peers, PATIENCE)
                parcel = Parcel()
                state = Fields("chardevs", before.give(parcel))
                after.take(state, Delivery([os.dup(fd) for fd in parcel.fds]))
                before.release()
                assert after.with_peers() == {1}
                assert not after.device.ports[1].state.host_connected
                after.announce()
                assert not after.device.ports[1].state.host_connected  # the one before may have left just now
                assert loop.run_until(lambda: after.device.ports[1].state.host_connected, PATIENCE)
            assert loop.run_until(lambda: not after.device.ports[1].state.host_connected, PATIENCE)


def test_what_a_chardev_holds_itself_comes_along():
    options = ["ringbuf,id=c0"], ["virtserialport,chardev=c0,nr=1"]
    with contextlib.ExitStack() as stack:
        loop = stack.enter_context(contextlib.closing(Loop()))
        hosts = [stack.enter_context(contextlib.closing(Host(loop, parse_configuration(*options)))) for _ in range(2)]
        before, after = (handover.Cargo(host, Server(host.device, loop), *options) for host in hosts)
        before.host.open()
        before.host.chardevs["c0"].write(memoryview(b"not read yet"))
        parcel = Parcel()
        draft, rest = Fields("draft", before.give(parcel)), Fields("rest", before.give_rest())
        after.take(draft, Delivery([]))
        after.take_rest(rest, before.host.device.snapshot())
        draft.end()
        rest.end()
        before.release()
        assert after.host.chardevs["c0"].read(100) == b"not read yet"


# -- drafts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [1, handover.DRAFTS - 1, handover.DRAFTS])
def test_a_draft_that_is_out_of_date_is_made_anew(setting, changes):
    """After the last one the device is suspended anyway: a taker is not kept waiting by a device that changes."""
    with stopped(setting.offer, "drafted") as successor:
        made = 0
        while state(successor) == "T":
            if made < changes:
                made += 1
                setting.host.close()
                setting.machine.until(lambda: not setting.port.host_connected)
                setting.host = setting.enter_context(connect(setting.chardev))
                setting.machine.until(lambda: setting.port.host_connected)
                setting.host.sendall(b"%d" % made)
                setting.machine.until(lambda made=made: setting.read() == b"%d" % made)
            successor.send_signal(signal.SIGCONT)
            setting.machine.until(lambda: state(successor) == "T" or setting.daemon.poll() is not None)
        assert setting.daemon.wait(PATIENCE) == 0
        assert made == changes
        setting.port.write(b"to the last host")
        setting.host.settimeout(PATIENCE)
        assert setting.host.recv(100) == b"to the last host"
        assert setting.port.host_history == [True, *[False, True] * made]


def test_the_device_runs_until_the_taker_has_made_what_a_draft_describes(setting):
    with stopped(setting.offer, "drafted") as successor:
        setting.talk.flow()
        successor.send_signal(signal.SIGCONT)
        setting.is_taken_by(successor)
        setting.goes_on()
        setting.ends()


def test_a_device_whose_ports_are_others_is_refused_before_it_is_paused(setting):
    """The taker was told the same options, and has made something else of them."""
    other = """
import sys
from vsport import cli, vm
parse = vm.parse_configuration
def parse_more(chardevs, devices):
    return parse(chardevs, [*devices, "virtserialport,nr=7"])
vm.parse_configuration = parse_more
sys.exit(cli.main(["serve", "--takeover", sys.argv[1]]))
"""
    with running([sys.executable, "-c", other, str(setting.offer)]) as process:
        assert process.wait(PATIENCE) == 1
        said = process.stderr.read().decode()
    assert said.startswith("vsport serve: cannot take over from /")
    assert "7 is too much" in said
    setting.goes_on()
    setting.ends()


def test_collecting_garbage_waits_for_the_end_of_the_pause():
    assert gc.isenabled()
    with pytest.raises(HostError), handover._undisturbed():
        assert not gc.isenabled()
        raise HostError("it went wrong")
    assert gc.isenabled()


# -- the taker fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_taker_that_ends_before_it_is_ready_costs_nothing(setting, moment, number):
    count = setting.settled_descriptors()
    with taker(setting.offer, moment, number) as process:
        setting.talk.until(lambda: process.poll() is not None)
    setting.goes_on()
    wait_for(lambda: descriptors(setting.daemon) == count, "nothing is left open")
    setting.ends()
    assert b"no handover to process %d: " % process.pid in setting.daemon.stderr.read()


@pytest.mark.parametrize("moment", ["received", "taken"])
def test_a_taker_that_is_ready_when_the_giver_has_lost_patience_does_not_get_it(setting, moment):
    with stopped(setting.offer, moment) as process:
        setting.goes_on()
        process.send_signal(signal.SIGCONT)
        assert "no answer came in time" in why(process)
    setting.goes_on()
    setting.take_over()
    setting.ends()


def test_a_giver_that_stood_still_itself_sees_that_it_was_taken(setting):
    """Its patience ran out, and ready had been said in time: the device is the other's."""
    with stopped(setting.offer, "received") as successor:
        setting.daemon.send_signal(signal.SIGSTOP)
        time.sleep(handover.STEP_SECONDS + 0.1)  # nothing can be waited for: this is about the time
        successor.send_signal(signal.SIGCONT)
        setting.talk.flow()
        setting.daemon.send_signal(signal.SIGCONT)
        assert setting.daemon.wait(PATIENCE) == 0


def test_a_taker_that_cannot_offer_it_in_turn_says_so_before_the_device_is_paused(setting, tmp_path):
    with daemon("--takeover", setting.offer, "--handover", tmp_path / "no" / "where") as process:
        assert "No such file or directory" in why(process)
    setting.goes_on()
    setting.ends()
    assert b"no/where: No such file or directory; going on" in setting.daemon.stderr.read()


def test_a_taker_that_may_not_have_so_many_descriptors_says_how_to_change_that(setting):
    def limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))

    with daemon("--takeover", setting.offer, preexec_fn=limit) as process:
        assert "raise its limit (ulimit -n)" in why(process)
    setting.goes_on()
    setting.ends()


def test_of_two_takers_at_once_one_gets_it_and_the_other_is_told(setting):
    takers = [setting.enter_context(daemon("--takeover", setting.offer)) for _ in range(2)]
    setting.talk.until(lambda: any(process.poll() is not None for process in takers))
    loser, winner = sorted(takers, key=lambda process: process.poll() is None)
    why(loser)
    setting.is_taken_by(winner)
    setting.goes_on()
    setting.ends()


def test_takers_in_a_queue_that_offer_it_on_get_it_one_after_another(setting):
    takers = [setting.enter_context(daemon("--takeover", setting.offer, "--handover", setting.offer)) for _ in range(4)]
    setting.talk.until(lambda: sum(process.poll() is None for process in [setting.daemon, *takers]) == 1)
    assert {process.poll() for process in [setting.daemon, *takers]} == {0, None}
    setting.daemon = next(process for process in takers if process.poll() is None)
    setting.goes_on()
    setting.ends()


@pytest.mark.parametrize("place", ["nowhere", "plain", "dead"])
def test_a_path_at_which_nobody_offers_a_device_is_one_line(setting, tmp_path, place):
    (tmp_path / "plain").touch()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead"))
    with daemon("--takeover", tmp_path / place) as process:
        why(process)
    setting.talk.check()


def test_a_process_that_is_no_giver_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(handover, "_TURN_SECONDS", 0.1)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "s"))
        silent.listen()
        with (
            pytest.raises(HostError, match=r"cannot take over from /.*/s: no answer came in time"),
            handover.Takeover(str(tmp_path / "s")) as takeover,
        ):
            takeover.configuration()


# -- strangers -----------------------------------------------------------------------------------------------------


def word(say, **fields):
    document = json.dumps({"say": say, **fields}).encode()
    return struct.pack("<4sIII", b"vsHO", len(document), 0, 0) + document


HELLO = word("hello", version=handover.VERSION)
PREPARED = [HELLO, word("prepared")]
ARRANGED = [*PREPARED, word("arranged")]
NONSENSE = {
    "noise": [os.urandom(4096)],
    "http": [b"GET / HTTP/1.1\r\n\r\n"],
    "empty": [b""],
    "half a header": [HELLO[:7]],
    "half a word": [HELLO[:-3]],
    "no word": [struct.pack("<4sIII", b"vsHO", 0, 0, 0)],
    "endless": [struct.pack("<4sIII", b"vsHO", 2**32 - 1, 2**32 - 1, 2**32 - 1)],
    "descriptors": [struct.pack("<4sIII", b"vsHO", 2, 0, 3) + b"{}"],
    "no json": [struct.pack("<4sIII", b"vsHO", 3, 0, 0) + b"{[}"],
    "deep json": [struct.pack("<4sIII", b"vsHO", 60000, 0, 0) + b"[" * 60000],
    "a list": [struct.pack("<4sIII", b"vsHO", 2, 0, 0) + b"[]"],
    "no version": [word("hello")],
    "surplus": [word("hello", version=handover.VERSION, more=1)],
    "version 99": [word("hello", version=99)],
    "version one": [word("hello", version="1")],
    "unasked": [word("prepared")],
    "ready at once": [word("ready")],
    "twice": [HELLO, HELLO],
    "ready too soon": [HELLO, word("ready")],
    "a surplus in prepared": [HELLO, word("prepared", yes=True)],
    "a refusal": [HELLO, word("refused", why="the\nmoon is \x1b[31mfull" * 100)],
    "a refusal without a reason": [HELLO, word("refused", why="")],
    "a refusal of the draft": [*PREPARED, word("refused", why="I do not like it")],
    "noise for arranged": [*PREPARED, os.urandom(100)],
    "ready for arranged": [*PREPARED, word("ready")],
    "prepared twice": [*PREPARED, word("prepared")],
    "a surplus in arranged": [*PREPARED, word("arranged", yes=True)],
    "a refusal of the state": [*ARRANGED, word("refused", why="I do not like it")],
    "noise for ready": [*ARRANGED, os.urandom(100)],
    "hello for ready": [*ARRANGED, HELLO],
    "half of ready": [*ARRANGED, word("ready")[:-1]],
    "a surplus in ready": [*ARRANGED, word("ready", yes=True)],
}


def heard(sock):
    """What was said until the other side hung up."""
    said = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(1 << 16):
            said += data
    return bytes(said)


def listen_once(sock):
    """Reads the word that comes now, as far as needed to go on."""
    assert sock.recv(1 << 20)


@pytest.mark.parametrize("said", NONSENSE.values(), ids=list(NONSENSE))
def test_nonsense_costs_nothing(setting, said):
    count = setting.settled_descriptors()
    with connect(setting.offer) as stranger:
        for number, message in enumerate(said):
            if number:
                listen_once(stranger)
            stranger.sendall(message)
        stranger.shutdown(socket.SHUT_WR)
        heard(stranger)
    setting.goes_on()
    wait_for(lambda: descriptors(setting.daemon) == count, "nothing is left open")
    setting.take_over()
    setting.ends()


def test_another_version_is_told_which_one_is_spoken(setting):
    with connect(setting.offer) as stranger:
        stranger.sendall(word("hello", version=99))
        assert b"the old process speaks version 2 of this, and the new one version 99" in heard(stranger)
    setting.goes_on()


def test_a_silent_stranger_pauses_nothing_and_keeps_a_taker_waiting_for_a_while_only(setting):
    with connect(setting.offer) as silent:
        setting.goes_on()
        setting.take_over("--handover", setting.offer)
        assert b"no answer came in time" in heard(silent)
    setting.goes_on()
    setting.ends()


def test_the_socket_is_the_users_own(setting):
    assert stat.S_IMODE(setting.offer.stat().st_mode) == 0o600
    setting.take_over("--handover", setting.offer.with_name("other"))
    assert not setting.offer.exists()
    assert stat.S_IMODE(setting.offer.with_name("other").stat().st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_another_user_gets_nothing_even_if_the_socket_lets_him_in():
    stranger = """
import socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
print(sock.recv(4096).decode(errors="replace"))
"""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        with Setting(Path(directory)) as setting:
            command = [sys.executable, "-c", stranger, str(setting.offer)]
            for mode, told in (
                (0o600, b"Permission denied"),
                (0o666, b"no device goes between a process of user 0 and one of user 65534"),
            ):
                setting.offer.chmod(mode)
                done = subprocess.run(
                    ["setpriv", "--reuid=65534", "--clear-groups", *command], capture_output=True, check=False, cwd="/"
                )
                assert told in done.stdout + done.stderr
                assert b"configuration" not in done.stdout
            setting.goes_on()


# -- the giver fails, or ends ------------------------------------------------------------------------------------------


def test_a_fault_of_ours_in_the_pause_costs_nothing_either(tmp_path):
    faulty = """
import sys
from vsport import cli, handover
def give(self, parcel):
    parcel.add(0)
    return {}["gone"]
handover.Cargo.give = give
sys.exit(cli.main(["serve", *sys.argv[1:]]))
"""
    vm, offer = tmp_path / "vm", tmp_path / "offer"
    with running([sys.executable, "-c", faulty, "--socket-path", str(vm), "--handover", str(offer)]) as giver:
        wait_for(offer.exists, "it offers its device")
        with daemon("--takeover", offer) as process:
            assert "'gone'" in why(process)
        assert serves(vm)
        giver.terminate()
        assert giver.wait(PATIENCE) == 0
        said = giver.stderr.read()
        assert said.startswith(b"vsport: no handover to process %d: 'gone'; going on" % process.pid)
        assert b"KeyError" in said


def test_a_giver_that_is_told_to_end_before_the_pause_ends(setting):
    with connect(setting.offer) as waiting:
        waiting.sendall(HELLO)
        listen_once(waiting)
        setting.ends()
        assert heard(waiting) == b""


def test_a_taker_whose_giver_ends_before_the_pause_says_so(setting):
    with stopped(setting.offer, "hello") as process:
        setting.ends()
        process.send_signal(signal.SIGCONT)
        assert "the other process has closed the connection" in why(process)


def test_a_giver_that_is_told_to_end_in_the_pause_hands_over_first(setting):
    with stopped(setting.offer, "received") as successor:
        setting.daemon.terminate()
        successor.send_signal(signal.SIGCONT)
        setting.is_taken_by(successor)
        setting.goes_on()
        setting.ends()


def test_a_giver_that_is_told_to_end_in_the_pause_ends_if_the_taker_fails(setting):
    setting.talk.check()
    with stopped(setting.offer, "taken") as process:
        setting.daemon.terminate()
        process.kill()
        assert setting.daemon.wait(PATIENCE) == 0
    assert not any(path.exists() for path in (setting.vm, setting.offer, setting.chardev))


# -- who has it ----------------------------------------------------------------------------------------------------


def test_ready_that_was_said_in_time_counts_however_late_it_is_read():
    here, there = socket.socketpair()
    with here, there:
        there.sendall(word("ready"))
        handover._wait_for_ready(here, time.monotonic() - 1)


@pytest.mark.parametrize("said", [b"", word("ready")[:-1]])
def test_ready_that_was_not_said_in_time_cannot_be_said_any_more(said):
    here, there = socket.socketpair()
    with here, there:
        there.sendall(said)
        with pytest.raises(TimeoutError):
            handover._wait_for_ready(here, time.monotonic() + 0.01)
        with pytest.raises(BrokenPipeError):
            there.sendall(word("ready")[-1:])


# -- messages ------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_make_a_word_or_a_document_error(data, framed):
    if framed:
        data = struct.pack("<4sIII", b"vsHO", len(data), 0, 0) + data
    here, there = socket.socketpair()
    with here, there:
        here.sendall(data)
        here.close()
        inbox = handover._Inbox(handover._SHORT)
        try:
            while not inbox.receive(there):
                pass
            assert inbox.message().word in data.decode()
        except (DocumentError, EOFError):
            pass
