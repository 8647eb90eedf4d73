# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: freethreading_compatible=True, auto_pickle=False, autotestdict=False
"""The table of buckets. The stub, _bucket.pyi, is its manual.

C below, a thin class above. Everything that a decision needs lies in one mapped region without a Python
object in it: a header, an index of 32-bit entries (open addressing, linear probing), and dense slots of one
cache line each, which never move. A bucket's key is kept as a keyed 96-bit fingerprint.

SAFETY: boundscheck is off. Every slot number comes from the index or the free list, which only the functions
here write and only under the lock; every array of a handle or an outcome has the handle's length, and each
entry point checks its arguments against that length before it takes the lock.
"""

import hashlib
import mmap
import secrets

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.long cimport PyLong_AsLongLong
from cpython.mem cimport PyMem_Calloc, PyMem_Free, PyMem_Malloc
from libc.stdint cimport INT64_MAX, int64_t, uint32_t, uint64_t
from libc.string cimport memcpy

from tokenguard.errors import StaleHandle, TableBusy, TableFull

cdef extern from *:
    """
    #include <pthread.h>
    #include <stdint.h>
    #include <time.h>

    typedef __int128 tg_wide;  /* holds any product of two int64 */

    static inline int64_t tg_now_us(void) {
        struct timespec t;
        clock_gettime(CLOCK_REALTIME, &t);
        return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
    }

    static inline int tg_lock_init(pthread_mutex_t *lock) {
        pthread_mutexattr_t attributes;
        int failed = pthread_mutexattr_init(&attributes)
            || pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED)
            || pthread_mutex_init(lock, &attributes);
        pthread_mutexattr_destroy(&attributes);
        return failed;
    }

    static inline int tg_lock_wait(pthread_mutex_t *lock) {
    #ifdef __APPLE__
        return pthread_mutex_lock(lock);  /* no timed wait there */
    #else
        struct timespec deadline;
        clock_gettime(CLOCK_REALTIME, &deadline);
        deadline.tv_sec += 1;
        return pthread_mutex_timedlock(lock, &deadline);
    #endif
    }
    """
    ctypedef long long wide "tg_wide"
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_trylock(pthread_mutex_t *) noexcept nogil
    int pthread_mutex_unlock(pthread_mutex_t *) noexcept nogil
    int64_t tg_now_us() noexcept nogil
    int tg_lock_init(pthread_mutex_t *) noexcept nogil
    int tg_lock_wait(pthread_mutex_t *) noexcept nogil

cdef enum:
    PLAN = 32                     # buckets in one plan
    INDEX_OFFSET = 4096           # bytes; the header has the first page for itself
    RECLAIM_SCAN = 1024           # slots looked at for one to reclaim; bounds the time under the lock
    STEP_US = 1_000_000           # a clock that steps back further than this is believed

MAX_PLAN = PLAN
MAX_BUCKETS = 10_000_000

cdef frozenset TICKS_US = frozenset(10 ** exponent for exponent in range(7))

cdef int64_t NEVER = 10**15
cdef int64_t MAX_UNITS = <int64_t>1 << 52

cdef enum Status:
    ALLOWED
    SHORT
    STALE
    FULL

cdef struct Slot:                 # 64 bytes, one cache line
    uint64_t print_hi
    uint32_t print_lo
    uint32_t tick_us              # 0: the slot is free, and `level` is the next free one
    int64_t level
    int64_t tick
    int64_t capacity
    int64_t debt
    int64_t gain
    int64_t unit

cdef struct Entry:                # one bucket of a handle: a slot as it should be, and where it was last seen
    Slot want
    uint32_t slot

cdef struct Bucket:               # one bucket of an outcome
    int64_t level
    int64_t tick
    int64_t cost
    int64_t wait_us

cdef struct Counters:
    uint32_t used
    int64_t reclaimed
    int64_t refused_full
    int64_t clock_steps
    int64_t forgiven

