"""What a call will take is guessed from what like calls took."""

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import properties
from tokenguard.estimate import COLD_OUTPUT_TOKENS, MAX_TRAFFICS, Estimator
from tokenguard.sizing import TOKEN

MODEL = "gpt-4o"
BUSY = 300
"""A few hundred calls: enough to have learned."""


def estimate(
    estimator,
    user="alice",
    team=None,
    model=MODEL,
    text_tokens=1000,
    text_bytes=4000,
    extra_tokens=0,
    choices=1,
    output_cap=None,
):
    """Estimate a call whose text looks like so many tokens."""
    return estimator.estimate(
        model,
        team,
        user,
        text_bytes=text_bytes,
        text_256ths=round(text_tokens * TOKEN),
        extra_tokens=extra_tokens,
        choices=choices,
        output_cap=output_cap,
    )


def learn(
    estimator,
    user="alice",
    team=None,
    model=MODEL,
    text_tokens=1000,
    prompt_tokens=1000,
    choices=1,
    output_tokens=256,
):
    """Teach what a text that looked like so many tokens came to."""
    estimator.learn(
        model,
        team,
        user,
        text_256ths=round(text_tokens * TOKEN),
        prompt_tokens=prompt_tokens,
        choices=choices,
        output_tokens=output_tokens,
    )


def output(estimator, **asked):
    """Return the output that is expected of one answer."""
    prompt, total, _ = estimate(estimator, **asked)
    return total - prompt


# --- cold ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text_tokens", "prompt"), [(0, 0), (1 / 256, 1), (1, 1), (257 / 256, 2), (1000, 1000), (2**40, 2**40)]
)
def test_cold_estimate_is_what_the_bytes_tell_and_a_prior(text_tokens, prompt):
    """Before anything was learned a text comes to what its bytes tell, rounded up, and an answer to 256 tokens."""
    assert estimate(Estimator(), text_tokens=text_tokens)[:2] == (prompt, prompt + COLD_OUTPUT_TOKENS)


def test_tokens_that_come_from_no_text_are_added():
    """Framing and attachments count on top of the text."""
    assert estimate(Estimator(), text_tokens=100, extra_tokens=772).prompt == 100 + 772


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


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.0, 1.3, 1.8])
def test_how_far_bytes_mislead_is_learned(factor):
    """After some calls the prompt's estimate is right for text of that kind."""
    estimator = Estimator()
    for _ in range(50):
        learn(estimator, text_tokens=1000, prompt_tokens=int(1000 * factor))

    assert estimate(estimator, text_tokens=10_000).prompt == pytest.approx(10_000 * factor, rel=0.03)


def test_one_call_is_a_step_of_the_way():
    """The first call counts by its size beside a prior of 500 tokens, of which the step forgets a fiftieth."""
    estimator = Estimator()
    learn(estimator, text_tokens=1000, prompt_tokens=1500)

    assert estimate(estimator).prompt == math.ceil(1000 * (490 + 1500) / (490 + 1000))


def test_one_odd_call_does_not_turn_the_estimate():
    """A short prompt of a strange kind weighs as little as it is long."""
    estimator = Estimator()
    for _ in range(50):
        learn(estimator)
    learn(estimator, text_tokens=3, prompt_tokens=40)

    assert estimate(estimator).prompt == pytest.approx(1000, rel=0.01)


@pytest.mark.parametrize(("text_tokens", "tokens"), [(0, 500), (1000, 0), (1000, -6)])
def test_prompt_of_unknown_size_teaches_nothing_about_text(text_tokens, tokens):
    """Where the text's share of the prompt is not known, what is known of text stays."""
    estimator = Estimator()
    for _ in range(50):
        learn(estimator, text_tokens=text_tokens, prompt_tokens=tokens)

    assert estimate(estimator).prompt == 1000


def test_hidden_prompt_does_not_make_later_text_look_enormous():
    """A provider that adds to short prompts teaches no more than that text is four times what it looks like."""
    estimator = Estimator()
    for _ in range(BUSY):
        learn(estimator, text_tokens=1, prompt_tokens=1000)

    assert estimate(estimator, text_tokens=2000).prompt == 8000


