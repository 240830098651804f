"""Means and shares with 95 % confidence intervals.

Samples of one prompt resemble each other, so the prompt is the unit that is drawn: an interval
counts prompts, not samples.
"""

import collections
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

Z = 1.959963984540054  # the normal distribution's 97.5 % point


class Estimate(NamedTuple):
    """A mean or share, and its 95 % confidence interval.

    The interval is (-inf, inf) where nothing is known of the spread: fewer than two prompts.

    Example:
      >>> one = estimate_share(5, 10)
      >>> one.value, round(one.low, 2), round(one.high, 2)
      (0.5, 0.24, 0.76)
    """

    value: float
    low: float
    high: float

    @property
    def error(self) -> float:
        """Half the width of the interval, divided by 1.96: about the standard error."""
        return (self.high - self.low) / (2 * Z)


def estimate_mean(values: Sequence[float], prompts: Sequence[Hashable] | None = None) -> Estimate:
    """Return the mean of `values`, with an interval from the spread between prompts.

    The standard error is that of a ratio of sums over clusters (the linearised, "cluster-robust"
    one): sqrt(k / (k - 1) sum_j (sum of residuals of prompt j)^2) / n, for n values of k prompts.

    Args:
      values: f64[n], at least one.
      prompts: the prompt of each value; None: each value has its own.

    Raises:
      ValueError: if there are no values, or not as many prompts as values.
    """
    if not values:
        raise ValueError("got no values to average, allowed: one or more")
    count = len(values)
    mean = math.fsum(values) / count
    residuals: dict[Hashable, float] = collections.defaultdict(float)
    names: Sequence[Hashable] = range(count) if prompts is None else prompts
    for value, name in zip(values, names, strict=True):
        residuals[name] += value - mean
    clusters = len(residuals)
    if clusters < 2:
        return Estimate(mean, -math.inf, math.inf)
    squares = math.fsum(one * one for one in residuals.values())
    error = math.sqrt(clusters / (clusters - 1) * squares) / count
    return Estimate(mean, mean - Z * error, mean + Z * error)


def estimate_ratio(
    values: Sequence[float], weights: Sequence[float], prompts: Sequence[Hashable] | None = None
) -> Estimate:
    """Return sum(values) / sum(weights), with an interval from the spread between prompts.

    The standard error is that of `estimate_mean`, which is this of weights of 1: residuals are
    value - ratio * weight, and n is the sum of the weights. A mean by token is the ratio of sums
    over sequences to their lengths; a self-normalised weighted mean that of w x to w.

    Args:
      values, weights: f64[n], at least one, with a sum of weights above 0.
      prompts: as of `estimate_mean`.

    Raises:
      ValueError: if the weights add up to nothing, or the lengths differ.
    """
    total = math.fsum(weights)
    if not total > 0:
        raise ValueError(f"got weights that add up to {total}, allowed: more than 0")
    ratio = math.fsum(values) / total
    residuals: dict[Hashable, float] = collections.defaultdict(float)
    names: Sequence[Hashable] = range(len(values)) if prompts is None else prompts
    for value, weight, name in zip(values, weights, names, strict=True):
        residuals[name] += value - ratio * weight
    clusters = len(residuals)
    if clusters < 2:
        return Estimate(ratio, -math.inf, math.inf)
    squares = math.fsum(one * one for one in residuals.values())
    error = math.sqrt(clusters / (clusters - 1) * squares) / total
    return Estimate(ratio, ratio - Z * error, ratio + Z * error)


def estimate_share(hits: int, count: int) -> Estimate:
    """Return `hits / count` with Wilson's score interval (Wilson 1927, eq. 6).

    For independent trials; for several samples a prompt use `estimate_mean` of zeros and ones.

    Raises:
      ValueError: unless 0 <= hits <= count and count > 0.
    """
    if not 0 <= hits <= count or not count:
        raise ValueError(f"got {hits} of {count}, allowed: at most all of one or more")
    return _estimate_wilson(hits / count, count)


def estimate_clustered_share(
    hits: Sequence[float], prompts: Sequence[Hashable] | None = None
) -> Estimate:
    """Return the share of hits, with an interval from the spread between prompts, inside [0, 1].

    Wilson's interval for as many independent trials as have the standard error of `estimate_mean`:
    from the number of prompts, which it is where all trials agree, to that of the trials (Korn &
    Graubard 1998 adjust intervals of surveys in this way).

    Args:
      hits: one number a trial, 1 or 0; 0.5 where it is undecided.
      prompts: as of `estimate_mean`.
    """
    found = estimate_mean(hits, prompts)
    clusters = len(hits if prompts is None else set(prompts))
    variance = found.error**2 if clusters > 1 else 0.0
    spread = found.value * (1 - found.value)
    trials = spread / variance if variance else clusters
    return _estimate_wilson(found.value, min(max(trials, clusters), len(hits)))


def _estimate_wilson(share: float, count: float) -> Estimate:
    weight = Z * Z / count
    middle = (share + weight / 2) / (1 + weight)
    half = math.sqrt(weight * (share * (1 - share) + weight / 4)) / (1 + weight)
    return Estimate(share, max(middle - half, 0.0), min(middle + half, 1.0))


def name_estimate(name: str, estimate: Estimate) -> Mapping[str, float]:
    """Return the metrics of an estimate: NAME, and where they are known NAME/low and NAME/high."""
    if not math.isfinite(estimate.low):
        return {name: estimate.value}
    return {name: estimate.value, f"{name}/low": estimate.low, f"{name}/high": estimate.high}
