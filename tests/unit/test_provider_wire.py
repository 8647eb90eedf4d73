"""What the provider tells of its limits, in header fields, refusals and pages, and what is made of it."""

import json
import math
from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.strategies import properties
from tokenguard.providers.limits import (
    DAY_S,
    MINUTE_S,
    AdminLimit,
    Kind,
    Refusal,
    duration_s,
    error_text,
    read_page,
    read_refusal,
    window_s,
)

NOW_S = 1_790_000_000.0

# --- the time in which a bucket fills -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "remaining", "reset", "window"),
    [
        # recorded of OpenAI
        (160_000, 159_976, b"9ms", MINUTE_S),
        (10_000, 9_481, b"3.114s", MINUTE_S),
        (5_000, 4_999, b"12ms", MINUTE_S),
        (10_000, 9_999, b"8.64s", DAY_S),
        (60, 59, b"1s", MINUTE_S),
        (200, 0, b"1m0s", MINUTE_S),
        (200, 100, b"12h0m0s", DAY_S),
        (14_400, 14_370, b"2m59.56s", DAY_S),
        # its guide's example contradicts itself
        (150_000, 149_984, b"6m0s", None),
        # Azure counts in windows, and tells the seconds until this one ends
        (30_000, 29_000, b"48", MINUTE_S),
        (30_000, 0, b"60", MINUTE_S),
        (30_000, 10, b"1", MINUTE_S),
        (30_000, 29_000, b"3600", None),
        (30_000, 29_000, b"0", None),
        # windows of a minute in Go's words are no day's bucket, but for chance
        (10_000, 9_000, b"42.1s", None),
        (10_000, 9_999, b"59.9s", None),
        # nothing was used, or nothing that makes sense is told
        (10_000, 10_000, b"0s", None),
        (10_000, 10_000, b"1ms", None),
        (10_000, 9_000, b"", None),
        (10_000, 9_000, b"-6s", None),
        (10_000, 9_000, b"6", MINUTE_S),
        (10_000, 9_000, b"soon", None),
        (10_000, 9_000, b"6 s", None),
        (10_000, 9_000, b"6s6s", None),
        (10_000, 9_000, b"6\xff", None),
        (10_000, 9_000, b"nan", None),
        (10_000, 9_000, b"inf", None),
        (10_000, 9_000, b"9" * 400, None),
    ],
)
def test_window_by_example(limit, remaining, reset, window):
    """A minute, a day, or nothing where it cannot be told."""
    assert window_s(limit, remaining, reset) == window


def go_duration(ms):
    """Word a duration as Go does."""
    hours, ms = divmod(ms, 3_600_000)
    minutes, ms = divmod(ms, 60_000)
    if not hours and not minutes and ms < 1000:
        return b"%dms" % ms
    seconds = f"{ms / 1000:.3f}".rstrip("0").rstrip(".") if ms else "0"
    words = (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + f"{seconds}s"
    return words.encode()


limits = st.sampled_from([1, 2, 3, 60, 500, 10_000, 30_000, 160_000, 10**7]) | st.integers(1, 10**9)


@properties
@given(
    limits,
    st.floats(0, 1),
    st.sampled_from([MINUTE_S, DAY_S]),
    st.sampled_from([math.floor, math.ceil, round]),
    st.booleans(),
)
def test_window_of_a_bucket_is_right_or_not_told(limit, used, window, rounded, in_seconds):
    """Of a bucket that refills all the time the window is never mistaken, however its provider rounds."""
    spent = max(1.0, used * limit)
    remaining = math.floor(limit - spent)
    full_in_s = spent / limit * window
    reset = b"%d" % rounded(full_in_s) if in_seconds else go_duration(rounded(full_in_s * 1000))

    assert window_s(limit, remaining, reset) in (window, None)


@properties
@given(limits, st.floats(0.001, 1), st.sampled_from([MINUTE_S, DAY_S]))
def test_window_is_told_once_enough_is_used(limit, used, window):
    """Where the reset is some milliseconds at least, and the limit is no tiny one, nothing is left in doubt."""
    spent = max(1.0, used * limit)
    full_in_ms = spent / limit * window * 1000

    if full_in_ms >= 5:
        assert window_s(limit, math.floor(limit - spent), go_duration(round(full_in_ms))) == window


@given(st.integers(1, 10**12), st.integers(0, 10**12), st.binary(max_size=20))
@example(1, 0, b"1e3")
def test_whatever_is_told_makes_a_window_or_none(limit, remaining, reset):
    """No bytes are an error."""
    assert window_s(limit, min(limit, remaining), reset) in (None, MINUTE_S, DAY_S)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (b"9ms", 0.009),
        (b"6m0s", 360),
        (b"1m12s", 72),
        (b"1h2m3.5s", 3723.5),
        (b"24h0m0s", 86_400),
        (b"1.5ms", 0.0015),
        (b"0s", 0),
        (b"", None),
        (b"12", None),
        (b"1s1m", None),
        (b"1us", None),
        (b"-1s", None),
        (b"1 s", None),
        (b"9999999999s", None),
        (b"\xd9\xa1s", None),
    ],
)
def test_go_duration_by_example(text, seconds):
    """Hours, minutes, seconds and milliseconds; anything else is none."""
    assert duration_s(text) == (seconds if seconds is None else pytest.approx(seconds))


