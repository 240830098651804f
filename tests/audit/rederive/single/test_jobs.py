"""Tasks made again; whole tasks are in tests/e2e."""

import json
from types import SimpleNamespace

import pytest

from halos_jax.audit.opened import Opened
from halos_jax.audit.rederive.compare import EXACT, Tolerance
from halos_jax.audit.rederive.single import jobs
from halos_jax.config import Config, EvalConfig, ModelConfig, RewardConfig, SamplingConfig
from halos_jax.data.records import formats as records
from halos_jax.types import Prompt, Sample, Turn
from halos_jax.workdir.changes import History
from halos_jax.workdir.ledger import no_ledger
from halos_jax.workdir.manifests import Manifest

CONFIG = Config(task="sample", sampling=SamplingConfig(shard_prompts=2, round=3))
PROMPTS = [Prompt(str(number), (Turn("user", "a"),)) for number in range(3)]
SAMPLES = [
    Sample(one, at, "x", (1,), (2,), "stop", reward=0.5) for one in PROMPTS for at in range(2)
]


def test_a_task_under_way_is_not_made_again(tmp_path):
    opened = Opened("sample", tmp_path, History(CONFIG), CONFIG, no_ledger(tmp_path), ())
    (found,) = jobs.check_job(opened, Manifest(0, task="sample", stages=("sample",)))
    assert (found.outcome, found.why) == ("not checked", "score is not done yet")


@pytest.mark.parametrize(("task", "round"), [("sample", 3), ("eval", 0)])
def test_answers_are_read_with_the_keys_that_drew_them(tmp_path, task, round):
    rows = [records.sample_to_record(one) | {"scores": {"a": 1.0}} for one in SAMPLES]
    records.write_records(tmp_path / "answers.jsonl", rows)
    draws = jobs._read_draws(tmp_path / "answers.jsonl", CONFIG, task)
    assert (draws.round, draws.prompts, draws.samples) == (round, PROMPTS, SAMPLES)


@pytest.mark.parametrize(
    ("made", "is_same", "outcome"),
    [(1.0, True, "passed"), (1.25, True, "differs"), (1.25, False, "passed")],
)
def test_files_are_compared_by_bytes_and_then_by_their_numbers(tmp_path, made, is_same, outcome):
    paths = [tmp_path / name for name in ("scores.jsonl", "made.jsonl")]
    for path, value in zip(paths, (1.0, made), strict=True):
        path.write_text(json.dumps({"reward": value}) + "\n")
    found = jobs._compare_files(*paths, 1, Tolerance(absolute=0.5), is_same=is_same)
    assert (found.check, found.outcome, found.amount) == ("scores.jsonl", outcome, "1 records")


def test_a_file_that_is_not_made_is_a_difference(tmp_path):
    (tmp_path / "best.jsonl").touch()
    found = jobs._compare_files(tmp_path / "best.jsonl", tmp_path / "no", 1, EXACT, is_same=False)
    assert (found.outcome, found.why) == ("differs", "it is not there, or was not made")


def test_a_loss_may_round_otherwise_where_a_function_may_not():
    function = Config(task="eval", reward=RewardConfig(kind="function"))
    assert jobs._find_close(function, "eval") == EXACT
    loss = Config(
        task="eval",
        eval=EvalConfig(on="feedback"),
        model=ModelConfig(compute_dtype="float32"),
        reward=RewardConfig(kind="function"),
    )
    assert jobs._find_close(loss, "eval") == jobs.steps.find_close("float32")


@pytest.mark.parametrize(
    ("again", "made", "outcomes"),
    [
        ({"a": "1" * 32, "b": "2" * 32}, "", ["passed"]),
        ({"a": "1" * 32, "b": "3" * 32}, "", ["differs"]),
        ({"a": "1" * 32, "b": "3" * 32}, "of another device", ["not checked"]),
        ({"a": "1" * 32}, "", ["not checked", "passed"]),
        ({"a": "3" * 32}, "", ["not checked", "differs"]),
        ({}, "", ["not checked"]),
    ],
)
def test_who_drew_samples_is_compared_where_it_is_known(monkeypatch, again, made, outcomes):
    monkeypatch.setattr(jobs.same, "explain_made", lambda *_: made)
    manifest = Manifest(0, sampled_by={"a": "1" * 32, "b": "2" * 32})
    workspace = SimpleNamespace(config=CONFIG)
    found = list(jobs._compare_marks(workspace, manifest, again))
    assert [one.outcome for one in found] == outcomes
    assert list(jobs._compare_marks(workspace, Manifest(0), again)) == []
