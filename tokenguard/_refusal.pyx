# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: auto_pickle=False, autotestdict=False
"""How a call is refused. The stub, _refusal.pyi, is its manual.

What a 429 says stands here once: the shape of its body as what msgspec makes of it, with holes where numbers and
names go; the message; the fields. What is the same in every refusal that tells of a bucket is made ready once.

PERF: all is written from numbers into one piece of memory, for in an overload most calls are refused; row "a call
that is refused" of test_bench_call.
"""

from functools import lru_cache

import msgspec

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.stdint cimport int64_t

from tokenguard._bucket cimport Outcome, State
from tokenguard._fields cimport put_text
from tokenguard._limit_fields cimport FIELDS, names_of, put_duration, put_fields, put_number
from tokenguard.limiter cimport Refusal
from tokenguard.model cimport Answer

from tokenguard.model import NEVER_US, Meter
from tokenguard.providers.openai import error_body

MAX_NAMES = 1024

cdef enum:
    MOST = 32                     # buckets of a plan
    METERS = 8                    # there are no more
    NUMBERS = 256                 # bytes of a bucket behind its opening, at most: 100 of digits, 70 around them
    WORDS = 1024                  # bytes of the message and of what is around it, without names: 400 at most
    RETRIES = 256                 # bytes of the fields that do not tell of a bucket: 125 at most
    FEW = 8192                    # bytes that most bodies find room in

cdef int64_t NEVER = NEVER_US
cdef int64_t WORTHWHILE_US = 60_000_000
cdef int64_t JITTER_FROM_US = 1_000_000
cdef double JITTER = 0.1

cdef bytes OURS = b"This is a TokenGuard budget, not a limit of the provider."
cdef bytes THEIRS = b"This is the provider's own limit, which TokenGuard keeps calls within."

cdef list METER = list(Meter)
cdef int GATE = METER.index(Meter.GATE)
cdef list NAMES = [names_of(meter) for meter in METER]

cdef object HOLE = msgspec.Raw(b"\0")  # no text in JSON has such a byte


cdef tuple around_holes(bytes text):
    return tuple(text.split(b"\0"))


cdef tuple error_of(meter):
    """Return the body around its holes: the message, the scope, the wait, the buckets."""
    shown = {"scope": HOLE, "retryAfterMs": HOLE, "buckets": HOLE}
    kind = Meter.REQUESTS if meter is Meter.GATE else meter
    return around_holes(error_body(HOLE, kind, "rate_limit_exceeded", tokenguard=shown))


cdef tuple bucket_of(kind, scope_id, meter, model, source):
    """Return a bucket of the body around its holes."""
    return around_holes(msgspec.json.encode({
        "scope": kind,
        "id": scope_id,
        "meter": meter,
        "model": model,
        "source": source,
        "limit": HOLE,
        "remaining": HOLE,
        "level": HOLE,
        "requested": HOLE,
        "allowed": HOLE,
        "retryAfterMs": HOLE,
    }))


cdef list ERRORS = [error_of(meter) for meter in METER]
cdef tuple BUCKET = bucket_of("", "", Meter.TOKENS, None, None)[1:]


cdef class Told:
    """What is the same in every refusal that tells of a bucket: texts in JSON.

    Attributes:
        opening: The bucket as far as its limit.
        scope: Its scope.
        what: What the message names, without quotes: the bucket, of a gate the model.
        theirs: Whether it is the provider's.
        meter: The number of its meter.
    """

    cdef bytes opening
    cdef bytes scope
    cdef bytes what
    cdef bint theirs
    cdef int meter

    def __cinit__(self, name):
        scope, meter, model, source = name
        what = msgspec.json.encode(f"{model}" if meter is Meter.GATE else f"{name}")
        self.opening = bucket_of(scope.kind, scope.id, meter, model, source)[0]
        self.scope = msgspec.json.encode(f"{scope}")
        self.what = what[1:len(what) - 1]
        self.theirs = source is not None
        self.meter = METER.index(meter)


told_of = lru_cache(MAX_NAMES)(Told)


cpdef Answer refuse(refused, double jitter):
    if isinstance(refused, Refusal):
        return refuse_by_outcome(<Refusal>refused, jitter)
    return refuse_by_decision(refused, jitter)


