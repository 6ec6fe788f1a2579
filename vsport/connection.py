"""How a port is connected: a table, and the only code that moves a port.

Three bits make the state. ``host_connected``: the back end's transport has a peer. ``device_ready``: the guest's driver
has said PORT_READY since the last reset. ``guest_connected``: a program in the guest holds the port open. Seen from
outside these are the four states A to D of a connection with two ends, the back end and the client (the guest's half):

    A  both are there     B  neither     C  only the back end     D  only the client

A client that is not ready cannot hold a port open, so six of the eight combinations exist. Every pair of state and
cause is in TABLE, also those that change nothing (they say so by an empty tuple of effects) and those that only a
broken driver can bring about (``Refused``). A repeat changes nothing: PORT_OPEN is a level, not an edge (R-CON-39).

A pause is no state of its own. What happens while the rings stand still moves the port at once, as it does at any other
time, and the words for the guest wait in order until it can take them: nothing is slept through. A host that leaves and
another that comes meanwhile are therefore two rows of this table, and two words for the guest.

A machine that was moved has a port whose bits are known and a back end that was made a moment ago and knows nothing:
RESTORE and HANDOVER are the rows by which it learns. What else is different on the new host, above all that the host's
session is another one, is then fed as the ordinary cause that it is.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import NamedTuple

__all__ = ["LETS_THROUGH", "TABLE", "Cause", "Effect", "OnRestore", "Policy", "Refused", "State", "Transition"]


class State(Enum):
    """The bits (host_connected, device_ready, guest_connected), named by the letter seen from outside."""

    B_UNREADY = (False, False, False)
    C_UNREADY = (True, False, False)
    B = (False, True, False)
    C = (True, True, False)
    D = (False, True, True)
    A = (True, True, True)

    @property
    def host_connected(self) -> bool:
        return self.value[0]

    @property
    def device_ready(self) -> bool:
        return self.value[1]

    @property
    def guest_connected(self) -> bool:
        return self.value[2]


class Cause(Enum):
    """What happened. The value is the word that back ends, events and logs see."""

    HOST_CONNECT = "host-connect"
    HOST_DISCONNECT = "host-disconnect"
    PORT_READY = "port-ready"
    GUEST_OPEN = "guest-open"
    GUEST_CLOSE = "guest-close"
    RESET = "reset"
    """The guest began anew. A reboot, a driver that is unbound and a front end that leaves all look like this."""
    UNPLUG = "unplug"
    PAUSE = "pause"
    """Every ring of the device stands still now."""
    RESUME = "resume"
    """The first ring of the device runs again."""
    SAVE = "save"
    """The state has been written down; the port may go on as if nothing had been."""
    RESTORE = "restore"
    """The port has its bits from a snapshot, and a back end that has heard nothing; no host came along."""
    HANDOVER = "handover"
    """The same in another process on the same machine, with the host's session carried over."""


class Effect(Enum):
    """What has to be done about it, in the order given by the table."""

    ANNOUNCE = auto()
    """Tell the guest what the port is: console or not, its size, its name (R-CON-31)."""
    TELL_GUEST_OPEN = auto()
    """Send PORT_OPEN 1: the host is there."""
    TELL_GUEST_CLOSED = auto()
    """Send PORT_OPEN 0: the host has gone."""
    TELL_BACK_END_OPEN = auto()
    """Call the back end's guest_connected(True, cause)."""
    TELL_BACK_END_CLOSED = auto()
    """Call the back end's guest_connected(False, cause)."""
    LOAD_BACK_END = auto()
    """Give the back end what it saved before the move."""
    RETURN_CHAINS = auto()
    """Give the guest back what it sent and nobody will take, a half-consumed chain included (R-CON-48)."""
    FLOW = auto()
    """Bytes may move now: look at both rings."""


class Transition(NamedTuple):
    state: State
    effects: tuple[Effect, ...] = ()


class Refused(NamedTuple):
    """The pair breaks a rule; the port stays as it is."""

    rule: str
    what: str


class Policy(Enum):
    """What a restored port's back end is told: the four answers of 2011 to "replay guest_open on migration".

    ``silent`` is the bug itself, kept so that it can be shown.
    """

    SILENT = "silent"
    REPLAY = "replay"
    BACKEND = "backend"
    RECONNECT = "reconnect"


class OnRestore(Enum):
    """What the guest is shown of a restore: ``auto`` closes and opens its port exactly if the host's session is new."""

    AUTO = "auto"
    RESUME = "resume"
    REOPEN = "reopen"


LETS_THROUGH: dict[Policy, frozenset[Effect]] = {
    Policy.SILENT: frozenset(),
    Policy.REPLAY: frozenset({Effect.TELL_BACK_END_OPEN}),
    Policy.BACKEND: frozenset({Effect.LOAD_BACK_END}),
    Policy.RECONNECT: frozenset({Effect.LOAD_BACK_END, Effect.TELL_BACK_END_CLOSED, Effect.TELL_BACK_END_OPEN}),
}
"""Of the effects that RESTORE has, those that each policy lets come about."""

