"""What is written of a refusal is, byte for byte, what plain Python makes of its decision, whoever refuses."""

import math
from fractions import Fraction

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.house import ALICE, MODEL, NOW_US, House, S, grant, named
from tests.strategies import properties
from tokenguard._bucket import BucketTable
from tokenguard._limit_fields import duration
from tokenguard.backends.memory import MemoryBackend
from tokenguard.errors import InvalidValue
from tokenguard.limiter import Limiter, Refusal
from tokenguard.model import NEVER_US, SCOPE_KINDS, BucketName, BucketState, Budget, Decision, Meter, Scope, Source
from tokenguard.plan import GATE_COST, Plan
from tokenguard.refusal import explain, refuse

OURS = "This is a TokenGuard budget, not a limit of the provider."
THEIRS = "This is the provider's own limit, which TokenGuard keeps calls within."

# --- the same in plain Python -------------------------------------------------------------------------------


def in_words(binding, wait_us):
    """Return the message."""
    (name, limit, level, cost, _, _) = binding
    state = f"limit {limit}, remaining {max(0, level)}, requested {cost}"
    if name.meter is Meter.GATE:
        text = (
            f"The provider asked to wait: calls of {name.model} are held back. "
            f"Please try again in {duration(wait_us)}."
        )
    elif cost > limit:
        text = f"Request too large for {name}: {state}. Waiting does not help: ask for fewer tokens."
    elif wait_us >= NEVER_US:
        text = f"Budget used up for {name}: {state}. It does not refill by itself."
    else:
        text = f"Rate limit reached for {name}: {state}. Please try again in {duration(wait_us)}."
    return f"{text} {OURS if name.source is None else THEIRS}"


def in_ms(wait_us):
    return None if wait_us >= NEVER_US else math.ceil(Fraction(wait_us, 1000))


def body_of(decision, wait_us):
    """Return the body."""
    meter = decision.binding.name.meter
    error = {
        "message": in_words(decision.binding, wait_us),
        "type": "requests" if meter is Meter.GATE else str(meter),
        "param": None,
        "code": "rate_limit_exceeded",
    }
    buckets = [
        {
            "scope": state.name.scope.kind,
            "id": state.name.scope.id,
            "meter": state.name.meter,
            "model": state.name.model,
            "source": state.name.source,
            "limit": state.limit,
            "remaining": state.remaining,
            "level": state.level,
            "requested": state.cost,
            "allowed": state.wait_us == 0,
            "retryAfterMs": in_ms(state.wait_us),
        }
        for state in decision.buckets
    ]
    tokenguard = {
        "scope": str(decision.binding.name.scope),
        "retryAfterMs": in_ms(decision.retry_after_us),
        "buckets": buckets,
    }
    return msgspec.json.encode({"error": error, "tokenguard": tokenguard}) + b"\n"


def headers_of(decision, wait_us):
    """Return the header fields."""
    headers = {"content-type": "application/json"}
    if wait_us < NEVER_US:
        headers["retry-after"] = max(1, math.ceil(Fraction(wait_us, S)))
        headers["retry-after-ms"] = in_ms(wait_us)
    if decision.retry_after_us > 60 * S:
        headers["x-should-retry"] = "false"
    shown = {decision.binding.name.meter: decision.binding}
    for meter in dict.fromkeys(state.name.meter for state in decision.buckets):
        tightest = min((s for s in decision.buckets if s.name.meter is meter), key=lambda state: state.level)
        shown.setdefault(meter, tightest)
    for meter, state in shown.items():
        if meter is not Meter.GATE:
            headers[f"x-ratelimit-limit-{meter}"] = state.limit
            headers[f"x-ratelimit-remaining-{meter}"] = state.remaining
            if state.full_in_us < NEVER_US:
                headers[f"x-ratelimit-reset-{meter}"] = duration(state.full_in_us)
    return [(name.encode(), str(value).encode()) for name, value in headers.items()]


def check(refused, decision, jitter):
    """See to it that a refusal is written as plain Python makes it of its decision."""
    wait_us = decision.retry_after_us
    if S < wait_us < NEVER_US:
        longest_us = 60_000_000 if wait_us <= 60_000_000 else NEVER_US - 1
        wait_us = min(wait_us + int(wait_us * 0.1 * jitter), longest_us)

    answer = refuse(refused, jitter)

    assert answer.status == 429
    assert answer.body == body_of(decision, wait_us)
    assert answer.headers == headers_of(decision, wait_us)
    assert answer.block == b"".join([b"%b: %b\r\n" % field for field in answer.headers])


# --- whatever a decision says -------------------------------------------------------------------------------

