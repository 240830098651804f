"""Look-ups against plain indexing: values, gradients, precision and independence of order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halos_jax.models.lookup import look_up_tokens, sum_by_index, take_positions

WIDTH = 8


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def expected_sum(values, index, size):
    """Add rows one by one in float64."""
    total = np.zeros((size, values.shape[1]))
    for row, target in zip(values.astype(np.float64), index, strict=True):
        if 0 <= target < size:
            total[target] += row
    return total


@pytest.mark.parametrize("count", [1, 2, 33, 64])
@pytest.mark.parametrize("size", [1, 7, 100])
def test_sum_by_index_adds_rows_and_leaves_out_what_is_outside(count, size):
    index = np.random.default_rng(count).integers(-1, size + 1, count)
    values = draw(size, count, WIDTH)
    got = sum_by_index(jnp.asarray(values), jnp.asarray(index), size)
    np.testing.assert_allclose(got, expected_sum(values, index, size), rtol=1e-6, atol=1e-6)


def test_a_token_that_is_everywhere_keeps_its_gradient_in_bfloat16():
    # Added up in bfloat16, ones would stop at 256.
    table = jnp.zeros((3, WIDTH), jnp.bfloat16)
    tokens = jnp.ones((4, 250), jnp.int32)
    gradient = jax.grad(lambda table: look_up_tokens(table, tokens).astype(float).sum())(table)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient, [[0.0] * WIDTH, [1000.0] * WIDTH, [0.0] * WIDTH])


def compare_tokens(vocab):
    table = draw(0, vocab, WIDTH)
    tokens = np.random.default_rng(1).integers(0, vocab, (8, 21))
    weights = draw(2, 8, 21, WIDTH)
    run = jax.jit(jax.value_and_grad(lambda t, i: (look_up_tokens(t, i) * weights).sum()))
    value, gradient = run(jnp.asarray(table), jnp.asarray(tokens))
    np.testing.assert_allclose(value, (table[tokens] * weights).sum(), rtol=1e-5)
    expected = expected_sum(weights.reshape(-1, WIDTH), tokens.reshape(-1), vocab)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(jax.jit(look_up_tokens)(table, tokens), table[tokens])


def test_tokens_on_one_device():
    compare_tokens(50)


# 51 does not divide by the tensor axis, so every device holds the whole vocabulary.
@pytest.mark.parametrize("vocab", [50, 51])
def test_tokens_on_the_mesh(mesh, vocab):
    compare_tokens(vocab)


def check_positions():
    hidden, weights = draw(0, 4, 9, WIDTH), draw(1, 4, 30, WIDTH)
    positions = np.random.default_rng(2).integers(0, 9, (4, 30))
    run = jax.jit(jax.value_and_grad(lambda h, p: (take_positions(h, p) * weights).sum()))
    value, gradient = run(jnp.asarray(hidden), jnp.asarray(positions))
    taken = np.take_along_axis(hidden, positions[..., None], axis=1)
    np.testing.assert_allclose(value, (taken * weights).sum(), rtol=1e-5)
    for row in range(4):
        expected = expected_sum(weights[row], positions[row], 9)
        np.testing.assert_allclose(gradient[row], expected, rtol=1e-5, atol=1e-5)


def test_positions_on_one_device():
    check_positions()


def test_positions_on_the_mesh(mesh):
    check_positions()


def test_gradients_need_no_scatter_in_which_an_index_may_stand_twice():
    tokens = jnp.zeros((2, 16), jnp.int32)
    run = jax.jit(jax.grad(lambda table: look_up_tokens(table, tokens).sum()))
    text = run.lower(jnp.zeros((5, WIDTH))).as_text()
    assert "unique_indices = true" in text
    assert "unique_indices = false" not in text
