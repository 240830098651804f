"""Temperature, top-k and top-p, without sorting the vocabulary.

Both filters keep the tokens whose weight (probability over that of the likeliest token) is at
least some cutoff. Positive floats order like their bit patterns, so a search over the patterns
finds the cutoff exactly in a fixed number of passes over the logits, where a sort of the whole
vocabulary would cost more than the model. A pass that tests several cutoffs at once settles
several bits: on an accelerator, where reading the logits is what costs, that is almost free.
"""

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int32

from halos_jax.types import Array

_BITS = 30  # of the patterns of [0, 1]
_NARROWER = (128, 8)  # logits in the blocks of which `find_largest` leaves most out


def find_kept(logits: Float32[Array, "S V"], *, top_k: int, top_p: float) -> Bool[Array, "S V"]:
    """Return the tokens that may be drawn, of logits to which the temperature was applied.

    Args:
      top_k: keep the k likeliest tokens (Fan et al. 2018); 0 keeps all. Ties with the k-th stay.
      top_p: keep the smallest set of likeliest tokens whose probability reaches p (Holtzman et al.
        2020), after top-k. Ties with the last one stay.
    """
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    # Formed once: rounded otherwise when formed again, the last token kept could be lost.
    weights = jax.lax.optimization_barrier(weights)
    cutoff = jnp.zeros((*logits.shape[:-1], 1), jnp.float32)
    if top_k and top_k < logits.shape[-1]:
        cutoff = _search(jnp.ones_like(weights), weights, top_k)
    if top_p < 1.0:
        left = jnp.where(weights >= cutoff, weights, 0.0)
        share = top_p * jnp.sum(left, axis=-1)
        cutoff = jnp.maximum(cutoff, _search(left, left, share))
    kept: jax.Array = weights >= cutoff
    return kept


def find_largest(
    logits: Float32[Array, "S V"], count: int
) -> tuple[Float32[Array, "S largest"], Int32[Array, "S largest"]]:
    """Return the `count` largest logits of each row, in falling order, and their ids.

    Of V logits at most, and of equal ones any; the id of -inf may be that of no logit. The largest
    are in the `count` blocks with the largest maxima, so few logits are left to be sorted: one pass
    over all of them, then blocks of these blocks.
    """
    count = min(count, logits.shape[1])
    values, ids = logits, None
    for width in _NARROWER:
        if values.shape[1] < 2 * count * width:
            continue
        padding = [(0, 0), (0, -values.shape[1] % width)]
        blocks = jnp.pad(values, padding, constant_values=-jnp.inf)
        blocks = blocks.reshape(len(blocks), -1, width)
        _, chosen = jax.lax.top_k(jnp.max(blocks, axis=-1), count)
        places = (chosen[..., None] * width + jnp.arange(width)).reshape(len(blocks), -1)
        values = jnp.take_along_axis(blocks, chosen[..., None], axis=1).reshape(len(blocks), -1)
        ids = places if ids is None else jnp.take_along_axis(ids, places, axis=-1, mode="clip")
    values, places = jax.lax.top_k(values, count)
    return values, places if ids is None else jnp.take_along_axis(ids, places, axis=-1)


def mask_unknown(
    logits: Float32[Array, "S V"], unknown: tuple[tuple[int, int], ...]
) -> Float32[Array, "S V"]:
    """Return the logits with -inf in the ranges `unknown`; the very same if none."""
    if not unknown:
        return logits
    # A table and no comparisons: a vocabulary may have holes by the thousand.
    masked = np.zeros(logits.shape[-1], bool)
    for start, stop in unknown:
        masked[start:stop] = True
    return jnp.where(masked, -jnp.inf, logits)


def sum_above(
    weights: Float32[Array, "S V"],
    logits: Float32[Array, "S V"],
    cutoffs: Float32[Array, "S candidates"],
) -> Float32[Array, "S candidates"]:
    """Return sum(weights where logits > cutoff) of each cutoff."""
    over = (logits > cutoffs[:, one, None] for one in range(cutoffs.shape[1]))
    return jnp.stack(sum_together([jnp.where(mask, weights, 0.0) for mask in over]), axis=-1)


def sum_together(parts: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Return the sum of each array over its last axis; on accelerators all in one pass."""
    if jax.default_backend() == "cpu":  # which would not vectorise it
        return tuple(jnp.sum(jax.lax.optimization_barrier(part), axis=-1) for part in parts)
    zeros = (jnp.zeros((), parts[0].dtype),) * len(parts)
    return tuple(jax.lax.reduce(tuple(parts), zeros, _add_each, (parts[0].ndim - 1,)))


def _add_each(left: Sequence[jax.Array], right: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    return tuple(map(operator.add, left, right))


def _search(values: jax.Array, weights: jax.Array, enough: jax.Array | int) -> jax.Array:
    """Return the largest cutoff f32[S, 1] in [0, 1] with sum(values where weights >= cutoff) >=
    enough."""
    bits = _choose_bits()
    steps = range(1, 1 << bits)

    def settle(number: jax.Array, low: jax.Array) -> jax.Array:
        shift = _BITS - bits * (number + 1)
        cutoffs = [_from_pattern(low + (k << shift)) for k in steps]
        sums = sum_together(
            [jnp.where(weights >= cutoff[..., None], values, 0.0) for cutoff in cutoffs]
        )
        count = functools.reduce(operator.add, (jnp.int32(part >= enough) for part in sums))
        settled: jax.Array = low + (count << shift)
        return settled

    low = jnp.zeros(weights.shape[:-1], jnp.int32)
    return _from_pattern(jax.lax.fori_loop(0, _BITS // bits, settle, low))[..., None]


def _choose_bits() -> int:
    return 1 if jax.default_backend() == "cpu" else 3


def _from_pattern(pattern: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(pattern, jnp.float32)
