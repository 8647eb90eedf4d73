"""One call from request to settlement, without I/O: every ending, and what travels in either direction."""

import contextlib
import gzip
import json
import math
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.house import House, grant, named
from tests.strategies import properties
from tokenguard._heads import forwarded_headers, read_identity, returned_headers
from tokenguard.errors import InvalidRequest, UpstreamError, UpstreamTimeout
from tokenguard.estimate import Estimator
from tokenguard.exchange import (
    Ask,
    Decoder,
    Exchange,
    Terms,
    decoder_for,
)
from tokenguard.model import Answer, Head, Identity, Meter, UpstreamRequest

FULL = 10_000
CREDENTIALS = [(b"authorization", b"Bearer sk-ours")]
CALLER = [(b"x-user-id", b"alice"), (b"content-type", b"application/json")]
JSON = [(b"content-type", b"application/json")]
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8")]

PROMPT = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Say hello."}]}
PROMPT_TOKENS = 3 + 6
RESERVED = PROMPT_TOKENS + 256
USAGE = {"prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 21}


def event(chunk):
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


COMPLETION = json.dumps({"choices": [{"message": {"content": "Hello!"}}], "usage": USAGE}).encode()
FIRST = event({"choices": [{"delta": {"role": "assistant", "content": ""}}], "usage": None})
WORD = event({"choices": [{"delta": {"content": "Hello"}}], "usage": None})
LAST = event({"choices": [], "usage": USAGE})
DONE = b"data: [DONE]\n\n"


class Call:
    """A call of alice's, driven by hand, over a fixed grant of 10,000 tokens and 10 requests."""

    def __init__(self, *, house=None, **members):
        self.house = house or House({"user": grant(FULL)})
        self.house.set("user:alice", grant(10), Meter.REQUESTS)
        self.estimator = Estimator()
        self.exchange = Exchange(Terms(CREDENTIALS, self.estimator, jitter=lambda: 0.0), "req-1")
        self.body = json.dumps({**PROMPT, **members}).encode()

    def begin(self, headers=(), body=None):
        return self.exchange.begin([*CALLER, *headers], self.body if body is None else body)

    def forwarded(self, headers=()):
        """Go up to the request to the provider."""
        return self.exchange.reserved(self.house.limiter.reserve(*self.begin(headers)))

    def answered(self, status=200, headers=JSON):
        """Go up to the head of the provider's answer."""
        self.forwarded()
        return self.exchange.answered(status, list(headers))

    def fed(self, *chunks):
        return b"".join([self.exchange.feed(chunk) for chunk in chunks])

    def settle(self, end):
        """Carry out what an end says, as a driver does."""
        if end.settlement is not None:
            self.house.carry_out(end.settlement)
        return end

    @property
    def level(self):
        """What is left of the tokens."""
        return self.house.levels(Identity("alice"))["user:alice on tokens"]

    @property
    def requests_left(self):
        return self.house.levels(Identity("alice"))["user:alice on requests"]


def streaming(**members):
    """Return a call that is streamed and whose answer has begun."""
    call = Call(stream=True, **members)
    call.answered(headers=EVENTS)
    return call


def plain():
    """Return a call that is not streamed and whose answer has begun."""
    call = Call()
    call.answered()
    return call


# --- the way there ------------------------------------------------------------------------------------------


def test_call_asks_for_its_estimate():
    """What is to be reserved names the caller, the model, the prompt's estimate and the total."""
    call = Call()

    asked = call.begin([(b"x-team-id", b"red")])

    assert asked == Ask(Identity("alice", team="red"), "gpt-4o", PROMPT_TOKENS, RESERVED, RESERVED)
    assert call.level == FULL


@pytest.mark.parametrize(
    ("members", "prompt", "output"),
    [
        ({"max_tokens": 10}, PROMPT_TOKENS, 10),
        ({"max_tokens": 10, "max_completion_tokens": 20}, PROMPT_TOKENS, 20),
        ({"n": 3}, PROMPT_TOKENS, 3 * 256),
        ({"n": 3, "max_tokens": 10}, PROMPT_TOKENS, 30),
        ({"messages": [{"role": "user", "content": "x" * 4096}]}, 960 + 6, 256),
        ({"messages": [{"role": "user", "content": "7" * 256}]}, 204 + 6, 256),
    ],
)
def test_estimate_follows_the_request(members, prompt, output):
    """The text, the caps and the number of answers make the estimate."""
    asked = Call(**members).begin()

    assert (asked.prompt, asked.total) == (prompt, prompt + output)


def test_request_is_forwarded_as_it_came():
    """A plain call's body travels byte for byte, with our credentials and plain encodings."""
    call = Call()
    call.body = b' {"model" : "gpt-4o","messages":[], "seed": 1.0, "x": "\\u00e9" } '

    request = call.forwarded([(b"x-request-id", b"theirs")])

    assert isinstance(request, UpstreamRequest)
    assert (request.method, request.path, request.stream) == ("POST", "/chat/completions", False)
    assert request.body == call.body
    assert request.headers == [
        (b"x-request-id", b"req-1"),
        (b"accept-encoding", b"identity"),
        (b"authorization", b"Bearer sk-ours"),
        (b"content-type", b"application/json"),
    ]
    assert call.exchange.stream is False


@pytest.mark.parametrize("options", [{}, {"stream_options": None}, {"stream_options": {"include_usage": False}}])
def test_stream_is_asked_for_its_usage(options):
    """Where the caller did not ask for the usage of a stream, we do."""
    request = Call(stream=True, **options).forwarded()

    assert json.loads(request.body) == {**PROMPT, "stream": True, "stream_options": {"include_usage": True}}
    assert request.stream is True


@pytest.mark.parametrize(
    "members",
    [
        {"stream": True, "stream_options": {"include_usage": True}},
        {"stream": False, "stream_options": {"include_usage": False}},
        {"stream_options": None},
    ],
)
def test_body_that_needs_no_change_is_not_changed(members):
    """A stream whose usage the caller asked for, and a call that is no stream, travel as they came."""
    call = Call(**members)

    assert call.forwarded().body == call.body


def test_asking_for_usage_can_be_switched_off():
    """Switched off, streams travel as they came and every event passes."""
    call = Call(stream=True)
    call.exchange = Exchange(Terms(CREDENTIALS, Estimator(), ask_for_usage=False), "req-1")

    assert call.forwarded().body == call.body
    call.exchange.answered(200, EVENTS)
    assert call.fed(WORD, LAST, DONE) == WORD + LAST + DONE
    call.settle(call.exchange.finish())
    assert call.level == FULL - 21


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", "body"),
        (b"[]", "body"),
        (b"\xff", "body"),
        (b'{"model":"m","model":"m","messages":[]}', "model"),
        (b'{"messages":[]}', "model"),
        (b'{"model":"m"}', "messages"),
        (b'{"model":"","messages":[]}', "model"),
        (b'{"model":"a\\nb","messages":[]}', "model"),
        (b'{"model":"m","messages":[],"n":0}', "n"),
        (b'{"model":"m","messages":[],"stream":"yes"}', "stream"),
        (b'{"model":"m","messages":["\\ud800"]}', "messages"),
        (b'{"model":"m","messages":[],"\\ud800":1,"\\ud800":2}', None),
        (b"[" * 100_000, "body"),
    ],
)
def test_request_that_cannot_be_read_is_answered_with_what_is_wrong(body, param):
    """A body that is no request for a completion is a 400 that names the member, and nothing was reserved."""
    call = Call()

    answer = call.begin(body=body)

    assert isinstance(answer, Answer)
    assert answer.status == 400
    error = json.loads(answer.body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert param is None or error["param"] == param
    end = call.exchange.abort()
    assert (end.settlement, end.rest, end.answer) == (None, b"", None)


@pytest.mark.parametrize("encoding", [b"gzip", b"br", b"zstd"])
def test_compressed_request_is_refused(encoding):
    """A body with a content-encoding is a 415."""
    answer = Call().begin([(b"content-encoding", encoding)])

    assert answer.status == 415
    assert json.loads(answer.body)["error"]["param"] == "content-encoding"


def test_refused_call_is_answered_and_takes_nothing():
    """A refusal is a 429; there is nothing to settle, whatever the driver does next."""
    call = Call(house=House({"user": grant(2)}))

    answer = call.forwarded()

    assert isinstance(answer, Answer)
    assert answer.status == 429
    assert call.exchange.abort().settlement is None
    assert call.exchange.finish().settlement is None
    assert call.level == 2
    assert call.requests_left == 10


def test_jitter_of_a_refusal_is_what_the_terms_say():
    """The number that prolongs a wait comes from outside."""
    call = Call(house=House({"user": grant(20, rate=1)}))
    call.exchange = Exchange(Terms([], Estimator(), jitter=lambda: 1.0), "req-1")
    call.house.limiter.settle(call.house.taken(1, who=Identity("alice")), 20)

    waits = [int(value) for name, value in call.forwarded().headers if name == b"retry-after-ms"]

    assert len(waits) == 1
    assert 9_000 < waits[0] <= 11_000


# --- the way back -------------------------------------------------------------------------------------------


def test_answer_passes_as_it_came():
    """Status, body and length of a plain answer are the provider's; our limits are added."""
    call = Call()
    head = call.answered(headers=[*JSON, (b"content-length", b"123"), (b"openai-version", b"2020-10-01")])

    assert isinstance(head, Head)
    assert head.status == 200
    assert head.headers[:3] == [*JSON, (b"content-length", b"123"), (b"openai-version", b"2020-10-01")]
    assert dict(head.headers)[b"x-ratelimit-remaining-tokens"] == b"%d" % (FULL - RESERVED)
    assert dict(head.headers)[b"x-ratelimit-remaining-requests"] == b"9"
    assert call.fed(COMPLETION[:10], COMPLETION[10:]) == COMPLETION


def test_stream_has_no_length_and_loses_only_our_own_event():
    """A stream passes event by event, but for the one that came because we asked."""
    call = Call(stream=True)
    head = call.answered(headers=[*EVENTS, (b"content-length", b"99")])

    assert b"content-length" not in dict(head.headers)
    assert call.fed(FIRST + WORD, LAST[:7], LAST[7:] + DONE) == FIRST + WORD + DONE


def test_stream_of_a_caller_who_asked_passes_whole():
    """A caller who asked for the usage gets its event."""
    call = streaming(stream_options={"include_usage": True})

    assert call.fed(FIRST, WORD, LAST, DONE) == FIRST + WORD + LAST + DONE


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 503])
def test_error_of_the_provider_passes_with_its_headers(status):
    """Status, body and headers are the provider's, its own limits under names that cannot be mistaken for ours."""
    call = Call()
    head = call.answered(status, [*JSON, (b"retry-after", b"7"), (b"x-ratelimit-remaining-tokens", b"0")])

    assert head.status == status
    assert (b"retry-after", b"7") in head.headers
    assert (b"x-upstream-ratelimit-remaining-tokens", b"0") in head.headers
    assert [value for name, value in head.headers if name == b"x-ratelimit-remaining-tokens"] != [b"0"]
    assert call.fed(b'{"error":{}}') == b'{"error":{}}'


