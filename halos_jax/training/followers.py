"""Followers of the policy in the train state: a reference some steps behind, a moving average."""

import dataclasses

import jax
import jax.numpy as jnp

from halos_jax.types import Params, TrainState


@dataclasses.dataclass(frozen=True)
class Followers:
    """Which followers of the policy the train state has.

    Attributes:
      sync_every: 0: no reference. Else each step whose number (from 0) is a multiple of this sets
        the reference, at its end, to the policy that it began with. So at every step but the first,
        where it is the policy itself, the reference is the policy of 1 to `sync_every` steps ago.
      ema_decay: 0: no average. Else each step ends with
        `average = ema_decay * average + (1 - ema_decay) * policy`.
    """

    sync_every: int = 0
    ema_decay: float = 0.0


NO_FOLLOWERS = Followers()


def take_policy(params: Params) -> Params:
    """Return the params of the policy alone, without those of a value head."""
    return {name: part for name, part in params.items() if name != "value"}


def take_averaged(state: TrainState) -> Params:
    """Return the params to evaluate: the average, if there is one, in the dtypes of the params.

    A value head is not averaged.
    """
    if state.ema is None:
        return state.params
    average = jax.tree.map(
        lambda mean, param: mean.astype(param.dtype), state.ema, take_policy(state.params)
    )
    return {**state.params, **average}


def take_exported(state: TrainState) -> Params:
    """Return the params of the policy to export: `take_averaged` without a value head."""
    return take_policy(take_averaged(state))


def move_followers(after: TrainState, before: TrainState, followers: Followers) -> TrainState:
    """Return the state `after` a step with its followers updated from the state `before` it."""
    if followers.sync_every:
        due = before.step % followers.sync_every == 0
        policy = take_policy(before.params)
        reference = jax.tree.map(lambda x, y: jnp.where(due, x, y), policy, before.reference)
        after = dataclasses.replace(after, reference=reference)
    if followers.ema_decay:
        share = 1 - followers.ema_decay
        ema = jax.tree.map(
            lambda mean, x: mean + share * (x.astype(jnp.float32) - mean),
            before.ema,
            take_policy(after.params),
        )
        after = dataclasses.replace(after, ema=ema)
    return after
