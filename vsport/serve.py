"""`vsport serve`: the daemon. It follows the vhost-user conventions for back-end programs (R-VU-100 to 105)."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shutil
import signal
import sys
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from vsport.addresses import UnixAddress
from vsport.chardev import KINDS
from vsport.errors import HostError, UsageError
from vsport.events import Journal, open_events
from vsport.handover import Takeover
from vsport.limits import raise_descriptor_limit
from vsport.loop import Loop
from vsport.option_table import Option, help_lines
from vsport.options import DEVICES
from vsport.template import PLACEHOLDER, Plan, plans
from vsport.vm import Vm, tell

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

_POLL_MAX_NS = 150_000
"""A guest's answer to a byte takes less; with a spin as long as that the answer's kick wakes nobody."""
_POLL_LIMIT_NS = 1_000_000_000

_EXIT_CODES = {
    signal.SIGTERM: 0,  # R-VU-100: the regular end
    signal.SIGINT: 128 + signal.SIGINT,
    signal.SIGHUP: 128 + signal.SIGHUP,
}


_OWN_DESCRIPTORS = 32
"""What the interpreter, the loop, the log and the events have, and some to spare."""
_NAMES_TOLD = 20


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
    """Runs until a signal says stop, or another process has taken over everything; returns the exit code.

    Raises UsageError, HostError.
    """
    _check(arguments)
    wanted = plans([*arguments.vm, *_listed(arguments.vms)], _template(arguments))
    _log_to_stderr(arguments.log_level)
    with contextlib.closing(Loop(poll_max_ns=_poll_max_ns(arguments.poll_max_ns))) as loop:
        daemon = _Daemon(loop)
        if arguments.takeover is not None:
            return daemon.take_over(wanted)
        return daemon.serve(wanted)


def _poll_max_ns(asked: int | None) -> int:
    """On one processor whoever is waited for could not run meanwhile."""
    if asked is None:
        return _POLL_MAX_NS if len(os.sched_getaffinity(0)) > 1 else 0
    return asked


def _check(arguments: argparse.Namespace) -> None:
    """What can be said of the options by themselves; raises UsageError."""
    for option in ("--socket-path", "--handover", "--takeover", "--events", "--vms"):
        if _value(arguments, option) == "":
            raise UsageError(f"{option} is empty")
    if arguments.poll_max_ns is not None and not 0 <= arguments.poll_max_ns <= _POLL_LIMIT_NS:
        raise UsageError(f"--poll-max-ns {arguments.poll_max_ns} is not in 0 to {_POLL_LIMIT_NS} (a second)")
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


def _template(arguments: argparse.Namespace) -> Plan:
    return Plan(
        socket_path=arguments.socket_path,
        fd=arguments.fd,
        handover=arguments.handover,
        takeover=arguments.takeover,
        events=arguments.events,
        chardevs=tuple(arguments.chardev),
        devices=tuple(arguments.device),
    )


def _listed(path: str | None) -> list[str]:
    """The names in a file, one a line; empty lines do not count. Raises HostError, UsageError."""
    if path is None:
        return []
    try:
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            names = [os.fsdecode(line) for raw in file if (line := raw.strip())]
    except OSError as exc:
        raise HostError(f"cannot read the names in {path}: {exc.strerror}") from exc
    if not names:
        raise UsageError(f"--vms {path}: there is no name in it")
    return names


def _log_to_stderr(level: str) -> None:
    """Lines that are about one of many devices begin with its name."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("vsport: %(whose)s%(message)s", defaults={"whose": ""}))
    logging.basicConfig(level=level.upper(), handlers=[handler])


