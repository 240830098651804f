"""Train states of every kind come back bit for bit on every mesh, one device included."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from halos_jax import sharding
from halos_jax.checkpoints.store import open_checkpoints
from halos_jax.config import OptimizerConfig
from halos_jax.config.sections import LoraConfig
from halos_jax.models import lora
from halos_jax.models.hf import families
from halos_jax.models.spec import DecoderConfig, abstract_params
from halos_jax.models.value import abstract_value_params
from halos_jax.training import optim
from halos_jax.training.followers import NO_FOLLOWERS, Followers
from halos_jax.training.state import make_abstract_state

DECODER = DecoderConfig(
    vocab_size=72, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_mlp=48
)
SAVED_ON = (1, 8, 1)
MESHES = [(2, 4, 1), (4, 2, 1), (8, 1, 1), (2, 2, 2), (1, 1, 8), (1, 1, 1)]
KINDS = ["adafactor", "muon", "lora muon", "value head", "average and reference"]
# Their arrays lie as some of those above.
OTHERS = ["adamw", "lion", "sgd", "bfloat16 moments", "lora", "average"]
KINDS += [pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS]


def make_mesh(sizes):
    return jax.make_mesh(
        sizes,
        sharding.MESH_AXES,
        (AxisType.Auto,) * 3,
        devices=jax.devices()[: math.prod(sizes)],
    )


def make_template(kind, mesh):
    """Return the abstract train state of a run of some kind on a mesh, as its trainer makes it."""
    settings = OptimizerConfig(warmup_steps=0)
    name = next((one for one in ("adafactor", "lion", "sgd", "muon") if one in kind), "adamw")
    dtype = "bfloat16" if "bfloat16" in kind else "float32"
    settings = dataclasses.replace(settings, name=name, moments_dtype=dtype)
    optimizer = optim.make_optimizer(settings, optim.make_schedule(settings, 5))
    trained = abstract_params(DECODER, mesh)
    if "lora" in kind:
        adapter = lora.make_adapter(LoraConfig(rank=8), DECODER, families.FAMILIES["llama"], seed=0)
        trained = lora.abstract_trained(DECODER, mesh, adapter)
    if "value" in kind:
        trained = {**trained, "value": abstract_value_params(DECODER.d_model, mesh)}
    follow = Followers(4 if "reference" in kind else 0, 0.9) if "average" in kind else NO_FOLLOWERS
    return make_abstract_state(trained, optimizer, mesh, follow)


def draw_state(template):
    """Return a state whose arrays hold random bits, each placed as its template."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        dtype = np.dtype(leaf.dtype)
        bits = rng.bytes(math.prod(leaf.shape) * dtype.itemsize)
        return jax.device_put(np.frombuffer(bits, dtype).reshape(leaf.shape), leaf.sharding)

    return jax.tree.map(draw, template)


def read_bits(state):
    return [(leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(state)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_comes_back_on_every_mesh(tmp_path, kind):
    state = draw_state(make_template(kind, make_mesh(SAVED_ON)))
    split = [leaf for leaf in jax.tree.leaves(state) if not leaf.is_fully_replicated]
    assert len(split) > 3, "nothing is cut into the chunks that this is about"
    checkpoints, expected = open_checkpoints(tmp_path, keep=1), read_bits(state)
    checkpoints.save(1, state, {"round": 1, "in_stage": False})
    checkpoints.finish()
    for sizes in MESHES:
        template = make_template(kind, make_mesh(sizes))
        restored, record = checkpoints.restore_newest(template)
        assert record["step"] == 1
        assert read_bits(restored) == expected, sizes
        assert jax.tree.structure(restored) == jax.tree.structure(template)
        for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(template), strict=True):
            assert leaf.sharding == wanted.sharding
    checkpoints.close()
