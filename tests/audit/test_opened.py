"""A workdir as its checks see it."""

import dataclasses
import json

import pytest

from halos_jax.audit.opened import list_places, list_stages, open_workdir
from halos_jax.config import Config, ConfigError, PipelineConfig
from halos_jax.storage import WorkdirError


def test_a_run_is_read_with_all_its_rounds(made):
    opened = made.open()
    assert opened.is_online and opened.is_finished and opened.problems == ()
    assert [place for place, _ in list_places(opened)] == ["round 0", "round 1", "round 2"]
    assert opened.folder(opened.manifests[2]) == made.workdir / "rounds" / "0002"
    assert opened.config.data == made.config.data
    assert [one.round for one in made.open(round=1).list_derived()] == [1]
    assert len(opened.list_derived()) == 3


def test_a_run_is_not_finished_before_its_final_or_after_it_was_extended(made):
    (made.workdir / "final").rename(made.workdir / "elsewhere")
    assert not made.open().is_finished
    (made.workdir / "elsewhere").rename(made.workdir / "final")
    segment = {"round": 2, "changed": {}, "exported": False}
    made.edit_json("config.json", lambda plain: plain.update(segments=[segment]))
    assert not made.open().is_finished


def test_what_cannot_be_read_is_a_problem_and_the_rest_is_read(made):
    made.edit("rounds/0001/manifest.json", lambda text: text.replace('"round"', '"rund"'))
    made.edit("ledger.jsonl", lambda text: text.replace('"size"', '"siez"', 1))
    opened = made.open()
    assert [one.round for one in opened.manifests] == [0, 2]
    assert "ledger.jsonl:1: not as the run wrote it" in opened.problems[0]
    assert "0001/manifest.json is not a readable manifest" in opened.problems[1]


def test_a_folder_without_a_run_is_refused(made, tmp_path):
    with pytest.raises(WorkdirError, match="holds no run"):
        open_workdir(dataclasses.replace(made.config, workdir=str(tmp_path)))
    made.edit_json("config.json", lambda plain: plain.update(sead=1))
    with pytest.raises(ConfigError, match="sead: unknown field"):
        made.open()
    (made.workdir / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(WorkdirError, match="is not the file that a run writes"):
        made.open()


def test_the_tasks_of_a_pipeline_have_workdirs_of_their_own():
    config = Config(task="pipeline", workdir="w", pipeline=PipelineConfig(tasks=("sft", "online")))
    assert [(one.task, one.workdir) for one in list_stages(config)] == [
        ("sft", "w/sft"),
        ("online", "w/online"),
    ]
    assert list_stages(Config()) == [Config()]


def test_a_manifest_in_the_folder_of_another_round_is_a_problem(made):
    made.edit("rounds/0001/manifest.json", lambda text: text.replace('"round": 1', '"round": 5', 1))
    (line,) = made.open().problems
    assert line.endswith("rounds/0001/manifest.json is the manifest of round 5")
