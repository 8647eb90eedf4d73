"""What follows from a provider's answer: limits are learned, levels lowered, gates closed, alarms raised."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.house import House, grant, named
from tests.mirror import learned
from tests.unit.test_provider_wire import AZURE, QUOTA, RPM, TOO_LARGE, body_of
from tokenguard.api.call import Call, Guard
from tokenguard.errors import UpstreamError
from tokenguard.estimate import Estimator
from tokenguard.exchange import Terms
from tokenguard.limiter import Limiter
from tokenguard.metrics import Metrics
from tokenguard.model import Answer, BucketName, Identity, Meter, Source, UpstreamRequest
from tokenguard.provider_limits import ProviderLimits
from tokenguard.provider_limits.source import ProviderAccount, ProviderSource

M = "m"
FULL = 10_000
JSON = (b"content-type", b"application/json")
USAGE = {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}
ANSWER = json.dumps({"choices": [], "usage": USAGE}).encode()


def limits(limit=30_000, remaining=29_000, reset=b"2s", of="tokens"):
    """Return the fields of one limit."""
    told = {b"limit": limit, b"remaining": remaining}
    return [
        *((b"x-ratelimit-%b-%b" % (what, of.encode()), str(amount).encode()) for what, amount in told.items()),
        (b"x-ratelimit-reset-%b" % of.encode(), reset),
    ]


class Listening(Metrics):
    """Metrics that tell in which order things happened."""

    def __init__(self, backend, told):
        super().__init__(backend)
        self.told = told

    def provider_told(self, what):
        self.told.append(what)
        super().provider_told(what)


class Desk:
    """Calls, and what heeds the provider's answers."""

    def __init__(self, credentials=()):
        self.house = House({"user": grant(FULL)}, buckets=256)
        self.told = []
        self.metrics = Listening(self.house.backend, self.told)
        source = ProviderSource(ProviderAccount("http://127.0.0.1:1/v1", list(credentials)), 1.0)
        self.limits = ProviderLimits(
            self.house.backend, self.house.budgets, source, self.metrics.provider_told, 3600.0
        )
        limiter = Limiter(self.house.backend, self.house.plans)
        self.guard = Guard(limiter, Terms([], Estimator()), self.metrics, None, 2**20, 60.0, self.limits)

    def close(self):
        self.limits.stop()

    def begin(self, model=M, **members):
        message = {"role": "user", "content": "Say hello"}
        body = json.dumps({"model": model, "messages": [message], **members}).encode()
        call = Call(self.guard, "req-1")
        return call, call.begin([(b"x-user-id", b"alice")], body)

    def answered(self, status=200, fields=(), body=ANSWER, model=M):
        """Make a call whose answer is this; return it."""
        call, begun = self.begin(model)
        assert isinstance(begun, UpstreamRequest), begun.body
        call.answered(status, [JSON, *fields])
        call.feed(body)
        call.finish()
        call.over()
        return call

    def is_held_back(self, model=M):
        call, begun = self.begin(model)
        call.leave()
        call.over()
        return isinstance(begun, Answer) and b"The provider asked to wait" in begun.body

    def budget(self, meter=Meter.TOKENS, model=M):
        name = learned(1, meter=meter, model=model).name
        return next((budget for budget in self.house.backend.budgets() if budget.name == name), None)

    def level(self, meter=Meter.TOKENS):
        return self.house.budgets.get(learned(1, meter=meter, model=M).name).level

    def open(self):
        """How many reservations are neither settled nor given back."""
        text = self.metrics.exposition(None)[1].decode()
        return int(float(text.partition("\ntokenguard_reservations_open ")[2].partition("\n")[0]))


@pytest.fixture
def desk():
    desk = Desk()
    yield desk
    desk.close()


def test_answer_teaches_a_limit(desk):
    """The next call of the same model has to pass it."""
    desk.answered(fields=[*limits(), *limits(500, 499, b"120ms", "requests")])

    assert desk.budget() == learned(30_000, model=M)
    assert desk.budget(Meter.REQUESTS) == learned(500, meter=Meter.REQUESTS, model=M)
    assert desk.told == ["learned", "learned"]
    call, _ = desk.begin()
    assert [budget.name.source for budget in call.exchange.reservation.plan.budgets] == [
        Source.HEADERS,
        Source.HEADERS,
        None,
    ]
    call.over()


def test_known_limits_are_not_heeded_again(desk):
    """An answer that tells what is known costs nothing more."""
    desk.answered(fields=limits())
    desk.answered(fields=limits(30_000, 29_999, b"2ms"))

    assert desk.told == ["learned"]


