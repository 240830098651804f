"""The language-model head: log-probabilities of targets without ever forming `[B, T, V]` logits.

Only response positions reach the head; they go through it in chunks. The backward pass forms each
chunk's logits again, or finds what it needs of them kept in the dtype of the hidden states: faster,
for the memory of one number a position and word. Statistics are float32. Under a mesh the rows stay
where they are and the vocabulary may be split over "tensor": every collective is written out.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from halos_jax import sharding
from halos_jax.integers import divide_up
from halos_jax.models.lookup import find_specs, index_in_shard

_Found = Any  # log-probs, or these and entropies: f32[rows, P] each
_Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
_Chunk = tuple[tuple[jax.Array, ...], jax.Array | None]  # results, slopes


def compute_token_logps(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    chunk: int,
    softcap: float = 0.0,
    keep: bool = False,
) -> jax.Array:
    """Log-probabilities of `targets` under `softmax(project_logits(hidden, head))`.

    Args:
      hidden: `[rows, P, D]`, states of the positions that predict the targets.
      head: `[V, D]`, in the dtype of `hidden`.
      targets: i32[rows, P].
      chunk: positions of a row whose logits exist at one time.
      softcap: of the logits, see `project_logits`.
      keep: keep what the backward pass needs of the logits instead of forming them again.

    Returns:
      f32[rows, P], in nats.
    """
    logps: jax.Array = _token_logps(hidden, head, targets, chunk, softcap, False, keep)
    return logps


def compute_token_statistics(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    chunk: int,
    softcap: float = 0.0,
    keep: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Return `compute_token_logps` and the distributions' entropies, both f32[rows, P] in nats.

    The entropies are for metrics: they have no gradient.
    """
    found: tuple[jax.Array, jax.Array] = _token_logps(
        hidden, head, targets, chunk, softcap, True, keep
    )
    return found


def project_logits(hidden: jax.Array, head: jax.Array, softcap: float = 0.0) -> jax.Array:
    """Return the logits f32[..., V] of `hidden [..., D]` and `head [V, D]`.

    A soft cap (Gemma 2) keeps them within +-softcap: `softcap * tanh(logits / softcap)`.
    """
    logits = jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)
    return softcap * jnp.tanh(logits / softcap) if softcap else logits


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _token_logps(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    chunk: int,
    softcap: float,
    entropy: bool,
    keep: bool,
) -> _Found:
    return _forward(hidden, head, targets, chunk, softcap, entropy, False)[0]


def _forward(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    chunk: int,
    softcap: float,
    entropy: bool,
    keep: bool,
) -> tuple[_Found, _Residuals]:
    rows, vocab = find_specs(targets, head)
    vocab_axis = vocab[0]
    run = functools.partial(
        _forward_shard,
        chunk=chunk,
        softcap=softcap,
        vocab_axis=vocab_axis,
        entropy=entropy,
        keep=keep,
    )
    slopes = PartitionSpec(None, rows[0], None, vocab_axis)
    out_specs = (rows,) * (3 if entropy else 2) + ((slopes,) if keep else ())
    on_mesh = sharding.run_on_mesh(run, in_specs=(rows, vocab, rows), out_specs=out_specs)
    logps, normalizers, *others = on_mesh(hidden, head, targets)
    kept = others.pop() if keep else normalizers
    return (logps, *others) if entropy else logps, (hidden, head, targets, kept)


def _backward(
    chunk: int,
    softcap: float,
    entropy: bool,
    keep: bool,
    residuals: _Residuals,
    gradients: _Found,
) -> tuple[jax.Array, jax.Array, None]:
    gradient = gradients[0] if entropy else gradients
    hidden, head, targets, kept = residuals
    rows, vocab = find_specs(targets, head)
    vocab_axis, row_axes = vocab[0], rows[0] or ()
    split = sharding.mesh_spec(("vocab", "embed" if row_axes else None), head.shape)
    sum_parts = functools.partial(sharding.sum_parts, row_axes=row_axes, spec=split)
    kept_spec = rows
    if keep:
        run = functools.partial(_backward_kept, vocab_axis=vocab_axis, sum_parts=sum_parts)
        kept_spec = PartitionSpec(None, rows[0], None, vocab_axis)
    else:
        run = functools.partial(
            _backward_shard,
            chunk=chunk,
            softcap=softcap,
            vocab_axis=vocab_axis,
            sum_parts=sum_parts,
        )
    in_specs = (rows, vocab, rows, kept_spec, rows)
    on_mesh = sharding.run_on_mesh(run, in_specs=in_specs, out_specs=(rows, split))
    return *on_mesh(hidden, head, targets, kept, gradient), None


_token_logps.defvjp(_forward, _backward)


