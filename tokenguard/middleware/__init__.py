"""Guards in front of an app of yours, ASGI or WSGI: Starlette, FastAPI, Django, Flask, Falcon, any other.

Source: docs/middleware.md
"""

from tokenguard.middleware.asgi import ASGIGuard
from tokenguard.middleware.asking import CALL, FromBody, Request, by_headers
from tokenguard.middleware.wsgi import WSGIGuard

__all__ = ["CALL", "ASGIGuard", "FromBody", "Request", "WSGIGuard", "by_headers"]
