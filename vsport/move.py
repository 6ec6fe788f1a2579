"""A simulated guest moves to another host while it works, as a virtual machine monitor (VMM) does it with a real one.

    source                                                    target
    runs, and marks each page that it writes (R-VU-80)
    its memory is copied in passes, each what the one before has missed
    stops; its state is saved, the last pages are copied
                                                              loads the state (R-VU-91), or refuses it
                                                              goes on where the rings stood

Until the target has accepted the state, nothing is given up: a move that fails goes on at the source.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from vsport.sim import SimulatedGuest
from vsport.vhost_user.frontend import FrontEnd, GuestMemory, OverVhostUser, PageLog

__all__ = ["FEW_PAGES", "PASSES", "PortTimes", "Report", "move"]

PASSES = 8
"""How many passes there are at most before the guest is stopped: one that writes faster than is copied never ends."""
FEW_PAGES = 32
"""A pass that leaves no more than these is the last one before the stop."""


@dataclass(slots=True)
class PortTimes:
    """When a port was of use again, in seconds since the stop."""

    told: float
    """Its back end had been told of the guest by then: the target said that it has taken the state."""
    answered: float | None = None
    """Its first byte after the move was answered; None until the caller, who alone can see that, says so."""


@dataclass(slots=True)
class Report:
    """What a move took."""

    stopped_at: float
    """time.monotonic() when the guest was stopped."""
    passes: list[int] = field(default_factory=list)
    """Pages copied in each pass; the last one was copied while the guest stood still."""
    downtime: float = 0.0
    """Seconds between the stop and the moment when every ring ran again."""
    ports: dict[int, PortTimes] = field(default_factory=dict)
    """By port id."""

    def answered(self, port: int) -> None:
        """The first byte of ``port`` has been answered just now."""
        self.ports[port].answered = time.monotonic() - self.stopped_at


def move(
    guest: SimulatedGuest,
    source: OverVhostUser,
    target: FrontEnd,
    *,
    work: Callable[[], None] = lambda: None,
    stopped: Callable[[GuestMemory, GuestMemory], None] = lambda *_: None,
) -> Report:
    """Moves ``guest``, which ``source`` attaches to where it runs, to ``target``, a connection that is still unused.

    ``work`` is called after each pass: what the guest and its hosts do meanwhile. ``stopped`` is given the guest's
    memory and its copy when both have to be the same. The front end and the memory of before are the caller's to close.
    Raises BackEndError: if ``target`` has not taken the state, the guest goes on where it was.
    """
    memory = source.guest_memory
    copy = GuestMemory([(region.gpa, region.size) for region in memory.wire])
    log = PageLog(memory.end)
    try:
        passes, pages = _copy_while_it_runs(guest, source.front_end, memory, copy, log, work)
        report = Report(time.monotonic(), passes)
        source.pause()
        try:
            state = source.front_end.save()
            pages |= set(log.take())
            memory.copy_to(copy, pages)
            report.passes.append(len(pages))
            stopped(memory, copy)
            target.negotiate(features=source.front_end.features)
            target.load(state)
            report.ports = {id: PortTimes(time.monotonic() - report.stopped_at) for id in guest.ports}
        except BaseException:
            source.resume()
            raise
    except BaseException:
        copy.close()
        source.front_end.stop_logging()
        raise
    finally:
        guest.on_write = lambda *_: None
        log.close()
    source.move_to(target, copy)
    source.resume()
    report.downtime = time.monotonic() - report.stopped_at
    guest.on_interrupt()  # The source may have called for what the guest has not looked at yet.
    return report


def _copy_while_it_runs(
    guest: SimulatedGuest,
    front_end: FrontEnd,
    memory: GuestMemory,
    copy: GuestMemory,
    log: PageLog,
    work: Callable[[], None],
) -> tuple[list[int], set[int]]:
    """Copies all of ``memory``, then what is written meanwhile, until few pages are left.

    Returns how many pages each pass copied, and those that are left.
    """
    guest.on_write = log.mark
    front_end.start_logging(log)
    pages = set(memory.pages())
    passes: list[int] = []
    while len(passes) < PASSES and (not passes or len(pages) > FEW_PAGES):
        memory.copy_to(copy, pages)
        passes.append(len(pages))
        work()
        pages = set(log.take())
    return passes, pages