# --- endings ------------------------------------------------------------------------------------------------


def whole_answer():
    call = plain()
    call.fed(COMPLETION)
    return call, call.exchange.finish


def whole_stream():
    call = streaming()
    call.fed(FIRST, WORD, LAST, DONE)
    return call, call.exchange.finish


def stream_without_usage():
    call = streaming()
    call.fed(FIRST, WORD, WORD, DONE)
    return call, call.exchange.finish


def answer_without_usage():
    call = plain()
    call.fed(b'{"choices":[]}')
    return call, call.exchange.finish


def answer_of_something_else():
    call = plain()
    call.fed(b"<html>")
    return call, call.exchange.finish


def answer_that_is_not_utf_8():
    call = plain()
    call.fed(b'{"choices":"\xff\xfe"}')
    return call, call.exchange.finish


def stream_that_is_not_utf_8():
    call = streaming()
    call.fed(b'data: {"choices":"\xff\xfe"}\n\n')
    return call, call.exchange.finish


def stream_of_an_error():
    call = streaming()
    call.fed(event({"error": {"message": "overloaded"}}))
    return call, call.exchange.finish


def caller_left_before_the_answer():
    call = Call()
    call.forwarded()
    return call, call.exchange.abort


def caller_left_a_stream_before_the_answer():
    call = Call(stream=True)
    call.forwarded()
    return call, call.exchange.abort


