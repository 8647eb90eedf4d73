"""What a call will take is guessed from what like calls took."""

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import properties
from tokenguard.estimate import COLD_OUTPUT_TOKENS, MAX_TRAFFICS, Estimator

MODEL = "gpt-4o"
BUSY = 300
"""A few hundred calls: enough to have learned."""


def estimate(estimator, user="alice", model=MODEL, text_bytes=4000, extra_tokens=0, choices=1, output_cap=None):
    return estimator.estimate(
        model, user, text_bytes=text_bytes, extra_tokens=extra_tokens, choices=choices, output_cap=output_cap
    )


def learn(estimator, user="alice", model=MODEL, text_bytes=4000, prompt_tokens=1000, choices=1, output_tokens=256):
    estimator.learn(
        model,
        user,
        text_bytes=text_bytes,
        prompt_tokens=prompt_tokens,
        choices=choices,
        output_tokens=output_tokens,
    )


def output(estimator, **asked):
    """Return the output that is expected of one answer."""
    prompt, total = estimate(estimator, **asked)
    return total - prompt


# --- cold ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text_bytes", "prompt"), [(0, 0), (1, 1), (4, 1), (5, 2), (4000, 1000)])
def test_cold_estimate_is_four_bytes_a_token_and_a_prior(text_bytes, prompt):
    """Before anything was learned a token is four bytes, rounded up, and an answer 256 tokens."""
    assert estimate(Estimator(), text_bytes=text_bytes) == (prompt, prompt + COLD_OUTPUT_TOKENS)


def test_tokens_that_come_from_no_text_are_added():
    """Framing and attachments count on top of the text."""
    assert estimate(Estimator(), text_bytes=400, extra_tokens=772).prompt == 100 + 772


@pytest.mark.parametrize(
    ("cap", "expected"), [(1, 1), (255, 255), (256, 256), (257, 256), (10**9, 256), (None, 256)]
)
def test_cap_bounds_what_is_expected(cap, expected):
    """A cap lowers the expectation, and never raises it."""
    assert output(Estimator(), output_cap=cap) == expected


def test_every_answer_counts():
    """N answers are expected to take n times one."""
    assert output(Estimator(), choices=5) == 5 * COLD_OUTPUT_TOKENS
    assert output(Estimator(), choices=5, output_cap=10) == 50


def test_estimating_teaches_nothing():
    """Asking for estimates changes none."""
    estimator = Estimator()

    assert len({estimate(estimator) for _ in range(100)}) == 1


# --- the prompt ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1.4, 2.1, 3.6, 4.3, 5.4])
def test_bytes_per_token_are_learned(ratio):
    """After some calls the prompt's estimate is right for text of that kind."""
    estimator = Estimator()
    for _ in range(50):
        learn(estimator, text_bytes=int(1000 * ratio), prompt_tokens=1000)

    assert estimate(estimator, text_bytes=int(10_000 * ratio)).prompt == pytest.approx(10_000, rel=0.03)


def test_one_odd_call_does_not_turn_the_estimate():
    """A short prompt of a strange kind weighs as little as it is long."""
    estimator = Estimator()
    for _ in range(50):
        learn(estimator, text_bytes=4000, prompt_tokens=1000)
    learn(estimator, text_bytes=10, prompt_tokens=40)

    assert estimate(estimator).prompt == pytest.approx(1000, rel=0.01)


@pytest.mark.parametrize(("text_bytes", "tokens"), [(0, 500), (4000, 0), (4000, -6)])
def test_prompt_of_unknown_size_teaches_nothing_about_bytes(text_bytes, tokens):
    """Where the text's share of the prompt is not known, the bytes per token stay."""
    estimator = Estimator()
    for _ in range(50):
        learn(estimator, text_bytes=text_bytes, prompt_tokens=tokens)

    assert estimate(estimator).prompt == 1000


def test_hidden_prompt_does_not_make_later_text_look_enormous():
    """A provider that adds to short prompts does not teach that one byte is many tokens, which cannot be."""
    estimator = Estimator()
    for _ in range(BUSY):
        learn(estimator, text_bytes=2, prompt_tokens=1000)

    assert estimate(estimator, text_bytes=8000).prompt <= 8000


def test_provider_that_counts_too_little_does_not_make_text_free():
    """A usage that is far too small does not teach that a prompt costs nothing."""
    estimator = Estimator()
    for _ in range(BUSY):
        learn(estimator, text_bytes=8000, prompt_tokens=1)

    assert estimate(estimator, text_bytes=8000).prompt >= 8000 / 100


# --- the output ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spread", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("median", [60, 300, 1_000, 4_000])
def test_learned_output_covers_most_answers_but_not_all(median, spread, seed):
    """After a few hundred calls what is expected covers 85 to 99 of 100 answers of lognormal traffic."""
    random = Random(seed)
    answers = [max(1, round(random.lognormvariate(math.log(median), spread))) for _ in range(2 * BUSY)]
    estimator = Estimator()
    for answer in answers[:BUSY]:
        learn(estimator, output_tokens=answer)

    covered = 0
    for answer in answers[BUSY:]:
        covered += answer <= output(estimator)
        learn(estimator, output_tokens=answer)

    assert 0.85 <= covered / BUSY <= 0.99, f"seed {seed}: {covered} of {BUSY} within {output(estimator)}"


