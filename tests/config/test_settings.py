import dataclasses
import json

import pytest
from ml_collections import ConfigDict

from halos_jax import config as config_lib
from halos_jax.config import Config, ConfigError, freeze


def sft_config() -> ConfigDict:
    config = config_lib.default()
    config.task = "sft"
    config.model.path = "model"
    config.data.train = "train.jsonl"
    return config


def errors_of(config, **kwargs) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        freeze(config, **kwargs)
    header, *lines = str(caught.value).splitlines()
    assert header.startswith(f"{len(lines)} error") and all(line[:4] == "  - " for line in lines)
    return [line[4:] for line in lines]


def test_default_freeze_to_dict_round_trip():
    frozen = freeze(sft_config())
    plain = config_lib.to_dict(frozen)
    assert json.loads(json.dumps(plain)) == plain
    assert freeze(plain) == frozen
    assert dataclasses.replace(frozen, task="online", data=Config().data, model=Config().model) == (
        Config()
    )


def test_frozen_to_the_bottom():
    config = sft_config()
    frozen = freeze(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        frozen.seed = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        frozen.train.batch_size = 1
    with pytest.raises(TypeError):
        frozen.loss["name"] = "sft"
    config.loss.name = "sft"
    assert frozen.loss["name"] == "dpo"


def test_all_errors_come_together():
    config = sft_config()
    config.train.bach_size = 3  # unknown
    config.model.remat = "fulll"  # no such choice; what follows is well typed but impossible
    config.model.path = ""
    config.optimizer.warmup_fraction = 2.0
    lines = errors_of(
        config,
        errors=["train.epochs: got 'q', allowed: an integer"],
        checks=[lambda frozen: [f"loss: says the check of {frozen.task}"]],
    )
    assert [line.partition(":")[0] for line in lines] == [
        "train.epochs",
        "model.remat",
        "train.bach_size",
        "optimizer.warmup_fraction",
        "model.path",
        "loss",
    ]
    assert "did you mean 'train.batch_size'?" in lines[2]


def test_a_check_may_raise_a_config_error():
    def check(frozen):
        raise ConfigError("mesh: no such devices")

    assert errors_of(sft_config(), checks=[check]) == ["mesh: no such devices"]


def test_a_bad_field_is_reported_once():
    config = sft_config().to_dict()
    config["model"]["path"] = 3
    assert errors_of(config) == ["model.path: got 3, allowed: a string"]
    config["task"] = "stf"
    lines = errors_of(config)
    assert len(lines) == 2 and lines[0].startswith("task: got 'stf', allowed: 'online', 'sft'")


def pipeline_config() -> ConfigDict:
    config = config_lib.default()
    config.task, config.workdir = "pipeline", "runs/p"
    config.loss.beta = 0.3
    config.pipeline.tasks = ("toy_data", "sft", "align")
    config.pipeline.overrides = {
        "sft": {
            "model": {"path": "{workdir}/toy_data/base", "random_init": True},
            "data": {"train": "{workdir}/toy_data/sft.jsonl"},
            "loss": {"name": "sft"},
        },
        "align": {"model": {"path": "{workdir}/sft/final"}, "data": {"train": "pairs.jsonl"}},
    }
    return config


def test_a_pipeline_is_expanded_into_its_stages():
    toy, sft, align = config_lib.expand_pipeline(freeze(pipeline_config()))
    assert [stage.task for stage in (toy, sft, align)] == ["toy_data", "sft", "align"]
    assert sft.workdir == "runs/p/sft"
    assert sft.model.path == "runs/p/toy_data/base" and sft.model.random_init
    assert sft.data.train == "runs/p/toy_data/sft.jsonl"
    assert dict(sft.loss) == {"name": "sft"}
    assert dict(align.loss) == {"name": "dpo", "beta": 0.3}
    assert toy.pipeline == Config().pipeline
    assert freeze(config_lib.to_dict(sft)) == sft


def test_only_the_last_model_of_a_pipeline_is_handed_on():
    """What lies between the stages is rounded to nobody's dtype, and is not pushed."""
    config = pipeline_config()
    config.pipeline.tasks = ("toy_data", "sft", "align", "eval")
    reward = {"kind": "function", "function": "a:b"}
    others = {"data": {"eval": "x"}, "model": {"path": "m"}}
    config.pipeline.overrides.eval = {"reward": reward, **others}
    config.export.push_to_hub = "me/x"
    _, sft, align, _ = config_lib.expand_pipeline(freeze(config))
    assert (sft.export.dtype, sft.export.push_to_hub) == ("params", "")
    assert (align.export.dtype, align.export.push_to_hub) == ("auto", "me/x")
    config.export.dtype = "bfloat16"
    config.pipeline.overrides.sft.export = {"push_to_hub": "me/sft"}
    _, sft, *_ = config_lib.expand_pipeline(freeze(config))
    assert (sft.export.dtype, sft.export.push_to_hub) == ("bfloat16", "me/sft")


def test_the_stages_of_a_pipeline_are_checked_before_any_runs():
    config = pipeline_config()
    config.pipeline.overrides.sft.data = {"train": ""}
    config.pipeline.overrides.align.model.pth = "x"
    config.pipeline.overrides.onlin = {"seed": 1}
    config.pipeline.tasks = ("toy_data", "sft", "align", "stf", "sft")
    config.train.batch_size = 0
    lines = errors_of(config)
    joined = "\n".join(lines)
    for expected in (
        "pipeline.tasks: got 'stf', allowed: online, sft",
        "pipeline.tasks: got 'sft' twice",
        "pipeline.overrides.onlin: unknown task, allowed: online",
        "pipeline.overrides.sft: data.train: got ''",
        "pipeline.overrides.align: model.pth: unknown field; did you mean 'model.path'?",
    ):
        assert expected in joined
    assert sum("train.batch_size: got 0" in line for line in lines) == 1


def test_an_empty_pipeline_and_a_flat_override_are_refused():
    config = config_lib.default()
    config.task = "pipeline"
    config.pipeline.overrides = {"sft": 3}
    lines = errors_of(config)
    assert lines[0] == "pipeline.tasks: got (), allowed: one task or more"
    assert "pipeline.overrides.sft: got 3, allowed: sections of fields" in lines


def test_a_section_made_by_hand_is_checked_by_type_and_bounds_alone():
    config_lib.check_fields(Config())  # without a model or data, which a task would need
    bad = Config(
        sampling=config_lib.SamplingConfig(top_p=1.5),
        feedback=config_lib.FeedbackConfig(type="pairwis"),
    )
    with pytest.raises(ConfigError) as caught:
        config_lib.check_fields(bad)
    header, first, second = str(caught.value).splitlines()
    assert header.startswith("2 errors")
    assert first.startswith("  - feedback.type: got 'pairwis', allowed: 'pairwise'")
    assert second.startswith("  - sampling.top_p: got 1.5, allowed: above 0")


def test_sections_may_be_plain_dicts():
    train = config_lib.TrainConfig(batch_size=4)
    assert config_lib.complete(Config(train={"batch_size": 4})) == Config(train=train)
    assert config_lib.check_fields(Config(train={"batch_size": 4})) == Config(train=train)
    wrong = Config(train=config_lib.TrainConfig(epochs="x"))
    assert config_lib.complete(wrong) is wrong  # its sections are typed: nothing to be done
    with pytest.raises(ConfigError, match=r"train\.epochs: got 'x', allowed: an integer"):
        config_lib.complete(Config(train={"epochs": "x"}))


def test_what_is_no_config_is_named():
    with pytest.raises(ConfigError, match="config: got int, allowed: what a preset returns"):
        freeze(3)
    for function in (config_lib.check_fields, config_lib.complete):
        with pytest.raises(ConfigError, match="config: got dict, allowed: a Config"):
            function({})


def test_a_path_stands_for_its_text(tmp_path):
    config = sft_config()
    config.workdir = tmp_path
    frozen = freeze(config)
    assert frozen.workdir == str(tmp_path)
    again = dataclasses.replace(frozen, workdir=tmp_path)
    assert config_lib.to_dict(again)["workdir"] == str(tmp_path)
