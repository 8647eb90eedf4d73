"""JSON is read strictly, and where a member is replaced every other byte stays as it came."""

import json
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import properties
from tests.wild import Writer
from tokenguard.errors import InvalidRequest
from tokenguard.jsontext import read_object, shown, whole_number


def refused(body):
    """Return the error that reading a body ends in."""
    with pytest.raises(InvalidRequest) as caught:
        read_object(body)
    return caught.value


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":1,"a":1}',
        b'{"a":1,"b":2,"a":3}',
        b'{"a":1,"\\u0061":2}',
        b'{"x":{"a":1,"a":2}}',
        b'{"x":[1,[{"a":1,"b":1,"a":2}]]}',
    ],
)
def test_member_given_twice_is_refused_at_any_depth(body):
    """Two members of one name in one object are an error that names the member, however it is escaped."""
    error = refused(body)

    assert error.field == "a"
    assert "member 'a' is given more than once" in str(error)


def test_equal_names_in_different_objects_are_no_duplicates():
    """Objects beside and inside each other may have members of the same name."""
    members = read_object(b'{"a":{"a":1},"b":[{"a":2},{"a":3}]}').members

    assert members == {"a": {"a": 1}, "b": [{"a": 2}, {"a": 3}]}


def test_duplicate_among_many_members_is_found():
    """The last of many members, given once more, is named."""
    members = ",".join(f'"k{i}":1' for i in range(20_000))

    assert "k19999" in str(refused(f'{{"a":{{{members},"k19999":1}}}}'.encode()))


def test_name_given_twice_is_shown_shortened():
    """A message does not repeat a name of any length."""
    name = "n" * 100_000

    assert len(str(refused(f'{{"{name}":1,"{name}":2}}'.encode()))) < 1000


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("body", ["{}", '{{"a":{}}}', '{{"a":[1,{{"b":{}}}]}}'])
def test_numbers_that_json_does_not_know_are_refused(constant, body):
    """NaN and the infinities are no JSON, wherever they stand."""
    error = refused(body.format(constant).encode())

    assert error.field == "body"
    assert "JSON" in str(error)


@pytest.mark.parametrize(
    ("body", "at"),
    [(b"\xff{}", "0xff at 0"), (b'{"a":"\xc3\x28"}', "0xc3 at 6"), (b'{"a":"\xed\xa0\x80"}', "0xed")],
)
def test_bytes_that_are_not_utf_8_are_refused(body, at):
    """A body in another encoding is refused, and the message tells the byte and its place."""
    assert f"body must be UTF-8, got byte {at}" in str(refused(body))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"\xef\xbb\xbf{}",
        b"null",
        b"[]",
        b"1",
        b'"a"',
        b"{",
        b"}",
        b"{}}",
        b"{} {}",
        b"{}x",
        b"{}\x00",
        b'{"a"}',
        b'{"a":}',
        b'{"a":1,}',
        b'{,"a":1}',
        b'{"a":1 "b":2}',
        b"{'a':1}",
        b"{a:1}",
        b'{"a":01}',
        b'{"a":+1}',
        b'{"a":.5}',
        b'{"a":tru}',
        b'{"a":"\n"}',
        b'{"a\x01":1}',
        b'{"a":"\\x"}',
        b'{"a":"\\u12"}',
        b'{"a":1}// done',
        b'\xc2\xa0{"a":1}',
        b'{"a":1\x0c}',
    ],
)
def test_what_is_not_one_json_object_is_refused(body):
    """Anything but exactly one object is an error about the body: no BOM, no comment, nothing behind it."""
    error = refused(body)

    assert error.field == "body"
    assert str(error).startswith("body must be")


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b"{" * 100_000,
        b'{"a":' + b"[" * 100_000,
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    ],
)
def test_deep_nesting_is_refused(body):
    """A body of nothing but brackets is an error like any other and no crash."""
    assert refused(body).field == "body"


def test_nesting_that_people_use_is_read():
    """A hundred levels are no problem."""
    assert read_object(b'{"a":' + b"[" * 100 + b"]" * 100 + b"}").members["a"]


def test_integers_of_any_useful_size_are_read_exactly():
    """An integer does not pass through a double on its way."""
    assert read_object(b'{"a":12345678901234567890123456789}').members == {"a": 12345678901234567890123456789}


def test_integer_of_thousands_of_digits_is_refused():
    """A number that would take long to convert is an error of the body."""
    assert refused(b'{"a":' + b"9" * 100_000 + b"}").field == "body"


