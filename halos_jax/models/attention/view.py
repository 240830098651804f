"""The attention view: packed tokens <-> virtual sequences, by gathers in both directions.

A token of a shared prompt sits in several sequences. The adjoint of the gather into the view is a
sum over the token's entries; with the inverse indices at hand it is again a gather, so the backward
pass is deterministic and needs no scatter-add.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from halos_jax.models.lookup import no_gradient
from halos_jax.types import View

Buckets = tuple[tuple[int, int], ...]
_Indices = tuple[jax.Array, jax.Array]


def _take_rows(x: jax.Array, indices: jax.Array) -> jax.Array:
    """Gather `x [rows, A, ...]` at `indices i32[rows, B]`; an index outside gives zeros."""

    def take(row: jax.Array, index: jax.Array) -> jax.Array:
        return row.at[index].get(mode="fill", fill_value=0)

    taken: jax.Array = jax.vmap(take)(x, indices)
    return taken


def _take_buckets(x: jax.Array, indices: jax.Array, buckets: Buckets) -> tuple[jax.Array, ...]:
    parts, start = [], 0
    for count, length in buckets:
        part = _take_rows(x, indices[:, start : start + count * length])
        parts.append(part.reshape(x.shape[0] * count, length, *x.shape[2:]))
        start += count * length
    return tuple(parts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def to_view(
    x: jax.Array, indices: jax.Array, inverse: jax.Array, buckets: Buckets
) -> tuple[jax.Array, ...]:
    """Gather tokens `x [rows, T, ...]` into the entries of the view, one array
    `[rows * sequences, length, ...]` a bucket.

    Each bucket is gathered by itself: a kernel would need a copy of its part of the whole.
    """
    return _take_buckets(x, indices, buckets)


def _to_view_forward(
    x: jax.Array, indices: jax.Array, inverse: jax.Array, buckets: Buckets
) -> tuple[tuple[jax.Array, ...], _Indices]:
    return to_view(x, indices, inverse, buckets), (indices, inverse)


def _to_view_backward(
    buckets: Buckets, residuals: _Indices, gradients: tuple[jax.Array, ...]
) -> tuple[jax.Array | int, np.ndarray, np.ndarray]:
    indices, inverse = residuals
    gradient = join_buckets(gradients, rows=indices.shape[0])
    copies = [_take_rows(gradient, inverse[:, copy]) for copy in range(inverse.shape[1])]
    return sum(copies), no_gradient(indices), no_gradient(inverse)


to_view.defvjp(_to_view_forward, _to_view_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def from_view(
    parts: tuple[jax.Array, ...], owner: jax.Array, owned: jax.Array, buckets: Buckets
) -> jax.Array:
    """Gather each token's output `[rows, T, ...]` from its owner among the entries of `to_view`."""
    return _take_rows(join_buckets(parts, owner.shape[0]), owner)


def _from_view_forward(
    parts: tuple[jax.Array, ...], owner: jax.Array, owned: jax.Array, buckets: Buckets
) -> tuple[jax.Array, _Indices]:
    return from_view(parts, owner, owned, buckets), (owner, owned)


def _from_view_backward(
    buckets: Buckets, residuals: _Indices, gradient: jax.Array
) -> tuple[tuple[jax.Array, ...], np.ndarray, np.ndarray]:
    owner, owned = residuals
    return _take_buckets(gradient, owned, buckets), no_gradient(owner), no_gradient(owned)


from_view.defvjp(_from_view_forward, _from_view_backward)


def join_buckets(parts: Sequence[jax.Array], rows: int) -> jax.Array:
    """Put the entries of all buckets, of `to_view`, one behind the other: `[rows, M, ...]`."""
    return jnp.concatenate([part.reshape(rows, -1, *part.shape[2:]) for part in parts], axis=1)


def split_lengths(view: View) -> list[jax.Array]:
    """Return the sequence lengths `i32[rows * n]` of each bucket."""
    lengths, start = [], 0
    for count, _ in view.buckets:
        lengths.append(view.lengths[:, start : start + count].reshape(-1))
        start += count
    return lengths
