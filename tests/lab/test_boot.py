"""The lab itself: guests boot, commands in them are as good as commands here, and nothing is left behind."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from vsport.lab import PIPE, Guest, LabError

pytestmark = pytest.mark.lab

KINDS = ["uml", "qemu"]
PATIENCE = 60.0


def until(condition, what):
    """Waits for something that has to happen."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
    return found


def processes_that_mention(word):
    """Numbers of the processes of this machine with `word` in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word in path.read_text(errors="replace"):
                found.append(int(path.parent.name))
    return found


@pytest.fixture(scope="module", params=KINDS)
def guest(request, lab_tree):
    """One guest of each kind, for all the tests that leave it as it was."""
    with Guest(request.param, tree=lab_tree) as booted:
        yield booted


def test_it_is_a_kernel_of_its_own(guest):
    release = guest.run(["uname", "-r"], check=True).stdout.decode().strip()
    assert release != os.uname().release
    assert ("cloud" in release) == (guest.kind == "qemu")


def test_the_root_is_read_only_and_the_usual_places_are_not(guest):
    assert guest.run(["touch", "/usr/nope"]).returncode == 1
    guest.run(["touch", "/tmp/a", "/run/a", "/dev/shm/a"], check=True)
    kinds = guest.run(["stat", "--file-system", "--format", "%T", "/proc", "/sys", "/dev/pts"], check=True).stdout
    assert kinds.split() == [b"proc", b"sysfs", b"devpts"]


def test_bytes_pass_unchanged_on_every_stream(guest):
    """The channel is a serial line: nothing may be echoed, translated or taken as a signal."""
    data = bytes(range(256)) * 3 + b"\r\n\n\r\x03\x04\x11\x13\xff" + os.urandom(100_000)
    done = guest.run(["tee", "/dev/stderr"], input=data, check=True)
    assert done.stdout == data
    assert done.stderr == data


def test_streams_are_kept_apart(guest):
    done = guest.run(["sh", "-c", "echo out; echo err >&2"])
    assert (done.returncode, done.stdout, done.stderr) == (0, b"out\n", b"err\n")


def test_no_input_is_an_end_of_file(guest):
    assert guest.run(["wc", "-c"]).stdout == b"0\n"


@pytest.mark.parametrize("code", [0, 1, 42, 255])
def test_exit_codes_are_passed_on(guest, code):
    assert guest.run(["sh", "-c", f"exit {code}"]).returncode == code


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP, signal.SIGINT, signal.SIGPIPE])
def test_death_by_a_signal_is_told_as_subprocess_does(guest, number):
    """And no signal is ignored from the start, as what the agent ignores would be."""
    assert guest.run(["sh", "-c", f"kill -{number:d} $$"]).returncode == -number


def test_what_cannot_be_started_ends_as_in_a_shell(guest):
    done = guest.run(["no-such-program"])
    assert (done.returncode, done.stderr) == (127, b"no-such-program: No such file or directory\n")
    assert guest.run(["/etc/passwd"]).returncode == 126


def test_environment_and_directory(guest):
    done = guest.run(["sh", "-c", "echo $WORD; pwd"], env={"WORD": "a b"}, cwd="/usr")
    assert done.stdout == b"a b\n/usr\n"


def test_a_long_command_line(guest):
    """Far longer than the line's window."""
    words = [f"{number:04}" for number in range(5000)]
    assert guest.run(["echo", *words], check=True).stdout.split() == [word.encode() for word in words]


def test_commands_run_at_the_same_time(guest):
    with guest.popen(["cat"], stdin=PIPE) as first, guest.popen(["cat"], stdin=PIPE) as second:
        for word in b"one\n", b"two\n":
            for process in second, first:
                process.stdin.write(word)
                assert process.stdout.readline() == word
        for process in first, second:
            process.stdin.close()
            assert process.wait(PATIENCE) == 0


