"""TokenGuard keeps every team, role and user of a shared LLM account within its token budget.

``Limiter`` guards calls in a process of your own (docs/library.md), ``tokenguard.middleware`` guards an app of
yours (docs/middleware.md), and ``tokenguard serve`` is a proxy (README.md).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from tokenguard._version import __version__

if TYPE_CHECKING:
    from tokenguard.budgets import BudgetState
    from tokenguard.errors import (
        AlreadySettled,
        BackendDown,
        BudgetNotFound,
        InvalidSetting,
        InvalidValue,
        StateUnwritable,
        TableBusy,
        TableFull,
        TokenGuardError,
    )
    from tokenguard.library import Limiter
    from tokenguard.library.call import BudgetExceeded, Call, Unsettled
    from tokenguard.model import BucketState, Decision, Identity

__all__ = [
    "AlreadySettled",
    "BackendDown",
    "BucketState",
    "BudgetExceeded",
    "BudgetNotFound",
    "BudgetState",
    "Call",
    "Decision",
    "Identity",
    "InvalidSetting",
    "InvalidValue",
    "Limiter",
    "StateUnwritable",
    "TableBusy",
    "TableFull",
    "TokenGuardError",
    "Unsettled",
    "__version__",
]

_HOMES = {
    "AlreadySettled": "tokenguard.errors",
    "BackendDown": "tokenguard.errors",
    "BucketState": "tokenguard.model",
    "BudgetExceeded": "tokenguard.library.call",
    "BudgetNotFound": "tokenguard.errors",
    "BudgetState": "tokenguard.budgets",
    "Call": "tokenguard.library.call",
    "Decision": "tokenguard.model",
    "Identity": "tokenguard.model",
    "InvalidSetting": "tokenguard.errors",
    "InvalidValue": "tokenguard.errors",
    "Limiter": "tokenguard.library",
    "StateUnwritable": "tokenguard.errors",
    "TableBusy": "tokenguard.errors",
    "TableFull": "tokenguard.errors",
    "TokenGuardError": "tokenguard.errors",
    "Unsettled": "tokenguard.library.call",
}
"""Where what is exported is; it is loaded when it is asked for, for whoever needs one part should not load all."""


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'tokenguard' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
