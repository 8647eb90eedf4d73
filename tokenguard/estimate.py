"""How many tokens a call will take, before it is made: learned from what like calls took.

What the prompt's text is expected to come to is told by the classes of its bytes (sizing.py); by what factor that
is off depends on the model, the language and the kind of text, and is learned. How long the answer will be is not
known at all; what like calls took in 95 of 100 cases is reserved.

Both are learned per model and user. A user not seen yet starts from what the model's calls of the same team took,
a team not seen yet from what all calls of the model took. What is learned serves estimates alone: every call is
settled to its real usage.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeVar

from tokenguard.sizing import TOKEN

K = TypeVar("K")

COLD_OUTPUT_TOKENS = 256
MAX_TRAFFICS = 4096
"""How many models are remembered, how many teams of models and how many users of models: whose last call is the
longest ago is forgotten first."""
LEAST_OUTPUT_TOKENS = 16
"""What a provider counts at least for answers without a cap."""
BYTES_PER_TOKEN = 4
"""What a provider takes for a token before it has counted."""

_TOKEN = float(TOKEN)
_LEAST_FACTOR, _MOST_FACTOR = 1 / 16, 4.0
_QUANTILE = 0.95
_PRIOR_TOKENS = 500.0
"""How much weight the factor that a kind of traffic starts with has, in tokens."""
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
        most: What the provider counts at most against its own limit of tokens per minute as the call comes in:
            the prompt, taken at four bytes a token if that is more, and all that the answers may take. OpenAI
            counts the larger of the two, Azure both. Without a cap the answers count as expected, but at least the
            16 tokens that OpenAI takes; Azure then counts the model's maximum, which is not known here.
    """

    prompt: int
    total: int
    most: int


def least_counted(text_bytes: int, choices: int, output_cap: int | None) -> int:
    """Return what a provider counts at least against its own limit as a call comes in: so does OpenAI.

    Args:
        text_bytes: The size of the prompt's text.
        choices: How many answers are asked for.
        output_cap: The largest cap on each, in tokens.
    """
    least = LEAST_OUTPUT_TOKENS + text_bytes // BYTES_PER_TOKEN
    return least if output_cap is None else max(least, choices * output_cap)


class Traffic:
    """What calls of one kind were seen to take.

    Attributes:
        output_tokens: What one answer stays within in about 95 of 100 cases.
    """

    def __init__(self, like: Traffic | None = None) -> None:
        self._expected = _PRIOR_TOKENS
        self._tokens = _PRIOR_TOKENS * (like.factor() if like else 1.0)
        self._log_output = math.log2(like.output_tokens if like else COLD_OUTPUT_TOKENS)
        self.output_tokens: int = _whole(2**self._log_output)
        self._log_prior = self._log_output - _DEVIATIONS * _PRIOR_DEVIATION
        self._seen = 0
        self._log_mean = 0.0
        self._log_squares = 0.0

    def factor(self) -> float:
        """Return how many times as many tokens as its bytes tell a text comes to, within what can be.

        Usage tells what the provider counted, which may be a prompt of its own on top, or nothing at all.
        """
        return min(max(self._tokens / self._expected, _LEAST_FACTOR), _MOST_FACTOR)

    def learn(self, text_256ths: int, prompt_tokens: int, log_answer: float) -> None:
        """Take in what a prompt's text came to, and an answer to it, as a power of two."""
        self.learn_prompt(text_256ths, prompt_tokens)
        self.learn_output(log_answer)

    def learn_prompt(self, text_256ths: int, tokens: int) -> None:
        """Take in how many tokens a prompt's text came to."""
        if text_256ths > 0 and tokens > 0:
            self._expected = self._expected * _DECAY + text_256ths / _TOKEN
            self._tokens = self._tokens * _DECAY + tokens

    def learn_output(self, log: float) -> None:
        """Take in how long an answer was, as a power of two of tokens.

        The first answers set the quantile by their mean and deviation, as if lengths were distributed
        log-normally, so that a dozen calls leave the cold start behind; from then on it is found step by step,
        whatever the distribution (stochastic approximation).
        """
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
        self._teams: dict[tuple[str, str], Traffic] = {}
        self._users: dict[tuple[str, str], Traffic] = {}

    def estimate(
        self,
        model: str,
        team: str | None,
        user: str,
        text_bytes: int,
        text_256ths: int,
        extra_tokens: int,
        choices: int,
        output_cap: int | None,
    ) -> Estimate:
        """Return what a call is expected to take.

        Args:
            model: The model's name.
            team: The caller's team, if any.
            user: The caller's id.
            text_bytes: The size of the prompt's text.
            text_256ths: What it is expected to come to by the classes of its bytes, in 256ths of a token.
            extra_tokens: Tokens of the prompt that do not come from its text.
            choices: How many answers are asked for.
            output_cap: The largest cap on each, in tokens.
        """
        traffic = self._users.get((model, user))
        if traffic is None and team is not None:
            traffic = self._teams.get((model, team))
        if traffic is None:
            traffic = self._models.get(model) or _COLD
        output = traffic.output_tokens
        answers = choices * output
        if output_cap is None:
            most = max(answers, LEAST_OUTPUT_TOKENS)
        else:
            most = choices * output_cap
            answers = min(answers, most)
        prompt = _whole(text_256ths / _TOKEN * traffic.factor()) + extra_tokens
        most += max(prompt, (text_bytes + BYTES_PER_TOKEN - 1) // BYTES_PER_TOKEN + extra_tokens)
        return tuple.__new__(Estimate, (prompt, prompt + answers, most))  # PERF: half of what its own takes

    def learn(
        self,
        model: str,
        team: str | None,
        user: str,
        text_256ths: int,
        prompt_tokens: int,
        choices: int,
        output_tokens: int,
    ) -> None:
        """Take in what a call really took.

        Args:
            model: The model's name.
            team: The caller's team, if any.
            user: The caller's id.
            text_256ths: What the prompt's text was expected to come to; 0 if its share of the prompt is not known.
            prompt_tokens: What the text came to.
            choices: How many answers there were.
            output_tokens: What all answers together came to.
        """
        # Compiled, nothing comes in between: no thread sees a dictionary that another has changed by half.
        whole = like = _remembered(self._models, model, None)
        if team is not None:
            like = _remembered(self._teams, (model, team), whole)
        own = _remembered(self._users, (model, user), like)
        log_answer = math.log2(max(1, output_tokens // choices))
        whole.learn(text_256ths, prompt_tokens, log_answer)
        own.learn(text_256ths, prompt_tokens, log_answer)
        if like is not whole:
            like.learn(text_256ths, prompt_tokens, log_answer)


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
