"""The attention view: packed tokens <-> virtual sequences, by gathers in both directions.

A token of a shared prompt sits in several sequences. The adjoint of the gather into the view is a
sum over the token's slots; with the inverse indices at hand it is again a gather, so the backward
pass is deterministic and needs no scatter-add.
"""

import jax
import jax.numpy as jnp
import numpy as np

from halos_jax.types import View


def _take_rows(x: jax.Array, indices: jax.Array) -> jax.Array:
    """Gather `x [rows, A, ...]` at `indices i32[rows, B]`; an index outside gives zeros."""
    return jax.vmap(lambda row, index: row.at[index].get(mode="fill", fill_value=0))(x, indices)


def _no_gradient(indices: jax.Array) -> np.ndarray:
    return np.zeros(indices.shape, jax.dtypes.float0)


@jax.custom_vjp
def to_view(x: jax.Array, indices: jax.Array, inverse: jax.Array) -> jax.Array:
    """Gather tokens `x [rows, T, ...]` into the slots of the view, `[rows, M, ...]`."""
    return _take_rows(x, indices)


def _to_view_forward(x, indices, inverse):
    return to_view(x, indices, inverse), (indices, inverse)


def _to_view_backward(residuals, gradient):
    indices, inverse = residuals
    copies = [_take_rows(gradient, inverse[:, copy]) for copy in range(inverse.shape[1])]
    return sum(copies), _no_gradient(indices), _no_gradient(inverse)


to_view.defvjp(_to_view_forward, _to_view_backward)


@jax.custom_vjp
def from_view(y: jax.Array, owner: jax.Array, owned: jax.Array) -> jax.Array:
    """Gather each token's output `[rows, T, ...]` from its owner among `y [rows, M, ...]`."""
    return _take_rows(y, owner)


def _from_view_forward(y, owner, owned):
    return from_view(y, owner, owned), (owner, owned)


def _from_view_backward(residuals, gradient):
    owner, owned = residuals
    return _take_rows(gradient, owned), _no_gradient(owner), _no_gradient(owned)


from_view.defvjp(_from_view_forward, _from_view_backward)


def split_buckets(x: jax.Array, view: View) -> list[jax.Array]:
    """Cut `x [rows, M, ...]` into one `[rows * n, length, ...]` array a bucket."""
    parts, start = [], 0
    for count, length in view.buckets:
        part = x[:, start : start + count * length]
        parts.append(part.reshape(x.shape[0] * count, length, *x.shape[2:]))
        start += count * length
    return parts


def join_buckets(parts: list[jax.Array], rows: int) -> jax.Array:
    """Undo `split_buckets`."""
    return jnp.concatenate([part.reshape(rows, -1, *part.shape[2:]) for part in parts], axis=1)


def split_lengths(view: View) -> list[jax.Array]:
    """Return the sequence lengths `i32[rows * n]` of each bucket."""
    lengths, start = [], 0
    for count, _ in view.buckets:
        lengths.append(view.lengths[:, start : start + count].reshape(-1))
        start += count
    return lengths
