"""The second policy of an evaluation."""

import dataclasses

import jax
import numpy as np
import pytest

from halos_jax.checkpoints.failures import CheckpointError
from halos_jax.config import Config, ConfigError, EvalConfig, LoraConfig, ModelConfig
from halos_jax.policies import against
from halos_jax.policies.policy import Policy, find_policy, load_params, start_policy
from halos_jax.policies.source import Source
from tests.policies.test_source import make_run, params  # noqa: F401 - a fixture


def make_config(path, second, **fields) -> Config:
    model = ModelConfig(path=str(path), compute_dtype="float32")
    return Config(task="eval", model=model, eval=EvalConfig(against=str(second), **fields))


def test_a_policy_is_read_with_the_settings_of_the_first(toy, tmp_path, params, mesh1):  # noqa: F811
    run = make_run(toy, tmp_path / "run", params, steps=(1, 2))
    config = make_config(toy / "policy", run, against_checkpoint=1)
    first = find_policy(config.model)
    found = against.find_against(config, first)
    assert (found.source.path, found.source.checkpoint) == (str(run), 1)
    assert found.settings.compute_dtype == "float32"
    loaded, frozen = against.load_policy(found, mesh1)
    assert frozen is None
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b + 1), loaded, params)
    later = against.find_against(config, first, recorded="checkpoint 2")
    assert later.source.checkpoint == 2


def test_what_is_wrong_with_it_is_said_of_its_own_fields(toy, tmp_path, params):  # noqa: F811
    run = make_run(toy, tmp_path / "run")
    first = find_policy(ModelConfig(path=str(toy / "policy")))
    with pytest.raises(ConfigError, match=r"^eval\.against: .* neither a checkpoint nor"):
        against.find_against(make_config(toy / "policy", run), first)
    config = make_config(toy / "policy", toy / "policy", against_checkpoint=3)
    with pytest.raises(ConfigError, match=r"^eval\.against_checkpoint: got 3, but eval\.against="):
        against.find_against(config, first)
    other = make_run(toy, tmp_path / "other", params, steps=(1,))
    with pytest.raises(CheckpointError, match=r"got checkpoint 3, there are: \[1\]"):
        against.find_against(make_config(toy / "policy", other, against_checkpoint=3), first)
    with pytest.raises(ConfigError, match=r"eval\.against: got 'sft', but .* not known"):
        against.find_against(make_config(toy / "policy", "sft"), first)


def test_sft_is_what_the_run_started_from(toy, tmp_path, mesh1, monkeypatch):
    """With an adapter of its own, that adapter belongs to it."""
    model = ModelConfig(path=str(toy / "policy"), compute_dtype="float32")
    run = Config(workdir=str(tmp_path), model=model, lora=LoraConfig(path="adapter"), seed=11)
    source = Source(str(tmp_path), model, tmp_path, run)
    first = dataclasses.replace(start_policy(Config(model=model)), source=source)
    found = against.find_against(make_config(tmp_path, "sft"), first)
    assert (found.source.name, found.lora.path, found.seed) == ("sft", "adapter", 11)
    assert found.base_dtype == "float32"
    asked: list[Policy] = []
    monkeypatch.setattr(against, "load_frozen", lambda policy, mesh: asked.append(policy) or "base")
    monkeypatch.setattr(against, "load_start", lambda policy, mesh, frozen: f"start of {frozen}")
    assert against.load_policy(found, mesh1) == ("start of base", "base") and asked == [found]
    monkeypatch.undo()
    plain = dataclasses.replace(found, lora=LoraConfig())
    ours, none = against.load_policy(plain, mesh1)
    assert none is None
    jax.tree.map(np.testing.assert_array_equal, ours, load_params(plain, mesh1))
