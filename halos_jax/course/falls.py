"""How far a mean has fallen below the best of several, with an interval that allows for the choice.

The best of k noisy rounds is too high, and the more so the larger k is. So the interval of the
difference is the one that all k comparisons keep together with a probability of 95 % (Bonferroni:
each of them keeps 1 - 0.05 / k).
"""

import math
import statistics
from collections.abc import Mapping, Sequence

from halos_jax.signs.intervals import Estimate, Z, estimate_mean


def compare_paired(
    now: Mapping[str, Sequence[float]], best: Mapping[str, Sequence[float]], *, chosen_from: int
) -> Estimate | None:
    """Return the mean reward `now` less that of `best`, paired by prompt.

    Args:
      now, best: prompt -> rewards of its samples; prompts that are in one of them alone are left
        out.
      chosen_from: how many rounds `best` is the best of.

    Returns:
      None if they have fewer than two prompts in common.
    """
    differences = [
        statistics.fmean(now[prompt]) - statistics.fmean(best[prompt])
        for prompt in now
        if best.get(prompt) and now[prompt]
    ]
    if len(differences) < 2:
        return None
    return _widen(estimate_mean(differences), chosen_from)


def compare_means(now: Estimate, best: Estimate, *, chosen_from: int) -> Estimate:
    """Return the difference of two independent means."""
    change = now.value - best.value
    half = math.hypot(now.high - now.value, best.value - best.low)
    return _widen(Estimate(change, change - half, change + half), chosen_from)


def _widen(estimate: Estimate, comparisons: int) -> Estimate:
    """Return a 95 % interval as one that holds for so many comparisons at once."""
    share = 0.025 / max(comparisons, 1)
    factor = statistics.NormalDist().inv_cdf(1 - share) / Z
    low, high = (estimate.value + factor * (end - estimate.value) for end in estimate[1:])
    return Estimate(estimate.value, low, high)