cdef Answer refuse_by_outcome(Refusal refused, double jitter):
    cdef Outcome outcome = refused.outcome
    cdef tuple told = refused.plan.told
    cdef State states[MOST]
    cdef int binding = outcome.binding
    cdef int i
    if told is None:
        told = refused.plan.told = tuple([told_of(budget.name) for budget in refused.plan.budgets])
    for i in range(check_room(len(told))):
        outcome.tell(i, &states[i])
    return written(told, states, <Told>told[binding], &states[binding], states[binding].wait_us, jitter)


cdef Answer refuse_by_decision(decision, double jitter):
    cdef State states[MOST]
    cdef State binding
    cdef int i
    check_refused(decision)
    check_room(len(decision.buckets))
    for i, bucket in enumerate(decision.buckets):
        states[i] = state_of(bucket)
    binding = state_of(decision.binding)
    told = tuple([told_of(bucket.name) for bucket in decision.buckets])
    return written(told, states, told_of(decision.binding.name), &binding, decision.retry_after_us, jitter)


cdef State state_of(bucket) except *:
    cdef State state
    _, state.limit, state.level, state.cost, state.wait_us, state.full_in_us = bucket
    return state


cdef int check_refused(decision) except -1:
    if decision.binding is None:
        raise ValueError("an allowed decision is not a refusal")
    return 0


cdef int check_room(Py_ssize_t buckets) except -1:
    if buckets > MOST:
        raise ValueError(f"a plan has at most {MOST} buckets, got {buckets}")
    return buckets


def explain(decision):
    cdef bytes text
    cdef State binding
    cdef Told told
    check_refused(decision)
    binding = state_of(decision.binding)
    told = told_of(decision.binding.name)
    text = PyBytes_FromStringAndSize(NULL, WORDS + PyBytes_GET_SIZE(told.what))
    size = put_message(PyBytes_AS_STRING(text), told, &binding, decision.retry_after_us) - PyBytes_AS_STRING(text)
    return msgspec.json.decode(b'"%b"' % text[:size])


cdef Answer written(
    tuple told, State *states, Told binding, State *bound, int64_t retry_after_us, double jitter,
):
    """Return the answer that tells of some buckets; ``bound`` is how things are with the one that binds."""
    cdef char lines[RETRIES + METERS * FIELDS]
    cdef Py_ssize_t size = WORDS + PyBytes_GET_SIZE(binding.what) + PyBytes_GET_SIZE(binding.scope)
    cdef int64_t wait_us = prolonged(retry_after_us, jitter)
    cdef Py_ssize_t lines_size = put_lines(lines, told, states, binding, bound, retry_after_us, wait_us) - lines
    cdef char few[FEW]
    cdef char *body = few
    cdef Told each
    for each in told:
        size += PyBytes_GET_SIZE(each.opening) + NUMBERS
    if size > FEW:
        body = <char *>PyMem_Malloc(size)
        if body == NULL:
            raise MemoryError
    try:
        size = put_body(body, told, states, binding, bound, retry_after_us, wait_us) - body
        return Answer(
            429, None, PyBytes_FromStringAndSize(body, size), PyBytes_FromStringAndSize(lines, lines_size)
        )
    finally:
        if body != few:
            PyMem_Free(body)


cdef int64_t prolonged(int64_t wait_us, double jitter) noexcept:
    """Return a wait with its jitter: who is refused together does not come back together.

    NOTE: a wait that is worthwhile stays so: some clients come back at once if they are told of over a minute.
    """
    if not JITTER_FROM_US < wait_us < NEVER:
        return wait_us
    cdef int64_t longest = WORTHWHILE_US if wait_us <= WORTHWHILE_US else NEVER - 1
    return min(wait_us + <int64_t>(wait_us * JITTER * jitter), longest)


# --- what is put writes from a place on, and returns where the next goes ----------------------------------------

