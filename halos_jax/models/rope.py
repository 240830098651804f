"""Rotary position embedding, in the half-split order of the Hugging Face checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np

from halos_jax.models.spec import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Return the angle per position of each pair of dimensions, f32[H/2], in radians.

    Pair i turns by theta^(-2i/H) (Su et al. 2021). "llama3" (Llama 3.1) divides by `factor` the
    frequencies with less than `low_freq_factor` turns in the original context, keeps those with
    more than `high_freq_factor`, and goes linearly from one to the other in between.
    """
    frequencies = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "llama3":
        turns = rope.original_max_length * frequencies / (2 * np.pi)
        span = rope.high_freq_factor - rope.low_freq_factor
        keep = np.clip((turns - rope.low_freq_factor) / span, 0.0, 1.0)
        frequencies = frequencies * (keep + (1 - keep) / rope.factor)
    return frequencies.astype(np.float32)


def apply_rope(x: jax.Array, positions: jax.Array, inverse_frequencies: jax.Array) -> jax.Array:
    """Rotate `x [..., heads, H]` by `positions i32[...]`; angles and rotation in float32.

    Dimension i is paired with i + H/2. The result has the dtype of `x`.
    """
    angles = positions[..., None, None].astype(jnp.float32) * inverse_frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
