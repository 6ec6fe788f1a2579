# The split ring (2.7): its descriptors, its two index fields, its event words.

cdef inline void to_host_order(Desc *d) noexcept nogil:
    d.addr = le64toh(d.addr)
    d.len = le32toh(d.len)
    d.flags = le16toh(d.flags)
    d.next = le16toh(d.next)


# -- what the driver offers --------------------------------------------------------------------------------------------

cdef bint look_split(Ring *r) noexcept nogil:
    """Reads how many chains are offered and not completed (R-RING-17, 70)."""
    cdef uint16_t avail_idx = load16_acquire(r.avail + 2)
    cdef uint16_t ahead = avail_idx - r.next_avail
    if ahead > r.size:
        return fail(r, AVAIL_AHEAD, avail_idx, r.next_avail, r.size, 0)
    if ahead < r.pending_seen:
        return fail(r, AVAIL_BACKWARDS, avail_idx, <uint16_t>(r.next_avail + r.pending_seen), 0, 0)
    r.pending_seen = ahead
    return True


cdef inline bint claim(Ring *r, Batch *b, uint32_t head, uint32_t index) noexcept nogil:
    """Takes a descriptor of the table for this chain: it is in one chain in flight, and once (R-RING-72, 79)."""
    cdef uint64_t stamp = r.stamps[index]
    r.stamps[index] = r.serial
    if stamp < b.first:
        return True
    if stamp == r.serial:
        return fail(r, CHAIN_LOOP, head, index, 0, 0)
    return fail(r, HEAD_TWICE if index == head else DESCRIPTOR_SHARED, head, index, 0, 0)


cdef inline bint take_split(Ring *r, Batch *b, Chain *c, Walk *w) noexcept nogil:
    """Walks the next chain of the available ring: each descriptor is copied once, and checked."""
    cdef Desc d
    c.head = load16(r.avail + 4 + 2 * <size_t>((r.next_avail + b.count) & (r.size - 1)))
    w.head = w.index = c.head
    if c.head >= r.size:
        return fail(r, HEAD_RANGE, c.head, r.size, 0, 0)
    r.serial += 1
    while True:
        b.walked += 1
        if not claim(r, b, w.head, w.index):
            return False
        memcpy(&d, r.desc + sizeof(Desc) * <size_t>w.index, sizeof(Desc))
        to_host_order(&d)
        if d.flags & DESC_INDIRECT:
            return enter_table(r, w, &d) and walk_split_table(r, b, c, w)
        if not add_descriptor(r, b, c, w, &d):
            return False
        if not d.flags & DESC_NEXT:
            return True
        w.index = d.next
        if w.index >= r.size:
            return fail(r, NEXT_RANGE, w.head, w.index, r.size, 0)


cdef bint walk_split_table(Ring *r, Batch *b, Chain *c, Walk *w) noexcept nogil:
    """Walks an indirect table, whose entries are linked by ``next``."""
    cdef Desc d
    cdef uint32_t walked
    for walked in range(w.entries):
        if w.index >= w.entries:
            return fail(r, TABLE_NEXT_RANGE, w.head, w.index, w.entries, 0)
        take_entry(r, b, w, &d)
        to_host_order(&d)
        if d.flags & DESC_INDIRECT:
            return fail(r, INDIRECT_NESTED, w.head, w.index, 0, 0)
        if not add_descriptor(r, b, c, w, &d):
            return False
        if not d.flags & DESC_NEXT:
            return True
        w.index = d.next
    if w.index >= w.entries:
        return fail(r, TABLE_NEXT_RANGE, w.head, w.index, w.entries, 0)
    return fail(r, TABLE_LOOP, w.head, w.entries, 0, 0)


# -- what the device gives back ----------------------------------------------------------------------------------------

cdef inline void put_used_split(Ring *r, uint16_t head, uint32_t written, uint32_t chains) noexcept nogil:
    """Writes one element for ``chains`` of them, of which ``head`` is the last (R-RING-10 to 12, R-RING-50)."""
    cdef UsedElem e
    e.id = htole32(head)
    e.len = htole32(written)
    memcpy(r.used + USED_RING + sizeof(UsedElem) * <size_t>(r.used_idx & (r.size - 1)), &e, sizeof(UsedElem))
    r.used_idx += chains


cdef inline void publish_split(Ring *r) noexcept nogil:
    """The elements come before the index that covers them (R-RING-17)."""
    store16_release(r.used + USED_IDX, r.used_idx)
    if r.flight != NULL:
        end_batch(r)
    if r.log != NULL:
        mark_elements(r)


cdef void mark_elements(Ring *r) noexcept nogil:
    """Marks the used elements that are shown now for the first time, and the index."""
    cdef uint32_t count = <uint16_t>(r.used_idx - r.shown), first = r.shown & (r.size - 1)
    cdef uint32_t straight = min(count, r.size - first)
    mark_used(r, USED_RING + sizeof(UsedElem) * <size_t>first, sizeof(UsedElem) * <size_t>straight)
    mark_used(r, USED_RING, sizeof(UsedElem) * <size_t>(count - straight))
    mark_used(r, USED_IDX, sizeof(uint16_t))


# -- event words -------------------------------------------------------------------------------------------------------

cdef inline uint8_t *used_event(Ring *r) noexcept nogil:
    return r.avail + 4 + 2 * <size_t>r.size


cdef inline size_t avail_event(Ring *r) noexcept nogil:
    """Where it is in the used ring."""
    return USED_RING + sizeof(UsedElem) * <size_t>r.size


cdef inline bint passed(uint16_t event, uint16_t new, uint32_t count) noexcept nogil:
    """Whether the entry ``event`` is among the last ``count`` ones before ``new`` (R-RING-21)."""
    return count >= ALL_INDICES or <uint16_t>(new - event - 1) < count


cdef inline bint call_wanted_split(Ring *r) noexcept nogil:
    if not r.event_idx:
        return not load16(r.avail) & NO_NOTIFICATION
    return r.signal_next or passed(load16(used_event(r)), r.used_idx, r.unsignalled)
