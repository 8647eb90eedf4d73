"""The gateway as it was first built, for comparison: Falcon in front, httpx behind, and nothing between them.

Run: UPSTREAM=http://127.0.0.1:PORT python -m uvicorn --factory benchmarks.gateway.first:create_app
"""

import os

import falcon.asgi
import httpx

from benchmarks.gateway.calls import PATH

_NOT_PASSED = {"host", "connection", "content-length", "transfer-encoding"}


class Pieces:
    """The pieces of an answer that streams."""

    def __init__(self, told):
        self._told = told
        self._pieces = told.aiter_raw()

    def __aiter__(self):
        """Return the pieces."""
        return self._pieces

    async def close(self):
        """Give the connection back."""
        await self._told.aclose()


class Chat:
    """Chat completions, passed on."""

    def __init__(self, client):
        self._client = client

    async def on_post(self, request, response):
        """Forward a call, and its answer."""
        headers = {name: value for name, value in request.headers.items() if name not in _NOT_PASSED}
        content = await request.stream.read()
        sent = self._client.build_request("POST", request.path, content=content, headers=headers)
        told = await self._client.send(sent, stream=True)
        response.status = told.status_code
        for name, value in told.headers.items():
            if name not in _NOT_PASSED:
                response.set_header(name, value)
        if "content-length" in told.headers:
            response.data = await told.aread()
        else:
            response.stream = Pieces(told)


def create_app():
    """Return the app."""
    limits = httpx.Limits(max_connections=1000, max_keepalive_connections=1000)
    app = falcon.asgi.App()
    app.add_route(PATH, Chat(httpx.AsyncClient(base_url=os.environ["UPSTREAM"], limits=limits, timeout=60)))
    return app
