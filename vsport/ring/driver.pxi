# DriverQueue: the driver's side of a queue of either kind, for a simulated guest.

# -- offering chains ---------------------------------------------------------------------------------------------------

cdef inline void put_split(DriverRing *d, Desc *elements, int count, uint16_t head) noexcept nogil:
    """Writes a chain into free descriptors of the table, and its head into the available ring."""
    cdef Desc e
    cdef uint16_t index = head, place = d.avail_idx + d.added
    cdef int i
    for i in range(count):
        e.addr = htole64(elements[i].addr)
        e.len = htole32(elements[i].len)
        e.flags = htole16(elements[i].flags | (DESC_NEXT if i + 1 < count else 0))
        e.next = htole16(d.slots[index].next if i + 1 < count else 0)
        memcpy(d.desc + sizeof(Desc) * <size_t>index, &e, sizeof(Desc))
        index = d.slots[index].next
    d.free_head = index
    store16(d.avail + 4 + 2 * <size_t>(place & (d.size - 1)), head)


cdef inline void put_packed(DriverRing *d, Desc *elements, int count, uint16_t id) noexcept nogil:
    """Writes a chain into the next slots. The flags of the first head that is not published wait for publish()."""
    cdef Desc e
    cdef uint8_t *slot
    cdef uint16_t flags
    cdef int i
    for i in range(count):
        slot = d.desc + sizeof(Desc) * <size_t>(d.next_slot & ~WRAP)
        e.addr = htole64(elements[i].addr)
        e.len = htole32(elements[i].len)
        e.flags = htole16(id)                       # where a packed descriptor has its id
        flags = elements[i].flags | (DESC_NEXT if i + 1 < count else 0)
        flags |= PACKED_AVAIL if d.next_slot & WRAP else PACKED_USED
        memcpy(slot, &e, PACKED_FLAGS)
        if d.next_slot == d.avail_idx:
            d.first_flags = flags
        else:
            store16(slot + PACKED_FLAGS, flags)
        d.next_slot = advance(d.next_slot, 1, d.size)
    d.free_head = d.slots[id].next


cdef uint16_t put_chain(DriverRing *d, Desc *elements, int count, uint64_t capacity) noexcept nogil:
    """Puts a chain of ``count`` elements, at most as many as are free, into the ring; publish_chains() shows it."""
    cdef uint16_t head = d.free_head
    if d.packed:
        put_packed(d, elements, count, head)
    else:
        put_split(d, elements, count, head)
    if d.in_order:
        d.order[<uint16_t>(d.avail_seq + d.added) % d.size] = head
    d.slots[head].count = count
    d.slots[head].capacity = capacity
    d.free -= count
    d.added += 1
    d.added_slots += count
    d.in_flight += 1
    return head


cdef bint publish_chains(DriverRing *d) noexcept nogil:
    """Shows the device what was added; whether it wants a kick for that (R-RING-16, R-RING-43)."""
    cdef uint32_t added = d.added, slots = d.added_slots
    if added == 0:
        return False
    d.added = d.added_slots = 0
    d.avail_seq = (d.avail_seq + added) % d.size
    if d.packed:
        store16_release(d.desc + sizeof(Desc) * <size_t>(d.avail_idx & ~WRAP) + PACKED_FLAGS, d.first_flags)
        d.avail_idx = d.next_slot
        full_fence()
        return wished(load32(d.used), d.event_idx, d.avail_idx, slots, d.size)
    d.avail_idx += added
    store16_release(d.avail + 2, d.avail_idx)
    full_fence()
    if d.event_idx:
        return passed(load16(d.used + USED_RING + sizeof(UsedElem) * <size_t>d.size), d.avail_idx, added)
    return not load16(d.used) & NO_NOTIFICATION


# -- taking chains back ------------------------------------------------------------------------------------------------

cdef enum:
    NOTHING_USED = 0
    TAKEN = 1
    # What the device did wrong (R-RING-84).
    USED_AHEAD = -1
    USED_UNKNOWN = -2
    USED_TOO_LONG = -3


