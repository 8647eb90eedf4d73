"""The least that a server of ASGI and one of WSGI can be: one request, one answer, and no sockets."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from io import BytesIO, StringIO


@dataclass
class Request:
    """What a caller sends.

    Attributes:
        method: The method.
        path: The path.
        headers: The fields, as the caller wrote them.
        pieces: The body, in the pieces in which it comes.
        measured: Whether the length of the body is told; else it comes in chunks.
        leaves_after: After how many pieces of the answer the caller hangs up; None to wait for all of it.
        cut: Whether the caller hangs up before the body has come to its end.
    """

    method: str = "POST"
    path: str = "/"
    headers: list = field(default_factory=lambda: [("x-user-id", "alice")])
    pieces: tuple = (b"",)
    measured: bool = True
    leaves_after: int | None = None
    cut: bool = False

    @property
    def body(self):
        return b"".join(self.pieces)

    @property
    def fields(self):
        """All fields, with the length of the body if that is told."""
        length = [("content-length", str(len(self.body)))] if self.measured and self.body else []
        return [*self.headers, *length]


@dataclass
class Heard:
    """What the caller hears.

    Attributes:
        status: The status; 0 if no answer began.
        headers: The fields, their names in lower case, in order.
        pieces: The pieces of the body.
        ended: Whether the answer came to its end.
        raised: What the app raised.
        messages: Whatever an ASGI app sent.
    """

    status: int = 0
    headers: list = field(default_factory=list)
    pieces: list = field(default_factory=list)
    ended: bool = False
    raised: BaseException | None = None
    messages: list = field(default_factory=list)

    @property
    def body(self):
        return b"".join(self.pieces)

    @property
    def fields(self):
        return dict(self.headers)


class AsgiServer:
    """Answers one request by an ASGI app, and is strict about what it sends.

    Args:
        app: The app.
        request: The request.
        raises: Whether sending raises once the caller has hung up, as ASGI has it since 2.4; else it does nothing.

    Attributes:
        gone: Is set once the caller has hung up.
    """

    def __init__(self, app, request, raises=False):
        self.heard = Heard()
        self.gone = asyncio.Event()
        self._app = app
        self._request = request
        self._raises = raises
        pieces = list(request.pieces)
        more = [True] * (len(pieces) - 1) + [request.cut]
        self._incoming = [
            {"type": "http.request", "body": piece, "more_body": left}
            for piece, left in zip(pieces, more, strict=True)
        ]
        if request.cut:
            self.gone.set()

    @property
    def scope(self):
        request = self._request
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": request.method,
            "scheme": "http",
            "path": request.path,
            "raw_path": request.path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in request.fields],
            "client": ("192.0.2.7", 1234),
            "server": ("127.0.0.1", 80),
            "state": {},
        }

    async def serve(self):
        """Answer; return what was heard."""
        try:
            await self._app(self.scope, self.receive, self.send)
        except BaseException as error:
            self.heard.raised = error
        return self.heard

    async def receive(self):
        if self._incoming:
            return self._incoming.pop(0)
        if not self.heard.ended:
            await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        heard = self.heard
        if self.gone.is_set():
            if self._raises:
                raise BrokenPipeError("the caller has hung up")
            return
        heard.messages.append(message)
        if message["type"] == "http.response.start":
            assert not heard.status, "a second head"
            heard.status = message["status"]
            heard.headers = [(name.decode(), value.decode("latin-1")) for name, value in message["headers"]]
            return
        assert message["type"] == "http.response.body", message
        assert heard.status, "a body without a head"
        assert not heard.ended, "more after the end"
        if message.get("body"):
            heard.pieces.append(bytes(message["body"]))
        heard.ended = not message.get("more_body", False)
        if len(heard.pieces) == self._request.leaves_after:
            self.gone.set()


def serve_asgi(app, request, **more):
    """Answer one request by an ASGI app; return what was heard."""

    async def serve():
        return await AsgiServer(app, request, **more).serve()

    return asyncio.run(serve())


def environ_of(request):
    """Return a request as a WSGI environment."""
    environ = {
        "REQUEST_METHOD": request.method,
        "SCRIPT_NAME": "",
        "PATH_INFO": request.path.encode().decode("latin-1"),
        "QUERY_STRING": "",
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "REMOTE_ADDR": "192.0.2.7",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": BytesIO(request.body[:-1] if request.cut else request.body),
        "wsgi.errors": StringIO(),
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
    }
    for name, value in request.fields:
        key = name.upper().replace("-", "_")
        key = key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}"
        environ[key] = f"{environ[key]},{value}" if key in environ else value
    if not request.measured:
        environ["wsgi.input_terminated"] = True
    return environ


class WsgiServer:
    """Answers one request by a WSGI app, as PEP 3333 has it: a head is kept until there is a piece of the body.

    Args:
        app: The app.
        request: The request.

    Attributes:
        environ: The environment.
        body: What the app returned.
    """

    def __init__(self, app, request):
        self.environ = environ_of(request)
        self.body = None
        self.heard = Heard()
        self._head = None
        self._app = app
        self._leaves_after = request.leaves_after

    def serve(self):
        """Answer; return what was heard."""
        try:
            self._serve()
        except BaseException as error:
            self.heard.raised = error
        return self.heard

    def _serve(self):
        self.body = self._app(self.environ, self._start_response)
        try:
            pieces = iter(self.body)
            while len(self.heard.pieces) != self._leaves_after:
                piece = next(pieces, None)
                if piece is None:
                    self._begin()
                    self.heard.ended = True
                    return
                self._write(piece)
        finally:
            if hasattr(self.body, "close"):
                self.body.close()

    def _start_response(self, status, headers, exc_info=None):
        assert exc_info or self._head is None, "a second head"
        if exc_info and self.heard.status:
            raise exc_info[1]
        self._head = int(status.split()[0]), [(name.lower(), value) for name, value in headers]
        return self._write

    def _write(self, piece):
        if len(self.heard.pieces) == self._leaves_after:
            raise BrokenPipeError("the caller has hung up")
        if piece:
            self._begin()
            self.heard.pieces.append(piece)

    def _begin(self):
        assert self._head, "a body without a head"
        self.heard.status, self.heard.headers = self._head


def serve_wsgi(app, request):
    """Answer one request by a WSGI app; return what was heard."""
    return WsgiServer(app, request).serve()
