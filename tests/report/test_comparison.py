"""A page that compares runs."""

import dataclasses

import pytest

from halos_jax.config import ConfigError
from halos_jax.report.comparison import (
    compare_runs,
    list_differences,
    merge_charts,
    name_runs,
    sum_up,
)
from halos_jax.report.page import render
from halos_jax.report.recorded import read_run
from tests.report.written_runs import write_config, write_run


@pytest.fixture
def runs(tmp_path):
    first = write_run(tmp_path / "one", optimizer__learning_rate=1e-6)
    return [read_run(one) for one in (first, write_run(tmp_path / "two", seed=1))]


def test_every_chart_has_a_line_for_each_run(runs):
    charts = {one.name: one for one in merge_charts(runs, ["one", "two"])}
    assert [line.name for line in charts["reward"].lines] == ["one", "two"]
    assert charts["reward"].lines[0].y == (0.0, 0.5, 1.0) and "times" not in charts
    assert charts["length"].about.endswith("may favour long answers.")
    several = dataclasses.replace(
        runs[0].rounds[1], metrics={"tied_share": 0.1, "truncated_share": 1}
    )
    run = dataclasses.replace(runs[0], rounds=(runs[0].rounds[0], several))
    shares = next(one for one in merge_charts([run], ["one"]) if one.name == "shares")
    assert shares.about.endswith("Shown: cut.") and len(shares.lines) == 1


def test_a_line_that_is_smoothed_is_said_to_be(runs):
    steps = tuple({"step": step, "loss/train": 1.0} for step in range(30))
    run = dataclasses.replace(runs[0], metrics=steps)
    (loss,) = (one for one in merge_charts([run], ["one"]) if one.name == "loss")
    assert loss.about.endswith("Shown: training, smoothed.") and len(loss.lines) == 1


def test_only_fields_that_differ_are_listed(runs):
    assert list_differences(runs) == [
        ("optimizer.learning_rate", ["1e-06", "2e-06"]),
        ("seed", ["0", "1"]),
    ]


def test_defaults_of_one_loss_are_compared_too(tmp_path, runs):
    other = read_run(write_run(tmp_path / "three", loss={"name": "dpo", "beta": 0.5}))
    assert ("loss.beta", ["0.1", "0.1", "0.5"]) in list_differences([*runs, other])
    other = read_run(write_run(tmp_path / "four", loss={"name": "ipo"}))
    found = [line for line in list_differences([*runs, other]) if line[0].startswith("loss.")]
    assert found == [("loss.name", ["dpo", "dpo", "ipo"])]


def test_the_best_round_is_named_where_it_is_not_the_last(runs):
    columns = {one.name: one.cells for one in sum_up(runs, ["one", "two"])}
    assert columns["best"] == ("round 2, 1.000",) * 2 and columns["note"] == ("best", "best")
    first, last = runs[1].rounds[-2:]
    decisions = last.decisions | {"best": {"round": first.round, "reward": 2.0, "of": 3}}
    fell = dataclasses.replace(last, decisions=decisions)
    run = dataclasses.replace(runs[1], rounds=(*runs[1].rounds[:-1], fell))
    columns = {one.name: one.cells for one in sum_up([runs[0], run], ["one", "two"])}
    assert columns["best"] == ("round 2, 1.000", f"round {first.round}, 2.000")
    assert columns["note"] == ("best", "–")


def test_a_row_for_each_run_has_its_newest_values(runs):
    columns = {one.name: one.cells for one in sum_up(runs, ["one", "two"])}
    assert columns["run"] == ("one", "two") and columns["win rate"] == ("75%", "75%")
    assert columns["time"] == ("2.0 s", "2.0 s")


def test_samples_of_the_same_held_out_prompts_stand_side_by_side(runs):
    contents = compare_runs(runs)
    browser = contents.browsers["held_out"]
    assert browser.columns == ("round 0 (SFT)", "one, round 2 (best)", "two, round 2 (best)")
    assert [cell[0][1] for cell in browser.prompts[0]["cells"]] == [0.0, 1.0, 1.0]
    assert "What differs in their configs" in render(contents)


def test_a_run_without_rounds_is_compared_by_its_steps(tmp_path, runs):
    alone = read_run(write_config(tmp_path / "sft", task="sft"))
    contents = compare_runs([runs[0], alone])
    assert contents.browsers == {} and contents.values["overview"][0].cells[0] == "one"


def test_names_tell_runs_apart(tmp_path, runs):
    assert name_runs(runs) == ["one", "two"]
    others = [read_run(write_config(tmp_path / f"{name}/run")) for name in ("a", "b")]
    assert name_runs(others) == ["a/run", "b/run"]


def test_too_many_runs_are_refused(runs):
    with pytest.raises(ConfigError, match="got 10 runs"):
        compare_runs(runs * 5)


def test_a_run_is_not_compared_with_itself(runs):
    with pytest.raises(ConfigError, match=r"report\.workdirs: got .*/one twice, allowed: "):
        compare_runs([runs[0], runs[1], runs[0]])
