"""The charts with a point for each round."""

import dataclasses

import pytest

from halos_jax.report.recorded import read_run
from halos_jax.report.round_charts import (
    begins_with,
    draw_rounds,
    draw_times,
    first_known,
    follow,
    list_marks,
    list_scorers,
)
from halos_jax.workdir.manifests import Manifest
from tests.report.written_runs import estimate, write_run


@pytest.fixture
def run(tmp_path):
    return read_run(write_run(tmp_path, guard__max_kl=2.0))


def test_a_line_has_the_points_and_the_intervals_that_are_known():
    rounds = [
        Manifest(0, metrics=estimate("reward_eval", 0.5, 0.25)),
        Manifest(1, metrics={"reward_eval": float("nan")}),
        Manifest(2, metrics={"reward_eval": 1.0}),
    ]
    line = follow(rounds, "reward_eval", "held-out", shift=-1)
    assert (line.x, line.y) == ((-1, 1), (0.5, 1.0))
    assert (line.low, line.high) == ((0.25, None), (0.75, None))
    assert follow(rounds[2:], "reward_eval", "held-out").low == ()
    assert follow(rounds, "absent", "none").x == ()


def test_the_charts_of_a_run(run):
    charts = {one.name: one for one in draw_rounds(run)}
    assert charts["reward"].lines[0].y == (0.0, 0.5, 1.0)
    assert charts["win_rate"].levels == ((0.5, "no better"),)
    assert charts["kl"].levels == ((2.0, "guard.max_kl"),)
    # Measured on the samples of rounds 1 and 2: of the policies after rounds 0 and 1.
    assert (charts["kl"].lines[0].x, charts["kl"].lines[0].y) == ((0, 1), (0.0, 0.5))
    assert charts["margin"].lines[0].x == (1, 2)


def test_reward_against_kl_is_of_the_same_policy(run):
    (line,) = next(one for one in draw_rounds(run) if one.name == "frontier").lines
    assert (line.x, line.y, line.notes) == ((0.0, 0.5), (0.0, 0.5), ("round 0", "round 1"))


def test_after_the_guard_went_back_kl_is_that_of_the_round_gone_back_to(run):
    """Round 3 samples from the policy of round 1, which has had its point."""
    back = dataclasses.replace(run.rounds[2], round=3, policy="round-0001")
    back = dataclasses.replace(back, metrics=estimate("kl_sft", 9.0, 0.1))
    charts = draw_rounds(dataclasses.replace(run, rounds=(*run.rounds, back)))
    (line,) = next(one for one in charts if one.name == "frontier").lines
    assert line.x == (0.0, 0.5)
    assert [begins_with(one) for one in (run.rounds[1], run.rounds[2], back)] == [0, 1, 1]


def test_the_best_round_and_the_ways_back_are_marked(run):
    verdict = {"action": "retry", "to": 0, "rate_factor": 0.5, "broken": []}
    decisions = {"best": {"round": 1, "reward": 1.0, "of": 3}, "guard": verdict}
    last = dataclasses.replace(run.rounds[2], decisions=decisions)
    rounds = (*run.rounds[:2], last)
    assert list_marks(rounds) == [(1, "best"), (2, "back to SFT")]
    again = dataclasses.replace(rounds[1], decisions={"guard": verdict})
    assert list_marks((rounds[0], again, last))[0] == (1, "best, back to SFT")
    assert list_marks(run.rounds) == []  # the last round is the best
    charts = draw_rounds(dataclasses.replace(run, rounds=rounds))
    assert [len(one.marks) for one in charts if one.name in ("reward", "frontier")] == [2, 0]


def test_bounds_that_are_off_are_no_levels(tmp_path):
    run = read_run(write_run(tmp_path, guard__max_kl=0.0, guard__min_margin="off"))
    charts = {one.name: one for one in draw_rounds(run)}
    assert charts["kl"].levels == () and charts["margin"].levels == ((0.0, "as SFT"),)


def test_scorers_are_those_of_the_metrics():
    metrics = {**estimate("reward_eval", 1, 1), **estimate("reward_eval/rule", 1, 1)}
    assert list_scorers([Manifest(0, metrics=metrics)]) == ["rule"]
    assert first_known([Manifest(0, metrics={"b": 1})], "a", "b") == "b"
    assert first_known([], "a", "b") == "a"


def test_times_are_a_bar_a_stage_in_a_unit_that_suits():
    times = [
        {"round": 1, "stage": "sample", "start": 0.0, "end": 120.0},
        {"round": 1, "stage": "train", "start": 120.0, "end": 900.0},
    ]
    chart = draw_times(times)
    assert chart.y == "minutes" and chart.lines[1].y == (13.0,)
    assert draw_times(times[:1]).y == "seconds" and draw_times([]).lines == ()
