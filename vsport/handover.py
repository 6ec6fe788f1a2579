"""A live device goes to another process: `vsport serve --handover PATH` offers it, `--takeover PATH` takes it.

    the taker                                 the giver
    hello, its version          -->           (its device runs: whoever dawdles here, or lies, costs nothing)
                                <--           the configuration
    prepared                    -->
                                <--           a draft: the device as it is just now, and all descriptors
    arranged                    -->           another draft, if the first is out of date
                                              suspends the device; its loop does not run any more
                                <--           the state: what changes while the device runs
    ready                       -->           (waits until the taker hangs up)
    goes on with the device                   releases what it has, and ends

Instead of any of these, either side may say ``refused``, and why.

The device stands still between ``arranged`` and ``ready``, so only what cannot be done before is done there. The taker
makes everything that it needs from a draft: sockets, mapped memory, rings at their places. A draft is out of date when
the giver's ``edition`` is another one: a front end has said something, a host has come or gone. It converges as a live
migration does: after a few drafts the device is suspended anyway, and the last one is part of the state.

Who has the device is decided by one act: ``ready`` gets into the socket, or it does not. A giver that has lost patience
shuts the socket first and then looks once more what is in there. So there is no moment, and no order of crashes, in
which both think that they have the device; and until ``ready`` the taker has touched nothing that the guest or a host
could notice, so that the giver goes on as if nothing had been.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import logging
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

from vsport.addresses import UnixAddress
from vsport.document import DocumentError, Fields
from vsport.errors import HostError, VsportError
from vsport.host import Host
from vsport.limits import raise_descriptor_limit
from vsport.loop import READ, WRITE, Loop, Timer
from vsport.parcel import Delivery, Parcel
from vsport.snapshot import Snapshot
from vsport.vhost_user.server import Server

__all__ = ["DRAFTS", "STEP_SECONDS", "VERSION", "Cargo", "Offer", "Takeover"]

log = logging.getLogger("vsport.handover")

VERSION = 2
"""Of what is said here and of every state within it: a taker with another one is refused."""
STEP_SECONDS = 5.0
"""How long one side waits for the next word of the other."""
_TURN_SECONDS = 15.0
"""How long a taker waits for its turn: others may have come before it."""
_LINGER_SECONDS = 0.1
"""How long a giver keeps what is not its own any more: with other devices it has something else to do."""
_ACCEPT_AGAIN_SECONDS = 1.0

_HEADER = struct.Struct("<4sIII")
_MAGIC = b"vsHO"
_CREDENTIALS = struct.Struct("3i")
_FDS_AT_ONCE = 253
"""The kernel's limit for one message (SCM_MAX_FD)."""
DRAFTS = 3
"""How many drafts there are at most before the device is suspended: one that changes faster never ends."""
_TEXTS_MAX = 1000
_WHY_MAX = 500


class Cargo(NamedTuple):
    """What is handed over: a device with its chardevs, its front end, and the options that it was made from."""

    host: Host
    server: Server
    chardevs: Sequence[str]
    """The texts of --chardev."""
    devices: Sequence[str]
    """The texts of --device."""

    @property
    def edition(self) -> Hashable:
        """As long as this is the same, nothing of what give() said is out of date but what give_rest() says."""
        return self.host.edition, self.server.edition

    def give(self, parcel: Parcel) -> dict[str, Any]:
        """The device as a document, running or not; its preview() is apart. Raises HostError if now is no time."""
        return {"chardevs": self.host.give(parcel), "server": self.server.give(parcel)}

    def take(self, draft: Fields, delivery: Delivery) -> None:
        """Makes all that ``draft`` describes, suspended. Raises VsportError, OSError; then release()."""
        self.host.take(draft.object("chardevs"), delivery)
        self.server.take(draft.object("server"), delivery)

    def suspend(self) -> None:
        """The device stands still until resume(), or for ever, and nobody is told."""
        self.server.suspend()

    def give_rest(self) -> dict[str, Any]:
        """What changes while a device runs, of one that is suspended; its snapshot() is apart."""
        return self.server.give_rest()

    def take_rest(self, state: Fields, snapshot: Snapshot) -> None:
        """After take(): becomes the device that gave this. Raises VsportError; then release()."""
        self.host.device.restore(snapshot, carried=self.host.with_peers())
        self.server.take_rest(state)

    def resume(self) -> None:
        """The device goes on, here."""
        self.server.resume()
        self.host.announce()

    def release(self) -> None:
        """The device goes on elsewhere."""
        self.server.release()
        self.host.release()


