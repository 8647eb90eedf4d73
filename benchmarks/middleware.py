"""Hello worlds in FastAPI under uvicorn, bare and guarded, in turns: what each answers and takes of its core.

README.md says what the rows mean. It exits with 1 if an answer was not what it should be.

Run: python -m benchmarks.middleware [seconds [rounds]]
"""

import random
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks.gateway.loads import Load
from benchmarks.gateway.programs import NotToBeHad
from benchmarks.gateway.report import table
from benchmarks.gateway.rows import uvicorn
from benchmarks.gateway.turns import Requests, call, measured
from benchmarks.test_bench_middleware import FIELDS

ROWS = {
    "bare": "fastapi",
    "ASGIGuard": "fastapi_guard",
    "slowapi's decorator": "slowapi_decorator",
    "slowapi's ASGI middleware": "slowapi_middleware",
}
"""What makes the app of each row in hello.py."""
LOAD = Load("a hello world", 64, tuple(ROWS), references=("bare", "slowapi's decorator"))
WARM_S = 1
"""How long a row is called before each turn."""


def request(user):
    """Return a user's request, one as long as the other."""
    fields = {**FIELDS, "x-user-id": f"user-{user:07}", "x-team-id": f"team-{user % 10}"}
    return "\r\n".join(["GET / HTTP/1.1", *map(": ".join, fields.items()), "", ""]).encode()


def write_requests(place):
    """Write a request of each user into a file, in a random order."""
    requests = [request(user) for user in range(LOAD.users)]
    random.Random(1).shuffle(requests)
    place.write_bytes(b"".join(requests))
    return Requests(place, len(requests[0]))


def main(seconds=2, rounds=8):
    """Let all have a turn in every round, and print the table; return what was wrong, or None."""
    seen = {row: [] for row in ROWS}
    order = list(ROWS)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        requests = write_requests(Path(folder, "requests"))
        servers = {}
        for row, app in ROWS.items():
            own = tempfile.mkdtemp(dir=folder)
            servers[row] = stack.enter_context(uvicorn(own, f"benchmarks.hello:{app}"))
        for number in range(rounds):
            for row in order[number % len(order) :] + order[: number % len(order)]:
                call(LOAD, requests, servers[row].port, WARM_S)
                seen[row].append(measured(LOAD, requests, servers[row], (), seconds))
    print(table(seen, LOAD.references, added=False))
    errors = sum(turn.errors for turns in seen.values() for turn in turns)
    return f"{errors} answers were not what they should be" if errors else None


if __name__ == "__main__":
    try:
        wrong = main(*map(int, sys.argv[1:]))
    except NotToBeHad as error:
        wrong = str(error)
    sys.exit(wrong)
