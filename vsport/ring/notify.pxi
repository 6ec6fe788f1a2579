# Notifications, both ways (R-RING-16 to 25), and what begins with a start.

cdef void tell_driver(Ring *r, size_t where, uint16_t value) noexcept nogil:
    """Writes one of the two words of a split used ring that say when to kick."""
    store16(r.used + where, value)
    if r.log != NULL:
        mark_used(r, where, sizeof(uint16_t))


cdef void ask_for_kick(Ring *r) noexcept nogil:
    """A kick for the next chain that the driver adds to those which it has shown by now."""
    if r.packed:
        ask_for_kick_packed(r)
    elif r.event_idx:
        tell_driver(r, avail_event(r), load16(r.avail + 2))
    else:
        tell_driver(r, USED_FLAGS, 0)


cdef void ask_for_no_kick(Ring *r) noexcept nogil:
    """No kicks; with event indices there is nothing to do: the driver kicks once, when it passes what was asked for."""
    if r.event_idx:
        return
    if r.packed:
        tell_event(r, 0, EVENT_NEVER)
    else:
        tell_driver(r, USED_FLAGS, NO_NOTIFICATION)


cdef bint ring_kicks_on(Ring *r) noexcept nogil:
    """Asks for a kick; True if there is a chain already (R-RING-18)."""
    ask_for_kick(r)
    full_fence()
    return has_chain(r)


cdef bint ring_kicks_ahead(Ring *r) noexcept nogil:
    """As ring_kicks_on(), but for a kick after a quarter of the chains that the driver has had out at once.

    A driver that keeps fewer out from now on would wait: the caller looks again before long, and calls ring_kicks_on().
    """
    cdef uint16_t skipped = r.most_pending // 4 - 1
    if not r.event_idx or r.most_pending < 8:
        return ring_kicks_on(r)
    if r.packed:
        look_packed(r)
        tell_event(r, advance(advance(r.next_avail, r.slots_seen, r.size), skipped, r.size), EVENT_AT_SLOT)
    else:
        tell_driver(r, avail_event(r), <uint16_t>(load16(r.avail + 2) + skipped))
    full_fence()
    return has_chain(r)


cdef uint32_t ring_unread(Ring *r) noexcept nogil:
    """How many used chains (packed: slots) the driver has not looked at yet, as far as it says so; else 0."""
    cdef uint32_t behind
    if not r.event_idx:
        return 0
    behind = unread_packed(r) if r.packed else <uint16_t>(r.used_idx - load16(used_event(r)))
    return behind if behind <= r.size else 0


cdef bint call_wanted(Ring *r) noexcept nogil:
    """Whether the driver wants an interrupt for what was completed since the last one (R-RING-20 to 23)."""
    cdef bint wanted
    if r.unsignalled == 0:
        return False
    full_fence()                                    # what is used is out before the driver's wish is read
    wanted = call_wanted_packed(r) if r.packed else call_wanted_split(r)
    r.unsignalled = 0
    r.signal_next = False
    return wanted


# -- starting ----------------------------------------------------------------------------------------------------------

cdef uint16_t first_place(Ring *r, uint16_t base) noexcept nogil:
    """Where a packed ring begins. Some front ends say 0 for a fresh ring, whose wrap counter is 1 (R-RING-49).

    A ring that has really come round to 0 has a descriptor in its first slot that has been available.
    """
    if base == 0 and not load16(slot_at(r, 0) + PACKED_FLAGS) & (PACKED_AVAIL | PACKED_USED):
        return WRAP
    return base


cdef void ring_start(Ring *r, uint16_t base, bint reset) noexcept nogil:
    """The places in the ring, and everything that is only valid for one run of the queue."""
    if r.packed:
        base = r.used_idx = first_place(r, base)
    if reset or r.next_avail != base:
        r.offset = 0
    r.starts += 1
    r.next_avail = base
    r.shown = r.used_idx
    r.done_count = 0
    r.pending_seen = 0
    r.most_pending = 0
    r.slots_seen = 0
    r.run = r.run_slots = 0
    r.buffer_range = r.table_range = 0
    r.fill_want = 1
    r.fault.code = NO_FAULT
    # A driver that is resumed may have missed its last call: it gets one more (R-RING-23).
    r.unsignalled = 0 if reset and r.used_idx == (WRAP if r.packed else 0) else 1
    r.signal_next = True
    if not r.packed:
        tell_driver(r, USED_FLAGS, 0)               # kicks are on, whatever was there before (R-RING-21)
    ask_for_kick(r)


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
