"""How many prompts a round gets where `rounds.prompts_per_round` is "auto"."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from halos_jax.config import Config
from halos_jax.config.kinds import FEEDBACK_TYPES
from halos_jax.console.stages import show_count
from halos_jax.course.advice import (
    THRESHOLDS,
    RoundSigns,
    describe_staleness,
    find_excess,
    find_staleness,
    read_staleness,
)
from halos_jax.course.budget_text import FEW_STEPS
from halos_jax.integers import divide_up, round_up

DECISION = "prompts_per_round"

# A round whose policy stays as near to the one that sampled it as this may be twice as long: its
# samples still tell almost as much of the new policy as of the old one.
_FRESH_ESS = 0.9
_FRESH_KL = 0.05  # that share for normal log-ratios, as `THRESHOLDS["stale_kl"]`


class Size(NamedTuple):
    """How many prompts a round gets, and why."""

    prompts: int
    reason: str

    def to_record(self) -> dict[str, Any]:
        """Return the JSON object that a manifest's decisions hold."""
        return self._asdict()


def expect_size(config: Config) -> int:
    """Return the prompts of a round, or with "auto" those of the first one.

    These are enough for `FEW_STEPS` optimizer steps if every other prompt is a tie, in multiples
    of `rounds.min_prompts_per_round`.
    """
    rounds, samples = config.rounds, config.sampling.num_samples_per_prompt
    if rounds.prompts_per_round != "auto":
        return rounds.prompts_per_round
    feedback = config.feedback
    a_prompt = FEEDBACK_TYPES[feedback.type].count(1, samples, feedback.mode)
    wanted = divide_up(2 * FEW_STEPS * config.train.batch_size, max(a_prompt, 1))
    return _bound(config, wanted)


def choose_size(config: Config, done: Sequence[RoundSigns], left: int) -> Size:
    """Return the size of the next round.

    It is half of the last one's where the policy has left the samples behind, or the signs say
    that the learning rate is too high: more rounds survive a rate that ruins fewer. It is twice as
    large where the policy has hardly moved in a round, or where its examples made a single step. A
    round that the guard went back from is no sign.

    Args:
      done: the rounds from round 0 on; `prompts` are those that were decided for a round, without
        what was sampled to refill it.
      left: the prompts that are left of the budget, one or more.
    """
    size, reason = _choose(config, done)
    return _fit_rest(config, size, reason, left)


def _choose(config: Config, done: Sequence[RoundSigns]) -> Size:
    if len(done) < 2:
        return Size(expect_size(config), "the first round")
    last = done[-1]
    if last.is_discarded:
        reason = f"the run has gone back to round {last.back_to}, and what it left is no sign"
        return Size(_bound(config, last.prompts), reason)
    stale, excess = find_staleness(last), find_excess(done)
    if stale or excess:
        return _resize(config, last.prompts, 0.5, "; ".join(filter(None, [stale, excess])))
    steps = last.metrics.get("steps_done", 0) - done[-2].metrics.get("steps_done", 0)
    if steps < THRESHOLDS["few_steps"].value:
        return _resize(
            config, last.prompts, 2, f"the last round had {show_count(steps, 'optimizer steps')}"
        )
    fresh = _find_freshness(last)
    if fresh:
        return _resize(config, last.prompts, 2, fresh)
    return Size(_bound(config, last.prompts), "no sign asks for another size")


def _find_freshness(one: RoundSigns) -> str:
    """Say that the policy has hardly left the samples of a round behind; "" if it has."""
    share, kl = read_staleness(one)
    is_fresh = (share is None or share > _FRESH_ESS) and (kl is None or kl < _FRESH_KL)
    if not is_fresh or share is kl is None:
        return ""
    measured = describe_staleness(share, kl)
    return f"at the end of the round its samples were still fresh ({measured})"


def _resize(config: Config, prompts: int, factor: float, reason: str) -> Size:
    """Return a size times a factor, within the bounds; the reason says where they hold it."""
    size = _bound(config, round(prompts * factor))
    if size == prompts:
        name = "min" if factor < 1 else "max"
        reason = f"{reason}, but it has rounds.{name}_prompts_per_round already"
    return Size(size, reason)


def _bound(config: Config, prompts: int) -> int:
    """Return the size within the bounds that `prompts` asks for, a multiple of the lowest one.

    Only the highest one may be something else.
    """
    low, high = config.rounds.min_prompts_per_round, config.rounds.max_prompts_per_round
    return min(max(round_up(prompts, low), low), high)


def _fit_rest(config: Config, size: int, reason: str, left: int) -> Size:
    """Return a size that leaves no rest smaller than the least round."""
    low, high = config.rounds.min_prompts_per_round, config.rounds.max_prompts_per_round
    if left <= size:
        return Size(left, f"{reason}; what is left of the budget")
    if left >= size + low:
        return Size(size, reason)
    if left <= high:
        return Size(left, f"{reason}; with the {left - size} prompts that would be left over")
    half = _bound(config, divide_up(left, 2))
    return Size(half, f"{reason}; half of the {left} prompts that are left")
