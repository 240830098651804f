"""Check for room on the disk before the first step, not when a checkpoint is half written."""

from pathlib import Path

from halos_jax import processes, storage
from halos_jax.training.followers import take_policy
from halos_jax.training.state import count_bytes
from halos_jax.types import TrainState


def require_room(
    workdir: Path, state: TrainState, *, is_trained: bool, checkpoints: int = 1
) -> None:
    """Raise an error if the disk of `workdir` has no room for what the run still has to write.

    That is some checkpoints or, if the run is trained, only the exported model. All processes of
    the job call this.

    Args:
      state: the train state; abstract arrays will do.
      checkpoints: by how many their number will grow at most, until some are deleted.

    Raises:
      WorkdirError: saying how much is free and how much is needed.
    """
    if is_trained:
        size, what = count_bytes(take_policy(state.params)), "the exported model"
    else:
        size = checkpoints * count_bytes(state)
        what = "a checkpoint" if checkpoints == 1 else f"a peak of {checkpoints} more checkpoints"
    processes.run_on_all(lambda: storage.require_space(workdir, size, what), storage.WorkdirError)
