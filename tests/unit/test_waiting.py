"""Who waits for a budget and in which order, driven by given times: nothing sleeps, and nobody is a thread."""

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.house import named
from tests.strategies import properties
from tokenguard.library.waiting import Line
from tokenguard.model import NEVER_US, BucketState, Decision

GLOBAL, ALICE, BOB = named("global"), named("user:alice"), named("user:bob")
LIMIT = 100


def refusal(name, wait_s=math.inf, *, others=(), cost=10, limit=LIMIT):
    """Return the decision that a bucket has refused, which others on the path would have let pass."""
    wait_us = NEVER_US if wait_s == math.inf else int(wait_s * 1_000_000)
    binding = BucketState(name, limit, 0, cost, wait_us, NEVER_US)
    passed = tuple(BucketState(other, LIMIT, LIMIT, cost, 0, 0) for other in others)
    return Decision(False, wait_us, binding, (*passed, binding))


class Waiter:
    """One who waits, and counts how often it is told."""

    def __init__(self, line, *names, until_s=60.0):
        self.told = 0
        self.gone = False
        self.turn = line.enter(names, until_s, self.tell, lambda: self.gone)

    def tell(self):
        self.told += 1

    def refused(self, name, wait_s=math.inf, now_s=0.0):
        """Ask in vain, twice: once before it stands in line, and once after."""
        for _ in range(2):
            assert self.turn.pause_s(now_s) == 0
            assert self.turn.refused(refusal(name, wait_s, others=set(self.turn.names) - {name}), now_s)
        return self


@pytest.fixture
def line():
    return Line()


def test_first_asks_at_once(line):
    """Whoever comes when nobody waits asks before anything else."""
    assert Waiter(line, GLOBAL, ALICE).turn.pause_s(0.0) == 0


def test_refused_one_asks_again_when_it_stands_in_line(line):
    """What was given back before it stood in line nobody told it of, and so it asks once more."""
    waiter = Waiter(line, GLOBAL, ALICE)
    assert waiter.turn.pause_s(0.0) == 0

    assert waiter.turn.refused(refusal(ALICE, others=[GLOBAL]), 0.0)

    assert waiter.turn.pause_s(0.0) == 0


def test_first_sleeps_until_its_bucket_has_filled_up(line):
    """Refused, it sleeps for as long as the decision says, and asks then, not earlier."""
    waiter = Waiter(line, GLOBAL, ALICE).refused(ALICE, wait_s=2.5)

    assert waiter.turn.pause_s(0.0) == 2.5
    assert waiter.turn.pause_s(2.0) == 0.5
    assert waiter.turn.pause_s(2.5) == 0


def test_nobody_sleeps_beyond_its_time(line):
    """It asks a last time when its time is over, and whatever comes of that, it waits no more."""
    waiter = Waiter(line, ALICE, until_s=1.0).refused(ALICE, wait_s=2.5)

    assert waiter.turn.pause_s(0.25) == 0.75
    assert waiter.turn.pause_s(1.0) == 0
    assert not waiter.turn.refused(refusal(ALICE), 1.0)


def test_one_behind_others_goes_without_when_its_time_is_over(line):
    """It does not overtake even then."""
    Waiter(line, ALICE).refused(ALICE)
    behind = Waiter(line, ALICE, until_s=1.0)

    assert behind.turn.pause_s(0.5) == 0.5
    assert behind.turn.pause_s(1.0) < 0


def test_one_who_asks_for_more_than_a_bucket_holds_does_not_wait(line):
    """Waiting for any other bucket would not help either."""
    waiter = Waiter(line, GLOBAL, ALICE)
    too_large = BucketState(ALICE, 5, 5, 11, NEVER_US, 0)

    assert not waiter.turn.refused(refusal(ALICE, cost=11, limit=5), 0.0)
    never = refusal(GLOBAL)
    assert not waiter.turn.refused(never._replace(buckets=(*never.buckets, too_large)), 0.0)


def test_later_one_waits_behind_the_first(line):
    """Who comes later and needs the bucket that another waits for does not ask before that one is gone."""
    first = Waiter(line, GLOBAL, ALICE).refused(ALICE)
    second = Waiter(line, GLOBAL, ALICE)

    assert second.turn.pause_s(0.0) == 60.0
    with first.turn:
        pass

    assert second.told == 1
    assert second.turn.pause_s(0.0) == 0


