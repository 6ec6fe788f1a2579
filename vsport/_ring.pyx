# The virtqueue engine: split and packed rings (virtio 2.7, 2.8), device side and driver side, on guest memory.
#
# How to read it. It is one module in several files, each for one question, in ring/; this one is their map. C functions
# over ``Ring *`` do the work, without Python objects and without allocation; thin classes at the end give them to
# Python, and _ring.pyi says what these promise. An operation of the device's side (operations.pxi) goes through these
# steps:
#
#   look()       sees what is offered (split.pxi, packed.pxi)
#   gather()     walks the chains that are offered into a Batch of pieces of guest memory, and checks them (chains.pxi)
#   (a copy)     readv(), writev() or memcpy() on the pieces
#   settle_*()   completes the chains that were used up, and publishes them to the driver together (chains.pxi)
#
# Two others may want to know of it, and cost one branch if they do not: a dirty log, of every byte that the device has
# written (R-VU-80), and a region that outlives the process, of every chain that it has begun and completed (R-VU-85).
#
# Two rules hold everywhere. What the driver can change is read once, into private memory, and checked there
# (R-RING-19). Nothing that the driver says decides how much is allocated or how long a call takes (R-RING-80).
#
# How a ring is laid out is known by split.pxi and packed.pxi, and by whoever asks ``r.packed`` to choose one of them.
"""The virtqueue engine: split and packed rings, device side and driver side, on guest memory."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from cpython.memoryview cimport PyMemoryView_FromObject, PyMemoryView_GET_BUFFER
from libc.errno cimport EAGAIN, EFAULT, EINTR, ENOTSOCK, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, UINT64_MAX
from libc.string cimport memcpy, memset

import os
from enum import IntEnum
from typing import NamedTuple

cimport cython

from vsport.errors import DeviceError, FrontEndError, GuestError

__all__ = ["DeviceQueue", "DirtyLog", "DriverQueue", "Inflight", "Memory", "Region", "Status"]

cdef enum:
    # Flags of a descriptor (R-RING-02), and bit 0 of the flags of both rings (R-RING-20).
    DESC_NEXT = 1
    DESC_WRITE = 2
    DESC_INDIRECT = 4
    NO_NOTIFICATION = 1

    QUEUE_SIZE_MAX = 32768
    TABLE_ENTRIES_MAX = 32768
    REGIONS_MAX = 512
    ALL_INDICES = 65536
    # After this many descriptors and pieces a call comes back and lets others have their turn (R-RING-80).
    WALK_LIMIT = 1 << 18
    # So that no sum of lengths leaves 32 bits, in used.len as in readv().
    BUDGET_MAX = 1 << 30
    PAGE = 4096
    # Where the words of a used ring are.
    USED_FLAGS = 0
    USED_IDX = 2
    USED_RING = 4
    # Of an in-flight region (R-VU-85).
    FLIGHT_VERSION = 1
    FLIGHT_HEAD = 16

class Status(IntEnum):
    """Why a drain or a fill came back."""

    EMPTY = 0
    BLOCKED = 1
    EOF = 2
    MORE = 3
    STOPPED = 4


cdef tuple STATUSES = tuple(Status)

# More than a table of every kind, full of the longest buffers, can name.
cdef uint64_t CHAIN_BYTES_MAX = <uint64_t>1 << 48

include "ring/faults.pxi"      # what a driver can do wrong
include "ring/memory.pxi"      # guest memory: Memory, Region
include "ring/dirty.pxi"       # who copies the guest: DirtyLog
include "ring/split.pxi"       # how a split ring is laid out
include "ring/packed.pxi"      # how a packed ring is
include "ring/flight.pxi"      # what outlives the process: Inflight
include "ring/chains.pxi"      # from the ring to pieces of memory, and back
include "ring/operations.pxi"  # drain, fill, push, discard ...
include "ring/notify.pxi"      # kicks and calls
include "ring/device.pxi"      # DeviceQueue
include "ring/driver.pxi"      # DriverQueue