def caller_left_amid_an_answer():
    call = plain()
    call.fed(COMPLETION[:20])
    return call, call.exchange.abort


def caller_left_after_the_usage():
    call = plain()
    call.fed(COMPLETION)
    return call, call.exchange.abort


def caller_left_a_stream_before_any_word():
    call = streaming()
    call.fed(FIRST, WORD[:10])
    return call, call.exchange.abort


def caller_left_amid_a_stream():
    call = streaming()
    call.fed(FIRST, WORD, WORD, WORD)
    return call, call.exchange.abort


def caller_left_a_stream_after_the_usage():
    call = streaming()
    call.fed(FIRST, WORD, LAST)
    return call, call.exchange.abort


def provider_broke_off_amid_a_stream():
    call = streaming()
    call.fed(FIRST, WORD)
    return call, lambda: call.exchange.abort(UpstreamError("broke off", sent=True))


def provider_broke_off_amid_an_answer():
    call = plain()
    call.fed(COMPLETION[:20])
    return call, lambda: call.exchange.abort(UpstreamError("broke off", sent=True))


def provider_fell_silent_amid_a_stream():
    call = streaming()
    call.fed(FIRST)
    return call, lambda: call.exchange.abort(UpstreamTimeout("late", sent=True))


def request_was_never_sent():
    call = Call()
    call.forwarded()
    return call, lambda: call.exchange.abort(UpstreamError("unreachable", sent=False))


