"""`vsport serve`: the daemon. It follows the vhost-user conventions for back-end programs (R-VU-100 to 105)."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from vsport.addresses import UnixAddress
from vsport.chardev import KINDS
from vsport.chardev.base import Chardev
from vsport.errors import HostError, UsageError
from vsport.events import EventLog, open_events
from vsport.handover import Cargo, Offer, Takeover
from vsport.host import Host
from vsport.loop import Loop
from vsport.option_table import Option, help_lines
from vsport.options import DEVICES, parse_configuration
from vsport.turns import ask_for_short_turns
from vsport.vhost_user.server import Server

__all__ = ["CAPABILITIES", "description", "option_help", "serve"]

CAPABILITIES = '{"type": "console"}'
"""What --print-capabilities prints; the schema has no features for a console (R-VU-101)."""

log = logging.getLogger("vsport.serve")

PROGRAM = "vhost-user-vsport"
"""Management programs start a back end by its path and options alone, so `vsport serve` has a name of its own."""

_DEVICE_SUMMARIES = {
    "virtserialport": "a port for programs: /dev/vportNpM, and its name in /dev/virtio-ports",
    "virtconsole": "a port for a terminal: /dev/hvcN",
    "virtio-serial": "the device that holds the ports; it is there without being asked for",
    "virtio-serial-pci": "the same as virtio-serial",
    "virtio-serial-device": "the same as virtio-serial",
}

_EXIT_CODES = {
    signal.SIGTERM: 0,  # R-VU-100: the regular end
    signal.SIGINT: 128 + signal.SIGINT,
    signal.SIGHUP: 128 + signal.SIGHUP,
}


def description() -> str:
    """What has to stand in e.g. /etc/qemu/vhost-user/50-vsport-console.json (R-VU-102). Raises HostError."""
    beside = Path(sys.executable).with_name(PROGRAM)  # where the environment's scripts are
    program = str(beside) if beside.exists() else shutil.which(PROGRAM)
    if program is None:
        raise HostError(f"the program {PROGRAM} is not installed: pip install vsport")
    entry = {"description": "vsport virtio-serial device", "type": "console", "binary": program, "tags": ["multiport"]}
    return json.dumps(entry, indent=2)


class _Kind(NamedTuple):
    """What one word after --chardev or --device stands for."""

    summary: str
    options: Mapping[str, Option]


def option_help(chardevs: Sequence[str], devices: Sequence[str]) -> str | None:
    """What `--chardev help`, `--chardev KIND,help` and the same of --device ask for; None if nothing does."""
    kinds = {kind: _Kind(cls.summary, cls.OPTIONS) for kind, cls in KINDS.items()}
    models = {model: _Kind(_DEVICE_SUMMARIES[model], table) for model, table in DEVICES.items()}
    for option, texts, known in (("--chardev", chardevs, kinds), ("--device", devices, models)):
        for text in texts:
            word, comma, rest = text.partition(",")
            if text == "help":
                return "\n".join([f"{option} KIND,...; KIND,help lists its options", *_summaries(known)])
            if comma and rest == "help" and word in known:
                return "\n".join([f"{option} {word},...", *help_lines(known[word].options)])
    return None


def _summaries(kinds: Mapping[str, _Kind]) -> list[str]:
    width = max(map(len, kinds))
    return [f"  {word:<{width}}  {kind.summary}" for word, kind in kinds.items()]


def serve(arguments: argparse.Namespace) -> int:
    """Runs until a signal says stop, or another process takes over; returns the exit code.

    Raises UsageError, HostError.
    """
    _check(arguments)
    logging.basicConfig(level=arguments.log_level.upper(), format="vsport: %(message)s", stream=sys.stderr)
    ask_for_short_turns()
    loop = Loop()
    try:
        if arguments.takeover is not None:
            return _take_over(loop, arguments)
        return _Daemon(loop, arguments.chardev, arguments.device, arguments.events).run(arguments)
    finally:
        loop.close()


def _check(arguments: argparse.Namespace) -> None:
    """What can be said of the options by themselves; raises UsageError."""
    for option in ("--socket-path", "--handover", "--takeover", "--events"):
        if _value(arguments, option) == "":
            raise UsageError(f"{option} is empty")
    if arguments.handover is not None:
        UnixAddress(arguments.handover)
    if arguments.takeover is not None:
        for option in ("--chardev", "--device", "--socket-path", "--fd"):
            if _value(arguments, option) not in (None, []):
                raise UsageError(
                    f"--takeover brings the device along as it is, with its chardevs and its VMM: no {option}"
                )
    elif (arguments.socket_path is None) == (arguments.fd is None):
        raise UsageError("give either --socket-path PATH or --fd N: where is the VMM?")


def _value(arguments: argparse.Namespace, option: str) -> Any:
    return getattr(arguments, option.removeprefix("--").replace("-", "_"))


def _take_over(loop: Loop, arguments: argparse.Namespace) -> int:
    """Goes on with the device of the process that offers it at --takeover PATH."""
    again = arguments.handover is not None and _same_file(arguments.handover, arguments.takeover)
    events = arguments.events if arguments.events in (None, "-") else os.path.abspath(arguments.events)
    elsewhere = None if again or arguments.handover is None else os.path.abspath(arguments.handover)
    with Takeover(arguments.takeover) as takeover:
        configuration = takeover.configuration()
        daemon = _Daemon(loop, configuration.chardevs, configuration.devices, events)
        daemon.take(takeover, keep_offer=again, offer_at=elsewhere)
    return daemon.go_on()


def _same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


class _Daemon:
    """Host and server on one loop, until a signal. Raises UsageError, HostError."""

    def __init__(self, loop: Loop, chardevs: Sequence[str], devices: Sequence[str], events: str | None) -> None:
        self.loop = loop
        self.host = Host(loop, parse_configuration(chardevs, devices))
        self.server = Server(self.host.device, loop)
        self.server.on_disconnected = self._front_end_left
        self.cargo = Cargo(self.host, self.server, chardevs, devices)
        self.events = None if events is None else EventLog(loop, self.host.device, open_events(events))
        self.offer: Offer | None = None
        self.exit_code: int | None = None

    def run(self, arguments: argparse.Namespace) -> int:
        self._obey_signals()
        try:
            self.host.open()
            self._tell_about_chardevs()
            self._wait_for_peers()
            if self.exit_code is None:
                self._listen(arguments)
                self._offer_at(arguments.handover)
                self.loop.run()
        finally:
            self._close()
        return self.exit_code or 0

    def take(self, takeover: Takeover, *, keep_offer: bool, offer_at: str | None) -> None:
        """Becomes what another process was. Its offer of the device is kept, or ends; another may be made at a path."""
        self._offer_at(offer_at)
        if self.offer is not None:
            takeover.if_it_fails(self.offer.close)
        inherited = takeover.take(self.cargo, self._handed_over)
        self._obey_signals()
        takeover.ready()
        self.cargo.resume()
        log.info("taken over; the device was paused for %.1f ms", takeover.milliseconds)
        if keep_offer:
            self.offer = inherited
            self.offer.start()
        else:
            inherited.close()

    def go_on(self) -> int:
        """As run(), after take()."""
        try:
            self.loop.run()
        finally:
            self._close()
        return self.exit_code or 0

    def _offer_at(self, path: str | None) -> None:
        if path is not None:
            self.offer = Offer(path, self.loop, self.cargo, self._handed_over)
            self.offer.listen()
            self.offer.start()

    def _handed_over(self) -> None:
        self._stop(0)

    def _close(self) -> None:
        if self.offer is not None:
            self.offer.close()
        self.server.close()
        self.host.close()
        if self.events is not None:
            self.events.close()

    def _obey_signals(self) -> None:
        for number, exit_code in _EXIT_CODES.items():
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # It is under nohup.
                self.loop.on_signal(number, partial(self._stop, exit_code))

    def _stop(self, exit_code: int) -> None:
        if self.exit_code is None:  # what comes first decides
            self.exit_code = exit_code
        self.loop.stop()

    def _front_end_left(self) -> None:
        """Who was given one connected socket (--fd) has nothing to wait for."""
        if not self.server.listening:
            self._stop(0)

    def _tell_about_chardevs(self) -> None:
        """Where the host's program has to go if the system chose that (a terminal, a free TCP port); a likely slip."""
        in_use = {pump.chardev.id for pump in self.host.pumps.values()}
        for option in self.host.configuration.chardevs:
            if option.id not in in_use:
                _tell(f"chardev {option.id} has no port; give one: --device virtserialport,chardev={option.id}")
            elif option.kind == "pty" or option.options.get("port") == "0":
                _tell(f"chardev {option.id} is {_address(self.host.chardevs[option.id])}")

    def _wait_for_peers(self) -> None:
        """wait=on: the VM starts when the host's programs are there."""
        announced: set[str] = set()
        while self.exit_code is None and (missing := self.host.missing_peers()):
            for chardev in missing:
                if chardev.id not in announced:
                    _tell(f"waiting for a connection on {_address(chardev)}")
                    announced.add(chardev.id)
            self.loop.run_once(None)

    def _listen(self, arguments: argparse.Namespace) -> None:
        if arguments.fd is not None:
            self.server.adopt(arguments.fd)
        else:
            self.server.listen(arguments.socket_path)


def _address(chardev: Chardev) -> str:
    return chardev.describe().removeprefix("disconnected:")


def _tell(what: str) -> None:
    """On standard error: standard output can be a port (--chardev stdio)."""
    print(f"vsport: {what}", file=sys.stderr, flush=True)
