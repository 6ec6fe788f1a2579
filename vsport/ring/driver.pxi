# DriverQueue: the driver's side, for a simulated guest.

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
