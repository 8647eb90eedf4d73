"""The provider is asked for its limits, over real sockets; whatever it answers, no secret of ours is told."""

import json
import threading
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.house import MODEL, House, grant, named
from tests.mirror import learned
from tests.redis_servers import free_port
from tokenguard._heads import Told
from tokenguard.errors import InvalidRequest, InvalidValue, ProviderError
from tokenguard.model import Budget, Meter, Source
from tokenguard.provider_limits import ProviderLimits
from tokenguard.provider_limits.gates import gate_of
from tokenguard.provider_limits.source import MAX_BYTES, MAX_PAGES, ProviderAccount, ProviderSource

KEY, ADMIN_KEY = "sk-ordinary-0123456789", "sk-admin-9876543210"
PATH = "/v1/organization/projects/proj%2F1/rate_limits"
CREDENTIALS = [(b"authorization", f"Bearer {KEY}".encode()), (b"openai-project", b"proj-77")]
TOLD = [
    ("x-ratelimit-limit-tokens", "30000"),
    ("x-ratelimit-remaining-tokens", "29000"),
    ("x-ratelimit-reset-tokens", "2s"),
    ("x-ratelimit-limit-requests", "10000"),
    ("x-ratelimit-remaining-requests", "9999"),
    ("x-ratelimit-reset-requests", "8.64s"),
]
RESTS = [(b"x-ratelimit-remaining-tokens", b"250"), (b"x-ratelimit-reset-tokens", b"30s")]


def page(*entries, **members):
    return 200, json.dumps({"object": "list", "data": list(entries), "has_more": False, **members}), []


def limit(model, tokens, **more):
    return {
        "object": "project.rate_limit",
        "id": f"rl-{model}",
        "model": model,
        "max_tokens_per_1_minute": tokens,
        **more,
    }


class Provider(ThreadingHTTPServer):
    """Answers as its script says, and keeps what it was asked."""

    daemon_threads = True

    def __init__(self, script):
        self.script = script
        self.asked = []
        self.ending = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.asked.append((self.command, self.path, dict(self.headers), body))
        answer = self.server.script(len(self.server.asked), self.path)
        if callable(answer):
            answer(self)
            return
        status, text, fields = answer
        data = text.encode() if isinstance(text, str) else text
        self.send_response(status)
        for name, value in [("content-length", str(len(data))), *fields]:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    do_POST = do_GET  # noqa: N815 - the base calls it so

    def log_message(self, *_):
        pass


@contextmanager
def provider(script):
    """Serve what a script says; it is a list of answers, or makes them of the number and the path."""
    answers = script if callable(script) else lambda number, _path: script[number - 1]
    with Provider(answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.ending.set()
            server.shutdown()
            thread.join()


def source_of(url, *, admin_key=ADMIN_KEY, credentials=CREDENTIALS, timeout_s=10.0):
    return ProviderSource(ProviderAccount(url, credentials, admin_key, "proj/1"), timeout_s)


def fails(source, ask=ProviderSource.read):
    """Ask, and return the error's words, which tell no secret, in one line."""
    with pytest.raises(ProviderError) as caught:
        ask(source)
    told = str(caught.value)
    assert KEY not in told
    assert ADMIN_KEY not in told
    assert "\n" not in told
    assert caught.value.__cause__ is None
    return told


# --- the admin API ------------------------------------------------------------------------------------------


def test_all_pages_are_read():
    """Each begins after the last of the one before, and all are asked for with the admin key alone."""
    with provider(
        [
            page(limit("a", 5), has_more=True, last_id="rl-a&b"),
            page(limit("b", 6), has_more=True, last_id="x"),
            page(),
        ]
    ) as server:
        found = source_of(server.url).read()

    assert [(told.model, told.limit) for told in found] == [("a", 5), ("b", 6)]
    assert [path for _, path, _, _ in server.asked] == [
        f"{PATH}?limit=100",
        f"{PATH}?limit=100&after=rl-a%26b",
        f"{PATH}?limit=100&after=x",
    ]
    assert {fields["authorization"] for _, _, fields, _ in server.asked} == {f"Bearer {ADMIN_KEY}"}
    assert not any(KEY in str(fields) for _, _, fields, _ in server.asked)


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (
            401,
            '{"error": {"message": "Incorrect API key provided: ' + ADMIN_KEY + '."}}',
            "Incorrect API key provided: ….",
        ),
        (403, '{"error": {"message": "You have no\\npermission"}}', "You have no permission"),
        (404, '{"code": 404, "message": "The project proj_1 was not found"}', "The project proj_1 was not found"),
        (429, '{"error": {"message": "Slow down"}}', "Slow down"),
        (500, "<html>oops</html>", "<html>oops</html>"),
        (503, "", ""),
        (400, '{"error": {"message": "' + "a" * 495 + ADMIN_KEY + '"}}', "a" * 495 + "…"),
        (400, b"\xff\xfe" + ADMIN_KEY.encode(), "��…"),
    ],
)
def test_refusal_is_told_with_what_the_provider_says(status, body, said):
    """Its status and its message, in whatever shape, without secrets of ours, even where it is cut."""
    with provider([(status, body, [])]) as server:
        told = fails(source_of(server.url))

    assert told == f"the provider answered {status} to GET /organization/projects/proj%2F1/rate_limits: {said}"


