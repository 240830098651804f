"""The charts of a run's steps, from metrics.jsonl.

A line has at most `MOST_POINTS` points: where there are more steps, they are means of neighbours.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from halos_jax.report.charts import Chart, Line

MOST_POINTS = 400
LONG = 30  # points from which on a line is smoothed


_STEPS: tuple[tuple[str, str, str, str, tuple[tuple[str, str], ...]], ...] = (
    (
        "loss",
        "Loss",
        "Of the training batches and of held-out feedback.",
        "loss",
        (("loss/train", "training"), ("loss/eval", "held-out")),
    ),
    (
        "step_accuracy",
        "Accuracy in training",
        "Share of pairs whose chosen response has the higher (implicit) reward. Equal ones count "
        "as wrong, so it starts at 0 where the policy starts as its reference.",
        "share",
        (("rewards_train/accuracies", "training"), ("rewards_eval/accuracies", "held-out")),
    ),
    (
        "step_margin",
        "Margin in training",
        "(Implicit) reward of the chosen response less that of the rejected one.",
        "implicit reward",
        (("rewards_train/margins", "training"), ("rewards_eval/margins", "held-out")),
    ),
    (
        "logps",
        "Log-probabilities of the responses",
        "In preference learning both may fall; a chosen one that falls as fast says that "
        "likelihood is being lost, not moved.",
        "nats a response",
        (("logps_train/chosen", "chosen"), ("logps_train/rejected", "rejected")),
    ),
    (
        "grad_norm",
        "Gradient norm",
        "Before clipping. Spikes go with steps that spoil a run.",
        "norm",
        (("grad_norm", "norm"),),
    ),
    ("rate", "Learning rate", "", "rate", (("counters/lr", "rate"),)),
    (
        "speed",
        "Speed of training",
        "",
        "examples a second",
        (("examples_per_second", "examples"),),
    ),
    (
        "tokens",
        "Tokens a second in training",
        "",
        "tokens a second",
        (("tokens_per_second", "tokens"),),
    ),
    (
        "mfu",
        "Model FLOP utilisation",
        "Share of the devices' peak that the model's own arithmetic makes use of.",
        "share",
        (("mfu", "MFU"),),
    ),
)


def draw_steps(records: Sequence[Mapping[str, float]]) -> list[Chart]:
    """Return the charts of the records of metrics.jsonl, step by step."""
    return [
        Chart(name, title, about, "step", unit, tuple(_list_lines(records, metrics)))
        for name, title, about, unit, metrics in _STEPS
    ]


def _list_lines(
    records: Sequence[Mapping[str, float]], metrics: Sequence[tuple[str, str]]
) -> list[Line]:
    lines = []
    # By the run, not by the line: some metrics leave out steps, and runs that are compared must
    # not be smoothed in the one and raw in the other for a few points.
    is_long = sum("loss/train" in one for one in records) >= LONG
    for metric, name in metrics:
        points = [
            (one["step"], value)
            for one in records
            if metric in one and math.isfinite(value := one[metric])
        ]
        shown = thin(points)
        lines.append(_line(name, shown))
        is_smoothed = metric != "counters/lr" and "eval" not in metric
        if is_smoothed and (is_long or len(shown) >= LONG):
            lines[-1] = _line(name, smooth(shown))
            lines.append(dataclasses.replace(_line(f"{name}, unsmoothed", shown), style="faint"))
    return lines


def _line(name: str, points: Sequence[tuple[float, float]]) -> Line:
    return Line(name, tuple(x for x, _ in points), tuple(y for _, y in points))


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most `MOST_POINTS` points: means of neighbours, where there are more."""
    if len(points) <= MOST_POINTS:
        return list(points)
    size = math.ceil(len(points) / MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (group[-1][0], statistics.fmean(value for _, value in group)) for group in groups if group
    ]


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return running means over a twelfth of the points, centred; fewer at the ends."""
    half = max(len(points) // 24, 1)
    found = []
    for index, (x, _) in enumerate(points):
        reach = min(half, index, len(points) - 1 - index)
        near = points[index - reach : index + reach + 1]
        found.append((x, statistics.fmean(value for _, value in near)))
    return found
