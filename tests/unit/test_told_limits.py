"""The provider's limits in a head: what can be used of them, and under which names they travel on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import properties
from tokenguard._heads import LIMITS, Told

NOTHING, USABLE, UNUSABLE = 0, 1, 2


def fields(**amounts):
    """Return fields: of ``requests``, ``tokens`` and ``project`` each a limit, a remainder and perhaps a reset."""
    heads = []
    for of, told in amounts.items():
        of = "project-tokens" if of == "project" else of
        for what, value in zip(("limit", "remaining", "reset"), told, strict=False):
            if value is not None:
                heads.append((f"x-ratelimit-{what}-{of}".encode(), str(value).encode()))
    return heads


def seen(heads):
    told = Told(heads)
    return told.limits, (told.requests_limit, told.requests_left), (told.tokens_limit, told.tokens_left)


NONE = (-1, -1)


@pytest.mark.parametrize(
    ("heads", "limits", "requests", "tokens"),
    [
        ([], NOTHING, NONE, NONE),
        ([(b"content-type", b"text/plain")], NOTHING, NONE, NONE),
        (fields(requests=(500, 499, "120ms"), tokens=(9000, 8000, "6s")), USABLE, (500, 499), (9000, 8000)),
        (fields(requests=(500, 0)), USABLE, (500, 0), NONE),
        (fields(tokens=(9000, 9000)), USABLE, NONE, (9000, 9000)),
        (fields(tokens=(1, 0)), USABLE, NONE, (1, 0)),
        (fields(tokens=(10**15 - 1, 10**15 - 1)), USABLE, NONE, (10**15 - 1, 10**15 - 1)),
        # a project's limit beside the organization's: the tighter limit, and the less that remains
        (fields(tokens=(150_000, 149_000), project=(60_000, 57_000)), USABLE, NONE, (60_000, 57_000)),
        (fields(tokens=(50_000, 49_000), project=(60_000, 57_000)), USABLE, NONE, (50_000, 49_000)),
        (fields(tokens=(150_000, 20_000), project=(60_000, 57_000)), USABLE, NONE, (60_000, 20_000)),
        (fields(tokens=(50_000, 49_000), project=(60_000, 7)), USABLE, NONE, (50_000, 7)),
        (fields(project=(60_000, 57_000)), USABLE, NONE, (60_000, 57_000)),
        (fields(tokens=(60_000, 5), project=(60_000, 7)), USABLE, NONE, (60_000, 5)),
        # only a reset tells nothing
        ([(b"x-ratelimit-reset-tokens", b"6s")], NOTHING, NONE, NONE),
    ],
)
def test_limits_that_can_be_used(heads, limits, requests, tokens):
    """Requests and tokens, each with what remains."""
    assert seen(heads) == (limits, requests, tokens)


@pytest.mark.parametrize(
    "heads",
    [
        fields(tokens=(-1, -1, 0)),
        fields(requests=(-1, -1, 0), tokens=(9000, 8000)),
        fields(tokens=(9000, None)),
        fields(tokens=(None, 8000)),
        fields(tokens=(9000, 9001)),
        fields(tokens=(0, 0)),
        fields(tokens=("", 5)),
        fields(tokens=("9 000", 5)),
        fields(tokens=("9000.0", 5)),
        fields(tokens=("+9000", 5)),
        fields(tokens=("0x10", 5)),
        fields(tokens=("9,000", 5)),
        fields(tokens=(10**15, 5)),
        fields(tokens=("9" * 400, 5)),
        fields(tokens=("unlimited", "unlimited")),
        fields(tokens=(9000, 8000), project=(60_000, 70_000)),
        fields(tokens=(9000, 8000), project=(None, 5)),
        fields(tokens=(9000, 8000)) + fields(tokens=(9000, None)),
        fields(tokens=(9000, 8000)) * 2,
        [*fields(tokens=(9000, 8000, "1s")), (b"x-ratelimit-reset-tokens", b"2s")],
        fields(requests=(5, 4)) + fields(project=(9000, 8000), tokens=(None, None)) + fields(requests=(5, None)),
    ],
)
def test_limits_that_make_no_sense_are_none(heads):
    """Negative, missing, malformed, contradictory or given twice: then nothing of them is used."""
    assert Told(heads).limits == UNUSABLE


def test_reset_is_that_of_the_limit_that_is_told():
    """The window is read from one bucket's three fields."""
    heads = fields(requests=(500, 499, "120ms"), tokens=(150_000, 9, "59s"), project=(60_000, 57_000, "3s"))
    told = Told(heads)

    assert (told.reset(True), told.reset(False)) == (b"3s", b"120ms")
    assert (told.tokens_left, told.tokens_left_of_limit) == (9, 57_000)
    assert Told(fields(tokens=(5, 4))).reset(True) == b""
    assert Told([]).reset(False) == b""


