"""RoPE against a direct rotation of complex numbers, its own invariants, and transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halos_jax.models.attention.rope import apply_rope, inverse_frequencies, make_rotations
from halos_jax.models.spec import DecoderConfig, RopeConfig, list_layer_kinds

DEFAULT = RopeConfig(theta=500_000.0)
LINEAR = RopeConfig(theta=1000.0, kind="linear", factor=4.0)
YARN = RopeConfig(
    theta=10_000.0,
    kind="yarn",
    factor=4.0,
    original_max_length=256,
    beta_fast=16.0,
    attention_factor=1.2,
)
LLAMA3 = RopeConfig(
    theta=500_000.0,
    kind="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_length=8192,
)


def random_heads(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


@pytest.mark.parametrize("rope", [DEFAULT, LLAMA3], ids=["default", "llama3"])
def test_rotation_is_a_complex_product(rope):
    x = np.asarray(random_heads((2, 7, 3, 16)))
    positions = np.array([[0, 1, 2, 3, 4, 5, 6], [9, 0, 100, 3, 3, 4096, 1]])
    frequencies = inverse_frequencies(rope, 16)
    turned = (x[..., :8] + 1j * x[..., 8:]) * np.exp(
        1j * positions[..., None, None] * frequencies.astype(np.float64)
    )
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    got = apply_rope(jnp.asarray(x), jnp.asarray(positions), jnp.asarray(frequencies))
    np.testing.assert_allclose(got, expected, atol=1e-3)  # 4096 radians in float32: 2.4e-4
    small = positions < 128
    np.testing.assert_allclose(np.asarray(got)[small], expected[small], atol=2e-5)


def test_products_depend_on_the_distance_alone():
    frequencies = jnp.asarray(inverse_frequencies(LLAMA3, 32))
    q, k = random_heads((1, 1, 32), 1), random_heads((1, 1, 32), 2)

    def product(at_q, at_k):
        rotated_q = apply_rope(q, jnp.array([at_q]), frequencies)
        return float(jnp.sum(rotated_q * apply_rope(k, jnp.array([at_k]), frequencies)))

    assert product(5, 2) == pytest.approx(product(203, 200), abs=1e-3)
    assert abs(product(5, 2) - product(5, 3)) > 1e-2


def test_position_zero_and_dtype_are_kept():
    x = random_heads((4, 2, 8)).astype(jnp.bfloat16)
    got = apply_rope(x, jnp.zeros(4, jnp.int32), jnp.asarray(inverse_frequencies(DEFAULT, 8)))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, x)


def test_llama3_keeps_fast_and_divides_slow_frequencies():
    plain, scaled = inverse_frequencies(DEFAULT, 128), inverse_frequencies(LLAMA3, 128)
    turns = 8192 * plain / (2 * np.pi)
    np.testing.assert_array_equal(scaled[turns > 4], plain[turns > 4])
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert np.all((scaled < plain)[between] & (scaled > plain / 8)[between])
    assert np.all(np.diff(scaled) < 0)


def test_only_a_fraction_of_the_dimensions_turns():
    x = random_heads((2, 5, 3, 16))
    positions = jnp.arange(5) * jnp.ones((2, 1), jnp.int32)
    frequencies = inverse_frequencies(RopeConfig(fraction=0.25), 16)
    assert frequencies.shape == (2,)
    got = apply_rope(x, positions, jnp.asarray(frequencies))
    np.testing.assert_array_equal(got[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(got[..., :4], apply_rope(x[..., :4], positions, frequencies))


def test_yarn_keeps_fast_and_divides_slow_pairs():
    plain = inverse_frequencies(RopeConfig(), 64)
    scaled, turns = inverse_frequencies(YARN, 64), 256 * plain / (2 * np.pi)
    np.testing.assert_allclose(scaled[turns > 20], plain[turns > 20], rtol=1e-6)
    np.testing.assert_allclose(scaled[turns < 0.7], plain[turns < 0.7] / 4, rtol=1e-6)
    assert np.all(np.diff(plain / scaled) >= -1e-6)


def test_layers_of_two_kinds_turn_by_their_own_table():
    sizes = {"vocab_size": 9, "d_model": 8, "num_heads": 2, "num_kv_heads": 1, "d_mlp": 8}
    config = DecoderConfig(
        **sizes, num_layers=3, head_dim=16, rope=DEFAULT, local_rope=YARN, windows=(4, 4, 0)
    )
    x, positions = random_heads((3, 2, 16)), jnp.array([0, 5, 90])
    rotation_of = make_rotations(config, positions)
    for number, rope in enumerate((YARN, DEFAULT)):  # in the order of the layers
        table = jnp.asarray(inverse_frequencies(rope, 16))
        expected = apply_rope(x, positions, table, rope.attention_factor)
        np.testing.assert_allclose(rotation_of(number)(x), expected, rtol=1e-6)
        traced = jax.jit(lambda kind: rotation_of(kind)(x))(number)
        np.testing.assert_allclose(traced, expected, atol=1e-5)


def test_layers_without_rotary_embedding_turn_nothing():
    sizes = {"vocab_size": 9, "d_model": 8, "num_heads": 2, "num_kv_heads": 1, "d_mlp": 8}
    config = DecoderConfig(
        **sizes, num_layers=3, head_dim=16, rope=YARN, unrotated=(False, True, False)
    )
    x, positions = random_heads((3, 2, 16)), jnp.array([0, 5, 90])
    kinds, kind_of_layer = list_layer_kinds(config)
    assert kind_of_layer == (0, 1, 0) and [kind.rope.kind for kind in kinds] == ["yarn", "none"]
    rotation_of = make_rotations(config, positions)
    np.testing.assert_array_equal(rotation_of(1)(x), x)
    np.testing.assert_array_equal(jax.jit(lambda kind: rotation_of(kind)(x))(1), x)
    turned = apply_rope(x, positions, inverse_frequencies(YARN, 16), YARN.attention_factor)
    np.testing.assert_allclose(rotation_of(0)(x), turned, rtol=1e-6)


@pytest.mark.parametrize(
    "rope", [DEFAULT, LINEAR, YARN, LLAMA3], ids=["default", "linear", "yarn", "llama3"]
)
def test_equals_transformers(rope):
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.models.llama import modeling_llama

    parameters = {"rope_theta": rope.theta, "rope_type": rope.kind}
    if rope.kind in ("linear", "yarn"):
        parameters["factor"] = rope.factor
    if rope.kind == "yarn":
        parameters |= {
            "beta_fast": rope.beta_fast,
            "attention_factor": rope.attention_factor,
            "original_max_position_embeddings": rope.original_max_length,
        }
    if rope.kind == "llama3":
        parameters |= {
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_length,
        }
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=65536,
        rope_parameters=parameters,
    )
    module = modeling_llama.LlamaRotaryEmbedding(config)
    frequencies = inverse_frequencies(rope, 64)
    np.testing.assert_allclose(frequencies, module.inv_freq.numpy(), rtol=3e-7)

    q = np.array(random_heads((2, 20, 4, 64), 3))
    positions = np.stack([np.arange(20), np.arange(20) * 7 + 3])
    cos, sin = module(torch.tensor(q), torch.tensor(positions))
    theirs, _ = modeling_llama.apply_rotary_pos_emb(
        torch.tensor(q), torch.tensor(q), cos, sin, unsqueeze_dim=2
    )
    ours = apply_rope(jnp.asarray(q), jnp.asarray(positions), frequencies, rope.attention_factor)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=5e-5)
