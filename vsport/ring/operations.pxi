# What the device does with its chains; without the interpreter lock.

cdef bint ring_lost(Ring *r) noexcept nogil:
    """Whether a front end has truncated a file that the ring works on (R-RING-82)."""
    if flag_get(&r.mem.lost):
        return True
    if r.log != NULL and flag_get(&r.log.lost):
        return True
    return r.flight != NULL and flag_get(r.flight_lost) != 0


cdef enum:
    # Looks in a row without a pause, and between two looks at the clock.
    LOOKS_AT_ONCE = 256
    LOOKS_A_TIME = 64
    # Chains that are returned unread before the driver is shown them: while it works on these we work on the next ones.
    DISCARD_TOGETHER = 16


cdef uint64_t now_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * 1000000000 + <uint64_t>now.tv_nsec


cdef inline void take_heart(Patience *p, uint64_t linger) noexcept nogil:
    """There was something: from now on it may be quiet for so many nanoseconds."""
    p.linger = linger
    p.until = 0
    p.looks = 0


cdef bint keeps_looking(Patience *p) noexcept nogil:
    """Whether another look is due; a clock costs more than a look, so it is read for many of them."""
    cdef uint64_t now
    if p.linger == 0:
        return False
    p.looks += 1
    if p.looks > LOOKS_AT_ONCE:
        relax()
    if p.looks % LOOKS_A_TIME:
        return True
    now = now_ns()
    if p.until == 0:
        p.until = now + p.linger
    return now < p.until


cdef bint chain_comes(Ring *r, Batch *b, Patience *p) noexcept nogil:
    """After nothing was gathered: waits for a chain, as long as there is patience. Each one costs a part of a turn."""
    if p.linger == 0 or r.fault.code or flag_get(&r.mem.lost) or b.walked > WALK_LIMIT:
        return False
    while not has_chain(r):
        if not keeps_looking(p):
            return False
    take_heart(p, p.linger)
    b.walked += 1
    return True


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
    cdef Patience patience
    take_heart(&patience, 0)
    return drain_patiently(r, fd, log_fd, budget, &patience)


cdef int drain_patiently(Ring *r, int fd, int log_fd, uint64_t *budget, Patience *patience) noexcept nogil:
    cdef Batch b
    cdef ssize_t n
    cdef uint64_t moved
    b.walked = 0
    while True:
        begin(r, &b)
        if not gather(r, &b, False, budget[0], budget[0], BATCH_CHAINS):
            if not chain_comes(r, &b, patience):
                return nothing_left(r)
            continue
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


cdef uint64_t ring_discard(Ring *r, uint64_t linger) noexcept nogil:
    cdef Batch b
    cdef Patience patience
    cdef uint64_t dropped = 0
    b.walked = 0
    take_heart(&patience, linger)
    while b.walked <= WALK_LIMIT:
        begin(r, &b)
        if not gather(r, &b, False, UINT64_MAX, 0, DISCARD_TOGETHER):
            if not chain_comes(r, &b, &patience):
                break
            continue
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
