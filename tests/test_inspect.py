"""`vsport inspect`: what it says about files, and the table of connections in three forms."""

import gc
import json
import os
import re

import pytest
from hypothesis import given
from qemu_files import Chain, Section, migration_file, recorded
from snapshot_files import EXAMPLE, framed, snapshots

from vsport import inspect
from vsport.cli import main
from vsport.connection import TABLE, Cause, Effect, Refused, State
from vsport.constants import BAD_PORT_ID, Event
from vsport.control import Message
from vsport.errors import HostError
from vsport.inspect import FileImage, describe, states
from vsport.report import Report
from vsport.snapshot import PortConfig, PortState, QueueState, Snapshot
from vsport.snapshot_report import snapshot_report


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


# -- snapshots ---------------------------------------------------------------------------------------------------------


def told(*ports, waiting=(), queues=(), features=7, driver_ready=True):
    """What is said about a snapshot with these ports."""
    snapshot = Snapshot(31, 80, 25, features, driver_ready, tuple(queues), tuple(ports), tuple(waiting))
    return words(snapshot_report("file", snapshot, 1).text)


def port(state, id=1, name="org.test.1", added=True, **options):
    return PortState(PortConfig(id, name), state, added=added, **options)


def test_a_snapshot_on_one_screen(write):
    text = describe(write(EXAMPLE.encode())).text
    assert len(text.splitlines()) < 60
    assert max(map(len, text.splitlines())) <= 100
    for part in (
        f"a snapshot of vsport, {len(EXAMPLE.encode())} bytes: a virtio-serial device at the moment it stood still.",
        "driver is running, and has asked for its ports",
        "features SIZE MULTIPORT EMERG_WRITE INDIRECT_DESC EVENT_IDX VERSION_1",
        "queues 10, of which the driver has set up 3",
        "ports 3 of 4",
        "port kind name guest host session waiting for the host",
        "0 console 132x43 - closed connected - -",
        "1 generic org.test.1 open connected 7 a chain from byte 4096 on",
        "3 generic org.test.3 not ready absent - -",
        "port 0: closed in the guest, the host was connected.",
        "port 1: open in the guest, and the host was connected. The new back end is told that the guest has it open",
        "port 1: half-sent: a host took the first 4096 bytes of the chain at available index 12 in queue 5",
        "port 1: its back end gets back what it kept for itself (15 B).",
        "port 3: the driver has not been told of it, and is when it asks for its ports.",
        "gets them in this order: port 1: its host has left port 3: its name is org.test.3 Nothing in it contradicts",
    ):
        assert part in words(text), part


@pytest.mark.parametrize(
    ("state", "added", "row", "meaning"),
    [
        (State.A, True, "open connected", "open in the guest, and the host was connected. The new back end is told"),
        (State.D, True, "open absent", "open in the guest, no host at save time. The new back end is told"),
        (State.C, True, "closed connected", "closed in the guest, the host was connected. This host's session stays"),
        (State.B, True, "closed absent", "nobody at either end. There is nothing to bring over."),
        (State.C_UNREADY, True, "not ready connected", "the driver was told of it, and has not called it ready."),
        (State.B_UNREADY, True, "not ready absent", "the driver was told of it, and has not called it ready."),
        (State.C_UNREADY, False, "not ready connected", "the driver has not been told of it"),
        (State.B_UNREADY, False, "not ready absent", "the driver has not been told of it"),
    ],
)
def test_every_state_of_a_port_in_words(state, added, row, meaning):
    text = told(port(state, added=added))
    assert f"1 generic org.test.1 {row} - -" in text
    assert f"port 1: {meaning}" in text


def test_each_meaning_is_told_once():
    text = told(*(port(State.D, id, f"org.test.{id}") for id in range(1, 6)))
    assert text.count("the bug of 2011") == 1
    assert "ports 1, 2, 3, 4, 5: open in the guest" in text


def test_bytes_that_nobody_takes_are_told():
    text = told(port(State.D, stale=True), queues=[QueueState(5, 128, 3, 10)])
    assert "half-sent: a host took the first 10 bytes of the chain at available index 3 in queue 5" in text
    assert "and not the rest, for which there is no host." in text
    assert "goes back to the guest, unsent." in text


def test_queues_only_where_they_say_something():
    text = told(port(State.D), queues=[QueueState(2, 128, 3), QueueState(3, 64, 9, 4), QueueState(4, 64, 9, 7)])
    assert "queue 3 control: 4 bytes into the chain at available index 9" in text
    assert "queue 4 port 1, to the guest: 7 bytes into the chain at available index 9" in text
    assert "queue 2" not in text
    assert "queue 5 port 1" not in told(port(State.A), queues=[QueueState(5, 128, 3, 10)])  # The port tells it.
    assert "queue 1 port 0, from the guest: 1 bytes" in told(queues=[QueueState(1, 128, 3, 1)])


