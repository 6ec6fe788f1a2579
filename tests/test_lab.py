"""The lab as far as it goes without a tree: what it says, where it looks, and the channel to a guest's agent."""

import contextlib
import fcntl
import io
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsport.lab import LabError, Tree, build, default_directory
from vsport.lab.build import Progress, explain, install_command, relocated
from vsport.lab.cpio import Archive
from vsport.lab.daemon import daemon
from vsport.lab.tree import PACKAGES, stamp
from vsport.lab.wire import CHANNEL_WINDOW, Channel, Incoming, Kind, Outgoing, Sink, Source

PATIENCE = 30.0

EXPIRED = """\
I: running apt-get update...
Get:1 http://mirror.example/debian forky InRelease [151 kB]
Reading package lists...
E: Release file for http://mirror.example/debian/dists/forky/InRelease is expired (invalid since 17d 9h 32min 18s). \
Updates for this repository will not be applied.
E: apt-get update --error-on=any -oAPT::Status-Fd=<$fd> -oDpkg::Use-Pty=false failed
E: mmdebstrap failed to run
"""

UNRESOLVED = """\
I: running apt-get update...
E: Failed to fetch http://mirror.example/debian/dists/forky/InRelease  Temporary failure resolving 'mirror.example'
E: mmdebstrap failed to run
"""


