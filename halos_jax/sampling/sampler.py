"""The sampler: keeps a fixed number of slots full until a shard of prompts is sampled.

Each prompt is prefilled once and forked. Decoding runs in chunks on the device; the host looks at
what a chunk finished only when the next one is under way, so the device never waits for it.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Collection, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from halos_jax import sharding
from halos_jax.config import SamplingConfig
from halos_jax.data.chat.renderer import Renderer
from halos_jax.integers import round_up
from halos_jax.metrics import NonFiniteError
from halos_jax.models.files import vocab
from halos_jax.models.hf.positions import refuse_longer
from halos_jax.models.spec import DecoderConfig
from halos_jax.packing.layout import round_shape
from halos_jax.sampling import decode
from halos_jax.sampling.draws import DecodeSettings
from halos_jax.sampling.responses import decode_output, find_finish, make_sample, pack_sets
from halos_jax.sampling.schedule import (
    Draft,
    Owners,
    Wave,
    choose_kept,
    fill_slots,
    has_idle,
    is_busy,
    plan_waves,
    release_slots,
)
from halos_jax.types import Params, Prompt, Sample

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The compiled sampler of a run; made once by `make_sampler`."""

    settings: SamplingConfig
    renderer: Renderer
    decoder: DecoderConfig
    mesh: Mesh
    stop_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    init_slots: decode.InitSlots
    prefill: decode.Prefill
    admit: decode.Admit
    decode_chunk: decode.DecodeChunk
    unstack: decode.Unstack
    select: decode.SelectSlots


def make_sampler(
    settings: SamplingConfig, renderer: Renderer, decoder: DecoderConfig, mesh: Mesh
) -> Sampler:
    """Make the sampler of `decoder` with the options of `config.sampling`.

    Its `exact_ratios` is off at "auto", which `losses.settle_sampling` replaces: it takes a loss.

    Raises:
      ModelError: if these allow sequences that the model has no angles for.
    """
    longest = settings.max_prompt_length + settings.max_tokens
    refuse_longer(decoder, {"sampling.max_prompt_length + sampling.max_tokens": longest})
    decoder = dataclasses.replace(decoder, remat="none")
    stop_ids = tuple(sorted(renderer.stop_ids))
    unknown = _find_unknown(renderer, decoder)
    is_exact, max_kept = _choose_exact(settings, unknown)
    compiled = decode.compile_decoder(
        DecodeSettings(
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            max_tokens=settings.max_tokens,
            chunk=min(settings.chunk, settings.max_tokens),
            stop_ids=stop_ids,
            unknown=unknown,
            is_exact=is_exact,
            max_kept=max_kept,
        ),
        decoder,
        sharding.replicated(mesh),
    )
    return Sampler(
        settings,
        renderer,
        decoder,
        mesh,
        stop_ids,
        (*settings.stop, *renderer.stop_strings),
        *compiled,
    )


def _choose_exact(
    settings: SamplingConfig, unknown: tuple[tuple[int, int], ...]
) -> tuple[bool, int]:
    """Return whether to keep what tokens are drawn from, and how many tokens to keep at most.

    A greedy choice is no draw, and at temperature 1 from all tokens it is the policy itself.
    """
    is_filtered = settings.top_k > 0 or settings.top_p < 1
    is_policy = settings.temperature == 1 and not is_filtered and not unknown
    if settings.exact_ratios is not True or settings.temperature == 0 or is_policy:
        return False, 0
    return True, (settings.top_k or settings.max_kept) if is_filtered else 0


def _find_unknown(renderer: Renderer, decoder: DecoderConfig) -> tuple[tuple[int, int], ...]:
    """Return the rows of the vocabulary that no token has, to be never drawn."""
    unknown = vocab.find_unknown(renderer.token_ids, decoder.vocab_size)
    if unknown:
        logger.info(
            "%d of %d rows of the vocabulary have no token: they are never sampled",
            sum(stop - start for start, stop in unknown),
            decoder.vocab_size,
        )
    return unknown