def test_drivers_that_know_less():
    assert "driver has not asked for its ports: it is not there, or not yet" in told(driver_ready=False)
    assert "driver has not asked for its ports" in told(driver_ready=False, features=0)
    assert "features none" in told(driver_ready=False, features=0)
    assert "driver knows one port only, number 0" in told(driver_ready=False, features=1)


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (Message(1, Event.PORT_ADD, 1), "port 1: it is there"),
        (Message(9, Event.PORT_REMOVE, 1), "port 9: it is unplugged"),
        (Message(1, Event.CONSOLE_PORT, 1), "port 1: it is a console"),
        (Message(1, Event.PORT_OPEN, 1), "port 1: its host has come"),
        (Message(1, Event.PORT_OPEN, 0), "port 1: its host has left"),
        (Message.name(1, "org.x"), "port 1: its name is org.x"),
        (Message(1, Event.PORT_NAME, 1, b"\x1b[2J\xff\n"), r"port 1: its name is '\x1b[2J\\xff\n'"),
        (Message.resize(1, 132, 43), "port 1: its terminal has 132 columns and 43 rows"),
        (Message.resize(2, 132, 43, rows_first=True), "port 2: its terminal has 132 columns and 43 rows"),
        (Message(1, Event.RESIZE, 0, b"\1"), "port 1: a size that is cut short"),
        (Message(BAD_PORT_ID, Event.DEVICE_READY, 1), "the device: DEVICE_READY, which only a driver says"),
    ],
)
def test_every_message_in_words(message, says):
    """R-MIG-22."""
    plugged = port(State.B), PortState(PortConfig(2, console=True, rows_first=True), State.B, added=True)
    assert f"gets them in this order: {says} " in told(*plugged, waiting=[message])


def test_more_messages_than_fit_on_a_screen():
    text = told(waiting=[Message(1, Event.PORT_ADD, 1)] * 23)
    assert text.count("port 1: it is there") == 20
    assert "and 3 more (--json has them)" in text


def test_names_that_would_do_harm_to_a_terminal_are_escaped(write):
    for name, seen in [
        ("a b", "'a b'"),
        ("\u202e\x9b2Jx", r"'\u202e\x9b2Jx'"),
        ("1  generic", "'1  generic'"),
        ("ü", "'ü'"),
        ("x" * 1000, f"'{'x' * 60}'..."),
    ]:
        report = describe(write(Snapshot(31, 80, 25, 7, True, (), (port(State.B, name=name),)).encode()))
        assert seen in report.text
        assert all(line.isprintable() for line in report.text.splitlines())
        assert [json.loads(line)["name"] for line in report.json_lines().splitlines()[2:]] == [name]


@given(snapshots)
def test_any_snapshot_can_be_told(snapshot):
    report = snapshot_report("file", snapshot, 1)
    assert max(map(len, report.text.splitlines())) < 200
    kinds = [json.loads(line)["type"] for line in report.json_lines().splitlines()]
    assert kinds == ["file", "device", *["port"] * len(snapshot.ports), *["message"] * len(snapshot.waiting)]


def test_the_json_of_a_snapshot_is_stable(write):
    path = write(EXAMPLE.encode())
    file, device, *rest = [json.loads(line) for line in describe(path).json_lines().splitlines()]
    assert file == {
        "type": "file",
        "format": "vsport-snapshot",
        "path": str(path),
        "size": path.stat().st_size,
        "consistent": True,
    }
    assert list(device) == [
        *("type", "max_ports", "cols", "rows", "features", "driver_ready", "queues", "feature_names"),
    ]
    assert device["queues"][2] == {"index": 5, "size": 256, "next_avail": 12, "offset": 4096}
    assert rest[1] == {
        "type": "port",
        "device": None,
        "id": 1,
        "name": "org.test.1",
        "console": False,
        "cols": 80,
        "rows": 25,
        "rows_first": False,
        "host_connected": True,
        "device_ready": True,
        "guest_connected": True,
        "added": True,
        "stale": False,
        "session": 7,
        "back_end_bytes": 15,
        "throttled": True,
        "bytes_taken": 4096,
    }
    assert rest[3] == {
        "type": "message",
        "device": None,
        "port": 1,
        "event": "PORT_OPEN",
        "value": 0,
        "words": "its host has left",
        "bytes": "0100000006000000",
    }


def test_ports_of_both_kinds_of_files_can_be_asked_alike(write):
    common = {"type", "device", "id", "guest_connected", "host_connected", "throttled"}
    for data in EXAMPLE.encode(), recorded():
        lines = [json.loads(line) for line in describe(write(data)).json_lines().splitlines()]
        assert all(common <= line.keys() for line in lines if line["type"] == "port")


def test_a_snapshot_cut_short_anywhere_or_changed_anywhere_gets_one_line(write):
    data = EXAMPLE.encode()
    broken = [data[:size] for size in range(len(data))]
    broken += [data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :] for at in range(len(data))]
    for changed in broken:
        path = write(changed)
        with pytest.raises(HostError) as caught:
            describe(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert str(caught.value).isprintable()


def test_a_file_that_only_claims_to_be_a_snapshot_costs_no_memory(tmp_path):
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.write(EXAMPLE.encode())
        file.truncate(1 << 40)
    with pytest.raises(HostError, match="cut short or longer"):
        describe(path)


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
        (EXAMPLE.encode()[:19], "not a vsport snapshot"),
        (EXAMPLE.encode()[:-1], "bytes where"),
        (EXAMPLE.encode()[:-1] + b"?", "its checksum is wrong: it was changed on its way"),
        (b"vsport\0\x09" + bytes(100), "format 9 is not known here; this vsport reads format 1"),
        (framed({"evil\n\x1b[2J": 1}), "max_ports is missing"),
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
    gc.collect()  # what earlier tests left must not go just now
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


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_report_or_its_objects(write, capsys):
    path = str(write(EXAMPLE.encode()))
    assert main(["inspect", path]) == 0
    assert capsys.readouterr().out == describe(path).text + "\n"
    assert main(["inspect", "--json", path]) == 0
    assert capsys.readouterr().out == describe(path).json_lines() + "\n"


def test_help_is_about_both_kinds_of_files_and_fits_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["inspect", "--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "a snapshot of vsport, or a QEMU migration file" in words(text)


def test_completion_knows_that_it_takes_a_file(capsys):
    assert main(["completion", "bash"]) == 0
    assert "_inspect_pos_0_COMPGEN=_shtab_compgen_files" in capsys.readouterr().out


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
