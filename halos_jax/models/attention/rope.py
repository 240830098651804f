"""Rotary position embedding, in the half-split order of the Hugging Face checkpoints."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from halos_jax.models.spec import DecoderConfig, RopeConfig, list_layer_kinds

# Rotates queries or keys [..., heads, H] by their positions.
Rotate = Callable[[jax.Array], jax.Array]


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Return the angle per position of each pair of rotated dimensions, f32[pairs], in radians.

    Pair i turns by theta^(-2i/n) (Su et al. 2021), where n = fraction * H. "linear" divides all
    frequencies by `factor` (Chen et al. 2023); "llama3" (Llama 3.1) those with less than
    `low_freq_factor` turns in the original context, none with more than `high_freq_factor`, and
    goes linearly from one to the other in between; "yarn" (Peng et al. 2023) does the same
    linearly in i, between the pairs with `beta_fast` and with `beta_slow` turns; "longrope" (Ding
    et al. 2024) divides each by a factor of its own, which holds up to `rope.longest` tokens. Of
    "none" all are zero, which turns nothing.
    """
    size = int(head_dim * rope.fraction)
    frequencies = rope.theta ** -(np.arange(0, size, 2, dtype=np.float64) / size)
    keep = np.ones_like(frequencies)
    if rope.kind == "none":
        frequencies = np.zeros_like(frequencies)
    elif rope.kind == "longrope":
        frequencies = frequencies / np.array(rope.factors)
    elif rope.kind == "linear":
        keep = np.zeros_like(frequencies)
    elif rope.kind == "llama3":
        turns = rope.original_max_length * frequencies / (2 * np.pi)
        span = rope.high_freq_factor - rope.low_freq_factor
        keep = np.clip((turns - rope.low_freq_factor) / span, 0.0, 1.0)
    elif rope.kind == "yarn":
        low, high = _yarn_bounds(rope, size)
        keep = 1 - np.clip((np.arange(len(frequencies)) - low) / (high - low), 0.0, 1.0)
    return (frequencies * (keep + (1 - keep) / rope.factor)).astype(np.float32)


def _yarn_bounds(rope: RopeConfig, size: int) -> tuple[float, float]:
    """Return the pairs at which YaRN begins and ends to divide frequencies."""

    def pair_with(turns: float) -> float:
        length = rope.original_max_length / (2 * math.pi * turns)
        return size * math.log(length) / (2 * math.log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    return low, high if high != low else high + 0.001


def make_rotations(
    config: DecoderConfig, positions: jax.Array
) -> Callable[[int | jax.Array], Rotate]:
    """Return a function from the number of a layer's kind to the rotation of its heads.

    The number may be traced: the tables of all kinds are then looked up in.
    """
    ropes = [kind.rope for kind in list_layer_kinds(config)[0]]
    tables = np.stack([inverse_frequencies(rope, config.head_dim) for rope in ropes])
    factors = np.array([rope.attention_factor for rope in ropes], np.float32)

    def rotation_of(kind: int | jax.Array) -> Rotate:
        if len(set(ropes)) == 1:
            kind = 0
        if isinstance(kind, int):
            frequencies, factor = tables[kind], factors[kind]
        else:
            frequencies, factor = jnp.asarray(tables)[kind], jnp.asarray(factors)[kind]
        return functools.partial(
            apply_rope, positions=positions, inverse_frequencies=frequencies, factor=factor
        )

    return rotation_of


def apply_rope(
    x: jax.Array,
    positions: jax.Array,
    inverse_frequencies: jax.Array,
    factor: float | jax.Array = 1.0,
) -> jax.Array:
    """Rotate `x [..., heads, H]` by `positions i32[...]`; angles and rotation in float32.

    Of the first n = 2 * len(inverse_frequencies) dimensions, i is paired with i + n/2, and the
    rotated ones are multiplied by `factor`; the others stay as they are. The result has the dtype
    of `x`.
    """
    size = 2 * inverse_frequencies.shape[-1]
    angles = positions[..., None, None].astype(jnp.float32) * inverse_frequencies
    cos, sin = jnp.cos(angles) * factor, jnp.sin(angles) * factor
    first, second = jnp.split(x[..., :size].astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    rotated = jnp.concatenate(turned, axis=-1).astype(x.dtype)
    if size == x.shape[-1]:
        return rotated
    return jnp.concatenate([rotated, x[..., size:]], axis=-1)
