"""Sums over sequences and batches that losses are made of."""

import jax
import jax.numpy as jnp

from halos_jax.types import Batch


def sum_by_sequence(values: jax.Array, batch: Batch) -> jax.Array:
    """Sum token values f32[rows, P] by sequence: f32[rows, N]; padding adds nothing.

    A masked sum rather than a segment sum: it needs no scatter, so it is deterministic.
    """
    numbers = jnp.arange(batch.sequences.role.shape[-1])
    hits = batch.sequence[:, None, :] == numbers[:, None]
    return jnp.sum(jnp.where(hits, values[:, None, :], 0.0), axis=-1)


def take_partner(values: jax.Array, batch: Batch) -> jax.Array:
    """Return for each sequence the value f32[rows, N] of the other half of its pair."""
    return jnp.take_along_axis(values, batch.sequences.partner, axis=-1)


def weighted_sum(values: jax.Array, batch: Batch, role: int) -> jax.Array:
    """Sum `values f32[rows, N]`, times the items' weights, over the sequences of one role."""
    mask = batch.sequences.role == role
    return jnp.sum(jnp.where(mask, values * batch.sequences.weight, 0.0))


def count_and_sum(values: jax.Array, batch: Batch, role: int) -> tuple[jax.Array, jax.Array]:
    """Return the (sum, count) of `values f32[rows, N]` over the sequences of one role."""
    mask = batch.sequences.role == role
    total = jnp.sum(jnp.where(mask, jax.lax.stop_gradient(values), 0.0))
    return total, jnp.sum(mask).astype(jnp.float32)
