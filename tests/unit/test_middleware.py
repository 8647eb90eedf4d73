"""Guards in front of apps: whatever an app does, and however a caller leaves, a request is settled once."""

import asyncio
import gzip
import json
import re
import sys
from contextlib import suppress
from dataclasses import replace
from io import BytesIO
from wsgiref.util import FileWrapper
from wsgiref.validate import validator

import pytest

from tests.house import MODEL
from tests.plain_servers import AsgiServer, Request, WsgiServer, serve_asgi, serve_wsgi
from tokenguard import Limiter, asgi, wsgi
from tokenguard._bucket import BucketTable
from tokenguard.backends.memory import MemoryBackend
from tokenguard.config import read_config
from tokenguard.errors import AlreadySettled, BackendDown, BudgetNotFound, InvalidValue, TableBusy, TableFull
from tokenguard.library.call import Desk
from tokenguard.limiter import Limiter as Decider
from tokenguard.middleware import CALL, ASGIGuard, FromBody, WSGIGuard
from tokenguard.model import Identity
from tokenguard.plan import Plans

GRANT = 1000
PRICE = 10
USED = 7
SETTINGS = {"CAP_GLOBAL": "unlimited", "CAP_TEAM": "unlimited", "CAP_USER": GRANT, "RATE_USER": 0}
JSON = ("content-type", "application/json")
EVENTS = ("content-type", "text/event-stream; charset=utf-8")
HTML = ("content-type", "text/html")
ANSWER = json.dumps({"usage": {"prompt_tokens": 2, "completion_tokens": 5, "total_tokens": USED}}).encode()
DELTA = b'data: {"choices": [{"delta": {"content": "Hello"}}]}\n\n'
TOLD = b'data: {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 5, "total_tokens": 7}}\n\n'
DONE = b"data: [DONE]\n\n"
WHOLE = b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n' + TOLD
"""The last of a model's output, and what all of it took."""


@pytest.fixture
def limiter():
    with Limiter("memory://", TOKENGUARD_BUCKETS=64, **SETTINGS) as limiter:
        yield limiter


def taken(limiter, user="alice"):
    """Return what a user has been charged."""
    (state,) = limiter.peek(user=user)
    return GRANT - state.level


def by_estimate():
    """Return the cost of a request whose answer tells what it took."""
    return FromBody(lambda _: PRICE)


# --- apps of steps --------------------------------------------------------------------------------------------


class Broken(Exception):
    """What an app raises."""


def head(status=200, *fields):
    return "head", status, list(fields)


def again(status=500, *fields):
    """A head in the place of another, as WSGI knows it."""
    return "again", status, list(fields)


def piece(data=b"hello"):
    return "piece", data


def settles(tokens):
    return "call", lambda call: call.settle(tokens)


REFUNDS = "call", lambda call: call.refund()
KEEPS = "call", lambda call: call.keep()
BREAKS = ("breaks",)


class AsgiSteps:
    """An ASGI app that does one step after the other."""

    def __init__(self, steps):
        self.steps = steps
        self.call = None

    async def __call__(self, scope, _, send):
        self.call = scope[CALL]
        for kind, *what in self.steps:
            if kind == "head":
                status, fields = what
                headers = [(name.lower().encode(), value.encode()) for name, value in fields]
                await send({"type": "http.response.start", "status": status, "headers": headers})
            elif kind == "piece":
                await send({"type": "http.response.body", "body": what[0], "more_body": True})
            elif kind == "call":
                what[0](self.call)
            else:
                raise Broken
        await send({"type": "http.response.body"})


class WsgiSteps:
    """Likewise of WSGI. It does its steps at once and returns a list, or one by one as its body is asked for."""

    def __init__(self, steps):
        self.steps = steps
        self.call = None

    def __call__(self, environ, start_response):
        self.call = environ[CALL]
        return self.returned(start_response)

    def done(self, start_response):
        """Yield the pieces of the body."""
        for kind, *what in self.steps:
            if kind in ("head", "again"):
                status, fields = what
                more = ()
                if kind == "again":
                    try:
                        raise Broken
                    except Broken:
                        more = (sys.exc_info(),)
                start_response(f"{status} Such", fields, *more)
            elif kind == "piece":
                yield what[0]
            elif kind == "call":
                what[0](self.call)
            else:
                raise Broken

    def returned(self, start_response):
        """Return the body: here a generator, of which nothing is done before it is asked for."""
        return self.done(start_response)


class WsgiList(WsgiSteps):
    def returned(self, start_response):
        return list(self.done(start_response))


class WsgiEager(WsgiSteps):
    """Does what comes before the first piece at once, and has a body with a length and without ``close``."""

    def returned(self, start_response):
        return Sized(self.done(start_response))


class Sized:
    """A body that is neither a list nor a generator."""

    def __init__(self, pieces):
        self._first = [one for one in [next(pieces, None)] if one is not None]
        self._rest = pieces

    def __len__(self):
        return 1 + len(self._first)

    def __iter__(self):
        yield from self._first
        yield from self._rest


class WsgiWrite(WsgiSteps):
    """Writes its body rather than return it."""

    def returned(self, start_response):
        written = []

        def started(*head):
            written[:] = [start_response(*head)]

        for chunk in self.done(started):
            written[0](chunk)
        return []


def asgi_app(limiter, steps, cost):
    app = AsgiSteps(steps)
    return app, ASGIGuard(app, limiter, cost=cost), serve_asgi


def wsgi_app(kind):
    def made(limiter, steps, cost):
        app = kind(steps)
        return app, WSGIGuard(app, limiter, cost=cost), serve_wsgi

    return made


