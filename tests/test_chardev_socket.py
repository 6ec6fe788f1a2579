"""The socket chardev: what the contract does not say about servers, clients, socket files and TCP."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from chardev_peers import HOSTS, Rig, Wire, shipped

from vsport.addresses import TcpAddress
from vsport.chardev import make
from vsport.chardev import socket as chardev_socket
from vsport.document import DocumentError
from vsport.errors import HostError
from vsport.loop import WRITE


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig() as rig:
        yield rig


def server(rig: Rig, path: Path) -> Wire:
    return rig.make("socket", path=str(path), server="on", wait="off")


def unix_client(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(str(path))
    return sock


def port_of(wire: Wire) -> int:
    return int(wire.chardev.describe().rsplit(":", 1)[1].split(",")[0])


# -- the socket file -----------------------------------------------------------------------------------------------


def test_the_socket_file_of_a_dead_process_is_replaced(rig: Rig) -> None:
    path = rig.directory / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.exists()
    server(rig, path).open()
    unix_client(path).close()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
def test_a_live_socket_is_refused_and_not_disturbed(rig: Rig, kind: socket.SocketKind) -> None:
    path = rig.directory / "s"
    with socket.socket(socket.AF_UNIX, kind) as live:
        live.bind(str(path))
        if kind != socket.SOCK_DGRAM:
            live.listen()
        live.setblocking(False)
        with pytest.raises(HostError, match=r"c0: cannot listen on unix:.*: another process listens there"):
            server(rig, path).open()
        with pytest.raises(BlockingIOError):  # nobody has called
            live.accept() if kind != socket.SOCK_DGRAM else live.recv(1)
        assert path.is_socket()


def test_a_second_chardev_on_the_same_path_is_refused(rig: Rig) -> None:
    path = rig.directory / "s"
    first, second = server(rig, path), server(rig, path)
    first.open()
    with pytest.raises(HostError, match="another process listens there"):
        second.open()
    rig.wire = first
    with unix_client(path):
        first.until(lambda: first.chardev.connected)
    assert second.events == []


@pytest.mark.parametrize("what", ["file", "directory", "link"])
def test_what_is_no_socket_is_never_removed(rig: Rig, what: str) -> None:
    path = rig.directory / "s"
    {"file": path.touch, "directory": path.mkdir, "link": lambda: path.symlink_to("elsewhere")}[what]()
    with pytest.raises(HostError, match="the path exists and is no socket"):
        server(rig, path).open()
    assert os.path.lexists(path)


def test_a_missing_directory_is_an_error(rig: Rig) -> None:
    with pytest.raises(HostError, match=r"cannot listen on unix:.*/missing/s: No such file or directory"):
        server(rig, rig.directory / "missing" / "s").open()


def test_close_removes_its_own_socket_file_only(rig: Rig) -> None:
    path = rig.directory / "s"
    wire = server(rig, path)
    wire.open()
    path.unlink()
    path.write_text("another's")
    wire.chardev.close()
    assert path.read_text() == "another's"


def test_an_abstract_name_is_no_file_and_in_use_only_once(rig: Rig) -> None:
    options = {"path": str(rig.directory / "s"), "abstract": "on", "server": "on"}
    rig.make("socket", **options).open()
    assert os.listdir(rig.directory) == []
    with pytest.raises(HostError, match="Address already in use"):
        rig.make("socket", **options).open()


# -- server --------------------------------------------------------------------------------------------------------


def test_clients_are_served_one_after_another(rig: Rig) -> None:
    wire = server(rig, rig.directory / "s")
    wire.open()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(unix_client(rig.directory / "s")) for _ in range(3)]
        for number, client in enumerate(clients):
            client.send(b"%d" % number)
        for number, client in enumerate(clients):
            wire.until(lambda number=number: len(wire.received) == number + 1)  # type: ignore[misc]
            wire.settle()
            assert wire.received == b"012"[: number + 1]  # the next one waits for this one to leave
            client.close()
        wire.until(lambda: len(wire.events) == 6)
    assert wire.events == ["connected", "disconnected"] * 3


def test_a_client_that_came_and_left_unseen_is_a_session_of_its_own(rig: Rig) -> None:
    wire = server(rig, rig.directory / "s")
    wire.open()
    with unix_client(rig.directory / "s") as client:
        client.send(b"in passing")
    wire.until(lambda: len(wire.events) == 2)
    assert wire.events == ["connected", "disconnected"]
    assert wire.received == b"in passing"


def test_a_reset_is_one_disconnect(rig: Rig) -> None:
    wire = rig.make("socket", host="127.0.0.1", port="0", server="on")
    wire.open()
    with socket.create_connection(("127.0.0.1", port_of(wire))) as client:
        wire.until(lambda: wire.events)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wire.until(lambda: not wire.chardev.connected)
    wire.settle()
    assert wire.events == ["connected", "disconnected"]


def test_a_client_that_finds_no_descriptor_left_waits_without_a_busy_loop(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chardev_socket, "_ACCEPT_PAUSE_SECONDS", 0.02)
    wire = server(rig, rig.directory / "s")
    wire.open()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with unix_client(rig.directory / "s"):
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            rounds = 0
            rig.loop.call_later(0.1, rig.loop.stop)

            def count() -> bool:
                nonlocal rounds
                rounds += 1
                return False

            rig.loop.run_until(count, None)
            rig.loop.run()  # takes the stop()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert wire.events == []
        assert rounds < 30
        wire.until(lambda: wire.chardev.connected)


@pytest.mark.parametrize(
    ("options", "waits"),
    [
        ({"server": "on"}, True),
        ({"server": "on", "wait": "on"}, True),
        ({"server": "on", "wait": "off"}, False),
        ({}, False),
    ],
)
def test_a_server_waits_unless_it_is_told_not_to(options: dict[str, str], waits: bool) -> None:
    assert make("socket", "c0", {"path": "s", **options}).waits_for_peer is waits


# -- client --------------------------------------------------------------------------------------------------------


def test_a_client_without_reconnect_fails_at_once(rig: Rig) -> None:
    wire = rig.make("socket", path=str(rig.directory / "s"))
    with pytest.raises(HostError, match=r"cannot connect to unix:.*: No such file or directory; start its server"):
        wire.open()


def test_a_client_without_reconnect_stays_away_when_its_server_left(rig: Rig) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(rig.directory / "s"))
        listener.listen()
        wire = rig.make("socket", path=str(rig.directory / "s"))
        wire.open()
        assert wire.events == ["connected"]
        listener.accept()[0].close()
        wire.until(lambda: not wire.chardev.connected)
        wire.settle()
        assert not rig.loop._timers
        assert wire.events == ["connected", "disconnected"]


def test_a_client_takes_the_legacy_reconnect_in_seconds(rig: Rig) -> None:
    rig.make("socket", path=str(rig.directory / "s"), reconnect="1").open()
    assert len(rig.loop._timers) == 1


def test_reconnect_ms_0_is_no_reconnect(rig: Rig) -> None:
    with pytest.raises(HostError, match="cannot connect"):
        rig.make("socket", path=str(rig.directory / "s"), reconnect_ms="0").open()


def test_a_server_with_a_full_backlog_does_not_block_the_loop(rig: Rig) -> None:
    """TCP drops what asks for more than the backlog: a connect that is neither refused nor done."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        wire = rig.make("socket", host="127.0.0.1", port=str(port), reconnect_ms="5")
        wire.open()
        wire.settle()
        assert wire.events == []
        assert wire.chardev.describe() == f"disconnected:tcp:127.0.0.1:{port}"
        stack.enter_context(listener.accept()[0])
        wire.until(lambda: wire.chardev.connected)  # the kernel repeats its request after a second
        assert wire.events == ["connected"]


