# The virtqueue engine: split rings (virtio 2.7), device side and driver side, on guest memory.
#
# How to read it. C functions over ``Ring *`` do the work, without Python objects and without allocation; thin classes
# at the end give them to Python, and _ring.pyi says what these promise. An operation of the device's side goes through
# these steps:
#
#   look()       reads avail.idx and checks it
#   gather()     walks the chains that are offered into a Batch of pieces of guest memory, and checks them on the way
#   (a copy)     readv(), writev() or memcpy() on the pieces
#   settle_*()   completes the chains that were used up, and publishes them to the driver together
#
# Two others may want to know of it, and cost one branch if they do not: a dirty log, of every byte that the device has
# written (R-VU-80), and a region that outlives the process, of every chain that it has begun and completed (R-VU-85).
#
# Two rules hold everywhere. What the driver can change is read once, into private memory, and checked there
# (R-RING-19). Nothing that the driver says decides how much is allocated or how long a call takes (R-RING-80).
#
# The packed ring (2.8) belongs beside look(), gather() and complete(): all else does not know how a ring is laid out.
"""The virtqueue engine: split rings, device side and driver side, on guest memory."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from cpython.memoryview cimport PyMemoryView_FromObject, PyMemoryView_GET_BUFFER
from libc.errno cimport EAGAIN, EFAULT, EINTR, ENOTSOCK, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, UINT64_MAX
from libc.string cimport memcpy, memset

import os
from enum import IntEnum
from typing import NamedTuple

cimport cython

from vsport.errors import DeviceError, FrontEndError, GuestError

__all__ = ["DeviceQueue", "DirtyLog", "DriverQueue", "Inflight", "Memory", "Region", "Status"]

cdef enum:
    # Flags of a descriptor (R-RING-02), and bit 0 of the flags of both rings (R-RING-20).
    DESC_NEXT = 1
    DESC_WRITE = 2
    DESC_INDIRECT = 4
    NO_NOTIFICATION = 1

    SIZE_MAX_SPLIT = 32768
    TABLE_ENTRIES_MAX = 32768
    REGIONS_MAX = 512
    ALL_INDICES = 65536
    # After this many descriptors and pieces a call comes back and lets others have their turn (R-RING-80).
    WALK_LIMIT = 1 << 18
    # So that no sum of lengths leaves 32 bits, in used.len as in readv().
    BUDGET_MAX = 1 << 30
    PAGE = 4096
    # Where the words of a used ring are.
    USED_FLAGS = 0
    USED_IDX = 2
    USED_RING = 4
    # Of an in-flight region (R-VU-85).
    FLIGHT_VERSION = 1
    FLIGHT_HEAD = 16

class Status(IntEnum):
    """Why a drain or a fill came back."""

    EMPTY = 0
    BLOCKED = 1
    EOF = 2
    MORE = 3
    STOPPED = 4


class Region(NamedTuple):
    """A range of guest memory (R-VU-60)."""

    gpa: int
    size: int
    front_end_addr: int
    buffer: object
    offset: int


cdef tuple STATUSES = tuple(Status)

# More than a table of every kind, full of the longest buffers, can name.
cdef uint64_t CHAIN_BYTES_MAX = <uint64_t>1 << 48

# -- faults of the driver ----------------------------------------------------------------------------------------------

cdef enum:
    NO_FAULT
    AVAIL_AHEAD
    AVAIL_BACKWARDS
    HEAD_RANGE
    NEXT_RANGE
    TABLE_NEXT_RANGE
    CHAIN_LOOP
    TABLE_LOOP
    READABLE_AFTER_WRITABLE
    INDIRECT_NOT_NEGOTIATED
    INDIRECT_NESTED
    INDIRECT_WITH_NEXT
    TABLE_LENGTH
    TABLE_UNMAPPED
    ADDRESS_OVERFLOW
    UNMAPPED
    HEAD_TWICE
    DESCRIPTOR_SHARED

# code: (rule, what, names of the values)
cdef dict FAULTS = {
    AVAIL_AHEAD: ("R-RING-70", "avail.idx is ahead by more than the queue's size", ("avail_idx", "next_avail", "size")),
    AVAIL_BACKWARDS: ("R-RING-70", "avail.idx moved backwards", ("avail_idx", "seen")),
    HEAD_RANGE: ("R-RING-71", "a chain's head is not in the table", ("head", "size")),
    NEXT_RANGE: ("R-RING-71", "a descriptor's next is not in the table", ("head", "index", "size")),
    TABLE_NEXT_RANGE: ("R-RING-71", "an indirect descriptor's next is not in its table", ("head", "index", "entries")),
    CHAIN_LOOP: ("R-RING-72", "a chain comes back to one of its descriptors", ("head", "index")),
    TABLE_LOOP: ("R-RING-72", "a chain has more descriptors than its indirect table", ("head", "entries")),
    READABLE_AFTER_WRITABLE: ("R-RING-74", "a readable descriptor follows a writable one", ("head", "index")),
    INDIRECT_NOT_NEGOTIATED: ("R-RING-75", "indirect descriptors were not negotiated", ("head", "index")),
    INDIRECT_NESTED: ("R-RING-75", "an indirect table holds an indirect descriptor", ("head", "index")),
    INDIRECT_WITH_NEXT: ("R-RING-75", "a descriptor is indirect and has a next one", ("head", "index")),
    TABLE_LENGTH: (
        "R-RING-75", "an indirect table's length is not 1 to 32768 times 16", ("head", "index", "addr", "len")
    ),
    TABLE_UNMAPPED: ("R-RING-75", "an indirect table is not in guest memory", ("head", "index", "addr", "len")),
    ADDRESS_OVERFLOW: ("R-RING-76", "a buffer reaches beyond 2**64", ("head", "index", "addr", "len")),
    UNMAPPED: ("R-RING-76", "a buffer is not in guest memory", ("head", "index", "addr", "len")),
    HEAD_TWICE: ("R-RING-79", "a head was offered again while in flight", ("head",)),
    DESCRIPTOR_SHARED: ("R-RING-79", "a descriptor belongs to two chains in flight", ("head", "index")),
}


cdef bint fail(Ring *r, int code, uint64_t a, uint64_t b, uint64_t c, uint64_t d) noexcept nogil:
    """Notes what the driver did; always False, so that it can be returned as "not well"."""
    r.fault.code = code
    r.fault.values[:] = [a, b, c, d]
    return False


# -- guest memory ------------------------------------------------------------------------------------------------------

cdef int find_range(GuestMemory *m, uint64_t gpa) noexcept nogil:
    """The number of the range that holds ``gpa``, or -1."""
    cdef int low = 0, high = m.count, middle
    while low < high:
        middle = (low + high) // 2
        if m.ranges[middle].gpa > gpa:
            high = middle
        elif gpa - m.ranges[middle].gpa >= m.ranges[middle].size:
            low = middle + 1
        else:
            return middle
    return -1


cdef inline uint8_t *locate(GuestMemory *m, int *hint, uint64_t gpa, uint64_t *room) noexcept nogil:
    """Where ``gpa`` is on the host and how many bytes follow there, or NULL. ``hint`` is the range to try first."""
    cdef Range *g = &m.ranges[hint[0]]
    cdef int found
    if gpa - g.gpa >= g.size:
        found = find_range(m, gpa)
        if found < 0:
            return NULL
        hint[0] = found
        g = &m.ranges[found]
    room[0] = g.size - (gpa - g.gpa)
    return g.host + (gpa - g.gpa)


cdef bint covers(GuestMemory *m, int *hint, uint64_t gpa, uint64_t size) noexcept nogil:
    """Whether all of it is guest memory; it may span adjacent regions (R-RING-76)."""
    cdef uint64_t room
    if size and gpa + (size - 1) < gpa:
        return False
    while size:
        if locate(m, hint, gpa, &room) == NULL:
            return False
        room = min(room, size)
        gpa += room
        size -= room
    return True


cdef void copy_covered(
    GuestMemory *m, int *hint, uint64_t gpa, void *data, uint64_t size, bint into_guest
) noexcept nogil:
    """Copies between ``data`` and guest memory that covers() has confirmed."""
    cdef uint8_t *local = <uint8_t *>data
    cdef uint8_t *guest
    cdef uint64_t room = 0
    while size:
        guest = locate(m, hint, gpa, &room)
        room = min(room, size)
        if into_guest:
            memcpy(guest, local, room)
        else:
            memcpy(local, guest, room)
        gpa += room
        local += room
        size -= room


# -- the dirty log (R-VU-80, R-VU-81) ----------------------------------------------------------------------------------

cdef void mark(PageLog *log, uint64_t gpa, uint64_t size) noexcept nogil:
    """Marks the pages of ``size`` bytes that have just been written; pages that the log has no bit for are left out."""
    cdef uint64_t page = gpa // PAGE, last, end, stop
    if size == 0:
        return
    last = gpa + (size - 1)
    end = min((last if last >= gpa else UINT64_MAX) // PAGE + 1, 8 * log.size)
    while page < end:
        stop = min(end, (page | 7) + 1)
        mark8(log.bits + page // 8, <uint8_t>((0xFF >> (8 - (stop - page))) << (page & 7)))
        page = stop


cdef void mark_pieces(PageLog *log, Batch *b, uint64_t size) noexcept nogil:
    """Marks the first ``size`` bytes of the batch."""
    cdef uint64_t length
    cdef int i = 0
    while size:
        length = min(size, <uint64_t>b.piece[i].iov_len)
        mark(log, b.gpa[i], length)
        size -= length
        i += 1


cdef void mark_used(Ring *r, uint64_t offset, uint64_t size) noexcept nogil:
    """Marks a part of the used ring, which the log has at an address of its own."""
    if r.logs_used and r.used_gpa + offset >= offset:
        mark(r.log, r.used_gpa + offset, size)


cdef void mark_elements(Ring *r) noexcept nogil:
    """Marks the used elements that are shown now for the first time, and the index."""
    cdef uint32_t count = <uint16_t>(r.used_idx - r.shown), first = r.shown & (r.size - 1)
    cdef uint32_t straight = min(count, r.size - first)
    mark_used(r, USED_RING + sizeof(UsedElem) * <size_t>first, sizeof(UsedElem) * <size_t>straight)
    mark_used(r, USED_RING, sizeof(UsedElem) * <size_t>(count - straight))
    mark_used(r, USED_IDX, sizeof(uint16_t))


# -- walking one chain -------------------------------------------------------------------------------------------------

cdef inline void to_host_order(Desc *d) noexcept nogil:
    d.addr = le64toh(d.addr)
    d.len = le32toh(d.len)
    d.flags = le16toh(d.flags)
    d.next = le16toh(d.next)


cdef inline bint claim(Ring *r, Batch *b, uint16_t head, uint32_t index) noexcept nogil:
    """Takes a descriptor of the table for this chain: it is in one chain in flight, and once (R-RING-72, 79)."""
    cdef uint64_t stamp = r.stamps[index]
    r.stamps[index] = r.serial
    if stamp < b.first:
        return True
    if stamp == r.serial:
        return fail(r, CHAIN_LOOP, head, index, 0, 0)
    return fail(r, HEAD_TWICE if index == head else DESCRIPTOR_SHARED, head, index, 0, 0)


cdef bint enter_table(Ring *r, Walk *w, Desc *d) noexcept nogil:
    """Goes on in the indirect table that ``d`` points to; WRITE means nothing there (R-RING-30 to 33, 75)."""
    if not r.indirect:
        return fail(r, INDIRECT_NOT_NEGOTIATED, w.head, w.index, 0, 0)
    if d.flags & DESC_NEXT:
        return fail(r, INDIRECT_WITH_NEXT, w.head, w.index, 0, 0)
    if d.len == 0 or d.len % sizeof(Desc) or d.len // sizeof(Desc) > TABLE_ENTRIES_MAX:
        return fail(r, TABLE_LENGTH, w.head, w.index, d.addr, d.len)
    if not covers(r.mem, &r.table_range, d.addr, d.len):
        return fail(r, TABLE_UNMAPPED, w.head, w.index, d.addr, d.len)
    w.table = d.addr
    w.entries = d.len // sizeof(Desc)
    w.entries_walked = 0
    w.index = 0
    return True


cdef bint take_entry(Ring *r, Walk *w, Desc *d) noexcept nogil:
    """Copies the entry of the indirect table that the walk has come to."""
    if w.index >= w.entries:
        return fail(r, TABLE_NEXT_RANGE, w.head, w.index, w.entries, 0)
    if w.entries_walked == w.entries:
        return fail(r, TABLE_LOOP, w.head, w.entries, 0, 0)
    w.entries_walked += 1
    copy_covered(r.mem, &r.table_range, w.table + sizeof(Desc) * <uint64_t>w.index, d, sizeof(Desc), False)
    to_host_order(d)
    if d.flags & DESC_INDIRECT:
        return fail(r, INDIRECT_NESTED, w.head, w.index, 0, 0)
    return True


cdef inline bint take_descriptor(Ring *r, Batch *b, Walk *w, Desc *d) noexcept nogil:
    """Copies the descriptor that the walk has come to, once, into ``d``; an indirect one leads into its table."""
    b.walked += 1
    if w.entries == 0:
        if w.index >= r.size:
            return fail(r, NEXT_RANGE, w.head, w.index, r.size, 0)
        if not claim(r, b, w.head, w.index):
            return False
        memcpy(d, r.desc + sizeof(Desc) * <size_t>w.index, sizeof(Desc))
        to_host_order(d)
        if not d.flags & DESC_INDIRECT:
            return True
        if not enter_table(r, w, d):
            return False
    return take_entry(r, w, d)


cdef inline void add_piece(
    Batch *b, Chain *c, uint64_t gpa, uint8_t *host, uint64_t size, uint64_t *skip, uint64_t limit
) noexcept nogil:
    """Counts a piece of memory to the chain, and gathers as much of it as there is room for."""
    cdef uint64_t skipped = min(size, skip[0])
    skip[0] -= skipped
    size -= skipped
    c.total += size
    size = min(size, limit - b.bytes)
    if size == 0 or b.pieces == BATCH_PIECES:
        return
    b.piece[b.pieces].iov_base = host + skipped
    b.piece[b.pieces].iov_len = size
    b.gpa[b.pieces] = gpa + skipped
    b.pieces += 1
    b.bytes += size
    c.bytes += size


cdef inline bint add_buffer(
    Ring *r, Batch *b, Chain *c, Walk *w, Desc *d, uint64_t *skip, uint64_t limit
) noexcept nogil:
    """Adds a descriptor's buffer, in pieces if it spans regions (R-RING-76); an empty one is fine (R-RING-73)."""
    cdef uint64_t gpa = d.addr, size = d.len, room
    cdef uint8_t *host
    if size and gpa + (size - 1) < gpa:
        return fail(r, ADDRESS_OVERFLOW, w.head, w.index, d.addr, d.len)
    while size:
        b.walked += 1
        host = locate(r.mem, &r.buffer_range, gpa, &room)
        if host == NULL:
            return fail(r, UNMAPPED, w.head, w.index, d.addr, d.len)
        room = min(room, size)
        add_piece(b, c, gpa, host, room, skip, limit)
        gpa += room
        size -= room
    return True


