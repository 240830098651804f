"""The train state and its abstract form: equal in structure, shapes, dtypes and shardings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halos_jax.config import OptimizerConfig
from halos_jax.models.spec import (
    DecoderConfig,
    abstract_params,
    init_params,
    params_shardings,
)
from halos_jax.models.value import abstract_value_params, init_value_params
from halos_jax.training.followers import Followers, take_averaged, take_policy
from halos_jax.training.optim import make_optimizer, make_schedule
from halos_jax.training.state import count_bytes, init_state, make_abstract_state, set_step

TINY = DecoderConfig(
    vocab_size=98,
    num_layers=2,
    d_model=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_mlp=48,
    params_dtype="bfloat16",
)


@pytest.fixture
def made(mesh):
    config = OptimizerConfig()
    optimizer = make_optimizer(config, make_schedule(config, 10))
    abstract = make_abstract_state(abstract_params(TINY, mesh), optimizer, mesh)
    params = jax.device_put(init_params(jax.random.key(0), TINY), params_shardings(TINY, mesh))
    return params, abstract, init_state(params, optimizer, abstract)


def test_the_state_is_what_its_abstract_form_says(made):
    _, abstract, state = made
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    for real, promised in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (real.shape, real.dtype) == (promised.shape, promised.dtype)
        assert real.sharding.is_equivalent_to(promised.sharding, real.ndim)


def test_the_state_starts_at_zero_around_the_very_params(made):
    params, _, state = made
    assert state.step == 0 and state.step.dtype == jnp.int32
    for one, other in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        assert one is other
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state.opt_state))


def test_moments_lie_as_their_params_in_float32(made, mesh):
    _, abstract, _ = made
    params = jax.tree.leaves(abstract_params(TINY, mesh))
    assert len({leaf.sharding.spec for leaf in params}) > 3, "the case has nothing to show"
    moments = [leaf for leaf in jax.tree.leaves(abstract.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(params)
    for moment, param in zip(moments, params + params, strict=True):
        assert moment.dtype == jnp.float32
        assert (moment.shape, moment.sharding) == (param.shape, param.sharding)
    assert all(
        leaf.sharding.is_fully_replicated
        for leaf in jax.tree.leaves(abstract.opt_state)
        if not leaf.ndim
    )


def test_followers_are_copies_of_the_policy_without_its_value_head(mesh):
    config = OptimizerConfig(name="sgd")
    optimizer = make_optimizer(config, make_schedule(config, 10))
    head = abstract_value_params(TINY.d_model, mesh)
    trained = {**abstract_params(TINY, mesh), "value": head}
    abstract = make_abstract_state(trained, optimizer, mesh, Followers(1, 0.9))
    params = jax.device_put(init_params(jax.random.key(0), TINY), params_shardings(TINY, mesh))
    value = init_value_params(jax.random.key(1), TINY.d_model)
    value = {name: jax.device_put(x, head[name].sharding) for name, x in value.items()}
    state = init_state({**params, "value": value}, optimizer, abstract)
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    for real, promised in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (real.shape, real.dtype) == (promised.shape, promised.dtype)
        assert real.sharding.is_equivalent_to(promised.sharding, real.ndim)
    policy = jax.tree.leaves(take_policy(state.params))
    for follower in (state.reference, state.ema):
        for leaf, param in zip(jax.tree.leaves(follower), policy, strict=True):
            assert leaf is not param
            np.testing.assert_array_equal(leaf.astype(jnp.float32), param.astype(jnp.float32))
    # The average is evaluated in the params' dtype, beside the head.
    moved = state.replace(ema=jax.tree.map(lambda leaf: leaf + 1, state.ema))
    averaged = take_averaged(moved)
    assert averaged["value"] is state.params["value"]
    for leaf, mean in zip(
        jax.tree.leaves(take_policy(averaged)), jax.tree.leaves(moved.ema), strict=True
    ):
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf, mean.astype(jnp.bfloat16))
    assert take_averaged(state.replace(ema=None)) is state.params


def test_the_size_of_a_state_is_that_of_its_arrays(made):
    _, abstract, state = made
    expected = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert count_bytes(state) == count_bytes(abstract) == expected > 100_000


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd", "muon"])
def test_a_state_counts_on_with_its_schedule_but_not_with_its_moments(name, mesh):
    config = OptimizerConfig(name=name, schedule="linear", warmup_steps=0)
    schedule = make_schedule(config, 10)
    optimizer = make_optimizer(config, schedule)
    params = jax.device_put(init_params(jax.random.key(0), TINY), params_shardings(TINY, mesh))
    abstract = make_abstract_state(abstract_params(TINY, mesh), optimizer, mesh)
    state = init_state(params, optimizer, abstract)
    moved = set_step(state, 5)
    assert int(moved.step) == 5 and jax.tree.structure(moved) == jax.tree.structure(state)
    changed = [
        int(one)
        for one, before in zip(
            jax.tree.leaves(moved.opt_state), jax.tree.leaves(state.opt_state), strict=True
        )
        if one is not before
    ]
    # Muon has a schedule for its matrices and one for the params that AdamW gets.
    assert changed == [5] * (2 if name == "muon" else 1)
    assert moved.step.sharding == state.step.sharding
