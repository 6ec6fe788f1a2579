# Waiting, and moving bytes while waiting, both without the interpreter lock.
#
# A Poller waits, by epoll, for what Loop asks of it. Where a descriptor's readiness means nothing but that bytes can move
# between a ring and a chardev, it moves them and waits on: Python hears only of what changes something.
#
#   Work      one direction of one port (in Python: a Flow): a ring, and the descriptor that it is drained into, or
#             filled from
#   Source    a descriptor: what Python wants to hear of it, and whose work its readiness is
#   Wait      all sources by descriptor, and the works that are not done: in the backlog, lingering, or with news
#
# A flow is good for one run of its queue: whoever stops a queue and starts it again has to say anew that bytes may move,
# so that nothing moves behind the back of the state plane.
"""Waits for descriptors, and moves bytes between rings and descriptors meanwhile, without the interpreter lock."""

from cpython.exc cimport PyErr_CheckSignals
from cpython.mem cimport PyMem_Calloc, PyMem_Free, PyMem_Realloc
from cpython.ref cimport PyObject
from libc.errno cimport EINTR, EAGAIN, EPERM, errno
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

import math
import os

cimport cython

from vsport._ring import Status

from vsport._ring cimport (
    BLOCKED,
    BUDGET,
    EMPTY,
    FAILED,
    INTERRUPTED,
    MORE,
    STOPPED,
    DeviceQueue,
    Ring,
    ask_for_no_kick,
    has_chain,
    ring_drain,
    ring_fetched,
    ring_fill,
    ring_kicks_ahead,
    ring_kicks_on,
    ring_lost,
    ring_notify,
    ring_unread,
)

__all__ = ["Flow", "Poller"]

cdef extern from "<sys/epoll.h>" nogil:
    enum:
        EPOLL_CLOEXEC
        EPOLL_CTL_ADD
        EPOLL_CTL_DEL
        EPOLL_CTL_MOD
        EPOLLERR
        EPOLLHUP
        EPOLLIN
        EPOLLOUT
        EPOLLRDHUP
    union epoll_data_t:
        int fd
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epoll, int what, int fd, epoll_event *event)

cdef extern from *:
    """
    #include <sys/epoll.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    /* Waits at most so many nanoseconds; below 0: for ever. Kernels before 5.11 round up to milliseconds. */
    static int vs_epoll_wait(int epoll, struct epoll_event *events, int most, int64_t patience)
    {
        int64_t milliseconds = patience < 0 ? -1 : (patience + 999999) / 1000000;
    #ifdef SYS_epoll_pwait2
        struct { int64_t seconds, nanoseconds; } time = {patience / 1000000000, patience % 1000000000};
        if (patience > 0) {
            int count = (int)syscall(SYS_epoll_pwait2, epoll, events, most, &time, NULL, (size_t)0);
            if (count >= 0 || errno != ENOSYS)
                return count;
        }
    #endif
        return epoll_wait(epoll, events, most, milliseconds > INT32_MAX ? INT32_MAX : (int)milliseconds);
    }
    """
    int epoll_wait "vs_epoll_wait" (int epoll, epoll_event *events, int most, int64_t patience) nogil

cdef extern from "<time.h>" nogil:
    enum:
        CLOCK_MONOTONIC
    struct timespec:
        int64_t tv_sec
        int64_t tv_nsec
    int clock_gettime(int clock, timespec *now)

cdef extern from "<unistd.h>" nogil:
    int close(int fd)
    ssize_t read(int fd, void *data, size_t size)

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef enum:
    EVENTS_MAX = 256            # of one look at epoll
    LINGERING_MAX = 64
    LOOKS = 16                  # at the rings, between two looks at epoll
    # Nanoseconds that the driver waits at most for the interrupt that gives it back a chain that it has sent. By then it
    # has mostly fetched it by itself, and wants none.
    CALL_DELAY = 200000
    # Until a driver that gave back fewer buffers than it was expected to is asked for a kick for any.
    KICK_DELAY = 100000
    # Until more is read for a guest that has this many buffers to look at: it gets fuller ones instead.
    FILL_DELAY = 50000
    UNREAD = 2
    # But not if as much as this comes at a time.
    FULL_ENOUGH = 4096
    FOR_EVER = -1