def no_connection_in_time():
    call = Call()
    call.forwarded()
    return call, lambda: call.exchange.abort(UpstreamTimeout("no connection", sent=False))


def no_answer_in_time():
    call = Call()
    call.forwarded()
    return call, lambda: call.exchange.abort(UpstreamTimeout("late", sent=True))


def no_answer_at_all():
    call = Call()
    call.forwarded()
    return call, lambda: call.exchange.abort(UpstreamError("broke off", sent=True))


def provider_refused():
    call = Call()
    call.answered(429)
    call.fed(b'{"error":{}}')
    return call, call.exchange.finish


def provider_refused_and_told_a_usage():
    call = Call()
    call.answered(500)
    call.fed(COMPLETION)
    return call, call.exchange.finish


def provider_refused_a_stream():
    call = Call(stream=True)
    call.answered(503, EVENTS)
    call.fed(FIRST, WORD)
    return call, call.exchange.finish


def provider_refused_and_broke_off():
    call = Call()
    call.answered(400)
    return call, lambda: call.exchange.abort(UpstreamError("broke off", sent=True))


def caller_left_a_refusal_of_the_provider():
    call = Call()
    call.answered(404)
    return call, call.exchange.abort


def early_usage_then_output():
    call = Call(stream=True)
    call.answered(headers=EVENTS)
    call.fed(b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":0,"total_tokens":9}}\n\n')
    call.fed(b'data: {"choices":[{"delta":{"content":"word"}}]}\n\n' * 30)
    return call, call.exchange.finish


def early_usage_then_caller_left():
    call = Call(stream=True)
    call.answered(headers=EVENTS)
    call.fed(b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":0,"total_tokens":9}}\n\n')
    return call, call.exchange.abort


def provider_redirected():
    call = Call()
    call.answered(307, [(b"location", b"https://elsewhere.example")])
    return call, call.exchange.finish


USED = 21
NOTHING = 0
ENDINGS = {
    whole_answer: USED,
    whole_stream: USED,
    stream_without_usage: PROMPT_TOKENS + 2,
    answer_without_usage: RESERVED,
    answer_of_something_else: RESERVED,
    answer_that_is_not_utf_8: RESERVED,
    stream_that_is_not_utf_8: RESERVED,
    stream_of_an_error: RESERVED,
    caller_left_before_the_answer: RESERVED,
    caller_left_a_stream_before_the_answer: RESERVED,
    caller_left_amid_an_answer: RESERVED,
    caller_left_after_the_usage: USED,
    caller_left_a_stream_before_any_word: RESERVED,
    caller_left_amid_a_stream: PROMPT_TOKENS + 3,
    caller_left_a_stream_after_the_usage: USED,
    provider_broke_off_amid_a_stream: PROMPT_TOKENS + 1,
    provider_broke_off_amid_an_answer: RESERVED,
    provider_fell_silent_amid_a_stream: RESERVED,
    request_was_never_sent: NOTHING,
    no_connection_in_time: NOTHING,
    no_answer_in_time: RESERVED,
    no_answer_at_all: RESERVED,
    provider_refused: NOTHING,
    provider_refused_and_told_a_usage: NOTHING,
    provider_refused_a_stream: NOTHING,
    provider_refused_and_broke_off: NOTHING,
    caller_left_a_refusal_of_the_provider: NOTHING,
    provider_redirected: NOTHING,
    early_usage_then_output: 9 + 30,
    early_usage_then_caller_left: RESERVED,
}
every_ending = pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: ending.__name__)


@every_ending
def test_call_is_charged_by_how_it_ended(ending):
    """Usage where it is known, the reservation or what was streamed where not, nothing if it came to nothing."""
    call, end = ending()

    call.settle(end())

    assert call.level == FULL - ENDINGS[ending]
    assert call.requests_left == 9


@every_ending
def test_call_is_settled_once_however_often_it_ends(ending):
    """After the first end, any number of further ends say nothing more about the reservation."""
    call, end = ending()
    call.settle(end())

    again = [
        end(),
        call.exchange.finish(),
        call.exchange.abort(),
        call.exchange.abort(UpstreamError("x", sent=False)),
    ]

    assert [each.settlement for each in again] == [None] * 4
    assert call.level == FULL - ENDINGS[ending]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UpstreamError("unreachable", sent=False), 502),
        (UpstreamError("broke off", sent=True), 502),
        (UpstreamTimeout("no connection", sent=False), 504),
        (UpstreamTimeout("late", sent=True), 504),
    ],
)
def test_failure_before_the_answer_is_answered_by_us(error, status):
    """Before the provider's head has come, a failure is a 502 or 504 in the provider's shape."""
    call = Call()
    call.forwarded()

    answer = call.exchange.abort(error).answer

    assert answer.status == status
    assert json.loads(answer.body)["error"]["message"] == str(error)


