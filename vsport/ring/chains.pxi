# Chains: walked and gathered into a Batch, and settled when their bytes have moved.

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
