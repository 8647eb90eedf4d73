# cython: freethreading_compatible=True, auto_pickle=False, autotestdict=False
"""The hop to the provider: connections that are kept, over HTTP/1.1. The stub, _pool.pyi, is its manual.

A connection carries one request at a time, and what becomes of it is told to a receiver, at once and without a
task. The newest idle connection is taken first, so that the others grow old and are closed.

A request is sent a second time only if it was sent over a connection that had been used before, that connection
ended before a single byte of an answer had come, and the request may be repeated: GET, HEAD, or whatever the
caller gave an ``idempotency-key``. docs/decisions/009-fast-lane.md says why.
"""

import asyncio
import socket
import ssl
from collections import deque

cimport cython
from cpython.bytes cimport PyBytes_GET_SIZE
from libc.errno cimport EAGAIN, ECONNABORTED, errno
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from tokenguard._fields cimport Fields, lines_of
from tokenguard.model cimport UpstreamRequest
from tokenguard.upstream._http cimport AnswerReader

from tokenguard.errors import UpstreamError, UpstreamTimeout
from tokenguard.upstream import KEEPALIVE_S, unusable, usable

cdef extern from "sys/socket.h" nogil:
    enum:
        MSG_PEEK
        MSG_DONTWAIT
    Py_ssize_t recv(int, void *, size_t, int)

cdef extern from *:
    """
    #include <sys/ioctl.h>

    /* Bytes that the kernel has of what was written and the other side has not; 0 where it does not tell. */
    static int kernel_unsent(int fd)
    {
    #ifdef TIOCOUTQ
        int unsent;
        if (ioctl(fd, TIOCOUTQ, &unsent) == 0)
            return unsent;
    #endif
        return 0;
    }
    """
    int kernel_unsent(int) noexcept nogil

LOOK_AFTER_S = 1.0
MAX_HELD_BYTES = 65_536

cdef double KEPT_S = KEEPALIVE_S
cdef double TRUSTED_S = LOOK_AFTER_S
cdef Py_ssize_t HELD_BYTES = MAX_HELD_BYTES
cdef Py_ssize_t LONG_BYTES = 16_384
cdef bytes CRLF = b"\r\n"
cdef object READ_LATE = "the provider did not answer in time"
cdef object TOTAL_LATE = "the provider did not end its answer in time"


cdef double clock_s() noexcept nogil:
    """Return the seconds of a clock that only goes on."""
    # PERF: the loop's own is asked through Python, several times a call
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return now.tv_sec + now.tv_nsec * 1e-9


cdef class Receiver:
    cdef int answered(self, int status, Fields fields, bytes piece, bint done) except -1:
        raise NotImplementedError

    cdef int came(self, bytes piece, bint done) except -1:
        raise NotImplementedError

    cdef int failed(self, object error) except -1:
        raise NotImplementedError

    cdef void pause(self):
        """Let nothing more come until ``resume``: whoever is to have it does not take it."""
        if self.connection is not None and not self.connection.paused:
            self.connection.paused = True
            self.connection.transport.pause_reading()

    cdef void resume(self):
        if self.connection is not None and self.connection.paused:
            self.connection.paused = False
            self.connection.deadline = self.connection.pool.now() + self.connection.pool.read_timeout_s
            self.connection.transport.resume_reading()


