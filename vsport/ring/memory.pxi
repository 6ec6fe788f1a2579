# Guest memory: from a guest-physical address to the host's, and memory that is shared with other programs.

class Region(NamedTuple):
    """A range of guest memory (R-VU-60)."""

    gpa: int
    size: int
    front_end_addr: int
    buffer: object
    offset: int


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
