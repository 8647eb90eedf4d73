"""Reserve, settle, refund, peek: what TokenGuard does, without HTTP and without knowing where buckets live."""

from __future__ import annotations

import asyncio

from tokenguard import _limit_fields
from tokenguard._bucket import Outcome
from tokenguard.backends import Backend, Handle
from tokenguard.drift import Charge
from tokenguard.errors import AlreadySettled, StaleHandle
from tokenguard.model import BucketName, BucketState, Decision, Headers, Identity
from tokenguard.plan import Plan, Plans

_TRIES = 8
"""How often a plan is resolved anew because a budget changed meanwhile, before the caller hears of it."""


class Reservation:
    """What a call took from every bucket of its plan. It is settled, refunded or kept: once.

    Attributes:
        plan: The buckets.
        costs: What was taken from each.
        unsent: Whether the provider cannot have counted the call.
        is_open: Whether it is still to be settled, refunded or kept.
    """

    def __init__(self, plan: Plan, costs: tuple[int, ...], outcome: Outcome) -> None:
        self.plan = plan
        self.costs = costs
        self._outcome = outcome
        self.is_open = True
        self.unsent = False
        self._heard = False
        self._tokens: Charge | None = None
        self._requests: Charge | None = None
        if plan.tokens_room is not None:
            self._tokens = plan.tokens_room.charge(outcome.level(plan.tokens_at), costs[plan.tokens_at])
        if plan.requests_room is not None:
            self._requests = plan.requests_room.charge(outcome.level(plan.requests_at), costs[plan.requests_at])

    def expect(self, least: int) -> None:
        """Take in for how many tokens the provider counts the call at least."""
        room, charge = self.plan.tokens_room, self._tokens
        if room is not None and charge is not None:
            room.drift.expect(charge, least)

    @property
    def handle(self) -> Handle:
        """How the backend knows what was taken."""
        return self._outcome.handle

    @property
    def decision(self) -> Decision:
        """The decision that allowed it: every bucket as the reserve left it."""
        return _decision(self.plan, self._outcome)

    def limit_headers(self) -> Headers:
        """Return the ``x-ratelimit-*`` fields: of each meter's tightest bucket, as the reserve left it."""
        return _limit_fields.limit_headers(self.plan.groups, self._outcome)

    def limit_lines(self) -> bytes:
        """Return the same as lines, each with its CRLF."""
        return _limit_fields.limit_lines(self.plan.groups, self._outcome)

    def lowering(self, tokens: int, requests: int, in_windows: bool = False) -> tuple[int, ...] | None:
        """Take in what the provider told of its own limits; return by how much each bucket has to be lowered.

        Args:
            tokens: What remains, of the moment when the provider counted this call; -1 if that is not known.
            requests: Likewise.
            in_windows: Whether the provider seems to count in windows.

        Returns:
            The deltas for ``Limiter.lower``, or None if there is nothing to lower.
        """
        plan = self.plan
        fewer_tokens = fewer_requests = 0
        if type(self._outcome.handle) is not type(plan.handle):
            return None  # a node decided on its own: its levels are not those of the bucket
        room, charge = plan.tokens_room, self._tokens
        if tokens >= 0 and room is not None and charge is not None:
            self._heard = True
            fewer_tokens = room.told(tokens, charge, in_windows)
        room, charge = plan.requests_room, self._requests
        if requests >= 0 and room is not None and charge is not None:
            fewer_requests = room.told(requests, charge, in_windows)
        if fewer_tokens == 0 and fewer_requests == 0:
            return None
        deltas = [0] * len(self.costs)
        if fewer_tokens:
            deltas[plan.tokens_at] = fewer_tokens
        if fewer_requests:
            deltas[plan.requests_at] = fewer_requests
        return tuple(deltas)

    def close(self) -> None:
        """Mark it as dealt with.

        Raises:
            AlreadySettled: It has been before.
        """
        if not self.is_open:
            raise AlreadySettled("the call has been settled, refunded or kept before; nothing was changed")
        self.is_open = False  # compiled, nothing can come in between: of two threads one gets through

    def close_at(self, tokens: int) -> tuple[Handle, tuple[int, ...]]:
        """Mark it as dealt with; return how to settle it at what the call took: the handle and the deltas.

        Raises:
            AlreadySettled: It has been before.
            ValueError: ``tokens`` is negative.
        """
        if tokens < 0:
            raise ValueError(f"tokens must be at least 0, got {tokens}")
        self.close()
        return self._outcome.handle, self.plan.deltas(self.costs, tokens, self.unsent, self._heard)

    def reopen(self) -> None:
        """Take back ``close``, for nothing came of it."""
        self.is_open = True


class Refusal:
    """That a call was refused, every bucket being as before.

    Attributes:
        plan: The buckets.
    """

    def __init__(self, plan: Plan, outcome: Outcome) -> None:
        self.plan = plan
        self.outcome = outcome

    @property
    def binding(self) -> BucketName:
        """The bucket with the longest wait."""
        return self.plan.budgets[self.outcome.binding].name

    @property
    def decision(self) -> Decision:
        """The decision: every bucket as it was found."""
        return _decision(self.plan, self.outcome)


