"""The virtqueue engine: split and packed rings, device side and driver side, on guest memory.

Bytes plane: no policy. Everything here works on memory that another program changes at the same time,
so each shared field is read once (R-RING-19) and every value read from it is checked (R-RING-70 to 84).
"""

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Final, NamedTuple, Self, final

from typing_extensions import Buffer

__all__ = ["DeviceQueue", "DirtyLog", "DriverQueue", "Inflight", "Memory", "Region", "Status"]

class Status(IntEnum):
    """Why a drain or a fill came back."""

    EMPTY = 0
    """The driver has offered nothing (more)."""
    BLOCKED = 1
    """The descriptor or the sink takes, or has, nothing now (EAGAIN)."""
    EOF = 2
    """The descriptor's other end has closed (fill only)."""
    MORE = 3
    """The budget is used up; there may be more."""
    STOPPED = 4
    """The queue is not running: never started, stopped, or broken."""

class Region(NamedTuple):
    """A range of guest memory (R-VU-60)."""

    gpa: int
    size: int
    front_end_addr: int
    buffer: Buffer
    """Writable memory, e.g. an ``mmap.mmap``; its export is held as long as the Memory lives."""
    offset: int
    """Where in ``buffer`` the region starts, in bytes."""

@final
class Memory:
    """Guest memory: an immutable table of regions.

    Raises FrontEndError (R-VU-62) if a region is empty, overflows 2**64, overlaps another one in guest-physical or in
    front-end addresses, or reaches beyond its buffer; at most 512 regions.
    """

    def __new__(cls, regions: Sequence[Region] = ()) -> Self: ...
    @property
    def regions(self) -> tuple[Region, ...]: ...
    @property
    def lost(self) -> bool:
        """True once the file behind a region proved to be truncated (R-RING-82): its pages now read as zeros."""
    def read(self, gpa: int, size: int) -> bytes:
        """Copies out guest-physical memory; raises IndexError if a part of it is in no region."""
    def write(self, gpa: int, data: Buffer) -> None:
        """Copies into guest-physical memory; raises IndexError, and then nothing is written."""

@final
class DirtyLog:
    """A bitmap of the pages of guest memory that were written to, shared with who copies the guest (R-VU-80, R-VU-81).

    Bit p % 8 of byte p // 8 is for page p, of 4096 bytes from guest-physical address 4096 * p on. It is ``size`` bytes
    of writable ``buffer`` from ``offset`` on, whose export is held. Others may set and take bits at any time.
    """

    def __new__(cls, buffer: Buffer, offset: int, size: int) -> Self:
        """Raises FrontEndError (R-VU-81) if it reaches beyond its buffer."""
    @property
    def size(self) -> int:
        """Bytes of the bitmap."""
    def mark(self, gpa: int, length: int) -> None:
        """Marks the pages of a range that was written to; for pages beyond the log nothing happens."""
    def take(self) -> bytes:
        """The bitmap, all of whose bits are taken away: for the side that copies.

        Whoever reads a page that it has a bit of finds what was written before the bit was set. A page that is written
        to meanwhile is marked again.
        """

@final
class Inflight:
    """Which chains of a split queue are in flight, in memory that outlives this process (R-VU-85 to R-VU-88).

    A DeviceQueue that has one marks a chain before its first byte moves, and takes the mark away after the chain is
    used. The device that starts next with the same region knows how far this one had come.
    """

    def __new__(cls, buffer: Buffer, offset: int, desc_num: int) -> Self:
        """Raises FrontEndError (R-VU-85, R-VU-86) if the region does not fit or is not aligned to 8 in memory."""
    @staticmethod
    def footprint(desc_num: int) -> int:
        """Bytes of a queue's region, rounded up to 64 (R-VU-86)."""
    @property
    def desc_num(self) -> int:
        """The size of its queue."""
    @property
    def fresh(self) -> bool:
        """Whether no device has used it yet."""

