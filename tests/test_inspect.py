"""`vsport inspect`: what it says about files, and the table of connections in three forms."""

import json
import os
import re

import pytest
from qemu_files import Chain, Section, migration_file, recorded

from vsport import inspect
from vsport.connection import TABLE, Cause, Effect, Refused, State
from vsport.errors import HostError
from vsport.inspect import FileImage, Report, describe, states


@pytest.fixture
def write(tmp_path):
    """Makes a file with the given bytes."""

    def make(data):
        path = tmp_path / "vm.file"
        path.write_bytes(data)
        return path

    return make


def words(text):
    """Text without its line breaks."""
    return " ".join(text.split())


# -- QEMU's files ------------------------------------------------------------------------------------------------------


def test_a_recorded_file_on_one_screen(write):
    text = describe(write(recorded())).text
    assert len(text.splitlines()) < 60
    assert max(map(len, text.splitlines())) <= 100
    told = words(text)
    for part in (
        "a migration file of QEMU",
        "a virtual machine of type pc-q35-11.1",
        "virtio-serial device 0000:00:02.0 (PCI)",
        "driver is running",
        "ports 5 of 31; their names are not in the file",
        "port guest host waiting for the host 1 open connected - 2 closed connected -",
        "ports 1, 3: open in the guest, and the host was connected. After the move the new back end has to be told",
        "port 2: closed in the guest, the host was connected.",
        "port 4: open in the guest, no host at save time.",
        "(the bug of 2011)",
        "port 5: nobody at either end.",
        "warning: 0000:00:03.0:00.0 (PCI): a throttled port with packed rings",
    ):
        assert part in told, part


def test_a_throttled_port(write):
    text = words(describe(write(migration_file(Section(ports=((1, 1, 1, Chain()),))))).text)
    assert "1 open connected 150 of 300 bytes" in text
    assert "port 1: throttled: the host had stopped reading, 150 bytes into a chain of 300." in text
    assert "The 150 bytes that are left have to follow exactly once, from guest address 0x5032 on." in text
    assert text.endswith("Nothing in it contradicts itself.")


def test_contradictions_come_first_and_forbid_a_restore(write):
    section = Section(ports_map=7, version=3, subsections=(("virtio/broken", b"\1"),))
    lines = describe(write(migration_file(section))).text.splitlines()
    where = next(number for number, line in enumerate(lines) if line.startswith("error: "))
    assert lines[where] == "error: 0000:00:04.0 (PCI): port 2 is in the map of ports but has no state"
    assert lines[where + 1].startswith("warning: ")
    assert lines[-1] == "Do not restore a device from this file."


def test_a_machine_without_the_device(write):
    assert "It has no virtio-serial device." in describe(write(migration_file())).text


def test_a_device_without_a_driver_and_ports(write):
    text = words(describe(write(migration_file(Section(ports=(), status=0, features=0)))).text)
    assert "driver is not running: nothing in the guest uses the device features none" in text
    assert "ports 0 of 3" in text


def test_json_has_an_object_for_each_thing(write):
    path = write(recorded())
    objects = [json.loads(line) for line in describe(path).json_lines().splitlines()]
    kinds = [item["type"] for item in objects]
    assert kinds == ["file", "device", *["port"] * 5, "device", *["port"] * 2, "finding"]
    assert objects[0] == {
        "type": "file",
        "format": "qemu-migration",
        "path": str(path),
        "size": path.stat().st_size,
        "machine": "pc-q35-11.1",
        "capabilities": [],
        "page_size": 4096,
        "described": True,
        "consistent": True,
    }
    assert objects[2] == {
        "type": "port",
        "device": "0000:00:02.0/virtio-console",
        "id": 1,
        "guest_connected": True,
        "host_connected": True,
        "element": None,
        "throttled": False,
    }
    assert set(objects[4]["element"]) == {
        *("head", "segments", "out_num", "in_num", "iov_idx", "iov_offset", "descriptors"),
        *("bytes_total", "bytes_taken", "bytes_left", "resumes_at"),
    }
    assert (objects[-1]["device"], objects[-1]["rule"]) == ("0000:00:03.0:00.0/virtio-console", "R-MIG-15")


def test_keys_of_a_device_are_stable(write):
    lines = describe(write(migration_file(Section()))).json_lines().splitlines()
    assert list(json.loads(lines[1])) == [
        *("type", "idstr", "instance", "version", "section_id", "offset", "size", "bus", "status", "isr", "queue_sel"),
        *("features", "config", "queues", "cols", "rows", "max_ports", "ports_map", "broken", "disabled", "started"),
        "feature_names",
    ]


