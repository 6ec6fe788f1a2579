"""The virtqueue engine's contract: what it takes from C, its structs, and the fields of its classes."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "<endian.h>" nogil:
    uint16_t htole16(uint16_t)
    uint32_t htole32(uint32_t)
    uint64_t htole64(uint64_t)
    uint16_t le16toh(uint16_t)
    uint32_t le32toh(uint32_t)
    uint64_t le64toh(uint64_t)

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t readv(int fd, const iovec *pieces, int count)
    ssize_t writev(int fd, const iovec *pieces, int count)

cdef extern from "<sys/socket.h>" nogil:
    enum:
        MSG_DONTWAIT
        MSG_NOSIGNAL
    ssize_t send(int fd, const void *data, size_t size, int flags)

cdef extern from "<unistd.h>" nogil:
    ssize_t write(int fd, const void *data, size_t size)

cdef extern from "_atomics.h" nogil:
    uint16_t load16 "vs_load16" (const uint8_t *word)
    uint32_t load32 "vs_load32" (const uint8_t *word)
    uint16_t load16_acquire "vs_load16_acquire" (const uint8_t *word)
    void store16 "vs_store16" (uint8_t *word, uint16_t value)
    void store32 "vs_store32" (uint8_t *word, uint32_t value)
    void store16_release "vs_store16_release" (uint8_t *word, uint16_t value)
    void full_fence "vs_full_fence" ()
    void mark8 "vs_mark8" (uint8_t *byte, uint8_t bits)
    uint8_t take8 "vs_take8" (uint8_t *byte)
    void note8 "vs_note8" (uint8_t *field, uint8_t value)
    void note16 "vs_note16" (uint16_t *field, uint16_t value)
    void note64 "vs_note64" (uint64_t *field, uint64_t value)
    uint8_t look8 "vs_look8" (const uint8_t *field)
    uint16_t look16 "vs_look16" (const uint16_t *field)
    uint64_t look64 "vs_look64" (const uint64_t *field)
    bint flag_get "vs_flag_get" (const int *flag)
    void flag_set "vs_flag_set" (int *flag)

cdef extern from "<stdint.h>" nogil:
    uint32_t UINT32_MAX

cdef extern from "_sigbus.h":
    struct vs_guard:
        pass
    vs_guard *guard_add "vs_guard_add" (void *start, size_t size, int *lost)
    void guard_remove "vs_guard_remove" (vs_guard *guard)


# -- in shared memory (2.7.5, 2.7.8, 2.8.13, R-VU-85) ------------------------------------------------------------------

cdef struct Desc:
    uint64_t addr
    uint32_t len
    uint16_t flags
    uint16_t next               # a packed ring has the buffer's id here, and the two fields the other way round

cdef struct UsedElem:
    uint32_t id
    uint32_t len

cdef struct UsedDesc:           # the part of a packed descriptor that the device writes, without its flags
    uint32_t len
    uint16_t id

cdef struct FlightEntry:
    uint8_t inflight
    uint8_t[5] padding
    uint16_t next               # in the list of a batch
    uint64_t counter

cdef struct FlightTable:
    uint64_t features
    uint16_t version            # 0: fresh
    uint16_t desc_num
    uint16_t last_batch_head
    uint16_t used_idx
    FlightEntry[32768] entry    # desc_num of them are there


# -- guest memory ------------------------------------------------------------------------------------------------------

cdef struct Range:
    uint64_t gpa
    uint64_t size
    uint64_t front_end_addr
    uint8_t *host

cdef struct GuestMemory:
    Range *ranges               # sorted by gpa
    int count
    int lost                    # set by the SIGBUS handler: only flag_get() and flag_set() touch it

cdef struct PageLog:
    uint8_t *bits
    uint64_t size               # in bytes
    int lost


# -- the device's side of a queue --------------------------------------------------------------------------------------

cdef struct Fault:
    int code                    # index into FAULTS; 0: none
    uint64_t[4] values

cdef struct Ring:
    GuestMemory *mem
    uint8_t *desc               # NULL while stopped
    uint8_t *avail              # packed: the driver's event suppression structure
    uint8_t *used               # packed: the device's
    uint32_t size               # split: a power of two
    bint packed
    bint in_order
    bint event_idx
    bint indirect
    bint running
    # Places in the ring. Split: a free-running index; packed: a slot, and the wrap counter in bit 15.
    uint16_t next_avail
    uint16_t used_idx
    uint16_t shown              # the place up to which the driver has been shown what is used
    uint16_t pending_seen       # chains known to be offered; the driver cannot take them back (R-RING-70)
    uint16_t most_pending       # chains offered at once since the start
    uint32_t slots_seen         # packed: slots of those chains
    uint16_t first_flags        # packed: of the first used descriptor that is not shown yet
    uint32_t run                # completed chains that one used entry is going to stand for (R-RING-50)
    uint32_t run_slots
    uint16_t run_head           # the last one's
    uint64_t offset             # bytes of the chain at next_avail that are consumed
    uint32_t unsignalled        # entries (slots) used since the driver was last interrupted, at most ALL_INDICES
    bint signal_next            # the next completion interrupts, whatever the event index says (R-RING-23)
    uint64_t serial             # number of the chain that is being walked
    uint64_t *stamps            # for each descriptor: the last chain that it was part of
    int buffer_range            # where the last lookup of a buffer ended
    int table_range             # the same for indirect tables
    uint64_t fill_want          # bytes that the next fill offers at first
    PageLog *log                # NULL: nobody wants to know what is written
    bint logs_used
    uint64_t used_gpa           # of the used ring, as the log has it
    uint64_t desc_gpa           # of the descriptors: the device writes to a packed ring's
    FlightTable *flight         # NULL: nobody keeps what is in flight
    int begun                   # chains from next_avail on that are marked as in flight
    uint64_t counter            # of the next one
    uint16_t *done              # completed and not yet shown: only if there is a flight table
    int done_count
    int error                   # errno of a failed system call
    Fault fault
    uint64_t bytes_moved
    uint64_t bytes_discarded
    uint64_t chains
    uint32_t starts             # how often it has been started
    int call_fd                 # -1: none
    bint call_is_socket
    uint64_t calls              # interrupts sent or asked for
    void *work                  # what a poller does with it; NULL: nothing

# What an operation comes back with: a Status, or one of the negative numbers.
cdef enum:
    EMPTY = 0
    BLOCKED = 1
    END_OF_FILE = 2
    MORE = 3
    STOPPED = 4
    FAULTY = -1
    FAILED = -2
    INTERRUPTED = -3

cdef enum:
    BUDGET = 1 << 20            # bytes of one turn
    BATCH_PIECES = 512
    BATCH_CHAINS = 512

cdef struct Chain:
    uint16_t head               # what the driver calls it: its head's index, or its buffer id
    uint16_t slots              # of a packed ring
    bint writable               # whether the device may write to a part of it
    uint64_t bytes              # gathered into the batch
    uint64_t total              # in the chain, without what was consumed before

cdef struct Batch:
    uint64_t first              # serial number of its first chain
    uint64_t bytes
    uint32_t walked             # descriptors and pieces, since the operation began
    uint32_t slots              # of a packed ring
    int pieces
    int count
    iovec[BATCH_PIECES] piece
    uint64_t[BATCH_PIECES] gpa  # of each piece
    Chain[BATCH_CHAINS] chain

cdef struct Walk:
    bint writable               # the direction that is gathered
    uint64_t skip               # bytes that were consumed before
    uint64_t limit              # bytes that the batch may have
    uint32_t head               # where the chain begins
    uint32_t index              # of the descriptor to look at
    uint64_t table              # of the indirect table
    uint32_t entries
    bint writable_seen

# What a poller does with a running ring, without the interpreter lock.
cdef int ring_drain(Ring *r, int fd, int log_fd, uint64_t *budget) noexcept nogil
cdef int ring_fill(Ring *r, int fd, uint64_t *budget) noexcept nogil
cdef bint ring_notify(Ring *r) noexcept nogil
cdef bint ring_kicks_on(Ring *r) noexcept nogil
cdef bint ring_kicks_ahead(Ring *r) noexcept nogil
cdef uint32_t ring_unread(Ring *r) noexcept nogil
cdef void ask_for_no_kick(Ring *r) noexcept nogil
cdef bint has_chain(Ring *r) noexcept nogil


# -- the driver's side -------------------------------------------------------------------------------------------------

cdef struct Slot:
    uint16_t next               # in the free list, or in the chain
    uint16_t count              # descriptors of the chain that has this head or id; 0: none has
    uint64_t capacity           # writable bytes of that chain

cdef struct DriverRing:
    uint8_t *desc
    uint8_t *avail              # packed: the driver's event structure
    uint8_t *used               # packed: the device's
    Slot *slots
    uint16_t *order             # IN_ORDER: heads in the order in which they were added
    uint32_t size
    bint packed
    bint in_order
    bint event_idx
    bint calls_wanted
    uint32_t free               # descriptors
    uint32_t in_flight          # chains
    uint32_t added              # chains not yet published, and their descriptors
    uint32_t added_slots
    uint16_t free_head
    uint16_t first_flags        # packed: of the first head that is not published
    # Places, as the device has them.
    uint16_t avail_idx          # published
    uint16_t next_slot          # packed: where the next chain goes
    uint16_t last_used
    uint16_t avail_seq          # where in ``order`` the next published and the next used chain are
    uint16_t used_seq
    uint32_t covered            # chains that the last used entry stands for and that were not collected yet
    uint32_t covered_len        # written to the last of them


# -- classes -----------------------------------------------------------------------------------------------------------

cdef class Memory:
    cdef GuestMemory c
    cdef vs_guard **guards
    cdef readonly tuple regions
    cdef tuple views            # read-only, in the order of c.ranges; each holds its buffer's export

    cdef object attach(self, object region)
    cdef int check(self, object gpa, object size) except -1
    cdef object view_of(self, void *host, size_t size)

cdef class DirtyLog:
    cdef PageLog c
    cdef vs_guard *guard
    cdef object view

cdef class Inflight:
    cdef FlightTable *c
    cdef vs_guard *guard
    cdef int lost
    cdef object view
    cdef readonly int desc_num

cdef class DeviceQueue:
    cdef Ring r
    cdef readonly int index
    cdef bint busy
    cdef bint *poller           # whether a poller that has this queue is at work, in whatever thread; NULL: none has
    cdef Memory memory
    cdef DirtyLog log
    cdef Inflight _inflight
    cdef readonly object fault

    cdef int make_tables(self, size_t size) except -1
    cdef uint16_t recover(self, uint16_t base) except *
    cdef str lost_file(self)
    cdef int idle(self) except -1
    cdef bint enter(self) except -1
    cdef int check(self) except -1
    cdef object status(self, int code)
    cdef int offer_chains(self, object sink, uint64_t budget) except -100
    cdef int offer_pieces(self, Batch *b, object sink, uint64_t *taken) except -1
    cdef object take_message(self, uint64_t limit)

cdef class DriverQueue:
    cdef DriverRing d
    cdef Memory memory
    cdef bint indirect
    cdef readonly bint packed
    cdef readonly int size
    cdef readonly uint64_t desc
    cdef readonly uint64_t avail
    cdef readonly uint64_t used
    cdef readonly bint broken

    cdef int make_tables(self) except -1
    cdef object write_table(self, list elements, object table)
    cdef bint take(self, UsedElem *e) except -1
    cdef int check_whole(self) except -1
