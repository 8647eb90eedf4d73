"""Whether a candidate does what it is measured for: one call looked at closely, and the books afterwards."""

import json
import time

from benchmarks.gateway.calls import DRAINED, answer, body, identity
from benchmarks.gateway.rows import TOKENGUARDS, metrics

USAGE = 240
"""What the provider says that each of its answers took, in tokens."""
QUIET_S = 10


def check(row, load, server, upstream_port):
    """Call once, and compare the answer with the provider's own, byte for byte."""
    content = body(load.model, load.stream)
    before = metrics(server) if row in TOKENGUARDS else {}
    if load.users == 0:
        status, told = answer(server.port, identity(0)._replace(user=DRAINED), content)
        if row not in TOKENGUARDS:  # nginx lets the first one of a minute pass
            status, told = answer(server.port, identity(0)._replace(user=DRAINED), content)
        assert status == 429, f"{row}: a call that should be refused was answered {status}: {told}"
        return
    status, told = answer(server.port, identity(0), content)
    assert status == 200, f"{row}: {status} {told}"
    expected = answer(upstream_port, identity(0), content)[1]
    assert told == expected, f"{row}: not the provider's answer, but {told}"
    if not load.stream:
        assert json.loads(told)["usage"]["total_tokens"] == USAGE, told
    if row in TOKENGUARDS:
        settled = quiet(row, server)["tokenguard_tokens_settled_total"] - before["tokenguard_tokens_settled_total"]
        assert settled == USAGE, f"{row}: a call was charged {settled:.0f} tokens, and took {USAGE}"


def quiet(row, server):
    """Wait until no call is under way, and return the counters; what was reserved must be accounted for."""
    until_s = time.monotonic() + QUIET_S
    while True:
        seen = metrics(server)
        under_way = seen["tokenguard_reservations_open"] + seen["tokenguard_calls_in_flight"]
        if under_way == 0:
            break
        assert time.monotonic() < until_s, f"{row}: {under_way:.0f} calls or reservations are left open"
        time.sleep(0.05)
    reserved, overrun, settled, refunded = (
        seen[f"tokenguard_tokens_{what}_total"] for what in ("reserved", "overrun", "settled", "refunded")
    )
    assert reserved + overrun == settled + refunded, (
        f"{row}: {reserved} + {overrun} != {settled} + {refunded} tokens"
    )
    return seen
