"""The error tree: everything TokenGuard raises on purpose is a ``TokenGuardError``.

A refusal is not here: it is a value (``limiter.Refusal``, ``model.Decision``), not an error.
"""


class TokenGuardError(Exception):
    """The root of everything that TokenGuard raises on purpose."""


class InvalidValue(TokenGuardError, ValueError):
    """A value from outside cannot be used.

    Attributes:
        field: What it was given as, in the words of whoever gave it: ``capacity``, ``x-user-id``.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class InvalidSetting(InvalidValue):
    """A setting of the environment cannot be used; the message names it, its value and what is allowed."""


class InvalidRequest(InvalidValue):
    """A caller's request cannot be read."""


class BodyTooLarge(InvalidRequest):
    """A request's body is larger than the configured limit."""


class BodyTimeout(InvalidRequest):
    """A caller took longer than the configured limit to send the next piece of a body."""


class BudgetNotFound(TokenGuardError, LookupError):
    """There is no explicit budget under the given name."""


class StaleHandle(TokenGuardError):
    """A budget changed since the handle was prepared: resolve the plan again and prepare anew."""


class TableFull(TokenGuardError):
    """The table has no room for a new bucket: every one in it is in use and not full."""


class TableBusy(TokenGuardError):
    """The table's lock was not free within the time allowed for a wait."""


class BackendDown(TokenGuardError):
    """The place where buckets are shared cannot be reached, and nothing else may decide in its stead.

    Attributes:
        told: What a caller may know of it: not where that place is.
    """

    def __init__(self, told: str, trouble: str) -> None:
        super().__init__(f"{told}: {trouble}")
        self.told = told


class StateUnwritable(TokenGuardError):
    """The state could not be written to the disk; what was to be changed is not."""


class AlreadySettled(TokenGuardError):
    """The reservation has been settled or refunded before; nothing was changed."""


class UpstreamError(TokenGuardError):
    """The provider could not be reached or did not answer as HTTP asks.

    Attributes:
        sent: False only if it is certain that no byte of the request reached the provider.
    """

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class UpstreamBusy(UpstreamError):
    """All connections to the provider are in use, and none became free in time; nothing was sent."""


class UpstreamTimeout(UpstreamError):
    """The provider took longer than the configured limit."""


class ProviderError(TokenGuardError):
    """The provider did not tell its limits; the message says what it said instead. Nothing was changed."""