cdef inline int read_used(DriverRing *d, UsedElem *e, uint32_t *most) noexcept nogil:
    """The used entry that comes next, and the most chains that it can stand for."""
    cdef uint8_t *slot
    cdef uint16_t used_idx
    if d.packed:
        slot = d.desc + sizeof(Desc) * <size_t>(d.last_used & ~WRAP)
        used_idx = load16_acquire(slot + PACKED_FLAGS)
        if d.in_flight == d.added or not is_used(used_idx, d.last_used):
            return NOTHING_USED
        e.len = le32toh((<uint32_t *>(slot + PACKED_LEN))[0]) if used_idx & DESC_WRITE else 0   # R-RING-45
        e.id = load16(slot + PACKED_LEN + 4)
        most[0] = d.in_flight
        return TAKEN
    used_idx = load16_acquire(d.used + USED_IDX)
    if used_idx == d.last_used:
        return NOTHING_USED
    most[0] = <uint16_t>(used_idx - d.last_used)
    if most[0] > d.size:
        e.id = most[0]
        return USED_AHEAD
    memcpy(e, d.used + USED_RING + sizeof(UsedElem) * <size_t>(d.last_used & (d.size - 1)), sizeof(UsedElem))
    e.id = le32toh(e.id)
    e.len = le32toh(e.len)
    return TAKEN


cdef int open_entry(DriverRing *d, UsedElem *e) noexcept nogil:
    """Reads and checks the used entry that comes next: it stands for d.covered chains, of which it names the last."""
    cdef uint32_t most, covered = 1
    cdef int code = read_used(d, e, &most)
    if code != TAKEN:
        return code
    if e.id >= d.size or d.slots[e.id].count == 0:
        return USED_UNKNOWN
    if e.len > d.slots[e.id].capacity:
        return USED_TOO_LONG
    if d.in_order:
        while d.order[(d.used_seq + covered - 1) % d.size] != e.id:
            covered += 1
            if covered > most:
                return USED_UNKNOWN
    d.covered = covered
    d.covered_len = e.len
    return TAKEN


cdef inline void release_chain(DriverRing *d, uint16_t head) noexcept nogil:
    """Takes a chain's descriptors back: to the front of the free list, or with IN_ORDER in their order (R-RING-52)."""
    cdef uint16_t last = head
    cdef uint32_t count = d.slots[head].count, i
    if not d.in_order:
        for i in range(count - 1 if not d.packed else 0):
            last = d.slots[last].next
        d.slots[last].next = d.free_head
        d.free_head = head
    d.last_used = advance(d.last_used, count, d.size) if d.packed else <uint16_t>(d.last_used + 1)
    d.free += count
    d.in_flight -= 1
    d.slots[head].count = 0


cdef int take_used(DriverRing *d, UsedElem *e) noexcept nogil:
    """The next used chain; of a batch all but the last one count as full (R-RING-51). Negative: what is wrong in it."""
    cdef int code
    if d.covered == 0:
        code = open_entry(d, e)
        if code != TAKEN:
            return code
    d.covered -= 1
    if d.in_order:
        e.id = d.order[d.used_seq % d.size]
        e.len = <uint32_t>min(d.slots[e.id].capacity, <uint64_t>UINT32_MAX) if d.covered else d.covered_len
    d.used_seq = (d.used_seq + 1) % d.size
    release_chain(d, <uint16_t>e.id)
    return TAKEN


cdef bint used_waits(DriverRing *d) noexcept nogil:
    """Whether take_used() has something."""
    cdef UsedElem e
    cdef uint32_t most
    return d.covered != 0 or read_used(d, &e, &most) != NOTHING_USED


cdef void ask_for_call(DriverRing *d) noexcept nogil:
    """An interrupt for the next chain; with event indices each one has to be asked for (R-RING-21)."""
    if d.packed:
        store32(d.avail, <uint32_t>EVENT_AT_SLOT << 16 | d.last_used if d.event_idx else EVENT_ALWAYS)
    elif d.event_idx:
        store16(d.avail + 4 + 2 * <size_t>d.size, d.last_used)
    else:
        store16(d.avail, 0)
    full_fence()


