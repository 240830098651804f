"""Which signs go with a fall of the accuracy: correlations, alarms and how early they come."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from curves import Result, Table, find_best, list_values, percent, read_curve, select, show_signed
from scipy import stats

from halos_jax.signs.intervals import Estimate, estimate_mean, estimate_share

# Sign of a round -> the direction in which it warns.
BEFORE = {
    "fresh_margin": -1,
    "fresh_loss": 1,
    "fresh_accuracy": -1,
    "implicit_accuracy": -1,
    "kl_sampled": 1,
    "entropy": -1,
    "truncated_share": 1,
    "tied_share": 1,
    "repeated_4grams": 1,
}
AFTER = {"kl_sampled_stale": 1, "kl_stale_reverse": 1, "stale_ess": -1, "stale_ratio_p01": -1}


class Step(NamedTuple):
    """What a sign was in a round, and how the accuracy changed in that round or the next."""

    run: str
    round: int
    sign: float
    change: Estimate


def list_changes(result: Result, *, lag: int | None = 0) -> dict[int, Estimate]:
    """Return round r -> change of the accuracy in round r + lag, where both ends were evaluated.

    With `lag` None it is the change from before round r to the run's last round.
    """
    curve = {point.round: point.shares for point in read_curve(result)}
    found = {}
    for round in range(1, max(curve, default=0) + 1):
        ends = (round - 1, max(curve)) if lag is None else (round + lag - 1, round + lag)
        if all(end in curve for end in ends):
            found[round] = estimate_mean((curve[ends[1]] - curve[ends[0]]).tolist())
    return found


def pair_sign(results: Mapping[str, Result], sign: str, *, lag: int | None) -> list[Step]:
    """Return a sign in each round of each run, with a change of the accuracy: see `list_changes`.

    For a sign that is known when its round is over, changes to the end begin after the round.
    """
    found = []
    later = int(sign in AFTER and lag is None)
    for name, result in results.items():
        changes = list_changes(result, lag=lag)
        for round, value in list_values(result, sign).items():
            if round + later in changes:
                found.append(Step(name, round, value, changes[round + later]))
    return found


def correlate(steps: Sequence[Step], *, draws: int = 400) -> Estimate:
    """Return Spearman's correlation of sign and change, with an interval from drawing runs anew."""
    value = _spearman(steps)
    runs = sorted({step.run for step in steps})
    by_run = {run: [step for step in steps if step.run == run] for run in runs}
    random = np.random.default_rng(0)
    drawn = []
    for _ in range(draws):
        chosen = random.choice(len(runs), len(runs))
        drawn.append(_spearman([step for index in chosen for step in by_run[runs[index]]]))
    known = [one for one in drawn if not math.isnan(one)]
    low, high = np.quantile(known, (0.025, 0.975)) if known else (math.nan, math.nan)
    return Estimate(value, float(low), float(high))


def _spearman(steps: Sequence[Step]) -> float:
    signs, changes = [step.sign for step in steps], [step.change.value for step in steps]
    if len(steps) < 3 or len(set(signs)) < 2 or len(set(changes)) < 2:
        return math.nan
    return float(np.corrcoef(stats.rankdata(signs), stats.rankdata(changes))[0, 1])


def rank_falls(steps: Sequence[Step], direction: int) -> float:
    """Return the chance that a round that fell had a worse sign than one that did not (ROC area).

    A round fell if its change is below 0 beyond its interval. NaN where there are none, or all.
    """
    falls = [direction * step.sign for step in steps if step.change.high < 0]
    others = [direction * step.sign for step in steps if step.change.high >= 0]
    if not falls or not others:
        return math.nan
    wins = [(fall > other) + (fall == other) / 2 for fall in falls for other in others]
    return float(np.mean(wins))


def table_signs(results: Mapping[str, Result]) -> Table:
    """Return, for each sign, how it goes with the change of accuracy that follows it.

    In this round (for signs that are known before its training), in the next one, and to the end.
    """
    rows = [["sign", "rounds", "rho, this round", "next round", "to the end", "falls", "area"]]
    runs = select(results, kind="dpo")
    for sign, direction in {**BEFORE, **AFTER}.items():
        ends = pair_sign(runs, sign, lag=None)
        if len(ends) < 3:
            continue
        found = [correlate(pair_sign(runs, sign, lag=lag)) for lag in (0, 1)]
        is_late = sign in AFTER  # known only when the round is over
        now, soon, end = (show_signed(one) for one in (*found, correlate(ends)))
        falls = sum(step.change.high < 0 for step in ends)
        area = f"{rank_falls(ends, direction):.2f}"
        rows.append([sign, str(len(ends)), "" if is_late else now, soon, end, str(falls), area])
    return rows


def table_alarms(
    results: Mapping[str, Result], sign: str, limits: Iterable[float], direction: int
) -> Table:
    """Return, for each limit of a sign, what follows its alarms: the change to the run's end."""
    rows = [["limit", "falls announced", "of", "alarms", "right, %", "by chance", "mean change"]]
    steps = pair_sign(select(results, kind="dpo"), sign, lag=None)
    falls = [step for step in steps if step.change.high < 0]
    for limit in limits:
        alarms = [step for step in steps if direction * (step.sign - limit) > 0]
        hits = sum(step.change.high < 0 for step in alarms)
        rows.append(
            [
                f"{limit:g}",
                str(hits),
                str(len(falls)),
                str(len(alarms)),
                percent(estimate_share(hits, len(alarms))) if alarms else "",
                f"{100 * len(falls) / max(len(steps), 1):.1f}",
                f"{100 * np.mean([one.change.value for one in alarms]):+.1f}" if alarms else "",
            ]
        )
    return rows


def table_leads(results: Mapping[str, Result], sign: str, limit: float, direction: int) -> Table:
    """Return, for each run that fell, the round of the first alarm and those of peak and fall."""
    rows = [["run", "first alarm", "best round", "first fall", "best", "last"]]
    for name, result in select(results, kind="dpo").items():
        curve = read_curve(result)
        values = list_values(result, sign)
        alarms = [one for one, value in values.items() if one and direction * (value - limit) > 0]
        falls = [round for round, change in list_changes(result).items() if change.high < 0]
        if not curve or not (alarms or falls):
            continue
        best = find_best(curve)
        rows.append(
            [
                name,
                str(min(alarms)) if alarms else "none",
                str(best.round),
                str(min(falls)) if falls else "none",
                f"{100 * best.shares.mean():.1f}",
                f"{100 * curve[-1].shares.mean():.1f}",
            ]
        )
    return rows