# -- messages --------------------------------------------------------------------------------------------------------


class _Sizes(NamedTuple):
    """What a message consists of, behind its header: bytes of JSON, bytes as they are, descriptors."""

    document: int
    attachment: int
    fds: int


_SHORT = _Sizes(1 << 16, 0, 0)
_CONFIGURATION = _Sizes(1 << 24, 0, 0)
_DEVICE = _Sizes(1 << 24, 1 << 27, 4096)


class _Message(NamedTuple):
    """One word of the dialogue; ``fields`` are to be read to their end."""

    word: str
    fields: Fields
    attachment: bytes

    def expect(self, word: str) -> Fields:
        """The fields of ``word``. Raises DocumentError if it is another one, HostError if it is a refusal."""
        if self.word == "refused":
            why = "".join(c if c.isprintable() else " " for c in self.fields.text("why")[:_WHY_MAX])
            raise HostError(why or "no reason was given")
        if self.word != word:
            raise DocumentError(f"{word!r} belongs here, and not {self.word[:20]!r}")
        return self.fields


def _encode(word: str, attachment: bytes = b"", fds: int = 0, **fields: Any) -> bytes:
    document = json.dumps({"say": word, **fields}, separators=(",", ":")).encode()
    return _HEADER.pack(_MAGIC, len(document), len(attachment), fds) + document + attachment


class _Inbox:
    """Puts a message together, however it comes in. ``most`` is how large it may be."""

    def __init__(self, most: _Sizes) -> None:
        self._most = most
        self._data = bytearray()
        self._sizes: _Sizes | None = None

    def receive(self, sock: socket.socket) -> bool:
        """Reads once; says whether the message is complete. Raises EOFError, DocumentError, and what recv() does."""
        data = sock.recv(min(self._missing, 1 << 20))
        if not data:
            raise EOFError
        self._data += data
        if self._sizes is None and len(self._data) == _HEADER.size:
            self._sizes = self._read_header()
        return self.complete

    @property
    def complete(self) -> bool:
        return self._missing == 0

    @property
    def _missing(self) -> int:
        """Never a byte of what comes behind the message: descriptors come with that."""
        whole = 0 if self._sizes is None else self._sizes.document + self._sizes.attachment
        return _HEADER.size + whole - len(self._data)

    def _read_header(self) -> _Sizes:
        magic, *numbers = _HEADER.unpack(self._data)
        sizes = _Sizes(*numbers)
        if magic != _MAGIC or not sizes.document:
            raise DocumentError("this is not how vsport speaks")
        if any(size > most for size, most in zip(sizes, self._most, strict=True)):
            raise DocumentError("a message is longer than any that belongs here")
        return sizes

    @property
    def fds(self) -> int:
        """How many descriptors come behind the complete message."""
        assert self._sizes is not None
        return self._sizes.fds

    def message(self) -> _Message:
        """The complete message; raises DocumentError."""
        assert self._sizes is not None
        at = _HEADER.size + self._sizes.document
        fields = Fields.parse("handover", bytes(self._data[_HEADER.size : at]))
        return _Message(fields.text("say"), fields, bytes(self._data[at:]))