cdef void ask_for_no_call(DriverRing *d) noexcept nogil:
    if d.packed:
        store32(d.avail, <uint32_t>EVENT_NEVER << 16)
    elif d.event_idx:
        store16(d.avail + 4 + 2 * <size_t>d.size, <uint16_t>(d.last_used - 1))  # a whole turn away
    else:
        store16(d.avail, NO_NOTIFICATION)


# -- the class ---------------------------------------------------------------------------------------------------------

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


cdef Desc _descriptor(object element) except *:
    """An element as a descriptor, in this machine's byte order, not linked to another one."""
    cdef Desc d
    d.addr = element[0]
    d.len = element[1]
    d.flags = element[2]
    d.next = 0
    return d


cdef bytes _table(list elements, bint packed):
    """An indirect table: a split ring's is linked by next, a packed one's is in order (R-RING-30, R-RING-46)."""
    cdef Desc d
    cdef int i, count = len(elements)
    table = bytearray()
    for i in range(count):
        d = _descriptor(elements[i])
        d.addr = htole64(d.addr)
        d.len = htole32(d.len)
        if packed:
            d.next = htole16(d.flags)
            d.flags = 0
        else:
            d.next = htole16(i + 1 if i + 1 < count else 0)
            d.flags = htole16(d.flags | (DESC_NEXT if i + 1 < count else 0))
        table += (<const char *>&d)[:sizeof(d)]
    return bytes(table)


