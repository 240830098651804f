"""The divergence of a policy from its teacher at each position, over the whole vocabulary.

As in `models.head`, positions go through both heads in chunks, and no more logits than a chunk's
exist at one time. The gradient is written out, and goes to the policy alone. The vocabulary may be
split over "tensor"; statistics are float32.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from halos_jax import sharding
from halos_jax.losses.terms import Divergence
from halos_jax.models.head import (
    join_positions,
    project_logits,
    pull_back,
    reduce_shards,
    split_positions,
)
from halos_jax.models.lookup import find_specs, index_in_shard

_Found = tuple[jax.Array, jax.Array, jax.Array]  # divergences, log-probs of policy and teacher
_Residuals = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How a policy and its teacher are compared.

    Attributes:
      divergence: which divergence, and at which temperature.
      words: the size of the vocabulary that both have. Rows of the heads from there on are padding:
        they belong to no token and have probability 0 on both sides.
      chunk: positions of a row whose logits exist at one time.
      softcap, teacher_softcap: of the logits, see `head.project_logits`.
      keep: keep the slopes of the divergences for the backward pass instead of computing both
        models' logits again.
    """

    divergence: Divergence
    words: int
    chunk: int
    softcap: float = 0.0
    teacher_softcap: float = 0.0
    keep: bool = False


class Divergences(NamedTuple):
    """What `compute_divergences` returns, each f32[rows, P] in nats.

    `policy` and `teacher` are the targets' log-probabilities at the temperature of the divergence;
    they are for metrics and have no gradient.
    """

    values: jax.Array
    policy: jax.Array
    teacher: jax.Array


def compute_divergences(
    hidden: jax.Array,
    head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    targets: jax.Array,
    comparison: Comparison,
) -> Divergences:
    """Return the divergences between the policy's and the teacher's next-token distributions.

    With s the policy's distribution, t the teacher's (both `softmax(logits / temperature)`) and
    m = (1 - beta) s + beta t, a divergence is (Agarwal et al. 2023, equation 1, and as TRL has it)

        beta = 0: KL(t || s)        beta = 1: KL(s || t)
        between: beta KL(t || m) + (1 - beta) KL(s || m)

    Args:
      hidden: `[rows, P, D]`, the policy's states of the positions that predict the targets.
      head: `[V, D]`, in the dtype of `hidden`.
      teacher_hidden, teacher_head: the same of the teacher, `[rows, P, D']` and `[V, D']`.
      targets: i32[rows, P].
    """
    return Divergences(*_compare(hidden, head, teacher_hidden, teacher_head, targets, comparison))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _compare(
    hidden: jax.Array,
    head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    targets: jax.Array,
    comparison: Comparison,
) -> _Found:
    whole = dataclasses.replace(comparison, keep=False)
    return _forward(hidden, head, teacher_hidden, teacher_head, targets, whole)[0]


def _forward(
    hidden: jax.Array,
    head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    targets: jax.Array,
    comparison: Comparison,
) -> tuple[_Found, _Residuals]:
    rows, vocab = find_specs(targets, head)
    run = functools.partial(_forward_shard, comparison=comparison, vocab_axis=vocab[0])
    kept = (PartitionSpec(None, rows[0], None, vocab[0]),) if comparison.keep else ()
    on_mesh = sharding.run_on_mesh(
        run, in_specs=(rows, vocab, rows, vocab, rows), out_specs=(rows, rows, rows, *kept)
    )
    values, policy, teacher, *slopes = on_mesh(hidden, head, teacher_hidden, teacher_head, targets)
    rest = slopes or (teacher_hidden, teacher_head)
    return (values, policy, teacher), (hidden, head, targets, *rest)


def _backward(
    comparison: Comparison, residuals: _Residuals, gradients: _Found
) -> tuple[jax.Array, jax.Array, None, None, None]:
    hidden, head, targets, *rest = residuals
    rows, vocab = find_specs(targets, head)
    row_axes = rows[0] or ()
    split = sharding.mesh_spec(("vocab", "embed" if row_axes else None), head.shape)
    run = functools.partial(
        _backward_shard,
        comparison=comparison,
        vocab_axis=vocab[0],
        sum_parts=functools.partial(sharding.sum_parts, row_axes=row_axes, spec=split),
    )
    slopes = PartitionSpec(None, rows[0], None, vocab[0])
    others = (slopes,) if comparison.keep else (rows, vocab)
    in_specs = (rows, vocab, rows, rows, *others)
    on_mesh = sharding.run_on_mesh(run, in_specs=in_specs, out_specs=(rows, split))
    return *on_mesh(hidden, head, targets, gradients[0], *rest), None, None, None


_compare.defvjp(_forward, _backward)


def _forward_shard(
    hidden: jax.Array,
    head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    targets: jax.Array,
    *,
    comparison: Comparison,
    vocab_axis: str | None,
) -> tuple[jax.Array, ...]:
    """Return the results f32[rows, P] for one device's rows and, if they are to be kept, the slopes
    of the divergences `[chunks, rows, P / chunks, V]`."""

    def one(_: None, xs: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, ...]]:
        found, slopes = _measure(xs, head, teacher_head, comparison, vocab_axis)
        return None, (*found, *((slopes.astype(hidden.dtype),) if comparison.keep else ()))

    xs = tuple(split_positions(x, comparison.chunk) for x in (hidden, teacher_hidden, targets))
    _, (values, policy, teacher, *kept) = jax.lax.scan(one, None, xs)
    found = (join_positions(x, targets.shape[1]) for x in (values, policy, teacher))
    return *found, *kept


