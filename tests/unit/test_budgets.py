"""Budgets: what people may type, and what setting, listing and removing them does."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.house import ALICE, MODEL, NOW_US, House, grant, named
from tests.mirror import learned
from tests.strategies import properties
from tokenguard.arithmetic import MAX_UNITS
from tokenguard.backends.memory import MemoryBackend
from tokenguard.budgets import read_budget, read_name
from tokenguard.errors import BudgetNotFound, InvalidValue, TableFull
from tokenguard.jsontext import shown
from tokenguard.model import SCOPE_KINDS, Budget, Identity, Meter
from tokenguard.plan import Plans

TYPED = {"scope": "team", "id": "red", "capacity": 5000, "refillPerSec": 25}


def typed(**members):
    """Return a budget as somebody typed it: a valid one, but for the members given."""
    return {**TYPED, **members}


def refused(members, read=read_budget):
    """Return the error that reading members ends in."""
    with pytest.raises(InvalidValue) as caught:
        read(members)
    return caught.value


# --- reading ------------------------------------------------------------------------------------------------


def test_form_of_the_specification_is_read():
    """Scope, id, capacity and rate mean tokens over all models, with a debt of ten capacities."""
    budget, level = read_budget(TYPED)

    assert budget.name == named("team:red")
    assert budget.scale == grant(5000, 25, 50_000)
    assert level is None


def test_every_field_is_read():
    """Meter, model, debt and level are taken where they are given."""
    budget, level = read_budget(typed(meter="requests", model=MODEL, maxDebt=7, level=-7))

    assert budget.name == named("team:red", Meter.REQUESTS, MODEL)
    assert budget.scale == grant(5000, 25, 7)
    assert level == -7


@pytest.mark.parametrize("field", ["meter", "model", "maxDebt", "level"])
def test_optional_field_may_be_null(field):
    """A field that need not be there may be null."""
    assert read_budget(typed(**{field: None})) == read_budget(TYPED)


@pytest.mark.parametrize("id_", [{}, {"id": "*"}, {"id": None}])
def test_global_needs_no_id(id_):
    """The global scope has one id, which may be left out."""
    budget, _ = read_budget({"scope": "global", "capacity": 10, "refillPerSec": 1, **id_})

    assert budget.name == named("global")


@pytest.mark.parametrize("kind", SCOPE_KINDS)
def test_every_level_may_have_a_budget(kind):
    """A budget can be set on each level of the hierarchy."""
    budget, _ = read_budget(typed(scope=kind, id="*"))

    assert budget.name.scope == (kind, "*")


@pytest.mark.parametrize(
    ("typed_rate", "rate"),
    [
        (0, Fraction(0)),
        (-0.0, Fraction(0)),
        (25, Fraction(25)),
        (0.5, Fraction(1, 2)),
        (16.6667, Fraction(166667, 10000)),
        (1000 / 60, Fraction(50, 3)),
        (1e-6, Fraction(1, 10**6)),
    ],
)
def test_rate_is_taken_for_what_was_meant(typed_rate, rate):
    """A rate typed as a decimal or computed as a quotient is exact."""
    budget, _ = read_budget(typed(refillPerSec=typed_rate))

    assert budget.scale.rate == rate


@pytest.mark.parametrize(("capacity", "read"), [(1, 1), (1000.0, 1000), (10**12, 10**12), (1e12, 10**12)])
def test_capacity_is_a_whole_number_however_it_is_written(capacity, read):
    """5.0 and 1e12 are whole numbers, from one to 10^12."""
    budget, _ = read_budget(typed(capacity=capacity))

    assert budget.scale.capacity == read
    assert budget.scale.debt == 10 * read


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("scope", "Team", "scope must be one of global, team, rolegroup, role, user"),
        ("scope", "", "scope must be one of"),
        ("scope", None, "scope must be one of"),
        ("scope", 5, "scope must be one of"),
        ("scope", ["team"], "scope must be one of"),
        ("id", None, "id must be a string"),
        ("id", 5, "id must be a string"),
        ("id", ["red"], "id must be a string"),
        ("meter", "token", "meter must be one of tokens, requests"),
        ("meter", "TOKENS", "meter must be one of tokens, requests"),
        ("meter", "", "meter must be one of tokens, requests"),
        ("meter", 0, "meter must be one of tokens, requests"),
        ("meter", False, "meter must be one of tokens, requests"),
        ("meter", [], "meter must be one of tokens, requests"),
        ("meter", {}, "meter must be one of tokens, requests"),
        ("model", 5, "model must be a string"),
        ("model", ["gpt-4o"], "model must be a string"),
        ("capacity", None, "capacity must be a whole number from 1 to 1000000000000"),
        ("capacity", 0, "capacity must be a whole number from 1 to 1000000000000"),
        ("capacity", -1, "capacity must be a whole number from 1 to 1000000000000"),
        ("capacity", 10**12 + 1, "capacity must be a whole number from 1 to 1000000000000"),
        ("capacity", 0.5, "capacity must be a whole number"),
        ("capacity", "5000", "capacity must be a whole number"),
        ("capacity", True, "capacity must be a whole number"),
        ("capacity", float("inf"), "capacity must be a whole number"),
        ("refillPerSec", None, "refillPerSec must be a number from 0 to 10^12"),
        ("refillPerSec", -1, "refillPerSec must be a number from 0 to 10^12"),
        ("refillPerSec", -1e-9, "refillPerSec must be a number from 0 to 10^12"),
        ("refillPerSec", 1.1e12, "refillPerSec must be a number from 0 to 10^12"),
        ("refillPerSec", "25", "refillPerSec must be a number from 0 to 10^12"),
        ("refillPerSec", True, "refillPerSec must be a number from 0 to 10^12"),
        ("refillPerSec", float("inf"), "refillPerSec must be a number from 0 to 10^12"),
        ("refillPerSec", float("nan"), "refillPerSec must be a number from 0 to 10^12"),
        ("maxDebt", -1, "maxDebt must be a whole number from 0 to"),
        ("maxDebt", 2**52 - 4999, f"maxDebt must be a whole number from 0 to {2**52 - 5000}"),
        ("maxDebt", 0.5, "maxDebt must be a whole number from 0 to"),
        ("maxDebt", "7", "maxDebt must be a whole number from 0 to"),
        ("maxDebt", False, "maxDebt must be a whole number from 0 to"),
        ("level", 5001, "level must be a whole number from -50000 to 5000"),
        ("level", -50_001, "level must be a whole number from -50000 to 5000"),
        ("level", 0.5, "level must be a whole number from -50000 to 5000"),
        ("level", "full", "level must be a whole number from -50000 to 5000"),
        ("level", True, "level must be a whole number from -50000 to 5000"),
    ],
)
def test_field_that_cannot_be_is_refused_by_name(field, value, allowed):
    """The error names the field, what is allowed and what was given."""
    error = refused(typed(**{field: value}))

    assert error.field == field
    assert str(error).startswith(allowed)
    assert str(error).endswith(f"got {shown({field: value}, field)}")


@pytest.mark.parametrize("field", list(TYPED))
def test_missing_field_is_named(field):
    """A field that must be there and is not is an error that says which."""
    members = dict(TYPED)
    del members[field]

    error = refused(members)

    assert error.field == field
    assert str(error).endswith("got nothing")


@pytest.mark.parametrize("field", ["id", "model"])
@pytest.mark.parametrize("value", ["", "x" * 257, "é" * 129, "a\nb", "a\x00", "a\x1fb", "\x7f", "\x85", "\ud800"])
def test_name_that_cannot_name_a_bucket_is_refused(field, value):
    """An id or a model is 1 to 256 bytes of UTF-8 without control characters."""
    error = refused(typed(**{field: value}))

    assert error.field == field
    assert field in str(error)
    assert str(error).encode()


@pytest.mark.parametrize("value", ["x" * 256, "é" * 128, "a b/c:d", "*", "日本"])
def test_any_other_name_is_taken(value):
    """Spaces, slashes, colons and letters of any script may stand in an id."""
    assert read_name({"scope": "user", "id": value}).scope.id == value


@pytest.mark.parametrize("value", [" ", "x ", "\u00a0x"])
def test_name_with_white_space_at_its_ends_is_refused(value):
    """No header could ever carry it, so no call would find its budget."""
    assert "white space" in str(refused(typed(id=value)))


def test_global_has_no_other_id():
    """There is one global scope."""
    error = refused(typed(scope="global", id="red"))

    assert error.field == "id"
    assert "'red'" in str(error)


@pytest.mark.parametrize("field", ["refill", "Capacity", "window", ""])
def test_unknown_field_is_refused(field):
    """A field that is not one of a budget is a typo, and the error lists those that are."""
    error = refused(typed(**{field: 1}))

    assert error.field == field
    assert "refillPerSec" in str(error)


def test_unknown_field_is_shown_shortened_and_as_text():
    """A message does not repeat a name of any length, and can always be sent."""
    assert len(str(refused(typed(**{"x" * 16_000: 1})))) < 1000
    assert str(refused(typed(**{"\ud800": 1}))).encode()


@pytest.mark.parametrize(
    ("members", "field"),
    [
        ({"capacity": 10**12, "refillPerSec": 1 / 3, "maxDebt": MAX_UNITS - 10**12}, "refillPerSec"),
        ({"refillPerSec": 1e-300}, "refillPerSec"),
        ({"refillPerSec": 5e-324}, "refillPerSec"),
    ],
)
def test_rate_that_cannot_be_kept_is_refused(members, field):
    """A rate that no integers come near beside the capacity is an error that names the nearest one."""
    error = refused(typed(**members))

    assert error.field == field
    assert "the nearest rate is" in str(error)


anything = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.builds(list)
fields = [*TYPED, "meter", "model", "maxDebt", "level"]


def complaint(members):
    """Return the field that an error is about, or None if the members can be read."""
    try:
        read_budget(members)
    except InvalidValue as error:
        return error.field
    return None


@properties
@given(st.fixed_dictionaries({}, optional=dict.fromkeys(fields, anything)))
def test_whatever_is_typed_is_read_or_refused(members):
    """Any JSON in any field gives a budget or an error about a field, and nothing else."""
    assert complaint(typed(**members)) in (None, *fields)


# --- setting ------------------------------------------------------------------------------------------------


def put(house, scope, scale, level=None, **name):
    return house.budgets.put(Budget(named(scope, **name), scale), level)


def test_new_budget_is_full():
    """Setting a budget answers with what its bucket holds: everything."""
    state = put(House(), "team:red", grant(500))

    assert (state.budget.name, state.explicit, state.level) == (named("team:red"), True, 500)


def test_what_was_used_stays_used():
    """A raised or lowered budget keeps what was taken, into debt where it must."""
    house = House()
    put(house, "user:alice", grant(500))
    house.taken(200)

    assert put(house, "user:alice", grant(1000)).level == 800
    assert put(house, "user:alice", grant(100)).level == -100
    assert put(house, "user:alice", grant(500)).level == 300


def test_budget_over_a_default_keeps_what_was_used():
    """The first budget of an id takes over from the default with what had been taken."""
    house = House({"user": grant(1000)})
    house.taken(300)

    assert put(house, "user:alice", grant(500)).level == 200


@pytest.mark.parametrize("level", [0, 1, 499, 500, -1, -5000])
def test_level_is_set_where_it_is_given(level):
    """A level takes the place of what the bucket held."""
    house = House()
    put(house, "user:alice", grant(500))
    house.taken(200)

    assert put(house, "user:alice", grant(500), level).level == level
    assert house.levels() == {"user:alice on tokens": level}


def test_meters_and_models_are_budgets_of_their_own():
    """Setting one leaves the others of the same scope alone."""
    house = House()
    put(house, "user:alice", grant(500))
    put(house, "user:alice", grant(5), meter=Meter.REQUESTS)
    put(house, "user:alice", grant(50), model=MODEL)
    put(house, "user:alice", grant(600))

    assert [state.budget.scale.capacity for state in house.budgets.page(b"", 10)[0]] == [5, 600, 50]


def test_budget_for_which_there_is_no_room_leaves_all_as_before():
    """Where a level needs a bucket and the table is full, nothing changes: neither budget nor bucket nor call."""
    house = House({"user": grant(1000)}, buckets=1)
    put(house, "team:red", grant(400))
    house.limiter.settle(house.taken(10, who=Identity("bob")), 10, NOW_US)

    for scope, level in [("team:red", 5), ("role:dev", 5)]:
        with pytest.raises(TableFull):
            put(house, scope, grant(700), level)

    (kept,) = house.budgets.page(b"", 10)[0]
    assert (kept.budget.name, kept.budget.scale, kept.level) == (named("team:red"), grant(400), 400)
    with pytest.raises(BudgetNotFound):
        house.budgets.get(named("role:dev"))
    assert house.levels() == {"team:red on tokens": 400, "user:alice on tokens": 1000}


class WatchedTable:
    """A table that lets somebody resolve a plan in the middle of a change, and has no room."""

    def __init__(self, table, meanwhile):
        self._table = table
        self._meanwhile = meanwhile

    def __getattr__(self, name):
        return getattr(self._table, name)

    def configure(self, *_):
        self._meanwhile()
        raise TableFull("all buckets are in use, none of them full")


def test_call_in_the_middle_of_a_failing_change_does_not_see_the_budget_that_never_was():
    """A plan that is made while a change is under way, which comes to nothing, knows nothing of it."""
    house = House({"user": grant(1000)})
    seen = []
    backend = MemoryBackend(WatchedTable(house.table, lambda: seen.append(plans.resolve(ALICE, MODEL))))
    plans = Plans(backend, {"user": grant(1000)})

    with pytest.raises(TableFull):
        backend.put(Budget(named("user:alice"), grant(5)), 3, NOW_US)

    assert [budget.scale.capacity for budget in seen[0].budgets] == [1000]
    assert seen[0].handle.epoch == backend.epoch


# --- showing, listing, removing -----------------------------------------------------------------------------


def test_get_shows_the_budget_that_holds():
    """An explicit budget is shown as one, a default as a default, with their live levels."""
    house = House({"user": grant(1000)})
    put(house, "team:red", grant(5000))
    house.taken(300)

    team, user = house.budgets.get(named("team:red")), house.budgets.get(named("user:alice"))

    assert (team.explicit, team.budget.scale, team.level) == (True, grant(5000), 4700)
    assert (user.explicit, user.budget.scale, user.level) == (False, grant(1000), 700)


@pytest.mark.parametrize(
    "name",
    [named("team:red"), named("user:alice", Meter.REQUESTS), named("user:alice", model=MODEL)],
)
def test_unlimited_scope_has_no_budget_to_show(name):
    """Where neither budget nor default holds, the error says that it is unlimited."""
    house = House({"user": grant(1000)})

    with pytest.raises(BudgetNotFound, match="unlimited"):
        house.budgets.get(name)


def test_scope_that_only_the_provider_limits_is_not_called_unlimited():
    """Who asks for a budget of a name that only a learned one has is told where to look."""
    house = House()
    house.backend.put(learned(600, meter=Meter.REQUESTS), None, None)

    with pytest.raises(BudgetNotFound, match=r"with source=headers$"):
        house.budgets.get(named("global:*", Meter.REQUESTS, MODEL))
    with pytest.raises(BudgetNotFound, match="unlimited"):
        house.budgets.get(named("global:*", model=MODEL))


def test_showing_makes_no_bucket():
    """Looking at a budget that nobody used takes no room in the table."""
    house = House({"user": grant(1000)})
    put(house, "team:red", grant(10))
    house.budgets.get(named("user:alice"))
    house.budgets.page(b"", 10)

    assert house.table.stats()["used"] == 0


def test_deleting_goes_back_to_the_default():
    """Without its budget an id has the default's, and what was used stays used."""
    house = House({"user": grant(1000)})
    put(house, "user:alice", grant(5000))
    house.taken(400)

    left = house.budgets.delete(named("user:alice"))

    assert (left.explicit, left.budget.scale, left.level) == (False, grant(1000), 600)
    assert house.budgets.get(named("user:alice")) == left
    assert house.levels() == {"user:alice on tokens": 600}


