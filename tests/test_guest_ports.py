"""guest_tools.ports: names, states and holders of ports, from text and files that others wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_tools import ports
from guest_tools.errors import PortBusy, PortNotFound, Unsupported
from guest_tools.ports import Holder, Port, PortState, parse_state, printable

# What Linux 7.2 prints (R-GUEST-03).
GENERIC = """name: org.test.0
guest_connected: 1
host_connected: 0
outvq_full: 0
bytes_sent: 0
bytes_received: 0
bytes_discarded: 0
is_console: no
console_vtermno: 0
"""

PORTS = [
    Port("/dev/vport0p1", "vport0p1", "org.test.0", 1),
    Port("/dev/vport0p2", "vport0p2", None, 2),
    Port("/dev/vport1p1", "vport1p1", "org.twice.0", 1),
    Port("/dev/vport2p1", "vport2p1", "org.twice.0", 1),
]


# debugfs


def test_the_state_of_a_generic_port() -> None:
    assert parse_state(GENERIC) == PortState(guest_connected=True, host_connected=False, is_console=False)


def test_the_state_of_a_console_port() -> None:
    assert parse_state(GENERIC.replace("no", "yes")).is_console is True


@pytest.mark.parametrize("text", ["", "\0", "host_connected", "host_connected:1", "host_connected: 2", ": ", "a: b: c"])
def test_what_is_malformed_is_not_known(text: str) -> None:
    assert parse_state(text) == PortState()


@given(st.text())
def test_any_text_is_a_state(text: str) -> None:
    assert isinstance(parse_state(text), PortState)


@given(st.text())
def test_no_name_can_pose_as_a_flag(name: str) -> None:
    text = GENERIC.replace("org.test.0", name)
    assert parse_state(text) == PortState(guest_connected=True, host_connected=False, is_console=False)


def test_a_port_without_a_debugfs_file_has_no_known_state(tmp_path: Path) -> None:
    assert ports.read_state("vport0p1", str(tmp_path)) == PortState()


def test_the_state_is_read_from_the_ports_own_file(tmp_path: Path) -> None:
    (tmp_path / "vport0p1").write_bytes(GENERIC.encode() + b"\xff\n")
    assert ports.read_state("vport0p1", str(tmp_path)).guest_connected is True


# Names


@pytest.mark.parametrize(
    ("attribute", "name"), [(None, None), (b"\n", ""), (b"a.0\n", "a.0"), (b"a", "a"), (b"a\n\n", "a\n")]
)
def test_the_name_attribute_ends_with_one_line_end(attribute: bytes | None, name: str | None) -> None:
    assert ports.parse_name(attribute) == name


@given(st.binary())
def test_any_bytes_can_be_a_name_and_be_printed(attribute: bytes) -> None:
    shown = printable(ports.parse_name(attribute))
    assert shown.isprintable()
    json.dumps(shown).encode("ascii")


@given(st.text())
def test_printable_text_stays_as_it_is_and_the_rest_becomes_harmless(text: str) -> None:
    assert printable(text).isprintable()
    assert (printable(text) == text) is text.isprintable()


# Finding one


@pytest.fixture
def some_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "list_ports", lambda: PORTS)


@pytest.mark.usefixtures("some_ports")
@pytest.mark.parametrize(("wanted", "index"), [("org.test.0", 0), ("vport0p2", 1), ("/dev/vport1p1", 2)])
def test_a_port_is_found_by_name_kernel_name_or_path(wanted: str, index: int) -> None:
    assert ports.find_port(wanted) is PORTS[index]


def test_a_port_is_found_by_any_path_that_leads_to_its_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = Port("/dev/vport-null", "vport0p1", None, 1, os.stat(os.devnull).st_rdev)
    monkeypatch.setattr(ports, "list_ports", lambda: [PORTS[0], port])
    (tmp_path / "link").symlink_to(os.devnull)
    for path in str(tmp_path / "link"), "/dev/../dev/./null":
        assert ports.find_port(path) is port


@pytest.mark.usefixtures("some_ports")
def test_a_name_that_two_ports_have_is_refused_and_both_paths_are_given() -> None:
    with pytest.raises(PortNotFound, match="use a path: /dev/vport1p1, /dev/vport2p1"):
        ports.find_port("org.twice.0")


@pytest.mark.usefixtures("some_ports")
@pytest.mark.parametrize("wanted", ["nope", "", "/dev/null", "/", "a\nb", "/\0", "vport0p3"])
def test_a_port_that_is_not_there_is_refused_and_the_others_are_named(wanted: str) -> None:
    with pytest.raises(PortNotFound, match=r"org\.test\.0") as caught:
        ports.find_port(wanted)
    assert str(caught.value).isprintable()


def test_a_ports_json_has_these_fields() -> None:
    port = Port("/dev/vport0p1", "vport0p1", "a\x1b", 1, 7, PortState(True, False, False), (Holder(4, "cat", "root"),))
    assert port.as_dict() == {
        "device": "/dev/vport0p1",
        "name": "a\\x1b",
        "id": 1,
        "kind": "generic",
        "host_connected": False,
        "guest_connected": True,
        "holders": [{"pid": 4, "command": "cat", "user": "root"}],
    }
    assert Port("/dev/vport0p2", "vport0p2", None, 2).as_dict()["holders"] is None


# Who holds it


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A process table: 100 has a port open, 101 another file and a node that was removed, 102 is ending.

    Its links lead where those of /proc lead: to something that is called as a port and is a character device.
    """
    (tmp_path / "vport9p1").symlink_to(os.devnull)
    (tmp_path / "vport9p1 (deleted)").symlink_to(os.devnull)
    (tmp_path / "proc/sys/fd").mkdir(parents=True)
    for pid, links in ("100", ["vport9p1", "vport9p1"]), ("101", ["other", "vport9p1 (deleted)"]), ("102", []):
        (tmp_path / "proc" / pid / "fd").mkdir(parents=True)
        for number, link in enumerate(links):
            (tmp_path / "proc" / pid / "fd" / str(number)).symlink_to(tmp_path / link)
        (tmp_path / "proc" / pid / "cmdline").write_bytes(b"cat\0-\0")
        (tmp_path / "proc" / pid / "comm").write_bytes(b"cat\n")
    (tmp_path / "proc/102/fd").rmdir()
    return tmp_path / "proc"


