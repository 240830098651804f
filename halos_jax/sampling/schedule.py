"""The schedule of a shard, on the host: which sample is in which slot, and which ones wait.

It follows from the shard's own prompts and samples alone, so a shard that is sampled again goes
through the same shapes.
"""

import collections
import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32, UInt32

from halos_jax.integers import round_up
from halos_jax.types import Prompt

# Below so many slots, fewer do not make a step any cheaper.
FEWEST_SLOTS = 16


@dataclasses.dataclass
class Draft:
    """One sample on its way: what it is and what it has drawn so far.

    `finish_reason` and `output` (its text) are empty until it is finished. `steps` counts the
    decode steps that were started for it, whether their tokens have been read or not.

    Example: `Draft(prompt, (1, 5, 2), sample_id=0, prompt_number=3, key=np.array([7, 9]))` after
    a chunk of two tokens has `ids == [8, 4]`, `logps == [-0.3, -2.1]`, `entropies == [0.9, 1.2]`
    and `steps == 2`.
    """

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    sample_id: int
    prompt_number: int  # within the shard
    key: UInt32[np.ndarray, "2"]  # key data
    ids: list[int] = dataclasses.field(default_factory=list)
    logps: list[float] = dataclasses.field(default_factory=list)
    entropies: list[float] = dataclasses.field(default_factory=list)
    # Of exact draws: log-probabilities, how many tokens were kept at each, and of each chunk which,
    # i32[kept], ascending at each token.
    drawn_logps: list[float] = dataclasses.field(default_factory=list)
    kept_counts: list[int] = dataclasses.field(default_factory=list)
    kept: list[np.ndarray] = dataclasses.field(default_factory=list)
    finish_reason: str = ""
    output: str = ""
    steps: int = 0


# The draft that each slot holds, [S]; None where the slot is idle.
Owners = list[Draft | None]


@dataclasses.dataclass(frozen=True)
class Wave:
    """Prompts that are prefilled together, and the drafts that wait to be forked from them.

    Prompts are padded on the right, and waves with empty prompts. A prompt's last token is left
    out: the first decode step of each of its drafts feeds it.
    """

    first: int  # number of the wave's first prompt within the shard
    tokens: Int32[np.ndarray, "prompts T"]
    lengths: Int32[np.ndarray, " prompts"]
    waiting: collections.deque[Draft]


def plan_waves(drafts: Sequence[Draft], *, size: int, length: int) -> list[Wave]:
    """Divide the drafts, in the order of their prompts, into waves of `size` prompts each.

    Args:
      length: tokens that prompts are padded to.
    """
    by_prompt = [
        list(group) for _, group in itertools.groupby(drafts, lambda draft: draft.prompt_number)
    ]
    waves = []
    for first in range(0, len(by_prompt), size):
        tokens, lengths = np.zeros((size, length), np.int32), np.zeros((size,), np.int32)
        chosen = by_prompt[first : first + size]
        for row, (draft, *_) in enumerate(chosen):
            lengths[row] = len(draft.prompt_ids) - 1
            tokens[row, : lengths[row]] = draft.prompt_ids[:-1]
        waves.append(Wave(first, tokens, lengths, collections.deque(itertools.chain(*chosen))))
    return waves


def release_slots(owners: Owners, max_tokens: int) -> Bool[np.ndarray, " S"]:
    """Idle the slots of drafts that are finished, or have had all of their steps.

    Returns:
      the slots that the device may still hold for busy: those of drafts whose tokens have
      been read and end before the limit (at a stop string, say).
    """
    cancelled = np.array([draft is not None and bool(draft.finish_reason) for draft in owners])
    for slot, draft in enumerate(owners):
        # Whoever has had all steps is done, whatever they drew: there is no need to wait for it.
        if draft is not None and (draft.finish_reason or draft.steps >= max_tokens):
            owners[slot] = None
    return cancelled


def fill_slots(owners: Owners, wave: Wave) -> list[tuple[int, Draft]]:
    """Give the idle slots, from the first on, to the wave's drafts; return who went where."""
    free = (slot for slot, draft in enumerate(owners) if draft is None)
    placed = []
    for slot in itertools.islice(free, len(wave.waiting)):
        draft = owners[slot] = wave.waiting.popleft()
        placed.append((slot, draft))
    return placed


def has_idle(owners: Owners) -> bool:
    """Tell whether there is a slot to be filled."""
    return any(draft is None for draft in owners)


def is_busy(owners: Owners) -> bool:
    """Tell whether there is a slot that a draft is in."""
    return any(draft is not None for draft in owners)


def choose_kept(owners: Owners, factor: int, row_shards: int) -> list[int]:
    """Return the slots to keep when no more drafts come: all of them, or the busy ones first.

    Slots become fewer by `factor` (0: never) while all busy ones fit: a step costs by slots, busy
    or not. Their number stays a multiple of `row_shards`.
    """
    busy = [slot for slot, draft in enumerate(owners) if draft is not None]
    size = _choose_size(len(owners), len(busy), factor, row_shards)
    if size == len(owners):
        return list(range(size))
    idle = [slot for slot, draft in enumerate(owners) if draft is None]
    return [*busy, *idle][:size]


def _choose_size(size: int, busy: int, factor: int, row_shards: int) -> int:
    while factor:
        fewer = round_up(size // factor, row_shards)
        if fewer >= size or fewer < max(busy, FEWEST_SLOTS):
            break
        size = fewer
    return size
