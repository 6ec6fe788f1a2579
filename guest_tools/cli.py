"""``vsport-open``: the virtio-serial ports of this machine, for people and shells.

Exit codes, stable:

====  ==================================================================================================
0     done; for a session: the host left, and everything that it sent was handed over
1     another error
2     wrong command line
3     no such port
4     the port is busy (the message names who holds it), or it is a console port, which the kernel holds
5     timeout
6     the port was unplugged
7     the host left before it took all of standard input
130   interrupted (Ctrl-C); the regular end of --watch and --hold
====  ==================================================================================================

Messages go to standard error; in a session that includes those of ``--json``, as standard output is the port's.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence

from guest_tools import errors
from guest_tools.ports import Port, find_port, list_ports, printable, why_no_ports
from guest_tools.record import Record
from guest_tools.report import STDERR, STDOUT, Reporter, clock, holders_text, port_table, write_line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from _typeshed import SupportsWrite

    from guest_tools.bridge import Outcome
    from guest_tools.events import Event
    from guest_tools.host_changes import HostChange

__all__ = ["main"]

OK, ERROR, USAGE, NOT_FOUND, BUSY, TIMEOUT, UNPLUGGED, UNSENT = 0, 1, 2, 3, 4, 5, 6, 7

EXIT_CODES: dict[type[errors.PortError], int] = {
    errors.PortNotFound: NOT_FOUND,
    errors.PortBusy: BUSY,
    errors.PortIsConsole: BUSY,
    errors.HostTimeout: TIMEOUT,
    errors.PortUnplugged: UNPLUGGED,
}

EPILOG = """\
examples:
  vsport-open org.qemu.guest_agent.0          talk to the host until it leaves
  vsport-open -N org.example.0 < messages     send a file, then close the port
  vsport-open org.example.0 </dev/null >data  receive until the host leaves
  vsport-open --list --json                   every port, one JSON object a line
  vsport-open --wait org.example.0 --timeout 5 && start-the-agent

exit codes:
  0    done: the host left (with -N: standard input ended), and nothing was lost
  1    another error
  2    wrong command line
  3    no such port
  4    the port is busy (the message says who holds it), or it is a console port
  5    timeout
  6    the port was unplugged
  7    the host left before it took all of standard input
  130  interrupted (Ctrl-C); the regular end of --watch and --hold
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``vsport-open``; the exit code. ``argv`` is without the program's name, default ``sys.argv[1:]``."""
    _prepare_process()
    out = Reporter(as_json=False, verbose=False)
    try:
        args = _parse(sys.argv[1:] if argv is None else argv)
        out = Reporter(as_json=args.json, verbose=args.verbose)
        return COMMANDS[args.command].run(args, out)
    except errors.PortError as exc:
        return _fail(out, str(exc), next((c for t, c in EXIT_CODES.items() if isinstance(exc, t)), ERROR))
    except OSError as exc:
        where = f"{exc.filename}: " if exc.filename else ""
        return _fail(out, where + (exc.strerror or str(exc)), ERROR)


def _fail(out: Reporter, message: str, code: int) -> int:
    out.error(message, code)
    return code


def _prepare_process() -> None:
    """A closed standard descriptor's number must not go to the port; signals end the process as in other tools."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # Takes the lowest free number, which is this one.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # Else it is ignored, as under nohup.
        # The kernel ends it at once (a shell says 130), and there is nothing to clean up: no output is buffered, and it
        # closes the port. A handler of ours would wait until Python is back from what it has begun to wait for.
        signal.signal(signal.SIGINT, signal.SIG_DFL)


# The command line


class Parser(argparse.ArgumentParser):
    """One line for each mistake, and no usage block in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {printable(message)} (see {self.prog} --help)\n")

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        """Straight to the descriptor, as Reporter does. Raises OSError of standard output."""
        if file is not sys.stderr:
            write_line(STDOUT, message.removesuffix("\n"))
        elif message:
            with contextlib.suppress(OSError):
                write_line(STDERR, message.removesuffix("\n"))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    args = parser.parse_args(argv)
    command = COMMANDS[args.command]
    if command.takes_port and not args.port:
        parser.error("which port? give its name or its path; vsport-open --list shows them")
    if not command.takes_port and args.port is not None:
        parser.error(f"--{args.command} takes no port: {args.port!r} is one too many")
    for option in ("timeout", "close_on_eof"):
        if getattr(args, option) not in (None, False) and option not in command.options:
            parser.error(f"--{option.replace('_', '-')} has no meaning together with --{args.command}")
    return args


