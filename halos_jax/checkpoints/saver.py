"""When a run saves during training: every few steps, and when it is asked to stop."""

import dataclasses
from collections.abc import Callable

from halos_jax.checkpoints.position import Position
from halos_jax.checkpoints.store import Checkpoints
from halos_jax.metrics import MetricWriter
from halos_jax.types import TrainState
from halos_jax.workdir.interrupt import StopSignal


@dataclasses.dataclass(frozen=True)
class Saver:
    """Saves the train state in the course of a stage.

    Attributes:
      every: steps between two saves, counted from the start of the stage; 0: only a stop saves.
      writer: it is flushed before a save. That raises if a loss was not finite, so no state after
        such a loss is saved.
      stop: tells whether the run was asked to stop; then it saves and ends.
    """

    checkpoints: Checkpoints
    writer: MetricWriter
    stop: StopSignal
    every: int

    def after_step(
        self, state: TrainState, done: int, total: int, locate: Callable[[], Position]
    ) -> None:
        """Save after step `done` of `total` if a checkpoint is due or the run must stop.

        The end of a stage is not saved here.

        Args:
          locate: returns the position of `state` in the run.

        Raises:
          Interrupted: after the save, if the run must stop.
        """
        stopping = self.stop.received(done)
        if done < total and (stopping or (self.every and done % self.every == 0)):
            self.writer.flush()
            self.save(state, locate())
            if stopping:
                self.checkpoints.finish()
                self.stop.interrupt(step=locate().step)

    def save(self, state: TrainState, position: Position) -> None:
        """Start saving `state`, which may be donated as soon as this returns."""
        self.checkpoints.save(position.step, state, position.to_dict())
