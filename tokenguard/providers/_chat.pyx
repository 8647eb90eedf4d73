# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: freethreading_compatible=True, auto_pickle=False, autotestdict=False
"""What every call's bytes are read by. The stub, _chat.pyi, is its manual.

C below, in _scan.pxi and _wire.pxi, thin classes here. What is plain, as nearly all is, is read in one pass
without a Python object. What is odd in any way is left to careful.py, which says what it means, or words the
error: what is read here is exactly what is read there.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcmp, memset, strlen

from tokenguard import sizing
from tokenguard.jsontext import read_object
from tokenguard.model import Usage
from tokenguard.providers import careful

ctypedef unsigned char byte

include "_scan.pxi"
include "_wire.pxi"

MAX_ANSWER_BYTES = 16 * 2**20
MAX_EVENT_BYTES = 2**20

cdef int64_t ANSWER_BYTES = MAX_ANSWER_BYTES
cdef int64_t EVENT_BYTES = MAX_EVENT_BYTES
cdef int64_t MESSAGE_TOKENS = careful.TOKENS_PER_MESSAGE
cdef int64_t PROMPT_TOKENS = careful.TOKENS_PER_PROMPT
cdef object new_tuple = tuple.__new__


# --- the request --------------------------------------------------------------------------------------------

@cython.final
cdef class ChatRequest:
    def __init__(
        self, str model not None, bint stream, int64_t choices, output_cap, int64_t text_bytes,
        int64_t text_256ths, int64_t extra_tokens, bint attachments, bint asks_for_usage, body,
    ):
        self.model = model
        self.stream = stream
        self.choices = choices
        self.output_cap = output_cap
        self.text_bytes = text_bytes
        self.text_256ths = text_256ths
        self.extra_tokens = extra_tokens
        self.attachments = attachments
        self.asks_for_usage = asks_for_usage
        self.read_body = body

    @property
    def body(self):
        if self.read_body is None:
            self.read_body = read_object(self.raw)
        return self.read_body

    cpdef bytes body_with_usage(self):
        if self.opening:
            return self.raw[:self.opening] + b'"stream_options":{"include_usage":true},' + self.raw[self.opening:]
        return careful.ask_for_usage(self.body)

    def __repr__(self):
        return (
            f"<ChatRequest of {self.model!r}: stream {self.stream}, {self.choices} choices, output cap "
            f"{self.output_cap}, {self.text_bytes} bytes of text and {self.extra_tokens} tokens>"
        )


cpdef ChatRequest scan_chat(bytes raw):
    cdef const byte *start
    cdef Scan s
    cdef Chat c
    cdef ChatRequest request
    if raw is None:
        raise TypeError("a body is bytes, got None")
    start = <const byte *>PyBytes_AS_STRING(raw)
    memset(&c, 0, sizeof(Chat))
    c.messages = -1
    c.choices = 1
    begin(&s, start, start + PyBytes_GET_SIZE(raw))
    s.weighs = True
    skip_space(&s)
    read_chat(&s, &c)
    if not over(&s) or c.model == NULL or c.messages < 0:
        return None
    request = ChatRequest.__new__(ChatRequest)
    request.model = (<const char *>c.model)[:c.model_size].decode("ascii")
    request.stream = c.stream
    request.choices = c.choices
    request.output_cap = c.cap or None
    request.text_bytes = c.text.bytes
    request.text_256ths = PLAIN_256THS * c.text.bytes + c.text.excess
    request.extra_tokens = MESSAGE_TOKENS * c.messages + PROMPT_TOKENS
    request.asks_for_usage = c.asks
    request.raw = raw
    request.opening = 0 if c.options else c.opening - start
    return request


# --- usage --------------------------------------------------------------------------------------------------

cdef object usage_of(Told *told):
    """Return the usage as ``careful.read_usage`` does."""
    cdef int64_t total
    if not told.usage:
        return None
    total = told.prompt + told.completion if told.total < 0 else told.total
    return new_tuple(Usage, (told.prompt, told.completion, total)) if 0 < total <= USAGE else None


cdef class Reader:
    cpdef bytes feed(self, bytes chunk):
        raise NotImplementedError

    cpdef bytes rest(self):
        raise NotImplementedError

    cpdef object final_usage(self, bint ended):
        raise NotImplementedError


# --- an answer in one piece ---------------------------------------------------------------------------------


@cython.final
cdef class JsonAnswer(Reader):
    def __cinit__(self):
        self.kept = []

    @property
    def streamed_tokens(self):
        return 0

    cpdef bytes feed(self, bytes chunk):
        self.size += PyBytes_GET_SIZE(chunk)
        if self.size > ANSWER_BYTES:
            self.kept = None
        elif self.kept is not None:
            self.kept.append(chunk)
        return chunk

    cpdef bytes rest(self):
        return b""

    @property
    def usage(self):
        return self.final_usage(True)

    cpdef object final_usage(self, bint ended):
        cdef bytes document
        cdef const byte *start
        cdef Scan s
        cdef Told told
        if self.kept is None:
            return None
        document = self.kept[0] if len(self.kept) == 1 else b"".join(self.kept)
        start = <const byte *>PyBytes_AS_STRING(document)
        begin(&s, start, start + PyBytes_GET_SIZE(document))
        told.usage = False
        skip_space(&s)
        read_answer(&s, &told)
        if over(&s):
            return usage_of(&told)
        answer = careful.decode(document)
        return None if answer is None else careful.read_usage(answer.get("usage"))


# --- a stream -----------------------------------------------------------------------------------------------

@cython.final
cdef class EventStream(Reader):
    def __cinit__(self, *, bint swallow_usage):
        self.swallow_usage = swallow_usage
        self.pending = bytearray()

    @property
    def streamed_tokens(self):
        return max(self.deltas, self.delta_bytes // 4)

    cpdef bytes feed(self, bytes chunk):
        cdef bytes data = chunk
        cdef const byte *start
        cdef const byte *end
        if self.pending:
            if not self.completes(chunk):
                return self.overflow()
            data = bytes(self.pending)
            self.pending.clear()
        start = <const byte *>PyBytes_AS_STRING(data)
        end = start + PyBytes_GET_SIZE(data)
        return self.pass_on(data, start, end)

    cdef bint completes(self, bytes chunk) except -1:
        """Put a piece behind what is pending; return whether that has an event's end now."""
        cdef Py_ssize_t before = max(0, len(self.pending) - 3)  # where a blank line may have begun
        cdef const byte *line
        cdef const byte *start
        self.pending += chunk
        start = <const byte *><char *>self.pending
        return event_end(start + before, start + len(self.pending), &line) != NULL

    cdef bytes overflow(self):
        """Return what is pending if it has become too much to keep."""
        return self.rest() if len(self.pending) > EVENT_BYTES else b""

    cdef bytes pass_on(self, bytes data, const byte *start, const byte *end):
        """Read all events that are complete, and keep the beginning of the next; return what passes."""
        cdef const byte *first = start     # of what passes and has not been put to the pieces
        cdef const byte *line
        cdef const byte *behind
        cdef list pieces = []
        while True:
            behind = event_end(start, end, &line)
            if behind == NULL:
                break
            if self.read(start, line, behind) and self.swallow_usage:
                pieces.append(first[:start - first])
                first = behind
            start = behind
        if start < end:
            self.pending += start[:end - start]
        elif not pieces:
            return data
        pieces.append(first[:start - first])
        pieces.append(self.overflow())
        return b"".join(pieces)

    cpdef bytes rest(self):
        cdef bytes rest = bytes(self.pending)
        self.pending.clear()
        return b"" if rest and self.read_carefully(rest) and self.swallow_usage else rest

    cdef bint read(self, const byte *start, const byte *line, const byte *behind) except -1:
        """Take note of an event, of one line if that ends at ``line``; return whether it tells the usage alone."""
        cdef Scan s
        cdef Event e
        if line == NULL:
            return self.read_carefully(start[:behind - start])
        begin(&s, start, line)
        if not starts(&s, b"data:"):
            return False
        s.at += 5
        skip_space(&s)
        if starts(&s, b"[DONE]") and line - s.at == 6:
            return False
        memset(&e, 0, sizeof(Event))
        read_event(&s, &e)
        if not over(&s):
            return self.read_carefully(start[:behind - start])
        self.take(e.deltas, e.delta_bytes, e.finished, usage_of(&e.told))
        return e.no_choices and e.told.usage

    cdef bint read_carefully(self, bytes data) except -1:
        event = careful.read_event(data)
        if event is None:
            return False
        self.take(event.deltas, event.delta_bytes, event.finished, event.usage)
        return event.only_usage

    cdef int take(self, int64_t deltas, int64_t delta_bytes, bint finished, object usage) except -1:
        self.finished |= finished
        self.deltas += deltas
        self.delta_bytes += delta_bytes
        if usage is not None:
            self.usage = usage
            self.deltas_at_usage = self.deltas
        return 0

    cpdef object final_usage(self, bint ended):
        return self.usage if (ended or self.finished) and self.deltas == self.deltas_at_usage else None
