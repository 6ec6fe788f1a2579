"""One command line becomes a plan for each of many virtual machines."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsport.errors import UsageError
from vsport.options import parse_configuration
from vsport.template import Plan, plans

TEMPLATE = Plan(
    socket_path="/run/{vm}.sock",
    events="/log/events",
    chardevs=("socket,id=c0,path=/run/{vm}/a,server=on", "null,id=c1"),
    devices=("virtserialport,chardev=c0,name=org.test.{vm}",),
)


def test_without_names_everything_is_as_it_is_given():
    plan = Plan(socket_path="/run/a.sock", chardevs=("null,id=c0",))
    assert plans([], plan) == [plan]


def test_each_name_takes_the_place_of_the_placeholder():
    first, second = plans(["web1", "db{}2"], TEMPLATE)
    assert (first.vm, first.socket_path, first.events) == ("web1", "/run/web1.sock", "/log/events")
    assert first.chardevs == ("socket,id=c0,path=/run/web1/a,server=on", "null,id=c1")
    assert second.socket_path == "/run/db{}2.sock"
    assert second.devices == ("virtserialport,chardev=c0,name=org.test.db{}2",)
    assert second.takeover is None


@given(st.text(min_size=1, max_size=20))
def test_any_name_is_refused_or_stays_one_value_among_the_options(name):
    try:
        (plan,) = plans([name], TEMPLATE)
    except UsageError as exc:
        assert "\n" not in str(exc)
    else:
        configuration = parse_configuration(plan.chardevs, plan.devices)
        assert configuration.chardevs[0].options == {"path": f"/run/{name}/a", "server": "on"}
        assert configuration.ports[0].name == f"org.test.{name}"


@pytest.mark.parametrize("name", ["", "a/b", ".", "..", "a\nb", "\x1b[2J", "\udcff"])
def test_a_name_that_is_no_part_of_a_path_is_refused(name):
    with pytest.raises(UsageError, match="a name becomes a part of a path") as caught:
        plans(["web1", name], TEMPLATE)
    assert str(caught.value).isprintable()


def test_a_name_that_is_given_twice_is_refused():
    with pytest.raises(UsageError, match="--vm web1: the name is given twice"):
        plans(["web1", "web2", "web1"], TEMPLATE)


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (Plan(socket_path="/run/{vm}.sock"), "--socket-path /run/{vm}.sock: {vm} stands for a name"),
        (Plan(handover="/run/{vm}"), "--handover"),
        (Plan(takeover="/run/{vm}"), "--takeover"),
        (Plan(events="{vm}"), "--events"),
        (Plan(chardevs=("null,id=c0", "file,id=c1,path=/{vm}")), "--chardev file,id=c1,path=/{vm}"),
        (Plan(devices=("virtserialport,name={vm}",)), "--device"),
    ],
)
def test_a_placeholder_without_a_name_is_a_mistake(plan, says):
    with pytest.raises(UsageError) as caught:
        plans([], plan)
    assert says in str(caught.value)
    assert "add --vm NAME" in str(caught.value)


def test_a_descriptor_is_one_machines():
    with pytest.raises(UsageError, match="--fd is the socket of one virtual machine"):
        plans(["web1"], Plan(fd=3))
