"""The steps that losses are made of: from tokens to sequences, and to the mean of a step."""

import math
from collections.abc import Mapping
from types import ModuleType
from typing import Literal, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Float32

from halos_jax.types import PADDING, Array, Batch

Scalar: TypeAlias = Float32[Array, ""]
# Of a function's `batch`: a number for each response position, and for each sequence.
PerToken: TypeAlias = Float32[Array, "rows {batch.sequence.shape[-1]}"]
PerSequence: TypeAlias = Float32[Array, "rows {batch.sequences.role.shape[-1]}"]
Sums: TypeAlias = dict[str, tuple[Scalar, Scalar]]  # name -> (sum, count)

_Number = TypeVar("_Number")  # an array, or on the host a float


def compute_ratios(policy: PerToken, other: PerToken, batch: Batch) -> PerToken:
    """Return the token log-ratios `policy - other` f32[rows, P]; 0 at padding, by its mask."""
    return jnp.where(batch.is_response, policy - other, 0.0)


def sum_by_sequence(values: PerToken, batch: Batch) -> PerSequence:
    """Sum token values f32[rows, P] by sequence: f32[rows, sequences]; padding adds nothing.

    A masked sum rather than a segment sum: it needs no scatter, so it is deterministic.
    """
    numbers = jnp.arange(batch.sequences.role.shape[-1])
    hits = batch.sequence[:, None, :] == numbers[:, None]
    return jnp.sum(jnp.where(hits, values[:, None, :], 0.0), axis=-1)


def take_partner(values: PerSequence, batch: Batch) -> PerSequence:
    """Return for each sequence the value f32[rows, sequences] of the other half of its pair."""
    return jnp.take_along_axis(values, batch.sequences.partner, axis=-1)


def weighted_sum(values: PerSequence, batch: Batch, role: int) -> Scalar:
    """Sum sequences' values, times the items' weights, over the sequences of one role."""
    mask = batch.sequences.role == role
    return jnp.sum(jnp.where(mask, values * batch.sequences.weight, 0.0))


def take_share(value: Scalar, batch: Batch, *, per: Literal["example", "token"]) -> Scalar:
    """Return a batch's share of its step's mean: its sum over all examples (or tokens) of the step.

    All responses of a step may be empty: then there is nothing to average, and 0 is right.
    """
    return value / (jnp.maximum(batch.num_tokens, 1.0) if per == "token" else batch.num_examples)


def count_and_sum(values: PerSequence, batch: Batch, role: int) -> tuple[Scalar, Scalar]:
    """Return the (sum, count) of `values f32[rows, sequences]` over the sequences of one role."""
    mask = batch.sequences.role == role
    total = jnp.sum(jnp.where(mask, jax.lax.stop_gradient(values), 0.0))
    return total, jnp.sum(mask).astype(jnp.float32)


def count_and_sum_class(
    values: PerSequence, batch: Batch, role: int, *, desirable: bool
) -> tuple[Scalar, Scalar]:
    """Return `count_and_sum` over the desirable sequences of a role, or over the others."""
    mask = (batch.sequences.role == role) & (batch.sequences.desirable == desirable)
    total = jnp.sum(jnp.where(mask, jax.lax.stop_gradient(values), 0.0))
    return total, jnp.sum(mask).astype(jnp.float32)


def count_tokens(batch: Batch) -> PerSequence:
    """Return the number of response tokens of each sequence: f32[rows, sequences]."""
    return sum_by_sequence(jnp.ones(batch.sequence.shape, jnp.float32), batch)


def mean_by_sequence(values: PerToken, batch: Batch) -> PerSequence:
    """Average token values f32[rows, P] by sequence: f32[rows, sequences]; 0 for an empty response.

    The divisor counts the response's tokens, never the values that differ from zero: where the
    policy is the reference all log-ratios are zero, and the mean must be too.
    """
    return sum_by_sequence(values, batch) / jnp.maximum(count_tokens(batch), 1.0)


def spread_to_tokens(values: PerSequence, batch: Batch) -> PerToken:
    """Give each response token the value of its sequence: f32[rows, P], 0 at padding."""
    padded = jnp.pad(values, ((0, 0), (0, 1)))
    return jnp.take_along_axis(padded, batch.sequence, axis=-1)


def count_and_sum_tokens(values: PerToken, batch: Batch, role: int) -> tuple[Scalar, Scalar]:
    """Return the (sum, count) of token `values f32[rows, P]` over the sequences of one role."""
    mask = batch.sequences.role == role
    total = jnp.where(mask, sum_by_sequence(jax.lax.stop_gradient(values), batch), 0.0)
    return jnp.sum(total), jnp.sum(jnp.where(mask, count_tokens(batch), 0.0))


def count_examples(batch: Batch) -> Scalar:
    """Return the total weight f32[] of the items in this batch, a part of the step's."""
    weights = batch.sequences.weight
    return jnp.sum(weights / jnp.maximum(sum_over_group(jnp.ones_like(weights), batch), 1.0))


def sum_over_group(values: PerSequence, batch: Batch) -> PerSequence:
    """Return for each sequence the sum of the values over its item; 0 at padding."""
    group, real = batch.sequences.group, batch.sequences.role != PADDING
    same = (group[:, :, None] == group[:, None, :]) & real[:, :, None] & real[:, None, :]
    return jnp.sum(jnp.where(same, values[:, None, :], 0.0), axis=-1)


def average_metrics(
    sums: Mapping[str, tuple[_Number, _Number]], numbers: ModuleType = jnp
) -> dict[str, _Number]:
    """Return the mean of each metric's (sum, count), 0 where it counts nothing.

    Answers that stand alone have no margin each: as in HALOs it is the mean implicit reward of
    those that were chosen less that of the others, NaN where there are none of one class. The
    squares of a correction's weights become its effective sample size, see `correction`.

    Args:
      numbers: the module to reckon with: numpy, in float64, for sums that are on the host.
    """
    means = {name: total / numbers.maximum(count, 1) for name, (total, count) in sums.items()}
    if "correction/squares" in means:
        squares = means.pop("correction/squares")
        effective = means["correction/weight"] ** 2 / numbers.maximum(squares, 1e-30)
        means["correction/effective"] = effective
    both = [f"rewards/{name}" for name in ("chosen", "rejected")]
    if "rewards/margins" not in means and all(name in means for name in both):
        counted = numbers.minimum(*(sums[name][1] for name in both)) > 0
        means["rewards/margins"] = numbers.where(counted, means[both[0]] - means[both[1]], math.nan)
    return means