cdef uint32_t GONE = EPOLLHUP | EPOLLERR
cdef uint32_t INPUT = EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR

cdef struct Work:
    Ring *ring
    Source *source              # of its descriptor; NULL: it has none now
    int log_fd
    bint fills                  # from the descriptor into the ring; else from the ring into the descriptor
    uint32_t run                # of the queue, in which bytes may move
    bint allowed                # whether Python has said so
    bint waiting                # for the descriptor to take more, or for the guest to give buffers
    bint tells_blocked          # that the descriptor takes no more is for Python
    bint held                   # the guest has enough to read: the descriptor is not looked at
    bint owes_call              # the driver has not been asked whether it wants to be interrupted
    uint16_t owed_until         # the used index when that was put off
    int64_t due                 # when to look again; 0: no need
    bint lingers
    bint in_backlog
    bint has_news
    int outcome                 # of the last turn
    Work *next_in_backlog
    Work *next_due
    Work *next_news
    PyObject *flow

cdef struct Source:
    int fd
    bint asked                  # Python wants to hear of
    uint32_t wanted             # these events
    bint registered             # epoll knows it, with
    uint32_t events             # these
    bint always_ready           # a regular file: epoll does not wait for it
    Ring *kicks                 # it is the kick descriptor of this ring
    Work *drain
    Work *fill

cdef struct Ready:
    int fd
    uint32_t events

cdef struct Wait:
    int epoll
    Source **sources            # by descriptor
    int room                    # in sources
    Work *backlog               # has its turn in the next pass
    Work *due                   # to be looked at when it is time
    bint holds                  # one of them gives the guest time to catch up
    Work *news                  # Python has to look at it
    Work *lingering[LINGERING_MAX]
    int lingerers
    int64_t spin_max            # nanoseconds; 0: never
    int64_t spin                # how long the next wait may spin
    Ready ready[EVENTS_MAX]
    int ready_count
    uint64_t sleeps
    uint64_t spins


# -- time --------------------------------------------------------------------------------------------------------------

cdef int64_t now() noexcept nogil:
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC, &time)
    return time.tv_sec * 1000000000 + time.tv_nsec


# -- a turn ------------------------------------------------------------------------------------------------------------

cdef inline bint may_move(Work *w) noexcept nogil:
    return w.allowed and w.source != NULL and w.ring.running and w.run == w.ring.starts


cdef int drain_some(Work *w, bint lingers) noexcept nogil:
    """Drains with kicks off. Who does not linger asks for kicks after the last chain, and looks once more (R-RING-18)."""
    cdef uint64_t left = BUDGET
    cdef int code
    ask_for_no_kick(w.ring)
    code = ring_drain(w.ring, w.source.fd, w.log_fd, &left)
    if code == EMPTY and not lingers and ring_kicks_on(w.ring):
        return MORE
    return code


cdef int fill_some(Work *w) noexcept nogil:
    """Fills. Without buffers it asks for a kick, and looks once more; while there are buffers no kick is needed."""
    cdef uint64_t left = BUDGET
    cdef int code = ring_fill(w.ring, w.source.fd, &left)
    if code == EMPTY and ring_kicks_ahead(w.ring):
        return MORE
    if code == BLOCKED:
        ask_for_no_kick(w.ring)
        if w.source.always_ready:                   # what a file has not given at once is at its end
            return MORE
    return code


cdef void take_turn(Work *w, bint lingers) noexcept nogil:
    """Moves what can be moved now."""
    w.held = False
    if not may_move(w):
        w.outcome = STOPPED
    elif w.fills:
        w.outcome = fill_some(w)
    else:
        w.outcome = drain_some(w, lingers)
    if w.outcome == INTERRUPTED:
        w.outcome = MORE
    if w.fills:
        w.waiting = w.outcome == EMPTY or w.outcome == STOPPED
    else:
        w.waiting = w.outcome == BLOCKED and not w.tells_blocked


cdef bint is_news(Work *w) noexcept nogil:
    """Whether Python has to hear of the turn: of its outcome, or because it alone can interrupt the guest."""
    if ring_lost(w.ring):
        return True
    if w.ring.call_fd < 0 and w.ring.unsignalled:
        return True
    if w.outcome == BLOCKED:
        return w.tells_blocked
    return w.outcome not in (EMPTY, MORE, STOPPED)