def test_redirect_is_not_followed():
    """Our keys go nowhere but where they were meant to go."""
    with provider([page()]) as elsewhere:
        with provider([(302, "", [("location", elsewhere.url)])]) as server:
            assert "answered 302" in fails(source_of(server.url))
        assert elsewhere.asked == []


@pytest.mark.parametrize(
    "body",
    ["", "<html>", "[]", '{"data": [{}]}', '{"data": [], "has_more": true}', "[" * 100_000, b"\xff"],
)
def test_page_that_cannot_be_read_is_told(body):
    """It is not taken for an empty one."""
    with provider([(200, body, [])]) as server:
        assert "cannot be read" in fails(source_of(server.url))


def test_pages_without_an_end_are_given_up():
    """A provider that always has more is not asked for ever."""
    with provider(lambda number, _path: page(has_more=True, last_id=f"rl-{number}")) as server:
        assert f"more than {MAX_PAGES} pages" in fails(source_of(server.url))

    assert len(server.asked) == MAX_PAGES


def test_next_page_that_no_url_can_ask_for_is_an_error():
    """The provider says where it begins, at whatever length."""
    with provider([page(limit("a", 5), has_more=True, last_id="x" * 100_000)]) as server:
        assert "cannot be asked" in fails(source_of(server.url))


def test_second_page_that_fails_is_an_error():
    """Half of the limits are not the limits."""
    with provider([page(limit("a", 5), has_more=True, last_id="a"), (500, "oops", [])]) as server:
        assert "answered 500" in fails(source_of(server.url))


def silent(handler):
    """Say nothing, until the test is over."""
    handler.server.ending.wait(30)


def cut(handler):
    """Break off in the middle."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n{")


def garbled(handler):
    """Answer what is no HTTP."""
    handler.wfile.write(f"SSH-2.0-{ADMIN_KEY}\r\n\r\n".encode())


def zipped(handler):
    """Say that it is compressed, and lie."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 4\r\n\r\nnope")


def test_silence_is_told():
    """A provider that does not answer in time is given up."""
    with provider([silent]) as server:
        told = fails(source_of(server.url, timeout_s=0.2))

    assert told == "the provider did not answer GET /organization/projects/proj%2F1/rate_limits in 0.2 s"


