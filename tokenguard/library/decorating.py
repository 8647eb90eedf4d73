"""Guards every call of a function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from tokenguard.library.call import Call

P = ParamSpec("P")
R = TypeVar("R")


class Guarding:
    """A decorator.

    Args:
        reserve: ``Limiter.reserve``.
        given: Its arguments, or functions of the call's arguments that return them.
        wait: How long to wait, in seconds.
        used: Returns what a call took, given what the function returned.
    """

    def __init__(
        self,
        reserve: Callable[..., Call],
        given: Mapping[str, object],
        wait: float,
        used: Callable[[Any], int] | None,
    ) -> None:
        self._reserve = reserve
        self._given = given
        self._wait = wait
        self._used = used

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Return the function, guarded."""
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                f"{function!r} is a generator, which runs on after it was called: guard its body by "
                "`with limiter.reserve(...)`"
            )
        if inspect.iscoroutinefunction(function):

            @wraps(function)
            async def guarded_soon(*args: P.args, **kwargs: P.kwargs) -> Any:  # noqa: ANN401 - the function's
                async with self._call(args, kwargs) as call:
                    result = await function(*args, **kwargs)
                    self._settle(call, result)
                    return result

            return guarded_soon  # type: ignore[return-value]  # R is what awaiting it comes from

        @wraps(function)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            with self._call(args, kwargs) as call:
                result = function(*args, **kwargs)
                if inspect.iscoroutine(result):
                    result.close()  # before it does anything: the call is refunded
                    raise TypeError(f"{function!r} returns a coroutine: guard an `async def` that awaits it")
                self._settle(call, result)
                return result

        return guarded

    def _call(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Call:
        asked = {name: value(*args, **kwargs) if callable(value) else value for name, value in self._given.items()}
        return self._reserve(**asked, wait=self._wait)

    def _settle(self, call: Call, result: object) -> None:
        try:
            tokens = self._used(result) if self._used else _usage(result)
        except BaseException:
            call.keep()  # the call was made
            raise
        if tokens is None:
            call.keep()
        else:
            call.settle(tokens)


def _usage(result: object) -> int | None:
    """Return what the openai SDK's answers tell that they took, if it is such an answer."""
    tokens = getattr(getattr(result, "usage", None), "total_tokens", None)
    return tokens if type(tokens) is int else None