@final
class DeviceQueue:
    """The device's side of one virtqueue, split or packed.

    Chains are taken lazily: ``next_avail`` moves only when a chain is completed, and ``offset`` says how many bytes of
    the chain at ``next_avail`` are already consumed. So stopping a queue loses nothing (R-VU-20, R-VU-89).

    A rule broken by the driver stops the queue: the call raises GuestError once, ``fault`` keeps it, and every later
    call returns Status.STOPPED (or None, False, 0) until the next start().
    """

    def __new__(cls, index: int) -> Self: ...
    index: Final[int]
    call_fd: int
    """Descriptor that interrupts the driver: 8 bytes are written to it; -1: none. Not owned, never read (R-VU-98).

    After it was set the next notify() repeats the last call, which the old descriptor may have swallowed (R-VU-55).
    """
    inflight: Inflight | None
    """Where chains in flight are kept. Can be set while the queue is stopped, otherwise ValueError."""
    @property
    def running(self) -> bool: ...
    @property
    def fault(self) -> Exception | None: ...
    @property
    def size(self) -> int: ...
    @property
    def next_avail(self) -> int:
        """Where the next chain is. Split: the available index; packed: the slot, with the wrap counter in bit 15."""
    @property
    def used_idx(self) -> int:
        """Where the next used entry goes, in the same way. Packed: the same as next_avail."""
    @property
    def offset(self) -> int: ...
    @property
    def bytes_moved(self) -> int:
        """Bytes moved between chains and a descriptor, a sink, or the caller, since the queue was made."""
    @property
    def bytes_discarded(self) -> int:
        """Bytes of device-readable chains that were returned to the driver unread by discard() or return_partial()."""
    @property
    def chains(self) -> int:
        """Chains completed since the queue was made."""
    @property
    def calls(self) -> int:
        """Interrupts sent or asked for since the queue was made."""
    def start(
        self,
        memory: Memory,
        size: int,
        desc: int,
        avail: int,
        used: int,
        *,
        base: int = 0,
        event_idx: bool = False,
        indirect: bool = False,
        packed: bool = False,
        in_order: bool = False,
        reset: bool = True,
    ) -> None:
        """Starts at available index ``base`` on rings at front-end addresses ``desc``, ``avail``, ``used``.

        With ``packed`` these are the descriptor ring, the driver's and the device's event structure, and ``base`` is as
        next_avail has it; 0 is also taken for the beginning of a ring that was never used (R-RING-49). With
        ``in_order`` one used entry may stand for several chains that the device could not write to (R-RING-50, 51).

        With reset=False a half-consumed chain's ``offset`` is kept (resume, new memory table), if ``base`` is still
        that chain. The used index is read from memory. Kicks are on, and a driver that is resumed is called once more
        by the next notify() (R-RING-23). Raises FrontEndError (R-RING-01, R-RING-04, R-RING-09, R-RING-40, R-RING-77,
        R-RING-82, R-VU-18, R-VU-90) and leaves the queue stopped.

        With an ``inflight`` region that is not fresh it goes on at the first chain that is not used, whatever ``base``
        is: at the first chain in flight, if there is one. Kick it, because nobody else will. A region that contradicts
        the rings is refused as it is (R-VU-85, R-VU-88).
        """
    def stop(self) -> int:
        """Stops the queue and returns ``next_avail``, for GET_VRING_BASE; ``offset`` is kept."""
    def restore(self, next_avail: int, offset: int) -> None:
        """Sets where start(base=next_avail, reset=False) goes on: ``offset`` bytes of that chain are consumed.

        For a stopped queue whose state comes from elsewhere; whether the chain is there is only seen when the queue
        runs. Raises ValueError for a running queue and for values out of range, and then nothing has changed.
        """
    def log_to(self, log: DirtyLog | None, used_gpa: int = -1) -> None:
        """From now on, also while running, what the device writes is marked in ``log`` after it is written (R-VU-80).

        Buffers are marked at their guest-physical addresses, the used ring (elements, index, flags, avail_event), or a
        packed ring's event structure, as if it began at ``used_gpa``, and a packed ring's descriptors where they are;
        -1: neither. Stays until it is called again. Raises ValueError.
        """
    def forget_partial(self) -> None:
        """Forgets the half-consumed chain's offset (device reset, R-CON-38)."""
    def pending(self) -> int:
        """How many chains are offered and not completed; 0 if not running. Raises GuestError (R-RING-70)."""
    def drain(self, fd: int, *, log_fd: int = -1, budget: int = ...) -> Status:
        """Writes device-readable bytes to ``fd`` with writev(), straight from guest memory, without the GIL.

        Completes the chains written out with length 0 (R-RING-11), remembers a half-written one. What was written to
        ``fd`` is also written to ``log_fd``, whose errors are ignored. At most ``budget`` bytes. ``fd`` is written to
        until it says EAGAIN, so it has to be non-blocking. Raises OSError if it fails otherwise (what was written
        before is accounted for), GuestError, FrontEndError (R-RING-82).
        """
    def drain_into(self, sink: Callable[[memoryview], int], *, budget: int = ...) -> Status:
        """Offers device-readable bytes, piece by piece, to ``sink``, which returns how many it took (0: blocked).

        The memoryviews are read-only and on guest memory: they hold the mapping. An exception of ``sink`` passes.
        """
    def discard(self) -> int:
        """Returns the chains offered by the driver with length 0, and says how many readable bytes were dropped.

        A driver that makes this long work on purpose is served in several calls: pending() tells (R-RING-80).
        """
    def return_partial(self) -> int:
        """Returns a half-consumed chain to the driver; says how many of its bytes were dropped (R-CON-48)."""
    def fill(self, fd: int, *, budget: int = ...) -> Status:
        """Reads from ``fd`` with readv(), straight into device-writable buffers, without the GIL.

        EMPTY: no buffer left; BLOCKED: no bytes now; EOF: the other end has closed. Buffers that got no byte stay
        with the device (R-CON-42). ``fd`` has to be non-blocking. Raises OSError, GuestError, FrontEndError
        (R-RING-82).
        """
    def fill_from(self, data: Buffer) -> int:
        """Copies ``data`` into as many device-writable buffers as it takes; returns how many bytes found room."""
    def push(self, message: bytes) -> bool:
        """Puts one whole message into one device-writable chain; False if there is none (yet).

        A chain that is too small for it is returned with length 0 and the next one is tried (R-CON-29).
        """
    def pop(self, limit: int = 4096) -> bytes | None:
        """Takes one chain and returns its device-readable bytes, at most ``limit`` of them; None if there is no chain.

        The chain is completed with length 0. More bytes than ``limit`` are dropped.
        """
    def kicks_off(self) -> None:
        """Tells the driver that notifications are not needed; a hint, no more (R-RING-24)."""
    def kicks_on(self) -> bool:
        """Asks the driver for a notification at its next chain; True if there is one already (R-RING-18)."""
    def notify(self) -> bool:
        """Interrupts the driver if it wants that for the chains completed since the last time (R-RING-20 to 23).

        With a ``call_fd`` it is written to, and False comes back; without, True means: a call is wanted, deliver it.
        A queue that a fault has stopped still tells of the chains that it had completed.
        """

