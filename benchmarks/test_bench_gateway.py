"""What a call through the whole server costs, beside one through the least that a proxy in Python does.

The short form of benchmarks/gateway, for the guard; README.md says what the rows mean.
"""

import subprocess
import time

import pytest

from benchmarks.gateway.books import check, quiet
from benchmarks.gateway.calls import body, write_requests
from benchmarks.gateway.loads import LOADS
from benchmarks.gateway.machine import LOAD, group_cpu_s, on
from benchmarks.gateway.programs import compiled, upstream
from benchmarks.gateway.rows import ROWS, TOKENGUARDS

CONNECTIONS = 8
ROUNDS = 9
TRIED = 200
"""How many calls show how quick a row is."""
ROUND_S = 0.2
"""How long a round is to take about."""

_leaders = []


def served_s():
    """Return the processor time that the server has taken so far; what others do meanwhile is not in it."""
    return group_cpu_s(_leaders[-1])


pytestmark = pytest.mark.benchmark(group="through the server", timer=served_s)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gateway")


@pytest.fixture(scope="module")
def provider(folder):
    with upstream(folder) as provider:
        yield provider


@pytest.fixture(scope="module")
def call(folder):
    """Return what makes some calls of a thousand users at a port."""
    load = LOADS["json"]
    program, requests = compiled("caller", folder), folder / "requests"
    size = write_requests(requests, load.users, body(load.model, load.stream))

    def call(port, calls):
        given = [program, str(port), str(CONNECTIONS), str(calls), str(size)]
        with requests.open("rb") as whole:
            subprocess.run(given, stdin=whole, check=True, preexec_fn=on(LOAD))

    return call


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ("splice", "baseline: bytes handed on by uvloop"),
        ("lane", "a call through TokenGuard"),
        ("falcon", "a call through TokenGuard, by way of Falcon"),
    ],
)
def test_call(benchmark, folder, provider, call, row, name):
    own = folder / row
    own.mkdir()
    with ROWS[row](own, provider) as server:
        check(row, LOADS["json"], server, provider[0])
        _leaders.append(server.leader)
        call(server.port, TRIED)
        began_s = time.perf_counter()
        call(server.port, TRIED)
        calls = max(TRIED // 2, round(TRIED * ROUND_S / (time.perf_counter() - began_s)))
        benchmark.name = name
        benchmark.extra_info["calls"] = calls
        benchmark.pedantic(call, (server.port, calls), rounds=ROUNDS)
        if row in TOKENGUARDS:
            quiet(row, server)
