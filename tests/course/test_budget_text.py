"""What is said of a budget: every number worked out by hand."""

import dataclasses

import pytest

from halos_jax.config import (
    Config,
    FeedbackConfig,
    OptimizerConfig,
    RoundsConfig,
    SamplingConfig,
    TrainConfig,
)
from halos_jax.course.budget_text import (
    RoundDone,
    RoundSize,
    describe_budget,
    describe_rest,
    find_traps,
)

# 512 pairs at most are 16 steps of 32; the 64 prompts of the last round are 2.
CONFIG = Config(
    sampling=SamplingConfig(num_samples_per_prompt=4, max_tokens=320),
    train=TrainConfig(batch_size=32),
    optimizer=OptimizerConfig(learning_rate=2e-6, warmup_fraction=0.1),
    rounds=RoundsConfig(total_prompts=1600),
)
ROUNDS = [RoundSize(512, 512, 16)] * 3 + [RoundSize(64, 64, 2)]


def change(config, section, **fields):
    return dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section), **fields)}
    )


def test_the_description_of_a_budget():
    assert describe_budget(CONFIG, ROUNDS) == [
        "budget: 4 rounds of 64 to 512 prompts, 1,600 in all; 4 samples a prompt, 6,400 in all, of "
        "at most 320 tokens, 2,048,000 in all",
        "budget: at most 64 to 512 pairs and 2 to 16 optimizer steps a round, 1,600 pairs and 50 "
        "steps in all; fewer where samples tie or have no reward",
        "budget: learning rate 2e-06 (constant) after 5 steps of warm-up",
    ]
    assert describe_budget(CONFIG, ROUNDS[:1])[0].startswith("budget: 1 round of 512 prompts, 512")
    (*_, line) = describe_budget(change(CONFIG, "feedback", replay=0.25), ROUNDS)
    assert line.startswith("budget: up to 0.25 of the pairs of each round but the first are")
    twice = change(CONFIG, "rounds", passes=2)
    assert (
        "1,600 in all (1.6 passes over 1,000 prompts); 4" in describe_budget(twice, ROUNDS, 1000)[0]
    )
    assert (
        "1,600 in all (in at most 2 passes over the data's);" in describe_budget(twice, ROUNDS)[0]
    )


def test_ratios_that_are_not_of_what_is_drawn_are_warned_of_where_that_is_asked_for():
    scalar = change(CONFIG, "feedback", type="scalar")
    config = dataclasses.replace(scalar, loss={"name": "dapo"})
    exact = change(config, "sampling", exact_ratios=False)
    (line,) = find_traps(exact, ROUNDS)
    assert line.startswith("sampling.exact_ratios=False: the ratios of loss 'dapo' are those of")
    assert "sampling.temperature=0.7, top_p=0.95, top_k=0:" in line
    assert "--config.sampling.exact_ratios=auto, or with temperature=1" in line
    for one in (
        config,  # exact by auto
        change(config, "sampling", exact_ratios=True),
        change(exact, "sampling", temperature=1.0, top_p=1.0),
        dataclasses.replace(exact, loss={"name": "rloo"}),
    ):
        assert find_traps(one, ROUNDS) == []


def test_sizes_that_the_run_chooses_are_called_expected():
    config = change(CONFIG, "rounds", prompts_per_round="auto", max_prompts_per_round=512)
    assert (
        "1,600 in all (expected; rounds.prompts_per_round=auto chooses 128 to 512); 4 samp"
        in (describe_budget(config, ROUNDS)[0])
    )


def test_a_budget_says_what_it_lacks_and_what_may_be_added():
    config = change(CONFIG, "rounds", total_prompts=500, prompts_per_round="auto")
    config = change(config, "optimizer", schedule="linear")
    config = change(config, "feedback", min_examples=9, max_prompts_factor=1.5)
    assert describe_budget(config, [RoundSize(64, 1, 1)]) == [
        "budget: 1 round of 64 prompts, 64 in all (there are no more for rounds.total_prompts=500; "
        "fewer than rounds.min_prompts_per_round=128); 4 samples a prompt, 256 in all, of at most "
        "320 tokens, 81,920 in all",
        "budget: at most 1 pair and 1 optimizer step a round without further prompts, 1 pair and "
        "1 step in all; fewer where samples tie or have no reward",
        "budget: learning rate 2e-06 (linear, over the prompts) after 0 steps of warm-up",
        "budget: a round that has fewer examples than feedback.min_examples=9 gets further "
        "prompts, up to 1.5 times its share in all (feedback.max_prompts_factor); fewer are left "
        "for later rounds",
    ]


