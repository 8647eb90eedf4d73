"""Clients of httpx2 that guard every chat completion."""

from __future__ import annotations

from types import ModuleType
from typing import ClassVar

import httpx2

from tokenguard.library.sending import GuardedBody, GuardedBodySoon, Sending, SendingSoon


class _Body(GuardedBody, httpx2.SyncByteStream):
    """The body of an answer."""


class _BodySoon(GuardedBodySoon, httpx2.AsyncByteStream):
    """The body of an answer."""


class GuardedClient(Sending, httpx2.Client):
    """An ``httpx2.Client`` that guards every chat completion."""

    kin: ClassVar[ModuleType] = httpx2
    body: ClassVar[type[GuardedBody]] = _Body


class AsyncGuardedClient(SendingSoon, httpx2.AsyncClient):
    """An ``httpx2.AsyncClient`` that guards every chat completion."""

    kin: ClassVar[ModuleType] = httpx2
    body: ClassVar[type[GuardedBodySoon]] = _BodySoon
