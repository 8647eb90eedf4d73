"""OpenAI's wire: what is read of a request, of an answer, and of a stream cut anywhere."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import properties
from tokenguard.errors import InvalidRequest, InvalidValue
from tokenguard.model import Usage
from tokenguard.providers.openai import (
    FULL_IMAGE_TOKENS,
    MAX_ANSWER_BYTES,
    MAX_EVENT_BYTES,
    TOKENS_PER_MESSAGE,
    TOKENS_PER_PROMPT,
    EventStream,
    JsonAnswer,
    error_body,
    read_chat,
    read_usage,
)

USAGE = {"prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 21}
COUNTED = Usage(9, 12, 21)


def body(**members):
    """Return a request's body: a valid one, but for the members given."""
    return json.dumps({"model": "gpt-4o", "messages": [], **members}).encode()


def chat(**members):
    """Return what is read of a request."""
    return read_chat(body(**members))


def said(content, **members):
    """Return what is read of a request of one message."""
    return chat(messages=[{"role": "user", "content": content}], **members)


# --- the request --------------------------------------------------------------------------------------------


def test_plain_request_is_read():
    """A request with nothing but a model and messages asks for one answer, whole and uncapped."""
    read = said("Hello")

    assert (read.model, read.stream, read.choices, read.output_cap) == ("gpt-4o", False, 1, None)
    assert read.text_bytes == len("Hello")
    assert read.extra_tokens == TOKENS_PER_MESSAGE + TOKENS_PER_PROMPT
    assert not read.attachments
    assert not read.asks_for_usage


@pytest.mark.parametrize("name", ["stream", "n", "max_tokens", "max_completion_tokens", "stream_options"])
def test_null_is_as_good_as_absent(name):
    """A member that is null is one that was not given."""
    read = chat(**{name: None})

    assert (read.stream, read.choices, read.output_cap, read.asks_for_usage) == (False, 1, None, False)


@pytest.mark.parametrize(
    ("member", "value", "allowed"),
    [
        ("model", None, "must be a string"),
        ("model", 5, "must be a string"),
        ("model", ["gpt-4o"], "must be a string"),
        ("messages", None, "must be a list"),
        ("messages", "Hello", "must be a list"),
        ("messages", {"role": "user"}, "must be a list"),
        ("stream", 1, "must be true or false"),
        ("stream", "true", "must be true or false"),
        ("n", 0, "must be a whole number from 1 to 128"),
        ("n", 129, "must be a whole number from 1 to 128"),
        ("n", 1.5, "must be a whole number from 1 to 128"),
        ("n", True, "must be a whole number from 1 to 128"),
        ("n", "2", "must be a whole number from 1 to 128"),
        ("max_tokens", 0, "must be a whole number from 1 to 1000000000"),
        ("max_tokens", -1, "must be a whole number from 1 to 1000000000"),
        ("max_tokens", 10**9 + 1, "must be a whole number from 1 to 1000000000"),
        ("max_completion_tokens", "many", "must be a whole number from 1 to 1000000000"),
        ("max_completion_tokens", False, "must be a whole number from 1 to 1000000000"),
        ("stream_options", True, "must be an object"),
        ("stream_options", [1], "must be an object"),
        ("stream_options", [], "must be an object"),
        ("stream_options", "", "must be an object"),
        ("stream_options", False, "must be an object"),
        ("stream_options", 0, "must be an object"),
    ],
)
def test_member_that_cannot_be_is_refused_by_name(member, value, allowed):
    """The error names the member, what was given and what is allowed."""
    with pytest.raises(InvalidRequest) as caught:
        chat(**{member: value})

    assert caught.value.field == member
    assert str(caught.value) == f"{member} {allowed}, got {value!r}"


