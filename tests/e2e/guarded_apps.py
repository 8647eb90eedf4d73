"""Apps of the frameworks that people use, each behind a guard, and all in one app of ASGI and one of WSGI.

The first part of a path says whose app answers. A request's body tells what it ``costs``, and what its answer
``takes``, if it tells that; ``/`` tells how many calls this worker has open.
"""

from __future__ import annotations

import asyncio
import json
from itertools import count
from pathlib import Path
from threading import Event

import django
import falcon
import falcon.asgi
import fastapi
import flask
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application
from django.http import FileResponse, HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import path
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from tokenguard import Limiter
from tokenguard.middleware import CALL, ASGIGuard, FromBody, WSGIGuard

FILE = Path(__file__)
EVENTS = "text/event-stream"
HELLO = 'data: {"choices": [{"delta": {"content": "Hello"}}]}\n\n'
LAST = 'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n'
PAUSE_S = 0.01
"""Between two of the pieces that a stream goes on with, until its caller hangs up."""

limiter = Limiter.from_env()
by_body = FromBody(lambda request: json.loads(request.body)["costs"] if request.body else 10)
_calls = []
_paused = Event()


def usage(takes):
    return {"usage": {"prompt_tokens": 0, "completion_tokens": takes, "total_tokens": takes}}


def answer_to(body):
    """Return what is answered to a request."""
    takes = json.loads(body).get("takes") if body else None
    return {"text": "hello " * 200} if takes is None else {"text": "hello " * 200, **usage(takes)}


def events(body):
    """Yield the pieces of a stream that does not end of itself; None for a pause."""
    takes = json.loads(body).get("takes")
    yield HELLO
    if takes is not None:
        yield LAST + f"data: {json.dumps({'choices': [], **usage(takes)})}\n\n"
    for number in count():
        yield None
        yield f": {number}\n\n"


async def events_soon(body):
    for event in events(body):
        if event is None:
            await asyncio.sleep(PAUSE_S)
        else:
            yield event


def events_now(body):
    for event in events(body):
        if event is None:
            _paused.wait(PAUSE_S)
        else:
            yield event


def told():
    """Return how things are with this worker."""
    return {"open": sum(call.is_open for call in _calls)}


def by_first_part(apps):
    """Return what finds the app that answers a path."""
    return lambda path: apps.get(path.split("/")[1])


def noting(app):
    """Return an app of ASGI that notes the calls that get through to it."""

    async def noted(scope, receive, send):
        _calls.append(scope[CALL])
        await app(scope, receive, send)

    return noted


def noting_wsgi(app):
    def noted(environ, start_response):
        _calls.append(environ[CALL])
        return app(environ, start_response)

    return noted


# --- FastAPI and Starlette ------------------------------------------------------------------------------------

fast = fastapi.FastAPI()


@fast.post("/fastapi/answer")
async def fastapi_answer(request: fastapi.Request):
    return answer_to(await request.body())


@fast.post("/fastapi/threaded")
def fastapi_threaded(request: fastapi.Request, body: dict):
    request.scope[CALL].settle(body["takes"])
    return answer_to(b"")


@fast.post("/fastapi/fails")
async def fastapi_fails():
    raise fastapi.HTTPException(503)


@fast.websocket("/fastapi/socket")
async def fastapi_socket(websocket: fastapi.WebSocket):
    await websocket.accept()
    await websocket.close()


async def starlette_answer(request):
    return JSONResponse(answer_to(await request.body()))


async def starlette_stream(request):
    return StreamingResponse(events_soon(await request.body()), media_type=EVENTS)


async def passing(request, call_next):
    return await call_next(request)


star = Starlette(
    routes=[
        Route("/starlette/answer", starlette_answer, methods=["POST"]),
        Route("/starlette/stream", starlette_stream, methods=["POST"]),
    ],
    middleware=[
        Middleware(GZipMiddleware),
        Middleware(BaseHTTPMiddleware, dispatch=passing),
        Middleware(ASGIGuard, limiter=limiter, cost=by_body),
        Middleware(noting),
        Middleware(BaseHTTPMiddleware, dispatch=passing),
    ],
)

# --- Django ---------------------------------------------------------------------------------------------------


def django_answer(request):
    return JsonResponse(answer_to(request.body))


async def django_stream_soon(request):
    return StreamingHttpResponse(events_soon(request.body), content_type=EVENTS)


def django_stream(request):
    return StreamingHttpResponse(events_now(request.body), content_type=EVENTS)


def django_file(request):
    return FileResponse(FILE.open("rb"))


def django_fails(request):
    return HttpResponse("oh", status=503)


settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], SECRET_KEY="none", LOGGING_CONFIG=None)
django.setup()
urlpatterns = [
    path("django/answer", django_answer),
    path("django/stream-soon", django_stream_soon),
    path("django/stream", django_stream),
    path("django/file", django_file),
    path("django/fails", django_fails),
]

# --- Flask ----------------------------------------------------------------------------------------------------

flasked = flask.Flask(__name__)


@flasked.post("/flask/answer")
def flask_answer():
    return answer_to(flask.request.get_data())


@flasked.post("/flask/stream")
def flask_stream():
    return flask.Response(flask.stream_with_context(events_now(flask.request.get_data())), mimetype=EVENTS)


@flasked.post("/flask/nothing")
def flask_nothing():
    return "", 204


@flasked.get("/flask/file")
def flask_file():
    return flask.send_file(FILE)


# --- Falcon ---------------------------------------------------------------------------------------------------


class FalconAnswer:
    """Settles its calls itself."""

    def on_post(self, req, resp):
        answered = answer_to(req.bounded_stream.read())
        req.env[CALL].settle(answered.pop("usage")["total_tokens"])
        resp.media = answered


class FalconAnswerSoon:
    async def on_post(self, req, resp):
        answered = answer_to(await req.stream.read())
        req.scope[CALL].settle(answered.pop("usage")["total_tokens"])
        resp.media = answered


falcon_wsgi = falcon.App()
falcon_wsgi.add_route("/falcon/answer", FalconAnswer())
falcon_asgi = falcon.asgi.App()
falcon_asgi.add_route("/falcon/answer", FalconAnswerSoon())

# --- all of them ----------------------------------------------------------------------------------------------


async def health(scope, receive, send):
    await JSONResponse(told())(scope, receive, send)


_asgi = by_first_part(
    {
        "fastapi": ASGIGuard(noting(fast), limiter, cost=by_body),
        "starlette": star,
        "django": ASGIGuard(noting(get_asgi_application()), limiter, cost=by_body),
        "falcon": ASGIGuard(noting(falcon_asgi), limiter, cost=by_body),
        "": health,
    }
)
_wsgi = by_first_part(
    {
        "flask": WSGIGuard(noting_wsgi(flasked), limiter, cost=by_body),
        "django": WSGIGuard(noting_wsgi(get_wsgi_application()), limiter, cost=by_body),
        "falcon": WSGIGuard(noting_wsgi(falcon_wsgi), limiter, cost=by_body),
    }
)


async def asgi_app(scope, receive, send):
    """Answer whatever comes over ASGI."""
    await (fast if scope["type"] == "lifespan" else _asgi(scope["path"]))(scope, receive, send)


def wsgi_app(environ, start_response):
    """Answer whatever comes over WSGI."""
    app = _wsgi(environ["PATH_INFO"])
    if app is not None:
        return app(environ, start_response)
    start_response("200 OK", [("content-type", "application/json")])
    return [json.dumps(told()).encode()]
