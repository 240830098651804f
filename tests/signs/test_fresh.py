"""Signs of fresh samples, by hand."""

import math

import numpy as np
import pytest

from halos_jax.signs import fresh
from halos_jax.types import Prompt, Sample


def make(name="a", number=0, ids=(1, 2), reward=0.0, finish="stop", entropy=1.0):
    prompt = Prompt(name, ())
    return Sample(
        prompt,
        number,
        "",
        (9,),
        tuple(ids),
        finish,
        reward=reward,
        sum_logps=-1.0,
        mean_entropy=entropy,
    )


def values(estimates):
    return {name: one.value for name, one in estimates.items()}


def test_responses():
    samples = [
        make("a", 0, [1, 2, 3, 4, 1, 2, 3, 4], finish="length", entropy=2.0),
        make("a", 1, [5], entropy=0.5),
        make("b", 0, [7] * 6, entropy=1.0),
        make("b", 1, [1, 2, 3, 4, 5], entropy=0.0),
    ]
    found = fresh.measure_responses(samples)
    assert values(found) == pytest.approx(
        {
            "truncated_share": 0.25,
            "response_tokens_mean": 5.0,
            "repeated_4grams": (1 / 5 + 0 + 2 / 3 + 0) / 4,
            # By token: long responses count for more.
            "entropy": (8 * 2 + 1 * 0.5 + 6 * 1 + 0) / 20,
        }
    )
    assert all(0 <= found["truncated_share"][i] <= 1 for i in range(3))
    # Of a file from before entropies were kept, the rest is known.
    old = [*samples, make("c", entropy=None)]
    assert fresh.measure_responses(old).keys() == found.keys() - {"entropy"}


def test_repetition():
    assert fresh.measure_repetition([1, 2, 3]) == 0
    assert fresh.measure_repetition([1, 2, 3, 4]) == 0
    assert fresh.measure_repetition([7] * 4) == 0
    assert fresh.measure_repetition([7] * 8) == pytest.approx(4 / 5)


def test_rewards_and_prompts_with_a_missing_label():
    rewards = {"a": [0, 1, 3], "b": [2, 2, 2], "c": [5, None, 5], "d": [1, 0, 0]}
    samples = [
        make(name, number, reward=reward)
        for name, group in rewards.items()
        for number, reward in enumerate(group)
    ]
    found = values(fresh.measure_rewards(samples))
    assert found == pytest.approx(
        {
            "reward_train_mean": (4 + 6 + 10 + 1) / 11,
            # "c" is left out: the missing label might be the best, or break the tie.
            "reward_best": (3 + 2 + 1) / 3,
            "reward_worst": (0 + 2 + 0) / 3,
            "reward_spread": (np.std([0, 1, 3]) + 0 + np.std([1, 0, 0])) / 3,
            "tied_share": 1 / 3,
        }
    )
    assert fresh.measure_rewards([make(reward=None)]) == {}
    assert "tied_share" not in fresh.measure_rewards([make("a"), make("b")]), "nothing to compare"


def test_divergence_has_its_name_and_counts_tokens():
    found = fresh.measure_divergence([1.0, 3.0, 2.0], [2, 2, 8], ["a", "b", "b"], name="kl_sft")
    assert values(found) == {"kl_sft": 2.0, "kl_sft_per_token": 0.5}
    assert found["kl_sft"].low < 2.0 < found["kl_sft"].high


def test_pairs():
    found = fresh.measure_pairs([0.0, math.log(3), -1.0, 2.0], ["a", "a", "b", "c"])
    losses = [math.log(2), math.log(4 / 3), math.log1p(math.e), math.log1p(math.exp(-2))]
    assert values(found) == pytest.approx(
        {
            "fresh_margin": (math.log(3) + 1) / 4,
            "fresh_accuracy": 2.5 / 4,
            "fresh_loss": sum(losses) / 4,
        }
    )
    assert 0 <= found["fresh_accuracy"].low < found["fresh_accuracy"].high <= 1
    assert fresh.measure_pairs([], []) == {}


def test_agreement_and_extremes_compare_samples_of_one_prompt():
    scored = [
        ("a", 0.3, 1.0),
        ("a", 0.1, 0.0),
        ("b", 0.7, 0.0),
        ("a", 0.1, 2.0),
        ("b", 0.5, 1.0),
        ("c", 0.0, 1.0),  # alone
        ("d", 0.4, 1.0),
        ("d", 0.2, 1.0),  # a tie
    ]
    # a: 1 > 0 right, 2 > 0 undecided, 2 > 1 wrong; b: wrong.
    assert values(fresh.measure_agreement(scored)) == {"implicit_accuracy": 1.5 / 4}
    assert fresh.pick_extremes(scored) == [("a", 0.0), ("b", pytest.approx(-0.2))]
    assert fresh.measure_agreement(scored[-2:]) == {}
