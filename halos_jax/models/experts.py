"""A mixture of experts (Shazeer et al. 2017) in place of a block's MLP.

A router sends each token to a few of the experts, and their outputs are added with its weights. No
token is ever dropped, whatever the load: what a token becomes depends on that token alone, and
so on neither packing nor batch. Tokens are sorted by expert and multiplied group by group.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from halos_jax import sharding
from halos_jax.models.spec import ExpertsConfig

Activation = Callable[[jax.Array], jax.Array]
_NAMES = ("expert_gate", "expert_up", "expert_down")


def run_experts(
    x: jax.Array, weights: dict[str, jax.Array], experts: ExpertsConfig, activate: Activation
) -> jax.Array:
    """Apply to each token of `x [rows, ..., D]` its experts of one layer.

    `weights` has "router" `[D, E]`, "expert_gate" and "expert_up" `[E, D, F]` and "expert_down"
    `[E, F, D]`. Devices along "tensor" have experts of their own, or, where these do not
    divide, a part of each; they see the same tokens and add up what they find.
    """
    chosen, shares = route_tokens(x, weights["router"], experts)
    rows = sharding.mesh_spec(("rows", *[None] * (x.ndim - 1)), x.shape)
    # "embed" is not named: devices along "fsdp" gather the experts, as they do any weight.
    by_expert = [
        sharding.mesh_spec(axes, weights[name].shape)
        for name, axes in zip(
            _NAMES,
            [("experts", None, "mlp")] * 2 + [("experts", "mlp", None)],
            strict=True,
        )
    ]
    split, axis = by_expert[0][0] is not None, by_expert[0][0] or by_expert[0][2]

    def run(x, chosen, shares, gate, up, down):
        first = jax.lax.axis_index(axis) * gate.shape[0] if split else 0
        out = _run_local(x, chosen - first, shares, (gate, up, down), activate)
        return jax.lax.psum(out, axis) if axis else out

    run = sharding.run_on_mesh(run, in_specs=(rows, rows, rows, *by_expert), out_specs=rows)
    return run(x, chosen, shares, *(weights[name] for name in _NAMES))


def route_tokens(
    x: jax.Array, router: jax.Array, experts: ExpertsConfig
) -> tuple[jax.Array, jax.Array]:
    """Return the experts i32[..., k] of each token of `x [..., D]`, and their shares f32[..., k].

    The logits are float32: a rounding that swaps two experts changes the token for good.
    """
    logits = jnp.einsum(
        "...d,de->...e",
        x.astype(jnp.float32),
        router.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    shares, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), experts.per_token)
    if experts.normalize:
        shares = shares / jnp.sum(shares, axis=-1, keepdims=True)
    return chosen, shares


def _run_local(
    x: jax.Array,
    chosen: jax.Array,
    shares: jax.Array,
    matrices: tuple[jax.Array, jax.Array, jax.Array],
    activate: Activation,
) -> jax.Array:
    """Return what the experts of this device, numbered from 0, add to the tokens; f32 sums."""
    gate, up, down = matrices
    tokens, count = x.reshape(-1, x.shape[-1]), gate.shape[0]
    per_token = chosen.shape[-1]
    # One place for each token and expert of it; those of other devices' experts sort to the end,
    # beyond all groups, where the product is zero.
    here = (chosen >= 0) & (chosen < count)
    expert = jnp.where(here, chosen, count).reshape(-1)
    order = jnp.argsort(expert, stable=True)
    inverse = jnp.argsort(order)
    sizes = jnp.sum(expert[:, None] == jnp.arange(count), axis=0, dtype=jnp.int32)
    multiply = functools.partial(jax.lax.ragged_dot, group_sizes=sizes)

    places = _permute(jnp.repeat(tokens, per_token, axis=0), order, inverse)
    hidden = activate(checkpoint_name(multiply(places, gate), "gate"))
    hidden = hidden * checkpoint_name(multiply(places, up), "up")
    out = _permute(multiply(hidden, down), inverse, order)
    out = out.reshape(*shares.shape, -1) * jnp.where(here, shares, 0.0)[..., None].astype(x.dtype)
    return jnp.sum(out, axis=-2)


@jax.custom_vjp
def _permute(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """Return `x[order]`; its gradient is a gather as well, by the inverse permutation."""
    return x[order]


def _permute_forward(x, order, inverse):
    return x[order], (order, inverse)


def _permute_backward(residuals, gradient):
    order, inverse = residuals
    nothing = np.zeros(order.shape, jax.dtypes.float0)
    return gradient[inverse], nothing, nothing


_permute.defvjp(_permute_forward, _permute_backward)