def test_output_that_nobody_reads_holds_up_no_other_command(guest):
    with guest.popen(["yes"]) as noisy:
        assert noisy.stdout.read(6) == b"y\ny\ny\n"
        assert guest.run(["echo", "here"]).stdout == b"here\n"
        assert noisy.poll() is None


def test_a_reader_that_leaves_ends_the_writer(guest):
    with guest.popen(["yes"]) as noisy:
        noisy.stdout.close()
        assert noisy.wait(PATIENCE) == -signal.SIGPIPE


def test_a_command_that_takes_too_long_is_killed_with_its_children(guest):
    with pytest.raises(subprocess.TimeoutExpired):
        guest.run(["sh", "-c", "sleep 4711 & wait"], timeout=0.5)
    sleeping = ["sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -c 'sleep 471[1]'"]
    until(lambda: guest.run(sleeping).stdout == b"0\n", "the children of the command end")


def test_the_guest_tools_are_there(guest):
    assert b"usage" in guest.run(["vsport-open", "--help"], check=True).stdout
    guest.run(["python3", "-c", "import guest_tools"], check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_behind(boot, running, short_path, monkeypatch, kind):
    monkeypatch.setattr(tempfile, "tempdir", str(short_path))
    guest = boot(kind)
    running.enter_context(guest.popen(["sleep", "1000"]))
    assert list(short_path.iterdir())
    assert processes_that_mention(str(short_path))
    running.close()
    assert not list(short_path.iterdir())
    assert not processes_that_mention(str(short_path))


@pytest.mark.parametrize("kind", KINDS)
def test_the_guest_dies_with_whoever_booted_it(lab_tree, short_path, kind):
    program = f"""if True:
        import time
        from pathlib import Path
        from vsport.lab import Guest
        with Guest({kind!r}, tree=Path({str(lab_tree)!r})) as guest:
            print("booted", flush=True)
            time.sleep(1000)
    """
    environment = os.environ | {"TMPDIR": str(short_path)}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment) as host:
        try:
            assert host.stdout.readline() == b"booted\n"
            mark = str(next(short_path.glob("vsport-lab-*")))
            assert processes_that_mention(mark)
        finally:
            host.kill()
    until(lambda: not processes_that_mention(mark), "the guest ends")


def test_a_guest_that_cannot_boot_shows_its_console(boot):
    with pytest.raises(LabError, match=r"(?s)uml guest ended instead of booting; .*Too few physical memory"):
        boot("uml", memory_mib=8)


def test_a_guest_that_takes_too_long_to_boot(boot):
    with pytest.raises(LabError, match=r"did not boot within 0\.1 seconds"):
        boot("uml", boot_timeout=0.1)


def test_a_place_that_a_kernel_could_not_be_told(boot, tmp_path, monkeypatch):
    (tmp_path / "a b").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "a b"))
    with pytest.raises(LabError, match="set TMPDIR to a shorter and simpler one"):
        boot("uml")
    assert not list((tmp_path / "a b").iterdir())


def test_a_port_that_never_comes_is_named(boot):
    with pytest.raises(LabError, match=r"has no port named org\.nosuch\.0"):
        boot("uml", ports=["org.nosuch.0"])


def test_a_guest_that_goes_away_ends_its_commands(boot):
    guest = boot("uml")
    with pytest.raises(LabError, match="went away while sh was running"):
        guest.run(["sh", "-c", "echo o >/proc/sysrq-trigger; sleep 1000"])
    with pytest.raises(LabError, match="went away"):
        guest.run(["true"])


def test_a_shared_directory_is_live_in_user_mode_linux(boot, running, tmp_path):
    (tmp_path / "in").write_text("from the host")
    guest = boot("uml", share=tmp_path)
    assert guest.run(["cat", "/mnt/share/in"], check=True).stdout == b"from the host"
    guest.run(["sh", "-c", "echo from the guest >/mnt/share/out"], check=True)
    running.close()
    assert (tmp_path / "out").read_text() == "from the guest\n"


