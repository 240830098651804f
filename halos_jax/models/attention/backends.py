"""Causal attention by named backend, over packed views, padded rows and the decoding cache."""

import dataclasses
import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from halos_jax import sharding
from halos_jax.devices import is_deterministic
from halos_jax.integers import round_up
from halos_jax.models.attention import view as views
from halos_jax.models.attention.dense import PLAIN, Scoring, attend_blocks, attend_dense
from halos_jax.once import once_a_run
from halos_jax.types import View

logger = logging.getLogger(__name__)

_SINK_DIMS = 8  # that queries have for their sinks; kernels want multiples of 8


@once_a_run
def choose_backend(
    name: str, head_dim: int, dtype: str, softcap: float = 0.0, *, sinks: bool = False
) -> str:
    """Return the backend that `name` means on this platform: "xla", "cudnn" or "splash".

    "auto" takes the platform's fused kernel where it knows the head dimension, the dtype and the
    soft cap (cuDNN has none). A backend that cannot run here falls back to "xla" with one logged
    line, and so does "auto" where it is the soft cap that rules the kernel out.
    """
    platform = jax.default_backend()
    on_gpu, half = platform in ("gpu", "cuda"), dtype in ("bfloat16", "float16")
    size = head_dim + _SINK_DIMS * sinks
    supported = {
        "cudnn": on_gpu and half and size % 8 == 0 and size <= 256 and not softcap,
        "splash": platform == "tpu" and head_dim % 64 == 0,
    }
    if name == "auto" and on_gpu and half and softcap:
        name = "cudnn"  # far slower without: not in silence
    if name == "auto":
        return next((backend for backend, usable in supported.items() if usable), "xla")
    if not supported.get(name, True):
        logger.warning(
            "attention backend %r cannot run on %s with head dimension %d in %s%s%s: using 'xla'",
            name,
            platform,
            head_dim,
            dtype,
            f" and soft cap {softcap:g}" if softcap else "",
            " and attention sinks" if sinks else "",
        )
        return "xla"
    return name


def attend_causal(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    backend: str,
    scoring: Scoring = PLAIN,
) -> jax.Array:
    """Causal attention of right-padded sequences.

    Args:
      q: `[B, T, N, H]`, k and v: `[B, T, K, H]`; N is a multiple of K (grouped queries).
      lengths: i32[B], real tokens of each sequence; outputs beyond them mean nothing.
      backend: "xla", "cudnn" or "splash".
      scoring: how the scores are formed.

    Returns:
      `[B, T, N, H]` in q's dtype.
    """
    # A window that no sequence of this length leaves is none.
    window = scoring.window if scoring.window < q.shape[1] else 0
    local = (window - 1, 0) if window else None
    if backend == "cudnn" and scoring.sinks is None:
        return _attend_cudnn(q, k, v, lengths, scale=scoring.scale, local=local)
    if backend == "splash":
        return _attend_splash(q, k, v, lengths, dataclasses.replace(scoring, window=window))
    # Padding stands to the right, so causality alone keeps it out of every real token's sight.
    if scoring.sinks is not None and window and 2 * window < q.shape[1]:
        return attend_blocks(q, k, v, scoring)
    if backend == "cudnn" and not window:
        return attend_sink_key(q, k, v, lengths, scoring, attend=_attend_cudnn)
    if scoring.softcap or scoring.sinks is not None:
        distance = jnp.arange(q.shape[1])[:, None] - jnp.arange(q.shape[1])
        visible = (distance >= 0) & (distance < (window or q.shape[1]))
        return attend_dense(q, k, v, visible, scoring)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scoring.scale,
        is_causal=True,
        local_window_size=local,
        implementation="xla",
    )


def _attend_cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    scale: float | None,
    local: tuple[int, int] | None = None,
) -> jax.Array:
    # A length of zero is undefined in the kernel; such a sequence is never read.
    lengths = jnp.maximum(lengths, 1)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        local_window_size=local,
        implementation="cudnn",
    )


def attend_sink_key(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    scoring: Scoring,
    *,
    attend: Callable[..., jax.Array],
) -> jax.Array:
    """Causal attention with sinks by a kernel that knows none, `attend`.

    A key in front of all others, with a value of zero, has the sinks as its scores: queries get
    dimensions of their own for it, in which all other keys are zero. They hold a sink as the sum
    of two numbers, so that bfloat16 does not round it.
    """
    scale = q.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
    assert scoring.sinks is not None
    wanted = scoring.sinks.astype(jnp.float32) / scale
    high = wanted.astype(q.dtype)
    low = jax.lax.stop_gradient(wanted - high.astype(jnp.float32)).astype(q.dtype)
    own = jnp.zeros((q.shape[2], _SINK_DIMS), q.dtype).at[:, 0].set(high).at[:, 1].set(low)
    own = jnp.broadcast_to(own, (*q.shape[:3], _SINK_DIMS))
    q = jnp.concatenate([q, own], axis=-1)
    rows = (1, -(q.shape[1] + 1) % 8)  # the kernel wants an even number
    k, v = (jnp.pad(x, [(0, 0), rows, (0, 0), (0, _SINK_DIMS)]) for x in (k, v))
    k = k.at[:, 0, :, -_SINK_DIMS : 2 - _SINK_DIMS].set(1)
    length, q = q.shape[1], jnp.pad(q, [(0, 0), rows, (0, 0), (0, 0)])
    out = attend(q, k, v, lengths + 1, scale=scale)
    return out[:, 1 : length + 1, :, :-_SINK_DIMS]