def test_failure_amid_the_answer_is_not_answered():
    """Once bytes have passed there is nothing to answer: the driver must cut the connection."""
    call = streaming()
    call.fed(FIRST, WORD)

    assert call.exchange.abort(UpstreamError("broke off", sent=True)).answer is None


def test_caller_who_left_gets_no_answer():
    """Nobody is there to read one."""
    call = Call()
    call.forwarded()

    assert call.exchange.abort().answer is None


def test_what_is_left_of_a_stream_passes_at_its_end():
    """A stream that ends without a blank line passes to its last byte."""
    call = streaming()

    assert call.fed(FIRST, b"data: [DONE]") == FIRST
    assert call.exchange.finish().rest == b"data: [DONE]"


def test_overage_is_charged():
    """A call that took more than was reserved is charged all of it."""
    call = Call(max_tokens=5)
    call.answered()
    call.fed(b'{"usage":{"prompt_tokens":9,"completion_tokens":5000,"total_tokens":5009}}')
    call.settle(call.exchange.finish())

    assert call.level == FULL - 5009


pieces = st.lists(st.integers(0, len(FIRST + WORD + LAST + DONE)), max_size=8)


@properties
@given(pieces, st.booleans())
def test_streamed_call_is_charged_alike_in_any_pieces(cuts, decoded):
    """However the provider's bytes are cut, compressed or not, the caller gets the same and pays the same."""
    stream = FIRST + WORD + LAST + DONE
    call = Call(stream=True)
    call.answered(headers=[*EVENTS, (b"content-encoding", b"gzip" if decoded else b"identity")])
    sent = gzip.compress(stream) if decoded else stream
    edges = [0, *sorted(min(cut, len(sent)) for cut in cuts), len(sent)]

    passed = call.fed(*[sent[edges[i] : edges[i + 1]] for i in range(len(edges) - 1)])
    end = call.settle(call.exchange.finish())

    assert passed + end.rest == FIRST + WORD + DONE
    assert call.level == FULL - 21


# --- learning -----------------------------------------------------------------------------------------------


def test_usage_is_learned_from():
    """A known usage teaches the estimator, per user and model."""
    call, end = whole_answer()
    before = call.begin().total

    call.settle(end())

    assert call.begin().total < before


@pytest.mark.parametrize("ending", [provider_refused_and_told_a_usage, stream_without_usage, no_answer_in_time])
def test_call_without_a_usage_teaches_nothing(ending):
    """What was not told by a successful answer is not learned."""
    call, end = ending()
    before = call.begin()

    call.settle(end())

    assert call.begin() == before


def test_framing_of_messages_is_not_learned_as_text():
    """Of many short messages most of the prompt is framing: what text comes to is learned of the text alone."""
    call = Call(messages=[{"role": "user", "content": "abcd"}] * 100)
    asked = call.begin()
    call.answered()
    call.fed(b'{"usage":{"prompt_tokens":%d,"completion_tokens":256,"total_tokens":999}}' % asked.prompt)

    call.settle(call.exchange.finish())

    assert asked.prompt == math.ceil(100 * 4 * 60 / 256) + 303
    assert call.begin().prompt == asked.prompt


class Forgetful(Estimator):
    """An estimator that fails to learn."""

    def learn(self, *_, **__):
        raise RuntimeError("dictionary changed size during iteration")


def test_failure_to_learn_does_not_lose_the_reservation():
    """Estimates are a convenience: a call is settled to its usage whatever becomes of them."""
    call = Call()
    call.exchange = Exchange(Terms(CREDENTIALS, Forgetful()), "req-1")
    call.answered()
    call.fed(COMPLETION)

    with contextlib.suppress(RuntimeError):
        call.settle(call.exchange.finish())
    call.settle(call.exchange.abort())

    assert call.level == FULL - 21


