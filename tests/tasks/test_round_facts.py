"""What a run decides on its way is told at its start."""

from halos_jax.config import (
    Config,
    DataConfig,
    FeedbackConfig,
    GuardConfig,
    RewardConfig,
    RoundsConfig,
)
from halos_jax.tasks.round_facts import describe_final, describe_guard, describe_sizes

HELD_OUT = DataConfig(eval="eval.jsonl")
SCORED = RewardConfig(kind="function", function="module:function")


def test_sizes_are_told_with_who_chooses_them():
    assert describe_sizes(Config()) == "512 prompts each"
    config = Config(
        rounds=RoundsConfig(prompts_per_round="auto"), feedback=FeedbackConfig(min_examples=64)
    )
    assert describe_sizes(config) == (
        "128 to 1024 prompts each, by rounds.prompts_per_round=auto; refilled with further "
        "prompts, up to 2 times as many, below feedback.min_examples=64"
    )


def test_a_guard_is_told_with_the_bounds_that_can_be_measured():
    assert describe_guard(Config()) == "no bound is set or can be measured"
    assert describe_guard(Config(data=HELD_OUT)) == "warns where the held-out reward falls"
    unscored = Config(data=HELD_OUT, reward=RewardConfig(kind="none"))  # nothing that could fall
    assert describe_guard(unscored) == "no bound is set or can be measured"
    guard = GuardConfig(action="retry", max_kl=5.0, min_margin=-0.5, patience=2, fall=False)
    assert describe_guard(Config(guard=guard)) == (
        "goes back, with a lower rate where the KL from SFT exceeds 5 nats, or the margin of "
        "fresh pairs is below -0.5, 2 rounds in a row, at most 3 times"
    )
    guard = GuardConfig(action="stop", max_truncated=0.5, max_length_change=0.25, scorer="judge")
    told = describe_guard(Config(guard=guard, data=HELD_OUT))
    assert told.startswith("ends the run where the held-out reward falls, or the score by judge")
    assert "50% of the samples are cut, or the length changes by more than 25%" in told


def test_what_is_exported_is_told():
    last = "the policy of the last round (rounds.keep_best=auto)"
    assert describe_final(Config(reward=SCORED)) == last
    assert describe_final(Config(reward=SCORED, data=HELD_OUT)) == (
        "the policy of the round with the highest held-out reward (rounds.keep_best=auto)"
    )
    never = Config(reward=SCORED, data=HELD_OUT, rounds=RoundsConfig(keep_best=False))
    assert describe_final(never) == "the policy of the last round (rounds.keep_best=False)"