def sample_shard(
    sampler: Sampler,
    weights: Params,
    prompts: Sequence[Prompt],
    *,
    seed: int,
    round: int,
    generator: str = "",
    logps_of: Collection[str] = (),
    on_sample: Callable[[int], None] = lambda count: None,
) -> list[Sample]:
    """Sample every prompt of a shard `num_samples_per_prompt` times.

    A sample depends on (seed, round, prompt id, sample id, position) and the policy alone, up to
    the rounding of matrix products of other shapes: the shapes are those of the shard, so the
    same shard gives the same samples, bit for bit.

    Args:
      weights: the policy's params, from `sampler.unstack`.
      logps_of: ids of prompts whose samples have `logps` in any case.
      on_sample: called with the number of samples finished since the last call.

    Returns:
      The samples in the order of the prompts, then of the sample ids.

    Raises:
      NonFiniteError: if the policy gives logits that nothing can be drawn from.
    """
    settings = sampler.settings
    prefix = render_prefix(settings, sampler.renderer)
    room = settings.max_prompt_length - len(prefix)
    rendered = [
        (*sampler.renderer.render_prompt(prompt.turns, room), *prefix) for prompt in prompts
    ]
    drafts = _make_drafts(prompts, rendered, settings.num_samples_per_prompt, seed, round)
    _run_drafts(sampler, weights, drafts, on_sample)
    return [
        make_sample(sampler, draft, generator, has_logps=draft.prompt.prompt_id in logps_of)
        for draft in drafts
    ]


def _make_drafts(
    prompts: Sequence[Prompt],
    rendered: Sequence[tuple[int, ...]],
    samples: int,
    seed: int,
    round: int,
) -> list[Draft]:
    """Return the empty drafts of all samples, in the order of the prompts, with their keys."""
    numbers = [
        (number, sample_id) for number in range(len(prompts)) for sample_id in range(samples)
    ]
    keys = decode.derive_keys(
        seed,
        round,
        [_number_prompt(prompts[number]) for number, _ in numbers],
        [sample_id for _, sample_id in numbers],
    )
    return [
        Draft(prompts[number], rendered[number], sample_id, number, key)
        for (number, sample_id), key in zip(numbers, np.asarray(keys), strict=True)
    ]


def render_prefix(settings: SamplingConfig, renderer: Renderer) -> tuple[int, ...]:
    """Return the ids of `sampling.prefix`, which end every prompt and count as a part of it."""
    return renderer.render_prefix(settings.prefix)


@dataclasses.dataclass(frozen=True)
class _Prefilled:
    """A wave whose prompts have their keys and values, [prompts, T, K, H] a layer."""

    wave: Wave
    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]


@dataclasses.dataclass
class _Shard:
    """A shard under way: the device's slots, who is in them, and who is still to come."""

    slots: decode.Slots
    owners: Owners
    current: _Prefilled | None  # whose drafts come next; None when all have been admitted
    waves: Iterator[Wave]  # after the current one


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """A chunk of decode steps that was started and not read yet, and who was in its slots."""

    output: decode.ChunkOutput
    owners: Owners


def _run_drafts(
    sampler: Sampler, weights: Params, drafts: Sequence[Draft], on_sample: Callable[[int], None]
) -> None:
    """Drive the slots until every draft is finished."""
    shard = _start_shard(sampler, weights, drafts)
    ahead: _Chunk | None = None
    remaining = len(drafts)
    while remaining:
        cancelled = release_slots(shard.owners, sampler.settings.max_tokens)
        _admit_drafts(sampler, weights, shard, cancelled)
        if shard.current is None:
            _shrink(sampler, shard)
        # The device is given the next chunk before the host reads the one before it.
        behind, ahead = ahead, _start_chunk(sampler, weights, shard)
        if behind is not None:
            remaining -= _collect(sampler, behind, on_sample)


