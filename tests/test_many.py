"""Many virtual machines in one process: each is served as if it were alone, whatever becomes of the others."""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys

import pytest
from daemons import PATIENCE, Conversation, Machine, answers, connect, daemon, running, serves, wait_for

from vsport.vhost_user.message import Direction

NAME = "org.test.0"
NAMES = ["web1", "web2", "db"]


class Place:
    """The paths of one daemon's virtual machines, and the options that name them."""

    def __init__(self, directory):
        self.directory = directory
        self.options = [
            *("--socket-path", directory / "{vm}.sock"),
            *("--chardev", f"socket,id=c0,path={directory}/{{vm}}-c0,server=on,wait=off"),
            *("--device", f"virtserialport,chardev=c0,name={NAME}", "--device", "virtio-serial,max_ports=2"),
        ]

    def vm(self, name):
        return self.directory / f"{name}.sock"

    def host(self, name):
        return self.directory / f"{name}-c0"

    def offer(self, name):
        return self.directory / f"{name}.offer"

    @contextlib.contextmanager
    def serving(self, names, *more, **options):
        """A daemon that serves ``names``."""
        with daemon(*vms(names), *self.options, *more, **options) as process:
            for name in names:
                wait_for(self.vm(name).exists, f"{name} is served")
            yield process

    @contextlib.contextmanager
    def conversation(self, name):
        """A guest and a host program that talk through the port of this virtual machine."""
        with Machine(self.vm(name)) as machine, connect(self.host(name)) as host:
            yield Conversation(machine, machine.port(NAME), host)


def vms(names):
    return [word for name in names for word in ("--vm", name)]


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def ends(process, number=signal.SIGTERM):
    """What a daemon said, when it has ended as it should."""
    process.send_signal(number)
    assert process.wait(PATIENCE) == (0 if number == signal.SIGTERM else 128 + number)
    return process.stderr.read().decode()


