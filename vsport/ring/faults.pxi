# What a driver can do wrong (R-RING-70 to 84): a code and its values in C, made an exception by DeviceQueue.check().

cdef enum:
    NO_FAULT
    AVAIL_AHEAD
    AVAIL_BACKWARDS
    HEAD_RANGE
    NEXT_RANGE
    TABLE_NEXT_RANGE
    CHAIN_LOOP
    TABLE_LOOP
    READABLE_AFTER_WRITABLE
    INDIRECT_NOT_NEGOTIATED
    INDIRECT_NESTED
    INDIRECT_WITH_NEXT
    TABLE_LENGTH
    TABLE_UNMAPPED
    ADDRESS_OVERFLOW
    UNMAPPED
    HEAD_TWICE
    DESCRIPTOR_SHARED
    CHAIN_LONG
    INDIRECT_IN_LIST
    TAKEN_BACK

# code: (rule, what, names of the values)
cdef dict FAULTS = {
    AVAIL_AHEAD: ("R-RING-70", "avail.idx is ahead by more than the queue's size", ("avail_idx", "next_avail", "size")),
    AVAIL_BACKWARDS: ("R-RING-70", "avail.idx moved backwards", ("avail_idx", "seen")),
    HEAD_RANGE: ("R-RING-71", "a chain's head is not in the table", ("head", "size")),
    NEXT_RANGE: ("R-RING-71", "a descriptor's next is not in the table", ("head", "index", "size")),
    TABLE_NEXT_RANGE: ("R-RING-71", "an indirect descriptor's next is not in its table", ("head", "index", "entries")),
    CHAIN_LOOP: ("R-RING-72", "a chain comes back to one of its descriptors", ("head", "index")),
    TABLE_LOOP: ("R-RING-72", "a chain has more descriptors than its indirect table", ("head", "entries")),
    READABLE_AFTER_WRITABLE: ("R-RING-74", "a readable descriptor follows a writable one", ("head", "index")),
    INDIRECT_NOT_NEGOTIATED: ("R-RING-75", "indirect descriptors were not negotiated", ("head", "index")),
    INDIRECT_NESTED: ("R-RING-75", "an indirect table holds an indirect descriptor", ("head", "index")),
    INDIRECT_WITH_NEXT: ("R-RING-75", "a descriptor is indirect and has a next one", ("head", "index")),
    TABLE_LENGTH: (
        "R-RING-75", "an indirect table's length is not 1 to 32768 times 16", ("head", "index", "addr", "len")
    ),
    TABLE_UNMAPPED: ("R-RING-75", "an indirect table is not in guest memory", ("head", "index", "addr", "len")),
    ADDRESS_OVERFLOW: ("R-RING-76", "a buffer reaches beyond 2**64", ("head", "index", "addr", "len")),
    UNMAPPED: ("R-RING-76", "a buffer is not in guest memory", ("head", "index", "addr", "len")),
    HEAD_TWICE: ("R-RING-79", "a head was offered again while in flight", ("head",)),
    DESCRIPTOR_SHARED: ("R-RING-79", "a descriptor belongs to two chains in flight", ("head", "index")),
    CHAIN_LONG: ("R-RING-72", "a chain has more descriptors than the ring has room for", ("head", "size")),
    INDIRECT_IN_LIST: ("R-RING-46", "an indirect descriptor follows another one", ("head", "index")),
    TAKEN_BACK: ("R-RING-70", "a chain that was offered is not there any more", ("head",)),
}


cdef bint fail(Ring *r, int code, uint64_t a, uint64_t b, uint64_t c, uint64_t d) noexcept nogil:
    """Notes what the driver did; always False, so that it can be returned as "not well"."""
    r.fault.code = code
    r.fault.values[:] = [a, b, c, d]
    return False