cdef bint walk(Ring *r, Batch *b, Chain *c, bint writable, uint64_t limit) noexcept nogil:
    """Checks the chain, and adds its buffers of one direction; those of the other are ignored (R-RING-78)."""
    cdef Walk w
    cdef Desc d
    cdef uint64_t skip = r.offset if b.count == 0 else 0
    w.head = c.head
    w.index = c.head
    w.entries = 0
    w.writable_seen = False
    r.serial += 1
    while True:
        if not take_descriptor(r, b, &w, &d):
            return False
        if d.flags & DESC_WRITE:
            w.writable_seen = True
        elif w.writable_seen:
            return fail(r, READABLE_AFTER_WRITABLE, w.head, w.index, 0, 0)
        if ((d.flags & DESC_WRITE) != 0) == writable and not add_buffer(r, b, c, &w, &d, &skip, limit):
            return False
        if not d.flags & DESC_NEXT:
            return True
        w.index = d.next


# -- chains in flight (R-VU-85 to R-VU-88) -----------------------------------------------------------------------------

# Chains are taken and completed in order, so those in flight are always the first ``begun`` ones from next_avail on.

cdef void mark_begun(Ring *r, Batch *b) noexcept nogil:
    """The batch's chains are in flight from now on, if they were not before; their bytes move after this (R-VU-87)."""
    cdef FlightEntry *entry
    cdef int i
    for i in range(r.begun, b.count):
        entry = &r.flight.entry[b.chain[i].head]
        note64(&entry.counter, r.counter)
        note8(&entry.inflight, 1)
        r.counter += 1
    r.begun = max(r.begun, b.count)


cdef void list_done(Ring *r, uint16_t head) noexcept nogil:
    """Adds a completed chain to the batch. Until end_batch() no head comes twice: claim() has seen to that."""
    note16(&r.flight.entry[head].next, look16(&r.flight.last_batch_head))
    note16(&r.flight.last_batch_head, head)
    r.done[r.done_count] = head
    r.done_count += 1
    r.begun -= 1


