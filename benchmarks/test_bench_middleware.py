"""What a guard adds to a request to a hello world: no server, no socket, the app is called as a server calls it.

Every row makes requests of users in a random order, and each of them is answered 200; whoever guards
refuses the second request of a user who has room for one. README.md says what the rows mean.
"""

import asyncio
import io
import random
import sys
from itertools import cycle

import pytest

from benchmarks import hello

CALLS = {"ASGI": 200, "FastAPI": 20, "WSGI": 200, "Flask": 20}
"""How many requests are timed together: some 2 ms of them, so that a busy machine seldom interrupts a round."""
USERS = 1_000
FIELDS = {
    "host": "127.0.0.1:8000",
    "accept": "application/json",
    "accept-encoding": "gzip, deflate",
    "user-agent": "python-httpx/0.28.1",
    "authorization": "Bearer sk-callers",
    "cookie": "session=879ddf438a447a1be893ab5dfb29bfc5",
}


def head(user):
    """Return the header fields of a user's request."""
    return {**FIELDS, "x-user-id": f"user-{user}", "x-team-id": f"team-{user % 10}"}


def scope(user):
    """Return what an ASGI server makes of a request."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/",
        "raw_path": b"/",
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in head(user).items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }


def environ(user):
    """Return what a WSGI server makes of a request."""
    return {
        "REQUEST_METHOD": "GET",
        "SCRIPT_NAME": "",
        "PATH_INFO": "/",
        "QUERY_STRING": "",
        "REMOTE_ADDR": "127.0.0.1",
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "8000",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": False,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
        **{f"HTTP_{name.upper().replace('-', '_')}": value for name, value in head(user).items()},
    }


@pytest.fixture(scope="module")
def run():
    with asyncio.Runner() as runner:
        yield runner.get_loop().run_until_complete


def asked_by_asgi(run):
    """Return what calls an ASGI app for some requests on one loop, and returns the statuses of the answers."""

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def ask(app, scopes):
        statuses = []

        async def send(message):
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        for scope in scopes:
            await app(scope.copy(), receive, send)
        return statuses

    return lambda app, scopes: run(ask(app, scopes))


def asked_by_wsgi(app, environs):
    """Call a WSGI app for some requests; return the statuses of the answers."""
    statuses = []

    def start_response(status, headers, exc_info=None):
        statuses.append(int(status[:3]))

    for environ in environs:
        body = app(environ.copy(), start_response)
        for _ in body:
            pass
        if hasattr(body, "close"):
            body.close()
    return statuses


def measure(benchmark, name, ask, app, requests):
    """Time rounds of requests: other ones in every round."""
    framework = name.removeprefix("baseline: ").partition(",")[0]
    calls = CALLS[framework]
    random.Random(1).shuffle(requests)
    rounds = cycle([requests[i : i + calls] for i in range(0, len(requests), calls)])
    passed = [200] * calls

    def work():
        assert ask(app, next(rounds)) == passed

    benchmark.group = f"hello world, {framework}"
    benchmark.name = name
    benchmark.extra_info["calls"] = calls
    for _ in range(USERS // calls):
        work()  # a user's first request takes longer
    benchmark(work)


ASGI = {
    "baseline: ASGI, bare": lambda: hello.asgi,
    "ASGI, ASGIGuard": hello.asgi_guard,
    "baseline: FastAPI, bare": hello.fastapi,
    "FastAPI, ASGIGuard": hello.fastapi_guard,
    "FastAPI, slowapi's decorator": hello.slowapi_decorator,
    "FastAPI, slowapi's ASGI middleware": hello.slowapi_middleware,
}
WSGI = {
    "baseline: WSGI, bare": lambda: hello.wsgi,
    "WSGI, WSGIGuard": hello.wsgi_guard,
    "baseline: Flask, bare": hello.flask,
    "Flask, WSGIGuard": hello.flask_guard,
}
"""What makes the app of each row; of those that guard, given how many requests a user may make."""


@pytest.mark.parametrize("name", ASGI)
def test_asgi(benchmark, run, name):
    make, ask = ASGI[name], asked_by_asgi(run)
    measure(benchmark, name, ask, make(), [scope(user) for user in range(USERS)])
    if not name.startswith("baseline"):
        assert ask(make(1), [scope(0)] * 2) == [200, 429]


@pytest.mark.parametrize("name", WSGI)
def test_wsgi(benchmark, name):
    make = WSGI[name]
    measure(benchmark, name, asked_by_wsgi, make(), [environ(user) for user in range(USERS)])
    if not name.startswith("baseline"):
        assert asked_by_wsgi(make(1), [environ(0)] * 2) == [200, 429]