@final
class DriverQueue:
    """The driver's side of one virtqueue, for a simulated guest.

    Lays out the three parts from guest-physical address ``gpa`` on (``footprint(size)`` bytes, aligned to 4096),
    zeroed; ``desc``, ``avail`` and ``used`` are their guest-physical addresses. The used ring, or a packed ring's event
    structure of the device, begins a page, so that what only the device writes is on no page of the driver's (R-VU-80).
    With ``in_order`` descriptors are used one after the other, and a used entry may stand for all chains that were
    offered before its own: each of them is collected, as full (R-RING-51, R-RING-52). A rule broken by the device marks
    the queue broken and raises DeviceError (R-RING-84).
    """

    def __new__(
        cls,
        memory: Memory,
        gpa: int,
        size: int,
        *,
        event_idx: bool = False,
        indirect: bool = False,
        packed: bool = False,
        in_order: bool = False,
    ) -> Self: ...
    @staticmethod
    def footprint(size: int) -> int:
        """Bytes of guest memory that a queue of ``size`` takes, rounded up to pages of 4096."""
    def rebind(self, memory: Memory) -> None:
        """Goes on with the same state in another memory of the same layout: the guest has been moved.

        What is in that memory is left as it is. Raises IndexError if the rings are not in one region of it, ValueError
        if they are not aligned to 16 on the host, and then nothing has changed.
        """
    size: Final[int]
    packed: Final[bool]
    desc: Final[int]
    avail: Final[int]
    used: Final[int]
    @property
    def free(self) -> int:
        """Descriptors of the table that are not in use."""
    @property
    def in_flight(self) -> int:
        """Chains offered and not yet collected."""
    @property
    def broken(self) -> bool: ...
    def add(
        self,
        readable: Sequence[tuple[int, int]] = (),
        writable: Sequence[tuple[int, int]] = (),
        *,
        indirect_table: int = 0,
    ) -> int:
        """Puts a chain of (gpa, length) elements into the ring, not yet published.

        Returns its head, or buffer id. With ``indirect_table`` (a gpa with 16 bytes for each element) it takes one
        descriptor. Raises BufferError if the table is full, ValueError if there is no element.
        """
    def publish(self) -> bool:
        """Shows the added chains to the device; True if the device wants a notification."""
    def collect(self) -> tuple[int, int] | None:
        """The next used chain as (head, bytes written), or None."""
    def all_used(self) -> bool:
        """Whether the device has given back everything that was published; nothing is collected by asking."""
    def calls_off(self) -> None: ...
    def calls_on(self) -> bool:
        """Asks for an interrupt at the next used chain; True if there is one already."""
