"""What the head's logits go through before their softmax, so that it is the sampler's.

All of it happens inside `sharding.run_on_mesh`, on one device's rows and words, chunk by chunk.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from halos_jax.models.lookup import index_in_shard
from halos_jax.types import Transform

Ranges = tuple[tuple[int, int], ...]  # [start, stop) of the vocabulary's rows


@struct.dataclass
class Narrowing:
    """A `Transform` such that zeros, with which positions are padded, are no tokens at no scale."""

    inverse: jax.Array  # f32[rows, P], of the temperature
    kept: jax.Array | None  # i32[rows, P, kept], ids + 1


def prepare_transform(transform: Transform | None) -> Narrowing | None:
    """Return the transform of a batch as the head wants it."""
    if transform is None:
        return None
    kept = None if transform.kept is None else transform.kept + 1
    return Narrowing(1 / transform.temperature, kept)


def narrow_logits(
    logits: jax.Array, narrowing: Narrowing, unknown: Ranges, vocab_axis: str | None
) -> jax.Array:
    """Return the scaled logits f32[rows, P, n] over which the softmax is: those of the kept tokens,
    or of all words, with -inf in place of what is not among them or on another device.

    Args:
      logits: f32[rows, P, V].
      unknown: rows of the vocabulary that no token has.
    """
    if narrowing.kept is None:
        scaled = logits * narrowing.inverse[..., None]
        return _mask_unknown(scaled, unknown, vocab_axis)
    index, here = _find_kept(narrowing.kept, logits.shape[-1], vocab_axis)
    taken = jnp.take_along_axis(logits, jnp.where(here, index, 0), axis=-1)
    return jnp.where(here, taken * narrowing.inverse[..., None], -jnp.inf)


def mask_logits(
    logits: jax.Array, narrowing: Narrowing, unknown: Ranges, vocab_axis: str | None
) -> jax.Array:
    """Return the scaled logits f32[rows, P, V] with -inf in place of what `narrow_logits` drops."""
    scaled = logits * narrowing.inverse[..., None]
    if narrowing.kept is None:
        return _mask_unknown(scaled, unknown, vocab_axis)
    size = logits.shape[-1]
    index, here = _find_kept(narrowing.kept, size, vocab_axis)
    # What is not here goes outside, each to an index of its own.
    index = jnp.where(here, index, size + jnp.arange(index.shape[-1]))
    rows, positions = jnp.ogrid[: index.shape[0], : index.shape[1]]
    allowed = jnp.zeros(logits.shape, bool)
    allowed = allowed.at[rows[..., None], positions[..., None], index].set(
        True, mode="drop", unique_indices=True
    )
    return jnp.where(allowed, scaled, -jnp.inf)


def _find_kept(kept: jax.Array, size: int, vocab_axis: str | None) -> tuple[jax.Array, jax.Array]:
    """Return the rows of kept tokens in a device's shard of `size` words, and which are in it."""
    index = index_in_shard(kept - 1, size, vocab_axis)
    return index, (kept > 0) & (index >= 0) & (index < size)


def _mask_unknown(logits: jax.Array, unknown: Ranges, vocab_axis: str | None) -> jax.Array:
    if not unknown:
        return logits
    size = logits.shape[-1]
    table = np.ones(size * (jax.lax.axis_size(vocab_axis) if vocab_axis else 1), bool)
    for start, stop in unknown:
        table[start:stop] = False
    known = jnp.asarray(table)
    if vocab_axis:
        known = jax.lax.dynamic_slice(known, [jax.lax.axis_index(vocab_axis) * size], [size])
    return jnp.where(known, logits, -jnp.inf)