cdef inline void call(Wait *p, Work *w, bint lazily) noexcept nogil:
    """Interrupts the driver, if it wants that. For what it has sent that can wait, unless it may run out of chains."""
    if not lazily or w.fills or 2 * w.ring.unsignalled >= w.ring.size:
        w.owes_call = False
        ring_notify(w.ring)
    elif w.ring.unsignalled and not w.owes_call:
        put_off_call(p, w)


cdef inline void put_off_call(Wait *p, Work *w) noexcept nogil:
    w.owes_call = True
    w.owed_until = w.ring.used_idx
    look_again(p, w, CALL_DELAY)


cdef void look_again(Wait *p, Work *w, int64_t delay) noexcept nogil:
    """Some time later. What is due already is not put off."""
    if w.due == 0:
        w.due = now() + delay
        w.next_due = p.due
        p.due = w


cdef void have_turn(Wait *p, Work *w, bint lingers, bint lazily) noexcept nogil:
    """A turn, and what follows from it."""
    take_turn(w, lingers)
    if w.outcome != STOPPED and w.ring.call_fd >= 0:
        call(p, w, lazily)
    if w.fills and w.outcome == EMPTY:
        look_again(p, w, KICK_DELAY)
    if w.outcome == MORE:
        put_off(p, w)
    elif w.outcome not in (EMPTY, BLOCKED, STOPPED):
        w.allowed = False       # until Python has seen to it
    if settle(p, w.source):
        w.ring.error = errno
        w.outcome = FAILED
        w.allowed = False


cdef void go_on(Wait *p, Work *w) noexcept nogil:
    """The turn of a work that may move, in a wait: kicks can stay off for as long as its ring is looked at anyway."""
    cdef bint lingers = not w.fills and p.spin > 0 and (w.lingers or p.lingerers < LINGERING_MAX)
    have_turn(p, w, lingers, True)
    if lingers and w.outcome == EMPTY and not w.lingers:
        w.lingers = True
        p.lingering[p.lingerers] = w
        p.lingerers += 1
    if is_news(w) and not w.has_news:
        w.has_news = True
        w.next_news = p.news
        p.news = w


cdef inline void put_off(Wait *p, Work *w) noexcept nogil:
    """There is more than fits into one turn."""
    if not w.in_backlog:
        w.in_backlog = True
        w.next_in_backlog = p.backlog
        p.backlog = w


cdef void work_off(Wait *p) noexcept nogil:
    """One turn for everybody in the backlog."""
    cdef Work *w = p.backlog
    cdef Work *after
    p.backlog = NULL
    while w != NULL:
        after = w.next_in_backlog
        w.in_backlog = False
        if may_move(w):
            go_on(p, w)
        w = after


cdef int64_t look_at_due(Wait *p) noexcept nogil:
    """Sees to what is due; says for how long nothing else is, or FOR_EVER."""
    cdef Work *w = p.due
    cdef Work *after
    cdef int64_t time, left = FOR_EVER
    p.holds = False
    if w == NULL:
        return left
    time = now()
    p.due = NULL
    while w != NULL:
        after = w.next_due
        if w.due <= time:
            w.due = 0
            is_due(p, w)
        else:
            left = w.due - time if left < 0 else min(left, w.due - time)
            p.holds |= w.held
            w.next_due = p.due
            p.due = w
        w = after
    return left


cdef void is_due(Wait *p, Work *w) noexcept nogil:
    """The driver is called, or the descriptor or the ring looked at, after all."""
    if not w.ring.running or w.run != w.ring.starts:
        w.owes_call = w.held = False                # with another start comes another call (R-RING-23)
        return
    if w.owes_call and ring_fetched(w.ring, w.owed_until) and w.owed_until != w.ring.used_idx:
        put_off_call(p, w)      # it is for younger chains only
    elif w.owes_call:
        w.owes_call = False
        if w.ring.call_fd >= 0:
            ring_notify(w.ring)
    if w.held or (w.fills and w.waiting and ring_kicks_on(w.ring)):
        w.held = w.waiting = False
        put_off(p, w)


cdef bint has_enough(Work *w) noexcept nogil:
    """Whether the guest is behind with buffers that have little in them."""
    return w.ring.fill_want < FULL_ENOUGH and ring_unread(w.ring) >= UNREAD


