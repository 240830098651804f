"""One optimizer step, for every objective: loss and gradient over microbatches, then the update."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from halos_jax import sharding
from halos_jax.losses import Loss, LossInputs, Statistics, average_metrics
from halos_jax.losses.sequences import Scalar, Sums
from halos_jax.models.lora import Frozen, fold_microbatch, start_dropout
from halos_jax.models.spec import DecoderConfig
from halos_jax.training.followers import (
    NO_FOLLOWERS,
    Followers,
    move_followers,
    take_policy,
)
from halos_jax.training.inputs import compute_inputs, compute_step_logps
from halos_jax.training.memory import choose_remat, measure_memory
from halos_jax.training.optim import BudgetSchedule
from halos_jax.training.rounding import measure_moved
from halos_jax.training.teacher import Teacher
from halos_jax.types import Batch, Params, TrainState

# The compiled step: (state, base of an adapter, batch) -> (new state, metrics).
TrainStep: TypeAlias = Callable[
    [TrainState, Frozen | None, Batch], tuple[TrainState, dict[str, jax.Array]]
]
EvalStep: TypeAlias = Callable[[Params, Frozen | None, Batch], Sums]
_Carry: TypeAlias = tuple[Scalar, Params, Sums]  # loss, gradient and metrics so far


def batch_loss(
    params: Params,
    frozen: Frozen | None,
    batch: Batch,
    loss: Loss,
    config: DecoderConfig,
    statistics: Statistics | None = None,
    *,
    teacher: Teacher | None = None,
) -> tuple[Scalar, Sums]:
    """Return one microbatch's share of the step's mean loss, and its metric sums.

    Args:
      statistics: those of the loss over the whole step; None if this microbatch is the whole step.
      teacher: here and below, the loss's, if it has one.
    """
    inputs = compute_inputs(params, frozen, batch, loss, config, teacher)
    if statistics is None:
        statistics = loss.measure(inputs, batch)
    return loss(dataclasses.replace(inputs, statistics=statistics), batch)


def measure_step(
    params: Params,
    frozen: Frozen | None,
    batch: Batch,
    loss: Loss,
    config: DecoderConfig,
    teacher: Teacher | None = None,
) -> Statistics:
    """Return the loss's statistics over all microbatches `[m, rows, ...]`; {} if it has none.

    This costs a forward pass without gradient. Only losses with statistics need it: they apply a
    non-linear function to a mean over the step, so microbatches cannot be treated one by one.
    """
    if loss.statistics is None:
        return {}

    def measure(numbered: tuple[jax.Array, Batch]) -> Statistics:
        number, one = numbered
        adapted = fold_microbatch(frozen, number)
        inputs = compute_inputs(params, adapted, one, loss, config, teacher)
        return loss.measure(inputs, one)

    parts = jax.lax.map(measure, (jnp.arange(batch.tokens.shape[0]), batch))
    return _sum_microbatches(parts)


def _sum_microbatches(parts: dict[str, tuple[jax.Array, jax.Array]]) -> Sums:
    """Add up (sum, count)s f32[m]."""
    summed: Sums = jax.tree.map(lambda x: x.sum(axis=0), parts)
    return summed


def loss_and_gradient(
    params: Params,
    frozen: Frozen | None,
    batch: Batch,
    loss: Loss,
    config: DecoderConfig,
    teacher: Teacher | None = None,
) -> tuple[Scalar, Params, Sums]:
    """Return the step's mean loss f32[], its gradient, and metric sums, over `[m, rows, ...]`.

    Numerators are summed over the microbatches, and denominators are those of the whole step, so
    the result does not depend on the number of microbatches.
    """
    value_and_grad = jax.value_and_grad(
        functools.partial(batch_loss, teacher=teacher), has_aux=True
    )
    count = batch.tokens.shape[0]
    if count == 1:
        single = jax.tree.map(lambda x: x[0], batch)
        (value, sums), gradient = value_and_grad(
            params, fold_microbatch(frozen, 0), single, loss, config
        )
        return value, gradient, sums

    statistics = measure_step(params, frozen, batch, loss, config, teacher)

    def one(carry: _Carry, numbered: tuple[jax.Array, Batch]) -> tuple[_Carry, None]:
        number, microbatch = numbered
        (value, sums), gradient = value_and_grad(
            params, fold_microbatch(frozen, number), microbatch, loss, config, statistics
        )
        part = (value, jax.tree.map(lambda x: x.astype(jnp.float32), gradient), sums)
        return jax.tree.map(jnp.add, carry, part), None

    first = jax.tree.map(lambda x: x[0], batch)
    shapes = jax.eval_shape(lambda: value_and_grad(params, frozen, first, loss, config))
    (_, sums_shape), _ = shapes
    zeros = (
        jnp.zeros(()),
        jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params),
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums_shape),
    )
    (value, gradient, sums), _ = jax.lax.scan(one, zeros, (jnp.arange(count), batch))
    gradient = jax.tree.map(lambda g, p: g.astype(p.dtype), gradient, params)
    return value, gradient, sums


def train_step(
    state: TrainState,
    frozen: Frozen | None,
    batch: Batch,
    *,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: DecoderConfig,
    followers: Followers = NO_FOLLOWERS,
    teacher: Teacher | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Take one optimizer step; return the new state and the step's metrics."""
    if followers.sync_every and loss.reference:
        assert state.reference is not None  # `make_abstract_state` has placed it there
        logps = compute_step_logps(state.reference, frozen, batch, config)
        batch = dataclasses.replace(batch, reference_logps=logps)
    frozen = start_dropout(frozen, state.step)
    value, gradient, sums = loss_and_gradient(state.params, frozen, batch, loss, config, teacher)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    rate = jnp.asarray(schedule(state.step), jnp.float32)
    if isinstance(schedule, BudgetSchedule):
        assert batch.progress is not None  # `Dataset.progress` gives it to each batch
        decay = schedule.decay(batch.progress[0])
        # An update is proportional to the rate, whatever the optimizer.
        updates = jax.tree.map(lambda update: update * decay.astype(update.dtype), updates)
        rate *= decay
    params = optax.apply_updates(state.params, updates)
    metrics = average_metrics(sums) | {
        "loss": value,
        "grad_norm": _measure_norm(take_policy(gradient)),
        "counters/lr": rate,
    }
    if loss.value:
        metrics["grad_norm_value"] = _measure_norm(gradient["value"])
    moved = measure_moved(state.params, params, gradient)
    if moved is not None:
        metrics["moved_params"] = moved
    after = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state)
    return move_followers(after, state, followers), metrics


