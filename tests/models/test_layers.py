"""The parts of a block against their formulas in float64."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from halos_jax.models import layers
from halos_jax.models.attention.rope import make_rotations
from halos_jax.models.spec import ClampedGate, DecoderConfig

CONFIG = DecoderConfig(
    vocab_size=11, num_layers=1, d_model=12, num_heads=4, num_kv_heads=2, head_dim=6, d_mlp=20
)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def single(*arrays):
    return [jnp.asarray(array, jnp.float32) for array in arrays]


def test_rms_norm_divides_by_the_root_mean_square():
    x, scale = draw(0, 3, 5, 12), draw(1, 12)
    expected = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(layers.rms_norm(*single(x, scale), 1e-5), expected, rtol=1e-5)


def test_rms_norm_keeps_the_dtype_and_its_statistics_are_wide():
    # Added up in bfloat16, the small squares would be lost beside the large one.
    x = jnp.full((4, 4096), 3.0, jnp.bfloat16).at[:, 0].set(200.0)
    got = layers.rms_norm(x, jnp.ones(4096, jnp.bfloat16), 0.0)
    wide = np.asarray(x, np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=2**-8)


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_rms_norm_of_zeros_is_zero(eps):
    zeros = jnp.zeros((2, 12))
    np.testing.assert_array_equal(layers.rms_norm(zeros, jnp.ones(12), eps), zeros)


def test_normalize_applies_the_norm_of_its_kind():
    x, scale, bias = draw(0, 3, 12), draw(1, 12), draw(2, 12)
    weights = dict(zip(("n", "n_bias"), single(scale, bias), strict=True))
    rms = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5)
    centred = x - x.mean(axis=-1, keepdims=True)
    standard = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    expected = {
        "rms": rms * scale,
        "rms_offset": rms * (1 + scale),
        "layer": standard * scale + bias,
    }
    (wide,) = single(x)
    for kind, value in expected.items():
        config = dataclasses.replace(CONFIG, norm=kind)
        np.testing.assert_allclose(layers.normalize(wide, weights, "n", config), value, atol=1e-5)
    assert layers.normalize(wide, weights, "another", CONFIG) is wide


def test_a_norm_over_all_heads_has_one_mean():
    x, scale = draw(0, 5, 4, 6), draw(1, 4, 6)
    expected = x / np.sqrt((x**2).mean(axis=(-2, -1), keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(layers.rms_norm(*single(x, scale), 1e-5), expected, atol=1e-5)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_an_mlp_without_a_gate_and_with_biases(activation):
    x, up, down, up_bias, down_bias = (
        draw(seed, *shape) for seed, shape in enumerate([(3, 12), (12, 20), (20, 12), (20,), (12,)])
    )
    inner = x @ up + up_bias
    share = {
        "silu": lambda x: 1 / (1 + np.exp(-x)),
        "gelu": np.vectorize(lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2)))),
        "gelu_tanh": lambda x: 0.5 * (1 + np.tanh(math.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    }[activation](inner)
    weights = {"up": up, "down": down, "up_bias": up_bias, "down_bias": down_bias}
    weights = {name: jnp.asarray(value, jnp.float32) for name, value in weights.items()}
    got = layers.run_mlp(*single(x), weights, dataclasses.replace(CONFIG, activation=activation))
    np.testing.assert_allclose(got, inner * share @ down + down_bias, rtol=1e-4, atol=1e-4)


def rotate(x, positions, theta=10_000.0):
    """Rotate pairs (i, i + H/2) as complex numbers."""
    half = x.shape[-1] // 2
    angles = positions[..., None, None] * theta ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def test_projections_rotate_queries_and_keys_and_leave_values():
    x = draw(0, 2, 5, 12)
    weights = {"q": draw(1, 12, 4, 6), "k": draw(2, 12, 2, 6), "v": draw(3, 12, 2, 6)}
    positions = np.array([[0, 1, 2, 3, 4], [7, 0, 100, 2, 2]])
    got = layers.project_qkv(
        jnp.asarray(x, jnp.float32),
        {name: jnp.asarray(value, jnp.float32) for name, value in weights.items()},
        make_rotations(CONFIG, jnp.asarray(positions))(0),
        CONFIG,
    )
    plain = {name: np.tensordot(x, value, 1) for name, value in weights.items()}
    expected = (rotate(plain["q"], positions), rotate(plain["k"], positions), plain["v"])
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5)


def test_project_out_sums_over_heads():
    attended, weight = draw(0, 2, 5, 4, 6), draw(1, 4, 6, 12)
    expected = sum(attended[..., head, :] @ weight[head] for head in range(4))
    got = layers.project_out(jnp.asarray(attended, jnp.float32), {"o": jnp.asarray(weight)})
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_gated_mlp_is_swiglu():
    x, gate, up, down = draw(0, 2, 5, 12), draw(1, 12, 20), draw(2, 12, 20), draw(3, 20, 12)
    opened = x @ gate
    expected = (opened / (1 + np.exp(-opened)) * (x @ up)) @ down
    weights = dict(zip(("gate", "up", "down"), single(gate, up, down), strict=True))
    np.testing.assert_allclose(
        layers.run_mlp(jnp.asarray(x, jnp.float32), weights, CONFIG), expected, rtol=1e-4, atol=1e-4
    )


def test_a_clamped_gate():
    x, gate, up, down = draw(0, 2, 5, 12), draw(1, 12, 20), draw(2, 12, 20), draw(3, 20, 12)
    opened, beside = np.minimum(x @ gate, 1.5), np.clip(x @ up, -1.5, 1.5)
    assert (opened == 1.5).any() and (opened < -1.5).any() and (beside == -1.5).any()
    expected = ((beside + 1) * opened / (1 + np.exp(-0.8 * opened))) @ down
    weights = dict(zip(("gate", "up", "down"), single(gate, up, down), strict=True))
    config = dataclasses.replace(CONFIG, clamped_gate=ClampedGate(alpha=0.8, limit=1.5))
    found = layers.run_mlp(*single(x), weights, config)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_one_token_without_a_row_axis_works_too():
    # The decode step calls the same functions on [S, D].
    x, gate, up, down = single(draw(0, 3, 12), draw(1, 12, 20), draw(2, 12, 20), draw(3, 20, 12))
    weights = {"gate": gate, "up": up, "down": down}
    rows = layers.run_mlp(x[:, None], weights, CONFIG)[:, 0]
    np.testing.assert_allclose(layers.run_mlp(x, weights, CONFIG), rows, rtol=1e-5, atol=1e-5)
