"""The command line of the host's half. Each command is imported when it is asked for, so that each starts quickly.

Exit codes:
  0    done, or ended by SIGTERM as a daemon should be
  1    the host cannot do it: a path, a socket, a missing program
  2    the command line is wrong
  130  interrupted (Ctrl-C)
`vsport lab run` passes on the exit code of its command, and says 124 for a time-out, 125 for a fault of the lab.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from vsport.errors import HostError, UsageError

__all__ = ["main", "make_parser"]

INTERRUPTED = 130

_SERVE_EPILOG = """\
Options are QEMU's own; one dash will do as well as two:

  vsport serve --socket-path /run/vm.sock \\
    --chardev socket,id=c0,path=/run/agent.sock,server=on,wait=off \\
    --device virtserialport,chardev=c0,name=org.qemu.guest_agent.0

Then start the VM, with memory that it shares:

  qemu-system-x86_64 ... -object memory-backend-memfd,id=m,size=1G,share=on -numa node,memdev=m \\
    -chardev socket,id=vs,path=/run/vm.sock \\
    -device vhost-user-test-device-pci,chardev=vs,virtio-id=3,num_vqs=64,config_size=12,vq_size=128
  linux.uml ... virtio_uml.device=/run/vm.sock:3
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; help texts, completion and documentation are made from it."""
    parser = _Parser(
        prog="vsport",
        description="A virtio-serial device outside the VMM, whose ports survive the move.",
        epilog=__doc__ and __doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and end")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    _add_serve(commands)
    _add_demo(commands)
    _add_lab(commands)
    _add_completion(commands)
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
        help="serve a virtio-serial device to a VMM over vhost-user",
        description="Serves one virtio-serial device to a VMM over vhost-user, until SIGTERM.",
        epilog=_SERVE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    where = serve.add_mutually_exclusive_group()
    where.add_argument("--socket-path", metavar="PATH", help="listen for the VMM on this Unix socket")
    where.add_argument("--fd", type=int, metavar="N", help="an inherited socket, listening or connected")
    serve.add_argument(
        "--chardev",
        "-chardev",
        action="append",
        default=[],
        metavar="KIND,id=ID[,...]",
        help="a host back end: socket, pty, file, pipe, stdio, ringbuf, null; KIND,help lists its options",
    )
    serve.add_argument(
        "--device",
        "-device",
        action="append",
        default=[],
        metavar="DEVICE[,...]",
        help="a port, virtserialport or virtconsole, or virtio-serial,max_ports=N; DEVICE,help lists its options",
    )
    serve.add_argument(
        "--log-level", choices=["error", "warning", "info", "debug"], default="warning", help="default: warning"
    )
    serve.add_argument(
        "--print-capabilities", action="store_true", help="print what this back end can do, as JSON, and end"
    )
    serve.add_argument(
        "--print-description",
        action="store_true",
        help="print the file for /etc/qemu/vhost-user by which a management program finds this back end, and end",
    )


def _add_demo(commands: _Commands[_Parser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="see the main job done in a minute",
        description="A guest opens a port, bytes flow both ways, the host leaves and returns, the guest closes.",
        allow_abbrev=False,
    )
    demo.add_argument(
        "--guest", choices=["sim", "uml", "qemu"], default="sim", help="simulated (default), or a real Linux kernel"
    )
    demo.add_argument("--json", action="store_true", help="one object a line, one for each thing that happened")
    demo.add_argument("--lab", metavar="DIR", help="where the lab is kept; default as in vsport lab")


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


def _demo(arguments: argparse.Namespace) -> int:
    from vsport import demo

    if arguments.guest == "sim":
        return demo.run(demo.simulated, as_json=arguments.json)
    from vsport.lab.demo import on_a_kernel

    return demo.run(on_a_kernel(arguments.guest, arguments.lab), as_json=arguments.json)


def _lab(arguments: argparse.Namespace) -> int:
    from vsport.lab.cli import run

    return run(arguments)


def _completion(arguments: argparse.Namespace) -> int:
    try:
        import shtab
    except ImportError:
        raise HostError("completion scripts are made by shtab: pip install 'vsport[completion]'") from None
    print(shtab.complete(make_parser(), arguments.shell))
    return 0


_COMMANDS = {"serve": _serve, "demo": _demo, "lab": _lab, "completion": _completion}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 2
    try:
        return _COMMANDS[arguments.command](arguments)
    except (UsageError, HostError) as exc:
        print(f"vsport {arguments.command}: {exc}", file=sys.stderr)
        return 2 if isinstance(exc, UsageError) else 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough; without this the interpreter would complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def main_serve() -> int:
    """The program `vhost-user-vsport`: `vsport serve` for those who start back ends by path alone (R-VU-102)."""
    return main(["serve", *sys.argv[1:]])
