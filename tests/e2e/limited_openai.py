"""An upstream with limits of its own, as OpenAI has them: token buckets, their header fields, and an admin API."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from urllib.parse import parse_qs

from tests.e2e.fake_openai import JSON, FakeOpenAI, complete, usage_of
from tests.provider_limit import (
    CHARGING,
    DAY_S,
    MODEL_MAXIMUM,
    Asked,
    Charging,
    Limit,
    Limits,
    duration,
    plain_seconds,
)

ADMIN_KEY = "sk-admin-0123456789abcdef"
PROJECT = "proj_abc"
QUOTA = (
    "You exceeded your current quota, please check your plan and billing details. For more information on this "
    "error, read the docs: https://platform.openai.com/docs/guides/error-codes/api-errors."
)
QUOTA_CODES = (
    "insufficient_quota",
    "credit_balance_exhausted",
    "organization_spend_limit_exceeded",
    "project_spend_limit_exceeded",
    "organization_usage_limit_exceeded",
)
_CHAT = "/v1/chat/completions"
_LEARN_MORE = "Visit https://platform.openai.com/account/rate-limits to learn more."
_SHORT = {"requests": "requests per min (RPM)", "tokens": "tokens per min (TPM)"}


def raw(fields):
    """Return header fields as ASGI has them."""
    return [(name.encode(), value.encode()) for name, value in fields.items()]


def error(message, kind, code, **more):
    """Return an error's body as OpenAI words it."""
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}, **more}).encode()


def masked(key):
    """Return a key as OpenAI shows it in its errors."""
    return f"{key[:8]}{'*' * 8}{key[-4:]}"


def waits(seconds):
    """Return the fields that tell how long to wait."""
    return {"retry-after": str(max(1, ceil(seconds))), "retry-after-ms": str(ceil(seconds * 1000))}


def wrong_key(shown):
    find = "You can find your API key at https://platform.openai.com/account/api-keys."
    message = f"Incorrect API key provided: {shown}. {find}"
    return error(message, "invalid_request_error", "invalid_api_key", status=401)


def refused(refusal, model):
    """Return the body of a 429 of OpenAI's."""
    if refusal.wait_s is None:
        what, wait = "Request too large", f"Limit {refusal.limit}, Requested {refusal.amount}. "
        wait += "The input or output tokens must be reduced in order to run successfully. "
    else:
        what, wait = "Rate limit reached", f"Limit {refusal.limit}, Used {refusal.used}, "
        wait += f"Requested {refusal.amount}. Please try again in {duration(refusal.wait_s)}. "
    where = f"{what} for {model} in organization org-X on {_SHORT[refusal.meter]}: "
    return error(where + wait + _LEARN_MORE, refusal.meter, "rate_limit_exceeded")


def refused_by_azure(refusal):
    """Return the body of a 429 of Azure's."""
    rate = {"requests": "call", "tokens": "token"}[refusal.meter]
    message = (
        "Requests to the ChatCompletions_Create Operation under Azure OpenAI API version 2024-10-21 have exceeded "
        f"{rate} rate limit of your current OpenAI S0 pricing tier. Please retry after "
        f"{plain_seconds(refusal.wait_s or DAY_S)} seconds. Please go here: https://aka.ms/oai/quotaincrease if "
        "you would like to further increase the default rate limit."
    )
    return json.dumps({"error": {"code": "429", "message": message}}).encode()


def answering(status, body, **fields):
    """Return a script that answers so."""

    async def script(reply):
        await reply.whole(status, raw({**fields, "x-request-id": "req_0"}) + JSON, body)

    return script


def rate_limited(wait_s, model="gpt-4o", meter="requests"):
    """Return a script: the provider is short, whatever its buckets say."""
    short = error(
        f"Rate limit reached for {model} in organization org-X on {_SHORT[meter]}: Limit 3, Used 3, "
        f"Requested 1. Please try again in {duration(wait_s)}. {_LEARN_MORE}",
        meter,
        "rate_limit_exceeded",
    )
    return answering(429, short, **waits(wait_s))


def slow_down(wait_s):
    """Return a script: traffic grew too fast."""
    message = "Your request rate has increased too quickly. Please slow down and ramp up gradually."
    return answering(429, error(message, "rate_limit_error", "slow_down"), **waits(wait_s))


