# The split ring (2.7): its descriptors, its two index fields, its event words.

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


cdef bint look(Ring *r, uint32_t *pending) noexcept nogil:
    """Reads how many chains are offered and not completed (R-RING-17, 70)."""
    cdef uint16_t avail_idx = load16_acquire(r.avail + 2)
    cdef uint16_t ahead = avail_idx - r.next_avail
    if ahead > r.size:
        return fail(r, AVAIL_AHEAD, avail_idx, r.next_avail, r.size, 0)
    if ahead < r.pending_seen:
        return fail(r, AVAIL_BACKWARDS, avail_idx, <uint16_t>(r.next_avail + r.pending_seen), 0, 0)
    r.pending_seen = ahead
    r.most_pending = max(r.most_pending, ahead)
    pending[0] = ahead
    return True


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