texts = st.text(
    st.sampled_from('a:" \\/<>\x00\x01\b\t\n\f\r\x1f\x7f\x80\x9fé日\u2028\U0001f600'), max_size=12
) | st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
names = st.builds(
    BucketName,
    st.builds(Scope, st.sampled_from(SCOPE_KINDS), texts),
    st.sampled_from(Meter),
    st.none() | texts,
    st.none() | st.sampled_from(Source),
)
amounts = st.sampled_from([0, 1, 9, 10, 99, 100, 10**12, 2**63 - 1]) | st.integers(0, 10**6)
levels = amounts | st.sampled_from([-1, -10, -(10**13), -(2**63)]) | st.integers(-(10**6), 0)
waits_us = st.sampled_from([0, 1, 999, 1000, 1001, S, S + 1, 60 * S, 60 * S + 1, NEVER_US - 1, NEVER_US]) | (
    st.integers(0, 10**8) | st.integers(0, NEVER_US)
)
states = st.builds(BucketState, names, amounts, levels, amounts, waits_us, waits_us)
jitters = st.sampled_from([0.0, 1.0]) | st.floats(0, 1)


@properties
@given(st.lists(states, min_size=1, max_size=32), st.data(), jitters)
def test_refusal_is_written_as_plain_python_makes_it(buckets, data, jitter):
    """Any numbers, any names, 1 to 32 buckets: status, fields, body and words are those of the decision."""
    binding = data.draw(st.sampled_from(buckets))
    if data.draw(st.booleans()):
        binding = binding._replace(wait_us=data.draw(waits_us))  # as of one who waited in vain
    decision = Decision(False, binding.wait_us, binding, tuple(buckets))

    check(decision, decision, jitter)
    assert explain(decision) == in_words(binding, decision.retry_after_us)


@pytest.mark.parametrize("control", [chr(number) for number in (*range(32), 34, 92, 127, 128, 159, 0x2028)])
def test_every_control_character_is_told(control):
    """Ids hold none, but whatever they hold is escaped as everywhere else."""
    state = BucketState(named(f"user:a{control}b"), 10, 0, 1, S, S)
    decision = Decision(False, S, state, (state,))

    check(decision, decision, 0.0)
    assert control in explain(decision)


def test_more_buckets_than_a_plan_has_are_no_decision():
    """What no plan can have is not written."""
    state = BucketState(named("user:alice"), 10, 0, 1, S, S)

    with pytest.raises(ValueError, match="at most 32 buckets, got 33"):
        refuse(Decision(False, S, state, (state,) * 33), 0.0)


# --- what real buckets say ----------------------------------------------------------------------------------


class OnePlan:
    """Resolves whoever calls to one plan."""

    def __init__(self, plan):
        self.plan = plan

    def resolve(self, _identity, _model):
        return self.plan


budgets = st.tuples(names, st.integers(1, 10**12), st.sampled_from([0, 1, 5, 1 / 3, 10**4]), levels)


@properties
@given(
    st.lists(budgets, min_size=1, max_size=32, unique_by=lambda budget: budget[0].key),
    st.integers(0, 10**6),
    st.integers(0, 10**12),
    jitters,
)
def test_refusal_of_real_buckets_is_written_as_its_decision(drawn, prompt, more, jitter):
    """Gates, learned limits, debts and fixed grants among others: what buckets say is what is written."""
    table = BucketTable(64, seed=b"written")
    backend = MemoryBackend(table)
    held = []
    for name, capacity, rate, level in drawn:
        try:
            scale = grant(capacity, rate)
        except InvalidValue:
            scale = grant(capacity)
        held.append(Budget(name, scale))
        table.configure(name.key, scale, max(-scale.debt, min(level, scale.capacity)), NOW_US)
    limiter = Limiter(backend, OnePlan(Plan(held, backend.prepare(held))))
    refused = limiter.reserve(ALICE, MODEL, prompt, prompt + more, now_us=NOW_US)
    assume(isinstance(refused, Refusal))

    decision = refused.decision

    assert refused.binding == decision.binding.name
    check(refused, decision, jitter)
    check(refused, decision, jitter)  # what was made ready at the first is told by the second
    check(decision, decision, jitter)


def test_gate_is_told_by_its_model():
    """Of a gate the model is named, its type is requests, and there are no fields of its own."""
    house = House({"user": grant(10_000, rate=5)})
    gate = BucketName(Scope("global", "*"), Meter.GATE, MODEL, Source.GATE)
    house.backend.put(Budget(gate, grant(2 * GATE_COST, rate=GATE_COST)), -GATE_COST, NOW_US)

    refused = house.limiter.reserve(ALICE, MODEL, 0, 10, now_us=NOW_US)

    assert refused.binding == gate
    check(refused, refused.decision, 0.0)
    assert [name for name, _ in refuse(refused, 0.0).headers if b"x-ratelimit" in name] == [
        b"x-ratelimit-limit-tokens",
        b"x-ratelimit-remaining-tokens",
        b"x-ratelimit-reset-tokens",
    ]


def test_plan_that_never_refuses_makes_nothing_ready():
    """What refusals tell of names is made at a plan's first, and kept for the next."""
    house = House({"user": grant(100)})
    house.taken(60, prompt=60)
    plan = house.plans.resolve(ALICE, MODEL)
    assert plan.told is None

    refuse(house.limiter.reserve(ALICE, MODEL, 60, 60, now_us=NOW_US), 0.0)

    told = plan.told
    refuse(house.limiter.reserve(ALICE, MODEL, 60, 60, now_us=NOW_US), 0.0)
    assert len(told) == 1
    assert plan.told is told
