# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: freethreading_compatible=True, auto_pickle=False, autotestdict=False
"""The table of buckets. The stub, _bucket.pyi, is its manual.

C below, a thin class above. Everything that a decision needs lies in one mapped region without a Python object
or a pointer in it, so that any number of processes can map it: a header with a journal, the names and rows of
tallies, an index by hash (heads of chains, and for each slot the next of its chain), dense slots of one cache
line each, which never move, and a log of what who changes budgets has to tell the others. A bucket's key is kept
as a keyed 96-bit fingerprint.

Whoever changes the region holds its lock and notes in the journal what was there before. If it dies, whoever gets
the lock next undoes what it had begun: every operation happens whole or not at all. Readers take no lock; a slot
tells them whether it changed under their eyes.

SAFETY: boundscheck is off. Every slot number comes from the index or the free list, which only the functions
here write and only under the lock; every array of a handle or an outcome has the handle's length, and each
entry point checks its arguments against that length before it takes the lock.
"""

import hashlib
import mmap
import secrets

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.long cimport PyLong_AsLongLong
from cpython.mem cimport PyMem_Calloc, PyMem_Free, PyMem_Malloc
from libc.stdint cimport INT64_MAX, int64_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

from tokenguard.errors import StaleHandle, TableBusy, TableFull

cdef extern from "_region.h":
    ctypedef long long wide "tg_wide"
    ctypedef struct tg_lock:
        pass
    int EBUSY
    int EOWNERDEAD
    void tg_pause() noexcept nogil
    const int64_t *tg_ticks_us
    int64_t tg_now_us() noexcept nogil
    int tg_lock_init(tg_lock *) noexcept nogil
    int tg_lock_try(tg_lock *) noexcept nogil
    int tg_lock_wait(tg_lock *, int64_t wait_us) noexcept nogil
    void tg_lock_mended(tg_lock *) noexcept nogil
    void tg_lock_give(tg_lock *) noexcept nogil
    void tg_in_order() noexcept nogil
    void tg_stores_done() noexcept nogil
    void tg_loads_done() noexcept nogil
    uint64_t tg_load(const uint64_t *) noexcept nogil
    uint16_t tg_load_seq "tg_load"(const uint16_t *) noexcept nogil
    void tg_store(uint64_t *, uint64_t) noexcept nogil
    void tg_store_link "tg_store"(uint32_t *, uint32_t) noexcept nogil
    void tg_store_seq "tg_store"(uint16_t *, uint16_t) noexcept nogil
    void tg_add(int64_t *, int64_t) noexcept nogil
    void tg_point() noexcept nogil
    void tg_witness(uint64_t turn, int64_t now_us) noexcept nogil

cdef enum:
    PLAN = 32                     # buckets in one plan
    JOURNAL = 16 * PLAN           # what an operation notes at most: 15 entries for a bucket that makes room
    RECLAIM_SCAN = 128            # slots looked at for one to reclaim; bounds the time under the lock
    STEP_US = 1_000_000           # a clock that steps back further than this is believed
    SPINS = 64                    # looks at a lock that is held before this thread sleeps: some µs
    LOCK_WAIT_US = 1_000_000
    CHANGES_WAIT_US = 10_000_000  # who changes budgets may write to a disk meanwhile
    PEEKS = 1000                  # how often a reader tries before it takes the lock
    SEQ_TURNS = 8192              # of so many turns none can bring a slot's sequence number round
    TALLIES = 1024                # how many there are; the last has no name, and counts what there is no room for
    ROWS = 128                    # processes that count, each in a row of its own
    NAME_BYTES = 94
    LOG_SHIFT = 40                # the log's word: times that it was rewritten, above how long it is
    LINE = 64                     # bytes of a cache line

MAX_PLAN = PLAN
MAX_BUCKETS = 10_000_000
MAX_ROWS = ROWS

cdef bytes MAGIC = b"TGTABLE\n"
cdef uint64_t LAYOUT = 1          # moves with every change of what is in the region

cdef dict PACES = {10 ** exponent: exponent + 1 for exponent in range(7)}

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
    uint16_t seq                  # moves with every write; odd while one is under way
    uint16_t pace                 # number of the tick's length; 0: the slot is free, `level` the next free one
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
    uint64_t used
    uint64_t reclaimed
    uint64_t refused_full
    uint64_t clock_steps
    uint64_t forgiven
    uint64_t repaired

cdef struct Undo:                 # what was there
    uint64_t at                   # bytes from the region's beginning
    uint64_t size
    char old[64]

cdef struct Name:
    uint16_t size                 # 0: nothing is counted under this number
    char text[94]

cdef struct Row:
    uint64_t pid                  # 0: it is nobody's
    uint64_t began                # when that process began, in whatever unit its owner uses
    uint64_t unused[6]
    int64_t tallies[1024]

