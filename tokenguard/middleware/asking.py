"""What a middleware asks of a request: who it is of, and what it costs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tokenguard._heads import read_identity
from tokenguard.api.environ import fields_of, identity_fields_of
from tokenguard.errors import InvalidValue
from tokenguard.library import Limiter
from tokenguard.library.call import Call, check_tokens
from tokenguard.model import Headers, Identity
from tokenguard.sizing import TOKEN, weigh

CALL = "tokenguard.call"
"""Where an app finds the ``Call`` of a request, to settle it: in the ASGI scope, or in the WSGI environment."""

MAX_BODY_BYTES = 20 * 2**20


@dataclass
class Request:
    """A request as ``identify`` and ``cost`` see it.

    Attributes:
        method: The HTTP method; ``GET`` for a WebSocket.
        path: The path, decoded.
        peer: The address of whoever is at the other end of the connection; empty if that is not known.
        scope: The ASGI scope, or the WSGI environment.
        body: The body, where ``cost`` is a ``FromBody``; else empty.
    """

    method: str
    path: str
    peer: str
    scope: Mapping[str, Any]
    body: bytes = field(default=b"", repr=False)

    @cached_property
    def fields(self) -> Headers:
        """The header fields, in the order they came, with their names in lower case."""
        return fields_of(self.scope) if "wsgi.input" in self.scope else list(self.scope["headers"])

    @cached_property
    def headers(self) -> dict[str, str]:
        """The same by their names; values of one given more than once are joined by a comma."""
        joined: dict[str, str] = {}
        for raw_name, raw_value in self.fields:
            name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
            joined[name] = f"{joined[name]}, {value}" if name in joined else value
        return joined


Who = Identity | str | None
"""Who a request is of; a string is a user's id, and None lets the request pass unguarded."""

Identify = Callable[[Request], Who]
IdentifySoon = Callable[[Request], Who | Awaitable[Who]]


def by_headers(request: Request) -> Identity:
    """Return who a request says it is of: ``x-user-id``, ``x-team-id``, ``x-role`` and ``x-llm-rolegroup``.

    Args:
        request: The request.

    Raises:
        InvalidValue: The user is missing, or a field is malformed or given twice.
    """
    scope = request.scope
    return read_identity(identity_fields_of(scope) if "wsgi.input" in scope else scope["headers"])


class FromBody:
    """Has a request cost what its body says.

    What a request takes is settled to the ``usage`` of its answer, JSON or server-sent events, if there is one and
    the app has not settled it itself; else it is what was estimated.

    Args:
        estimate: Returns the tokens that a request is expected to take, by its ``body``. By default that is, of a
            chat completion's, what the proxy estimates, and budgets of its model bind too; of any other, what the
            text comes to.
        max_bytes: A longer body is refused with 413. It is held in memory until the app has read it.
    """

    def __init__(
        self, estimate: Callable[[Request], int] | None = None, *, max_bytes: int = MAX_BODY_BYTES
    ) -> None:
        self.estimate = estimate
        self.max_bytes = max_bytes


Cost = int | Callable[[Request], int] | FromBody


class Asking:
    """Who asks, and at which price.

    Args:
        limiter: Reserves and settles.
        cost: What a request costs.
    """

    def __init__(self, limiter: Limiter, cost: Cost) -> None:
        if not isinstance(limiter, Limiter):
            raise TypeError(f"limiter must be a Limiter, got {limiter!r}")
        if isinstance(cost, type):
            raise TypeError(f"cost is a class: write {cost.__name__}()")
        if not callable(cost) and not isinstance(cost, FromBody):
            check_tokens("cost", cost)
        self._limiter = limiter
        self._cost = cost
        self.body = cost if isinstance(cost, FromBody) else None

    def call(self, who: Identity | str, request: Request) -> Call:
        """Return the request's call, of which nothing is reserved yet.

        Raises:
            InvalidValue: The cost is no number of tokens, or the identity none that can be.
            TypeError: ``identify`` returned something else than who it is.
        """
        identity = Identity(who) if isinstance(who, str) else who
        if not isinstance(identity, Identity):
            raise TypeError(f"identify must return an Identity, the id of a user, or None, got {who!r}")
        return self._limiter.reserve_for(identity, **self._ask(identity, request))

    def _ask(self, who: Identity, request: Request) -> dict[str, Any]:
        cost = self._cost
        if isinstance(cost, int):
            return {"tokens": cost}
        if not isinstance(cost, FromBody):
            return {"tokens": _returned(cost, request)}
        if cost.estimate is not None:
            return {"tokens": _returned(cost.estimate, request)}
        try:
            return {**self._limiter.estimate(request.body, user=who.user, team=who.team)}
        except InvalidValue:
            return {"tokens": -(-weigh(request.body) // TOKEN)}


def _returned(cost: Callable[[Request], int], request: Request) -> int:
    """Return what a function of the app's says, whose mistakes are not the caller's.

    Raises:
        TypeError: It is no number of tokens.
    """
    tokens = cost(request)
    try:
        check_tokens("cost", tokens)
    except InvalidValue as error:
        raise TypeError(str(error)) from None
    return tokens
