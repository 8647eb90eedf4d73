"""TokenGuard keeps every team, role and user of a shared LLM account within its token budget.

``Limiter`` guards calls in a process of your own (docs/library.md), ``tokenguard.middleware`` guards an app of
yours (docs/middleware.md), and ``tokenguard serve`` is a proxy (README.md).
"""

from tokenguard._version import __version__
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