cdef struct Header:
    char magic[8]                 # written last: a region without it is not one yet
    uint64_t layout
    char mark[64]                 # what its owners want to know it by
    char identity[16]
    char seed[64]
    uint64_t seed_size
    uint64_t slots
    uint64_t index_mask
    uint64_t log_bytes
    uint64_t hand                 # where reclaiming looks next
    uint64_t turn                 # moves with every operation that changes something
    uint64_t shape                # moves with every change of the index; odd while one is under way
    uint64_t epoch                # moves with every change of a budget
    uint64_t fresh                # slots from here on were never used
    uint64_t free                 # head of the list of free slots, as number + 1
    uint64_t log                  # see LOG_SHIFT
    uint64_t names
    Counters counters
    tg_lock lock
    tg_lock changes               # held while budgets are changed
    uint64_t noted                # entries of the journal that count
    Undo journal[512]

cdef struct Table:
    Header *header
    Name *names
    Row *rows
    uint32_t *heads               # slot number + 1; 0 is the end of a chain
    uint32_t *next
    Slot *slots
    char *log                     # two halves; one is in use

cdef struct Size:                 # bytes from the region's beginning
    size_t names
    size_t rows
    size_t heads
    size_t next
    size_t slots
    size_t log
    size_t log_bytes
    size_t end


# --- one bucket ---------------------------------------------------------------------------------------------

cdef inline int64_t floor_div(int64_t a, int64_t b) noexcept nogil:
    return a // b - (a % b != 0 and a < 0)


cdef inline int64_t clamp(int64_t value, int64_t low, int64_t high) noexcept nogil:
    return low if value < low else high if value > high else value


cdef inline int64_t add(int64_t a, int64_t b) noexcept nogil:
    """Return the sum of two amounts that are not negative; what is more than fits stays at the most that does."""
    return a + b if a <= INT64_MAX - b else INT64_MAX


cdef inline int64_t tick_us(const Slot *s) noexcept nogil:
    return tg_ticks_us[s.pace]


cdef inline bint refill(Slot *s, int64_t now_us) noexcept nogil:
    """Bring ``s`` up to now; return whether the clock had stepped back so far that its tick was set anew."""
    cdef int64_t tick = now_us // tick_us(s)
    cdef int64_t room
    if tick > s.tick:
        room = s.capacity * s.unit - s.level
        if <wide>(tick - s.tick) * s.gain >= room:
            s.level += room
        else:
            s.level += (tick - s.tick) * s.gain
        s.tick = tick
    elif (s.tick - 1) * tick_us(s) - now_us >= STEP_US:  # a tick may begin up to its own length in the future
        s.tick = tick
        return True
    return False


cdef inline bint same_scale(const Slot *a, const Slot *b) noexcept nogil:
    return (a.capacity == b.capacity and a.gain == b.gain and a.unit == b.unit
            and a.debt == b.debt and a.pace == b.pace)


cdef int64_t convert(Slot *s, const Slot *want, int64_t now_us) noexcept nogil:
    """Take over another scale: what was used stays used, to the whole token; ``s`` is up to now.

    Return how many tokens fell below the new floor of debt.
    """
    cdef int64_t tokens = floor_div(s.level, s.unit) + want.capacity - s.capacity
    cdef int64_t held_us = s.tick * tick_us(s)
    if held_us > now_us:          # a frozen clock grants nothing twice
        now_us = held_us
    s.level = clamp(tokens, -want.debt, want.capacity) * want.unit
    s.tick = (now_us + tick_us(want) - 1) // tick_us(want)
    s.capacity, s.debt, s.gain, s.unit, s.pace = want.capacity, want.debt, want.gain, want.unit, want.pace
    return -want.debt - tokens if tokens < -want.debt else 0


cdef struct Found:                # what is to be counted once buckets that were brought up to date are kept so
    int64_t clock_steps
    int64_t forgiven


cdef bint bring_up(Slot *s, const Slot *want, int64_t now_us, Found *found) noexcept nogil:
    """Bring ``s`` up to now and to the scale wanted; return whether that must be kept even on a refusal.

    A clock that stepped back, and a budget that changed, are facts of their own. If a refusal dropped the
    change of budget, a bucket under an old rate of 0 would be refused for ever.
    """
    cdef bint stepped = refill(s, now_us)
    cdef bint changed = not same_scale(s, want)
    if stepped:
        found.clock_steps += 1
    if changed:
        found.forgiven = add(found.forgiven, convert(s, want, now_us))
    return stepped or changed


