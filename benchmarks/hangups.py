"""Thousands of callers who hang up at random moments: what is left behind?

Usage: python -m benchmarks.hangups [CALLS [SEED]]
"""

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx

from tests.e2e import storm
from tests.e2e.conftest import DRIVERS, OUR_KEY


def main(calls: int = 10_000, seed: int = 1) -> None:
    """Run the storm; an assertion fails if anything is left, or anybody is charged what they may not be."""
    with tempfile.TemporaryDirectory() as folder, storm.Upstream(seed) as upstream:
        url = f"http://127.0.0.1:{upstream.port}/v1"
        settings = {"OPENAI_API_KEY": OUR_KEY, "OPENAI_BASE_URL": url, **storm.SETTINGS}
        with (
            DRIVERS["uvicorn"](Path(folder), **settings) as server,
            httpx.Client(base_url=server.url, timeout=10) as client,
        ):
            callers = storm.rage(server, 1_000, seed, "first")
            before = storm.quiet(client)
            began = time.perf_counter()
            callers += storm.rage(server, calls, seed, "user")
            after = storm.quiet(client)
            seconds = time.perf_counter() - began
            charges = Counter(storm.account(client, upstream, callers))
            assert server.log == "", server.log
    assert after["tokenguard_reservations_open"] == 0
    print(f"{calls} hang-ups (after 1000 to warm up) in {seconds:.1f} s, seed {seed}")
    print(f"reservations left open: {after['tokenguard_reservations_open']:.0f}")
    print("levels: every user's is legal, and global's is the oracle's for the same calls")
    for charge, what in ((0, "nothing"), (storm.USED, "their usage"), (storm.RESERVED, "their reservation")):
        print(f"charged {what}: {charges.pop(charge, 0)}")
    print(f"charged what had been streamed: {charges.total()}")
    for name, unit in (("process_resident_memory_bytes", 2**20), ("process_open_fds", 1)):
        print(f"{name}: {before[name] / unit:.1f} before, {after[name] / unit:.1f} after")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