def test_close_while_a_connect_is_under_way_leaves_nothing(rig: Rig) -> None:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        stack.enter_context(socket.create_connection(listener.getsockname()))
        wire = rig.make("socket", host="127.0.0.1", port=str(listener.getsockname()[1]), reconnect_ms="5")
        wire.open()
        wire.chardev.close()


def test_a_client_that_met_itself_is_not_connected(rig: Rig) -> None:
    """The kernel chooses the client's port; here the choice is made for it, so that it is the server's."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.connect(sock.getsockname())
    adopted: list[socket.socket] = []
    address = TcpAddress(*sock.getsockname())
    connector = chardev_socket._Connector(rig.loop, address, adopted.append, retry=3600)
    connector._pending = sock
    connector._finished(WRITE)
    assert adopted == []
    assert sock.fileno() == -1
    connector.stop()


def test_the_next_address_of_a_name_is_tried(rig: Rig) -> None:
    """localhost may be ::1 and 127.0.0.1, and the server on one of them only."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        wire = rig.make("socket", host="127.0.0.1", port=str(port), reconnect_ms="5")
        address = wire.chardev._address  # type: ignore[attr-defined]
        address._found = [(socket.AF_INET6, ("::1", port)), *address.targets()]
        wire.open()
        wire.until(lambda: wire.chardev.connected)
        listener.accept()[0].close()


