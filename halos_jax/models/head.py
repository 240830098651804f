"""The language-model head: log-probabilities of targets without ever forming `[B, T, V]` logits.

Only response positions reach the head; they go through it in chunks. The backward pass forms each
chunk's logits again, or finds what it needs of them kept in the dtype of the hidden states: faster,
for the memory of one number a position and word. Statistics are float32. Under a mesh the rows stay
where they are and the vocabulary may be split over "tensor": every collective is written out.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from halos_jax import sharding
from halos_jax.integers import divide_up
from halos_jax.models.lookup import find_specs, index_in_shard
from halos_jax.models.transforms import (
    Narrowing,
    Ranges,
    mask_logits,
    narrow_logits,
    prepare_transform,
)
from halos_jax.types import Transform

Statistic: TypeAlias = Literal["entropy", "alignment"]
_Found = Any  # log-probs, or these and a statistic: f32[rows, P] each
_Residuals = tuple[jax.Array, jax.Array, jax.Array, Narrowing | None, jax.Array]
_Chunk = tuple[tuple[jax.Array, ...], jax.Array | None]  # results, slopes


class _How(NamedTuple):
    """How the head is computed; see `compute_token_logps`."""

    chunk: int
    softcap: float
    statistic: Statistic | None
    keep: bool
    unknown: Ranges


def compute_token_logps(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    chunk: int,
    softcap: float = 0.0,
    keep: bool = False,
    transform: Transform | None = None,
    unknown: Ranges = (),
) -> jax.Array:
    """Log-probabilities of `targets` under `softmax(project_logits(hidden, head))`.

    Args:
      hidden: `[rows, P, D]`, states of the positions that predict the targets.
      head: `[V, D]`, in the dtype of `hidden`.
      targets: i32[rows, P].
      chunk: positions of a row whose logits exist at one time.
      softcap: of the logits, see `project_logits`.
      keep: keep what the backward pass needs of the logits instead of forming them again.
      transform: what the logits go through before the softmax; None: nothing.
      unknown: rows of the vocabulary that no token has; a transform leaves them out.

    Returns:
      f32[rows, P], in nats.
    """
    how = _How(chunk, softcap, None, keep, unknown)
    logps: jax.Array = _token_logps(hidden, head, targets, prepare_transform(transform), how)
    return logps


def compute_token_statistics(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    chunk: int,
    softcap: float = 0.0,
    keep: bool = False,
    transform: Transform | None = None,
    unknown: Ranges = (),
    statistic: Statistic = "entropy",
) -> tuple[jax.Array, jax.Array]:
    """Return `compute_token_logps` and a statistic of the distributions, both f32[rows, P] in nats.

    The statistic has no gradient: the entropy, or the alignment, log sum_v p(v)^2, the log of the
    probability that a token drawn from p is expected to have.
    """
    how = _How(chunk, softcap, statistic, keep, unknown)
    found: tuple[jax.Array, jax.Array] = _token_logps(
        hidden, head, targets, prepare_transform(transform), how
    )
    return found


def project_logits(hidden: jax.Array, head: jax.Array, softcap: float = 0.0) -> jax.Array:
    """Return the logits f32[..., V] of `hidden [..., D]` and `head [V, D]`.

    A soft cap (Gemma 2) keeps them within +-softcap: `softcap * tanh(logits / softcap)`.
    """
    logits = jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)
    return softcap * jnp.tanh(logits / softcap) if softcap else logits


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _token_logps(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    narrowing: Narrowing | None,
    how: _How,
) -> _Found:
    return _forward(hidden, head, targets, narrowing, how._replace(keep=False))[0]


def _forward(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    narrowing: Narrowing | None,
    how: _How,
) -> tuple[_Found, _Residuals]:
    rows, vocab = find_specs(targets, head)
    vocab_axis = vocab[0]
    run = functools.partial(_forward_shard, how=how, vocab_axis=vocab_axis)
    slopes = PartitionSpec(None, rows[0], None, vocab_axis)
    out_specs = (rows,) * (3 if how.statistic else 2) + ((slopes,) if how.keep else ())
    on_mesh = sharding.run_on_mesh(run, in_specs=(rows, vocab, rows, rows), out_specs=out_specs)
    logps, normalizers, *others = on_mesh(hidden, head, targets, narrowing)
    kept = others.pop() if how.keep else normalizers
    found = (logps, *others) if how.statistic else logps
    return found, (hidden, head, targets, narrowing, kept)


def _backward(
    how: _How, residuals: _Residuals, gradients: _Found
) -> tuple[jax.Array, jax.Array, None, None]:
    gradient = gradients[0] if how.statistic else gradients
    hidden, head, targets, narrowing, kept = residuals
    rows, vocab = find_specs(targets, head)
    vocab_axis, row_axes = vocab[0], rows[0] or ()
    split = sharding.mesh_spec(("vocab", "embed" if row_axes else None), head.shape)
    sum_parts = functools.partial(sharding.sum_parts, row_axes=row_axes, spec=split)
    kept_spec = rows
    if how.keep:
        run = functools.partial(_backward_kept, vocab_axis=vocab_axis, sum_parts=sum_parts)
        kept_spec = PartitionSpec(None, rows[0], None, vocab_axis)
    else:
        run = functools.partial(
            _backward_shard, how=how, vocab_axis=vocab_axis, sum_parts=sum_parts
        )
    in_specs = (rows, vocab, rows, rows, kept_spec, rows)
    on_mesh = sharding.run_on_mesh(run, in_specs=in_specs, out_specs=(rows, split))
    return *on_mesh(hidden, head, targets, narrowing, kept, gradient), None, None


_token_logps.defvjp(_forward, _backward)


def _forward_shard(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    narrowing: Narrowing | None,
    *,
    how: _How,
    vocab_axis: str | None,
) -> tuple[jax.Array, ...]:
    """Return log-probs, log-normalizers and, if asked for, a statistic f32[rows, P] of one device's
    rows, and the slopes of the log-probs `[chunks, rows, P / chunks, V]`."""

    def one(_: None, xs: tuple[jax.Array, jax.Array, Narrowing | None]) -> tuple[None, _Chunk]:
        hidden, targets, narrowing = xs
        logits = project_logits(hidden, head, how.softcap)
        # Each target lies in one vocabulary shard; the others add zero.
        index = index_in_shard(targets, head.shape[0], vocab_axis)
        here = (index >= 0) & (index < head.shape[0])
        picked = jnp.take_along_axis(logits, jnp.where(here, index, 0)[..., None], axis=-1)
        picked = reduce_shards(jnp.where(here, picked[..., 0], 0.0), jax.lax.psum, vocab_axis)
        counted = logits
        if narrowing is not None:
            picked *= narrowing.inverse
            counted = narrow_logits(logits, narrowing, how.unknown, vocab_axis)
        peak = reduce_shards(jnp.max(counted, axis=-1), jax.lax.pmax, vocab_axis)
        if narrowing is not None:  # padding has nothing else
            peak = jnp.where(peak > -jnp.inf, peak, 0.0)
        shifted = counted - peak[..., None]
        weights = jnp.exp(shifted)
        total = reduce_shards(jnp.sum(weights, axis=-1), jax.lax.psum, vocab_axis)
        if narrowing is not None:
            total = jnp.where(total > 0, total, 1.0)
            shifted = jnp.where(shifted > -jnp.inf, shifted, 0.0)
        normalizer = peak + jnp.log(total)
        found: tuple[jax.Array, ...] = (picked - normalizer, normalizer)
        if how.statistic == "alignment":
            squares = reduce_shards(jnp.sum(weights**2, axis=-1), jax.lax.psum, vocab_axis)
            found += (jnp.log(squares) - 2 * jnp.log(total),)
        if how.statistic == "entropy":
            moment = jnp.sum(weights * shifted, axis=-1)
            found += (jnp.log(total) - reduce_shards(moment, jax.lax.psum, vocab_axis) / total,)
        slopes = None
        if how.keep:
            slopes = _differentiate(logits, normalizer, index, narrowing, how, vocab_axis)
            slopes = slopes.astype(hidden.dtype)
        return None, (found, slopes)

    split = functools.partial(split_positions, chunk=how.chunk)
    xs = jax.tree.map(split, (hidden, targets, narrowing))
    _, (found, slopes) = jax.lax.scan(one, None, xs)
    found = tuple(join_positions(x, targets.shape[1]) for x in found)
    return found if slopes is None else (*found, slopes)


def _differentiate(
    logits: jax.Array,
    normalizers: jax.Array,
    index: jax.Array,
    narrowing: Narrowing | None,
    how: _How,
    vocab_axis: str | None,
) -> jax.Array:
    """Return the derivatives of the targets' log-probs by the logits before the soft cap."""
    hits = index[..., None] == jnp.arange(logits.shape[-1])
    counted = logits
    if narrowing is not None:
        counted = mask_logits(logits, narrowing, how.unknown, vocab_axis)
    slopes = hits - jnp.exp(counted - normalizers[..., None])
    if narrowing is not None:
        slopes *= narrowing.inverse[..., None]
    return slopes * (1 - (logits / how.softcap) ** 2) if how.softcap else slopes


