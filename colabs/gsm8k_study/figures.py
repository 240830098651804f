"""Figures of the study, drawn by matplotlib from the results."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from curves import NAME, SHAPES, Result, find_best, list_values, read_curve, select
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sign_tables import pair_sign

COLOURS = {"offline": "tab:gray", "4x512": "tab:blue", "16x128": "tab:orange", "64x32": "tab:green"}
PROMPTS = 2048


def draw_rates(results: Mapping[str, Result]) -> Figure:
    """Draw the held-out accuracy over the prompts used: a panel a rate, a line a run."""
    runs = select(results, kind="dpo")
    rates = sorted({NAME.fullmatch(name)["rate"] for name in runs})
    figure, panels = _make_panels(len(rates))
    for axes, rate in zip(panels, rates, strict=True):
        for shape in SHAPES:
            for number, result in enumerate(select(runs, rate=rate, shape=shape).values()):
                stops = {one["round"]: one["stop"] for one in result["rounds"]}
                label = shape if number == 0 else None
                _draw_curve(axes, result, stops, label=label, color=COLOURS[shape])
        axes.set_title(f"learning rate {rate}")
        axes.set_xlabel("prompts")
    panels[0].set_ylabel("right answers, %")
    panels[-1].legend()
    return figure


def _draw_curve(
    axes: Axes,
    result: Result,
    places: Mapping[int, float],
    label: str | None,
    color: str | None = None,
) -> None:
    curve = [point for point in read_curve(result) if point.round in places]
    x = [places[point.round] for point in curve]
    y = [100 * point.estimate.value for point in curve]
    error = [196 * point.estimate.error for point in curve]
    axes.errorbar(x, y, error, label=label, color=color, marker="o", markersize=3, linewidth=1)


def draw_signs(results: Mapping[str, Result], signs: Sequence[str]) -> Figure:
    """Draw the change of the accuracy in a round over what a sign was before its training."""
    runs = select(results, kind="dpo")
    figure, panels = _make_panels(len(signs))
    for axes, sign in zip(panels, signs, strict=True):
        for rate in sorted({NAME.fullmatch(name)["rate"] for name in runs}):
            steps = pair_sign(select(runs, rate=rate), sign, lag=0)
            x, y = [one.sign for one in steps], [100 * one.change.value for one in steps]
            axes.scatter(x, y, s=10, label=rate)
        axes.axhline(0, color="black", linewidth=0.5)
        axes.set_xlabel(sign)
    panels[0].set_ylabel("change in the round, points")
    panels[-1].legend(title="learning rate")
    return figure


def draw_preset(results: Mapping[str, Result]) -> Figure:
    """Draw the held-out accuracy of the preset's seeds over the prompts used."""
    figure, panels = _make_panels(1)
    for name, result in results.items():
        if "preset" in name and result["rounds"]:
            stops = {one["round"]: one["stop"] for one in result["rounds"]}
            _draw_curve(panels[0], result, stops, label=name)
    panels[0].set_xlabel("prompts")
    panels[0].set_ylabel("right answers, %")
    panels[0].legend()
    return figure


def draw_course(results: Mapping[str, Result], names: Sequence[str], sign: str) -> Figure:
    """Draw the accuracy of runs over rounds, and below it a sign; a star is the best round."""
    figure, axes = plt.subplots(2, 1, figsize=(7, 5), sharex=True, layout="constrained")
    for name in names:
        curve = read_curve(results[name])
        x = [point.round for point in curve]
        (line,) = axes[0].plot(x, [100 * point.shares.mean() for point in curve], label=name)
        best = find_best(curve)
        axes[0].plot([best.round], [100 * best.shares.mean()], "*", color=line.get_color())
        values = list_values(results[name], sign)
        axes[1].plot(list(values), list(values.values()), color=line.get_color())
    axes[0].set_ylabel("right answers, %")
    axes[0].legend(fontsize="small")
    axes[1].axhline(0, color="black", linewidth=0.5)
    axes[1].set_ylabel(sign)
    axes[1].set_xlabel("round")
    return figure


def _make_panels(count: int) -> tuple[Figure, np.ndarray]:
    size = (3.2 * count + 0.8, 3.2)
    figure, panels = plt.subplots(
        1, count, figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    return figure, panels[0]