def validated_app(limiter, steps, cost):
    """Have somebody strict look on from both sides."""
    app = WsgiSteps(steps)
    guard = validator(WSGIGuard(validator(app), limiter, cost=cost))
    return app, guard, serve_wsgi


WSGI = {
    "wsgi": wsgi_app(WsgiSteps),
    "wsgi list": wsgi_app(WsgiList),
    "wsgi eager": wsgi_app(WsgiEager),
    "wsgi write": wsgi_app(WsgiWrite),
}
BOTH = {"asgi": asgi_app, **WSGI}

ENDINGS = {
    # what is answered costs what was reserved
    "an answer": ([head(), piece()], PRICE, PRICE),
    "an answer of many pieces": ([head(), piece(), piece(b""), piece()], PRICE, PRICE),
    "a head alone": ([head(204)], PRICE, PRICE),
    "not modified": ([head(304, JSON)], by_estimate(), PRICE),
    "no answer to what is not there": ([head(404), piece()], PRICE, PRICE),
    "nothing that is asked for": ([head(), piece()], 0, 0),
    # unless the app says what it took
    "settled at less": ([head(), settles(3), piece()], PRICE, 3),
    "settled at more": ([settles(25), head(), piece()], PRICE, 25),
    "settled after a piece": ([head(), piece(), settles(3)], PRICE, 3),
    "refunded": ([REFUNDS, head(), piece()], PRICE, 0),
    "kept": ([KEEPS, head(500), piece()], PRICE, PRICE),
    # what the app fails costs nothing
    "broken before its head": ([BREAKS], PRICE, 0),
    "broken before its body": ([head(), BREAKS], PRICE, 0),
    "broken after a piece of nothing": ([head(), piece(b""), BREAKS], PRICE, 0),
    "an error": ([head(500), piece()], PRICE, 0),
    "an error without a body": ([head(503)], PRICE, 0),
    "an error that is broken off": ([head(502), piece(), BREAKS], PRICE, 0),
    # but what had been said of it, and what the caller had of it
    "settled, and broken": ([settles(3), BREAKS], PRICE, 3),
    "settled, and an error": ([settles(3), head(500)], PRICE, 3),
    "broken off": ([head(), piece(), BREAKS], PRICE, PRICE),
    # usage settles what was estimated
    "usage": ([head(200, JSON), piece(ANSWER)], by_estimate(), USED),
    "usage in pieces": ([head(200, JSON), piece(ANSWER[:9]), piece(ANSWER[9:])], by_estimate(), USED),
    "usage of a kind of JSON": (
        [head(200, ("Content-Type", "Application/Vnd.X+JSON")), piece(ANSWER)],
        by_estimate(),
        USED,
    ),
    "usage that is not compressed": (
        [head(200, JSON, ("content-encoding", "Identity")), piece(ANSWER)],
        by_estimate(),
        USED,
    ),
    "usage in events": ([head(200, EVENTS), piece(DELTA), piece(TOLD + DONE)], by_estimate(), USED),
    "usage at the end, and broken": ([head(200, EVENTS), piece(DELTA + WHOLE), BREAKS], by_estimate(), USED),
    "usage so far, and broken off": ([head(200, EVENTS), piece(DELTA + TOLD), BREAKS], by_estimate(), PRICE),
    "broken off before usage": ([head(200, EVENTS), piece(DELTA), BREAKS], by_estimate(), PRICE),
    "half a usage": ([head(200, JSON), piece(ANSWER[:-3]), BREAKS], by_estimate(), PRICE),
    "no usage": ([head(200, JSON), piece(b"{}")], by_estimate(), PRICE),
    "usage of no JSON": ([head(200, HTML), piece(ANSWER)], by_estimate(), PRICE),
    "usage that cannot be read": (
        [head(200, JSON, ("content-encoding", "gzip")), piece(gzip.compress(ANSWER))],
        by_estimate(),
        PRICE,
    ),
    "usage of an error": ([head(500, JSON), piece(ANSWER)], by_estimate(), 0),
    "usage where the app has settled": ([head(200, JSON), settles(3), piece(ANSWER)], by_estimate(), 3),
    "usage that is not asked for": ([head(200, JSON), piece(ANSWER)], PRICE, PRICE),
}
"""What an app does, the cost of a request, and what is charged."""


@pytest.mark.parametrize("server", BOTH)
@pytest.mark.parametrize("ending", ENDINGS)
def test_request_is_charged_by_how_it_ends(limiter, server, ending):
    """Whichever way an app has of doing so; and the answer is as the app gave it."""
    steps, cost, charged = ENDINGS[ending]
    app, guard, serve = BOTH[server](limiter, steps, cost)
    heard = serve(guard, Request())
    if server == "wsgi list" and BREAKS in steps and settles(3)[0] != steps[0][0]:
        charged = 0  # no piece of it had been returned
    assert (taken(limiter), app.call.is_open) == (charged, False)
    assert isinstance(heard.raised, Broken) == (BREAKS in steps), heard.raised
    if BREAKS not in steps:
        ((_, status, fields),) = (step for step in steps if step[0] == "head")
        assert (heard.status, heard.ended) == (status, True)
        assert heard.headers[: len(fields)] == [(name.lower(), value) for name, value in fields]
        assert heard.body == b"".join(step[1] for step in steps if step[0] == "piece")


@pytest.mark.parametrize("answer", [[], ()])
def test_app_that_answers_nothing_has_failed(limiter, kind, answer):
    """It is for the server to say so."""

    async def silent(scope, receive, send):
        assert scope[CALL].is_open

    app = silent if kind == "asgi" else lambda *_: iter(answer) if answer == [] else answer
    heard, _ = ask(kind, limiter, app, cost=PRICE)
    assert (heard.status, heard.ended) == (0, False)
    assert taken(limiter) == 0


