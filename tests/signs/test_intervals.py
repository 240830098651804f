"""Intervals against formulas, and against the spread of many draws."""

import math

import numpy as np
import pytest

from halos_jax.signs.intervals import Z, estimate_mean, estimate_share, name_estimate


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
