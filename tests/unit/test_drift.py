"""What the provider counts that is not ours, call by call."""

import pytest

from tokenguard._bucket import Shared
from tokenguard.drift import Drift

LIMIT = 60_000
OURS, LEAST = 900, 400
"""What a call is charged here, and the least that a provider counts."""


class Account:
    """A provider's bucket and ours, of which calls take one after the other; time stands still.

    Args:
        counts: For what the provider counts a call.
        level: What both hold at first.
    """

    def __init__(self, counts=OURS, level=LIMIT // 2):
        self.shared = Shared()
        self.drift = Drift(self.shared)
        self.drift.hold(LIMIT)
        self.counts = counts
        self.theirs = self.ours = level

    def send(self):
        """Charge a call on both sides; return its charge, and what its answer will tell."""
        self.ours -= OURS
        charge = self.drift.charge(self.ours, OURS, 0)
        self.drift.expect(charge, LEAST)
        self.theirs -= self.counts
        return self.theirs, charge

    def call(self, others=0, *, in_windows=False):
        """Make a call after others have spent so much; return what is missed in all."""
        self.theirs -= others
        self.drift.told(*self.send(), in_windows)
        return self.drift.missed


def test_what_is_charged_alike_is_not_missed():
    """Our calls alone leave both buckets as far apart as they were."""
    account = Account()

    assert [account.call() for _ in range(10)] == [0] * 10


def test_what_others_spend_is_missed():
    """It is known with the next call's answer, to the token; the first one has nothing to be compared with."""
    account = Account()

    assert [account.call(others) for others in (500, 0, 100, 0, 20)] == [0, 0, 100, 100, 120]


def test_what_flows_into_a_full_bucket_is_not_missed():
    """A bucket that is full before a call, here or there, tells nothing of what came before."""
    account = Account()
    account.call()
    account.theirs, account.ours = LIMIT - 5000, LIMIT  # ours was full first
    assert account.call() == 0
    assert account.call(300) == 300
    account.theirs, account.ours = LIMIT, LIMIT - 5000  # and now the provider's
    assert account.call() == 300
    assert account.call(40) == 340


def test_late_answer_is_of_the_past():
    """What was told of a later call has all of it."""
    account = Account()
    account.call()
    late = account.send()
    assert account.call(700) == 700
    account.drift.told(*late, False)

    assert account.drift.missed == 700
    assert account.call() == 700


def test_limit_that_is_changed_begins_anew():
    """What remains of another limit has nothing to do with what remained."""
    account = Account()
    account.call()
    account.drift.hold(LIMIT // 2)
    account.theirs = LIMIT // 4
    assert account.call() == 0

    assert account.call(200) == 200


def test_provider_that_counts_less_hides_others_until_it_has_shown_so():
    """The surplus of our calls is taken off; once pairs of calls have shown the rule, nothing is hidden."""
    account = Account(LEAST)
    assert [account.call() for _ in range(3)] == [0, LEAST - OURS, 2 * (LEAST - OURS)]
    for _ in range(20):
        account.call()
    before = account.drift.missed

    assert [account.call(others) - before for others in (0, 0, 300, 0)] == [0, 0, 300, 300]


@pytest.mark.parametrize("counts", [OURS, LEAST + 100, LEAST - 100, 0])
def test_rule_is_not_believed_where_it_does_not_fit(counts):
    """A provider that counts otherwise keeps what it does not count."""
    account = Account(counts)
    for _ in range(30):
        account.call()
    before = account.drift.missed

    assert account.call() - before == counts - OURS


def test_provider_that_counts_in_windows_is_known_by_its_last_answer():
    """Then nobody looks at what is missed."""
    account = Account()
    account.call(in_windows=True)
    assert account.drift.in_windows
    account.call()
    assert not account.drift.in_windows


def test_all_processes_see_what_others_spend():
    """Calls of other processes in between are no others: what they were charged too much is known."""
    account, crew = Account(LEAST), []
    for _ in range(3):
        crew.append(Drift(account.shared))
        crew[-1].hold(LIMIT)
    for step in range(120):
        account.drift = crew[step % 3]
        account.call()
    before = [drift.missed for drift in crew]
    account.call(300)
    for step in range(6):
        account.drift = crew[step % 3]
        account.call()

    assert [drift.missed - was for drift, was in zip(crew, before, strict=True)] == [300] * 3


def test_bucket_that_another_process_found_full_tells_nothing():
    """What flowed in and was lost is not missed, whoever saw it."""
    account = Account()
    mine, other = account.drift, Drift(account.shared)
    other.hold(LIMIT)
    account.call()
    account.ours = LIMIT
    account.drift = other
    account.call()
    account.drift = mine

    assert account.call() == 0
    assert account.call(300) == 300
