"""A refusal as the clients' own retry logic needs it, and every error as its answer."""

import json
import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.house import MODEL, House, S, grant, named
from tests.strategies import properties
from tokenguard._limit_fields import duration
from tokenguard.errors import (
    AlreadySettled,
    BudgetNotFound,
    InvalidRequest,
    InvalidSetting,
    InvalidValue,
    StaleHandle,
    StateUnwritable,
    TableBusy,
    TableFull,
    UpstreamError,
    UpstreamTimeout,
)
from tokenguard.model import NEVER_US, BucketState, Budget, Decision, Meter, Source
from tokenguard.provider_limits.gates import gate_of
from tokenguard.refusal import error_answer, problem, refuse

GO_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+)ms)?")


def microseconds(text):
    """Return what a Go duration says, read as clients read it."""
    hours, minutes, seconds, ms = GO_DURATION.fullmatch(text).groups()
    total = int(hours or 0) * 3600 + int(minutes or 0) * 60 + Fraction(seconds or 0) + Fraction(int(ms or 0), 1000)
    return int(total * S)


def state(scope="user:alice", meter=Meter.TOKENS, **more):
    """Return a bucket's state: 70 of 1000 left, 80 asked, 2 s to wait."""
    values = {"limit": 1000, "level": 70, "cost": 80, "wait_us": 2 * S, "full_in_us": 186 * S, **more}
    return BucketState(named(scope, meter, values.pop("model", None)), **values)


def refusal_of(*states):
    """Return the decision that refuses on these buckets."""
    binding = max(states, key=lambda each: each.wait_us)
    return Decision(False, binding.wait_us, binding, states)


def refused(*states, jitter=0.0):
    """Return the status, headers and body of a refusal."""
    answer = refuse(refusal_of(*states), jitter)
    headers = {name.decode(): value.decode() for name, value in answer.headers}
    assert len(headers) == len(answer.headers), "a header is given twice"
    return answer.status, headers, json.loads(answer.body)


# --- when to come back --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wait_us", "seconds", "ms"),
    [
        (1, "1", "1"),
        (999, "1", "1"),
        (1_000, "1", "1"),
        (1_001, "1", "2"),
        (999_999, "1", "1000"),
        (S, "1", "1000"),
        (S + 1, "2", "1001"),
        (2 * S, "2", "2000"),
        (18_641_001, "19", "18642"),
        (60 * S, "60", "60000"),
        (86_400 * S, "86400", "86400000"),
        (NEVER_US - 1, "1000000000", "1000000000000"),
    ],
)
def test_wait_is_told_in_whole_seconds_and_milliseconds_rounded_up(wait_us, seconds, ms):
    """retry-after is an integer of at least 1; both forms never send anybody back too early."""
    _, headers, _ = refused(state(wait_us=wait_us))

    assert headers["retry-after"] == seconds
    assert headers["retry-after-ms"] == ms


@pytest.mark.parametrize(
    ("wait_us", "says"),
    [(1, None), (S, None), (60 * S, None), (60 * S + 1, "false"), (86_400 * S, "false"), (NEVER_US, "false")],
)
def test_long_waits_tell_clients_not_to_retry(wait_us, says):
    """x-should-retry is false for waits over a minute and for never, and absent otherwise."""
    _, headers, _ = refused(state(wait_us=wait_us))

    assert headers.get("x-should-retry") == says


@pytest.mark.parametrize("cost", [80, 2001])
def test_never_has_no_time_to_come_back(cost):
    """Where waiting does not help there is neither retry-after nor a wait in the body."""
    _, headers, body = refused(state(wait_us=NEVER_US, full_in_us=NEVER_US, cost=cost))

    assert "retry-after" not in headers
    assert "retry-after-ms" not in headers
    assert headers["x-should-retry"] == "false"
    assert body["tokenguard"]["retryAfterMs"] is None
    assert body["tokenguard"]["buckets"][0]["retryAfterMs"] is None
    assert "try again in" not in body["error"]["message"]


