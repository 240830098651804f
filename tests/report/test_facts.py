"""What a page says of a run in words and tables."""

import dataclasses
import json

import pytest

from halos_jax.report import facts
from halos_jax.report.facts import (
    describe_state,
    list_columns,
    list_commands,
    list_config,
    list_environment,
    list_facts,
    list_remarks,
    show_seconds,
    show_time,
)
from halos_jax.report.recorded import read_run
from halos_jax.workdir.manifests import Manifest, save_manifest
from tests.report.written_runs import write_config, write_lines, write_round, write_run


def test_the_state_says_how_far_a_run_is(tmp_path):
    sizes = {"rounds__total_prompts": 40, "rounds__prompts_per_round": 10}
    write_run(tmp_path, **sizes)
    assert describe_state(read_run(tmp_path)).endswith("after round 2 of 4")
    write_round(tmp_path, 3, stages=("sample", "score"))
    assert describe_state(read_run(tmp_path)).endswith("in round 3 of 4, stage feedback")
    write_round(tmp_path, 3)
    (tmp_path / "final").mkdir()
    assert describe_state(read_run(tmp_path)) == "complete"
    write_round(tmp_path, 4, decisions={"guard": {"action": "stop", "broken": []}})
    assert describe_state(read_run(tmp_path)) == "ended by the guard after round 4"


def test_the_state_of_tasks_without_rounds(tmp_path):
    write_config(tmp_path / "sft", task="sft")
    write_lines(tmp_path / "sft" / "metrics.jsonl", [{"step": 7, "loss/train": 1.0}])
    assert describe_state(read_run(tmp_path / "sft")).endswith("after step 7")
    write_config(tmp_path / "eval", task="eval")
    save_manifest(tmp_path / "eval", Manifest(0, task="eval"))
    assert describe_state(read_run(tmp_path / "eval")).endswith("next stage evaluate")


def test_the_table_of_rounds_has_the_columns_that_have_a_value(tmp_path):
    columns = {one.name: one.cells for one in list_columns(read_run(write_run(tmp_path)))}
    assert columns["held-out reward"] == ("0.000 ±0.100", "0.500 ±0.100", "1.000 ±0.100")
    assert columns["win rate"] == ("–", "75%", "75%")
    assert columns["KL"] == ("–", "0.00", "0.50") and columns["prompts"] == ("–", "10", "10")
    assert columns["time"] == ("–", "2.0 s", "–") and columns["note"] == ("–", "–", "best")
    assert "ties" not in columns and "test reward" not in columns


def test_facts_name_the_run(tmp_path):
    facts = dict(list_facts(read_run(write_run(tmp_path, loss={"name": "dpo", "beta": 0.2}))))
    assert facts["loss"] == "dpo (beta 0.2)" and facts["learning rate"] == "2e-06"
    assert facts["rounds"].endswith("4 samples each")
    sft = write_config(tmp_path / "sft", task="sft", loss={"name": "dpo", "beta": 0.2})
    assert dict(list_facts(read_run(sft)))["loss"] == "sft"


def test_remarks_have_advice_verdicts_changes_and_warnings(tmp_path):
    write_run(tmp_path)
    broken = {"bound": "guard.max_kl", "limit": 1.0, "rounds": [3], "values": [2.0]}
    write_round(
        tmp_path,
        3,
        metrics={"tied_share": 0.9},
        decisions={"guard": {"action": "warn", "broken": [broken]}},
    )
    plain = json.loads((tmp_path / "config.json").read_text())
    plain["segments"] = [{"round": 2, "step": 5, "changed": {"optimizer.beta1": [0.9, 0.8]}}]
    (tmp_path / "config.json").write_text(json.dumps(plain))
    write_lines(tmp_path / "journal.jsonl", [{"kind": "warning", "time": 0.0, "text": "careful"}])
    remarks = list_remarks(read_run(tmp_path))
    found = {one.level: one for one in remarks if one.level != "advice"}
    advice = [one for one in remarks if "equal reward" in one.text]
    assert [(one.level, one.where) for one in advice] == [("advice", "round 3")]
    assert found["guard"].text.startswith("round 3 is beyond guard.max_kl=1")
    assert (found["change"].where, found["change"].text) == (
        "round 2",
        "optimizer.beta1: 0.9 -> 0.8",
    )
    assert (found["warning"].where, found["warning"].text) == ("1970-01-01 00:00 UTC", "careful")


def test_config_shows_what_is_not_at_its_default_first(tmp_path):
    rows = list_config(read_run(write_config(tmp_path, seed=3)))
    assert ("seed", "3", False) in rows and ("train.epochs", "1", True) in rows
    assert [one[2] for one in rows] == sorted(one[2] for one in rows)
    assert [one[0] for one in rows if not one[2]] == ["seed", "workdir"]


def test_environment_and_commands_are_those_of_the_last_start(tmp_path):
    run = read_run(write_run(tmp_path))
    assert list_environment(run) == [] and len(list_commands(run)) == 2
    starts = [
        {"kind": "start", "time": 0, "program": version, "command": f"python -m x{version}"}
        for version in ("1", "2")
    ]
    write_lines(tmp_path / "journal.jsonl", starts)
    executions = [
        {"round": 0, "stage": "train", "execution": {"device": name, "versions": {"jax": name}}}
        for name in ("a", "b")
    ]
    executions[1]["execution"]["flags"] = {"XLA_FLAGS": ["--a", "--b"]}
    write_lines(tmp_path / "executions.jsonl", executions)
    run = read_run(tmp_path)
    assert dict(list_environment(run)) == {
        "device": "b",
        "jax": "b",
        "flags.XLA_FLAGS": "--a, --b",
        "starts": "2, the last 1970-01-01 00:00 UTC",
    }
    assert list_commands(run)[0][1] == "python -m x2"
    assert list_commands(dataclasses.replace(run, workdir=tmp_path / "a b"))[1][1].startswith(
        f"python -m halos_jax.main --config='{tmp_path}/a b/config.json'"
    )


@pytest.mark.parametrize(
    "seconds, text", [(None, ""), (2.04, "2.0 s"), (150, "2 min"), (7200, "2.0 h")]
)
def test_times_have_a_unit_that_suits(seconds, text):
    assert show_seconds(seconds) == text


def test_a_time_that_is_none_is_not_shown():
    assert show_time("soon") == "" and show_time(True) == ""


def test_an_interval_that_ends_at_zero_is_shown():
    rewards = {"reward_eval": -0.25, "reward_eval/low": -0.5, "reward_eval/high": 0.0}
    assert facts._estimate("reward_eval")(Manifest(0, metrics=rewards)) == "-0.250 ±0.250"
