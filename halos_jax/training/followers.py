"""What follows the policy in the train state: a reference some steps behind, a moving average."""

import dataclasses

import jax
import jax.numpy as jnp

from halos_jax.types import Params, TrainState


@dataclasses.dataclass(frozen=True)
class Followers:
    """What follows the policy in the train state.

    Attributes:
      sync_every: 0, or the reference is in the state: the step whose number (from 0) is a multiple
        of this ends by making it the policy that the step began with. So at every step it is the
        policy of 1 to `sync_every` steps ago, with 1 always the one before; at the first step it is
        the policy itself.
      ema_decay: 0, or after each step the average becomes `decay * it + (1 - decay) * policy`.
    """

    sync_every: int = 0
    ema_decay: float = 0.0


NO_FOLLOWERS = Followers()


def take_policy(params: Params) -> Params:
    """Return what is trained of the policy alone, without a value head."""
    return {name: part for name, part in params.items() if name != "value"}


def take_averaged(state: TrainState) -> Params:
    """Return the params to be evaluated, those of the average where there is one.

    In the params' dtypes, with the value head as it is.
    """
    if state.ema is None:
        return state.params
    average = jax.tree.map(
        lambda mean, param: mean.astype(param.dtype), state.ema, take_policy(state.params)
    )
    return {**state.params, **average}


def take_exported(state: TrainState) -> Params:
    """Return the policy to be exported: `take_averaged` without a value head."""
    return take_policy(take_averaged(state))


def move_followers(after: TrainState, before: TrainState, followers: Followers) -> TrainState:
    """Return the state `after` a step with what follows the policy moved on from `before` it."""
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