_S, _C, _E, _T = State, Cause, Effect, Transition
_UNREADY_OPEN = Refused("R-CON-31", "PORT_OPEN for a port that the driver has not called ready")

TABLE: dict[tuple[State, Cause], Transition | Refused] = {
    # The host comes. A driver that is not ready hears of it when it is (PORT_READY below).
    (_S.B_UNREADY, _C.HOST_CONNECT): _T(_S.C_UNREADY),
    (_S.B, _C.HOST_CONNECT): _T(_S.C, (_E.TELL_GUEST_OPEN, _E.FLOW)),
    (_S.D, _C.HOST_CONNECT): _T(_S.A, (_E.TELL_GUEST_OPEN, _E.FLOW)),
    (_S.C_UNREADY, _C.HOST_CONNECT): _T(_S.C_UNREADY),
    (_S.C, _C.HOST_CONNECT): _T(_S.C),
    (_S.A, _C.HOST_CONNECT): _T(_S.A),
    # The host goes: what it did not take goes back to the guest before the guest hears of it.
    (_S.C_UNREADY, _C.HOST_DISCONNECT): _T(_S.B_UNREADY, (_E.RETURN_CHAINS,)),
    (_S.C, _C.HOST_DISCONNECT): _T(_S.B, (_E.RETURN_CHAINS, _E.TELL_GUEST_CLOSED)),
    (_S.A, _C.HOST_DISCONNECT): _T(_S.D, (_E.RETURN_CHAINS, _E.TELL_GUEST_CLOSED)),
    (_S.B_UNREADY, _C.HOST_DISCONNECT): _T(_S.B_UNREADY),
    (_S.B, _C.HOST_DISCONNECT): _T(_S.B),
    (_S.D, _C.HOST_DISCONNECT): _T(_S.D),
    # The driver knows the port. A second PORT_READY comes from a driver that has forgotten what it was told (a guest
    # that slept, R-CON-33, R-CON-34): it hears everything again, the host's absence included.
    (_S.B_UNREADY, _C.PORT_READY): _T(_S.B, (_E.ANNOUNCE,)),
    (_S.C_UNREADY, _C.PORT_READY): _T(_S.C, (_E.ANNOUNCE, _E.TELL_GUEST_OPEN)),
    (_S.B, _C.PORT_READY): _T(_S.B, (_E.ANNOUNCE, _E.TELL_GUEST_CLOSED)),
    (_S.C, _C.PORT_READY): _T(_S.C, (_E.ANNOUNCE, _E.TELL_GUEST_OPEN)),
    (_S.D, _C.PORT_READY): _T(_S.D, (_E.ANNOUNCE, _E.TELL_GUEST_CLOSED)),
    (_S.A, _C.PORT_READY): _T(_S.A, (_E.ANNOUNCE, _E.TELL_GUEST_OPEN)),
    # A program in the guest opens the port.
    (_S.B, _C.GUEST_OPEN): _T(_S.D, (_E.TELL_BACK_END_OPEN, _E.FLOW)),
    (_S.C, _C.GUEST_OPEN): _T(_S.A, (_E.TELL_BACK_END_OPEN, _E.FLOW)),
    (_S.D, _C.GUEST_OPEN): _T(_S.D),
    (_S.A, _C.GUEST_OPEN): _T(_S.A),
    (_S.B_UNREADY, _C.GUEST_OPEN): _UNREADY_OPEN,
    (_S.C_UNREADY, _C.GUEST_OPEN): _UNREADY_OPEN,
    # It closes the port. What it wrote before is already on its way, and a chain that a slow host has taken half of
    # stays with the ring, which remembers where to go on: nothing is stuck, and the last words are not lost.
    (_S.D, _C.GUEST_CLOSE): _T(_S.B, (_E.TELL_BACK_END_CLOSED,)),
    (_S.A, _C.GUEST_CLOSE): _T(_S.C, (_E.TELL_BACK_END_CLOSED,)),
    (_S.B, _C.GUEST_CLOSE): _T(_S.B),
    (_S.C, _C.GUEST_CLOSE): _T(_S.C),
    (_S.B_UNREADY, _C.GUEST_CLOSE): _UNREADY_OPEN,
    (_S.C_UNREADY, _C.GUEST_CLOSE): _UNREADY_OPEN,
    # The device is reset: the guest forgets everything, the host's side stays (R-CON-38).
    (_S.B_UNREADY, _C.RESET): _T(_S.B_UNREADY),
    (_S.C_UNREADY, _C.RESET): _T(_S.C_UNREADY),
    (_S.B, _C.RESET): _T(_S.B_UNREADY),
    (_S.C, _C.RESET): _T(_S.C_UNREADY),
    (_S.D, _C.RESET): _T(_S.B_UNREADY, (_E.TELL_BACK_END_CLOSED,)),
    (_S.A, _C.RESET): _T(_S.C_UNREADY, (_E.TELL_BACK_END_CLOSED,)),
    # The port is taken away: its chains go back first (R-CON-49).
    (_S.B_UNREADY, _C.UNPLUG): _T(_S.B_UNREADY, (_E.RETURN_CHAINS,)),
    (_S.C_UNREADY, _C.UNPLUG): _T(_S.C_UNREADY, (_E.RETURN_CHAINS,)),
    (_S.B, _C.UNPLUG): _T(_S.B_UNREADY, (_E.RETURN_CHAINS,)),
    (_S.C, _C.UNPLUG): _T(_S.C_UNREADY, (_E.RETURN_CHAINS,)),
    (_S.D, _C.UNPLUG): _T(_S.B_UNREADY, (_E.RETURN_CHAINS, _E.TELL_BACK_END_CLOSED)),
    (_S.A, _C.UNPLUG): _T(_S.C_UNREADY, (_E.RETURN_CHAINS, _E.TELL_BACK_END_CLOSED)),
    # The machine stops and goes on. Words for the guest have waited; bytes may move again.
    (_S.B_UNREADY, _C.PAUSE): _T(_S.B_UNREADY),
    (_S.C_UNREADY, _C.PAUSE): _T(_S.C_UNREADY),
    (_S.B, _C.PAUSE): _T(_S.B),
    (_S.C, _C.PAUSE): _T(_S.C),
    (_S.D, _C.PAUSE): _T(_S.D),
    (_S.A, _C.PAUSE): _T(_S.A),
    (_S.B_UNREADY, _C.RESUME): _T(_S.B_UNREADY, (_E.FLOW,)),
    (_S.C_UNREADY, _C.RESUME): _T(_S.C_UNREADY, (_E.FLOW,)),
    (_S.B, _C.RESUME): _T(_S.B, (_E.FLOW,)),
    (_S.C, _C.RESUME): _T(_S.C, (_E.FLOW,)),
    (_S.D, _C.RESUME): _T(_S.D, (_E.FLOW,)),
    (_S.A, _C.RESUME): _T(_S.A, (_E.FLOW,)),
    # Writing the state down changes nothing: who saved may go on.
    (_S.B_UNREADY, _C.SAVE): _T(_S.B_UNREADY),
    (_S.C_UNREADY, _C.SAVE): _T(_S.C_UNREADY),
    (_S.B, _C.SAVE): _T(_S.B),
    (_S.C, _C.SAVE): _T(_S.C),
    (_S.D, _C.SAVE): _T(_S.D),
    (_S.A, _C.SAVE): _T(_S.A),
    # A restore is a reset seen from the back end: it hears a close, and then an open if the guest holds the port open.
    (_S.B_UNREADY, _C.RESTORE): _T(_S.B_UNREADY, (_E.LOAD_BACK_END, _E.TELL_BACK_END_CLOSED)),
    (_S.C_UNREADY, _C.RESTORE): _T(_S.C_UNREADY, (_E.LOAD_BACK_END, _E.TELL_BACK_END_CLOSED)),
    (_S.B, _C.RESTORE): _T(_S.B, (_E.LOAD_BACK_END, _E.TELL_BACK_END_CLOSED)),
    (_S.C, _C.RESTORE): _T(_S.C, (_E.LOAD_BACK_END, _E.TELL_BACK_END_CLOSED)),
    (_S.D, _C.RESTORE): _T(_S.D, (_E.LOAD_BACK_END, _E.TELL_BACK_END_CLOSED, _E.TELL_BACK_END_OPEN)),
    (_S.A, _C.RESTORE): _T(_S.A, (_E.LOAD_BACK_END, _E.TELL_BACK_END_CLOSED, _E.TELL_BACK_END_OPEN)),
    # A handover is no reset: the session goes on, and the new back end is told how it stands.
    (_S.B_UNREADY, _C.HANDOVER): _T(_S.B_UNREADY, (_E.LOAD_BACK_END, _E.TELL_BACK_END_CLOSED)),
    (_S.C_UNREADY, _C.HANDOVER): _T(_S.C_UNREADY, (_E.LOAD_BACK_END, _E.TELL_BACK_END_CLOSED)),
    (_S.B, _C.HANDOVER): _T(_S.B, (_E.LOAD_BACK_END, _E.TELL_BACK_END_CLOSED)),
    (_S.C, _C.HANDOVER): _T(_S.C, (_E.LOAD_BACK_END, _E.TELL_BACK_END_CLOSED)),
    (_S.D, _C.HANDOVER): _T(_S.D, (_E.LOAD_BACK_END, _E.TELL_BACK_END_OPEN)),
    (_S.A, _C.HANDOVER): _T(_S.A, (_E.LOAD_BACK_END, _E.TELL_BACK_END_OPEN)),
}