# -- other files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"Q", "begins with b'Q', and is no file that vsport knows"),
        (b"\0" * 100, "is no file that vsport knows"),
        (b"\x1f\x8b\x08\0", "is compressed by gzip: unpack it first"),
        (b"\x28\xb5\x2f\xfd....", "is compressed by zstd"),
        (b"LibvirtQemudSave....", "is a save image of libvirt"),
        (b"QFI\xfb....", "is a qcow2 disk"),
        (b"QEVM\0\0\0\4", "at byte 4: expected version 3 of the format, found version 4; the file is damaged"),
        (migration_file(Section(), describe=False)[:500], "the file is damaged or cut short"),
    ],
)
def test_what_is_no_good_file_gets_one_line(write, data, message):
    path = write(data)
    with pytest.raises(HostError) as caught:
        describe(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_at_all(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in [
        (tmp_path, "not a regular file"),
        (tmp_path / "pipe", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        (tmp_path / "missing", "No such file or directory"),
        ("a\0b", "embedded null byte"),
    ]:
        with pytest.raises(HostError, match=message):
            describe(path)


def test_another_kind_of_file_needs_a_line_in_the_table(write, monkeypatch):
    monkeypatch.setitem(inspect.FORMATS, b"MINE", lambda path, image: Report(f"{image.size} bytes of mine", []))
    assert describe(write(b"MINE and more")).text == "13 bytes of mine"


def test_no_descriptor_stays_open(write):
    before = os.listdir("/proc/self/fd")
    describe(write(recorded()))
    with pytest.raises(HostError):
        describe(write(b"?"))
    assert os.listdir("/proc/self/fd") == before


def test_a_file_is_read_where_it_is_asked_for(write):
    with write(bytes(range(200))).open("rb") as file:
        image = FileImage(file.fileno())
        assert (image.size, image.read(190, 5), image.read(190, 50)) == (
            200,
            bytes(range(190, 195)),
            bytes(range(190, 200)),
        )
        assert image.read(500, 5) == b""


# -- the table of connections ------------------------------------------------------------------------------------------


def test_every_pair_is_in_the_table():
    lines = states().splitlines()
    for (state, cause), outcome in TABLE.items():
        (line,) = [line for line in lines if line.split()[:2] == [state.name, cause.value]]
        rest = line.split(None, 2)[2]
        if isinstance(outcome, Refused):
            assert rest == f"refused     {outcome.what} ({outcome.rule})"
            continue
        following, effects = re.split(r"  +", rest)
        assert following == ("-" if outcome.state is state else outcome.state.name)
        assert effects == (", ".join(effect.name.lower().replace("_", " ") for effect in outcome.effects) or "-")


def test_the_bits_of_each_state_are_in_the_table():
    rows = [line.split() for line in states().splitlines()[2 : 2 + len(State)]]
    assert rows == [[state.name, *("yes" if bit else "-" for bit in state.value)] for state in State]


def test_columns_are_aligned():
    lines = [
        line for line in states().splitlines() if len(line.split()) > 3 and line.split()[1] in set(map(str, values()))
    ]
    starts = {re.match(r"  \S+ +\S+ +\S+ +", line).end() for line in lines}
    assert (len(lines), len(starts)) == (len(TABLE), 1)


def values():
    return [cause.value for cause in Cause]


def arrows():
    """What a diagram has to show: the pairs that change or do something."""
    shown = {pair: outcome for pair, outcome in TABLE.items() if not isinstance(outcome, Refused)}
    return {pair: outcome for pair, outcome in shown.items() if outcome.state is not pair[0] or outcome.effects}


def test_mermaid_has_an_arrow_for_each_change():
    lines = [line.strip() for line in states("mermaid").splitlines()]
    assert lines[0] == "stateDiagram-v2"
    assert sum(" --> " in line for line in lines) == len(arrows())
    for (state, cause), outcome in arrows().items():
        start = f"{state.name} --> {outcome.state.name}: {cause.value}"
        assert any(line == start or line.startswith(f"{start} / ") for line in lines), start


def test_dot_has_an_arrow_for_each_change():
    text = states("dot")
    assert text.startswith("digraph connection {")
    assert text.endswith("\n}")
    assert text.count(" -> ") == len(arrows())
    assert text.count('"') % 2 == 0
    for (state, cause), outcome in arrows().items():
        assert re.search(rf'^    {state.name} -> {outcome.state.name} \[label="{cause.value}["\\]', text, re.MULTILINE)


def test_every_effect_of_the_table_is_named_in_every_form():
    used = {effect for outcome in arrows().values() for effect in outcome.effects}
    assert used <= set(Effect)
    for form in inspect.STATES_FORMATS:
        for effect in used:
            assert effect.name.lower().replace("_", " ") in states(form)


def test_an_unknown_form():
    with pytest.raises(KeyError):
        states("svg")