def _measure_norm(gradient: Params) -> Scalar:
    norm: jax.Array = optax.global_norm(jax.tree.map(lambda x: x.astype(jnp.float32), gradient))
    return norm


def compile_train_step(
    abstract_state: TrainState,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: DecoderConfig,
    mesh: Mesh,
    followers: Followers = NO_FOLLOWERS,
    teacher: Teacher | None = None,
    room: int = 0,
) -> TrainStep:
    """Return the jitted `train_step`, which takes over the state's buffers but not the base's.

    `room` is as of `choose_remat`.
    """
    memory = measure_memory()

    def step(
        state: TrainState, frozen: Frozen | None, batch: Batch, teacher: Teacher | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        return train_step(
            state,
            frozen,
            batch,
            loss=loss,
            optimizer=optimizer,
            schedule=schedule,
            config=choose_remat(
                config, batch, abstract_state, mesh, limit=memory, teacher=teacher, room=room
            ),
            followers=followers,
            teacher=teacher,
        )

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    placed = (shardings, sharding.replicated(mesh))
    run = jax.jit(step, donate_argnums=0, out_shardings=placed)
    return run if teacher is None else functools.partial(run, teacher=teacher)


def compile_eval_step(
    loss: Loss, config: DecoderConfig, mesh: Mesh, teacher: Teacher | None = None
) -> EvalStep:
    """Return the jitted function from params and a batch to metric (sum, count)s."""

    def step(
        params: Params, frozen: Frozen | None, batch: Batch, teacher: Teacher | None = None
    ) -> Sums:
        inputs = jax.lax.map(
            lambda one: compute_inputs(params, frozen, one, loss, config, teacher), batch
        )
        statistics = _sum_microbatches(
            jax.lax.map(lambda both: loss.measure(*both), (inputs, batch))
        )

        def apply(both: tuple[LossInputs, Batch]) -> tuple[Scalar, Sums]:
            inputs, microbatch = both
            return loss(dataclasses.replace(inputs, statistics=statistics), microbatch)

        values, sums = jax.lax.map(apply, (inputs, batch))
        total = (batch.num_tokens if loss.per == "token" else batch.num_examples)[0]
        return {**_sum_microbatches(sums), "loss": (values.sum() * total, total)}

    run = jax.jit(step, out_shardings=sharding.replicated(mesh))
    return run if teacher is None else functools.partial(run, teacher=teacher)
