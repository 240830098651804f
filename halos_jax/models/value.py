"""The value head of an actor-critic: an estimate of what reward is still to come, at each token.

Three linear layers with ReLU between them, in float32, on the decoder's hidden states, which they
do not train. The head's params are no part of the model: they stand beside the policy's as
`params["value"]` and are never exported.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from halos_jax import sharding
from halos_jax.models.spec import ParamSpec, abstract_arrays
from halos_jax.types import Batch, Params

DROPOUT = 0.1  # of the hidden states, in training


def make_value_spec(width: int) -> dict[str, ParamSpec]:
    """Return the spec tree of the head on hidden states of `width`."""
    spec = {}
    for name, size in (("first", width), ("second", width), ("third", 1)):
        spec[name] = ParamSpec((width, size), ("embed", "mlp" if size > 1 else None))
        spec[f"{name}_bias"] = ParamSpec((size,), (None,), "zeros")
    return spec


def abstract_value_params(width: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the head's params as `jax.ShapeDtypeStruct`s that carry their shardings."""
    return abstract_arrays(make_value_spec(width), mesh, "float32")


def init_value_params(key: jax.Array, width: int) -> dict[str, jax.Array]:
    """Draw the head's params, normal with 1 / sqrt(width); the last layer is 0, and so is V."""
    params = {}
    for number, (name, leaf) in enumerate(make_value_spec(width).items()):
        params[name] = jnp.zeros(leaf.shape, jnp.float32)
        if name in ("first", "second"):
            drawn = jax.random.normal(jax.random.fold_in(key, number), leaf.shape, jnp.float32)
            # The factor is held apart for the reason given in `spec.init_params`.
            params[name] = jax.lax.optimization_barrier(drawn) * width**-0.5
    return params


def compute_values(params: Params, hidden: jax.Array, batch: Batch) -> jax.Array:
    """Return V f32[rows, P], before each response token; 0 at padding.

    Where `batch.noise` is there, a share of the hidden states is dropped: the mask of a token
    depends on its noise alone, so not on where in which microbatch it stands.

    Args:
      hidden: `[rows, P, D]` (see `decoder.encode_responses`); gets no gradient.
    """
    x = jax.lax.stop_gradient(hidden).astype(jnp.float32)
    if batch.noise is not None:
        x = _drop(x, batch.noise)
    for name in ("first", "second"):
        # Whole over "tensor", and so its gradient: see `sharding.constrain`.
        x = sharding.constrain(x, "rows", None, None)
        x = jax.nn.relu(x @ params[name] + params[f"{name}_bias"])
    values = (x @ params["third"] + params["third_bias"])[..., 0]
    return jnp.where(batch.is_response, values, 0.0)


def _drop(x: jax.Array, noise: jax.Array) -> jax.Array:
    """Drop elements of `x [..., D]`: those whose number, mixed with the token's, is small.

    The mixing is MurmurHash3's finaliser (Appleby 2011). A key of jax.random for each token would
    cost more than the head itself.
    """
    bits = noise[..., None] + jnp.arange(x.shape[-1], dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    keep = (bits ^ (bits >> 16)) >= jnp.uint32(DROPOUT * 2**32)
    return jnp.where(keep, x / (1 - DROPOUT), 0.0)
