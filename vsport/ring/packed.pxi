# The packed ring (2.8): one ring of descriptors that both sides write to, and an event structure for each side.
#
# A place in it is a slot with a wrap counter in bit 15, as event structures and SET_VRING_BASE have it (R-RING-41,
# R-VU-18). Chains are completed in the order in which they are offered, so the next one that is available and the next
# used descriptor are at the same place, but for what is not written yet.

cdef enum:
    PACKED_AVAIL = 1 << 7
    PACKED_USED = 1 << 15
    WRAP = 1 << 15
    # Where the fields of a descriptor are, and those of an event structure.
    PACKED_LEN = 8
    PACKED_FLAGS = 14
    EVENT_FLAGS = 2
    # What an event structure asks for (R-RING-41); above: the slot that its lower half names.
    EVENT_ALWAYS = 0
    EVENT_NEVER = 1
    EVENT_AT_SLOT = 2


cdef inline uint16_t advance(uint16_t place, uint32_t slots, uint32_t size) noexcept nogil:
    """The place that is ``slots`` further on, at most ``size``: the counter flips behind the last slot (R-RING-42)."""
    cdef uint32_t slot = (place & ~WRAP) + slots
    if slot >= size:
        return <uint16_t>((slot - size) | (~place & WRAP))
    return <uint16_t>(slot | (place & WRAP))


cdef inline uint8_t *slot_at(Ring *r, uint16_t place) noexcept nogil:
    return r.desc + sizeof(Desc) * <size_t>(place & ~WRAP)


cdef inline bint is_available(uint16_t flags, uint16_t place) noexcept nogil:
    """AVAIL is the wrap counter and USED is not (R-RING-42)."""
    return (flags & (PACKED_AVAIL | PACKED_USED)) == (PACKED_AVAIL if place & WRAP else PACKED_USED)


cdef inline bint is_used(uint16_t flags, uint16_t place) noexcept nogil:
    """Both are the wrap counter."""
    return (flags & (PACKED_AVAIL | PACKED_USED)) == (PACKED_AVAIL | PACKED_USED if place & WRAP else 0)


cdef inline void to_host_order_packed(Desc *d) noexcept nogil:
    """A split ring's descriptor: flags and next, which is the buffer id, are the other way round (R-RING-40)."""
    cdef uint16_t id = le16toh(d.flags)
    d.addr = le64toh(d.addr)
    d.len = le32toh(d.len)
    d.flags = le16toh(d.next)
    d.next = id


# -- what the driver offers --------------------------------------------------------------------------------------------

cdef bint look_packed(Ring *r) noexcept nogil:
    """Counts the chains that are offered; those that were seen before are not looked at again."""
    cdef uint16_t flags, place = advance(r.next_avail, r.slots_seen, r.size)
    while r.slots_seen < r.size and is_available(load16_acquire(slot_at(r, place) + PACKED_FLAGS), place):
        r.pending_seen += 1
        flags = DESC_NEXT
        while flags & DESC_NEXT and r.slots_seen < r.size:
            flags = load16(slot_at(r, place) + PACKED_FLAGS)
            place = advance(place, 1, r.size)
            r.slots_seen += 1
    return True


cdef bint take_packed(Ring *r, Batch *b, Chain *c, Walk *w) noexcept nogil:
    """Walks the chain in the slots after the batch's, if there is one: each is copied once, and checked.

    Only the head's flags are acquired and say that it is there, since they are what the driver writes last (R-RING-43).
    """
    cdef Desc d
    cdef uint16_t place = advance(r.next_avail, b.slots, r.size)
    cdef uint16_t flags
    if b.slots == r.size:
        return False
    flags = load16_acquire(slot_at(r, place) + PACKED_FLAGS)
    w.head = place & ~WRAP
    if not is_available(flags, place):
        return False if b.count >= r.pending_seen else fail(r, TAKEN_BACK, w.head, 0, 0, 0)
    c.slots = 0
    while True:
        b.walked += 1
        w.index = place & ~WRAP
        memcpy(&d, slot_at(r, place), sizeof(Desc))
        to_host_order_packed(&d)
        if c.slots == 0:
            d.flags = flags
        c.slots += 1
        if d.flags & DESC_INDIRECT:
            c.head = d.next
            if c.slots > 1:
                return fail(r, INDIRECT_IN_LIST, w.head, w.index, 0, 0)
            return enter_table(r, w, &d) and walk_packed_table(r, b, c, w)
        if not add_descriptor(r, b, c, w, &d):
            return False
        if not d.flags & DESC_NEXT:
            c.head = d.next                         # R-RING-44
            return True
        if b.slots + c.slots == r.size:
            return fail(r, CHAIN_LONG, w.head, r.size, 0, 0)
        place = advance(place, 1, r.size)


