"""The train state: how it is made, and its abstract form for compilation and restore."""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from halos_jax import sharding
from halos_jax.models.spec import DecoderConfig, abstract_params
from halos_jax.types import TrainState


def make_abstract_state(
    config: DecoderConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Return the train state as ShapeDtypeStructs with shardings; moments lie as their params."""
    params = abstract_params(config, mesh)
    opt_state = jax.eval_shape(optimizer.init, params)
    opt_state = optax.tree_map_params(
        optimizer,
        lambda leaf, param: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=param.sharding),
        opt_state,
        params,
        transform_non_params=lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding.replicated(mesh)
        ),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
    return TrainState(step=step, params=params, opt_state=opt_state)


def init_state(params, optimizer: optax.GradientTransformation, abstract: TrainState) -> TrainState:
    """Return the state at step 0 around `params`, which it takes over."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    step = jax.device_put(jnp.zeros((), jnp.int32), shardings.step)
    return TrainState(step=step, params=params, opt_state=opt_state)
