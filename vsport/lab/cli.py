"""`vsport lab`: build the lab, and run a command in a guest of it."""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

from vsport.errors import UsageError
from vsport.lab.build import build
from vsport.lab.daemon import daemon
from vsport.lab.run import Guest, GuestKind
from vsport.lab.tree import Tree, default_directory
from vsport.options import parse_configuration

__all__ = ["AWAY_PORT", "NULL_PORT", "add_parser", "place", "run"]

TIMED_OUT, LAB_FAILED, KILLED = 124, 125, 128
"""As timeout(1), env(1) and the shells have it: CMD took too long, the lab is at fault, CMD died of a signal."""

AWAY_PORT = "org.vsport.away.0"
NULL_PORT = "org.vsport.null.0"

_APTOPT_VARIABLE = "VSPORT_LAB_APTOPT"

_RUN_EPILOG = f"""\
Without --chardev and --device the guest has two ports: {AWAY_PORT}, whose
host never comes, and {NULL_PORT}, whose host takes everything.

A chat between this terminal and another one:

  vsport lab run \\
    --chardev socket,id=c0,path=/tmp/agent.sock,server=on,wait=off \\
    --device virtserialport,chardev=c0,name=org.example.agent.0 \\
    -- vsport-open org.example.agent.0
  socat - UNIX-CONNECT:/tmp/agent.sock     # in the other one

The exit code is that of CMD, 128 + N if signal N killed it, 124 if it took
longer than --timeout, 125 if the guest did not boot, 126 or 127 if CMD cannot
be run there.
"""


def add_parser(commands: argparse._SubParsersAction[Any]) -> None:
    """Adds `lab` to the commands of a parser; run() carries out what it parsed."""
    lab = commands.add_parser(
        "lab",
        help="real Linux guests: build them, run a command in one",
        description="Real Linux guests, booted in seconds, without KVM and without root.",
        allow_abbrev=False,
    )
    actions = lab.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=type(lab))
    _add_build(actions)
    _add_run(actions)
    _add_directory(actions.add_parser("path", help="print where the tree is", allow_abbrev=False))


def _add_directory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dir",
        type=place,
        metavar="DIR",
        help=f"where the lab is kept; default: $VSPORT_LAB, or {_tilde(default_directory({'HOME': str(Path.home())}))}",
    )


def _tilde(path: Path) -> str:
    return str(path).replace(str(Path.home()), "~", 1)


def _add_build(actions: argparse._SubParsersAction[Any]) -> None:
    parser = actions.add_parser(
        "build",
        help="make the lab: a Debian tree with kernels for User Mode Linux and QEMU",
        description="Makes the lab unless it is there. It takes mmdebstrap, a gigabyte, and about a minute.",
        allow_abbrev=False,
    )
    _add_directory(parser)
    parser.add_argument(
        "--aptopt",
        action="append",
        default=[],
        metavar="OPTION",
        help=f"an option for apt, also taken from ${_APTOPT_VARIABLE}; a frozen copy of a mirror needs "
        "'Acquire::Check-Valid-Until \"false\"'",
    )
    parser.add_argument("--mirror", metavar="URL", help="where packages come from; default: where this machine's do")
    parser.add_argument("--force", action="store_true", help="make it anew, from the packages that were kept")


