# Chains in flight, in a region that outlives the process (R-VU-85 to R-VU-88).
#
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


@cython.final
@cython.no_gc_clear                                 # c points into what the view holds
cdef class Inflight:
    """What a front end keeps of one queue for the back end after a crash: which chains are in flight (R-VU-85)."""

    def __cinit__(self, buffer, offset: int, desc_num: int):
        if not 0 < desc_num <= QUEUE_SIZE_MAX:
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
