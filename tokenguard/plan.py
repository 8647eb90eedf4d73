"""From who calls which model to the buckets that the call must pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from tokenguard._limit_fields import by_meter
from tokenguard.backends import Backend, Handle
from tokenguard.model import BucketName, Budget, Identity, Meter, Scale, Scope

MAX_PLANS = 8192
"""How many plans are remembered; the least used is forgotten first."""


class Plan:
    """The buckets that one call must pass, made ready by the backend.

    Attributes:
        budgets: What limits the call, in the order of the hierarchy.
        handle: The backend's.
        groups: Their numbers, those of one meter together, for the fields that tell of them.
    """

    def __init__(self, budgets: Sequence[Budget], handle: Handle) -> None:
        self.budgets = tuple(budgets)
        self.handle = handle
        self.groups = by_meter([budget.name.meter for budget in self.budgets])
        self._counts_tokens = tuple([budget.name.meter is Meter.TOKENS for budget in self.budgets])
        self._small = min(
            (_half(budget.scale) for budget, tokens in zip(budgets, self._counts_tokens, strict=True) if tokens),
            default=0,
        )

    def costs(self, prompt: int, total: int) -> tuple[int, ...]:
        """Return what a call asks of each bucket: the estimate, capped, or one request.

        A bucket is never asked for more than the larger of the prompt and half of what it holds, so that no
        call needs a brim-full bucket; what is used beyond becomes debt when the call is settled. Only where
        half the prompt's estimate exceeds the capacity (estimates err by up to 1.6 times) is the prompt asked
        for as it is, which can never pass.

        Args:
            prompt: Tokens expected for the prompt.
            total: Tokens expected for the prompt and the answers.
        """
        if total <= self._small:  # PERF: the common case; row "Limiter" of test_bench_bucket
            return tuple([total if tokens else 1 for tokens in self._counts_tokens])
        return tuple(
            [
                _token_cost(budget.scale, prompt, total) if tokens else 1
                for budget, tokens in zip(self.budgets, self._counts_tokens, strict=True)
            ]
        )

    def deltas(self, costs: tuple[int, ...], tokens: int) -> tuple[int, ...]:
        """Return what each bucket is still owed once a call took ``tokens``; requests stay counted."""
        counted = self._counts_tokens
        return tuple([tokens - costs[i] if counted[i] else 0 for i in range(len(counted))])


def _half(scale: Scale) -> int:
    return (scale.capacity + 1) // 2


def _token_cost(scale: Scale, prompt: int, total: int) -> int:
    if prompt > 2 * scale.capacity:
        return prompt
    return min(total, max(prompt, _half(scale)), scale.capacity)


class Plans:
    """Resolves plans and remembers them until a budget changes.

    Args:
        backend: Where the budgets live.
        defaults: For each kind of scope the tokens, over all models, that an id without a budget of its own
            gets. A kind without a default is unlimited.
    """

    def __init__(self, backend: Backend, defaults: Mapping[str, Scale]) -> None:
        self._backend = backend
        self._defaults = dict(defaults)
        self.resolve = lru_cache(MAX_PLANS)(self._resolve)
        self.forget = self.resolve.cache_clear

    def default(self, name: BucketName) -> Budget | None:
        """Return what holds for a scope without a budget of its own."""
        if name.meter is not Meter.TOKENS or name.model is not None or name.scope.kind not in self._defaults:
            return None
        return Budget(name, self._defaults[name.scope.kind])

    def _resolve(self, identity: Identity, model: str) -> Plan:
        epoch = self._backend.epoch  # before the budgets: if one changes now, the handle is stale
        budgets = [budget for scope in identity.scopes() for budget in self._on(scope, model)]
        return Plan(budgets, self._backend.prepare(budgets, epoch))

    def _on(self, scope: Scope, model: str) -> list[Budget]:
        """Return what limits calls of a model on one scope: tokens first, all models first."""
        default = self.default(BucketName(scope))
        explicit = self._backend.on(scope)
        if not explicit:  # PERF: most users have no budget of their own
            return [default] if default else []
        binding = {
            budget.name: budget for budget in explicit if budget.name.model is None or budget.name.model == model
        }
        if default:
            binding.setdefault(default.name, default)
        return sorted(
            binding.values(), key=lambda budget: (budget.name.meter is not Meter.TOKENS, budget.name.model or "")
        )
