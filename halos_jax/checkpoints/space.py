"""Room on the disk, asked for before the first step and not when a checkpoint is half written."""

from pathlib import Path

from halos_jax import processes, storage
from halos_jax.training.followers import take_policy
from halos_jax.training.state import count_bytes
from halos_jax.types import TrainState


def require_room(workdir: Path, state: TrainState, *, is_trained: bool) -> None:
    """Refuse to go on where the disk of `workdir` has no room for what a run still writes.

    Until the run is trained that is a checkpoint, beside those that are there; then it is the
    exported model alone. All processes of the job call this.

    Args:
      state: abstract or not.

    Raises:
      WorkdirError: saying how much is free and how much is needed.
    """
    if is_trained:
        size, what = count_bytes(take_policy(state.params)), "the exported model"
    else:
        size, what = count_bytes(state), "a checkpoint"
    processes.run_on_all(lambda: storage.require_space(workdir, size, what), storage.WorkdirError)