def attend_view(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    view: View,
    *,
    backend: str,
    scoring: Scoring = PLAIN,
) -> jax.Array:
    """Attention of packed rows `[rows, T, heads, H]` through their view (see `types.View`).

    Runs under `shard_map`: rows, with everything their view points to, and heads never leave
    their device.
    """

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, view: View, scoring: Scoring) -> jax.Array:
        gathered = [views.to_view(x, view.indices, view.inverse, view.buckets) for x in (q, k, v)]
        outputs = tuple(
            attend_causal(*parts, backend=backend, scoring=scoring)
            for parts in zip(*gathered, views.split_lengths(view), strict=True)
        )
        joined: jax.Array = views.from_view(outputs, view.owner, view.owned, view.buckets)
        return joined

    heads, by_row, by_head = _attention_specs(k)
    specs = (heads, heads, heads, by_row, by_head)
    run = sharding.run_on_mesh(attend, in_specs=specs, out_specs=heads)
    out: jax.Array = run(q, k, v, view, scoring)
    return out


def attend_rows(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    backend: str,
    scoring: Scoring = PLAIN,
) -> jax.Array:
    """Attention of one right-padded sequence a row, `[rows, T, heads, H]`, on the mesh."""

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, scoring: Scoring
    ) -> jax.Array:
        return attend_causal(q, k, v, lengths, backend=backend, scoring=scoring)

    heads, by_row, by_head = _attention_specs(k)
    specs = (heads, heads, heads, by_row, by_head)
    run = sharding.run_on_mesh(attend, in_specs=specs, out_specs=heads)
    out: jax.Array = run(q, k, v, lengths, scoring)
    return out


def _attention_specs(k: jax.Array) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
    """Return the specs of q, k and v, `[rows, T, heads, H]`, of what has rows alone, and of sinks.

    N is a multiple of K, so query heads divide wherever their key heads do.
    """
    spec = sharding.mesh_spec(("rows", None, "kv_heads", None), k.shape)
    return spec, PartitionSpec(spec[0]), PartitionSpec(spec[2])


def attend_cache(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    *,
    backend: str,
    scoring: Scoring = PLAIN,
) -> jax.Array:
    """Attention of one new token a slot over its cache.

    Args:
      q: `[S, N, H]`.
      keys, values: `[S, C, K, H]`, filled up to and including `positions`.
      positions: i32[S], where the new token stands.

    Returns:
      `[S, N, H]`.
    """
    heads, by_row, by_head = _attention_specs(keys)
    attend = functools.partial(_attend_slots, backend=backend)
    new = PartitionSpec(heads[0], heads[2], None)
    specs = (new, heads, heads, by_row, by_head)
    run = sharding.run_on_mesh(attend, in_specs=specs, out_specs=new)
    out: jax.Array = run(q, keys, values, positions, scoring)
    return out


def _attend_slots(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    scoring: Scoring,
    *,
    backend: str,
) -> jax.Array:
    window = scoring.window if scoring.window < keys.shape[1] else 0
    # cuDNN has no sinks; its window is one of causality, which a query against a cache has not.
    if backend == "cudnn" and not window and scoring.sinks is None:
        return _attend_slots_cudnn(q, keys, values, positions, scoring.scale)
    at = jnp.arange(keys.shape[1])
    visible = at <= positions[:, None]
    if window:
        visible &= at > positions[:, None] - window
    return attend_dense(q, keys, values, visible[:, None, None], scoring)


def _attend_slots_cudnn(
    q: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array, scale: float | None
) -> jax.Array:
    """Attend by a kernel that repeats itself to the last bit where XLA_FLAGS ask for it.

    That for one query does not: it adds up parts of the cache in an order that changes. One for
    several queries does, so the queries that share a key head are given to it as a sequence of
    that head, or twice where there is one alone.
    """
    slots, num_heads, size = q.shape
    num_kv_heads = keys.shape[2]
    queries = q[:, None]
    if is_deterministic():
        queries = q.reshape(slots, num_kv_heads, -1, size).swapaxes(1, 2)
        queries = jnp.repeat(queries, 2 if num_heads == num_kv_heads else 1, axis=1)
    out = jax.nn.dot_product_attention(
        queries,
        keys,
        values,
        scale=scale,
        query_seq_lengths=jnp.full_like(positions, queries.shape[1]),
        key_value_seq_lengths=positions + 1,
        implementation="cudnn",
    )
    if not is_deterministic():
        return out[:, 0]
    return out[:, : num_heads // num_kv_heads].swapaxes(1, 2).reshape(q.shape)


def _attend_splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    scoring: Scoring = PLAIN,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Splash attention (TPU Pallas kernel): the view's sequences as segment ids."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, num_heads, head_dim = q.shape[1:]
    padded = round_up(length, 128)
    q, k, v = (jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))) for x in (q, k, v))
    shape = (padded, padded)
    of_head: masks.Mask
    if scoring.window:
        of_head = masks.LocalMask(shape, window_size=(scoring.window - 1, 0), offset=0)
    else:
        of_head = masks.CausalMask(shape)
    attend = kernel.make_splash_mha(
        masks.MultiHeadMask([of_head] * num_heads),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=scoring.softcap or None,
        interpret=interpret,
    )
    scale = head_dim**-0.5 if scoring.scale is None else scoring.scale
    # Padding is a segment of its own; it attends to itself, which keeps its softmax finite.
    segments = (jnp.arange(padded) < lengths[:, None]).astype(jnp.int32)

    def one(q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array) -> jax.Array:
        heads_first = (x.swapaxes(0, 1) for x in (q * scale, k, v))
        segments = kernel.SegmentIds(segment, segment)
        out: jax.Array = attend(*heads_first, segment_ids=segments, sinks=scoring.sinks)
        return out.swapaxes(0, 1)

    out: jax.Array = jax.vmap(one)(q, k, v, segments)
    return out[:, :length].astype(q.dtype)