def endless(handler, piece, every_s):
    """Answer, and come to no end, until nobody listens."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
    with suppress(OSError):
        while not handler.server.ending.wait(every_s):
            handler.wfile.write(piece)


def test_answer_that_trickles_is_given_up():
    """The time is for all of it, and not for each piece."""
    with provider([partial(endless, piece=b" ", every_s=0.01)]) as server:
        assert fails(source_of(server.url, timeout_s=0.2)).endswith("rate_limits in 0.2 s")


def test_answer_that_is_far_too_long_is_given_up():
    """It does not fill the memory."""
    with provider([partial(endless, piece=b" " * 2**20, every_s=0)]) as server:
        assert f"more than {MAX_BYTES} bytes" in fails(source_of(server.url, timeout_s=60))


@pytest.mark.parametrize("how", [cut, garbled, zipped])
def test_answer_that_breaks_is_told(how):
    """Whatever comes that is no answer."""
    with provider([how]) as server:
        assert fails(source_of(server.url)).startswith("the provider cannot be asked to GET ")


def test_nobody_there_is_told():
    """A port that nobody listens on."""
    assert "cannot be asked" in fails(source_of(f"http://127.0.0.1:{free_port()}/v1"))


def test_secrets_show_nowhere():
    """Neither in what an account is shown as, nor in what asks."""
    account = ProviderAccount("http://x/v1", CREDENTIALS, ADMIN_KEY, "proj")
    shown = f"{account} {account!r} {[account]} {ProviderSource(account, 1)!r}"

    assert KEY not in shown
    assert ADMIN_KEY not in shown


# --- a probe ------------------------------------------------------------------------------------------------


def probed(source):
    return source.probe("gpt-4o-mini")


def test_probe_is_the_smallest_call_with_the_ordinary_key():
    """One message, one token; the admin key stays where it is."""
    with provider([(200, "{}", TOLD)]) as server:
        fields = dict(probed(source_of(server.url)))

    ((method, path, headers, body),) = server.asked
    assert (method, path) == ("POST", "/v1/chat/completions")
    assert (headers["authorization"], headers["openai-project"]) == (f"Bearer {KEY}", "proj-77")
    assert ADMIN_KEY not in str(headers)
    assert json.loads(body) == {
        "model": "gpt-4o-mini",
        "messages": [{"role": "user", "content": "."}],
        "max_completion_tokens": 1,
    }
    assert fields[b"x-ratelimit-limit-tokens"] == b"30000"


def test_probe_that_is_refused_is_told_without_our_key():
    """With the provider's words."""
    with provider([(401, f'{{"error": {{"message": "bad key {KEY}"}}}}', [])]) as server:
        assert fails(source_of(server.url), probed).endswith("answered 401 to POST /chat/completions: bad key …")


def test_probe_needs_a_key():
    """Without one nothing is asked."""
    with provider([]) as server, pytest.raises(InvalidRequest):
        probed(source_of(server.url, credentials=[]))

    assert server.asked == []


# --- sync ---------------------------------------------------------------------------------------------------


class Desk:
    """The provider's limits on a house of their own."""

    def __init__(self, url, **how):
        self.house = House(buckets=256)
        self.counted = []
        source = source_of(url, **how)
        self.limits = ProviderLimits(self.house.backend, self.house.budgets, source, self.counted.append, 3600.0)

    def put(self, budget):
        self.house.backend.put(budget)

    @property
    def budgets(self):
        return {str(budget.name.model): budget.scale.capacity for budget in self.house.backend.budgets()}


def test_sync_applies_what_the_admin_api_tells():
    """What it tells is a budget each, in the order of models; what it tells no more is removed."""
    with provider([page(limit("b", 600), limit("a", 500, max_requests_per_1_day=9))]) as server:
        desk = Desk(server.url)
        desk.put(learned(7, source=Source.ADMIN, model="old"))
        desk.put(Budget(gate_of("b"), grant(1000)))
        entries = desk.limits.sync()

    assert [(entry.name.model, entry.name.source.value) for entry in entries] == [
        ("a", "admin-daily"),
        ("a", "admin"),
        ("b", "admin"),
        ("old", "admin"),
    ]
    assert entries[-1].state is None
    assert all(entry.change is not None and entry.age_s < 60 for entry in entries)
    assert desk.budgets == {"a": 500, "b": 600} | {"b": desk.budgets["b"]}


def test_sync_again_changes_nothing():
    """What is known is told of, and nothing is changed."""
    with provider(lambda *_: page(limit("a", 500))) as server:
        desk = Desk(server.url)
        desk.limits.sync()
        epoch = desk.house.backend.epoch
        (entry,) = desk.limits.sync()

    assert (entry.change, entry.state.level) == (None, 500)
    assert desk.house.backend.epoch == epoch