class _Daemon:
    """Virtual machines on one loop, until a signal, or until none is left. Raises UsageError, HostError."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.vms: dict[str, Vm] = {}
        self.exit_code: int | None = None
        self._journals: dict[str, Journal] = {}
        self._untried: deque[Plan] = deque()
        """Whose takeover has yet to come."""
        self._obeying = False

    def serve(self, wanted: Sequence[Plan]) -> int:
        """Serves all of them, or none; returns the exit code."""
        self._obey_signals()
        with contextlib.ExitStack() as stack:
            stack.callback(self._close)
            for plan in wanted:
                self.vms[plan.vm] = Vm(self.loop, plan, self._journal(plan.events), self._over)
            vms = list(self.vms.values())
            if len(vms) > 1:
                _check_claims(vms)
            _allow_descriptors(vms)
            for vm in vms:
                vm.open()
            for vm in vms:
                vm.start()
            if len(vms) > 1:
                for vm in vms:
                    vm.on_failure = self._give_up
            self.loop.run()
        return self.exit_code or 0

    def _journal(self, path: str | None) -> Journal | None:
        """Where to write events; many virtual machines may share one."""
        if path is None:
            return None
        if path not in self._journals:
            self._journals[path] = open_events(path)
        return self._journals[path]

    def _over(self, vm: Vm) -> None:
        """There is nothing more to do for ``vm``."""
        vm.close()
        del self.vms[vm.plan.vm]
        if not self.vms and not self._untried:
            self._stop(0)

    def _give_up(self, vm: Vm, why: HostError) -> None:
        """One of many cannot be served: that is no reason to stop the others."""
        tell(str(why))
        self._over(vm)

    def _close(self) -> None:
        with contextlib.ExitStack() as stack:  # whatever goes wrong with one of them
            for journal in self._journals.values():
                stack.callback(journal.close)
            for vm in self.vms.values():
                stack.callback(vm.close)

    # -- signals -------------------------------------------------------------------------------------------------------

    def _obey_signals(self) -> None:
        if self._obeying:
            return
        self._obeying = True
        for number, exit_code in _EXIT_CODES.items():
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # It is under nohup.
                self.loop.on_signal(number, partial(self._stop, exit_code))

    def _stop(self, exit_code: int) -> None:
        if self.exit_code is None:  # what comes first decides
            self.exit_code = exit_code
        self.loop.stop()

    # -- takeover ------------------------------------------------------------------------------------------------------

    def take_over(self, wanted: Sequence[Plan]) -> int:
        """Goes on with the devices of the process that offers them, and returns the exit code.

        Of many, each is taken in a round of its own, so that those that were taken before it do not stand still. What
        cannot be taken stays where it is, and is told; the others go on here.
        """
        _check_distinct(wanted)
        plans = [_absolute(plan) for plan in wanted]
        with contextlib.ExitStack() as stack:
            stack.callback(self._close)
            if len(plans) == 1:
                self._take(plans[0])
            else:
                self._untried.extend(plans)
                self.loop.call_soon(partial(self._take_next, []))
            self.loop.run()
        return self.exit_code or 0

    def _take(self, plan: Plan) -> None:
        assert plan.takeover is not None
        again = plan.handover is not None and _same_file(plan.handover, plan.takeover)
        with Takeover(plan.takeover) as takeover:
            chardevs, devices = map(tuple, takeover.configuration())
            plan = replace(plan, chardevs=chardevs, devices=devices)
            vm = Vm(self.loop, plan, self._journal(plan.events), self._over)
            vm.take(takeover, keep_offer=again, before_ready=self._obey_signals)
        self.vms[plan.vm] = vm

    def _take_next(self, failed: list[str]) -> None:
        plan = self._untried.popleft()
        try:
            self._take(plan)
        except (HostError, UsageError) as exc:
            tell(str(exc), plan.vm)
            failed.append(plan.vm)
            if isinstance(exc.__cause__, TimeoutError):  # it hangs: those that run here shall not wait for the others
                failed += [plan.vm for plan in self._untried]
                self._untried.clear()
        if self._untried:
            self.loop.call_soon(partial(self._take_next, failed))
        elif failed:
            self._tell_of(failed)

    def _tell_of(self, failed: list[str]) -> None:
        """Which process has which, when not all could be taken."""
        tell(f"not taken over, and left where they are: {_some(failed)}")
        if self.vms:
            tell(f"taken over, and served here now: {_some(list(self.vms))}")
        else:
            self._stop(1)


def _check_claims(vms: Iterable[Vm]) -> None:
    """That no two chardevs or sockets of theirs want the same path, address or stream. Raises UsageError."""
    owners: dict[str, str] = {}
    for vm in vms:
        for place, what in vm.claims():
            owner = f"{vm.plan.vm}'s {what}"
            other = owners.setdefault(place, owner)
            if other is not owner:
                raise UsageError(
                    f"{other} and {owner} cannot both have {place}: "
                    f"each needs its own ({PLACEHOLDER} stands for the virtual machine's name)"
                )


def _check_distinct(wanted: Iterable[Plan]) -> None:
    """That each of them comes from a place of its own, and is offered at one. Raises UsageError."""
    for option in ("takeover", "handover"):
        paths = [path for plan in wanted if (path := getattr(plan, option)) is not None]
        if len(set(paths)) < len(paths):
            raise UsageError(
                f"--{option} {paths[0]}: each virtual machine needs its own ({PLACEHOLDER} stands for its name)"
            )


def _allow_descriptors(vms: Sequence[Vm]) -> None:
    """Raises the limit as far as it goes. Raises HostError if they cannot even be opened with that."""
    least = _OWN_DESCRIPTORS + sum(vm.descriptors.least for vm in vms)
    most = _OWN_DESCRIPTORS + sum(vm.descriptors.most for vm in vms)
    allowed = raise_descriptor_limit(most)
    limit = f"this process may have {allowed} (ulimit -n; with systemd, LimitNOFILE=)"
    if least > allowed:
        raise HostError(f"{least} descriptors are needed to begin with, and {limit}")
    if most > allowed:
        log.warning(
            "with all guests running, up to %d descriptors are needed, and %s; fewer ports need fewer "
            "(--device virtio-serial,max_ports=N)",
            most,
            limit,
        )


def _absolute(plan: Plan) -> Plan:
    """With paths that stay what they are in the directory of the process that is taken over from."""
    paths = {
        option: path for option in ("takeover", "handover", "events") if (path := getattr(plan, option)) is not None
    }
    return replace(plan, **{option: path if path == "-" else os.path.abspath(path) for option, path in paths.items()})


def _same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _some(names: Sequence[str]) -> str:
    """The first few of many names."""
    more = len(names) - _NAMES_TOLD
    return ", ".join(names[:_NAMES_TOLD]) + (f" and {more} more" if more > 0 else "")
