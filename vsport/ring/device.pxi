# DeviceQueue: the device's side for Python.

def _check_setup(index, memory, size, base, packed):
    """What a front end can get wrong about a queue besides its addresses."""
    if not 0 < size <= QUEUE_SIZE_MAX or (size & (size - 1) and not packed):
        if packed:
            raise FrontEndError("R-RING-40", "a packed queue's size is 1 to 32768", queue=index, size=size)
        raise FrontEndError("R-RING-01", "a queue's size is a power of two up to 32768", queue=index, size=size)
    if not 0 <= base < ALL_INDICES:
        raise FrontEndError("R-RING-04", "an available index has 16 bits", queue=index, base=base)
    if packed and base & ~WRAP >= size:
        raise FrontEndError("R-VU-18", "a packed ring's base is not in the ring", queue=index, base=base, size=size)
    if memory.lost:
        raise FrontEndError("R-RING-82", "the file behind guest memory was truncated", queue=index)


cdef uint8_t *_ring_part(
    Memory memory, int index, str name, uint64_t address, uint64_t size, int align, uint64_t *gpa = NULL
) except NULL:
    """Where a part of a ring lies on the host: whole, in one region, aligned (R-RING-09, R-RING-77)."""
    cdef Range *g
    cdef uint64_t start
    cdef int i
    for i in range(memory.c.count):
        g = &memory.c.ranges[i]
        start = address - g.front_end_addr
        if start < g.size:
            break
    else:
        raise FrontEndError("R-RING-77", f"the {name} is in no memory region", queue=index, address=hex(address))
    if g.size - start < size:
        raise FrontEndError("R-RING-77", f"the {name} reaches beyond its region", queue=index, address=hex(address))
    if address % align or <size_t>(g.host + start) % align:
        raise FrontEndError("R-RING-09", f"the {name} is not aligned to {align}", queue=index, address=hex(address))
    if gpa != NULL:
        gpa[0] = g.gpa + start
    return g.host + start


cdef int _lay_out(Ring *r, Memory memory, int index, uint64_t desc, uint64_t avail, uint64_t used) except -1:
    """Finds the parts of a ring, whose size and kind are known; raises FrontEndError, and then nothing has changed."""
    cdef uint8_t *desc_host
    cdef uint8_t *avail_host
    cdef uint8_t *used_host
    cdef uint64_t size = r.size
    if r.packed:
        desc_host = _ring_part(memory, index, "descriptor ring", desc, 16 * size, 16, &r.desc_gpa)
        avail_host = _ring_part(memory, index, "driver's event structure", avail, 4, 4)
        used_host = _ring_part(memory, index, "device's event structure", used, 4, 4)
    else:
        desc_host = _ring_part(memory, index, "descriptor table", desc, 16 * size, 16)
        avail_host = _ring_part(memory, index, "available ring", avail, 6 + 2 * size, 2)
        used_host = _ring_part(memory, index, "used ring", used, 6 + 8 * size, 4)
    r.desc, r.avail, r.used = desc_host, avail_host, used_host
    r.mem = &memory.c
    return 0