def _wait(sock: socket.socket, deadline: float) -> None:
    """Makes the next call on ``sock`` raise TimeoutError when the deadline has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    sock.settimeout(left)


def _fill(inbox: _Inbox, sock: socket.socket, deadline: float) -> None:
    """Waits for the message. Raises EOFError, TimeoutError, DocumentError, OSError."""
    while not inbox.complete:
        _wait(sock, deadline)
        inbox.receive(sock)


class _Outgoing:
    """A message on its way, with its descriptors behind it. They are copies: theirs may be closed meanwhile."""

    def __init__(self, message: bytes, parcel: Parcel | None = None) -> None:
        self._message = message
        self._fds = [] if parcel is None else parcel.copies()
        self._count = len(self._fds)

    def send(self, sock: socket.socket) -> bool:
        """Sends once; says whether that was the last of it. Raises HostError, and what send() does."""
        if self._message:
            self._message = self._message[sock.send(self._message) :]
        else:
            self._send_fds(sock)
        return not self._message and not self._fds

    def _send_fds(self, sock: socket.socket) -> None:
        try:
            socket.send_fds(sock, [b"+"], self._fds[:_FDS_AT_ONCE])
        except OSError as exc:
            if exc.errno == errno.ETOOMANYREFS:
                raise HostError(
                    f"the old process may not send {self._count} descriptors: raise its limit (ulimit -n)"
                ) from exc
            raise
        for fd in self._fds[:_FDS_AT_ONCE]:
            os.close(fd)
        del self._fds[:_FDS_AT_ONCE]

    def send_all(self, sock: socket.socket, deadline: float) -> None:
        """Sends all of it. Raises TimeoutError, HostError, OSError."""
        try:
            done = False
            while not done:
                _wait(sock, deadline)
                done = self.send(sock)
        finally:
            self.close()

    def close(self) -> None:
        """Gives up what has not been sent. Safe to call twice."""
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()


def _receive_fds(sock: socket.socket, count: int, deadline: float) -> Delivery:
    """The descriptors behind a message. Raises EOFError, TimeoutError, HostError, OSError, and keeps none."""
    fds: list[int] = []
    try:
        while len(fds) < count:
            _wait(sock, deadline)
            expected = min(count - len(fds), _FDS_AT_ONCE)
            data, more, _, _ = socket.recv_fds(sock, 1, _FDS_AT_ONCE, socket.MSG_CMSG_CLOEXEC)
            fds += more
            if not data:
                raise EOFError
            if len(more) != expected:
                raise HostError(f"the new process may not have {count} descriptors more: raise its limit (ulimit -n)")
    except BaseException:
        Delivery(fds).close()
        raise
    return Delivery(fds)


class _Peer(NamedTuple):
    """The process at the other end of a Unix socket."""

    pid: int
    uid: int

    @classmethod
    def of(cls, sock: socket.socket) -> _Peer:
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, _ = _CREDENTIALS.unpack(credentials)
        return cls(pid, uid)

    def check(self) -> None:
        """A device goes to and comes from the same user, or root. Raises HostError."""
        if self.uid not in {os.geteuid(), 0}:
            raise HostError(f"no device goes between a process of user {os.geteuid()} and one of user {self.uid}")


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """No garbage is collected meanwhile: a full collection takes longer than a handover."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _reason(exc: BaseException) -> str:
    """What went wrong, as a part of a line."""
    if isinstance(exc, TimeoutError):
        return "no answer came in time"
    if isinstance(exc, (EOFError, BrokenPipeError, ConnectionResetError)):
        return "the other process has closed the connection"
    if isinstance(exc, OSError) and exc.strerror:
        return exc.strerror if exc.filename is None else f"{exc.filename}: {exc.strerror}"
    return str(exc)


# -- the giver -------------------------------------------------------------------------------------------------------


class Offer:
    """Waits at a Unix socket for processes that want the device, one at a time: the others wait in its queue.

    ``on_taken`` is called when the device is another process's. Raises UsageError for an impossible path.
    """

    def __init__(self, path: str, loop: Loop, cargo: Cargo, on_taken: Callable[[], None]) -> None:
        self.path = path
        self.loop = loop
        self.cargo = cargo
        self.on_taken = on_taken
        self._address = UnixAddress(path, mode=0o600)
        self._listener: socket.socket | None = None
        self._dialogue: _Dialogue | None = None

    def listen(self) -> None:
        """Makes the socket. Raises HostError."""
        (self._listener,) = self._address.listen()

    def give(self, parcel: Parcel) -> dict[str, Any]:
        assert self._listener is not None
        return {"path": self.path, "address": self._address.give([self._listener], parcel)}

    def take(self, address: Fields, delivery: Delivery) -> None:
        """In place of listen(): the socket of another process's offer at the same path. Raises DocumentError."""
        listeners = self._address.take(address, delivery)
        if len(listeners) != 1:
            for sock in listeners:
                sock.close()
            raise DocumentError(f"{address.where}: {len(listeners)} sockets listen at one path")
        (self._listener,) = listeners

    def start(self) -> None:
        """Lets takers in, when the loop runs."""
        if self._listener is not None and self._dialogue is None:
            self.loop.watch(self._listener.fileno(), READ, self._accept)

    def _accept(self, _ready: int) -> None:
        assert self._listener is not None
        self.loop.unwatch(self._listener.fileno())
        try:
            accepted, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            self.start()
        except OSError as exc:  # no descriptors or no memory: the taker stays in the queue
            log.error("cannot accept a taker: %s", exc.strerror)
            self.loop.call_later(_ACCEPT_AGAIN_SECONDS, self.start)
        else:
            self._dialogue = _Dialogue(accepted, self)
            self._dialogue.start()

    def over(self, *, taken: bool) -> None:
        """The dialogue has ended."""
        self._dialogue = None
        if taken:
            self.release()
            self.cargo.release()
            self.on_taken()
        else:
            self.start()

    def close(self) -> None:
        """Offers the device no more; the socket file goes. Safe to call twice."""
        self._address.forget()
        self.release()

    def release(self) -> None:
        """The socket is another process's now: it stays."""
        if self._dialogue is not None:
            self._dialogue.close()
            self._dialogue = None
        if self._listener is not None:
            self.loop.unwatch(self._listener.fileno())
            self._listener.close()
            self._listener = None
        self._address.disown()