def test_prompt_of_an_image_teaches_nothing_about_text():
    """Where attachments took part of the prompt, the size of its text is not known."""
    image = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    call = Call(messages=[{"role": "user", "content": [{"type": "text", "text": "x" * 400}, image]}])
    call.answered()
    call.fed(b'{"usage":{"prompt_tokens":5000,"completion_tokens":256,"total_tokens":5256}}')
    before = call.begin().prompt

    call.answered()
    call.fed(b'{"usage":{"prompt_tokens":5000,"completion_tokens":256,"total_tokens":5256}}')
    call.settle(call.exchange.finish())

    assert call.begin().prompt == before


# --- compression --------------------------------------------------------------------------------------------


def raw_deflate(data):
    """Return data as servers send it that take deflate for the bare format."""
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(data) + compressor.flush()


@pytest.mark.parametrize(
    ("encoding", "compress"),
    [
        (b"gzip", gzip.compress),
        (b"GZIP", gzip.compress),
        (b" x-gzip ", gzip.compress),
        (b"deflate", zlib.compress),
        (b"deflate", raw_deflate),
        (b"gzip", lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:])),
    ],
)
def test_compressed_answer_is_decoded(encoding, compress):
    """An answer that is compressed all the same passes plain, without its encoding and length, and is read."""
    call = Call()
    head = call.answered(headers=[*JSON, (b"content-encoding", encoding), (b"content-length", b"77")])
    sent = compress(COMPLETION)

    assert {b"content-encoding", b"content-length"}.isdisjoint(dict(head.headers))
    assert call.fed(*[sent[i : i + 1] for i in range(len(sent))]) + call.exchange.finish().rest == COMPLETION


@pytest.mark.parametrize("encoding", [b"gzip", b"deflate"])
def test_usage_of_a_compressed_answer_is_settled(encoding):
    """What a compressed answer tells is what the call is charged."""
    call = Call()
    call.answered(headers=[*JSON, (b"content-encoding", encoding)])
    call.fed(gzip.compress(COMPLETION) if encoding == b"gzip" else zlib.compress(COMPLETION))
    call.settle(call.exchange.finish())

    assert call.level == FULL - 21


@pytest.mark.parametrize("encoding", [b"br", b"zstd", b"gzip, br", b"unknown"])
@pytest.mark.parametrize("kind", [JSON, EVENTS])
def test_answer_that_cannot_be_decoded_passes_and_keeps_the_reservation(encoding, kind):
    """Another compression passes byte for byte with its encoding, and the reservation stays charged."""
    call = Call(stream=kind is EVENTS)
    head = call.answered(headers=[*kind, (b"content-encoding", encoding)])
    body = b"\x0b\x00\x80\n\ndata: \xff\xfe\n\n\x03"

    assert dict(head.headers)[b"content-encoding"] == encoding
    assert call.fed(body) + call.settle(call.exchange.finish()).rest == body
    assert call.level == FULL - RESERVED


@pytest.mark.parametrize("kind", [JSON, EVENTS])
def test_damaged_compression_is_an_error_of_the_provider(kind):
    """Bytes that are not what they say they are raise, and the reservation stays charged."""
    call = Call(stream=kind is EVENTS)
    call.answered(headers=[*kind, (b"content-encoding", b"gzip")])
    sent = bytearray(gzip.compress(COMPLETION * 10))
    sent[20:40] = b"\xff" * 20

    with pytest.raises(UpstreamError, match="damaged") as caught:
        call.fed(bytes(sent))

    assert caught.value.sent
    call.settle(call.exchange.abort(caught.value))
    assert call.level == FULL - RESERVED


def test_compression_that_ends_too_early_is_not_turned_into_a_clean_end():
    """An answer cut amid its compressed bytes is an error of the provider, however the connection closed."""
    call = Call()
    call.answered(headers=[*JSON, (b"content-encoding", b"gzip")])
    call.fed(gzip.compress(COMPLETION)[:-12])

    with pytest.raises(UpstreamError):
        call.exchange.finish()

    call.settle(call.exchange.abort())
    assert call.level == FULL - RESERVED


def test_decoder_of_nothing_is_none():
    """No compression, and one that is passed on, has no decoder."""
    assert decoder_for(b"identity") is None
    assert decoder_for(b"br") is None
    assert isinstance(decoder_for(b"gzip"), Decoder)


# --- header fields ------------------------------------------------------------------------------------------

