"""The extents of a round's range: its first prompts, then further ones until it has its examples.

    "decisions": {"refill": {"extents": [{"stop": 512, "examples": 150}, ...], "ended": "enough"}}

An extent is the part of a round's range that is sampled and scored at once. Each is committed to
the manifest together with what was decided on it: whether another one follows.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from halos_jax.config import FeedbackConfig
from halos_jax.config.kinds import FEEDBACK_TYPES, ITEM_KINDS
from halos_jax.losses import Loss
from halos_jax.workdir.manifests import Manifest

NAME = "refill"  # in `Manifest.decisions`
# Why a round gets no further prompts.
ENOUGH, MOST, USED_UP = "enough", "feedback.max_prompts_factor", "no prompts left"


@dataclasses.dataclass(frozen=True)
class Extent:
    """The part of a round's range up to `stop`, from where the extent before it ends.

    `examples` counts what the round has to train on with this extent and those before it; `counts`
    are the scorer's own counts of this extent.
    """

    stop: int
    examples: int
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)


def is_on(feedback: FeedbackConfig) -> bool:
    """Tell whether a round may get further prompts."""
    return feedback.min_examples > 0


def count_examples(feedback: FeedbackConfig, loss: Loss, counts: Mapping[str, int]) -> int:
    """Return how many examples that teach something feedback has, given its counts.

    They are what `train.batch_size` counts: pairs (two answers each for a loss on single answers),
    labelled answers, or the groups whose rewards differ. For a loss that learns from a reward by
    itself, a group is one whatever its rewards.
    """
    spec = FEEDBACK_TYPES[feedback.type]
    if loss.name in spec.single_losses:
        return counts["examples"]
    found = spec.useful(counts)
    return found * ITEM_KINDS[loss.items].per_pair if spec.pairs else found


def extend(
    feedback: FeedbackConfig, manifest: Manifest, examples: int, *, end: int, shard: int
) -> tuple[int, str]:
    """Return where the round's range ends from now on, and why it does not grow if it does not.

    It grows by a shard at a time, or by less where the round may have no more.

    Args:
      manifest: the round's, with its range up to now, all of which is scored.
      examples: how many the round has.
      end: where the run's budget or its prompts end.
      shard: how many prompts are sampled together.
    """
    extents = read_extents(manifest)
    first = (extents[0].stop if extents else manifest.stop) - manifest.start
    most = manifest.start + int(first * feedback.max_prompts_factor)
    stop = max(min(manifest.stop + shard, most, end), manifest.stop)
    if examples >= feedback.min_examples:
        return manifest.stop, ENOUGH
    if stop == manifest.stop:
        return stop, USED_UP if end <= most else MOST
    return stop, ""


def read_extents(manifest: Manifest) -> list[Extent]:
    """Return the extents that are committed, in order."""
    return [Extent(**one) for one in manifest.decisions.get(NAME, {}).get("extents", ())]


def add_extent(manifest: Manifest, extent: Extent, ended: str) -> dict[str, Any]:
    """Return `decisions` with one more extent, and why no other one follows ("": one does)."""
    extents = [dataclasses.asdict(one) for one in (*read_extents(manifest), extent)]
    return {NAME: {"extents": extents, "ended": ended}}


def has_ended(manifest: Manifest) -> bool:
    """Tell whether the round has got all its prompts."""
    return bool(manifest.decisions.get(NAME, {}).get("ended"))


def measure_refill(manifest: Manifest) -> dict[str, int]:
    """Return the metrics of a round whose extents are all committed."""
    extents = read_extents(manifest)
    return {
        "feedback_extensions": len(extents) - 1,
        "feedback_refilled": extents[-1].stop - extents[0].stop,
    }