def test_a_dozen_long_answers_leave_the_cold_start_behind():
    """Answers ten times as long as expected are expected after a dozen calls."""
    estimator = Estimator()
    for _ in range(12):
        learn(estimator, output_tokens=2_560)

    assert output(estimator) >= 1_280


def test_output_follows_traffic_that_changes():
    """Traffic that turns long, then short again, is followed."""
    estimator = Estimator()
    for _ in range(BUSY):
        learn(estimator, output_tokens=100)
    before = output(estimator)
    for _ in range(BUSY):
        learn(estimator, output_tokens=2000)
    long = output(estimator)
    for _ in range(4 * BUSY):
        learn(estimator, output_tokens=100)

    assert before < 250
    assert long > 1900
    assert output(estimator) < 250


def test_output_is_learned_per_answer():
    """What n answers took together is shared out among them."""
    estimator = Estimator()
    for _ in range(BUSY):
        learn(estimator, choices=4, output_tokens=4 * 2000)

    assert 1500 <= output(estimator) <= 2500


@properties
@given(st.lists(st.integers(0, 10**12), max_size=60), st.integers(1, 128))
def test_estimate_stays_sane_whatever_is_told(usages, choices):
    """Counts of any size, even absurd ones, leave estimates that are whole numbers of at least one token."""
    estimator = Estimator()
    for usage in usages:
        learn(estimator, text_bytes=usage % 10**7, prompt_tokens=usage, choices=choices, output_tokens=usage)

    prompt, total = estimate(estimator, choices=choices)

    assert type(prompt) is type(total) is int
    assert prompt >= 1
    assert total >= prompt + choices


# --- who is like whom ---------------------------------------------------------------------------------------


def test_users_are_told_apart():
    """One user's traffic does not change another's estimate once both are known."""
    estimator = Estimator()
    for _ in range(BUSY):
        learn(estimator, user="alice", output_tokens=4000, text_bytes=1700, prompt_tokens=1000)
        learn(estimator, user="bob", output_tokens=500, text_bytes=5400, prompt_tokens=1000)

    assert 3500 <= output(estimator, user="alice") <= 4500
    assert 400 <= output(estimator, user="bob") <= 600
    assert estimate(estimator, user="alice", text_bytes=1700).prompt == pytest.approx(1000, rel=0.05)
    assert estimate(estimator, user="bob", text_bytes=5400).prompt == pytest.approx(1000, rel=0.05)


def test_user_not_seen_yet_is_expected_to_be_like_the_others():
    """A new user starts from what the model's other users taught, and another model's users teach nothing."""
    estimator = Estimator()
    for number in range(BUSY):
        learn(estimator, user=f"user-{number % 10}", output_tokens=4000, text_bytes=1700, prompt_tokens=1000)

    assert 3500 <= output(estimator, user="new") <= 4500
    assert estimate(estimator, user="new", text_bytes=1700).prompt == pytest.approx(1000, rel=0.05)
    assert output(estimator, user="new", model="other") == COLD_OUTPUT_TOKENS


def test_first_call_of_a_user_does_not_forget_the_others():
    """A user's own estimate is seeded from the model's, and one call does not turn it over."""
    estimator = Estimator()
    for number in range(BUSY):
        learn(estimator, user=f"user-{number % 10}", output_tokens=2000)
    learn(estimator, user="new", output_tokens=2000)

    assert 1500 <= output(estimator, user="new") <= 4500


def test_model_and_user_of_equal_names_are_told_apart():
    """A user named like a model is no model."""
    estimator = Estimator()
    for _ in range(BUSY):
        learn(estimator, user="m", model="m", output_tokens=4000)

    assert output(estimator, user="x", model="x") == COLD_OUTPUT_TOKENS


# --- memory -------------------------------------------------------------------------------------------------


def test_memory_is_bounded():
    """However many users and models come, only so many kinds of traffic are remembered."""
    estimator = Estimator()
    for number in range(MAX_TRAFFICS + 500):
        learn(estimator, user=f"user-{number}", model=f"model-{number % 700}")
    for number in range(MAX_TRAFFICS + 500):
        learn(estimator, user="alice", model=f"many-{number}")

    assert len(estimator._models) == MAX_TRAFFICS
    assert len(estimator._users) == MAX_TRAFFICS
    assert estimate(estimator, user="user-0").total > 0


def test_busy_user_is_not_forgotten_for_a_crowd_of_strangers():
    """Who calls all the time is remembered, however many others call once."""
    estimator = Estimator()
    for number in range(MAX_TRAFFICS + 500):
        learn(estimator, user=f"user-{number}", output_tokens=100)
        if number % 40 == 0:
            learn(estimator, user="busy", output_tokens=4000)

    assert output(estimator, user="busy") >= 3500


def test_model_is_not_forgotten_for_its_users():
    """A new user is expected to be like the others even after more users than are remembered."""
    estimator = Estimator()
    for number in range(MAX_TRAFFICS + 10):
        learn(estimator, user=f"user-{number}", output_tokens=4000)

    assert output(estimator, user="new") >= 3500