HOP_BY_HOP = [
    (b"connection", b"keep-alive, X-Private"),
    (b"keep-alive", b"timeout=5"),
    (b"proxy-authenticate", b"Basic"),
    (b"proxy-authorization", b"Basic eA=="),
    (b"proxy-connection", b"keep-alive"),
    (b"te", b"trailers"),
    (b"trailer", b"x"),
    (b"transfer-encoding", b"chunked"),
    (b"upgrade", b"h2c"),
    (b"x-private", b"listed in connection"),
]
SECRETS = [
    (b"authorization", b"Bearer sk-theirs"),
    (b"api-key", b"theirs"),
    (b"x-api-key", b"theirs"),
    (b"cookie", b"session=1"),
    (b"openai-organization", b"org-theirs"),
    (b"openai-project", b"proj-theirs"),
]
WHO_AND_WHERE = [
    (b"x-user-id", b"alice"),
    (b"x-team-id", b"red"),
    (b"x-role", b"dev"),
    (b"x-llm-rolegroup", b"staff"),
    (b"forwarded", b"for=10.0.0.1"),
    (b"via", b"1.1 proxy"),
    (b"x-real-ip", b"10.0.0.1"),
    (b"x-forwarded-for", b"10.0.0.1"),
    (b"x-forwarded-proto", b"https"),
    (b"x-forwarded-anything", b"1"),
    (b"x-tokenguard-anything", b"1"),
]
OF_THE_HOP = [
    (b"host", b"tokenguard:8000"),
    (b"content-length", b"12"),
    (b"content-type", b"text/plain"),
    (b"accept-encoding", b"gzip, br"),
    (b"expect", b"100-continue"),
]
TRAVELLING = [
    (b"accept", b"application/json"),
    (b"user-agent", b"OpenAI/Python 2.52"),
    (b"x-stainless-retry-count", b"0"),
    (b"openai-beta", b"assistants=v2"),
    (b"x-twice", b"1"),
    (b"x-twice", b"2"),
    (b"idempotency-key", b"k"),
]


@pytest.mark.parametrize(
    "field", [*HOP_BY_HOP, *SECRETS, *WHO_AND_WHERE, *OF_THE_HOP], ids=lambda field: field[0].decode()
)
def test_field_that_is_between_caller_and_us_does_not_travel(field):
    """Hop-by-hop fields, the caller's credentials and identity, and what our hop sets itself stay here."""
    sent = forwarded_headers([*HOP_BY_HOP, *TRAVELLING, field], CREDENTIALS, "req-1")

    assert field not in sent


def test_other_fields_travel_in_order():
    """Everything else goes to the provider as it came, then the plain encoding and our credentials."""
    sent = forwarded_headers(
        [*SECRETS, *TRAVELLING, *HOP_BY_HOP, *WHO_AND_WHERE, *OF_THE_HOP], CREDENTIALS, "req-1"
    )

    ours = [(b"x-request-id", b"req-1"), (b"accept-encoding", b"identity")]
    assert sent == [*TRAVELLING, *ours, *CREDENTIALS]


def test_several_connection_fields_are_all_heeded():
    """Names may be listed in several connection fields, in any case, with any spaces."""
    listed = [
        (b"connection", b"X-A ,x-b"),
        (b"x-a", b"1"),
        (b"connection", b" X-C"),
        (b"x-b", b"2"),
        (b"x-c", b"3"),
    ]

    assert forwarded_headers(listed, [], "req-1") == [
        (b"x-request-id", b"req-1"),
        (b"accept-encoding", b"identity"),
    ]
    assert returned_headers(listed, drop_length=False, drop_encoding=False) == []


def test_connection_field_cannot_remove_our_own_fields():
    """A caller who lists our fields in connection takes nothing from what we send."""
    sent = forwarded_headers([(b"connection", b"authorization, accept-encoding")], CREDENTIALS, "req-1")

    ours = [(b"x-request-id", b"req-1"), (b"accept-encoding", b"identity")]
    assert sent == [*ours, *CREDENTIALS]


@pytest.mark.parametrize(
    "field",
    [
        *HOP_BY_HOP,
        (b"set-cookie", b"__cf_bm=1"),
        (b"alt-svc", b'h3=":443"'),
        (b"strict-transport-security", b"max-age=1"),
        (b"date", b"Thu, 01 Jan 2026 00:00:00 GMT"),
        (b"server", b"cloudflare"),
    ],
    ids=lambda field: field[0].decode(),
)
def test_field_that_is_between_the_provider_and_us_does_not_travel(field):
    """Hop-by-hop fields and what speaks of the provider's host stay here."""
    assert field not in returned_headers([*HOP_BY_HOP, field], drop_length=False, drop_encoding=False)


