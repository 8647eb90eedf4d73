"""The tests' provider can be trusted: its limits are what was recorded of the real one."""

import asyncio
import json
from fractions import Fraction

import pytest

from tests.e2e.limited_openai import (
    ADMIN_KEY,
    LimitedOpenAI,
    admin_row,
    failing,
    out_of_quota,
    rate_limited,
)
from tests.provider_limit import CHARGING, DAY_S, Asked, Limit, Limits, Window, duration, plain_seconds

CHAT = "/v1/chat/completions"
LIMITS = "/v1/organization/projects/proj_abc/rate_limits"


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        (0, "0s"),
        (0.009, "9ms"),
        (0.012, "12ms"),
        (1, "1s"),
        (8.64, "8.64s"),
        (3.114, "3.114s"),
        (72, "1m12s"),
        (360, "6m0s"),
        (Fraction(86_400) - Fraction(1, 2), "23h59m59.5s"),
    ],
)
def test_durations_are_written_as_go_does(seconds, written):
    """Milliseconds below a second, then seconds with what of them there is, then minutes and hours."""
    assert duration(seconds) == written


@pytest.mark.parametrize(
    ("limit", "window_s", "taken", "remaining", "reset"),
    [
        (160_000, 60, 24, "159976", "9ms"),
        (10_000, 60, 519, "9481", "3.114s"),
        (5_000, 60, 1, "4999", "12ms"),
        (10_000, DAY_S, 1, "9999", "8.64s"),
        (150_000, 360, 150_000, "0", "6m0s"),
    ],
)
def test_fields_are_those_recorded(limit, window_s, taken, remaining, reset):
    """What was recorded of OpenAI comes out of a bucket of which as much was taken."""
    tokens = Limit(limit, window_s)
    assert tokens.take(100.0, taken)
    assert Limits(tokens=tokens).told(100.0) == {
        "x-ratelimit-limit-tokens": str(limit),
        "x-ratelimit-remaining-tokens": remaining,
        "x-ratelimit-reset-tokens": reset,
    }


def test_limit_grants_its_capacity_and_what_flows_in():
    """It refills all the time, is never more than full, and what waits as long as told passes at that instant."""
    tokens = Limit(600)
    assert tokens.take(0, 600)
    assert not tokens.take(0, 1)
    assert tokens.wait_s(0, 25) == Fraction(5, 2)
    assert not tokens.take(2.499999999, 25)
    assert tokens.take(2.5, 25)
    assert tokens.level(1000) == 600
    assert tokens.charged == 625
    assert tokens.given(1000) == 10_000


def test_time_that_runs_back_gives_nothing():
    """A clock that steps back is waited for."""
    tokens = Limit(600)
    tokens.take(10, 600)
    assert tokens.level(5) == tokens.level(10) == 0
    assert tokens.level(11) == 10


def test_window_forgets_at_its_end():
    """All of it is there again at once, and nothing before; reset and wait are the time until then."""
    tokens = Window(600)
    assert tokens.take(100, 400)
    assert tokens.level(159) == 200
    assert tokens.told(159) == (600, 200, 1)
    assert tokens.wait_s(159, 201) == 1
    assert tokens.level(160) == 600
    assert tokens.take(170, 600)
    assert tokens.told(170) == (600, 0, 50)
    assert tokens.level(500) == 600
    assert tokens.given(500) == 400 + 600


def test_others_take_what_is_there_and_no_more():
    """Others' use lowers what remains; an empty bucket gives them what flows in."""
    tokens = Limit(600, others_per_s=30)
    assert tokens.level(0) == 600
    assert tokens.level(10) == 600 + 100 - 300
    assert tokens.level(100) == 0
    assert tokens.taken_by_others == 600 + 1000


@pytest.mark.parametrize(
    ("kind", "cap", "choices", "at_once", "in_the_end"),
    [
        ("openai", None, 1, 16 + 10, 26),
        ("openai", 20, 3, 26, 26),
        ("openai", 500, 1, 500, 500),
        ("azure", 500, 3, 10 + 1500, 1510),
        ("azure", None, 1, 10 + 4096, 77),
        ("usage", 500, 1, 1, 77),
    ],
)
def test_tokens_are_counted_as_providers_do(kind, cap, choices, at_once, in_the_end):
    """A request of 40 characters that takes 77 tokens in the end."""
    asked = Asked(40, cap, choices)
    assert CHARGING[kind].at_once(asked) == at_once
    assert CHARGING[kind].in_the_end(asked, 77) == in_the_end