class _Dialogue:
    """The giver's half: on the loop as long as the device runs, and without the loop while it stands still."""

    def __init__(self, sock: socket.socket, offer: Offer) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._offer = offer
        self._peer = _Peer.of(sock)
        self._inbox = _Inbox(_SHORT)
        self._next: tuple[str, Callable[[Fields], None]] = ("hello", self._hello)
        self._outgoing = _Outgoing(b"")
        self._drafts = 0
        self._edition: Hashable = None
        self._preview: Snapshot | None = None
        self._timer: Timer | None = None

    def start(self) -> None:
        try:
            self._peer.check()
        except HostError as exc:
            self._fail(exc)
        else:
            self._listen()

    def _watch(self, events: int, callback: Callable[[int], None]) -> None:
        """Waits for the taker, and not for ever."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._offer.loop.call_later(STEP_SECONDS, lambda: self._fail(TimeoutError()))
        self._offer.loop.watch(self._sock.fileno(), events, callback)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._offer.loop.unwatch(self._sock.fileno())

    def _listen(self) -> None:
        self._inbox = _Inbox(_SHORT)
        self._watch(READ, self._readable)

    def _readable(self, _ready: int) -> None:
        try:
            if self._inbox.receive(self._sock):
                self._hear(self._inbox.message())
        except BlockingIOError:
            return
        except Exception as exc:
            self._fail(exc)

    def _hear(self, message: _Message) -> None:
        word, act = self._next
        act(message.expect(word))

    def _hello(self, fields: Fields) -> None:
        version = fields.integer("version", 0, 2**32)
        fields.end()
        if version != VERSION:
            raise HostError(f"the old process speaks version {VERSION} of this, and the new one version {version}")
        log.info("process %d asks for the device", self._peer.pid)
        cargo = self._offer.cargo
        self._next = ("prepared", self._prepared)
        message = _encode(
            "configuration", chardevs=list(cargo.chardevs), devices=list(cargo.devices), directory=_directory()
        )
        self._say(_Outgoing(message))

    def _say(self, outgoing: _Outgoing) -> None:
        """Then listens. The device runs on, however slow the taker is."""
        self._outgoing = outgoing
        self._watch(WRITE, self._writable)

    def _writable(self, _ready: int) -> None:
        try:
            if self._outgoing.send(self._sock):
                self._listen()
        except BlockingIOError:
            return
        except (HostError, OSError) as exc:
            self._fail(exc)

    def _prepared(self, fields: Fields) -> None:
        fields.end()
        raise_descriptor_limit(sys.maxsize)  # as many descriptors may be under way
        self._next = ("arranged", self._arranged)
        self._draft()

    def _draft(self) -> None:
        """Describes the device, which runs on, so that the taker can make everything but the rest."""
        self._drafts += 1
        self._edition = self._offer.cargo.edition
        self._preview = self._offer.cargo.host.device.preview()
        parcel = Parcel()
        draft = self._describe(parcel)
        self._say(_Outgoing(_encode("draft", self._preview.encode(), len(parcel.fds), **draft), parcel))

    def _describe(self, parcel: Parcel) -> dict[str, Any]:
        return {"offer": self._offer.give(parcel), **self._offer.cargo.give(parcel)}

    def _arranged(self, fields: Fields) -> None:
        """The taker has made what the draft describes: if that is still the device, it stands still now."""
        fields.end()
        if self._edition != self._offer.cargo.edition and self._drafts < DRAFTS:
            self._draft()
        else:
            self._unwatch()
            with _undisturbed():
                self._hand_over()
            log.info("process %d has taken over", self._peer.pid)
            self._sock.close()
            self._offer.over(taken=True)

    def _hand_over(self) -> None:
        """Suspends the device. It is the taker's when this returns; if this raises, it goes on here."""
        cargo = self._offer.cargo
        up_to_date = self._edition == cargo.edition
        paused_at = time.monotonic_ns()
        cargo.suspend()
        try:
            deadline = time.monotonic() + STEP_SECONDS
            self._state(paused_at, up_to_date=up_to_date).send_all(self._sock, deadline)
            _wait_for_ready(self._sock, deadline)
        except BaseException as exc:
            self._refuse(exc)  # the socket is closed before the device goes on: nobody can say ready any more
            cargo.resume()
            raise
        _wait_for_hangup(self._sock)

    def _state(self, paused_at: int, *, up_to_date: bool) -> _Outgoing:
        """The rest, and the whole device once more if the last draft was in vain."""
        assert self._preview is not None
        cargo, parcel = self._offer.cargo, Parcel()
        drafts = [] if up_to_date else [self._describe(parcel)]
        snapshot = cargo.host.device.snapshot()
        moved = snapshot.moved_since(self._preview)
        rest = {"paused_at": paused_at, "drafts": drafts, "whole": moved is None, **cargo.give_rest()}
        attachment = snapshot.encode() if moved is None else moved
        return _Outgoing(_encode("state", attachment, len(parcel.fds), **rest), parcel)

    def _fail(self, exc: BaseException) -> None:
        ours = not isinstance(exc, (VsportError, OSError, EOFError))
        log.warning("no handover to process %d: %s; going on", self._peer.pid, _reason(exc), exc_info=ours and exc)
        self._refuse(exc)
        self._offer.over(taken=False)

    def _refuse(self, exc: BaseException) -> None:
        """Says why not, if that can be said without waiting, and hangs up. Safe to call twice."""
        if self._sock.fileno() >= 0:
            with contextlib.suppress(OSError):
                self._sock.setblocking(False)
                self._sock.send(_encode("refused", why=_reason(exc)))
        self.close()

    def close(self) -> None:
        self._unwatch()
        self._outgoing.close()
        self._sock.close()


