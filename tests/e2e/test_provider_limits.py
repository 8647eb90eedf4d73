"""The provider's own limits are learned from its answers, and kept."""

from itertools import cycle, pairwise

import pytest

from tests.e2e.conftest import running
from tests.e2e.fake_openai import JSON
from tests.e2e.guarding import (
    FROM_HEADERS,
    ask,
    budgets,
    health,
    learned,
    nothing_told,
    of_model,
    other_models,
    refused_by_us,
    sync,
    terms,
)
from tests.e2e.limited_openai import error, raw
from tests.e2e.test_budgets import error_of
from tests.e2e.test_observing import series
from tests.nodes import until
from tests.provider_limit import DAY_S, Limit, Limits

# --- learned from header fields ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_limits_of_header_fields_become_budgets(guard, provider, model, stream):
    """One call is enough: capacity is the limit, and it flows in within the window."""
    provider.limits[model] = Limits(Limit(600), Limit(30_000))
    assert ask(guard, model, stream=stream).status_code == 200
    found = learned(guard, model, *FROM_HEADERS)
    assert terms(found[FROM_HEADERS[0]]) == ("global", "*", 600, 10)
    assert terms(found[FROM_HEADERS[1]]) == ("global", "*", 30_000, 500)


def test_learned_limit_refuses_before_the_provider_does(guard, provider, model):
    """What the provider would refuse never reaches it, and the refusal says whose limit it is."""
    provider.limits[model] = Limits(requests=Limit(3))
    assert ask(guard, model).status_code == 200
    learned(guard, model, FROM_HEADERS[0])
    answers = [ask(guard, model) for _ in range(6)]
    assert [answer.status_code for answer in answers[:2]] == [200, 200]
    refused = answers[-1]
    assert refused_by_us(refused)
    assert error_of(refused)["type"] == "requests"
    assert error_of(refused)["code"] == "rate_limit_exceeded"
    assert "provider's own limit" in error_of(refused)["message"]
    assert "not a limit of the provider" not in error_of(refused)["message"]
    assert all(call.status == 200 for call in provider.calls if call.model == model)


def test_requests_per_day_are_no_requests_per_minute(guard, provider, model):
    """The window is told by the reset: ten thousand a day are not ten thousand a minute."""
    provider.limits[model] = Limits(Limit(10_000, DAY_S))
    until(lambda: ask(guard, model).status_code and of_model(guard, model), "it is not learned")
    found = learned(guard, model, FROM_HEADERS[0])
    assert terms(found[FROM_HEADERS[0]]) == ("global", "*", 10_000, pytest.approx(10_000 / DAY_S))
    _, models = sync(guard, dry_run=1)
    assert models[model]["requestsPerMinute"] == pytest.approx(10_000 / 1440, rel=1e-5)
    assert models[model]["tokensPerMinute"] is None
    assert models[model]["limits"][0]["windowS"] == DAY_S


def test_window_that_cannot_be_told_is_not_guessed(guard, provider, model):
    """A bucket that is told to be full says nothing about how fast it fills; later calls do."""
    provider.limits[model] = Limits(Limit(10_000, DAY_S))
    provider.altered[model] = lambda told: {**told, **full(told)}
    assert ask(guard, model).status_code == 200
    provider.altered.clear()
    assert ask(guard, next(other_models)).status_code == 200
    assert of_model(guard, model) == {}
    until(lambda: ask(guard, model).status_code and of_model(guard, model), "it is not learned")
    found = learned(guard, model, FROM_HEADERS[0])
    assert found[FROM_HEADERS[0]]["refillPerSec"] < 1


def full(told):
    """Return the fields of a limit of which nothing was taken."""
    return {
        "x-ratelimit-remaining-requests": told["x-ratelimit-limit-requests"],
        "x-ratelimit-reset-requests": "0s",
    }


def each(value, part=""):
    """Return what makes every field whose name has that part say something else."""
    return lambda told: {name: value if part in name else was for name, was in told.items()}