cdef class Connection:
    """One connection, as asyncio's protocol."""

    def __cinit__(self, Pool pool not None):
        self.pool = pool
        self.reader = AnswerReader()
        self.fd = -1

    def connection_made(self, transport):
        self.transport = transport
        self.fd = transport.get_extra_info("socket").fileno()

    cdef int carry(self, Receiver receiver, bint reused) except -1:
        """Send a request."""
        cdef double now = self.pool.now()
        self.receiver = receiver
        receiver.connection = self
        self.reused = reused
        self.heard = self.told = False
        self.unsent = 0
        self.reader.begin(receiver.bodiless)
        self.deadline = now + self.pool.read_timeout_s
        self.end = now + self.pool.total_timeout_s
        self.long = PyBytes_GET_SIZE(receiver.message) > LONG_BYTES
        self.transport.write(receiver.message)
        return 0

    cdef Py_ssize_t outstanding(self) except -1:
        """Return how many bytes of what was written the provider's side has not yet."""
        # the loop hears of room only once a third of the kernel's buffer, a megabyte and more, is free again
        cdef Py_ssize_t unsent = self.transport.get_write_buffer_size()
        return unsent if self.transport.is_closing() else unsent + kernel_unsent(self.fd)

    cdef bint written(self):
        """Return whether all of the request has left; one that is not long has, if it is answered."""
        return not self.long or self.transport.get_write_buffer_size() == 0

    cdef bint healthy(self):
        """Return whether it can carry a request: nobody has closed it, or said something that nobody asked for."""
        cdef char byte
        if self.transport.is_closing():
            return False
        if self.pool.now() - self.idle_since < TRUSTED_S:
            return True  # PERF: the loop would have been told by now
        return recv(self.fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) < 0 and errno == EAGAIN

    def data_received(self, bytes data):
        cdef Receiver receiver = self.receiver
        cdef bint told = self.told
        cdef bytes piece
        if receiver is None:
            self.drop()  # nobody asked
            return
        self.heard = True
        self.deadline = self.pool.now() + self.pool.read_timeout_s
        try:
            piece = self.reader.feed(data)
        except UpstreamError as error:
            if self.reader.headed and not told and usable(self.reader.status):
                receiver.answered(self.reader.status, self.reader.fields, b"", False)
            self.fail(error)
            return
        if not self.reader.headed:
            return
        if not told and not usable(self.reader.status):
            self.fail(unusable(self.reader.status))
            return
        if self.reader.done:
            self.finish(told, piece)
        elif told:
            if piece:
                receiver.came(piece, False)
        else:
            self.told = True
            receiver.answered(self.reader.status, self.reader.fields, piece, False)

    cdef int finish(self, bint told, bytes piece) except -1:
        """The answer is whole: be free for the next request, then tell."""
        cdef Receiver receiver = self.receiver
        cdef int status = self.reader.status
        cdef Fields fields = self.reader.fields
        self.receiver = receiver.connection = None
        self.pool.free(self)
        if told:
            receiver.came(piece, True)
        else:
            receiver.answered(status, fields, piece, True)
        return 0

    cdef int fail(self, object error) except -1:
        """There is no answer, or no end of it."""
        cdef Receiver receiver = self.receiver
        if receiver is not None:
            self.receiver = receiver.connection = None
            self.drop()
            receiver.failed(error)
        return 0

    cdef void drop(self):
        """Close, and be nobody's any more; what was to be sent yet is not."""
        self.receiver = None
        self.transport.abort()

    def eof_received(self):
        if self.receiver is not None and self.reader.headed and self.reader.end():
            self.finish(self.told, b"")

    def connection_lost(self, error):
        cdef Receiver receiver = self.receiver
        cdef bint again = receiver is not None and receiver.repeatable and self.reused and not self.heard
        if receiver is not None:
            self.receiver = receiver.connection = None
        if again:
            self.pool.connect(receiver)  # first: the room that this one leaves is not for whoever waits
        self.pool.forget(self)
        if receiver is not None and not again:
            what = "closed the connection" if error is None else reason_of(error)
            receiver.failed(UpstreamError(f"the provider's answer broke off ({what})", sent=True))

    def pause_writing(self):
        pass

    def resume_writing(self):
        pass


