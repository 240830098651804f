"""Drawing tokens from logits: one pass for the draw, its log-probability and the entropy."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float32, Int32, UInt32

from halos_jax.sampling.filters import (
    find_kept,
    find_largest,
    mask_unknown,
    sum_above,
    sum_together,
)
from halos_jax.types import Array

# Tokens whose weights are summed, block by block, to find the one that is drawn: a cumulative sum
# costs by its length squared on some backends.
_BLOCK, _SMALL_BLOCK = 512, 32
# Of top-p: a pass over the logits tests a handful of candidates, a search for the cutoff takes ten.
_MOST_CANDIDATES = 16
_UNIFORM_BITS = 24  # of a float32 uniform; what is rarer than 2^-24 no draw can show


@dataclasses.dataclass(frozen=True)
class DecodeSettings:
    """What a compiled decoder is specialised to."""

    temperature: float
    top_k: int
    top_p: float
    max_tokens: int
    chunk: int
    stop_ids: tuple[int, ...]
    unknown: tuple[tuple[int, int], ...] = ()  # ranges [start, stop) of ids that no token has
    is_exact: bool = False  # whether to say what tokens are drawn from, see `draw_exactly`
    max_kept: int = 0  # of an exact draw with top-k or top-p: most tokens to keep


class ExactDraws(NamedTuple):
    """Tokens, one a slot, and what they were drawn from."""

    tokens: Int32[Array, " S"]
    logps: Float32[Array, " S"]  # at temperature 1, unfiltered, as of `draw_tokens`
    entropies: Float32[Array, " S"]
    drawn_logps: Float32[Array, " S"]  # under the distribution that they were drawn from
    kept: Int32[Array, "S kept"] | None  # its ids, filled up with -1; None: all that tokens have


def draw_tokens(
    logits: Float32[Array, "S V"],
    keys: UInt32[Array, "S 2"],
    generated: Int32[Array, " S"],
    settings: DecodeSettings,
) -> tuple[Int32[Array, " S"], Float32[Array, " S"], Float32[Array, " S"]]:
    """Draw one token a slot; the randomness is (sample's key, response position).

    Also return the tokens' log-probabilities at temperature 1, unfiltered, and the entropy of that
    distribution (nats): ids that no token has are never drawn, but they count as the trainer
    counts them.

    Top-p needs no cutoff: candidates are drawn from the whole distribution, and the first one that
    the likelier tokens do not already make up p for is taken, which is a draw from the kept ones.
    All candidates are tested in one pass. That none passes is rarer than what the uniforms resolve;
    the likeliest candidate is taken then. Where p is so small that many would fail, the cutoff is
    searched for.
    """
    if settings.temperature == 0:
        drawn = jnp.argmax(mask_unknown(logits, settings.unknown), axis=-1).astype(jnp.int32)
        normalizers, top = jax.nn.logsumexp(logits, axis=-1), jnp.max(logits, axis=-1)
        gaps = jnp.sum(_weigh_gaps(logits, top), axis=-1)
        entropies = _find_entropies(gaps, normalizers, top)
        return drawn, _take(logits, drawn) - normalizers, entropies
    return _draw(logits, keys, generated, settings)[:3]


def draw_exactly(
    logits: Float32[Array, "S V"],
    keys: UInt32[Array, "S 2"],
    generated: Int32[Array, " S"],
    settings: DecodeSettings,
) -> ExactDraws:
    """Draw as `draw_tokens` does, and say from which distribution, at a temperature above 0.

    With top-k or top-p, that is a set of at most `settings.max_kept` tokens. It is formed and then
    drawn from, so a token's log-probability is that of its draw up to the rounding of float32.
    Where more tokens than `max_kept` would make up top-p, the likeliest of them are kept. Of tokens
    that are equally likely, only as many are kept as are needed.
    """
    if settings.top_k == 0 and settings.top_p == 1:
        return ExactDraws(*_draw(logits, keys, generated, settings), kept=None)
    allowed = mask_unknown(logits, settings.unknown)
    values, ids = find_largest(allowed, settings.max_kept)
    peak = values[:, :1]
    top = jnp.max(logits, axis=-1) if settings.unknown else peak[:, 0]
    weights = jnp.exp((values - peak) / settings.temperature)
    is_kept = values > -jnp.inf
    plain = _split_blocks(logits)
    parts = [jnp.exp(plain - top[:, None, None]), _weigh_gaps(plain, top)]
    if settings.top_k:
        is_kept &= jnp.arange(values.shape[1]) < settings.top_k
        total, (shares, gaps) = (
            jnp.sum(jnp.where(is_kept, weights, 0.0), axis=-1),
            sum_together(parts),
        )
    else:
        whole = jnp.exp((_split_blocks(allowed) - peak[..., None]) / settings.temperature)
        sums, shares, gaps = sum_together([whole, *parts])
        total = jnp.sum(sums, axis=-1)
    if settings.top_p < 1:
        likelier = jnp.pad(jnp.cumsum(weights, axis=-1), [(0, 0), (1, 0)])[:, :-1]
        is_kept &= likelier < settings.top_p * total[:, None]
    weights = jnp.where(is_kept, weights, 0.0)
    up_to = jnp.cumsum(weights, axis=-1)
    uniforms = _draw_uniforms(keys, generated, 1)
    drawn = _find_first(up_to > uniforms * up_to[:, -1:], weights > 0)
    value = _take(values, drawn)
    normalizers = top + jnp.log(shares.sum(axis=-1))
    return ExactDraws(
        _take(ids, drawn),
        value - normalizers,
        _find_entropies(jnp.sum(gaps, axis=-1), normalizers, top),
        (value - peak[:, 0]) / settings.temperature - jnp.log(up_to[:, -1]),
        jnp.where(is_kept, ids, -1),
    )


def _draw(
    logits: jax.Array, keys: jax.Array, generated: jax.Array, settings: DecodeSettings
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return what `draw_tokens` does at a temperature above 0 and, where nothing but `unknown` is
    left out, the log-probabilities of the draws."""
    allowed = mask_unknown(logits, settings.unknown)
    candidates = count_candidates(settings.top_p)
    searched = 1.0 if candidates else settings.top_p
    # Each weight is relative to the largest of those that it is added to.
    top, peak = jnp.max(logits, axis=-1), jnp.max(allowed, axis=-1)
    if settings.top_k or searched < 1:
        scaled = allowed / settings.temperature
        kept = find_kept(scaled, top_k=settings.top_k, top_p=searched)
        allowed = jnp.where(kept, allowed, -jnp.inf)

    def weigh(
        logits: jax.Array, temperature: float = settings.temperature, peak: jax.Array = peak
    ) -> jax.Array:
        return jnp.exp((logits - jnp.expand_dims(peak, range(1, logits.ndim))) / temperature)

    uniforms = _draw_uniforms(keys, generated, max(candidates, 1))
    blocks, plain = _split_blocks(allowed), _split_blocks(logits)
    sums, shares, gaps = sum_together(
        [weigh(blocks), weigh(plain, 1.0, top), _weigh_gaps(plain, top)]
    )
    normalizers = top + jnp.log(jnp.sum(shares, axis=-1))
    entropies = _find_entropies(jnp.sum(gaps, axis=-1), normalizers, top)
    drawn = invert_cumulative(blocks, sums, uniforms, weigh)
    logps = (_take(logits, drawn[:, 0]) - peak) / settings.temperature
    logps -= jnp.log(jnp.sum(sums, axis=-1))
    if candidates < 2:
        return drawn[:, 0], _take(logits, drawn[:, 0]) - normalizers, entropies, logps
    # Logits are compared, not weights: these may be rounded otherwise where they are formed again.
    likelier = sum_above(weigh(allowed), allowed, jnp.take_along_axis(allowed, drawn, axis=-1))
    accepted = likelier < settings.top_p * jnp.sum(sums, axis=-1, keepdims=True)
    likeliest = jnp.argmin(likelier, axis=-1)
    taken = jnp.where(jnp.any(accepted, axis=-1), jnp.argmax(accepted, axis=-1), likeliest)
    drawn = _take(drawn, taken)
    return drawn, _take(logits, drawn) - normalizers, entropies, logps


def _draw_uniforms(keys: jax.Array, generated: jax.Array, count: int) -> jax.Array:
    """Return f32[S, count] in [0, 1): a function of the sample's key and the position."""

    def draw(key_data: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(key_data), position)
        return jax.random.uniform(key, (count,))

    return jax.vmap(draw)(keys, generated)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, index[:, None], axis=-1)[:, 0]