@pytest.mark.parametrize("ending", [name for name, (steps, _, _) in ENDINGS.items() if BREAKS not in steps])
def test_guard_is_an_app_to_its_server_and_a_server_to_its_app(limiter, ending):
    """Python's own checker of WSGI finds nothing from either side."""
    steps, cost, charged = ENDINGS[ending]
    guard = validator(WSGIGuard(validator(WsgiSteps(list(map(typed, steps)))), limiter, cost=cost))
    heard = serve_wsgi(guard, Request())
    assert (heard.raised, heard.ended) == (None, True)
    assert taken(limiter) == charged


def typed(step):
    """Return a head that tells its content's type where the checker wants one, and others as they are."""
    if step[0] != "head":
        return step
    _, status, fields = step
    if status in (204, 304):
        return head(status)
    return step if fields else head(status, HTML)


def test_last_head_before_the_body_counts(limiter):
    """An app of WSGI may take a head back until there is a piece of the body, and not later."""
    cases = {
        "taken back": ([head(), again(), piece()], 0, 500),
        "made good": ([head(500), again(200), piece()], PRICE, 200),
        "too late": ([head(), piece(), again(500), piece()], PRICE, 200),
    }
    for number, (steps, charged, status) in enumerate(cases.values()):
        request = Request(headers=[("x-user-id", f"user-{number}")])
        heard = serve_wsgi(WSGIGuard(WsgiSteps(steps), limiter, cost=PRICE), request)
        assert (taken(limiter, f"user-{number}"), heard.status) == (charged, status)


def test_pieces_may_be_views_and_arrays(limiter):
    """Starlette passes on what an app yields; the usage in it is read all the same."""
    steps = [head(200, JSON), piece(memoryview(ANSWER[:5])), piece(bytearray(ANSWER[5:]))]
    _, guard, serve = asgi_app(limiter, steps, by_estimate())
    assert serve(guard, Request()).body == ANSWER
    assert taken(limiter) == USED


@pytest.mark.parametrize("kind", ["http.response.pathsend", "http.response.zerocopysend"])
def test_file_that_an_asgi_server_sends_is_an_answer(limiter, kind):
    """It ends the answer, though nothing of it is seen."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})
        await send({"type": kind, "path": "/a/file"})

    async def send(message):
        sent.append(message["type"])

    sent = []
    guard, calls = watched(app, limiter, cost=PRICE)
    asyncio.run(guard(AsgiServer(guard, Request()).scope, None, send))
    assert sent == ["http.response.start", kind]
    assert (taken(limiter), calls[0].is_open) == (PRICE, False)


def watched(app, limiter, **more):
    """Return a guard in front of an app, and a list of the calls that get through."""
    calls = []

    async def watching(scope, receive, send):
        calls.append(scope[CALL])
        await app(scope, receive, send)

    return ASGIGuard(watching, limiter, **more), calls


def test_file_that_a_wsgi_server_sends_is_left_to_it(limiter):
    """It gets the very wrapper that it gave, so that it can send the file without reading it."""
    file = BytesIO(b"a file")

    def app(environ, start_response):
        start_response("200 OK", [HTML])
        return environ["wsgi.file_wrapper"](file)

    server = WsgiServer(WSGIGuard(app, limiter, cost=PRICE), Request())
    server.environ["wsgi.file_wrapper"] = FileWrapper
    assert server.serve().body == b"a file"
    assert type(server.body) is FileWrapper
    assert (taken(limiter), file.closed) == (PRICE, True)


def test_body_of_one_piece_stays_one(limiter):
    """Servers tell its length where the app does not."""
    server = WsgiServer(WSGIGuard(WsgiList([head(), piece()]), limiter), Request())
    server.serve()
    assert server.body == [b"hello"]


def test_body_is_closed_once(limiter):
    """However the app's own ends, its ``close`` is called by whoever closes ours."""
    closed = []

    class Body(list):
        def __iter__(self):
            return iter([b"a", b"b"])

        def close(self):
            closed.append(True)

    class Other:
        __iter__ = Body.__iter__
        close = Body.close

    for body in (Body(), Other()):
        for leaves_after in (None, 0, 1):
            app = lambda _, start, body=body: start("200 OK", []) and body  # noqa: E731
            serve_wsgi(WSGIGuard(app, limiter), Request(leaves_after=leaves_after))
            assert closed.pop()
            assert closed == []


def settling_behind_its_end_asgi(fields, then):
    async def app(scope, receive, send):
        await AsgiSteps([head(200, *fields), piece(ANSWER)])(scope, receive, send)
        then(scope[CALL])

    return app


def settling_behind_its_end_wsgi(fields, then):
    class Body(Sized):
        def close(self):
            then(self.call)

    def app(environ, start_response):
        body = Body(WsgiSteps([head(200, *fields), piece(ANSWER)]).done(start_response))
        body.call = environ[CALL]
        return body

    return app


BEHIND = {"asgi": settling_behind_its_end_asgi, "wsgi": settling_behind_its_end_wsgi}


def test_app_may_settle_behind_the_end_of_its_answer(limiter, kind):
    """In a task that goes on behind it, or when its body is closed."""
    heard, _ = ask(kind, limiter, BEHIND[kind]([JSON], lambda call: call.settle(3)), cost=PRICE)
    assert (heard.raised, taken(limiter)) == (None, 3)


def test_usage_counts_before_whoever_has_the_answer_may_look(limiter, kind):
    """Of what fails behind it, nothing is given back."""
    seen = []

    def then(call):
        seen.append((call.is_open, taken(limiter)))
        raise Broken

    heard, _ = ask(kind, limiter, BEHIND[kind]([JSON], then), cost=by_estimate())
    assert (seen, taken(limiter)) == ([(False, USED)], USED)
    assert isinstance(heard.raised, Broken)


