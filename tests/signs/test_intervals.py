"""Intervals against formulas, and against the spread of many draws."""

import math

import numpy as np
import pytest

from halos_jax.signs.intervals import (
    Z,
    estimate_clustered_share,
    estimate_mean,
    estimate_ratio,
    estimate_share,
    name_estimate,
)


def test_mean_of_single_values_has_the_usual_standard_error() -> None:
    values = [1.0, 2.0, 4.0, 9.0]
    error = np.std(values, ddof=1) / 2
    found = estimate_mean(values)
    assert found.value == 4.0
    assert found.low == pytest.approx(4.0 - Z * error) and found.high == pytest.approx(
        4.0 + Z * error
    )
    assert found.error == pytest.approx(error)


def test_samples_of_one_prompt_count_as_prompts() -> None:
    values, prompts = [0.0, 1.0, 5.0], ["a", "b", "c"]
    single = estimate_mean(values, prompts)
    repeated = estimate_mean(values * 4, prompts * 4)  # four equal samples teach nothing more
    assert repeated == pytest.approx(single)


def test_interval_of_clusters_covers_the_mean() -> None:
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        prompts = np.repeat(np.arange(50), 4)
        values = np.repeat(rng.normal(size=50), 4) + rng.normal(size=200)
        found = estimate_mean(values.tolist(), prompts.tolist())
        hits += found.low < 0 < found.high
    assert 0.92 < hits / 400 < 0.98


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_share_has_wilsons_interval(hits: int, count: int, low: float, high: float) -> None:
    """81 of 263 is the example of Newcombe 1998, table I, method 3."""
    found = estimate_share(hits, count)
    assert found.value == hits / count
    assert (found.low, found.high) == pytest.approx((low, high), abs=6e-5)


def test_one_prompt_has_no_interval() -> None:
    found = estimate_mean([1.0, 3.0], ["a", "a"])
    assert found == (2.0, -math.inf, math.inf)
    assert name_estimate("kl", found) == {"kl": 2.0}
    assert set(name_estimate("kl", estimate_mean([1.0, 3.0]))) == {"kl", "kl/low", "kl/high"}


def test_bad_counts_are_refused() -> None:
    for bad in [(3, 2), (-1, 4), (0, 0)]:
        with pytest.raises(ValueError, match="at most all of one or more"):
            estimate_share(*bad)
    with pytest.raises(ValueError, match="no values"):
        estimate_mean([])


def test_ratios_of_sums() -> None:
    values, weights, prompts = [1.0, 4.0, 2.0, 9.0], [1.0, 2.0, 1.0, 4.0], ["a", "a", "b", "c"]
    found = estimate_ratio(values, weights, prompts)
    assert found.value == 2.0
    residuals = [(1 + 4) - 2 * 3, 2 - 2 * 1, 9 - 2 * 4]
    assert found.error == pytest.approx(math.sqrt(3 / 2 * sum(r * r for r in residuals)) / 8)
    # Of weights of 1 it is the mean, and of one prompt nothing is known of the spread.
    assert estimate_ratio(values, [1.0] * 4, prompts) == pytest.approx(
        estimate_mean(values, prompts)
    )
    assert estimate_ratio(values, weights, ["a"] * 4).low == -math.inf
    with pytest.raises(ValueError, match="add up to 0"):
        estimate_ratio([1.0], [0.0])


def test_interval_of_ratios_covers_the_ratio() -> None:
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        prompts = np.repeat(np.arange(60), 4)
        lengths = rng.integers(1, 20, 240) * np.repeat(rng.integers(1, 4, 60), 4)
        values = lengths * (1 + np.repeat(rng.normal(size=60), 4)) + rng.normal(size=240)
        found = estimate_ratio(values.tolist(), lengths.tolist(), prompts.tolist())
        hits += found.low < 1 < found.high
    assert 0.91 < hits / 400 < 0.98


def test_shares_of_clusters_stay_inside_and_count_prompts() -> None:
    # Independent trials of one a prompt: Wilson's, up to the k / (k - 1) of the standard error.
    alone = estimate_clustered_share([1.0] * 30 + [0.0] * 70)
    assert alone == pytest.approx(estimate_share(30, 100), abs=2e-3)
    # Four equal trials of each prompt are those of the prompts.
    prompts = [number for number in range(100) for _ in range(4)]
    repeated = estimate_clustered_share([float(number < 30) for number in prompts], prompts)
    assert repeated == pytest.approx(estimate_share(30, 100), abs=2e-3)
    # No hit at all says no more than as many prompts without one.
    none = estimate_clustered_share([0.0] * 400, prompts)
    assert none == pytest.approx(estimate_share(0, 100), abs=1e-9)
    assert none.low >= 0 and none.high <= 1


def test_interval_of_clustered_shares_covers_the_share() -> None:
    rng, hits = np.random.default_rng(1), 0
    for _ in range(400):
        chances = rng.beta(0.4, 1.6, size=60)
        prompts = np.repeat(np.arange(60), 4)
        found = estimate_clustered_share(
            (rng.random(240) < np.repeat(chances, 4)).astype(float).tolist(), prompts.tolist()
        )
        hits += found.low < 0.2 < found.high
    assert 0.92 < hits / 400 < 0.98
