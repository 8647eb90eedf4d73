"""A call as both drivers see it: settled once whatever happens, counted, and told of."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.house import House, grant, named
from tests.strategies import properties
from tokenguard.account import Outcome
from tokenguard.api.call import SETTLE_TRIES, Call, Guard
from tokenguard.errors import TableBusy, UpstreamError
from tokenguard.estimate import Estimator
from tokenguard.exchange import Terms
from tokenguard.limiter import Limiter
from tokenguard.metrics import Metrics
from tokenguard.model import Answer, Budget, Identity, UpstreamRequest

FULL = 10_000
PROMPT = 9
RESERVED = PROMPT + 256
CALLER = [(b"x-user-id", b"alice")]
JSON = [(b"content-type", b"application/json")]
BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Say hello"}]}).encode()
USAGE = {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}
ANSWER = json.dumps({"usage": USAGE}).encode()


class Busy:
    """A backend that is busy at its first settlements, and does what the one behind it does otherwise."""

    def __init__(self, backend, times):
        self._backend = backend
        self.times = times

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def settle(self, handle, deltas, now_us=None):
        if self.times:
            self.times -= 1
            raise TableBusy("the table is locked")
        return self._backend.settle(handle, deltas, now_us)


class Desk:
    """Calls of alice's over a fixed grant."""

    def __init__(self, busy=0):
        self.house = House({"user": grant(FULL)})
        backend = Busy(self.house.backend, busy)
        self.metrics = Metrics(backend)
        self.ended = []
        limiter = Limiter(backend, self.house.plans)
        self.guard = Guard(limiter, Terms([], Estimator()), self.metrics, self.ended.append, 2**20, 60.0)

    def call(self, body=BODY):
        call = Call(self.guard, "req-1")
        begun = call.begin(CALLER, body)
        return call, begun

    def seen(self, name):
        text = self.metrics.exposition(None)[1].decode()
        return float(re.search(rf"^tokenguard_{name} (\S+)$", text, re.MULTILINE)[1])

    def balanced(self):
        spent = self.seen("tokens_settled_total") + self.seen("tokens_refunded_total")
        return self.seen("tokens_reserved_total") + self.seen("tokens_overrun_total") == spent

    def level(self):
        (state,) = self.house.limiter.peek(Identity("alice"), "m")
        return state.level


def answered(call, body=ANSWER):
    call.answered(200, [*JSON, (b"content-length", b"%d" % len(body))])
    return call.feed(body)


def test_call_is_settled_before_its_last_byte_is_passed_on():
    """Once all announced bytes are there, the buckets are up to date, though the end has not been seen."""
    desk = Desk()
    call, begun = desk.call()
    assert isinstance(begun, UpstreamRequest)
    assert desk.seen("reservations_open") == 1
    assert answered(call) == ANSWER
    assert desk.seen("reservations_open") == 0
    assert (call.account.outcome, call.account.charged, call.account.usage_told) == (Outcome.SETTLED, 30, True)
    assert desk.level() == FULL - 30
    assert desk.balanced()


@pytest.mark.parametrize("times", range(1, SETTLE_TRIES))
def test_settling_is_tried_again_while_the_buckets_are_locked(times):
    """A lock that is not to be had at once costs nobody anything."""
    desk = Desk(busy=times)
    call, _ = desk.call()
    answered(call)
    assert desk.level() == FULL - 30
    assert desk.seen("settlements_lost_total") == 0


def test_reservation_stays_spent_if_the_buckets_stay_locked(caplog):
    """When all tries fail, the reservation is kept, which is said and counted; nothing is left open."""
    desk = Desk(busy=SETTLE_TRIES)
    call, _ = desk.call()
    answered(call)
    call.over()
    assert desk.level() == FULL - RESERVED
    assert (call.account.outcome, call.account.charged) == (Outcome.KEPT, RESERVED)
    assert desk.seen("settlements_lost_total") == 1
    assert desk.seen("reservations_open") == 0
    assert desk.balanced()
    assert "the reservation stays spent (request req-1)" in caplog.text


ENDINGS = {
    "finish": lambda call: call.finish(),
    "leave": lambda call: call.leave(),
    "over": lambda call: call.over(),
    "fail": lambda call: call.failed(UpstreamError("it broke off", sent=True)),
    "fail unsent": lambda call: call.failed(UpstreamError("no connection", sent=False)),
    "answer": answered,
    "answer half": lambda call: answered(call, ANSWER[:9]),
}


@given(st.lists(st.sampled_from(sorted(ENDINGS)), max_size=6), st.integers(0, SETTLE_TRIES + 1))
@properties
def test_call_is_settled_once_whichever_way_it_ends(endings, busy):
    """However often and in whatever order a call is ended, one ending counts, and the tokens add up."""
    desk = Desk(busy)
    call, _ = desk.call()
    for ending in endings:
        ENDINGS[ending](call)
    call.over()
    assert not call.account.open
    assert desk.seen("reservations_open") == desk.seen("calls_in_flight") == 0
    assert desk.balanced()
    assert desk.ended == [call.account]
    assert desk.level() == FULL - call.account.charged


def test_refused_and_invalid_calls_reserve_nothing():
    """A call that a budget refuses, or that cannot be read, leaves no reservation, and is told of all the same."""
    desk = Desk()
    desk.house.backend.put(Budget(named("user:alice"), grant(10)), level=0)
    refused, answer = desk.call()
    assert isinstance(answer, Answer)
    invalid, answer = desk.call(b"{")
    assert isinstance(answer, Answer)
    for call in (refused, invalid):
        call.over()
        assert (call.account.admitted, call.account.outcome) == (False, None)
    assert str(refused.account.refused_by) == "user:alice on tokens"
    assert desk.seen(r'refusals_total\{meter="tokens",scope="user"\}') == 1
    assert desk.seen("tokens_reserved_total") == 0


@pytest.mark.parametrize("odd", ["alice\n", "x" * 256, '"', "\u20ac"])
def test_no_label_comes_from_a_caller(odd):
    """Neither ids nor models nor paths become time series."""
    desk = Desk()
    call = Call(desk.guard, "req-1")
    call.begin(
        [(b"x-user-id", odd.encode()), (b"x-team-id", b"t")], json.dumps({"model": odd, "messages": []}).encode()
    )
    call.over()
    desk.metrics.answered(None, 404)
    text = desk.metrics.exposition("application/openmetrics-text")[1].decode()
    assert odd not in text.replace('"', "") or odd == '"'
    assert 'route="other",status="404"' in text
    assert text.endswith("# EOF\n")