def _start_shard(sampler: Sampler, weights: Params, drafts: Sequence[Draft]) -> _Shard:
    """Lay out slots and waves, as many prompts a wave as fill the slots; prefill the first."""
    settings, row_shards = sampler.settings, sharding.num_row_shards(sampler.mesh)
    num_slots = min(settings.slots, round_up(len(drafts), row_shards))
    # Of a coarse grid, so that shards have few lengths and most find their programs compiled.
    length = round_shape(max(len(draft.prompt_ids) for draft in drafts), 16, parts=2)
    samples = settings.num_samples_per_prompt
    wave_size = min(max(num_slots // samples, 1), len(drafts) // samples)
    waves = iter(plan_waves(drafts, size=round_up(wave_size, row_shards), length=length))
    return _Shard(
        slots=sampler.init_slots(slots=num_slots, length=length + settings.max_tokens),
        owners=[None] * num_slots,
        current=_prefill_next(sampler, weights, waves),
        waves=waves,
    )


def _prefill_next(sampler: Sampler, weights: Params, waves: Iterator[Wave]) -> _Prefilled | None:
    wave = next(waves, None)
    if wave is None:
        return None
    tokens, lengths = sharding.put_batch((wave.tokens, wave.lengths), sampler.mesh)
    return _Prefilled(wave, *sampler.prefill(weights, tokens, lengths))


def _admit_drafts(sampler: Sampler, weights: Params, shard: _Shard, cancelled: np.ndarray) -> None:
    """Fill the idle slots, and idle those in `cancelled bool[S]` that nobody fills."""
    while shard.current is not None and has_idle(shard.owners):
        placed = fill_slots(shard.owners, shard.current.wave)
        admission = _make_admission(placed, shard.current.wave.first, len(shard.owners))
        shard.slots = sampler.admit(
            shard.slots, shard.current.keys, shard.current.values, admission, cancelled
        )
        cancelled = np.zeros_like(cancelled)
        if not shard.current.wave.waiting:
            shard.current = _prefill_next(sampler, weights, shard.waves)
    if cancelled.any():
        shard.slots = dataclasses.replace(shard.slots, done=shard.slots.done | cancelled)


def _make_admission(
    placed: Sequence[tuple[int, Draft]], first: int, num_slots: int
) -> decode.Admission:
    """Describe who goes where, padded to one of two sizes: so `admit` is compiled only twice.

    Args:
      placed: slots and drafts, of prompts of one wave.
      first: number of the wave's first prompt.
    """
    few = max(num_slots // 8, 1)
    size = few if len(placed) <= few else num_slots
    slot = np.full((size,), num_slots, np.int32)
    source, token, position = (np.zeros((size,), np.int32) for _ in range(3))
    key = np.zeros((size, 2), np.uint32)
    for row, (number, draft) in enumerate(placed):
        slot[row] = number
        source[row] = draft.prompt_number - first
        token[row] = draft.prompt_ids[-1]
        position[row] = len(draft.prompt_ids) - 1
        key[row] = draft.key
    return decode.Admission(slot, source, token, position, key)


def _shrink(sampler: Sampler, shard: _Shard) -> None:
    """Keep fewer slots where most are idle for good."""
    row_shards = sharding.num_row_shards(sampler.mesh)
    kept = choose_kept(shard.owners, sampler.settings.shrink, row_shards)
    if len(kept) < len(shard.owners):
        shard.slots = sampler.select(shard.slots, np.asarray(kept, np.int32))
        shard.owners = [shard.owners[slot] for slot in kept]


def _start_chunk(sampler: Sampler, weights: Params, shard: _Shard) -> _Chunk | None:
    """Start the next chunk on the device, without waiting for it; None where all slots idle."""
    if not is_busy(shard.owners):
        return None
    shard.slots, output = sampler.decode_chunk(weights, shard.slots)
    for draft in shard.owners:
        if draft is not None:
            draft.steps += output.tokens.shape[1]
    return _Chunk(output, list(shard.owners))


def _collect(sampler: Sampler, chunk: _Chunk, on_sample: Callable[[int], None]) -> int:
    """Read what a chunk drew into its drafts; return how many of them it finished."""
    output: decode.ChunkOutput = jax.device_get(chunk.output)
    tokens, logps, entropies = output.tokens, output.logps, output.entropies
    sets = None if output.kept is None else pack_sets(np.asarray(output.kept))
    finished = 0
    for slot, draft in enumerate(chunk.owners):
        if draft is None or draft.finish_reason:
            continue
        new = int(output.count[slot])
        if not np.isfinite(logps[slot, :new]).all():
            raise NonFiniteError(
                f"the policy gives NaN or infinite logits for prompt {draft.prompt.prompt_id}, "
                f"sample {draft.sample_id}; check model.path, and try "
                "--config.model.compute_dtype=float32"
            )
        draft.ids += tokens[slot, :new].tolist()
        draft.logps += logps[slot, :new].tolist()
        draft.entropies += entropies[slot, :new].tolist()
        if output.drawn_logps is not None:
            draft.drawn_logps += output.drawn_logps[slot, :new].tolist()
        if sets is not None:
            draft.kept_counts += sets.counts[slot, :new].tolist()
            draft.kept.append(sets.ids[slot])
        draft.finish_reason = find_finish(sampler, draft, new, is_done=bool(output.done[slot]))
        if draft.finish_reason:  # detokenised at once: the device is busy with the next chunk
            draft.output = decode_output(sampler, draft)
            finished += 1
    if finished:
        on_sample(finished)
    return finished


def _number_prompt(prompt: Prompt) -> int:
    """Return a 64-bit number that stands for the prompt id."""
    return int.from_bytes(hashlib.sha256(prompt.prompt_id.encode()).digest()[:8], "big")