def files(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


# -- they are served -----------------------------------------------------------------------------------------------


def test_each_has_its_own_device_and_its_own_hosts(place):
    with place.serving(NAMES) as process, contextlib.ExitStack() as stack:
        talks = [stack.enter_context(place.conversation(name)) for name in NAMES]
        for talk in talks:
            talk.flow(30_000)
        for talk in talks:
            talk.check()
        assert ends(process) == ""
    assert files(place.directory) == []


def test_names_come_from_a_file_and_from_standard_input(place):
    names = place.directory / "names"
    names.write_text("web1\n\n  web2  \n")
    with daemon("--vm", "db", "--vms", names, *place.options) as process:
        for name in NAMES:
            wait_for(lambda name=name: serves(place.vm(name)), f"{name} is served")
        ends(process)
    with daemon("--vms", "-", *place.options, stdin=subprocess.PIPE) as process:
        process.stdin.write(b"web1\nweb2\n")
        process.stdin.close()
        for name in NAMES[:2]:
            wait_for(lambda name=name: serves(place.vm(name)), f"{name} is served")
        ends(process)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_all_of_them(place, number):
    with place.serving(NAMES) as process, Machine(place.vm("web1")), connect(place.host("web2")):
        assert ends(process, number) == ""
    assert files(place.directory) == []


def test_they_sleep_when_nothing_happens(place):
    """No wake-ups: neither with a front end nor without one."""
    with place.serving(NAMES) as process, Machine(place.vm("web1")), place.conversation("web2") as talk:
        talk.flow(1)
        talk.check()

        def switches():
            with open(f"/proc/{process.pid}/status") as status:
                return sum(int(line.split()[1]) for line in status if "ctxt_switches" in line)

        def still():
            before = switches()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
            return switches() == before

        wait_for(still, "it sleeps for half a second")


def test_each_waits_for_its_own_hosts(place):
    """wait=on: no other virtual machine is kept waiting."""
    options = [str(option).replace("wait=off", "wait=on") for option in place.options]
    with daemon(*vms(NAMES), *options) as process:
        told = sorted(process.stderr.readline().decode() for _ in NAMES)
        assert [line.partition(" waiting")[0] for line in told] == ["vsport: db:", "vsport: web1:", "vsport: web2:"]
        with connect(place.host("web2")):
            wait_for(lambda: serves(place.vm("web2")), "its host is there")
            assert not place.vm("web1").exists()
            with connect(place.host("web1")):
                wait_for(lambda: serves(place.vm("web1")), "its host is there, too")
        assert ends(process) == ""
    assert files(place.directory) == []


def test_one_that_cannot_be_served_in_the_end_does_not_stop_the_others(place):
    options = [str(option).replace("wait=off", "wait=on") for option in place.options]
    with daemon(*vms(NAMES), *options) as process:
        for _ in NAMES:
            process.stderr.readline()
        place.vm("web1").mkdir()
        with connect(place.host("web1")), connect(place.host("web2")):
            told = process.stderr.readline().decode()
            assert told == (
                f"vsport: web1: cannot listen on unix:{place.vm('web1')}: "
                "the path exists and is no socket; remove it or use another\n"
            )
            wait_for(lambda: serves(place.vm("web2")), "another one is served")
            assert not place.host("web1").exists()
        ends(process)


# -- what is said says whose it is -----------------------------------------------------------------------------------


def test_events_say_whose_they_are(place):
    journal = place.directory / "events"
    with place.serving(NAMES, "--events", journal) as process:
        for name in NAMES:
            with place.conversation(name) as talk:
                talk.flow(1)
        wait_for(lambda: {event["vm"] for event in events(journal)} == set(NAMES), "each has said something")
        ends(process)
    opened = [event["vm"] for event in events(journal) if event["event"] == "port" and event["cause"] == "guest-open"]
    assert opened == NAMES


def test_each_can_have_events_of_its_own(place):
    with place.serving(NAMES[:2], "--events", place.directory / "{vm}.events") as process:
        with place.conversation("web2") as talk:
            talk.flow(1)
        ends(process)
    assert (place.directory / "web1.events").read_text() == ""
    assert {event["vm"] for event in events(place.directory / "web2.events")} == {"web2"}


def events(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_of_the_log_begin_with_the_name(place):
    with place.serving(NAMES) as process, place.conversation("web1") as talk:
        vandalise(place.vm("web2"))
        talk.flow()
        talk.check()
        said = ends(process).splitlines()
    assert len(said) == 1
    assert said[0].startswith("vsport: web2: connection ended, the front end broke a rule: ")


def vandalise(path):
    with connect(path) as vandal:
        vandal.sendall(b"\xff" * 4096)
        with contextlib.suppress(ConnectionResetError):
            while vandal.recv(4096):
                pass


# -- none of them touches another ------------------------------------------------------------------------------------


def test_a_host_that_does_not_read_stops_nobody_else(place):
    with place.serving(NAMES) as process, place.conversation("web1") as talk, place.conversation("web2") as stalled:
        with contextlib.suppress(BlockingIOError):
            while True:
                stalled.port.write(bytes(30_000))
                stalled.machine.loop.run_once(0.01)
        talk.flow(1_000_000)
        talk.check()
        assert ends(process) == ""


def test_a_full_disk_is_one_machines(place):
    """The log of one is full: what it had to say is lost, and nothing else."""
    (place.directory / "web2.log").symlink_to("/dev/full")
    options = [f"{option},logfile={place.directory}/{{vm}}.log" if "id=c0" in str(option) else option
               for option in place.options]  # fmt: skip
    with daemon(*vms(NAMES), *options) as process:
        wait_for(place.vm("db").exists, "it serves")
        with place.conversation("web1") as talk, place.conversation("web2") as full:
            for _ in range(3):
                full.flow(1000)
                talk.flow(1000)
            full.check()
            talk.check()
        ends(process)
    assert (place.directory / "web1.log").stat().st_size == talk.up.sent


def test_a_guest_that_breaks_its_ring_breaks_nobody_elses(place):
    with place.serving(NAMES) as process, place.conversation("web1") as talk, Machine(place.vm("web2")) as broken:
        broken.until(lambda: any(port.name for port in broken.guest.ports.values()))  # it has no more to say
        ring = broken.front_end.rings[3]
        broken.memory.memory.write(ring.driver.avail + 2, b"\xff\x7f")  # more chains than the ring has
        ring.kick()
        broken.until(ring.failed)
        talk.flow()
        talk.check()
        assert "vsport: web2: queue 3 stopped: R-RING-70" in ends(process)


# -- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (["--socket-path", "{}/vm.sock"], "web1's --socket-path and web2's --socket-path cannot both have {}/vm.sock"),
        (["--handover", "{}/offer"], "web1's --handover and web2's --handover cannot both have {}/offer"),
        (["--handover", "{}/{{vm}}.sock"], "web1's --socket-path and web1's --handover cannot both have {}/web1.sock"),
        (["--chardev", "socket,id=c1,path={}/a,server=on"], "web2's chardev c1 cannot both have {}/a"),
        (["--chardev", "socket,id=c1,path=a,abstract=on,server=on"], "web2's chardev c1 cannot both have @a"),
        (["--chardev", "socket,id=c1,port=4711,server=on"], "cannot both have tcp::4711"),
        (["--chardev", "file,id=c1,path={}/a"], "web2's chardev c1 cannot both have {}/a"),
        (["--chardev", "null,id=c1,logfile={}/a"], "web2's chardev c1 cannot both have {}/a"),
        (["--chardev", "pipe,id=c1,path={}/a"], "cannot both have {}/a"),
        (["--chardev", "pty,id=c1,path={}/a"], "cannot both have {}/a"),
        (["--chardev", "stdio,id=c1"], "web2's chardev c1 cannot both have standard input and output"),
        (["--fd", "3"], "with argument --socket-path"),
        (["--vm", "web1"], "--vm web1: the name is given twice"),
        (["--vm", "we/b"], "a name becomes a part of a path"),
        (["--vms", "/dev/null"], "--vms /dev/null: there is no name in it"),
        (["--vms", "{}/none"], "cannot read the names in {}/none: No such file or directory"),
        (["--chardev", "socket,id=c1,path={}/no/{{vm}},server=on", "--device", "virtconsole,chardev=c1"],
         "web1: chardev c1: cannot listen on unix:{}/no/web1: No such file"),
        (["--chardev", "socket,id=c1,path={}/{{vm}}-c0,server=on", "--device", "virtconsole,chardev=c1"],
         "web1's chardev c0 and web1's chardev c1 cannot both have {}/web1-c0"),
        (["--device", "virtserialport,chardev=c9"], "web1: port '': there is no --chardev with id=c9"),
        (["--events", "{}/no/where"], "{}/no/where: No such file or directory"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "",
)  # fmt: skip
def test_what_cannot_be_is_said_in_a_line_and_nothing_is_left(place, changed, says):
    options = [option.format(place.directory) for option in changed]
    with daemon(*vms(NAMES[:2]), *place.options, *options) as process:
        assert process.wait(PATIENCE) in (1, 2)
        (line,) = process.stderr.read().decode().splitlines()
    assert says.format(place.directory) in line
    assert line.startswith("vsport serve: ")
    assert files(place.directory) == []


@pytest.mark.parametrize(
    "chardev",
    [
        "file,path={}/all.log,append=on",
        "file,path=/dev/null",
        "socket,path={}/log.sock",
        "socket,port=0,host=localhost,server=on,wait=off",
        "null,logfile={}/all.log,logappend=on",
    ],
)
def test_what_can_be_shared_is_shared(place, chardev):
    kind, _, rest = chardev.format(place.directory).partition(",")
    with contextlib.ExitStack() as stack:
        if "log.sock" in rest:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(place.directory / "log.sock"))
            listener.listen()
        more = ["--chardev", f"{kind},id=c1,{rest}", "--device", "virtserialport,chardev=c1"]
        options = [str(option).replace("max_ports=2", "max_ports=3") for option in place.options]
        process = stack.enter_context(daemon(*vms(NAMES), *options, *more))
        wait_for(place.vm(NAMES[-1]).exists, "they are served")
        ends(process)


# -- descriptors -----------------------------------------------------------------------------------------------------


def limited(soft, hard):
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_limit_of_descriptors_is_raised_as_far_as_needed(place):
    names = [f"vm{number}" for number in range(40)]
    with place.serving(names, preexec_fn=limited(50, 2000)) as process:
        assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (2000, 2000)
        assert all(serves(place.vm(name)) for name in names)
        assert ends(process) == ""


def test_too_low_a_limit_is_told_before_anything_is_opened(place):
    with daemon(*vms(f"vm{number}" for number in range(40)), *place.options, preexec_fn=limited(50, 60)) as process:
        assert process.wait(PATIENCE) == 1
        said = process.stderr.read().decode()
    assert said.startswith(
        "vsport serve: 112 descriptors are needed to begin with, and this process may have 60 (ulimit"
    )
    assert files(place.directory) == []


def test_a_limit_that_some_guests_will_feel_is_told(place):
    with place.serving(NAMES, preexec_fn=limited(50, 80)) as process:
        assert "with all guests running, up to 113 descriptors are needed, and this process may have 80" in ends(
            process
        )


# -- handover --------------------------------------------------------------------------------------------------------


def offered(place, names):
    return place.serving(names, "--handover", place.directory / "{vm}.offer", "--log-level", "info")


def taker(place, names, *more):
    return daemon("--takeover", place.directory / "{vm}.offer", *vms(names), "--log-level", "info", *more)


def test_all_of_them_go_to_another_process(place):
    """And back, with nothing lost or repeated, and the descriptors of none of them left behind."""
    with offered(place, NAMES) as first, contextlib.ExitStack() as stack:
        talks = [stack.enter_context(place.conversation(name)) for name in NAMES[:2]]
        before = first
        for _ in range(2):
            again = ["--handover", place.directory / "{vm}.offer"]
            after = stack.enter_context(taker(place, NAMES, *again))
            while before.poll() is None:
                for talk in talks:
                    talk.step()
            assert before.returncode == 0
            assert before.stderr.read().decode().count("has taken over") == len(NAMES)
            before = after
        for talk in talks:
            talk.flow(30_000)
            talk.check()
        assert serves(place.vm("db"))
        said = ends(before)
        assert [f"vsport: {name}: taken over; the device was paused for" in said for name in NAMES] == [True] * 3
    assert files(place.directory) == []


def test_what_is_not_taken_stays_where_it_is(place):
    """Each is served by exactly one process, and both say by which."""
    with offered(place, NAMES) as giver, contextlib.ExitStack() as stack:
        talk = stack.enter_context(place.conversation("db"))
        moving = stack.enter_context(Machine(place.vm("web2")))
        moving.front_end.pause()
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        ours = moving.front_end._begin_transfer(Direction.LOAD, theirs, ours)  # it never says that it is over
        stack.callback(os.close, ours)
        successor = stack.enter_context(taker(place, [*NAMES, "nobody"]))
        told = [line for line in iter_lines(successor, 6) if b"paused" not in line]
        assert told[0].startswith(b"vsport: web2: cannot take over from ")
        assert told[0].endswith(b"the front end is moving the device's state just now: try again when that is done\n")
        assert told[1].startswith(b"vsport: nobody: cannot take over from ")
        assert told[2:] == [
            b"vsport: not taken over, and left where they are: web2, nobody\n",
            b"vsport: taken over, and served here now: web1, db\n",
        ]
        talk.flow()
        assert giver.poll() is None
        assert [place.offer(name).exists() for name in NAMES] == [False, True, False]
        ends(successor)
        assert files(place.directory) == ["web2-c0", "web2.offer", "web2.sock"]
        moving.close()
        with taker(place, ["web2"]) as second:
            assert giver.wait(PATIENCE) == 0
            wait_for(lambda: serves(place.vm("web2")), "the second one has the rest")
            ends(second)
    assert files(place.directory) == []


def iter_lines(process, count):
    return [process.stderr.readline() for _ in range(count)]


def test_where_nothing_can_be_taken_the_taker_ends(place):
    with taker(place, NAMES) as process:
        assert process.wait(PATIENCE) == 1
        said = process.stderr.read().decode().splitlines()
    assert len(said) == 4
    assert said[-1] == "vsport: not taken over, and left where they are: web1, web2, db"


HASTY = """
import sys
from vsport import cli, handover
handover._TURN_SECONDS = 0.5
sys.exit(cli.main(["serve", *sys.argv[1:]]))
"""
"""The real thing, but that it waits no longer than that for its turn."""


def test_a_process_that_hangs_is_waited_for_once_and_not_once_for_each(place):
    with offered(place, NAMES) as giver:
        giver.send_signal(signal.SIGSTOP)
        arguments = ["--takeover", str(place.directory / "{vm}.offer"), *vms(NAMES)]
        with running([sys.executable, "-c", HASTY, *arguments]) as process:
            assert process.wait(PATIENCE) == 1
            said = process.stderr.read().decode().splitlines()
        assert len(said) == 2
        assert said[0].endswith("no answer came in time")
        assert said[1] == "vsport: not taken over, and left where they are: web1, web2, db"
        giver.send_signal(signal.SIGCONT)
        assert all(serves(place.vm(name)) for name in NAMES)
        ends(giver)


@pytest.mark.parametrize("option", ["--takeover", "--handover"])
def test_each_comes_from_a_place_of_its_own(place, option):
    options = {"--takeover": place.directory / "{vm}.offer", "--handover": place.directory / "{vm}.next"}
    options[option] = place.directory / "one"
    with daemon(*vms(NAMES), *(word for pair in options.items() for word in pair)) as process:
        assert process.wait(PATIENCE) == 2
        assert f"{option} {place.directory}/one: each virtual machine needs its own" in process.stderr.read().decode()


def test_a_machine_without_a_front_end_answers_after_the_handover(place):
    with offered(place, NAMES[:2]) as giver, taker(place, NAMES[:2]) as successor:
        assert giver.wait(PATIENCE) == 0
        for name in NAMES[:2]:
            with connect(place.vm(name)) as front_end:
                assert answers(front_end)
        ends(successor)
    assert files(place.directory) == []
