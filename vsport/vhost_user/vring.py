"""What the front end has said about one queue, and how that goes to another process."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vsport.constants import QUEUE_SIZE_MAX
from vsport.document import DocumentError, Fields
from vsport.parcel import Delivery, Parcel
from vsport.vhost_user.message import VringAddress

__all__ = ["Vring"]

_U64 = 2**64 - 1


@dataclass(slots=True)
class Vring:
    """A queue as the front end has it. The descriptors are the session's, which closes them."""

    size: int = 0
    address: VringAddress | None = None
    base: int = 0
    """Where the next chain is, as in DeviceQueue.next_avail: set by the front end, or where the ring was stopped."""
    rewound: bool = False
    """Whether the front end has set ``base`` back to the beginning on a ring that had got further."""
    kick_fd: int = -1
    call_fd: int = -1
    err_fd: int = -1
    polled: bool = False
    """Whether there is no kick descriptor on purpose (R-VU-21)."""
    started: bool = False
    enabled: bool = False
    live: bool = False
    """Whether the ring is in use: the device's queue has been started. It runs, unless somebody broke a rule."""

    @property
    def configured(self) -> bool:
        return self.size > 0 and self.address is not None

    @property
    def wanted(self) -> bool:
        """Whether the ring has to be live. A disabled ring is left alone: what is in it waits (R-VU-51, R-VU-52)."""
        return self.started and self.enabled and self.configured

    @property
    def places(self) -> tuple[int, int, int] | None:
        """Where its parts are; the rest of an address does not move a ring."""
        return places(self.address) if self.address is not None else None

    # -- handover ------------------------------------------------------------------------------------------------------

    def give(self, parcel: Parcel) -> dict[str, Any]:
        """The ring as a document, its descriptors in ``parcel``."""
        return {
            "size": self.size,
            "address": [asdict(self.address)] if self.address is not None else [],
            "base": self.base,
            "rewound": self.rewound,
            "kick": parcel.add(self.kick_fd),
            "call": parcel.add(self.call_fd),
            "err": parcel.add(self.err_fd),
            "polled": self.polled,
            "started": self.started,
            "enabled": self.enabled,
            "live": self.live,
        }

    def take(self, index: int, fields: Fields, delivery: Delivery, *, packed: bool) -> None:
        """Becomes what give() described. Raises DocumentError; what was taken until then is in place."""
        self.kick_fd = delivery.take(fields, "kick")
        self.call_fd = delivery.take(fields, "call")
        self.err_fd = delivery.take(fields, "err")
        self.size = fields.integer("size", 0, QUEUE_SIZE_MAX)
        for address in fields.each("address", 1, Fields):
            self.address = _read_address(index, address)
        self.base = fields.integer("base", 0, 0xFFFF)
        self.rewound = fields.boolean("rewound")
        self.polled = fields.boolean("polled")
        self.started = fields.boolean("started")
        self.enabled = fields.boolean("enabled")
        self.live = fields.boolean("live")
        if (self.size & (self.size - 1) and not packed) or (self.live and not self.wanted):
            raise DocumentError(f"{fields.where}: a ring that cannot be as it is described")


def places(address: VringAddress) -> tuple[int, int, int]:
    """The front-end addresses of a ring's parts."""
    return address.desc, address.avail, address.used


def _read_address(index: int, fields: Fields) -> VringAddress:
    address = VringAddress(
        index=fields.integer("index", index, index),
        flags=fields.integer("flags", 0, 2**32 - 1),
        **{name: fields.integer(name, 0, _U64) for name in ("desc", "used", "avail", "log")},
    )
    fields.end()
    return address