def test_log_tells_what_is_learned(desk, caplog):
    """One line says which limit, how much, in what time, and who told it."""
    caplog.set_level("INFO", "tokenguard")
    for _ in range(3):
        desk.answered(fields=limits())

    assert caplog.messages == ["the provider's limit on tokens of m is 30000 per minute (headers)"]


def test_less_that_remains_lowers_the_level(desk):
    """At once, while the answer is still under way."""
    desk.answered(fields=limits())
    call, _ = desk.begin()
    call.answered(200, [JSON, *limits(30_000, 5000, b"50s")])

    assert desk.level() < 5000
    assert "lowered" in desk.told
    call.over()


@pytest.mark.parametrize("fields", [limits(-1, -1, b"0"), limits(5, 9), limits() + limits(), limits("", "")])
def test_fields_that_make_no_sense_change_nothing(desk, fields):
    """They are counted."""
    desk.answered(fields=fields)

    assert desk.house.backend.budgets() == []
    assert desk.told == ["unusable"]


def test_missing_fields_are_counted(desk):
    """Not every provider tells."""
    desk.answered()

    assert desk.told == ["missing"]


@pytest.mark.parametrize("status", [302, 400, 401, 404, 500, 503])
def test_errors_teach_nothing(desk, status):
    """What stands in front of a provider may tell limits of its own."""
    desk.answered(status, limits())

    assert desk.house.backend.budgets() == []


def test_refusal_closes_the_gate_of_its_model(desk):
    """Once all of its body is known; calls of other models pass."""
    call, _ = desk.begin()
    call.answered(429, [JSON, (b"retry-after-ms", b"20000")])
    assert not desk.is_held_back()
    call.feed(body_of(RPM, "requests"))
    call.finish()

    assert desk.is_held_back()
    assert not desk.is_held_back("other")
    assert desk.told == ["missing", "refused-wait"]
    assert desk.limits.shown()["heldBack"] == [M]
    call.over()
    assert desk.told == ["missing", "refused-wait"]


def test_log_tells_no_secret_that_a_refusal_repeats(caplog):
    """Not even the part of it that is left where the text is cut."""
    key = "sk-0123456789abcdef"
    desk = Desk([(b"authorization", f"Bearer {key}".encode())])
    for text in (f"{key} is short", f"{'a' * 190} {key}"):
        desk.answered(429, body=body_of(text), model=f"m{len(text)}")
    desk.close()

    assert len(caplog.messages) == 2
    assert not any("sk-0" in message for message in caplog.messages)


@pytest.mark.parametrize("ends", ["over", "left", "failed"])
def test_refusal_whose_body_breaks_off_closes_the_gate_too(desk, ends):
    """What has come of it is heeded, once."""
    call, _ = desk.begin()
    call.answered(429, [JSON])
    call.feed(body_of(AZURE)[:-5])
    if ends == "left":
        call.leave()
    elif ends == "failed":
        call.failed(UpstreamError("it broke off", sent=True))
    call.over()

    assert desk.is_held_back()
    assert desk.told == ["missing", "refused-wait"]
    assert desk.open() == 0


def test_refusal_that_is_too_large_touches_nobody_else(desk):
    """It is the one call's business."""
    desk.answered(429, body=body_of(TOO_LARGE))

    assert not desk.is_held_back()
    assert desk.told == ["missing", "refused-shorten"]


@pytest.mark.parametrize(
    ("cap", "held_back"), [(7000, True), (7985, True), (8000, False), (9000, False), (10**6, False)]
)
@pytest.mark.parametrize("body", [RPM, AZURE])
def test_refusal_of_a_call_that_the_limit_may_not_hold_touches_nobody_else(desk, cap, held_back, body):
    """Some say "retry" to what can never pass: whoever asks for more than there is does not stop all others."""
    desk.house.backend.put(learned(8000, model=M), None, None)
    desk.house.backend.put(learned(9000, model=M, source=Source.ADMIN), None, None)
    call, begun = desk.begin(max_tokens=cap)
    assert isinstance(begun, UpstreamRequest), begun.body
    call.answered(429, [JSON, (b"retry-after", b"30")])
    call.feed(body_of(body))
    call.finish()

    assert desk.is_held_back() is held_back
    assert desk.told == ["missing", "refused-wait" if held_back else "refused-shorten"]


def test_quota_raises_an_alarm_until_a_call_is_answered(desk):
    """Nobody is held back: the provider's answer is passed on."""
    desk.answered(429, [(b"retry-after", b"50")], body_of(QUOTA, "insufficient_quota", "insufficient_quota"))

    assert not desk.is_held_back()
    assert desk.limits.shown()["alarms"] == ["insufficient_quota"]
    assert "insufficient_quota" in desk.limits.trouble()
    assert desk.limits.alarmed
    desk.answered()
    assert desk.limits.trouble() is None
    assert not desk.limits.alarmed