@cython.final
@cython.no_gc_clear                                 # r points into memory
cdef class DeviceQueue:
    """The device's side of one virtqueue."""

    def __cinit__(self, index: int):
        self.index = index
        self.r.call_fd = -1

    def __dealloc__(self):
        PyMem_Free(self.r.stamps)
        PyMem_Free(self.r.done)

    # Each operation that walks the ring is enclosed in enter() and ``busy = False``: a sink may call anything, and
    # other threads run while the interpreter lock is released.

    cdef int idle(self) except -1:
        if self.busy or (self.poller != NULL and self.poller[0]):
            raise RuntimeError(f"queue {self.index} is busy")
        return 0

    cdef bint enter(self) except -1:
        """Begins an operation; False if the queue is not running."""
        self.idle()
        self.busy = self.r.running
        return self.busy

    cdef int check(self) except -1:
        """Raises what the operation ran into, and then the queue stands still."""
        lost = self.lost_file()
        if lost:
            self.fault = FrontEndError("R-RING-82", f"the file behind {lost} was truncated", queue=self.index)
        elif self.r.fault.code:
            rule, what, names = FAULTS[self.r.fault.code]
            values = {name: self.r.fault.values[i] for i, name in enumerate(names)}
            self.fault = GuestError(rule, what, queue=self.index, **values)
        else:
            return 0
        self.r.running = False
        raise self.fault

    cdef str lost_file(self):
        """What a front end has truncated of all that the queue works on; None: nothing (R-RING-82)."""
        if flag_get(&self.memory.c.lost):
            return "guest memory"
        if self.log is not None and flag_get(&self.log.c.lost):
            return "the dirty log"
        if self._inflight is not None and flag_get(&self._inflight.lost):
            return "the in-flight region"
        return None

    cdef object status(self, int code):
        """The Status for what a core function returned, or its exception."""
        if code == FAULTY or self.lost_file():
            self.check()
        if code == FAILED:
            raise OSError(self.r.error, os.strerror(self.r.error))
        return STATUSES[code]

    @property
    def call_fd(self):
        """Descriptor that interrupts the driver: 8 bytes are written to it; -1: none (R-VU-98)."""
        return self.r.call_fd

    @call_fd.setter
    def call_fd(self, int fd):
        self.idle()
        self.r.call_fd = fd
        self.r.call_is_socket = True                # until send() says otherwise
        # The last call may have gone to a descriptor that nobody listens to: it is repeated (R-RING-23, R-VU-55).
        self.r.signal_next = True
        self.r.unsignalled = max(self.r.unsignalled, 1)

    @property
    def inflight(self):
        """Where the chains in flight are kept; None: nowhere. Set while the queue is stopped (R-VU-85)."""
        return self._inflight

    @inflight.setter
    def inflight(self, Inflight region):
        self.idle()
        if self.r.running:
            raise ValueError(f"queue {self.index} is running")
        self.r.flight = NULL
        self._inflight = region

    @property
    def running(self):
        return self.r.running != 0

    @property
    def size(self):
        return self.r.size

    @property
    def next_avail(self):
        return self.r.next_avail

    @property
    def used_idx(self):
        return self.r.used_idx

    @property
    def offset(self):
        return self.r.offset

    @property
    def bytes_moved(self):
        """Bytes moved between chains and a descriptor, a sink, or the caller, since the queue was made."""
        return self.r.bytes_moved

    @property
    def bytes_discarded(self):
        """Bytes of device-readable chains that were returned to the driver unread by discard() or return_partial()."""
        return self.r.bytes_discarded

    @property
    def chains(self):
        """Chains completed since the queue was made."""
        return self.r.chains

    @property
    def calls(self):
        """Interrupts sent or asked for since the queue was made."""
        return self.r.calls

    def start(
        self,
        memory: Memory,
        size: int,
        desc: int,
        avail: int,
        used: int,
        *,
        base: int = 0,
        event_idx: bool = False,
        indirect: bool = False,
        packed: bool = False,
        in_order: bool = False,
        reset: bool = True,
    ) -> None:
        """Starts on rings at front-end addresses; raises FrontEndError, and then the queue stays stopped."""
        self.stop()
        _check_setup(self.index, memory, size, base, packed)
        if packed and self._inflight is not None:
            what = "chains in flight are not kept for a packed ring; leave INFLIGHT_SHMFD or packed=on"
            raise FrontEndError("R-VU-90", what, queue=self.index)
        self.r.size = size
        self.r.packed = packed
        self.r.in_order = in_order
        self.r.event_idx = event_idx
        self.r.indirect = indirect
        _lay_out(&self.r, memory, self.index, desc, avail, used)
        self.memory = memory
        self.make_tables(size)
        if not packed:
            self.r.used_idx = load16(self.r.used + USED_IDX)
        ring_start(&self.r, base if self._inflight is None else self.recover(base), reset)
        self.fault = None
        self.r.running = True
        self.check()

    cdef int make_tables(self, size_t size) except -1:
        PyMem_Free(self.r.stamps)
        PyMem_Free(self.r.done)
        self.r.stamps = NULL
        self.r.done = NULL
        self.r.serial = 0
        self.r.stamps = <uint64_t *>PyMem_Calloc(size, sizeof(uint64_t))
        self.r.done = <uint16_t *>PyMem_Calloc(size if self._inflight is not None else 1, sizeof(uint16_t))
        if self.r.stamps == NULL or self.r.done == NULL:
            raise MemoryError
        return 0

    cdef uint16_t recover(self, uint16_t base) except *:
        """Takes the in-flight region into use; says where to go on."""
        self.r.flight = self._inflight.c
        try:
            check_size(&self.r, self.index, self._inflight.desc_num)
            return self.r.used_idx if recover(&self.r, self.index) else base
        except BaseException:
            self.stop()
            raise

    def stop(self) -> int:
        """Stops the queue and returns next_avail, for GET_VRING_BASE; ``offset`` is kept."""
        self.idle()
        self.r.running = False
        self.r.desc = self.r.avail = self.r.used = NULL
        self.r.flight = NULL
        self.memory = None
        return self.r.next_avail

    def restore(self, next_avail: int, offset: int) -> None:
        """Sets where start(base=next_avail, reset=False) goes on; raises ValueError, and then nothing has changed."""
        self.idle()
        if self.r.running:
            raise ValueError(f"queue {self.index} is running")
        if not 0 <= next_avail < ALL_INDICES:
            raise ValueError(f"an available index has 16 bits: {next_avail}")
        if not 0 <= offset <= CHAIN_BYTES_MAX:
            raise ValueError(f"no chain has so many bytes: {offset}")
        self.r.next_avail = next_avail
        self.r.offset = offset

    def log_to(self, log: DirtyLog | None, used_gpa: int = -1) -> None:
        """From now on marks in ``log`` what is written; the used ring at ``used_gpa``, unless it is -1 (R-VU-80)."""
        self.idle()
        if not -1 <= used_gpa < 1 << 64:
            raise ValueError(f"an address has 64 bits: {used_gpa}")
        self.r.logs_used = used_gpa >= 0
        self.r.used_gpa = max(used_gpa, 0)
        self.r.log = &log.c if log is not None else NULL
        self.log = log

    def forget_partial(self) -> None:
        """Forgets the half-consumed chain's offset (device reset, R-CON-38)."""
        self.idle()
        self.r.offset = 0

    def pending(self) -> int:
        """How many chains are offered and not completed; 0 if not running. Raises GuestError (R-RING-70)."""
        if not self.enter():
            return 0
        try:
            self.r.fault.code = NO_FAULT
            look(&self.r)
            self.check()
            return self.r.pending_seen
        finally:
            self.busy = False

    def drain(self, fd: int, *, log_fd: int = -1, budget: int = BUDGET) -> Status:
        """Writes device-readable bytes to ``fd`` with writev(), straight from guest memory, without the GIL."""
        cdef int out = fd, log = log_fd, code
        cdef uint64_t left = _checked_budget(budget)
        if not self.enter():
            return Status.STOPPED
        try:
            while True:
                with nogil:
                    code = ring_drain(&self.r, out, log, &left)
                if code != INTERRUPTED:
                    return self.status(code)
                PyErr_CheckSignals()
        finally:
            self.busy = False

    def drain_into(self, sink, *, budget: int = BUDGET) -> Status:
        """Offers device-readable bytes, piece by piece, to ``sink``, which returns how many it took (0: blocked)."""
        cdef uint64_t left = _checked_budget(budget)
        if not self.enter():
            return Status.STOPPED
        try:
            return self.status(self.offer_chains(sink, left))
        finally:
            self.busy = False

    cdef int offer_chains(self, object sink, uint64_t budget) except -100:
        cdef Batch b
        cdef uint64_t taken
        b.walked = 0
        while True:
            begin(&self.r, &b)
            if not gather(&self.r, &b, False, 1, budget, BATCH_CHAINS):
                return nothing_left(&self.r)
            taken = 0
            try:
                self.offer_pieces(&b, sink, &taken)
            finally:
                settle_readable(&self.r, &b, taken)
            budget -= taken
            if taken < b.bytes:
                return BLOCKED
            if self.r.fault.code:
                return FAULTY
            if budget == 0 or b.walked > WALK_LIMIT:
                return MORE

    cdef int offer_pieces(self, Batch *b, object sink, uint64_t *taken) except -1:
        """Gives the pieces to the sink until it takes no more; ``taken`` grows on the way, also if it raises."""
        cdef int i
        cdef Py_ssize_t took
        for i in range(b.pieces):
            view = self.memory.view_of(b.piece[i].iov_base, b.piece[i].iov_len)
            while len(view):
                took = sink(view)
                if not 0 <= took <= len(view):
                    raise ValueError(f"the sink took {took} of {len(view)} bytes")
                if took == 0:
                    return 0
                taken[0] += took
                view = view[took:]
        return 0

    def discard(self) -> int:
        """Returns the chains offered by the driver with length 0, and says how many readable bytes were dropped."""
        cdef uint64_t dropped
        if not self.enter():
            return 0
        try:
            with nogil:
                dropped = ring_discard(&self.r)
            self.check()
            return dropped
        finally:
            self.busy = False

    def return_partial(self) -> int:
        """Returns a half-consumed chain to the driver; says how many of its bytes were dropped (R-CON-48)."""
        cdef uint64_t dropped
        if not self.enter():
            return 0
        try:
            self.r.fault.code = NO_FAULT
            dropped = ring_return_partial(&self.r)
            self.check()
            return dropped
        finally:
            self.busy = False

    def fill(self, fd: int, *, budget: int = BUDGET) -> Status:
        """Reads from ``fd`` with readv(), straight into device-writable buffers, without the GIL."""
        cdef int source = fd, code
        cdef uint64_t left = _checked_budget(budget)
        if not self.enter():
            return Status.STOPPED
        try:
            while True:
                with nogil:
                    code = ring_fill(&self.r, source, &left)
                if code != INTERRUPTED:
                    return self.status(code)
                PyErr_CheckSignals()
        finally:
            self.busy = False

    def fill_from(self, data) -> int:
        """Copies ``data`` into as many device-writable buffers as it takes; returns how many bytes found room."""
        cdef const uint8_t[::1] view = memoryview(data).cast("B")
        cdef uint64_t size = view.shape[0], done
        if not self.enter():
            return 0
        try:
            if size == 0:
                return 0
            with nogil:
                done = ring_fill_from(&self.r, &view[0], size)
            self.check()
            return done
        finally:
            self.busy = False

    def push(self, message: bytes) -> bool:
        """Puts one whole message into one device-writable chain; False if there is none (yet)."""
        cdef bint done
        if not self.enter():
            return False
        try:
            done = ring_push(&self.r, <const uint8_t *>PyBytes_AS_STRING(message), len(message))
            self.check()
            return done != 0
        finally:
            self.busy = False

    def pop(self, limit: int = 4096) -> bytes | None:
        """Takes one chain and returns its device-readable bytes, at most ``limit``; None if there is no chain."""
        if not self.enter():
            return None
        try:
            message = self.take_message(limit)
            self.check()
            return message
        finally:
            self.busy = False

    cdef object take_message(self, uint64_t limit):
        """One chain's bytes; a chain of more pieces than a batch has is taken in several passes."""
        cdef Batch b
        cdef int i
        message = bytearray()
        b.walked = 0
        while True:
            begin(&self.r, &b)
            if not gather(&self.r, &b, False, 1, limit - len(message), 1):
                return None
            for i in range(b.pieces):
                message += (<const char *>b.piece[i].iov_base)[:b.piece[i].iov_len]
            if b.bytes == b.chain[0].total or len(message) == <Py_ssize_t>limit:
                break
            self.r.offset += b.bytes
        self.r.bytes_moved += len(message)
        complete(&self.r, &b.chain[0], 0)
        publish(&self.r)
        return bytes(message)

    def kicks_off(self) -> None:
        """Tells the driver that notifications are not needed; a hint, no more (R-RING-24)."""
        if self.enter():
            ask_for_no_kick(&self.r)
            self.busy = False

    def kicks_on(self) -> bool:
        """Asks the driver for a notification at its next chain; True if there is one already (R-RING-18)."""
        if not self.enter():
            return False
        self.busy = False
        return ring_kicks_on(&self.r) != 0

    def notify(self) -> bool:
        """Interrupts the driver if it wants that for the chains completed since the last time (R-RING-20 to 23)."""
        self.idle()
        return self.r.used != NULL and ring_notify(&self.r)


cdef uint64_t _checked_budget(object budget) except 0:
    if budget <= 0:
        raise ValueError("the budget has to be positive")
    return min(budget, BUDGET_MAX)
