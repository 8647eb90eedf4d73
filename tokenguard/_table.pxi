"""The C of the table of buckets: the region, and what is done to it. Nothing here touches a Python object.

Included by _bucket.pyx, whose docstring says how it works. Handles and outcomes are described in _bucket.pxd.
"""

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
    int64_t tg_add(int64_t *, int64_t) noexcept nogil
    void tg_store_number "tg_store"(int64_t *, int64_t) noexcept nogil
    int64_t tg_load_number "tg_load"(const int64_t *) noexcept nogil
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
    SHARED = 512                  # keys of numbers that are shared
    KEY_BYTES = 8
    NUMBERS = 7                   # of each key
    LOG_SHIFT = 40                # the log's word: times that it was rewritten, above how long it is
    LINE = 64                     # bytes of a cache line


cdef uint64_t LAYOUT = 2          # moves with every change of what is in the region


cdef int64_t NEVER = 10**15
cdef int64_t MAX_UNITS = <int64_t>1 << 52

cdef enum Status:
    ALLOWED
    SHORT
    STALE
    FULL

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

cdef struct Common:               # one cache line
    char key[8]
    int64_t numbers[7]            # what they are is their owner's business

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
    uint64_t shared
    Counters counters
    uint64_t saved                # the turn of the last state that was saved
    tg_lock lock
    tg_lock changes               # held while budgets are changed
    uint64_t noted                # entries of the journal that count
    Undo journal[512]

cdef struct Table:
    Header *header
    Name *names
    Row *rows
    Common *shared
    uint32_t *heads               # slot number + 1; 0 is the end of a chain
    uint32_t *next
    Slot *slots
    char *log                     # two halves; one is in use

cdef struct Size:                 # bytes from the region's beginning
    size_t names
    size_t rows
    size_t shared
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
    # NOTE: somebody may have seen a shape, a turn or an epoch that came to nothing; none is ever used again.
    tg_store(&h.shape, h.shape | 1)
    tg_stores_done()
    tg_point()
    tg_store(&h.turn, h.turn + 1)
    tg_point()
    while i:
        i -= 1
        undo = &h.journal[i]
        at = <char *>h + undo.at
        if undo.size == sizeof(Slot):
            put_slot(<Slot *>at, <Slot *>undo.old)
        else:
            memcpy(at, undo.old, undo.size)
        tg_point()
    tg_store(&h.shape, h.shape + 1)
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


cdef uint64_t collect(Table *t, uint64_t slot, uint64_t end, Slot *into, Py_ssize_t *held,
                      int64_t now_us) noexcept nogil:
    """Copy the buckets in some slots that are not full; return the first that never held still, or ``end``."""
    cdef int tries = 0
    cdef Slot s
    while slot < end:
        if not look(t, slot, &s):
            tries += 1
            if tries == PEEKS:
                return slot
            continue
        into[held[0]] = s
        into[held[0]].seq = 0
        if s.pace and not like_new(&s, now_us):
            held[0] += 1
        slot += 1
        tries = 0
    return end


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


# --- what is where ------------------------------------------------------------------------------------------

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
    size.shared = lines(size.rows + ROWS * sizeof(Row))
    size.heads = lines(size.shared + SHARED * sizeof(Common))
    size.next = lines(size.heads + heads_of(buckets) * sizeof(uint32_t))
    size.slots = lines(size.next + buckets * sizeof(uint32_t))
    size.log = size.slots + buckets * sizeof(Slot)
    size.log_bytes = lines(65536 + 16 * buckets)
    size.end = size.log + 2 * size.log_bytes
    return size


cdef bint in_bounds(const Slot *s) noexcept nogil:
    """Return whether a scale is one that arithmetic.scale() could have made."""
    return (1 <= s.capacity <= MAX_UNITS and 0 <= s.debt <= MAX_UNITS and 0 <= s.gain <= MAX_UNITS
            and 1 <= s.unit <= MAX_UNITS and 1 <= s.pace <= 7
            and <wide>(s.capacity + s.debt) * s.unit <= MAX_UNITS)