cdef inline int64_t time_us(const Slot *s, int64_t units, int64_t now_us) noexcept nogil:
    """Return the µs until the level has risen by ``units``, rounded up; at most NEVER."""
    cdef wide at
    if units <= 0:
        return 0
    if s.gain == 0:
        return NEVER
    at = (<wide>s.tick + (units + s.gain - 1) // s.gain) * tick_us(s) - now_us
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
    s.tick = now_us // tick_us(&s)
    return s


cdef inline bint like_new(Slot *s, int64_t now_us) noexcept nogil:
    """Bring a copy up to now; return whether it cannot be told from a new bucket, which would start now."""
    refill(s, now_us)
    return s.level == s.capacity * s.unit and s.tick * tick_us(s) <= now_us


# --- the journal: the only way to change the region, each under the lock ------------------------------------

cdef inline void note(Table *t, void *at, uint64_t size) noexcept nogil:
    """Note what is there, so that it can be undone."""
    cdef Undo *undo = &t.header.journal[t.header.noted]
    undo.at = <char *>at - <char *>t.header
    undo.size = size
    memcpy(undo.old, at, size)
    tg_in_order()
    tg_point()
    t.header.noted += 1
    tg_in_order()
    tg_point()


cdef inline void set_word(Table *t, uint64_t *at, uint64_t value) noexcept nogil:
    note(t, at, sizeof(uint64_t))
    tg_store(at, value)
    tg_point()


cdef inline void set_link(Table *t, uint32_t *at, uint32_t value) noexcept nogil:
    note(t, at, sizeof(uint32_t))
    tg_store_link(at, value)
    tg_point()


cdef inline void count(Table *t, uint64_t *counter, int64_t amount) noexcept nogil:
    if amount:
        set_word(t, counter, <uint64_t>add(<int64_t>counter[0], amount))


cdef inline void put_slot(Slot *at, const Slot *s) noexcept nogil:
    """Write a slot under the eyes of readers."""
    tg_store_seq(&at.seq, at.seq | 1)
    tg_stores_done()
    tg_point()
    at.print_hi = s.print_hi
    tg_point()
    at.print_lo = s.print_lo
    tg_point()
    at.pace = s.pace
    tg_point()
    at.level = s.level
    tg_point()
    at.tick = s.tick
    tg_point()
    at.capacity = s.capacity
    tg_point()
    at.debt = s.debt
    tg_point()
    at.gain = s.gain
    tg_point()
    at.unit = s.unit
    tg_point()
    tg_store_seq(&at.seq, at.seq + 1)
    tg_point()


cdef inline void set_slot(Table *t, Slot *at, const Slot *s) noexcept nogil:
    note(t, at, sizeof(Slot))
    put_slot(at, s)


cdef inline void commit(Table *t, int64_t now_us) noexcept nogil:
    """End an operation: once nothing counts as noted, it has happened."""
    tg_in_order()
    if t.header.noted:
        tg_store(&t.header.turn, t.header.turn + 1)  # before: a change that no turn tells of would not be saved
        tg_in_order()
        tg_point()
        t.header.noted = 0
        tg_point()
    tg_witness(t.header.turn, now_us)


cdef void mend(Table *t) noexcept nogil:
    """Undo what a holder of the lock that died had begun. May itself be killed and done again."""
    cdef Header *h = t.header
    cdef uint64_t i = h.noted
    cdef Undo *undo
    cdef char *at
    while i:
        i -= 1
        undo = &h.journal[i]
        at = <char *>h + undo.at
        if undo.size == sizeof(Slot):
            put_slot(<Slot *>at, <Slot *>undo.old)
        else:
            memcpy(at, undo.old, undo.size)
        tg_point()
    # NOTE: somebody may have seen the shape or the epoch that came to nothing; neither is ever used again.
    tg_store(&h.shape, (h.shape | 1) + 1)
    tg_point()
    if h.noted:
        tg_store(&h.epoch, h.epoch + 2)
        tg_point()
        h.counters.repaired += 1
        tg_point()
    tg_in_order()
    h.noted = 0
    tg_point()


# --- the index ----------------------------------------------------------------------------------------------

cdef inline bint is_key(const Slot *s, const Slot *want) noexcept nogil:
    return s.print_hi == want.print_hi and s.print_lo == want.print_lo and s.pace != 0


cdef inline Slot *find(Table *t, Entry *e) noexcept nogil:
    """Return the entry's slot, or NULL. The entry remembers where it was, and checks the key there first."""
    cdef uint32_t link
    if e.slot < t.header.slots and is_key(&t.slots[e.slot], &e.want):
        return &t.slots[e.slot]
    link = t.heads[e.want.print_hi & t.header.index_mask]
    while link:
        if is_key(&t.slots[link - 1], &e.want):
            e.slot = link - 1
            return &t.slots[e.slot]
        link = t.next[link - 1]
    return NULL


cdef void unlink(Table *t, uint32_t slot) noexcept nogil:
    """Take a slot out of the index and free it."""
    cdef uint32_t *link = &t.heads[t.slots[slot].print_hi & t.header.index_mask]
    cdef Slot free = t.slots[slot]
    tg_store(&t.header.shape, t.header.shape + 1)
    tg_stores_done()
    tg_point()
    while link[0] != slot + 1:
        link = &t.next[link[0] - 1]
    set_link(t, link, t.next[slot])
    free.pace = 0
    free.level = t.header.free
    set_slot(t, &t.slots[slot], &free)
    set_word(t, &t.header.free, slot + 1)
    set_word(t, &t.header.counters.used, t.header.counters.used - 1)
    tg_store(&t.header.shape, t.header.shape + 1)
    tg_point()


cdef bint reclaim(Table *t, const Entry *keep, int n, int64_t now_us) noexcept nogil:
    """Free one slot whose bucket is full and not among ``keep``: it cannot be told from a new one."""
    cdef uint64_t slot
    cdef uint64_t looked = 0
    cdef int i
    cdef Slot s
    while looked < RECLAIM_SCAN and looked < t.header.slots:
        slot = t.header.hand
        t.header.hand = slot + 1 if slot + 1 < t.header.slots else 0
        tg_point()
        looked += 1
        s = t.slots[slot]
        if s.pace == 0 or not like_new(&s, now_us):
            continue
        for i in range(n):
            if is_key(&t.slots[slot], &keep[i].want):
                break
        else:
            unlink(t, slot)
            count(t, &t.header.counters.reclaimed, 1)
            return True
    return False


cdef Slot *insert(Table *t, Entry *keep, int n, Entry *e, int64_t now_us) noexcept nogil:
    """Return a new, full bucket for ``e``, or NULL if there is no room."""
    cdef Header *h = t.header
    cdef uint32_t *head = &t.heads[e.want.print_hi & h.index_mask]
    cdef uint64_t slot
    cdef Slot s = full(&e.want, now_us)
    if not h.free and h.fresh == h.slots and not reclaim(t, keep, n, now_us):
        count(t, &h.counters.refused_full, 1)
        return NULL
    tg_store(&h.shape, h.shape + 1)
    tg_stores_done()
    tg_point()
    if h.free:
        slot = h.free - 1
        set_word(t, &h.free, t.slots[slot].level)
    else:
        slot = h.fresh
        set_word(t, &h.fresh, slot + 1)
    count(t, &h.counters.used, 1)
    set_slot(t, &t.slots[slot], &s)
    set_link(t, &t.next[slot], head[0])
    set_link(t, head, slot + 1)
    tg_store(&h.shape, h.shape + 1)
    tg_point()
    e.slot = slot
    return &t.slots[slot]


# --- reading without the lock -------------------------------------------------------------------------------

cdef inline bint look(Table *t, uint64_t slot, Slot *s) noexcept nogil:
    """Copy a slot; return False if it was being written meanwhile."""
    cdef Slot *at = &t.slots[slot]
    cdef uint64_t turn = tg_load(&t.header.turn)
    cdef uint16_t seq = tg_load_seq(&at.seq)
    if seq & 1:
        return False
    memcpy(s, at, sizeof(Slot))
    tg_loads_done()
    return tg_load_seq(&at.seq) == seq and tg_load(&t.header.turn) - turn < SEQ_TURNS


cdef int spot(Table *t, const Slot *want, Slot *s) noexcept nogil:
    """Copy the bucket of a key without the lock; return 1, 0 if it is not there, -1 if that cannot be told."""
    cdef uint64_t shape = tg_load(&t.header.shape)
    cdef uint64_t steps = 0
    cdef uint32_t link
    if shape & 1:
        return -1
    link = t.heads[want.print_hi & t.header.index_mask]
    while link and link <= t.header.slots and steps < t.header.slots:
        if not look(t, link - 1, s):
            return -1
        if is_key(s, want):
            return 1
        link = t.next[link - 1]
        steps += 1
    tg_loads_done()
    return 0 if tg_load(&t.header.shape) == shape else -1


# --- the operations, each under the lock --------------------------------------------------------------------

cdef Status take(Table *t, Entry *entries, const int64_t *costs, int n, uint64_t epoch, Bucket *seen,
                 int *binding, int64_t now_us) noexcept nogil:
    """Check every bucket on a copy, then take from all or from none."""
    cdef Slot work[PLAN]
    cdef Slot *slots[PLAN]
    cdef bint keep[PLAN]
    cdef Found found = Found(0, 0)
    cdef Status status = ALLOWED
    cdef int64_t longest = 0
    cdef int i
    if epoch != t.header.epoch:
        return STALE
    for i in range(n):
        slots[i] = find(t, &entries[i])
        if slots[i] == NULL:
            work[i] = full(&entries[i].want, now_us)
            keep[i] = False
        else:
            work[i] = slots[i][0]
            keep[i] = bring_up(&work[i], &entries[i].want, now_us, &found)
        seen[i].wait_us = wait_us(&work[i], costs[i], now_us)
        if seen[i].wait_us > longest:
            longest = seen[i].wait_us
            binding[0] = i
            status = SHORT
    if status == ALLOWED:
        for i in range(n):
            if slots[i] == NULL and costs[i]:
                slots[i] = insert(t, entries, n, &entries[i], now_us)
                if slots[i] == NULL:
                    status = FULL
                    break
    for i in range(n):
        if status == ALLOWED and costs[i]:
            work[i].level -= costs[i] * work[i].unit
            keep[i] = True
        if keep[i]:
            set_slot(t, slots[i], &work[i])
        seen[i].level, seen[i].tick, seen[i].cost = work[i].level, work[i].tick, costs[i]
    count(t, &t.header.counters.clock_steps, found.clock_steps)
    count(t, &t.header.counters.forgiven, found.forgiven)
    return status


cdef int64_t charge(Slot *s, int64_t delta) noexcept nogil:
    """Take ``delta`` more tokens (or give them back) within the bounds; return how many were forgiven."""
    cdef int64_t bound = s.capacity + s.debt
    cdef int64_t before = s.level
    s.level = clamp(before - clamp(delta, -bound, bound) * s.unit, -s.debt * s.unit, s.capacity * s.unit)
    return delta - (before - s.level) // s.unit if delta > 0 else 0


cdef int64_t settle_all(Table *t, Entry *entries, const int64_t *deltas, int n, int64_t now_us) noexcept nogil:
    """Charge each bucket its delta, under the scale that it stands in; return how much was forgiven."""
    cdef int64_t forgiven = 0
    cdef int64_t clock_steps = 0
    cdef Slot *at
    cdef Slot s
    cdef int i
    for i in range(n):
        if deltas[i] == 0:
            continue
        at = find(t, &entries[i])
        if at == NULL:
            if deltas[i] < 0:     # reclaimed when it was full: there is nothing to give back to
                continue
            at = insert(t, entries, n, &entries[i], now_us)
            if at == NULL:
                forgiven = add(forgiven, deltas[i])
                continue
        s = at[0]
        clock_steps += refill(&s, now_us)
        forgiven = add(forgiven, charge(&s, deltas[i]))
        set_slot(t, at, &s)
    count(t, &t.header.counters.clock_steps, clock_steps)
    count(t, &t.header.counters.forgiven, forgiven)
    return forgiven


cdef bint put(Table *t, Entry *e, bint has_level, int64_t level, int64_t now_us) noexcept nogil:
    """Give a bucket the entry's scale at once, and a level if asked; return False if there is no room."""
    cdef Slot *at = find(t, e)
    cdef Slot s
    cdef Found found = Found(0, 0)
    if at == NULL and has_level and level < e.want.capacity:
        at = insert(t, e, 1, e, now_us)
        if at == NULL:
            return False
    if at != NULL:
        s = at[0]
        bring_up(&s, &e.want, now_us, &found)
        if has_level:
            s.level = level * s.unit
        set_slot(t, at, &s)
        count(t, &t.header.counters.clock_steps, found.clock_steps)
        count(t, &t.header.counters.forgiven, found.forgiven)
    return True


cdef inline uint64_t log_used(uint64_t log) noexcept nogil:
    return log & ((<uint64_t>1 << LOG_SHIFT) - 1)


cdef inline char *log_half(Table *t, uint64_t log) noexcept nogil:
    return t.log + (log >> LOG_SHIFT & 1) * t.header.log_bytes


cdef void tell(Table *t, const char *record, uint64_t size) noexcept nogil:
    """Put a record at the end of the log, where there must be room, and make every plan stale.

    The epoch moves last: whoever sees the new one finds the record.
    """
    cdef uint64_t log = t.header.log
    if size:
        memcpy(log_half(t, log) + log_used(log), record, size)
        tg_point()
        set_word(t, &t.header.log, log + size)
    set_word(t, &t.header.epoch, t.header.epoch + 1)


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


cdef inline size_t lines(size_t size) noexcept nogil:
    return size + LINE - 1 & ~<size_t>(LINE - 1)


cdef uint64_t heads_of(uint64_t buckets) noexcept nogil:
    cdef uint64_t heads = 8
    while heads < buckets:
        heads *= 2
    return heads


cdef Size size_of(uint64_t buckets) noexcept nogil:
    """Return where what is in the region of a table."""
    cdef Size size
    size.names = lines(sizeof(Header))
    size.rows = lines(size.names + TALLIES * sizeof(Name))
    size.heads = lines(size.rows + ROWS * sizeof(Row))
    size.next = lines(size.heads + heads_of(buckets) * sizeof(uint32_t))
    size.slots = lines(size.next + buckets * sizeof(uint32_t))
    size.log = size.slots + buckets * sizeof(Slot)
    size.log_bytes = lines(65536 + 16 * buckets)
    size.end = size.log + 2 * size.log_bytes
    return size


cdef int64_t checked_buckets(int64_t buckets) except -1:
    if not 1 <= buckets <= MAX_BUCKETS:
        raise ValueError(f"buckets must be between 1 and {MAX_BUCKETS}, got {buckets}")
    return buckets


def region_bytes(int64_t buckets):
    return size_of(checked_buckets(buckets)).end


cdef bint in_bounds(const Slot *s) noexcept nogil:
    """Return whether a scale is one that arithmetic.scale() could have made."""
    return (1 <= s.capacity <= MAX_UNITS and 0 <= s.debt <= MAX_UNITS and 0 <= s.gain <= MAX_UNITS
            and 1 <= s.unit <= MAX_UNITS and 1 <= s.pace <= 7
            and <wide>(s.capacity + s.debt) * s.unit <= MAX_UNITS)


cdef class Tally:
    cdef BucketTable table
    cdef uint32_t number

    def add(self, int64_t amount=1):
        tg_add(&self.table.row.tallies[self.number], amount)


cdef class BucketTable:
    cdef object __weakref__
    cdef Table table
    cdef Row *row
    cdef Py_buffer buffer
    cdef object region
    cdef readonly bytes seed
    cdef readonly bytes identity

    def __cinit__(self, int64_t buckets=500_000, *, bytes seed=None, fd=None, bytes mark=b""):
        cdef Size size = size_of(checked_buckets(buckets))
        if seed is not None and len(seed) > 64:
            raise ValueError(f"seed must be at most 64 bytes, got {len(seed)}")
        if len(mark) > 64:
            raise ValueError(f"mark must be at most 64 bytes, got {len(mark)}")
        self.region = mmap.mmap(-1 if fd is None else fd, size.end)
        PyObject_GetBuffer(self.region, &self.buffer, PyBUF_WRITABLE)
        base = <char *>self.buffer.buf
        self.table.header = <Header *>base
        self.table.names = <Name *>(base + size.names)
        self.table.rows = <Row *>(base + size.rows)
        self.table.heads = <uint32_t *>(base + size.heads)
        self.table.next = <uint32_t *>(base + size.next)
        self.table.slots = <Slot *>(base + size.slots)
        self.table.log = base + size.log
        self.row = self.table.rows
        h = self.table.header
        if memcmp(h.magic, <char *>MAGIC, 8):
            self.begin(buckets, secrets.token_bytes(16) if seed is None else seed, mark, size.log_bytes)
        if h.layout != (LAYOUT << 32 | sizeof(Header)):
            raise ValueError("its layout is another version's")
        if h.slots != <uint64_t>buckets:
            raise ValueError(f"it holds {h.slots} buckets, not {buckets}")
        if h.mark[:64].rstrip(b"\0") != mark:
            raise ValueError("it was made under another mark")
        self.seed = h.seed[:h.seed_size]
        self.identity = h.identity[:16]

    cdef int begin(self, int64_t buckets, bytes seed, bytes mark, size_t log_bytes) except -1:
        """Make a region of zeros a table."""
        cdef bytes identity = secrets.token_bytes(16)
        h = self.table.header
        h.layout = LAYOUT << 32 | sizeof(Header)
        h.slots = buckets
        h.index_mask = heads_of(buckets) - 1
        h.log_bytes = log_bytes
        memcpy(h.seed, <char *>seed, len(seed))
        h.seed_size = len(seed)
        memcpy(h.mark, <char *>mark, len(mark))
        memcpy(h.identity, <char *>identity, 16)
        if tg_lock_init(&h.lock) or tg_lock_init(&h.changes):
            raise OSError("the table's lock could not be made")
        tg_stores_done()
        memcpy(h.magic, <char *>MAGIC, 8)
        return 0

    def __dealloc__(self):
        PyBuffer_Release(&self.buffer)

    # --- the lock ---------------------------------------------------------------------------------------------

    cdef int lock(self) except -1:
        cdef int failed = tg_lock_try(&self.table.header.lock)
        cdef int tries = 0
        # PERF: a section is shorter than going to sleep would be; benchmarks/processes.py, two processes
        while failed == EBUSY and tries < SPINS:
            tg_pause()
            failed = tg_lock_try(&self.table.header.lock)
            tries += 1
        if failed == 0:
            return 0
        # PERF: the GIL is given up only when there is somebody to wait for
        with nogil:
            if failed != EOWNERDEAD:
                failed = tg_lock_wait(&self.table.header.lock, LOCK_WAIT_US)
            if failed == EOWNERDEAD:
                mend(&self.table)
                tg_lock_mended(&self.table.header.lock)
                failed = 0
        if failed:
            raise TableBusy("the table of buckets was locked for over a second")
        return 0

    cdef int64_t lock_at(self, now_us) except -1:
        """Take the lock; return the time given, or what the clock says now that the lock is ours."""
        cdef int64_t us = self.read_time(now_us)
        self.lock()
        return tg_now_us() if us < 0 else us

    cdef int64_t read_time(self, now_us) except -2:
        """Return the time given, or -1."""
        cdef int64_t us
        if now_us is None:
            return -1
        us = PyLong_AsLongLong(now_us)
        if not 0 <= us < <int64_t>1 << 53:
            raise ValueError(f"now_us must be between 0 and 2^53 - 1, got {us}")
        return us

    cdef void unlock(self, int64_t now_us=0) noexcept:
        """End the operation and give the lock back."""
        commit(&self.table, now_us)
        tg_lock_give(&self.table.header.lock)

    # --- plans ------------------------------------------------------------------------------------------------

    cdef int fill(self, Entry *e, key, scale) except -1:
        """Read a bucket's key and scale as Python gives them."""
        cdef Slot *want = &e.want
        cdef bytes fingerprint = hashlib.blake2b(key, digest_size=12, key=self.seed).digest()
        memcpy(&want.print_hi, <char *>fingerprint, 8)
        memcpy(&want.print_lo, <char *>fingerprint + 8, 4)
        capacity, debt, gain, unit, tick_us = scale
        want.capacity, want.debt = PyLong_AsLongLong(capacity), PyLong_AsLongLong(debt)
        want.gain, want.unit = PyLong_AsLongLong(gain), PyLong_AsLongLong(unit)
        want.pace = PACES.get(tick_us, 0)
        want.seq = 0
        if not in_bounds(want):
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

    # --- calls ------------------------------------------------------------------------------------------------

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
        self.unlock(o.now_us)
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
        self.unlock(now)
        return forgiven

    def peek(self, Handle handle not None, now_us=None):
        cdef Outcome o
        cdef Slot s
        cdef Found found = Found(0, 0)
        cdef int i
        self.own(handle)
        o = new_outcome(handle)
        o.now_us = self.read_time(now_us)
        if o.now_us < 0:
            o.now_us = tg_now_us()
        for i in range(handle.count):
            if self.see(&handle.entries[i].want, &s):
                bring_up(&s, &handle.entries[i].want, o.now_us, &found)
            else:
                s = full(&handle.entries[i].want, o.now_us)
            o.seen[i].level, o.seen[i].tick, o.seen[i].cost, o.seen[i].wait_us = s.level, s.tick, 0, 0
        return o

    cdef bint see(self, const Slot *want, Slot *s) except -1:
        """Copy the bucket of a key; return False if it is not there."""
        cdef Entry e
        cdef Slot *at
        cdef int found = -1
        cdef int tries = 0
        while found < 0 and tries < PEEKS:
            found = spot(&self.table, want, s)
            tries += 1
        if found >= 0:
            return found
        e.want = want[0]          # somebody writes all the time, or died while writing
        e.slot = self.table.header.slots
        self.lock()
        at = find(&self.table, &e)
        if at != NULL:
            s[0] = at[0]
        self.unlock()
        return at != NULL

    def state(self, key):
        cdef Entry e
        cdef Slot s
        self.fill(&e, key, (1, 0, 0, 1, 1))
        if not self.see(&e.want, &s):
            return None
        return s.level, s.tick, s.capacity, s.gain, s.unit, tick_us(&s)

    # --- budgets ----------------------------------------------------------------------------------------------

    def configure(self, key, scale, level=None, now_us=None, bytes record not None=b""):
        cdef Entry e
        cdef bint has_level = level is not None
        cdef int64_t tokens = PyLong_AsLongLong(level) if has_level else 0
        cdef int64_t now
        cdef bint done
        self.fill(&e, key, scale)
        if not -e.want.debt <= tokens <= e.want.capacity:
            raise ValueError(f"level must be between {-e.want.debt} and {e.want.capacity}, got {tokens}")
        now = self.lock_for(record, now_us)
        done = put(&self.table, &e, has_level, tokens, now)
        if done:
            tell(&self.table, record, len(record))
        self.unlock(now)
        if not done:
            self.full_up()

    def remove(self, key, bytes record not None=b""):
        cdef Entry e
        cdef Slot *s
        self.fill(&e, key, (1, 0, 0, 1, 1))
        self.lock_for(record, 0)
        s = find(&self.table, &e)
        if s != NULL:
            unlink(&self.table, e.slot)
        tell(&self.table, record, len(record))
        self.unlock()

    @property
    def epoch(self):
        return tg_load(&self.table.header.epoch)

    def expire_handles(self):
        self.lock()
        tell(&self.table, NULL, 0)
        self.unlock()

    cdef int64_t lock_for(self, bytes record, now_us) except -1:
        """Take the lock for a change that has a record, and return the time."""
        cdef int64_t now = self.lock_at(now_us)
        cdef int64_t room = self.table.header.log_bytes - log_used(self.table.header.log)
        if len(record) > room:
            self.unlock()
            raise ValueError(f"there is room for {room} bytes, got {len(record)}")
        return now

    @property
    def log_room(self):
        return self.table.header.log_bytes - log_used(self.settled_log())

    def changes(self, uint64_t since):
        cdef uint64_t log, start
        cdef bytes records
        while True:
            log = self.settled_log()
            start = log_used(since) if since >> LOG_SHIFT == log >> LOG_SHIFT else 0
            records = log_half(&self.table, log)[start:log_used(log)]
            tg_loads_done()
            if tg_load(&self.table.header.log) >> LOG_SHIFT == log >> LOG_SHIFT:
                return log, start == 0, records  # it was not rewritten meanwhile

    cdef uint64_t settled_log(self) except? 0:
        """Return the log's word as it is once what somebody died over is undone."""
        self.lock()
        log = self.table.header.log
        self.unlock()
        return log

    def rewrite(self, bytes records not None):
        # NOTE: a word that is yet to be undone would name the half that counts as the one to write to.
        cdef uint64_t fresh = (self.settled_log() >> LOG_SHIFT) + 1 << LOG_SHIFT
        if len(records) > <Py_ssize_t>self.table.header.log_bytes:
            room = self.table.header.log_bytes
            raise TableFull(f"the budgets take {len(records)} bytes, there is room for {room}")
        memcpy(log_half(&self.table, fresh), <char *>records, len(records))
        tg_stores_done()
        self.lock()
        set_word(&self.table, &self.table.header.log, fresh + len(records))
        self.unlock()

    def lock_changes(self):
        cdef int failed
        with nogil:
            failed = tg_lock_wait(&self.table.header.changes, CHANGES_WAIT_US)
            if failed == EOWNERDEAD:
                tg_lock_mended(&self.table.header.changes)
                failed = 0
        if failed:
            raise TableBusy("somebody else has been changing budgets for over ten seconds")

    def unlock_changes(self):
        tg_lock_give(&self.table.header.changes)

    # --- leaving and coming back ------------------------------------------------------------------------------

    @property
    def turn(self):
        return tg_load(&self.table.header.turn)

    def dump(self, uint64_t start, uint64_t slots, now_us=None):
        cdef uint64_t end = min(start + slots, tg_load(&self.table.header.fresh))
        cdef uint64_t slot
        cdef int64_t now = self.read_time(now_us)
        cdef Slot s
        cdef Slot *into
        cdef Py_ssize_t held = 0
        cdef int tries
        if start >= end:
            return b""
        records = PyBytes_FromStringAndSize(NULL, (end - start) * sizeof(Slot))
        into = <Slot *>PyBytes_AS_STRING(records)
        if now < 0:
            now = tg_now_us()
        for slot in range(start, end):
            with nogil:
                tries = 0
                while tries < PEEKS and not look(&self.table, slot, &s):
                    tries += 1
            if tries == PEEKS:
                self.lock()
                s = self.table.slots[slot]
                self.unlock()
            into[held] = s
            if s.pace and not like_new(&s, now):
                into[held].seq = 0
                held += 1
        return records[:held * sizeof(Slot)]

    def load(self, bytes records not None, now_us=None):
        cdef Py_ssize_t n = len(records) // sizeof(Slot)
        cdef Py_ssize_t i
        cdef int64_t now = self.read_time(now_us)
        cdef Entry e
        cdef Slot s
        cdef Slot *at = NULL
        if len(records) % sizeof(Slot):
            raise ValueError(f"a bucket has {sizeof(Slot)} bytes, got {len(records)} in all")
        for i in range(n):
            memcpy(&s, <char *>records + i * sizeof(Slot), sizeof(Slot))
            if not (in_bounds(&s) and -s.debt * s.unit <= s.level <= s.capacity * s.unit
                    and 0 <= s.tick <= <int64_t>1 << 53):
                raise ValueError(f"bucket {i} is out of bounds")
            e.want = s
            e.slot = self.table.header.slots
            self.lock()
            at = find(&self.table, &e)
            if at == NULL:
                at = insert(&self.table, &e, 1, &e, tg_now_us() if now < 0 else now)
            if at != NULL:
                set_slot(&self.table, at, &s)
            self.unlock()
            if at == NULL:
                self.full_up()

    # --- what is counted --------------------------------------------------------------------------------------

    def stats(self):
        cdef Counters c = self.table.header.counters
        return dict(c, buckets=self.table.header.slots, region_bytes=len(self.region))

    def tally(self, bytes name not None):
        cdef Tally tally = Tally.__new__(Tally)
        cdef uint64_t names, i
        cdef Name *at
        if not 1 <= len(name) <= NAME_BYTES:
            raise ValueError(f"name must be 1 to {NAME_BYTES} bytes, got {len(name)}")
        tally.table = self
        self.lock()
        names = self.table.header.names
        for i in range(names):
            at = &self.table.names[i]
            if at.size == len(name) and not memcmp(at.text, <char *>name, at.size):
                break
        else:
            i = names
            if names < TALLIES - 1:
                at = &self.table.names[i]
                memcpy(at.text, <char *>name, len(name))
                at.size = len(name)
                tg_point()
                set_word(&self.table, &self.table.header.names, names + 1)
        self.unlock()
        tally.number = i
        return tally

    def tallies(self):
        cdef uint64_t i
        cdef int row
        cdef Name *at
        told = {}
        for i in range(tg_load(&self.table.header.names)):
            at = &self.table.names[i]
            told[at.text[:at.size]] = [self.table.rows[row].tallies[i] for row in range(ROWS)]
        return told

    def rows(self):
        return [(self.table.rows[row].pid, self.table.rows[row].began) for row in range(ROWS)]

    def hold_row(self, int row, uint64_t pid, uint64_t began, names=()):
        cdef Row *at
        if not 0 <= row < ROWS:
            raise ValueError(f"row must be between 0 and {ROWS - 1}, got {row}")
        at = &self.table.rows[row]
        for name in names:
            at.tallies[(<Tally>self.tally(name)).number] = 0
        at.began = began
        tg_store(&at.pid, pid)
        if pid:
            self.row = at

    def __repr__(self):
        return f"<BucketTable {self.table.header.counters.used} of {self.table.header.slots} buckets>"
