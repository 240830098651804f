"""When a run saves while it trains: every so many steps, and where it is asked to stop."""

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
      every: steps between two saves, counted from the start of the stage; 0: none is due.
      writer: what it holds back is written before a save, so that no state after a non-finite
        loss is saved.
      stop: the request to stop; after the save that it causes the run ends.
    """

    checkpoints: Checkpoints
    writer: MetricWriter
    stop: StopSignal
    every: int

    def after_step(
        self, state: TrainState, done: int, total: int, locate: Callable[[], Position]
    ) -> None:
        """Save after step `done` of `total` if that is due or the run must stop.

        The end of a stage is not saved here.

        Args:
          locate: returns the place of `state` in the run.

        Raises:
          Interrupted: where the run must stop; it is saved by then.
        """
        stopping = self.stop.received(done)
        if done < total and (stopping or (self.every and done % self.every == 0)):
            self.writer.flush()
            self.save(state, locate())
            if stopping:
                self.checkpoints.finish()
                self.stop.interrupt(step=locate().step)

    def save(self, state: TrainState, position: Position) -> None:
        """Start to save `state`, which may be donated as soon as this returns."""
        self.checkpoints.save(position.step, state, position.to_dict())
