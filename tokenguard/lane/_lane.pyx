# cython: freethreading_compatible=True, auto_pickle=False, autotestdict=False
"""The fast lane. The stub, _lane.pyi, is its manual.

A connection looks at the beginning of each request. A plain ``POST /v1/chat/completions`` is answered here;
whatever else comes, and whatever is odd about it, goes byte for byte to the protocol behind, which is uvicorn's,
and so to Falcon. Both answer alike: the same statuses, fields and bodies, the same charges, the same metrics.

No task and no queue is made for a call. Its steps are callbacks: the body is there; the buckets have answered; the
provider has; the caller reads on, or is gone.
"""

import asyncio
import logging
import os
from asyncio import CancelledError
from http import HTTPStatus

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeASCII
from libc.stdint cimport uint64_t
from libc.string cimport memcmp

from tokenguard._fields cimport Fields, known, lines_of, put_text
from tokenguard._limit_fields cimport put_number
from tokenguard.account cimport Account
from tokenguard.api.call cimport CallSoon, Guard
from tokenguard.exchange cimport Exchange
from tokenguard.limiter cimport Limiter, Reservation
from tokenguard.metrics cimport Metrics
from tokenguard.model cimport Answer, Head, UpstreamRequest
from tokenguard.upstream._http cimport find_head_end
from tokenguard.upstream._pool cimport Pool, PooledUpstream, Receiver, clock_s

from tokenguard import refusal
from tokenguard._heads import REQUEST_ID
from tokenguard.api.call import answer_to
from tokenguard.api.wire import GONE, request_id_of
from tokenguard.errors import BodyTimeout, TokenGuardError, UpstreamError

CHAT_ROUTE = "/v1/chat/completions"
KEEPALIVE_S = 75
cdef bytes BEGINS = b"POST /v1/chat/completions HTTP/1.1\r\n"
cdef Py_ssize_t MAX_HEAD_BYTES = 16_384
cdef Py_ssize_t MAX_PENDING_BYTES = 65_536
cdef double KEPT_S = KEEPALIVE_S
cdef int NAME_OF_ID = known(REQUEST_ID)
cdef int KEY = known(b"idempotency-key")
cdef const char *HEX = "0123456789abcdef"
cdef bytes CLOSE = b"connection: close\r\n"
cdef bytes ID = b"x-request-id: "
cdef bytes CRLF = b"\r\n"
cdef bytes LENGTH = b"\r\ncontent-length: "
cdef bytes CHUNKED = b"transfer-encoding: chunked\r\n"
cdef bytes JSON = b"content-type: application/json\r\n"
cdef bytes LAST_CHUNK = b"0\r\n\r\n"
cdef frozenset BODILESS = frozenset((204, 304))
cdef object log = logging.getLogger("tokenguard")


cdef class Lane:
    """What is the same for all connections of a server."""

    cdef Guard guard
    cdef Limiter limiter
    cdef Metrics metrics
    cdef Pool pool
    cdef object state
    cdef set tasks
    cdef object loop
    cdef bint waits
    cdef Py_ssize_t max_body_bytes
    cdef double caller_timeout_s
    cdef dict firsts
    cdef object dated

    def __cinit__(self, Guard guard not None, PooledUpstream upstream not None):
        self.guard, self.limiter, self.metrics = guard, guard.limiter, guard.metrics
        self.pool = upstream.pool
        self.waits = guard.limiter.waits
        self.max_body_bytes = guard.max_body_bytes
        self.caller_timeout_s = guard.caller_timeout_s

    cdef bytes first(self, int status):
        """Return the first lines of an answer: the status, and the fields that all have, such as the date."""
        cdef bytes line
        fields = self.state.default_headers
        if fields is not self.dated:  # uvicorn makes a new list each second
            self.dated, self.firsts = fields, {}
        line = self.firsts.get(status)
        if line is None:
            line = b"HTTP/1.1 %d %b\r\n" % (status, phrase_of(status))
            line = self.firsts[status] = line + lines_of(fields)
        return line