cdef class Pool:
    def __cinit__(self, hop, loop=None):
        self.hop, self.loop, self.by_loop = hop, loop, loop is not None
        self.read_timeout_s, self.total_timeout_s = hop.read_timeout_s, hop.total_timeout_s
        self.tick_s = min(1.0, self.read_timeout_s / 8, self.total_timeout_s / 8)
        self.firsts = {}
        self.idle = []
        self.connections, self.connecting, self.dead = set(), {}, set()
        self.waiting = deque()
        self.most = hop.max_connections

    def __repr__(self):
        idle, busy = len(self.idle), len(self.connections) - len(self.idle)
        return f"<Pool: {idle} idle, {busy} busy, {len(self.connecting)} connecting, {len(self.waiting)} waiting>"

    cdef double now(self) except? -1:
        # PERF: a loop is asked through Python, several times a call; one that was given has a clock of its own
        return self.loop.time() if self.by_loop else clock_s()

    cdef bytes write(self, UpstreamRequest request):
        """Return a request as it travels."""
        cdef bytes first = self.firsts.get((request.method, request.path))
        cdef bytes block = request.block or lines_of(request.headers)
        cdef bytes length = b""
        if first is None:
            target = self.hop.target(request.path)
            first = f"{request.method} {target} HTTP/1.1\r\nhost: {self.hop.authority}\r\n".encode()
            if len(self.firsts) < 64:
                self.firsts[request.method, request.path] = first
        if request.method != "GET" and request.method != "HEAD":
            length = b"content-length: %d\r\n" % len(request.body)
        return b"".join((first, block, length, CRLF, request.body))

    cdef int send(self, Receiver receiver) except -1:
        """Send a request as soon as there is a connection for it; its receiver is told what comes of that."""
        cdef Connection connection
        if self.closed:
            receiver.failed(stopping(False))
            return 0
        if self.loop is None:
            self.loop = asyncio.get_running_loop()
        while self.idle:
            connection = self.idle.pop()
            if connection.healthy():
                connection.carry(receiver, True)
                return 0
            connection.drop()
        if len(self.connections) + len(self.connecting) < self.most:
            self.connect(receiver)
        elif len(self.waiting) >= self.most:
            receiver.failed(self.hop.busy())
        else:
            receiver.patience = self.loop.call_later(self.hop.queue_timeout_s, self.give_up, receiver)
            self.waiting.append(receiver)
        return 0

    def give_up(self, Receiver receiver not None):
        """It has waited long enough for a connection."""
        self.waiting.remove(receiver)
        receiver.patience = None
        receiver.failed(self.hop.busy())

    cdef int connect(self, Receiver receiver) except -1:
        """Open a connection for a request."""
        task = self.loop.create_task(self.reach())
        self.connecting[task] = receiver
        task.add_done_callback(self.reached)
        if self.sweeper is None:
            self.sweeper = self.loop.call_later(self.tick_s, self.sweep)
        return 0

    def reached(self, task):
        """There is a connection for a request, or there is none, and room for another one."""
        cdef Receiver receiver = self.connecting.pop(task)
        cdef Connection connection
        try:
            connection = task.result()
            if self.closed:
                connection.drop()
                raise asyncio.CancelledError
            if connection.transport.is_closing():
                raise ConnectionAbortedError(ECONNABORTED, "it closed the connection at once")
        except (Exception, asyncio.CancelledError) as error:
            if not receiver.left:
                receiver.failed(unreached(error))
            self.serve_waiting()
            return
        self.connections.add(connection)
        if receiver.left:
            self.free(connection)
        else:
            connection.carry(receiver, False)

    async def reach(self):
        """Return a new connection.

        The provider's addresses are tried one after the other, and each may take its share of what time is left:
        one that is dead does not use up all of it, and is tried last from then on.
        """
        if self.hop.tls and self.tls is None:
            self.tls = tls_context(self.hop.ca_file, self.hop.ca_dir)
        end = self.now() + self.hop.connect_timeout_s
        async with asyncio.timeout(self.hop.connect_timeout_s):
            found = await self.loop.getaddrinfo(self.hop.host, self.hop.port, type=socket.SOCK_STREAM)
        addresses = [info[4] for info in found]
        self.dead.intersection_update(addresses)
        addresses.sort(key=self.dead.__contains__)
        for left in range(len(addresses), 0, -1):
            address = addresses[-left]
            try:
                async with asyncio.timeout((end - self.now()) / left):
                    _, connection = await self.loop.create_connection(
                        lambda: Connection(self),
                        *address[:2],
                        ssl=self.tls,
                        server_hostname=self.hop.host if self.hop.tls else None,
                    )
                self.dead.discard(address)
                return connection
            except OSError as error:
                self.dead.add(address)
                if left == 1 or isinstance(error, ssl.SSLError):
                    raise

    def serve_waiting(self):
        """Open a connection for whoever has waited longest, where one may be opened."""
        while self.waiting and len(self.connections) + len(self.connecting) < self.most:
            self.connect(self.next_waiting())

    cdef Receiver next_waiting(self):
        """Return who has waited longest, and waits no more."""
        cdef Receiver receiver = self.waiting.popleft()
        receiver.patience.cancel()
        receiver.patience = None
        return receiver

    cdef int free(self, Connection connection) except -1:
        """Keep a connection that is not needed any more for the next request, if it can carry one."""
        if connection.paused:
            connection.paused = False
            connection.transport.resume_reading()
        if connection.reader.headed and not (connection.reader.reusable and connection.written()):
            connection.drop()
            return 0
        if self.waiting and not connection.transport.is_closing():
            connection.carry(self.next_waiting(), True)
        else:
            connection.idle_since = self.now()
            self.idle.append(connection)
        return 0

    cdef void forget(self, Connection connection):
        """Count a connection no more."""
        self.connections.discard(connection)
        if connection in self.idle:
            self.idle.remove(connection)
        self.serve_waiting()

    cdef void leave(self, Receiver receiver):
        """Nobody waits for a request's answer any more: drop what carries it."""
        receiver.left = True
        if receiver.connection is not None:
            connection, receiver.connection = receiver.connection, None
            (<Connection>connection).drop()
        elif receiver.patience is not None:
            receiver.patience.cancel()
            receiver.patience = None
            self.waiting.remove(receiver)

    def sweep(self):
        """Close what has been idle for too long, and give up what takes too long."""
        cdef Connection connection
        cdef double now = self.now()
        cdef Py_ssize_t unsent
        for connection in list(self.connections):
            unsent = connection.outstanding()
            if unsent < connection.unsent:
                connection.deadline = now + self.read_timeout_s  # it still takes in the request
            connection.unsent = unsent
            if connection.receiver is None:
                if now - connection.idle_since >= KEPT_S and connection in self.idle:
                    self.idle.remove(connection)
                    connection.transport.close()
            elif now >= connection.end:
                connection.fail(UpstreamTimeout(TOTAL_LATE, sent=True))
            elif now >= connection.deadline and not connection.paused:
                connection.fail(UpstreamTimeout(READ_LATE, sent=True))
        alive = self.connections or self.connecting
        self.sweeper = self.loop.call_later(self.tick_s, self.sweep) if alive else None

    async def close(self):
        """Close all connections, for good; whoever waits for something is told that there will be nothing."""
        cdef Connection connection
        self.closed = True
        if self.sweeper is not None:
            self.sweeper.cancel()
            self.sweeper = None
        while self.waiting:
            self.next_waiting().failed(stopping(False))
        for task in self.connecting:
            task.cancel()
        for connection in list(self.connections):
            connection.fail(stopping(True))
            connection.transport.abort()
        while self.connections or self.connecting:
            await asyncio.sleep(0)  # so that they are told


