"""From who calls which model to the buckets that the call must pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from tokenguard._limit_fields import by_meter
from tokenguard.backends import Backend, Handle
from tokenguard.headroom import Headroom
from tokenguard.model import BucketName, Budget, Identity, Meter, Scale, Scope, Source

MAX_PLANS = 8192
"""How many plans are remembered; the least used is forgotten first."""

GATE_COST = 1000
"""What a call costs of a gate, which counts in thousandths of a call, so that it opens to the millisecond."""

_ANY = 2**62
_KEPT = 32
"""Of the provider's bucket one part in so many is kept in hand, for calls that count for more than it seemed."""


class Plan:
    """The buckets that one call must pass, made ready by the backend.

    Attributes:
        budgets: What limits the call, in the order of the hierarchy.
        handle: The backend's.
        groups: Their numbers, those of one meter together, for the fields that tell of them.
        tokens_at: Which of them is the provider's own, of tokens, as header fields told it; -1 for none.
        requests_at: Likewise, of requests.
        tokens_room: What is known of the provider's own count of that, if there is one.
        requests_room: Likewise.
        mirrors: Whether there is any of the two.
        largest: What the provider may count a call for at most, so as not to refuse it for its size alone.
        told: What refusals tell of their names; None until one does.
    """

    def __init__(
        self,
        budgets: Sequence[Budget],
        handle: Handle,
        tokens_room: Headroom | None = None,
        requests_room: Headroom | None = None,
    ) -> None:
        self.budgets = tuple(budgets)
        self.handle = handle
        self.groups = by_meter([budget.name.meter for budget in self.budgets])
        self.told: tuple[object, ...] | None = None
        self.tokens_room = tokens_room
        self.requests_room = requests_room
        self.tokens_at = _place(self.budgets, Meter.TOKENS)
        self.requests_at = _place(self.budgets, Meter.REQUESTS)
        self._capacities = [budget.scale.capacity for budget in self.budgets]
        self._limits = [budget.scale.capacity if _is_brisk(budget.scale) else 0 for budget in self.budgets]
        tokens = [budget.name.meter is Meter.TOKENS for budget in self.budgets]
        learned = [budget.name.source is not None for budget in self.budgets]
        self._ours = tuple([tokens[i] and not learned[i] for i in range(len(tokens))])
        self._theirs = tuple([tokens[i] and learned[i] for i in range(len(tokens))])
        self._fixed = tuple([GATE_COST if budget.name.meter is Meter.GATE else 1 for budget in self.budgets])
        self._plain = not any(learned)
        self.mirrors = tokens_room is not None or requests_room is not None
        for room, at in ((tokens_room, self.tokens_at), (requests_room, self.requests_at)):
            if room is not None:
                capacity, brisk = self._capacities[at], self._limits[at] > 0
                room.hold(capacity, capacity // _KEPT if brisk else 0, not brisk)
        theirs = [self._capacities[i] for i in range(len(tokens)) if self._theirs[i]]
        self.largest = min(theirs, default=_ANY)
        self._small = min([_half(self._capacities[i]) for i in range(len(tokens)) if tokens[i]], default=0)

    def limit_at(self, place: int) -> int:
        """Return the capacity of one of the buckets; 0 for none, at -1, and for what is still to be looked at."""
        return 0 if place < 0 else self._limits[place]

    def costs(self, prompt: int, total: int, most: int | None = None) -> tuple[int, ...]:
        """Return what a call asks of each bucket: an estimate, capped, or one request.

        A bucket is never asked for more than the larger of the prompt and half of what it holds, so that no
        call needs a brim-full bucket; what is used beyond becomes debt when the call is settled. Only where
        half the prompt's estimate exceeds the capacity (estimates err by up to 1.6 times) is the prompt asked
        for as it is, which can never pass.

        Of the provider's own buckets a call asks what the provider may count it for; of one that cannot hold so
        much, the larger of the prompt and the answers, which is what OpenAI counts. If it cannot hold that either,
        the provider will refuse the call itself, and for good: it is not kept waiting for that.

        Args:
            prompt: Tokens expected for the prompt.
            total: Tokens expected for the prompt and the answers.
            most: Tokens that the provider may count it for when it comes in; None for ``total``.
        """
        ours, theirs = self._ours, self._theirs
        if self._plain and total <= self._small:  # PERF: the common case; row "Limiter" of test_bench_bucket
            return tuple([total if tokens else 1 for tokens in ours])
        counted = total if most is None else most
        costs = []
        for i in range(len(ours)):
            capacity = self._capacities[i]
            if ours[i]:
                costs.append(_token_cost(capacity, prompt, total))
            elif theirs[i]:
                costs.append(_counted(capacity, prompt, counted))
            else:
                costs.append(self._fixed[i])
        return tuple(costs)

    def deltas(
        self, costs: tuple[int, ...], tokens: int, unsent: bool = False, heard: bool = True
    ) -> tuple[int, ...]:
        """Return what each bucket is still owed once a call took ``tokens``; requests stay counted.

        Of what the provider's own buckets were charged, as much is given back as the provider's count allows,
        where that is known; and all of it if the provider never got the call.

        Args:
            costs: What each was charged.
            tokens: What the call took.
            unsent: Whether the provider cannot have counted it.
            heard: Whether the provider's answer told what remains; else all go by what the call took.
        """
        ours, theirs = self._ours, self._theirs
        if self._plain:
            return tuple([tokens - costs[i] if ours[i] else 0 for i in range(len(ours))])
        given = -1
        room = self.tokens_room
        if room is not None:
            cost = costs[self.tokens_at]
            if unsent:
                room.gave(cost)
            elif heard:
                given = room.give(cost, room.kept)
            else:
                room.gave(cost - tokens)
        deltas = []
        for i in range(len(ours)):
            if theirs[i] and given >= 0:
                deltas.append(-min(given, costs[i]))
            else:
                deltas.append(tokens - costs[i] if ours[i] or theirs[i] else 0)
        return tuple(deltas)


def _is_brisk(scale: Scale) -> bool:
    """Return whether a bucket fills in less than an hour: who took a minute for a day would be far too strict."""
    return scale.rate * 3600 > scale.capacity


def _place(budgets: tuple[Budget, ...], meter: Meter) -> int:
    for i, budget in enumerate(budgets):
        if budget.name.source is Source.HEADERS and budget.name.meter is meter:
            return i
    return -1


def _half(capacity: int) -> int:
    return (capacity + 1) // 2


def _counted(capacity: int, prompt: int, most: int) -> int:
    if most <= capacity:
        return most
    least = max(prompt, most - prompt)
    return least if least <= capacity else min(prompt, _half(capacity))


def _token_cost(capacity: int, prompt: int, total: int) -> int:
    if prompt > 2 * capacity:
        return prompt
    return min(total, max(prompt, _half(capacity)), capacity)


class Plans:
    """Resolves plans and remembers them until a budget changes.

    Args:
        backend: Where the budgets live.
        defaults: For each kind of scope the tokens, over all models, that an id without a budget of its own
            gets. A kind without a default is unlimited.
        heeds_provider: Whether what was learned of the provider's own limits binds too; else nobody sees to it.
    """

    def __init__(self, backend: Backend, defaults: Mapping[str, Scale], heeds_provider: bool = True) -> None:
        self._backend = backend
        self._defaults = dict(defaults)
        self._heeds_provider = heeds_provider
        self._rooms: dict[BucketName, Headroom] = {}
        self.resolve = lru_cache(MAX_PLANS)(self._resolve)
        self.forget = self.resolve.cache_clear

    def default(self, name: BucketName) -> Budget | None:
        """Return what holds for a scope without a budget of its own."""
        if name != BucketName(name.scope) or name.scope.kind not in self._defaults:
            return None
        return Budget(name, self._defaults[name.scope.kind])

    def _resolve(self, identity: Identity, model: str) -> Plan:
        epoch = self._backend.epoch  # before the budgets: if one changes now, the handle is stale
        budgets = [budget for scope in identity.scopes() for budget in self._on(scope, model)]
        rooms = {
            budget.name.meter: self._room(budget.name)
            for budget in budgets
            if budget.name.source is Source.HEADERS
        }
        return Plan(
            budgets, self._backend.prepare(budgets, epoch), rooms.get(Meter.TOKENS), rooms.get(Meter.REQUESTS)
        )

    def rooms(self) -> list[tuple[BucketName, Headroom]]:
        """Return what is known of the provider's own counts."""
        return list(self._rooms.items())

    def _room(self, name: BucketName) -> Headroom:
        """Return what all plans with a bucket know of it: of as many as there are learned limits at most."""
        if (room := self._rooms.get(name)) is None:
            room = self._rooms.setdefault(name, Headroom(self._backend.table.shared(name.digest)))
        return room

    def _on(self, scope: Scope, model: str) -> list[Budget]:
        """Return what limits calls of a model on one scope: tokens first, all models first, ours first."""
        default = self.default(BucketName(scope))
        explicit = self._backend.on(scope)
        if not explicit:  # PERF: most users have no budget of their own
            return [default] if default else []
        binding = {
            budget.name: budget
            for budget in explicit
            if (budget.name.model is None or budget.name.model == model)
            and (self._heeds_provider or budget.name.source is None)
        }
        if default:
            binding.setdefault(default.name, default)
        return sorted(binding.values(), key=_order)


def _order(budget: Budget) -> tuple[bool, str, str]:
    name = budget.name
    return name.meter is not Meter.TOKENS, name.model or "", name.source or ""
