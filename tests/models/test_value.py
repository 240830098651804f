"""The value head: its formula, its dropout, and that it trains nothing but itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halos_jax import sharding
from halos_jax.models.value import (
    DROPOUT,
    abstract_value_params,
    compute_values,
    init_value_params,
    make_value_spec,
)
from halos_jax.types import Batch, Sequences

WIDTH, ROWS, POSITIONS = 64, 2, 5


def make_batch(noise=None):
    """Return a batch of which the head reads only what is a sequence's, and the noise."""
    sequence = np.array([[0, 0, 1, 2, 2], [0, 1, 1, 1, 2]], np.int32)  # 2: padding
    fields = {field.name: None for field in dataclasses.fields(Batch)}
    names = [field.name for field in dataclasses.fields(Sequences)]
    sequences = Sequences(**(dict.fromkeys(names) | {"role": np.zeros((ROWS, 2), np.int32)}))
    return Batch(**(fields | {"sequence": sequence, "sequences": sequences, "noise": noise}))


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)
        for name, leaf in make_value_spec(WIDTH).items()
    }


def draw_hidden():
    return np.random.default_rng(1).normal(size=(ROWS, POSITIONS, WIDTH)).astype(np.float32)


def test_three_layers_in_float32_and_zero_at_padding():
    params, hidden, batch = make_params(), draw_hidden(), make_batch()
    x = jnp.asarray(hidden, jnp.bfloat16)
    got = compute_values(params, x, batch)
    wide = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    expected = np.asarray(x, np.float64)
    for name in ("first", "second"):
        expected = np.maximum(expected @ wide[name] + wide[f"{name}_bias"], 0)
    expected = (expected @ wide["third"] + wide["third_bias"])[..., 0]
    assert got.dtype == jnp.float32
    expected[batch.sequence == 2] = 0
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3)


def test_hidden_states_get_no_gradient_and_every_layer_gets_one():
    hidden, batch = draw_hidden(), make_batch()
    run = lambda params, x: compute_values(params, x, batch).sum()  # noqa: E731
    own, into = jax.grad(run, argnums=(0, 1))(make_params(), hidden)
    assert not np.asarray(into).any()
    assert all(np.asarray(leaf).any() for leaf in own.values())


@pytest.mark.parametrize("tokens", [32, 64, 96, 128, 256])
def test_on_a_mesh_of_three_axes_values_and_gradient_are_those_of_one_device(mesh, mesh1, tokens):
    # As many tokens as the layers are wide, and about: there the partitioner's choice changes.
    rng, shape = np.random.default_rng(tokens), (8, tokens // 8)
    hidden = rng.normal(size=(*shape, WIDTH)).astype(np.float32)
    weights = rng.normal(size=shape).astype(np.float32)
    batch = make_batch(rng.integers(2**32, size=shape, dtype=np.uint32))
    batch = batch.replace(sequence=np.zeros(shape, np.int32))

    def run(params, hidden, batch, weights):
        values = compute_values(params, hidden, batch)
        return (values * weights).sum(), values

    find = jax.value_and_grad(run, has_aux=True)
    params = jax.tree.map(np.asarray, make_params())
    with jax.set_mesh(mesh1):
        (_, expected), gradient = jax.jit(find)(params, hidden, batch, weights)
    placed = {n: leaf.sharding for n, leaf in abstract_value_params(WIDTH, mesh).items()}
    given = jax.device_put(params, placed), *sharding.put_batch((hidden, batch, weights), mesh)
    (_, values), found = jax.jit(find, out_shardings=(None, placed))(*given)
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-3)
    for name, leaf in gradient.items():
        np.testing.assert_allclose(found[name], leaf, atol=2e-5 * np.abs(leaf).max())


def test_dropout_depends_on_the_noise_of_a_token_alone():
    params, hidden = make_params(), draw_hidden()
    noise = np.arange(ROWS * POSITIONS, dtype=np.uint32).reshape(ROWS, POSITIONS)
    values = np.asarray(compute_values(params, hidden, make_batch(noise)))
    plain = np.asarray(compute_values(params, hidden, make_batch()))
    assert (values != plain).sum() == 7  # of the real tokens all, of padding none
    np.testing.assert_array_equal(values, compute_values(params, hidden, make_batch(noise)))
    # The same token in another place, with its noise.
    noise[1, 3], hidden[1, 3] = noise[0, 1], hidden[0, 1]
    moved = np.asarray(compute_values(params, hidden, make_batch(noise)))
    np.testing.assert_allclose(moved[1, 3], values[0, 1], rtol=1e-6)


def test_a_share_of_the_inputs_is_dropped_and_the_rest_makes_up_for_it():
    # A head that sums its inputs, which are 1: the kept ones count 1 / (1 - share).
    params = jax.tree.map(jnp.zeros_like, make_params())
    params["first"] = params["first"].at[:, 0].set(1.0)
    params["second"] = params["second"].at[0, 0].set(1.0)
    params["third"] = params["third"].at[0, 0].set(1.0)
    sums = []
    for seed in range(40):
        noise = np.random.default_rng(seed).integers(2**32, size=(ROWS, POSITIONS), dtype=np.uint32)
        values = compute_values(params, np.ones((ROWS, POSITIONS, WIDTH)), make_batch(noise))
        sums += np.asarray(values)[make_batch().sequence < 2].tolist()
    kept = np.array(sums) * (1 - DROPOUT)
    np.testing.assert_allclose(kept, np.round(kept), atol=1e-3)
    assert len(set(np.round(kept))) > 5
    np.testing.assert_allclose(np.mean(sums), WIDTH, rtol=0.02)


def test_a_new_head_says_nothing_and_lies_as_its_abstract_form_says(mesh):
    abstract = abstract_value_params(WIDTH, mesh)
    params = init_value_params(jax.random.key(3), WIDTH)
    assert {name: (x.shape, x.dtype) for name, x in params.items()} == {
        name: (x.shape, x.dtype) for name, x in abstract.items()
    }
    assert not np.asarray(compute_values(params, draw_hidden(), make_batch())).any()
    np.testing.assert_allclose(np.std(params["first"]), WIDTH**-0.5, rtol=0.05)
    assert (np.asarray(params["first"]) != np.asarray(params["second"])).mean() > 0.99
    assert not abstract["first"].sharding.is_fully_replicated