def test_others_pass_by_one_who_waits_for_a_bucket_of_its_own(line):
    """Alice's line holds up nobody but those who need what is Alice's."""
    Waiter(line, GLOBAL, ALICE).refused(ALICE)

    assert Waiter(line, GLOBAL, BOB).turn.pause_s(0.0) == 0


def test_one_who_waits_for_a_common_bucket_holds_up_all_who_need_it(line):
    """A call that needs much of the global budget is not starved by small ones."""
    Waiter(line, GLOBAL, ALICE).refused(GLOBAL)

    assert Waiter(line, GLOBAL, BOB).turn.pause_s(0.0) > 0


def test_what_is_given_back_wakes_the_first_alone(line):
    """One is told, and the next when that one is done."""
    waiters = [Waiter(line, ALICE).refused(ALICE)]
    waiters += [Waiter(line, ALICE) for _ in range(3)]
    for waiter in waiters[1:]:
        waiter.turn.pause_s(0.0)

    line.stir([ALICE])

    assert [waiter.told for waiter in waiters] == [1, 0, 0, 0]
    for i, waiter in enumerate(waiters):
        assert waiter.turn.pause_s(0.0) == 0
        with waiter.turn:
            assert [other.told for other in waiters[i + 1 :]] == [0] * (3 - i)
    assert not line


def test_what_is_given_back_to_others_wakes_nobody(line):
    """Bob's tokens are of no use to Alice."""
    waiter = Waiter(line, GLOBAL, ALICE).refused(ALICE)

    line.stir([GLOBAL, BOB])

    assert not waiter.told


def test_told_while_it_asks_it_asks_again(line):
    """What is given back between its question and the answer is not lost."""
    waiter = Waiter(line, ALICE).refused(ALICE)
    line.stir([ALICE])
    assert waiter.turn.pause_s(0.0) == 0

    line.stir([ALICE])
    assert waiter.turn.refused(refusal(ALICE), 0.0)

    assert waiter.turn.pause_s(0.0) == 0


def test_one_who_is_told_and_leaves_tells_the_next(line):
    """A wake-up is handed on, even by who was cancelled before it could ask."""
    first = Waiter(line, ALICE).refused(ALICE)
    second = Waiter(line, ALICE)
    second.turn.pause_s(0.0)
    line.stir([ALICE])

    with pytest.raises(KeyboardInterrupt), first.turn:
        raise KeyboardInterrupt

    assert second.told == 1


def test_one_who_moves_on_to_another_line_keeps_its_place(line):
    """Refused by another bucket, it waits there by its arrival, ahead of who came later."""
    first = Waiter(line, GLOBAL, ALICE).refused(ALICE)
    second = Waiter(line, GLOBAL, BOB).refused(GLOBAL)
    line.stir([ALICE])
    assert first.turn.pause_s(0.0) == 0

    assert first.turn.refused(refusal(GLOBAL, others=[ALICE]), 0.0)
    line.stir([GLOBAL])

    assert first.turn.pause_s(0.0) == 0
    assert second.turn.pause_s(0.0) > 0


def test_one_short_of_two_buckets_waits_for_the_one_that_takes_longer(line):
    """Until that has enough, whatever comes into the other is of no use."""
    waiter = Waiter(line, GLOBAL, ALICE)
    short = [BucketState(name, LIMIT, 0, 10, wait_s * 10**6, 0) for name, wait_s in ((GLOBAL, 5), (ALICE, 6))]
    assert waiter.turn.pause_s(0.0) == 0

    assert waiter.turn.refused(Decision(False, 6 * 10**6, short[1], tuple(short)), 0.0)

    assert waiter.turn.at == ALICE
    assert waiter.turn.pause_s(0.0) == 0
    assert waiter.turn.pause_s(0.0) == 6