cdef bint walk_packed_table(Ring *r, Batch *b, Chain *c, Walk *w) noexcept nogil:
    """Walks an indirect table: all its entries in their order, of whose flags only WRITE counts (R-RING-46)."""
    cdef Desc d
    for w.index in range(w.entries):
        take_entry(r, b, w, &d)
        to_host_order_packed(&d)
        if not add_descriptor(r, b, c, w, &d):
            return False
    return True


# -- what the device gives back ----------------------------------------------------------------------------------------

cdef inline void put_used_packed(Ring *r, uint16_t id, uint32_t written, uint32_t slots) noexcept nogil:
    """Writes one used descriptor for ``slots`` of them (R-RING-44, 45, 50).

    The flags of the first one that the driver has not been shown wait for publish(): they show all the others.
    """
    cdef UsedDesc u
    cdef uint8_t *slot = slot_at(r, r.used_idx)
    cdef uint16_t flags = (PACKED_AVAIL | PACKED_USED if r.used_idx & WRAP else 0) | (DESC_WRITE if written else 0)
    u.len = htole32(written)
    u.id = htole16(id)
    memcpy(slot + PACKED_LEN, &u, PACKED_FLAGS - PACKED_LEN)
    if r.used_idx == r.shown:
        r.first_flags = flags
    else:
        store16(slot + PACKED_FLAGS, flags)
    r.used_idx = advance(r.used_idx, slots, r.size)


cdef inline void publish_packed(Ring *r) noexcept nogil:
    """All of the batch comes before the flags that make the driver look at it (R-RING-43)."""
    store16_release(slot_at(r, r.shown) + PACKED_FLAGS, r.first_flags)
    if r.log != NULL:
        mark_slots(r)


cdef void mark_slots(Ring *r) noexcept nogil:
    """Marks the slots from the first one that was written to the last one; they are where the guest has its ring."""
    cdef uint64_t first = r.shown & ~WRAP, end = r.used_idx & ~WRAP
    if not r.logs_used:
        return
    if (r.shown ^ r.used_idx) & WRAP:
        mark(r.log, r.desc_gpa + sizeof(Desc) * first, sizeof(Desc) * (r.size - first))
        first = 0
    mark(r.log, r.desc_gpa + sizeof(Desc) * first, sizeof(Desc) * (end - first))


# -- event structures --------------------------------------------------------------------------------------------------

cdef inline bint passed_packed(uint16_t event, uint16_t new, uint32_t slots, uint32_t size) noexcept nogil:
    """Whether the place ``event`` is among the last ``slots`` ones before ``new`` (R-RING-48)."""
    cdef int behind = (new & ~WRAP) - (event & ~WRAP)
    if (event ^ new) & WRAP:
        behind += size
    return slots >= 2 * size or 0 < behind <= <int>slots


cdef inline uint32_t unread_packed(Ring *r) noexcept nogil:
    """Slots from the one whose use the driver wants to hear of to where the device is; more than a ring: it wants not."""
    cdef uint32_t event = load32(r.avail)
    cdef int behind = (r.used_idx & ~WRAP) - (<uint16_t>event & ~WRAP)
    if (event >> 16) & 3 != EVENT_AT_SLOT:
        return r.size + 1
    return behind + r.size if (event ^ r.used_idx) & WRAP else behind


cdef void tell_event(Ring *r, uint16_t place, uint16_t wish) noexcept nogil:
    """Writes the device's event structure in one access: its halves belong together."""
    store32(r.used, <uint32_t>wish << 16 | place)
    if r.log != NULL:
        mark_used(r, 0, sizeof(uint32_t))


cdef inline void ask_for_kick_packed(Ring *r) noexcept nogil:
    if r.event_idx:
        look_packed(r)
        tell_event(r, advance(r.next_avail, r.slots_seen, r.size), EVENT_AT_SLOT)
    else:
        tell_event(r, 0, EVENT_ALWAYS)


cdef inline bint wished(uint32_t event, bint event_idx, uint16_t new, uint32_t slots, uint32_t size) noexcept nogil:
    """Whether who wrote ``event`` wants to hear of the ``slots`` before ``new``; what is unknown is a yes."""
    cdef uint32_t wish = (event >> 16) & 3
    if wish == EVENT_AT_SLOT and event_idx:
        return passed_packed(<uint16_t>event, new, slots, size)
    return wish != EVENT_NEVER


cdef inline bint call_wanted_packed(Ring *r) noexcept nogil:
    cdef uint32_t event = load32(r.avail)
    if r.signal_next and (event >> 16) & 3 == EVENT_AT_SLOT:
        return True
    return wished(event, r.event_idx, r.used_idx, r.unsignalled, r.size)