def test_the_largest_cap_and_all_text_count():
    """Both names of the cap are read, and every message."""
    messages = [{"role": "system", "content": "abc"}, {"role": "assistant"}, {"role": "user", "content": "defgh"}]
    body = {"messages": messages, "max_tokens": 5, "max_completion_tokens": 9, "n": 2}
    assert Asked.of(body) == Asked(8, 9, 2)


def test_refused_requests_count_and_are_never_owed():
    """Hammering takes what would let a request pass, but what is taken for nothing is no debt."""
    limits = Limits(Limit(60), Limit(100))
    assert limits.admit(0, 100) is None
    assert limits.admit(0, 60).meter == "tokens"
    assert limits.requests.level(0) == 58
    for _ in range(100):
        limits.admit(0, 60)
    refusal = limits.admit(0, 60)
    assert (refusal.meter, refusal.limit, refusal.used, refusal.amount) == ("requests", 60, 60, 1)
    assert refusal.wait_s == 1
    assert limits.requests.charged == 1


def test_request_that_never_fits_is_told_no_wait():
    """It is too large for an empty bucket and a full one alike, and leaves the tokens alone."""
    limits = Limits(tokens=Limit(30_000), project_tokens=Limit(20_000))
    refusal = limits.admit(0, 20_001)
    assert (refusal.wait_s, refusal.limit) == (None, 20_000)
    assert limits.tokens.level(0) == 30_000


def test_others_seconds_are_whole():
    """Azure rounds what is left up to whole seconds."""
    assert [plain_seconds(seconds) for seconds in (0, 0.009, 1, Fraction(3, 2))] == ["0", "1", "1", "2"]


# --- over ASGI, without a socket --------------------------------------------------------------------------------


def ask(fake, path=CHAT, key="sk-ours", query="", **body):
    """Return the status, the fields and the body that the fake answers."""
    request = {"model": "gpt-4o", "messages": [{"role": "user", "content": "x" * 40}], **body}
    sent = []

    async def receive():
        return {"type": "http.request", "body": json.dumps(request).encode()}

    async def send(message):
        sent.append(message)

    scope = {"method": "POST", "raw_path": path.encode(), "query_string": query.encode()}
    scope["headers"] = [(b"authorization", f"Bearer {key}".encode())]
    asyncio.run(fake(scope, receive, send))
    fields = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], fields, b"".join(message["body"] for message in sent[1:])


def message_of(answer):
    return json.loads(answer[2])["error"]["message"]


def fake_of(requests, tokens, **more):
    return LimitedOpenAI(limits={"gpt-4o": Limits(Limit(requests), Limit(tokens))}, clock=lambda: 7.0, **more)


def test_refusal_of_requests_is_the_recorded_one():
    """The words, the type and the wait are the provider's."""
    fake = fake_of(3, 10_000)
    assert [ask(fake)[0] for _ in range(3)] == [200] * 3
    status, fields, body = answer = ask(fake)
    assert message_of(answer) == (
        "Rate limit reached for gpt-4o in organization org-X on requests per min (RPM): Limit 3, Used 3, "
        "Requested 1. Please try again in 20s. "
        "Visit https://platform.openai.com/account/rate-limits to learn more."
    )
    assert (status, json.loads(body)["error"]["type"]) == (429, "requests")
    assert (fields["retry-after"], fields["retry-after-ms"]) == ("20", "20000")
    assert fields["x-ratelimit-remaining-requests"] == "0"
    assert fields["x-ratelimit-reset-requests"] == "1m0s"


def test_refusal_of_tokens_is_the_recorded_one():
    """The words, the type and the wait are the provider's."""
    fake = fake_of(10, 30_000)
    ask(fake, max_tokens=14_567)
    answer = ask(fake, max_tokens=24_754)
    assert "on tokens per min (TPM): Limit 30000, Used 14567, Requested 24754. Please try again in 18.642s." in (
        message_of(answer)
    )
    assert json.loads(answer[2])["error"]["type"] == "tokens"


def test_request_too_large_is_the_recorded_one():
    """It is told the limit and what was asked, and no wait."""
    answer = ask(fake_of(10, 30_000), max_tokens=39_143)
    assert message_of(answer) == (
        "Request too large for gpt-4o in organization org-X on tokens per min (TPM): Limit 30000, "
        "Requested 39143. The input or output tokens must be reduced in order to run successfully. "
        "Visit https://platform.openai.com/account/rate-limits to learn more."
    )
    assert "retry-after" not in answer[1]