def test_a_budget_that_is_set_meanwhile_counts(line):
    """Those who are refused by a bucket that was not on their path when they came wait in order, too."""
    first, second = Waiter(line, ALICE), Waiter(line, ALICE)
    assert first.turn.pause_s(0.0) == second.turn.pause_s(0.0) == 0
    for waiter in (first, second):
        assert waiter.turn.refused(refusal(GLOBAL, others=[ALICE]), 0.0)

    assert first.turn.pause_s(0.0) == 0
    assert second.turn.pause_s(0.0) > 0


def test_one_who_is_gone_holds_up_nobody(line):
    """Who can never be told anymore, for its event loop is closed, is passed over."""
    first = Waiter(line, ALICE).refused(ALICE)
    second = Waiter(line, ALICE)
    second.turn.pause_s(0.0)
    first.gone = True

    line.stir([ALICE])

    assert (first.told, second.told) == (0, 1)
    assert second.turn.pause_s(0.0) == 0
    assert Waiter(line, ALICE).turn.pause_s(0.0) > 0


def test_nobody_waits_in_a_process_that_was_forked_off(line):
    """Those who waited are not there, and whoever still leaves may."""
    waiter = Waiter(line, ALICE).refused(ALICE)

    line.forget()

    assert not line
    assert Waiter(line, ALICE).turn.pause_s(0.0) == 0
    with waiter.turn:
        pass


def test_refusal_of_one_who_never_asked_is_one(line):
    """Where there would be enough, those ahead are to have it: it is told when they ask again."""
    Waiter(line, ALICE).refused(ALICE, wait_s=4.0)
    behind = Waiter(line, ALICE, until_s=1.0)
    assert behind.turn.pause_s(1.0) < 0
    seen = Decision(True, 0, None, (BucketState(ALICE, LIMIT, 50, 10, 0, 0),))

    decision = behind.turn.in_vain(seen, 1.0)

    assert not decision.allowed
    assert decision.binding.name == ALICE
    assert decision.retry_after == decision.binding.wait_us / 1_000_000 == 3.0
    assert behind.turn.in_vain(refusal(ALICE), 1.0) == refusal(ALICE)


# --- a random machine -------------------------------------------------------------------------------------------

NAMES = [GLOBAL, ALICE, BOB]
PATHS = [(GLOBAL, ALICE), (GLOBAL, BOB), (ALICE,), (BOB,)]


