"""Row look-ups whose gradient is summed in float32, in an order that never changes.

The adjoint of a look-up adds up all rows with the same index. As a scatter-add that sum is made in
the table's dtype and, on a GPU, in whatever order the threads arrive. Here the rows are sorted by
index and added up pairwise; what is left is a scatter in which no index stands twice.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from halos_jax import sharding

_Residuals = tuple[jax.Array, jax.Array]


@jax.custom_vjp
def look_up_tokens(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Return `table[tokens]`, `[rows, ..., D]`, of `table [V, D]` and `tokens i32[rows, ...]`.

    On a mesh the rows stay where they are and the vocabulary may be split over "tensor". Every
    token must be in the vocabulary.
    """
    return _tokens_forward(table, tokens)[0]


def _tokens_forward(table: jax.Array, tokens: jax.Array) -> tuple[jax.Array, _Residuals]:
    rows, vocab = find_specs(tokens, table)
    run = functools.partial(_look_up_shard, vocab_axis=vocab[0])
    found: jax.Array = sharding.run_on_mesh(run, in_specs=(vocab, rows), out_specs=rows)(
        table, tokens
    )
    return found, (tokens, table)


def _tokens_backward(residuals: _Residuals, gradient: jax.Array) -> tuple[jax.Array, np.ndarray]:
    tokens, table = residuals
    rows, vocab = find_specs(tokens, table)
    row_axes = rows[0] or ()
    spec = sharding.mesh_spec(("vocab", "embed" if row_axes else None), table.shape)

    def run(tokens: jax.Array, gradient: jax.Array) -> jax.Array:
        size = table.shape[0] // (jax.lax.axis_size(vocab[0]) if vocab[0] else 1)
        index = index_in_shard(tokens.reshape(-1), size, vocab[0])
        part = sum_by_index(gradient.reshape(-1, gradient.shape[-1]), index, size)
        return sharding.sum_parts(part.astype(table.dtype), row_axes, spec)

    summed = sharding.run_on_mesh(run, in_specs=(rows, rows), out_specs=spec)
    return summed(tokens, gradient), no_gradient(tokens)


look_up_tokens.defvjp(_tokens_forward, _tokens_backward)


@jax.custom_vjp
def take_positions(hidden: jax.Array, positions: jax.Array) -> jax.Array:
    """Return the states `[rows, P, D]` of `hidden [rows, T, D]` at `positions i32[rows, P]`."""
    return jnp.take_along_axis(hidden, positions[..., None], axis=1)


def _take_forward(hidden: jax.Array, positions: jax.Array) -> tuple[jax.Array, _Residuals]:
    return take_positions(hidden, positions), (positions, hidden)


def _take_backward(residuals: _Residuals, gradient: jax.Array) -> tuple[jax.Array, np.ndarray]:
    positions, hidden = residuals
    rows, _ = find_specs(positions, hidden)

    def run(positions: jax.Array, gradient: jax.Array) -> jax.Array:
        add = functools.partial(sum_by_index, size=hidden.shape[1])
        return jax.vmap(add)(gradient, positions).astype(hidden.dtype)

    summed = sharding.run_on_mesh(run, in_specs=(rows, rows), out_specs=rows)
    return summed(positions, gradient), no_gradient(positions)


take_positions.defvjp(_take_forward, _take_backward)


def sum_by_index(values: jax.Array, index: jax.Array, size: int) -> jax.Array:
    """Sum the rows of `values [n, D]` by `index i32[n]`: f32[size, D].

    An index outside of the result is left out. After k rounds each row holds the sum of itself and
    the 2^k - 1 rows before it that have its index, so the last one of a run ends up with its total.
    """
    order = jnp.argsort(index, stable=True)
    index = jnp.asarray(index)[order]
    count = len(order)
    here = jnp.arange(count)

    def add(round: jax.Array, sums: jax.Array) -> jax.Array:
        before = here - (1 << round)
        same = (before >= 0) & (index[before] == index)
        return sums + jnp.where(same[:, None], sums[before], 0.0)

    rounds = max(count - 1, 0).bit_length()
    sums = jax.lax.fori_loop(0, rounds, add, values[order].astype(jnp.float32))
    last = jnp.append(index[1:] != index[:-1], True) & (index >= 0) & (index < size)
    # What is no total goes outside, each to an index of its own.
    to = jnp.where(last, index, size + here)
    zeros = jnp.zeros((size, values.shape[1]), jnp.float32)
    return zeros.at[to].set(sums, mode="drop", unique_indices=True)


def _look_up_shard(table: jax.Array, tokens: jax.Array, *, vocab_axis: str | None) -> jax.Array:
    if vocab_axis is None:
        return table[tokens]
    # Each token lies in one vocabulary shard; the others add zero.
    index = index_in_shard(tokens, table.shape[0], vocab_axis)
    found = table.at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    summed: jax.Array = jax.lax.psum(found, vocab_axis)
    return summed


def index_in_shard(tokens: jax.Array, size: int, vocab_axis: str | None) -> jax.Array:
    """Return the rows of `tokens` in a device's shard of `size` words; others are outside of it."""
    return tokens - jax.lax.axis_index(vocab_axis) * size if vocab_axis else tokens


def find_specs(index: jax.Array, table: jax.Array) -> tuple[PartitionSpec, PartitionSpec]:
    """Return the specs of the rows of `index` and of a table `[V, D]` gathered over "fsdp"."""
    rows = sharding.mesh_spec(("rows",), index.shape[:1])
    return rows, sharding.mesh_spec(("vocab", None), table.shape[:2])


def no_gradient(index: jax.Array) -> np.ndarray:
    """Return the cotangent of whole numbers, as `custom_vjp` wants it."""
    return np.zeros(index.shape, jax.dtypes.float0)