def _backward_shard(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    narrowing: Narrowing | None,
    normalizers: jax.Array,
    gradient: jax.Array,
    *,
    how: _How,
    vocab_axis: str | None,
    sum_parts: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of `hidden` and `head`; one sum over the row shards at the end."""

    def one(head_gradient: jax.Array, xs: Any) -> tuple[jax.Array, jax.Array]:
        hidden, targets, narrowing, normalizers, gradient = xs
        logits = project_logits(hidden, head, how.softcap)
        index = index_in_shard(targets, head.shape[0], vocab_axis)
        slopes = _differentiate(logits, normalizers, index, narrowing, how, vocab_axis)
        added, hidden_gradient = pull_back(slopes * gradient[..., None], hidden, head, vocab_axis)
        return head_gradient + added, hidden_gradient

    split = functools.partial(split_positions, chunk=how.chunk)
    xs = jax.tree.map(split, (hidden, targets, narrowing, normalizers, gradient))
    head_gradient, hidden_gradient = jax.lax.scan(one, jnp.zeros(head.shape, jnp.float32), xs)
    return join_positions(hidden_gradient, targets.shape[1]), sum_parts(head_gradient).astype(
        head.dtype
    )


def _backward_kept(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    narrowing: Narrowing | None,
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


def pull_back(
    logits_gradient: jax.Array, hidden: jax.Array, head: jax.Array, vocab_axis: str | None
) -> tuple[jax.Array, jax.Array]:
    """Return a chunk's gradients of the head, f32[V, D], and of the hidden states.

    Args:
      logits_gradient: f32[rows, c, V], of the shard of the vocabulary that `head` is.
      hidden: `[rows, c, D]`.
    """
    logits_gradient = logits_gradient.astype(hidden.dtype)
    head_gradient = jnp.einsum(
        "rcv,rcd->vd", logits_gradient, hidden, preferred_element_type=jnp.float32
    )
    hidden_gradient = jnp.einsum(
        "rcv,vd->rcd", logits_gradient, head, preferred_element_type=jnp.float32
    )
    hidden_gradient = reduce_shards(hidden_gradient, jax.lax.psum, vocab_axis)
    return head_gradient, hidden_gradient.astype(hidden.dtype)


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
