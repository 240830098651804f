"""Learning-rate schedules and optimizers, from the config, through optax."""

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from halos_jax.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Return the learning rate as a function of optimizer steps taken before.

    Linear warm-up from `warmup_start * learning_rate`, then constant, or linear or cosine decay to
    0 at `total_steps`. The warm-up is a whole number of steps and ends before the last one, so the
    peak is reached at any length.
    """
    peak = config.learning_rate
    warmup = config.warmup_steps
    if warmup < 0:
        warmup = round(config.warmup_fraction * total_steps)
    warmup = min(warmup, max(total_steps - 1, 0))
    decay_steps = max(total_steps - warmup, 1)
    main = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, decay_steps),
        "cosine": optax.cosine_decay_schedule(peak, decay_steps),
    }[config.schedule]
    if warmup == 0:
        return main
    rise = optax.linear_schedule(config.warmup_start * peak, peak, warmup)
    return optax.join_schedules([rise, main], [warmup])


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Return global-norm clipping followed by AdamW (Loshchilov & Hutter 2019).

    Norm scales are not decayed. Moments are kept in `moments_dtype` whatever the params' dtype: in
    bfloat16 the second moment would lose updates smaller than 1/256 of itself. The norm that
    gradients are clipped by is always float32.
    """
    adam = optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_mask_decayed,
    )
    adam = _keep_dtype(adam, jnp.dtype(config.moments_dtype))
    clip = _keep_dtype(optax.clip_by_global_norm(config.max_grad_norm), jnp.float32)
    return optax.chain(clip, adam)


def _mask_decayed(params):
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict({path: "norm" not in path[-1] for path in flat})


def _keep_dtype(inner: optax.GradientTransformation, dtype) -> optax.GradientTransformation:
    """Run `inner` with its state, and all its arithmetic, in `dtype`."""

    def cast(tree):
        return jax.tree.map(lambda x: x.astype(dtype), tree)

    def init(params):
        return inner.init(cast(params))

    def update(updates, state, params=None):
        return inner.update(cast(updates), state, cast(params))

    return optax.GradientTransformation(init, update)
