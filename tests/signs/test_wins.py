"""Win rates, against hand-counted pairs."""

import pytest

from halos_jax.signs.intervals import Z
from halos_jax.signs.wins import estimate_wins


def test_a_win_counts_one_and_a_tie_one_half():
    found = estimate_wins([2.0, 1.0, 0.0, 5.0], [1.0, 1.0, 1.0, 4.0], ["a", "a", "b", "b"])
    assert found.value == (1 + 0.5 + 0 + 1) / 4
    # Residuals by prompt: 1.5 - 1.25 and 1 - 1.25.
    error = (2 * 2 * 0.25**2) ** 0.5 / 4
    assert (found.low, found.high) == pytest.approx((0.625 - Z * error, 0.625 + Z * error))


def test_pairs_without_both_scores_are_left_out():
    assert estimate_wins([2.0, None, 3.0], [1.0, 1.0, None], ["a", "b", "c"]).value == 1.0
    assert estimate_wins([None], [1.0], ["a"]) is None
