"""The provider's refusals are obeyed by everybody, and what calls for somebody is told."""

import openai
import pytest

from tests.e2e.conftest import running
from tests.e2e.guarding import LONG_S, ask, health, learned, nothing_told, other_models, refused_by_us
from tests.e2e.limited_openai import (
    QUOTA,
    QUOTA_CODES,
    answering,
    error,
    out_of_quota,
    overloaded,
    rate_limited,
    slow_down,
)
from tests.e2e.test_budgets import error_of
from tests.nodes import until
from tests.provider_limit import Limit, Limits

LASTING_S = 90
"""What lasts less long is no use of the key by others."""

# --- the gate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [rate_limited, slow_down])
@pytest.mark.parametrize("stream", [False, True])
def test_refusal_of_the_provider_closes_its_models_gate(guard, provider, model, script, stream):
    """It is passed on; then the model's callers are told to wait, without asking the provider, and others pass."""
    provider.scripts[model].append(script(LONG_S))
    first = ask(guard, model, stream=stream)
    assert first.status_code == 429
    assert first.headers["retry-after"] == str(LONG_S)
    assert not refused_by_us(first)

    answers = [ask(guard, model, f"user-{i}", stream=stream) for i in range(12)]

    assert all(map(refused_by_us, answers))
    assert provider.count(model) == 1
    for answer in answers:
        error = error_of(answer)
        assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
        assert "provider asked to wait" in error["message"]
        assert 1 <= int(answer.headers["retry-after"]) <= LONG_S * 1.1 + 1
        assert answer.headers["content-type"].startswith("application/json")
    assert ask(guard, next(other_models)).status_code == 200
    assert model in closed(guard)


def test_refusal_of_azure_closes_the_gate_too(guard, provider, model):
    """Its errors have neither type nor OpenAI's code, but a wait."""
    provider.azure = True
    provider.limits[model] = Limits(tokens=Limit(3000))
    provider.limits[model].tokens.waste(provider.clock(), 3000)
    provider.altered[model] = nothing_told
    assert not refused_by_us(ask(guard, model, max_tokens=2500))
    assert refused_by_us(ask(guard, model, max_tokens=2500))
    assert provider.count(model) == 1


def test_gate_refusal_is_the_sdks_rate_limit_error(guard, provider, model, user):
    """The official client reads it as the provider's own."""
    provider.scripts[model].append(rate_limited(LONG_S))
    for _ in range(2):
        with pytest.raises(openai.RateLimitError) as caught:
            guard.client(user).chat.completions.create(model=model, messages=[{"role": "user", "content": "hi"}])
        assert caught.value.code == "rate_limit_exceeded"
    assert provider.count(model) == 1


def test_closed_gate_costs_nobody_anything(guard, provider, model, user):
    """Whoever is refused by it keeps their tokens and their requests."""
    guard.set_budget("user", user, 500)
    guard.set_budget("user", user, 5, meter="requests")
    provider.scripts[model].append(rate_limited(LONG_S))
    ask(guard, model)
    assert all(refused_by_us(ask(guard, model, user)) for _ in range(8))
    assert guard.level("user", user) == 500
    assert guard.level("user", user, meter="requests") == 5


def test_gate_opens_again(guard, provider, model):
    """After the wait that the provider asked for, calls pass, and health says nothing of it any more."""
    provider.scripts[model].append(rate_limited(1))
    assert ask(guard, model).status_code == 429
    assert refused_by_us(ask(guard, model))
    until(lambda: ask(guard, model).status_code == 200, "it stays closed")
    until(lambda: ask(guard, model).status_code == 200 and model not in closed(guard), "it is told to be closed")


def closed(server):
    """Return the models whose gates health tells to be closed."""
    return health(server)["provider"]["heldBack"]


def test_gate_that_the_provider_closes_again_stays_closed(guard, provider, model):
    """The last word counts: another refusal prolongs the wait."""
    provider.scripts[model] += [rate_limited(1), rate_limited(LONG_S)]
    ask(guard, model)
    until(lambda: provider.count(model) == 2 or not ask(guard, model), "it stays closed")
    assert refused_by_us(ask(guard, model))
    assert int(ask(guard, model).headers["retry-after"]) > 5
    assert provider.count(model) == 2


def test_refusal_without_a_wait_does_not_close_for_good(guard, provider, model):
    """Where the provider does not say how long, callers are let through again soon."""
    short = error("Rate limit reached", "requests", "rate_limit_exceeded")
    provider.scripts[model].append(answering(429, short))
    assert ask(guard, model).status_code == 429
    until(lambda: ask(guard, model).status_code == 200, "it stays closed")


@pytest.mark.parametrize("wait", ["soon", "-5", "1e400", "nan", "", "0"])
def test_odd_wait_does_not_close_for_good(guard, provider, model, wait):
    """A wait that is none is as good as none."""
    short = error("Rate limit reached", "requests", "rate_limit_exceeded")
    provider.scripts[model].append(answering(429, short, **{"retry-after": wait}))
    assert ask(guard, model).status_code == 429
    until(lambda: ask(guard, model).status_code == 200, "it stays closed")


