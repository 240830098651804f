"""The train state: its initial value, and its abstract form for compilation and restoring."""

import dataclasses
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
    """Return the train state as ShapeDtypeStructs with shardings; moments have their params'.

    Args:
      params: the trained params, as ShapeDtypeStructs with shardings.
    """
    by_path = traverse_util.flatten_dict(params)

    def place(path: tuple[object, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # A moment is found under the keys of its param. A factored one (adafactor) has another
        # shape; it is small, so it is replicated.
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
    """Return the state at step 0 with `params`, whose buffers it takes over."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    step = jax.device_put(jnp.zeros((), jnp.int32), shardings.step)

    def copy(wanted: Params) -> Params:
        # Copies, because a step donates the state's buffers, and none can be donated twice.
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


def set_step(state: TrainState, step: int) -> TrainState:
    """Return a state that counts on from `step`, and its learning rate's schedule with it.

    A count that belongs to moments, such as that of Adam's bias correction, stays as it is.
    """

    def put(count: jax.Array) -> jax.Array:
        placed: jax.Array = jax.device_put(jnp.asarray(step, count.dtype), count.sharding)
        return placed

    def change(node: Tree) -> Tree:
        is_schedule = isinstance(node, optax.ScaleByScheduleState)
        return node._replace(count=put(node.count)) if is_schedule else node

    opt_state = jax.tree.map(
        change, state.opt_state, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState)
    )
    return dataclasses.replace(state, step=put(state.step), opt_state=opt_state)


def count_bytes(state: Tree) -> int:
    """Return the bytes of all arrays in a state, abstract or not, as a checkpoint stores them."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
