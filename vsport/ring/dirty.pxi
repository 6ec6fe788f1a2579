# The dirty log: every page that the device has written to is marked, after it was (R-VU-80, R-VU-81).

cdef void mark(PageLog *log, uint64_t gpa, uint64_t size) noexcept nogil:
    """Marks the pages of ``size`` bytes that have just been written; pages that the log has no bit for are left out."""
    cdef uint64_t page = gpa // PAGE, last, end, stop
    if size == 0:
        return
    last = gpa + (size - 1)
    end = min((last if last >= gpa else UINT64_MAX) // PAGE + 1, 8 * log.size)
    while page < end:
        stop = min(end, (page | 7) + 1)
        mark8(log.bits + page // 8, <uint8_t>((0xFF >> (8 - (stop - page))) << (page & 7)))
        page = stop


cdef void mark_pieces(PageLog *log, Batch *b, uint64_t size) noexcept nogil:
    """Marks the first ``size`` bytes of the batch."""
    cdef uint64_t length
    cdef int i = 0
    while size:
        length = min(size, <uint64_t>b.piece[i].iov_len)
        mark(log, b.gpa[i], length)
        size -= length
        i += 1


cdef void mark_used(Ring *r, uint64_t offset, uint64_t size) noexcept nogil:
    """Marks a part of the used ring or of the device's event structure, which the log has at an address of its own."""
    if r.logs_used and r.used_gpa + offset >= offset:
        mark(r.log, r.used_gpa + offset, size)


@cython.final
@cython.no_gc_clear                                 # c.bits points into what the view holds
cdef class DirtyLog:
    """Which pages of guest memory the device has written to: a bit for each (R-VU-80)."""

    def __cinit__(self, buffer, offset: int, size: int):
        _check_inside("R-VU-81", "a dirty log", buffer, offset, size)
        self.view = _shared_view(buffer, offset, size)
        self.c.bits = <uint8_t *>PyMemoryView_GET_BUFFER(self.view).buf
        self.c.size = size
        self.guard = _guard(self.view, &self.c.lost)

    def __dealloc__(self):
        if self.guard != NULL:
            guard_remove(self.guard)

    @property
    def size(self):
        return self.c.size

    def mark(self, uint64_t gpa, uint64_t length) -> None:
        """Marks the pages of a range that was written to; what the log has no bits for is left out (R-VU-81)."""
        mark(&self.c, gpa, length)

    def take(self) -> bytes:
        """The marks, which are taken away: a page written to after this is marked again."""
        cdef uint64_t i
        marks = PyBytes_FromStringAndSize(NULL, self.c.size)
        cdef uint8_t *out = <uint8_t *>PyBytes_AS_STRING(marks)
        with nogil:
            for i in range(self.c.size):
                out[i] = take8(self.c.bits + i)
        return marks