def _backward_shard(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    gradient: jax.Array,
    *rest: jax.Array,
    comparison: Comparison,
    vocab_axis: str | None,
    sum_parts: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of `hidden` and `head`; `rest` are the slopes, if they were kept, or
    else the teacher's states and head."""

    def one(head_gradient: jax.Array, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        hidden, gradient, *others = xs
        if comparison.keep:
            slopes = others[0]
        else:
            _, slopes = _measure((hidden, *others), head, rest[1], comparison, vocab_axis)
        added, hidden_gradient = pull_back(slopes * gradient[..., None], hidden, head, vocab_axis)
        return head_gradient + added, hidden_gradient

    split = functools.partial(split_positions, chunk=comparison.chunk)
    others = (rest[0],) if comparison.keep else (split(rest[0]), split(targets))
    xs = (split(hidden), split(gradient), *others)
    head_gradient, hidden_gradient = jax.lax.scan(one, jnp.zeros(head.shape, jnp.float32), xs)
    joined = join_positions(hidden_gradient, targets.shape[1])
    return joined, sum_parts(head_gradient).astype(head.dtype)


def _measure(
    chunk: tuple[jax.Array, ...],
    head: jax.Array,
    teacher_head: jax.Array,
    comparison: Comparison,
    vocab_axis: str | None,
) -> tuple[_Found, jax.Array]:
    """Return the results f32[rows, c] of a chunk (states of policy and teacher, targets), and the
    slopes f32[rows, c, V] of the divergences: by the policy's logits before the soft cap."""
    hidden, teacher_hidden, targets = chunk
    heat, softcap = comparison.divergence.temperature, comparison.softcap
    index = index_in_shard(targets, head.shape[0], vocab_axis)
    last = index_in_shard(jnp.int32(comparison.words - 1), head.shape[0], vocab_axis)
    is_word = jnp.arange(head.shape[0]) <= last
    logits = project_logits(hidden, head, softcap)
    others = project_logits(teacher_hidden, teacher_head, comparison.teacher_softcap)
    policy = _normalize(logits / heat, is_word, vocab_axis)
    teacher = _normalize(others / heat, is_word, vocab_axis)
    values, slopes = _diverge(policy, teacher, comparison.divergence.beta, vocab_axis)
    slopes /= heat
    if softcap:
        slopes *= 1 - (logits / softcap) ** 2
    here = (index >= 0) & (index < head.shape[0])

    def pick(logps: jax.Array) -> jax.Array:
        picked = jnp.take_along_axis(logps, jnp.where(here, index, 0)[..., None], axis=-1)
        return reduce_shards(jnp.where(here, picked[..., 0], 0.0), jax.lax.psum, vocab_axis)

    return (values, pick(policy), pick(teacher)), slopes


def _normalize(logits: jax.Array, is_word: jax.Array, vocab_axis: str | None) -> jax.Array:
    """Return the log-probabilities f32[rows, c, V] over the words, -infinity elsewhere."""
    logits = jnp.where(is_word, logits, -jnp.inf)
    peak = reduce_shards(jnp.max(logits, axis=-1), jax.lax.pmax, vocab_axis)
    total = jnp.sum(jnp.exp(logits - peak[..., None]), axis=-1)
    total = reduce_shards(total, jax.lax.psum, vocab_axis)
    return logits - (peak + jnp.log(total))[..., None]


def _diverge(
    policy: jax.Array, teacher: jax.Array, beta: float, vocab_axis: str | None
) -> tuple[jax.Array, jax.Array]:
    """Return the divergences f32[rows, c] of log-probabilities f32[rows, c, V], and their slopes.

    By the policy's logits z, KL(t || s) has the slope s - t. For the others, which depend on s by a
    sum of s log(s / q), it is s (log(s / q) - KL(s || q)), with t or m for q; m moves with s, but
    the terms of that cancel.
    """

    def expect(logps: jax.Array, ratios: jax.Array) -> jax.Array:
        total = jnp.sum(jnp.exp(logps) * ratios, axis=-1)
        return reduce_shards(total, jax.lax.psum, vocab_axis)

    is_word = policy > -jnp.inf

    def subtract(one: jax.Array, other: jax.Array) -> jax.Array:
        return jnp.where(is_word, one - other, 0.0)

    if beta == 0:
        values = expect(teacher, subtract(teacher, policy))
        return values, jnp.exp(policy) - jnp.exp(teacher)
    mixture = teacher
    if beta < 1:
        mixture = jnp.logaddexp(policy + math.log1p(-beta), teacher + math.log(beta))
    ratios = subtract(policy, mixture)
    values = own = expect(policy, ratios)
    slopes = jnp.exp(policy) * (ratios - own[..., None])
    if beta < 1:
        values = beta * expect(teacher, subtract(teacher, mixture)) + (1 - beta) * own
        slopes *= 1 - beta
    return values, slopes