def _add_run(actions: argparse._SubParsersAction[Any]) -> None:
    parser = actions.add_parser(
        "run",
        help="boot a guest with our device and run a command in it",
        description="Boots a guest that has our device, and runs CMD in it as if it ran here: same\n"
        "input, output, exit code.",
        epilog=_RUN_EPILOG,
        usage="%(prog)s [OPTION]... [--] CMD [ARGUMENT]...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_directory(parser)
    parser.add_argument(
        "--guest", choices=["uml", "qemu"], default="uml", help="User Mode Linux (default, faster) or QEMU"
    )
    parser.add_argument("--memory", type=_memory, default=256, metavar="MIB", help="of the guest, in MiB; default: 256")
    parser.add_argument(
        "--share",
        type=_directory,
        metavar="DIR",
        help="a directory of this machine that the guest sees as /mnt/share (QEMU: a copy)",
    )
    parser.add_argument("--timeout", type=_seconds, metavar="S", help="kill CMD after so many seconds")
    parser.add_argument("--verbose", action="store_true", help="show what kernel and device said, afterwards")
    for option in "chardev", "device":
        parser.add_argument(
            f"--{option}",
            f"-{option}",
            action="append",
            default=[],
            metavar="ARGS",
            help="what the guest's device is, as in vsport serve",
        )
    parser.set_defaults(host_error_code=LAB_FAILED)
    parser.add_argument("command_line", nargs=argparse.REMAINDER, metavar="CMD", help="what to run in the guest")


def place(text: str) -> Path:
    """For argparse: where a lab is or shall be."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return Path(text)


def _memory(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 64 <= int(text) <= 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of MiB from 64 to 65536")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= threading.TIMEOUT_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return seconds


def _directory(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a directory")
    return path


def run(arguments: argparse.Namespace) -> int:
    """Carries out `vsport lab`; returns the exit code. Raises UsageError, HostError."""
    directory = arguments.dir or default_directory()
    return _ACTIONS[arguments.action](directory / "tree", arguments)


def _build(tree: Path, arguments: argparse.Namespace) -> int:
    variable = os.environ.get(_APTOPT_VARIABLE)
    aptopts = [*arguments.aptopt, *([variable] if variable else [])]
    if not build(tree, aptopts=aptopts, mirror=arguments.mirror, force=arguments.force):
        print(f"the lab in {tree.parent} is complete", file=sys.stderr)
    return 0


def _path(tree: Path, arguments: argparse.Namespace) -> int:
    print(tree)
    return 0


def _run(tree: Path, arguments: argparse.Namespace) -> int:
    words: list[str] = arguments.command_line
    command = words[1:] if words[:1] == ["--"] else words
    if not command:
        raise UsageError("give the command to run in the guest, as in: vsport lab run -- vsport-open --list")
    Tree(tree).check()
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vsport-run-")))
        chardevs, devices = _device_options(arguments, place)
        configuration = parse_configuration(chardevs, devices)
        options = [*(f"--chardev={text}" for text in chardevs), *(f"--device={text}" for text in devices)]
        log = place / "vsport.log"
        stack.enter_context(daemon(place / "vm.sock", options, log))
        guest = Guest(
            cast(GuestKind, arguments.guest),
            tree=tree,
            socket_path=place / "vm.sock",
            ports=[port.name for port in configuration.ports if port.name],
            max_ports=configuration.max_ports,
            memory_mib=arguments.memory,
            share=arguments.share,
        )
        if arguments.verbose:
            stack.callback(lambda: print(guest.console(), log.read_text(), sep="", file=sys.stderr))
        stack.enter_context(guest)
        return _carry_out(guest, command, arguments.timeout)


def _device_options(arguments: argparse.Namespace, place: Path) -> tuple[list[str], list[str]]:
    if arguments.chardev or arguments.device:
        return arguments.chardev, arguments.device
    return (
        [f"socket,id=away,path={place}/away.sock,server=on,wait=off", "null,id=null"],
        [f"virtserialport,chardev=away,name={AWAY_PORT}", f"virtserialport,chardev=null,name={NULL_PORT}"],
    )


def _carry_out(guest: Guest, command: Sequence[str], timeout: float | None) -> int:
    with guest.popen(command, stdin=0, stdout=1, stderr=2) as process:
        try:
            code = process.wait(timeout)
            process.drain(timeout)
        except subprocess.TimeoutExpired:
            print(f"vsport lab: {command[0]} took longer than {timeout:g} seconds", file=sys.stderr)
            return TIMED_OUT
    return code if code >= 0 else KILLED - code


_ACTIONS = {"build": _build, "run": _run, "path": _path}