cdef void end_batch(Ring *r) noexcept nogil:
    """used.idx covers the batch: nothing of it is in flight any more."""
    cdef int i
    for i in range(r.done_count):
        note8(&r.flight.entry[r.done[i]].inflight, 0)
    note16(&r.flight.used_idx, r.used_idx)
    r.done_count = 0


cdef void make_ready(Ring *r) noexcept nogil:
    """Fills a fresh region; the version comes last, so that a region is fresh until all of it is good."""
    cdef FlightTable *table = r.flight
    cdef uint32_t head
    note64(&table.features, 0)
    note16(&table.desc_num, <uint16_t>r.size)
    note16(&table.last_batch_head, 0)
    note16(&table.used_idx, r.used_idx)
    for head in range(r.size):
        note8(&table.entry[head].inflight, 0)
    note16(&table.version, FLIGHT_VERSION)


# What recovery knows of a head.
cdef enum:
    IDLE = 0
    IN_FLIGHT = 1
    COMPLETED = 2
    RESUBMITTED = 3


cdef int contradiction(int queue, str what, dict values) except -1:
    raise FrontEndError("R-VU-88", what, queue=queue, **values)


cdef int check_size(Ring *r, int queue, int desc_num) except -1:
    if desc_num != <int>r.size:
        what = "an in-flight region for a queue of another size"
        raise FrontEndError("R-VU-85", what, queue=queue, desc_num=desc_num, size=r.size)
    return 0


cdef int check_kind(Ring *r, int queue, int version) except -1:
    cdef uint64_t features = look64(&r.flight.features)
    if version != FLIGHT_VERSION or features:
        what = "an in-flight region of an unknown kind"
        raise FrontEndError("R-VU-85", what, queue=queue, version=version, features=hex(features))
    return 0


cdef int read_flags(Ring *r, int queue, uint8_t[::1] heads) except -1:
    cdef uint32_t head
    for head in range(r.size):
        heads[head] = look8(&r.flight.entry[head].inflight)
        if heads[head] > IN_FLIGHT:
            contradiction(queue, "a chain is neither in flight nor not", {"head": head, "inflight": heads[head]})
    return 0


cdef int find_completed(Ring *r, int queue, uint8_t[::1] heads) except -1:
    """The last batch's chains, if the crash came when used.idx covered them and the region did not say so yet."""
    cdef uint16_t count = <uint16_t>(r.used_idx - look16(&r.flight.used_idx))
    cdef uint16_t head = look16(&r.flight.last_batch_head)
    for _ in range(count):
        if head >= r.size:
            contradiction(queue, "a head of the last batch is not in the table", {"head": head, "size": r.size})
        if heads[head] == COMPLETED:
            contradiction(queue, "the last batch comes back to one of its heads", {"head": head, "count": count})
        heads[head] = COMPLETED
        head = look16(&r.flight.entry[head].next)
    return 0


cdef int find_begun(Ring *r, int queue, uint8_t[::1] heads) except -1:
    """The chains in flight: they have to be those that the driver offered next, in the order of their counters."""
    cdef uint16_t head, offered = <uint16_t>(load16_acquire(r.avail + 2) - r.used_idx)
    cdef uint64_t counter
    cdef uint32_t i, count = 0
    for i in range(r.size):
        count += heads[i] == IN_FLIGHT
    if count > offered:
        contradiction(queue, "more chains are in flight than are offered", {"in_flight": count, "offered": offered})
    for i in range(count):
        head = load16(r.avail + 4 + 2 * <size_t>((r.used_idx + i) & (r.size - 1)))
        if head >= r.size or heads[head] != IN_FLIGHT:
            contradiction(queue, "the chains in flight are not those that come next", {"head": head, "place": i})
        heads[head] = RESUBMITTED
        counter = look64(&r.flight.entry[head].counter)
        if counter < r.counter or counter == UINT64_MAX:
            contradiction(queue, "chains in flight are in a wrong order", {"head": head, "counter": counter})
        r.counter = counter + 1
    r.begun = count
    return 0


cdef void finish_batch(Ring *r, uint8_t[::1] heads) noexcept:
    """What the crash has kept end_batch() from."""
    cdef uint32_t head
    for head in range(r.size):
        if heads[head] == COMPLETED:
            note8(&r.flight.entry[head].inflight, 0)
    note16(&r.flight.used_idx, r.used_idx)


cdef bint recover(Ring *r, int queue) except -1:
    """Reads what is in flight; False if the region is fresh. A region that contradicts the rings is left as it is.

    There is nothing to resubmit: the chains in flight are those from used.idx on, and that is where the queue goes on.
    """
    cdef uint16_t version = look16(&r.flight.version)
    r.begun = 0
    r.counter = 0
    if version == 0:
        make_ready(r)
        return False
    check_kind(r, queue, version)
    check_size(r, queue, look16(&r.flight.desc_num))
    heads = bytearray(r.size)
    read_flags(r, queue, heads)
    find_completed(r, queue, heads)
    find_begun(r, queue, heads)
    finish_batch(r, heads)
    return True


# -- gathering chains --------------------------------------------------------------------------------------------------

cdef bint look(Ring *r, uint32_t *pending) noexcept nogil:
    """Reads how many chains are offered and not completed (R-RING-17, 70)."""
    cdef uint16_t avail_idx = load16_acquire(r.avail + 2)
    cdef uint16_t ahead = avail_idx - r.next_avail
    if ahead > r.size:
        return fail(r, AVAIL_AHEAD, avail_idx, r.next_avail, r.size, 0)
    if ahead < r.pending_seen:
        return fail(r, AVAIL_BACKWARDS, avail_idx, <uint16_t>(r.next_avail + r.pending_seen), 0, 0)
    r.pending_seen = ahead
    pending[0] = ahead
    return True


cdef bint add_chain(Ring *r, Batch *b, uint16_t index, bint writable, uint64_t limit) noexcept nogil:
    """Adds the chain at ``index`` of the available ring; a broken one leaves no trace in the batch."""
    cdef Chain *c = &b.chain[b.count]
    cdef uint64_t bytes = b.bytes
    cdef int pieces = b.pieces
    c.head = load16(r.avail + 4 + 2 * <size_t>(index & (r.size - 1)))
    c.bytes = 0
    c.total = 0
    if c.head >= r.size:
        return fail(r, HEAD_RANGE, c.head, r.size, 0, 0)
    if not walk(r, b, c, writable, limit):
        b.bytes = bytes
        b.pieces = pieces
        return False
    b.count += 1
    return True


cdef inline void begin(Ring *r, Batch *b) noexcept nogil:
    """Nothing is in flight: all that was gathered before has been given back to the driver."""
    b.first = r.serial + 1


cdef int gather(Ring *r, Batch *b, bint writable, uint64_t enough, uint64_t limit, uint32_t most) noexcept nogil:
    """Fills the batch with the chains that are offered next, and says how many there are.

    No chain is added after ``most`` of them, ``enough`` bytes, or one that did not fit in ``limit`` bytes. After a
    fault, which is left in r.fault, what was gathered before it is good; but nothing is when memory was lost on the way
    (R-RING-82).
    """
    cdef uint32_t pending, i
    cdef Chain *c
    b.count = 0
    b.pieces = 0
    b.bytes = 0
    r.fault.code = NO_FAULT
    if not look(r, &pending):
        return 0
    for i in range(min(pending, most)):
        if not add_chain(r, b, <uint16_t>(r.next_avail + i), writable, limit):
            break
        c = &b.chain[b.count - 1]
        if b.bytes >= enough or c.bytes < c.total or b.pieces == BATCH_PIECES or b.walked > WALK_LIMIT:
            break
    if flag_get(&r.mem.lost):
        b.count = 0
    if r.flight != NULL:
        mark_begun(r, b)
    return b.count


# -- completing chains -------------------------------------------------------------------------------------------------

cdef inline void complete(Ring *r, uint16_t head, uint32_t written) noexcept nogil:
    """Puts the chain at next_avail into the used ring (R-RING-10 to 12); publish() shows it."""
    cdef UsedElem e
    e.id = htole32(head)
    e.len = htole32(written)
    memcpy(r.used + USED_RING + sizeof(UsedElem) * <size_t>(r.used_idx & (r.size - 1)), &e, sizeof(UsedElem))
    r.used_idx += 1
    r.next_avail += 1
    r.pending_seen -= 1
    r.offset = 0
    r.chains += 1
    r.unsignalled = min(r.unsignalled + 1, <uint32_t>ALL_INDICES)
    if r.flight != NULL:
        list_done(r, head)


cdef inline void publish(Ring *r) noexcept nogil:
    """The elements come before the index that covers them (R-RING-17). Nothing is written if nothing is new."""
    if r.used_idx == r.shown:
        return
    store16_release(r.used + USED_IDX, r.used_idx)
    if r.flight != NULL:
        end_batch(r)
    if r.log != NULL:
        mark_elements(r)
    r.shown = r.used_idx


