"""The command line: whatever is typed gets an answer in a line, and an exit code that says what it was."""

import json
import subprocess
import sys

import pytest

from vsport.cli import main, make_parser


def vsport(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "vsport", *arguments], capture_output=True, text=True, timeout=60, check=False, **options
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["serve"],
        ["serve", "--socket-path"],
        ["serve", "--socket-path", "/x", "--fd", "3"],
        ["serve", "--fd", "three"],
        ["serve", "--fd", "-1"],
        ["serve", "--fd", "99"],
        ["serve", "--fd", "0"],
        ["serve", "--log-level", "loud", "--socket-path", "/x"],
        ["serve", "--socket-path", ""],
        ["serve", "--socket-path", "/no/such/directory/socket"],
        ["serve", "--socket-path", "/etc/passwd"],
        ["serve", "--socket-path", "/tmp/" + "x" * 200],
        ["serve", "--socket-path", "/x", "surplus"],
        ["serve", "--socket-path", "/x", "--no-such-option"],
        ["serve", "--socket-path", "/x", "--chardev", "socket"],
        ["serve", "--socket-path", "/x", "--chardev", "socket,id=c0"],
        ["serve", "--socket-path", "/x", "--chardev", "socket,id=c0,path=/y,server=maybe"],
        ["serve", "--socket-path", "/x", "--chardev", ",,,"],
        ["serve", "--socket-path", "/x", "--chardev", ""],
        ["serve", "--socket-path", "/x", "--device", ""],
        ["serve", "--socket-path", "/x", "--device", "virtserialport,chardev=none"],
        ["serve", "--socket-path", "/x", "--device", "virtserialport,name=\x01"],
        ["serve", "--socket-path", "/x", "--device", "virtserialport,nr=1e3"],
        [
            "serve",
            "--socket-path",
            "/x",
            "--chardev",
            "file,id=c0,path=/proc/nope/x",
            "--device",
            "virtserialport,chardev=c0",
        ],
        ["serve", "--socket-path", "/x", "--chardev", "ringbuf,id=c0,size=3", "--device", "virtserialport,chardev=c0"],
        ["demo", "--guest", "windows"],
        ["demo", "surplus"],
        ["demo", "--guest", "uml", "--lab", "/no/such/lab"],
        ["completion", "tcl"],
    ],
    ids=" ".join,
)
def test_nonsense_gives_one_line_and_no_traceback(arguments):
    done = vsport(*arguments)
    assert done.returncode in (1, 2)
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("vsport")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments", [[], ["serve"], ["demo"], ["lab"], ["completion"]], ids=lambda a: " ".join(a) or "-"
)
def test_every_command_has_help(arguments):
    done = vsport(*arguments, "--help")
    assert done.returncode == 0
    assert "usage: vsport" in done.stdout
    assert done.stderr == ""


def test_without_a_command_there_is_help_and_an_error_code():
    done = vsport()
    assert done.returncode == 2
    assert "serve" in done.stdout


def test_capabilities_are_printed_whatever_else_is_given():
    """R-VU-100, R-VU-101."""
    done = vsport("serve", "--print-capabilities", "--socket-path", "/no/such/place", "--chardev", "nonsense")
    assert (done.returncode, json.loads(done.stdout), done.stderr) == (0, {"type": "console"}, "")


def test_the_description_names_a_program_that_answers(tmp_path):
    """R-VU-102: the file for /etc/qemu/vhost-user, and the binary in it speaks the convention."""
    done = vsport("serve", "--print-description")
    entry = json.loads(done.stdout)
    assert entry["type"] == "console"
    asked = subprocess.run([entry["binary"], "--print-capabilities"], capture_output=True, text=True, check=True)
    assert json.loads(asked.stdout) == {"type": "console"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_scripts_know_the_options(shell):
    done = vsport("completion", shell)
    assert done.returncode == 0
    assert "socket-path" in done.stdout


def test_qemus_single_dash_will_do():
    arguments = make_parser().parse_args(
        ["serve", "--socket-path", "/x", "-chardev", "null,id=c0", "-device", "virtserialport,chardev=c0"]
    )
    assert (arguments.chardev, arguments.device) == (["null,id=c0"], ["virtserialport,chardev=c0"])


def test_main_returns_the_exit_code(capsys):
    assert main(["serve"]) == 2
    assert "--socket-path" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_gets_no_complaint():
    done = subprocess.run(
        f"{sys.executable} -m vsport demo --json | head -1", shell=True, capture_output=True, text=True, check=False
    )
    assert json.loads(done.stdout)["who"] == "guest"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (["--chardev", "help"], "ringbuf"),
        (["--chardev", "socket,help"], "reconnect-ms=N"),
        (["--device", "help"], "virtserialport"),
        (["--device", "virtconsole,help"], "rows=N"),
        (["--device", "virtio-serial,help"], "(default: 31)"),
    ],
)
def test_options_explain_themselves(option, says):
    done = vsport("serve", *option)
    assert done.returncode == 0
    assert says in done.stdout
