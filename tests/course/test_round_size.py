"""The sizes of rounds with "auto"."""

import dataclasses

import pytest

from halos_jax.config import Config, FeedbackConfig, RoundsConfig, SamplingConfig, TrainConfig
from halos_jax.course.advice import RoundSigns
from halos_jax.course.round_size import choose_size, expect_size

AUTO = RoundsConfig(prompts_per_round="auto", min_prompts_per_round=64, max_prompts_per_round=500)
CONFIG = Config(
    rounds=AUTO,
    train=TrainConfig(batch_size=16),
    sampling=SamplingConfig(num_samples_per_prompt=4),
)
MANY = 100_000
STALE = {"kl_stale": 0.36, "stale_ess": 0.4}
FRESH = {"kl_stale": 0.04, "stale_ess": 0.93}
NEGATIVE = {"fresh_margin": -0.2, "fresh_margin/low": -0.3, "fresh_margin/high": -0.1}


def make_done(prompts, *, steps=4, **metrics):
    """Return round 0 and one round of so many prompts and steps."""
    return [
        RoundSigns(0, 0, 1e-6, {"steps_done": 0}),
        RoundSigns(1, prompts, 1e-6, {"steps_done": steps, **metrics}),
    ]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # 4 steps of 16 pairs, of every other prompt one: 128 prompts.
        ({}, 128),
        ({"train": TrainConfig(batch_size=20)}, 192),  # 160, in multiples of 64
        ({"train": TrainConfig(batch_size=100)}, 500),  # the highest bound
        ({"train": TrainConfig(batch_size=1)}, 64),
        ({"feedback": FeedbackConfig(mode="all")}, 64),  # 6 pairs a prompt: 22 prompts
        ({"rounds": RoundsConfig(prompts_per_round=7)}, 7),
    ],
)
def test_the_first_round_has_a_few_steps_if_half_of_the_prompts_are_ties(fields, expected):
    config = dataclasses.replace(CONFIG, **fields)
    assert expect_size(config) == expected
    if config.rounds.prompts_per_round == "auto":
        zero = make_done(0)[:1]
        assert choose_size(config, zero, MANY) == (expected, "the first round")


@pytest.mark.parametrize(
    ("done", "expected", "reason"),
    [
        (make_done(256, **STALE), 128, "left the one that sampled it behind (KL 0.36 nats"),
        (make_done(256, stale_ess=0.4), 128, "(effective share of its samples 0.40)"),
        (make_done(256, kl_sampled_stale=0.36), 128, "(KL 0.36 nats a response)"),
        (make_done(192, **STALE), 128, "behind"),  # 96, in multiples of 64
        (make_done(64, **STALE), 64, "but it has rounds.min_prompts_per_round already"),
        (make_done(256, **NEGATIVE), 128, "margin -0.200"),
        (make_done(128, **FRESH), 256, "its samples were still fresh (KL 0.04 nats"),
        (make_done(256, **FRESH), 500, "still fresh"),
        (make_done(500, **FRESH), 500, "but it has rounds.max_prompts_per_round already"),
        (make_done(128, steps=1), 256, "the last round had 1 optimizer step"),
        # Too few steps do not count where the policy has moved too far in them.
        (make_done(128, steps=1, **STALE), 64, "behind"),
        (make_done(128, kl_stale=0.2, stale_ess=0.8), 128, "no sign asks for another size"),
        (make_done(128, kl_stale=0.04, stale_ess=0.8), 128, "no sign"),
        (make_done(128), 128, "no sign"),
    ],
)
def test_signs_of_the_last_round_change_the_size(done, expected, reason):
    size = choose_size(CONFIG, done, MANY)
    assert size.prompts == expected and reason in size.reason
    assert size.to_record() == {"prompts": expected, "reason": size.reason}


def test_a_round_that_the_guard_went_back_from_is_no_sign():
    for signs in (STALE, FRESH, NEGATIVE, {"steps": 1}):
        done = make_done(256, **signs)
        done[-1] = done[-1]._replace(back_to=0)
        reason = "the run has gone back to round 0, and what it left is no sign"
        assert choose_size(CONFIG, done, MANY) == (256, reason)


@pytest.mark.parametrize(
    ("size", "left", "expected", "reason"),
    [
        (128, 128 + 64, 128, ""),  # what is left over is a round of its own
        (128, 128 + 63, 191, "with the 63 prompts that would be left over"),
        (128, 128, 128, "what is left of the budget"),
        (128, 5, 5, "what is left of the budget"),
        (500, 540, 320, "half of the 540 prompts that are left"),  # 270, in multiples of 64
    ],
)
def test_no_rest_is_smaller_than_the_least_round(size, left, expected, reason):
    chosen = choose_size(CONFIG, make_done(size), left)
    assert chosen.prompts == expected
    assert chosen.reason == f"no sign asks for another size{'; ' if reason else ''}{reason}"


def test_all_prompts_are_used_and_every_round_is_within_the_bounds():
    for left in range(64, 2000, 7):
        total, size, sizes = left, 128, []
        while left:
            size = choose_size(CONFIG, make_done(size, **FRESH), left).prompts
            sizes.append(size)
            left -= size
        assert sum(sizes) == total
        assert all(64 <= one <= 500 for one in sizes), (total, sizes)