# -- descriptors -------------------------------------------------------------------------------------------------------

cdef uint32_t needed(Source *s) noexcept nogil:
    """What epoll has to wait for."""
    cdef uint32_t events = s.wanted if s.asked else 0
    if s.drain != NULL and s.drain.waiting and may_move(s.drain):
        events |= EPOLLOUT
    if s.fill != NULL and not s.fill.waiting and not s.fill.held and may_move(s.fill):
        events |= EPOLLIN
    return events


cdef int settle(Wait *p, Source *s) noexcept nogil:
    """Brings epoll in line with what is needed; -1: it could not, and errno says why.

    A descriptor that nobody asks for is not left with epoll, which would go on reporting its hang-up.
    """
    cdef epoll_event event
    cdef uint32_t events
    if s == NULL or s.always_ready:
        return 0
    event.events = events = needed(s)
    event.data.fd = s.fd
    if not s.asked and events == 0:
        if s.registered:
            s.registered = False
            return epoll_ctl(p.epoll, EPOLL_CTL_DEL, s.fd, &event)
        return 0
    if s.registered and events == s.events:
        return 0
    if epoll_ctl(p.epoll, EPOLL_CTL_MOD if s.registered else EPOLL_CTL_ADD, s.fd, &event):
        return -1
    s.registered = True
    s.events = events
    return 0


cdef bint kicked(Wait *p, Source *s) noexcept nogil:
    """The driver has offered something; False: that is for Python, and nothing was read."""
    cdef Work *w = <Work *>s.kicks.work
    cdef uint64_t count
    cdef ssize_t n
    if w == NULL or not may_move(w):
        return False
    n = read(s.fd, &count, sizeof(count))
    if n == 0 or (n < 0 and errno != EAGAIN and errno != EINTR):
        return False
    if w.fills == w.waiting:    # who waits for the host is not helped by the guest, and the other way round
        w.waiting = False
        go_on(p, w)
    return True


cdef uint32_t move_what_it_can(Wait *p, Source *s, uint32_t events) noexcept nogil:
    """Bytes move, if that is what the events are about; says which events are left for Python."""
    if events & (EPOLLOUT | GONE) and s.drain != NULL and s.drain.waiting and may_move(s.drain):
        go_on(p, s.drain)
        events &= ~<uint32_t>EPOLLOUT
    if events & INPUT and s.fill != NULL and not s.fill.waiting and may_move(s.fill):
        if events == EPOLLIN and has_enough(s.fill):
            s.fill.held = True
            look_again(p, s.fill, FILL_DELAY)
        else:
            go_on(p, s.fill)
        events &= ~(INPUT if not s.fill.waiting else <uint32_t>EPOLLIN)
    settle(p, s)                # the queue of a flow may have stopped since
    return events


cdef void dispatch(Wait *p, int fd, uint32_t events) noexcept nogil:
    cdef Source *s = p.sources[fd]
    if s == NULL or not s.registered:
        return
    if s.kicks != NULL and events == EPOLLIN and kicked(p, s):
        return
    if s.drain != NULL or s.fill != NULL:
        events = move_what_it_can(p, s, events)
    if s.asked and events & (s.wanted | GONE):
        p.ready[p.ready_count].fd = fd
        p.ready[p.ready_count].events = events & (s.wanted | GONE)
        p.ready_count += 1


# -- waiting -----------------------------------------------------------------------------------------------------------

cdef bint look_at_lingering(Wait *p) noexcept nogil:
    """Whether rings have got chains while their kicks were off: they have a turn, and linger on."""
    cdef int i
    for i in range(p.lingerers):
        if p.lingering[i].outcome == EMPTY and has_chain(p.lingering[i].ring):
            put_off(p, p.lingering[i])
    return p.backlog != NULL


cdef void end_lingering(Wait *p) noexcept nogil:
    """Asks for the kicks that were not asked for while the rings were looked at anyway (R-RING-18)."""
    cdef Work *w
    cdef int i
    for i in range(p.lingerers):
        w = p.lingering[i]
        w.lingers = False
        if w.outcome == EMPTY and ring_kicks_on(w.ring):
            put_off(p, w)
    p.lingerers = 0