def test_dry_run_changes_nothing():
    """It tells what would be, and every budget is as before."""
    with provider([page(limit("a", 500)), (200, "{}", TOLD)]) as server:
        desk = Desk(server.url)
        desk.put(learned(7, source=Source.ADMIN, model="old"))
        epoch, before = desk.house.backend.epoch, desk.budgets
        entries = desk.limits.sync(dry_run=True, probe=MODEL)

    assert (desk.house.backend.epoch, desk.budgets) == (epoch, before)
    shown = {(entry.name.model, entry.name.meter.value): entry.state and entry.state.level for entry in entries}
    assert shown == {
        ("a", "tokens"): 500,
        (MODEL, "requests"): 9999,
        (MODEL, "tokens"): 29_000,
        ("old", "tokens"): None,
    }


@pytest.mark.parametrize(
    "second",
    [(500, "oops", []), (200, "rubbish", []), page(limit("bad\nname", 5)), page({"model": 7}), page(limit("", 5))],
)
def test_failing_second_page_changes_nothing(second):
    """Nor does a name that is none: the error is the provider's."""
    with provider([page(limit("a", 500), has_more=True, last_id="a"), second]) as server:
        desk = Desk(server.url)
        desk.put(learned(7, source=Source.ADMIN, model="old"))
        with pytest.raises(ProviderError):
            desk.limits.sync()

    assert desk.budgets == {"old": 7}


def test_failing_probe_changes_nothing():
    """All is read before anything is applied."""
    with provider([page(limit("a", 500)), (200, "{}", [])]) as server:
        desk = Desk(server.url)
        with pytest.raises(ProviderError, match="tells no limits that can be used"):
            desk.limits.sync(probe=MODEL)

    assert desk.budgets == {}


def test_probe_teaches_limits_with_what_remains():
    """A minute of tokens, a day of requests, and their levels."""
    with provider([(200, "{}", TOLD)]) as server:
        desk = Desk(server.url, admin_key=None)
        requests, tokens = desk.limits.sync(probe=MODEL)

    assert (requests.name.meter, requests.state.level) == (Meter.REQUESTS, 9999)
    assert (tokens.name.meter, tokens.state.budget) == (Meter.TOKENS, learned(30_000))
    assert tokens.state.level == pytest.approx(29_000, abs=300)


def test_probe_tells_how_old_its_limits_are():
    """They have just been told."""
    with provider([(200, "{}", TOLD)]) as server:
        entries = Desk(server.url, admin_key=None).limits.sync(probe=MODEL)

    assert [0 <= entry.age_s < 10 for entry in entries] == [True, True]


def test_probe_is_newer_than_what_was_heard_before():
    """An answer of old that told another limit changes nothing where the probe tells the known one."""
    with provider([(200, "{}", TOLD)]) as server:
        desk = Desk(server.url, admin_key=None)
        desk.put(learned(30_000))
        desk.limits.told(MODEL, Told([(b"x-ratelimit-limit-tokens", b"500"), *RESTS]))
        requests, tokens = desk.limits.sync(probe=MODEL)

    assert tokens.state.budget == learned(30_000)
    assert tokens.change is None
    assert requests.change is not None


@pytest.mark.parametrize("probe", ["", " ", "x" * 257, "a\x1fb"])
def test_probe_of_what_is_no_model_is_the_callers_error(probe):
    """Nothing is asked with it."""
    with provider([]) as server, pytest.raises(InvalidValue):
        Desk(server.url, admin_key=None).limits.sync(probe=probe)

    assert server.asked == []


def test_budgets_set_by_hand_are_as_they_were():
    """A sync knows budgets of its own alone."""
    with provider([page(limit(MODEL, 500))]) as server:
        desk = Desk(server.url)
        desk.house.set("global", grant(123), model=MODEL)
        desk.limits.sync()

    assert desk.house.budgets.get(named("global", model=MODEL)).budget.scale == grant(123)