@cython.final
@cython.no_gc_clear                                 # the host pointers point into memory
cdef class DriverQueue:
    """The driver's side of one virtqueue, for a simulated guest."""

    def __cinit__(
        self,
        memory: Memory,
        gpa: int,
        size: int,
        *,
        event_idx: bool = False,
        indirect: bool = False,
        packed: bool = False,
        in_order: bool = False,
    ):
        if not 0 < size <= QUEUE_SIZE_MAX or (size & (size - 1) and not packed):
            raise ValueError("a queue's size is a power of two up to 32768")
        if gpa % PAGE:
            raise ValueError("a queue's address has to be a multiple of 4096")
        self.size = self.d.size = self.d.free = size
        self.d.event_idx = event_idx
        self.d.packed = self.packed = packed
        self.d.in_order = in_order
        self.d.calls_wanted = True
        self.indirect = indirect
        self.desc = gpa
        self.avail = gpa + 16 * size
        self.used = gpa + _used_offset(size)
        self.rebind(memory)
        memset(self.d.desc, 0, self.footprint(size))
        self.make_tables()
        if packed:
            self.d.avail_idx = self.d.next_slot = self.d.last_used = WRAP

    cdef int make_tables(self) except -1:
        cdef uint32_t i
        self.d.slots = <Slot *>PyMem_Calloc(self.d.size, sizeof(Slot))
        self.d.order = <uint16_t *>PyMem_Calloc(self.d.size, sizeof(uint16_t))
        if self.d.slots == NULL or self.d.order == NULL:
            raise MemoryError
        for i in range(self.d.size):
            self.d.slots[i].next = <uint16_t>((i + 1) % self.d.size)
        return 0

    def __dealloc__(self):
        PyMem_Free(self.d.slots)
        PyMem_Free(self.d.order)

    @staticmethod
    def footprint(size: int) -> int:
        """Bytes of guest memory that a queue of ``size`` takes, rounded up to pages of 4096."""
        return page_up(_used_offset(size) + 6 + 8 * size)

    def rebind(self, memory: Memory) -> None:
        """Goes on with the same state in another memory; raises IndexError, ValueError, and then nothing changes."""
        cdef uint8_t *rings = _driver_rings(memory, self.desc, self.footprint(self.size))
        self.memory = memory
        self.d.desc = rings
        self.d.avail = rings + (self.avail - self.desc)
        self.d.used = rings + (self.used - self.desc)

    @property
    def free(self):
        return self.d.free

    @property
    def in_flight(self):
        return self.d.in_flight

    def add(self, readable=(), writable=(), *, indirect_table: int = 0) -> int:
        """Puts a chain of (gpa, length) elements into the ring, not yet published."""
        cdef Desc one
        cdef Desc *chain = &one
        cdef int i
        self.check_whole()
        elements = _elements(readable, writable)
        cdef uint64_t capacity = sum([length for _, length, flags in elements if flags])
        if indirect_table:
            elements = [self.write_table(elements, indirect_table)]
        cdef int count = len(elements)
        if count > <int>self.d.free:
            raise BufferError(f"{count} descriptors are needed and {self.d.free} are free")
        if count > 1:
            chain = <Desc *>PyMem_Calloc(count, sizeof(Desc))
            if chain == NULL:
                raise MemoryError
        try:
            for i in range(count):
                chain[i] = _descriptor(elements[i])
            return put_chain(&self.d, chain, count, capacity)
        finally:
            if chain != &one:
                PyMem_Free(chain)

    cdef object write_table(self, list elements, object table):
        """Writes an indirect table; returns the one element that points to it."""
        if not self.indirect:
            raise ValueError("indirect descriptors were not negotiated")
        self.memory.write(table, _table(elements, self.d.packed))
        return (table, 16 * len(elements), DESC_INDIRECT)

    def publish(self) -> bool:
        """Shows the added chains to the device; True if the device wants a notification (R-RING-16)."""
        self.check_whole()
        return publish_chains(&self.d) != 0

    def collect(self) -> tuple[int, int] | None:
        """The next used chain as (head, bytes written), or None."""
        cdef UsedElem e
        self.check_whole()
        if not self.take(&e):
            return None
        if self.d.calls_wanted:
            ask_for_call(&self.d)
        return e.id, e.len

    cdef bint take(self, UsedElem *e) except -1:
        """take_used(), and its faults as exceptions (R-RING-84)."""
        cdef int code = take_used(&self.d, e)
        if code >= 0:
            return code
        self.broken = True
        if code == USED_AHEAD:
            what, values = "used.idx is ahead by more than the queue's size", {"count": e.id, "size": self.size}
        elif code == USED_UNKNOWN:
            what, values = "the device returned a chain that it did not have", {"id": e.id}
        else:
            what = "the device wrote more than there was room for"
            values = {"id": e.id, "len": e.len, "capacity": self.d.slots[e.id].capacity}
        raise DeviceError("R-RING-84", what, **values)

    cdef int check_whole(self) except -1:
        if self.broken:
            raise DeviceError("R-RING-84", "the queue is broken")
        return 0

    def all_used(self) -> bool:
        """Whether the device has given back everything that was published; nothing is collected by asking."""
        cdef DriverRing d = self.d
        cdef UsedElem e
        cdef uint32_t place
        if not d.packed:
            return load16_acquire(d.used + USED_IDX) == d.avail_idx
        while d.in_flight > d.added:
            if d.covered == 0 and open_entry(&d, &e) != TAKEN:
                return False
            for place in range(d.covered):
                head = d.order[(d.used_seq + place) % d.size] if d.in_order else e.id
                d.last_used = advance(d.last_used, d.slots[head].count, d.size)
            d.used_seq = (d.used_seq + d.covered) % d.size
            d.in_flight -= d.covered
            d.covered = 0
        return True

    def calls_off(self) -> None:
        """Tells the device that interrupts are not needed; a hint, no more (R-RING-24)."""
        self.d.calls_wanted = False
        ask_for_no_call(&self.d)

    def calls_on(self) -> bool:
        """Asks for an interrupt at the next used chain; True if there is one already (R-RING-18)."""
        self.d.calls_wanted = True
        ask_for_call(&self.d)
        return used_waits(&self.d) != 0


cdef uint64_t page_up(uint64_t size) noexcept:
    return (size + PAGE - 1) & ~<uint64_t>(PAGE - 1)


cdef uint64_t _used_offset(uint64_t size) noexcept:
    """From a queue's start to its used ring, which begins a page: each is written by one side only (R-VU-80)."""
    return page_up(16 * size + 6 + 2 * size)
