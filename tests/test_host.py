"""Host: a configuration becomes ports and chardevs, and nothing stays when it is closed."""

import gc
import os

import pytest

from vsport.errors import HostError, UsageError
from vsport.host import Host
from vsport.loop import Loop
from vsport.options import PortOption, parse_configuration


@pytest.fixture
def loop():
    made = Loop()
    yield made
    made.close()


def make(loop, chardevs, devices):
    return Host(loop, parse_configuration(chardevs, devices))


def fds():
    gc.collect()  # what earlier tests left must not go just now
    return set(os.listdir("/proc/self/fd"))


def test_ports_get_the_numbers_that_qemus_users_expect(loop):
    """R-CON-51: chosen numbers first, a console takes the lowest from 0 on, others from 1 on."""
    host = make(
        loop,
        [],
        ["virtserialport,name=a", "virtconsole,name=b", "virtserialport,name=c,nr=1", "virtserialport,name=d"],
    )
    assert {port.name: id for id, port in host.device.ports.items()} == {"a": 2, "b": 0, "c": 1, "d": 3}


@pytest.mark.parametrize(
    ("chardevs", "devices", "says"),
    [
        ([], ["virtserialport,nr=0"], "for a console"),
        ([], ["virtio-serial,max_ports=2", "virtserialport,nr=2"], "not in 0 to 1"),
        ([], ["virtserialport,nr=3", "virtserialport,nr=3"], "number 3 is taken"),
        ([], ["virtserialport,name=x", "virtserialport,name=x"], "'x' is taken"),
        ([], ["virtserialport,name=a/b"], "no '/'"),
        ([], ["virtserialport,name=" + "n" * 2000], "longer than 1024 bytes"),
        ([], ["virtio-serial,max_ports=1", "virtserialport"], "all 1 ports"),
        (["floppy,id=c0"], [], "floppy"),
        (["socket,id=c0,colour=red"], [], "colour"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_touched(loop, chardevs, devices, says):
    before = fds()
    with pytest.raises(UsageError) as caught:
        make(loop, chardevs, devices)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert fds() == before


def test_a_chardev_that_fails_takes_the_others_down_with_it(loop, tmp_path):
    before = fds()
    host = make(
        loop,
        [f"socket,id=c0,path={tmp_path}/ok,server=on,wait=off", f"file,id=c1,path={tmp_path}/no/such/dir/f"],
        ["virtserialport,chardev=c0", "virtserialport,chardev=c1"],
    )
    with pytest.raises(HostError, match="no/such/dir"):
        host.open()
    assert fds() == before
    assert not (tmp_path / "ok").exists()


def test_closing_leaves_nothing(loop, tmp_path):
    before = fds()
    host = make(
        loop,
        [f"socket,id=c0,path={tmp_path}/s,server=on,wait=off", "pty,id=c1", f"file,id=c2,path={tmp_path}/f"],
        ["virtserialport,chardev=c0", "virtserialport,chardev=c1", "virtserialport,chardev=c2"],
    )
    host.open()
    assert fds() > before
    host.close()
    host.close()
    assert fds() == before


def test_a_port_is_unplugged_once(loop):
    host = make(loop, ["null,id=c0"], ["virtserialport,chardev=c0,nr=5"])
    host.open()
    host.unplug(5)
    with pytest.raises(UsageError, match="no port 5"):
        host.unplug(5)
    assert host.plug(PortOption(console=False, chardev="c0", nr=5)) == 5
    host.pumps[5].open()
    assert host.device.ports[5].state.host_connected
    host.close()


def test_chardevs_that_wait_are_known(loop, tmp_path):
    host = make(
        loop,
        [f"socket,id=c0,path={tmp_path}/0,server=on,wait=on", f"socket,id=c1,path={tmp_path}/1,server=on,wait=off"],
        ["virtserialport,chardev=c0", "virtserialport,chardev=c1"],
    )
    host.open()
    assert [chardev.id for chardev in host.missing_peers()] == ["c0"]
    host.close()


def test_a_guest_that_kicks_without_end_costs_one_turn_in_each_round(loop):
    """R-RING-80: what is left of a long ring is one more call, not one for each kick."""
    host = make(loop, ["null,id=c0"], ["virtserialport,chardev=c0"])
    turns = []
    host.device.kick = turns.append
    for _ in range(1000):
        host.device.backlog(5)
        host.device.backlog(7)
    loop.run_once(0)
    assert turns == [5, 7]
    host.device.backlog(5)
    loop.run_once(0)
    assert turns == [5, 7, 5]
