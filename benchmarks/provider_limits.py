"""What a provider with limits of its own sees of an overload, and how much of what it grants is used.

Usage: python -m benchmarks.provider_limits [load] [OPTIONS]    three times the limit is offered
       python -m benchmarks.provider_limits nodes [OPTIONS]     one 429 is to stop three nodes on one Redis

**The share that is used**: of the binding meter, over the time from the fifth second to the end, what the
provider's own bucket was charged by calls that it let through, divided by what it had to give to us:

    level at the fifth second + what has flowed in since - what others took meanwhile

What is still in the bucket at the end counts as not used; so does what it takes for requests that it refuses.
"""

import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import click
import httpx

from benchmarks import gate
from benchmarks.limited_provider import Callers, provider, why
from tests.e2e.conftest import OUR_KEY, running_workers
from tests.e2e.limited_openai import LimitedOpenAI
from tests.provider_limit import CHARGING, Asked, Limit, Limits, Window

MODEL = "gpt-4o"
OVERLOAD = 3
SETTLED_S = 5
"""How long TokenGuard may take to find the limits."""
MOST_REFUSED, LEAST_USED = 0.01, 0.9
UNLIMITED = {"CAP_GLOBAL": "unlimited", "CAP_TEAM": "unlimited", "CAP_USER": "unlimited"}
OTHERS_CALL = 400
"""How many tokens somebody else takes at a time."""
_CAPS = (None, None, None, 50, 200, 600)
_WORDS = "Summarise the following note in one sentence, and name whoever has to act on it. "
_FAR = 1000
"""How many times as much as is offered the meter grants that does not bind."""


class Books(NamedTuple):
    """What the provider has counted so far of the binding meter, and the calls that came."""

    now_s: float
    level: float
    given: float
    charged: int
    others: float
    calls: list


def limited(kind, requests, tokens, charging, seed, **more):
    """Make the provider; its limits are of a kind, such as ``Limit``."""
    limits = {MODEL: Limits(kind(*requests), kind(*tokens))}
    return LimitedOpenAI(
        limits=limits, charging=CHARGING[charging], azure=charging == "azure", mean_output=120, seed=seed, **more
    )


def books(meter, fake):
    """Return the provider's books."""
    limit, now_s = getattr(fake.limits[MODEL], meter), fake.clock()
    level = float(limit.level(now_s))
    given = float(limit.given(now_s))
    return Books(now_s, level, given, limit.charged, float(limit.taken_by_others), list(fake.calls))


def lower(meter, share, fake):
    """Leave only a share in a bucket."""
    limit = getattr(fake.limits[MODEL], meter)
    limit.waste(fake.clock(), round(limit.limit * (1 - share)))