def test_deleting_without_a_default_lifts_the_limit():
    """Without budget and default a scope is unlimited, and a budget set later begins full."""
    house = House()
    put(house, "team:red", grant(100))
    house.taken(50)

    assert house.budgets.delete(named("team:red")) is None
    assert house.levels() == {}
    assert put(house, "team:red", grant(100)).level == 100


def test_deleting_what_is_not_there_is_an_error():
    """A default cannot be deleted, nor a budget twice, nor one of another meter or model."""
    house = House({"user": grant(1000)})
    put(house, "team:red", grant(10))
    for name in (named("user:alice"), named("team:red", Meter.REQUESTS), named("team:red", model=MODEL)):
        with pytest.raises(BudgetNotFound):
            house.budgets.delete(name)

    house.budgets.delete(named("team:red"))

    with pytest.raises(BudgetNotFound):
        house.budgets.delete(named("team:red"))


def test_deleting_one_of_several_budgets_keeps_the_others():
    """The budgets of one scope are deleted one by one."""
    house = House()
    put(house, "user:alice", grant(10))
    put(house, "user:alice", grant(20), model=MODEL)

    house.budgets.delete(named("user:alice"))

    assert [state.budget.scale.capacity for state in house.budgets.page(b"", 10)[0]] == [20]


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 10, 11])
def test_pages_show_every_budget_once_in_order(limit):
    """Going on where each page ended shows all explicit budgets, sorted, and the last page says it is the last."""
    house = House({"user": grant(1)})
    scopes = [f"team:{letter}" for letter in "dacb"] + [f"user:{letter}é" for letter in "zyxwv"] + ["global"]
    for scope in scopes:
        put(house, scope, grant(10))

    seen, after, sizes = [], b"", []
    while after is not None:
        page, after = house.budgets.page(after, limit)
        seen += [str(state.budget.name.scope) for state in page]
        sizes.append(len(page))

    assert seen == sorted(seen)
    assert sorted(seen) == sorted(["global:*", *scopes[:-1]])
    assert sizes[:-1] == [limit] * (len(sizes) - 1)
    assert 1 <= sizes[-1] <= limit


def test_page_of_no_budgets_is_empty():
    """Defaults are not listed: they have no end."""
    assert House({"user": grant(1)}).budgets.page(b"", 10) == ([], None)


def test_page_goes_on_behind_a_budget_that_was_deleted():
    """A page begins behind a key, whether or not the key is still there."""
    house = House()
    for letter in "abc":
        put(house, f"team:{letter}", grant(10))
    _, after = house.budgets.page(b"", 2)
    house.budgets.delete(named("team:b"))

    page, more = house.budgets.page(after, 2)

    assert [state.budget.name for state in page] == [named("team:c")]
    assert more is None
