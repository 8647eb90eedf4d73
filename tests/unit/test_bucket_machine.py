"""Random machines drive the engine and the oracle side by side and compare all there is to see."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from tests.machine import KEYS, EngineMachine, SideBySide, asked, signed
from tests.strategies import amount, budgets, properties, seen
from tokenguard._bucket import BucketTable
from tokenguard.errors import TableFull

CROWD = tuple(b"user-%d" % i for i in range(7))

crowd_paths = st.lists(st.sampled_from(CROWD), min_size=1, max_size=3, unique=True).map(tuple)


class TableMachine(EngineMachine):
    """The table in this process."""

    def new_table(self, seed):
        return BucketTable(len(KEYS), seed=seed)


class CrowdedMachine(SideBySide):
    """Seven users and room for three: what is dropped to make room is never missed.

    A bucket that is not in the table is full, so levels and decisions are compared, not what is stored.
    """

    SLOTS = 3

    @initialize(seed=st.binary(max_size=2), drawn=st.lists(budgets(), min_size=7, max_size=7))
    def begin(self, seed, drawn):
        self.table = BucketTable(self.SLOTS, seed=seed)
        self.budgets = dict(zip(CROWD, drawn, strict=True))

    def has_room(self, path):
        """Return whether the buckets of a call fit beside those that are not full."""
        views = {key: self.oracle.peek(self.plan((key,)), self.now_us) for key in CROWD}
        in_use = {key for key, view in views.items() if view.full_in_us[0]}
        return len(in_use | set(path)) <= self.SLOTS

    @rule(path=crowd_paths, parts=asked)
    def reserve(self, path, parts):
        plan = self.plan(path)
        costs = tuple(amount(part, terms) for (_, terms), part in zip(plan, parts, strict=False))
        try:
            if self.compare_reserve(self.handle(plan), plan, costs):
                self.calls.append((self.handle(plan), plan, costs))
        except TableFull:
            assert not self.has_room(path)

    @precondition(lambda self: self.calls)
    @rule(number=st.integers(0, 99), parts=st.lists(signed, min_size=4, max_size=4))
    def settle(self, number, parts):
        handle, plan, _ = self.call(number)
        if self.has_room([key for key, _ in plan]):
            deltas = tuple(amount(part, terms) for (_, terms), part in zip(plan, parts, strict=False))
            expected = self.oracle.settle(plan, deltas, self.now_us)
            assert self.table.settle(handle, deltas, self.now_us) == expected

    @rule(path=crowd_paths)
    def peek(self, path):
        plan = self.plan(path)
        assert seen(self.table.peek(self.handle(plan), self.now_us)) == self.oracle.peek(plan, self.now_us)

    @invariant()
    def buckets_that_are_not_full_are_kept_to_the_unit(self):
        for key, bucket in self.oracle.buckets.items():
            plan = self.plan((key,))
            if self.oracle.peek(plan, self.now_us).full_in_us[0]:
                assert self.table.state(key) == bucket.stored
            else:
                assert self.table.peek(self.handle(plan), self.now_us).full_in_us(0) == 0


TestEngineMachine = TableMachine.TestCase
TestEngineMachine.settings = settings(properties, max_examples=250, stateful_step_count=40)
TestCrowdedMachine = CrowdedMachine.TestCase
TestCrowdedMachine.settings = settings(properties, max_examples=120, stateful_step_count=40)
