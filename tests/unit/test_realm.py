"""What a node knows of the budgets that are shared."""

from hypothesis import given
from hypothesis import strategies as st

from tests.house import grant, named
from tests.strategies import properties
from tokenguard.backends.batch import read_scale, scale_text
from tokenguard.backends.realm import UNKNOWN, Realm, read_changes, revision, told
from tokenguard.model import BucketName, Meter, Scope

names = st.builds(
    named,
    st.sampled_from(["global", "team:red", "user:alice", "user:ü {x}:y"]),
    st.sampled_from(Meter),
    st.sampled_from([None, "gpt-4o"]),
)
scales = st.builds(grant, st.integers(1, 10**9), st.sampled_from([0, 5, 0.5]))
changes = st.lists(st.tuples(names, st.none() | scales), max_size=30)


@properties
@given(changes)
def test_changes_one_by_one_come_to_what_they_say(some):
    """The last word on each budget counts, and the list is in the order of the keys."""
    mirror = UNKNOWN
    for number, change in enumerate(some):
        mirror = mirror.changed(f"{number}:x", [change])

    last = {name: scale for name, scale in dict(some).items() if scale is not None}
    assert {budget.name: budget.scale for budget in mirror.all} == last
    assert [budget.name.key for budget in mirror.all] == sorted(name.key for name in last)
    assert revision(mirror) == len(some) - 1


@properties
@given(changes)
def test_mirror_that_is_published_is_read_as_it_was(some):
    """What one node writes another reads."""
    mirror = UNKNOWN.changed("7:x", some)
    fields = [part if isinstance(part, bytes) else part.encode() for part in told(mirror)]

    assert UNKNOWN.changed("7:x", read_changes(fields)).all == mirror.all


@properties
@given(names)
def test_name_is_read_back_from_its_key(name):
    """Keys and names are one to one."""
    assert BucketName.from_key(name.key) == name


def test_scale_is_read_back_from_its_text():
    """In whole numbers, of any size that there may be."""
    scale = grant(10**12, 0.125)

    assert read_scale(scale_text(scale)) == scale


def test_change_leaves_the_mirror_before_it_as_it_was():
    """Others may be reading it."""
    before = UNKNOWN.changed("1:x", [(named("team:red"), grant(5))])

    after = before.changed("2:x", [(named("team:red"), None)])

    assert [budget.scale.capacity for budget in before.all] == [5]
    assert after.budgets == {}


def test_all_keys_of_a_realm_have_its_hash_tag():
    """Whatever braces an id has."""
    realm = Realm("north")
    keys = [*realm.budgets_keys, realm.record_key("x"), realm.bucket_key(BucketName(Scope("user", "{a}{b}")))]

    assert all(key[key.index(b"{") : key.index(b"}") + 1] == b"{north}" for key in keys)
    assert len(set(keys)) == len(keys)
