"""What it costs to observe a call: a guarded call without its I/O, with and without metrics and the log line.

The rows differ in who is told of the call, or in what becomes of it; the last one is a whole request through the
ASGI app, to set that against.
"""

import asyncio
import json
import logging
import os

import pytest

from tokenguard import logs
from tokenguard.api.call import Call, Guard
from tokenguard.asgi import create_app
from tokenguard.config import read_config
from tokenguard.demo import DemoUpstream
from tokenguard.engine import buckets
from tokenguard.estimate import Estimator
from tokenguard.exchange import Terms
from tokenguard.limiter import Limiter
from tokenguard.metrics import Metrics
from tokenguard.model import Identity
from tokenguard.plan import Plans
from tokenguard.providers.openai import read_chat

CALLS = 200
KINDS = ("GLOBAL", "TEAM", "ROLEGROUP", "ROLE", "USER")
CONFIG = read_config({f"CAP_{kind}": str(10**12) for kind in KINDS} | {f"RATE_{kind}": "1000" for kind in KINDS})
HEADERS = [
    (b"host", b"127.0.0.1:8000"),
    (b"accept", b"application/json"),
    (b"content-type", b"application/json"),
    (b"user-agent", b"OpenAI/Python 2.8.0"),
    (b"authorization", b"Bearer sk-callers"),
    (b"x-user-id", b"alice"),
    (b"x-team-id", b"search"),
    (b"x-role", b"developer"),
    (b"x-llm-rolegroup", b"staff"),
    (b"content-length", b"574"),
]
BODY = json.dumps({"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "word " * 100}]}).encode()
USAGE = {"prompt_tokens": 110, "completion_tokens": 150, "total_tokens": 260}
ANSWER = json.dumps({"choices": [{"message": {"content": "word " * 150}}], "usage": USAGE}).encode()
ANSWER_HEADERS = [
    (b"date", b"Tue, 25 Nov 2025 10:00:00 GMT"),
    (b"content-type", b"application/json"),
    (b"content-length", b"%d" % len(ANSWER)),
    (b"connection", b"keep-alive"),
    (b"access-control-expose-headers", b"X-Request-ID"),
    (b"openai-organization", b"acme"),
    (b"openai-processing-ms", b"412"),
    (b"openai-version", b"2020-10-01"),
    (b"x-request-id", b"req_879ddf43"),
    (b"x-ratelimit-limit-requests", b"10000"),
    (b"x-ratelimit-limit-tokens", b"200000"),
    (b"x-ratelimit-remaining-requests", b"9999"),
    (b"x-ratelimit-reset-requests", b"8.64s"),
    (b"server", b"cloudflare"),
]
REQUEST_ID = "879ddf438a447a1be893ab5dfb29bfc5"

pytestmark = pytest.mark.benchmark(group="observing a call")


def _count_nothing(*_):
    pass


class Unobserved(Metrics):
    """Metrics that count nothing."""

    began = admitted = upstream_answered = settled = ended = _count_nothing


@pytest.fixture
def nowhere():
    """Lead log lines of calls to a file that keeps nothing, but is written to."""
    logger = logging.getLogger("tokenguard.calls")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    with open(os.devnull, "w") as stream:  # noqa: PTH123 - a device

        def lead(formatter):
            handler = logging.StreamHandler(stream)
            handler.setFormatter(formatter)
            logger.addHandler(handler)

        yield lead
        logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


def measure(benchmark, name, work):
    benchmark.name = name
    benchmark.extra_info["calls"] = CALLS
    work()
    benchmark(work)


def guard_of(backend, metrics, log):
    """Return what guards calls."""
    limiter = Limiter(backend, Plans(backend, CONFIG.defaults))
    terms = Terms([(b"authorization", b"Bearer sk-ours")], Estimator())
    return Guard(limiter, terms, metrics(backend), log, 2**20, 60.0)


def calls(metrics, log):
    """Return what makes ``CALLS`` calls, one after the other."""
    guard = guard_of(buckets(CONFIG), metrics, log)

    def work():
        for _ in range(CALLS):
            call = Call(guard, REQUEST_ID)
            call.begin(HEADERS, BODY)
            call.answered(200, ANSWER_HEADERS)
            call.feed(ANSWER)
            call.over()

    return work


def refusals():
    """Return what makes ``CALLS`` calls of somebody who has nothing left, whose answers are written."""
    guard = guard_of(buckets(CONFIG), Metrics, None)
    alice = Identity("alice", "search", "developer", "staff")
    guard.limiter.settle(guard.limiter.reserve(alice, "gpt-4o-mini", 0, 10), 2 * 10**12)

    def work():
        for _ in range(CALLS):
            call = Call(guard, REQUEST_ID)
            answer = call.begin(HEADERS, BODY)
            assert answer.status == 429
            call.over()

    return work


def test_unobserved(benchmark):
    measure(benchmark, "baseline: a call, unobserved", calls(Unobserved, None))


def test_metrics(benchmark):
    measure(benchmark, "a call with metrics", calls(Metrics, None))


def test_refused(benchmark):
    measure(benchmark, "a call that is refused", refusals())


@pytest.mark.parametrize("formatter", [logs.TextFormatter, logs.JsonFormatter])
def test_log_line(benchmark, nowhere, formatter):
    nowhere(formatter())
    shown = "text" if formatter is logs.TextFormatter else "JSON"
    measure(benchmark, f"a call with metrics and a log line, {shown}", calls(Metrics, logs.log_call))


def test_whole_request(benchmark):
    app = create_app(CONFIG, DemoUpstream())
    path = "/v1/chat/completions"
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": HEADERS,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }

    async def receive():
        return {"type": "http.request", "body": BODY, "more_body": False}

    async def send(event):
        if event["type"] == "http.response.start":
            assert event["status"] == 200

    async def requests():
        for _ in range(CALLS):
            await app(dict(scope), receive, send)

    with asyncio.Runner() as runner:
        measure(benchmark, "a whole request through the ASGI app, demo upstream", lambda: runner.run(requests()))


# --- phase by phase -------------------------------------------------------------------------------------------


class Phases:
    """Calls that are led through one phase after the other, all of them together."""

    def __init__(self):
        backend = buckets(CONFIG)
        self.table = backend.table
        self.guard = guard_of(backend, Metrics, None)
        self.reserve = self.guard.limiter.reserve

    def made(self):
        self.calls = [Call(self.guard, REQUEST_ID) for _ in range(CALLS)]

    def begun(self):
        self.asked = [call.exchange.begin(HEADERS, BODY) for call in self.calls]

    def decided(self):
        reserve = self.reserve
        self.found = [reserve(*asked) for asked in self.asked]

    def reserved(self):
        for call, found in zip(self.calls, self.found, strict=True):
            call.reserved(found)

    def answered(self):
        for call in self.calls:
            call.answered(200, ANSWER_HEADERS)

    def fed(self):
        for call in self.calls:
            call.feed(ANSWER)

    def ended(self):
        for call in self.calls:
            call.over()


PHASES = {
    "made": "a call is made",
    "begun": "its request is read and estimated",
    "decided": "it is reserved for",
    "reserved": "its request goes on",
    "answered": "its answer's head",
    "fed": "its answer is read, and it is settled",
    "ended": "it is over",
}


def phase_by_phase(benchmark, name, setup, work):
    benchmark.group = "a call, phase by phase"
    benchmark.name = name
    benchmark.extra_info["calls"] = CALLS
    benchmark.pedantic(work, setup=setup, rounds=100, warmup_rounds=5)


@pytest.mark.parametrize("phase", PHASES)
def test_phase(benchmark, phase):
    phases = Phases()
    before = list(PHASES)[: list(PHASES).index(phase)]

    def setup():
        for earlier in before:
            getattr(phases, earlier)()

    phase_by_phase(benchmark, f"a call: {PHASES[phase]}", setup, getattr(phases, phase))


def test_table_alone(benchmark):
    phases = Phases()
    for phase in ("made", "begun", "decided"):
        getattr(phases, phase)()
    reservation = phases.found[0]
    table, handle, costs = phases.table, reservation.plan.handle, reservation.costs
    deltas = reservation.plan.deltas(costs, 260)

    def work():
        for _ in range(CALLS):
            table.reserve(handle, costs)
            table.settle(handle, deltas)

    phase_by_phase(benchmark, "baseline: the table's reserve + settle", lambda: None, work)


def test_request_is_read(benchmark):
    def work():
        for _ in range(CALLS):
            read_chat(BODY)

    phase_by_phase(benchmark, "baseline: the request's body is read", lambda: None, work)