def vsport(*arguments, **options):
    command = [sys.executable, "-m", "vsport", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


def make_tree(directory, content=None):
    """What a build leaves behind, as far as is_current() looks."""
    tree = Tree(directory / "tree")
    tree.own.mkdir(parents=True)
    tree.stamp_file.write_text(stamp() if content is None else content)
    return tree


class TestPlace:
    @pytest.mark.parametrize(
        ("environment", "place"),
        [
            ({"HOME": "/home/u"}, "/home/u/.cache/vsport/lab"),
            ({"HOME": "/home/u", "XDG_CACHE_HOME": "/c"}, "/c/vsport/lab"),
            ({"HOME": "/home/u", "XDG_CACHE_HOME": ""}, "/home/u/.cache/vsport/lab"),
            ({"HOME": "/home/u", "XDG_CACHE_HOME": "/c", "VSPORT_LAB": "/lab"}, "/lab"),
        ],
    )
    def test_default_directory(self, environment, place):
        assert default_directory(environment) == Path(place)

    def test_path_prints_the_tree(self, tmp_path):
        assert vsport("lab", "path", "--dir", str(tmp_path)).stdout == f"{tmp_path}/tree\n"
        assert vsport("lab", "path", env=os.environ | {"VSPORT_LAB": "/x"}).stdout == "/x/tree\n"


class TestStamp:
    def test_a_tree_with_this_recipes_stamp_is_current(self, tmp_path):
        tree = make_tree(tmp_path)
        assert tree.is_current()
        tree.check()

    def test_an_interrupted_build_has_no_stamp(self, tmp_path):
        tree = make_tree(tmp_path)
        tree.stamp_file.unlink()
        assert not tree.is_current()

    def test_another_recipe_is_told(self, tmp_path):
        with pytest.raises(LabError, match=f"made by another version of vsport: run vsport lab build --dir {tmp_path}"):
            make_tree(tmp_path, "0123").check()

    def test_no_tree_is_told_with_what_to_do(self, tmp_path, monkeypatch):
        with pytest.raises(LabError, match=f"there is no lab in {tmp_path}: run vsport lab build --dir {tmp_path}$"):
            Tree(tmp_path / "tree").check()
        monkeypatch.setenv("VSPORT_LAB", str(tmp_path))
        with pytest.raises(LabError, match="run vsport lab build"):
            Tree(tmp_path / "tree").check()

    def test_the_stamp_follows_the_packages(self, monkeypatch):
        before = stamp()
        monkeypatch.setattr("vsport.lab.tree.PACKAGES", [*PACKAGES, "hello"])
        assert stamp() != before


class TestBuild:
    def test_a_complete_lab_is_left_alone(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", "")
        assert build(make_tree(tmp_path).root) is False

    def test_missing_tools_are_named_with_their_packages(self, tmp_path):
        done = vsport("lab", "build", "--dir", str(tmp_path), env=os.environ | {"PATH": str(tmp_path)})
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert "mmdebstrap, tar, setpriv" in done.stderr
        assert "apt-get install mmdebstrap tar " in done.stderr

    def test_a_place_that_cannot_be_written(self):
        done = vsport("lab", "build", "--dir", "/proc/lab")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "the lab cannot be built in /proc/lab" in done.stderr

    def test_a_second_build_waits_for_the_first_and_says_so(self, tmp_path):
        tree = make_tree(tmp_path)
        out, results = io.StringIO(), []
        with (tmp_path / "lock").open("w") as first:
            fcntl.flock(first, fcntl.LOCK_EX)
            second = threading.Thread(target=lambda: results.append(build(tree.root, progress=Progress(out))))
            second.start()
            second.join(1.0)
            assert second.is_alive()
            assert "another build of this lab is under way: waiting for it" in out.getvalue()
        second.join(PATIENCE)
        assert results == [False]

    def test_options_reach_mmdebstrap(self):
        option = 'Acquire::Check-Valid-Until "false"'
        command = install_command(Path("/lab/pack ages"), [option], "http://mirror/debian")
        assert f"--aptopt={option}" in command
        assert command[-3:] == ["forky", "-", "http://mirror/debian"]
        assert any("sync-in '/lab/pack ages'" in word for word in command)

    @pytest.mark.parametrize(("user", "mode"), [(0, "root"), (1000, "unshare")])
    def test_the_mode_follows_the_user(self, monkeypatch, user, mode):
        monkeypatch.setattr(os, "geteuid", lambda: user)
        assert f"--mode={mode}" in install_command(Path("/p"), [], None)

    def test_every_package_is_downloaded_before_the_installation(self):
        hooks = [word for word in install_command(Path("/p"), [], None) if word.startswith("--essential-hook=")]
        fetched = " ".join(hook.partition("install ")[2] for hook in hooks).replace(">&2", "").split()
        assert fetched == list(PACKAGES)


class TestExplain:
    def test_an_expired_release_file_says_what_to_pass(self):
        line = explain(EXPIRED)
        assert "InRelease is expired" in line
        assert "VSPORT_LAB_APTOPT='Acquire::Check-Valid-Until \"false\"'" in line
        assert "--aptopt" in line
        assert "\n" not in line

    def test_a_full_disk(self):
        assert "no space left on device" in explain("tar: usr/lib: Cannot write: No space left on device\nE: failed\n")

    @pytest.mark.parametrize(
        ("log", "line"),
        [
            (UNRESOLVED, "mmdebstrap failed: Failed to fetch http://mirror.example/debian/dists/forky/InRelease"),
            ("setpriv: something\n", "mmdebstrap failed: setpriv: something"),
            ("", "mmdebstrap failed: it said nothing"),
        ],
    )
    def test_otherwise_the_first_error_counts(self, log, line):
        assert explain(log).startswith(line)


class TestProgress:
    def clocked(self, out, *times):
        return Progress(out, iter(times).__next__)

    def test_elsewhere_a_line_for_each_step_and_one_now_and_then(self):
        out = io.StringIO()
        progress = self.clocked(out, 0.0, 1.0, 2.0, 20.0, 20.0, 21.0)
        progress.step("one")
        progress.tick()
        progress.tick()
        progress.done("two")
        assert out.getvalue() == "[   1 s] one\n[  20 s] one\n[  21 s] two\n"

    def test_on_a_terminal_one_line(self):
        class Terminal(io.StringIO):
            def isatty(self):
                return True

        out = Terminal()
        progress = self.clocked(out, 0.0, 1.0, 2.0, 3.0)
        progress.step("one")
        progress.tick()
        progress.done("two")
        assert out.getvalue() == "\r\x1b[K[   1 s] one\r\x1b[K[   2 s] one\r\x1b[K[   3 s] two\n"

    def test_a_failed_build_ends_the_line_before_its_error_is_told(self, tmp_path):
        ours, theirs = os.openpty()
        try:
            done = subprocess.run(
                [sys.executable, "-m", "vsport", "lab", "build", "--dir", str(tmp_path), "--mirror", "file:///none"],
                stderr=theirs,
                check=False,
            )
            said = os.read(ours, 1 << 16).decode()
        finally:
            os.close(ours)
            os.close(theirs)
        assert done.returncode == 1
        assert said.count("\nvsport lab: ") == 1


def test_user_mode_linux_finds_its_loader_below_the_current_directory():
    loader = b"/lib64/ld-linux-x86-64.so.2\0"
    assert relocated(b"ELF" + loader + b"rest") == b"ELF" + loader[1:] + b"\0rest"
    for odd in b"ELF", b"ELF" + 2 * loader:
        with pytest.raises(LabError, match="not supported"):
            relocated(odd)


def entries(archive):
    """(name, mode, content) of each file in a cpio archive."""
    at, found = 0, []
    while True:
        assert archive[at : at + 6] == b"070701"
        numbers = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        name = archive[at + 110 : at + 110 + numbers[11] - 1].decode()
        content = at + -(-(110 + numbers[11]) // 4) * 4
        at = content + -(-numbers[6] // 4) * 4
        if name == "TRAILER!!!":
            assert at == len(archive)
            return found
        found.append((name, numbers[1], archive[content : content + numbers[6]]))


def test_cpio_archives_hold_what_was_put_in(tmp_path):
    (tmp_path / "d").mkdir(mode=0o755)
    (tmp_path / "d/file").write_bytes(b"12345")
    (tmp_path / "d/file").chmod(0o640)
    (tmp_path / "link").symlink_to("d/file")
    os.mkfifo(tmp_path / "pipe")
    archive = Archive()
    archive.directory("bin")
    archive.file("init", b"#!", 0o755)
    archive.tree(tmp_path, "mnt")
    assert entries(bytes(archive)) == [
        ("bin", 0o040755, b""),
        ("init", 0o100755, b"#!"),
        ("mnt/d", 0o040755, b""),
        ("mnt/d/file", 0o100640, b"12345"),
        ("mnt/link", 0o120777, b"d/file"),
    ]


class Line:
    """Both ends of a channel, each with a thread that collects the frames that arrive there."""

    def __init__(self):
        self.sockets = socket.socketpair()
        self.host = Channel(self.sockets[0].fileno())
        self.guest = Channel(self.sockets[1].fileno(), acknowledge=True)
        self.arrived = {self.host: [], self.guest: []}
        self.threads = []

    def listen(self, end, handle=lambda frame: None):
        def run():
            for frame in end.frames():
                self.arrived[end].append(frame)
                handle(frame)

        self.threads.append(threading.Thread(target=run, daemon=True))
        self.threads[-1].start()

    def close(self):
        for sock in self.sockets:
            sock.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        for sock in self.sockets:
            sock.close()


@pytest.fixture
def line():
    with contextlib.closing(Line()) as made:
        yield made


class TestWire:
    def test_frames_arrive_as_they_were_sent(self, line):
        line.guest.send(Kind.DATA, 70_000, 2, b"\0\xff")
        line.guest.send_exit(1, -9)
        frames = line.host.frames()
        assert next(frames) == (Kind.DATA, 2, 70_000, b"\0\xff")
        assert next(frames).code == -9

    def test_towards_the_guest_little_is_under_way_until_it_is_acknowledged(self, line):
        line.listen(line.host)
        sender = threading.Thread(target=line.host.send_request, args=(1, bytes(100_000)), daemon=True)
        sender.start()
        sender.join(0.5)
        assert sender.is_alive()
        assert len(line.sockets[1].recv(1 << 20, socket.MSG_PEEK)) <= CHANNEL_WINDOW
        line.listen(line.guest)
        sender.join(PATIENCE)
        assert not sender.is_alive()
        assert all(frame.kind is not Kind.ACK for frame in line.arrived[line.host])

    def test_a_sender_does_not_wait_for_a_guest_that_has_gone(self, line):
        line.listen(line.host)
        sender = threading.Thread(target=line.host.send_request, args=(1, bytes(100_000)), daemon=True)
        sender.start()
        line.sockets[1].shutdown(socket.SHUT_RDWR)
        sender.join(PATIENCE)
        assert not sender.is_alive()

    def stream(self, line, source, sink):
        """Standard output of a command: from the guest's end to the host's."""
        outgoing = Outgoing(line.guest, 1, 1, source)
        incoming = Incoming(line.host, 1, 1, sink)
        line.listen(line.host, lambda frame: incoming.feed(frame.payload))
        credit = {Kind.CREDIT: lambda frame: outgoing.credit(frame.number), Kind.STOP: lambda frame: outgoing.stop()}
        line.listen(line.guest, lambda frame: credit[frame.kind](frame))
        outgoing.start()
        incoming.start()
        return outgoing, incoming

    def test_a_stream_carries_any_amount_in_order(self, line):
        data, got, done = os.urandom(1_000_000), bytearray(), []
        source = Source(io.BytesIO(data).read, lambda: done.append("source"))
        threads = self.stream(line, source, Sink(got.extend, lambda: done.append("sink")))
        for thread in threads:
            thread.join(PATIENCE)
        assert got == data
        assert sorted(done) == ["sink", "source"]

    def test_a_reader_that_has_gone_stops_the_writer(self, line):
        def refuse(data):
            raise BrokenPipeError

        done = threading.Event()
        outgoing, incoming = self.stream(line, Source(bytes, done.set), Sink(refuse, lambda: None))
        incoming.join(PATIENCE)
        outgoing.join(PATIENCE)
        assert done.is_set()

    @given(st.binary(max_size=200))
    def test_nonsense_ends_the_channel_and_nothing_else(self, data):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(data)
            theirs.shutdown(socket.SHUT_WR)
            for frame in Channel(ours.fileno()).frames():
                assert frame.kind in Kind


class TestDaemon:
    def test_it_is_ready_when_its_socket_is_there_and_ends_with_the_context(self, tmp_path):
        path = tmp_path / "s"
        options = ["--chardev=null,id=a", "--device=virtserialport,chardev=a,name=org.test.0"]
        with daemon(path, options, tmp_path / "log") as process:
            assert path.is_socket()
            assert process.poll() is None
        assert process.returncode == 0
        assert not path.exists()

    def test_one_that_cannot_start_says_why(self, tmp_path):
        with (
            pytest.raises(LabError, match=r"the device did not start: vsport serve: .*unknown device 'foo'"),
            daemon(tmp_path / "s", ["--device=foo"], tmp_path / "log"),
        ):
            pass


class TestCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "what"),
        [
            ([], "ACTION"),
            (["fly"], "invalid choice: 'fly'"),
            (["build", "--no-such-option"], "--no-such-option"),
            (["build", "surplus"], "surplus"),
            (["run"], "give the command to run in the guest"),
            (["run", "--"], "give the command to run in the guest"),
            (["run", "--guest", "xen", "true"], "invalid choice: 'xen'"),
            (["run", "--memory", "lots", "true"], "'lots' is not a number of MiB"),
            (["run", "--memory", "1", "true"], "'1' is not a number of MiB"),
            (["run", "--timeout", "soon", "true"], "'soon' is not a number of seconds"),
            (["run", "--timeout", "-1", "true"], "'-1' is not a number of seconds"),
            (["run", "--timeout", "inf", "true"], "'inf' is not a number of seconds"),
            (["run", "--share", "/no/such/place", "true"], "'/no/such/place' is not a directory"),
        ],
    )
    def test_nonsense_gives_one_line_and_exit_code_2(self, arguments, what):
        done = vsport("lab", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1
        assert what in done.stderr

    def test_devices_are_checked_before_anything_is_started(self, tmp_path):
        make_tree(tmp_path)
        done = vsport("lab", "run", "--dir", str(tmp_path), "--device", "foo", "--", "true")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "unknown device 'foo'" in done.stderr

    def test_without_a_lab_there_is_one_line_and_125(self, tmp_path):
        done = vsport("lab", "run", "--dir", str(tmp_path / "none"), "--", "true")
        assert (done.returncode, done.stdout) == (125, "")
        assert done.stderr == (
            f"vsport lab: there is no lab in {tmp_path}/none: run vsport lab build --dir {tmp_path}/none\n"
        )
