"""The parts of a decoder block, each a pure function of activations and one layer's weights."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from halos_jax.models.rope import Rotate
from halos_jax.models.spec import DecoderConfig

Weights = dict[str, Any]

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def normalize(x: jax.Array, weights: Weights, name: str, config: DecoderConfig) -> jax.Array:
    """Apply the norm `name` of `weights` in its kind; without such a norm return `x`."""
    if name not in weights:
        return x
    if config.norm == "layer":
        return layer_norm(x, weights[name], weights[f"{name}_bias"], config.norm_eps)
    offset = 1.0 if config.norm == "rms_offset" else 0.0
    return rms_norm(x, weights[name], config.norm_eps, offset=offset)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, *, offset: float = 0.0) -> jax.Array:
    """Root-mean-square layer norm (Zhang & Sennrich 2019) over the axes of `scale`.

    Statistics are float32; `offset` (Gemma's 1) is added to the scale, in float32 too.
    """
    wide = x.astype(jnp.float32)
    axes = tuple(range(-scale.ndim, 0))
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=axes, keepdims=True) + eps)
    if offset:
        return (wide * (offset + scale.astype(jnp.float32))).astype(x.dtype)
    return scale * wide.astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Layer norm (Ba et al. 2016) over the last axis; statistics in float32."""
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return scale * wide.astype(x.dtype) + bias


def project_qkv(
    x: jax.Array, weights: Weights, rotate: Rotate, config: DecoderConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Project `x [..., D]` to rotated queries `[..., N, H]` and keys `[..., K, H]`, and values."""
    q, k, v = (
        checkpoint_name(
            _add_bias(jnp.einsum("...d,dnh->...nh", x, weights[name]), weights, name), "qkv"
        )
        for name in "qkv"
    )
    q, k = normalize(q, weights, "q_norm", config), normalize(k, weights, "k_norm", config)
    return rotate(q), rotate(k), v


def project_out(attended: jax.Array, weights: Weights) -> jax.Array:
    """Project the heads' outputs `[..., N, H]` back to `[..., D]`."""
    out = jnp.einsum("...nh,nhd->...d", checkpoint_name(attended, "attended"), weights["o"])
    return _add_bias(out, weights, "o")


def run_mlp(x: jax.Array, weights: Weights, config: DecoderConfig) -> jax.Array:
    """Feed-forward `down(f(up(x)))`, or with a gate `down(f(gate(x)) * up(x))` (Shazeer 2020)."""
    activate = _ACTIVATIONS[config.activation]

    def project(name: str) -> jax.Array:
        projected = _add_bias(jnp.einsum("...d,df->...f", x, weights[name]), weights, name)
        return checkpoint_name(projected, "mlp")

    gate = project("gate") if "gate" in weights else None
    up = project("up")
    hidden = activate(up) if gate is None else activate(gate) * up
    return _add_bias(jnp.einsum("...f,fd->...d", hidden, weights["down"]), weights, "down")


def _add_bias(x: jax.Array, weights: Weights, name: str) -> jax.Array:
    bias = weights.get(f"{name}_bias")
    return x if bias is None else x + bias
