"""What an operator sees of calls: metrics, log lines, request ids."""

import asyncio
import json
import re

import httpx
import openai
import pytest

from tests.e2e.conftest import DRIVERS, OUR_KEY, THEIR_KEY, running
from tests.e2e.fake_openai import JSON, completion, usage_of

MESSAGES = [{"role": "user", "content": "the secret of the day"}]


def series(server):
    """Return the metrics as they are now: each series with its labels, and its value."""
    text = server.get("/metrics").text
    return {name: float(value) for name, value in re.findall(r"^(tokenguard\S+) (\S+)$", text, re.MULTILINE)}


@pytest.fixture(params=DRIVERS)
def observed(request, tmp_path, upstream_url):
    """A server of each driver that logs calls as JSON."""
    with DRIVERS[request.param](
        tmp_path,
        OPENAI_API_KEY=OUR_KEY,
        OPENAI_BASE_URL=upstream_url,
        RATE_USER=0,
        CAP_USER=300,
        TOKENGUARD_LOG_CALLS="on",
        TOKENGUARD_LOG_FORMAT="json",
    ) as server:
        yield server


def quiet(server):
    """Return the metrics once no call is under way: a server may end a call just after its last byte."""
    for _ in range(1000):
        if (seen := series(server))["tokenguard_calls_in_flight"] == 0:
            return seen
    pytest.fail("a call does not end")


def lines(server):
    quiet(server)
    return [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]


def test_metrics_add_up(observed, fake, user):
    """Calls, refusals and tokens are counted, and what was reserved is accounted for to the token."""
    client = observed.client(user)
    fake.usage = usage_of(10, 200)
    client.chat.completions.create(model="m", messages=MESSAGES, max_tokens=50)
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(model="m", messages=MESSAGES, n=9)
    list(client.chat.completions.create(model="m", messages=MESSAGES, max_tokens=50, stream=True))
    seen = quiet(observed)
    assert seen['tokenguard_requests_total{route="/v1/chat/completions",status="200"}'] == 2
    assert seen['tokenguard_requests_total{route="/v1/chat/completions",status="429"}'] == 1
    assert seen['tokenguard_refusals_total{meter="tokens",scope="user"}'] == 1
    assert seen['tokenguard_upstream_answers_total{status="200"}'] == 2
    assert seen["tokenguard_tokens_settled_total"] == 420
    assert seen["tokenguard_tokens_reserved_total"] + seen["tokenguard_tokens_overrun_total"] == (
        seen["tokenguard_tokens_settled_total"] + seen["tokenguard_tokens_refunded_total"]
    )
    assert seen["tokenguard_reservations_open"] == 0
    assert seen["tokenguard_buckets_used"] == 2
    assert seen["tokenguard_estimate_ratio_count"] == 2
    assert seen['tokenguard_estimate_error_count{model="m",of="prompt"}'] == 2
    assert seen['tokenguard_estimate_error{model="m",of="total",quantile="0.95"}'] >= 0.5
    assert user not in httpx.get(f"{observed.url}/metrics").text


def test_calls_under_way_are_shown(observed, fake, user, upstream_loop):
    """While the provider holds an answer back, the call is in flight and its reservation open."""
    arrived, go_on = asyncio.Event(), asyncio.Event()

    async def script(reply):
        await reply.head()
        await reply.piece(b" ")
        arrived.set()
        await go_on.wait()
        await reply.piece(completion(reply.received, usage_of(10, 20)))
        await reply.end()

    fake.script = script
    body = {"model": "m", "messages": MESSAGES}
    with httpx.stream(
        "POST", f"{observed.url}/v1/chat/completions", json=body, headers={"x-user-id": user}
    ) as call:
        pieces = call.iter_raw()
        next(pieces)
        assert series(observed)["tokenguard_reservations_open"] == 1
        assert series(observed)["tokenguard_calls_in_flight"] == 1
        upstream_loop.call_soon_threadsafe(go_on.set)
        list(pieces)
    assert quiet(observed)["tokenguard_reservations_open"] == 0


