"""The quick readers read what the careful ones read, or leave it to them: every body, answer and stream alike."""

import json
import sys
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import slow_wire
from tests.strategies import properties
from tests.wild import BYTES, Wild
from tokenguard.errors import InvalidValue
from tokenguard.providers import careful
from tokenguard.providers._chat import scan_chat
from tokenguard.providers.openai import EventStream, JsonAnswer, read_chat

wilds = st.builds(Wild, st.integers(0, 2**32).map(Random), st.sampled_from([0, 0.03, 0.2]))


def read_carefully(raw):
    """Return all that the careful reader says of a body: what it reads, or how it refuses it."""
    try:
        chat = careful.read_chat(raw)
    except InvalidValue as error:
        return type(error), error.field, str(error)
    return (*chat, careful.ask_for_usage(chat.body))


def attributes(request):
    """Return the same of a request that was read."""
    return (*(getattr(request, name) for name in careful.Chat._fields), request.body_with_usage())


def check_chat(raw):
    """Assert that a body is read as it should be; return whether it was plain."""
    expected = read_carefully(raw)
    if (request := scan_chat(raw)) is not None:
        assert attributes(request) == expected
        return True
    try:
        read = attributes(read_chat(raw))
    except InvalidValue as error:
        read = type(error), error.field, str(error)
    assert read == expected
    return False


def told(reader):
    """Return all that a reader has to tell."""
    return reader.usage, reader.streamed_tokens, reader.final_usage(ended=False), reader.final_usage(ended=True)


def check_answer(pieces):
    """Assert that an answer passes and tells its usage as it should."""
    ours, theirs = JsonAnswer(), slow_wire.JsonAnswer()
    for piece in pieces:
        assert ours.feed(piece) == theirs.feed(piece) == piece
    assert ours.rest() == theirs.rest() == b""
    assert told(ours) == told(theirs)


def check_stream(pieces, swallow):
    """Assert that after every piece the same has passed, and the same is told."""
    ours, theirs = EventStream(swallow_usage=swallow), slow_wire.EventStream(swallow_usage=swallow)
    for piece in pieces:
        assert ours.feed(piece) == theirs.feed(piece)
        assert told(ours) == told(theirs)
    assert ours.rest() == theirs.rest()
    assert told(ours) == told(theirs)


@properties
@given(wilds)
def test_any_body_is_read_alike(wild):
    """Whatever a body is, and however it is written: the same is read of it, or the same is said against it."""
    for _ in range(5):
        check_chat(wild.damaged(wild.written(wild.chat())))


@properties
@given(wilds)
def test_any_answer_is_read_alike(wild):
    """Whatever a document is, it passes as it came, and the same usage is read of it."""
    for _ in range(5):
        check_answer(wild.pieces(wild.damaged(wild.written(wild.answer()))))


@properties
@given(wilds, st.booleans())
def test_any_stream_is_read_alike(wild, swallow):
    """Whatever the events are, and wherever a stream is cut, the same passes at once and the same is told."""
    for _ in range(5):
        check_stream(wild.pieces(wild.stream()), swallow)


# --- what is plain ------------------------------------------------------------------------------------------


def careful_calls(work):
    """Return the names of the careful functions that some work calls."""
    called = []

    def note(frame, happened, _):
        if happened == "call" and frame.f_code.co_filename == careful.__file__:
            called.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return called