def test_provider_that_counts_too_little_does_not_make_text_free():
    """A usage that is far too small does not teach that a prompt costs nothing."""
    estimator = Estimator()
    for _ in range(BUSY):
        learn(estimator, text_tokens=2000, prompt_tokens=1)

    assert estimate(estimator, text_tokens=2000).prompt == 2000 / 16


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
        learn(estimator, text_tokens=usage % 10**7, prompt_tokens=usage, choices=choices, output_tokens=usage)

    prompt, total, most = estimate(estimator, choices=choices)

    assert type(prompt) is type(total) is type(most) is int
    assert prompt >= 1
    assert total >= prompt + choices
    assert most >= total


# --- what the provider may count ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "most"),
    [
        ({}, 1000 + 256),
        ({"text_bytes": 4001}, 1001 + 256),
        ({"text_bytes": 40_000}, 10_000 + 256),
        ({"text_bytes": 8, "text_tokens": 3}, 3 + 256),
        ({"text_bytes": 4001, "extra_tokens": 9}, 1010 + 256),
        ({"extra_tokens": 9, "text_bytes": 0}, 1009 + 256),
        ({"choices": 3}, 1000 + 3 * 256),
        ({"output_cap": 5}, 1000 + 5),
        ({"output_cap": 100_000}, 1000 + 100_000),
        ({"output_cap": 100_000, "choices": 2}, 1000 + 200_000),
        ({"output_cap": 10**9, "choices": 128}, 1000 + 128 * 10**9),
    ],
)
def test_most_is_what_the_provider_may_count_as_the_call_comes_in(asked, most):
    """The provider takes four bytes for a token, and counts the whole cap, be it ever so large."""
    assert estimate(Estimator(), **asked).most == most


def test_provider_counts_sixteen_tokens_for_answers_that_are_shorter():
    """Without a cap, answers that were learned to be short still count 16 tokens in all."""
    estimator = Estimator()
    for _ in range(BUSY):
        learn(estimator, output_tokens=2)

    prompt, total, most = estimate(estimator)

    assert total - prompt < 8
    assert most - prompt == 16


# --- who is like whom ---------------------------------------------------------------------------------------


def test_users_are_told_apart():
    """One user's traffic does not change another's estimate once both are known."""
    estimator = Estimator()
    for _ in range(BUSY):
        learn(estimator, user="alice", output_tokens=4000, text_tokens=600, prompt_tokens=1000)
        learn(estimator, user="bob", output_tokens=500, text_tokens=1300, prompt_tokens=1000)

    assert 3500 <= output(estimator, user="alice") <= 4500
    assert 400 <= output(estimator, user="bob") <= 600
    assert estimate(estimator, user="alice", text_tokens=600).prompt == pytest.approx(1000, rel=0.05)
    assert estimate(estimator, user="bob", text_tokens=1300).prompt == pytest.approx(1000, rel=0.05)


def test_user_not_seen_yet_is_expected_to_be_like_the_others():
    """A new user starts from what the model's other users taught, and another model's users teach nothing."""
    estimator = Estimator()
    for number in range(BUSY):
        learn(estimator, user=f"user-{number % 10}", output_tokens=4000, text_tokens=600, prompt_tokens=1000)

    assert 3500 <= output(estimator, user="new") <= 4500
    assert estimate(estimator, user="new", text_tokens=600).prompt == pytest.approx(1000, rel=0.05)
    assert output(estimator, user="new", model="other") == COLD_OUTPUT_TOKENS


def test_first_call_of_a_user_does_not_forget_the_others():
    """A user's own estimate is seeded from the model's, and one call does not turn it over."""
    estimator = Estimator()
    for number in range(BUSY):
        learn(estimator, user=f"user-{number % 10}", output_tokens=2000)
    learn(estimator, user="new", output_tokens=2000)

    assert 1500 <= output(estimator, user="new") <= 4500


