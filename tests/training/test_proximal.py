"""The policy at the start: for which losses a pass is made, and what becomes of what it finds."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from halos_jax.config import Config, ConfigError
from halos_jax.losses import get_loss
from halos_jax.packing.layout import LayoutMemory
from halos_jax.training import loop, proximal
from halos_jax.training.loop import Dataset
from halos_jax.types import MEMBER, Item


@pytest.fixture
def passes(monkeypatch):
    """Return the passes that were made, as (items, params, name, label)."""
    made = []

    def compute(trainer, items, params, *, recurring="", label):
        made.append((items, params, recurring, label))
        return "logps"

    monkeypatch.setattr(proximal, "compute_logps", compute)
    return made


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({"name": "dapo"}, False),
        ({"name": "dapo", "correction": "token_tis"}, True),
        ({"name": "grpo_clip", "correction": "sequence_tis"}, True),
        ({"name": "dpo", "correction": "sequence_tis"}, False),
        ({"name": "dpo", "correction": "wpo"}, False),
        ({"name": "sum", "dapo": {"correction": "token_tis"}, "rloo": {}}, True),
    ],
)
def test_a_pass_is_made_for_a_corrected_ratio_to_the_old_policy(passes, settings, needed):
    trainer = SimpleNamespace(loss=get_loss(settings))
    dataset = Dataset(["item"], None, recurring="train")
    loaded = []

    def load():
        loaded.append("params")
        return "params"

    found = proximal.add_proximal(trainer, dataset, load, label="start")
    if not needed:
        assert found is dataset and not passes and not loaded
        return
    assert found == dataclasses.replace(dataset, proximal_logps="logps")
    assert passes == [(["item"], "params", "train pass", "start")]
    found = proximal.add_proximal(trainer, dataset, load, known="known", label="start")
    assert found.proximal_logps == "known" and len(passes) == len(loaded) == 1


def test_with_a_value_head_the_collector_is_the_policy_of_the_start():
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:1])
    trainer = SimpleNamespace(
        config=Config(progress=False),
        loss=get_loss({"name": "ppo", "correction": "token_tis"}),
        mesh=mesh,
        layouts=LayoutMemory(),
        frozen=None,
        check=lambda: None,
        collect=lambda params, frozen, batch: (batch.target.astype(np.float32), 0.5 * batch.target),
    )
    bare = [Item(np.array([3, 4]), (np.array([5, 6, 7]),), (MEMBER,), (1.0,))] * 3
    with pytest.raises(ConfigError, match="3 of 3 examples lack its log-probabilities"):
        loop.make_dataset(trainer, bare, seed=7)
    logps = (np.full(3, -0.5, np.float32),)
    items = [dataclasses.replace(item, old_logps=logps) for item in bare]
    with jax.set_mesh(mesh):
        dataset = loop.make_dataset(trainer, items, seed=7)
        dataset = loop.add_collected(trainer, dataset, {}, seed=11, label="values")
        batch = next(loop.stream_batches(mesh, dataset))
    np.testing.assert_array_equal(batch.proximal_logps, batch.target)
    np.testing.assert_array_equal(batch.old_logps, -0.5 * batch.is_response)