waits_us = st.integers(1, 10 * S) | st.integers(1, NEVER_US - 1)


@properties
@given(waits_us, st.floats(0, 1))
def test_jitter_prolongs_a_wait_by_at_most_a_tenth(wait_us, jitter):
    """Waits over a second gain up to a tenth, shorter ones nothing, and none is shortened."""
    _, headers, _ = refused(state(wait_us=wait_us), jitter=jitter)
    ms = int(headers["retry-after-ms"])

    assert ms * 1000 >= wait_us
    if wait_us <= S:
        assert ms == -(-wait_us // 1000)
    else:
        assert ms <= wait_us * 1.1 / 1000 + 1
        assert (ms > 60_000) is (wait_us > 60 * S)
    assert int(headers["retry-after"]) == max(1, -(-ms // 1000))


def test_crowd_that_is_refused_together_does_not_come_back_together():
    """Refusals of one moment name different times, spread over a tenth of the wait."""
    waits = {refused(state(wait_us=20 * S), jitter=step / 10)[1]["retry-after-ms"] for step in range(11)}

    assert waits == {str(20_000 + 200 * step) for step in range(11)}


# --- whose limit it was -------------------------------------------------------------------------------------


def test_refusal_is_an_error_as_the_provider_words_it():
    """A 429 with all four members, the meter as its type, and rate_limit_exceeded."""
    status, headers, body = refused(state())

    assert status == 429
    assert headers["content-type"] == "application/json"
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["type"] == "tokens"
    assert body["error"]["code"] == "rate_limit_exceeded"
    assert body["error"]["param"] is None


def test_type_is_the_meter_that_binds():
    """A budget of requests refuses with the type requests."""
    _, _, body = refused(state(meter=Meter.REQUESTS, cost=1, level=0))

    assert body["error"]["type"] == "requests"


@pytest.mark.parametrize(
    ("given_state", "words"),
    [
        (state(), ["user:alice", "tokens", "limit 1000", "remaining 70", "requested 80", "try again in 2s"]),
        (state("team:red", level=-5), ["team:red", "limit 1000", "remaining 0", "requested 80"]),
        (state("global", model=MODEL), ["global:*", MODEL]),
        (state(wait_us=NEVER_US, cost=2001), ["too large", "user:alice", "limit 1000", "requested 2001"]),
        (state(wait_us=NEVER_US), ["used up", "user:alice", "limit 1000", "remaining 70", "requested 80"]),
        (state(meter=Meter.REQUESTS, cost=1, level=0), ["requests", "remaining 0", "requested 1"]),
    ],
)
def test_message_tells_whose_limit_and_how_much(given_state, words):
    """The message has the scope, the limit, what remains, what was requested and the wait, and says it is ours."""
    _, _, body = refused(given_state)

    for word in [*words, "TokenGuard", "not a limit of the provider"]:
        assert word in body["error"]["message"]


@properties
@given(waits_us)
def test_wait_in_the_message_is_that_of_the_headers(wait_us):
    """The message writes the wait as the provider does, and never sends anybody back too early."""
    _, headers, body = refused(state(wait_us=wait_us))
    (told,) = re.findall(r"Please try again in (\S+)\. ", body["error"]["message"])

    assert microseconds(told) == int(headers["retry-after-ms"]) * 1000


def test_body_tells_every_scope():
    """Beside the error stand the binding scope, the wait, and each bucket of the path in order."""
    team = state("team:red", wait_us=0, level=900, cost=80, limit=5000)
    user = state(meter=Meter.REQUESTS, model=MODEL, wait_us=1_500_001, level=-3, cost=1)

    _, _, body = refused(team, user)

    assert body["tokenguard"] == {
        "scope": "user:alice",
        "retryAfterMs": 1501,
        "buckets": [
            {
                "scope": "team",
                "id": "red",
                "meter": "tokens",
                "model": None,
                "source": None,
                "limit": 5000,
                "remaining": 900,
                "level": 900,
                "requested": 80,
                "allowed": True,
                "retryAfterMs": 0,
            },
            {
                "scope": "user",
                "id": "alice",
                "meter": "requests",
                "model": MODEL,
                "source": None,
                "limit": 1000,
                "remaining": 0,
                "level": -3,
                "requested": 1,
                "allowed": False,
                "retryAfterMs": 1501,
            },
        ],
    }


def test_any_id_can_be_told():
    """Ids of any script and with any punctuation come back as they were."""
    scope = 'user:"<Ünï\\ 日本/a:b>"'

    _, _, body = refused(state(scope))

    assert scope in body["error"]["message"]
    assert body["tokenguard"]["scope"] == scope


def test_allowed_decision_is_no_refusal():
    """There is no 429 for a call that passed."""
    with pytest.raises(ValueError, match="allowed"):
        refuse(Decision(True, 0, None, ()), 0.0)


def test_refusal_of_a_real_limiter_is_told():
    """What the limiter decides is what the answer says, to the millisecond."""
    house = House({"user": grant(1000, rate=5), "team": grant(5000, rate=25)})
    house.taken(1000, prompt=1000)
    answer = refuse(house.reserve(100), 0.0)

    headers = dict(answer.headers)
    assert headers[b"retry-after"] == b"20"
    assert headers[b"retry-after-ms"] == b"20000"
    assert headers[b"x-ratelimit-remaining-tokens"] == b"0"
    assert headers[b"x-ratelimit-reset-tokens"] == b"3m20s"
    assert "user:alice" in json.loads(answer.body)["error"]["message"]


# --- x-ratelimit-* ------------------------------------------------------------------------------------------


def limits(headers):
    """Return the x-ratelimit headers."""
    return {name.removeprefix("x-ratelimit-"): value for name, value in headers.items() if "x-ratelimit" in name}


def test_binding_bucket_is_shown_and_the_other_meters_tightest():
    """Of the meter that binds the binding bucket is shown, though another holds less; else the tightest."""
    _, headers, _ = refused(
        state("global", level=10, limit=90, wait_us=0),
        state("team:red", Meter.REQUESTS, level=7, limit=60, wait_us=0, full_in_us=53 * S),
        state("user:alice", level=70, full_in_us=186 * S),
        state("user:alice", Meter.REQUESTS, level=9, limit=10, wait_us=0),
    )

    assert limits(headers) == {
        "limit-tokens": "1000",
        "remaining-tokens": "70",
        "reset-tokens": "3m6s",
        "limit-requests": "60",
        "remaining-requests": "7",
        "reset-requests": "53s",
    }


def test_debt_is_shown_as_nothing_left():
    """Remaining is never negative, and reset is when the bucket is full, not when the call passes."""
    _, headers, _ = refused(state(level=-500, full_in_us=1500 * S))

    assert limits(headers) == {"limit-tokens": "1000", "remaining-tokens": "0", "reset-tokens": "25m0s"}


def test_bucket_that_never_fills_has_no_reset():
    """A fixed grant has a limit and a rest, and no time of reset."""
    _, headers, _ = refused(state(wait_us=NEVER_US, full_in_us=NEVER_US))

    assert limits(headers) == {"limit-tokens": "1000", "remaining-tokens": "70"}


def test_success_shows_the_tightest_bucket_of_each_meter():
    """On an allowed call, of each meter the bucket with the least in it is shown, the first of equals."""
    house = House({"global": grant(10_000, 50), "team": grant(500, 5), "user": grant(500, 1)})
    house.set("user:alice", grant(20, 1), Meter.REQUESTS)

    headers = dict(house.taken(100).limit_headers())

    assert headers == {
        b"x-ratelimit-limit-tokens": b"500",
        b"x-ratelimit-remaining-tokens": b"400",
        b"x-ratelimit-reset-tokens": b"20s",
        b"x-ratelimit-limit-requests": b"20",
        b"x-ratelimit-remaining-requests": b"19",
        b"x-ratelimit-reset-requests": b"1s",
    }


def test_call_without_limits_has_no_limits_to_show():
    """Where nothing limits a call there are no such headers."""
    assert House().taken(100).limit_headers() == []


# --- durations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("us", "text"),
    [
        (0, "0ms"),
        (1, "1ms"),
        (9_000, "9ms"),
        (12_000, "12ms"),
        (999_000, "999ms"),
        (999_001, "1s"),
        (S, "1s"),
        (8_640_000, "8.64s"),
        (3_114_000, "3.114s"),
        (10 * S, "10s"),
        (59_999_000, "59.999s"),
        (59_999_001, "1m0s"),
        (72 * S, "1m12s"),
        (360 * S, "6m0s"),
        (3_600 * S, "1h0m0s"),
        (3_602 * S, "1h0m2s"),
        (86_400 * S, "24h0m0s"),
        (3_660_500_000, "1h1m0.5s"),
    ],
)
def test_duration_is_written_as_the_provider_writes_it(us, text):
    """Durations look like those on the provider's wire."""
    assert duration(us) == text


@properties
@given(st.integers(0, 10**8) | st.integers(0, NEVER_US))
def test_duration_reads_back_rounded_up_to_the_millisecond(us):
    """What a client's parser reads is the duration, rounded up to the millisecond."""
    assert microseconds(duration(us)) == -(-us // 1000) * 1000


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "kind", "code", "param"),
    [
        (InvalidRequest("n", "n is odd"), 400, "invalid_request_error", "invalid_value", "n"),
        (InvalidValue("id", "id is odd"), 400, "invalid_request_error", "invalid_value", "id"),
        (InvalidSetting("CAP_USER", "no"), 400, "invalid_request_error", "invalid_value", "CAP_USER"),
        (BudgetNotFound("none"), 404, "invalid_request_error", "budget_not_found", None),
        (UpstreamTimeout("late", sent=True), 504, "upstream_error", "upstream_timeout", None),
        (UpstreamTimeout("late", sent=False), 504, "upstream_error", "upstream_timeout", None),
        (UpstreamError("gone", sent=True), 502, "upstream_error", "upstream_unreachable", None),
        (UpstreamError("gone", sent=False), 502, "upstream_error", "upstream_unreachable", None),
        (TableFull("full"), 503, "service_unavailable_error", "no_bucket", None),
        (TableBusy("busy"), 503, "service_unavailable_error", "no_bucket", None),
        (StaleHandle("stale"), 503, "service_unavailable_error", "no_bucket", None),
        (StateUnwritable("full"), 503, "service_unavailable_error", "state_unwritable", None),
        (AlreadySettled("twice"), 500, "server_error", None, None),
    ],
)
def test_every_error_has_its_answer(error, status, kind, code, param):
    """Each error of ours is answered with its status and all four members; a 503 says when to come back."""
    answer = error_answer(error)
    told = json.loads(answer.body)["error"]

    assert answer.status == status
    assert {**told, "message": ""} == {"message": "", "type": kind, "param": param, "code": code}
    assert (str(error) in told["message"]) is (status < 500 or status > 500)
    assert dict(answer.headers)[b"content-type"] == b"application/json"
    assert dict(answer.headers).get(b"retry-after") == (b"1" if status == 503 else None)


def test_error_about_a_name_that_is_no_unicode_can_be_sent():
    """A name with a lone surrogate does not turn a 400 into a failure of ours."""
    answer = error_answer(InvalidRequest("\ud800", "member '\\ud800' is given more than once"))

    assert answer.status == 400
    assert json.loads(answer.body)["error"]["code"] == "invalid_value"


def test_inner_failure_tells_nothing_of_the_inside():
    """An error that is nobody else's business is answered without its text."""
    assert b"secret" not in error_answer(AlreadySettled("secret")).body


def test_problem_says_when_to_come_back_only_if_asked():
    """A problem has retry-after where it is given, in whole seconds."""
    assert dict(problem(503, "m", "k", None, retry_after_s=7).headers)[b"retry-after"] == b"7"
    assert b"retry-after" not in dict(problem(400, "m", "k", None).headers)


# --- limits of the provider's -------------------------------------------------------------------------------


def theirs(source, meter=Meter.TOKENS, **more):
    """Return the state of a bucket whose limit was learned."""
    return state("global", meter, model=MODEL, **more)._replace(
        name=named("global", meter, MODEL)._replace(source=source)
    )


def gate(wait_us=2 * S, **more):
    """Return the state of a model's gate."""
    values = {"limit": 1000, "level": -1000, "cost": 1000, "full_in_us": 3 * S, **more}
    return BucketState(gate_of(MODEL), wait_us=wait_us, **values)


@pytest.mark.parametrize("source", [Source.HEADERS, Source.ADMIN, Source.ADMIN_DAILY])
def test_refusal_of_a_learned_limit_says_whose_it_is(source):
    """Ours and the provider's are told apart, in words and in the body; all else is as ever."""
    status, headers, body = refused(state(wait_us=0), theirs(source))

    assert status == 429
    assert body["error"]["message"] == (
        f"Rate limit reached for global:* on tokens of {MODEL}: limit 1000, remaining 70, requested 80. Please "
        "try again in 2s. This is the provider's own limit, which TokenGuard keeps calls within."
    )
    assert (body["error"]["type"], body["error"]["code"]) == ("tokens", "rate_limit_exceeded")
    assert [bucket["source"] for bucket in body["tokenguard"]["buckets"]] == [None, source]
    assert headers["x-ratelimit-limit-tokens"] == "1000"
    assert headers["retry-after"] == "2"


def test_refusal_of_a_budget_of_ours_says_so():
    """Beside learned limits that would let the call pass."""
    _, _, body = refused(state(), theirs(Source.HEADERS, wait_us=0))

    assert body["error"]["message"].endswith("This is a TokenGuard budget, not a limit of the provider.")


def test_refusal_of_a_gate_says_that_the_provider_asked_to_wait():
    """Its words tell neither a limit nor a remainder, which mean nothing to anybody."""
    status, headers, body = refused(gate())

    assert status == 429
    assert body["error"]["message"] == (
        f"The provider asked to wait: calls of {MODEL} are held back. Please try again in 2s. This is the "
        "provider's own limit, which TokenGuard keeps calls within."
    )
    assert (body["error"]["type"], body["error"]["code"]) == ("requests", "rate_limit_exceeded")
    assert (headers["retry-after"], headers["retry-after-ms"]) == ("2", "2000")
    assert "x-should-retry" not in headers


def test_no_rate_limit_field_tells_of_a_gate():
    """Where it alone refuses there is none; beside other buckets there are theirs."""
    _, alone, _ = refused(gate())
    _, beside, _ = refused(state(wait_us=0), state(meter=Meter.REQUESTS, wait_us=0, limit=60), gate())

    assert not any(name.startswith("x-ratelimit") for name in alone)
    told = {name: value for name, value in beside.items() if name.startswith("x-ratelimit-limit")}
    assert told == {"x-ratelimit-limit-tokens": "1000", "x-ratelimit-limit-requests": "60"}


def test_admitted_call_is_told_of_no_gate():
    """The fields of an answer that passes through an open gate tell of the other buckets alone."""
    house = House({"user": grant(1000)})
    house.backend.put(Budget(gate_of(MODEL), grant(1000, 1000)))
    fields = dict(house.taken(10).limit_headers())

    assert {name for name in fields if b"limit" in name and name.endswith(b"tokens")}
    assert not any(name.endswith((b"requests", b"gate")) for name in fields)


def test_gate_that_is_closed_for_long_tells_clients_not_to_retry():
    """A wait of over a minute is not to be waited out by a client on its own."""
    _, headers, _ = refused(gate(wait_us=61 * S))

    assert headers["x-should-retry"] == "false"