def overloaded(wait_s=None):
    """Return a script: the provider has too much to do."""
    message = "The server is currently overloaded. Please try again later."
    body = error(message, "service_unavailable_error", "server_is_overloaded")
    return answering(503, body, **({} if wait_s is None else waits(wait_s)))


def out_of_quota(code="insufficient_quota"):
    """Return a script: the account has nothing left."""
    return answering(429, error(QUOTA, "insufficient_quota", code))


async def forbidden(reply):
    """Answer an administrator who may not read this."""
    message = "You have insufficient permissions for this operation. Missing scopes: api.management.read."
    await reply.whole(403, JSON, error(message, "invalid_request_error", None))


async def silent(reply):
    """Answer nothing, for as long as somebody waits."""
    await reply.until_gone()


async def cut(reply):
    """Break off in the middle of an answer."""
    await reply.head(200, [*JSON, (b"content-length", b"1000")])
    await reply.piece(b'{"object":"list","data":[')
    raise ConnectionAbortedError


async def failing(reply):
    """Answer that something went wrong."""
    message = "The server had an error while processing your request. Sorry about that!"
    await reply.whole(500, JSON, error(message, "server_error", None))


def admin_row(model, rpm, tpm, **more):
    """Return a model's limits as the admin API lists them."""
    row = {"object": "project.rate_limit", "id": f"rl-{model}", "model": model}
    return {**row, "max_requests_per_1_minute": rpm, "max_tokens_per_1_minute": tpm, **more}


@dataclass
class Call:
    """A completion as the provider saw it.

    Attributes:
        request_id: What whoever called says it is.
        at_s: When it came, by the provider's clock.
        status: What it was answered; None where a test's script did.
        tokens: What it was charged.
        usage: What it took.
    """

    request_id: str
    model: str
    at_s: float
    status: int | None = 200
    tokens: int = 0
    usage: int = 0


