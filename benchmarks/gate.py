"""One 429 of the provider's, and three nodes on one Redis that are to obey it: part of ``provider_limits``."""

import asyncio
import random
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click
import httpx

from benchmarks.limited_provider import Callers, provider, why
from tests.e2e.conftest import OUR_KEY, running
from tests.e2e.limited_openai import LimitedOpenAI, rate_limited
from tests.redis_servers import RedisServer

MODEL, OTHER = "gpt-4o", "gpt-4o-mini"
OTHERS = 6
"""Callers of the other model."""
WARM_S = 4
AFTER_S = 5
"""How long it is watched after it has opened again."""


class Called(NamedTuple):
    """A call as its caller saw it."""

    node: int
    model: str
    request_id: str
    began_s: float
    ended_s: float
    status: int
    reason: str


def generous(service_s):
    """Make a provider without limits."""
    return LimitedOpenAI(service_s=service_s, mean_output=20)


def refuse_one(wait_s, fake):
    """Have the next call of the model refused."""
    fake.scripts[MODEL].append(rate_limited(wait_s))


def calls_of(fake):
    return list(fake.calls)


def round_trip_s(redis):
    """Return what a round trip takes, the median of some."""
    with redis.client() as client:
        times = []
        for _ in range(500):
            begin = time.perf_counter()
            client.ping()
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


async def caller(number, model, ports, pause_s, until_s):
    """Call one node again and again, whatever it answers; return the calls."""
    node, callers, seen = number % len(ports), Callers(), []
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20}
    rng = random.Random(number)
    await asyncio.sleep(rng.uniform(0, pause_s))
    while (began_s := time.monotonic()) < until_s:
        request_id = f"{node}-{model}-{number}-{len(seen)}"
        answer = await callers.call(ports[node], f"user-{number}", body, request_id)
        status = answer.status if answer else 0
        reason = why(answer) if status == 429 else ""
        seen.append(Called(node, model, request_id, began_s, time.monotonic(), status, reason))
        await asyncio.sleep(rng.uniform(0.5, 1.5) * pause_s)
    callers.close()
    return seen


async def crowd(ports, upstream, callers, pause_s, wait_s):
    """Let them call; once they are warm, the provider refuses one call. Return what they saw."""
    until_s = time.monotonic() + WARM_S + 1.5 * wait_s + AFTER_S
    models = [MODEL] * callers + [OTHER] * OTHERS
    calls = [caller(number, model, ports, pause_s, until_s) for number, model in enumerate(models)]
    calling = asyncio.gather(*calls)
    await asyncio.sleep(WARM_S)
    await asyncio.to_thread(upstream.ask, partial(refuse_one, wait_s))
    return [one for each in await calling for one in each]


class Story:
    """What came of it, joined from what callers saw and what the provider saw.

    Attributes:
        refused_s: When the call came that the provider refused.
        told_s: When its caller was told.
        opened_s: When the next call of the model came that began later than that; None if none did.
    """

    def __init__(self, seen, came, rtt_s):
        self.seen, self.rtt_s = seen, rtt_s
        self.began_s = {one.request_id: one.began_s for one in seen}
        self.came = [call for call in came if call.model == MODEL and call.request_id in self.began_s]
        self.others = [call for call in came if call.model == OTHER]
        (refused,) = (call for call in came if call.status is None)
        self.refused_id, self.refused_s = refused.request_id, refused.at_s
        (self.told_s,) = (one.ended_s for one in seen if one.request_id == refused.request_id)
        later = [call.at_s for call in self.came if call.at_s > self.refused_s + 1]
        self.opened_s = min(later, default=None)
        self.end_s = self.opened_s or max(one.ended_s for one in seen)

    def slips(self, node):
        """Return when calls of a node began that came after the refused one, from when its caller was told."""
        came = [call for call in self.came if self.refused_s < call.at_s < self.end_s]
        return [
            self.began_s[call.request_id] - self.told_s for call in came if call.request_id.startswith(f"{node}-")
        ]

    def print_node(self, node):
        """Print how soon a node obeyed; return how many calls slipped through that began a round trip later."""
        slips = self.slips(node)
        late = sum(slip > self.rtt_s for slip in slips)
        own = [
            one.ended_s - self.refused_s
            for one in self.seen
            if (one.node, one.model, one.status) == (node, MODEL, 429) and one.request_id != self.refused_id
        ]
        latest = f"{max(slips) * 1000:8.1f} ms" if slips else "       none"
        first = f"{min(own) * 1000:8.1f} ms" if own else "   never"
        print(f"node {node}   refuses itself after {first}   came all the same {len(slips):4}   "
              f"the last began at {latest}   began a round trip later {late:4}")  # fmt: skip
        return late

    def rate(self, begin_s, seconds, calls=None):
        """Return how many calls a second came."""
        calls = self.came if calls is None else calls
        return sum(begin_s <= call.at_s < begin_s + seconds for call in calls) / seconds


