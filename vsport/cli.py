"""The command line of the host's half. Each command is imported when it is asked for, so that each starts quickly.

Exit codes:
  0    done; for `vsport serve` also: ended by SIGTERM, as a daemon should be
  1    the host cannot do it: a path, a socket, a missing program
  2    the command line is wrong
  130  interrupted (Ctrl-C); likewise 129 for SIGHUP, 143 for SIGTERM
`vsport lab run` passes on the exit code of its command; 124 is a time-out, 125
a fault of the lab.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from vsport.errors import HostError, UsageError

__all__ = ["main", "make_parser"]

INTERRUPTED = 130
_ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)

_LONGEST_LINE = 800
"""Of an error message, in characters: more than any path, less than whatever somebody piped into an option."""

_SERVE_EPILOG = """\
Options are QEMU's own; one dash will do as well as two:

  vsport serve --socket-path /run/vm.sock \\
    --chardev socket,id=c0,path=/run/agent.sock,server=on,wait=off \\
    --device virtserialport,chardev=c0,name=org.qemu.guest_agent.0

Then start the virtual machine, with memory that it shares. QEMU 10.2 or later:

  qemu-system-x86_64 ... -m 1G \\
    -object memory-backend-memfd,id=m,size=1G,share=on -numa node,memdev=m \\
    -chardev socket,id=vs,path=/run/vm.sock \\
    -device vhost-user-test-device-pci,chardev=vs,virtio-id=3,\\
num_vqs=64,config_size=12,vq_size=128

(virtio-id 3 is a console; num_vqs is twice max_ports, plus 2.) User Mode Linux:

  linux.uml ... virtio_uml.device=/run/vm.sock:3

To upgrade vsport under a running machine, offer the device when it starts, and
later have the new version take it over; guest and hosts notice a short pause:

  vsport serve --socket-path /run/vm.sock ... --handover /run/vm.handover
  vsport serve --takeover /run/vm.handover --handover /run/vm.handover

The second one offers it in turn. The first one ends with exit code 0 as soon as
the second one has all; if that fails at any point, the first one just goes on.

One process for many machines; {vm} is the name of each:

  vsport serve --vm web1 --vm web2 --socket-path /run/{vm}.sock \\
    --chardev socket,id=c0,path=/run/{vm}-agent.sock,server=on,wait=off \\
    --device virtserialport,chardev=c0,name=org.qemu.guest_agent.0
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {_printable(message)}; see {self.prog} --help\n")


def _printable(text: str) -> str:
    """Control characters and undecodable bytes as escapes, an endless line without its middle.

    A line break is kept where an indented line follows.
    """
    return "\n  ".join(_shortened("".join(map(_escaped, line))) for line in text.split("\n  "))