def stopping(sent):
    return UpstreamError("the provider is not asked any more: the server stops", sent=sent)


def unreached(error):
    """Return the error of a call for which there is no connection."""
    if isinstance(error, TimeoutError):
        return UpstreamTimeout("the provider could not be reached in time", sent=False)
    if isinstance(error, asyncio.CancelledError):
        return stopping(False)
    return UpstreamError(f"the provider could not be reached ({reason_of(error)})", sent=False)


def tls_context(ca_file, ca_dir):
    if ca_file is None and ca_dir is None:
        import certifi  # whoever speaks no TLS need not load it

        ca_file = certifi.where()
    try:
        context = ssl.create_default_context(cafile=ca_file, capath=ca_dir)
    except OSError as error:
        raise OSError(error.errno, f"no certificates in {ca_file or ca_dir}: {error.strerror}") from None
    context.set_alpn_protocols(["http/1.1"])
    return context


def reason_of(error):
    """Return an error's kind and what the system said of it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"{type(error).__name__}: {error.verify_message}"
    said = error.strerror if isinstance(error, OSError) else None
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


# --- for whoever can wait ---------------------------------------------------------------------------------------


@cython.final
cdef class Response(Receiver):
    """An answer whose head has come and whose body is coming: ``UpstreamResponse``."""

    cdef readonly int status
    cdef readonly list headers
    cdef Pool pool
    cdef list pieces
    cdef Py_ssize_t held
    cdef bint done
    cdef object error
    cdef object waiter

    def __cinit__(self, Pool pool not None):
        self.pool = pool
        self.pieces = []

    cdef int answered(self, int status, Fields fields, bytes piece, bint done) except -1:
        self.status, self.headers = status, fields.as_list()
        return self.came(piece, done)

    cdef int came(self, bytes piece, bint done) except -1:
        if piece:
            self.pieces.append(piece)
            self.held += len(piece)
        self.done = done
        if self.held > HELD_BYTES:
            self.pause()
        self.wake()
        return 0

    cdef int failed(self, object error) except -1:
        self.error = error
        self.wake()
        return 0

    cdef void wake(self):
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def wait(self):
        """Wait until there is news."""
        self.waiter = self.pool.loop.create_future()
        try:
            await self.waiter
        finally:
            self.waiter = None

    async def head(self):
        """Wait for the head."""
        while not self.status:
            if self.error is not None:
                raise self.error
            await self.wait()

    def chunks(self):
        return self

    def __aiter__(self):
        return self

    async def __anext__(self):
        cdef bytes piece
        while not self.pieces:
            if self.error is not None:
                raise self.error
            if self.done:
                raise StopAsyncIteration
            await self.wait()
        piece = self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)
        self.pieces = []
        self.held = 0
        self.resume()
        return piece

    async def close(self):
        """Drop the connection, if it still carries this."""
        self.pool.leave(self)


cdef class PooledUpstream:
    def __cinit__(self, hop, loop=None):
        self.pool = Pool(hop, loop)

    def describe(self):
        return self.pool.hop.describe()

    async def open(self, request):
        cdef Response response = Response(self.pool)
        response.repeatable = may_be_repeated(request)
        response.bodiless = request.method == "HEAD"
        response.message = self.pool.write(request)
        self.pool.send(response)
        try:
            await response.head()
        except BaseException:
            self.pool.leave(response)
            raise
        return response

    async def close(self):
        await self.pool.close()


cdef bint may_be_repeated(UpstreamRequest request) except -1:
    if request.method == "GET" or request.method == "HEAD":
        return True
    return any([name == b"idempotency-key" for name, _ in request.headers])
