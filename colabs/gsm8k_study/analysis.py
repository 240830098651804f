"""Tables of the study from its results: accuracies, orderings, signs, guards and ceilings.

A table is a list of rows of text, the first of them the names of its columns; `show` formats it.
Accuracies are in per cent. An interval is a 95 % one, from the spread between questions.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from halos_jax.signs.intervals import Estimate, estimate_mean, estimate_share

RESULTS = Path(__file__).parent / "results"
NAME = re.compile(r"(?P<kind>[a-z]+)-(?P<shape>\w+)-(?P<rate>\de-\d)-s(?P<seed>\d)")
SHAPES = ("offline", "4x512", "16x128", "64x32")
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

Result = Mapping[str, Any]
Table = list[list[str]]


class Point(NamedTuple):
    """A round's right answers: the share right of each question, in the order of their ids."""

    round: int
    shares: np.ndarray

    @property
    def estimate(self) -> Estimate:
        """The mean share, with its interval."""
        return estimate_mean(self.shares.tolist())


def load_results(folder: Path = RESULTS) -> dict[str, Result]:
    """Return name -> record of every file in a folder."""
    return {
        path.stem: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))
    }


def select(results: Mapping[str, Result], **wanted: str) -> dict[str, Result]:
    """Return the online runs whose `kind`, `shape`, `rate` and `seed` are as asked for."""
    found = {}
    for name, result in results.items():
        match = NAME.fullmatch(name)
        if match and all(match[key] == value for key, value in wanted.items()):
            found[name] = result
    return found


def read_curve(result: Result, name: str = "held_out") -> list[Point]:
    """Return the evaluated rounds of a run, on the held-out or on the `test` questions."""
    return [Point(one["round"], read_shares(one[name])) for one in result["rounds"] if name in one]


def read_shares(counts: Mapping[str, Any]) -> np.ndarray:
    """Return the share of right samples of each question, f64[questions]."""
    return np.array([int(one, 36) for one in counts["right"]]) / counts["samples"]


def find_best(curve: Sequence[Point]) -> Point:
    """Return the round with the highest accuracy, the first of equal ones."""
    return max(curve, key=lambda point: point.shares.mean())


def list_values(result: Result, sign: str) -> dict[int, float]:
    """Return round -> value of a sign of a run."""
    rounds = result["rounds"]
    return {one["round"]: one["metrics"][sign] for one in rounds if sign in one["metrics"]}


# --------------------------------------------------------------------------- accuracy


def table_runs(results: Mapping[str, Result]) -> Table:
    """Return a row for each run: its accuracy at the start, the end and its best round."""
    rows = [["run", "start", "last", "best", "in round", "test before", "test of final/", "steps"]]
    for name, result in results.items():
        curve = read_curve(result)
        if not curve:
            continue
        best, test = find_best(curve), read_curve(result, "test")
        last = f"{percent(curve[-1].estimate)} ({curve[-1].round})"
        rows.append(
            [
                name if result["is_complete"] else f"{name} (cut)",
                percent(curve[0].estimate),
                last,
                percent(best.estimate),
                str(best.round),
                percent(test[0].estimate) if test else "",
                percent(test[-1].estimate) if len(test) > 1 else "",
                str(len(result["steps"].get("step", []))),
            ]
        )
    return rows


def table_rates(results: Mapping[str, Result], *, best: bool = False) -> Table:
    """Return rates against rounds: mean of the seeds at the last round, or at the best one."""
    runs = select(results, kind="dpo")
    rates = sorted({NAME.fullmatch(name)["rate"] for name in runs})
    rows = [["rate", *SHAPES]]
    for rate in rates:
        row = [rate]
        for shape in SHAPES:
            ends = list_ends(select(runs, rate=rate, shape=shape), best=best)
            each = ", ".join(f"{100 * value:.1f}" for value in ends)
            mean = f"{100 * np.mean(ends):.1f}" if len(ends) else ""
            row.append(f"{mean} ({each})" if len(ends) > 1 else mean)
        rows.append(row)
    return rows


def list_ends(runs: Mapping[str, Result], *, best: bool = False) -> list[float]:
    """Return the accuracy of each complete run, at its last round or at its best one."""
    curves = [read_curve(one) for one in runs.values() if one["is_complete"]]
    points = [find_best(curve) if best else curve[-1] for curve in curves if curve]
    return [float(point.shares.mean()) for point in points]


