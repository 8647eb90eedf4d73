"""Other engines with the surface of ``BucketTable``, for tests that run over any: a real Redis, and the oracle."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Any, NamedTuple

from tests.oracle import OracleOutcome, OracleTable, Plan, Stored
from tests.strategies import seen
from tests.timeline import terms_of
from tokenguard._bucket import BucketTable, Outcome
from tokenguard.backends.batch import STALE, Call, Kind, RedisHandle, Reply, Result, decode, encode, scale_text
from tokenguard.backends.realm import Realm
from tokenguard.backends.scripts import CALLS, CONFIGURE, PUBLISH, Script
from tokenguard.errors import StaleHandle
from tokenguard.model import BucketName, Budget, Scale, Scope


class RedisTable:
    """The buckets of one realm in a real Redis, with every time given, so that nothing expires.

    Args:
        client: Of a server, with replies as bytes. Many tables may share one server.
        calls: The script that evaluates batches.
        configure: The script that changes budgets.
    """

    def __init__(self, client: Any, calls: Script = CALLS, configure: Script = CONFIGURE) -> None:
        self._client = client
        self._calls = calls
        self._configure_script = configure
        self._realm = Realm(secrets.token_hex(8))
        self._record_key = self._realm.record_key("tests")
        self._plans = BucketTable(1)  # reads what Redis answers, and holds no bucket
        self._number = 0
        self._forgiven = self._clock_steps = 0
        self.expire_handles()

    def __enter__(self) -> RedisTable:
        return self

    def __exit__(self, *error: object) -> None:
        self.forget()

    def forget(self) -> None:
        """Remove every key of the realm."""
        self._client.delete(*self._client.keys(f"tg:{{{self._realm.name}}}:*"))

    # --- as BucketTable has it ----------------------------------------------------------------------------------

    @property
    def epoch(self) -> str:
        return (self._client.get(self._realm.epoch_key) or b"").decode()

    def prepare(self, buckets: Iterable[tuple[bytes, Scale]], epoch: str | None = None) -> RedisHandle:
        budgets = [Budget(name_of(key), scale) for key, scale in buckets]
        return self._realm.prepare(self._plans, budgets, self.epoch if epoch is None else epoch)

    def reserve(self, handle: RedisHandle, costs: tuple[int, ...], now_us: int) -> Outcome:
        (result,) = self.batch([reserve_of(handle, costs)], now_us)
        if result is STALE:
            raise StaleHandle("a budget changed since the plan was prepared")
        return result

    def settle(self, handle: RedisHandle, deltas: tuple[int, ...], now_us: int) -> int:
        (forgiven,) = self.batch([settle_of(handle, deltas)], now_us)
        return forgiven

    def peek(self, handle: RedisHandle, now_us: int) -> Outcome:
        (outcome,) = self.batch([peek_of(handle)], now_us)
        return outcome

    def configure(self, key: bytes, scale: Scale, level: int | None = None, now_us: int | None = None) -> None:
        assert now_us is not None
        text = scale_text(scale)
        self._change(key, text, text, "" if level is None else str(level), str(now_us))

    def remove(self, key: bytes) -> None:
        # NOTE: only an explicit budget can be removed, and this may be the bucket of a default.
        self._client.hsetnx(self._realm.budgets_keys[1], name_of(key).key, "1 0 0 1 1")
        self._change(key, "", "", "", "0")

    def expire_handles(self) -> None:
        keys = self._realm.budgets_keys
        assert self._run(PUBLISH, keys, (self.epoch, f"0:{secrets.token_hex(8)}")) == 1

    def state(self, key: bytes) -> Stored | None:
        numbers = self._numbers(key)
        return None if numbers is None else (*numbers[:3], *numbers[4:])

    def stats(self) -> dict[str, int]:
        """Return what the scripts counted; Redis is never full, and what may be dropped expires."""
        used = len(self._client.keys(self._realm.bucket_key(name_of(b"*"))))
        return {
            "used": used,
            "forgiven": self._forgiven,
            "clock_steps": self._clock_steps,
            "reclaimed": 0,
            "refused_full": 0,
        }

    # --- and what only Redis has --------------------------------------------------------------------------------

    def debt(self, key: bytes) -> int | None:
        """Return the floor of debt that a bucket is stored with."""
        numbers = self._numbers(key)
        return None if numbers is None else numbers[3]

    def batch(self, calls: Iterable[Call], now_us: int) -> list[Result]:
        """Evaluate calls in one script; their reserves must be of plans of one epoch."""
        return list(self.send(calls, now_us, self._number + 1).results)

    def send(self, calls: Iterable[Call], now_us: int, number: int, *, recorded: bool = False) -> Reply:
        """Send a batch under a number."""
        self._number = max(self._number, number)
        calls = list(calls)
        epochs = {call.handle.epoch for call in calls if call.kind is Kind.RESERVE}
        assert len(epochs) <= 1, "a batch is sent under one epoch"
        epoch = epochs.pop() if epochs else ""
        keys, payload = encode(calls, number, epoch, recorded=recorded, now_us=now_us)
        answer = self._run(self._calls, (self._realm.epoch_key, self._record_key, *keys), (payload,))
        reply = decode(calls, answer)
        self._forgiven += reply.forgiven
        self._clock_steps += reply.clock_steps
        return reply

    def _change(self, key: bytes, explicit: str, then: str, level: str, now_us: str) -> None:
        name = name_of(key)
        keys = (*self._realm.budgets_keys, self._realm.bucket_key(name))
        args = (name.key, explicit, then, level, secrets.token_hex(8), now_us)
        done, forgiven, clock_steps = self._run(self._configure_script, keys, args)
        assert done == 1
        self._forgiven += forgiven
        self._clock_steps += clock_steps

    def _numbers(self, key: bytes) -> list[int] | None:
        """Return what is stored: level, tick, capacity, debt, gain, unit, tick_us."""
        value = self._client.get(self._realm.bucket_key(name_of(key)))
        if value is None:
            return None
        numbers = [int(part) for part in value.split()]
        assert value == b"%d %d %d %d %d %d %d" % tuple(numbers), f"no plain whole numbers: {value}"
        return numbers

    def _run(self, script: Script, keys: Iterable[bytes], args: Iterable[Any]) -> Any:
        keys = list(keys)
        return self._client.eval(script.text, len(keys), *keys, *args)


def name_of(key: bytes) -> BucketName:
    """Return the name that a key of the tests stands for."""
    return BucketName(Scope("user", key.decode()))


def reserve_of(handle: RedisHandle, costs: tuple[int, ...]) -> Call:
    """Return a reserve as a batch has it."""
    return Call(Kind.RESERVE, handle.refs, costs, handle)


def settle_of(handle: RedisHandle, deltas: tuple[int, ...]) -> Call:
    """Return a settlement as a batch has it."""
    return Call(Kind.SETTLE, handle.refs, deltas, handle)


def peek_of(handle: RedisHandle) -> Call:
    """Return a look at buckets as a batch has it."""
    return Call(Kind.PEEK, handle.refs, (), handle)


class OracleHandle(NamedTuple):
    """A plan, and what the oracle's budgets were when it was made."""

    plan: Plan
    epoch: int


