"""QEMU's option syntax."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsport.errors import UsageError
from vsport.options import Configuration, PortOption, parse_configuration, split_options


@pytest.mark.parametrize(
    ("text", "kind", "options"),
    [
        ("null", "null", {}),
        ("null,id=c0", "null", {"id": "c0"}),
        ("socket,id=c0,path=/run/x,server=on", "socket", {"id": "c0", "path": "/run/x", "server": "on"}),
        ("socket,id=c0,server,nowait", "socket", {"id": "c0", "server": "on", "wait": "off"}),
        ("file,id=c0,path=/a,,b", "file", {"id": "c0", "path": "/a,b"}),
        ("file,id=c0,path=/a,,,,b", "file", {"id": "c0", "path": "/a,,b"}),
        ("file,id=c0,path=/a,,,append=on", "file", {"id": "c0", "path": "/a,", "append": "on"}),
        ("file,id=c0,path=x=y", "file", {"id": "c0", "path": "x=y"}),
    ],
)
def test_options_are_split_as_qemu_does(text, kind, options):
    assert split_options(text) == (kind, options)


@given(st.text(max_size=40).filter(lambda value: value))
def test_any_value_survives_with_its_commas_doubled(value):
    assert split_options("file,path=" + value.replace(",", ",,")) == ("file", {"path": value})


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused_in_one_line(text):
    try:
        split_options(text)
    except UsageError as exc:
        assert "\n" not in str(exc)


@given(st.lists(st.text(max_size=30), max_size=3), st.lists(st.text(max_size=30), max_size=3))
def test_any_command_line_is_read_or_refused(chardevs, devices):
    with contextlib.suppress(UsageError):
        assert isinstance(parse_configuration(chardevs, devices), Configuration)


def test_a_whole_command_line():
    configuration = parse_configuration(
        ["socket,id=c0,path=/run/a,server=on,wait=off", "pty,id=c1"],
        [
            "virtio-serial-pci,id=vs,max_ports=5,packed=on",
            "virtserialport,bus=vs.0,nr=1,chardev=c0,name=org.qemu.guest_agent.0,id=p0",
            "virtconsole,chardev=c1",
        ],
    )
    assert (configuration.max_ports, configuration.packed, configuration.in_order) == (5, True, False)
    assert [chardev.kind for chardev in configuration.chardevs] == ["socket", "pty"]
    assert configuration.ports == (
        PortOption(False, "p0", "c0", "org.qemu.guest_agent.0", 1),
        PortOption(True, chardev="c1"),
    )


@pytest.mark.parametrize(
    ("chardevs", "devices", "says"),
    [
        (["socket"], [], "needs an id"),
        (["id=c0"], [], "the kind has to come first"),
        (["null,id=0c"], [], "starting with a letter"),
        (["null,id=c0,x"], [], "'x' is not key=value"),
        (["null,id=c0,id=c1"], [], "given twice"),
        (["null,id=c0", "null,id=c0"], [], "given to two"),
        ([], ["floppy"], "unknown device 'floppy'; known are virtserialport, virtconsole"),
        ([], ["virtserialport,colour=red"], "unknown option 'colour'; known: away, bus, chardev, id, name, nr, on_res"),
        ([], ["virtserialport,cols=80"], "unknown option 'cols'"),
        ([], ["virtserialport,chardev=c9"], "no --chardev with id=c9"),
        (["null,id=c0"], ["virtserialport,chardev=c0", "virtserialport,chardev=c0"], "used by two ports"),
        ([], ["virtserialport,nr=127"], "from 0 to 126"),
        ([], ["virtserialport,nr=-1"], "from 0 to 126"),
        ([], ["virtserialport,nr=" + "9" * 5000], "from 0 to 126"),
        ([], ["virtio-serial,max_ports=0"], "from 1 to 127"),
        ([], ["virtio-serial", "virtio-serial"], "one virtio-serial device"),
        ([], ["virtserialport,bus=vs.0"], "no bus 'vs.0'"),
        ([], ["virtio-serial,id=a", "virtserialport,bus=vs.0"], "no bus 'vs.0'"),
        ([], ["virtserialport,id=a", "virtserialport,id=a"], "given to two"),
        ([], ["virtconsole,cols=65536"], "from 0 to 65535"),
        ([], ["virtconsole,x-rows-first=yes"], "must be on or off"),
    ],
)
def test_nonsense_is_named(chardevs, devices, says):
    with pytest.raises(UsageError) as caught:
        parse_configuration(chardevs, devices)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
