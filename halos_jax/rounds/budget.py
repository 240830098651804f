"""Which prompts a round gets: the run's budget, split over the fixed prompt order."""

import dataclasses

from halos_jax.config import FeedbackConfig
from halos_jax.losses.registry import Items


@dataclasses.dataclass(frozen=True, slots=True)
class RoundPlan:
    """The prompts of one round: the half-open range `[start, stop)` of the fixed order.

    `stop` is also the number of prompts consumed once the round is done (the next `num_skip`).
    """

    start: int
    stop: int

    @property
    def num_prompts(self) -> int:
        return self.stop - self.start

    @property
    def is_empty(self) -> bool:
        """Whether no prompt is left, which ends the run."""
        return self.start == self.stop


@dataclasses.dataclass(frozen=True, slots=True)
class Budget:
    """How many prompts the run may use, `prompts_per_round` at a time.

    `num_skip` prompts at the start of the order are left out: another run has consumed them.

    Raises:
      ValueError: where a number is impossible.
    """

    total_prompts: int
    prompts_per_round: int
    num_skip: int = 0

    def __post_init__(self) -> None:
        for name, least in (("total_prompts", 1), ("prompts_per_round", 1), ("num_skip", 0)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"rounds.{name}: got {value}, allowed: {least} or more")

    @property
    def num_rounds(self) -> int:
        """Rounds of the whole run, a last partial one included."""
        return -(-self.total_prompts // self.prompts_per_round)

    def plan_round(self, round: int, num_available: int) -> RoundPlan:
        """Return the prompts of `round` (counted from 1) where the order has `num_available`.

        The plan depends on its arguments alone, so a resumed run plans the same rounds. It is
        partial where the budget or the prompts end inside the round, and empty past that.

        Raises:
          ValueError: where `round` is less than 1 or `num_available` is negative.
        """
        if round < 1 or num_available < 0:
            raise ValueError(
                f"got round {round} of {num_available} prompts; allowed: rounds from 1 (round 0 "
                "only evaluates) and 0 prompts or more"
            )
        end = min(self.num_skip + self.total_prompts, num_available)
        start = self.num_skip + (round - 1) * self.prompts_per_round
        stop = min(start + self.prompts_per_round, end)
        return RoundPlan(min(start, end), stop) if stop > start else RoundPlan(end, end)


def expect_examples(num_prompts: int, num_samples: int, feedback: FeedbackConfig, items: Items):
    """Return how many training examples `num_samples` samples of each prompt can give.

    What learning rate schedules are laid out for; ties and unlabelled samples may make it fewer.
    """
    if feedback.type == "binary":
        return num_prompts * num_samples
    if feedback.type == "scalar":
        return num_prompts
    pairs = {"random": num_samples // 2, "all": num_samples * (num_samples - 1) // 2}
    halves = 2 if items in ("unpaired", "controlled", "answer") else 1
    return num_prompts * pairs.get(feedback.mode, 1) * halves
