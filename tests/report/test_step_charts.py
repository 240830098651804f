"""The charts with a point for each step."""

import math

import pytest

from halos_jax.report.step_charts import MOST_POINTS, draw_steps, smooth, thin


def test_lines_are_those_of_the_metrics():
    records = [
        {"step": 0, "loss/eval": 0.7},
        {"step": 1, "loss/train": 0.6},
        {"step": 2, "loss/train": math.nan},
        {"step": 3, "loss/train": 0.5},
    ]
    chart = draw_steps(records)[0]
    assert chart.name == "loss"
    assert [(line.name, line.x, line.y) for line in chart.lines] == [
        ("training", (1, 3), (0.6, 0.5)),
        ("held-out", (0,), (0.7,)),
    ]


def test_many_steps_are_smoothed_and_shown_as_they_are_behind_it():
    chart = draw_steps([{"step": step, "loss/train": step % 2} for step in range(100)])[0]
    mean, raw = chart.lines[:2]
    assert (raw.name, raw.style, raw.y[:3]) == ("training, unsmoothed", "faint", (0, 1, 0))
    # Over 4 to each side: 4 or 5 of 9 are 1.
    assert mean.y[4:6] == pytest.approx((4 / 9, 5 / 9)) and len(mean.y) == 100


def test_a_metric_that_leaves_out_steps_is_smoothed_as_the_others_are():
    """Of runs that are compared, one would be smoothed and the other raw for a few points."""
    records = [{"step": step, "loss/train": 0.0} for step in range(30)]
    for step in (0, 10, 20):
        records[step]["tokens_per_second"] = float(step % 20)
    charts = {one.name: one for one in draw_steps(records)}
    mean, raw = charts["tokens"].lines
    assert (mean.y, raw.y) == ((0.0, 10 / 3, 0.0), (0.0, 10.0, 0.0))
    short = {one.name: one for one in draw_steps(records[:29])}["tokens"]
    assert [line.name for line in short.lines] == ["tokens"]


def test_thin_keeps_the_mean_and_the_last_step():
    points = [(step, float(step)) for step in range(1, 2 * MOST_POINTS + 1)]
    thinned = thin(points)
    assert len(thinned) == MOST_POINTS and thinned[0] == (2, 1.5) and thinned[-1][0] == 800
    assert thin(points[:3]) == points[:3]


def test_smooth_keeps_the_ends():
    assert smooth([(0, 0.0), (1, 3.0), (2, 0.0)]) == [(0, 0.0), (1, 1.0), (2, 0.0)]
