"""Tables of the study: accuracies, orderings, decisions, ceilings and times."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from curves import (
    NAME,
    SHAPES,
    Result,
    Table,
    find_best,
    has_ended,
    percent,
    read_curve,
    select,
)

from halos_jax.signs.intervals import Estimate, estimate_mean


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
    """Return the accuracy of each run that has ended, at its last round or at its best one."""
    curves = [read_curve(one) for one in runs.values() if has_ended(one)]
    points = [find_best(curve) if best else curve[-1] for curve in curves]
    return [float(point.shares.mean()) for point in points]


def table_progress(
    results: Mapping[str, Result], prompts: Sequence[int] = (512, 1024, 1536, 2048)
) -> Table:
    """Return the accuracy of each run after so many prompts, where it was evaluated there."""
    rows = [["run", *map(str, prompts)]]
    for name, result in results.items():
        stops = {one["round"]: one["stop"] for one in result["rounds"]}
        found = {stops[point.round]: point.estimate for point in read_curve(result)}
        row = [percent(found[count]) if count in found else "" for count in prompts]
        if any(row):
            rows.append([name, *row])
    return rows


def compare_shapes(results: Mapping[str, Result], rate: str, many: str, few: str) -> Estimate:
    """Return the difference of the mean end accuracies of two shapes, over the seeds of both.

    The standard error is the larger of that between questions (for these runs) and that between
    seeds (for these questions), which Welch's formula has from the spread of each shape's ends.

    Raises:
      ValueError: if for no seed runs of both shapes have ended.
    """
    ends = {}
    for shape in (many, few):
        runs = select(results, kind="dpo", rate=rate, shape=shape)
        curves = {name[-1]: read_curve(one) for name, one in runs.items() if has_ended(one)}
        ends[shape] = {seed: curve[-1].shares for seed, curve in curves.items()}
    seeds = sorted(ends[many].keys() & ends[few].keys())
    if not seeds:
        raise ValueError(f"{rate}: got no seed with ended runs of {many} and of {few}")
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
    rows = [["rate", "few - offline", "many - few", "many - offline", "in errors"]]
    runs = select(results, kind="dpo")
    for rate in sorted({NAME.fullmatch(name)["rate"] for name in runs}):
        row = [rate]
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