def test_what_fails_behind_an_answer_is_paid_for(limiter, kind):
    """Be there a body or not."""

    def then(call):
        assert call.is_open
        raise Broken

    heard, _ = ask(kind, limiter, BEHIND[kind]([JSON], then), cost=PRICE)
    assert isinstance(heard.raised, Broken)
    assert taken(limiter) == PRICE


# --- callers who hang up --------------------------------------------------------------------------------------

LEFT = {
    "before a piece": ([head(), piece(), piece()], 0, PRICE),
    "after a piece": ([head(), piece(), piece()], 1, PRICE),
    "after all pieces": ([head(), piece()], 1, PRICE),
    "before it is settled": ([head(), piece(), settles(3)], 1, PRICE),
    "after it is settled": ([head(), settles(3), piece(), piece()], 1, 3),
    "of an error": ([head(500), piece(), piece()], 1, 0),
    "of an error of which nothing is heard": ([head(500), piece()], 0, 0),
    "before usage": ([head(200, EVENTS), piece(DELTA), piece(TOLD)], 1, PRICE),
    "amid usage": ([head(200, EVENTS), piece(DELTA + TOLD), piece(DELTA)], 1, PRICE),
    "behind usage": ([head(200, EVENTS), piece(WHOLE), piece(DONE)], 1, USED),
}


@pytest.mark.parametrize("left", LEFT)
def test_wsgi_caller_who_hangs_up_pays(limiter, left):
    """A server then closes the body and asks for no more of it."""
    steps, leaves_after, charged = LEFT[left]
    app = WsgiEager(steps)
    heard = serve_wsgi(WSGIGuard(app, limiter, cost=by_estimate()), Request(leaves_after=leaves_after))
    assert (heard.ended, len(heard.pieces)) == (False, leaves_after)
    assert (taken(limiter), app.call.is_open) == (charged, False)


def test_wsgi_caller_who_hangs_up_before_an_app_began_pays(limiter):
    """An app may do all its work as its body is asked for: of that nobody knows."""
    app = WsgiSteps([head(500), piece()])
    assert serve_wsgi(WSGIGuard(app, limiter, cost=PRICE), Request(leaves_after=0)).status == 0
    assert (taken(limiter), app.call.is_open) == (PRICE, False)


def told_by_receiving(server, receive, send):
    async def leave():
        server.gone.set()
        while (await receive())["type"] != "http.disconnect":
            pass

    return leave()


def told_by_sending(server, receive, send):
    async def leave():
        server.gone.set()
        for _ in range(2):
            with suppress(BrokenPipeError):
                await send({"type": "http.response.start", "status": 200, "headers": []})

    return leave()


def cancelled(server, receive, send):
    async def leave():
        server.gone.set()
        asyncio.current_task().cancel()
        await asyncio.sleep(0)

    return leave()


@pytest.mark.parametrize("told", [told_by_receiving, told_by_sending, cancelled])
@pytest.mark.parametrize("before", [[], [head()], [head(), piece()]], ids=["nothing", "a head", "a piece"])
@pytest.mark.parametrize("after", ["returns", "breaks", "answers an error"])
def test_asgi_caller_who_hangs_up_pays(limiter, told, before, after):
    """However the app learns of it, and whatever it does then: else to hang up were a way to call for free."""

    async def app(scope, receive, send):
        with suppress(Broken):
            await AsgiSteps([*before, BREAKS])(scope, receive, send)
        await told(server, receive, send)
        if after == "breaks":
            raise Broken
        if after == "answers an error":
            with suppress(BrokenPipeError):
                await send({"type": "http.response.start", "status": 500, "headers": []})
                await send({"type": "http.response.body"})

    async def serve():
        nonlocal server
        server = AsgiServer(guard, Request(), raises=told is told_by_sending)
        await server.serve()

    server = None
    guard, calls = watched(app, limiter, cost=PRICE)
    asyncio.run(serve())
    assert (taken(limiter), calls[0].is_open) == (PRICE, False)


def test_asgi_caller_who_hangs_up_after_an_error_does_not_pay(limiter):
    """The app had failed before."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"oh", "more_body": True})
        assert (await receive())["type"] == "http.request"
        assert (await receive())["type"] == "http.disconnect"

    serve_asgi(ASGIGuard(app, limiter, cost=PRICE), Request(leaves_after=1))
    assert taken(limiter) == 0


# --- who asks, and what it costs ------------------------------------------------------------------------------

GUARDS = {"asgi": (ASGIGuard, serve_asgi), "wsgi": (WSGIGuard, serve_wsgi)}
USER = ("x-user-id", "alice")


class Saying:
    """An app of either kind that says hello, and keeps what it is asked.

    Attributes:
        asked: The scope or the environment of the last request.
        body: The body of the last request.
    """

    def __init__(self, *fields, raises=None):
        self.asked = None
        self.body = None
        self._fields = fields
        self._raises = raises

    def __call__(self, environ, second, send=None):
        return self._wsgi(environ, second) if send is None else self._asgi(environ, second, send)

    async def _asgi(self, scope, receive, send):
        self.asked = scope
        if self._raises is not None:
            raise self._raises
        self.body = b""
        more = True
        while more:
            message = await receive()
            self.body += message["body"]
            more = message["more_body"]
        headers = [(name.encode(), value.encode()) for name, value in self._fields]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"hello"})

    def _wsgi(self, environ, start_response):
        self.asked = environ
        if self._raises is not None:
            raise self._raises
        self.body = environ["wsgi.input"].read()
        start_response("200 OK", list(self._fields))
        return [b"hello"]


@pytest.fixture(params=GUARDS)
def kind(request):
    return request.param


def ask(kind, limiter, app=None, request=None, **more):
    """Send a request to a guarded app; return what is heard, and the app."""
    app = Saying(HTML) if app is None else app
    guard, serve = GUARDS[kind]
    return serve(guard(app, limiter, **more), Request(headers=[USER, JSON]) if request is None else request), app


@pytest.mark.parametrize("who", ["alice", Identity("alice", team="red")])
def test_request_is_of_whom_identify_says(limiter, kind, who):
    """Be it a user's id or a whole identity, and whatever the headers say."""
    limiter.budgets.set("team", "red", capacity=100, refill_per_sec=0)
    ask(kind, limiter, request=Request(headers=[("x-user-id", "bob")]), identify=lambda _: who)
    assert (taken(limiter), taken(limiter, "bob")) == (1, 0)
    assert limiter.budgets.get("team", "red").level == (100 if who == "alice" else 99)


