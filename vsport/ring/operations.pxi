# What the device does with its chains; without the interpreter lock.

cdef int nothing_left(Ring *r) noexcept nogil:
    return FAULTY if r.fault.code else EMPTY


cdef int why_failed(Ring *r, int error) noexcept nogil:
    """What the failure of readv() or writev() means."""
    if error == EAGAIN:
        return BLOCKED
    if error == EINTR:
        return INTERRUPTED
    if error == EFAULT:                             # what would be SIGBUS in this process (R-RING-82)
        flag_set(&r.mem.lost)
        return FAULTY
    r.error = error
    return FAILED


cdef int drop_front(iovec *piece, int count, uint64_t size) noexcept nogil:
    """Takes ``size`` bytes off the front of the pieces; says how many pieces are used up."""
    cdef int used = 0
    while used < count and size >= piece[used].iov_len:
        size -= piece[used].iov_len
        used += 1
    if used < count:
        piece[used].iov_base = <uint8_t *>piece[used].iov_base + size
        piece[used].iov_len -= size
    return used


cdef int keep_front(iovec *piece, int count, uint64_t size) noexcept nogil:
    """Keeps the first ``size`` bytes of the pieces; says how many pieces are left."""
    cdef int kept = 0
    while kept < count and size > 0:
        piece[kept].iov_len = min(<uint64_t>piece[kept].iov_len, size)
        size -= piece[kept].iov_len
        kept += 1
    return kept


cdef void write_log(int fd, Batch *b, uint64_t size) noexcept nogil:
    """Writes the first ``size`` bytes of the batch; a log that fails is not the port's concern. Uses up the pieces."""
    cdef iovec *piece = b.piece
    cdef int used, count = keep_front(piece, b.pieces, size)
    cdef ssize_t written
    while count:
        written = writev(fd, piece, count)
        if written < 0 and errno == EINTR:
            continue
        if written <= 0:
            return
        used = drop_front(piece, count, written)
        piece += used
        count -= used


cdef int ring_drain(Ring *r, int fd, int log_fd, uint64_t *budget) noexcept nogil:
    cdef Batch b
    cdef ssize_t n
    cdef uint64_t moved
    b.walked = 0
    while True:
        begin(r, &b)
        if not gather(r, &b, False, budget[0], budget[0], BATCH_CHAINS):
            return nothing_left(r)
        n = writev(fd, b.piece, b.pieces) if b.bytes else 0
        moved = n if n > 0 else 0
        if moved and log_fd >= 0:
            write_log(log_fd, &b, moved)
        settle_readable(r, &b, moved)
        budget[0] -= moved
        if n < 0:
            return why_failed(r, errno)
        if moved == b.bytes and r.fault.code:
            return FAULTY
        if budget[0] == 0 or b.walked > WALK_LIMIT:
            return MORE


cdef int ring_fill(Ring *r, int fd, uint64_t *budget) noexcept nogil:
    """Offers about as many bytes as came last time, and four times as many as long as all of them are taken."""
    cdef Batch b
    cdef ssize_t n
    b.walked = 0
    while True:
        begin(r, &b)
        if not gather(r, &b, True, min(r.fill_want, budget[0]), budget[0], BATCH_CHAINS):
            return nothing_left(r)
        n = readv(fd, b.piece, b.pieces) if b.bytes else 0
        if n < 0:
            return why_failed(r, errno)
        if n == 0 and b.bytes:
            return END_OF_FILE
        settle_writable(r, &b, n)
        budget[0] -= n
        if <uint64_t>n < b.bytes:
            r.fill_want = n
            return BLOCKED if has_chain(r) else EMPTY     # that was all: no need to be told so once more
        elif r.fault.code:
            return FAULTY
        else:
            r.fill_want = min(4 * max(b.bytes, r.fill_want), <uint64_t>BUDGET_MAX)
        if budget[0] == 0 or b.walked > WALK_LIMIT:
            return MORE


cdef void scatter(Batch *b, const uint8_t *data) noexcept nogil:
    """Copies ``data`` into the batch's pieces."""
    cdef int i
    for i in range(b.pieces):
        memcpy(b.piece[i].iov_base, data, b.piece[i].iov_len)
        data += b.piece[i].iov_len


cdef uint64_t ring_fill_from(Ring *r, const uint8_t *data, uint64_t size) noexcept nogil:
    cdef Batch b
    cdef uint64_t left = size, limit
    b.walked = 0
    while left and b.walked <= WALK_LIMIT:
        limit = min(left, <uint64_t>BUDGET_MAX)
        begin(r, &b)
        if not gather(r, &b, True, limit, limit, BATCH_CHAINS):
            break
        scatter(&b, data)
        settle_writable(r, &b, b.bytes)
        data += b.bytes
        left -= b.bytes
        if r.fault.code:
            break
    return size - left


cdef bint ring_push(Ring *r, const uint8_t *data, uint64_t size) noexcept nogil:
    cdef Batch b
    cdef bint fits = False
    b.walked = 0
    begin(r, &b)
    while not fits and b.walked <= WALK_LIMIT and gather(r, &b, True, 1, size, 1):
        fits = b.bytes == size
        if fits:
            scatter(&b, data)
            if r.log != NULL:
                mark_pieces(r.log, &b, size)
            r.bytes_moved += size
        complete(r, &b.chain[0], <uint32_t>size if fits else 0)
    publish(r)
    return fits


cdef uint64_t return_unread(Ring *r, Batch *b) noexcept nogil:
    """Completes all chains of the batch; says how many readable bytes they still had."""
    cdef uint64_t dropped = 0
    cdef int i
    for i in range(b.count):
        dropped += b.chain[i].total
        complete(r, &b.chain[i], 0)
    publish(r)
    r.bytes_discarded += dropped
    return dropped


cdef uint64_t ring_discard(Ring *r) noexcept nogil:
    cdef Batch b
    cdef uint64_t dropped = 0
    b.walked = 0
    while b.walked <= WALK_LIMIT:
        begin(r, &b)
        if not gather(r, &b, False, UINT64_MAX, 0, BATCH_CHAINS):
            break
        dropped += return_unread(r, &b)
        if r.fault.code:
            break
    return dropped


cdef uint64_t ring_return_partial(Ring *r) noexcept nogil:
    cdef Batch b
    cdef uint64_t dropped = 0
    b.walked = 0
    begin(r, &b)
    if r.offset and gather(r, &b, False, 1, 0, 1):
        dropped = return_unread(r, &b)
    return dropped
