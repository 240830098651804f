"""Passes of a reference: by the trainer's own program, or by one for another architecture."""

import dataclasses

import jax
import numpy as np
import pytest

from halos_jax.config import Config, TrainConfig
from halos_jax.losses import get_loss
from halos_jax.models.spec import DecoderConfig, init_params
from halos_jax.training import loop
from halos_jax.training.reference import refer
from halos_jax.types import CHOSEN, REJECTED, Item

TINY = DecoderConfig(
    vocab_size=61,
    num_layers=1,
    d_model=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    d_mlp=24,
    init_std=0.3,
)


@pytest.fixture
def trainer(mesh1):
    config = Config(progress=False, train=TrainConfig(row_multiple=64, tokens_per_device=512))
    return loop.make_trainer(config, TINY, get_loss({"name": "dpo"}), mesh1, total_steps=1)


def make_items(count):
    rng = np.random.default_rng(1)
    parts = rng.integers(1, 61, (count, 3, 4)).astype(np.int32)
    return [Item(one[0], (one[1], one[2]), (CHOSEN, REJECTED)) for one in parts]


def test_an_earlier_state_of_the_policy_is_run_by_its_own_trainer(trainer):
    assert refer(trainer, None) is trainer


def test_a_model_of_the_same_architecture_shares_the_program_but_not_an_adapter_s_base(trainer):
    adapted = dataclasses.replace(trainer, frozen="base")
    held = dataclasses.replace(TINY, params_dtype="bfloat16", remat="full", new_rows=(3,))
    made = refer(adapted, held)
    assert made.logps is trainer.logps and made.frozen is None


def test_another_architecture_has_a_program_of_its_own(trainer):
    deeper = dataclasses.replace(TINY, num_layers=TINY.num_layers + 1)
    params = init_params(jax.random.key(3), deeper)
    # With nothing in its last layer it is the model without that layer.
    for name in ("o", "down"):
        layer = params["layers"][name]
        params["layers"][name] = layer.at[-1].set(0)
    short = {**params, "layers": jax.tree.map(lambda leaf: leaf[:-1], params["layers"])}
    items = make_items(3)
    made = refer(trainer, deeper)
    assert made.logps is not trainer.logps and refer(trainer, deeper).logps is made.logps
    found = loop.compute_logps(made, items, params, label="deeper")
    expected = loop.compute_logps(trainer, items, short, label="short")
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5)