def _wait_for_ready(sock: socket.socket, deadline: float) -> None:
    """Returns when the taker has the device. When this raises, the taker does not have it, and cannot get it."""
    inbox = _Inbox(_SHORT)
    try:
        _fill(inbox, sock, deadline)
    except TimeoutError:
        sock.shutdown(socket.SHUT_RD)  # what has not been said by now cannot be said any more
        with contextlib.suppress(EOFError):
            while not inbox.receive(sock):
                pass
        if not inbox.complete:
            raise
    inbox.message().expect("ready").end()


def _wait_for_hangup(sock: socket.socket) -> None:
    """The taker goes on first: giving everything up takes processor time, and both may have to share one."""
    with contextlib.suppress(OSError):
        sock.settimeout(_LINGER_SECONDS)
        sock.recv(1)


def _directory() -> str:
    """Where relative paths begin; nothing if that directory has been removed."""
    try:
        return os.getcwd()
    except OSError:
        return ""


# -- the taker -------------------------------------------------------------------------------------------------------


class Configuration(NamedTuple):
    """What the giver's device was made from."""

    chardevs: Sequence[str]
    devices: Sequence[str]


class Takeover:
    """The taker's half: it waits for each answer, having nothing else to do. A context manager.

    What goes wrong within it is undone, told to the giver, and raised as a HostError that says all in one line.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._sock = socket.socket(socket.AF_UNIX)
        self._undo = contextlib.ExitStack()
        self._quiet = contextlib.ExitStack()
        self._paused_at = 0

    def __enter__(self) -> Takeover:
        return self

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        self._quiet.close()
        self._undo.close()
        if exc is not None:
            with contextlib.suppress(OSError):
                self._sock.setblocking(False)
                self._sock.send(_encode("refused", why=_reason(exc)))
        self._sock.close()
        if isinstance(exc, (VsportError, OSError, EOFError)):
            raise HostError(f"cannot take over from {self.path}: {_reason(exc)}") from exc

    def configuration(self) -> Configuration:
        """Connects, and asks. Then this process is in the giver's directory: its paths are relative to that."""
        deadline = time.monotonic() + _TURN_SECONDS
        self._connect(deadline)
        self._say("hello", version=VERSION)
        fields = self._hear("configuration", deadline)
        configuration = Configuration(
            fields.each("chardevs", _TEXTS_MAX, _text), fields.each("devices", _TEXTS_MAX, _text)
        )
        directory = fields.text("directory")
        fields.end()
        if directory:
            os.chdir(directory)
        return configuration

    def _connect(self, deadline: float) -> None:
        _wait(self._sock, deadline)
        try:
            self._sock.connect(self.path)
        except (FileNotFoundError, ConnectionRefusedError) as exc:
            raise HostError(f"{exc.strerror}; nobody offers a device there (vsport serve --handover PATH)") from exc
        _Peer.of(self._sock).check()

    def _say(self, word: str, **fields: Any) -> None:
        deadline = time.monotonic() + STEP_SECONDS
        try:
            _Outgoing(_encode(word, **fields)).send_all(self._sock, deadline)
        except BrokenPipeError:
            self._hear("nothing", deadline)  # it may have said why
            raise

    def _hear(self, word: str, deadline: float) -> Fields:
        inbox = _Inbox(_CONFIGURATION)
        _fill(inbox, self._sock, deadline)
        return inbox.message().expect(word)

    def take(self, cargo: Cargo, on_taken: Callable[[], None]) -> Offer:
        """The device pauses there, and ``cargo`` becomes it, suspended. Returns the giver's offer, not started yet."""
        raise_descriptor_limit(sys.maxsize)
        draft = _Draft(cargo, on_taken)
        self.if_it_fails(draft.release)
        self._say("prepared")
        while (message := self._receive(draft)).word == "draft":
            message.fields.end()
            self._quiet.enter_context(_undisturbed())
            self._say("arranged")
        state = message.expect("state")
        self._paused_at = state.integer("paused_at", 0, 2**63 - 1)
        cargo.take_rest(state, draft.snapshot(message.attachment, whole=state.boolean("whole")))
        state.end()
        return draft.offer

    def _receive(self, draft: _Draft) -> _Message:
        """The next message about the device; what it says of the whole of it is in ``draft`` by then."""
        deadline = time.monotonic() + STEP_SECONDS
        inbox = _Inbox(_DEVICE)
        _fill(inbox, self._sock, deadline)
        message = inbox.message()
        with contextlib.closing(_receive_fds(self._sock, inbox.fds, deadline)) as delivery:
            if message.word == "draft":
                draft.take(message.fields, delivery)
                draft.look_at(message.attachment)
            else:
                for fields in message.expect("state").each("drafts", 1, Fields):
                    draft.take(fields, delivery)
                    fields.end()
        return message

    def if_it_fails(self, undo: Callable[[], None]) -> None:
        """Calls back at the end, unless ready() was said."""
        self._undo.callback(undo)

    def ready(self) -> None:
        """The device is this process's from now on."""
        self._say("ready")
        self._undo.pop_all()  # and not called

    @property
    def milliseconds(self) -> float:
        """How long it is since the giver suspended the device."""
        return (time.monotonic_ns() - self._paused_at) / 1e6


