"""Which buckets a call must pass, and what it asks of each."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.house import ALICE, MODEL, House, grant, named
from tests.mirror import learned
from tests.strategies import properties
from tokenguard.model import SCOPE_KINDS, SETTABLE_METERS, Budget, Identity, Meter
from tokenguard.plan import MAX_PLANS, Plan, Plans
from tokenguard.provider_limits.gates import gate_of

EVERYBODY = {kind: grant(1000 * (5 - level)) for level, kind in enumerate(SCOPE_KINDS)}


def path(house, who=ALICE, model=MODEL):
    """Return the names of the buckets that a call must pass, in order."""
    return [str(budget.name) for budget in house.plans.resolve(who, model).budgets]


# --- which buckets ------------------------------------------------------------------------------------------


def test_path_leads_from_global_down_to_the_user():
    """A call passes global, team, rolegroup, role and user, in this order, however budgets came."""
    house = House()
    for scope in ("user:alice", "role:dev", "global", "rolegroup:staff", "team:red"):
        house.set(scope, grant(10))

    assert path(house) == [
        "global:* on tokens",
        "team:red on tokens",
        "rolegroup:staff on tokens",
        "role:dev on tokens",
        "user:alice on tokens",
    ]


def test_defaults_make_the_same_path():
    """Where no budget was set, the defaults of every level limit the call, each id on its own."""
    house = House(EVERYBODY)

    assert [budget.scale.capacity for budget in house.plans.resolve(ALICE, MODEL).budgets] == [
        5000,
        4000,
        3000,
        2000,
        1000,
    ]


@pytest.mark.parametrize(
    ("who", "expected"),
    [
        (Identity("bob"), ["global:*", "user:bob"]),
        (Identity("bob", team="red"), ["global:*", "team:red", "user:bob"]),
        (Identity("bob", role="dev"), ["global:*", "role:dev", "user:bob"]),
        (Identity("bob", rolegroup="staff"), ["global:*", "rolegroup:staff", "user:bob"]),
        (
            Identity("bob", "red", "dev", "staff"),
            ["global:*", "team:red", "rolegroup:staff", "role:dev", "user:bob"],
        ),
    ],
)
def test_level_that_a_caller_is_not_on_is_not_on_the_path(who, expected):
    """A caller without a team, role or rolegroup passes no such bucket."""
    assert path(House(EVERYBODY), who) == [f"{scope} on tokens" for scope in expected]


def test_scope_without_default_or_budget_is_absent():
    """Unlimited scopes are not on the path: they cost nothing."""
    house = House({"user": grant(10)})

    assert path(house) == ["user:alice on tokens"]
    assert path(House()) == []


def test_budget_takes_the_place_of_the_default():
    """A budget of one's own replaces the default of that id, and of no other."""
    house = House(EVERYBODY)
    house.set("user:alice", grant(7))

    alice = house.plans.resolve(ALICE, MODEL).budgets[-1]
    bob = house.plans.resolve(ALICE._replace(user="bob"), MODEL).budgets[-1]

    assert (alice.scale.capacity, bob.scale.capacity) == (7, 1000)


def test_meters_stand_beside_each_other():
    """A budget on requests joins that on tokens, on the same level."""
    house = House({"user": grant(10), "global": grant(100)})
    house.set("user:alice", grant(3), Meter.REQUESTS)
    house.set("global", grant(30), Meter.REQUESTS)

    assert path(house) == [
        "global:* on tokens",
        "global:* on requests",
        "user:alice on tokens",
        "user:alice on requests",
    ]


def test_budget_of_one_model_joins_that_of_all():
    """A budget on a model limits calls of that model, beside the budget over all models."""
    house = House({"user": grant(10)})
    house.set("user:alice", grant(5), model=MODEL)
    house.set("user:alice", grant(2), Meter.REQUESTS, model=MODEL)
    house.set("user:alice", grant(1), model="other")

    assert path(house) == [
        "user:alice on tokens",
        f"user:alice on tokens of {MODEL}",
        f"user:alice on requests of {MODEL}",
    ]
    assert path(house, model="another") == ["user:alice on tokens"]


def test_what_was_learned_of_the_provider_binds_nobody_where_it_is_not_heeded():
    """Neither a limit nor a gate that an earlier process has left: nobody would see to them anymore."""
    house = House()
    house.set("global", grant(10))
    house.backend.put(learned(60))
    house.backend.put(Budget(gate_of(MODEL), grant(1)))
    assert len(path(house)) == 3

    house.plans = Plans(house.backend, {}, heeds_provider=False)
    assert path(house) == ["global:* on tokens"]


def test_longest_path_fits_the_table():
    """Every level with every meter, for all models and for one, is one plan."""
    house = House(buckets=64)
    for scope in ("user:alice", "role:dev", "global", "rolegroup:staff", "team:red"):
        for meter in SETTABLE_METERS:
            for model in (None, MODEL):
                house.set(scope, grant(10), meter, model)

    assert len(path(house)) == 20
    assert house.taken(1).decision.allowed


def test_ids_are_case_sensitive_and_kinds_do_not_mix():
    """Equal ids on different levels, and ids that differ by case, are different buckets."""
    house = House()
    house.set("user:x", grant(10))

    assert path(house, Identity("x")) == ["user:x on tokens"]
    assert path(house, Identity("X", team="x", role="x", rolegroup="x")) == []


# --- remembering --------------------------------------------------------------------------------------------