class Limiter:
    """The use cases.

    Args:
        backend: Where the buckets live.
        plans: What a call must pass.

    Attributes:
        waits: Whether the backend waits for somebody else: then an event loop must use what ends in ``_soon``.
    """

    def __init__(self, backend: Backend, plans: Plans) -> None:
        self.waits = backend.waits
        self._backend = backend
        self._plans = plans

    def reserve(
        self,
        identity: Identity,
        model: str,
        prompt: int,
        total: int,
        most: int | None = None,
        now_us: int | None = None,
    ) -> Reservation | Refusal:
        """Take a call's estimate from every bucket on its path, or from none.

        Args:
            identity: Who calls.
            model: Which model.
            prompt: Tokens expected for the prompt.
            total: Tokens expected for the prompt and the answers.
            most: Tokens that the provider may count against its own limits; None for ``total``.
            now_us: The time; None is now.

        Returns:
            The reservation, or the refusal.

        Raises:
            TableFull: There is no room for a new bucket; nothing was charged.
            TableBusy: The table's lock was not to be had; nothing was charged.
            StaleHandle: Budgets changed faster than the plan could be resolved; nothing was charged.
            BackendDown: The buckets cannot be reached.
        """
        for tries_left in reversed(range(_TRIES)):
            plan = self._plans.resolve(identity, model)
            costs = plan.costs(prompt, total, most)
            try:
                outcome = self._backend.reserve(plan.handle, costs, now_us)
            except StaleHandle:
                self._plans.forget()
                if not tries_left:
                    raise
            else:
                break
        return Reservation(plan, costs, outcome) if outcome.allowed else Refusal(plan, outcome)

    async def reserve_soon(
        self,
        identity: Identity,
        model: str,
        prompt: int,
        total: int,
        most: int | None = None,
        now_us: int | None = None,
    ) -> Reservation | Refusal:
        """Do what ``reserve`` does, without holding up an event loop; if it is cancelled, nothing is taken."""
        # PERF: the loop stands here once more, for a generator that serves both takes a quarter of a reserve.
        for tries_left in reversed(range(_TRIES)):
            plan = self._plans.resolve(identity, model)
            costs = plan.costs(prompt, total, most)
            try:
                outcome = await self._backend.reserve_soon(plan.handle, costs, now_us)
            except StaleHandle:
                self._plans.forget()
                if not tries_left:
                    raise
            else:
                break
        return Reservation(plan, costs, outcome) if outcome.allowed else Refusal(plan, outcome)

    def settle(self, reservation: Reservation, tokens: int, now_us: int | None = None) -> int:
        """Replace what was reserved by what the call took.

        Args:
            reservation: The reservation; it is closed.
            tokens: What the call took, at least 0.
            now_us: The time; None is now.

        Returns:
            How many tokens fell below the floor of a bucket's debt and are forgiven.

        Raises:
            AlreadySettled: It has been settled or refunded before; nothing was changed.
            TableBusy: The table's lock was not to be had; nothing was changed, and it can be tried again.
            ValueError: ``tokens`` is negative, or more than can be counted; nothing was changed.
        """
        handle, deltas = reservation.close_at(tokens)
        try:
            return self._backend.settle(handle, deltas, now_us)
        except Exception:
            reservation.reopen()
            raise

    def settle_soon(self, reservation: Reservation, tokens: int, now_us: int | None = None) -> asyncio.Future[int]:
        """Do what ``settle`` does, without holding up an event loop, whether anybody waits for it or not."""
        handle, deltas = reservation.close_at(tokens)
        try:
            return self._backend.settle_soon(handle, deltas, now_us)
        except Exception:
            reservation.reopen()
            raise

    def lower(self, reservation: Reservation, deltas: tuple[int, ...], now_us: int | None = None) -> None:
        """Charge the buckets that a call passed for what was spent beside it.

        Args:
            reservation: The call's; it stays open.
            deltas: What ``Reservation.lowering`` returned.
            now_us: The time; None is now.

        Raises:
            TableBusy: The table's lock was not to be had; nothing was changed.
        """
        self._backend.settle(reservation.handle, deltas, now_us)

    def lower_soon(self, reservation: Reservation, deltas: tuple[int, ...]) -> None:
        """Do so without holding up an event loop; nobody waits for it."""
        self._backend.settle_soon(reservation.handle, deltas)

    def refund(self, reservation: Reservation, now_us: int | None = None) -> None:
        """Give all tokens back, for the call was never made; the request stays counted.

        Raises:
            AlreadySettled: It has been settled or refunded before; nothing was changed.
        """
        reservation.unsent = True
        self.settle(reservation, 0, now_us)

    def peek(self, identity: Identity, model: str, now_us: int | None = None) -> tuple[BucketState, ...]:
        """Return every bucket on a call's path as it is now, and change nothing."""
        plan = self.plan(identity, model)
        return _decision(plan, self._backend.peek(plan.handle, now_us)).buckets

    def look(self, identity: Identity, model: str, prompt: int, total: int, now_us: int | None = None) -> Decision:
        """Return what ``reserve`` would come to, and take nothing."""
        plan = self.plan(identity, model)
        seen = self._backend.peek(plan.handle, now_us)
        return _decision(plan, seen.asked(plan.costs(prompt, total)))

    def plan(self, identity: Identity, model: str) -> Plan:
        """Return the plan of a call by the budgets as they are now."""
        plan = self._plans.resolve(identity, model)
        if plan.handle.epoch != self._backend.epoch:
            self._plans.forget()
            plan = self._plans.resolve(identity, model)
        return plan


def _state(plan: Plan, outcome: Outcome, i: int) -> BucketState:
    """Return one bucket of a plan as an outcome tells it."""
    return tuple.__new__(
        BucketState,
        (
            plan.budgets[i].name,
            outcome.limit(i),
            outcome.level(i),
            outcome.cost(i),
            outcome.wait_us(i),
            outcome.full_in_us(i),
        ),
    )


def _decision(plan: Plan, outcome: Outcome) -> Decision:
    buckets = tuple([_state(plan, outcome, i) for i in range(len(plan.budgets))])
    binding = None if outcome.allowed else buckets[outcome.binding]
    return Decision(outcome.allowed, outcome.retry_after_us, binding, buckets)
