"""The sampler: keeps a fixed number of slots full until a shard of prompts is sampled.

Each prompt is prefilled once and forked. Decoding runs in chunks on the device; the host looks at
what a chunk finished only when the next one is under way, so the device never waits for it.
"""

import collections
import dataclasses
import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from halos_jax import sharding
from halos_jax.config import SamplingConfig
from halos_jax.data.chat.renderer import Renderer
from halos_jax.metrics import NonFiniteError
from halos_jax.models.files import vocab
from halos_jax.models.hf.positions import refuse_longer
from halos_jax.models.spec import DecoderConfig
from halos_jax.packing.layout import round_shape
from halos_jax.sampling import decode
from halos_jax.types import FINISH_LENGTH, FINISH_STOP, Prompt, Sample

logger = logging.getLogger(__name__)

# Below so many slots, fewer do not make a step any cheaper.
_FEWEST_SLOTS = 16


@dataclasses.dataclass
class _Job:
    """One sample on its way: what it is and what it has drawn so far."""

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    sample_id: int
    prompt_number: int  # within the shard
    ids: list[int] = dataclasses.field(default_factory=list)
    logps: list[float] = dataclasses.field(default_factory=list)
    finish_reason: str = ""
    output: str = ""  # its text, when it is finished
    steps: int = 0  # that it has been under way for; looked at or not


@dataclasses.dataclass
class _Wave:
    """Prompts that are prefilled, and the jobs that wait to be forked from them."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    first: int  # number of the wave's first prompt
    jobs: collections.deque[_Job]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The compiled sampler of a run; made once by `make_sampler`."""

    settings: SamplingConfig
    renderer: Renderer
    decoder: DecoderConfig
    mesh: Mesh
    stop_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    init_slots: Callable
    prefill: Callable
    admit: Callable
    decode_chunk: Callable
    unstack: Callable
    select: Callable