cdef void settle_readable(Ring *r, Batch *b, uint64_t moved) noexcept nogil:
    """Completes the chains of which all bytes are among the ``moved`` ones, and remembers a half-consumed one."""
    cdef Chain *c
    cdef int i
    r.bytes_moved += moved
    for i in range(b.count):
        c = &b.chain[i]
        if moved < c.total:
            r.offset += moved
            break
        moved -= c.total
        complete(r, c.head, 0)                      # R-RING-11
    publish(r)


cdef void settle_writable(Ring *r, Batch *b, uint64_t moved) noexcept nogil:
    """Completes the chains that got one of the ``moved`` bytes; the others stay with the device (R-CON-42)."""
    cdef Chain *c
    cdef uint64_t written
    cdef int i
    if r.log != NULL:
        mark_pieces(r.log, b, moved)
    r.bytes_moved += moved
    for i in range(b.count):
        c = &b.chain[i]
        if moved == 0 and c.bytes:
            break
        written = min(moved, c.bytes)
        moved -= written
        complete(r, c.head, <uint32_t>written)
    publish(r)


# -- the device's operations -------------------------------------------------------------------------------------------

cdef int nothing_left(Ring *r) noexcept nogil:
    return FAULTY if r.fault.code else EMPTY


cdef int why_failed(Ring *r, int error) noexcept nogil:
    """What the failure of readv() or writev() means."""
    if error == EAGAIN:
        return BLOCKED
    if error == EINTR:
        return INTERRUPTED
    if error == EFAULT:                             # what would be SIGBUS in this process (R-RING-82)
        flag_set(&r.mem.lost)
        return FAULTY
    r.error = error
    return FAILED


cdef int drop_front(iovec *piece, int count, uint64_t size) noexcept nogil:
    """Takes ``size`` bytes off the front of the pieces; says how many pieces are used up."""
    cdef int used = 0
    while used < count and size >= piece[used].iov_len:
        size -= piece[used].iov_len
        used += 1
    if used < count:
        piece[used].iov_base = <uint8_t *>piece[used].iov_base + size
        piece[used].iov_len -= size
    return used


cdef int keep_front(iovec *piece, int count, uint64_t size) noexcept nogil:
    """Keeps the first ``size`` bytes of the pieces; says how many pieces are left."""
    cdef int kept = 0
    while kept < count and size > 0:
        piece[kept].iov_len = min(<uint64_t>piece[kept].iov_len, size)
        size -= piece[kept].iov_len
        kept += 1
    return kept


cdef void write_log(int fd, Batch *b, uint64_t size) noexcept nogil:
    """Writes the first ``size`` bytes of the batch; a log that fails is not the port's concern. Uses up the pieces."""
    cdef iovec *piece = b.piece
    cdef int used, count = keep_front(piece, b.pieces, size)
    cdef ssize_t written
    while count:
        written = writev(fd, piece, count)
        if written < 0 and errno == EINTR:
            continue
        if written <= 0:
            return
        used = drop_front(piece, count, written)
        piece += used
        count -= used


cdef int ring_drain(Ring *r, int fd, int log_fd, uint64_t *budget) noexcept nogil:
    cdef Batch b
    cdef ssize_t n
    cdef uint64_t moved
    b.walked = 0
    while True:
        begin(r, &b)
        if not gather(r, &b, False, budget[0], budget[0], BATCH_CHAINS):
            return nothing_left(r)
        n = writev(fd, b.piece, b.pieces) if b.bytes else 0
        moved = n if n > 0 else 0
        if moved and log_fd >= 0:
            write_log(log_fd, &b, moved)
        settle_readable(r, &b, moved)
        budget[0] -= moved
        if n < 0:
            return why_failed(r, errno)
        if moved == b.bytes and r.fault.code:
            return FAULTY
        if budget[0] == 0 or b.walked > WALK_LIMIT:
            return MORE


cdef int ring_fill(Ring *r, int fd, uint64_t *budget) noexcept nogil:
    """Offers about as many bytes as came last time, and four times as many as long as all of them are taken."""
    cdef Batch b
    cdef ssize_t n
    b.walked = 0
    while True:
        begin(r, &b)
        if not gather(r, &b, True, min(r.fill_want, budget[0]), budget[0], BATCH_CHAINS):
            return nothing_left(r)
        n = readv(fd, b.piece, b.pieces) if b.bytes else 0
        if n < 0:
            return why_failed(r, errno)
        if n == 0 and b.bytes:
            return END_OF_FILE
        settle_writable(r, &b, n)
        budget[0] -= n
        if <uint64_t>n < b.bytes:
            r.fill_want = n
        elif r.fault.code:
            return FAULTY
        else:
            r.fill_want = min(4 * max(b.bytes, r.fill_want), <uint64_t>BUDGET_MAX)
        if budget[0] == 0 or b.walked > WALK_LIMIT:
            return MORE


cdef void scatter(Batch *b, const uint8_t *data) noexcept nogil:
    """Copies ``data`` into the batch's pieces."""
    cdef int i
    for i in range(b.pieces):
        memcpy(b.piece[i].iov_base, data, b.piece[i].iov_len)
        data += b.piece[i].iov_len


cdef uint64_t ring_fill_from(Ring *r, const uint8_t *data, uint64_t size) noexcept nogil:
    cdef Batch b
    cdef uint64_t left = size, limit
    b.walked = 0
    while left and b.walked <= WALK_LIMIT:
        limit = min(left, <uint64_t>BUDGET_MAX)
        begin(r, &b)
        if not gather(r, &b, True, limit, limit, BATCH_CHAINS):
            break
        scatter(&b, data)
        settle_writable(r, &b, b.bytes)
        data += b.bytes
        left -= b.bytes
        if r.fault.code:
            break
    return size - left


cdef bint ring_push(Ring *r, const uint8_t *data, uint64_t size) noexcept nogil:
    cdef Batch b
    cdef bint fits = False
    b.walked = 0
    begin(r, &b)
    while not fits and b.walked <= WALK_LIMIT and gather(r, &b, True, 1, size, 1):
        fits = b.bytes == size
        if fits:
            scatter(&b, data)
            if r.log != NULL:
                mark_pieces(r.log, &b, size)
            r.bytes_moved += size
        complete(r, b.chain[0].head, <uint32_t>size if fits else 0)
    publish(r)
    return fits


cdef uint64_t return_next(Ring *r, Batch *b) noexcept nogil:
    """Completes the next chain unread, not yet published; says how many readable bytes it still had."""
    r.bytes_discarded += b.chain[0].total
    complete(r, b.chain[0].head, 0)
    return b.chain[0].total


cdef uint64_t ring_discard(Ring *r) noexcept nogil:
    cdef Batch b
    cdef uint64_t dropped = 0
    b.walked = 0
    begin(r, &b)
    while b.walked <= WALK_LIMIT and gather(r, &b, False, 1, 0, 1):
        dropped += return_next(r, &b)
    publish(r)
    return dropped


cdef uint64_t ring_return_partial(Ring *r) noexcept nogil:
    cdef Batch b
    cdef uint64_t dropped = 0
    b.walked = 0
    begin(r, &b)
    if r.offset and gather(r, &b, False, 1, 0, 1):
        dropped = return_next(r, &b)
        publish(r)
    return dropped


# -- notifications -----------------------------------------------------------------------------------------------------

cdef inline uint8_t *used_event(Ring *r) noexcept nogil:
    return r.avail + 4 + 2 * <size_t>r.size


cdef inline size_t avail_event(Ring *r) noexcept nogil:
    """Where it is in the used ring."""
    return USED_RING + sizeof(UsedElem) * <size_t>r.size


cdef inline bint passed(uint16_t event, uint16_t new, uint32_t count) noexcept nogil:
    """Whether the entry ``event`` is among the last ``count`` ones before ``new`` (R-RING-21)."""
    return count >= ALL_INDICES or <uint16_t>(new - event - 1) < count


cdef void tell_driver(Ring *r, size_t where, uint16_t value) noexcept nogil:
    """Writes one of the two words of the used ring that say when to kick."""
    store16(r.used + where, value)
    if r.log != NULL:
        mark_used(r, where, sizeof(uint16_t))


cdef void ring_kicks_off(Ring *r) noexcept nogil:
    """With event indices there is nothing to do: the driver kicks once, when it passes what ask_for_kick() wrote."""
    if not r.event_idx:
        tell_driver(r, USED_FLAGS, NO_NOTIFICATION)


