"""The daemon as a process: starting, refusing, ending (R-VU-100 to 105)."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from daemons import PATIENCE, Conversation, Machine, answers, connect, daemon, serves, wait_for


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_a_signal_ends_it_and_its_sockets_are_gone(tmp_path, number, code, busy):
    """R-VU-100: promptly, with exit code 0 for SIGTERM."""
    chardev, vm = tmp_path / "c.sock", tmp_path / "vm.sock"
    options = ["--chardev", f"socket,id=c0,path={chardev},server=on,wait=off", "--device", "virtserialport,chardev=c0"]
    with daemon("--socket-path", vm, *options) as process, contextlib.ExitStack() as stack:
        wait_for(vm.exists, "the daemon listens")
        if busy:
            front_end = stack.enter_context(connect(vm))
            assert answers(front_end)
            stack.enter_context(connect(chardev))
        process.send_signal(number)
        assert process.wait(PATIENCE) == code
        assert not vm.exists()
        assert not chardev.exists()
        assert process.stderr.read() == b""


def test_under_nohup_it_outlives_its_terminal(tmp_path):
    vm = tmp_path / "vm.sock"
    command = [sys.executable, "-m", "vsport", "serve", "--socket-path", str(vm)]
    process = subprocess.Popen(["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *command])
    try:
        wait_for(vm.exists, "the daemon listens")
        process.send_signal(signal.SIGHUP)
        with connect(vm) as front_end:
            assert answers(front_end)
        process.terminate()
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()


def test_it_tells_the_addresses_that_the_system_chose(tmp_path):
    """A terminal has another name each time, and port=0 is any free one: the user has to be told."""
    options = ["--chardev", "pty,id=c0", "--device", "virtserialport,chardev=c0"]
    options += ["--chardev", "socket,id=c1,host=localhost,port=0,server=on,wait=off", "--device",
                "virtserialport,chardev=c1"]  # fmt: skip
    with daemon("--socket-path", tmp_path / "vm.sock", *options) as process:
        terminal = process.stderr.readline().decode().removeprefix("vsport: chardev c0 is pty:").strip()
        assert os.path.exists(terminal)
        address = process.stderr.readline().decode().removeprefix("vsport: chardev c1 is tcp:localhost:")
        with socket.create_connection(("localhost", int(address.partition(",")[0])), PATIENCE):
            pass


def test_a_chardev_without_a_port_is_told(tmp_path):
    with daemon("--socket-path", tmp_path / "vm.sock", "--chardev", "null,id=c0") as process:
        assert b"chardev c0 has no port" in process.stderr.readline()


def test_a_second_daemon_on_the_same_path_is_refused_and_the_first_goes_on(tmp_path):
    vm = tmp_path / "vm.sock"
    with daemon("--socket-path", vm) as first:
        wait_for(vm.exists, "the first listens")
        with daemon("--socket-path", vm) as second:
            assert second.wait(PATIENCE) == 1
            said = second.stderr.read().decode()
            assert str(vm) in said
            assert len(said.splitlines()) == 1
        with connect(vm) as front_end:
            assert answers(front_end)
        assert first.poll() is None


def test_where_nothing_can_be_offered_it_does_not_start(tmp_path):
    vm = tmp_path / "vm.sock"
    with daemon("--socket-path", vm, "--handover", tmp_path / "no" / "where") as process:
        assert process.wait(PATIENCE) == 1
        assert process.stderr.read().endswith(b"no/where: No such file or directory\n")
    assert not vm.exists()


def test_what_a_dead_daemon_left_behind_is_replaced(tmp_path):
    vm = tmp_path / "vm.sock"
    with daemon("--socket-path", vm) as killed:
        wait_for(vm.exists, "the first listens")
        killed.kill()
        killed.wait()
    assert vm.exists()
    with daemon("--socket-path", vm) as second:
        wait_for(lambda: serves(vm), "the second listens")
        assert second.poll() is None


def test_an_inherited_socket_may_be_listening(tmp_path):
    """R-VU-103."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "vm.sock"))
        listener.listen()
        with daemon("--fd", listener.fileno(), pass_fds=[listener.fileno()]):
            for _ in range(2):
                with connect(tmp_path / "vm.sock") as front_end:
                    assert answers(front_end)