class Bucket:
    """A bucket that may fill up, by whole tokens in whole seconds."""

    def __init__(self, level, rate):
        self.level, self.rate = level, rate

    def wait_s(self, cost):
        if cost <= self.level:
            return 0
        return -(-(cost - self.level) // self.rate) if self.rate else math.inf


class Asker(Waiter):
    """One who waits for so many tokens of each of its buckets."""

    def __init__(self, line, names, cost, until_s):
        super().__init__(line, *names, until_s=until_s)
        self.cost = cost
        self.wakes_s = -math.inf
        self.outcome = None

    def tell(self):
        self.wakes_s = -math.inf


class WaitingMachine(RuleBasedStateMachine):
    """All who wait, driven as threads and tasks drive themselves, in whatever order they come to run."""

    @initialize(levels=st.tuples(*[st.integers(0, 30)] * 3), rates=st.tuples(*[st.integers(0, 3)] * 3))
    def begin(self, levels, rates):
        self.line = Line()
        self.now_s = 0
        self.buckets = {name: Bucket(level, rate) for name, level, rate in zip(NAMES, levels, rates, strict=True)}
        self.waiting = []
        self.everybody = []

    @rule(path=st.sampled_from(PATHS), cost=st.integers(1, 20), wait_s=st.integers(1, 30), data=st.data())
    def come(self, path, cost, wait_s, data):
        asker = Asker(self.line, path, cost, self.now_s + wait_s)
        self.everybody.append(asker)
        self.waiting.append(asker)
        self.run(data)

    @rule(path=st.sampled_from(PATHS), tokens=st.integers(1, 20), data=st.data())
    def give_back(self, path, tokens, data):
        for name in path:
            self.buckets[name].level = min(LIMIT, self.buckets[name].level + tokens)
        self.line.stir(path)
        self.run(data)

    @rule(seconds=st.integers(1, 10), data=st.data())
    def let_time_pass(self, seconds, data):
        for _ in range(seconds):
            self.now_s += 1
            for bucket in self.buckets.values():
                bucket.level = min(LIMIT, bucket.level + bucket.rate)
            self.run(data)

    @rule(data=st.data())
    def cancel(self, data):
        if self.waiting:
            asker = data.draw(st.sampled_from(self.waiting))
            self.end(asker, "cancelled")
            self.run(data)

    def run(self, data):
        """Let all run who have woken up, in any order, until all sleep."""
        for _ in range(1000):
            awake = [asker for asker in self.waiting if asker.wakes_s <= self.now_s]
            if not awake:
                return
            self.go_on(data.draw(st.sampled_from(awake)) if len(awake) > 1 else awake[0])
        raise AssertionError("they ask without end")

    def go_on(self, asker):
        pause_s = asker.turn.pause_s(self.now_s)
        if pause_s > 0:
            asker.wakes_s = self.now_s + pause_s
        elif pause_s < 0:
            self.end(asker, "in vain")
        elif self.takes(asker):
            self.end(asker, "served")
        elif not asker.turn.refused(self.refusal_of(asker), self.now_s):
            self.end(asker, "in vain")

    def takes(self, asker):
        """Decide as the buckets do, all or nothing; nobody may be served ahead of who came before."""
        if any(self.buckets[name].level < asker.cost for name in asker.turn.names):
            return False
        ahead = {other.turn.at for other in self.waiting if other.turn.number < asker.turn.number}
        assert not ahead & set(asker.turn.names), "overtaken"
        for name in asker.turn.names:
            self.buckets[name].level -= asker.cost
        return True

    def refusal_of(self, asker):
        states = [self.state_of(name, asker.cost) for name in asker.turn.names]
        binding = max(states, key=lambda state: state.wait_us)
        return Decision(False, binding.wait_us, binding, tuple(states))

    def state_of(self, name, cost):
        wait_s = self.buckets[name].wait_s(cost)
        wait_us = NEVER_US if wait_s == math.inf else wait_s * 1_000_000
        return BucketState(name, LIMIT, self.buckets[name].level, cost, wait_us, NEVER_US)

    def end(self, asker, outcome):
        assert asker.outcome is None
        asker.outcome = outcome
        self.waiting.remove(asker)
        with asker.turn:
            pass

    @invariant()
    def nobody_sleeps_without_a_reason(self):
        """Who waits lacks something, or comes behind somebody who waits for what it needs."""
        for asker in getattr(self, "waiting", ()):
            lacks = any(self.buckets[name].level < asker.cost for name in asker.turn.names)
            behind = any(
                other.turn.at in asker.turn.names and other.turn.number < asker.turn.number
                for other in self.waiting
            )
            assert lacks or behind, f"{asker.turn.number} was not told"

    @invariant()
    def nobody_waits_beyond_its_time(self):
        for asker in getattr(self, "waiting", ()):
            assert asker.turn._until_s > self.now_s

    def teardown(self):
        """In the end everybody has been served or sent away, and the line is empty."""
        for asker in list(getattr(self, "waiting", ())):
            self.now_s = max(self.now_s, asker.turn._until_s)
        while getattr(self, "waiting", ()):
            for asker in list(self.waiting):
                if asker.outcome is None:
                    self.go_on(asker)
        assert all(asker.outcome for asker in getattr(self, "everybody", ()))
        assert not getattr(self, "line", ())


def test_random_machine():
    """Whoever comes, goes and gives back: all are served in order or in time sent away, and no wake-up is lost."""
    run_state_machine_as_test(
        WaitingMachine, settings=settings(properties, max_examples=100, stateful_step_count=40)
    )


def test_stir_out_of_a_finaliser_waits_for_nobody():
    """What is given back while this very thread is at the lines is told of when it is done with them."""
    line = Line()
    told = []

    def tell():
        told.append(len(told))
        if len(told) == 1:
            line.stir([BOB])  # as a finaliser would, in the middle of it

    first = line.enter([ALICE], math.inf, tell)
    second = line.enter([BOB], math.inf, lambda: told.append("bob"))
    line.wait_for(first, ALICE)
    line.wait_for(second, BOB)

    line.stir([ALICE])

    assert told == [0, "bob"]
    line.leave(first)
    line.leave(second)
    assert not line