def drawn(rng):
    """Return a call: a short text or a long one, with a cap or without, streamed or not."""
    characters = min(8000, round(rng.lognormvariate(6, 1)))
    text = (_WORDS * (characters // len(_WORDS) + 1))[:characters]
    cap = rng.choice(_CAPS)
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "stream": rng.random() < 0.5}
    return body if cap is None else {**body, "max_tokens": cap}


def mean_charge(charging, seed):
    """Return how many tokens a call is charged on average."""
    rng, fake = random.Random(seed), LimitedOpenAI(mean_output=120, seed=seed)
    asked = [Asked.of(drawn(rng)) for _ in range(5000)]
    charge = CHARGING[charging].in_the_end
    return sum(charge(one, fake.drawn_usage(one)["total_tokens"]) for one in asked) / len(asked)


async def offer(port, rate, seconds, seed, steady):
    """Call at a rate, whatever becomes of the calls before; return the answers."""
    rng, callers, answers = random.Random(seed), Callers(), []
    loop = asyncio.get_running_loop()
    begin, at_s = loop.time(), 0.0
    async with asyncio.TaskGroup() as group:
        for number in count():
            at_s += 1 / rate if steady else rng.expovariate(rate)
            if at_s > seconds:
                break
            await asyncio.sleep(begin + at_s - loop.time())
            who = rng.randrange(200)
            call = callers.call(
                port, f"user-{who}", drawn(rng), f"call-{number}", **{"x-team-id": f"t-{who % 20}"}
            )
            answers.append(group.create_task(call))
    callers.close()
    return [task.result() for task in answers]


async def watched(port, upstream, binding, rate, seconds, seed, steady):
    """Offer the load; return the answers, and the books after the fifth second and at the end."""
    offering = asyncio.create_task(offer(port, rate, seconds, seed, steady))
    await asyncio.sleep(SETTLED_S)
    settled = await asyncio.to_thread(upstream.ask, partial(books, binding))
    await asyncio.sleep(seconds - SETTLED_S)
    ended = await asyncio.to_thread(upstream.ask, partial(books, binding))
    return await offering, settled, ended


def set_by_hand(server, rpm, tpm):
    """Set the provider's limits as budgets, for comparison with those that are learned."""
    for meter, limit in (("requests", rpm), ("tokens", tpm)):
        server.set_budget("global", "*", limit, limit / 60, meter=meter, model=MODEL)


def report(answers, settled, ended):
    """Print what came of it; return whether both targets are met."""
    first = len(settled.calls)
    late = ended.calls[first:]
    refused = sum(call.status == 429 for call in ended.calls)
    refused_late = sum(call.status == 429 for call in late)
    others = ended.others - settled.others
    had = settled.level + (ended.given - settled.given) - others
    used = ended.charged - settled.charged
    print(f"{'calls offered':36}{len(answers)}")
    print(f"{'forwarded to the provider':36}{len(ended.calls)}")
    print(f"{'the provider refused, in all':36}{refused}")
    met = [
        target(f"… after {SETTLED_S} s", refused_late, len(late), "<", MOST_REFUSED),
        target(f"used of what it granted after {SETTLED_S} s", used, had, ">=", LEAST_USED),
    ]
    print(f"{'level then, and at the end':36}{settled.level:.0f}, {ended.level:.0f}; others took {others:.0f}")
    statuses = Counter(answer.status if answer else "broken off" for answer in answers)
    print(f"{'answers':36}{', '.join(f'{number} x {status}' for status, number in statuses.items())}")
    for reason, number in Counter(why(one) for one in answers if one and one.status == 429).most_common():
        print(f"  {number:7} x 429: {reason}")
    return all(met)


def target(name, part, whole, asked, bound):
    """Print a share beside what was asked of it; return whether it is met."""
    share = part / whole if whole > 0 else 0.0
    met = share < bound if asked == "<" else share >= bound
    verdict = "met" if met else "NOT MET"
    print(f"{name:36}{part:.0f} of {whole:.0f}: {share:.2%}; asked for is {asked} {bound:.0%}: {verdict}")
    return met


@click.group(invoke_without_command=True)
@click.pass_context
def main(context):
    """Measure how a provider's own limits are kept to."""
    if context.invoked_subcommand is None:
        context.invoke(load)


@main.command()
@click.option("--seconds", type=int, help="60; with --windows 115, so that it ends just before a window does.")
@click.option("--rpm", type=int, help="Requests a minute; 1200, or far more than is offered where tokens bind.")
@click.option("--tpm", type=int, help="Tokens a minute; 300000, or far more than is offered where requests bind.")
@click.option("--binding", type=click.Choice(["requests", "tokens"]), default="tokens", show_default=True)
@click.option("--charging", type=click.Choice(list(CHARGING)), default="openai", show_default=True)
@click.option("--others", default=0.0, help="The share of the rate that somebody else uses, all the time.")
@click.option("--level", default=1.0, help="How full the provider's bucket is at first.")
@click.option(
    "--service", "service_s", default=0.3, show_default=True, help="How long an answer takes, in seconds."
)
@click.option(
    "--windows", is_flag=True, help="The provider counts minute by minute, and has no bucket that refills."
)
@click.option("--steady", is_flag=True, help="Arrivals at equal distances instead of at random.")
@click.option("--by-hand", is_flag=True, help="Set the limits as budgets, instead of having them learned.")
@click.option("--workers", default=1, show_default=True)
@click.option("--seed", default=1, show_default=True)
def load(seconds, rpm, tpm, binding, charging, others, level, service_s, windows, steady, by_hand, workers, seed):
    """Offer three times what the provider grants, from callers who do not retry."""
    seconds = seconds or (115 if windows else 60)
    mean = mean_charge(charging, seed)
    if binding == "tokens":
        tpm = tpm or 300_000
        rate = OVERLOAD * tpm / 60 / mean
        rpm = rpm or round(rate * _FAR)
    else:
        rpm = rpm or 1200
        rate = OVERLOAD * rpm / 60
        tpm = tpm or round(rate * mean * _FAR)
    per_s = (rpm if binding == "requests" else tpm) / 60
    drains = {meter: round(others * per_s) if meter == binding else 0 for meter in ("requests", "tokens")}
    limits = (rpm, 60, drains["requests"], 1), (tpm, 60, drains["tokens"], OTHERS_CALL)
    settings = f"{workers} worker(s), seed {seed}{', limits set by hand' if by_hand else ''}"
    print(
        f"{OVERLOAD} x {per_s * 60:.0f} {binding} a minute are {rate:.1f} calls a second, "
        f"{mean:.0f} tokens each as {charging} charges; {settings}"
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        provider(
            partial(limited, Window if windows else Limit, *limits, charging, seed, service_s=service_s)
        ) as upstream,
        running_workers(
            Path(folder), workers, OPENAI_API_KEY=OUR_KEY, OPENAI_BASE_URL=upstream.url, **UNLIMITED
        ) as server,
    ):
        upstream.ask(partial(lower, binding, level))
        if by_hand:
            set_by_hand(server, rpm, tpm)
        before = time.process_time()
        port = httpx.URL(server.url).port
        met = report(*asyncio.run(watched(port, upstream, binding, rate, seconds, seed, steady)))
        print(f"{'callers, of a core':36}{(time.process_time() - before) / seconds:.0%}")
        print(server.log, end="")
    sys.exit(not met)


main.add_command(gate.nodes)

if __name__ == "__main__":
    main()
