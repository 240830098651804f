"""The train state: how it is made, and its abstract form for compilation and restore."""

import math
from typing import cast

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax.sharding import Mesh

from halos_jax import sharding
from halos_jax.training.followers import NO_FOLLOWERS, Followers, take_policy
from halos_jax.types import Params, TrainState, Tree


def make_abstract_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    followers: Followers = NO_FOLLOWERS,
) -> TrainState:
    """Return the train state as ShapeDtypeStructs with shardings; moments lie as their params.

    Args:
      params: what is trained, as ShapeDtypeStructs with shardings.
    """
    by_path = traverse_util.flatten_dict(params)

    def place(path: tuple[object, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # A moment stands in dicts of the params' keys; a factored one (adafactor) has another
        # shape, and is small.
        names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        param = by_path.get(names)
        same = param is not None and param.shape == leaf.shape
        where = param.sharding if same else sharding.replicated(mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    opt_state = jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, params))
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
    policy = take_policy(params)
    average = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding), policy
    )
    return TrainState(
        step=cast(jax.Array, step),
        params=params,
        opt_state=opt_state,
        reference=policy if followers.sync_every else None,
        ema=average if followers.ema_decay else None,
    )


def init_state(
    params: Params, optimizer: optax.GradientTransformation, abstract: TrainState
) -> TrainState:
    """Return the state at step 0 around `params`, which it takes over."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    step = jax.device_put(jnp.zeros((), jnp.int32), shardings.step)

    def copy(wanted: Params) -> Params:
        # Copies, since a step takes the state's buffers over, each of them once.
        def run(policy: Params) -> Params:
            made: Params = jax.tree.map(
                lambda x, like: jnp.copy(x.astype(like.dtype)), policy, wanted
            )
            return made

        placed = jax.tree.map(lambda like: like.sharding, wanted)
        copied: Params = jax.jit(run, out_shardings=placed)(take_policy(params))
        return copied

    return TrainState(
        step=step,
        params=params,
        opt_state=opt_state,
        reference=None if abstract.reference is None else copy(abstract.reference),
        ema=None if abstract.ema is None else copy(abstract.ema),
    )


def count_bytes(state: Tree) -> int:
    """Return the size of all arrays of a state, abstract or not, as they stand in a checkpoint."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
