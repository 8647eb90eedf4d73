"""The scripts decide as the oracle and the table in memory do, to the unit, in Redis and in Valkey."""

import pytest
from hypothesis import settings
from hypothesis.stateful import invariant, run_state_machine_as_test

from tests.cases import CASES, walk
from tests.engines import RedisTable
from tests.golden import TIMELINES, read, replay
from tests.machine import EngineMachine
from tests.redis_servers import RedisServer, valkey_command
from tests.strategies import properties

EXACT = 2**53
"""The scripts count in doubles, which are exact up to here."""


@pytest.fixture(scope="module", params=["redis", "valkey"])
def client(request):
    """A client of a server of each kind."""
    command = valkey_command() if request.param == "valkey" else None
    with RedisServer(command=command) as server, server.client(decode_responses=False) as client:
        yield client


@pytest.mark.parametrize("sentence", CASES)
def test_one_bucket(client, sentence):
    """Each table of rows reads as the sentence above it."""
    walk(RedisTable(client), sentence)


@pytest.mark.parametrize("name", TIMELINES)
def test_golden_timeline(client, name):
    """What was recorded once is decided so still."""
    replay(read(name), RedisTable(client))


def test_random_machine(client):
    """Whatever may happen to buckets, the scripts and the oracle agree on all there is to see."""

    class RedisMachine(EngineMachine):
        def new_table(self, _seed):
            return RedisTable(client)

        def compare_tokens(self, counted, expected):
            # NOTE: no level is ever as large; the sum of what many buckets forgive may be, and is then rounded.
            assert counted == (expected if expected <= EXACT else pytest.approx(expected, rel=1e-14))

        @invariant()
        def floors_of_debt_agree(self):
            for key, bucket in self.oracle.buckets.items():
                assert self.table.debt(key) == bucket.terms.max_debt

        def teardown(self):
            if self.budgets:
                self.table.forget()

    run_state_machine_as_test(RedisMachine, settings=settings(properties, max_examples=80, stateful_step_count=40))
