"""The parts of a decoder block, each a pure function of activations and one layer's weights."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from halos_jax.models.rope import apply_rope, inverse_frequencies
from halos_jax.models.spec import DecoderConfig

Weights = dict[str, Any]


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square layer norm (Zhang & Sennrich 2019); statistics in float32."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return scale * wide.astype(x.dtype)


def project_qkv(
    x: jax.Array, weights: Weights, positions: jax.Array, config: DecoderConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Project `x [..., D]` to rotated queries `[..., N, H]` and keys `[..., K, H]`, and values."""
    q, k, v = (
        checkpoint_name(jnp.einsum("...d,dnh->...nh", x, weights[name]), "qkv") for name in "qkv"
    )
    frequencies = jnp.asarray(inverse_frequencies(config.rope, config.head_dim))
    return apply_rope(q, positions, frequencies), apply_rope(k, positions, frequencies), v


def project_out(attended: jax.Array, weights: Weights) -> jax.Array:
    """Project the heads' outputs `[..., N, H]` back to `[..., D]`."""
    return jnp.einsum("...nh,nhd->...d", checkpoint_name(attended, "attended"), weights["o"])


def gated_mlp(x: jax.Array, weights: Weights) -> jax.Array:
    """SwiGLU feed-forward (Shazeer 2020): `down(silu(gate(x)) * up(x))`."""
    gate = checkpoint_name(jnp.einsum("...d,df->...f", x, weights["gate"]), "mlp")
    up = checkpoint_name(jnp.einsum("...d,df->...f", x, weights["up"]), "mlp")
    return jnp.einsum("...f,fd->...d", jax.nn.silu(gate) * up, weights["down"])
