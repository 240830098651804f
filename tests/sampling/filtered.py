"""Logits as the sampler draws from them, formed whole."""

import jax
import jax.numpy as jnp

from halos_jax.sampling.filters import find_kept


def filter_logits(
    logits: jax.Array, *, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> jax.Array:
    """Return `logits / temperature` with the tokens that may not be drawn at -inf."""
    logits = logits / temperature
    return jnp.where(find_kept(logits, top_k=top_k, top_p=top_p), logits, -jnp.inf)
