"""Report how many prompts, before sampling, and samples, after it, the token limits cut."""

import logging
import sys
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from halos_jax.config import SamplingConfig
from halos_jax.data.chat.renderer import Renderer
from halos_jax.data.lengths import Tally, report_positions, report_prompts
from halos_jax.models.spec import DecoderConfig
from halos_jax.once import say_once
from halos_jax.sampling.sampler import render_prefix
from halos_jax.types import FINISH_LENGTH, Prompt, Sample

logger = logging.getLogger(__name__)

_MANY_FULL = 0.05  # share of full sets of tokens from which on it is warned of


class Limited(Protocol):
    """The part of a sampler that this module needs."""

    @property
    def settings(self) -> SamplingConfig: ...

    @property
    def renderer(self) -> Renderer: ...

    @property
    def decoder(self) -> DecoderConfig: ...


def check_prompts(sampler: Limited, *sources: tuple[str, Iterable[Prompt]]) -> None:
    """Render prompts as the sampler will, before hours of sampling; log how many will be cut.

    Args:
      sources: (name, prompts) pairs; the log calls the prompts by that name.

    Raises:
      RecordError: if the chat template refuses a prompt.
      ConfigError: if the template alone is longer than `sampling.max_prompt_length`.
    """
    settings, renderer = sampler.settings, sampler.renderer
    prefix, positions = len(render_prefix(settings, renderer)), sampler.decoder.max_positions
    for label, prompts in sources:
        count_cut(renderer, prompts, settings.max_prompt_length, label, prefix=prefix)
    longest = settings.max_prompt_length + settings.max_tokens
    if 0 < positions < longest:
        logger.warning(
            "sampling.max_prompt_length + sampling.max_tokens = %d, but the model was made for %d "
            "positions (max_position_embeddings): its output beyond them is unreliable",
            longest,
            positions,
        )


def count_cut(
    renderer: Renderer, prompts: Iterable[Prompt], limit: int, label: str, *, prefix: int = 0
) -> None:
    """Render prompts and log how many exceed `limit` tokens, with `prefix` more after each."""
    turns, tally = list(dict.fromkeys(prompt.turns for prompt in prompts)), Tally()
    for one, ids in zip(turns, renderer.render_prompts(turns, sys.maxsize), strict=True):
        tally.add(prefix + len(ids), limit)
        if tally.over == 1 and prefix + len(ids) > limit:
            renderer.render_prompt(one, limit - prefix)
    report_prompts(label, tally, limit)


def report_samples(sampler: Limited, samples: Sequence[Sample], label: str) -> None:
    """Log how many samples the token limit has cut, and how many are too long for the model."""
    cut = sum(sample.finish_reason == FINISH_LENGTH for sample in samples)
    limit, positions = sampler.settings.max_tokens, sampler.decoder.max_positions
    if cut and cut == len(samples):
        say_once(
            logger,
            "%s: all %d samples were cut at sampling.max_tokens=%d: none has an end that "
            "the reward could see or the policy learn; raise the limit, or check that the policy "
            "was trained to end its answers",
            label,
            cut,
            limit,
        )
    elif cut:
        say_once(
            logger,
            "%s: %d of %d samples (%.3g %%) were cut at sampling.max_tokens=%d",
            label,
            cut,
            len(samples),
            100 * cut / len(samples),
            limit,
            level=logging.INFO,
        )
    _report_sets(sampler.settings, samples, label)
    tally = Tally()
    for sample in samples:
        tally.add(len(sample.prompt_ids) + len(sample.response_ids), positions)
    report_positions(label, tally, positions)


def measure_samples(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the metrics of a round's samples for its manifest.

    "prompt_pass", the mean pass of their prompts, is among them once one is of a later pass.
    """
    metrics = {
        "samples": len(samples),
        "response_tokens_mean": float(np.mean([len(sample.response_ids) for sample in samples])),
        "truncated": sum(sample.finish_reason == FINISH_LENGTH for sample in samples),
    }
    passes = [sample.prompt.pass_number for sample in samples]
    return metrics | ({"prompt_pass": float(np.mean(passes))} if max(passes, default=1) > 1 else {})


def _report_sets(settings: SamplingConfig, samples: Sequence[Sample], label: str) -> None:
    """Log how many tokens the sets of exact ratios have, and how many sets are full."""
    drawn = (sample.drawn for sample in samples)
    counts = [count for one in drawn if one is not None for count in one.kept_counts]
    if not counts:
        return
    logger.info("%s: a token was drawn from %.3g on average", label, sum(counts) / len(counts))
    full = sum(count >= settings.max_kept for count in counts)
    if full and not settings.top_k:
        say_once(
            logger,
            "%s: %d of %d tokens (%.3g %%) were drawn from the sampling.max_kept=%d likeliest "
            "alone, where sampling.top_p=%g may keep more; raise max_kept to have these too",
            label,
            full,
            len(counts),
            100 * full / len(counts),
            settings.max_kept,
            settings.top_p,
            level=logging.WARNING if full > _MANY_FULL * len(counts) else logging.INFO,
        )