cdef int spin(Wait *p, epoll_event *events, int64_t end) noexcept nogil:
    """Looks instead of sleeping. Says how many events there are; or there is a backlog, or nothing has come."""
    cdef int i, count
    p.spins += 1
    while True:
        sched_yield()           # whom the last turn has woken may have been given this very processor
        for i in range(LOOKS if p.lingerers else 1):
            if look_at_lingering(p):
                return 0
        count = epoll_wait(p.epoll, events, EVENTS_MAX, 0)
        if count or now() >= end:
            return count


cdef int sleep(Wait *p, epoll_event *events, int64_t patience) noexcept nogil:
    """Waits for events, at most ``patience`` nanoseconds; if the last wait was short, it spins before it sleeps."""
    cdef int64_t began, length
    cdef int count
    if p.spin_max == 0:
        p.sleeps += 1
        return epoll_wait(p.epoll, events, EVENTS_MAX, patience)
    began = now()
    length = p.spin if patience < 0 else min(p.spin, patience)
    if p.holds or p.lingerers == 0:
        length = 0              # the guest may need this processor; and it is kicks that are dear, not who wakes us else
    if length:
        count = spin(p, events, began + length)
        if count or p.backlog != NULL or length == patience:
            return count
    end_lingering(p)
    if p.backlog != NULL:
        return 0
    p.sleeps += 1
    count = epoll_wait(p.epoll, events, EVENTS_MAX, patience - length if patience > 0 else patience)
    if count:                   # else only the time was over
        p.spin = p.spin_max if now() - began <= p.spin_max else 0
    return count


cdef int wait(Wait *p, int64_t patience) noexcept nogil:
    """Moves bytes until there is something for Python, or ``patience`` is over; an errno, or 0."""
    cdef epoll_event events[EVENTS_MAX]
    cdef int64_t end = now() + patience if patience > 0 else 0, left = patience, due
    cdef int i, count
    p.ready_count = 0
    while True:
        work_off(p)
        due = look_at_due(p)
        if p.backlog != NULL or p.news != NULL or left == 0:
            count = epoll_wait(p.epoll, events, EVENTS_MAX, 0)
        else:
            count = sleep(p, events, left if due < 0 or (0 < left < due) else due)
        if count < 0:
            return errno
        for i in range(count):
            dispatch(p, events[i].data.fd, events[i].events)
        if p.ready_count or p.news != NULL:
            return 0
        if patience >= 0:
            left = max(end - now(), 0) if patience else 0
            if left == 0:
                return 0


# -- the classes -------------------------------------------------------------------------------------------------------

