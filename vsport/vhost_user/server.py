"""The transport of vhost-user: the listening socket, one front end's connection, and every descriptor that it sends.

Nothing here waits: sockets are non-blocking, and the loop says when to go on.
"""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Callable, Hashable
from typing import Any

from vsport.addresses import UnixAddress
from vsport.addresses import stream_socket as taken_socket
from vsport.device import SerialDevice
from vsport.document import DocumentError, Fields
from vsport.errors import FrontEndError, GuestError, HostError, UsageError
from vsport.loop import RDHUP, READ, WRITE, Loop, Timer
from vsport.parcel import Delivery, Parcel
from vsport.vhost_user.channel import REPLY_SECONDS, Channel, cancel
from vsport.vhost_user.edge import Mapping
from vsport.vhost_user.message import HEADER_SIZE, Header, encode_u64
from vsport.vhost_user.session import Reply, Session
from vsport.vhost_user.state_file import StateReader, StateWriter
from vsport.vhost_user.transport import (
    BrokenConnection,
    Stream,
    make_shared,
    map_shared,
    send_some,
    unix_stream,
)

__all__ = ["LOG_SECONDS", "POLL_SECONDS", "Server"]

POLL_SECONDS = 0.001
"""How often a ring without kick descriptor is looked at (R-VU-21)."""
LOG_SECONDS = 0.01
"""How often a front end that wants to hear of it is told that its dirty log has changed (R-VU-17)."""
_ACCEPT_AGAIN_SECONDS = 1.0
_SIGNAL = encode_u64(1)


