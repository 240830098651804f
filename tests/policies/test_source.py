"""A path that is a run's workdir stands for the model that the run has made."""

import contextlib
import dataclasses
import json

import jax
import numpy as np
import pytest

from halos_jax.checkpoints.failures import CheckpointError
from halos_jax.checkpoints.store import open_checkpoints
from halos_jax.config import Config, ConfigError, EvalConfig, ModelConfig, RewardConfig, to_dict
from halos_jax.config.rewards import ScorerConfig
from halos_jax.data.chat.loading import load_renderer
from halos_jax.models import spec
from halos_jax.models.files import hf
from halos_jax.policies import source
from halos_jax.policies.policy import find_policy, load_params
from tests.reward_parts import with_parts


@pytest.fixture
def params(toy):
    config = hf.load_decoder_config(str(toy / "policy"), ModelConfig(compute_dtype="float32"))
    return spec.init_params(jax.random.key(5), config)


def make_run(toy, workdir, params=None, *, steps=(), task="online"):
    """Make a workdir with a checkpoint, of params that grow, for each of `steps`."""
    workdir.mkdir(parents=True)
    model = ModelConfig(path=str(toy / "policy"), added_tokens=())
    config = Config(task=task, workdir=str(workdir), model=model)
    (workdir / "config.json").write_text(json.dumps(to_dict(config)))
    if steps:
        checkpoints = open_checkpoints(workdir / "checkpoints", keep=9)
        for step in steps:
            state = {"params": jax.tree.map(lambda leaf, n=step: leaf + n, params), "step": step}
            state["step"] = np.int32(step)
            checkpoints.save(step, state, {"in_stage": False, "round": step})
        checkpoints.close()
    return workdir


def test_a_workdir_is_told_from_a_model(toy, tmp_path):
    run = make_run(toy, tmp_path / "run")
    assert source.is_workdir(str(run))
    for path in ("", "org/model", str(toy / "policy"), str(tmp_path), str(tmp_path / "missing")):
        assert not source.is_workdir(path)


def test_training_starts_from_the_final_model_of_a_run(toy, tmp_path, caplog):
    caplog.set_level("INFO")
    run = make_run(toy, tmp_path / "run")
    config = Config(model=ModelConfig(path=str(run)), reward=RewardConfig(path="org/reward"))
    with pytest.raises(ConfigError, match=r"model\.path: .* has not finished.*task=export"):
        source.use_final(config)
    (run / "final").mkdir()
    found = source.use_final(config)
    assert found.model.path == str(run / "final") and found.reward.path == "org/reward"
    assert f"model.path: {run} is the workdir of a run: using {run / 'final'}" in caplog.text
    assert source.use_final(found) == found
    parts = {"helpful": {"path": str(run), "weight": 2.0}, "short": {"kind": "function"}}
    found = source.use_final(Config(reward=with_parts(RewardConfig(path="org/reward"), parts)))
    helpful, short = found.reward.parts["helpful"], found.reward.parts["short"]
    assert (helpful.path, helpful.weight) == (str(run / "final"), 2.0)
    assert (short.path, short.kind) == ("org/reward", "function")
    scorers = {"gold": ScorerConfig(path=str(run)), "rule": ScorerConfig(kind="function")}
    found = source.use_final(Config(eval=EvalConfig(scorers=scorers))).eval.scorers
    assert (found["gold"].path, found["rule"].path) == (str(run / "final"), "")
    # A task that has no use for them does not look at them either.
    (run / "final").rmdir()
    for task, is_refused in (("sft", False), ("eval", True)):
        config = Config(task=task, eval=EvalConfig(scorers=scorers))
        with pytest.raises(ConfigError) if is_refused else contextlib.nullcontext():
            assert source.use_final(config).eval.scorers == scorers
        config = Config(task=task, reward=RewardConfig(path=str(run)))
        with pytest.raises(ConfigError) if is_refused else contextlib.nullcontext():
            assert source.use_final(config).reward.path == str(run)