@given(st.integers(0, 10**11))
def test_go_duration_is_read_as_it_is_worded(ms):
    """What Go words is read back to the millisecond."""
    assert duration_s(go_duration(ms)) == pytest.approx(ms / 1000, abs=1e-6)


# --- its refusals -------------------------------------------------------------------------------------------


def body_of(message, kind="tokens", code="rate_limit_exceeded", **more):
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}, **more}).encode()


RPM = (
    "Rate limit reached for gpt-3.5-turbo-1106 in organization org-X on requests per min (RPM): Limit 3, Used 3, "
    "Requested 1. Please try again in 20s. Visit https://platform.openai.com/account/rate-limits to learn more."
)
TPM = (
    "Rate limit reached for gpt-4o in organization org-X on tokens per min (TPM): Limit 30000, Used 14567, "
    "Requested 24754. Please try again in 18.642s. Visit "
    "https://platform.openai.com/account/rate-limits to learn more."
)
TOO_LARGE = (
    "Request too large for gpt-4o in organization org-X on tokens per min (TPM): Limit 30000, Requested 39143. "
    "The input or output tokens must be reduced in order to run successfully. Visit "
    "https://platform.openai.com/account/rate-limits to learn more."
)
QUOTA = (
    "You exceeded your current quota, please check your plan and billing details. For more information on this "
    "error, read the docs: https://platform.openai.com/docs/guides/error-codes/api-errors."
)
AZURE = (
    "Requests to the ChatCompletions_Create Operation under Azure OpenAI API version 2024-10-21 have exceeded "
    "token rate limit of your current OpenAI S0 pricing tier. Please retry after 33 seconds. Please go here: "
    "https://aka.ms/oai/quotaincrease if you would like to further increase the default rate limit."
)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (body_of(RPM, "requests"), Refusal(Kind.WAIT, "rate_limit_exceeded", 20)),
        (body_of(TPM), Refusal(Kind.WAIT, "rate_limit_exceeded", 18.642)),
        (body_of(TOO_LARGE), Refusal(Kind.SHORTEN, "rate_limit_exceeded", None)),
        (body_of("Request too large for gpt-4o."), Refusal(Kind.SHORTEN, "rate_limit_exceeded", None)),
        (
            body_of(TOO_LARGE.removeprefix("Request too large for ")),
            Refusal(Kind.SHORTEN, "rate_limit_exceeded", None),
        ),
        (
            body_of(QUOTA, "insufficient_quota", "insufficient_quota"),
            Refusal(Kind.PAY, "insufficient_quota", None),
        ),
        (body_of(QUOTA, "insufficient_quota", None), Refusal(Kind.PAY, "insufficient_quota", None)),
        *(
            (body_of("No.", "insufficient_quota", code), Refusal(Kind.PAY, code, None))
            for code in (
                "credit_balance_exhausted",
                "organization_spend_limit_exceeded",
                "project_spend_limit_exceeded",
                "organization_usage_limit_exceeded",
            )
        ),
        (body_of("Slow down.", "rate_limit_error", "slow_down"), Refusal(Kind.WAIT, "slow_down", None)),
        (
            body_of("Flex does not have sufficient resources.", "x", "flex_unavailable"),
            Refusal(Kind.SHORTEN, "flex_unavailable", None),
        ),
        (json.dumps({"error": {"code": "429", "message": AZURE}}).encode(), Refusal(Kind.WAIT, "429", 33)),
        (
            json.dumps({"error": {"code": "RateLimitReached", "message": AZURE}}).encode(),
            Refusal(Kind.WAIT, "RateLimitReached", 33),
        ),
        (
            body_of("Please retry after 86400 seconds.", code=429),
            Refusal(Kind.WAIT, "429", 86_400),
        ),
        (b'{"code": 429, "message": "Please try again in 2s."}', Refusal(Kind.WAIT, "429", 2)),
        (b'{"error": "Please try again in 2s."}', Refusal(Kind.WAIT, "", 2)),
        (body_of(RPM, "requests", status=429), Refusal(Kind.WAIT, "rate_limit_exceeded", 20)),
    ],
)
def test_refusal_word_for_word(body, expected):
    """Every 429 that was recorded is read as what it asks for."""
    assert read_refusal(body) == expected


