"""Hello worlds, bare and guarded: the apps of test_bench_middleware.py and of middleware.py.

Whoever guards lets each user make ``room`` requests a minute, and has its buckets in the process's memory.
"""

import slowapi
from fastapi import FastAPI, Request
from flask import Flask
from slowapi.errors import RateLimitExceeded
from slowapi.middleware import SlowAPIASGIMiddleware

from tokenguard import Limiter
from tokenguard.middleware import ASGIGuard, WSGIGuard

AMPLE = 10**9
HELLO = b"hello, world\n"


def limiter(room):
    """Return a limiter with a budget for everybody, for each team, and for each user: the one that runs dry."""
    far = {"CAP_GLOBAL": 10**12, "RATE_GLOBAL": 10**10, "CAP_TEAM": 10**12, "RATE_TEAM": 10**10}
    return Limiter(CAP_USER=room, RATE_USER=room / 60, **far)


# --- ASGI -----------------------------------------------------------------------------------------------------


async def asgi(scope, receive, send):
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(HELLO))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": HELLO})


def asgi_guard(room=AMPLE):
    return ASGIGuard(asgi, limiter(room))


def fastapi():
    app = FastAPI()

    @app.get("/")
    async def hello():
        return {"hello": "world"}

    return app


def fastapi_guard(room=AMPLE):
    app = fastapi()
    app.add_middleware(ASGIGuard, limiter=limiter(room))
    return app


def _user(request: Request):
    return request.headers["x-user-id"]


def _with_slowapi(app, **options):
    app.state.limiter = slowapi.Limiter(key_func=_user, **options)
    app.add_exception_handler(RateLimitExceeded, slowapi._rate_limit_exceeded_handler)  # noqa: SLF001 - as told to
    return app


def slowapi_decorator(room=AMPLE):
    app = _with_slowapi(FastAPI())

    @app.get("/")
    @app.state.limiter.limit(f"{room}/minute")
    async def hello(request: Request):
        return {"hello": "world"}

    return app


def slowapi_middleware(room=AMPLE):
    app = _with_slowapi(fastapi(), default_limits=[f"{room}/minute"])
    app.add_middleware(SlowAPIASGIMiddleware)
    return app


# --- WSGI -----------------------------------------------------------------------------------------------------


def wsgi(environ, start_response):
    start_response("200 OK", [("content-type", "text/plain"), ("content-length", str(len(HELLO)))])
    return [HELLO]


def wsgi_guard(room=AMPLE):
    return WSGIGuard(wsgi, limiter(room))


def flask():
    app = Flask("hello")

    @app.get("/")
    def hello():
        return {"hello": "world"}

    return app


def flask_guard(room=AMPLE):
    app = flask()
    app.wsgi_app = WSGIGuard(app.wsgi_app, limiter(room))
    return app