def test_asgi_apps_may_wait_to_know_whom_a_request_is_of(limiter):
    async def identify(request):
        await asyncio.sleep(0)
        return "alice"

    ask("asgi", limiter, identify=identify)
    assert taken(limiter) == 1


@pytest.mark.parametrize("raises", [None, BudgetNotFound("of the app's own")])
def test_request_of_nobody_passes_unguarded(limiter, kind, raises):
    """The app finds no call, is sent no more than it was, and fails as it would have failed."""
    app = Saying(HTML, raises=raises)
    heard, _ = ask(kind, limiter, app, identify=lambda _: None, cost=by_estimate())
    assert CALL not in app.asked
    assert heard.raised is raises
    assert (heard.status, heard.headers) == ((0, []) if raises else (200, [HTML]))


def test_what_identify_raises_is_the_apps_own(limiter, kind):
    def identify(request):
        raise Broken

    heard, app = ask(kind, limiter, identify=identify)
    assert isinstance(heard.raised, Broken)
    assert app.asked is None


def test_cost_may_be_a_function_of_the_request(limiter, kind):
    """It sees what both kinds of servers tell, by the same names."""
    seen = []

    def cost(request):
        seen.append(request)
        return int(request.headers["content-length"]) * 2

    request = Request("PUT", "/a/\u00e4", [USER, ("X-Twice", "a"), JSON], pieces=(b"hello",))
    ask(kind, limiter, request=request, cost=cost)
    (asked,) = seen
    assert (asked.method, asked.path, asked.peer, asked.body) == ("PUT", "/a/\u00e4", "192.0.2.7", b"")
    assert {**asked.headers, "content-length": "5"} == asked.headers
    assert (asked.headers["x-twice"], asked.headers["content-type"]) == ("a", "application/json")
    assert taken(limiter) == 10


@pytest.mark.parametrize("cost", [-1, 10**12 + 1, 1.5, "1", None, True])
def test_cost_that_is_none_is_refused_at_once(limiter, kind, cost):
    with pytest.raises(InvalidValue, match="cost must be a whole number from 0 to 10"):
        GUARDS[kind][0](Saying(), limiter, cost=cost)


@pytest.mark.parametrize("wrap", [lambda cost: cost, FromBody], ids=["cost", "FromBody"])
@pytest.mark.parametrize("returned", ["5", None, -1, 1.5])
def test_mistake_of_a_cost_is_not_the_caller_s(limiter, kind, wrap, returned):
    """What a function of the app's returns and is no cost is an error of the app's, and nothing is charged."""
    heard, _ = ask(kind, limiter, cost=wrap(lambda _: returned))
    assert isinstance(heard.raised, TypeError)
    assert "cost must be a whole number from 0 to 10" in str(heard.raised)
    assert taken(limiter) == 0


def test_identify_may_reserve_by_itself(limiter, kind):
    """What it is refused is a refusal of the request."""

    def identify(request):
        with limiter.reserve(user=request.peer, tokens=GRANT + 1, prompt=1) as call:
            call.keep()
        return "alice"

    limiter.budgets.set("user", "192.0.2.7", capacity=5, refill_per_sec=0, level=0)
    heard, _ = ask(kind, limiter, identify=identify)
    assert (heard.status, heard.raised) == (429, None)
    assert b"user:192.0.2.7" in heard.body
    assert taken(limiter) == 0


def test_guard_stands_in_front_of_the_proxy_s_own_app(limiter):
    """Each has a call of its own for the request."""
    config = read_config({"OPENAI_API_KEY": "sk-1"})
    app = asgi.create_app(config, NoUpstream(), MemoryBackend(BucketTable(64)))
    heard = serve_asgi(ASGIGuard(app, limiter), Request("GET", "/openapi.json", [USER]))
    assert (heard.status, heard.raised) == (200, None)
    assert taken(limiter) == 1


def test_guard_that_is_put_together_wrongly(limiter, kind):
    """It says so when it is made, and not at each request."""
    with pytest.raises(TypeError, match="limiter must be a Limiter, got 'memory://'"):
        GUARDS[kind][0](Saying(), "memory://")
    with pytest.raises(TypeError, match=r"cost is a class: write FromBody\(\)"):
        GUARDS[kind][0](Saying(), limiter, cost=FromBody)


def test_answer_tells_the_limits_unless_the_app_does(limiter, kind):
    """Those of the tightest bucket, as the request left it."""
    heard, _ = ask(kind, limiter, cost=PRICE)
    limits = {name: value for name, value in heard.headers if name.startswith("x-ratelimit-")}
    assert limits["x-ratelimit-limit-tokens"] == str(GRANT)
    assert limits["x-ratelimit-remaining-tokens"] == str(GRANT - PRICE)
    own = [HTML, ("x-ratelimit-limit-tokens", "7")]
    heard, _ = ask(kind, limiter, Saying(*own))
    assert heard.headers == own


