"""Cases of the sampler: fixed and varied lengths, on the sampler's own path."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from halos_jax import sharding
from halos_jax.bench.ceilings import Ceilings, count_decode_bytes
from halos_jax.bench.training import draw_params
from halos_jax.bench.workloads import Case, make_decoder
from halos_jax.config import Config
from halos_jax.data.chat.renderer import Renderer
from halos_jax.integers import divide_up
from halos_jax.sampling import decode
from halos_jax.sampling.sampler import Sampler, make_sampler, sample_shard
from halos_jax.types import Params, Prompt, Sample, Turn


class _TokenRenderer:
    """What the sampler uses of a renderer: prompts of random tokens, responses without a text."""

    stop_strings: tuple[str, ...] = ()

    def __init__(self, stop_ids: frozenset[int], length: int, vocab_size: int) -> None:
        self.stop_ids = stop_ids
        self.token_ids = frozenset(range(vocab_size))
        self._length, self._vocab_size = length, vocab_size

    def render_prompt(self, turns: Sequence[Turn], max_length: int) -> tuple[int, ...]:
        rng = np.random.default_rng(int(turns[0].content))
        return tuple(rng.integers(3, self._vocab_size, self._length).tolist())

    def render_prefix(self, text: str) -> tuple[int, ...]:
        return ()

    def decode_response(self, ids: Sequence[int], *, keep_marker: bool = False) -> str:
        return ""


def make_token_renderer(stop_ids: frozenset[int], length: int, vocab_size: int) -> Renderer:
    """Return a renderer for the sampler alone: each prompt becomes `length` random tokens."""
    return cast(Renderer, _TokenRenderer(stop_ids, length, vocab_size))


def make_numbered_prompts(count: int) -> list[Prompt]:
    """Return the prompts of a token renderer, which draws their tokens from their numbers."""
    return [Prompt(str(number), (Turn("user", str(number)),)) for number in range(count)]


def run_sampling_case(case: Case, config: Config, mesh: Mesh, ceilings: Ceilings) -> dict[str, Any]:
    """Time one shard of all prompts after another that compiles; return the measurement.

    The policy draws every token with the same probability, so where one token in `case.mean`
    ends a response, the lengths are geometric; the work of a step is that of any policy.
    """
    decoder = make_decoder(case, config.model)
    decoder = dataclasses.replace(decoder, params_dtype=decoder.compute_dtype)
    prompt_length, max_tokens = case.fixed_lengths
    stop_ids = frozenset(range(3, decoder.vocab_size, case.mean)) if case.mean else frozenset()
    slots = min(config.sampling.slots, case.examples * case.samples)
    settings = dataclasses.replace(
        config.sampling,
        num_samples_per_prompt=case.samples,
        max_tokens=max_tokens,
        max_prompt_length=prompt_length,
        slots=slots,
    )
    renderer = make_token_renderer(stop_ids, prompt_length, decoder.vocab_size)
    sampler = make_sampler(settings, renderer, decoder, mesh)
    params = draw_params(decoder, mesh, seed=0)
    weights = sampler.unstack(params | {"final_norm": jnp.zeros_like(params["final_norm"])})
    del params
    prompts = make_numbered_prompts(case.examples)

    def sample() -> tuple[list[Sample], float]:
        start = time.perf_counter()
        samples = sample_shard(sampler, weights, prompts, seed=0, round=1)
        return samples, time.perf_counter() - start

    first = sample()[1]
    samples, seconds = sample()
    decoding = {}
    if not case.mean:
        decoding_seconds = _time_decoding(sampler, weights, slots, prompt_length)
        decoding = {"decode_tokens_per_second": slots * max_tokens / decoding_seconds}
    lengths = np.array([len(one.response_ids) for one in samples])
    tokens = int(lengths.sum())
    mean_length = prompt_length + float((lengths**2).sum() / (2 * tokens))
    bytes_per_token = count_decode_bytes(decoder, slots=slots, mean_length=mean_length) / slots
    return {
        "tokens_per_second": tokens / seconds,
        **decoding,
        "samples_per_second": len(samples) / seconds,
        "of_copy_ceiling": tokens * bytes_per_token / seconds / (ceilings.bytes * mesh.size),
        "mean_tokens": float(lengths.mean()),
        "max_tokens": int(lengths.max()),
        "slots": slots,
        "seconds": seconds,
        "compile_seconds": first - seconds,
        "seconds_per_prompt": seconds / case.examples,
    }


def _time_decoding(sampler: Sampler, weights: Params, slots: int, prompt_length: int) -> float:
    """Return the seconds of the decode steps alone, of a sequence in each slot: no prefill, and
    nobody reads what is drawn."""
    settings = sampler.settings
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, sampler.decoder.vocab_size, (slots, prompt_length)).astype(np.int32)
    batch = sharding.put_batch((tokens, np.full(slots, prompt_length - 1, np.int32)), sampler.mesh)
    keys, values = sampler.prefill(weights, *batch)
    numbers = np.arange(slots, dtype=np.int32)
    admission = decode.Admission(
        slot=numbers,
        source=numbers,
        token=tokens[:, -1],
        position=np.full(slots, prompt_length - 1, np.int32),
        key=np.stack([numbers, numbers], axis=1).astype(np.uint32),
    )
    start = 0.0
    for _ in range(2):  # the first time some of it compiles
        state = sampler.init_slots(slots=slots, length=prompt_length + settings.max_tokens)
        state = sampler.admit(state, keys, values, admission, np.zeros(slots, bool))
        jax.block_until_ready(state)
        start = time.perf_counter()
        for _ in range(divide_up(settings.max_tokens, settings.chunk)):
            state, output = sampler.decode_chunk(weights, state)
        jax.block_until_ready(output)
    return time.perf_counter() - start


def peak_memory_gib() -> float | None:
    """Return the most memory that the process had in use on a device; None where unknown."""
    stats: dict[str, int] = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return None if peak is None else peak / 2**30
