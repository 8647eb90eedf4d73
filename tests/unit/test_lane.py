"""How calls travel: together, in order, once; what becomes of those that are given up. Without any server."""

import asyncio
from collections import deque

import msgspec
import pytest

from tests.house import grant, named
from tokenguard._bucket import BucketTable
from tokenguard.backends.batch import MAX_CALLS, Kind, RedisHandle
from tokenguard.backends.lane import Lane, LinkLost
from tokenguard.backends.outage import Closed, Watch
from tokenguard.backends.realm import Realm
from tokenguard.backends.scripts import BUDGETS, CALLS, PUBLISH
from tokenguard.errors import BackendDown, StaleHandle
from tokenguard.model import Budget

EPOCH = "0:abc"
S = 60
"""The time limit of these tests, in seconds: it is never reached."""


class Held:
    """A link that holds what is sent until the test lets it go, and admits every call.

    Attributes:
        sent: Batches that have been sent and not answered: what they hold, and whom to tell.
        numbers: The number of each batch that was sent.
        looks: How often the budgets were asked for.
    """

    def __init__(self):
        self.closed = None
        self.sent = deque()
        self.numbers = []
        self.looks = 0

    async def connect(self):
        pass

    def send(self, script, keys, args, answered):  # noqa: ARG002 - as a lane calls it
        if script is BUDGETS:
            self.looks += 1
            answered([EPOCH.encode(), 1])
        elif script is PUBLISH:
            answered(1)
        else:
            assert script is CALLS
            number, _, _, _, _, _, flat = msgspec.msgpack.decode(args[0])
            self.numbers.append(number)
            if flat:
                self.sent.append((list(calls_in(flat)), answered))
            else:
                answered(reply([]))

    def drop(self, why):
        while self.sent:
            self.sent.popleft()[1](why)

    def answer(self):
        """Let the batch that was sent first be answered; return what was in it."""
        calls, answered = self.sent.popleft()
        answered(reply(calls))
        return calls

    def lose(self, **how):
        """Let the batch that was sent first get no answer; return what was in it."""
        calls, answered = self.sent.popleft()
        answered(LinkLost("lost", **how))
        return calls


def calls_in(flat):
    """Yield the calls of a batch, as kind and amounts."""
    at = 0
    while at < len(flat):
        kind, n = Kind(flat[at]), flat[at + 1]
        at += 2 + n
        amounts = () if kind is Kind.PEEK else tuple(flat[at : at + n])
        at += len(amounts)
        yield kind, amounts


def reply(calls):
    """Return what the script answers to calls that all pass."""
    told = [1, 10**15, 0, 0]
    for kind, _ in calls:
        told += {Kind.RESERVE: [1, 5, 10**15], Kind.SETTLE: [0], Kind.PEEK: [5, 10**15]}[kind]
    return msgspec.msgpack.encode(told)


class Desk:
    """A lane over a link that is held, and a plan of one bucket."""

    def __init__(self):
        self.link = Held()
        self.realm = Realm("tests")
        self.table = BucketTable(4)
        self.lane = Lane(self.link, self.realm, Closed(), Watch("closed"), S)

    def handle(self) -> RedisHandle:
        return self.realm.prepare(self.table, [Budget(named("user:alice"), grant(100))], None)

    def reserve(self, cost=1):
        return self.lane.ask(Kind.RESERVE, self.handle(), (cost,))

    def settle(self, delta=1):
        return self.lane.ask(Kind.SETTLE, self.handle(), (delta,))


async def turns(count=5):
    """Let the event loop run what is ready, a few times."""
    for _ in range(count):
        await asyncio.sleep(0)


def on_a_desk(test):
    """Run a test with a desk whose lane is up, and close the lane."""

    def run():
        async def main():
            desk = Desk()
            await desk.lane.ready()
            try:
                await test(desk)
            finally:
                desk.link.drop(LinkLost("over"))
                await desk.lane.close()

        asyncio.run(main(), debug=False)

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@on_a_desk
async def test_lone_call_leaves_at_once(desk):
    """Nothing waits for company: it is sent before whoever asks has even begun to wait."""
    desk.reserve()

    assert len(desk.link.sent) == 1
    desk.link.answer()


@on_a_desk
async def test_calls_that_come_meanwhile_travel_together_in_order(desk):
    """One batch is under way at a time; what queues up goes with the next one."""
    first = desk.reserve(1)
    others = [desk.reserve(2), desk.settle(3), desk.reserve(4)]

    assert desk.link.answer() == [(Kind.RESERVE, (1,))]
    assert len(desk.link.sent) == 1
    assert desk.link.answer() == [(Kind.RESERVE, (2,)), (Kind.SETTLE, (3,)), (Kind.RESERVE, (4,))]

    assert (await first).allowed
    assert [type(await other).__name__ for other in others] == ["Outcome", "int", "Outcome"]