SYSTEM = {"role": "system", "content": 'You are terse.\nAnswer in "plain" words.'}
USER = {"role": "user", "content": "Grüße aus 東京 😀"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": "this?"}]}
CALL = {"id": "call_1", "type": "function", "function": {"name": "find", "arguments": '{"city": "Bern"}'}}
ASKED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
FOUND = {"role": "tool", "tool_call_id": "call_1", "content": "[1.5, true, null]"}
CITY = {"type": "string", "enum": ["Bern", "Zürich"], "minLength": 1}
SCHEMA = {"type": "object", "properties": {"city": CITY}, "required": ["city"], "additionalProperties": False}
FIND = {"name": "find", "description": "Looks\tup", "parameters": SCHEMA, "strict": True}
TOOL = {"type": "function", "function": FIND}
FORM = {"type": "json_schema", "json_schema": {"name": "reply", "schema": SCHEMA}}
SETTINGS = {"temperature": 0.7, "top_p": 1.0, "frequency_penalty": -1.5, "seed": 42, "user": "u1"}


PLAIN = [
    {"messages": []},
    {"messages": [SYSTEM, USER]},
    {"messages": [SYSTEM, USER], **SETTINGS},
    {"messages": [SYSTEM, PARTS], "max_tokens": 256, "stop": ["\n", "###"], "n": 2, "logit_bias": {"50256": -100}},
    {"messages": [USER], "stream": True, "max_completion_tokens": 10**9},
    {"messages": [USER], "stream": True, "stream_options": {"include_usage": True}},
    {"messages": [USER], "stream": True, "stream_options": {"include_usage": False, "include_obfuscation": False}},
    {"messages": [USER], "stream": True, "stream_options": {}},
    {"messages": [USER], "stream": False, "stream_options": None, "n": None, "max_tokens": None},
    {"messages": [SYSTEM, USER, ASKED, FOUND], "tools": [TOOL, TOOL], "tool_choice": "auto"},
    {"messages": [USER], "functions": [FIND], "response_format": FORM, "tools": []},
    {"messages": [USER], "tools": None, "response_format": {"type": "json_object"}},
    {"messages": [USER, SYSTEM] * 300},
    {"messages": [USER], "metadata": {"n": "1", "seed": "2", "x": {"n": 3, "seed": []}}, "seed": 2, "n": 1},
    {"messages": ["text", ["deep", [{"a": {"b": "c"}}]]], "metadata": {"Team": "X"}},
]  # fmt: skip


@pytest.mark.parametrize("members", PLAIN)
@pytest.mark.parametrize("form", [{}, {"ensure_ascii": False}, {"separators": (",", ":")}, {"indent": 2}])
def test_what_clients_send_is_plain(members, form):
    """Bodies as the SDKs write them are read without the careful reader, and as it reads them."""
    raw = json.dumps({"model": "gpt-4o-mini", **members}, **form).encode()

    assert check_chat(raw)
    assert check_chat(b" \r\n\t" + raw + b"\n")


def body(members=b"", model=b'"m"', messages=b"[]"):
    """Return a body as it is spelt."""
    return b'{"model":' + model + b',"messages":' + messages + (b"," if members else b"") + members + b"}"


WRONG = {
    "model": [b"null", b"1", b"m", b'""', b'"\\u006d"', b'"\xc3\xa9"', b'"a b"', b'" "', b'"\x7f"'],
    "messages": [b"null", b"{}", b'"x"', b"[1,]", b"[,1]", b"[1 2]", b"[", b"[}"],
    "stream": [b"1", b'"true"', b"[]", b"tru", b"True"],
    "stream_options": [b"[]", b"true", b'{"include_usage":1}', b'{"a":1,"a":1}', b"{"],
    "n": [b"0", b"129", b"1.0", b"1e0", b"01", b"-1", b"true", b'"1"', b""],
    "max_tokens": [b"1000000001", b"10000000000000000000000", b"1.5", b"0", b"-0"],
    "tools": [b"[0.5]", b"[-0]", b"-0", b"0.0", b"[1e3]", b'["\\ud800"]'],
    "x": [
        *(b"NaN", b"Infinity", b"-Infinity", b"01", b"1.", b".5", b"1e", b"1e+", b"+1", b"-", b"9" * 301),
        *(b'"\n"', b'"\\x"', b'"\\u12"', b'"\\u12g4"', b'"\\ud83d"', b'"\\ude00"', b'"\\ud83d\\u0041"', b'"'),
        *(b'"\xff"', b'"\xc0\x80"', b'"\xed\xa0\x80"', b'"\xf4\x90\x80\x80"', b'"\xe2\x82"', b'"\xe2"', b'"\\'),
        *(b'{"a":1,"a":2}', b'[{"b":{"a":1,"a":2}}]', b'{"\\u0061":1}', b"{1:1}", b'{"a"}', b'{"a":1,}'),
        *(b'{"\xff":1}', b"[" * 64 + b"]" * 64, b"[" * 10**5, b'{"a":' * 10**5),
        b"{" + b",".join(b'"%d":1' % i for i in range(65)) + b"}",
    ],
}  # fmt: skip
PARTS_LEFT = [
    b'{"type":"image_url","image_url":{"url":"data:"}}',
    b'{"file":{"file_data":"x"},"type":"file"}',
    b'{"type":"fil\\u0065","file":{"file_data":"x"}}',
    b'{"content":[{"type":"input_audio","input_audio":{"data":"x"}}]}',
]
NOT_PLAIN = [
    *(b"", b" ", b"{}", b"[]", b"null", b'{"model":"m"}', b'{"messages":[]}', body()[:-1], body() + b"x"),
    *(b"\xef\xbb\xbf" + body(), body() + b"\0", b"\x0b" + body(), body().decode().encode("utf-16")),
    *(body(model=value) for value in (*WRONG["model"], b'"%s"' % (b"a" * 257))),
    *(body(messages=value) for value in WRONG["messages"]),
    *(body(messages=b"[" + part + b"]") for part in PARTS_LEFT),
    *(body(b'"%s":%s' % (name.encode(), value)) for name in list(WRONG)[2:] for value in WRONG[name]),
    *(body(b'"%s":1' % name) for name in (b"Model", b"N", b"seeD", b"\\u006e", b"model", b"\xc3\xa9")),
    body('"max_to\u212aens":1'.encode()),  # a Kelvin sign, whose lower case is k
]


@pytest.mark.parametrize("raw", NOT_PLAIN, ids=lambda raw: repr(raw[:60]))
def test_what_is_not_plain_is_left_alone(raw):
    """What is wrong, or merely unusual, is for the careful reader to read or to refuse in its words."""
    assert not check_chat(raw)


@pytest.mark.parametrize("shape", ["tools", "functions", "response_format"])
@pytest.mark.parametrize(
    "value",
    [
        *("null", "false", "true", "0", "7", "12", "-1", '""', '"x"', "[]", "[ ]", "[ 1 , 2 ]", "{}", "{ }"),
        *('{"a":[],"b":{}}', '{"é":"\\"","role":"r","type":"t"}', '"\\u0022\\u005c\\/\\u000a\\u000b\\u0008\\f"'),
        '"\\u007f\\u00e9\\u07ff\\u0800\\u20ac\\uffff\\ud83d\\ude00\\ud800\\udc00"',
    ],
)
def test_shapes_count_as_they_would_be_written(shape, value):
    """Tools and forms of answers count what they take as JSON, however the body spells them."""
    assert check_chat(f'{{"model":"m","messages":[],"{shape}":{value}}}'.encode())


@pytest.mark.parametrize("junk", BYTES, ids=repr)
def test_body_is_read_alike_with_anything_at_any_place(junk):
    """Bytes that are wrong nearly everywhere, and now and then right, are put everywhere into a body."""
    raw = (
        b'{"model":"m","messages":[{"role":"a","content":"\\u00e9 \xc3\xa9"}],"n":1,"stream":true,"x":[-1.5e3,{}]}'
    )
    for at in range(len(raw) + 1):
        check_chat(raw[:at] + junk + raw[at:])


@pytest.mark.parametrize("size", range(40))
def test_special_byte_is_found_at_any_place(size):
    """Text is looked at many bytes at a time, and what is not text ends it wherever it stands."""
    for special in (b"\0", b"\x1f", b'"', b"\\", b"\\n", b"\x80", b"\xff", b"\xc3\xa9", b"\x7f", b" ", b"~"):
        for rest in range(20):
            check_chat(body(messages=b'["' + b"a" * size + special + b"b" * rest + b'"]'))
            check_chat(b'{"model":"m","messages":["' + b"a" * size + special + b"b" * rest)


# --- answers and streams ------------------------------------------------------------------------------------

USAGE = {"prompt_tokens": 19, "completion_tokens": 10, "total_tokens": 29}
DETAILS = {**USAGE, "prompt_tokens_details": {"cached_tokens": 0}, "completion_tokens_details": {"x": 0}}
CHOICE = {"index": 0, "logprobs": {"content": [{"logprob": -0.25}]}, "finish_reason": "stop"}
MESSAGE = {"role": "assistant", "content": "Grüße 😀\n", "refusal": None, "annotations": [], "tool_calls": [CALL]}
ANSWER = {"id": "c1", "created": 1741569952, "choices": [{**CHOICE, "message": MESSAGE}], "usage": DETAILS}


def chunk(delta, finish_reason=None, **more):
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return {"id": "c1", "object": "chat.completion.chunk", "created": 1741569952, "choices": [choice], **more}


CHUNKS = [
    {"choices": [], "prompt_filter_results": [{"prompt_index": 0}]},
    chunk({"role": "assistant", "content": "", "refusal": None}),
    chunk({"content": " word"}, usage=None, obfuscation="x7"),
    chunk({"content": '"Grüße"\n😀'}),
    chunk({"tool_calls": [{"index": 0, **CALL}]}),
    chunk({}, "stop"),
    {"choices": [], "usage": DETAILS},
]


def event(members, end=b"\n\n", **form):
    return b"data: " + json.dumps(members, **form).encode() + end


STREAM = b"".join(map(event, CHUNKS)) + b": ping\n\ndata: [DONE]\n\n"


def test_what_providers_answer_is_plain():
    """An answer's usage is read without decoding the answer."""
    answer = JsonAnswer()
    answer.feed(json.dumps(ANSWER, indent=1).encode())

    assert not careful_calls(lambda: answer.usage)
    assert answer.usage == (19, 10, 29)


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r", b"\r\n\n"])
@pytest.mark.parametrize("form", [{}, {"ensure_ascii": False}, {"separators": (",", ":")}])
def test_what_providers_stream_is_plain(end, form):
    """Events, comments and the end mark are read without the careful reader."""
    pieces = [*(event(each, end, **form) for each in CHUNKS), b": ping" + end, b"data: [DONE]" + end]
    reader = EventStream(swallow_usage=True)

    assert not careful_calls(lambda: [reader.feed(piece) for piece in pieces])
    assert reader.final_usage(ended=False) == (19, 10, 29)
    check_stream(pieces, swallow=True)


def test_piece_that_passes_whole_is_not_copied():
    """Where all of a piece passes, it is that piece and no copy."""
    reader = EventStream(swallow_usage=True)
    piece = b"".join(map(event, CHUNKS[:-1]))

    assert reader.feed(piece) is piece


@pytest.mark.parametrize("swallow", [False, True])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_stream_is_read_alike_wherever_it_is_cut_twice(swallow, end):
    """Any three pieces of a stream pass what they should at once, whatever the line ends are."""
    stream = (event(CHUNKS[2])[-40:] + event(CHUNKS[6])[:30] + b"\n\ndata: [DONE]\n\n\n").replace(b"\n", end)
    for first in range(len(stream) + 1):
        for second in range(first, len(stream) + 1, 3):
            check_stream([stream[:first], stream[first:second], stream[second:]], swallow)


@properties
@given(st.lists(st.sampled_from([b"\n", b"\r", b"\r\n", b"x", b"data:{}", b""]), max_size=12))
def test_any_line_ends_part_events_alike(pieces):
    """Line ends of all kinds, mixed and cut anywhere, end events where they should."""
    check_stream(pieces, swallow=True)


@pytest.mark.parametrize("swallow", [False, True])
@pytest.mark.parametrize("junk", BYTES, ids=repr)
def test_stream_is_read_alike_with_anything_at_any_place(junk, swallow):
    """Bytes that do not belong there are put everywhere into two events."""
    usage = {"total_tokens": 21}
    chunk = {"choices": [{"delta": {"content": "a", "type": "x"}, "finish_reason": None}], "usage": usage}
    stream = event(chunk, separators=(",", ":")) + event({"choices": [], "usage": usage}, separators=(",", ":"))
    for at in range(len(stream)):
        check_stream([stream[:at] + junk + stream[at:]], swallow)
        check_answer([stream[6:at] + junk + stream[at:-36]])


def test_event_in_many_pieces_is_not_read_again_and_again():
    """An event that comes byte by byte takes time by its size, not by the square of it."""
    reader = EventStream(swallow_usage=True)
    pieces = [b"x"] * 2**20

    assert not any(map(reader.feed, pieces))
    assert len(reader.feed(b"x")) == 2**20 + 1
