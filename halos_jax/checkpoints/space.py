"""Check for room on the disk before the first step, not when a checkpoint is half written."""

from pathlib import Path

from halos_jax import processes, storage
from halos_jax.training.followers import take_policy
from halos_jax.training.state import count_bytes
from halos_jax.types import TrainState


def require_room(workdir: Path, state: TrainState, *, is_trained: bool) -> None:
    """Raise an error if the disk of `workdir` has no room for what the run still has to write.

    That is one more checkpoint or, if the run is trained, only the exported model. All processes
    of the job call this.

    Args:
      state: the train state; abstract arrays will do.

    Raises:
      WorkdirError: saying how much is free and how much is needed.
    """
    if is_trained:
        size, what = count_bytes(take_policy(state.params)), "the exported model"
    else:
        size, what = count_bytes(state), "a checkpoint"
    processes.run_on_all(lambda: storage.require_space(workdir, size, what), storage.WorkdirError)
