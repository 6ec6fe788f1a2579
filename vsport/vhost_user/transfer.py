"""A device's state on its way to or from a front end that moves the machine (R-VU-37, R-VU-38, R-VU-91, R-VU-92)."""

from __future__ import annotations

from typing import Any, Protocol

from vsport.device import SerialDevice
from vsport.document import DocumentError, Fields
from vsport.errors import FrontEndError, HostError
from vsport.snapshot import SIZE_MAX, Snapshot
from vsport.vhost_user.edge import Edge
from vsport.vhost_user.message import DeviceState, Direction

__all__ = ["Owner", "StateTransfer"]

_PHASE_STOPPED = 0
_NOTHING = "no state was asked for or sent"


class Owner(Protocol):
    """Who owns the rings, and the connection."""

    @property
    def suspended(self) -> bool:
        """Whether no ring runs."""

    def state_loaded(self) -> None:
        """The device has another state now."""

    def transfer_over(self) -> None:
        """The transfer is over, well or not."""


class StateTransfer:
    """One transfer at a time (R-VU-37, R-VU-38, R-VU-91). The edge moves the bytes, and says when it is done."""

    def __init__(self, device: SerialDevice, edge: Edge, owner: Owner) -> None:
        self.busy = False
        """Whether bytes are still on their way."""
        self._device = device
        self._edge = edge
        self._owner = owner
        self._failure = _NOTHING

    def begin(self, asked: DeviceState, fds: list[int]) -> None:
        """Takes the descriptor over; raises FrontEndError if that cannot be."""
        if asked.direction not in set(Direction) or asked.phase != _PHASE_STOPPED:
            raise FrontEndError("R-VU-37", "unknown direction or phase", direction=asked.direction, phase=asked.phase)
        if self.busy:
            raise FrontEndError("R-VU-37", "another transfer is under way")
        if not self._owner.suspended:
            raise FrontEndError("R-VU-91", "a device whose rings run has no state to be moved: stop them first")
        self.busy = True
        if asked.direction == Direction.SAVE:
            self._edge.write_state(fds.pop(), self._device.snapshot().encode(), self._written)
        else:
            self._edge.read_state(fds.pop(), SIZE_MAX, self._read)

    @property
    def failed(self) -> bool:
        """The answer to CHECK_DEVICE_STATE, once it is not busy."""
        return bool(self._failure)

    def _written(self, failure: str) -> None:
        self._done(failure and f"the front end did not take the state: {failure}")

    def _read(self, data: bytes, failure: str) -> None:
        self._done(f"the front end did not send a state: {failure}" if failure else self._load(data))

    def _load(self, data: bytes) -> str:
        """Why the state cannot be used; the device is as before then (R-VU-92)."""
        if not self._owner.suspended:
            return "rings were started before the state was there"
        try:
            self._device.restore(Snapshot.decode(data))
        except DocumentError as exc:
            return str(exc)
        self._owner.state_loaded()
        return ""

    def _done(self, failure: str) -> None:
        if failure:
            self._device.log.warning("state transfer failed: %s", failure)
        self._failure, self.busy = failure, False
        self._owner.transfer_over()

    # -- handover ------------------------------------------------------------------------------------------------------

    def give(self) -> dict[str, Any]:
        """How the last transfer went; raises HostError while one is under way."""
        if self.busy:
            raise HostError("the front end is moving the device's state just now: try again when that is done")
        return {"failure": self._failure}

    def take(self, fields: Fields) -> None:
        """Raises DocumentError."""
        self._failure = fields.text("failure")
        fields.end()