cdef bint ring_kicks_on(Ring *r) noexcept nogil:
    """Asks for a kick; True if there is a chain already (R-RING-18)."""
    ask_for_kick(r)
    full_fence()
    return ring_offers(r)


cdef bint ring_offers(Ring *r) noexcept nogil:
    """Whether the driver has offered a chain."""
    return load16_acquire(r.avail + 2) != r.next_avail


cdef void ask_for_kick(Ring *r) noexcept nogil:
    """A kick for the next chain that the driver adds to those which it has shown by now."""
    if r.event_idx:
        tell_driver(r, avail_event(r), load16(r.avail + 2))
    else:
        tell_driver(r, USED_FLAGS, 0)


cdef bint call_wanted(Ring *r) noexcept nogil:
    """Whether the driver wants an interrupt for what was completed since the last one (R-RING-20 to 23)."""
    cdef bint wanted
    if r.unsignalled == 0:
        return False
    full_fence()                                    # used.idx is out before the driver's wish is read
    if not r.event_idx:
        wanted = not load16(r.avail) & NO_NOTIFICATION
    else:
        wanted = r.signal_next or passed(load16(used_event(r)), r.used_idx, r.unsignalled)
    r.unsignalled = 0
    r.signal_next = False
    return wanted


cdef bint ring_notify(Ring *r) noexcept nogil:
    """Interrupts the driver if it wants that; True if there is no descriptor for it, and the caller has to."""
    if flag_get(&r.mem.lost) or not call_wanted(r):
        return False
    r.calls += 1
    if r.call_fd < 0:
        return True
    send_call(r)
    return False


cdef void send_call(Ring *r) noexcept nogil:
    """Adds 1 to an eventfd, or writes the same 8 bytes to whatever it is. A full one has a call pending already."""
    cdef uint64_t one = 1
    if r.call_is_socket:
        if send(r.call_fd, &one, sizeof(one), MSG_DONTWAIT | MSG_NOSIGNAL) >= 0 or errno != ENOTSOCK:
            return
        r.call_is_socket = False
    while write(r.call_fd, &one, sizeof(one)) < 0 and errno == EINTR:
        pass


# -- starting ----------------------------------------------------------------------------------------------------------

cdef void ring_start(Ring *r, uint16_t base, bint reset) noexcept nogil:
    """The indices, and everything that is only valid for one run of the queue; used_idx is known."""
    if reset or r.next_avail != base:
        r.offset = 0
    r.runs += 1
    r.next_avail = base
    r.shown = r.used_idx
    r.done_count = 0
    r.pending_seen = 0
    r.buffer_range = r.table_range = 0
    r.fill_want = 1
    r.fault.code = NO_FAULT
    # A driver that is resumed may have missed its last call: it gets one more (R-RING-23).
    r.unsignalled = 0 if reset and r.used_idx == 0 else 1
    r.signal_next = True
    tell_driver(r, USED_FLAGS, 0)                   # kicks are on, whatever was there before (R-RING-21)
    ask_for_kick(r)


# -- the classes -------------------------------------------------------------------------------------------------------

def _sorted_regions(regions):
    """The regions in the order of their addresses, if they are sound (R-VU-62)."""
    if len(regions) > REGIONS_MAX:
        raise FrontEndError("R-VU-62", "too many memory regions", regions=len(regions))
    for region in regions:
        _check_region(region)
    for field in ("front_end_addr", "gpa"):
        ordered = sorted(regions, key=lambda region: getattr(region, field))
        for low, high in zip(ordered, ordered[1:]):
            if getattr(low, field) + low.size > getattr(high, field):
                raise FrontEndError("R-VU-62", "memory regions overlap", **{field: hex(getattr(high, field))})
    return ordered


def _check_region(region):
    where = {"gpa": hex(region.gpa), "size": region.size}
    if region.size <= 0:
        raise FrontEndError("R-VU-62", "a memory region is empty", **where)
    if min(region.gpa, region.front_end_addr, region.offset) < 0:
        raise FrontEndError("R-VU-62", "a memory region has a negative address", **where)
    if max(region.gpa, region.front_end_addr) + region.size > 1 << 64:
        raise FrontEndError("R-VU-62", "a memory region reaches beyond 2**64", **where)
    if region.offset + region.size > memoryview(region.buffer).nbytes:
        raise FrontEndError("R-VU-62", "a memory region reaches beyond its file", **where)


cdef object _shared_view(object buffer, object offset, object size):
    """``size`` bytes of writable memory that another program has, too; the view holds it."""
    view = PyMemoryView_FromObject(buffer).cast("B")[offset:offset + size]
    if view.readonly:
        raise BufferError("memory that is shared has to be writable")
    return view


cdef vs_guard *_guard(object view, int *lost) except NULL:
    """Guards what the view is on; ``lost`` is set when its file proves to be truncated (R-RING-82)."""
    cdef Py_buffer *memory = PyMemoryView_GET_BUFFER(view)
    cdef vs_guard *guard = guard_add(memory.buf, memory.len, lost)
    if guard == NULL:
        raise OSError(errno, "cannot guard shared memory against truncation")
    return guard


@cython.final
@cython.no_gc_clear                                 # c.ranges point into what the views hold
cdef class Memory:
    """Guest memory: an immutable table of regions."""

    def __cinit__(self, regions=()):
        self.regions = tuple(regions)
        ordered = _sorted_regions(self.regions)
        self.c.ranges = <Range *>PyMem_Calloc(max(len(ordered), 1), sizeof(Range))
        self.guards = <vs_guard **>PyMem_Calloc(max(len(ordered), 1), sizeof(vs_guard *))
        if self.c.ranges == NULL or self.guards == NULL:
            raise MemoryError
        self.views = tuple(self.attach(region) for region in ordered)

    cdef object attach(self, object region):
        """Adds a region to the table; the view that comes back holds its memory."""
        cdef Range *g = &self.c.ranges[self.c.count]
        view = _shared_view(region.buffer, region.offset, region.size)
        g.gpa = region.gpa
        g.size = region.size
        g.front_end_addr = region.front_end_addr
        g.host = <uint8_t *>PyMemoryView_GET_BUFFER(view).buf
        self.guards[self.c.count] = _guard(view, &self.c.lost)
        self.c.count += 1
        return view.toreadonly()

    def __dealloc__(self):
        cdef int i
        for i in range(self.c.count):
            guard_remove(self.guards[i])
        PyMem_Free(self.guards)
        PyMem_Free(self.c.ranges)

    @property
    def lost(self):
        """True once the file behind a region proved to be truncated (R-RING-82): its pages now read as zeros."""
        return flag_get(&self.c.lost) != 0

    cdef int check(self, object gpa, object size) except -1:
        cdef int hint = 0
        if not 0 <= gpa < 1 << 64 or not covers(&self.c, &hint, gpa, size):
            raise IndexError(f"{size} bytes at {gpa:#x} are not all guest memory")
        return 0

    cdef object view_of(self, void *host, size_t size):
        """A read-only memoryview of gathered guest memory; it holds the mapping."""
        cdef size_t start
        cdef int i
        for i in range(self.c.count):
            start = <uint8_t *>host - self.c.ranges[i].host
            if start < self.c.ranges[i].size and size <= self.c.ranges[i].size - start:
                return self.views[i][start:start + size]
        raise AssertionError("a gathered piece is in no region")

    def read(self, gpa: int, size: int) -> bytes:
        """Copies out guest-physical memory; raises IndexError if a part of it is in no region."""
        cdef int hint = 0
        self.check(gpa, size)
        data = PyBytes_FromStringAndSize(NULL, size)
        copy_covered(&self.c, &hint, gpa, PyBytes_AS_STRING(data), size, False)
        return data

    def write(self, gpa: int, data) -> None:
        """Copies into guest-physical memory; raises IndexError, and then nothing is written."""
        cdef int hint = 0
        view = memoryview(data)
        if not view.c_contiguous:
            raise BufferError("the data has to be contiguous")
        self.check(gpa, view.nbytes)
        copy_covered(&self.c, &hint, gpa, PyMemoryView_GET_BUFFER(view).buf, view.nbytes, True)


def _check_inside(rule, what, buffer, offset, size):
    if offset < 0 or size < 0 or offset + size > memoryview(buffer).nbytes:
        raise FrontEndError(rule, f"{what} reaches beyond its file", offset=offset, size=size)


