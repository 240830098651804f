"""The log of feedback: what was counted, and a warning where it teaches little or nothing."""

import logging
import statistics
from collections.abc import Mapping, Sequence

from halos_jax.config import Config
from halos_jax.config.kinds import FEEDBACK_TYPES
from halos_jax.config.tasks import load
from halos_jax.data.items import SMALLEST_CLASS
from halos_jax.once import say_once
from halos_jax.types import Sample

logger = logging.getLogger(__name__)


def report_feedback(
    label: str, counts: Mapping[str, int], samples: Sequence[Sample], config: Config
) -> None:
    """Log what became of scored samples, and warn if the feedback teaches little or nothing.

    Args:
      label: where the feedback is from, such as "round 3".
      counts: the counts of the function that made it.
    """
    settings = config.feedback
    shown = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
    logger.info("%s: %s feedback: %s", label, settings.type, shown)
    rewards = [one.reward for one in samples if one.reward is not None]
    if not rewards:
        return
    warning = load(FEEDBACK_TYPES[settings.type].warn)(config, counts)
    if warning:
        say_once(
            logger,
            "%s: %s; the rewards go from %g to %g, their median is %g",
            label,
            warning,
            min(rewards),
            max(rewards),
            statistics.median(rewards),
        )


def warn_of_pairs(config: Config, counts: Mapping[str, int]) -> str:
    """Return a warning if there is no pair."""
    if counts["pairs"]:
        return ""
    threshold = config.feedback.threshold
    least = 0 if threshold == "auto" else threshold
    gap = counts.get("length_gap", 0)
    return (
        f"no pair of {counts['prompts']} prompts: {counts['single']} have fewer than two rewards, "
        f"and those of the others are equal, or no further apart than feedback.threshold={least:g}"
        + (
            f"; feedback.max_length_gap={config.feedback.max_length_gap:g} rules out {gap}"
            * bool(gap)
        )
    )


def warn_of_groups(config: Config, counts: Mapping[str, int]) -> str:
    """Return a warning if no group has rewards that differ, although the loss needs that."""
    groups, losses = counts["examples"], FEEDBACK_TYPES[config.feedback.type].single_losses
    if config.loss["name"] in losses or counts["equal"] + counts["single"] < groups:
        return ""
    return f"each of {groups} groups has equal rewards: none says which of its answers is better"


def warn_of_classes(config: Config, counts: Mapping[str, int]) -> str:
    """Return a warning if one class has few answers or none."""
    labels, desirable = counts["examples"], counts["desirable"]
    advice = (
        "set feedback.threshold to the least reward that is desirable, or to 'median' or 'mean' "
        "with feedback.scope='file' or 'prompt'"
    )
    if not labels:
        return f"no answer gets a label, since all rewards are equal; {advice}"
    fewer = min(desirable, labels - desirable)
    if fewer >= SMALLEST_CLASS * labels:
        return ""
    kind = "desirable" if fewer == desirable else "undesirable"
    return (
        f"{fewer} of {labels} answers ({fewer / labels:.1%}) are {kind}, too few to learn from; "
        f"{advice}"
    )