def _parser() -> Parser:
    parser = Parser(
        prog="vsport-open",
        usage="vsport-open [options] PORT | --wait PORT | --hold PORT | --list | --watch",
        description="Open a virtio-serial port: standard input and output become the port, for one\n"
        "session with the host. PORT is the port's name, or a path such as /dev/vport0p1.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(command="session")
    parser.add_argument("port", metavar="PORT", nargs="?", help=argparse.SUPPRESS)
    group = parser.add_mutually_exclusive_group()
    for name, command in COMMANDS.items():
        if command.help:
            group.add_argument(f"--{name}", dest="command", action="store_const", const=name, help=command.help)
    _add_options(parser)
    return parser


def _add_options(parser: Parser) -> None:
    add = parser.add_argument
    add("--json", action="store_true", help="one JSON object a line; times in seconds since 1970")
    limit = "give up when the host (for --wait: or the port) is not there after so long"
    add("--timeout", type=_seconds, metavar="SECONDS", help=limit)
    close = "close the port when standard input ends; otherwise the session goes on until the host leaves"
    add("-N", "--close-on-eof", action="store_true", help=close)
    add("-v", "--verbose", action="store_true", help="tell on standard error what goes on")
    add("--version", action="version", version=f"vsport-open {_version()}")


def _version() -> str:
    import guest_tools

    return guest_tools.__version__


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return seconds


# The commands: each takes the command line and where to report, and returns the exit code. Each imports what it
# alone needs, so that --list starts quickly.


def _list(args: argparse.Namespace, out: Reporter) -> int:
    ports = list_ports()
    if not ports:
        out.warning(why_no_ports(), {"event": "no_ports", "message": why_no_ports()})
        return OK
    if args.json:
        for port in ports:
            out.result("", port.as_dict())
    else:
        out.result("\n".join(port_table(ports)), {})
    return OK


def _watch(args: argparse.Namespace, out: Reporter) -> int:
    from guest_tools.events import watch

    if not list_ports():
        out.warning(why_no_ports(), {"event": "no_ports", "message": why_no_ports()})
    for event in watch():
        out.result(_event_text(event), event.as_dict())
    return OK


def _event_text(event: Event) -> str:
    by = f" by {holders_text(event.port)}" if event.kind == "opened" else ""
    return f"{clock(event.time)}  {event.kind.replace('_', ' '):14}  {event.port}{by}"


def _wait(args: argparse.Namespace, out: Reporter) -> int:
    from guest_tools.events import wait_for_host

    out.note(f"waiting for {printable(args.port)}", {"event": "waiting", "port": printable(args.port)})
    port = wait_for_host(args.port, args.timeout)
    if args.json:
        out.result("", {"event": "ready", "time": round(time.time(), 6), **port.as_dict()})
    else:
        out.note(f"the host has {port} open", {})
    return OK


def _hold(args: argparse.Namespace, out: Reporter) -> int:
    from guest_tools.channel import open_port
    from guest_tools.host_changes import hold

    port = find_port(args.port)
    with open_port(port) as channel:
        first = True
        for change in hold(channel):
            _report_change(out, port, change, first)
            first = False
    return OK


def _report_change(out: Reporter, port: Port, change: HostChange, first: bool) -> None:
    left = "waiting" if first else "host_left"  # So that the lines for leaving are as many as it left.
    kind, now = "host_connected" if change.connected else left, time.time()
    discarded = f"  {change.discarded} bytes discarded" if change.discarded else ""
    text = f"{clock(now)}  {kind.replace('_', ' '):14}  {port}{discarded}"
    where = {"device": port.device, "name": port.name and printable(port.name)}
    out.result(text, {"event": kind, "time": round(now, 6), **where, "discarded": change.discarded})


def _session(args: argparse.Namespace, out: Reporter) -> int:
    from guest_tools.bridge import Bridge
    from guest_tools.channel import open_port
    from guest_tools.host_changes import HostWatch

    with open_port(args.port, timeout=args.timeout) as channel, HostWatch(channel) as watch:
        if not channel.host_connected:
            out.note(f"waiting for the host to open {channel.label}", {"event": "waiting"})
            channel.wait_host()
        watch.restart()  # From here on a leave ends the session, however short it is.
        out.note(f"connected to {channel.label}", {"event": "connected"})
        outcome = Bridge(channel, 0, 1, close_on_eof=args.close_on_eof, watch=watch).run()
    return _report_outcome(out, outcome)


def _report_outcome(out: Reporter, outcome: Outcome) -> int:
    from guest_tools.bridge import Ending

    record = {"event": "ended", "sent": outcome.sent, "received": outcome.received, "unsent": outcome.unsent}
    out.note(f"{outcome.ending.value}; {outcome.sent} bytes sent, {outcome.received} received", record)
    if outcome.ending is Ending.OUTPUT_CLOSED:
        return _fail(out, "nobody reads standard output any more", ERROR)
    if outcome.unsent:
        return _fail(out, f"the host left before it took the last {outcome.unsent} bytes of input", UNSENT)
    return OK


class Command(Record):
    run: Callable[[argparse.Namespace, Reporter], int]
    takes_port: bool
    options: tuple[str, ...]
    help: str


COMMANDS = {
    "session": Command(_session, True, ("timeout", "close_on_eof"), ""),
    "list": Command(_list, False, (), 'list every port, and who holds it open; "?" is what this user cannot see'),
    "watch": Command(_watch, False, (), "list every port, then whatever happens to one"),
    "wait": Command(_wait, True, ("timeout",), "wait until PORT exists and the host has its end open"),
    "hold": Command(_hold, True, (), "keep PORT open, discard its input, tell whenever the host leaves or returns"),
}