def _forward_shard(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    chunk: int,
    softcap: float,
    vocab_axis: str | None,
    entropy: bool,
    keep: bool,
) -> tuple[jax.Array, ...]:
    """Return log-probs, log-normalizers and, if asked for, entropies f32[rows, P] of one device's
    rows, and the slopes of the log-probs `[chunks, rows, P / chunks, V]`."""

    def one(_: None, xs: tuple[jax.Array, ...]) -> tuple[None, _Chunk]:
        hidden, targets = xs
        logits = project_logits(hidden, head, softcap)
        peak = reduce_shards(jnp.max(logits, axis=-1), jax.lax.pmax, vocab_axis)
        shifted = logits - peak[..., None]
        total = reduce_shards(jnp.sum(jnp.exp(shifted), axis=-1), jax.lax.psum, vocab_axis)
        normalizer = peak + jnp.log(total)
        # Each target lies in one vocabulary shard; the others add zero.
        index = index_in_shard(targets, head.shape[0], vocab_axis)
        here = (index >= 0) & (index < head.shape[0])
        picked = jnp.take_along_axis(logits, jnp.where(here, index, 0)[..., None], axis=-1)
        picked = reduce_shards(jnp.where(here, picked[..., 0], 0.0), jax.lax.psum, vocab_axis)
        found: tuple[jax.Array, ...] = (picked - normalizer, normalizer)
        if entropy:
            moment = jnp.sum(jnp.exp(shifted) * shifted, axis=-1)
            found += (jnp.log(total) - reduce_shards(moment, jax.lax.psum, vocab_axis) / total,)
        slopes = None
        if keep:
            slopes = _differentiate(logits, normalizer, index, softcap).astype(hidden.dtype)
        return None, (found, slopes)

    xs = tuple(split_positions(x, chunk) for x in (hidden, targets))
    _, (found, slopes) = jax.lax.scan(one, None, xs)
    found = tuple(join_positions(x, targets.shape[1]) for x in found)
    return found if slopes is None else (*found, slopes)


def _differentiate(
    logits: jax.Array, normalizers: jax.Array, index: jax.Array, softcap: float
) -> jax.Array:
    """Return the derivatives of the targets' log-probs by the logits before the soft cap."""
    hits = index[..., None] == jnp.arange(logits.shape[-1])
    slopes = hits - jnp.exp(logits - normalizers[..., None])
    return slopes * (1 - (logits / softcap) ** 2) if softcap else slopes


def _backward_shard(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    normalizers: jax.Array,
    gradient: jax.Array,
    *,
    chunk: int,
    softcap: float,
    vocab_axis: str | None,
    sum_parts: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of `hidden` and `head`; one sum over the row shards at the end."""

    def one(head_gradient: jax.Array, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        hidden, targets, normalizers, gradient = xs
        logits = project_logits(hidden, head, softcap)
        index = index_in_shard(targets, head.shape[0], vocab_axis)
        slopes = _differentiate(logits, normalizers, index, softcap)
        logits_gradient = (slopes * gradient[..., None]).astype(hidden.dtype)
        head_gradient += jnp.einsum(
            "rcv,rcd->vd", logits_gradient, hidden, preferred_element_type=jnp.float32
        )
        hidden_gradient = jnp.einsum(
            "rcv,vd->rcd", logits_gradient, head, preferred_element_type=jnp.float32
        )
        hidden_gradient = reduce_shards(hidden_gradient, jax.lax.psum, vocab_axis)
        return head_gradient, hidden_gradient.astype(hidden.dtype)

    xs = tuple(split_positions(x, chunk) for x in (hidden, targets, normalizers, gradient))
    head_gradient, hidden_gradient = jax.lax.scan(one, jnp.zeros(head.shape, jnp.float32), xs)
    return join_positions(hidden_gradient, targets.shape[1]), sum_parts(head_gradient).astype(
        head.dtype
    )


def _backward_kept(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    slopes: jax.Array,
    gradient: jax.Array,
    *,
    vocab_axis: str | None,
    sum_parts: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Return what `_backward_shard` does, from the slopes: no pass over positions and words but
    the two matrix products. What a position's log-prob weighs is put on its hidden state."""
    chunk = slopes.shape[2]
    hidden, gradient = (split_positions(x, chunk) for x in (hidden, gradient[..., None]))
    weighted = (hidden * gradient).astype(hidden.dtype)
    head_gradient = jnp.einsum(
        "nrcv,nrcd->vd", slopes, weighted, preferred_element_type=jnp.float32
    )
    hidden_gradient = jnp.einsum("nrcv,vd->nrcd", slopes, head, preferred_element_type=jnp.float32)
    hidden_gradient = reduce_shards(hidden_gradient, jax.lax.psum, vocab_axis) * gradient
    hidden_gradient = join_positions(hidden_gradient.astype(hidden.dtype), targets.shape[1])
    return hidden_gradient, sum_parts(head_gradient).astype(head.dtype)


def reduce_shards(
    x: jax.Array, how: Callable[[jax.Array, str], jax.Array], axis: str | None
) -> jax.Array:
    """Reduce `x` over the shards of the vocabulary by `how`, where it is split over `axis`."""
    return how(x, axis) if axis else x


def split_positions(x: jax.Array, chunk: int) -> jax.Array:
    """`[rows, P, ...]` -> `[chunks, rows, P / chunks, ...]`, padded at the end."""
    count = divide_up(x.shape[1], chunk)
    size = divide_up(x.shape[1], count)
    x = jnp.pad(x, [(0, 0), (0, count * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], count, size, *x.shape[2:]).swapaxes(0, 1)


def join_positions(x: jax.Array, positions: int) -> jax.Array:
    """Undo `split_positions`, whose padding is cut off: `[rows, positions, ...]`."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :positions]