class OracleEngine:
    """The oracle, asked as an engine is."""

    def __init__(self) -> None:
        self.oracle = OracleTable()
        self.epoch = 0

    def prepare(self, buckets: Iterable[tuple[bytes, Scale]], epoch: int | None = None) -> OracleHandle:
        plan = tuple((key, terms_of(scale)) for key, scale in buckets)
        return OracleHandle(plan, self.epoch if epoch is None else epoch)

    def reserve(self, handle: OracleHandle, costs: tuple[int, ...], now_us: int) -> OracleOutcome:
        if handle.epoch != self.epoch:
            raise StaleHandle("a budget changed since the plan was prepared")
        return self.oracle.reserve(handle.plan, costs, now_us)

    def settle(self, handle: OracleHandle, deltas: tuple[int, ...], now_us: int) -> int:
        return self.oracle.settle(handle.plan, deltas, now_us)

    def peek(self, handle: OracleHandle, now_us: int) -> OracleOutcome:
        return self.oracle.peek(handle.plan, now_us)

    def configure(self, key: bytes, scale: Scale, level: int | None, now_us: int) -> None:
        self.epoch += 1
        self.oracle.configure(key, terms_of(scale), level, now_us)

    def remove(self, key: bytes) -> None:
        self.epoch += 1
        self.oracle.remove(key)

    def expire_handles(self) -> None:
        self.epoch += 1

    def state(self, key: bytes) -> Stored | None:
        return self.oracle.stored(key)

    def stats(self) -> dict[str, int]:
        counted = {"forgiven": self.oracle.forgiven, "clock_steps": self.oracle.clock_steps}
        return {**counted, "used": len(self.oracle.buckets)}


def found(outcome: Outcome | OracleOutcome) -> OracleOutcome:
    """Return what an outcome says, whichever engine it is of."""
    return outcome if isinstance(outcome, OracleOutcome) else seen(outcome)
