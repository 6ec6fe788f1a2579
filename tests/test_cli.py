"""The command line: whatever is typed gets an answer in a line, and an exit code that says what it was."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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
        ["serve", "--poll-max-ns", "-1", "--socket-path", "/x"],
        ["serve", "--poll-max-ns", "2000000000", "--socket-path", "/x"],
        ["serve", "--poll-max-ns", "long", "--socket-path", "/x"],
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
        ["serve", "--socket-path", "/x", "--handover", ""],
        ["serve", "--socket-path", "/x", "--handover", "/tmp/" + "x" * 200],
        ["serve", "--takeover", ""],
        ["serve", "--takeover", "/no/such/offer"],
        ["serve", "--takeover", "/tmp/" + "x" * 200],
        ["serve", "--takeover", "/x", "--handover", "/tmp/" + "x" * 200],
        ["serve", "--takeover", "/no/such\x1b/offer\udcff"],
        ["demo", "--guest", "windows"],
        ["demo", "surplus"],
        ["demo", "--guest", "uml", "--lab", "/no/such/lab"],
        ["demo", "--lab", ""],
        ["demo", "--guest", "uml", "--lab", "x" * 300],
        ["lab"],
        ["lab", "nonsense"],
        ["lab", "path", "--dir", ""],
        ["lab", "path", "surplus"],
        ["lab", "build", "--dir", "/dev/null"],
        ["lab", "run"],
        ["lab", "run", "--memory", "99999999999999999999", "--", "true"],
        ["serve", "--fd", "99", "--chardev", "nonsense\n\x1b[2J,id=c0"],
        ["serve", "--socket-path", "/no\nsuch/directory/\udcff"],
        ["nonsense\n\udcff"],
        ["serve", "--fd", "99", "--device", "virtserialport,nr=" + "9" * 100_000],
        ["completion", "tcl"],
        ["inspect"],
        ["inspect", "/no/such/file"],
        ["inspect", "/etc/passwd"],
        ["inspect", "/dev/null"],
        ["inspect", "--states", "poem"],
        ["inspect", "--states", "dot", "/etc/passwd"],
    ],
    ids=lambda arguments: repr(" ".join(arguments))[1:61],
)
def test_nonsense_gives_one_line_and_no_traceback(arguments):
    done = vsport(*arguments)
    assert done.returncode in (1, 2)
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("vsport")
    assert lines[0].isprintable()
    assert len(lines[0]) < 1000
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "prefix"),
    [
        (["--bad"], "vsport: "),
        (["serve", "--bad"], "vsport serve: "),
        (["lab", "run", "--bad"], "vsport lab run: "),
    ],
)
def test_an_unknown_option_is_blamed_on_its_command(arguments, prefix):
    assert vsport(*arguments).stderr.startswith(f"{prefix}unrecognized arguments: --bad; see {prefix[:-2]} --help")


@pytest.mark.parametrize(
    "arguments",
    [[], ["serve"], ["demo"], ["lab"], ["lab", "build"], ["lab", "run"], ["lab", "path"], ["completion"]],
    ids=lambda a: " ".join(a) or "-",
)
def test_every_command_has_help_that_fits_a_terminal(arguments):
    done = vsport(*arguments, "--help", env=os.environ | {"COLUMNS": "80"})
    assert done.returncode == 0
    assert "usage: vsport" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert done.stderr == ""


def test_serving_does_not_load_what_it_does_not_need():
    code = "import sys; from vsport.cli import main; main(['serve', '--print-capabilities']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"vsport.lab", "vsport.demo", "vsport.sim", "subprocess", "asyncio"}


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


def test_bash_completes_files_and_directories_where_an_option_takes_them():
    script = vsport("completion", "bash").stdout
    for option in ("socket_path", "handover", "takeover"):
        assert f"_serve___{option}_COMPGEN=_shtab_compgen_files" in script
    assert "_lab_build___dir_COMPGEN=_shtab_compgen_dirs" in script


@pytest.mark.parametrize(
    ("option", "value"),
    [("--chardev", "null,id=c0"), ("--device", "virtserialport"), ("--socket-path", "/y"), ("--fd", "0")],
)
def test_a_device_that_is_taken_over_is_as_it_is(option, value):
    done = vsport("serve", "--takeover", "/x", option, value)
    assert done.returncode == 2
    assert done.stderr == (
        f"vsport serve: --takeover brings the device along as it is, with its chardevs and its VMM: no {option}\n"
    )


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


@pytest.mark.parametrize(
    "arguments",
    [["--version"], ["--help"], ["demo"], ["serve", "--print-capabilities"], ["completion", "bash"], ["lab", "path"]],
    ids=" ".join,
)
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_full_disk_gets_one_line(arguments, unbuffered):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "vsport", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    if arguments == ["--help"] and unbuffered:  # argparse keeps such an error to itself.
        assert done.stderr == ""
        return
    assert (done.returncode, done.stderr) == (1, "vsport: cannot write the output: No space left on device\n")


def test_closed_standard_descriptors_stay_out_of_use(tmp_path):
    """Their numbers would go to the next socket, and messages into it."""
    vm = tmp_path / "vm.sock"
    command = f'exec "$@" <&- >&- 2>"{tmp_path}/said"'
    daemon = [sys.executable, "-m", "vsport", "serve", "--socket-path", str(vm)]
    process = subprocess.Popen(["sh", "-c", command, "sh", *daemon])
    try:
        deadline = time.monotonic() + 20
        while not vm.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert [os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in (0, 1)] == ["/dev/null"] * 2
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "said").read_text() == ""


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_descriptors_are_no_error(redirection):
    for command in "demo", "lab path":
        shell = f"{sys.executable} -m vsport {command} {redirection}"
        done = subprocess.run(shell, shell=True, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_ends_the_demo_and_nothing_is_left(tmp_path, number, code):
    process = subprocess.Popen(
        [sys.executable, "-m", "vsport", "demo", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    with process:
        process.stdout.readline()
        assert list(tmp_path.iterdir())
        process.send_signal(number)
        assert process.stderr.read() == b""
    assert process.returncode == code
    assert list(tmp_path.iterdir()) == []


def test_a_path_goes_out_as_it_came_in():
    command = [sys.executable, "-m", "vsport", "lab", "path", "--dir", b"/\xff\xfe"]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"/\xff\xfe/tree\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_the_demo_draws_with_what_the_terminal_has(encoding):
    done = vsport("demo", env=os.environ | {"PYTHONIOENCODING": encoding}, encoding=encoding)
    assert (done.returncode, done.stderr) == (0, "")
    assert ("██" if encoding == "utf-8" else "##") in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_the_library_example_of_the_readme_runs(tmp_path):
    text = (Path(__file__).parent.parent / "README.md").read_text()
    example = text.partition("```python\n")[2].partition("```")[0].replace("/run/vm.sock", str(tmp_path / "vm.sock"))
    exec(compile(example.replace("loop.run()", "loop.run_once(0)"), "README.md", "exec"), names := {})
    assert (tmp_path / "vm.sock").is_socket()
    for thing in "server", "host", "loop":
        names[thing].close()
