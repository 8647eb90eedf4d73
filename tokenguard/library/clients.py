"""Clients of httpx that guard every chat completion."""

from __future__ import annotations

from types import ModuleType
from typing import ClassVar

import httpx

from tokenguard.library.sending import GuardedBody, GuardedBodySoon, Sending, SendingSoon


class _Body(GuardedBody, httpx.SyncByteStream):
    """The body of an answer."""


class _BodySoon(GuardedBodySoon, httpx.AsyncByteStream):
    """The body of an answer."""


class GuardedClient(Sending, httpx.Client):
    """An ``httpx.Client`` that guards every chat completion."""

    kin: ClassVar[ModuleType] = httpx
    body: ClassVar[type[GuardedBody]] = _Body


class AsyncGuardedClient(SendingSoon, httpx.AsyncClient):
    """An ``httpx.AsyncClient`` that guards every chat completion."""

    kin: ClassVar[ModuleType] = httpx
    body: ClassVar[type[GuardedBodySoon]] = _BodySoon