ODD_FIELDS = {
    "missing": nothing_told,
    "no reset": lambda told: {name: value for name, value in told.items() if "reset" not in name},
    "no remaining": lambda told: {name: value for name, value in told.items() if "remaining" not in name},
    "minus one": each("-1"),
    "empty": each(""),
    "words": each("unlimited"),
    "a limit of nothing": each("0", "limit-"),
    "too many digits": each("9" * 40, "limit-"),
    "a fraction": each("29999.5", "limit-"),
    "other digits": each("\u0663", "limit-"),
    "more than the limit": each("999999999", "remaining"),
    "a reset of another window": each("50m0s", "reset"),
    "a reset of no time": each("0s", "reset"),
    "a reset that is none": each("soon", "reset"),
    "a negative reset": each("-5s", "reset"),
    "a date": each("Thu, 01 Jan 2026 00:00:00 GMT", "reset"),
}


@pytest.mark.parametrize("what", ODD_FIELDS)
def test_odd_fields_change_nothing_and_are_counted(guard, provider, model, what):
    """Neither before anything is known, nor afterwards; calls go on, and the metrics tell of it."""
    provider.limits[model] = Limits(Limit(600), Limit(30_000))
    provider.limits[model].tokens.waste(provider.clock(), 10_000)
    provider.altered[model] = ODD_FIELDS[what]
    before = ignored(guard)
    assert [ask(guard, model).status_code for _ in range(3)] == [200] * 3
    assert of_model(guard, model) == {}
    until(lambda: ignored(guard) >= before + 3, "it is not counted")
    provider.altered.clear()
    until(lambda: ask(guard, model) and len(of_model(guard, model)) == len(FROM_HEADERS), "it is not learned")
    found = {name: terms(one) for name, one in learned(guard, model, *FROM_HEADERS).items()}
    provider.altered[model] = ODD_FIELDS[what]
    assert [ask(guard, model).status_code for _ in range(3)] == [200] * 3
    assert {name: terms(one) for name, one in of_model(guard, model).items()} == found


def ignored(server):
    """Return how many answers told nothing that is of use."""
    told = "tokenguard_provider_limits_total"
    return sum(series(server).get(f'{told}{{what="{what}"}}', 0) for what in ("missing", "unusable", "unclear"))


def test_flapping_field_does_not_rewrite_budgets(guard, provider, model):
    """A limit that changes with every answer is not followed to and fro."""
    provider.limits[model] = Limits(tokens=Limit(30_000))
    ask(guard, model)
    learned(guard, model, FROM_HEADERS[1])
    flapping = cycle([20_000, 30_000])
    seen = []
    for _ in range(12):
        provider.limits[model].tokens.limit = next(flapping)
        ask(guard, model)
        seen.append(of_model(guard, model)[FROM_HEADERS[1]]["capacity"])
    assert sum(one != other for one, other in pairwise(seen)) <= 2, seen


def test_lasting_change_is_followed(guard, provider, model):
    """A limit that was lowered for good soon is the budget."""
    provider.limits[model] = Limits(tokens=Limit(30_000))
    ask(guard, model)
    learned(guard, model, FROM_HEADERS[1])
    provider.limits[model].tokens.limit = 9_000

    def followed():
        ask(guard, model)
        return terms(of_model(guard, model)[FROM_HEADERS[1]]) == ("global", "*", 9_000, 150)

    until(followed, "it is not followed")


def test_remaining_lowers_a_level_and_never_raises_it(guard, provider, model):
    """What the provider has left bounds what we have; that it has more gives us nothing."""
    limit = Limit(60_000)
    provider.limits[model] = Limits(tokens=limit)
    ask(guard, model)
    learned(guard, model, FROM_HEADERS[1])
    limit.waste(provider.clock(), 50_000)
    ask(guard, model)
    until(lambda: of_model(guard, model)[FROM_HEADERS[1]]["level"] < 30_000, "the level is not lowered")
    limit.charge(provider.clock(), -50_000)
    ask(guard, model)
    ask(guard, model)
    assert of_model(guard, model)[FROM_HEADERS[1]]["level"] < 45_000


def test_seconds_of_azure_are_understood(guard, provider, model):
    """Whole seconds without a unit tell the window too, as soon as enough was taken to tell it."""
    provider.azure = True
    provider.limits[model] = Limits(tokens=Limit(30_000))
    provider.limits[model].tokens.waste(provider.clock(), 15_000)
    ask(guard, model)
    found = learned(guard, model, FROM_HEADERS[1])
    assert terms(found[FROM_HEADERS[1]]) == ("global", "*", 30_000, 500)


