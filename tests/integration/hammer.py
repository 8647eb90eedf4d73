"""One node that is hammered: 64 callers of one user and one team, for some seconds.

Run: python -m tests.integration.hammer URL CAPACITY RATE SECONDS
It prints how many calls were allowed and refused, and the tokens reserved, given back, and used beyond that.
"""

import asyncio
import random
import sys
import time
from fractions import Fraction

from tests.house import grant
from tests.nodes import Node
from tokenguard.limiter import Reservation

CALLERS = 64


async def caller(node, until_s, told):
    """Reserve, take a provider's time, settle to less, to more, or to nothing; again and again."""
    while time.monotonic() < until_s:
        tokens = random.randint(1, 400)
        reserved = await node.reserve_soon(tokens, team="red")
        if not isinstance(reserved, Reservation):
            told["refused"] += 1
            await asyncio.sleep(random.uniform(0, 0.01))
            continue
        told["allowed"] += 1
        told["reserved"] += tokens
        await asyncio.sleep(random.uniform(0, 0.01))
        used = random.choice([0, random.randint(0, tokens), tokens, tokens + random.randint(0, 200)])
        told["refunded"] += max(0, tokens - used)
        told["overrun"] += max(0, used - tokens)
        await node.limiter.settle_soon(reserved, used)


async def main(url, capacity, rate, seconds):
    """Hammer, and tell."""
    told = dict.fromkeys(("allowed", "refused", "reserved", "refunded", "overrun"), 0)
    with Node(url, dict.fromkeys(("team", "user"), grant(capacity, rate))) as node:
        await node.backend.start()
        until_s = time.monotonic() + seconds
        await asyncio.gather(*[caller(node, until_s, told) for _ in range(CALLERS)])
        await node.backend.stop()
    print(*told.values())


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), Fraction(sys.argv[3]), float(sys.argv[4])))
