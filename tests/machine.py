"""A machine that does to an engine and to the oracle whatever may happen to buckets, and compares all there is."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.oracle import OracleTable
from tests.strategies import (
    LATEST_US,
    START_US,
    S,
    amount,
    budgets,
    pauses_us,
    prepared,
    scale_of,
    seen,
    shares,
    verdict,
)
from tokenguard.errors import StaleHandle

KEYS = (b"global", b"team", b"user-1", b"user-2")

paths = st.lists(st.sampled_from(KEYS), min_size=1, max_size=4, unique=True).map(tuple)
asked = st.lists(shares, min_size=4, max_size=4)
signed = st.tuples(st.sampled_from([1, 1, -1]), shares).map(lambda drawn: drawn[0] * drawn[1])


class SideBySide(RuleBasedStateMachine):
    """What machines have in common: two tables, a clock, and the calls in flight."""

    def __init__(self):
        super().__init__()
        self.oracle = OracleTable()
        self.now_us = START_US
        self.budgets = {}
        self.handles = {}
        self.calls = []

    def plan(self, path):
        return tuple((key, self.budgets[key]) for key in path)

    def handle(self, plan):
        """Return the handle of a plan: the one from before, as long as it is not stale."""
        kept = self.handles.get(plan)
        if kept is None or kept.epoch != self.table.epoch:
            kept = self.handles[plan] = prepared(self.table, plan)
        return kept

    def compare_reserve(self, handle, plan, costs):
        """Reserve on both sides and compare; return whether it was allowed."""
        outcome = self.table.reserve(handle, costs, self.now_us)
        expected = self.oracle.reserve(plan, costs, self.now_us)
        assert verdict(outcome) == verdict(expected)
        assert seen(outcome) == expected
        return outcome.allowed

    def call(self, number):
        """Return a call in flight: its handle, plan and costs."""
        return self.calls[number % len(self.calls)]

    @rule(path=paths)
    def peek(self, path):
        plan = self.plan(path)
        assert seen(self.table.peek(self.handle(plan), self.now_us)) == self.oracle.peek(plan, self.now_us)

    @rule(pause_us=pauses_us)
    def time_passes(self, pause_us):
        self.now_us = min(LATEST_US, self.now_us + pause_us)

    @invariant()
    def levels_are_in_bounds(self):
        for bucket in self.oracle.buckets.values():
            assert -bucket.terms.max_debt <= bucket.level <= bucket.terms.capacity

    @precondition(lambda self: self.calls)
    @rule(number=st.integers(0, 99))
    def refund(self, number):
        handle, plan, costs = self.calls.pop(number % len(self.calls))
        deltas = tuple(-cost for cost in costs)
        assert self.table.settle(handle, deltas, self.now_us) == 0
        assert self.oracle.settle(plan, deltas, self.now_us) == 0


class EngineMachine(SideBySide):
    """Everything that may happen to buckets for which there is room: the stored integers agree, always."""

    def new_table(self, seed):
        """Return a table of the engine, with room for all of KEYS."""
        raise NotImplementedError

    def compare_tokens(self, counted, expected):
        """Compare tokens forgiven, which may be more than any level is."""
        assert counted == expected

    @initialize(
        seed=st.binary(max_size=2),
        drawn=st.lists(budgets(), min_size=4, max_size=4),
        start_us=st.sampled_from([S, START_US + 1]),
    )
    def begin(self, seed, drawn, start_us):
        self.table = self.new_table(seed)
        self.budgets = dict(zip(KEYS, drawn, strict=True))
        self.now_us = start_us

    @rule(path=paths, parts=asked)
    def reserve(self, path, parts):
        plan = self.plan(path)
        costs = tuple(amount(part, terms) for (_, terms), part in zip(plan, parts, strict=False))
        if self.compare_reserve(self.handle(plan), plan, costs):
            self.calls.append((self.handle(plan), plan, costs))

    @rule(key=st.sampled_from(KEYS), more=st.integers(0, 1))
    def reserve_about_all_of_one(self, key, more):
        plan = self.plan((key,))
        level = max(0, self.oracle.peek(plan, self.now_us).levels[0])
        self.compare_reserve(self.handle(plan), plan, (level + more,))

    @rule(path=paths, parts=asked)
    def reserve_again_after_the_wait(self, path, parts):
        plan = self.plan(path)
        costs = tuple(amount(part, terms) for (_, terms), part in zip(plan, parts, strict=False))
        wait_us = self.oracle.reserve(plan, costs, self.now_us).retry_after_us
        before = self.table.reserve(self.handle(plan), costs, self.now_us).retry_after_us
        assert before == wait_us
        if 0 < wait_us <= LATEST_US - self.now_us and wait_us < 10**15:
            self.now_us += wait_us - 1
            assert not self.compare_reserve(self.handle(plan), plan, costs)
            self.now_us += 1
            assert self.compare_reserve(self.handle(plan), plan, costs)

    @precondition(lambda self: self.calls)
    @rule(number=st.integers(0, 99), parts=asked)
    def reserve_with_the_handle_of_an_earlier_call(self, number, parts):
        handle, plan, _ = self.call(number)
        costs = tuple(amount(part, terms) for (_, terms), part in zip(plan, parts, strict=False))
        if handle.epoch == self.table.epoch:
            self.compare_reserve(handle, plan, costs)
            return
        with pytest.raises(StaleHandle):
            self.table.reserve(handle, costs, self.now_us)

    @precondition(lambda self: self.calls)
    @rule(number=st.integers(0, 99), parts=st.lists(signed, min_size=4, max_size=4))
    def settle(self, number, parts):
        handle, plan, _ = self.call(number)
        deltas = tuple(amount(part, terms) for (_, terms), part in zip(plan, parts, strict=False))
        expected = self.oracle.settle(plan, deltas, self.now_us)
        self.compare_tokens(self.table.settle(handle, deltas, self.now_us), expected)

    @rule(key=st.sampled_from(KEYS), terms=budgets())
    def configure(self, key, terms):
        self.budgets[key] = terms
        self.table.configure(key, scale_of(terms), None, self.now_us)
        self.oracle.configure(key, terms, None, self.now_us)

    @rule(key=st.sampled_from(KEYS), terms=budgets(), part=st.fractions(0, 1, max_denominator=10))
    def configure_with_a_level(self, key, terms, part):
        self.budgets[key] = terms
        level = int(part * (terms.capacity + terms.max_debt)) - terms.max_debt
        self.table.configure(key, scale_of(terms), level, self.now_us)
        self.oracle.configure(key, terms, level, self.now_us)

    @rule(key=st.sampled_from(KEYS), terms=budgets())
    def default_changes(self, key, terms):
        self.budgets[key] = terms

    @rule(key=st.sampled_from(KEYS), divisor=st.integers(2, 5))
    def default_debt_alone_changes(self, key, divisor):
        terms = self.budgets[key]
        self.budgets[key] = terms._replace(max_debt=terms.max_debt // divisor)

    @rule(key=st.sampled_from(KEYS))
    def remove(self, key):
        self.table.remove(key)
        self.oracle.remove(key)

    @rule(step_us=st.one_of(st.integers(1, S), st.integers(S, 5 * S), st.just(3_600 * S)))
    def clock_steps_back(self, step_us):
        self.now_us = max(0, self.now_us - step_us)

    @invariant()
    def stored_integers_agree(self):
        for key in self.budgets:
            assert self.table.state(key) == self.oracle.stored(key)

    @invariant()
    def counters_agree(self):
        if self.budgets:
            stats = self.table.stats()
            self.compare_tokens(stats["forgiven"], self.oracle.forgiven)
            assert stats["clock_steps"] == self.oracle.clock_steps
            assert stats["used"] == len(self.oracle.buckets)
            assert stats["refused_full"] == stats["reclaimed"] == 0