def test_qemus_own_device_is_seen_by_name(boot, short_path, tmp_path):
    """R-GUEST-01 to 03 with the device that everybody has: so the guest is right before ours comes into it."""
    (tmp_path / "in").write_text("from the host")
    path = short_path / "port.sock"
    guest = boot(
        "qemu",
        share=tmp_path,
        ports=["org.qemu.one.0", "org.qemu.two.0"],
        device_args=[
            *("-device", "virtio-serial-pci", "-chardev", f"socket,id=one,path={path},server=on,wait=off"),
            *("-device", "virtserialport,chardev=one,name=org.qemu.one.0,nr=1"),
            *("-chardev", "null,id=two", "-device", "virtserialport,chardev=two,name=org.qemu.two.0,nr=2"),
        ],
    )
    links = guest.run(["readlink", "/dev/virtio-ports/org.qemu.one.0", "/dev/virtio-ports/org.qemu.two.0"], check=True)
    assert links.stdout == b"../vport0p1\n../vport0p2\n"
    assert guest.run(["cat", "/sys/class/virtio-ports/vport0p2/name"]).stdout == b"org.qemu.two.0\n"
    assert b"guest_connected: 0" in guest.run(["cat", "/sys/kernel/debug/virtio-ports/vport0p1"], check=True).stdout
    listed = guest.run(["vsport-open", "--list", "--json"], check=True).stdout.splitlines()
    assert [json.loads(line)["name"] for line in listed] == ["org.qemu.one.0", "org.qemu.two.0"]
    with socket.socket(socket.AF_UNIX) as host:
        host.settimeout(PATIENCE)
        host.connect(str(path))
        guest.run(["sh", "-c", "echo hello >/dev/virtio-ports/org.qemu.one.0"], check=True)
        assert host.recv(6, socket.MSG_WAITALL) == b"hello\n"
    assert guest.run(["cat", "/mnt/share/in"], check=True).stdout == b"from the host"


def lab_run(*arguments, **options):
    command = [sys.executable, "-m", "vsport", "lab", "run", *arguments]
    return subprocess.run(command, capture_output=True, timeout=2 * PATIENCE, check=False, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_lab_run_lists_the_ports_of_our_device(lab_tree, kind):
    done = lab_run("--guest", kind, "--", "vsport-open", "--list", "--json")
    assert (done.returncode, done.stderr) == (0, b"")
    ports = [json.loads(line) for line in done.stdout.splitlines()]
    assert [port["name"] for port in ports] == ["org.vsport.away.0", "org.vsport.null.0"]


def test_lab_run_passes_streams_and_exit_code_on(lab_tree):
    data = os.urandom(10_000)
    done = lab_run("--", "sh", "-c", "cat; echo err >&2; exit 7", input=data)
    assert (done.returncode, done.stdout, done.stderr) == (7, data, b"err\n")


def test_lab_run_gives_up_after_its_timeout(lab_tree):
    done = lab_run("--timeout", "0.3", "sleep", "1000")
    assert (done.returncode, done.stdout) == (124, b"")
    assert done.stderr == b"vsport lab: sleep took longer than 0.3 seconds\n"


def test_lab_run_says_when_the_device_cannot_start(lab_tree):
    chardev = "socket,id=a,path=/no/such/place/x,server=on,wait=off"
    done = lab_run("--chardev", chardev, "--device", "virtserialport,chardev=a", "true")
    assert done.returncode == 125
    assert done.stderr.startswith(b"vsport lab: the device did not start: ")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_lab_run_leaves_nothing_behind_when_interrupted(lab_tree, short_path, number, code):
    command = [sys.executable, "-m", "vsport", "lab", "run", "--", "sh", "-c", "echo running; sleep 1000"]
    environment = os.environ | {"TMPDIR": str(short_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline() == b"running\n"
        process.send_signal(number)
        assert process.wait(PATIENCE) == code
    assert not list(short_path.iterdir())
    assert not processes_that_mention(str(short_path))