def test_refusals_body_is_looked_at_in_part(desk):
    """A body without an end is passed on, and not kept."""
    call, _ = desk.begin()
    call.answered(429, [JSON])
    for _ in range(100):
        assert call.feed(b"x" * 65_000) == b"x" * 65_000

    assert len(call.exchange.refusal) <= 65_536 + 65_000
    call.over()
    assert desk.is_held_back()


def test_budget_set_by_hand_stays_as_it_is(desk):
    """A limit of the provider's on the same model stands beside it."""
    desk.house.set("global", grant(1000), model=M)
    desk.answered(fields=limits())

    assert desk.house.budgets.get(named("global", model=M)).budget.scale == grant(1000)
    assert desk.budget() == learned(30_000, model=M)


def test_limits_that_cannot_be_kept_are_told_of_in_one_line(desk, caplog):
    """While budgets cannot be changed, every answer of every model would have one."""
    for number in range(300):
        desk.answered(fields=limits(), model=f"m{number}")

    assert len(desk.house.backend.budgets()) < 300
    assert sum("is not kept" in record.getMessage() for record in caplog.records) == 1


# --- whatever a provider says -------------------------------------------------------------------------------

numbers = st.sampled_from(["-1", "0", "1", "5", "60", "500", "10000", "30000", "9" * 15, "9" * 16, "", "x", "5.0"])
resets = st.sampled_from(["1s", "6m0s", "12ms", "8.64s", "", "-1s", "0", "59", "86400", "1h0m0s", "x", "0s"])
names = st.sampled_from(["requests", "tokens", "project-tokens", "images"])
fields = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["limit", "remaining"]), names, numbers),
        st.tuples(st.just("reset"), names, resets),
    ).map(lambda told: (f"x-ratelimit-{told[0]}-{told[1]}".encode(), told[2].encode())),
    max_size=9,
)
waits = st.lists(
    st.tuples(
        st.sampled_from([b"retry-after", b"retry-after-ms", b"content-encoding", b"content-length"]),
        st.sampled_from(
            [b"0", b"1", b"1.5", b"-1", b"99999999999", b"soon", b"gzip", b"Fri, 01 Jan 2100 00:00:00 GMT"]
        ),
    ),
    max_size=2,
)
bodies = st.sampled_from(
    [
        ANSWER,
        b"",
        b"{",
        body_of(RPM),
        body_of(TOO_LARGE),
        body_of(QUOTA, "insufficient_quota"),
        b"\xff",
        b"data: [DONE]\n\n",
    ]
)
answers = st.tuples(
    st.sampled_from([200, 200, 200, 204, 302, 400, 429, 429, 500, 503]),
    fields,
    waits,
    bodies,
    st.sampled_from(["finish", "leave", "failed", "never sent", "over"]),
    st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(answers, max_size=12))
def test_no_answer_leaves_a_reservation_open_or_a_level_out_of_bounds(said):
    """Random heads and bodies, overlapping, ended in every way: nothing is raised, and all is settled."""
    desk = Desk()
    running = []
    try:
        for status, told, extra, body, how, later in said:
            call, begun = desk.begin(stream=random.Random(len(told)).random() < 0.3)
            if isinstance(begun, Answer):
                assert begun.status == 429
                call.over()
                continue
            running.append((call, status, [JSON, *told, *extra], body, how))
            if not later:
                while running:
                    _ended(*running.pop())
                    _within_bounds(desk)
        while running:
            _ended(*running.pop(0))
        _within_bounds(desk)
        assert desk.open() == 0
    finally:
        desk.close()


def _ended(call, status, head, body, how):
    if how == "never sent":
        call.failed(UpstreamError("nobody there", sent=False))
    else:
        call.answered(status, head)
        try:
            call.feed(body)
            if how == "finish":
                call.finish()
        except UpstreamError as error:
            call.failed(error)
        if how == "leave":
            call.leave()
        elif how == "failed":
            call.failed(UpstreamError("it broke off", sent=True))
    call.over()


def _within_bounds(desk):
    for budget in desk.house.backend.budgets():
        name, scale = budget
        level = desk.house.budgets.get(name).level
        assert -scale.debt <= level <= scale.capacity
        assert name.source is not None
        assert BucketName.from_key(name.key) == name
        if name.meter is not Meter.GATE:
            assert name.source is Source.HEADERS
    (alice,) = [
        state for state in desk.house.limiter.peek(Identity("alice"), "no such model") if state.name.source is None
    ]
    assert alice.level <= FULL
