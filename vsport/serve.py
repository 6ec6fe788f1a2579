"""`vsport serve`: the daemon. It follows the vhost-user conventions for back-end programs (R-VU-100 to 105)."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from vsport.chardev import KINDS
from vsport.errors import HostError, UsageError
from vsport.host import Host
from vsport.loop import Loop
from vsport.option_table import help_lines
from vsport.options import DEVICES, parse_configuration
from vsport.vhost_user.server import Server

__all__ = ["CAPABILITIES", "description", "option_help", "serve"]

CAPABILITIES = '{"type": "console"}'
"""What --print-capabilities prints; the schema has no features for a console (R-VU-101)."""

PROGRAM = "vhost-user-vsport"
"""Management programs start a back end by its path and options alone, so `vsport serve` has a name of its own."""

_INTERRUPTED = 128 + signal.SIGINT


def description() -> str:
    """What has to stand in e.g. /etc/qemu/vhost-user/50-vsport-console.json (R-VU-102). Raises HostError."""
    beside = Path(sys.executable).with_name(PROGRAM)  # where the environment's scripts are
    program = str(beside) if beside.exists() else shutil.which(PROGRAM)
    if program is None:
        raise HostError(f"the program {PROGRAM} is not installed: pip install vsport")
    entry = {"description": "vsport virtio-serial device", "type": "console", "binary": program, "tags": ["multiport"]}
    return json.dumps(entry, indent=2)


def option_help(chardevs: Sequence[str], devices: Sequence[str]) -> str | None:
    """What `--chardev help`, `--chardev KIND,help` and the same of --device ask for; None if nothing does."""
    kinds = {kind: cls.OPTIONS for kind, cls in KINDS.items()}
    for option, texts, tables in (("--chardev", chardevs, kinds), ("--device", devices, DEVICES)):
        for text in texts:
            kind, comma, rest = text.partition(",")
            if text == "help":
                return "\n".join([f"{option} KIND,...", *(f"  {kind}" for kind in tables)])
            if comma and rest == "help" and kind in tables:
                return "\n".join([f"{option} {kind},...", *help_lines(tables[kind])])
    return None


def serve(arguments: argparse.Namespace) -> int:
    """Runs until a signal says stop; returns the exit code. Raises UsageError, HostError."""
    if (arguments.socket_path is None) == (arguments.fd is None):
        raise UsageError("give either --socket-path PATH or --fd N: where is the VMM?")
    if arguments.socket_path == "":
        raise UsageError("--socket-path is empty")
    logging.basicConfig(level=arguments.log_level.upper(), format="vsport: %(message)s", stream=sys.stderr)
    configuration = parse_configuration(arguments.chardev, arguments.device)
    loop = Loop()
    try:
        return _Daemon(loop, Host(loop, configuration)).run(arguments)
    finally:
        loop.close()


class _Daemon:
    """Host and server on one loop, until a signal."""

    def __init__(self, loop: Loop, host: Host) -> None:
        self.loop = loop
        self.host = host
        self.server = Server(host.device, loop)
        self.exit_code: int | None = None

    def run(self, arguments: argparse.Namespace) -> int:
        self.server.on_disconnected = self._front_end_left
        self.loop.on_signal(signal.SIGTERM, lambda: self._stop(0))
        self.loop.on_signal(signal.SIGINT, lambda: self._stop(_INTERRUPTED))
        try:
            self.host.open()
            self._wait_for_peers()
            if self.exit_code is None:
                self._listen(arguments)
                self.loop.run()
        finally:
            self.server.close()
            self.host.close()
        return self.exit_code or 0

    def _stop(self, exit_code: int) -> None:
        if self.exit_code is None:  # what comes first decides
            self.exit_code = exit_code
        self.loop.stop()

    def _front_end_left(self) -> None:
        """Who was given one connected socket (--fd) has nothing to wait for."""
        if not self.server.listening:
            self._stop(0)

    def _wait_for_peers(self) -> None:
        """wait=on: the VM starts when the host's programs are there."""
        announced: set[str] = set()
        while self.exit_code is None and (missing := self.host.missing_peers()):
            for chardev in missing:
                if chardev.id not in announced:
                    print(f"vsport: waiting for a connection on {chardev.describe()}", file=sys.stderr, flush=True)
                    announced.add(chardev.id)
            self.loop.run_once(None)

    def _listen(self, arguments: argparse.Namespace) -> None:
        if arguments.fd is not None:
            self.server.adopt(arguments.fd)
        else:
            self.server.listen(arguments.socket_path)