@pytest.mark.parametrize("member", ["model", "messages"])
def test_member_that_is_missing_is_refused_by_name(member):
    """A request without a model or messages is an error that says which."""
    members = {"model": "gpt-4o", "messages": []}
    del members[member]

    with pytest.raises(InvalidRequest) as caught:
        read_chat(json.dumps(members).encode())

    assert caught.value.field == member
    assert "got nothing" in str(caught.value)


@pytest.mark.parametrize("model", ["", "m" * 257, "é" * 129, "a\nb", "a\x1fb", "\x7f", "\ud800"])
def test_model_that_cannot_name_a_bucket_is_refused(model):
    """A model's name is 1 to 256 bytes of UTF-8 without control characters."""
    with pytest.raises(InvalidValue) as caught:
        chat(model=model)

    assert caught.value.field == "model"


@pytest.mark.parametrize(
    ("caps", "cap"),
    [
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 7}, 7),
        ({"max_tokens": 5, "max_completion_tokens": 7}, 7),
        ({"max_tokens": 9, "max_completion_tokens": 7}, 9),
        ({"max_tokens": 9, "max_completion_tokens": None}, 9),
        ({"max_tokens": 5.0}, 5),
    ],
)
def test_largest_cap_counts(caps, cap):
    """Where the caller sets two caps, the larger one is what the answer may take."""
    assert chat(**caps).output_cap == cap


def test_number_of_answers_is_read():
    """Asking for n answers asks for n answers."""
    assert chat(n=128).choices == 128


@pytest.mark.parametrize(
    ("options", "asks"),
    [({}, False), ({"include_usage": True}, True), ({"include_usage": False}, False), ({"other": True}, False)],
)
def test_asking_for_usage_is_noticed(options, asks):
    """Only include_usage asks for the usage."""
    assert chat(stream=True, stream_options=options).asks_for_usage is asks


# --- how large the prompt is --------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "Hello", "Grüße", "日本語", "😀" * 10])
def test_text_is_counted_as_utf_8(text):
    """The size of text is that of its UTF-8, however the body escapes it."""
    messages = [{"role": "user", "content": text}]
    for escaped in (True, False):
        raw = json.dumps({"model": "m", "messages": messages}, ensure_ascii=escaped).encode()

        assert read_chat(raw).text_bytes == len(text.encode())