def test_plan_is_resolved_once():
    """The same caller and model get the same plan, and others another."""
    house = House(EVERYBODY)
    plan = house.plans.resolve(ALICE, MODEL)

    assert house.plans.resolve(Identity("alice", team="red", role="dev", rolegroup="staff"), MODEL) is plan
    assert house.plans.resolve(ALICE, "other") is not plan
    assert house.plans.resolve(ALICE._replace(user="bob"), MODEL) is not plan


def test_only_so_many_plans_are_remembered():
    """Plans of more callers than are remembered do not fill the memory."""
    house = House({"user": grant(10)})
    for number in range(MAX_PLANS + 100):
        house.plans.resolve(Identity(f"user-{number}"), MODEL)

    assert house.plans.resolve.cache_info().currsize == MAX_PLANS


def test_forgetting_resolves_anew():
    """After forgetting, a plan is made of what the budgets are now."""
    house = House()
    house.plans.resolve(ALICE, MODEL)
    house.set("user:alice", grant(7))

    house.plans.forget()

    assert path(house) == ["user:alice on tokens"]


# --- what a call asks ---------------------------------------------------------------------------------------

capacities = st.integers(1, 30) | st.integers(1, 10**12)
amounts = st.integers(0, 100) | st.integers(0, 10**13)


@st.composite
def calls(draw):
    """Draw some capacities, a prompt and a total, often near each other."""
    held = draw(st.lists(capacities, min_size=1, max_size=5))
    near = st.sampled_from(held).flatmap(lambda c: st.integers(max(0, c // 2 - 2), 2 * c + 2))
    prompt = draw(amounts | near)
    return held, prompt, prompt + draw(amounts | near)


def plan_of(held, meter=Meter.TOKENS):
    """Return a plan over budgets of the given capacities."""
    return Plan([Budget(named(f"user:{i}", meter), grant(c, 0, 0)) for i, c in enumerate(held)], handle=None)


@properties
@given(calls())
def test_cost_can_be_met_unless_half_the_prompt_exceeds_the_bucket(call):
    """No bucket is asked for more than it holds, unless even half the prompt's estimate does not fit."""
    held, prompt, total = call

    for capacity, cost in zip(held, plan_of(held).costs(prompt, total), strict=True):
        if prompt > 2 * capacity:
            assert cost > capacity
        else:
            assert cost <= capacity


@properties
@given(calls())
def test_cost_is_the_estimate_capped_at_the_prompt_or_half_a_bucket(call):
    """Each bucket is asked for min(estimate, max(prompt, C/2), C), C/2 rounded up."""
    held, prompt, total = call
    assume(all(prompt <= 2 * capacity for capacity in held))

    assert plan_of(held).costs(prompt, total) == tuple(
        min(total, max(prompt, -(-capacity // 2)), capacity) for capacity in held
    )


@properties
@given(calls())
def test_plan_of_many_costs_what_each_bucket_costs_alone(call):
    """The short way for small calls gives the same costs as the long one."""
    held, prompt, total = call

    assert plan_of(held).costs(prompt, total) == tuple(
        cost for capacity in held for cost in plan_of([capacity]).costs(prompt, total)
    )


@properties
@given(calls())
def test_small_call_costs_its_estimate(call):
    """A call of at most half of the smallest bucket is asked for as it is."""
    held, _, _ = call
    total = -(-min(held) // 2)

    assert plan_of(held).costs(0, total) == (total,) * len(held)
    assert plan_of(held).costs(total, total) == (total,) * len(held)


@pytest.mark.parametrize(
    ("capacity", "prompt", "total", "cost"),
    [
        (1000, 10, 300, 300),
        (1000, 10, 500, 500),
        (1000, 10, 501, 500),
        (1000, 10, 5000, 500),
        (1000, 700, 5000, 700),
        (1000, 1000, 5000, 1000),
        (1000, 1001, 5000, 1000),
        (1000, 2000, 5000, 1000),
        (1000, 2001, 5000, 2001),
        (1001, 10, 5000, 501),
        (1, 0, 1, 1),
        (1, 2, 2, 1),
        (1, 3, 3, 3),
        (1, 0, 0, 0),
    ],
)
def test_cost_by_example(capacity, prompt, total, cost):
    """The rule in numbers: the estimate, then half the bucket, then the prompt, then all of it, then never."""
    assert plan_of([capacity]).costs(prompt, total) == (cost,)


@properties
@given(calls(), st.integers(0, 10**6))
def test_request_costs_one_whatever_its_size(call, tokens):
    """A bucket of requests is asked for one, and nothing is owed to it afterwards."""
    held, prompt, total = call
    plan = plan_of(held, Meter.REQUESTS)

    assert plan.costs(prompt, total) == (1,) * len(held)
    assert plan.deltas((1,) * len(held), tokens) == (0,) * len(held)


@properties
@given(calls(), st.integers(0, 10**12))
def test_cost_and_delta_come_to_what_the_call_took(call, tokens):
    """Whatever was reserved, every bucket of tokens is charged the real usage in the end."""
    held, prompt, total = call
    plan = plan_of(held)
    costs = plan.costs(prompt, total)

    assert {cost + delta for cost, delta in zip(costs, plan.deltas(costs, tokens), strict=True)} == {tokens}


def test_empty_plan_costs_nothing():
    """A call that no bucket limits is asked for nothing."""
    assert plan_of([]).costs(10, 1000) == ()
