"""What a text comes to by the classes of its bytes: the same whoever reads it, however the body spells it."""

import json
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import properties
from tests.wild import Writer
from tokenguard.providers import careful
from tokenguard.providers._chat import scan_chat
from tokenguard.providers.openai import read_chat
from tokenguard.sizing import PLAIN, TOKEN, WEIGHTS, weigh

DIGIT, CAPITAL, SPACE, LINE_END, FOLLOWS = (WEIGHTS[byte] for byte in b"7A \n\x80")


def body(text, **form):
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": text}]}, **form).encode()


def sized(text):
    """Return what both readers find a text to weigh, who must agree."""
    raw = body(text, ensure_ascii=False)
    request = scan_chat(raw)
    assert request is not None
    assert request.text_256ths == careful.read_chat(raw).text_256ths
    return request.text_256ths


# --- weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "weight"),
    [
        ("", 0),
        ("abc", 3 * 60),
        ("a b", 2 * 60 + 30),
        ("AZ", 2 * 128),
        ("09", 2 * 204),
        ("@[/:`{\x7f", 7 * 60),
        ("a\n\t\x00", 60 + 3 * 180),
        ('"\\/', 3 * 60),
        ("ü", 220 + 36),
        ("Я", 52 + 36),
        ("日", 128 + 2 * 36),
        ("の", 104 + 2 * 36),
        ("한", 120 + 2 * 36),
        ("“", 208 + 2 * 36),
        ("😀", 255 + 3 * 36),
        ("Ab 1日\n", 128 + 60 + 30 + 204 + 200 + 180),
    ],
)
def test_text_weighs_what_its_bytes_do(text, weight):
    """Each class of bytes has a weight, and a text the sum of its bytes'."""
    assert sized(text) == weigh(text.encode()) == weight


def test_ascii_is_of_the_classes_that_are_read_many_bytes_at_a_time():
    """All printable bytes but spaces, digits and capitals weigh alike; no sum of a byte's parts overflows."""
    for byte in range(0x20, 0x80):
        known = {" ": SPACE}.get(
            chr(byte), DIGIT if chr(byte).isdigit() else CAPITAL if 0x41 <= byte <= 0x5A else PLAIN
        )
        assert WEIGHTS[byte] == known
    assert SPACE <= PLAIN <= min(DIGIT, CAPITAL)
    assert len(WEIGHTS) == 256


def test_english_comes_to_about_what_tokenizers_make_of_it():
    """The weights are of the right size: a sentence of 14 words and marks comes to between 10 and 20 tokens."""
    assert 10 <= sized("The quick brown fox jumps over the lazy dog, and then it sleeps.") / TOKEN <= 20


# --- however it is spelt ------------------------------------------------------------------------------------

texts = st.text(max_size=60) | st.text('aZ9 \n"\\/é日😀', max_size=80)


@properties
@given(texts, st.integers(0, 2**32).map(Random), st.sampled_from([0, 0.1, 0.5, 1]))
def test_escapes_count_as_what_they_stand_for(text, random, wildness):
    """Escaped or not, by either reader, a text weighs what its UTF-8 does."""
    content = Writer(random, "", wildness).string(text)
    raw = f'{{"model":"m","messages":[{{"role":"user","content":{content}}}]}}'.encode()

    assert scan_chat(raw).text_256ths == careful.read_chat(raw).text_256ths == weigh(text.encode())


@pytest.mark.parametrize("size", range(40))
def test_bytes_weigh_alike_at_any_place(size):
    """Text is weighed many bytes at a time; what is of another class counts wherever it stands."""
    for other in ("7", "A", " ", "\n", '"', "é", "日", "😀", "~"):
        for rest in range(20):
            text = "a" * size + other + "b" * rest
            assert sized(text) == weigh(text.encode())


shapes = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=15,
)


@properties
@given(shapes, st.sampled_from(["tools", "functions", "response_format"]), st.booleans())
def test_shapes_weigh_what_they_would_be_written_as(value, shape, escaped):
    """Tools and forms weigh as JSON, whatever escapes and white space the body has."""
    members = {"model": "m", "messages": [], shape: value}
    raw = json.dumps(members, ensure_ascii=escaped, indent=1).encode()
    written = json.dumps(value, ensure_ascii=False).encode() if value else b""

    assert read_chat(raw).text_256ths == careful.read_chat(raw).text_256ths == weigh(written)


def test_names_of_members_weigh_in_shapes_alone():
    """A message's names are framing; a tool's are what the model reads."""
    told = {"name": "find", "Parameter 1": "é"}

    assert sized("") == 0
    assert scan_chat(json.dumps({"model": "m", "messages": [told]}).encode()).text_256ths == weigh(
        "findé".encode()
    )
    assert scan_chat(json.dumps({"model": "m", "messages": [], "tools": told}).encode()).text_256ths == weigh(
        '{"name": "find", "Parameter 1": "é"}'.encode()
    )


# --- what is no text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("detail", [{}, {"detail": "low"}, {"detail": "high"}])
@pytest.mark.parametrize("kilobytes", [1, 1000])
def test_image_weighs_nothing_of_its_bytes(detail, kilobytes):
    """The base64 of an image is no text, however much of it there is: the text beside it is all that weighs."""
    url = "data:image/png;base64," + "iVBORw0K" * (125 * kilobytes)
    image = {"type": "image_url", "image_url": {"url": url, **detail}}
    read = read_chat(body([{"type": "text", "text": "What is 1?"}, image]))

    assert read.text_256ths == weigh(b"What is 1?")
    assert read.text_bytes == 10


@pytest.mark.parametrize("name", ["role", "type"])
def test_role_and_type_weigh_nothing(name):
    """What says whose words follow, or of what kind, is framing and no text."""
    raw = json.dumps({"model": "m", "messages": [{name: "Words 123", "content": "a"}]}).encode()

    assert scan_chat(raw).text_256ths == careful.read_chat(raw).text_256ths == PLAIN
