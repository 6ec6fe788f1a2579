"""One virtual machine as the daemon has it: ports with their chardevs, the VMM's socket, events, an offer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

from vsport.addresses import UnixAddress
from vsport.chardev.base import Chardev
from vsport.connection import Cause, State
from vsport.constants import queue_count
from vsport.errors import HostError, UsageError
from vsport.events import EventLog, Journal
from vsport.handover import Cargo, Offer, Takeover
from vsport.host import Host
from vsport.loop import Loop
from vsport.options import parse_configuration
from vsport.port import Port
from vsport.template import Plan
from vsport.vhost_user.server import Server

__all__ = ["Descriptors", "Vm", "tell"]

_OF_A_QUEUE = 3
"""Kick, call and error descriptor."""
_OF_A_FRONT_END = 6
"""The connection, the back-end channel, and two regions of memory: one descriptor to map each, one to hand it over."""


class Descriptors(NamedTuple):
    """How many descriptors something needs."""

    least: int
    """To begin with."""
    most: int
    """With a guest that uses all queues of its device, and a host at every port."""


def tell(what: str, vm: str = "") -> None:
    """On standard error: standard output can be a port (--chardev stdio)."""
    print(f"vsport: {vm and f'{vm}: '}{what}", file=sys.stderr, flush=True)


class Vm:
    """The device that ``plan`` describes. Raises UsageError; nothing of the machine is touched before open().

    ``on_over`` is called when there is nothing more to serve: another process has the device, or the one connection
    that it was given (--fd) has ended.
    """

    def __init__(self, loop: Loop, plan: Plan, journal: Journal | None, on_over: Callable[[Vm], None]) -> None:
        self.plan = plan
        self.loop = loop
        try:
            self.host = Host(loop, parse_configuration(plan.chardevs, plan.devices), plan.vm)
        except UsageError as exc:
            raise UsageError(self._named(exc)) from exc
        self.server = Server(self.host.device, loop)
        self.server.on_disconnected = self._front_end_left
        self.cargo = Cargo(self.host, self.server, plan.chardevs, plan.devices)
        self.events = None if journal is None else EventLog(loop, self.host.device, journal, plan.vm)
        self.offer: Offer | None = None
        self.on_over = on_over
        self.on_failure: Callable[[Vm, HostError], None] = self._raise
        """(this, why) It cannot be served after all, and that shows when the daemon is at work already."""

    def _named(self, what: object) -> str:
        return f"{self.plan.vm}: {what}" if self.plan.vm else str(what)

    @staticmethod
    def _raise(_: Vm, why: HostError) -> None:
        raise why

    def claims(self) -> Iterator[tuple[str, str]]:
        """What nothing else may have: paths, addresses; and what each is for."""
        for option, path in (("--socket-path", self.plan.socket_path), ("--handover", self.plan.handover)):
            if path is not None:
                yield from ((place, option) for place in UnixAddress(path).claims())
        for chardev in self.host.chardevs.values():
            yield from ((place, f"chardev {chardev.id}") for place in chardev.claims())

    @property
    def descriptors(self) -> Descriptors:
        """How many it needs."""
        chardevs = len(self.host.pumps)
        least = 1 + (self.plan.handover is not None) + chardevs
        queues = queue_count(self.host.device.max_ports)
        return Descriptors(least, least + chardevs + _OF_A_FRONT_END + _OF_A_QUEUE * queues)

    # -- life ----------------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Opens its chardevs; raises HostError."""
        try:
            self.host.open()
        except HostError as exc:
            raise HostError(self._named(exc)) from exc
        self._tell_about_chardevs()

    def _tell_about_chardevs(self) -> None:
        """Where the host's program has to go if the system chose that (a terminal, a free TCP port); a likely slip."""
        in_use = {pump.chardev.id for pump in self.host.pumps.values()}
        for option in self.host.configuration.chardevs:
            if option.id not in in_use:
                self._tell(f"chardev {option.id} has no port; give one: --device virtserialport,chardev={option.id}")
            elif option.kind == "pty" or option.options.get("port") == "0":
                self._tell(f"chardev {option.id} is {_address(self.host.chardevs[option.id])}")

    def _tell(self, what: str) -> None:
        tell(what, self.plan.vm)

    def start(self) -> None:
        """Lets its VMM in: now, or when all hosts are there that it shall wait for (wait=on). Raises HostError."""
        missing = self.host.missing_peers()
        if not missing:
            self._listen()
            return
        for chardev in missing:
            self._tell(f"waiting for a connection on {_address(chardev)}")
        device = self.host.device
        heard = device.on_transition

        def moved(port: Port, cause: Cause, before: State) -> None:
            heard(port, cause, before)
            if not self.host.missing_peers():
                device.on_transition = heard
                self.loop.call_soon(self._listen_late)

        device.on_transition = moved

    def _listen_late(self) -> None:
        try:
            self._listen()
        except HostError as exc:
            self.on_failure(self, exc)

    def _listen(self) -> None:
        try:
            if self.plan.fd is not None:
                self.server.adopt(self.plan.fd)
            else:
                assert self.plan.socket_path is not None
                self.server.listen(self.plan.socket_path)
            self._offer_at(self.plan.handover)
        except HostError as exc:
            raise HostError(self._named(exc)) from exc

    def close(self) -> None:
        """Ends it; its socket files go. What another process has by now stays. Safe to call twice."""
        if self.offer is not None:
            self.offer.close()
        self.server.close()
        self.host.close()
        if self.events is not None:
            self.events.flush()

    def _front_end_left(self) -> None:
        """Who was given one connected socket (--fd) has nothing to wait for."""
        if not self.server.listening:
            self.on_over(self)

    # -- handover ------------------------------------------------------------------------------------------------------

    def _offer_at(self, path: str | None) -> None:
        if path is not None:
            self.offer = Offer(path, self.loop, self.cargo, self._handed_over)
            self.offer.listen()
            self.offer.start()

    def _handed_over(self) -> None:
        self.on_over(self)

    def take(self, takeover: Takeover, *, keep_offer: bool, before_ready: Callable[[], None]) -> None:
        """In place of open() and start(): becomes what another process was, whose offer is kept, or ends.

        Another offer may be made at the plan's path. Raises what Takeover does: within its ``with`` all is undone.
        """
        self._offer_at(None if keep_offer else self.plan.handover)
        if self.offer is not None:
            takeover.if_it_fails(self.offer.close)
        inherited = takeover.take(self.cargo, self._handed_over)
        before_ready()
        takeover.ready()
        self.cargo.resume()
        self.host.device.log.info("taken over; the device was paused for %.1f ms", takeover.milliseconds)
        if keep_offer:
            self.offer = inherited
            self.offer.start()
        else:
            inherited.close()


def _address(chardev: Chardev) -> str:
    return chardev.describe().removeprefix("disconnected:")