def _weigh_gaps(logits: jax.Array, top: jax.Array) -> jax.Array:
    """Return `gap exp(-gap)`, with each logit's gap to the largest; 0 of -inf."""
    gaps = jnp.expand_dims(top, range(1, logits.ndim)) - logits
    return jnp.where(gaps < jnp.inf, gaps * jnp.exp(-gaps), 0.0)


def _find_entropies(gaps: jax.Array, normalizers: jax.Array, top: jax.Array) -> jax.Array:
    """Return the entropies f32[S] (nats) of softmax(logits).

    -sum p log p = log Z - top + sum(gap exp(-gap)) / (Z exp(-top)), where log Z is the normalizer:
    all terms are 0 or more, so nothing cancels.

    Args:
      gaps: f32[S], the sums of `_weigh_gaps`.
    """
    share = normalizers - top
    return share + gaps * jnp.exp(-share)


def count_candidates(top_p: float) -> int:
    """Return how many draws are enough for one to be among the kept tokens; 0 where too many are.

    A draw is kept with probability p or more.
    """
    if top_p >= 1:
        return 1
    count = math.ceil(_UNIFORM_BITS / -math.log2(1 - top_p))
    return count if count <= _MOST_CANDIDATES else 0


def _split_blocks(logits: jax.Array) -> jax.Array:
    """Return f32[S, V / _BLOCK, _BLOCK], with -inf behind the last."""
    padding = -logits.shape[1] % _BLOCK
    padded = jnp.pad(logits, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    return padded.reshape(logits.shape[0], -1, _BLOCK)


def invert_cumulative(
    blocks: Float32[Array, "S blocks block"],
    sums: Float32[Array, "S blocks"],
    uniforms: Float32[Array, "S candidates"],
    weigh: Callable[[jax.Array], jax.Array],
) -> Int32[Array, "S candidates"]:
    """Return the first tokens whose cumulative weight exceeds a uniform's share of the
    row.

    One random number a draw: the Gumbel trick would need one for every token of the vocabulary.
    The sum is taken by blocks, then within the block that the number falls into. Weights are formed
    where they are needed: written down, they would be one more pass over the vocabulary.

    Args:
      blocks: the logits, in blocks of 512.
      sums: the sums of their weights.
      uniforms: in [0, 1).
      weigh: from logits `[S, ..., n]` to weights: 0 or more, not all 0 in a row, 0 of -inf; they
        need not sum to 1.
    """
    up_to = jnp.cumsum(sums, axis=-1)
    target = uniforms * up_to[:, -1:]
    index = _find_first(up_to[:, None] > target[..., None], sums[:, None] > 0)
    before = jnp.take_along_axis(up_to - sums, index, axis=-1)
    inside = weigh(jnp.take_along_axis(blocks, index[..., None], axis=1))
    for width in (_SMALL_BLOCK, 1):
        blocks = inside.reshape(*inside.shape[:2], -1, width)
        sums = jnp.sum(blocks, axis=-1)
        up_to = before[..., None] + jnp.cumsum(sums, axis=-1)
        chosen = _find_first(up_to > target[..., None], sums > 0)[..., None]
        before = jnp.take_along_axis(up_to - sums, chosen, axis=-1)[..., 0]
        inside = jnp.take_along_axis(blocks, chosen[..., None], axis=2)[:, :, 0]
        index = index * blocks.shape[2] + chosen[..., 0]
    return index.astype(jnp.int32)


def _find_first(reached: jax.Array, allowed: jax.Array) -> jax.Array:
    """Return along the last axis the first allowed position that is reached, else the last allowed
    one: by rounding, none may be reached."""
    found = reached & allowed
    last = allowed.shape[-1] - 1 - jnp.argmax(allowed[..., ::-1], axis=-1)
    return jnp.where(jnp.any(found, axis=-1), jnp.argmax(found, axis=-1), last)
