"""Where a response ends, and the sample that a finished draft becomes."""

import math
from collections.abc import Collection
from typing import NamedTuple, Protocol

import numpy as np

from halos_jax.config import SamplingConfig
from halos_jax.data.chat.renderer import Renderer
from halos_jax.drawn import Drawn
from halos_jax.sampling.schedule import Draft
from halos_jax.types import FINISH_LENGTH, FINISH_STOP, Sample


class Ending(Protocol):
    """The part of a sampler that this module needs."""

    @property
    def settings(self) -> SamplingConfig: ...

    @property
    def renderer(self) -> Renderer: ...

    @property
    def stop_ids(self) -> Collection[int]: ...

    @property
    def stop_strings(self) -> Collection[str]: ...


def find_finish(sampler: Ending, draft: Draft, new: int, *, is_done: bool) -> str:
    """Return why a draft is finished, cut at a stop string if it has one; else ""."""
    if _cut_at_stop_string(sampler, draft, new):
        return FINISH_STOP
    if not is_done:
        return ""
    return FINISH_STOP if draft.ids[-1] in sampler.stop_ids else FINISH_LENGTH


def _cut_at_stop_string(sampler: Ending, draft: Draft, new: int) -> bool:
    """Cut the draft's tokens after the one that completes a stop string; tell if there was one.

    Only the end that the `new` last tokens may have completed is looked at first: a stop string
    has no more tokens than bytes, and the first token of a part may read otherwise.
    """

    def stops(count: int, start: int = 0) -> bool:
        text = sampler.renderer.decode_response(draft.ids[start:count], keep_marker=True)
        return any(stop in text for stop in sampler.stop_strings)

    if not sampler.stop_strings:
        return False
    longest = max(len(stop.encode()) for stop in sampler.stop_strings)
    end = len(draft.ids)
    if not stops(end, max(end - new - longest - 1, 0)) or not stops(end):
        return False
    low, high = 0, len(draft.ids)  # stops(high) and not stops(low)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if stops(middle) else (middle, high)
    for values in (draft.ids, draft.logps, draft.entropies, draft.drawn_logps, draft.kept_counts):
        del values[high:]
    return True


def decode_output(sampler: Ending, draft: Draft) -> str:
    text = sampler.renderer.decode_response(draft.ids)
    for stop in sampler.settings.stop:
        text = text.partition(stop)[0]
    return text


def keeps_logps(settings: SamplingConfig, drawn: Drawn | None) -> bool:
    """Tell whether a sample's record has the log-probability of each token under the policy."""
    # A draw from the policy itself has no other log-probabilities.
    return settings.keep_logps or (settings.exact_ratios is True and not drawn)


def make_sample(
    sampler: Ending, draft: Draft, generator: str, *, has_logps: bool = False
) -> Sample:
    """Return the sample of a finished draft, with `logps` if asked for or kept in any case."""
    drawn = _make_drawn(sampler, draft)
    keep = has_logps or keeps_logps(sampler.settings, drawn)
    return Sample(
        prompt=draft.prompt,
        sample_id=draft.sample_id,
        output=draft.output,
        prompt_ids=tuple(draft.prompt_ids),
        response_ids=tuple(draft.ids),
        finish_reason=draft.finish_reason,
        generator=generator,
        logps=tuple(draft.logps) if keep else None,
        sum_logps=math.fsum(draft.logps),
        mean_entropy=math.fsum(draft.entropies) / len(draft.entropies),
        drawn=drawn,
    )


def _make_drawn(sampler: Ending, draft: Draft) -> Drawn | None:
    if not draft.drawn_logps:
        return None
    ids = np.concatenate(draft.kept).astype("<i4") if draft.kept else np.zeros(0, "<i4")
    return Drawn(
        sampler.settings.temperature,
        tuple(draft.drawn_logps),
        tuple(draft.kept_counts),
        ids[: sum(draft.kept_counts)].tobytes(),
    )


class Sets(NamedTuple):
    """The kept tokens of a chunk: how many at each token, and the ids of each slot's."""

    counts: np.ndarray  # i64[S, chunk]
    ids: list[np.ndarray]


def pack_sets(kept: np.ndarray) -> Sets:
    """Pack the ids i32[S, chunk, kept] of a chunk, which are filled up with -1, for all slots."""
    kept = np.sort(kept, axis=-1)  # -1 before the first
    is_id = kept >= 0
    counts = is_id.sum(axis=-1)
    return Sets(counts, np.split(kept[is_id], np.cumsum(counts.sum(axis=-1))[:-1]))