def test_text_of_every_form_of_message_is_counted():
    """Plain content, parts, names, refusals and tool calls with their arguments are all text."""
    call = {"id": "x1", "type": "function", "function": {"name": "find", "arguments": '{"q":1}'}}
    read = chat(
        messages=[
            {"role": "system", "content": "abc"},
            {"role": "user", "content": [{"type": "text", "text": "de"}, {"type": "text", "text": "f"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "x1", "content": "ghi"},
        ]
    )

    assert read.text_bytes == len("abc" + "def" + "x1" + "find" + '{"q":1}' + "x1" + "ghi")
    assert read.extra_tokens == 4 * TOKENS_PER_MESSAGE + TOKENS_PER_PROMPT


@pytest.mark.parametrize("member", ["tools", "functions", "response_format"])
def test_tools_and_schemas_are_counted(member):
    """What describes tools or the answer's form is part of the prompt."""
    schema = [{"name": "find", "description": "Looks things up. " * 10}]

    assert chat(**{member: schema}).text_bytes >= len("Looks things up. ") * 10


BLOB = "iVBORw0KGgo" * 10_000


@pytest.mark.parametrize(
    ("part", "least", "most"),
    [
        ({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{BLOB}"}}, 765, 765),
        ({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{BLOB}", "detail": "low"}}, 85, 85),
        ({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{BLOB}", "detail": "high"}}, 765, 765),
        ({"type": "image_url", "image_url": f"data:image/png;base64,{BLOB}"}, 765, 765),
        ({"type": "input_audio", "input_audio": {"data": BLOB, "format": "wav"}}, 10, 200),
        ({"type": "file", "file": {"file_data": BLOB, "filename": "a.pdf"}}, 500, 5000),
    ],
)
def test_attachment_is_not_counted_as_text(part, least, most):
    """An image, a sound or a file counts what it is likely to cost, and none of its base64 as text."""
    read = said([{"type": "text", "text": "What is this?"}, part])

    assert read.text_bytes == len("What is this?")
    assert least <= read.extra_tokens - TOKENS_PER_MESSAGE - TOKENS_PER_PROMPT <= most
    assert read.attachments


def test_every_attachment_counts():
    """Ten images cost ten times one."""
    image = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}

    assert said([image] * 10).extra_tokens == TOKENS_PER_MESSAGE + TOKENS_PER_PROMPT + 10 * FULL_IMAGE_TOKENS


def test_message_cannot_hide_its_text_behind_the_type_of_an_attachment():
    """Text beside an attachment's type counts: no member that a provider ignores makes a prompt look small."""
    messages = [{"role": "user", "type": "image_url", "content": "x" * 100_000}]

    assert chat(messages=messages).text_bytes >= 100_000


def outcome(raw):
    """Return what comes of reading a body and asking for its usage."""
    try:
        return "read" if read_chat(raw).body_with_usage() else "nothing"
    except InvalidRequest:
        return "refused"


@pytest.mark.parametrize("place", ["messages", "tools", "stream_options", "ignored"])
@pytest.mark.parametrize("depth", [500, 900, 960, 975, 985, 1_000, 5_000, 100_000])
def test_nesting_of_any_depth_is_read_or_refused(place, depth):
    """Wherever a body is nested, and however deeply: it is read, or it is an InvalidRequest."""
    nested = {"messages": "[{}]", "stream_options": '{{"a":{}}}'}.get(place, "{}").format(
        '{"a":' * depth + "1" + "}" * depth
    )
    members = {"model": '"m"', "messages": "[]", "stream": "true", place: nested}
    raw = "{" + ",".join(f'"{name}":{value}' for name, value in members.items()) + "}"

    assert outcome(raw.encode()) in ("read", "refused")


@pytest.mark.parametrize("member", ["model", "messages", "stream", "n", "stream_options"])
@pytest.mark.parametrize("depth", [500, 900, 960, 975, 985])
def test_nested_value_that_cannot_be_is_refused(member, depth):
    """A value too deeply nested to be shown is still refused as an InvalidRequest."""
    nested = "[" * depth + "]" * depth if member != "messages" else '{"a":' * depth + "1" + "}" * depth
    members = {"model": '"m"', "messages": "[]", member: nested}
    raw = "{" + ",".join(f'"{name}":{value}' for name, value in members.items()) + "}"

    with pytest.raises(InvalidRequest):
        read_chat(raw.encode())


def test_text_that_is_no_unicode_is_refused():
    """A lone surrogate, which no provider could be sent as UTF-8, is an error and no crash."""
    with pytest.raises(InvalidRequest, match="surrogate"):
        said("\ud800")


# --- asking for the usage -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "with_usage"),
    [
        (
            b'{ "model":"m",\n "messages":[], "stream":true }',
            b'{"stream_options":{"include_usage":true}, "model":"m",\n "messages":[], "stream":true }',
        ),
        (
            b'{"model":"m","messages":[],"stream_options" : { "include_obfuscation": false } ,"seed":1.0}',
            b'{"model":"m","messages":[],"stream_options" : '
            b'{"include_usage":true, "include_obfuscation": false } ,"seed":1.0}',
        ),
        (
            b'{"stream_options":{"a":{"b":[]},"include_usage" : null},"model":"m","messages":[]}',
            b'{"stream_options":{"a":{"b":[]},"include_usage" : true},"model":"m","messages":[]}',
        ),
        (
            '{"é":"😀","stream_options":{"é":"😀","include_usage":false},"model":"m","messages":[]}'.encode(),
            '{"é":"😀","stream_options":{"é":"😀","include_usage":true},"model":"m","messages":[]}'.encode(),
        ),
        (
            b'{"stream_options":{ },"model":"m","messages":[]}',
            b'{"stream_options":{"include_usage":true },"model":"m","messages":[]}',
        ),
        (
            b'{"stream_options":null,"model":"\\u006d","messages":["\xc3\xa9"]}',
            b'{"stream_options":{"include_usage":true},"model":"\\u006d","messages":["\xc3\xa9"]}',
        ),
    ],
)
def test_usage_is_asked_for_without_touching_another_byte(sent, with_usage):
    """Only stream_options changes, and of it only include_usage."""
    assert read_chat(sent).body_with_usage() == with_usage


@properties
@given(
    st.dictionaries(
        st.text(max_size=5), st.none() | st.booleans() | st.integers() | st.text(max_size=5), max_size=3
    )
)
def test_other_stream_options_stay(options):
    """Whatever the options are, they are sent on, with include_usage beside them."""
    sent = json.loads(chat(stream=True, stream_options=options).body_with_usage())

    assert sent.pop("stream_options") == {**options, "include_usage": True}
    assert sent == {"model": "gpt-4o", "messages": [], "stream": True}


def test_body_with_usage_is_always_json():
    """A number beyond a double's range does not turn into something that JSON does not know."""
    raw = b'{"model":"m","messages":[],"stream_options":{"a":1e999}}'

    assert b"Infinity" not in read_chat(raw).body_with_usage()


# --- usage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "read"),
    [
        (USAGE, COUNTED),
        ({**USAGE, "prompt_tokens_details": {"cached_tokens": 5}, "x": None}, COUNTED),
        ({"prompt_tokens": 9, "completion_tokens": 12}, COUNTED),
        ({"prompt_tokens": 9, "total_tokens": 9}, Usage(9, 0, 9)),
        ({"total_tokens": 21}, Usage(0, 0, 21)),
        ({"prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 30}, Usage(9, 12, 30)),
        ({"prompt_tokens": 10**12, "completion_tokens": 0, "total_tokens": 10**12}, Usage(10**12, 0, 10**12)),
    ],
)
def test_usage_is_read(told, read):
    """The usage is what the provider tells, and its total is the provider's where there is one."""
    assert read_usage(told) == read


@pytest.mark.parametrize(
    "told",
    [
        None,
        {},
        [],
        "21",
        21,
        True,
        {"prompt_tokens": -1, "completion_tokens": 2, "total_tokens": 1},
        {"prompt_tokens": 1, "completion_tokens": -2, "total_tokens": 1},
        {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": -3},
        {"prompt_tokens": 10**18, "completion_tokens": 0, "total_tokens": 1},
        {"prompt_tokens": 1, "completion_tokens": 0, "total_tokens": 10**18},
        {"prompt_tokens": 1, "completion_tokens": 10**18},
        {"prompt_tokens": 10**12, "completion_tokens": 10**12},
        {"prompt_tokens": True, "completion_tokens": True, "total_tokens": 2},
        {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": True},
        {"prompt_tokens": 1.5, "completion_tokens": 1, "total_tokens": 3},
        {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2.5},
        {"prompt_tokens": float("nan"), "completion_tokens": 1},
        {"prompt_tokens": "9", "completion_tokens": "12", "total_tokens": "21"},
        {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        {"prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 0},
    ],
)
def test_usage_that_cannot_be_is_none(told):
    """A usage that is no count of tokens, or counts none, is not believed."""
    assert read_usage(told) is None


# --- an answer in one piece ---------------------------------------------------------------------------------

ANSWER = json.dumps(
    {"id": "c1", "choices": [{"message": {"content": "Grüße 😀", "usage": {"total_tokens": 1}}}], "usage": USAGE},
    ensure_ascii=False,
    indent=1,
).encode()


def fed(reader, pieces):
    """Return all that a reader passes on."""
    return b"".join([reader.feed(piece) for piece in pieces]) + reader.rest()


def test_answer_passes_and_tells_its_usage_wherever_it_is_split():
    """An answer in two pieces, cut at any byte, passes unchanged and its usage is read."""
    for cut in range(len(ANSWER) + 1):
        answer = JsonAnswer()

        assert fed(answer, [ANSWER[:cut], ANSWER[cut:]]) == ANSWER
        assert answer.usage == COUNTED
        assert answer.streamed_tokens == 0


def test_answer_in_single_bytes_is_read():
    """An answer may come byte by byte."""
    answer = JsonAnswer()

    assert fed(answer, [ANSWER[i : i + 1] for i in range(len(ANSWER))]) == ANSWER
    assert answer.usage == COUNTED


def test_usage_is_not_known_before_the_answer_is_whole():
    """Half an answer tells no usage, even where the usage has come."""
    answer = JsonAnswer()
    answer.feed(b'{"usage":{"total_tokens":21},"choices":[')

    assert answer.usage is None


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"<html>",
        b"null",
        b"[]",
        b'"usage"',
        b"{}",
        b'{"usage":null}',
        b'{"usage":{"total_tokens":21}} x',
        b'\xff{"usage":{"total_tokens":21}}',
        b"\x1f\x8b\x08",
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
)
def test_answer_that_is_no_completion_tells_no_usage(document):
    """Anything else passes unchanged and tells no usage."""
    answer = JsonAnswer()

    assert fed(answer, [document]) == document
    assert answer.usage is None


@pytest.mark.parametrize(
    "document",
    [b'{"choices":"\xff","usage":{"total_tokens":21}}', b'{"\xff":1,"usage":{"total_tokens":21}}', b'"\xff"'],
)
def test_answer_that_is_not_utf_8_does_no_harm(document):
    """Text that is not UTF-8 inside an answer passes, and reading the usage does not fail for it."""
    answer = JsonAnswer()

    assert fed(answer, [document]) == document
    assert answer.usage in (None, Usage(0, 0, 21))


def test_answer_that_is_too_large_passes_unread():
    """An answer beyond what is kept in memory passes on, and tells no usage."""
    answer = JsonAnswer()
    padding = b" " * (MAX_ANSWER_BYTES // 4)

    assert (
        fed(answer, [padding] * 4 + [b'{"usage":{"total_tokens":21}}'])[-29:] == b'{"usage":{"total_tokens":21}}'
    )
    assert answer.usage is None


# --- a stream -----------------------------------------------------------------------------------------------


def delta(content="", **more):
    """Return a chunk that carries a piece of an answer."""
    choice = {"index": 0, "delta": {"content": content, **more}, "finish_reason": None}
    return {"id": "c1", "object": "chat.completion.chunk", "choices": [choice], "usage": None}


def event(chunk, end=b"\n\n"):
    """Return a chunk as an event."""
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + end


FILTERED = {"id": "", "choices": [], "prompt_filter_results": [{"prompt_index": 0}], "usage": None}
LAST = {"id": "c1", "object": "chat.completion.chunk", "choices": [], "usage": USAGE}
DONE = b"data: [DONE]"


def recorded(end):
    """Return a stream as Azure sends it: filter results first, comments in between; and the same without usage."""
    before = [
        event(FILTERED, end),
        b": keep-alive" + end,
        event(delta("", role="assistant"), end),
        b"event: message" + end[: len(end) // 2] + event(delta("Grüße 😀"), end),
        event(delta("!"), end),
        b"id: 7" + end,
    ]
    return b"".join([*before, event(LAST, end), DONE + end]), b"".join([*before, DONE + end])


ENDS = [b"\n\n", b"\r\n\r\n", b"\r\r"]


@pytest.mark.parametrize("end", ENDS)
def test_stream_is_read_alike_wherever_it_is_split(end):
    """Cut in two at any byte, a stream passes but for the event that we asked for, which tells the usage."""
    stream, passed = recorded(end)

    for cut in range(len(stream) + 1):
        reader = EventStream(swallow_usage=True)

        assert fed(reader, [stream[:cut], stream[cut:]]) == passed, cut
        assert reader.usage == COUNTED
        assert reader.streamed_tokens == 3


@properties
@given(st.sampled_from(ENDS), st.booleans(), st.lists(st.integers(0, 1500), max_size=40))
def test_stream_is_read_alike_in_any_pieces(end, swallow, cuts):
    """However many pieces a stream comes in, what passes and what it tells is the same."""
    stream, without = recorded(end)
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    reader = EventStream(swallow_usage=swallow)

    passed = fed(reader, [stream[start:stop] for start, stop in pairwise(edges)])

    assert passed == (without if swallow else stream)
    assert reader.usage == COUNTED
    assert reader.streamed_tokens == 3


@pytest.mark.parametrize("end", ENDS)
def test_stream_in_single_bytes_is_read(end):
    """A stream may come byte by byte."""
    stream, passed = recorded(end)
    reader = EventStream(swallow_usage=True)

    assert fed(reader, [stream[i : i + 1] for i in range(len(stream))]) == passed
    assert reader.usage == COUNTED


def test_event_passes_as_soon_as_it_is_complete():
    """Nothing is held back but an event that is not complete."""
    reader = EventStream(swallow_usage=True)
    first, second = event(delta("a")), event(delta("b"))

    assert reader.feed(first + second[:10]) == first
    assert reader.feed(second[10:-1]) == b""
    assert reader.feed(second[-1:]) == second


def test_caller_who_asked_for_the_usage_gets_it():
    """Where the caller asked, the usage's event passes like any other."""
    reader = EventStream(swallow_usage=False)

    assert fed(reader, [event(LAST)]) == event(LAST)
    assert reader.usage == COUNTED


@pytest.mark.parametrize(
    "chunk",
    [
        FILTERED,
        {"choices": []},
        {"choices": [], "usage": None},
        {"usage": USAGE},
        {"choices": None, "usage": USAGE},
        {"choices": {}, "usage": USAGE},
        {**delta("x"), "usage": USAGE},
        {"error": {"message": "overloaded"}, "usage": USAGE},
        {"error": {"message": "overloaded"}},
        {},
    ],
)
def test_only_the_event_that_we_asked_for_is_kept_back(chunk):
    """An event passes unless its choices are an empty list and it tells a usage: Azure's first one passes."""
    reader = EventStream(swallow_usage=True)

    assert fed(reader, [event(chunk)]) == event(chunk)


@pytest.mark.parametrize(
    "other",
    [
        b": ping\n\n",
        b"\n\n",
        b"data\n\n",
        b"data:\n\n",
        b"data: [DONE]\n\n",
        b"data: not json\n\n",
        b"data: [1]\n\n",
        b'data: "x"\n\n',
        b"event: error\ndata: {}\n\n",
        b"retry: 1000\n\n",
        b'database: {"choices":[],"usage":{"total_tokens":1}}\n\n',
        b"data: " + b"[" * 100_000 + b"\n\n",
        b"<html>\n\n</html>",
    ],
)
def test_what_is_no_chunk_passes_unread(other):
    """Comments, unknown fields, the end mark and garbage pass as they came and tell nothing."""
    reader = EventStream(swallow_usage=True)

    assert fed(reader, [other]) == other
    assert reader.usage is None
    assert reader.streamed_tokens == 0


def test_event_that_is_not_utf_8_does_no_harm():
    """An event that cannot be read as text passes, and the stream goes on."""
    reader = EventStream(swallow_usage=True)
    bad = b'data: {"choices":[{"delta":{"content":"\xff\xfe"}}]}\n\n'

    assert fed(reader, [bad, event(LAST)]) == bad
    assert reader.usage == COUNTED


@pytest.mark.parametrize("depth", [500, 900, 950, 970, 980, 990, 1_000, 5_000])
def test_event_of_any_depth_does_no_harm(depth):
    """An event nested however deeply passes, and the stream goes on."""
    reader = EventStream(swallow_usage=True)
    deep = b'data: {"choices":[{"delta":{"a":' + b'{"a":' * depth + b"1" + b"}" * depth + b"}}]}\n\n"

    assert fed(reader, [deep, event(LAST)]) == deep
    assert reader.usage == COUNTED


@pytest.mark.parametrize(
    "told",
    [
        b'data: {"choices":[],\ndata: "usage":{"prompt_tokens":9,\ndata:"completion_tokens":12}}\n\n',
        b'id: 1\r\ndata:{"choices":[],\r\ndata:"usage":{"prompt_tokens":9,"completion_tokens":12}}\r\n\r\n',
        b'event: x\n: comment\ndata:   {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":12}}  \n\n',
    ],
)
def test_event_of_several_lines_is_read(told):
    """Data over several lines, with or without a space, between other fields, is one event."""
    reader = EventStream(swallow_usage=True)

    assert fed(reader, [told]) == b""
    assert reader.usage == COUNTED


def test_last_usage_counts():
    """Where every chunk tells the usage so far, the last one that can be read counts."""
    reader = EventStream(swallow_usage=False)
    chunks = [
        {**delta("a"), "usage": {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}},
        {**delta("b"), "usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}},
        {**delta("c"), "usage": None},
        {**delta("d"), "usage": {"prompt_tokens": -9}},
    ]

    assert fed(reader, map(event, chunks)) == b"".join(map(event, chunks))
    assert reader.usage == Usage(9, 2, 11)


@pytest.mark.parametrize("told", [event(LAST)[:-1], event(LAST)[:-2], event(LAST, b"\r\n")])
def test_usage_at_a_ragged_end_is_read(told):
    """A last event that lacks its blank line still tells the usage."""
    reader = EventStream(swallow_usage=False)

    assert fed(reader, [event(delta("a")), told]) == event(delta("a")) + told
    assert reader.usage == COUNTED


def test_event_that_we_asked_for_is_kept_back_at_a_ragged_end():
    """The usage's event does not pass for want of the blank line behind it."""
    reader = EventStream(swallow_usage=True)

    assert fed(reader, [event(delta("a")), event(LAST)[:-1]]) == event(delta("a"))
    assert reader.usage == COUNTED


def test_beginning_of_an_event_passes_at_the_end():
    """What a cut stream leaves of an event is passed on as it came."""
    reader = EventStream(swallow_usage=True)

    assert reader.feed(b'data: {"cho') == b""
    assert reader.rest() == b'data: {"cho'
    assert reader.rest() == b""


def test_oversize_event_passes_unread_and_the_stream_goes_on():
    """An event too large to keep passes in pieces, and what follows is read again."""
    reader = EventStream(swallow_usage=True)
    piece = b"x" * (MAX_EVENT_BYTES // 4)
    pieces = [b"data: ", *[piece] * 9, b"\n\n"]

    passed = [reader.feed(part) for part in pieces]

    assert b"".join(passed) == b"".join(pieces)
    assert max(map(len, passed)) < 2 * MAX_EVENT_BYTES
    assert fed(reader, [event(LAST), DONE + b"\n\n"]) == DONE + b"\n\n"
    assert reader.usage == COUNTED


@pytest.mark.parametrize(
    ("chunks", "tokens"),
    [
        ([], 0),
        ([delta("", role="assistant", refusal=None)], 0),
        ([delta("", role="assistant"), {"choices": [{"delta": {}, "finish_reason": "stop"}]}], 0),
        ([delta("a")] * 7, 7),
        ([delta("a" * 40)], 10),
        ([delta("é" * 40)], 20),
        ([delta(None, reasoning_content="hmm hmm hmm ")], 3),
        ([delta(None, tool_calls=[{"index": 0, "function": {"arguments": '{"city":"Bern"}' * 4}}])], 15),
        ([{"choices": [{"delta": {"content": "a"}}, {"delta": {"content": "b"}}]}], 2),
        ([{"choices": [None, 1, [], {}, {"delta": None}, {"delta": "x"}]}], 0),
        ([{"choices": "abc"}], 0),
    ],
)
def test_streamed_tokens_count_visible_output(chunks, tokens):
    """At least one token a delta that carries text, else one for four bytes of text; nothing for framing."""
    reader = EventStream(swallow_usage=True)
    fed(reader, map(event, chunks))

    assert reader.streamed_tokens == tokens


# --- errors -------------------------------------------------------------------------------------------------


def test_error_has_all_four_members():
    """An error has message, type, param and code, null where there is nothing to say."""
    assert json.loads(error_body("no", "tokens", None, extra={"a": 1})) == {
        "error": {"message": "no", "type": "tokens", "param": None, "code": None},
        "extra": {"a": 1},
    }


def test_error_about_text_that_is_no_unicode_can_be_written():
    """A lone surrogate that a caller sent, shown in an error, does not break the error."""
    assert json.loads(error_body("\ud800", "invalid_request_error", None, "\ud800"))["error"]


def test_usage_that_output_followed_is_not_the_calls():
    """A usage told early, or in the middle, is of a part: the whole call's must come after the last output."""
    reader = EventStream(swallow_usage=False)
    fed(reader, [event(LAST), event(delta("word")), event(delta("word"))])

    assert reader.usage == COUNTED
    assert reader.final_usage(ended=True) is None

    fed(reader, [event(LAST)])
    assert reader.final_usage(ended=True) == COUNTED


def test_usage_of_a_stream_that_has_not_finished_is_not_the_calls():
    """Until the stream ended, or told why it finished, more output may come."""
    reader = EventStream(swallow_usage=False)
    fed(reader, [event({**delta("word"), "usage": USAGE})])

    assert reader.final_usage(ended=False) is None
    assert reader.final_usage(ended=True) == COUNTED

    finished = delta("")
    finished["choices"][0]["finish_reason"] = "stop"
    fed(reader, [event(finished)])
    assert reader.final_usage(ended=False) == COUNTED


@pytest.mark.parametrize("oddity", [b"NaN", b"-Infinity", b'"\\ud83d"', b"[[[]]]", b"1e999"])
def test_oddity_beside_the_usage_does_not_hide_it(oddity):
    """What strict JSON refuses elsewhere in an answer or a chunk leaves the usage readable."""
    odd = b'{"choices":[],"odd":' + oddity + b',"usage":' + json.dumps(USAGE).encode() + b"}"
    answer, stream = JsonAnswer(), EventStream(swallow_usage=False)
    fed(answer, [odd])
    fed(stream, [b"data: " + odd + b"\n\n"])

    assert answer.usage == stream.usage == COUNTED


def test_total_that_is_null_is_the_sum():
    """A provider that leaves the total out in that way has still told the parts."""
    assert read_usage({**USAGE, "total_tokens": None}) == COUNTED


@pytest.mark.parametrize("value", ["false", "no", 0, 1, []])
def test_include_usage_is_a_boolean(value):
    """What one parser takes for true and another for false is refused, like any other switch."""
    with pytest.raises(InvalidRequest, match="include_usage must be true or false"):
        chat(stream=True, stream_options={"include_usage": value})


@pytest.mark.parametrize("name", ["Model", "STREAM", "Max_Tokens", "N"])
def test_member_that_differs_in_case_is_refused(name):
    """Parsers that ignore case would read another call than the one that is guarded."""
    with pytest.raises(InvalidRequest, match=f"{name} is not a member, but {name.lower()} is"):
        chat(**{name: 1})