NULL = os.stat(os.devnull).st_rdev


def test_the_holder_of_a_port_is_found_once(proc: Path) -> None:
    found, complete = ports.scan_holders({NULL}, str(proc))
    assert [(holder.pid, holder.command) for holder in found[NULL]] == [(100, "cat -")]
    assert complete


def test_another_ports_holder_is_not_meant(proc: Path) -> None:
    assert ports.scan_holders({NULL + 1}, str(proc)) == ({}, True)


def test_without_proc_nothing_is_known(tmp_path: Path) -> None:
    assert ports.scan_holders({NULL}, str(tmp_path / "none")) == ({}, False)


def test_this_machines_processes_can_be_scanned() -> None:
    found, _ = ports.scan_holders({NULL})
    assert not found.get(NULL)  # Somebody has /dev/null open for sure, but it is not called like a port.


@pytest.mark.parametrize(
    ("cmdline", "comm", "command"),
    [
        (b"qemu-ga\0-p\0/dev/x\0", b"qemu-ga\n", "qemu-ga -p /dev/x"),
        (b"", b"kworker/0:1\n", "[kworker/0:1]"),
        (b"\0", b"", "[]"),
    ],
)
def test_a_process_is_named_by_its_command_line(cmdline: bytes, comm: bytes, command: str) -> None:
    assert ports.parse_command(cmdline, comm) == command


@given(st.binary(), st.binary())
def test_any_command_line_makes_one_line(cmdline: bytes, comm: bytes) -> None:
    assert str(Holder(1, ports.parse_command(cmdline, comm), "root")).isprintable()


def test_the_error_for_a_busy_port_names_its_holder() -> None:
    assert "qemu-ga (pid 7, user root)" in str(PortBusy("/dev/vport0p1", [Holder(7, "qemu-ga", "root")]))
    assert "cannot see" in str(PortBusy("/dev/vport0p1", None))


# No ports, no udev


@pytest.mark.parametrize(
    ("device", "driver", "sentence"),
    [(None, False, "no virtio-serial device"), ("0x0003", False, "modprobe"), ("0x0003", True, "has given it none")],
)
def test_why_there_are_no_ports(
    device: str | None, driver: bool, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R-GUEST-02: sysfs tells a missing device, a missing driver and a missing port apart."""
    monkeypatch.setattr(ports, "VIRTIO_DEVICES", str(tmp_path))
    for name, content in ("virtio0", "0x0002\n"), ("virtio1", "junk"), ("virtio2", device):
        (tmp_path / name).mkdir()
        if content:
            (tmp_path / name / "device").write_text(content)
    if driver:
        (tmp_path / "virtio2" / "driver").mkdir()
    assert sentence in ports.why_no_ports()


def test_another_system_than_linux_gets_a_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "PLATFORM", "darwin")
    with pytest.raises(Unsupported, match="this is darwin"):
        ports.list_ports()


def test_without_pyudev_the_package_is_named() -> None:
    code = "import sys; sys.modules['pyudev'] = None; from guest_tools.cli import main; sys.exit(main(['--list']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert "python3-pyudev" in done.stderr
    assert done.stderr.count("\n") == 1