def test_request_that_is_too_large_touches_nobody_else(guard, provider, model):
    """It is passed on, and the next call of the model reaches the provider."""
    provider.limits[model] = Limits(tokens=Limit(1000))
    provider.altered[model] = nothing_told
    large = ask(guard, model, max_tokens=5000)
    assert error_of(large)["message"].startswith("Request too large")
    assert not refused_by_us(large)
    assert ask(guard, model).status_code == 200
    assert provider.count(model) == 2


@pytest.mark.parametrize(("cap", "is_ours"), [(19_990, True), (25_000, False)])
def test_azure_saying_retry_to_what_can_never_pass_touches_nobody_else(guard, provider, model, cap, is_ours):
    """It has no words for a request that is too large: whoever makes one does not stop all others for a minute.

    One that OpenAI would take while its bucket is full waits here for that.
    """
    provider.azure = True
    provider.limits[model] = Limits(tokens=Limit(20_000))
    assert ask(guard, model, max_tokens=100).status_code == 200
    learned(guard, model, ("tokens", "headers"))
    for number in range(2):
        assert refused_by_us(ask(guard, model, f"greedy-{number}", max_tokens=cap)) is is_ours
        assert ask(guard, model, f"user-{number}", max_tokens=100).status_code == 200
    assert model not in closed(guard)


def test_overload_is_passed_on(guard, provider, model):
    """A 503 is the provider's own, with its wait, and the next call is tried."""
    provider.scripts[model].append(overloaded(7))
    answer = ask(guard, model)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")
    assert error_of(answer)["code"] == "server_is_overloaded"
    assert ask(guard, model).status_code == 200


def test_two_nodes_close_and_open_as_one(provider, behind_limits, redis_server, tmp_path, model):
    """One provider's refusal on one node stops the model on the other."""
    shared = {"REDIS_URL": redis_server.url, "TOKENGUARD_REALM": model, "TOKENGUARD_REDIS_TIMEOUT_S": 10}
    settings = {**behind_limits, **shared}
    with running(tmp_path, "serve", **settings) as a, running(tmp_path, "serve", **settings) as b:
        assert [ask(node, model).status_code for node in (a, b)] == [200, 200]
        provider.scripts[model].append(rate_limited(LONG_S))
        assert not refused_by_us(ask(a, model))
        assert refused_by_us(ask(b, model))
        assert refused_by_us(ask(a, model))
        assert provider.count(model) == 3
        assert model in closed(b)
        assert ask(b, next(other_models)).status_code == 200


# --- alarms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", QUOTA_CODES)
@pytest.mark.parametrize("stream", [False, True])
def test_account_without_means_is_an_alarm(guard, provider, model, code, stream):
    """The error is passed on and closes nothing; health and one line of the log name the code, until a success."""
    assert health(guard)["status"] == "ok"
    lines = guard.log.count(code)
    provider.scripts[model] += [out_of_quota(code)] * 3
    answers = [ask(guard, model, stream=stream) for _ in range(3)]
    assert [error_of(answer) for answer in answers] == [
        {"message": QUOTA, "type": "insufficient_quota", "param": None, "code": code}
    ] * 3
    assert provider.count(model) == 3
    until(lambda: health(guard)["status"] == "degraded", "there is no alarm")
    told = health(guard)
    assert code in told["trouble"]
    assert told["provider"]["alarms"] == [code]
    until(lambda: guard.log.count(code) > lines, "the log says nothing")
    assert guard.log.count(code) == lines + 1, guard.log

    until(lambda: ask(guard, model).status_code == 200 and health(guard)["status"] == "ok", "the alarm stays")
    assert "trouble" not in health(guard)


def test_foreign_use_of_the_key_is_told(provider, behind_limits, tmp_path, model):
    """When what remains falls faster than calls of ours explain, health and the log say how fast, and of what."""
    provider.limits[model] = Limits(tokens=Limit(600_000, others_per_s=20_000))
    with running(tmp_path, "serve", **behind_limits) as server:
        noticed = until(lambda: ask(server, model).status_code and foreign(server, model), "no", LASTING_S)
        assert noticed == pytest.approx(20_000 * 60, rel=0.6)
        assert model in server.log


def foreign(server, model):
    """Return how many tokens of a model others use per minute, as health tells it; None if nobody does."""
    return health(server)["provider"]["othersTokensPerMinute"].get(model)


def test_provider_is_told_to_be_well(provider, behind_limits, tmp_path, model):
    """Where nothing is wrong, health says so."""
    with running(tmp_path, "serve", **behind_limits) as server:
        ask(server, model)
        told = health(server)
    assert told["status"] == "ok"
    assert told["provider"] == {
        "alarms": [],
        "heldBack": [],
        "othersTokensPerMinute": {},
        "othersRequestsPerMinute": {},
    }