def compare_shapes(results: Mapping[str, Result], rate: str, many: str, few: str) -> Estimate:
    """Return the difference of the mean end accuracies of two shapes, over the seeds of both.

    The standard error is the larger of that between questions (for these runs) and that between
    seeds (for these questions), which Welch's formula has from the spread of each shape's ends.

    Raises:
      ValueError: if no seed has complete runs of both shapes.
    """
    ends = {}
    for shape in (many, few):
        runs = select(results, kind="dpo", rate=rate, shape=shape)
        curves = {name[-1]: read_curve(one) for name, one in runs.items() if one["is_complete"]}
        ends[shape] = {seed: curve[-1].shares for seed, curve in curves.items() if curve}
    seeds = sorted(ends[many].keys() & ends[few].keys())
    if not seeds:
        raise ValueError(f"{rate}: got no seed with complete runs of {many} and of {few}")
    first, second = (np.array([ends[shape][seed] for seed in seeds]) for shape in (many, few))
    between = estimate_mean((first - second).mean(0).tolist())
    error = between.error
    if len(seeds) > 1:
        spread = [np.var(one.mean(1), ddof=1) / len(seeds) for one in (first, second)]
        error = max(error, math.sqrt(sum(spread)))
    half = 1.96 * error
    return Estimate(between.value, between.value - half, between.value + half)


def table_orders(results: Mapping[str, Result]) -> Table:
    """Return the differences of more rounds and fewer rounds, for each rate."""
    rows = [["rate", "seeds", "few - offline", "many - few", "many - offline", "in errors"]]
    runs = select(results, kind="dpo")
    for rate in sorted({NAME.fullmatch(name)["rate"] for name in runs}):
        seeds = len(select(runs, rate=rate, shape="16x128"))
        row = [rate, str(seeds)]
        found = None
        for many, few in (("4x512", "offline"), ("16x128", "4x512"), ("16x128", "offline")):
            try:
                found = compare_shapes(results, rate, many, few)
            except ValueError:
                found = None
            row.append(percent(found, sign="+") if found else "")
        row.append(f"{found.value / found.error:+.1f}" if found else "")
        rows.append(row)
    return rows


# --------------------------------------------------------------------------- signs


class Step(NamedTuple):
    """What a sign was in a round, and how the accuracy changed in that round or the next."""

    run: str
    round: int
    sign: float
    change: Estimate


def list_changes(result: Result) -> dict[int, Estimate]:
    """Return round -> change of accuracy since the round before, where both were evaluated."""
    curve = {point.round: point for point in read_curve(result)}
    return {
        round: estimate_mean((point.shares - curve[round - 1].shares).tolist())
        for round, point in curve.items()
        if round - 1 in curve
    }


def pair_sign(results: Mapping[str, Result], sign: str, *, lag: int) -> list[Step]:
    """Return a sign in each round r of each run, with the change of accuracy in round r + lag."""
    found = []
    for name, result in results.items():
        changes = list_changes(result)
        for round, value in list_values(result, sign).items():
            if round and round + lag in changes:
                found.append(Step(name, round, value, changes[round + lag]))
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
    """Return, for each sign, how it goes with the change of accuracy in the round and the next."""
    rows = [["sign", "rounds", "falls", "rho, this round", "area", "rho, next round", "area"]]
    runs = select(results, kind="dpo")
    for sign, direction in {**BEFORE, **AFTER}.items():
        row = []
        for lag in (0, 1):
            steps = pair_sign(runs, sign, lag=lag)
            if len(steps) < 3:
                break
            falls = sum(step.change.high < 0 for step in steps)
            row += [str(len(steps)), str(falls)] if lag == 0 else []
            is_late = sign in AFTER and lag == 0  # known only when the round is over
            rho, area = correlate(steps), rank_falls(steps, direction)
            row += ["", ""] if is_late else [show_signed(rho), f"{area:.2f}"]
        if row:
            rows.append([sign, *row])
    return rows


