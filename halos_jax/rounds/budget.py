"""Which prompts a round gets: the run's budget, split over the fixed prompt order."""

import dataclasses
from collections.abc import Callable

from halos_jax.config import FeedbackConfig
from halos_jax.config.kinds import FEEDBACK_TYPES, ITEM_KINDS, ItemKind
from halos_jax.integers import divide_up
from halos_jax.packing.batches import count_steps


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


NO_PROMPTS = RoundPlan(0, 0)  # of round 0, which only evaluates


@dataclasses.dataclass(frozen=True, slots=True)
class Budget:
    """How many prompts the run may use, and which of them its rounds have got so far.

    The order is that of all passes, one after the other; a prompt counts once in each. The first
    `num_skip` prompts of the order are left out: another run has consumed them. `opened` holds the
    ranges of the rounds that have begun, which may be of any size. The next round starts
    where the last of them ends. How many rounds there will be is an expectation: it takes the
    rounds that have not begun to have `prompts_per_round` prompts each.
    """

    total_prompts: int
    prompts_per_round: int
    num_skip: int = 0
    opened: tuple[tuple[int, int], ...] = ()

    @property
    def used(self) -> int:
        """Where in the order the rounds that have begun end, and the next one starts."""
        return self.opened[-1][1] if self.opened else self.num_skip

    @property
    def limit(self) -> int:
        """Where in the order the budget ends, if there are enough prompts."""
        return self.num_skip + self.total_prompts

    @property
    def num_rounds(self) -> int:
        """Expected rounds if there are enough prompts, including a partial last round."""
        left = max(self.limit - self.used, 0)
        return len(self.opened) + divide_up(left, self.prompts_per_round)

    def end(self, num_available: int) -> int:
        """Return where in an order of `num_available` prompts the last round ends."""
        return min(self.limit, num_available)

    def measure(self, start: int, stop: int, num_available: int) -> tuple[float, float]:
        """Return the shares of the run's prompts that lie before `start` and before `stop`."""
        total = max(self.end(num_available) - self.num_skip, 1)
        return (start - self.num_skip) / total, (stop - self.num_skip) / total

    def open(self, round: int, start: int, stop: int) -> "Budget":
        """Return the budget once `round` has begun with the range `[start, stop)`.

        Later rounds have not begun, even if they are in `opened`.
        """
        return dataclasses.replace(self, opened=(*self.opened[: round - 1], (start, stop)))

    def plan_next(self, round: int, num_prompts: int, num_available: int) -> RoundPlan:
        """Return the range of `round`, the first that has not begun, if it gets `num_prompts`.

        It is partial, or empty, where the budget or the order ends; see `plan_round`.
        """
        before = self.opened[: round - 1]
        sized = dataclasses.replace(self, prompts_per_round=num_prompts, opened=before)
        return sized.plan_round(round, num_available)

    def count_rounds(self, num_available: int) -> int:
        """Return how many rounds are expected to get prompts from an order of `num_available`."""
        rounds = range(1, self.num_rounds + 1)
        return sum(not self.plan_round(round, num_available).is_empty for round in rounds)

    def plan_round(self, round: int, num_available: int) -> RoundPlan:
        """Return the prompts of `round` (counted from 1), given an order of `num_available`.

        They are those of a round that has begun, and else what is expected. The plan depends only
        on the budget and the arguments, so a resumed run plans the same rounds. It is partial if
        the budget or the prompts run out in the round, and empty after that.

        Raises:
          ValueError: if `round` is less than 1 or `num_available` is negative.
        """
        if round < 1 or num_available < 0:
            raise ValueError(
                f"got round {round} of {num_available} prompts; allowed: rounds from 1 (round 0 "
                "only evaluates) and 0 prompts or more"
            )
        if round <= len(self.opened):
            return RoundPlan(*self.opened[round - 1])
        end = self.end(num_available)
        start = self.used + (round - 1 - len(self.opened)) * self.prompts_per_round
        stop = min(start + self.prompts_per_round, end)
        return RoundPlan(min(start, end), stop) if stop > start else RoundPlan(end, end)


def expect_examples(
    num_prompts: int, num_samples: int, feedback: FeedbackConfig, items: ItemKind
) -> int:
    """Return the most training examples that prompts with `num_samples` samples each can give.

    Learning rate schedules are laid out for this number; ties and unlabelled samples reduce it.
    """
    spec = FEEDBACK_TYPES[feedback.type]
    count = spec.count(num_prompts, num_samples, feedback.mode)
    return count * ITEM_KINDS[items].per_pair if spec.pairs else count


def expect_steps(
    budget: Budget,
    num_available: int,
    *,
    examples: Callable[[int], int],
    batch_size: int,
    epochs: Callable[[int], int],
    replay: float = 0.0,
) -> int:
    """Return how many optimizer steps the rounds that have prompts will take.

    Learning rate schedules are laid out for this number, the best estimate before the run.

    Args:
      num_available: how many prompts the order has.
      examples: maps a number of prompts to the most examples it can give (`expect_examples`).
      epochs: maps the number of a round to how many epochs it trains.
      replay: the share of its examples that are those of earlier rounds, `feedback.replay`.
    """
    return sum(
        count_steps(count, batch_size=batch_size, epochs=epochs(round))
        for round, count in enumerate(list_examples(budget, num_available, examples, replay), 1)
    )


def list_examples(
    budget: Budget, num_available: int, examples: Callable[[int], int], replay: float
) -> list[int]:
    """Return how many examples each round that has prompts trains on at most, replayed ones too.

    The arguments are those of `expect_steps`.
    """
    found, known = list[int](), 0
    for round in range(1, budget.count_rounds(num_available) + 1):
        fresh = examples(budget.plan_round(round, num_available).num_prompts)
        found.append(fresh + count_replayed(fresh, replay, known))
        known += fresh
    return found


def count_replayed(fresh: int, share: float, known: int) -> int:
    """Return how many of `known` examples of earlier rounds make up `share` beside `fresh` ones."""
    return min(round(fresh * share / (1 - share)), known)


def describe_shortage(budget: Budget, num_prompts: int, passes: int = 1) -> str | None:
    """Return a line that says so if there are fewer prompts than the budget allows, or fewer in it
    than so many passes have; else None.

    Args:
      num_prompts: how many prompts a pass has.
    """
    available = num_prompts * passes
    usable = max(available - budget.num_skip, 0)
    after = f" after rounds.num_skip={budget.num_skip}" if budget.num_skip else ""
    if usable >= budget.total_prompts:
        used = divide_up(budget.end(available), num_prompts)
        if used == passes:
            return None
        return (
            f"rounds.passes: got {passes}, but rounds.total_prompts={budget.total_prompts}{after} "
            f"ends in pass {used} over the {num_prompts} prompts of data.train; for all passes set "
            f"--config.rounds.total_prompts={usable}"
        )
    spread, when = (
        (f" in {passes} passes", "before the second pass begins")
        if passes > 1
        else ("", "now or once it has ended")
    )
    return (
        f"data.train: {usable} prompts{spread}{after} are enough for "
        f"{budget.count_rounds(available)} of {budget.num_rounds} rounds "
        f"(rounds.total_prompts={budget.total_prompts}): the run ends after these, and the "
        "learning rate's schedule is laid out for them; raise rounds.passes to use them more than "
        f"once (recipes for GSM8K take ten passes and more), add prompts, {when}, or lower "
        "rounds.total_prompts"
    )