cdef struct Header:
    uint64_t epoch                # moves with every change of a budget
    uint32_t slots
    uint32_t index_mask
    uint32_t fresh                # slots from here on were never used
    uint32_t free                 # head of the list of free slots, as number + 1
    uint32_t hand                 # where reclaiming looks next
    Counters counters
    pthread_mutex_t lock

cdef struct Table:
    Header *header
    uint32_t *index               # slot number + 1; 0 is empty
    Slot *slots


# --- one bucket ---------------------------------------------------------------------------------------------

cdef inline int64_t floor_div(int64_t a, int64_t b) noexcept nogil:
    return a // b - (a % b != 0 and a < 0)


cdef inline int64_t clamp(int64_t value, int64_t low, int64_t high) noexcept nogil:
    return low if value < low else high if value > high else value


cdef inline int64_t add(int64_t a, int64_t b) noexcept nogil:
    """Return the sum of two amounts that are not negative; what is more than fits stays at the most that does."""
    return a + b if a <= INT64_MAX - b else INT64_MAX


cdef inline bint refill(Slot *s, int64_t now_us) noexcept nogil:
    """Bring ``s`` up to now; return whether the clock had stepped back so far that its tick was set anew."""
    cdef int64_t tick = now_us // s.tick_us
    cdef int64_t room
    if tick > s.tick:
        room = s.capacity * s.unit - s.level
        if <wide>(tick - s.tick) * s.gain >= room:
            s.level += room
        else:
            s.level += (tick - s.tick) * s.gain
        s.tick = tick
    elif (s.tick - 1) * s.tick_us - now_us >= STEP_US:  # a tick may begin up to its own length in the future
        s.tick = tick
        return True
    return False


cdef inline bint same_scale(const Slot *a, const Slot *b) noexcept nogil:
    return (a.capacity == b.capacity and a.gain == b.gain and a.unit == b.unit
            and a.debt == b.debt and a.tick_us == b.tick_us)


cdef void convert(Table *t, Slot *s, const Slot *want, int64_t now_us) noexcept nogil:
    """Take over another scale: what was used stays used, to the whole token; ``s`` is up to now."""
    cdef int64_t tokens = floor_div(s.level, s.unit) + want.capacity - s.capacity
    cdef int64_t held_us = s.tick * s.tick_us
    if held_us > now_us:          # a frozen clock grants nothing twice
        now_us = held_us
    if tokens < -want.debt:
        t.header.counters.forgiven = add(t.header.counters.forgiven, -want.debt - tokens)
    s.level = clamp(tokens, -want.debt, want.capacity) * want.unit
    s.tick = (now_us + want.tick_us - 1) // want.tick_us
    s.capacity, s.debt, s.gain, s.unit, s.tick_us = want.capacity, want.debt, want.gain, want.unit, want.tick_us


cdef bint bring_up(Table *t, Slot *s, const Slot *want, int64_t now_us) noexcept nogil:
    """Bring ``s`` up to now and to the scale wanted; return whether that must be kept even on a refusal.

    A clock that stepped back, and a budget that changed, are facts of their own. If a refusal dropped the
    change of budget, a bucket under an old rate of 0 would be refused for ever.
    """
    cdef bint stepped = refill(s, now_us)
    cdef bint changed = not same_scale(s, want)
    if stepped:
        t.header.counters.clock_steps += 1
    if changed:
        convert(t, s, want, now_us)
    return stepped or changed