cdef char *put_lines(
    char *at, tuple told, State *states, Told binding, State *bound, int64_t retry_after_us, int64_t wait_us,
):
    """Write the fields: when to come back, the binding bucket, and of each other meter the tightest."""
    cdef int lowest[METERS]
    cdef int order[METERS]
    cdef int meters = 0
    cdef int meter, i
    at = put_text(at, b"content-type: application/json\r\n")
    if wait_us < NEVER:
        at = put_number(put_text(at, b"retry-after: "), max(1, up(wait_us, 1_000_000)))
        at = put_number(put_text(at, b"\r\nretry-after-ms: "), up(wait_us, 1000))
        at = put_text(at, b"\r\n")
    if retry_after_us > WORTHWHILE_US:
        at = put_text(at, b"x-should-retry: false\r\n")
    for i in range(METERS):
        lowest[i] = -1
    for i in range(<int>len(told)):
        meter = (<Told>told[i]).meter
        if lowest[meter] < 0:
            order[meters] = meter
            meters += 1
            lowest[meter] = i
        elif states[i].level < states[lowest[meter]].level:
            lowest[meter] = i
    if binding.meter != GATE:
        at = put_fields(at, NAMES[binding.meter], bound.limit, bound.level, bound.full_in_us)
    for i in range(meters):
        meter = order[i]
        if meter != GATE and meter != binding.meter:
            bound = &states[lowest[meter]]
            at = put_fields(at, NAMES[meter], bound.limit, bound.level, bound.full_in_us)
    return at


cdef char *put_body(
    char *at, tuple told, State *states, Told binding, State *bound, int64_t retry_after_us, int64_t wait_us,
):
    cdef tuple error = <tuple>ERRORS[binding.meter]
    cdef int i
    at = put_text(put_text(at, error[0]), b'"')
    at = put_text(put_message(at, binding, bound, wait_us), b'"')
    at = put_text(put_text(at, error[1]), binding.scope)
    at = put_ms(put_text(at, error[2]), retry_after_us)
    at = put_text(put_text(at, error[3]), b"[")
    for i in range(<int>len(told)):
        if i:
            at = put_text(at, b",")
        at = put_bucket(at, <Told>told[i], &states[i])
    return put_text(put_text(at, b"]"), error[4])


cdef char *put_bucket(char *at, Told told, State *state):
    at = put_number(put_text(at, told.opening), state.limit)
    at = put_number(put_text(at, BUCKET[0]), max(0, state.level))
    at = put_number(put_text(at, BUCKET[1]), state.level)
    at = put_number(put_text(at, BUCKET[2]), state.cost)
    at = put_text(put_text(at, BUCKET[3]), b"false" if state.wait_us else b"true")
    at = put_ms(put_text(at, BUCKET[4]), state.wait_us)
    return put_text(at, BUCKET[5])


cdef char *put_ms(char *at, int64_t wait_us):
    return put_number(at, up(wait_us, 1000)) if wait_us < NEVER else put_text(at, b"null")


cdef char *put_message(char *at, Told told, State *state, int64_t wait_us):
    """Write whose limit it was, how things are with it, and what may help."""
    if told.meter == GATE:
        at = put_text(put_text(at, b"The provider asked to wait: calls of "), told.what)
        at = put_again(put_text(at, b" are held back"), wait_us)
    elif state.cost > state.limit:
        at = put_numbers(put_text(at, b"Request too large for "), told, state)
        at = put_text(at, b". Waiting does not help: ask for fewer tokens. ")
    elif wait_us >= NEVER:
        at = put_numbers(put_text(at, b"Budget used up for "), told, state)
        at = put_text(at, b". It does not refill by itself. ")
    else:
        at = put_again(put_numbers(put_text(at, b"Rate limit reached for "), told, state), wait_us)
    return put_text(at, THEIRS if told.theirs else OURS)


cdef char *put_numbers(char *at, Told told, State *state):
    at = put_number(put_text(put_text(at, told.what), b": limit "), state.limit)
    at = put_number(put_text(at, b", remaining "), max(0, state.level))
    return put_number(put_text(at, b", requested "), state.cost)


cdef char *put_again(char *at, int64_t wait_us):
    return put_text(put_duration(put_text(at, b". Please try again in "), wait_us), b". ")


cdef inline int64_t up(int64_t amount, int64_t unit) noexcept:
    return amount // unit + (amount % unit != 0)
