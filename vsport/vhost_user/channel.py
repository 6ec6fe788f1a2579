"""The back-end channel: the socket on which we ask, and the front end answers (R-VU-25, R-VU-95)."""

from __future__ import annotations

from typing import Any

from vsport.document import Fields
from vsport.errors import FrontEndError
from vsport.loop import READ, Loop, Timer
from vsport.parcel import Delivery, Parcel
from vsport.vhost_user.message import HEADER_SIZE, decode_reply
from vsport.vhost_user.session import Session
from vsport.vhost_user.transport import BrokenConnection, Stream, send_some

__all__ = ["REPLY_SECONDS", "Channel", "cancel"]

REPLY_SECONDS = 5.0
"""How long a front end may leave our reply unread, or our request unanswered."""


def cancel(timer: Timer | None) -> None:
    """Forgets a timer, if there is one."""
    if timer is not None:
        timer.cancel()


class Channel:
    """The back-end channel: our requests go out, their answers come in whenever they come (R-VU-97)."""

    def __init__(self, stream: Stream, loop: Loop, session: Session) -> None:
        self._stream = stream
        self._loop = loop
        self._session = session
        self._timer: Timer | None = None

    def watch(self) -> None:
        self._loop.watch(self._stream.sock.fileno(), READ, self._readable)

    def send(self, data: bytes, need_reply: bool) -> None:
        """Sends a request. If there is no room for it, the front end has requests of ours to read as it is."""
        try:
            sent = send_some(self._stream.sock, data)
        except BrokenConnection as exc:
            self._lost(str(exc))
            return
        if 0 < sent < len(data):
            self._lost("half a request fitted in")
        elif need_reply:
            self._expect_answer()

    def _expect_answer(self) -> None:
        self._timer = self._loop.call_later(REPLY_SECONDS, self._unanswered)

    def _unanswered(self) -> None:
        self._session.device.log.warning(
            "the front end has not answered on the back-end channel for %g s", REPLY_SECONDS
        )
        self._timer = None
        self._session.channel_free()

    def _readable(self, _ready: int) -> None:
        try:
            if self._stream.receive(HEADER_SIZE + 8):
                self._answered()
        except BrokenConnection as exc:
            self._lost(str(exc))
        except FrontEndError as exc:
            self._session.device.log.warning("the front end broke a rule on the back-end channel: %s", str(exc))
            self._lost("refused")

    def _answered(self) -> None:
        self._stream.drop_fds()
        request, result = decode_reply(self._stream.take_data())
        if result:
            self._session.device.log.warning("the front end refused request %d of ours: %d", request, result)
        if self._timer is not None:  # else it is an answer that came too late, or to no question
            self._timer.cancel()
            self._timer = None
            self._session.channel_free()

    def _lost(self, why: str) -> None:
        self._session.device.log.info("back-end channel closed: %s", why)
        self._session.channel_lost()
        self.close()

    def close(self) -> None:
        """Safe to call twice."""
        cancel(self._timer)
        self._timer = None
        if self.open:
            self._loop.unwatch(self._stream.sock.fileno())
            self._stream.close()

    # -- handover ----------------------------------------------------------------------------------------------------

    @property
    def open(self) -> bool:
        """Whether the other end has not gone yet, as far as is known."""
        return self._stream.sock.fileno() >= 0

    @property
    def reads(self) -> int:
        """How often something has come in."""
        return self._stream.reads

    def suspend(self) -> None:
        """An answer that comes now waits in the socket."""
        cancel(self._timer)
        self._timer = None
        if self.open:
            self._loop.unwatch(self._stream.sock.fileno())

    def resume(self) -> None:
        if self.open:
            self.watch()
            if self._session.channel_busy:
                self._expect_answer()

    def give(self, parcel: Parcel) -> dict[str, Any]:
        return self._stream.give(parcel)

    @classmethod
    def take(cls, fields: Fields, delivery: Delivery, loop: Loop, session: Session) -> Channel:
        """Raises DocumentError, and keeps nothing."""
        return cls(Stream.take(fields, delivery), loop, session)
