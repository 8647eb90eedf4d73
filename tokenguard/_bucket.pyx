# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: freethreading_compatible=True, auto_pickle=False, autotestdict=False
"""The table of buckets. The stub, _bucket.pyi, is its manual.

C below, in _table.pxi, a thin class here. Everything that a decision needs lies in one mapped region without a
Python object or a pointer in it, so that any number of processes can map it: a header with a journal, the names
and rows of tallies, an index by hash (heads of chains, and for each slot the next of its chain), dense slots of
one cache line each, which never move, and a log of what who changes budgets has to tell the others. A bucket's
key is kept as a keyed 96-bit fingerprint.

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
from libc.string cimport memcmp, memcpy, memset

from tokenguard.errors import StaleHandle, TableBusy, TableFull

include "_table.pxi"

MAX_PLAN = PLAN
MAX_BUCKETS = 10_000_000
MAX_ROWS = ROWS
MAX_SHARED = SHARED

cdef bytes MAGIC = b"TGTABLE\n"
cdef dict PACES = {10 ** exponent: exponent + 1 for exponent in range(7)}


cdef class Handle:
    def __dealloc__(self):
        PyMem_Free(self.entries)

    def __len__(self):
        return self.count


cdef class Outcome:
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

    cpdef int64_t level(self, int i) except? -1:
        self.check(i)
        return floor_div(self.seen[i].level, self.plan.entries[i].want.unit)

    cpdef int64_t limit(self, int i) except? -1:
        self.check(i)
        return self.plan.entries[i].want.capacity

    cpdef int64_t cost(self, int i) except? -1:
        self.check(i)
        return self.seen[i].cost

    cpdef int64_t wait_us(self, int i) except? -1:
        self.check(i)
        return self.seen[i].wait_us

    cpdef int64_t full_in_us(self, int i) except? -1:
        cdef Slot s
        self.check(i)
        s = self.plan.entries[i].want
        s.tick = self.seen[i].tick
        return time_us(&s, s.capacity * s.unit - self.seen[i].level, self.now_us)

    cdef int tell(self, int i, State *state) except -1:
        state.full_in_us = self.full_in_us(i)  # checks i
        state.limit = self.plan.entries[i].want.capacity
        state.level = floor_div(self.seen[i].level, self.plan.entries[i].want.unit)
        state.cost, state.wait_us = self.seen[i].cost, self.seen[i].wait_us
        return 0

    def asked(self, tuple costs not None):
        cdef Outcome o
        cdef Slot s
        cdef int64_t longest = 0
        cdef int i
        if len(costs) != len(self):
            raise ValueError(f"the plan has {len(self)} buckets, got {len(costs)} costs")
        o = new_outcome(self.plan)
        o.now_us = self.now_us
        for i in range(len(self)):
            o.seen[i] = self.seen[i]
            o.seen[i].cost = PyLong_AsLongLong(costs[i])
            s = self.plan.entries[i].want
            s.level, s.tick = self.seen[i].level, self.seen[i].tick
            o.seen[i].wait_us = wait_us(&s, o.seen[i].cost, o.now_us)
            if o.seen[i].wait_us > longest:
                longest = o.seen[i].wait_us
                o.binding = i
        o.allowed = o.binding < 0
        return o

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


cdef int64_t checked_buckets(int64_t buckets) except -1:
    if not 1 <= buckets <= MAX_BUCKETS:
        raise ValueError(f"buckets must be between 1 and {MAX_BUCKETS}, got {buckets}")
    return buckets


def region_bytes(int64_t buckets):
    return size_of(checked_buckets(buckets)).end


cdef class Tally:
    cpdef add(self, int64_t amount=1):
        tg_add(&(<BucketTable>self.table).row.tallies[self.number], amount)

    cpdef set(self, int64_t number):
        tg_store_number(&(<BucketTable>self.table).row.tallies[self.number], number)


cdef class Shared:
    def __cinit__(self):
        self.numbers = self.alone

    cdef int check(self, int i) except -1:
        if not 0 <= i < NUMBERS:
            raise IndexError(f"number must be between 0 and {NUMBERS - 1}, got {i}")
        return 0

    cpdef int64_t add(self, int i, int64_t amount) except? -1:
        self.check(i)
        return tg_add(&self.numbers[i], amount) + amount

    cpdef int64_t get(self, int i) except? -1:
        self.check(i)
        return tg_load_number(&self.numbers[i])

    cpdef int set(self, int i, int64_t number) except -1:
        self.check(i)
        tg_store_number(&self.numbers[i], number)
        return 0


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
        self.table.shared = <Common *>(base + size.shared)
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

    @property
    def saved_turn(self):
        return tg_load(&self.table.header.saved)

    @saved_turn.setter
    def saved_turn(self, uint64_t turn):
        tg_store(&self.table.header.saved, turn)

    def dump(self, uint64_t start, uint64_t slots, now_us=None):
        cdef uint64_t end = min(start + slots, tg_load(&self.table.header.fresh))
        cdef int64_t now = self.read_time(now_us)
        cdef Slot *into
        cdef Py_ssize_t held = 0
        if start >= end:
            return b""
        records = PyBytes_FromStringAndSize(NULL, (end - start) * sizeof(Slot))
        into = <Slot *>PyBytes_AS_STRING(records)
        if now < 0:
            now = tg_now_us()
        while True:
            with nogil:
                start = collect(&self.table, start, end, into, &held, now)
            if start == end:
                return records[:held * sizeof(Slot)]
            self.lock()           # somebody writes it all the time, or died while writing
            start = collect(&self.table, start, start + 1, into, &held, now)
            self.unlock()

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

    def shared(self, bytes key not None):
        cdef Shared shared = Shared.__new__(Shared)
        cdef uint64_t known, i
        if len(key) != KEY_BYTES:
            raise ValueError(f"key must be {KEY_BYTES} bytes, got {len(key)}")
        self.lock()
        known = self.table.header.shared
        for i in range(known):
            if not memcmp(self.table.shared[i].key, <char *>key, KEY_BYTES):
                break
        else:
            i = known
            if known < SHARED:
                memset(&self.table.shared[i], 0, sizeof(Common))
                memcpy(self.table.shared[i].key, <char *>key, KEY_BYTES)
                tg_point()
                set_word(&self.table, &self.table.header.shared, known + 1)
        self.unlock()
        if i < SHARED:
            shared.table = self
            shared.numbers = self.table.shared[i].numbers
        return shared

    def forget_shared(self):
        self.lock()
        set_word(&self.table, &self.table.header.shared, 0)
        self.unlock()

    def rows(self):
        return [(self.table.rows[row].pid, self.table.rows[row].began) for row in range(ROWS)]

    @property
    def held_row(self):
        return self.row - self.table.rows

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