@cython.final
@cython.no_gc_clear                                 # c.bits points into what the view holds
cdef class DirtyLog:
    """Which pages of guest memory the device has written to: a bit for each (R-VU-80)."""

    def __cinit__(self, buffer, offset: int, size: int):
        _check_inside("R-VU-81", "a dirty log", buffer, offset, size)
        self.view = _shared_view(buffer, offset, size)
        self.c.bits = <uint8_t *>PyMemoryView_GET_BUFFER(self.view).buf
        self.c.size = size
        self.guard = _guard(self.view, &self.c.lost)

    def __dealloc__(self):
        if self.guard != NULL:
            guard_remove(self.guard)

    @property
    def size(self):
        return self.c.size

    def mark(self, uint64_t gpa, uint64_t length) -> None:
        """Marks the pages of a range that was written to; what the log has no bits for is left out (R-VU-81)."""
        mark(&self.c, gpa, length)

    def take(self) -> bytes:
        """The marks, which are taken away: a page written to after this is marked again."""
        cdef uint64_t i
        marks = PyBytes_FromStringAndSize(NULL, self.c.size)
        cdef uint8_t *out = <uint8_t *>PyBytes_AS_STRING(marks)
        with nogil:
            for i in range(self.c.size):
                out[i] = take8(self.c.bits + i)
        return marks


@cython.final
@cython.no_gc_clear                                 # c points into what the view holds
cdef class Inflight:
    """What a front end keeps of one queue for the back end after a crash: which chains are in flight (R-VU-85)."""

    def __cinit__(self, buffer, offset: int, desc_num: int):
        if not 0 < desc_num <= SIZE_MAX_SPLIT:
            raise FrontEndError("R-VU-85", "an in-flight region has 1 to 32768 entries", desc_num=desc_num)
        _check_inside("R-VU-86", "an in-flight region", buffer, offset, self.footprint(desc_num))
        self.view = _shared_view(buffer, offset, self.footprint(desc_num))
        self.c = <FlightTable *>PyMemoryView_GET_BUFFER(self.view).buf
        if <size_t>self.c % sizeof(uint64_t):
            raise FrontEndError("R-VU-86", "an in-flight region is not aligned to 8", offset=offset)
        self.desc_num = desc_num
        self.guard = _guard(self.view, &self.lost)

    def __dealloc__(self):
        if self.guard != NULL:
            guard_remove(self.guard)

    @staticmethod
    def footprint(desc_num: int) -> int:
        """Bytes of a region, and from one queue's to the next one's (R-VU-86)."""
        return (FLIGHT_HEAD + sizeof(FlightEntry) * <size_t>desc_num + 63) & ~<size_t>63

    @property
    def fresh(self):
        return look16(&self.c.version) == 0


def _check_setup(index, memory, size, base):
    """What a front end can get wrong about a queue besides its addresses."""
    if not 0 < size <= SIZE_MAX_SPLIT or size & (size - 1):
        raise FrontEndError("R-RING-01", "a queue's size is a power of two up to 32768", queue=index, size=size)
    if not 0 <= base < ALL_INDICES:
        raise FrontEndError("R-RING-04", "an available index has 16 bits", queue=index, base=base)
    if memory.lost:
        raise FrontEndError("R-RING-82", "the file behind guest memory was truncated", queue=index)


cdef uint8_t *_ring_part(Memory memory, int index, str name, uint64_t address, uint64_t size, int align) except NULL:
    """Where a part of a ring lies on the host: whole, in one region, aligned (R-RING-09, R-RING-77)."""
    cdef Range *g
    cdef uint64_t start
    cdef int i
    for i in range(memory.c.count):
        g = &memory.c.ranges[i]
        start = address - g.front_end_addr
        if start < g.size:
            break
    else:
        raise FrontEndError("R-RING-77", f"the {name} is in no memory region", queue=index, address=hex(address))
    if g.size - start < size:
        raise FrontEndError("R-RING-77", f"the {name} reaches beyond its region", queue=index, address=hex(address))
    if address % align or <size_t>(g.host + start) % align:
        raise FrontEndError("R-RING-09", f"the {name} is not aligned to {align}", queue=index, address=hex(address))
    return g.host + start