def make_sampler(
    settings: SamplingConfig, renderer: Renderer, decoder: DecoderConfig, mesh: Mesh
) -> Sampler:
    """Make the sampler of `decoder` with the options of `config.sampling`.

    Raises:
      ModelError: where these allow sequences that the model has no angles for.
    """
    longest = settings.max_prompt_length + settings.max_tokens
    refuse_longer(decoder, {"sampling.max_prompt_length + sampling.max_tokens": longest})
    decoder = dataclasses.replace(decoder, remat="none")
    stop_ids = tuple(sorted(renderer.stop_ids))
    compiled = decode.compile_decoder(
        decode.DecodeSettings(
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            max_tokens=settings.max_tokens,
            chunk=min(settings.chunk, settings.max_tokens),
            stop_ids=stop_ids,
            unknown=_find_unknown(renderer, decoder),
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
    weights: Any,
    prompts: Sequence[Prompt],
    *,
    seed: int,
    round: int,
    generator: str = "",
    on_sample: Callable[[int], None] = lambda count: None,
) -> list[Sample]:
    """Sample every prompt of a shard `num_samples_per_prompt` times.

    A sample depends on (seed, round, prompt id, sample id, position) and the policy alone, up to
    the rounding of matrix products of other shapes: the shapes are those of the shard, so the
    same shard gives the same samples, bit for bit.

    Args:
      weights: the policy's params, from `sampler.unstack`.
      on_sample: called with the number of samples finished since the last call.

    Returns:
      The samples in the order of the prompts, then of the sample ids.

    Raises:
      NonFiniteError: where the policy gives logits that nothing can be drawn from.
    """
    settings = sampler.settings
    prefix = render_prefix(settings, sampler.renderer)
    room = settings.max_prompt_length - len(prefix)
    rendered = [
        (*sampler.renderer.render_prompt(prompt.turns, room), *prefix) for prompt in prompts
    ]
    jobs = [
        _Job(prompt, ids, sample_id, number)
        for number, (prompt, ids) in enumerate(zip(prompts, rendered, strict=True))
        for sample_id in range(settings.num_samples_per_prompt)
    ]
    _run_jobs(sampler, weights, jobs, rendered, seed=seed, round=round, on_sample=on_sample)
    return [_make_sample(sampler, job, generator) for job in jobs]


def render_prefix(settings: SamplingConfig, renderer: Renderer) -> tuple[int, ...]:
    """Return the ids of `sampling.prefix`, which end every prompt and count as a part of it."""
    return renderer.render_prefix(settings.prefix)


def _run_jobs(sampler, weights, jobs, rendered, *, seed, round, on_sample) -> None:
    """Drive the slots until every job has its tokens."""
    settings, row_shards = sampler.settings, sharding.num_row_shards(sampler.mesh)
    num_slots = min(settings.slots, -(-len(jobs) // row_shards) * row_shards)
    # Of a coarse grid, so that shards have few lengths and most find their programs compiled.
    prompt_length = round_shape(max(len(ids) for ids in rendered), 16, parts=2)
    slots = sampler.init_slots(slots=num_slots, length=prompt_length + settings.max_tokens)
    keys = np.asarray(
        decode.derive_keys(
            seed,
            round,
            [_number_prompt(job.prompt) for job in jobs],
            [job.sample_id for job in jobs],
        )
    )
    key_of = {id(job): key for job, key in zip(jobs, keys, strict=True)}
    waves = _plan_waves(sampler, weights, jobs, rendered, num_slots, prompt_length)
    owner: list[_Job | None] = [None] * num_slots
    pending, wave = None, next(waves)
    remaining = len(jobs)
    while remaining:
        cancelled = np.array([job is not None and bool(job.finish_reason) for job in owner])
        # Who has had its steps is done, without a look.
        owner = [
            None if job is None or job.finish_reason or job.steps >= settings.max_tokens else job
            for job in owner
        ]
        free = collections.deque(slot for slot, job in enumerate(owner) if job is None)
        while free and wave is not None:
            pairs = []
            while free and wave.jobs:
                pairs.append((free.popleft(), wave.jobs.popleft()))
            if pairs:
                slots = _admit(sampler, slots, wave, pairs, key_of, cancelled)
                cancelled = np.zeros_like(cancelled)
            for slot, job in pairs:
                owner[slot] = job
            if not wave.jobs:
                wave = next(waves, None)
        if cancelled.any():
            slots = dataclasses.replace(slots, done=slots.done | cancelled)
        if wave is None:
            slots, owner = _shrink(sampler, slots, owner)
        ahead = None
        if any(job is not None for job in owner):
            slots, output = sampler.decode_chunk(weights, slots)
            ahead = (output, list(owner))
            for job in owner:
                if job is not None:
                    job.steps += output.tokens.shape[1]
        if pending is not None:
            remaining -= _collect(sampler, *pending, on_sample)
        pending = ahead


def _shrink(sampler, slots, owner: list[_Job | None]):
    """Keep fewer slots where most are idle for good: a step costs by slots, busy or not.

    When the slots shrink is decided by the shard's own samples, so a shard that is sampled again
    goes through the same shapes.
    """
    busy = [slot for slot, job in enumerate(owner) if job is not None]
    size = _choose_size(
        len(owner), len(busy), sampler.settings.shrink, sharding.num_row_shards(sampler.mesh)
    )
    if size == len(owner):
        return slots, owner
    idle = [slot for slot, job in enumerate(owner) if job is None]
    kept = [*busy, *idle][:size]
    return sampler.select(slots, np.asarray(kept, np.int32)), [owner[slot] for slot in kept]


def _choose_size(size: int, busy: int, factor: int, row_shards: int) -> int:
    while factor:
        fewer = _round_up(size // factor, row_shards)
        if fewer >= size or fewer < max(busy, _FEWEST_SLOTS):
            break
        size = fewer
    return size


def _plan_waves(sampler, weights, jobs, rendered, num_slots, prompt_length):
    """Yield the prompts in waves of as many as fill the slots, prefilled when they are needed."""
    samples = sampler.settings.num_samples_per_prompt
    size = min(max(num_slots // samples, 1), len(rendered))
    row_shards = sharding.num_row_shards(sampler.mesh)
    size = _round_up(size, row_shards)
    for first in range(0, len(rendered), size):
        chosen = rendered[first : first + size]
        tokens = np.zeros((size, prompt_length), np.int32)
        lengths = np.zeros((size,), np.int32)
        for row, ids in enumerate(chosen):
            # The last token is fed by the first decode step.
            tokens[row, : len(ids) - 1] = ids[:-1]
            lengths[row] = len(ids) - 1
        batch = sharding.put_batch((tokens, lengths), sampler.mesh)
        keys, values = sampler.prefill(weights, *batch)
        members = jobs[first * samples : (first + len(chosen)) * samples]
        yield _Wave(keys, values, first, collections.deque(members))


def _admit(sampler, slots, wave: _Wave, pairs, key_of, cancelled: np.ndarray):
    """Put jobs into slots; admissions are padded to one of two sizes, to compile but twice."""
    num_slots = len(cancelled)
    few = max(num_slots // 8, 1)
    size = few if len(pairs) <= few else num_slots
    admission = decode.Admission(
        slot=np.full((size,), num_slots, np.int32),
        source=np.zeros((size,), np.int32),
        token=np.zeros((size,), np.int32),
        position=np.zeros((size,), np.int32),
        key=np.zeros((size, 2), np.uint32),
    )
    for row, (slot, job) in enumerate(pairs):
        admission.slot[row] = slot
        admission.source[row] = job.prompt_number - wave.first
        admission.token[row] = job.prompt_ids[-1]
        admission.position[row] = len(job.prompt_ids) - 1
        admission.key[row] = key_of[id(job)]
    return sampler.admit(slots, wave.keys, wave.values, admission, cancelled)


def _collect(sampler, output, owner, on_sample) -> int:
    """Read what a chunk drew into its jobs; return how many of them it finished."""
    tokens, logps, count, done = jax.device_get(
        (output.tokens, output.logps, output.count, output.done)
    )
    finished = 0
    for slot, job in enumerate(owner):
        if job is None or job.finish_reason:
            continue
        if not np.isfinite(logps[slot, : count[slot]]).all():
            raise NonFiniteError(
                f"the policy gives NaN or infinite logits for prompt {job.prompt.prompt_id}, "
                f"sample {job.sample_id}; check model.path, and try "
                "--config.model.compute_dtype=float32"
            )
        job.ids += tokens[slot, : count[slot]].tolist()
        job.logps += logps[slot, : count[slot]].tolist()
        if _cut_at_stop_string(sampler, job, int(count[slot])):
            job.finish_reason = FINISH_STOP
        elif done[slot]:
            job.finish_reason = FINISH_STOP if job.ids[-1] in sampler.stop_ids else FINISH_LENGTH
        if job.finish_reason:  # detokenised at once: the device is busy with the next chunk
            job.output = _decode_output(sampler, job)
            finished += 1
    if finished:
        on_sample(finished)
    return finished


def _cut_at_stop_string(sampler: Sampler, job: _Job, new: int) -> bool:
    """Cut the job's tokens after the one that completes a stop string; tell if there was one.

    Only the end that the `new` last tokens may have completed is looked at first: a stop string
    has no more tokens than bytes, and the first token of a part may read otherwise.
    """

    def stops(count: int, start: int = 0) -> bool:
        text = sampler.renderer.decode_response(job.ids[start:count], keep_marker=True)
        return any(stop in text for stop in sampler.stop_strings)

    if not sampler.stop_strings:
        return False
    longest = max(len(stop.encode()) for stop in sampler.stop_strings)
    end = len(job.ids)
    if not stops(end, max(end - new - longest - 1, 0)) or not stops(end):
        return False
    low, high = 0, len(job.ids)  # stops(high) and not stops(low)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if stops(middle) else (middle, high)
    del job.ids[high:], job.logps[high:]
    return True


def _decode_output(sampler: Sampler, job: _Job) -> str:
    text = sampler.renderer.decode_response(job.ids)
    for stop in sampler.settings.stop:
        text = text.partition(stop)[0]
    return text


def _make_sample(sampler: Sampler, job: _Job, generator: str) -> Sample:
    return Sample(
        prompt=job.prompt,
        sample_id=job.sample_id,
        output=job.output,
        prompt_ids=tuple(job.prompt_ids),
        response_ids=tuple(job.ids),
        finish_reason=job.finish_reason,
        generator=generator,
        logps=tuple(job.logps) if sampler.settings.keep_logps else None,
    )


def _number_prompt(prompt: Prompt) -> int:
    """Return a 64-bit number that stands for the prompt id."""
    return int.from_bytes(hashlib.sha256(prompt.prompt_id.encode()).digest()[:8], "big")


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