class _Draft:
    """What the taker has made of the last draft: ``cargo``, but for the rest, and the giver's offer."""

    def __init__(self, cargo: Cargo, on_taken: Callable[[], None]) -> None:
        self._cargo = cargo
        self._on_taken = on_taken
        self._offer: Offer | None = None
        self._preview: Snapshot | None = None

    @property
    def offer(self) -> Offer:
        if self._offer is None:
            raise DocumentError("a state without a draft before it")
        return self._offer

    def take(self, fields: Fields, delivery: Delivery) -> None:
        """In place of the one before. Raises VsportError, OSError."""
        self.release()
        offer = fields.object("offer")
        self._offer = Offer(offer.text("path"), self._cargo.host.loop, self._cargo, self._on_taken)
        self._offer.take(offer.object("address"), delivery)
        offer.end()
        self._cargo.take(fields, delivery)

    def look_at(self, preview: bytes) -> None:
        """What the device was at the time of the draft: if it does not fit, that need not be found out in the pause."""
        self._preview = Snapshot.decode(preview)
        self._cargo.host.device.check(self._preview)

    def snapshot(self, data: bytes, *, whole: bool) -> Snapshot:
        """The device that was suspended, or what is different from the preview."""
        if whole:
            return Snapshot.decode(data)
        if self._preview is None:
            raise DocumentError("a state without a draft before it")
        return self._preview.move(data)

    def release(self) -> None:
        """Nobody notices that it was there."""
        if self._offer is not None:
            self._offer.release()
            self._offer = None
        self._cargo.release()


def _text(where: str, value: object) -> str:
    if not isinstance(value, str):
        raise DocumentError(f"{where}: a text belongs here")
    return value
