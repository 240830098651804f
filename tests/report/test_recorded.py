"""A run as its workdir has it."""

import json

import pytest

from halos_jax.config import ConfigError
from halos_jax.report.recorded import read_lines, read_run
from halos_jax.workdir.manifests import Manifest, round_folder, save_manifest
from tests.report.written_runs import write_config, write_round, write_run


def test_all_that_a_workdir_says_is_read(tmp_path):
    run = read_run(write_run(tmp_path / "first", seed=7))
    assert (run.name, run.plain["seed"], run.config.seed) == ("first", 7, 7)
    assert [one.round for one in run.rounds] == [0, 1, 2] and run.task is None
    assert [one["loss/train"] for one in run.metrics] == pytest.approx([0.6, 0.5])
    assert run.times[0]["stage"] == "sample" and run.problems == ()
    assert [one.round for one in run.list_signs()] == [0, 1, 2]


def test_a_run_is_complete_once_its_last_round_and_its_export_are_there(tmp_path):
    write_run(tmp_path)
    assert not read_run(tmp_path).is_complete
    (tmp_path / "final").mkdir()
    assert read_run(tmp_path).is_complete
    write_round(tmp_path, 3, stages=("sample",))
    assert not read_run(tmp_path).is_complete


def test_a_task_without_rounds_is_complete_by_its_own_manifest(tmp_path):
    write_config(tmp_path / "eval", task="eval")
    save_manifest(tmp_path / "eval", Manifest(0, task="eval", stages=("evaluate",)))
    run = read_run(tmp_path / "eval")
    assert run.is_complete and run.rounds == ()
    assert run.name == f"{tmp_path.name}/eval"  # the folder above says which eval it is


def test_what_cannot_be_read_is_said_and_the_rest_is_there(tmp_path):
    write_run(tmp_path)
    plain = json.loads((tmp_path / "config.json").read_text())
    plain["optimizer"]["strange"] = 1
    (tmp_path / "config.json").write_text(json.dumps(plain))
    (round_folder(tmp_path, 2) / "manifest.json").write_text("{")
    (tmp_path / "metrics.jsonl").write_text("no json\n")
    run = read_run(tmp_path)
    assert run.config is None and run.list_signs() == []
    assert [one.round for one in run.rounds] == [0, 1] and run.metrics == ()
    said = "\n".join(run.problems)
    assert (
        "optimizer.strange" in said and "0002/manifest.json" in said and "metrics.jsonl:1" in said
    )


@pytest.mark.parametrize("text", [None, '{"model_type": "llama"}'])
def test_a_folder_without_a_run_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="allowed: the workdir of a run"):
        read_run(tmp_path)


def test_torn_lines_are_left_out(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n[2]\n{"a": 3}\n{"a": ')
    assert list(read_lines(path)) == [{"a": 1}, {"a": 3}]
    assert list(read_lines(tmp_path / "absent")) == []