def test_examples_have_the_name_that_their_loss_gives_them():
    """A group whose rewards are equal is an example, too."""
    feedback = FeedbackConfig(type="scalar")
    config = dataclasses.replace(CONFIG, loss={"name": "grpo"}, feedback=feedback)
    assert describe_budget(config, ROUNDS[:1])[1] == (
        "budget: at most 512 examples and 16 optimizer steps a round, 512 examples and 16 steps in "
        "all; fewer where samples have no reward"
    )


def test_a_sound_budget_has_no_traps():
    assert find_traps(CONFIG, ROUNDS) == []


@pytest.mark.parametrize(
    ("section", "fields", "rounds", "expected"),
    [
        (
            "train",
            {"batch_size": 100},
            [RoundSize(64, 64, 1)] * 9,
            "train.batch_size=100 is more than the 64 pairs that a round has at most",
        ),
        (
            "train",
            {"batch_size": 32},
            [RoundSize(96, 96, 3)] * 9,
            "a round has at most 3 optimizer steps (96 pairs, train.batch_size=32), fewer where "
            "samples tie or have no reward; for 4, raise rounds.prompts_per_round, or set "
            "--config.train.batch_size=24",
        ),
        (
            "optimizer",
            {"warmup_steps": 150},
            ROUNDS,
            "optimizer.warmup_steps=150, but the run has at most 50 steps: only the last of them "
            "reaches the learning rate",
        ),
    ],
)
def test_traps_are_named_with_their_numbers(section, fields, rounds, expected):
    (line,) = find_traps(change(CONFIG, section, **fields), rounds)
    assert line.startswith(expected)


def test_sizes_that_the_run_chooses_are_raised_by_their_bound():
    config = change(CONFIG, "rounds", prompts_per_round="auto", max_prompts_per_round=128)
    (line,) = find_traps(change(config, "train", batch_size=128), [RoundSize(128, 128, 1)])
    assert "for 4, raise rounds.max_prompts_per_round, or set" in line


def test_what_is_left_is_told_from_what_was_measured():
    done = [RoundDone(512, 200, 6, 100.0), RoundDone(512, 184, 6, 20.0)]
    # 384 pairs of 1,024 prompts; 512 x 0.375 = 192 pairs are 6 steps, 64 x 0.375 = 24 are 1.
    # The first round, which compiled, says nothing of the pace: 576 prompts at 20 s for 512.
    assert describe_rest(CONFIG, done, ROUNDS[2:], 50) == (
        "2 rounds left; 0.38 pairs a prompt so far, so about 19 steps in all; about 22 s"
    )
    assert describe_rest(CONFIG, done[:1], ROUNDS[1:], 50).endswith("about 3 min 32 s")
    unknown = [one._replace(seconds=0.0) for one in done]
    assert describe_rest(CONFIG, unknown, ROUNDS[2:], 50).endswith("about 19 steps in all")
    assert describe_rest(CONFIG, done, [], 50) == describe_rest(CONFIG, [], ROUNDS, 50) == ""


def test_a_decay_that_the_run_does_not_reach_the_end_of_is_told():
    """Laid out for 50 steps without warm-up: after 19, the rate is 31/50 of its peak."""
    config = change(CONFIG, "optimizer", schedule="linear", warmup_steps=0)
    done = [RoundDone(512, 200, 6, 0.0), RoundDone(512, 184, 6, 0.0)]
    assert describe_rest(config, done, ROUNDS[2:], 50).endswith(
        "about 19 steps in all; 50 in the schedule, so the learning rate ends at 1.2e-06 of 2e-06"
    )
    full = [RoundDone(512, 512, 16, 0.0)] * 2
    assert "schedule" not in describe_rest(config, full, ROUNDS[2:], 50)
    # A rate that follows the prompts gets to its end, however many steps there are.
    by_budget = change(config, "feedback", min_examples=32)
    assert "schedule" not in describe_rest(by_budget, done, ROUNDS[2:], 50)


def test_rounds_without_any_pair_take_no_step():
    assert "so about 0 steps" in describe_rest(CONFIG, [RoundDone(512, 0, 0, 0.0)], ROUNDS[1:], 50)