@pytest.mark.parametrize(
    ("worded", "seconds"),
    [
        ("try again in 6ms.", 0.006),
        ("try again in 120ms. Visit", 0.12),
        ("try again in 1.5s.", 1.5),
        ("try again in 20s. Visit", 20),
        ("try again in 6m0s.", 360),
        ("try again in 1m12s.", 72),
        ("try again in 7m12.5s. ", 432.5),
        ("try again in 1h0m0s.", 3600),
        ("retry after 1 second.", 1),
        ("retry after 33 seconds.", 33),
        ("try again in a while.", None),
        ("try again in 5 minutes.", None),
        ("try again in 1..5s.", None),
        ("try again in 9999999999999999s.", None),
        ("retry after " + "9" * 5000 + " seconds", None),
    ],
)
def test_wait_that_is_worded(worded, seconds):
    """A wait in a message is read, milliseconds not as minutes; what makes no sense is none."""
    wait_s = read_refusal(body_of(f"Please {worded}")).wait_s

    assert wait_s == (seconds if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize(
    ("in_ms", "in_s", "seconds"),
    [
        ([b"1500"], [b"2"], 1.5),
        ([b"0.5"], [], 0.0005),
        ([], [b"56"], 56),
        ([], [b"1.25"], 1.25),
        ([], [b" 7 "], 7),
        ([], [b"0"], 0),
        ([], [format_datetime(datetime.fromtimestamp(NOW_S + 30, UTC), usegmt=True).encode()], 30),
        ([], [format_datetime(datetime.fromtimestamp(NOW_S - 30, UTC), usegmt=True).encode()], 0),
        ([b"soon"], [b"3"], 3),
        ([b"-5"], [b"-3"], 20),
        ([], [b"1e9"], 20),
        ([], [b"2147483647"], 2**31 - 1),
        ([], [b"99999999999999999999"], 20),
        ([], [b"nan"], 20),
        ([], [b"inf"], 20),
        ([], [b""], 20),
        ([], [b"\xff\xfe"], 20),
        ([], [b"Fri, 99 Foo 99999 99:99:99 GMT"], 20),
        ([], [b"Mon, 01 Jan 0001 00:00:00 +2359"], 0),
        ([b"no"], [b"never", b"4"], 4),
    ],
)
def test_wait_that_fields_tell(in_ms, in_s, seconds):
    """Milliseconds come first, then seconds, then a date; what is none of them leaves the message's words."""
    assert read_refusal(body_of(RPM), in_ms, in_s, NOW_S).wait_s == pytest.approx(seconds)


@given(st.binary(max_size=60), st.binary(max_size=60))
def test_no_field_of_a_refusal_is_an_error(in_ms, in_s):
    """Whatever bytes tell a wait, it is a number that is not negative, or nothing."""
    wait_s = read_refusal(b"", [in_ms], [in_s], NOW_S).wait_s

    assert wait_s is None or 0 <= wait_s < math.inf


anything = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["error", "message", "code", "type"]) | st.text(max_size=5), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@given(st.binary(max_size=200) | anything.map(lambda value: json.dumps(value).encode()))
@example(b"[" * 100_000)
@example(b'{"error":' * 50_000)
@example(b'{"error":{"message":"\xff\xfe"}}')
@example(b'{"error":{"message":' + b"9" * 5000 + b"}}")
@example(body_of("Limit " + "9" * 5000 + ", Requested 1"))
@example(body_of("Limit 1, " * 7000))
@example(b"<html>429</html>")
@example(b"")
def test_no_body_of_a_refusal_is_an_error(body):
    """A body that says nothing that is understood asks to wait, for nobody knows how long."""
    refusal = read_refusal(body)

    assert refusal.kind in Kind
    assert refusal.wait_s is None or refusal.wait_s >= 0
    assert len(error_text(body)) <= 500


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"code": 404, "message": "The project proj-1 was not found"}', "The project proj-1 was not found"),
        (b'{"error": {"message": "Incorrect\\nAPI key"}}', "Incorrect API key"),
        (b'{"error": "nope"}', "nope"),
        (b"<html>\n502</html>", "<html> 502</html>"),
        (b"\xff", "�"),
        (b"", ""),
    ],
)
def test_what_an_error_says(body, said):
    """The message, whatever its shape, in one line."""
    assert error_text(body) == said


