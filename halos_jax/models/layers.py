"""The parts of a decoder block, each a pure function of activations and one layer's weights.

The sampler joins weights that read one input (see `models.cache`): "qkv" instead of "q", "k" and
"v", "gate_up" instead of "gate" and "up".
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from halos_jax.models.activations import ACTIVATIONS
from halos_jax.models.attention.rope import Rotate
from halos_jax.models.experts import run_experts
from halos_jax.models.spec import DecoderConfig

Weights = dict[str, Any]


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
    equation = "...d,dnh->...nh"
    if "qkv" in weights:
        bounds = (config.num_heads, config.num_heads + config.num_kv_heads)
        q, k, v = jnp.split(project(equation, x, weights, "qkv"), bounds, axis=-2)
    else:
        q, k, v = (checkpoint_name(project(equation, x, weights, name), "qkv") for name in "qkv")
    q, k = normalize(q, weights, "q_norm", config), normalize(k, weights, "k_norm", config)
    return rotate(q), rotate(k), v


def project_out(attended: jax.Array, weights: Weights) -> jax.Array:
    """Project the heads' outputs `[..., N, H]` back to `[..., D]`."""
    return project("...nh,nhd->...d", checkpoint_name(attended, "attended"), weights, "o")


def run_mlp(x: jax.Array, weights: Weights, config: DecoderConfig) -> jax.Array:
    """Feed-forward `down(f(up(x)))`, or with a gate `down(f(gate(x)) * up(x))` (Shazeer 2020).

    Where there is a router, each token goes to some of several of them.
    """
    if config.experts is not None:
        return run_experts(x, weights, config.experts, _make_gating(config))

    def project_in(name: str) -> jax.Array:
        named: jax.Array = checkpoint_name(project("...d,df->...f", x, weights, name), name)
        return named

    gate: jax.Array | None
    up: jax.Array
    if "gate_up" in weights:
        gate, up = jnp.split(project_in("gate_up"), 2, axis=-1)
    else:
        gate, up = project_in("gate") if "gate" in weights else None, project_in("up")
    if gate is None:
        hidden = ACTIVATIONS[config.activation](up)
    else:
        hidden = _make_gating(config)(gate, up)
    return project("...f,fd->...d", hidden, weights, "down")


def _make_gating(config: DecoderConfig) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return what makes a gated MLP's hidden layer of `gate` and `up`, both `[..., F]`."""
    activate, clamped = ACTIVATIONS[config.activation], config.clamped_gate

    if clamped is None:
        return lambda gate, up: activate(gate) * up

    def gate_clamped(gate: jax.Array, up: jax.Array) -> jax.Array:
        gate = jnp.minimum(gate, clamped.limit)
        up = jnp.clip(up, -clamped.limit, clamped.limit)
        return (up + 1) * (gate * jax.nn.sigmoid(clamped.alpha * gate))

    return gate_clamped


@struct.dataclass
class Dropout:
    """Dropout of what enters the adapters of a layer."""

    key: jax.Array  # random key, [L] where layers are stacked
    rate: float = struct.field(pytree_node=False)


# The adapters that read one and the same input have one mask.
_INPUT_NUMBERS = {"q": 0, "k": 0, "v": 0, "o": 1, "gate": 2, "up": 2, "down": 3}


def project(equation: str, x: jax.Array, weights: Weights, name: str) -> jax.Array:
    """Apply the linear layer `name`: its weight, and its adapter and bias where it has them.

    The adapter's part is `(x a) b` (see `models.lora`); the weight itself is never changed, and a
    frozen one needs no gradient.
    """
    out = jnp.einsum(equation, x, weights[name])
    if f"{name}_lora_a" in weights:
        a, b = weights[f"{name}_lora_a"], weights[f"{name}_lora_b"]
        low = jnp.tensordot(_drop(x, weights, name), a, a.ndim - 1)
        out += jnp.tensordot(low, b, 1)
    bias = weights.get(f"{name}_bias")
    return out if bias is None else out + bias


def _drop(x: jax.Array, weights: Weights, name: str) -> jax.Array:
    dropout = weights.get("lora_dropout")
    if dropout is None:
        return x
    key = jax.random.fold_in(dropout.key, _INPUT_NUMBERS[name])
    # 16 bits an element are half the work of 32, and miss the rate by 1e-5 at most.
    limit = round(dropout.rate * 2**16)
    keep = jax.random.bits(key, x.shape, "uint16") >= limit
    return jnp.where(keep, x * jnp.asarray(2**16 / (2**16 - limit), x.dtype), 0)