def test_scope_of_whoever_stands_outside_is_left_alone(limiter):
    """What an ASGI app is given is another, which shares what is in it."""
    scopes = []

    async def outside(scope, receive, send):
        scopes.append(scope)
        await guard(scope, receive, send)
        assert CALL not in scope

    app = Saying()
    guard = ASGIGuard(app, limiter)
    assert serve_asgi(outside, Request()).raised is None
    assert app.asked == {**scopes[0], CALL: app.asked[CALL]}
    assert app.asked["state"] is scopes[0]["state"]


@pytest.mark.parametrize("kind", ["lifespan", "something new"])
def test_what_is_no_request_passes(limiter, kind):
    passed = []

    async def app(*given):
        passed.append(given)

    given = {"type": kind}, object(), object()
    asyncio.run(ASGIGuard(app, limiter)(*given))
    assert passed == [given]


# --- bodies ---------------------------------------------------------------------------------------------------

CHAT = json.dumps(
    {"model": MODEL, "messages": [{"role": "user", "content": "Say hello"}], "max_tokens": 21}
).encode()
BODIES = {
    "none": ((b"",), True),
    "one piece": ((CHAT,), True),
    "pieces": ((CHAT[:5], b"", CHAT[5:]), True),
    "chunks": ((CHAT[:5], CHAT[5:]), False),
    "as large as may be": ((b"x" * 200,), True),
}


@pytest.mark.parametrize("validated", [False, True])
@pytest.mark.parametrize("body", BODIES)
def test_app_reads_the_very_body_that_was_read_before(limiter, kind, body, validated):
    """However it came."""
    pieces, measured = BODIES[body]
    app, seen = Saying(HTML), []
    cost = FromBody(lambda request: seen.append(request.body) or 1, max_bytes=200)
    guard, serve = GUARDS[kind]
    guarded = guard(app, limiter, cost=cost)
    heard = serve(guarded, Request(headers=[USER], pieces=pieces, measured=measured))
    assert (heard.raised, heard.status) == (None, 200)
    assert app.body == seen[0] == b"".join(pieces)
    if kind == "wsgi":
        assert int(app.asked["CONTENT_LENGTH"]) == len(app.body)


@pytest.mark.parametrize("measured", [True, False])
def test_body_that_is_too_large_is_refused(limiter, kind, measured):
    """The app is not asked, and nothing is charged."""
    request = Request(headers=[USER], pieces=(b"x" * 200, b"x"), measured=measured)
    heard, app = ask(kind, limiter, request=request, cost=FromBody(max_bytes=200))
    assert (heard.status, app.asked, taken(limiter)) == (413, None, 0)
    assert json.loads(heard.body)["error"]["code"] == "body_too_large"


def test_body_that_is_cut_is_nobodys_request(limiter, kind):
    """Its caller has hung up, so that nobody hears an answer, and nothing is charged."""
    request = Request(headers=[USER], pieces=(b"hello",), cut=True)
    heard, app = ask(kind, limiter, request=request, cost=FromBody(max_bytes=200))
    assert (heard.raised, app.asked, taken(limiter)) == (None, None, 0)
    assert heard.messages == []


def test_wsgi_body_of_no_known_length_is_refused(limiter):
    """A server should have done so."""
    request = Request(headers=[USER, ("content-length", "five")], measured=False)
    heard, app = ask("wsgi", limiter, request=request, cost=FromBody())
    assert (heard.status, app.asked) == (400, None)


def test_app_hears_of_the_end_after_the_body(limiter):
    """Behind a body that was read before comes what comes from the server."""
    kinds = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"hello", "more_body": True})
        kinds.extend([(await receive())["type"], (await receive())["type"]])

    serve_asgi(ASGIGuard(app, limiter, cost=FromBody()), Request(leaves_after=1))
    assert kinds == ["http.request", "http.disconnect"]


@pytest.mark.parametrize(
    ("body", "charged"),
    [
        pytest.param(CHAT, 30, id="a chat: its prompt and what it may answer"),
        pytest.param(b"x" * 400, None, id="any other: its text"),
        pytest.param(b"", 0, id="none"),
    ],
)
def test_cost_is_estimated_from_the_body(limiter, kind, body, charged):
    ask(kind, limiter, request=Request(headers=[USER], pieces=(body,)), cost=FromBody())
    assert taken(limiter) == charged if charged is not None else 50 <= taken(limiter) <= 200


def test_chat_is_reserved_as_the_proxy_does_it(kind):
    """Budgets of its model bind, and of what its answer may take a bucket is asked for half of what it holds."""
    chat = b'{"model":"gpt-4o","messages":[{"role":"user","content":"Say hello"}]}'
    with Limiter(CAP_GLOBAL="unlimited", CAP_TEAM="unlimited", CAP_USER=100, RATE_USER=0) as limiter:
        limiter.budgets.set("global", model="gpt-4o", capacity=GRANT, refill_per_sec=0)
        heard, _ = ask(kind, limiter, request=Request(headers=[USER], pieces=(chat,)), cost=FromBody())
        left = {str(state.name): state.level for state in limiter.peek(user="alice", model="gpt-4o")}
    assert heard.status == 200
    assert left == {"global:* on tokens of gpt-4o": GRANT - 9 - 256, "user:alice on tokens": 50}


# --- refusals -------------------------------------------------------------------------------------------------


class Wrapped:
    """A backend that fails as a test says, and does what the one behind it does otherwise."""

    def __init__(self, backend, **fails):
        self._backend = backend
        self._fails = fails

    def __getattr__(self, name):
        if (error := self._fails.get(name)) is None:
            return getattr(self._backend, name)

        def fail(*given):
            raise error

        return fail


