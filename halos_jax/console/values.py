"""Metrics in words: a few of them in a line that is never longer than a terminal is wide."""

import shutil
import sys
from collections.abc import Mapping
from typing import Any

WIDTH = 100  # columns
WHOLE = 10_000  # columns of a log file

# Metric -> what a line calls it: what says most of a step.
_STEP = {
    "loss/train": "loss",
    "loss/eval": "held-out loss",
    "rewards_train/accuracies": "accuracy",
    "rewards_eval/accuracies": "accuracy",
    "rewards_train/margins": "margin",
    "rewards_eval/margins": "margin",
    "counters/lr": "lr",
}


def describe_step(values: Mapping[str, Any]) -> str:
    """Return the few metrics of a step, or of an evaluation, by which its course is judged.

    Values may be arrays of one number, also on the device.

    >>> describe_step({"counters/lr": 1e-5, "loss/train": 0.69314, "grad_norm": 2.0})
    'loss 0.6931, lr 1e-05'
    """
    return ", ".join(
        f"{name} {show_value(float(values[metric]))}"
        for metric, name in _STEP.items()
        if metric in values
    )


def show_metrics(values: Mapping[str, Any]) -> list[str]:
    """Return a text for each metric; the ends of an interval stand behind what they belong to.

    Example:
      >>> show_metrics({"reward_eval": 0.5, "reward_eval/low": 0.25, "reward_eval/high": 0.75})
      ['reward_eval 0.5 (0.25 to 0.75)']
    """
    shown = []
    for name, value in values.items():
        stem, _, end = name.rpartition("/")
        if end in ("low", "high") and stem in values:
            continue
        ends = [values[f"{name}/{end}"] for end in ("low", "high") if f"{name}/{end}" in values]
        interval = f" ({' to '.join(map(show_value, ends))})" if len(ends) == 2 else ""
        shown.append(f"{name} {show_value(value)}{interval}")
    return shown


def fit(parts: list[str], *, width: int = WIDTH) -> str:
    """Join as many parts as there is room for in a line; the rest is counted, not dropped.

    >>> fit(["loss 0.5", "accuracy 0.75", "margin 0.125"], width=30)
    'loss 0.5, and 2 more'
    """
    for count in range(len(parts), -1, -1):
        more = f"and {len(parts) - count} more" if count < len(parts) else ""
        line = ", ".join(filter(None, [*parts[:count], more]))
        if len(line) <= width or not count:
            return line
    return ""


def show_value(value: Any) -> str:
    """Return a number with four digits that count; an integer whole."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def find_width() -> int:
    """Return the columns of the terminal that a program writes to; a log file has room for all."""
    return shutil.get_terminal_size((WIDTH, 24)).columns if sys.stdout.isatty() else WHOLE


def find_text_width() -> int:
    """Return the columns of text that is wrapped: those of a terminal, at most 100."""
    return min(find_width(), WIDTH)