# --- pages of the admin API ---------------------------------------------------------------------------------


def page_of(*entries, **members):
    return json.dumps({"object": "list", "data": list(entries), "has_more": False, **members}).encode()


ENTRY = {
    "object": "project.rate_limit",
    "id": "rl-gpt-4o",
    "model": "gpt-4o",
    "max_requests_per_1_minute": 500,
    "max_tokens_per_1_minute": 30_000,
    "max_images_per_1_minute": 7,
    "batch_1_day_max_input_tokens": 90_000,
}


def test_page_tells_limits_and_where_the_next_begins():
    """Requests and tokens per minute, requests per day; and the id after which there is more."""
    body = page_of({**ENTRY, "max_requests_per_1_day": 10_000}, {"model": "o3"}, has_more=True, last_id="rl-o3")

    assert read_page(body) == (
        [
            AdminLimit("gpt-4o", "requests", 500, MINUTE_S),
            AdminLimit("gpt-4o", "requests", 10_000, DAY_S),
            AdminLimit("gpt-4o", "tokens", 30_000, MINUTE_S),
        ],
        "rl-o3",
    )


def test_last_page_has_none_behind_it():
    """A page that has no more ends it, whatever its last id."""
    assert read_page(page_of(last_id="rl-1")) == ([], None)
    assert read_page(b'{"data": []}') == ([], None)


@pytest.mark.parametrize("value", [None, -1, 0, True, False, "500", [500], {}, 0.5, 1e400])
def test_limit_that_limits_nothing_is_none(value):
    """What is no number of at least one is no limit."""
    text = json.dumps({**ENTRY, "max_requests_per_1_minute": "HERE"}).replace('"HERE"', _json(value))
    try:
        found, _ = read_page(b'{"data": [' + text.encode() + b"]}")
    except ValueError:
        assert value == 1e400  # no JSON that is read
    else:
        assert [limit.meter for limit in found] == ["tokens"]


def _json(value):
    return "1e400" if value == 1e400 else json.dumps(value)


def test_whole_float_is_a_limit():
    """Some write 500.0 for 500."""
    found, _ = read_page(page_of({"model": "m", "max_tokens_per_1_minute": 500.0}))

    assert found == [AdminLimit("m", "tokens", 500, MINUTE_S)]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b"<html>",
        b"\xff",
        b"{}",
        b'{"data": {}}',
        b'{"data": [1]}',
        b'{"data": [{}]}',
        b'{"data": [{"model": 4}]}',
        b'{"data": [], "has_more": true}',
        b'{"data": [], "has_more": true, "last_id": null}',
        b'{"data": [], "has_more": true, "last_id": 7}',
        b'{"data": []',
    ],
)
def test_what_is_no_page_is_an_error(body):
    """A page that cannot be read whole is not taken for the last."""
    with pytest.raises(ValueError, match=r"."):
        read_page(body)


@given(st.binary(max_size=100) | anything.map(lambda value: json.dumps({"data": [value, ENTRY]}).encode()))
@example(b"[" * 100_000)
def test_page_is_read_or_no_page(body):
    """Whatever comes is a page or an error that says so."""
    try:
        found, following = read_page(body)
    except ValueError:
        return
    assert all(limit.limit >= 1 for limit in found)
    assert following is None