def test_lone_surrogates_are_read_as_they_came():
    """An escape that is no character is kept for whoever must judge it."""
    body = b'{"a":"\\ud800","b":1}'

    read = read_object(body)

    assert read.members["a"] == "\ud800"
    assert read.replacing("b", "2") == b'{"a":"\\ud800","b":2}'


# --- members and where they stand ---------------------------------------------------------------------------

names = st.text(max_size=6)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(names, values, max_size=5)


@properties
@given(objects, st.integers(0, 2**32))
def test_object_is_read_as_json_reads_it(members, seed):
    """Whatever white space and escapes are used, the members are those of the standard's reading."""
    text = Writer(Random(seed)).document(members)

    assert read_object(text.encode()).members == json.loads(text) == members


@properties
@given(objects, st.integers(0, 2**32), values, st.data())
def test_replacing_changes_only_the_bytes_of_that_member(members, seed, value, data):
    """The text before and behind a member's value stays byte for byte; the member has the new value."""
    members = members or {"only": 1}
    writer = Writer(Random(seed))
    text = writer.document(members)
    name = data.draw(st.sampled_from(sorted(members)))
    start, end = writer.spans[name]

    replaced = read_object(text.encode()).replacing(name, json.dumps(value)).decode()

    assert json.loads(replaced) == {**members, name: value}
    assert replaced[:start] == text[:start]
    assert replaced[len(replaced) - len(text) + end :] == text[end:]
    assert json.loads(replaced[start : len(replaced) - len(text) + end]) == value


@properties
@given(objects, st.integers(0, 2**32), values, names)
def test_replacing_a_member_that_is_not_there_adds_it(members, seed, value, name):
    """A new member is put in at one place; everything around it stays byte for byte."""
    members.pop(name, None)
    text = Writer(Random(seed)).document(members)

    added = read_object(text.encode()).replacing(name, json.dumps(value)).decode()

    opening = text.index("{") + 1
    assert json.loads(added) == {**members, name: value}
    assert added.startswith(text[:opening])
    assert added.endswith(text[opening:])


@pytest.mark.parametrize(
    ("body", "replaced"),
    [
        (b'{"a":1}', b'{"a":[]}'),
        (b' { "a" : 1 , "b" : 2 } ', b' { "a" : [] , "b" : 2 } '),
        ('{"é":"😀","a":"😀","z":"é"}'.encode(), '{"é":"😀","a":[],"z":"é"}'.encode()),
        (b"{}", b'{"a":[]}'),
        (b"{ }", b'{"a":[] }'),
        (b'{"b":1}', b'{"a":[],"b":1}'),
        (b'{"b":{"a":1}}', b'{"a":[],"b":{"a":1}}'),
    ],
)
def test_replacing_by_example(body, replaced):
    """Spans count characters as the text has them, and only the outer object's members are meant."""
    assert read_object(body).replacing("a", "[]") == replaced


# --- reading members ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "read"), [(1, 1), (10, 10), (5.0, 5), (1e1, 10)])
def test_whole_number_is_an_integer_however_it_is_written(value, read):
    """5.0 and 1e1 are whole numbers; the result is an int."""
    number = whole_number({"n": value}, "n", 1, 10)

    assert number == read
    assert type(number) is int


@pytest.mark.parametrize(
    ("members", "got"),
    [
        ({}, "nothing"),
        ({"n": None}, "None"),
        ({"n": 0}, "0"),
        ({"n": 11}, "11"),
        ({"n": 1.5}, "1.5"),
        ({"n": True}, "True"),
        ({"n": "5"}, "'5'"),
        ({"n": [5]}, "[5]"),
        ({"n": float("inf")}, "inf"),
        ({"n": 1e300}, "1e+300"),
    ],
)
def test_what_is_no_whole_number_within_bounds_is_refused(members, got):
    """The message names the field, the bounds and what was given; true is no number."""
    with pytest.raises(InvalidRequest) as caught:
        whole_number(members, "n", 1, 10)

    assert caught.value.field == "n"
    assert str(caught.value) == f"n must be a whole number from 1 to 10, got {got}"


def test_shown_values_are_short():
    """A value of any size is cut so that a message stays one line."""
    assert len(shown({"a": "x" * 10_000}, "a")) == 80
    assert shown({"a": "x"}, "a") == "'x'"
    assert shown({}, "a") == "nothing"
