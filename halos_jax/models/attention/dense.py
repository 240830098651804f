"""Attention with its scores in memory, for what no fused kernel does."""

import jax
import jax.numpy as jnp
from flax import struct

from halos_jax.integers import divide_up


@struct.dataclass
class Scoring:
    """How a query scores the keys: `softcap(scale * q.k)` for the last `window` ones."""

    # None: H^-0.5.
    scale: float | None = struct.field(pytree_node=False, default=None)
    # Scores -> cap * tanh(scores / cap) (Gemma 2); 0: as they are.
    softcap: float = struct.field(pytree_node=False, default=0.0)
    # Keys in sight, the query's own included; 0: all.
    window: int = struct.field(pytree_node=False, default=0)
    # Of each head, `[N]`, a score beside the keys' that leads to no value (Xiao et al. 2024,
    # attention sinks; gpt-oss); None: no such score.
    sinks: jax.Array | None = None


PLAIN = Scoring()


def attend_dense(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, scoring: Scoring
) -> jax.Array:
    """Attention of `q [B, (T,) N, H]` to `[B, C, K, H]` with all scores in memory.

    `visible` broadcasts to the scores, `[B, K, N/K, (T,) C]`.
    """
    num_heads, head_dim = q.shape[-2:]
    num_kv_heads = k.shape[2]
    grouped = q.reshape(*q.shape[:-2], num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = jnp.einsum("b...kgh,bckh->bkg...c", grouped, k, preferred_element_type=jnp.float32)
    scores = scores * (head_dim**-0.5 if scoring.scale is None else scoring.scale)
    if scoring.softcap:
        scores = scoring.softcap * jnp.tanh(scores / scoring.softcap)
    scores = jnp.where(visible, scores, -jnp.inf)
    weights = _weigh(scores, scoring.sinks).astype(v.dtype)
    return jnp.einsum("bkg...c,bckh->b...kgh", weights, v).reshape(q.shape)


def _weigh(scores: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """Return the softmax of `scores f32[B, K, N/K, (T,) C]` and the heads' sinks, without these."""
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    of_head = (*scores.shape[1:3], *[1] * (scores.ndim - 3))
    sinks = sinks.astype(jnp.float32).reshape(of_head)
    top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sinks)
    top = jax.lax.stop_gradient(top)
    weights = jnp.exp(scores - top)
    return weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sinks - top))


def attend_blocks(q: jax.Array, k: jax.Array, v: jax.Array, scoring: Scoring) -> jax.Array:
    """Causal attention of `[B, T, N, H]` within the window, block by block.

    Blocks are as long as the window W, so a block's queries see its own keys and those of the block
    before it: T x 2 W scores are formed instead of T x T.
    """
    window, length = scoring.window, q.shape[1]
    count = divide_up(length, window)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, count * window - length), (0, 0), (0, 0)))
        return x.reshape(x.shape[0], count, window, *x.shape[2:])

    def add_before(x: jax.Array) -> jax.Array:
        before = jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))
        return jnp.concatenate([before, x], axis=2)

    distance = window + jnp.arange(window)[:, None] - jnp.arange(2 * window)
    visible = (distance >= 0) & (distance < window)
    # Before the first block there is nothing.
    exists = (jnp.arange(count)[:, None] > 0) | (jnp.arange(2 * window) >= window)
    visible = jnp.tile(visible & exists[:, None], (q.shape[0], 1, 1))[:, None, None]
    own, keys, values = (
        x.reshape(-1, *x.shape[2:]) for x in (split(q), add_before(split(k)), add_before(split(v)))
    )
    out = attend_dense(own, keys, values, visible, scoring)
    return out.reshape(q.shape[0], count * window, *q.shape[2:])[:, :length]