def test_usage_is_drawn_anew_but_the_same_for_a_seed():
    """It stays within the caller's cap, and what is charged in the end is what was used."""
    fakes = [fake_of(10**6, 10**6, mean_output=50, seed=3, charging=CHARGING["usage"]) for _ in range(2)]
    usages = [[json.loads(ask(fake, max_tokens=30)[2])["usage"] for _ in range(20)] for fake in fakes]
    assert usages[0] == usages[1]
    assert all(1 <= usage["completion_tokens"] <= 30 for usage in usages[0])
    charged = fakes[0].limits["gpt-4o"].tokens.charged
    assert charged == sum(usage["total_tokens"] for usage in usages[0])


def test_stream_is_told_the_limits_in_its_head():
    """A stream has the same fields as an answer in one piece, and its usage if that was asked for."""
    _, fields, body = ask(fake_of(10, 1000), stream=True, stream_options={"include_usage": True})
    assert fields["x-ratelimit-remaining-tokens"] == "974"
    assert b'"choices": [], "usage": {' in body
    assert body.endswith(b"data: [DONE]\n\n")


def test_azure_speaks_its_own_way():
    """Whole seconds, an error without type and param, and both fields that tell the wait."""
    fake = fake_of(1, 1000, azure=True)
    _, fields, _ = ask(fake)
    assert fields["x-ratelimit-reset-requests"] == "60"
    _, fields, body = ask(fake)
    assert json.loads(body)["error"].keys() == {"code", "message"}
    assert "exceeded call rate limit" in json.loads(body)["error"]["message"]
    assert fields["retry-after"] == "60"


def test_scripts_answer_the_next_calls_of_a_model():
    """One call each, in their order; other models and later calls are answered as ever."""
    fake = fake_of(10, 1000)
    fake.scripts["gpt-4o"] += [rate_limited(5), None, out_of_quota()]
    assert ask(fake, model="other")[0] == 200
    limited, passed, quota, after = (ask(fake) for _ in range(4))
    assert (limited[0], limited[1]["retry-after"]) == (429, "5")
    assert json.loads(quota[2])["error"]["code"] == "insufficient_quota"
    assert [passed[0], after[0]] == [200, 200]
    assert (fake.count("gpt-4o"), fake.count("other")) == (4, 1)


def test_fields_can_be_altered():
    """A test says what becomes of what is told."""
    fake = fake_of(10, 1000)
    fake.altered["gpt-4o"] = lambda told: dict.fromkeys(told, "-1")
    _, fields, _ = ask(fake)
    assert {value for name, value in fields.items() if name.startswith("x-ratelimit")} == {"-1"}


def test_admin_api_has_pages():
    """The next page begins behind the last id, and the last says so."""
    fake = LimitedOpenAI(rows=[admin_row(f"m-{i}", 10, 100) for i in range(5)])
    first = json.loads(ask(fake, LIMITS, ADMIN_KEY, "limit=3")[2])
    assert (first["has_more"], first["last_id"], len(first["data"])) == (True, "rl-m-2", 3)
    second = json.loads(ask(fake, LIMITS, ADMIN_KEY, "limit=3&after=rl-m-2")[2])
    assert (second["has_more"], [row["model"] for row in second["data"]]) == (False, ["m-3", "m-4"])
    fake.admin_scripts[2] = failing
    assert [ask(fake, LIMITS, ADMIN_KEY, f"limit=3{more}")[0] for more in ("", "&after=rl-m-2")] == [200, 500]


def test_keys_open_what_they_are_for():
    """The admin API takes no other key, and completions do not take the admin's; errors show them in part."""
    fake = LimitedOpenAI()
    status, _, body = ask(fake, LIMITS, "sk-ours-0123456789")
    assert status == 401
    assert b"sk-ours-********6789" in body
    assert ask(fake, CHAT, ADMIN_KEY)[0] == 401
    assert fake.calls == []
    status, _, body = ask(fake, LIMITS.replace("abc", "xyz"), ADMIN_KEY)
    assert (status, json.loads(body)) == (404, {"code": 404, "message": "The project proj_xyz was not found"})
    assert fake.credentials("/v1/organization") == {"Bearer sk-ours-0123456789", f"Bearer {ADMIN_KEY}"}