def learned_by_teams():
    """Return what two teams taught: red asks for little and gets much, blue the other way about."""
    estimator = Estimator()
    for number in range(BUSY):
        learn(estimator, f"r{number % 5}", "red", output_tokens=4000, text_tokens=600, prompt_tokens=1000)
        learn(estimator, f"b{number % 5}", "blue", output_tokens=100, text_tokens=2000, prompt_tokens=1000)
    return estimator


def test_new_user_starts_from_the_team():
    """Who has not called yet is expected to be like the team, which is nearer than all who use the model."""
    estimator = learned_by_teams()

    assert estimate(estimator, "new", "red", text_tokens=600).prompt == pytest.approx(1000, rel=0.05)
    assert estimate(estimator, "new", "blue", text_tokens=2000).prompt == pytest.approx(1000, rel=0.05)
    assert output(estimator, user="new", team="red") > 3500
    assert output(estimator, user="new", team="blue") < 250


def test_first_call_keeps_to_the_team():
    """What a user is expected to take after the first call is still near what the team taught."""
    estimator = learned_by_teams()
    learn(estimator, "new", "red", output_tokens=4000, text_tokens=6, prompt_tokens=10)

    assert estimate(estimator, "new", "red", text_tokens=600).prompt == pytest.approx(1000, rel=0.05)
    assert output(estimator, user="new", team="red") > 2000


@pytest.mark.parametrize("team", [None, "green"])
def test_user_of_no_known_team_starts_from_the_model(team):
    """Without a team, or with one that has not called yet, all who use the model are the nearest there is."""
    estimator = learned_by_teams()

    assert estimate(estimator, "new", team) == estimate(estimator, "other", None)
    assert estimate(estimator, "new", team, text_tokens=1300).prompt == pytest.approx(1000, rel=0.02)


def test_team_not_seen_yet_starts_from_the_model():
    """A team's first call does not leave what the model taught."""
    estimator = Estimator()
    for number in range(BUSY):
        learn(estimator, f"r{number % 5}", "red", text_tokens=600, prompt_tokens=1000)
    learn(estimator, "first", "green", text_tokens=6, prompt_tokens=10)

    assert estimate(estimator, "second", "green", text_tokens=600).prompt == pytest.approx(1000, rel=0.05)


def test_team_does_not_change_what_is_known_of_a_user():
    """Who is known is estimated by their own calls, whatever team they name."""
    estimator = learned_by_teams()

    assert len({estimate(estimator, "r1", team) for team in ("red", "blue", "green", None)}) == 1


def test_team_user_and_model_of_equal_names_are_told_apart():
    """A user named like a team is not that team, nor a team that user."""
    estimator = Estimator()
    for _ in range(BUSY):
        learn(estimator, user="m", team="t", model="m", output_tokens=4000)

    assert output(estimator, user="t", model="x", team="m") == COLD_OUTPUT_TOKENS
    assert ("m", "t") not in estimator._users
    assert ("m", "m") not in estimator._teams


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
        learn(estimator, user=f"user-{number}", team=f"team-{number}", model=f"model-{number % 700}")
    for number in range(MAX_TRAFFICS + 500):
        learn(estimator, user="alice", team="red", model=f"many-{number}")

    assert len(estimator._models) == MAX_TRAFFICS
    assert len(estimator._teams) == MAX_TRAFFICS
    assert len(estimator._users) == MAX_TRAFFICS
    assert estimate(estimator, user="user-0").total > 0


def test_who_called_the_longest_ago_is_forgotten_first():
    """A full table makes room by the last call, not by the first."""
    estimator = Estimator()
    for number in range(MAX_TRAFFICS):
        learn(estimator, user=f"user-{number}", team=f"team-{number}")
    learn(estimator, user="user-0", team="team-0")
    learn(estimator, user="new", team="new")

    for kept, of in ((estimator._users, "user"), (estimator._teams, "team")):
        assert (MODEL, f"{of}-0") in kept
        assert (MODEL, f"{of}-1") not in kept
        assert (MODEL, f"{of}-2") in kept


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
