"""A mixture of experts (Shazeer et al. 2017) in place of a block's MLP.

A router sends each token to a few of the experts, and their outputs are added with its weights. No
token is ever dropped, whatever the load: what a token becomes depends on that token alone, and
so on neither packing nor batch. Tokens are sorted by expert and multiplied group by group.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from halos_jax import sharding
from halos_jax.models.spec import ExpertsConfig

Gating = Callable[[jax.Array, jax.Array], jax.Array]  # of gate and up, both [copies, F]
# "embed" is not named: devices along "fsdp" gather the experts, as they do any weight.
_AXES = {
    "expert_gate": ("experts", None, "mlp"),
    "expert_up": ("experts", None, "mlp"),
    "expert_down": ("experts", "mlp", None),
    "expert_gate_bias": ("experts", "mlp"),
    "expert_up_bias": ("experts", "mlp"),
    "expert_down_bias": ("experts", None),
}


def run_experts(
    x: jax.Array, weights: dict[str, jax.Array], experts: ExpertsConfig, gating: Gating
) -> jax.Array:
    """Apply to each token of `x [rows, ..., D]` its experts of one layer.

    `weights` has "router" `[D, E]`, "expert_gate" and "expert_up" `[E, D, F]` and "expert_down"
    `[E, F, D]`, and may have a bias of each (of "router" `[E]`, of "expert_up" `[E, F]`). Devices
    along "tensor" have experts of their own, or, where these do not divide, a part of each; they
    see the same tokens and add up what they find.
    """
    chosen, shares = route_tokens(x, weights, experts)
    rows = sharding.mesh_spec(("rows", *[None] * (x.ndim - 1)), x.shape)
    own = {name: weights[name] for name in _AXES if name in weights}
    by_expert = {name: sharding.mesh_spec(_AXES[name], leaf.shape) for name, leaf in own.items()}
    by_number, _, by_width = by_expert["expert_gate"]

    def run(
        x: jax.Array, chosen: jax.Array, shares: jax.Array, own: dict[str, jax.Array]
    ) -> jax.Array:
        first: int | jax.Array = 0
        if by_number:
            first = jax.lax.axis_index(by_number) * own["expert_gate"].shape[0]
        elif by_width and "expert_down_bias" in own:
            # Each device has a part of every sum, to which this is added once.
            keep = (jax.lax.axis_index(by_width) == 0).astype(x.dtype)
            own = own | {"expert_down_bias": own["expert_down_bias"] * keep}
        out = _run_local(x, chosen - first, shares, own, gating)
        axis = by_number or by_width
        return jax.lax.psum(out, axis) if axis else out

    specs = (rows, rows, rows, by_expert)
    out: jax.Array = sharding.run_on_mesh(run, in_specs=specs, out_specs=rows)(
        x, chosen, shares, own
    )
    return out


def route_tokens(
    x: jax.Array, weights: dict[str, jax.Array], experts: ExpertsConfig
) -> tuple[jax.Array, jax.Array]:
    """Return the experts i32[..., k] of each token of `x [..., D]`, and their shares f32[..., k].

    The logits are float32: a rounding that swaps two experts changes the token for good.
    """
    logits = jnp.einsum(
        "...d,de->...e",
        x.astype(jnp.float32),
        weights["router"].astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    if "router_bias" in weights:
        logits += weights["router_bias"].astype(jnp.float32)
    shares, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), experts.per_token)
    if experts.normalize:
        shares = shares / jnp.sum(shares, axis=-1, keepdims=True)
    return chosen, shares


def _run_local(
    x: jax.Array,
    chosen: jax.Array,
    shares: jax.Array,
    own: dict[str, jax.Array],
    gating: Gating,
) -> jax.Array:
    """Return what the experts of this device, numbered from 0, add to the tokens; f32 sums."""
    tokens, count = x.reshape(-1, x.shape[-1]), own["expert_gate"].shape[0]
    per_token = chosen.shape[-1]
    # One copy of a token for each of its experts; those of other devices' experts sort to the end,
    # beyond all groups, where the product is zero.
    here = (chosen >= 0) & (chosen < count)
    expert = jnp.where(here, chosen, count).reshape(-1)
    order = jnp.argsort(expert, stable=True)
    inverse = jnp.argsort(order)
    sizes = jnp.sum(expert[:, None] == jnp.arange(count), axis=0, dtype=jnp.int32)

    def project(copies: jax.Array, name: str) -> jax.Array:
        out = jax.lax.ragged_dot(copies, own[f"expert_{name}"], group_sizes=sizes)
        bias = own.get(f"expert_{name}_bias")
        return out if bias is None else out + _look_up_biases(bias, expert[order])

    copies = _permute(jnp.repeat(tokens, per_token, axis=0), order, inverse)
    gate, up = (checkpoint_name(project(copies, name), name) for name in ("gate", "up"))
    out = _permute(project(gating(gate, up), "down"), inverse, order)
    out = out.reshape(*shares.shape, -1) * jnp.where(here, shares, 0.0)[..., None].astype(x.dtype)
    return jnp.sum(out, axis=-2)


def _look_up_biases(bias: jax.Array, expert: jax.Array) -> jax.Array:
    """Return each copy's row of `bias [E, F]`; zeros where `expert` is E.

    A product with ones and zeros, so that the gradient is no scatter: it sums in a fixed order.
    """
    ones = (expert[:, None] == jnp.arange(bias.shape[0])).astype(bias.dtype)
    return jnp.matmul(ones, bias, precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def _permute(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """Return `x[order]`; its gradient is a gather as well, by the inverse permutation."""
    return x[order]


def _permute_forward(
    x: jax.Array, order: jax.Array, inverse: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x[order], (order, inverse)


def _permute_backward(
    residuals: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, np.ndarray, np.ndarray]:
    order, inverse = residuals
    nothing = np.zeros(order.shape, jax.dtypes.float0)
    return gradient[inverse], nothing, nothing


_permute.defvjp(_permute_forward, _permute_backward)
