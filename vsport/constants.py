"""Every number of the specifications, once, with the place it comes from.

Names are the specifications' own, without their prefixes. Section numbers are those of virtio 1.4.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

# -- identity and queues (5.3.1, 5.3.2) --------------------------------------------------------------------------------

DEVICE_ID_CONSOLE = 3
QUEUE_CONTROL_RX = 2
"""Device to driver (R-CON-02)."""
QUEUE_CONTROL_TX = 3
"""Driver to device."""
QUEUE_SIZE_MAX = 32768
"""2.7, 2.8: a ring's largest size; a split one's is a power of two (R-RING-01, R-RING-40)."""
PACKED_BEGINNING = 0x8000
"""Where a packed ring begins: slot 0, with the wrap counter, in bit 15, at 1 (R-RING-42)."""
PORTS_MAX = 127
"""vhost-user names a queue with 8 bits, so 256 queues at most, two of them for control (R-VU-22)."""
PORTS_DEFAULT = 31
"""What QEMU has as default, and the most that User Mode Linux takes (R-CON-12)."""


def rx_queue(port: int) -> int:
    """The index of the queue on which the driver of ``port`` receives (5.3.2, R-CON-02)."""
    return 0 if port == 0 else 2 * port + 2


def tx_queue(port: int) -> int:
    """The index of the queue on which the driver of ``port`` transmits."""
    return rx_queue(port) + 1


def queue_count(max_ports: int) -> int:
    """How many queues a multiport device with ``max_ports`` ports has."""
    return 2 * (max_ports + 1)


# -- features (5.3.3, 6) -----------------------------------------------------------------------------------------------


class Feature(IntFlag):
    """Feature bits of the console device and of the transport that vsport knows."""

    SIZE = 1 << 0
    MULTIPORT = 1 << 1
    EMERG_WRITE = 1 << 2
    LOG_ALL = 1 << 26
    """vhost-user: log every write to guest memory (R-VU-11)."""
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = 1 << 30
    """vhost-user: never shown to a guest as a virtio feature (R-RING-27)."""
    VERSION_1 = 1 << 32
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35


# -- configuration space (5.3.4, R-CON-05) -----------------------------------------------------------------------------

CONFIG_LAYOUT = "<HHII"
"""cols, rows, max_nr_ports, emerg_wr."""
CONFIG_SIZE = 12
CONFIG_EMERG_WR = 8
"""Offset of emerg_wr, the only field that a guest writes."""

# -- control messages (5.3.6.2, R-CON-20 to 28) ------------------------------------------------------------------------

CONTROL_LAYOUT = "<IHH"
"""id, event, value."""
CONTROL_SIZE = 8
RESIZE_LAYOUT = "<HH"
"""cols, rows: what follows a RESIZE header (R-CON-25)."""
BAD_PORT_ID = 0xFFFFFFFF
"""What Linux puts into DEVICE_READY, which is about no port (R-CON-20)."""


class Event(IntEnum):
    """The ``event`` of a control message; the comment says who sends it."""

    DEVICE_READY = 0  # driver
    PORT_ADD = 1  # device
    PORT_REMOVE = 2  # device
    PORT_READY = 3  # driver
    CONSOLE_PORT = 4  # device
    RESIZE = 5  # device
    PORT_OPEN = 6  # both
    PORT_NAME = 7  # device


# -- rings (2.7) -------------------------------------------------------------------------------------------------------


class Desc(IntFlag):
    """Flags of a split descriptor (2.7.5)."""

    NEXT = 1
    WRITE = 2
    INDIRECT = 4
