"""The train states that rounds began and ended with: from checkpoints, or trained once more."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from halos_jax.audit.rederive.replica import Replica
from halos_jax.rounds.context import Run
from halos_jax.rounds.outcome.decisions import find_start
from halos_jax.training.state import set_step
from halos_jax.types import TrainState

logger = logging.getLogger(__name__)

# Trains a round again from its first state, to its end; None if that cannot be done.
Train = Callable[[Run, TrainState, int], TrainState | None]


def _train_nothing(run: Run, state: TrainState, round: int) -> None:
    """Stand in where no round is trained again."""


@dataclasses.dataclass
class Policies:
    """Finds states; the only mutable part of a verification.

    Attributes:
      replays: whether states that retention has deleted are trained again, from the SFT checkpoint
        or the last checkpoint before on.
      replayed: the rounds that were trained again to have their states.
    """

    replica: Replica
    replays: bool
    train: Train = _train_nothing
    replayed: list[int] = dataclasses.field(default_factory=list)
    _held: tuple[int, TrainState, dict[str, Any]] | None = None

    def begin(self, run: Run, round: int, *, keep: bool = False) -> TrainState | None:
        """Return the state that `round` began with, to be taken over; None if it is gone.

        Args:
          keep: whether it is only looked at, and asked for once more.
        """
        found = self.replica.load_begin(run, round)
        if found is not None or not self.replays:
            return found
        start = find_start(self.replica.scratch, round)
        state = self._take(run, start, keep=keep)
        if state is None or start == round - 1 or keep:
            return state
        return set_step(state, self.replica.count_steps(round - 1))

    def hold(self, run: Run, round: int, state: TrainState) -> None:
        """Keep the state at the end of `round`, for the next round or the evaluation of this."""
        self._held = (round, state, run.trainer.layouts.to_record())

    def end(self, run: Run, round: int) -> TrainState | None:
        """Return the state at the end of `round`, which must not be taken over; None: it is gone.

        It is that of the checkpoint, where there is one.
        """
        found = self.replica.load_end(run, round)
        if found is None and self._held is not None and self._held[0] == round:
            return self._held[1]
        return found

    def _take(self, run: Run, round: int, *, keep: bool) -> TrainState | None:
        """Return the state at the end of `round`, trained again unless it is held."""
        if self._held is None or self._held[0] != round:
            own = self.replica.at(round)
            state = self.begin(own, round)
            after = None if state is None else self.train(own, state, round)
            if after is None:
                return None
            self.replayed.append(round)
            self.hold(own, round, after)
            self.replica.at(round + 1)  # the reward model's shapes are again those of `run`
        if self._held is None:
            raise RuntimeError(f"the state at the end of round {round} was not kept")
        _, held, layouts = self._held
        if not keep:
            self._held = None
        run.trainer.layouts.load(layouts)
        return held