@on_a_desk
async def test_batch_holds_no_more_than_its_limit(desk):
    """Redis is not held up for longer than 64 calls take."""
    asked = [desk.reserve() for _ in range(2 * MAX_CALLS)]

    sizes = []
    while desk.link.sent:
        sizes.append(len(desk.link.answer()))

    assert sizes == [1, MAX_CALLS, MAX_CALLS - 1]
    assert all([(await each).allowed for each in asked])


@on_a_desk
async def test_call_given_up_before_it_is_sent_is_not_sent(desk):
    """Nobody pays for it, and the others go on."""
    desk.reserve(1)
    given_up, other = desk.reserve(2), desk.reserve(3)
    given_up.cancel()

    desk.link.answer()

    assert desk.link.answer() == [(Kind.RESERVE, (3,))]
    assert (await other).allowed


@on_a_desk
async def test_call_given_up_under_way_is_given_back(desk):
    """What it took is refunded with the next batch; its neighbours keep theirs."""
    desk.reserve(1)
    given_up, other = desk.reserve(20), desk.reserve(3)
    desk.link.answer()
    given_up.cancel()
    desk.link.answer()

    assert (await other).allowed
    assert desk.link.answer() == [(Kind.SETTLE, (-20,))]
    assert not desk.link.sent


@on_a_desk
async def test_settlement_given_up_is_carried_out_all_the_same(desk):
    """Whether anybody waits for it or not."""
    desk.reserve(1)
    desk.settle(2).cancel()

    desk.link.answer()

    assert desk.link.answer() == [(Kind.SETTLE, (2,))]


@on_a_desk
async def test_of_a_lost_batch_only_settlements_are_sent_again(desk):
    """Under its old number. What it reserved may have been taken: the policy decides, and nobody asks twice."""
    desk.reserve(1)
    reserved, settled = desk.reserve(5), desk.settle(7)
    desk.link.answer()
    number = desk.link.numbers[-1]

    assert desk.link.lose(at_once=True) == [(Kind.RESERVE, (5,)), (Kind.SETTLE, (7,))]
    await turns()

    with pytest.raises(BackendDown):
        await reserved
    assert await settled == 0
    assert desk.link.numbers[-1] == number
    assert desk.link.answer() == [(Kind.SETTLE, (7,))]


@on_a_desk
async def test_batch_that_redis_did_not_do_is_sent_again(desk):
    """Where it is certain that nothing was done, nobody is turned away."""
    reserved, settled = desk.reserve(5), desk.settle(7)

    assert desk.link.lose(undone=True, at_once=True) == [(Kind.RESERVE, (5,))]
    await turns()

    assert desk.link.answer() == [(Kind.RESERVE, (5,)), (Kind.SETTLE, (7,))]
    assert (await reserved).allowed
    assert await settled == 0


@on_a_desk
async def test_call_whose_plan_is_stale_is_not_sent(desk):
    """Its budgets have changed since: it is to be planned anew."""
    desk.reserve(1)
    stale = desk.reserve(2)
    desk.realm.mirror = desk.realm.mirror.changed("1:def", [])

    desk.link.answer()

    assert not desk.link.sent
    with pytest.raises(StaleHandle):
        await stale


@on_a_desk
async def test_answer_that_makes_no_sense_holds_nobody_up(desk):
    """It is a fault, and a fault is an outage like any other."""
    reserved = desk.reserve(1)
    _, answered = desk.link.sent.popleft()

    answered(b"\xc1")
    await turns()

    with pytest.raises(BackendDown):
        await reserved


@on_a_desk
async def test_calls_at_one_time_of_their_own_do_not_mix(desk):
    """A time that is given holds for a whole batch, so that calls of two times are two batches."""
    handle = desk.handle()
    desk.reserve(1)
    for now_us in (10, 10, 20):
        desk.lane.ask(Kind.RESERVE, handle, (2,), now_us)

    desk.link.answer()

    assert len(desk.link.answer()) == 2
    assert len(desk.link.answer()) == 1


@on_a_desk
async def test_batch_that_cannot_be_written_holds_nobody_up(desk):
    """Who asked for it is told, and the lane goes on."""
    impossible = desk.reserve(2**64)

    with pytest.raises(OverflowError):
        await impossible
    possible = desk.reserve(1)
    desk.link.answer()
    assert (await possible).allowed


@on_a_desk
async def test_lane_that_nobody_asks_looks_at_redis_at_every_beat(desk):
    """But not at one since which a call has travelled: that was a look."""
    looks = desk.link.looks

    for expected in (1, 2, 3):
        desk.lane._beat()
        await turns()
        assert desk.link.looks == looks + expected

    desk.reserve()
    desk.link.answer()
    desk.lane._beat()
    await turns()
    assert desk.link.looks == looks + 3
