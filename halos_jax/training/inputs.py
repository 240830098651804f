"""The inputs of a loss: the log-probabilities, values and scores that models give for a batch."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32

from halos_jax import sharding
from halos_jax.losses import Loss, LossInputs
from halos_jax.models import decoder
from halos_jax.models.lora import Frozen, attach_adapter
from halos_jax.models.spec import DecoderConfig
from halos_jax.models.value import compute_values
from halos_jax.training.teacher import Teacher, compute_divergences
from halos_jax.types import Array, Batch, Params


def compute_inputs(
    params: Params,
    frozen: Frozen | None,
    batch: Batch,
    loss: Loss,
    config: DecoderConfig,
    teacher: Teacher | None = None,
) -> LossInputs:
    """Return the inputs of the loss for a microbatch.

    Here and below, `params` are the trained params and `frozen` the base of the adapter that they
    are; None: they are the whole model. `teacher` is there if the loss has one.
    """
    params = attach_adapter(params, frozen)
    if loss.divergence is not None:
        assert teacher is not None  # `loop.make_trainer` sees to it
        found = compute_divergences(params, batch, teacher, loss.divergence, config)
        return LossInputs(divergences=found.values, policy=found.policy, teacher=found.teacher)
    if loss.needs == "scores":
        return LossInputs(scores=decoder.compute_scores(params, batch, config))
    inputs = LossInputs()
    if loss.reference:
        inputs = dataclasses.replace(inputs, reference=batch.reference_logps)
    if loss.old:
        inputs = dataclasses.replace(inputs, old=batch.old_logps)
    if loss.sampled:
        # In evaluation nothing stands in for the policy that sampled: the ratio to it is 1.
        start = inputs.old if batch.proximal_logps is None else batch.proximal_logps
        inputs = dataclasses.replace(inputs, old=start, sampled=batch.old_logps)
    if loss.aligned:
        hidden = decoder.encode_responses(params, batch, config)
        policy, aligned = decoder.compute_statistics(params, hidden, batch, config, "alignment")
        return dataclasses.replace(inputs, policy=policy, alignment=aligned)
    if not loss.value:
        return dataclasses.replace(inputs, policy=decoder.compute_logps(params, batch, config))
    hidden = decoder.encode_responses(params, batch, config)
    policy, entropies = decoder.compute_statistics(params, hidden, batch, config)
    values = compute_values(params["value"], hidden, batch)
    collected = jax.lax.stop_gradient(values) if batch.old_values is None else batch.old_values
    return dataclasses.replace(
        inputs, policy=policy, entropies=entropies, values=values, old_values=collected
    )


def compute_step_logps(
    params: Params, frozen: Frozen | None, batch: Batch, config: DecoderConfig
) -> Float32[Array, "m rows P"]:
    """Return the log-probs f32[m, rows, P] of a step's response tokens, without gradient."""
    params = jax.lax.stop_gradient(attach_adapter(params, frozen))
    logps: jax.Array = jax.lax.map(lambda one: decoder.compute_logps(params, one, config), batch)
    return logps


def compile_logps(
    config: DecoderConfig, mesh: Mesh
) -> Callable[[Params, Frozen | None, Batch], jax.Array]:
    """Return the jitted function from params and a batch to log-probs f32[m, rows, P]."""

    def run(params: Params, frozen: Frozen | None, batch: Batch) -> jax.Array:
        return compute_step_logps(params, frozen, batch, config)

    return jax.jit(run, out_shardings=sharding.replicated(mesh))


def compile_collect(
    config: DecoderConfig, mesh: Mesh
) -> Callable[[Params, Frozen | None, Batch], tuple[jax.Array, jax.Array]]:
    """Return the jitted function from params with a value head and a batch to the log-probs and
    the values of its response tokens, both f32[m, rows, P]."""

    def run(params: Params, frozen: Frozen | None, batch: Batch) -> tuple[jax.Array, jax.Array]:
        attached = attach_adapter(params, frozen)

        def one(batch: Batch) -> tuple[jax.Array, jax.Array]:
            hidden = decoder.encode_responses(attached, batch, config)
            logps, _ = decoder.compute_statistics(attached, hidden, batch, config)
            return logps, compute_values(attached["value"], hidden, batch)

        collected: tuple[jax.Array, jax.Array] = jax.lax.map(one, batch)
        return collected

    return jax.jit(run, out_shardings=sharding.replicated(mesh))


def read_behind(started: Iterable[tuple[jax.Array, ...]]) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield the results of computations on the host, each when the next one has been started.

    So the device is never idle while the host reads.
    """
    behind: tuple[jax.Array, ...] | None = None
    for results in started:
        if behind is not None:
            yield tuple(map(np.asarray, behind))
        behind = results
    if behind is not None:
        yield tuple(map(np.asarray, behind))