def test_a_checkpoint_is_chosen_by_id_or_is_the_newest(toy, tmp_path, params, mesh1):
    run = make_run(toy, tmp_path / "run", params, steps=(2, 5))
    settings = ModelConfig(path=str(run), compute_dtype="float32", remat="none")
    before = sorted((run / "checkpoints").rglob("*"))
    for wanted, recorded, step in (("auto", "", 5), (1, "", 2), ("auto", "checkpoint 1", 2)):
        asked = dataclasses.replace(settings, checkpoint=wanted)
        found = source.find_source(asked, recorded=recorded)
        assert found.name == f"checkpoint {1 if step == 2 else 2}"
        assert found.settings.path == str(toy / "policy")
        assert (found.settings.compute_dtype, found.settings.remat) == ("float32", "none")
        policy = find_policy(asked, recorded=recorded)
        assert policy.source == found
        assert policy.renderer.fingerprint == load_renderer(str(toy / "policy")).fingerprint
        loaded = load_params(policy, mesh1)
        jax.tree.map(lambda a, b, n=step: np.testing.assert_array_equal(a, b + n), loaded, params)
    assert sorted((run / "checkpoints").rglob("*")) == before
    with pytest.raises(CheckpointError, match=r"got checkpoint 7, there are: \[1, 2\]"):
        source.find_source(dataclasses.replace(settings, checkpoint=7))
    # A run that is complete is its final model, unless a checkpoint is asked for.
    (run / "final").mkdir()
    assert source.find_source(settings).settings.path == str(run / "final")
    assert source.find_source(settings).name == "final"
    assert source.find_source(dataclasses.replace(settings, checkpoint=1)).name == "checkpoint 1"


def test_what_has_no_checkpoint_is_refused(toy, tmp_path):
    run = make_run(toy, tmp_path / "run")
    with pytest.raises(ConfigError, match="neither a checkpoint nor final/ yet"):
        source.find_source(ModelConfig(path=str(run)))
    assert not (run / "checkpoints").exists()
    with pytest.raises(ConfigError, match=r"model\.checkpoint: got 3, but model\.path="):
        source.find_source(ModelConfig(path=str(toy / "policy"), checkpoint=3))
    assert source.find_source(ModelConfig(path=str(toy / "policy"))).name == "model"


def test_a_config_of_another_version_is_explained(toy, tmp_path):
    run = make_run(toy, tmp_path / "run")
    plain = json.loads((run / "config.json").read_text()) | {"sampler": {}}
    (run / "config.json").write_text(json.dumps(plain))
    with pytest.raises(ConfigError, match="is not of this version: sampler: unknown field"):
        source.read_config(run)


def test_the_folder_of_a_round_is_its_export_or_its_checkpoint(toy, tmp_path, params):
    run = make_run(toy, tmp_path / "run", params, steps=(1, 2))
    folders = {round: run / "rounds" / f"{round:04d}" for round in (0, 1, 2, 3)}
    for folder in folders.values():
        folder.mkdir(parents=True)
        assert source.is_round(str(folder))
        assert source.find_workdir(str(folder)) == run == source.find_workdir(str(run))
    assert source.find_workdir(str(toy / "policy")) is None and source.find_workdir("") is None
    assert not source.is_round(str(run)) and not source.is_round(str(tmp_path / "rounds" / "0001"))
    found = source.find_source(ModelConfig(path=str(folders[1])))
    assert (found.name, found.position.round) == ("checkpoint 1", 1)
    assert found.settings.path == str(toy / "policy")
    (folders[1] / "model").mkdir()
    model = source.find_source(ModelConfig(path=str(folders[1])))
    assert (model.name, model.settings.path) == ("round 1", str(folders[1] / "model"))
    assert source.find_folder(str(folders[1])) == folders[1] / "model"
    # A job that has begun with the checkpoint goes on with it.
    settings = ModelConfig(path=str(folders[1]))
    assert source.find_source(settings, recorded="checkpoint 1").checkpoint == 1
    for round, line in ((0, "round 0, whose policy the run"), (3, "neither a model/ nor a check")):
        with pytest.raises(ConfigError, match=line):
            source.find_source(ModelConfig(path=str(folders[round])))
    with pytest.raises(ConfigError, match=r"model\.checkpoint: got 1, but model\.path="):
        source.find_source(ModelConfig(path=str(folders[2]), checkpoint=1))


def test_a_run_starts_from_its_model_computed_as_asked(toy, tmp_path):
    run = source.read_config(make_run(toy, tmp_path / "run"))
    found = source.find_start(ModelConfig(path="x", compute_dtype="float32"), run)
    assert (found.name, found.path, found.workdir) == ("sft", str(toy / "policy"), tmp_path / "run")
    assert found.settings.compute_dtype == "float32" and found.position.round == 0