@cython.final
@cython.no_gc_clear                                 # r points into memory
cdef class DeviceQueue:
    """The device's side of one split virtqueue."""

    def __cinit__(self, index: int):
        self.index = index
        self.r.call_fd = -1

    def __dealloc__(self):
        PyMem_Free(self.r.stamps)
        PyMem_Free(self.r.done)

    # Each operation that walks the ring is enclosed in enter() and ``busy = False``: a sink may call anything, and
    # other threads run while the interpreter lock is released.

    cdef int idle(self) except -1:
        if self.busy or (self.poller != NULL and self.poller[0]):
            raise RuntimeError(f"queue {self.index} is busy")
        return 0

    cdef bint enter(self) except -1:
        """Begins an operation; False if the queue is not running."""
        self.idle()
        self.busy = self.r.running
        return self.busy

    cdef int check(self) except -1:
        """Raises what the operation ran into, and then the queue stands still."""
        lost = self.lost_file()
        if lost:
            self.fault = FrontEndError("R-RING-82", f"the file behind {lost} was truncated", queue=self.index)
        elif self.r.fault.code:
            rule, what, names = FAULTS[self.r.fault.code]
            values = {name: self.r.fault.values[i] for i, name in enumerate(names)}
            self.fault = GuestError(rule, what, queue=self.index, **values)
        else:
            return 0
        self.r.running = False
        raise self.fault

    cdef str lost_file(self):
        """What a front end has truncated of all that the queue works on; None: nothing (R-RING-82)."""
        if flag_get(&self.memory.c.lost):
            return "guest memory"
        if self.log is not None and flag_get(&self.log.c.lost):
            return "the dirty log"
        if self._inflight is not None and flag_get(&self._inflight.lost):
            return "the in-flight region"
        return None

    cdef object status(self, int code):
        """The Status for what a core function returned, or its exception."""
        if code == FAULTY or self.lost_file():
            self.check()
        if code == FAILED:
            raise OSError(self.r.error, os.strerror(self.r.error))
        return STATUSES[code]

    @property
    def call_fd(self):
        """Descriptor that interrupts the driver: 8 bytes are written to it; -1: none (R-VU-98)."""
        return self.r.call_fd

    @call_fd.setter
    def call_fd(self, int fd):
        self.idle()
        self.r.call_fd = fd
        self.r.call_is_socket = True                # until send() says otherwise
        # The last call may have gone to a descriptor that nobody listens to: it is repeated (R-RING-23, R-VU-55).
        self.r.signal_next = True
        self.r.unsignalled = max(self.r.unsignalled, 1)

    @property
    def inflight(self):
        """Where the chains in flight are kept; None: nowhere. Set while the queue is stopped (R-VU-85)."""
        return self._inflight

    @inflight.setter
    def inflight(self, Inflight region):
        self.idle()
        if self.r.running:
            raise ValueError(f"queue {self.index} is running")
        self.r.flight = NULL
        self._inflight = region

    @property
    def running(self):
        return self.r.running != 0

    @property
    def size(self):
        return self.r.size

    @property
    def next_avail(self):
        return self.r.next_avail

    @property
    def used_idx(self):
        return self.r.used_idx

    @property
    def offset(self):
        return self.r.offset

    @property
    def bytes_moved(self):
        """Bytes moved between chains and a descriptor, a sink, or the caller, since the queue was made."""
        return self.r.bytes_moved

    @property
    def bytes_discarded(self):
        """Bytes of device-readable chains that were returned to the driver unread by discard() or return_partial()."""
        return self.r.bytes_discarded

    @property
    def chains(self):
        """Chains completed since the queue was made."""
        return self.r.chains

    @property
    def calls(self):
        """Interrupts sent or asked for since the queue was made."""
        return self.r.calls

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
        reset: bool = True,
    ) -> None:
        """Starts on rings at front-end addresses; raises FrontEndError, and then the queue stays stopped."""
        self.stop()
        _check_setup(self.index, memory, size, base)
        desc_host = _ring_part(memory, self.index, "descriptor table", desc, 16 * size, 16)
        avail_host = _ring_part(memory, self.index, "available ring", avail, 6 + 2 * size, 2)
        used_host = _ring_part(memory, self.index, "used ring", used, 6 + 8 * size, 4)
        self.make_tables(size)
        self.memory = memory
        self.r.mem = &memory.c
        self.r.desc, self.r.avail, self.r.used = desc_host, avail_host, used_host
        self.r.size = size
        self.r.event_idx = event_idx
        self.r.indirect = indirect
        self.r.used_idx = load16(used_host + USED_IDX)
        ring_start(&self.r, base if self._inflight is None else self.recover(base), reset)
        self.fault = None
        self.r.running = True
        self.check()

    cdef int make_tables(self, size_t size) except -1:
        PyMem_Free(self.r.stamps)
        PyMem_Free(self.r.done)
        self.r.serial = 0
        self.r.stamps = <uint64_t *>PyMem_Calloc(size, sizeof(uint64_t))
        self.r.done = <uint16_t *>PyMem_Calloc(size if self._inflight is not None else 1, sizeof(uint16_t))
        if self.r.stamps == NULL or self.r.done == NULL:
            raise MemoryError
        return 0

    cdef uint16_t recover(self, uint16_t base) except *:
        """Takes the in-flight region into use; says where to go on."""
        self.r.flight = self._inflight.c
        try:
            check_size(&self.r, self.index, self._inflight.desc_num)
            return self.r.used_idx if recover(&self.r, self.index) else base
        except BaseException:
            self.stop()
            raise

    def stop(self) -> int:
        """Stops the queue and returns the next available index, for GET_VRING_BASE; ``offset`` is kept."""
        self.idle()
        self.r.running = False
        self.r.desc = self.r.avail = self.r.used = NULL
        self.r.flight = NULL
        self.memory = None
        return self.r.next_avail

    def restore(self, next_avail: int, offset: int) -> None:
        """Sets where start(base=next_avail, reset=False) goes on; raises ValueError, and then nothing has changed."""
        self.idle()
        if self.r.running:
            raise ValueError(f"queue {self.index} is running")
        if not 0 <= next_avail < ALL_INDICES:
            raise ValueError(f"an available index has 16 bits: {next_avail}")
        if not 0 <= offset <= CHAIN_BYTES_MAX:
            raise ValueError(f"no chain has so many bytes: {offset}")
        self.r.next_avail = next_avail
        self.r.offset = offset

    def log_to(self, log: DirtyLog | None, used_gpa: int = -1) -> None:
        """From now on marks in ``log`` what is written; the used ring at ``used_gpa``, unless it is -1 (R-VU-80)."""
        self.idle()
        if not -1 <= used_gpa < 1 << 64:
            raise ValueError(f"an address has 64 bits: {used_gpa}")
        self.r.logs_used = used_gpa >= 0
        self.r.used_gpa = max(used_gpa, 0)
        self.r.log = &log.c if log is not None else NULL
        self.log = log

    def forget_partial(self) -> None:
        """Forgets the half-consumed chain's offset (device reset, R-CON-38)."""
        self.idle()
        self.r.offset = 0

    def pending(self) -> int:
        """How many chains are offered and not completed; 0 if not running. Raises GuestError (R-RING-70)."""
        cdef uint32_t count = 0
        if not self.enter():
            return 0
        try:
            self.r.fault.code = NO_FAULT
            look(&self.r, &count)
            self.check()
            return count
        finally:
            self.busy = False

    def drain(self, fd: int, *, log_fd: int = -1, budget: int = BUDGET) -> Status:
        """Writes device-readable bytes to ``fd`` with writev(), straight from guest memory, without the GIL."""
        cdef int out = fd, log = log_fd, code
        cdef uint64_t left = _checked_budget(budget)
        if not self.enter():
            return Status.STOPPED
        try:
            while True:
                with nogil:
                    code = ring_drain(&self.r, out, log, &left)
                if code != INTERRUPTED:
                    return self.status(code)
                PyErr_CheckSignals()
        finally:
            self.busy = False

    def drain_into(self, sink, *, budget: int = BUDGET) -> Status:
        """Offers device-readable bytes, piece by piece, to ``sink``, which returns how many it took (0: blocked)."""
        cdef uint64_t left = _checked_budget(budget)
        if not self.enter():
            return Status.STOPPED
        try:
            return self.status(self.offer_chains(sink, left))
        finally:
            self.busy = False

    cdef int offer_chains(self, object sink, uint64_t budget) except -100:
        cdef Batch b
        cdef uint64_t taken
        b.walked = 0
        while True:
            begin(&self.r, &b)
            if not gather(&self.r, &b, False, 1, budget, BATCH_CHAINS):
                return nothing_left(&self.r)
            taken = 0
            try:
                self.offer_pieces(&b, sink, &taken)
            finally:
                settle_readable(&self.r, &b, taken)
            budget -= taken
            if taken < b.bytes:
                return BLOCKED
            if self.r.fault.code:
                return FAULTY
            if budget == 0 or b.walked > WALK_LIMIT:
                return MORE

    cdef int offer_pieces(self, Batch *b, object sink, uint64_t *taken) except -1:
        """Gives the pieces to the sink until it takes no more; ``taken`` grows on the way, also if it raises."""
        cdef int i
        cdef Py_ssize_t took
        for i in range(b.pieces):
            view = self.memory.view_of(b.piece[i].iov_base, b.piece[i].iov_len)
            while len(view):
                took = sink(view)
                if not 0 <= took <= len(view):
                    raise ValueError(f"the sink took {took} of {len(view)} bytes")
                if took == 0:
                    return 0
                taken[0] += took
                view = view[took:]
        return 0

    def discard(self) -> int:
        """Returns the chains offered by the driver with length 0, and says how many readable bytes were dropped."""
        cdef uint64_t dropped
        if not self.enter():
            return 0
        try:
            with nogil:
                dropped = ring_discard(&self.r)
            self.check()
            return dropped
        finally:
            self.busy = False

    def return_partial(self) -> int:
        """Returns a half-consumed chain to the driver; says how many of its bytes were dropped (R-CON-48)."""
        cdef uint64_t dropped
        if not self.enter():
            return 0
        try:
            self.r.fault.code = NO_FAULT
            dropped = ring_return_partial(&self.r)
            self.check()
            return dropped
        finally:
            self.busy = False

    def fill(self, fd: int, *, budget: int = BUDGET) -> Status:
        """Reads from ``fd`` with readv(), straight into device-writable buffers, without the GIL."""
        cdef int source = fd, code
        cdef uint64_t left = _checked_budget(budget)
        if not self.enter():
            return Status.STOPPED
        try:
            while True:
                with nogil:
                    code = ring_fill(&self.r, source, &left)
                if code != INTERRUPTED:
                    return self.status(code)
                PyErr_CheckSignals()
        finally:
            self.busy = False

    def fill_from(self, data) -> int:
        """Copies ``data`` into as many device-writable buffers as it takes; returns how many bytes found room."""
        cdef const uint8_t[::1] view = memoryview(data).cast("B")
        cdef uint64_t size = view.shape[0], done
        if not self.enter():
            return 0
        try:
            if size == 0:
                return 0
            with nogil:
                done = ring_fill_from(&self.r, &view[0], size)
            self.check()
            return done
        finally:
            self.busy = False

    def push(self, message: bytes) -> bool:
        """Puts one whole message into one device-writable chain; False if there is none (yet)."""
        cdef bint done
        if not self.enter():
            return False
        try:
            done = ring_push(&self.r, <const uint8_t *>PyBytes_AS_STRING(message), len(message))
            self.check()
            return done != 0
        finally:
            self.busy = False

    def pop(self, limit: int = 4096) -> bytes | None:
        """Takes one chain and returns its device-readable bytes, at most ``limit``; None if there is no chain."""
        if not self.enter():
            return None
        try:
            message = self.take_message(limit)
            self.check()
            return message
        finally:
            self.busy = False

    cdef object take_message(self, uint64_t limit):
        """One chain's bytes; a chain of more pieces than a batch has is taken in several passes."""
        cdef Batch b
        cdef int i
        message = bytearray()
        b.walked = 0
        while True:
            begin(&self.r, &b)
            if not gather(&self.r, &b, False, 1, limit - len(message), 1):
                return None
            for i in range(b.pieces):
                message += (<const char *>b.piece[i].iov_base)[:b.piece[i].iov_len]
            if b.bytes == b.chain[0].total or len(message) == <Py_ssize_t>limit:
                break
            self.r.offset += b.bytes
        self.r.bytes_moved += len(message)
        complete(&self.r, b.chain[0].head, 0)
        publish(&self.r)
        return bytes(message)

    def kicks_off(self) -> None:
        """Tells the driver that notifications are not needed; a hint, no more (R-RING-24)."""
        if self.enter():
            ring_kicks_off(&self.r)
            self.busy = False

    def kicks_on(self) -> bool:
        """Asks the driver for a notification at its next chain; True if there is one already (R-RING-18)."""
        if not self.enter():
            return False
        self.busy = False
        return ring_kicks_on(&self.r) != 0

    def notify(self) -> bool:
        """Interrupts the driver if it wants that for the chains completed since the last time (R-RING-20 to 23)."""
        self.idle()
        return self.r.used != NULL and ring_notify(&self.r)


cdef uint64_t _checked_budget(object budget) except 0:
    if budget <= 0:
        raise ValueError("the budget has to be positive")
    return min(budget, BUDGET_MAX)


# -- the driver's side -------------------------------------------------------------------------------------------------