def put_behind(limiter, backend):
    """Have a limiter ask another backend; return it."""
    limiter._desk = Desk(Decider(backend, Plans(backend, limiter._engine.config.defaults)), backend.close)
    return backend


class NoUpstream:
    """A provider that nobody may ask."""


def proxied(kind, backend, request):
    """Return what the proxy answers to the same request, of the same buckets."""
    settings = {"OPENAI_API_KEY": "sk-1", "TOKENGUARD_PROVIDER_LIMITS": "off", **SETTINGS}  # which has no thread
    config = read_config({name: str(value) for name, value in settings.items()})
    root, serve = {"asgi": (asgi, serve_asgi), "wsgi": (wsgi, serve_wsgi)}[kind]
    app = root.create_app(config, NoUpstream(), backend)
    return serve(app, replace(request, path="/v1/chat/completions"))


def but_for_its_time(heard):
    """Return an answer without what no other has: its request's id, and how much time it has left to wait."""
    headers = {name: value for name, value in heard.headers if name != "x-request-id"}
    passing = (
        "retry-after",
        "retry-after-ms",
        "x-ratelimit-reset-tokens",
        "x-ratelimit-reset-requests",
        "content-length",
    )
    body = re.sub(rb'("retryAfterMs":|try again in )[0-9.hms]+', rb"\1...", heard.body)
    return heard.status, {name: "..." if name in passing else value for name, value in headers.items()}, body