cdef inline int64_t time_us(const Slot *s, int64_t units, int64_t now_us) noexcept nogil:
    """Return the µs until the level has risen by ``units``, rounded up; at most NEVER."""
    cdef wide at
    if units <= 0:
        return 0
    if s.gain == 0:
        return NEVER
    at = (<wide>s.tick + (units + s.gain - 1) // s.gain) * s.tick_us - now_us
    return <int64_t>at if at < NEVER else NEVER


cdef inline int64_t wait_us(const Slot *s, int64_t cost, int64_t now_us) noexcept nogil:
    """Return the µs until ``s`` would pass ``cost``: 0 is now, NEVER is never."""
    if cost == 0:
        return 0
    if cost > s.capacity:         # decided before any multiplication
        return NEVER
    return time_us(s, cost * s.unit - s.level, now_us)


cdef inline Slot full(const Slot *want, int64_t now_us) noexcept nogil:
    """Return a new bucket of a key and scale: it is full."""
    cdef Slot s = want[0]
    s.level = s.capacity * s.unit
    s.tick = now_us // s.tick_us
    return s


# --- the table ----------------------------------------------------------------------------------------------

cdef inline bint is_key(const Slot *s, const Slot *want) noexcept nogil:
    return s.print_hi == want.print_hi and s.print_lo == want.print_lo and s.tick_us != 0


cdef inline Slot *find(Table *t, Entry *e) noexcept nogil:
    """Return the entry's slot, or NULL. The entry remembers where it was, and checks the key there first."""
    cdef uint32_t i
    cdef uint32_t mask = t.header.index_mask
    if e.slot < t.header.slots and is_key(&t.slots[e.slot], &e.want):
        return &t.slots[e.slot]
    i = e.want.print_hi & mask
    while t.index[i]:
        if is_key(&t.slots[t.index[i] - 1], &e.want):
            e.slot = t.index[i] - 1
            return &t.slots[e.slot]
        i = (i + 1) & mask
    return NULL


cdef void unlink(Table *t, uint32_t slot) noexcept nogil:
    """Take a slot out of the index (closing the gap, so that probing still works) and free it."""
    cdef uint32_t mask = t.header.index_mask
    cdef uint32_t gap = t.slots[slot].print_hi & mask
    cdef uint32_t i, home
    while t.index[gap] != slot + 1:
        gap = (gap + 1) & mask
    i = gap
    while True:
        i = (i + 1) & mask
        if not t.index[i]:
            break
        home = t.slots[t.index[i] - 1].print_hi & mask
        if ((i - home) & mask) >= ((i - gap) & mask):
            t.index[gap] = t.index[i]
            gap = i
    t.index[gap] = 0
    t.slots[slot].tick_us = 0
    t.slots[slot].level = t.header.free
    t.header.free = slot + 1
    t.header.counters.used -= 1


cdef bint reclaim(Table *t, const Entry *keep, int n, int64_t now_us) noexcept nogil:
    """Free one slot whose bucket is full and not among ``keep``: it cannot be told from a new one."""
    cdef uint32_t slot
    cdef uint32_t looked = 0
    cdef int i
    cdef Slot s
    while looked < RECLAIM_SCAN and looked < t.header.slots:
        slot = t.header.hand
        t.header.hand = slot + 1 if slot + 1 < t.header.slots else 0
        looked += 1
        s = t.slots[slot]
        if s.tick_us == 0:
            continue
        refill(&s, now_us)
        if s.level != s.capacity * s.unit or s.tick * s.tick_us > now_us:  # a new one would start now
            continue
        for i in range(n):
            if is_key(&t.slots[slot], &keep[i].want):
                break
        else:
            unlink(t, slot)
            t.header.counters.reclaimed += 1
            return True
    return False


cdef Slot *insert(Table *t, Entry *keep, int n, Entry *e, int64_t now_us) noexcept nogil:
    """Return a new, full bucket for ``e``, or NULL if there is no room."""
    cdef Header *h = t.header
    cdef uint32_t slot, i
    if not h.free and h.fresh == h.slots and not reclaim(t, keep, n, now_us):
        h.counters.refused_full += 1
        return NULL
    if h.free:
        slot = h.free - 1
        h.free = <uint32_t>t.slots[slot].level
    else:
        slot = h.fresh
        h.fresh += 1
    h.counters.used += 1
    i = e.want.print_hi & h.index_mask
    while t.index[i]:
        i = (i + 1) & h.index_mask
    t.index[i] = slot + 1
    t.slots[slot] = full(&e.want, now_us)
    e.slot = slot
    return &t.slots[slot]


# --- the operations, each under the lock --------------------------------------------------------------------

cdef Status take(Table *t, Entry *entries, const int64_t *costs, int n, uint64_t epoch, Bucket *seen,
                 int *binding, int64_t now_us) noexcept nogil:
    """Check every bucket on a copy, then take from all or from none."""
    cdef Slot work[PLAN]
    cdef Slot *slots[PLAN]
    cdef int64_t longest = 0
    cdef int i
    if epoch != t.header.epoch:
        return STALE
    for i in range(n):
        slots[i] = find(t, &entries[i])
        if slots[i] == NULL:
            work[i] = full(&entries[i].want, now_us)
        else:
            work[i] = slots[i][0]
            if bring_up(t, &work[i], &entries[i].want, now_us):
                slots[i][0] = work[i]
        seen[i].wait_us = wait_us(&work[i], costs[i], now_us)
        if seen[i].wait_us > longest:
            longest = seen[i].wait_us
            binding[0] = i
    if not longest:
        for i in range(n):
            if slots[i] == NULL and costs[i]:
                slots[i] = insert(t, entries, n, &entries[i], now_us)
                if slots[i] == NULL:
                    return FULL
        for i in range(n):
            if costs[i]:
                work[i].level -= costs[i] * work[i].unit
                slots[i].level, slots[i].tick = work[i].level, work[i].tick
    for i in range(n):
        seen[i].level, seen[i].tick, seen[i].cost = work[i].level, work[i].tick, costs[i]
    return SHORT if longest else ALLOWED


cdef int64_t charge(Slot *s, int64_t delta) noexcept nogil:
    """Take ``delta`` more tokens (or give them back) within the bounds; return how many were forgiven."""
    cdef int64_t bound = s.capacity + s.debt
    cdef int64_t before = s.level
    s.level = clamp(before - clamp(delta, -bound, bound) * s.unit, -s.debt * s.unit, s.capacity * s.unit)
    return delta - (before - s.level) // s.unit if delta > 0 else 0


cdef int64_t settle_all(Table *t, Entry *entries, const int64_t *deltas, int n, int64_t now_us) noexcept nogil:
    """Charge each bucket its delta, under the scale that it stands in; return how much was forgiven."""
    cdef int64_t forgiven = 0
    cdef Slot *s
    cdef int i
    for i in range(n):
        if deltas[i] == 0:
            continue
        s = find(t, &entries[i])
        if s == NULL:
            if deltas[i] < 0:     # reclaimed when it was full: there is nothing to give back to
                continue
            s = insert(t, entries, n, &entries[i], now_us)
            if s == NULL:
                forgiven = add(forgiven, deltas[i])
                continue
        if refill(s, now_us):
            t.header.counters.clock_steps += 1
        forgiven = add(forgiven, charge(s, deltas[i]))
    t.header.counters.forgiven = add(t.header.counters.forgiven, forgiven)
    return forgiven


cdef void peek_all(Table *t, Entry *entries, int n, Bucket *seen, int64_t now_us) noexcept nogil:
    """Show each bucket as a reserve would find it now, and write nothing."""
    cdef Slot work
    cdef Slot *s
    cdef Counters counters = t.header.counters
    cdef int i
    for i in range(n):
        s = find(t, &entries[i])
        if s == NULL:
            work = full(&entries[i].want, now_us)
        else:
            work = s[0]
            bring_up(t, &work, &entries[i].want, now_us)
        seen[i].level, seen[i].tick, seen[i].cost, seen[i].wait_us = work.level, work.tick, 0, 0
    t.header.counters = counters  # nothing happened: what bring_up counted, it counted on copies


cdef bint put(Table *t, Entry *e, bint has_level, int64_t level, int64_t now_us) noexcept nogil:
    """Give a bucket the entry's scale at once, and a level if asked; return False if there is no room."""
    cdef Slot *s = find(t, e)
    if s != NULL:
        bring_up(t, s, &e.want, now_us)
    if has_level and (s != NULL or level < e.want.capacity):
        if s == NULL:
            s = insert(t, e, 1, e, now_us)
            if s == NULL:
                return False
        s.level = level * s.unit
    t.header.epoch += 1
    return True


# --- the classes --------------------------------------------------------------------------------------------

cdef class Handle:
    cdef Entry *entries
    cdef object owner
    cdef readonly uint64_t epoch
    cdef int count

    def __dealloc__(self):
        PyMem_Free(self.entries)

    def __len__(self):
        return self.count


cdef class Outcome:
    cdef Handle plan
    cdef public object handle
    cdef Bucket *seen
    cdef int64_t now_us
    cdef readonly bint allowed
    cdef readonly int binding

    def __dealloc__(self):
        PyMem_Free(self.seen)

    cdef int check(self, int i) except -1:
        if self.plan is None:
            raise TypeError("an Outcome is made by a table")
        if not 0 <= i < self.plan.count:
            raise IndexError(f"bucket must be between 0 and {self.plan.count - 1}, got {i}")
        return 0

    def __len__(self):
        return 0 if self.plan is None else self.plan.count

    @property
    def retry_after_us(self):
        return 0 if self.allowed else self.wait_us(self.binding)

    def level(self, int i):
        self.check(i)
        return floor_div(self.seen[i].level, self.plan.entries[i].want.unit)

    def limit(self, int i):
        self.check(i)
        return self.plan.entries[i].want.capacity

    def cost(self, int i):
        self.check(i)
        return self.seen[i].cost

    def wait_us(self, int i):
        self.check(i)
        return self.seen[i].wait_us

    def full_in_us(self, int i):
        cdef Slot s
        self.check(i)
        s = self.plan.entries[i].want
        s.tick = self.seen[i].tick
        return time_us(&s, s.capacity * s.unit - self.seen[i].level, self.now_us)

    def __repr__(self):
        what = "allowed" if self.allowed else f"short for {self.retry_after_us} µs at {self.binding}"
        return f"<Outcome {what}, levels {[self.level(i) for i in range(len(self))]}>"


cdef Outcome new_outcome(Handle handle):
    cdef Outcome o = Outcome.__new__(Outcome)
    o.plan = o.handle = handle
    o.seen = <Bucket *>PyMem_Malloc(handle.count * sizeof(Bucket))
    if o.seen == NULL:
        raise MemoryError
    o.allowed = True
    o.binding = -1
    return o


def outcome_of(Handle handle not None, tuple costs, bint allowed, list told not None, Py_ssize_t at, now_us):
    cdef Outcome o = new_outcome(handle)
    cdef Bucket *seen
    cdef Slot s
    cdef int64_t longest = 0
    cdef int i
    if at < 0 or at + 2 * handle.count > len(told):
        raise ValueError(f"{2 * handle.count} integers from {at} on are asked for, there are {len(told)}")
    if costs is not None and len(costs) != handle.count:
        raise ValueError(f"the plan has {handle.count} buckets, got {len(costs)} costs")
    o.now_us = PyLong_AsLongLong(now_us)
    o.allowed = allowed
    for i in range(handle.count):
        seen = &o.seen[i]
        s = handle.entries[i].want
        s.level = seen.level = PyLong_AsLongLong(told[at + 2 * i])
        s.tick = seen.tick = PyLong_AsLongLong(told[at + 2 * i + 1])
        seen.cost = 0 if costs is None else PyLong_AsLongLong(costs[i])
        seen.wait_us = 0 if allowed else wait_us(&s, seen.cost, o.now_us)
        if seen.wait_us > longest:
            longest = seen.wait_us
            o.binding = i
    return o


cdef class BucketTable:
    cdef Table table
    cdef Py_buffer buffer
    cdef object region
    cdef readonly bytes seed

    def __cinit__(self, int64_t buckets=500_000, *, bytes seed=None):
        cdef uint32_t index = 8
        if not 1 <= buckets <= MAX_BUCKETS:
            raise ValueError(f"buckets must be between 1 and {MAX_BUCKETS}, got {buckets}")
        if seed is not None and len(seed) > 64:
            raise ValueError(f"seed must be at most 64 bytes, got {len(seed)}")
        while index < buckets + buckets // 2:
            index *= 2
        self.seed = secrets.token_bytes(16) if seed is None else seed
        slots_offset = INDEX_OFFSET + 4 * <size_t>index + 63 & ~63
        self.region = mmap.mmap(-1, slots_offset + sizeof(Slot) * <size_t>buckets)
        PyObject_GetBuffer(self.region, &self.buffer, PyBUF_WRITABLE)
        base = <char *>self.buffer.buf
        self.table.header = <Header *>base
        self.table.index = <uint32_t *>(base + INDEX_OFFSET)
        self.table.slots = <Slot *>(base + <size_t>slots_offset)
        self.table.header.slots = buckets
        self.table.header.index_mask = index - 1
        if tg_lock_init(&self.table.header.lock):
            raise OSError("the table's lock could not be made")

    def __dealloc__(self):
        PyBuffer_Release(&self.buffer)

    cdef int lock(self) except -1:
        cdef int failed = pthread_mutex_trylock(&self.table.header.lock)
        if failed:                # PERF: the GIL is given up only when there is somebody to wait for
            with nogil:
                failed = tg_lock_wait(&self.table.header.lock)
            if failed:
                raise TableBusy("the table of buckets was locked for over a second")
        return 0

    cdef int64_t lock_at(self, now_us) except -1:
        """Take the lock; return the time given, or what the clock says now that the lock is ours."""
        cdef int64_t us = -1
        if now_us is not None:
            us = PyLong_AsLongLong(now_us)
            if not 0 <= us < <int64_t>1 << 53:
                raise ValueError(f"now_us must be between 0 and 2^53 - 1, got {us}")
        self.lock()
        return tg_now_us() if us < 0 else us

    cdef void unlock(self) noexcept:
        pthread_mutex_unlock(&self.table.header.lock)

    cdef int fill(self, Entry *e, key, scale) except -1:
        """Read a bucket's key and scale as Python gives them."""
        cdef Slot *want = &e.want
        cdef bytes fingerprint = hashlib.blake2b(key, digest_size=12, key=self.seed).digest()
        memcpy(&want.print_hi, <char *>fingerprint, 8)
        memcpy(&want.print_lo, <char *>fingerprint + 8, 4)
        capacity, debt, gain, unit, tick_us = scale
        want.capacity, want.debt = PyLong_AsLongLong(capacity), PyLong_AsLongLong(debt)
        want.gain, want.unit = PyLong_AsLongLong(gain), PyLong_AsLongLong(unit)
        want.tick_us = tick_us if tick_us in TICKS_US else 0
        if not (1 <= want.capacity <= MAX_UNITS and 0 <= want.debt <= MAX_UNITS and 0 <= want.gain <= MAX_UNITS
                and want.unit >= 1 and want.tick_us
                and <wide>(want.capacity + want.debt) * want.unit <= MAX_UNITS):
            raise ValueError(f"a scale must keep to the bounds of arithmetic.scale(), got {scale}")
        e.slot = self.table.header.slots
        return 0

    def prepare(self, buckets, epoch=None):
        cdef Handle handle = Handle.__new__(Handle)
        cdef int i
        buckets = tuple(buckets)
        if len(buckets) > PLAN:
            raise ValueError(f"a plan must have at most {MAX_PLAN} buckets, got {len(buckets)}")
        if len({key for key, _ in buckets}) < len(buckets):
            raise ValueError("a plan must name each bucket once")
        handle.owner = self
        handle.epoch = self.epoch if epoch is None else epoch
        handle.entries = <Entry *>PyMem_Calloc(max(1, len(buckets)), sizeof(Entry))
        if handle.entries == NULL:
            raise MemoryError
        for i, (key, scale) in enumerate(buckets):
            self.fill(&handle.entries[i], key, scale)
        handle.count = len(buckets)
        return handle

    cdef int own(self, Handle handle) except -1:
        if handle.owner is not self:
            raise ValueError("the handle was prepared by another table")
        return 0

    cdef int full_up(self) except -1:
        raise TableFull(f"all {self.table.header.slots} buckets are in use, none of them full")

    cdef int read(self, Handle handle, tuple amounts, int64_t *into) except -1:
        cdef int i
        self.own(handle)
        if len(amounts) != handle.count:
            raise ValueError(f"the plan has {handle.count} buckets, got {len(amounts)} amounts")
        for i in range(handle.count):
            into[i] = PyLong_AsLongLong(amounts[i])  # takes no float, where Cython would
        return 0

    def reserve(self, Handle handle not None, tuple costs not None, now_us=None):
        cdef int64_t cost[PLAN]
        cdef Outcome o
        cdef Status status
        cdef int i
        self.read(handle, costs, cost)
        for i in range(handle.count):
            if cost[i] < 0:
                raise ValueError(f"a cost must be at least 0, got {cost[i]}")
        o = new_outcome(handle)
        o.now_us = self.lock_at(now_us)
        status = take(&self.table, handle.entries, cost, handle.count, handle.epoch, o.seen, &o.binding, o.now_us)
        self.unlock()
        if status == STALE:
            raise StaleHandle("a budget changed since the plan was prepared")
        if status == FULL:
            self.full_up()
        o.allowed = status == ALLOWED
        return o

    def settle(self, Handle handle not None, tuple deltas not None, now_us=None):
        cdef int64_t delta[PLAN]
        cdef int64_t now, forgiven
        self.read(handle, deltas, delta)
        now = self.lock_at(now_us)
        forgiven = settle_all(&self.table, handle.entries, delta, handle.count, now)
        self.unlock()
        return forgiven

    def peek(self, Handle handle not None, now_us=None):
        cdef Outcome o
        self.own(handle)
        o = new_outcome(handle)
        o.now_us = self.lock_at(now_us)
        peek_all(&self.table, handle.entries, handle.count, o.seen, o.now_us)
        self.unlock()
        return o

    def configure(self, key, scale, level=None, now_us=None):
        cdef Entry e
        cdef bint has_level = level is not None
        cdef int64_t tokens = PyLong_AsLongLong(level) if has_level else 0
        cdef int64_t now
        cdef bint done
        self.fill(&e, key, scale)
        if not -e.want.debt <= tokens <= e.want.capacity:
            raise ValueError(f"level must be between {-e.want.debt} and {e.want.capacity}, got {tokens}")
        now = self.lock_at(now_us)
        done = put(&self.table, &e, has_level, tokens, now)
        self.unlock()
        if not done:
            self.full_up()

    def remove(self, key):
        cdef Entry e
        cdef Slot *s
        self.fill(&e, key, (1, 0, 0, 1, 1))
        self.lock()
        s = find(&self.table, &e)
        if s != NULL:
            unlink(&self.table, e.slot)
        self.table.header.epoch += 1
        self.unlock()

    @property
    def epoch(self):
        return self.table.header.epoch

    def expire_handles(self):
        self.lock()
        self.table.header.epoch += 1
        self.unlock()

    def state(self, key):
        cdef Entry e
        cdef Slot *s
        cdef Slot copy
        self.fill(&e, key, (1, 0, 0, 1, 1))
        self.lock()
        s = find(&self.table, &e)
        if s != NULL:
            copy = s[0]
        self.unlock()
        if s == NULL:
            return None
        return copy.level, copy.tick, copy.capacity, copy.gain, copy.unit, copy.tick_us

    def stats(self):
        cdef Counters c
        self.lock()
        c = self.table.header.counters
        self.unlock()
        return dict(c, buckets=self.table.header.slots, region_bytes=len(self.region))

    def __repr__(self):
        return f"<BucketTable {self.table.header.counters.used} of {self.table.header.slots} buckets>"