def phrase_of(status):
    try:
        return HTTPStatus(status).phrase.encode()
    except ValueError:
        return b""


cdef class Connection:
    """A caller's connection, as asyncio's protocol."""

    cdef Lane lane
    cdef object fallback_of
    cdef object fallback
    cdef object transport
    cdef LaneCall call
    cdef bytes pending
    cdef Fields fields
    cdef list body
    cdef Py_ssize_t missing
    cdef bint taking
    cdef bint keep_alive
    cdef bint said_close
    cdef bint read_paused
    cdef bint write_paused
    cdef object timer
    cdef double due
    cdef double deadline

    def __init__(self, Lane lane not None, fallback_of, config, server_state, app_state, _loop=None):
        self.lane = lane
        if lane.state is not server_state:
            lane.state, lane.tasks, lane.loop, lane.dated = server_state, server_state.tasks, _loop, None
        self.fallback_of = lambda: fallback_of(config, server_state, app_state, _loop)
        self.pending = b""
        self.keep_alive = True

    # --- what asyncio and uvicorn tell ------------------------------------------------------------------------

    def connection_made(self, transport):
        if self.lane.loop is None:
            self.lane.loop = asyncio.get_running_loop()
        self.transport = transport
        self.lane.state.connections.add(self)
        self.expect(self.lane.caller_timeout_s)

    def data_received(self, bytes data):
        if self.fallback is not None and not self.fallback.idle:
            self.fallback.data_received(data)
        elif self.missing:
            self.take_body(data)
        elif self.call is not None or self.pending:
            self.hold(self.pending + data)  # the next request, ahead of its time
        else:
            self.take(data)

    def eof_received(self):
        pass

    def connection_lost(self, error):
        cdef LaneCall call = self.call
        self.lane.state.connections.discard(self)
        self.expect(0)
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self.pending, self.missing = b"", 0
        if self.fallback is not None:
            self.fallback.connection_lost(error)
        if call is not None:
            call.caller_left()
        elif self.fields is not None:
            self.fields = self.body = None
            self.lane.tasks.discard(self)

    def pause_writing(self):
        self.write_paused = True
        if self.fallback is not None:
            self.fallback.pause_writing()
        if self.call is not None:
            self.call.pause()
            self.expect(self.lane.caller_timeout_s)

    def resume_writing(self):
        self.write_paused = False
        if self.fallback is not None:
            self.fallback.resume_writing()
        if self.call is not None:
            self.expect(0)
            self.call.resume()
        elif self.pending:
            self.read_on()  # answers that nobody took held it up

    def shutdown(self):
        if self.call is not None or self.fields is not None:
            self.keep_alive = False
        elif self.fallback is not None and not self.fallback.idle:
            self.fallback.shutdown()
        else:
            self.transport.close()

    def cancel(self, msg=None):
        self.lane.loop.call_soon(self.stop)  # uvicorn is going through its tasks, of which this is one

    def stop(self):
        if self.call is not None:
            self.call.cancel()
        elif self.fields is not None:
            self.answer_before_any_call(refusal.stopping())

    # --- requests ---------------------------------------------------------------------------------------------

    cdef int take(self, bytes data) except -1:
        """Read requests, one after the other, until one is not answered yet."""
        cdef Py_ssize_t used
        self.taking = True
        try:
            while data and self.call is None and not self.write_paused and not self.transport.is_closing():
                used = self.begin(data)
                if used == 0:
                    self.hand_over(data)
                    break
                data = data[used:] if used < PyBytes_GET_SIZE(data) else b""
            else:
                self.hold(data)
        finally:
            self.taking = False
        return 0

    cdef int hand_over(self, bytes data) except -1:
        """Leave a request to the protocol behind."""
        self.expect(0)
        if self.fallback is None:
            self.fallback = self.fallback_of()
            self.fallback.connection_made(self.transport)
            self.lane.state.connections.discard(self.fallback)  # it is shut down through this one
            if self.write_paused:
                self.fallback.pause_writing()
        self.fallback.data_received(data)
        return 0

    cdef Py_ssize_t begin(self, bytes data) except -1:
        """Take up a request; return how many bytes it has so far, 0 if it is not for the lane."""
        cdef const char *at = PyBytes_AS_STRING(data)
        cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
        cdef Py_ssize_t begins = PyBytes_GET_SIZE(BEGINS)
        cdef Py_ssize_t head
        cdef Fields fields
        if size < begins or memcmp(at, PyBytes_AS_STRING(BEGINS), begins):
            return 0
        head = find_head_end(at, min(size, MAX_HEAD_BYTES))
        if head == 0:
            return 0
        fields = Fields()
        if (
            not fields.read(data, at + begins, at + head)
            or fields.odd
            or fields.chunked
            or not fields.host
            or not 0 <= fields.length <= self.lane.max_body_bytes
        ):
            return 0
        if self.fallback is not None:
            self.fallback.rest()
        self.lane.tasks.add(self)
        self.expect(0)
        self.keep_alive = self.keep_alive and not fields.close
        if size - head >= fields.length:
            self.fields = fields
            self.start(PyBytes_FromStringAndSize(at + head, fields.length))
            return head + fields.length
        self.fields, self.body, self.missing = fields, [], fields.length
        self.expect(self.lane.caller_timeout_s)
        if size > head:
            self.take_body(data[head:])
        return size

    cdef int take_body(self, bytes data) except -1:
        """Take in a piece of a body."""
        cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
        cdef bytes more = b""
        if self.call is None:
            self.call = LaneCall(self)
        if size > self.missing:
            data, more = data[:self.missing], data[self.missing:]
            size = self.missing
        self.body.append(data)
        self.missing -= size
        if self.missing:
            self.expect(self.lane.caller_timeout_s)
            return 0
        self.expect(0)
        self.hold(more)
        self.start(b"".join(self.body))
        return 0

    cdef int start(self, bytes body) except -1:
        """The request is whole."""
        if self.call is None:
            self.call = LaneCall(self)
        self.body = None
        self.call.start(body)
        return 0

    cdef int ended(self) except -1:
        """The call is over, and its answer written: go on to the next."""
        self.call = None
        self.fields = self.body = None
        self.missing = 0
        self.lane.tasks.discard(self)
        self.lane.state.total_requests += 1
        if self.transport.is_closing():
            return 0
        if not self.keep_alive:
            self.transport.close()
            return 0
        self.expect(KEPT_S)
        if self.taking:
            return 0  # whoever takes goes on
        self.read_on()
        return 0

    cdef int read_on(self) except -1:
        """Go on to what has come meanwhile, and to what follows."""
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()
        data, self.pending = self.pending, b""
        if data:
            self.take(data)
        return 0

    cdef int answer_before_any_call(self, answer) except -1:
        """Answer a request of which nothing but the head has come."""
        cdef bytes request_id = id_of(self.fields).encode()
        self.keep_alive = False
        self.lane.metrics.answered(None, answer.status)
        self.transport.write(self.write_answer(answer, request_id))
        self.ended()
        return 0

    cdef bytes write_answer(self, Answer answer, bytes request_id):
        """Return a whole answer of ours."""
        cdef bytes first = self.lane.first(answer.status)
        cdef bytes block = answer.block
        cdef bytes close = b""
        cdef bytes out
        cdef char length[20]
        cdef char *at = put_number(length, PyBytes_GET_SIZE(answer.body))
        cdef Py_ssize_t digits = at - length
        if not block:
            block = lines_of(answer.headers)
            if (b"connection", b"close") in answer.headers:
                self.keep_alive = False
                self.said_close = True
        if not self.keep_alive and not self.said_close:
            close = CLOSE
        out = PyBytes_FromStringAndSize(
            NULL,
            PyBytes_GET_SIZE(first) + PyBytes_GET_SIZE(block) + PyBytes_GET_SIZE(ID) + PyBytes_GET_SIZE(request_id)
            + PyBytes_GET_SIZE(LENGTH) + digits + PyBytes_GET_SIZE(CRLF) + PyBytes_GET_SIZE(close)
            + PyBytes_GET_SIZE(CRLF) + PyBytes_GET_SIZE(answer.body),
        )
        at = put_text(put_text(PyBytes_AS_STRING(out), first), block)
        at = put_text(put_text(put_text(at, ID), request_id), LENGTH)
        at = put_text(put_text(put_number(at, PyBytes_GET_SIZE(answer.body)), CRLF), close)
        put_text(put_text(at, CRLF), answer.body)
        return out

    cdef void hold(self, bytes data):
        """Keep what comes ahead of its time, but not much: who does not read does not see a caller leave."""
        self.pending = data
        if PyBytes_GET_SIZE(data) > MAX_PENDING_BYTES:
            self.pause_reading()

    cdef void pause_reading(self):
        if not self.read_paused and not self.transport.is_closing():
            self.read_paused = True
            self.transport.pause_reading()

    # --- time -------------------------------------------------------------------------------------------------

    cdef int expect(self, double seconds) except -1:
        """Expect something of the caller within some seconds; 0 for nothing."""
        # PERF: one timer a connection, which is moved when it goes off, not one a request
        cdef double now
        if seconds == 0:
            self.deadline = 0
            return 0
        now = clock_s()
        self.deadline = now + seconds
        if self.timer is not None and self.due > self.deadline:
            self.timer.cancel()
            self.timer = None
        if self.timer is None:
            self.due = self.deadline
            self.timer = self.lane.loop.call_later(seconds, self.on_time)
        return 0

    def on_time(self):
        cdef double left = self.deadline - clock_s()
        self.timer = None
        if self.deadline == 0:
            return
        if left > 0.001:
            self.due = self.deadline
            self.timer = self.lane.loop.call_later(left, self.on_time)
        elif self.call is not None:
            self.call.caller_stalled()
        elif self.fields is not None:
            self.answer_before_any_call(refusal.error_answer(body_timeout(self.lane.caller_timeout_s)))
        else:
            self.transport.close()