cdef uint8_t *_driver_rings(Memory memory, uint64_t gpa, uint64_t size) except NULL:
    """Where a driver's ring lies on the host."""
    cdef int hint = 0
    cdef uint64_t room = 0
    cdef uint8_t *host = locate(&memory.c, &hint, gpa, &room)
    if host == NULL or room < size:
        raise IndexError(f"{size} bytes at {gpa:#x} are not in one region of guest memory")
    if <size_t>host % 16:
        raise ValueError("the memory of a ring has to be aligned to 16 on the host")
    return host


def _elements(readable, writable):
    """The elements of a chain in their order (R-RING-06), as (gpa, length, flags)."""
    elements = [(gpa, length, 0) for gpa, length in readable]
    elements += [(gpa, length, DESC_WRITE) for gpa, length in writable]
    if not elements:
        raise ValueError("a chain has at least one element")
    return elements


cdef Desc _descriptor(object element, int next_index) except *:
    """A descriptor in the ring's byte order; ``next_index`` below 0: it is the chain's last."""
    cdef Desc d
    cdef uint64_t gpa = element[0]
    cdef uint32_t length = element[1]
    cdef uint16_t flags = element[2]
    d.addr = htole64(gpa)
    d.len = htole32(length)
    d.flags = htole16(flags if next_index < 0 else flags | DESC_NEXT)
    d.next = htole16(0 if next_index < 0 else next_index)
    return d


@cython.final
@cython.no_gc_clear                                 # the host pointers point into memory
cdef class DriverQueue:
    """The driver's side of one split virtqueue, for a simulated guest."""

    def __cinit__(self, memory: Memory, gpa: int, size: int, *, event_idx: bool = False, indirect: bool = False):
        cdef int i
        if not 0 < size <= SIZE_MAX_SPLIT or size & (size - 1):
            raise ValueError("a queue's size is a power of two up to 32768")
        if gpa % PAGE:
            raise ValueError("a queue's address has to be a multiple of 4096")
        self.size = size
        self.event_idx = event_idx
        self.indirect = indirect
        self.desc = gpa
        self.avail = gpa + 16 * size
        self.used = gpa + _used_offset(size)
        self.rebind(memory)
        memset(self.desc_host, 0, self.footprint(size))
        self.slots = <Slot *>PyMem_Calloc(size, sizeof(Slot))
        if self.slots == NULL:
            raise MemoryError
        for i in range(self.size):
            self.slots[i].next = <uint16_t>(i + 1)
        self.free = size
        self.calls_wanted = True

    def __dealloc__(self):
        PyMem_Free(self.slots)

    @staticmethod
    def footprint(size: int) -> int:
        """Bytes of guest memory that a queue of ``size`` takes, rounded up to pages of 4096."""
        return page_up(_used_offset(size) + 6 + 8 * size)

    def rebind(self, memory: Memory) -> None:
        """Goes on with the same state in another memory; raises IndexError, ValueError, and then nothing changes."""
        cdef uint8_t *rings = _driver_rings(memory, self.desc, self.footprint(self.size))
        self.memory = memory
        self.desc_host = rings
        self.avail_host = rings + (self.avail - self.desc)
        self.used_host = rings + (self.used - self.desc)

    def add(self, readable=(), writable=(), *, indirect_table: int = 0) -> int:
        """Puts a chain of (gpa, length) elements into the table and the available ring, not yet published."""
        self.check_whole()
        elements = _elements(readable, writable)
        cdef uint64_t capacity = sum([length for _, length, flags in elements if flags])
        if indirect_table:
            elements = [self.write_table(elements, indirect_table)]
        cdef int count = len(elements)
        if count > self.free:
            raise BufferError(f"{count} descriptors are needed and {self.free} are free")
        cdef uint16_t head = self.free_head
        self.write_chain(elements)
        self.slots[head].count = count
        self.slots[head].capacity = capacity
        store16(self.avail_host + 4 + 2 * <size_t>(<uint16_t>(self.avail_idx + self.added) & (self.size - 1)), head)
        self.free -= count
        self.added += 1
        self.in_flight += 1
        return head

    cdef object write_table(self, list elements, object table):
        """Writes an indirect table; returns the one element that points to it."""
        cdef Desc d
        cdef int i, count = len(elements)
        if not self.indirect:
            raise ValueError("indirect descriptors were not negotiated")
        for i in range(count):
            d = _descriptor(elements[i], i + 1 if i + 1 < count else -1)
            self.memory.write(table + 16 * i, (<const char *>&d)[:sizeof(d)])
        return (table, 16 * count, DESC_INDIRECT)

    cdef int write_chain(self, list elements) except -1:
        """Writes the elements into free descriptors, which it takes from the free list when all are written."""
        cdef Desc d
        cdef int i, count = len(elements)
        cdef uint16_t index = self.free_head
        for i in range(count):
            d = _descriptor(elements[i], self.slots[index].next if i + 1 < count else -1)
            memcpy(self.desc_host + sizeof(Desc) * <size_t>index, &d, sizeof(Desc))
            index = self.slots[index].next
        self.free_head = index
        return 0

    def publish(self) -> bool:
        """Shows the added chains to the device; True if the device wants a notification (R-RING-16)."""
        self.check_whole()
        cdef uint16_t count = self.added
        if count == 0:
            return False
        self.avail_idx += count
        self.added = 0
        store16_release(self.avail_host + 2, self.avail_idx)
        full_fence()
        if self.event_idx:
            return passed(load16(self.used_host + 4 + sizeof(UsedElem) * <size_t>self.size), self.avail_idx, count) != 0
        return not load16(self.used_host) & NO_NOTIFICATION

    def collect(self) -> tuple[int, int] | None:
        """The next used chain as (head, bytes written), or None."""
        cdef UsedElem e
        self.check_whole()
        cdef uint16_t used_idx = load16_acquire(self.used_host + 2)
        if used_idx == self.last_used:
            return None
        memcpy(&e, self.used_host + 4 + sizeof(UsedElem) * <size_t>(self.last_used & (self.size - 1)), sizeof(e))
        e.id = le32toh(e.id)
        e.len = le32toh(e.len)
        self.check_used(<uint16_t>(used_idx - self.last_used), e)
        self.release(<uint16_t>e.id)
        self.last_used += 1
        if self.calls_wanted:
            self.ask_for_call()
        return e.id, e.len

    cdef int check_used(self, uint16_t count, UsedElem e) except -1:
        if count > self.size:
            self.break_down("used.idx is ahead by more than the queue's size", {"count": count, "size": self.size})
        if e.id >= <uint32_t>self.size or self.slots[e.id].count == 0:
            self.break_down("the device returned a chain that it did not have", {"id": e.id})
        if e.len > self.slots[e.id].capacity:
            values = {"id": e.id, "len": e.len, "capacity": self.slots[e.id].capacity}
            self.break_down("the device wrote more than there was room for", values)
        return 0

    cdef int release(self, uint16_t head) except -1:
        """Puts a chain's descriptors back at the front of the free list."""
        cdef uint16_t last = head
        cdef int i
        for i in range(self.slots[head].count - 1):
            last = self.slots[last].next
        self.slots[last].next = self.free_head
        self.free_head = head
        self.free += self.slots[head].count
        self.in_flight -= 1
        self.slots[head].count = 0
        return 0

    cdef int break_down(self, str what, dict context) except -1:
        self.broken = True
        raise DeviceError("R-RING-84", what, **context)

    cdef int check_whole(self) except -1:
        if self.broken:
            raise DeviceError("R-RING-84", "the queue is broken")
        return 0

    cdef int ask_for_call(self) except -1:
        """An interrupt for the next chain; with event indices each one has to be asked for (R-RING-21)."""
        if self.event_idx:
            store16(self.avail_host + 4 + 2 * <size_t>self.size, self.last_used)
            full_fence()
        else:
            store16(self.avail_host, 0)
        return 0

    def calls_off(self) -> None:
        """Tells the device that interrupts are not needed; a hint, no more (R-RING-24)."""
        self.calls_wanted = False
        if self.event_idx:
            store16(self.avail_host + 4 + 2 * <size_t>self.size, <uint16_t>(self.last_used - 1))  # a whole turn away
        else:
            store16(self.avail_host, NO_NOTIFICATION)

    def calls_on(self) -> bool:
        """Asks for an interrupt at the next used chain; True if there is one already (R-RING-18)."""
        self.calls_wanted = True
        self.ask_for_call()
        full_fence()
        return load16(self.used_host + 2) != self.last_used


cdef uint64_t page_up(uint64_t size) noexcept:
    return (size + PAGE - 1) & ~<uint64_t>(PAGE - 1)


cdef uint64_t _used_offset(uint64_t size) noexcept:
    """From a queue's start to its used ring, which begins a page: each is written by one side only (R-VU-80)."""
    return page_up(16 * size + 6 + 2 * size)