def test_an_inherited_connection_is_served_to_its_end():
    """R-VU-103: and then there is nothing to wait for."""
    ours, theirs = socket.socketpair()
    with ours, theirs, daemon("--fd", theirs.fileno(), pass_fds=[theirs.fileno()]) as process:
        theirs.close()
        ours.settimeout(PATIENCE)
        assert answers(ours)
        ours.close()
        assert process.wait(PATIENCE) == 0


def test_it_waits_for_its_hosts_where_it_was_told_to(tmp_path):
    """wait=on: no front end is served before the host's program is there; a signal ends the waiting."""
    chardev, vm = tmp_path / "c.sock", tmp_path / "vm.sock"
    options = ["--chardev", f"socket,id=c0,path={chardev},server=on,wait=on", "--device", "virtserialport,chardev=c0"]
    with daemon("--socket-path", vm, *options) as process:
        assert b"waiting for a connection on" in process.stderr.readline()
        assert not vm.exists()
        with connect(chardev):
            wait_for(vm.exists, "the daemon listens once its host is there")
    vm.unlink(missing_ok=True)
    with daemon("--socket-path", vm, *options) as process:
        process.stderr.readline()
        process.terminate()
        assert process.wait(PATIENCE) == 0


def test_a_front_end_that_talks_nonsense_is_cut_off_and_the_next_is_served(tmp_path):
    vm = tmp_path / "vm.sock"
    with daemon("--socket-path", vm) as process:
        wait_for(vm.exists, "the daemon listens")
        with connect(vm) as vandal:
            vandal.sendall(os.urandom(4096))
            with contextlib.suppress(ConnectionResetError):
                while vandal.recv(4096):
                    pass
        with connect(vm) as front_end:
            assert answers(front_end)
        assert process.poll() is None


def test_standard_input_and_output_can_be_a_port(tmp_path):
    """--chardev stdio: the daemon runs as the last of a pipeline, and gives the descriptors back as they were."""
    vm = tmp_path / "vm.sock"
    ours, theirs = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "vsport", "serve", "--socket-path", str(vm), "--chardev", "stdio,id=c0", "--device",
         "virtserialport,chardev=c0"],
        stdin=ours,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(vm.exists, "the daemon listens")
        process.terminate()
        assert process.wait(PATIENCE) == 0
        assert os.get_blocking(ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)


def test_it_sleeps_when_nothing_happens(tmp_path):
    """No wake-ups: the daemon's processor time stands still while nobody talks to it."""
    vm = tmp_path / "vm.sock"
    with daemon("--socket-path", vm, "--chardev", "null,id=c0", "--device", "virtserialport,chardev=c0") as process:
        wait_for(vm.exists, "the daemon listens")

        def switches():
            with open(f"/proc/{process.pid}/status") as status:
                return sum(int(line.split()[1]) for line in status if "ctxt_switches" in line)

        wait_for(lambda: (before := switches(), time.sleep(0.2), switches() == before)[-1], "it sleeps through")


def processor_time(process):
    """Nanoseconds on a processor so far."""
    with open(f"/proc/{process.pid}/schedstat") as file:
        return int(file.read().split()[0])


def test_a_port_that_was_busy_costs_nothing_when_its_traffic_ends(tmp_path):
    """However long it may look for more instead of sleeping: it sleeps in the end."""
    chardev, vm = tmp_path / "c.sock", tmp_path / "vm.sock"
    options = ["--chardev", f"socket,id=c0,path={chardev},server=on,wait=off"]
    options += ["--device", "virtserialport,chardev=c0,name=org.test.0", "--poll-max-ns", "100000000"]
    with daemon("--socket-path", vm, *options) as process:
        wait_for(vm.exists, "the daemon listens")
        with Machine(vm) as machine, connect(chardev) as host:
            talk = Conversation(machine, machine.port("org.test.0"), host)
            talk.flow()
            talk.check()
            machine.loop.run_until(lambda: False, 1.0)
            before = processor_time(process)
            machine.loop.run_until(lambda: False, 1.0)
            assert processor_time(process) == before