def test_limits_of_the_provider_go_by_another_name():
    """The provider's own limits and id cannot be taken for ours; everything else passes in order."""
    headers = [
        (b"openai-processing-ms", b"12"),
        (b"x-ratelimit-limit-tokens", b"150000"),
        (b"x-ratelimit-reset-project-tokens", b"3s"),
        (b"x-request-id", b"req_1"),
        (b"retry-after-ms", b"500"),
        (b"content-length", b"7"),
        (b"content-encoding", b"br"),
    ]

    assert returned_headers(headers, drop_length=False, drop_encoding=False) == [
        (b"openai-processing-ms", b"12"),
        (b"x-upstream-ratelimit-limit-tokens", b"150000"),
        (b"x-upstream-ratelimit-reset-project-tokens", b"3s"),
        (b"x-upstream-request-id", b"req_1"),
        *headers[4:],
    ]


# --- who calls ----------------------------------------------------------------------------------------------


def test_identity_is_read_from_its_fields():
    """Each part of the identity has its field; what is absent is not on the path."""
    fields = WHO_AND_WHERE[:4]

    assert read_identity(fields) == Identity("alice", "red", "dev", "staff")
    assert read_identity(fields[:1]) == Identity("alice")


@pytest.mark.parametrize("value", ["Alice", "a b", "日本", "x" * 256, "é" * 128, "a/b:c"])
def test_identity_is_taken_as_it_is(value):
    """Ids are case-sensitive UTF-8 of up to 256 bytes, and may hold spaces and punctuation."""
    assert read_identity([(b"x-user-id", value.encode())]).user == value


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"x-team-id", b"red")],
        [(b"x-user-id", b"")],
        [(b"x-user-id", b"alice"), (b"x-user-id", b"alice")],
        [(b"x-user-id", b"alice"), (b"x-user-id", b"bob")],
        [(b"x-user-id", b"x" * 257)],
        [(b"x-user-id", "é".encode() * 129)],
        [(b"x-user-id", b"a\tb")],
        [(b"x-user-id", b"a\x00")],
        [(b"x-user-id", b"a\x1fb")],
        [(b"x-user-id", b"a\x7f")],
        [(b"x-user-id", b"a\xc2\x85")],
        [(b"x-user-id", b"\xff\xfe")],
        [(b"x-user-id", b"\xed\xa0\x80")],
        [(b"x-user-id", b"caf\xe9")],
    ],
)
def test_malformed_user_is_a_400_that_names_the_field(headers):
    """A user who is missing, given twice, empty, too long or no clean UTF-8 is refused, whatever the body."""
    answer = Exchange(Terms(CREDENTIALS, Estimator()), "req-1").begin(headers, b"not even JSON")

    assert isinstance(answer, Answer)
    assert answer.status == 400
    error = json.loads(answer.body)["error"]
    assert error["param"] == "x-user-id"
    assert "x-user-id" in error["message"]


@pytest.mark.parametrize("name", [b"x-team-id", b"x-role", b"x-llm-rolegroup"])
@pytest.mark.parametrize("values", [[b""], [b"a", b"b"], [b"x" * 257], [b"\x01"], [b"\xff"]])
def test_malformed_scope_is_a_400_that_names_the_field(name, values):
    """Every part of the identity keeps to the rules of the user's."""
    headers = [(b"x-user-id", b"alice"), *[(name, value) for value in values]]

    answer = Exchange(Terms(CREDENTIALS, Estimator()), "req-1").begin(headers, b"{}")

    assert isinstance(answer, Answer)
    assert answer.status == 400
    assert json.loads(answer.body)["error"]["param"] == name.decode()


def test_identity_given_twice_is_refused_even_if_equal():
    """A field given twice is an error: two readers could take different ones."""
    with pytest.raises(InvalidRequest, match="more than once"):
        read_identity([(b"x-role", b"dev"), (b"x-user-id", b"alice"), (b"x-role", b"dev")])


def test_budgets_of_the_whole_path_are_charged():
    """The identity's fields decide which buckets a call passes."""
    house = House()
    for scope in ("global", "team:red", "rolegroup:staff", "role:dev"):
        house.set(scope, grant(FULL))
    call = Call(house=house)
    call.forwarded(WHO_AND_WHERE[1:4])

    for scope in ("global", "team:red", "rolegroup:staff", "role:dev"):
        assert house.budgets.get(named(scope)).level == FULL - RESERVED