def test_limit_of_the_project_binds_if_it_is_tighter(guard, provider, model):
    """Of the organization's tokens and the project's, fewer may be had."""
    provider.limits[model] = Limits(tokens=Limit(30_000), project_tokens=Limit(12_000))
    ask(guard, model)
    until(lambda: sync(guard, dry_run=1)[1].get(model, {}).get("tokensPerMinute") == 12_000, "it is not learned")


def test_nothing_is_learned_if_it_is_switched_off(provider, behind_limits, tmp_path, model):
    """With TOKENGUARD_PROVIDER_LIMITS=off header fields are nobody's business."""
    provider.limits[model] = Limits(Limit(600), Limit(30_000))
    with running(tmp_path, "serve", **behind_limits, TOKENGUARD_PROVIDER_LIMITS="off") as server:
        assert [ask(server, model).status_code for _ in range(3)] == [200] * 3
        assert budgets(server) == []
        assert "provider" not in health(server)


def test_answers_of_no_completion_teach_nothing(guard, provider, model):
    """Errors that tell limits of something else, and models that are listed, leave budgets alone."""
    fields = {
        "x-ratelimit-limit-tokens": "5",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "60s",
    }

    async def bad_request(reply):
        await reply.whole(400, JSON + raw(fields), error("No", "invalid_request_error", None))

    provider.scripts[model].append(bad_request)
    assert ask(guard, model).status_code == 400
    assert ask(guard, model).status_code == 200
    assert of_model(guard, model) == {}


# --- budgets by hand beside them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("by_hand", [2, 1000])
def test_both_bind_and_the_tighter_wins(guard, provider, model, by_hand):
    """A budget set by hand is never overwritten: it stands beside what was learned for the same."""
    provider.limits[model] = Limits(requests=Limit(4))
    guard.set_budget("global", "*", by_hand, meter="requests", model=model)
    assert ask(guard, model).status_code == 200
    found = learned(guard, model, ("requests", "explicit"), FROM_HEADERS[0])
    assert found["requests", "explicit"]["capacity"] == by_hand
    assert found["requests", "explicit"]["level"] == by_hand - 1
    assert found[FROM_HEADERS[0]]["capacity"] == 4
    answers = [ask(guard, model) for _ in range(6)]
    assert [answer.status_code for answer in answers[: min(by_hand, 4) - 1]] == [200] * (min(by_hand, 4) - 1)
    assert refused_by_us(answers[-1])
    message = error_of(answers[-1])["message"]
    assert ("not a limit of the provider" in message) == (by_hand == 2)


def test_learned_budget_can_be_removed(guard, provider, model):
    """With its source in the query; what was set by hand stays, and the other way round."""
    provider.limits[model] = Limits(requests=Limit(600))
    guard.set_budget("global", "*", 50, meter="requests", model=model)
    ask(guard, model)
    learned(guard, model, ("requests", "explicit"), FROM_HEADERS[0])
    path, query = "/config/budget/global", {"meter": "requests", "model": model}
    shown = guard.get(path, params={**query, "source": "headers"}).json()
    assert (shown["source"], shown["capacity"]) == ("headers", 600)
    assert guard.get(path, params=query).json()["capacity"] == 50
    answer = guard.request("DELETE", path, params={**query, "source": "headers"})
    assert answer.json()["deleted"] is True
    assert of_model(guard, model).keys() == {("requests", "explicit")}
    again = guard.request("DELETE", path, params={**query, "source": "headers"})
    assert (again.status_code, error_of(again)["code"]) == (404, "budget_not_found")


def test_removed_budget_of_ours_leaves_the_learned_one(guard, provider, model):
    """Removing what was set by hand touches nothing that was learned."""
    provider.limits[model] = Limits(requests=Limit(600))
    guard.set_budget("global", "*", 50, meter="requests", model=model)
    ask(guard, model)
    learned(guard, model, ("requests", "explicit"), FROM_HEADERS[0])
    guard.request("DELETE", "/config/budget/global", params={"meter": "requests", "model": model})
    assert of_model(guard, model).keys() == {FROM_HEADERS[0]}


@pytest.mark.parametrize("query", [{"source": "hearsay"}, {"source": ""}])
def test_source_that_is_none_is_refused(guard, query):
    """A typo must not remove another budget than was meant."""
    assert guard.request("DELETE", "/config/budget/global", params=query).status_code == 400