def test_each_call_is_one_line_that_tells_all_but_what_was_said(observed, fake, user):
    """A call's line has who, what, how it ended and what it took; no text of it, and no key."""
    headers = {"x-user-id": user, "x-team-id": "red\u00e9 team".encode(), "x-request-id": "req-77"}
    headers["authorization"] = f"Bearer {THEIR_KEY}"
    observed.post("/v1/chat/completions", json={"model": "gpt-4o", "messages": MESSAGES}, headers=headers)
    observed.set_budget("user", user, 300, level=0)
    with pytest.raises(openai.RateLimitError):
        observed.client(user).chat.completions.create(model="m", messages=MESSAGES)
    observed.post("/v1/chat/completions", content=b"{", headers={"x-user-id": user})
    done, refused, bad = (line for line in lines(observed) if line["logger"] == "tokenguard.calls")
    assert done["request_id"] == "req-77"
    assert (done["user"], done["team"], done["model"]) == (user, "red\u00e9 team", "gpt-4o")
    assert (done["status"], done["outcome"], done["charged"], done["upstream_status"]) == (200, "settled", 30, 200)
    assert 0 <= done["upstream_ms"] <= done["ms"]
    assert (refused["status"], refused["refused_by"]) == (429, f"user:{user} on tokens")
    assert "outcome" not in refused
    assert bad["status"] == 400
    for secret in (OUR_KEY, THEIR_KEY, MESSAGES[0]["content"], "Hello there"):
        assert secret not in observed.log


def test_no_line_for_calls_unless_asked_for(tmp_path, upstream_url, fake, user):
    """By default the log tells nothing of calls that go well, or that are refused."""
    with running(tmp_path, "serve", OPENAI_API_KEY=OUR_KEY, OPENAI_BASE_URL=upstream_url) as server:
        server.client(user).chat.completions.create(model="m", messages=MESSAGES)
        server.post("/v1/chat/completions", content=b"{", headers={"x-user-id": user})
        assert server.log == ""


def test_request_id_goes_through_and_comes_back(server, fake, user):
    """The caller's id reaches the provider and comes back; the provider's own has a name of its own."""

    async def script(reply):
        await reply.whole(200, [*JSON, (b"x-request-id", b"req_theirs")], completion(reply.received, fake.usage))

    fake.script = script
    raw = server.client(user, **{"x-request-id": "my-id/1"}).chat.completions.with_raw_response
    answer = raw.create(model="m", messages=MESSAGES)
    assert fake.received[-1].header("x-request-id") == ["my-id/1"]
    assert answer.headers["x-request-id"] == "my-id/1"
    assert answer.headers["x-upstream-request-id"] == "req_theirs"


@pytest.mark.parametrize("given", [None, "", "two words", "x" * 129, "h\u00e9".encode("latin-1")])
def test_request_id_is_made_where_none_can_be_used(server, fake, user, given):
    """Without an id, or with one that cannot be passed on, the call gets one, and so does every answer."""
    headers = {"x-user-id": user} | ({} if given is None else {"x-request-id": given})
    answer = server.post("/v1/chat/completions", json={"model": "m", "messages": MESSAGES}, headers=headers)
    made = answer.headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", made)
    assert fake.received[-1].header("x-request-id") == [made]
    paths = ("/", "/nothing", "/v1/models", "/config/budget", "/metrics", "/openapi.json")
    assert all(httpx.get(server.url + path).headers["x-request-id"] for path in paths)


def test_request_id_of_a_refused_call_comes_back(server, fake, user):
    """A refusal and an error carry the id too, so that the caller can be told which line in the log it is."""
    server.set_budget("user", user, 10, level=0)
    for content, status in ((b'{"model":"m","messages":[]}', 429), (b"{", 400)):
        headers = {"x-user-id": user, "x-request-id": "r-9"}
        answer = server.post("/v1/chat/completions", content=content, headers=headers)
        assert (answer.status_code, answer.headers["x-request-id"]) == (status, "r-9")
