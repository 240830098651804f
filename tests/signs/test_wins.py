"""Win rates, against hand-counted pairs."""

import pytest

from halos_jax.signs.intervals import Z
from halos_jax.signs.wins import estimate_wins


def test_a_win_counts_one_and_a_tie_one_half():
    found = estimate_wins([2.0, 1.0, 0.0, 5.0], [1.0, 1.0, 1.0, 4.0], ["a", "a", "b", "b"])
    assert found.value == (1 + 0.5 + 0 + 1) / 4
    # Residuals by prompt: 1.5 - 1.25 and 1 - 1.25; an error of 1/8, as 15 trials have. There are 4.
    middle, half = 0.625 + Z**2 / 8, Z * (0.625 * 0.375 / 4 + Z**2 / 64) ** 0.5
    ends = (middle - half) / (1 + Z**2 / 4), (middle + half) / (1 + Z**2 / 4)
    assert (found.low, found.high) == pytest.approx(ends)


def test_ties_alone_are_no_certainty():
    prompts = [f"p{number}" for number in range(9)]
    found = estimate_wins([1.0] * 9, [1.0] * 9, prompts)
    half = 0.5 * Z / (9 + Z**2) ** 0.5  # Wilson's at one half
    assert found == pytest.approx((0.5, 0.5 - half, 0.5 + half))


def test_pairs_without_both_scores_are_left_out():
    assert estimate_wins([2.0, None, 3.0], [1.0, 1.0, None], ["a", "b", "c"]).value == 1.0
    assert estimate_wins([None], [1.0], ["a"]) is None