amounts = st.integers(-2, 20).map(str) | st.sampled_from(["", "x", "9" * 15, "9" * 16, "5.0", " 5"])
names = st.sampled_from([f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in LIMITS])
drawn = st.lists(st.tuples(names, amounts), max_size=12).map(
    lambda given: [(name.encode(), value.encode()) for name, value in given]
)


def number(value):
    return int(value) if value.isdigit() and len(value) <= 15 else -1


@properties
@given(drawn)
def test_head_is_weighed_as_a_plain_reader_would(heads):
    """Whatever is told in whatever order: usable if and only if all of it makes sense."""
    once = dict(heads)
    groups = {}
    for of in LIMITS:
        limit, left = (once.get(f"x-ratelimit-{what}-{of}".encode()) for what in ("limit", "remaining"))
        if limit is not None or left is not None:
            groups[of] = number((limit or b"").decode()), number((left or b"").decode())
    sound = all(limit >= 1 and 0 <= left <= limit for limit, left in groups.values())
    told = Told(heads)

    if len(once) < len(heads) or not sound:
        assert told.limits == UNUSABLE
        return
    assert told.limits == (USABLE if groups else NOTHING)
    assert (told.requests_limit, told.requests_left) == groups.get("requests", NONE)
    tokens = [groups[of] for of in ("tokens", "project-tokens") if of in groups]
    assert told.tokens_limit == min((limit for limit, _ in tokens), default=-1)
    assert told.tokens_left == min((left for _, left in tokens), default=-1)


OTHERS = [
    (b"x-ratelimit-limit-tokens_usage_based", b"5"),
    (b"x-ratelimit-remaining-images", b"7"),
    (b"x-ratelimit-reset", b"1"),
    (b"x-ratelimit-limit-project-requests", b"9"),
]


@pytest.mark.parametrize(
    "heads",
    [
        fields(requests=(500, 499, "120ms"), tokens=(9000, 8000, "6s"), project=(60_000, 57_000, "3s")),
        fields(tokens=(-1, -1, 0)),
        fields(tokens=("rubbish", "")),
        OTHERS,
        OTHERS + fields(tokens=(9000, 8000)),
    ],
)
def test_limits_travel_under_names_of_their_own(heads):
    """All of them, known or not, usable or not, as they came; as a list and as lines."""
    other = (b"content-type", b"text/plain")
    expected = [(b"x-upstream-" + name.removeprefix(b"x-"), value) for name, value in heads]

    assert Told([*heads, other]).returned(False, False) == [*expected, other]
    block = b"".join(b"%b: %b\r\n" % field for field in [*expected, other])
    assert Told([*heads, other]).returned_block(False, False, b"x-ours: 1\r\n") == block + b"x-ours: 1\r\n"


def test_limits_given_twice_travel_on_together():
    """As Falcon has it, a field that is given twice is there once, with both values."""
    heads = fields(tokens=(9000, 8000)) + fields(tokens=(7000, None))

    block = Told(heads).returned_block(False, False, b"")
    assert b"x-upstream-ratelimit-limit-tokens: 9000, 7000\r\n" in block
    assert block.count(b"\r\n") == 2


@pytest.mark.parametrize(
    ("reset", "in_windows"),
    [("6s", False), ("6m0s", False), ("12ms", False), ("", False), ("6", True), ("59", True)],
)
@pytest.mark.parametrize("of", ["requests", "tokens", "project"])
def test_time_without_a_unit_is_of_a_window(of, reset, in_windows):
    """Azure tells in whole seconds when its window ends; who has buckets tells Go's durations."""
    assert Told(fields(**{of: (500, 400, reset)})).in_windows is in_windows


def test_time_that_is_not_told_is_of_no_window():
    """Where there is no reset, or no limit, nothing is known."""
    assert not Told(fields(tokens=(500, 400))).in_windows
    assert not Told([]).in_windows