class Server:
    """Offers ``device`` to front ends, one at a time: others wait in the backlog until it has gone (R-VU-75).

    Takes over the device's hooks ``on_fault`` and ``on_config_change``.
    """

    def __init__(self, device: SerialDevice, loop: Loop) -> None:
        self.device = device
        self.loop = loop
        self.on_connected: Callable[[], None] = lambda: None
        """A front end has come."""
        self.on_disconnected: Callable[[], None] = lambda: None
        """The front end has gone, and everything that came from it."""
        self._listener: socket.socket | None = None
        self._address: UnixAddress | None = None
        self._connection: Connection | None = None
        self._connections = 0
        self._suspended = False
        device.on_fault = self._on_fault
        device.on_config_change = self._on_config_change

    @property
    def connected(self) -> bool:
        """Whether a front end is there."""
        return self._connection is not None

    @property
    def listening(self) -> bool:
        """Whether another front end can come after this one."""
        return self._listener is not None

    # -- sockets -----------------------------------------------------------------------------------------------------

    def listen(self, path: str) -> None:
        """Listens on a Unix socket at ``path``, in place of one that a dead process left behind. Raises HostError."""
        self._address = UnixAddress(path)
        (listener,) = self._address.listen()
        self._listen_on(listener)

    def adopt(self, fd: int) -> None:
        """Takes over an inherited Unix stream socket, listening or connected (R-VU-103). Raises HostError."""
        inherited = unix_stream(fd)
        if inherited is None:
            raise HostError(f"descriptor {fd} is not a Unix stream socket")
        os.set_inheritable(fd, False)
        if inherited.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            self._listen_on(inherited)
        else:
            self._connect(inherited)

    def _listen_on(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._accept_when_free()

    def _accept_when_free(self) -> None:
        if self._listener is not None and self._connection is None and not self._suspended:
            self.loop.watch(self._listener.fileno(), READ, self._accept)

    def _accept(self, _ready: int) -> None:
        assert self._listener is not None
        self.loop.unwatch(self._listener.fileno())
        try:
            accepted, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            self._accept_when_free()
        except OSError as exc:  # no descriptors or no memory: the peer stays in the backlog
            self.device.log.error("cannot accept a front end: %s", exc.strerror)
            self.loop.call_later(_ACCEPT_AGAIN_SECONDS, self._accept_when_free)
        else:
            self._connect(accepted)

    def _connect(self, sock: socket.socket) -> None:
        self._connections += 1
        self._connection = Connection(Stream(sock), self.device, self.loop, self._disconnected)
        self._connection.watch()
        self.device.log.info("front end connected")
        self.on_connected()

    def _disconnected(self) -> None:
        self._connection = None
        self._accept_when_free()
        self.on_disconnected()

    def close(self) -> None:
        """Ends the connection, stops listening, and removes the socket file if it is still ours."""
        if self._listener is not None:
            self.loop.unwatch(self._listener.fileno())
            self._listener.close()
            self._listener = None
        if self._connection is not None:
            self._connection.close("closing")
        if self._address is not None:
            self._address.forget()
            self._address = None

    # -- handover ----------------------------------------------------------------------------------------------------

    def suspend(self) -> None:
        """Nothing moves any more, and nobody is told: neither the guest, nor the front end, nor one that knocks."""
        self._suspended = True
        if self._listener is not None:
            self.loop.unwatch(self._listener.fileno())
        if self._connection is not None:
            self._connection.suspend()

    def resume(self) -> None:
        """Goes on, here or in the process that took over, where suspend() stopped. Safe to call twice."""
        if not self._suspended:
            return
        self._suspended = False
        if self._connection is not None:
            self._connection.resume()
        self._accept_when_free()

    @property
    def edition(self) -> Hashable:
        """As long as this is the same, nothing of what give() said is out of date but what give_rest() says."""
        return self._connections, self._connection.edition if self._connection is not None else None

    def give(self, parcel: Parcel) -> dict[str, Any]:
        """Everything as a document, its descriptors in ``parcel``; running or suspended, and it changes nothing.

        The device's own state is not in it: that is its snapshot. Raises HostError while the front end moves that
        state itself: then it has to be tried again.
        """
        listeners = [self._listener] if self._listener is not None else []
        if self._address is None:
            inherited = [{"socket": parcel.add(sock.fileno())} for sock in listeners]
            return {"path": "", "inherited": inherited, "front_end": self._give_connection(parcel)}
        address = self._address.give(listeners, parcel)
        return {"path": self._address.path, "address": address, "front_end": self._give_connection(parcel)}

    def _give_connection(self, parcel: Parcel) -> list[dict[str, Any]]:
        return [self._connection.give(parcel)] if self._connection is not None else []

    def give_rest(self) -> dict[str, Any]:
        """What changes while nobody says anything: where the rings stand. Suspended before."""
        return {"rings": [self._connection.session.give_rest()] if self._connection is not None else []}

    def take_rest(self, state: Fields) -> None:
        """After take(): with what give_rest() said, it is the giver's. Raises DocumentError, FrontEndError."""
        for rings in state.each("rings", 1, Fields):
            if self._connection is None:
                raise DocumentError(f"{rings.where}: there is no front end whose rings these could be")
            self._connection.session.take_rest(rings)

    def take(self, state: Fields, delivery: Delivery) -> None:
        """In place of listen() or adopt(): becomes what give() of another process described, and is suspended.

        The device is left alone: its state is restored apart from this, before resume(). on_connected is not called.
        Raises DocumentError, FrontEndError, HostError, and then has no descriptor, mapping or socket file of it.
        """
        self._suspended = True
        try:
            self._take_listener(state, delivery)
            for front_end in state.each("front_end", 1, Fields):
                self._connection = Connection.take(front_end, delivery, self.device, self.loop, self._disconnected)
            state.end()
        except BaseException:
            self.release()
            raise

    def _take_listener(self, state: Fields, delivery: Delivery) -> None:
        path = state.text("path")
        if path:
            self._listener = self._take_address(path, state.object("address"), delivery)
            return
        for inherited in state.each("inherited", 1, Fields):
            fd = delivery.take(inherited, "socket")
            self._listener = taken_socket(inherited.where, fd, {socket.AF_UNIX}, listening=True)
            inherited.end()

    def _take_address(self, path: str, address: Fields, delivery: Delivery) -> socket.socket | None:
        try:
            self._address = UnixAddress(path)
        except UsageError as exc:
            raise DocumentError(f"{address.where}: {exc}") from None
        listeners = self._address.take(address, delivery)
        for sock in listeners[1:]:  # a Unix socket has one
            sock.close()
        return listeners[0] if listeners else None

    def release(self) -> None:
        """It is another process's now: gives up the own copies, and nobody notices. The socket file stays."""
        if self._listener is not None:
            self._listener.close()
        if self._connection is not None:
            self._connection.release()
        self._listener = self._connection = self._address = None
        self._suspended = False

    # -- hooks of the device -----------------------------------------------------------------------------------------

    def _on_fault(self, index: int, error: GuestError | FrontEndError) -> None:
        """A guest that broke a rule loses one queue; a front end that took guest memory away has ended its session."""
        if self._connection is None:
            return
        self._connection.session.queue_failed(index)
        if isinstance(error, FrontEndError):  # R-RING-82; not at once, as the session may be what is running
            self.loop.call_soon(functools.partial(self._give_up, self._connection, str(error)))

    def _give_up(self, connection: Connection, why: str) -> None:
        if self._connection is connection:
            self.device.log.warning("connection ended, the front end broke a rule: %s", why)
            connection.close("refused")

    def _on_config_change(self) -> None:
        if self._connection is not None:
            self._connection.session.config_changed()


class Connection:
    """One front end: its socket, its session, and the descriptors that it sent. The session's Edge."""

    def __init__(self, stream: Stream, device: SerialDevice, loop: Loop, on_closed: Callable[[], None]) -> None:
        self.loop = loop
        self.session = Session(device, self)
        self._stream = stream
        self._on_closed = on_closed
        self._header: Header | None = None
        self._unsent = Reply(b"")
        self._patience: Timer | None = None
        self._channel: Channel | None = None
        self._transfer: StateReader | StateWriter | None = None
        self._replies = 0
        self._on_kick = self._kicked  # one for all queues, of which a device may have many
        self._polled: set[int] = set()
        self._poll_timer: Timer | None = None
        self._log_timer: Timer | None = None

    # -- messages ----------------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Waits for what has to come next. Who leaves a reply unread, or waits for one, gets no further."""
        sock = self._stream.sock
        if self._unsent.data:
            self.loop.watch(sock.fileno(), WRITE, self._writable)
        elif self.session.owes_reply:
            self.loop.watch(sock.fileno(), RDHUP, self._left)
        else:
            self.loop.watch(sock.fileno(), READ, self._readable)

    def _readable(self, _ready: int) -> None:
        """Goes on with the message that is being received; at most one in a turn, so that others get theirs."""
        try:
            if self._header is None and self._stream.receive(HEADER_SIZE):
                self._header = Header.decode(self._stream.take_data())
            if self._header is not None and self._stream.receive(self._header.size):
                self._handle(self._header)
        except BrokenConnection as exc:
            self.close(str(exc))
        except FrontEndError as exc:
            self.session.device.log.warning("connection ended, the front end broke a rule: %s", str(exc))
            self.close("refused")

    def _handle(self, header: Header) -> None:
        self._header = None
        payload, fds = self._stream.take_data(), self._stream.take_fds()
        self.session.device.log.debug("%s, %d bytes, %d descriptors", header.name, len(payload), len(fds))
        reply = self.session.handle(header, payload, fds)
        if reply is not None:
            self._send(reply)
        elif self.session.owes_reply:
            self.watch()

    def _left(self, _ready: int) -> None:
        self.close("it did not wait for its reply")

    def _send(self, reply: Reply) -> None:
        """Raises BrokenConnection."""
        self._unsent = reply
        self._go_on_sending()
        if self._unsent.data:
            self._be_patient()
            self.watch()

    def _go_on_sending(self) -> None:
        self._replies += 1
        data, fd = self._unsent
        sent = send_some(self._stream.sock, data, [fd] if fd >= 0 else [])
        if sent and fd >= 0:
            os.close(fd)
            fd = -1
        self._unsent = Reply(data[sent:], fd)

    def _be_patient(self) -> None:
        self._patience = self.loop.call_later(REPLY_SECONDS, lambda: self.close("does not read its replies"))

    def _writable(self, _ready: int) -> None:
        try:
            self._go_on_sending()
        except BrokenConnection as exc:
            self.close(str(exc))
            return
        if not self._unsent.data:
            cancel(self._patience)
            self.watch()

    def close(self, why: str) -> None:
        """Ends the connection and gives everything back that came through it."""
        self.session.device.log.info("front end disconnected: %s", why)
        self._unwatch()
        self.session.close()
        self._drop()
        self._on_closed()

    def _unwatch(self) -> None:
        self.loop.unwatch(self._stream.sock.fileno())
        for timer in (self._patience, self._poll_timer, self._log_timer):
            cancel(timer)
        self._poll_timer = self._log_timer = None

    def _drop(self) -> None:
        self._drop_channel()
        if self._transfer is not None:
            self._transfer.close()
        if self._unsent.fd >= 0:
            os.close(self._unsent.fd)
        self._unsent = Reply(b"")
        self._stream.close()

    # -- handover ----------------------------------------------------------------------------------------------------

    def suspend(self) -> None:
        """Stops the rings, and listens to nobody. Kicks say nothing new: resume() looks at each ring by itself."""
        self.session.suspend()
        self._unwatch()
        if self._channel is not None:
            self._channel.suspend()

    def resume(self) -> None:
        """What was said meanwhile is in the rings and in the socket."""
        self.watch()
        if self._unsent.data:
            self._be_patient()
        if self._channel is not None:
            self._channel.resume()
        self.session.resume()

    @property
    def edition(self) -> Hashable:
        """As in Server."""
        channel = self._channel.reads if self._channel is not None and self._channel.open else -1
        return self._stream.reads, self._replies, channel, self.session.edition

    def give(self, parcel: Parcel) -> dict[str, Any]:
        """The connection as a document; raises HostError if the session cannot be given now."""
        session = self.session.give(parcel)
        channels = [self._channel] if self._channel is not None and self._channel.open else []
        return {
            "session": session,
            "stream": self._stream.give(parcel),
            "header": self._header.encode().hex() if self._header is not None else "",
            "unsent": self._unsent.data.hex(),
            "unsent_fd": parcel.add(self._unsent.fd),
            "channel": [channel.give(parcel) for channel in channels],
        }

    @classmethod
    def take(
        cls, fields: Fields, delivery: Delivery, device: SerialDevice, loop: Loop, on_closed: Callable[[], None]
    ) -> Connection:
        """The suspended connection that give() described. Raises DocumentError, FrontEndError, and keeps nothing."""
        connection = cls(Stream.take(fields.object("stream"), delivery), device, loop, on_closed)
        try:
            connection._take(fields, delivery)
        except BaseException:
            connection.release()
            raise
        return connection

    def _take(self, fields: Fields, delivery: Delivery) -> None:
        self._unsent = Reply(b"", delivery.take(fields, "unsent_fd"))
        self._unsent = self._unsent._replace(data=fields.bytes("unsent"))
        if self._unsent.fd >= 0 and not self._unsent.data:
            raise DocumentError(f"{fields.where}: a descriptor without the reply that it belongs to")
        header = fields.bytes("header")
        self._header = Header.decode(header) if header else None
        for channel in fields.each("channel", 1, Fields):
            self._channel = Channel.take(channel, delivery, self.loop, self.session)
        self.session.take(fields.object("session"), delivery, has_channel=self._channel is not None)
        fields.end()

    def release(self) -> None:
        """Gives up the own copies of everything, and neither the front end nor the device notices."""
        self._unwatch()
        self.session.release()
        self._drop()

    # -- Edge: memory and descriptors ----------------------------------------------------------------------------------

    def map_shared(self, fd: int, offset: int, size: int) -> Mapping:
        return map_shared(fd, offset, size)

    def make_shared(self, size: int) -> int:
        try:
            return make_shared("vsport-inflight", size)
        except OSError as exc:
            raise FrontEndError("R-VU-28", f"no memory for it: {exc.strerror}", size=size) from exc

    def close_fd(self, fd: int) -> None:
        os.close(fd)

    def make_nonblocking(self, fd: int) -> None:
        try:
            os.set_blocking(fd, False)
        except OSError as exc:
            raise FrontEndError("R-VU-21", f"unusable descriptor: {exc.strerror}") from exc

    def signal(self, fd: int) -> None:
        try:
            os.write(fd, _SIGNAL)
        except OSError as exc:  # full: there is a signal in it already; gone: nobody listens
            self.session.device.log.debug("signal to descriptor %d: %s", fd, exc)

    # -- Edge: kicks ---------------------------------------------------------------------------------------------------

    def watch_kick(self, index: int, fd: int) -> None:
        self.make_nonblocking(fd)
        try:
            self.loop.watch_kick(fd, self.session.device.queues[index], self._on_kick)
        except OSError as exc:
            raise FrontEndError("R-VU-21", f"cannot wait for kicks on this descriptor: {exc.strerror}") from exc

    def unwatch_kick(self, fd: int) -> None:
        self.loop.unwatch(fd)

    def _kicked(self, index: int, fd: int, ready: int) -> None:
        try:
            alive = bool(os.read(fd, len(_SIGNAL)))
        except BlockingIOError:  # somebody else has read it, or it is only an error that is ready
            alive = bool(ready & READ)
        except OSError:
            alive = False
        if alive:
            self.session.kicked(index)
        else:
            self.session.device.log.warning(
                "queue %d: its kick descriptor is broken, so its kicks are not heard any more", index
            )
            self.loop.unwatch(fd)

    def poll_ring(self, index: int, on: bool) -> None:
        if on:
            self._polled.add(index)
            if self._poll_timer is None:
                self._poll_timer = self.loop.call_later(POLL_SECONDS, self._poll)
        else:
            self._polled.discard(index)

    def _poll(self) -> None:
        self._poll_timer = None
        for index in sorted(self._polled):
            self.session.kicked(index)
        if self._polled:
            self._poll_timer = self.loop.call_later(POLL_SECONDS, self._poll)

    def poll_log(self, on: bool) -> None:
        if not on:
            cancel(self._log_timer)
            self._log_timer = None
        elif self._log_timer is None:
            self._log_timer = self.loop.call_later(LOG_SECONDS, self._log_is_due)

    def _log_is_due(self) -> None:
        self._log_timer = self.loop.call_later(LOG_SECONDS, self._log_is_due)
        self.session.log_due()

    # -- Edge: the device's state --------------------------------------------------------------------------------------

    def write_state(self, fd: int, data: bytes, done: Callable[[str], None]) -> None:
        self._transfer = StateWriter(self.loop, fd, data, done)

    def read_state(self, fd: int, limit: int, done: Callable[[bytes, str], None]) -> None:
        self._transfer = StateReader(self.loop, fd, limit, done)

    def send_reply(self, data: bytes) -> None:
        try:
            self._send(Reply(data))
        except BrokenConnection as exc:
            self.close(str(exc))
        else:
            self.watch()

    # -- Edge: back-end channel ----------------------------------------------------------------------------------------

    def open_channel(self, fd: int) -> None:
        sock = unix_stream(fd)
        if sock is None:
            raise FrontEndError("R-VU-25", "the back-end channel is not a Unix stream socket")
        self._drop_channel()
        self._channel = Channel(Stream(sock), self.loop, self.session)
        self._channel.watch()

    def send_request(self, data: bytes, *, need_reply: bool) -> None:
        if self._channel is not None:
            self._channel.send(data, need_reply)

    def _drop_channel(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