def _escaped(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def _shortened(line: str) -> str:
    half = _LONGEST_LINE // 2
    return line if len(line) <= _LONGEST_LINE else f"{line[:half]} ... {line[-half:]}"


def make_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The parser of the whole command line; help texts, completion and documentation are made from it.

    With ``only``, of that command alone: others may have to import what this one does not need.
    """
    parser = _Parser(
        prog="vsport",
        description="A virtio-serial device for virtual machines: channels between a guest's\nprograms and its host's.",
        epilog=__doc__ and __doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(host_error_code=1)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and end")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for name in _COMMANDS if only is None else [only]:
        _COMMANDS[name].add(commands)
    return parser


class _Version(argparse.Action):
    """Looks the version up only when it is asked for: that takes longer than all the rest of a start."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"vsport {version('vsport')}")
        except PackageNotFoundError:
            parser.exit(1, "vsport: it is not installed, so it has no version\n")
        parser.exit()


_Commands = argparse._SubParsersAction  # argparse has no public name for it


def _add_serve(commands: _Commands[_Parser]) -> None:
    serve = commands.add_parser(
        "serve",
        help="serve a virtio-serial device to a virtual machine (the daemon)",
        description="Serves a virtio-serial device to a virtual machine monitor (VMM), such as QEMU\n"
        "or User Mode Linux, over vhost-user, until SIGTERM or Ctrl-C. With --vm, one\n"
        "process serves many machines, a device to each.",
        epilog=_SERVE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    where = serve.add_mutually_exclusive_group()
    where.add_argument("--socket-path", metavar="PATH", help="listen for the VMM on this Unix socket")
    where.add_argument("--fd", type=int, metavar="N", help="instead: an inherited socket, listening or connected")
    serve.add_argument(
        "--vm",
        action="append",
        default=[],
        metavar="NAME",
        help="serve several virtual machines: {vm} in the other options stands for the name of each; repeat it",
    )
    serve.add_argument("--vms", metavar="FILE", help="the same, with a name in each line of FILE; - is standard input")
    serve.add_argument(
        "--chardev",
        "-chardev",
        action="append",
        default=[],
        metavar="KIND,id=ID[,...]",
        help="the host's side of a port; 'help' lists the kinds, KIND,help the options of one",
    )
    serve.add_argument(
        "--device",
        "-device",
        action="append",
        default=[],
        metavar="KIND[,...]",
        help="the guest's side: a port (virtserialport, virtconsole), or virtio-serial,max_ports=N; 'help' as above",
    )
    serve.add_argument(
        "--events",
        metavar="PATH",
        help="write what happens to the ports to this file or FIFO, one JSON object a line; - is standard output",
    )
    serve.add_argument("--handover", metavar="PATH", help="let another process take the live device over, at PATH")
    serve.add_argument(
        "--takeover",
        metavar="PATH",
        help="take it over from the process that offers it at PATH, and go on in its place; needs none of the above",
    )
    serve.add_argument(
        "--poll-max-ns",
        type=int,
        metavar="N",
        help="after traffic look for more for up to N nanoseconds instead of sleeping, while that pays; 0: never; "
        "default: 150000, or 0 on one processor",
    )
    serve.add_argument(
        "--log-level",
        choices=["error", "warning", "info", "debug"],
        default="warning",
        help="how much to tell on standard error; default: warning",
    )
    serve.add_argument(
        "--print-capabilities", action="store_true", help="print what this back end can do, as JSON, and end"
    )
    serve.add_argument(
        "--print-description",
        action="store_true",
        help="print the file for /etc/qemu/vhost-user by which a management program finds this back end, and end",
    )


def _add_inspect(commands: _Commands[_Parser]) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="say what a snapshot, or a QEMU migration file, knows about its ports",
        description="Says what a snapshot of vsport, or a QEMU migration file, knows about its\nvirtio-serial ports, "
        "and what that means for each of them after the move; or\nshows the table by which ports are connected here.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    inspect.add_argument("file", nargs="?", metavar="FILE", help="a snapshot, or what QEMU wrote by migrate file:PATH")
    inspect.add_argument(
        "--json", action="store_true", help="one object a line: the file, its devices, ports, messages, findings"
    )
    inspect.add_argument(
        "--states",
        nargs="?",
        const="table",
        choices=["table", "mermaid", "dot"],
        metavar="FORM",
        help="the connection table instead, as a table (default), mermaid or dot",
    )


def _add_demo(commands: _Commands[_Parser]) -> None:
    from vsport.lab.cli import place

    demo = commands.add_parser(
        "demo",
        help="see what it does, in seconds, without a virtual machine",
        description="A guest opens a port, bytes flow both ways, the host leaves and returns, the\n"
        "guest closes. With --migrate the machine is moved, and its agent is dead or\n"
        "not, as the new back end is told.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    demo.add_argument(
        "--guest", choices=["sim", "uml", "qemu"], default="sim", help="simulated (default), or a real Linux kernel"
    )
    demo.add_argument(
        "--migrate",
        action="store_true",
        help="the story of 2011 instead: an agent in the guest, and its machine is moved. With a real kernel,\n"
        "the device goes to another process",
    )
    demo.add_argument("--json", action="store_true", help="one object a line, one for each thing that happened")
    demo.add_argument("--lab", type=place, metavar="DIR", help="where the lab is kept; default as in vsport lab")


def _add_lab(commands: _Commands[_Parser]) -> None:
    from vsport.lab.cli import add_parser

    add_parser(commands)


def _add_completion(commands: _Commands[_Parser]) -> None:
    completion = commands.add_parser(
        "completion", help="print a completion script for a shell", description="Prints a completion script."
    )
    completion.add_argument("shell", choices=["bash", "zsh", "tcsh"])


def _serve(arguments: argparse.Namespace) -> int:
    from vsport import serve

    if arguments.print_capabilities:
        print(serve.CAPABILITIES)
    elif arguments.print_description:
        print(serve.description())
    elif told := serve.option_help(arguments.chardev, arguments.device):
        print(told)
    else:
        return serve.serve(arguments)
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from vsport import inspect

    if (arguments.file is None) == (arguments.states is None):
        raise UsageError("give a FILE, or --states")
    if arguments.states is not None:
        print(inspect.states(arguments.states))
    else:
        report = inspect.describe(arguments.file)
        print(report.json_lines() if arguments.json else report.text)
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from vsport import demo

    if arguments.guest == "sim":
        if arguments.migrate:
            return demo.run_moves(as_json=arguments.json)
        return demo.run(demo.simulated, as_json=arguments.json)
    from vsport.lab.demo import on_a_kernel, run_handover

    if arguments.migrate:
        return run_handover(arguments.guest, arguments.lab, as_json=arguments.json)
    return demo.run(on_a_kernel(arguments.guest, arguments.lab), as_json=arguments.json)


def _lab(arguments: argparse.Namespace) -> int:
    from vsport.lab.cli import run

    return run(arguments)


def _completion(arguments: argparse.Namespace) -> int:
    try:
        import shtab
    except ImportError:
        raise HostError("completion scripts are made by shtab: pip install 'vsport[completion]'") from None
    parser = make_parser()
    files = {"PATH": shtab.FILE, "FILE": shtab.FILE, "DIR": shtab.DIRECTORY}
    for action in _all_actions(parser):
        if action.metavar in files:
            action.complete = files[action.metavar]
    print(shtab.complete(parser, arguments.shell))
    return 0


def _all_actions(parser: argparse.ArgumentParser) -> Iterator[Any]:
    """The options of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _all_actions(command)


class _Command(NamedTuple):
    add: Callable[[_Commands[_Parser]], None]
    run: Callable[[argparse.Namespace], int]


_COMMANDS = {
    "serve": _Command(_add_serve, _serve),
    "inspect": _Command(_add_inspect, _inspect),
    "demo": _Command(_add_demo, _demo),
    "lab": _Command(_add_lab, _lab),
    "completion": _Command(_add_completion, _completion),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    _prepare_process()
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # Here a full disk gets a line of ours, at exit the interpreter's complaint.
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as exc:
        return _give_up(exc)


def _run(argv: Sequence[str] | None) -> int:
    words = sys.argv[1:] if argv is None else argv
    parser = make_parser(words[0] if words and words[0] in _COMMANDS else None)
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        asked = ("vsport", arguments.command, getattr(arguments, "action", None))
        _Parser(" ".join(filter(None, asked))).error(f"unrecognized arguments: {' '.join(unknown)}")
    if arguments.command is None:
        parser.print_help()
        return 2
    try:
        return _COMMANDS[arguments.command].run(arguments)
    except (UsageError, HostError) as exc:
        print(f"vsport {arguments.command}: {_printable(str(exc))}", file=sys.stderr)
        return 2 if isinstance(exc, UsageError) else arguments.host_error_code


def _give_up(exc: OSError) -> int:
    """A reader that went away has seen enough; anything else is told."""
    if not isinstance(exc, BrokenPipeError):
        print(f"vsport: {_printable(str(exc.filename or 'cannot write the output'))}: {exc.strerror}", file=sys.stderr)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # What is still in the buffer has nowhere to go.
    return 1


def _prepare_process() -> None:
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:  # It is closed: its number must not go to a socket of ours.
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(fd, "r" if fd == 0 else "w", closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # A path goes out as it came in.
    for number in _ENDING_SIGNALS:
        if signal.getsignal(number) is signal.SIG_DFL:  # Else it is ignored, as under nohup.
            signal.signal(number, _terminated)


def _terminated(number: int, frame: object) -> NoReturn:
    """Ends the command as an exception does: whatever it made is removed."""
    raise SystemExit(128 + number)


def main_serve() -> int:
    """The program `vhost-user-vsport`: `vsport serve` for those who start back ends by path alone (R-VU-102)."""
    return main(["serve", *sys.argv[1:]])