def body_timeout(seconds):
    return BodyTimeout("body", f"nothing more of the body came for {seconds:g} s")


cdef class LaneCall(Receiver):
    """One guarded call."""

    cdef Connection caller
    cdef Lane lane
    cdef CallSoon call
    cdef Exchange exchange
    cdef Account account
    cdef Head head
    cdef bytes held
    cdef bint headed
    cdef bint chunked
    cdef bint gone
    cdef bint over
    cdef bint last

    def __cinit__(self, Connection caller not None):
        self.caller, self.lane = caller, caller.lane
        self.call = CallSoon(self.lane.guard, id_of(caller.fields))
        self.exchange, self.account = self.call.exchange, self.call.account

    # --- from the caller to the provider ----------------------------------------------------------------------

    cdef int start(self, bytes body) except -1:
        """The request is whole: read it, and reserve for it."""
        try:
            asked = self.exchange.begin(self.caller.fields, body)
            if isinstance(asked, Answer):
                self.answer(<Answer>asked)
                return 0
            identity, model, prompt, total, most = asked
            if self.lane.waits:
                Steps(self.lane.limiter.reserve_soon(identity, model, prompt, total, most), self).go_on(None)
            else:
                self.forward(self.lane.limiter.reserve(identity, model, prompt, total, most))
        except Exception as error:
            self.broke(error)
        return 0

    cdef int reserved(self, reserved, error) except -1:
        """The buckets have answered, after a while."""
        if self.over:
            if isinstance(reserved, Reservation):
                self.lane.limiter.settle_soon(reserved, 0)  # nobody knows of it any more
            return 0
        try:
            if error is not None:
                raise error
            self.forward(reserved)
        except Exception as error:
            self.broke(error)
        return 0

    cdef int forward(self, reserved) except -1:
        cdef UpstreamRequest request
        forward = self.call.reserved(reserved)
        if isinstance(forward, Answer):
            self.answer(<Answer>forward)
        elif self.gone and self.exchange.stream:
            self.leave(GONE.status)
        else:
            request = <UpstreamRequest>forward
            self.repeatable = has(self.caller.fields, KEY)
            self.message = self.lane.pool.write(request)
            self.lane.pool.send(self)
        return 0

    # --- from the provider to the caller ----------------------------------------------------------------------

    cdef int answered(self, int status, Fields fields, bytes piece, bint done) except -1:
        cdef Head head
        try:
            head = self.call.answered(status, fields)
            self.count(status)
            self.head = head
            self.headed = True
            self.chunked = not head.measured and head.status not in BODILESS
            self.pass_on(piece, done)
        except Exception as error:
            self.broke(error)
        return 0

    cdef int came(self, bytes piece, bint done) except -1:
        try:
            self.pass_on(piece, done)
        except Exception as error:
            self.broke(error)
        return 0

    cdef int failed(self, object error) except -1:
        try:
            self.fail(error)
        except Exception as unexpected:
            self.broke(unexpected)
        return 0

    cdef int fail(self, error) except -1:
        """The provider failed: answer for it, or cut the caller's connection where an answer has begun."""
        self.lane.pool.leave(self)
        answer = self.call.failed(error)
        if answer is not None:
            self.answer(answer)
        else:
            self.caller.keep_alive = False
            self.write(self.begun(b""), True)
        return 0

    cdef int pass_on(self, bytes piece, bint done) except -1:
        """Take in a piece of the provider's body, and pass on what is to be passed on."""
        cdef bytes passed = b""
        cdef bytes out
        try:
            if piece:
                passed = self.call.feed(piece)
            if done:
                passed += self.call.finish()
        except UpstreamError as error:
            return self.fail(error)
        out = passed
        if self.chunked:
            if passed:
                out = b"%x\r\n%b\r\n%b" % (len(passed), passed, LAST_CHUNK if done else b"")
            elif done:
                out = LAST_CHUNK
        self.write(self.begun(out), done)
        return 0

    cdef bytes begun(self, bytes out):
        """Return what is to be passed on, behind the head of the answer if that has not been passed on yet."""
        if self.head is not None:
            out = b"".join((self.lane.first(self.head.status), self.head.block, self.last_lines(), out))
            self.head = None
        return out

    cdef bytes last_lines(self):
        """Return what the heads of all the provider's answers end with, in the order in which Falcon has it."""
        cdef bytes last = ID + self.account.request_id.encode() + CRLF
        if not self.head.typed and self.head.status not in BODILESS:
            last += JSON
        if not self.caller.keep_alive:
            last += CLOSE
        return last + CHUNKED + CRLF if self.chunked else last + CRLF

    cdef int answer(self, Answer answer) except -1:
        """Answer with a whole answer of ours."""
        self.count(answer.status)
        self.headed = True
        self.write(self.caller.write_answer(answer, self.account.request_id.encode()), True)
        return 0

    cdef int write(self, bytes out, bint last) except -1:
        """Pass bytes on to the caller once the buckets are up to date: whoever has the answer may look."""
        settling = self.call.settling
        if self.held is not None or (settling is not None and not settling.done()):
            if self.held is None:
                self.held = b""
                self.pause()
                settling.add_done_callback(self.on_settled)
            self.held += out
            self.last = last
            return 0
        if out and not self.gone:
            self.caller.transport.write(out)
        if last:
            self.end()
        elif self.caller.write_paused:
            self.pause()
            self.caller.expect(self.lane.caller_timeout_s)
        return 0

    def on_settled(self, _):
        cdef bytes held = self.held
        self.held = None
        if self.over:
            return
        if not self.caller.write_paused:
            self.resume()
        self.write(held, self.last)

    # --- ends -------------------------------------------------------------------------------------------------

    cdef int count(self, int status) except -1:
        """Count the request as answered."""
        self.lane.metrics.answered(CHAT_ROUTE, status)
        self.account.status = status
        return 0

    cdef int end(self) except -1:
        """The call is over; tell of it, and let the caller's connection go on."""
        cdef Connection caller = self.caller
        if self.over:
            return 0
        self.over = True
        self.call.over()
        caller.ended()
        return 0

    cdef int leave(self, int status) except -1:
        """Nobody waits for the answer any more."""
        self.lane.pool.leave(self)
        if not self.headed and status:
            self.count(status)
        self.gone = True
        self.end()
        return 0

    cdef void caller_left(self):
        """The caller's connection is gone. A call that is not streamed runs on, to learn what it took."""
        cdef bint begun = self.caller.body is None
        self.gone = True
        if not begun or (self.call.account.admitted and self.exchange.stream):
            self.leave(GONE.status)
        else:
            self.resume()

    cdef int caller_stalled(self) except -1:
        """The caller does not send the rest of its request, or does not take its answer."""
        timeout_s = self.lane.caller_timeout_s
        if self.caller.body is not None:
            self.answer(refusal.error_answer(body_timeout(timeout_s)))
            return 0
        self.account.failure = f"the caller took nothing for {timeout_s:g} s"
        log.warning("%s; its connection was closed (request %s)", self.account.failure, self.account.request_id)
        self.caller.keep_alive = False
        self.leave(0)
        return 0

    cdef int cancel(self) except -1:
        """The server stops, and has waited long enough."""
        self.caller.keep_alive = False
        if not self.headed and not self.gone:
            answer = refusal.stopping()
            self.lane.metrics.answered(None, answer.status)
            self.account.status = answer.status
            self.caller.transport.write(self.caller.write_answer(answer, self.account.request_id.encode()))
        self.leave(0)
        return 0

    cdef int broke(self, error) except -1:
        """Something failed that is ours: answer, if there is still something to be answered."""
        if self.over:
            log.error("a call failed after its end (request %s)", self.account.request_id, exc_info=error)
            return 0
        self.lane.pool.leave(self)
        if isinstance(error, TokenGuardError):
            answer = answer_to(error, self.account.request_id)
        else:
            log.error("POST %s failed (request %s)", CHAT_ROUTE, self.account.request_id, exc_info=error)
            answer = refusal.failed()
        if self.headed:
            self.caller.keep_alive = False
            self.end()
        else:
            self.answer(answer)
        return 0