REFUSALS = {
    # by budgets
    "for ever": ({"capacity": 100, "refill_per_sec": 0, "level": 5}, [USER]),
    "for a while": ({"capacity": 100, "refill_per_sec": 0.001, "level": 5}, [USER]),
    "in debt": ({"capacity": 100, "refill_per_sec": 0.5, "level": -70}, [USER]),
    "by requests": ({"capacity": 1, "refill_per_sec": 0.5, "level": 0, "meter": "requests"}, [USER]),
    # for want of an identity
    "of nobody": ({}, []),
    "of two": ({}, [USER, ("x-user-id", "bob")]),
    "of two in one": ({}, [("x-user-id", "alice,bob")]),
    "of a user with a bad team": ({}, [USER, ("x-team-id", "a\tb")]),
    "of an empty name": ({}, [("x-user-id", "")]),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_refusal_is_the_proxys(limiter, kind, refusal):
    """The same status, fields and body, of the same buckets; the app is not asked, and nothing is charged."""
    budget, headers = REFUSALS[refusal]
    if budget:
        limiter.budgets.set("user", "alice", **budget)
    before = limiter.peek(user="alice")[-1].level
    request = Request(headers=[*headers, JSON], pieces=(CHAT,))
    heard, app = ask(kind, limiter, request=request, cost=FromBody())
    if kind == "asgi" and refusal == "of two in one":
        assert heard.status == 200  # it is one there
        return
    assert app.asked is None
    assert heard.status == (429 if budget else 400)
    assert limiter.peek(user="alice")[-1].level - before in (0, 1)
    theirs = proxied(kind, limiter._engine.backend, request)
    assert but_for_its_time(heard) == but_for_its_time(theirs)
    assert {**heard.fields, "content-length": str(len(heard.body))} == heard.fields


FAULTS = {
    "full": TableFull("the table has no room"),
    "busy": TableBusy("the table is locked"),
    "down": BackendDown("The shared budgets cannot be reached", "nobody listens on redis.internal:6379"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_the_buckets_is_answered_as_the_proxy_does(limiter, kind, fault, caplog):
    """By a 503 that says when to come again, and not where the buckets are."""
    backend = put_behind(
        limiter, Wrapped(limiter._engine.backend, reserve=FAULTS[fault], reserve_soon=FAULTS[fault])
    )
    request = Request(headers=[USER, JSON], pieces=(CHAT,))
    heard, app = ask(kind, limiter, request=request, cost=FromBody())
    assert (heard.status, heard.fields["retry-after"], app.asked) == (503, "1", None)
    assert b"internal:" not in heard.body
    assert len(caplog.records) == (fault != "down")
    assert but_for_its_time(heard) == but_for_its_time(proxied(kind, backend, request))


def test_head_is_refused_without_a_body(limiter, kind):
    """Its fields are those of the answer to a GET."""
    heads = [ask(kind, limiter, request=Request(method, headers=[]))[0] for method in ("GET", "HEAD")]
    assert heads[0].headers == heads[1].headers
    assert (heads[0].status, heads[1].status, heads[1].body) == (400, 400, b"")
    assert heads[1].ended


def test_refusal_is_one_that_wsgis_checker_takes(limiter):
    limiter.budgets.set("user", "alice", capacity=1, refill_per_sec=0, level=0)
    heard = serve_wsgi(validator(WSGIGuard(validator(Saying(HTML)), limiter)), Request())
    assert (heard.raised, heard.status) == (None, 429)


# --- settling -------------------------------------------------------------------------------------------------


def test_reservation_stays_spent_while_the_buckets_are_locked(limiter, kind, caplog):
    """The answer is none the worse for it."""
    put_behind(limiter, Wrapped(limiter._engine.backend, settle=TableBusy("the table is locked")))
    steps = [head(200, JSON), piece(ANSWER)]
    app, guard, serve = BOTH[kind](limiter, steps, by_estimate())
    assert serve(guard, Request()).body == ANSWER
    assert (taken(limiter), app.call.is_open) == (PRICE, False)
    assert "the table is locked: what was reserved stays spent" in caplog.text


def test_app_may_settle_in_another_thread_at_the_very_end(limiter, kind):
    """Whoever comes second leaves it be."""
    put_behind(limiter, Wrapped(limiter._engine.backend, settle=AlreadySettled("just now")))
    app, guard, serve = BOTH[kind](limiter, [head(200, JSON), piece(ANSWER)], by_estimate())
    assert serve(guard, Request()).raised is None
    app.call.keep()


class Slow(Wrapped):
    """A backend that waits for somebody else, like Redis; what it settles is settled once ``answer`` is called."""

    waits = True

    def __init__(self, backend):
        super().__init__(backend)
        self.settling = []
        self.settles = asyncio.Event()

    def settle_soon(self, *given):
        answer = asyncio.get_running_loop().create_future()
        self.settling.append((answer, given))
        self.settles.set()
        return answer

    def answer(self):
        """Settle all there is."""
        while self.settling:
            answer, given = self.settling.pop()
            answer.set_result(self._backend.settle(*given))


@pytest.mark.parametrize("cancels", [0, 1, 2])
def test_answer_ends_when_its_call_is_settled(limiter, cancels):
    """Whoever has it may look; and whoever waits for it may be cancelled, the app's tasks or all of them."""
    slow = put_behind(limiter, Slow(limiter._engine.backend))
    steps = [head(200, JSON), piece(ANSWER)]

    async def app(scope, receive, send):
        sending = asyncio.create_task(AsgiSteps(steps)(scope, receive, send))
        await slow.settles.wait()
        if cancels:
            sending.cancel()
        with suppress(asyncio.CancelledError):
            await sending

    async def serve():
        server = AsgiServer(ASGIGuard(app, limiter, cost=by_estimate()), Request())
        serving = asyncio.create_task(server.serve())
        await slow.settles.wait()
        for _ in range(5):
            await asyncio.sleep(0)
        assert not server.heard.ended
        assert not serving.done()
        if cancels == 2:
            serving.cancel()
        slow.answer()
        return await serving

    heard = asyncio.run(serve())
    assert isinstance(heard.raised, asyncio.CancelledError) == (cancels == 2)
    assert heard.ended == (cancels == 0)
    assert taken(limiter) == USED


def test_many_threads_are_charged_each_for_its_own(limiter):
    """Of a fixed grant exactly what is in it is given."""
    limiter.budgets.set("user", "alice", capacity=100, refill_per_sec=0)
    guard = WSGIGuard(Saying(HTML), limiter)

    async def crowd():
        return await asyncio.gather(*(asyncio.to_thread(serve_wsgi, guard, Request()) for _ in range(150)))

    assert sorted(heard.status for heard in asyncio.run(crowd())) == [200] * 100 + [429] * 50


# --- WebSockets -----------------------------------------------------------------------------------------------

ACCEPT = {"type": "websocket.accept", "headers": [(b"x-a", b"b")]}
CLOSE = {"type": "websocket.close"}
SOCKETS = {
    # what the app sends, whether it breaks, what is charged
    "accepted": ([ACCEPT, {"type": "websocket.send", "text": "hello"}, CLOSE], False, PRICE),
    "accepted, and broken": ([ACCEPT], True, PRICE),
    "closed at once": ([CLOSE], False, PRICE),
    "broken at once": ([], True, 0),
    "answered": (
        [{"type": "websocket.http.response.start", "status": 403}, {"type": "websocket.http.response.body"}],
        False,
        PRICE,
    ),
    "answered by an error": (
        [{"type": "websocket.http.response.start", "status": 503}, {"type": "websocket.http.response.body"}],
        False,
        0,
    ),
}


def open_socket(limiter, app, headers=((b"x-user-id", b"alice"),), **more):
    """Open a WebSocket; return what is sent to it, and what the app raised."""
    sent = []

    async def receive():
        return {"type": "websocket.connect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "websocket", "path": "/", "headers": list(headers), **more}
    try:
        asyncio.run(ASGIGuard(app, limiter, cost=PRICE)(scope, receive, send))
    except Broken as error:
        return sent, error
    return sent, None


@pytest.mark.parametrize("socket", SOCKETS)
def test_websocket_is_charged_when_it_is_opened(limiter, socket):
    messages, breaks, charged = SOCKETS[socket]

    async def app(scope, receive, send):
        assert scope[CALL].is_open
        for message in messages:
            await send(message)
        if breaks:
            raise Broken

    sent, error = open_socket(limiter, app)
    assert [message["type"] for message in sent] == [message["type"] for message in messages]
    assert isinstance(error, Broken) == breaks
    assert taken(limiter) == charged
    if messages and messages[0] is ACCEPT:
        fields = dict(sent[0]["headers"])
        assert (fields[b"x-a"], fields[b"x-ratelimit-remaining-tokens"]) == (b"b", b"990")


def test_websocket_may_be_settled_when_it_is_closed(limiter):
    """What it took is known by then."""

    async def app(scope, receive, send):
        await send(ACCEPT)
        await send(CLOSE)
        scope[CALL].settle(3)

    assert open_socket(limiter, app)[1] is None
    assert taken(limiter) == 3


def test_websocket_is_refused_before_it_is_opened(limiter):
    """By HTTP where the server can; else it is closed, as one may try again later."""
    limiter.budgets.set("user", "alice", capacity=1, refill_per_sec=0, level=0)
    assert open_socket(limiter, None)[0] == [{"type": "websocket.close", "code": 1013}]
    sent, _ = open_socket(limiter, None, extensions={"websocket.http.response": {}})
    assert [message["type"] for message in sent] == [
        "websocket.http.response.start",
        "websocket.http.response.body",
    ]
    assert (sent[0]["status"], json.loads(sent[1]["body"])["tokenguard"]["scope"]) == (429, "user:alice")
    assert (
        open_socket(limiter, None, headers=[], extensions={"websocket.http.response": {}})[0][0]["status"] == 400
    )
