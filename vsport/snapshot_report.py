"""What is in a snapshot, told to people and to programs, and what a restore would do with each port."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from vsport.connection import State
from vsport.constants import BAD_PORT_ID, QUEUE_CONTROL_RX, QUEUE_CONTROL_TX, Event, Feature, queue_count, tx_queue
from vsport.control import Message
from vsport.errors import GuestError
from vsport.report import Report, facts, meanings, paragraph, shown, size, table
from vsport.snapshot import PortConfig, PortState, QueueState, Snapshot

__all__ = ["snapshot_report"]

_MESSAGES_SHOWN = 20


def snapshot_report(path: Path, snapshot: Snapshot, file_size: int) -> Report:
    """What is in the snapshot ``path`` of ``file_size`` bytes, and what becomes of each port when it is restored."""
    return Report("\n".join(_text(path, snapshot, file_size)), list(_objects(path, snapshot, file_size)))


def _objects(path: Path, snapshot: Snapshot, file_size: int) -> Iterator[dict[str, object]]:
    """The file, its device, the device's ports, then the control messages that wait."""
    device = snapshot.as_dict()
    ports, waiting = device.pop("ports"), device.pop("waiting")
    yield {"type": "file", "format": "vsport-snapshot", "path": str(path), "size": file_size, "consistent": True}
    yield {"type": "device", **device, "feature_names": _features(snapshot.features)}
    taken = {queue.index: queue.offset for queue in snapshot.queues}
    for port in ports:
        half = taken.get(tx_queue(port["id"]), 0)
        yield {"type": "port", "device": None, **port, "throttled": half > 0, "bytes_taken": half}
    for message, raw in zip(snapshot.waiting, waiting, strict=True):
        yield {
            "type": "message",
            "device": None,
            "port": message.port,
            "event": message.event.name,
            "value": message.value,
            "words": _words(message, _configs(snapshot)),
            "bytes": raw,
        }


def _text(path: Path, snapshot: Snapshot, file_size: int) -> Iterator[str]:
    yield from paragraph(
        f"{path}: a snapshot of vsport, {size(file_size)}: a virtio-serial device at the moment it stood still."
    )
    yield ""
    yield from _device_text(snapshot)
    if snapshot.waiting:
        yield ""
        yield from _waiting_text(snapshot)
    yield ""
    yield "Nothing in it contradicts itself."


def _device_text(snapshot: Snapshot) -> Iterator[str]:
    yield "virtio-serial device"
    yield from facts(
        ("driver", _driver_words(snapshot)),
        ("features", " ".join(_features(snapshot.features)) or "none"),
        ("console", f"{snapshot.cols} columns, {snapshot.rows} rows"),
        ("queues", f"{queue_count(snapshot.max_ports)}, of which the driver has set up {len(snapshot.queues)} (split)"),
        ("ports", f"{len(snapshot.ports)} of {snapshot.max_ports}"),
        *_unusual_queues(snapshot),
    )
    if snapshot.ports:
        transmit = {queue.index: queue for queue in snapshot.queues if queue.offset}
        heading = ("port", "kind", "name", "guest", "host", "session", "waiting for the host")
        yield ""
        yield from table([heading, *(_row(port, transmit) for port in snapshot.ports)], indent=2)
        yield ""
        yield "When it is restored, unless a port is told to do otherwise:"
        yield from meanings(
            (port.config.id, meaning) for port in snapshot.ports for meaning in _meanings(port, transmit)
        )


def _features(features: int) -> list[str]:
    return [feature.name or "" for feature in Feature if features & feature]


def _driver_words(snapshot: Snapshot) -> str:
    if snapshot.driver_ready:
        return "is running, and has asked for its ports"
    if snapshot.features and not snapshot.features & Feature.MULTIPORT:
        return "knows one port only, number 0: it has not negotiated MULTIPORT"
    return "has not asked for its ports: it is not there, or not yet"


def _unusual_queues(snapshot: Snapshot) -> Iterator[tuple[str, str]]:
    """Half-consumed chains where no port of this snapshot tells of them."""
    told = {tx_queue(port.config.id) for port in snapshot.ports}
    for queue in snapshot.queues:
        if queue.offset and queue.index not in told:
            yield f"queue {queue.index}", f"{_queue_words(queue.index)}: {queue.offset} bytes into {_chain(queue)}"


def _queue_words(index: int) -> str:
    """Whose queue it is (R-CON-02)."""
    if index in (QUEUE_CONTROL_RX, QUEUE_CONTROL_TX):
        return "control"
    port = 0 if index < QUEUE_CONTROL_RX else index // 2 - 1
    return f"port {port}, {'from' if index % 2 else 'to'} the guest"


