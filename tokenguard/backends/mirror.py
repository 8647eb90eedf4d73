"""The explicit budgets as one process knows them, and how they are written down."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec

from tokenguard.model import BucketName, Budget, Scale, Scope

Change = tuple[BucketName, Scale | None]
"""A budget that is set, or with None, removed."""

_SIZE_BYTES = 2


class _Record(msgspec.Struct, array_like=True):
    key: bytes
    scale: tuple[int, int, int, int, int] | None


@dataclass(frozen=True)
class Mirror:
    """The explicit budgets at one moment.

    Attributes:
        epoch: The backend's own mark of that moment.
        budgets: By scope.
    """

    epoch: Any
    budgets: Mapping[Scope, tuple[Budget, ...]]

    @cached_property
    def all(self) -> list[Budget]:
        """All budgets, in the order of their keys."""
        budgets = [budget for on_scope in self.budgets.values() for budget in on_scope]
        return sorted(budgets, key=lambda budget: budget.name.key)

    @cached_property
    def records(self) -> bytes:
        """All budgets, as ``read_records`` takes them."""
        return b"".join(record_of(budget.name, budget.scale) for budget in self.all)

    def changed(self, epoch: Any, changes: Iterable[Change]) -> Mirror:  # noqa: ANN401 - the backend's
        """Return what this comes to after some changes."""
        budgets = dict(self.budgets)
        for name, scale in changes:
            kept = tuple(budget for budget in budgets.pop(name.scope, ()) if budget.name != name)
            if scale is not None:
                kept = (*kept, Budget(name, scale))
            if kept:
                budgets[name.scope] = kept
        return Mirror(epoch, budgets)

    def find(self, name: BucketName) -> Budget | None:
        """Return the budget of a name, if there is one."""
        return next((budget for budget in self.budgets.get(name.scope, ()) if budget.name == name), None)


NOTHING = Mirror(None, {})


def record_of(name: BucketName, scale: Scale | None) -> bytes:
    """Return a change as bytes that say where they end."""
    record = msgspec.msgpack.encode(_Record(name.key, scale))
    return len(record).to_bytes(_SIZE_BYTES) + record


def read_records(records: bytes) -> Iterator[Change]:
    """Yield the changes that some records hold, one after the other.

    Raises:
        ValueError: They are no records.
    """
    at = 0
    while at < len(records):
        begin = at + _SIZE_BYTES
        end = begin + int.from_bytes(records[at:begin])
        try:
            record = msgspec.msgpack.decode(records[begin:end], type=_Record)
            yield BucketName.from_key(record.key), None if record.scale is None else Scale(*record.scale)
        except ValueError as error:  # msgspec's too
            raise ValueError(f"no budget begins at byte {at}: {error}") from None
        at = end
