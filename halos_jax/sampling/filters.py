"""Temperature, top-k and top-p, without sorting the vocabulary.

Both filters keep the tokens whose probability is at least some threshold. Positive floats order
like their bit patterns, so bisecting over the patterns finds that threshold exactly in 31 passes
over the logits, where a sort of the whole vocabulary would cost more than the model.
"""

import jax
import jax.numpy as jnp

_STEPS = 31  # bits of a positive float32


def filter_logits(
    logits: jax.Array, *, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> jax.Array:
    """Return `logits / temperature` with the tokens that may not be drawn at -inf.

    Args:
      logits: f32[S, V].
      temperature: must be greater than 0 (greedy decoding takes the argmax instead).
      top_k: keep the k likeliest tokens (Fan et al. 2018); 0 keeps all. Ties with the k-th stay.
      top_p: keep the smallest set of likeliest tokens whose probability reaches p (Holtzman et al.
        2020), after top-k. Ties with the last one stay.
    """
    logits = logits / temperature
    if top_k and top_k < logits.shape[-1]:
        weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
        logits = jnp.where(weights >= _find_top_k(weights, top_k), logits, -jnp.inf)
    if top_p < 1.0:
        weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
        logits = jnp.where(weights >= _find_top_p(weights, top_p), logits, -jnp.inf)
    return logits


def _find_top_k(weights: jax.Array, k: int) -> jax.Array:
    """Return the largest threshold f32[S, 1] that at least k weights f32[S, V] reach."""
    return _bisect(weights, lambda kept: jnp.sum(kept, axis=-1, keepdims=True) >= k)


def _find_top_p(weights: jax.Array, p: float) -> jax.Array:
    """Return the largest threshold f32[S, 1] above which the weights sum to p of their total."""
    total = jnp.sum(weights, axis=-1, keepdims=True)

    def enough(kept: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(kept, weights, 0.0), axis=-1, keepdims=True) >= p * total

    return _bisect(weights, enough)


def _bisect(weights: jax.Array, enough) -> jax.Array:
    """Return the largest threshold in [0, 1] with `enough(weights >= threshold)`."""

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        kept = weights >= jax.lax.bitcast_convert_type(middle, jnp.float32)
        good = enough(kept)
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    shape = (*weights.shape[:-1], 1)
    one = jax.lax.bitcast_convert_type(jnp.float32(1.0), jnp.int32)
    # A threshold of 0 keeps everything; one just above 1 keeps nothing.
    bounds = (jnp.zeros(shape, jnp.int32), jnp.full(shape, one + 1))
    low, _ = jax.lax.fori_loop(0, _STEPS, halve, bounds)
    return jax.lax.bitcast_convert_type(low, jnp.float32)
