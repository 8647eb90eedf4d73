"""What it costs to observe a call: a guarded call without its I/O, with and without metrics and the log line.

The rows differ in who is told of the call; the last one is a whole request through the ASGI app, to set that
against.
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
from tokenguard.estimate import Estimator
from tokenguard.exchange import Terms
from tokenguard.limiter import Limiter
from tokenguard.metrics import Metrics
from tokenguard.plan import Plans
from tokenguard.wiring import buckets

CALLS = 200
CONFIG = read_config({"CAP_GLOBAL": "unlimited", "CAP_TEAM": str(10**12), "CAP_USER": str(10**12)})
HEADERS = [(b"x-user-id", b"alice"), (b"x-team-id", b"search"), (b"user-agent", b"OpenAI/Python")]
JSON = [(b"content-type", b"application/json")]
BODY = json.dumps({"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "word " * 100}]}).encode()
USAGE = {"prompt_tokens": 110, "completion_tokens": 150, "total_tokens": 260}
ANSWER = json.dumps({"choices": [{"message": {"content": "word " * 150}}], "usage": USAGE}).encode()

pytestmark = pytest.mark.benchmark(group="observing a call")


class Unobserved(Metrics):
    """Metrics that count nothing."""

    def began(self):
        pass

    def admitted(self, account):
        pass

    def upstream_answered(self, account):
        pass

    def settled(self, account):
        pass

    def ended(self, account):
        pass


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


def calls(metrics, log):
    """Return what makes ``CALLS`` calls, one after the other."""
    backend = buckets(CONFIG)
    limiter = Limiter(backend, Plans(backend, CONFIG.defaults))
    terms = Terms([(b"authorization", b"Bearer sk-ours")], Estimator())
    guard = Guard(limiter, terms, metrics(backend), log, 2**20, 60.0)

    def work():
        for _ in range(CALLS):
            call = Call(guard, "879ddf438a447a1be893ab5dfb29bfc5")
            call.begin(HEADERS, BODY)
            call.answered(200, JSON)
            call.exchange.feed(ANSWER)
            call.finish()
            call.over()

    return work


def test_unobserved(benchmark):
    measure(benchmark, "baseline: a call, unobserved", calls(Unobserved, None))


def test_metrics(benchmark):
    measure(benchmark, "a call with metrics", calls(Metrics, None))


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
