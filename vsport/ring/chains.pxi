# Chains: walked and gathered into a Batch, and completed when their bytes have moved.

# -- walking one chain -------------------------------------------------------------------------------------------------

cdef inline void add_piece(
    Batch *b, Chain *c, Walk *w, uint64_t gpa, uint8_t *host, uint64_t size
) noexcept nogil:
    """Counts a piece of memory to the chain, and gathers as much of it as there is room for."""
    cdef uint64_t skipped = min(size, w.skip)
    w.skip -= skipped
    size -= skipped
    c.total += size
    size = min(size, w.limit - b.bytes)
    if size == 0 or b.pieces == BATCH_PIECES:
        return
    b.piece[b.pieces].iov_base = host + skipped
    b.piece[b.pieces].iov_len = size
    b.gpa[b.pieces] = gpa + skipped
    b.pieces += 1
    b.bytes += size
    c.bytes += size


cdef inline bint add_buffer(Ring *r, Batch *b, Chain *c, Walk *w, Desc *d) noexcept nogil:
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
        add_piece(b, c, w, gpa, host, room)
        gpa += room
        size -= room
    return True


cdef inline bint add_descriptor(Ring *r, Batch *b, Chain *c, Walk *w, Desc *d) noexcept nogil:
    """Adds a descriptor of the direction that is gathered; those of the other are only checked (R-RING-74, 78)."""
    cdef bint writable = d.flags & DESC_WRITE
    if writable:
        w.writable_seen = True
    elif w.writable_seen:
        return fail(r, READABLE_AFTER_WRITABLE, w.head, w.index, 0, 0)
    return (writable != 0) != w.writable or add_buffer(r, b, c, w, d)


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
    w.index = 0
    return True


cdef inline void take_entry(Ring *r, Batch *b, Walk *w, Desc *d) noexcept nogil:
    """Copies the entry of the indirect table that the walk has come to, once."""
    b.walked += 1
    copy_covered(r.mem, &r.table_range, w.table + sizeof(Desc) * <uint64_t>w.index, d, sizeof(Desc), False)


# -- gathering chains --------------------------------------------------------------------------------------------------

cdef inline bint look(Ring *r) noexcept nogil:
    """Sees how many chains are offered and not completed: r.pending_seen (R-RING-17, 70)."""
    return look_packed(r) if r.packed else look_split(r)


cdef bint has_chain(Ring *r) noexcept nogil:
    """Whether a chain is offered, without a check of anything."""
    if r.packed:
        return is_available(load16(slot_at(r, r.next_avail) + PACKED_FLAGS), r.next_avail)
    return load16(r.avail + 2) != r.next_avail


cdef bint add_chain(Ring *r, Batch *b, bint writable, uint64_t limit) noexcept nogil:
    """Adds the chain that is offered next, if there is one; a broken one leaves no trace in the batch."""
    cdef Walk w
    cdef Chain *c = &b.chain[b.count]
    cdef uint64_t bytes = b.bytes
    cdef int pieces = b.pieces
    c.bytes = c.total = 0
    w.writable = writable
    w.skip = r.offset if b.count == 0 else 0
    w.limit = limit
    w.writable_seen = False
    if not (take_packed(r, b, c, &w) if r.packed else take_split(r, b, c, &w)):
        b.bytes = bytes
        b.pieces = pieces
        return False
    c.writable = w.writable_seen
    b.count += 1
    if r.packed:
        b.slots += c.slots
    return True


cdef inline void begin(Ring *r, Batch *b) noexcept nogil:
    """Nothing is in flight: all that was gathered before has been given back to the driver."""
    b.first = r.serial + 1


cdef int gather(Ring *r, Batch *b, bint writable, uint64_t enough, uint64_t limit, uint32_t most) noexcept nogil:
    """Fills the batch with the chains that are offered next, and says how many there are.

    No chain is added after ``most`` of them, ``enough`` bytes, or one that did not fit in ``limit`` bytes; with a limit
    of 0, chains are checked and counted, and no byte is gathered. After a fault, which is left in r.fault, what was
    gathered before it is good; but nothing is when memory was lost on the way (R-RING-82).
    """
    cdef uint32_t i
    cdef Chain *c
    b.count = b.pieces = 0
    b.bytes = b.slots = 0
    r.fault.code = NO_FAULT
    if not r.packed:
        if not look_split(r):
            return 0
        most = min(most, <uint32_t>r.pending_seen)
    for i in range(most):
        if not add_chain(r, b, writable, limit):
            break
        c = &b.chain[b.count - 1]
        if b.bytes >= enough or (limit and c.bytes < c.total) or b.pieces == BATCH_PIECES or b.walked > WALK_LIMIT:
            break
    if r.packed:
        r.pending_seen = max(r.pending_seen, <uint16_t>b.count)
        r.slots_seen = max(r.slots_seen, b.slots)
    r.most_pending = max(r.most_pending, r.pending_seen)
    if flag_get(&r.mem.lost):
        b.count = 0
    if r.flight != NULL:
        mark_begun(r, b)
    return b.count


# -- completing chains -------------------------------------------------------------------------------------------------

cdef inline void put_used(Ring *r, uint16_t head, uint32_t written, uint32_t chains, uint32_t slots) noexcept nogil:
    """One used entry for ``chains`` that have ``slots``, of which ``head`` is the last; publish() shows it."""
    if r.packed:
        put_used_packed(r, head, written, slots)
        r.unsignalled += slots
    else:
        put_used_split(r, head, written, chains)
        r.unsignalled += chains
    r.unsignalled = min(r.unsignalled, <uint32_t>ALL_INDICES)


cdef inline void end_run(Ring *r) noexcept nogil:
    """Writes the one used entry for all the chains of a run (R-RING-50)."""
    if r.run:
        put_used(r, r.run_head, 0, r.run, r.run_slots)
        r.run = r.run_slots = 0


cdef inline void complete(Ring *r, Chain *c, uint32_t written) noexcept nogil:
    """The chain at next_avail is used. Only one that nothing could be written to may be in a run (R-RING-51)."""
    if r.in_order and not c.writable:
        r.run += 1
        r.run_slots += c.slots
        r.run_head = c.head
    else:
        end_run(r)
        put_used(r, c.head, written, 1, c.slots)
    if r.packed:
        r.next_avail = advance(r.next_avail, c.slots, r.size)
        r.slots_seen -= min(r.slots_seen, <uint32_t>c.slots)
    else:
        r.next_avail += 1
    r.pending_seen -= 1
    r.offset = 0
    r.chains += 1
    if r.flight != NULL:
        list_done(r, c.head)


cdef inline void publish(Ring *r) noexcept nogil:
    """Shows the driver what is used. Nothing is written if nothing is new."""
    end_run(r)
    if r.used_idx == r.shown:
        return
    if r.packed:
        publish_packed(r)
    else:
        publish_split(r)
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
        complete(r, c, 0)                           # R-RING-11
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
        complete(r, c, <uint32_t>written)
    publish(r)