def _chain(queue: QueueState) -> str:
    return f"the chain at available index {queue.next_avail}"


# -- ports -------------------------------------------------------------------------------------------------------------


def _row(port: PortState, transmit: Mapping[int, QueueState]) -> tuple[str, ...]:
    config, state = port.config, port.state
    half = transmit.get(tx_queue(config.id))
    return (
        str(config.id),
        f"console {config.cols}x{config.rows}" if config.console else "generic",
        shown(config.name) if config.name else "-",
        "open" if state.guest_connected else "closed" if state.device_ready else "not ready",
        "connected" if state.host_connected else "absent",
        str(port.session) if port.session else "-",
        f"a chain from byte {half.offset} on" if half else "-",
    )


_LEFT_BEHIND = "This host's session stays behind: the guest is told that it has left, and of the next host."
_MEANINGS = {
    State.A: (
        "open in the guest, and the host was connected. The new back end is told that the guest has it open: it did "
        f"not see that happen, and would otherwise stay silent (the bug of 2011). {_LEFT_BEHIND}"
    ),
    State.D: (
        "open in the guest, no host at save time. The new back end is told that the guest has it open, so that "
        "whoever connects is served at once (the bug of 2011)."
    ),
    State.C: f"closed in the guest, the host was connected. {_LEFT_BEHIND}",
    State.B: "nobody at either end. There is nothing to bring over.",
}
"""What becomes of a port that the driver has called ready."""
_UNTOLD = "the driver has not been told of it, and is when it asks for its ports."
_UNANSWERED = (
    "the driver was told of it, and has not called it ready. As soon as it does, it hears what the port is, and "
    "whether a host is there."
)


def _meanings(port: PortState, transmit: Mapping[int, QueueState]) -> Iterator[str]:
    if port.state.device_ready:
        yield _MEANINGS[port.state]
    else:
        yield _UNANSWERED if port.added else _UNTOLD
    if half := transmit.get(tx_queue(port.config.id)):
        yield _half_sent(half, host=port.state.host_connected)
    if port.stale:
        yield "what it sent to a host that left while the machine stood still goes back to the guest, unsent."
    if port.back_end:
        yield f"its back end gets back what it kept for itself ({len(port.back_end)} B)."


def _half_sent(queue: QueueState, *, host: bool) -> str:
    after = "which goes back to the guest, unsent, with the session" if host else "for which there is no host"
    keeps = "; only a host whose session goes on, as in a handover, gets it" if host else ""
    return (
        f"half-sent: a host took the first {queue.offset} bytes of {_chain(queue)} in queue {queue.index}, and not "
        f"the rest, {after}{keeps}."
    )


# -- control messages --------------------------------------------------------------------------------------------------


def _waiting_text(snapshot: Snapshot) -> Iterator[str]:
    """In order, as the guest will hear them; at the most what fits on a screen (R-MIG-22)."""
    yield "The guest had no buffer yet for these messages, and gets them in this order:"
    configs = _configs(snapshot)
    for message in snapshot.waiting[:_MESSAGES_SHOWN]:
        about = "the device" if message.port == BAD_PORT_ID else f"port {message.port}"
        yield from paragraph(f"  {about}: {_words(message, configs)}", indent=4)
    if (more := len(snapshot.waiting) - _MESSAGES_SHOWN) > 0:
        yield f"  and {more} more (--json has them)"


def _configs(snapshot: Snapshot) -> dict[int, PortConfig]:
    return {port.config.id: port.config for port in snapshot.ports}


def _words(message: Message, configs: Mapping[int, PortConfig]) -> str:
    """What a control message says (5.3.6.2)."""
    match message.event:
        case Event.PORT_ADD:
            return "it is there"
        case Event.PORT_REMOVE:
            return "it is unplugged"
        case Event.CONSOLE_PORT:
            return "it is a console"
        case Event.PORT_OPEN:
            return "its host has come" if message.value else "its host has left"
        case Event.PORT_NAME:
            return f"its name is {shown(message.tail.decode(errors='backslashreplace'))}"
        case Event.RESIZE:
            return _size_words(message, configs.get(message.port))
        case _:
            return f"{message.event.name}, which only a driver says"


def _size_words(message: Message, config: PortConfig | None) -> str:
    """A size in the order of fields in which this port says it (R-CON-26)."""
    try:
        first, second = message.size()
    except GuestError:
        return "a size that is cut short"
    cols, rows = (second, first) if config and config.rows_first else (first, second)
    return f"its terminal has {cols} columns and {rows} rows"
