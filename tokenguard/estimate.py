"""How many tokens a call will take, before it is made: learned from what like calls took.

The prompt's size is known in bytes; how many bytes make a token depends on the language and the kind of text.
How long the answer will be is not known at all; what like calls took in 95 of 100 cases is reserved. Both are
learned per model and user, and per model for users not seen yet. What is learned serves estimates alone:
every call is settled to its real usage.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeVar

K = TypeVar("K")

COLD_OUTPUT_TOKENS = 256
COLD_BYTES_PER_TOKEN = 4.0
MAX_TRAFFICS = 4096
"""How many models, and how many users of models, are remembered; who has not called the longest is forgotten."""

_FEWEST_BYTES, _MOST_BYTES = 1.0, 100.0
_QUANTILE = 0.95
_PRIOR_TOKENS = 500.0
"""How much weight the bytes per token that a kind of traffic starts with has, in tokens."""
_DECAY = 0.98
_STEP = 0.1
"""How far one answer moves the learned output at most, in powers of two, once it has settled."""
_WARM_OUTPUTS = 20
_PRIOR_OUTPUTS = 2
"""How many answers' worth the cold prior is."""
_PRIOR_DEVIATION = 1.2
"""How far answers are expected to deviate, in powers of two."""
_DEVIATIONS = 1.645
"""Of a normal distribution 95 of 100 lie below so many deviations above the mean."""


class Estimate(NamedTuple):
    """How many tokens a call is expected to take.

    Attributes:
        prompt: For the prompt.
        total: For the prompt and all answers.
        most: What the provider may count against its own limits when the call comes in.
    """

    prompt: int
    total: int
    most: int


class Traffic:
    """What calls of one kind were seen to take.

    Attributes:
        output_tokens: What one answer stays within in about 95 of 100 cases.
    """

    def __init__(self, like: Traffic | None = None) -> None:
        ratio = like.bytes_per_token() if like else COLD_BYTES_PER_TOKEN
        self._bytes = ratio * _PRIOR_TOKENS
        self._tokens = _PRIOR_TOKENS
        self._log_output = math.log2(like.output_tokens if like else COLD_OUTPUT_TOKENS)
        self.output_tokens: int = _whole(2**self._log_output)
        self._log_prior = self._log_output - _DEVIATIONS * _PRIOR_DEVIATION
        self._seen = 0
        self._log_mean = 0.0
        self._log_squares = 0.0

    def bytes_per_token(self) -> float:
        """Return how many bytes of text make one token, within what text can be.

        Usage tells what the provider counted, which may be a prompt of its own on top, or nothing at all.
        """
        return min(max(self._bytes / self._tokens, _FEWEST_BYTES), _MOST_BYTES)

    def learn_prompt(self, text_bytes: int, tokens: int) -> None:
        """Take in how many tokens a prompt's text came to."""
        if text_bytes > 0 and tokens > 0:
            self._bytes = self._bytes * _DECAY + text_bytes
            self._tokens = self._tokens * _DECAY + tokens

    def learn_output(self, tokens: int) -> None:
        """Take in how long an answer was.

        The first answers set the quantile by their mean and deviation, as if lengths were distributed
        log-normally, so that a dozen calls leave the cold start behind; from then on it is found step by step,
        whatever the distribution (stochastic approximation).
        """
        log = math.log2(max(1, tokens))
        self._seen += 1
        if self._seen <= _WARM_OUTPUTS:
            distance = log - self._log_mean
            self._log_mean += distance / self._seen
            self._log_squares += distance * (log - self._log_mean)
            self._log_output = max(0.0, self._warm_output())
        else:
            over = log > self._log_output
            self._log_output = max(0.0, self._log_output + _STEP * (_QUANTILE - (not over)))
        self.output_tokens = _whole(2**self._log_output)

    def _warm_output(self) -> float:
        """Return the quantile of the answers so far and, until there are enough, of the prior's."""
        prior = 0 if self._seen == _WARM_OUTPUTS else _PRIOR_OUTPUTS
        count = self._seen + prior
        gap = self._log_mean - self._log_prior
        mean = self._log_mean - gap * prior / count
        squares = self._log_squares + prior * (_PRIOR_DEVIATION * _PRIOR_DEVIATION)
        squares += gap * gap * self._seen * prior / count
        return mean + _DEVIATIONS * math.sqrt(squares / count)


class Estimator:
    """Estimates calls, and learns from their usage."""

    def __init__(self) -> None:
        self._models: dict[str, Traffic] = {}
        self._users: dict[tuple[str, str], Traffic] = {}

    def estimate(
        self,
        model: str,
        user: str,
        text_bytes: int,
        extra_tokens: int,
        choices: int,
        output_cap: int | None,
    ) -> Estimate:
        """Return what a call is expected to take.

        Args:
            model: The model's name.
            user: The caller's id.
            text_bytes: The prompt's text.
            extra_tokens: Tokens of the prompt that do not come from its text.
            choices: How many answers are asked for.
            output_cap: The largest cap on each, in tokens.
        """
        traffic = self._users.get((model, user)) or self._models.get(model) or _COLD
        output = traffic.output_tokens
        if output_cap is not None and output_cap < output:
            output = output_cap
        prompt = _whole(text_bytes / traffic.bytes_per_token()) + extra_tokens
        most = max(prompt, (text_bytes + 3) // 4 + extra_tokens)
        most += choices * output_cap if output_cap is not None else max(choices * output, 16)
        return tuple.__new__(
            Estimate, (prompt, prompt + choices * output, most)
        )  # PERF: half of what its own takes

    def learn(
        self, model: str, user: str, text_bytes: int, prompt_tokens: int, choices: int, output_tokens: int
    ) -> None:
        """Take in what a call really took.

        Args:
            model: The model's name.
            user: The caller's id.
            text_bytes: The prompt's text; 0 if its share of the prompt is not known.
            prompt_tokens: What the text came to.
            choices: How many answers there were.
            output_tokens: What all answers together came to.
        """
        # Compiled, nothing comes in between: no thread sees a dictionary that another has changed by half.
        whole = _remembered(self._models, model, None)
        own = _remembered(self._users, (model, user), whole)
        for traffic in (whole, own):
            traffic.learn_prompt(text_bytes, prompt_tokens)
            traffic.learn_output(output_tokens // choices)


def _whole(amount: float) -> int:
    """Return the next whole number."""
    return int(math.ceil(amount))  # noqa: RUF046 - compiled, ``math`` is C's, whose ceil is a float


def _remembered(traffics: dict[K, Traffic], key: K, like: Traffic | None) -> Traffic:
    traffic = traffics.pop(key, None) or Traffic(like)
    while len(traffics) >= MAX_TRAFFICS:
        traffics.pop(next(iter(traffics)), None)
    traffics[key] = traffic  # the last: a dict keeps the order
    return traffic


_COLD = Traffic()