@cython.final
@cython.no_gc_clear                                 # what the sources and works point to lives as long as this
cdef class Poller:
    """Waits for descriptors, and lets flows move bytes meanwhile."""

    cdef Wait p
    cdef bint waits                                 # whether a thread is in poll(), without the interpreter lock
    cdef dict kicks                                 # the queues that sources point to, by descriptor
    cdef object __weakref__

    def __cinit__(self):
        self.p.epoll = epoll_create1(EPOLL_CLOEXEC)
        if self.p.epoll < 0:
            raise OSError(errno, os.strerror(errno))
        self.kicks = {}

    def __dealloc__(self):
        cdef int fd
        self.close()
        for fd in range(self.p.room):
            PyMem_Free(self.p.sources[fd])
        PyMem_Free(self.p.sources)

    def close(self) -> None:
        """Gives back its own descriptor; nothing that was watched is closed."""
        if self.p.epoll >= 0:
            close(self.p.epoll)
            self.p.epoll = -1

    cdef int alone(self) except -1:
        if self.waits:
            raise RuntimeError("the poller is at work in another thread")
        return 0

    cdef Source *source(self, int fd) except NULL:
        """The source of ``fd``, made if there was none."""
        cdef Source **sources
        cdef int room
        self.alone()
        if fd < 0:
            raise ValueError(f"no descriptor: {fd}")
        if fd >= self.p.room:
            room = max(fd + 1, 2 * self.p.room)
            sources = <Source **>PyMem_Realloc(self.p.sources, room * sizeof(Source *))
            if sources == NULL:
                raise MemoryError
            memset(sources + self.p.room, 0, (room - self.p.room) * sizeof(Source *))
            self.p.sources = sources
            self.p.room = room
        if self.p.sources[fd] == NULL:
            self.p.sources[fd] = <Source *>PyMem_Calloc(1, sizeof(Source))
            if self.p.sources[fd] == NULL:
                raise MemoryError
            self.p.sources[fd].fd = fd
        return self.p.sources[fd]

    cdef int settled(self, Source *s) except -1:
        if settle(&self.p, s):
            s.always_ready = errno == EPERM
            raise OSError(errno, os.strerror(errno))
        return 0

    @property
    def spin_max(self):
        """For how many nanoseconds a wait may look instead of sleep at most, while that pays; 0: never."""
        return self.p.spin_max

    @spin_max.setter
    def spin_max(self, int64_t nanoseconds):
        if nanoseconds < 0:
            raise ValueError(f"a time cannot be negative: {nanoseconds}")
        self.p.spin_max = nanoseconds
        self.p.spin = 0

    @property
    def sleeps(self):
        """How often it went to sleep."""
        return self.p.sleeps

    @property
    def spins(self):
        """How often it looked for a while before that."""
        return self.p.spins

    def watch(self, fd: int, events: int) -> None:
        """poll() says from now on when one of ``events``, or a hang-up, is ready at ``fd``."""
        cdef Source *s = self.source(fd)
        if s.always_ready:
            raise PermissionError(EPERM, os.strerror(EPERM))
        s.asked = True
        s.wanted = events
        try:
            self.settled(s)
        except OSError:
            s.asked = False
            if s.drain == NULL and s.fill == NULL:
                self.unwatch(fd)                    # its number may be another one's next time
            raise

    def watch_kick(self, fd: int, queue: DeviceQueue) -> None:
        """As watch() for reading; but a flow of ``queue`` that may move goes on, and reads ``fd``, by itself."""
        self.watch(fd, EPOLLIN)
        self.kicks[fd] = queue
        self.p.sources[fd].kicks = &queue.r

    def ignore(self, fd: int) -> None:
        """poll() says nothing of ``fd`` any more; what flows through it goes on."""
        self.alone()
        if 0 <= fd < self.p.room and self.p.sources[fd] != NULL:
            self.p.sources[fd].asked = False
            self.settled(self.p.sources[fd])

    def unwatch(self, fd: int) -> None:
        """Forgets ``fd``, and whatever flows through it stands still; before the descriptor is closed."""
        cdef Source *s
        self.alone()
        if fd < 0 or fd >= self.p.room or self.p.sources[fd] == NULL:
            return
        s = self.p.sources[fd]
        self.kicks.pop(fd, None)
        s.asked = False
        s.kicks = NULL
        if s.drain != NULL:
            self.detach(s.drain)
        if s.fill != NULL:
            self.detach(s.fill)
        settle(&self.p, s)
        self.p.sources[fd] = NULL
        PyMem_Free(s)

    cdef int detach(self, Work *w) except -1:
        """The work has no descriptor any more."""
        cdef Source *s = w.source
        if s == NULL:
            return 0
        w.allowed = w.waiting = False
        w.source = NULL
        if s.drain == w:
            s.drain = NULL
        if s.fill == w:
            s.fill = NULL
        settle(&self.p, s)
        return 0

    def poll(self, timeout: float | None) -> tuple[list[tuple[int, int]], list[Flow]]:
        """Moves bytes until something is ready that was asked for, a flow has news, or ``timeout`` seconds are over."""
        cdef int64_t patience = FOR_EVER if timeout is None else <int64_t>math.ceil(timeout * 1e9)
        cdef int error, i
        self.alone()
        self.waits = True
        with nogil:
            error = wait(&self.p, patience)
            end_lingering(&self.p)
        self.waits = False
        if error and error != EINTR:
            raise OSError(error, os.strerror(error))
        PyErr_CheckSignals()
        return [(self.p.ready[i].fd, self.p.ready[i].events) for i in range(self.p.ready_count)], self.take_news()

    cdef int drop(self, Work *w) except -1:
        """The work does not go on, and its news is of no interest."""
        cdef Work **link = &self.p.backlog
        while link[0] != NULL:
            if link[0] == w:
                link[0] = w.next_in_backlog
            else:
                link = &link[0].next_in_backlog
        link = &self.p.due
        while link[0] != NULL:
            if link[0] == w:
                link[0] = w.next_due
            else:
                link = &link[0].next_due
        link = &self.p.news
        while link[0] != NULL:
            if link[0] == w:
                link[0] = w.next_news
            else:
                link = &link[0].next_news
        return 0

    cdef list take_news(self):
        news = []
        cdef Work *w = self.p.news
        self.p.news = NULL
        while w != NULL:
            w.has_news = False
            news.append(<object>w.flow)
            w = w.next_news
        return news


