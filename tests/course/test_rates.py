"""Rates that are far from what suits a task are told, and runs that have learnt nothing."""

import pytest

from halos_jax.cli.presets import load_preset
from halos_jax.config import Config, LoraConfig, ModelConfig, OptimizerConfig
from halos_jax.course.rates import SUITED, check_rate, describe_standstill

SIZE = 500_000_000
ADAPTER = LoraConfig(rank=8)


def make(task="sft", rate=2e-6, loss=None, **sections):
    loss = {"name": loss or "dpo"}
    return Config(task=task, loss=loss, optimizer=OptimizerConfig(learning_rate=rate), **sections)


@pytest.mark.parametrize(
    "config, expected",
    [
        (make(), "2e-06 is low for loss 'sft' on all weights, where 8e-06 to 0.0002 are usual"),
        (make(rate=5e-6), "5e-06 is low for loss 'sft' on all weights"),
        (make("reward_model"), "2e-06 is low for loss 'bradley-terry' on all weights"),
        (make(lora=ADAPTER, rate=1e-5), "1e-05 is low for loss 'sft' on a LoRA adapter"),
        (make("online", lora=ADAPTER, rate=1e-6), "1e-06 is low for loss 'dpo' on a LoRA adapter"),
        (make("align", rate=1e-4), "0.0001 is high for loss 'dpo' on all weights, where 1e-07 to"),
        (make("online", 2e-5, "dapo"), "2e-05 is high for loss 'dapo' on all weights"),
        (make(rate=1e-3), "0.001 is high for loss 'sft' on all weights"),
    ],
)
def test_a_rate_that_is_far_off_is_told(config, expected):
    assert f"optimizer.learning_rate={expected}" in check_rate(config, SIZE)


@pytest.mark.parametrize(
    "config, size",
    [
        (make(rate=1e-5), SIZE),
        (make(rate=2e-6), 8_000_000_000),  # what is low for a small model suits a large one
        (make(rate=3e-3), 1_000_000),  # a toy
        (make(rate=3e-3), None),
        (make(rate=3e-3, model=ModelConfig(random_init=True)), SIZE),
        (make("online", rate=2e-6), SIZE),
        (make("align", rate=1e-4, lora=ADAPTER), SIZE),
        (make("align", rate=1e-4, loss="orpo"), SIZE),  # has no reference: rates are not known
        (make("sample", rate=1.0), SIZE),
        (Config(task="sft", optimizer=OptimizerConfig(name="sgd", learning_rate=1e-9)), SIZE),
    ],
)
def test_nothing_is_said_of_other_rates(config, size):
    assert check_rate(config, size) == ""


def test_what_is_advised_is_what_the_presets_have():
    """And of no preset is anything said."""
    for (_, is_adapter), suited in SUITED.items():
        preset = load_preset(suited.preset)
        assert suited.low < suited.rate < suited.high
        if is_adapter == bool(preset.lora.rank):
            assert preset.optimizer.learning_rate == suited.rate
    line = check_rate(make(), SIZE)
    assert "try --config.optimizer.learning_rate=1e-05 (preset 'sft': configs/README.md" in line


def rows(*losses):
    return [{"step": 50 * i, "loss/eval": loss} for i, loss in enumerate(losses)]


def test_a_run_that_has_learnt_nothing_says_so():
    config = make()
    line = describe_standstill(config, [*rows(1.5, 1.499), {"step": 50, "loss/train": 1.0}])
    assert line.startswith("the held-out loss hardly changed: 1.5000 at the start, 1.4990 after 50")
    assert "at optimizer.learning_rate=2e-06; try a higher rate" in line
    line = describe_standstill(config, rows(1.5, 1.2, 1.6))
    assert "the held-out loss rose: 1.5000 at the start, 1.6000 after 100 steps" in line
    assert "try a lower rate" in line


@pytest.mark.parametrize(
    "found",
    [rows(1.5, 1.4), rows(1.5), [], rows(-1.5, -1.5), rows(0.0, 0.0), rows(1.5, 1.49)[1:] * 2],
)
def test_nothing_is_said_of_a_run_that_has_learnt_or_is_not_measured(found):
    assert describe_standstill(make(), found) == ""