cdef uint64_t ids_of_process = 0
cdef uint64_t ids = 0


def reseed():
    """Make the ids of this process its own."""
    global ids_of_process
    ids_of_process = int.from_bytes(os.urandom(8))


reseed()
os.register_at_fork(after_in_child=reseed)


cdef bint has(Fields fields, int name) noexcept:
    """Return whether there is a field of a name, which is given by its number."""
    cdef int i
    for i in range(fields.count):
        if fields.lines[i].known == name:
            return True
    return False


cdef str id_of(Fields fields):
    """Return what the caller calls a request; else make a name."""
    # PERF: 32 hex digits like those of request_id_of, without asking the system for each
    global ids
    cdef char text[32]
    cdef uint64_t half
    cdef int i
    if has(fields, NAME_OF_ID):
        return request_id_of(fields.as_list())
    ids += 1
    half = ids * <uint64_t>0x9E3779B97F4A7C15  # odd: all are different
    for i in range(16):
        text[i] = HEX[ids_of_process >> 4 * i & 15]
        text[16 + i] = HEX[half >> 60 - 4 * i & 15]
    return PyUnicode_DecodeASCII(text, 32, NULL)


cdef class Steps:
    """Runs a coroutine that waits for futures, without a task, and tells a call what it returned."""

    cdef object coroutine
    cdef LaneCall call

    def __cinit__(self, coroutine, LaneCall call not None):
        self.coroutine = coroutine
        self.call = call

    def go_on(self, future):
        try:
            awaited = self.coroutine.send(None)
        except StopIteration as stop:
            self.call.reserved(stop.value, None)
        except (Exception, CancelledError) as error:
            self.call.reserved(None, error)
        else:
            awaited._asyncio_future_blocking = False
            awaited.add_done_callback(self.go_on)