def table_alarms(
    results: Mapping[str, Result], sign: str, limits: Iterable[float], direction: int
) -> Table:
    """Return, for each limit of a sign, how many falls it announces and how often it is wrong."""
    rows = [["limit", "falls announced", "of", "alarms", "right", "by chance"]]
    steps = pair_sign(select(results, kind="dpo"), sign, lag=0)
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


# --------------------------------------------------------------------------- decisions


def table_decisions(results: Mapping[str, Result]) -> Table:
    """Return what runs have decided: each round in which the guard spoke, each change of size."""
    rows = [["run", "round", "prompts", "what", "why"]]
    for name, result in results.items():
        size = None
        for one in result["rounds"]:
            decisions, place = one.get("decisions", {}), [name, str(one["round"])]
            asked = str(one["stop"] - one["start"])
            guard, chosen = decisions.get("guard", {}), decisions.get("prompts_per_round")
            if guard.get("action", "none") != "none":
                back = f" to round {guard['to']}" if "to" in guard else ""
                bounds = ", ".join(broken["bound"] for broken in guard["broken"])
                rows.append([*place, asked, f"{guard['action']}{back}", bounds])
            if chosen and chosen["prompts"] != size:
                size = chosen["prompts"]
                rows.append([*place, asked, f"rounds of {size}", chosen["reason"]])
    return rows


# --------------------------------------------------------------------------- ceilings, times


def estimate_pass(counts: Mapping[str, Any], k: int) -> Estimate:
    """Return pass@k: the chance that one of k samples is right (Chen et al. 2021, eq. 1).

    Raises:
      ValueError: if there are fewer than k samples of a question.
    """
    samples = counts["samples"]
    if k > samples:
        raise ValueError(f"got k={k}, allowed: at most {samples}, the samples of a question")
    right = [int(one, 36) for one in counts["right"]]
    missed = [math.comb(samples - one, k) / math.comb(samples, k) for one in right]
    return estimate_mean([1 - one for one in missed])


def table_ceilings(results: Mapping[str, Result]) -> Table:
    """Return what policies can do at most: right answers, pass@4, pass@16, and cut samples."""
    rows = [["policy", "samples", "right", "pass@4", "pass@16", "tokens", "cut"]]
    for name, counts in list_evaluations(results):
        passes = [
            percent(estimate_pass(counts, k)) if counts["samples"] >= k else "" for k in (1, 4, 16)
        ]
        cut = f"{100 * counts['cut']:.1f}"
        rows.append([name, str(counts["samples"]), *passes, str(counts["response_tokens"]), cut])
    return rows


def list_evaluations(results: Mapping[str, Result]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """Yield the evaluations without a run, and the first and the last ones of complete runs."""
    for name, result in results.items():
        if "right" in result:
            yield name, result["right"]
    for name, result in results.items():
        held_out = [one for one in result["rounds"] if "held_out" in one]
        if result["is_complete"] and held_out:
            yield f"{name}, round {held_out[-1]['round']}", held_out[-1]["held_out"]


def table_times(results: Mapping[str, Result]) -> Table:
    """Return the wall time of each run, and the seconds of each stage after round 1."""
    stages = ("sample", "score", "feedback", "train", "evaluate")
    rows = [["run", "share of a GPU", "seconds", *(f"{one}, a round" for one in stages)]]
    for name, result in results.items():
        seconds = sum(one["seconds"] for one in result["attempts"])
        row = [name, f"{result['attempts'][-1]['share']:.2f}", f"{seconds:.0f}"]
        for stage in stages:
            warm = [one[2] for one in result["times"] if one[1] == stage and one[0] > 1]
            row.append(f"{np.median(warm):.1f}" if warm else "")
        rows.append(row)
    return rows


# --------------------------------------------------------------------------- text


def percent(estimate: Estimate, sign: str = "") -> str:
    """Return "16.3 ± 2.5": a share in per cent, and half of its interval."""
    half = 100 * (estimate.high - estimate.low) / 2
    return f"{100 * estimate.value:{sign}.1f} ± {half:.1f}"


def show_signed(estimate: Estimate) -> str:
    """Return "-0.31 (-0.50 .. -0.12)"."""
    return f"{estimate.value:+.2f} ({estimate.low:+.2f} .. {estimate.high:+.2f})"


def show(table: Table) -> str:
    """Return a table as text, with its columns aligned."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
