"""The spec tree: counts, shardings, and initialisation that depends on (key, path) alone."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import PartitionSpec

from halos_jax.models import spec
from halos_jax.models.spec import DecoderConfig, ParamSpec

CONFIG = DecoderConfig(
    vocab_size=128,
    num_layers=8,
    d_model=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    d_mlp=96,
)


def flatten(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def test_number_of_parameters():
    attention = 64 * 16 * (4 + 2 + 2 + 4)
    layer = attention + 3 * 64 * 96 + 2 * 64
    assert spec.count_params(CONFIG) == 2 * 128 * 64 + 8 * layer + 64
    tied = dataclasses.replace(CONFIG, tie_embeddings=True)
    assert spec.count_params(CONFIG) - spec.count_params(tied) == 128 * 64


def test_the_output_array_is_that_of_the_task():
    def last(**changes):
        return set(spec.make_spec(dataclasses.replace(CONFIG, **changes))) & {"head", "score"}

    assert last() == {"head"}
    assert last(tie_embeddings=True) == set()
    assert last(num_labels=1) == {"score"}
    assert last(num_labels=2, tie_embeddings=True) == {"score"}


def test_init_has_the_spec_s_shapes_dtype_and_scales():
    config = dataclasses.replace(CONFIG, params_dtype="bfloat16", init_std=0.05)
    params = flatten(spec.init_params(jax.random.key(0), config))
    tree = flatten(spec.make_spec(config))
    assert params.keys() == tree.keys()
    for name, array in params.items():
        assert array.shape == tree[name].shape and array.dtype == jnp.bfloat16
        values = np.asarray(array, np.float32)
        if name.endswith("norm"):
            assert np.all(values == 1)
            continue
        std = 0.05 / math.sqrt(16) if name in ("layers/o", "layers/down") else 0.05
        assert values.std() == pytest.approx(std, rel=0.05)
        assert abs(values.mean()) < 4 * std / math.sqrt(values.size)
        assert np.unique(values[:2].reshape(2, -1), axis=0).shape[0] == 2  # layers differ


def test_init_depends_on_key_and_path_alone(mesh, mesh1):
    config = dataclasses.replace(CONFIG, num_layers=2, num_kv_heads=4)

    def draw(where, *seeds):
        shardings = spec.params_shardings(config, where)
        with jax.set_mesh(where):
            init = jax.jit(lambda key: spec.init_params(key, config), out_shardings=shardings)
            drawn = [init(jax.random.key(seed)) for seed in seeds]
        assert jax.tree.map(lambda x: x.sharding, drawn[0]) == shardings
        return drawn

    (wide,), (params, other) = draw(mesh, 3), draw(mesh1, 3, 4)
    jax.tree.map(np.testing.assert_array_equal, params, wide)
    assert not np.any(np.asarray(params["embed"]) == np.asarray(other["embed"]))
    assert not np.any(np.asarray(params["embed"]) == np.asarray(params["head"]))


def test_abstract_params_carry_dtype_and_sharding(mesh):
    abstract = spec.abstract_params(dataclasses.replace(CONFIG, params_dtype="bfloat16"), mesh)
    shapes = jax.tree.map(lambda x: x.shape, abstract)
    is_spec = {"is_leaf": lambda x: isinstance(x, ParamSpec)}
    assert shapes == jax.tree.map(lambda x: x.shape, spec.make_spec(CONFIG), **is_spec)
    assert abstract["layers"]["q"].dtype == jnp.bfloat16
    specs = {name: leaf.sharding.spec for name, leaf in flatten(abstract).items()}
    assert specs["layers/q"] == PartitionSpec(None, "fsdp", "tensor", None)
    assert specs["layers/o"] == PartitionSpec(None, "tensor", None, "fsdp")
    assert specs["layers/down"] == PartitionSpec(None, "tensor", "fsdp")
    assert specs["embed"] == PartitionSpec("tensor", "fsdp")


def test_what_does_not_divide_is_replicated(mesh):
    config = dataclasses.replace(CONFIG, num_kv_heads=1, vocab_size=129)
    shardings = spec.params_shardings(config, mesh)
    assert shardings["layers"]["k"].spec == PartitionSpec(None, "fsdp", None, None)
    assert shardings["embed"].spec == PartitionSpec(None, "fsdp")