# -- TCP -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodelay", ["on", "off"])
def test_nodelay_is_set_as_asked_for(rig: Rig, nodelay: str) -> None:
    wire = rig.make("socket", host="127.0.0.1", port="0", server="on", nodelay=nodelay)
    wire.open()
    with socket.create_connection(("127.0.0.1", port_of(wire))):
        wire.until(lambda: wire.chardev.connected)
        with socket.socket(fileno=os.dup(wire.chardev.read_fd)) as session:
            assert bool(session.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)) is (nodelay == "on")


def test_to_takes_the_first_free_port(rig: Rig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = min(taken.getsockname()[1], 65000)
        wire = rig.make("socket", host="127.0.0.1", port=str(port), to=str(port + 100), server="on")
        wire.open()
        assert port < port_of(wire) <= port + 100


def test_a_port_in_use_is_refused(rig: Rig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        wire = rig.make("socket", host="127.0.0.1", port=str(taken.getsockname()[1]), server="on")
        with pytest.raises(HostError, match=r"cannot listen on tcp:127.0.0.1:.*: Address already in use"):
            wire.open()


def test_a_server_without_host_listens_on_ipv4_and_ipv6(rig: Rig) -> None:
    wire = rig.make("socket", port="0", server="on")
    wire.open()
    hosts = ["127.0.0.1", "::1"] if has_ipv6() else ["127.0.0.1"]
    for host in hosts:
        with socket.create_connection((host, port_of(wire))):
            wire.until(lambda: wire.chardev.connected)
        wire.until(lambda: not wire.chardev.connected)


@pytest.mark.parametrize(("option", "families"), [("ipv4", [socket.AF_INET]), ("ipv6", [socket.AF_INET6])])
def test_ipv4_and_ipv6_exclude_each_other(option: str, families: list[int]) -> None:
    more = {"port": "0", "server": "on"}
    wanted = make("socket", "c0", {**more, option: "on"})
    other = make("socket", "c0", {**more, {"ipv4": "ipv6", "ipv6": "ipv4"}[option]: "off"})
    both = make("socket", "c0", {**more, "ipv4": "on", "ipv6": "on"})
    for chardev, expected in ((wanted, families), (other, families), (both, [socket.AF_INET, socket.AF_INET6])):
        found = chardev._address.targets()  # type: ignore[attr-defined]
        assert {family for family, _ in found} <= set(expected)


def test_a_host_that_cannot_be_looked_up_is_an_error(rig: Rig) -> None:
    wire = rig.make("socket", host="x" * 64, port="1", reconnect_ms="5")
    with pytest.raises(HostError, match=r"c0: cannot look up 'xxx.*': .*too long"):
        wire.open()


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


# -- going on in another process -----------------------------------------------------------------------------------


def test_a_port_that_was_chosen_stays(rig: Rig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = min(taken.getsockname()[1], 65000)
        for options in ({"port": "0"}, {"port": str(port), "to": str(port + 100)}):
            wire = rig.make("socket", host="127.0.0.1", server="on", **options)
            wire.open()
            chosen = port_of(wire)
            for _ in range(2):
                wire = rig.hand_over(wire)
                assert port_of(wire) == chosen
            with socket.create_connection(("127.0.0.1", chosen)):
                wire.until(lambda: wire.events == ["connected"])  # noqa: B023
            wire.chardev.close()


def test_all_listening_sockets_of_a_name_go_along(rig: Rig) -> None:
    wire = rig.make("socket", port="0", server="on")
    wire.open()
    wire = rig.hand_over(wire)
    for host in ["127.0.0.1", "::1"] if has_ipv6() else ["127.0.0.1"]:
        with socket.create_connection((host, port_of(wire))):
            wire.until(lambda: wire.chardev.connected)
        wire.until(lambda: not wire.chardev.connected)


@pytest.mark.parametrize("mine", [{"port": "0"}, {"path": "s"}, {"path": "s", "abstract": "on"}])
def test_a_listening_socket_of_another_chardev_is_refused(rig: Rig, mine: dict[str, str]) -> None:
    mine = {name: str(rig.directory / value) if name == "path" else value for name, value in mine.items()}
    wire = rig.make("socket", server="on", **mine)
    wire.open()
    others = [{"path": str(rig.directory / "other")}, {"path": str(rig.directory / "s2"), "abstract": "on"}]
    for other in [*others, {"host": "127.0.0.1", "port": str(port_of(wire) ^ 1)}] if "port" in mine else others:
        state, delivery = shipped(wire.chardev)
        with pytest.raises(DocumentError):
            rig.make("socket", server="on", **other).take(state, delivery)
        delivery.close()


def test_a_client_does_not_listen_and_a_server_does(rig: Rig) -> None:
    listening = server(rig, rig.directory / "s")
    listening.open()
    with unix_client(rig.directory / "s"):
        listening.until(lambda: listening.chardev.connected)
        state, delivery = shipped(listening.chardev)
        with pytest.raises(DocumentError, match="a client does not listen"):
            rig.make("socket", path=str(rig.directory / "s")).take(state, delivery)
        delivery.close()
        state, delivery = shipped(listening.chardev)
        state["address"]["listeners"].clear()
        with pytest.raises(DocumentError, match="no socket listens"):
            rig.successor(listening).take(state, delivery)
        delivery.close()


def test_clients_in_the_queue_are_served_by_the_successor(rig: Rig) -> None:
    wire = server(rig, rig.directory / "s")
    wire.open()
    with unix_client(rig.directory / "s") as first, unix_client(rig.directory / "s") as second:
        first.send(b"1")
        second.send(b"2")
        wire.until(lambda: wire.received == b"1")
        wire = rig.hand_over(wire)
        wire.settle()
        assert wire.events == []
        first.close()
        wire.until(lambda: wire.received == b"2")
        assert wire.events == ["disconnected", "connected"]


def test_a_connect_that_is_under_way_begins_anew(rig: Rig) -> None:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        wire = rig.make("socket", host="127.0.0.1", port=str(port), reconnect="3600")
        wire.open()
        wire.settle()
        wire = rig.hand_over(wire)
        stack.enter_context(listener.accept()[0])
        wire.until(lambda: wire.events == ["connected"])


def test_a_client_that_waits_tries_at_once_in_another_process_and_looks_nothing_up(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    wire = rig.make("socket", host="localhost", port=str(port), reconnect="3600")
    wire.open()
    wire.settle()
    monkeypatch.delattr(socket, "getaddrinfo")
    with socket.create_server(("127.0.0.1", port)) as listener:
        wire = rig.hand_over(wire)
        wire.until(lambda: wire.events == ["connected"])
        listener.accept()[0].close()


def test_a_client_without_reconnect_stays_away_in_another_process_too(rig: Rig) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(rig.directory / "s"))
        listener.listen()
        wire = rig.make("socket", path=str(rig.directory / "s"))
        wire.open()
        listener.accept()[0].close()
        wire.until(lambda: not wire.chardev.connected)
        wire = rig.hand_over(wire)
        wire.settle()
        assert not wire.loop._timers
        assert wire.events == []


@pytest.mark.parametrize(
    "wrong", [{"host": "localhost"}, {"host": ""}, {"host": "::1\0"}, {"family": 1}, {"family": 10}, {"port": 65536}]
)
def test_an_address_that_would_be_looked_up_is_refused(rig: Rig, wrong: dict[str, object]) -> None:
    wire = rig.make("socket", host="127.0.0.1", port="1", reconnect="3600")
    wire.open()
    state, delivery = shipped(wire.chardev)
    state["address"]["found"][0].update(wrong)
    with pytest.raises(DocumentError, match=r"chardev.address.found\[0\]: "):
        rig.successor(wire).take(state, delivery)
    delivery.close()


# -- describe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "away", "here"),
    [
        ("unix-server", r"disconnected:unix:/.*/s,server=on", r"unix:/.*/s,server=on"),
        ("abstract-server", r"disconnected:unix:/.*/s,abstract=on,server=on", r"unix:/.*/s,abstract=on,server=on"),
        ("unix-client", r"disconnected:unix:/.*/s", r"unix:/.*/s"),
        (
            "tcp-server",
            r"disconnected:tcp:127\.0\.0\.1:\d+,server=on",
            r"tcp:127\.0\.0\.1:\d+,server=on <-> 127\.0\.0\.1:\d+",
        ),
        ("tcp-client", r"disconnected:tcp:localhost:\d+", r"tcp:127\.0\.0\.1:\d+ <-> 127\.0\.0\.1:\d+"),
    ],
)
def test_describes_itself_as_query_chardev_shows_it(name: str, away: str, here: str) -> None:
    with Rig(HOSTS[name]) as rig:
        rig.open()
        assert re.fullmatch(away, rig.wire.chardev.describe())
        rig.connect()
        assert re.fullmatch(here, rig.wire.chardev.describe())
        rig.leave()
        assert re.fullmatch(away, rig.wire.chardev.describe())


def test_ipv6_addresses_are_in_brackets() -> None:
    assert make("socket", "c0", {"host": "::1", "port": "7", "server": "on"}).describe() == (
        "disconnected:tcp:[::1]:7,server=on"
    )