@cython.final
@cython.no_gc_clear                                 # the end needs both
cdef class Flow:
    """One direction of one port: between a queue and a descriptor."""

    cdef Work w
    cdef Poller poller
    cdef DeviceQueue queue
    cdef readonly object callback

    def __cinit__(self, poller: Poller, queue: DeviceQueue, callback, *, fills: bool):
        queue.idle()
        if queue.r.work != NULL:
            raise ValueError(f"queue {queue.index} has a flow already")
        self.poller = poller
        self.queue = queue
        self.callback = callback
        self.w.ring = &queue.r
        self.w.fills = fills
        self.w.flow = <PyObject *>self
        queue.r.work = &self.w
        queue.poller = &poller.waits

    def __dealloc__(self):
        if self.callback is not None:
            self.forget()

    cdef int forget(self) except -1:
        """Nobody points to the work any more."""
        self.poller.detach(&self.w)
        self.poller.drop(&self.w)
        self.queue.r.work = NULL
        self.queue.poller = NULL
        self.callback = None
        return 0

    def close(self) -> None:
        """The end: its queue may have another one. Safe to call twice."""
        if self.callback is not None:
            self.poller.alone()
            self.forget()

    def start(self, fd: int, log_fd: int = -1, *, tells_blocked: bool = False) -> None:
        """Bytes may move from now on, until stop(), or until the queue stops."""
        cdef Source *s = self.poller.source(fd)
        cdef Work *other = s.fill if self.w.fills else s.drain
        if self.callback is None:
            raise ValueError("the flow is closed")
        if other != NULL and other != &self.w:
            raise ValueError(f"descriptor {fd} has a flow in this direction already")
        if self.w.source != s:
            self.poller.detach(&self.w)
            self.w.source = s
        if self.w.fills:
            s.fill = &self.w
        else:
            s.drain = &self.w
        if not may_move(&self.w):
            self.w.waiting = self.w.held = self.w.owes_call = False
        self.w.log_fd = log_fd
        self.w.tells_blocked = tells_blocked
        self.w.allowed = True
        self.w.run = self.w.ring.starts
        self.settle(s)

    cdef int settle(self, Source *s) except -1:
        try:
            self.poller.settled(s)
        except PermissionError:                     # a file can always be read: it has a turn in each pass
            pass
        if s.always_ready and self.w.fills:
            put_off(&self.poller.p, &self.w)
        return 0

    def stop(self) -> None:
        """No byte moves from now on, until start()."""
        self.poller.alone()
        self.w.allowed = False
        if self.w.source != NULL:
            self.poller.settled(self.w.source)

    @property
    def moves(self):
        """Whether bytes may move."""
        return may_move(&self.w)

    @property
    def waiting(self):
        """Whether it waits for the descriptor to take more (drain), or for the guest to give buffers (fill)."""
        return may_move(&self.w) and self.w.waiting

    def wake(self) -> None:
        """What it waits for may be there."""
        self.poller.alone()
        self.w.waiting = False
        if self.w.source != NULL:
            self.settle(self.w.source)

    def run(self) -> Status:
        """A turn now; comes back as DeviceQueue.drain() or fill() does."""
        self.poller.alone()
        if self.queue.enter():
            try:
                with nogil:
                    have_turn(&self.poller.p, &self.w, False, False)
            finally:
                self.queue.busy = False
        else:
            self.w.outcome = STOPPED
            self.w.waiting = self.w.fills
        return self.result()

    def result(self) -> Status:
        """What the last turn came to; comes back as DeviceQueue.drain() or fill() does."""
        if self.w.outcome == STOPPED or not self.queue.r.running:
            return Status.STOPPED
        return self.queue.status(self.w.outcome)