def told(story, wait_s):
    """Print the story; return whether nothing slipped through and the other model was left alone."""
    print(f"the provider's 429 reached its caller, of node {story.refused_id[0]}, "
          f"{(story.told_s - story.refused_s) * 1000:.1f} ms after the call had come")  # fmt: skip
    late = sum(story.print_node(node) for node in sorted({one.node for one in story.seen}))
    spoiled = sum(one.status != 200 for one in story.seen if one.model == OTHER)
    before = story.rate(story.refused_s - 1, 1, story.others)
    during = story.rate(story.refused_s, min(wait_s, story.end_s - story.refused_s), story.others)
    print(f"the other model: {before:.0f} calls/s before, {during:.0f} meanwhile; {spoiled} not answered with 200")
    for reason in sorted({one.reason for one in story.seen if one.reason}):
        print(f"  {sum(one.reason == reason for one in story.seen):6} x 429: {reason}")
    usual = story.rate(story.refused_s - 1, 1)
    if story.opened_s is None or story.opened_s - story.refused_s < wait_s:
        print(f"NOT MET: it did not stay closed for {wait_s} s and open then")
        return False
    after_s = story.opened_s - story.refused_s
    print(f"open again {after_s:.2f} s after the refused call came; {usual:.0f} calls/s before it")
    tenths = [round(story.rate(story.opened_s + i / 10, 0.1) / 10) for i in range(10)]
    seconds = [round(story.rate(story.opened_s + i, 1)) for i in range(AFTER_S)]
    print(f"calls in each tenth of the first second: {tenths}; in each second: {seconds}")
    return late == 0 and spoiled == 0


@click.command()
@click.option("--wait", "wait_s", default=5, show_default=True, help="The provider's retry-after, in seconds.")
@click.option("--callers", default=50, show_default=True, help="Of the model that is refused.")
@click.option("--pause-ms", default=100, show_default=True, help="Between a caller's answer and its next call.")
@click.option(
    "--service", "service_s", default=0.02, show_default=True, help="How long an answer takes, in seconds."
)
def nodes(wait_s, callers, pause_ms, service_s):
    """Have the provider refuse one call, and see three nodes on one Redis obey."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        redis = stack.enter_context(RedisServer())
        upstream = stack.enter_context(provider(partial(generous, service_s)))
        settings = {f"CAP_{kind}": "unlimited" for kind in ("GLOBAL", "TEAM", "USER")}
        settings |= {"OPENAI_API_KEY": OUR_KEY, "OPENAI_BASE_URL": upstream.url, "REDIS_URL": redis.url}
        servers = [stack.enter_context(running(folder, "serve", **settings)) for _ in range(3)]
        ports = [httpx.URL(server.url).port for server in servers]
        idle_s = round_trip_s(redis)
        seen = asyncio.run(crowd(ports, upstream, callers, pause_ms / 1000, wait_s))
        print(f"{callers} callers of {MODEL}, {OTHERS} of {OTHER}; idle, Redis answers in {idle_s * 1e6:.0f} µs")
        met = told(Story(seen, upstream.ask(calls_of), idle_s), wait_s)
        for server in servers:
            print(server.log, end="")
    sys.exit(not met)
