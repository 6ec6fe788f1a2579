"""``vsport-open`` as a user meets it: one line for each mistake, stable exit codes. With real ports: tests/lab."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import guest_tools
from guest_tools import cli, report
from guest_tools.bridge import Ending, Outcome
from guest_tools.events import Event
from guest_tools.host_changes import HostChange
from guest_tools.ports import Holder, Port, PortState

COMMAND = [sys.executable, "-m", "guest_tools"]
ROOT = Path(guest_tools.__file__).parent.parent
NOBODY = "org.nobody.has.this.0"


def vsport_open(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    defaults = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 30, "cwd": ROOT}
    return subprocess.run([*COMMAND, *args], **{**defaults, **options})


NONSENSE = [
    [],
    [""],
    ["--json"],
    ["a", "b"],
    ["--nonsense"],
    ["--lis"],
    ["-x"],
    ["--list", "--watch"],
    ["--wait", "--hold", NOBODY],
    ["--wait"],
    ["--hold"],
    ["--list", NOBODY],
    ["--watch", NOBODY],
    ["--list=yes"],
    ["--timeout"],
    ["--timeout", "", NOBODY],
    ["--timeout", "soon", NOBODY],
    ["--timeout", "-1", NOBODY],
    ["--timeout", "nan", NOBODY],
    ["--timeout", "inf", NOBODY],
    ["--timeout", "1\n2", NOBODY],
    ["--timeout", "1", "--hold", NOBODY],
    ["--timeout", "1", "--list"],
    ["--timeout", "1", "--watch"],
    ["-N", "--list"],
    ["-N", "--wait", NOBODY],
    ["--close-on-eof", "--hold", NOBODY],
    ["--json=1", NOBODY],
    ["--verbose=1", NOBODY],
    ["\x1b[2J", "\x1b"],
]


@pytest.mark.parametrize("args", NONSENSE, ids=repr)
def test_nonsense_gets_one_line_and_exit_code_2(args: list[str]) -> None:
    done = vsport_open(*args)
    assert (done.returncode, done.stdout) == (cli.USAGE, "")
    assert re.fullmatch(r"vsport-open: [ -~]+ \(see vsport-open --help\)\n", done.stderr), done.stderr


@pytest.mark.parametrize("args", [[NOBODY], ["--hold", NOBODY], ["/dev/null"], ["/"], ["vport99p99"], ["\udcff\x07"]])
def test_a_port_that_is_not_there_gets_one_line_and_exit_code_3(args: list[str]) -> None:
    done = vsport_open(*args)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (cli.NOT_FOUND, "", 1)
    assert "no virtio-serial port" in done.stderr


def test_waiting_in_vain_is_exit_code_5() -> None:
    done = vsport_open("--wait", NOBODY, "--timeout", "0.1")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (cli.TIMEOUT, "", 1)


def test_with_json_errors_are_json_too() -> None:
    done = vsport_open("--json", NOBODY)
    assert json.loads(done.stderr)["code"] == done.returncode == cli.NOT_FOUND


def test_an_interrupt_is_quiet_and_ends_it_at_once() -> None:
    with subprocess.Popen([*COMMAND, "-v", "--wait", NOBODY], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        assert process.stderr.readline() == f"vsport-open: waiting for {NOBODY}\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == -signal.SIGINT  # which a shell shows as 130


def test_an_output_that_takes_nothing_is_one_line() -> None:
    """Needs a result to write, so the table is written without a port to be listed."""
    code = "from guest_tools import cli; cli._list = lambda args, out: out.result('x', {});"
    code += "cli.COMMANDS['list'] = cli.COMMANDS['list'].replace(run=cli._list); raise SystemExit(cli.main(['--list']))"
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (cli.ERROR, "vsport-open: No space left on device\n")


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_standard_descriptors_do_no_harm(closed: tuple[int, ...]) -> None:
    shell = " ".join(f"{fd}>&-" for fd in closed)
    done = subprocess.run(["sh", "-c", f'exec "$@" {shell}', "sh", *COMMAND, NOBODY], cwd=ROOT, timeout=30)
    assert done.returncode == cli.NOT_FOUND


def test_list_succeeds_also_when_there_are_no_ports() -> None:
    done = vsport_open("--list")
    assert done.returncode == cli.OK
    assert done.stdout.startswith("PORT ") or "no virtio-serial ports: " in done.stderr


def test_help_names_every_option_and_exit_code() -> None:
    text = vsport_open("--help").stdout
    for word in ("--list", "--watch", "--wait", "--hold", "--json", "--timeout", "--close-on-eof", "examples:"):
        assert word in text
    for code in (*cli.EXIT_CODES.values(), cli.OK, cli.ERROR, cli.USAGE, cli.UNSENT, 130):
        assert re.search(rf"^  {code}\s", text, re.MULTILINE)
        assert re.search(rf"^{code}\s", cli.__doc__ or "", re.MULTILINE)


def test_the_version_is_the_projects() -> None:
    project = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert project
    assert vsport_open("--version").stdout == f"vsport-open {project[1]}\n"


def test_nothing_of_the_hosts_half_is_loaded() -> None:
    code = "import sys, guest_tools.cli; print(sorted(m for m in sys.modules if m.split('.')[0] == 'vsport'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


def test_an_ignored_interrupt_stays_ignored() -> None:
    """As under nohup, or for a command that a shell runs in the background."""
    code = "import signal; from guest_tools.cli import main; signal.signal(2, signal.SIG_IGN); main(['--list'])"
    code += "; assert signal.getsignal(2) is signal.SIG_IGN"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_listing_does_not_load_what_it_does_not_need() -> None:
    code = "import sys; from guest_tools.cli import main; main(['--list']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(done.stderr.split())
    ours = {module.removeprefix("guest_tools.") for module in loaded if module.startswith("guest_tools.")}
    assert ours == {"cli", "errors", "ports", "record", "report"}
    assert not loaded & {"dataclasses", "inspect", "json"}


def test_every_public_name_of_the_package_is_there() -> None:
    assert {name for name in guest_tools.__all__ if not hasattr(guest_tools, name)} == set()
    with pytest.raises(AttributeError, match="nonsense"):
        _ = guest_tools.nonsense  # type: ignore[attr-defined]


# What is printed

PORTS = [
    Port("/dev/vport0p1", "vport0p1", "org.a.0", 1, 0, PortState(True, False, False), (Holder(7, "qemu-ga", "root"),)),
    Port("/dev/vport0p12", "vport0p12", None, 12, 0, PortState(), None),
    Port("/dev/vport0p3", "vport0p3", "con", 3, 0, PortState(True, True, True), None),
    Port("/dev/vport0p4", "vport0p4", "\x1b[2J", 4, 0, PortState(False, True, False), ()),
]


def test_the_table_is_aligned_and_safe_to_print() -> None:
    assert report.port_table(PORTS) == [
        "PORT            NAME     ID  KIND     HOST       HOLDER",
        "/dev/vport0p1   org.a.0  1   generic  away       qemu-ga (pid 7, user root)",
        "/dev/vport0p12  -        12  ?        ?          ?",
        "/dev/vport0p3   con      3   console  connected  kernel",
        "/dev/vport0p4   \\x1b[2J  4   generic  connected  -",
    ]


@given(st.lists(st.builds(Port, st.just("/dev/x"), st.just("x"), st.none() | st.text(), st.integers())))
def test_any_names_make_one_printable_line_each(ports: list[Port]) -> None:
    lines = report.port_table(ports)
    assert len(lines) == len(ports) + 1
    assert all(line.isprintable() for line in lines)


def test_the_clock_shows_milliseconds() -> None:
    assert re.fullmatch(r"\d\d:\d\d:01\.999", report.clock(61.9996))


class Lines(report.Reporter):
    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []
        self.errors: list[int] = []

    def result(self, text: str, record: dict[str, Any]) -> None:
        self.lines.append((text, record))

    note = result

    def error(self, text: str, code: int) -> None:
        self.errors.append(code)


def test_the_state_at_the_start_is_no_leaving() -> None:
    out = Lines()
    for connected, first in (False, True), (True, False), (False, False):
        cli._report_change(out, PORTS[0], HostChange(connected, 5), first)
    assert [record["event"] for _, record in out.lines] == ["waiting", "host_connected", "host_left"]
    assert out.lines[2][1].keys() == {"event", "time", "device", "name", "discarded"}


def test_an_opening_names_who_did_it() -> None:
    assert cli._event_text(Event("opened", PORTS[0], 0.0)).endswith("(org.a.0) by qemu-ga (pid 7, user root)")


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (Outcome(Ending.HOST_LEFT, 1, 1, 0), cli.OK),
        (Outcome(Ending.HOST_LEFT, 1, 1, 3), cli.UNSENT),
        (Outcome(Ending.INPUT_ENDED, 1, 1, 0), cli.OK),
        (Outcome(Ending.OUTPUT_CLOSED, 1, 1, 3), cli.ERROR),
    ],
)
def test_the_exit_code_of_a_session(outcome: Outcome, code: int) -> None:
    out = Lines()
    assert cli._report_outcome(out, outcome) == code
    assert out.errors == ([code] if code else [])


def test_a_pipe_that_is_full_and_non_blocking_still_gets_whole_lines() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    text = "x" * 200_000
    pid = os.fork()
    if not pid:
        report.write_line(writer, text)
        os._exit(0)
    os.close(writer)
    with open(reader, encoding="ascii") as file:
        assert file.read() == text + "\n"
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize("args", [["--help"], ["--version"]])
def test_a_full_disk_gets_one_line(args: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = vsport_open(*args, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (cli.ERROR, "vsport-open: No space left on device\n")


def test_the_help_fits_a_terminal() -> None:
    done = vsport_open("--help", env={**os.environ, "COLUMNS": "80"})
    assert max(map(len, done.stdout.splitlines())) <= 80