@dataclass
class LimitedOpenAI(FakeOpenAI):
    """Answers as OpenAI does to whoever keeps within its limits.

    Attributes:
        rpm: Requests a minute of models that have no limits of their own; None for no limit.
        tpm: Tokens likewise.
        limits: Models' own limits.
        charging: How tokens are counted.
        azure: Whether it is Azure: whole seconds, errors of its own.
        tells_wait: Whether a 429 says how long to wait.
        service_s: How long a completion takes.
        mean_output: How many tokens an answer has on average; None for those of ``usage``.
        altered: For a model, what becomes of what the header fields tell.
        scripts: For a model, how its next calls are to be answered; None for as usual.
        rows: What the admin API lists.
        admin_scripts: How the admin API answers a page instead: 1 is the first.
        masks: Whether an error shows a key in part only.
        clock: Says the time, in seconds.
        calls: The completions that came.
        admin_at_s: When the admin API was asked.
    """

    rpm: int | None = None
    tpm: int | None = None
    limits: dict[str, Limits] = field(default_factory=dict)
    charging: Charging = CHARGING["openai"]
    azure: bool = False
    tells_wait: bool = True
    service_s: float = 0
    mean_output: int | None = None
    altered: dict[str, Callable[[dict], dict]] = field(default_factory=dict)
    scripts: dict[str, deque] = field(default_factory=lambda: defaultdict(deque))
    rows: list[dict] = field(default_factory=list)
    admin_scripts: dict[int, Callable] = field(default_factory=dict)
    masks: bool = True
    seed: int = 1
    clock: Callable[[], float] = time.monotonic
    calls: list[Call] = field(default_factory=list)
    admin_at_s: list[float] = field(default_factory=list)

    def __post_init__(self):
        self._random = random.Random(self.seed)
        self._numbers = itertools.count(1)

    # --- what a test asks --------------------------------------------------------------------------------------

    def count(self, model):
        """Return how many completions of a model have come."""
        return Counter(call.model for call in self.calls)[model]

    def credentials(self, path):
        """Return what has come as ``Authorization`` to paths that begin so."""
        came = [one for one in self.received if one.path.startswith(path)]
        return {value for one in came for value in one.header("authorization")}

    def limits_of(self, model):
        """Return a model's limits."""
        if model not in self.limits:
            self.limits[model] = Limits(*(None if per is None else Limit(per) for per in (self.rpm, self.tpm)))
        return self.limits[model]

    # --- how it answers ----------------------------------------------------------------------------------------

    async def answer(self, reply):
        """Answer as OpenAI does."""
        path = reply.received.path
        if path.startswith("/v1/organization/"):
            await self._administer(reply)
        elif path != _CHAT:
            await super().answer(reply)
        elif f"Bearer {ADMIN_KEY}" in reply.received.header("authorization"):
            await reply.whole(401, JSON, wrong_key(self._shown(ADMIN_KEY)))
        else:
            await self._chat(reply)

    async def _chat(self, reply):
        model = reply.received.json["model"]
        call = Call(next(iter(reply.received.header("x-request-id")), ""), model, self.clock())
        self.calls.append(call)
        script = self.scripts[model].popleft() if self.scripts[model] else None
        if script is None:
            await self._limited(reply, call)
        else:
            call.status = None
            await script(reply)

    async def _limited(self, reply, call):
        limits, asked = self.limits_of(call.model), Asked.of(reply.received.json)
        at_once = self.charging.at_once(asked)
        refusal = limits.admit(call.at_s, at_once)
        fields = self._fields(limits, call)
        if refusal is not None:
            call.status = 429
            await self._refuse(reply, call, refusal, fields)
            return
        usage = self.drawn_usage(asked)
        call.usage, call.tokens = usage["total_tokens"], self.charging.in_the_end(asked, usage["total_tokens"])
        try:
            await complete(reply, usage, raw(fields), self.service_s)
        finally:
            limits.correct(self.clock(), call.tokens - at_once)

    def _fields(self, limits, call):
        told = limits.told(call.at_s, plain_seconds if self.azure else duration)
        told = self.altered.get(call.model, dict)(told)
        return {**told, "x-request-id": f"req_{next(self._numbers)}", "openai-version": "2020-10-01"}

    async def _refuse(self, reply, call, refusal, fields):
        if self.tells_wait and refusal.wait_s is not None:
            fields = {**fields, **waits(refusal.wait_s)}
        body = refused_by_azure(refusal) if self.azure else refused(refusal, call.model)
        await reply.whole(429, raw(fields) + JSON, body)

    def drawn_usage(self, asked):
        """Return the usage of an answer, at random where there is a mean to draw around."""
        if self.mean_output is None:
            return self.usage
        prompt = 8 + round(asked.characters / 4 * self._random.uniform(0.8, 1.25))
        lengths = [1 + int(self._random.expovariate(1 / self.mean_output)) for _ in range(asked.choices)]
        most = MODEL_MAXIMUM if asked.cap is None else asked.cap
        return usage_of(prompt, sum(min(length, most) for length in lengths))

    # --- the admin API -------------------------------------------------------------------------------------------

    async def _administer(self, reply):
        self.admin_at_s.append(self.clock())
        received, query = reply.received, parse_qs(reply.received.query)
        given = next(iter(received.header("authorization")), "").removeprefix("Bearer ")
        after = query.get("after", [""])[0]
        begin = next((i for i, row in enumerate(self.rows, 1) if row["id"] == after), 0)
        limit = int(query.get("limit", ["100"])[0])
        script = self.admin_scripts.get(begin // limit + 1)
        if given != ADMIN_KEY:
            await reply.whole(401, JSON, wrong_key(self._shown(given)))
        elif script is not None:
            await script(reply)
        elif received.path != f"/v1/organization/projects/{PROJECT}/rate_limits":
            project = received.path.split("/")[4]
            missing = {"code": 404, "message": f"The project {project} was not found"}
            await reply.whole(404, JSON, json.dumps(missing).encode())
        else:
            await reply.whole(200, JSON, json.dumps(_page(self.rows, begin, limit)).encode())

    def _shown(self, key):
        return masked(key) if self.masks else key


def _page(rows, begin, limit):
    """Return a page of a list."""
    page = rows[begin : begin + limit]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    more = begin + limit < len(rows)
    return {"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": more}
