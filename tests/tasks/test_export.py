"""`task=export`: a checkpoint becomes a Hugging Face folder with the very same weights."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halos_jax.checkpoints.failures import CheckpointError
from halos_jax.checkpoints.store import read_checkpoints
from halos_jax.config import (
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    ExportConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
)
from halos_jax.models import spec
from halos_jax.models.files import hf
from halos_jax.policies import final, source
from halos_jax.tasks.export import run_export
from halos_jax.tasks.train import run_training
from halos_jax.workdir.interrupt import Interrupted, StopSignal


class StopAfter(StopSignal):
    """A signal that comes during a certain step."""

    def received(self, step):
        return step >= 3


@pytest.fixture(scope="module")
def stopped(toy, tmp_path_factory):
    """Return the workdir of an SFT run that was stopped after step 3, with checkpoints 1 and 2."""
    workdir = tmp_path_factory.mktemp("stopped")
    config = Config(
        task="sft",
        workdir=str(workdir),
        progress=False,
        model=ModelConfig(path=str(toy / "policy"), compute_dtype="float32", remat="none"),
        data=DataConfig(train=str(toy / "sft.jsonl")),
        sampling=SamplingConfig(max_prompt_length=12),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0),
        train=TrainConfig(batch_size=16, max_length=24, row_multiple=64),
        checkpoint=CheckpointConfig(every=2, keep=5),
    )
    with pytest.raises(Interrupted):
        run_training(config, StopAfter())
    return workdir


def make_config(source, workdir, *, checkpoint="auto", **export) -> Config:
    return Config(
        task="export",
        workdir=str(workdir),
        model=ModelConfig(path=str(source), checkpoint=checkpoint),
        export=ExportConfig(**export),
    )


def test_a_checkpoint_inside_a_stage_is_exported_as_it_is(stopped, toy, tmp_path, mesh1):
    decoder = hf.load_decoder_config(str(toy / "policy"))
    abstract = spec.abstract_params(decoder, mesh1)
    checkpoints = read_checkpoints(stopped / "checkpoints")
    for number, (checkpoint, save_id, step) in enumerate((("auto", 2, 3), (1, 1, 2))):
        assert checkpoints.read_round_state(save_id)["step"] == step
        config = make_config(stopped, tmp_path / str(number), checkpoint=checkpoint)
        run_export(config, StopSignal())
        folder = tmp_path / str(number) / "final"
        exported = hf.load_params(str(folder), hf.load_decoder_config(str(folder)), mesh1)
        expected = checkpoints.restore_params(abstract, save_id)
        jax.tree.map(np.testing.assert_array_equal, exported, expected)
    checkpoints.close()
    # The job's workdir stands for the model: it is exported again, as bfloat16, to a folder.
    output = tmp_path / "out" / "model"
    config = make_config(tmp_path / "1", tmp_path / "2", output=str(output), dtype="bfloat16")
    metrics = run_export(config, StopSignal())
    assert metrics == {"parameters": spec.count_params(decoder)}
    assert json.loads((output / "config.json").read_text())["torch_dtype"] == "bfloat16"
    half = hf.load_params(str(output), decoder, mesh1)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), expected)
    jax.tree.map(np.testing.assert_array_equal, half, rounded)
    # Done is done.
    before = (output / "model.safetensors").stat().st_mtime_ns
    assert run_export(config, StopSignal()) == metrics
    assert (output / "model.safetensors").stat().st_mtime_ns == before


def test_an_adapter_is_merged_into_the_base_that_its_run_has_drawn(stopped, toy, tmp_path, mesh1):
    plain = source.read_config(stopped)
    model = dataclasses.replace(plain.model, path=str(toy / "base"), random_init=True)
    lora = LoraConfig(rank=2, targets=("q_proj",))
    config = dataclasses.replace(plain, workdir=str(tmp_path / "run"), model=model, lora=lora)
    with pytest.raises(Interrupted):
        run_training(config, StopAfter())
    run_export(make_config(tmp_path / "run", tmp_path / "job"), StopSignal())
    decoder = hf.load_decoder_config(str(toy / "base"))
    drawn = hf.load_or_init_params(model, decoder, mesh1, config.seed)
    exported = hf.load_params(str(tmp_path / "job" / "final"), decoder, mesh1)
    adapted = [layers["layers"].pop("q") for layers in (exported, drawn)]
    jax.tree.map(np.testing.assert_array_equal, exported, drawn)
    assert not np.array_equal(*adapted)


def test_what_stands_there_is_not_replaced(stopped, tmp_path, monkeypatch):
    output = tmp_path / "mine"
    output.mkdir()
    config = make_config(stopped, tmp_path / "job", output=str(output))
    with pytest.raises(ConfigError, match=r"export\.output: .*mine exists already; allowed: a new"):
        run_export(config, StopSignal())
    output.rmdir()

    # Killed between the folder's appearing and the manifest: it is the job's own then.
    def export_and_die(*arguments, **options):
        original(*arguments, **options)
        raise KeyboardInterrupt

    original = final.export_policy
    monkeypatch.setattr(final, "export_policy", export_and_die)
    with pytest.raises(KeyboardInterrupt):
        run_export(config, StopSignal())
    monkeypatch.undo()
    assert (output / "config.json").exists()
    assert run_export(config, StopSignal())["parameters"] > 0


def test_checkpoints_that_are_not_there(stopped, toy, tmp_path):
    config = make_config(stopped, tmp_path / "job", checkpoint=9)
    with pytest.raises(CheckpointError, match=r"got checkpoint 9, there are: \[1, 2\]; choose one"):
        run_export(config, StopSignal())
    empty = dataclasses.replace(config, workdir=str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="neither a checkpoint nor final/ yet"):
        run_export(make_config(tmp_path / "job", tmp_path / "other"), StopSignal())
    with pytest.raises(ConfigError, match=r"model\.checkpoint: got 9, but model\.path"):
        model = dataclasses.replace(config.model, path=str(toy / "policy"))
        run_export(dataclasses.replace(empty, model=model), StopSignal())


def test_weights_that_are_drawn_are_drawn_by_the_seed(toy, tmp_path, monkeypatch):
    seen = []

    def export_policy(params, *rest, **options):
        seen.append(np.asarray(params["embed"]))
        raise NotImplementedError  # what follows is another test's

    monkeypatch.setattr(final, "export_policy", export_policy)
    for number, seed in enumerate((0, 9, 9)):
        config = make_config(toy / "base", tmp_path / str(number))
        model = dataclasses.replace(config.model, random_init=True)
        with pytest.raises(NotImplementedError):
            run_export(dataclasses.replace(config, seed=seed, model=model), StopSignal())
    assert (seen[1] == seen[2]).all() and (seen[0] != seen[1]).any()
