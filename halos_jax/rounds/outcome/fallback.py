"""The way back to an earlier round's policy, from which the next round starts."""

import dataclasses
import logging

import jax

from halos_jax.checkpoints.failures import CheckpointError
from halos_jax.policies.policy import load_start
from halos_jax.rounds.context import Run
from halos_jax.rounds.outcome.decisions import find_start, find_verdict, name_start
from halos_jax.rounds.progress import Progress
from halos_jax.training import loop as training
from halos_jax.training.state import set_step
from halos_jax.types import TrainState

logger = logging.getLogger(__name__)


def fall_back(run: Run, progress: Progress, round: int) -> Run:
    """Return the run as it goes on in `round`, and put its policy back if the guard said so.

    Params, moments and followers are those of the round to go back to. The count of steps goes on,
    so that the schedule does and no step is written twice; only the learning rate changes. A round
    that is under way has done this already.

    Raises:
      CheckpointError: if the checkpoint to go back to is gone.
    """
    if round < 2 or progress.round != round - 1 or progress.stage_step:
        return run
    if find_verdict(run.workdir, round - 1).action != "retry":
        return run
    workspace, trainer = run.remake({"round": round, "step": int(progress.state.step)})
    run = dataclasses.replace(run, workspace=workspace, trainer=trainer)
    start = find_start(run.workdir, round)
    if start != round - 1:
        progress.state = _restore_start(run, progress.state, start)
    logger.info(
        "round %d starts from %s, with a learning rate of %.3g",
        round,
        f"the policy of round {start}" if start else name_start(run.config),
        run.config.optimizer.learning_rate,
    )
    return run


def _restore_start(run: Run, state: TrainState, start: int) -> TrainState:
    """Return the state at the end of round `start` (0: before the first step), counting on."""
    step = int(state.step)
    jax.tree.map(lambda leaf: leaf.delete(), state)  # a device may have no room for two
    if not start and not run.config.branch.workdir:
        params = load_start(run.policy, run.mesh, run.trainer.frozen)
        return set_step(training.start_state(run.trainer, params), step)
    save_id = run.checkpoints.find_round_end(start)
    if save_id is None:
        raise CheckpointError(
            f"{run.workdir / 'checkpoints'}: the checkpoint at the end of round {start} is gone, "
            "but the guard has decided to go back to it; put it back, or start a new run with "
            "--config.workdir=DIR"
        )
    restored: TrainState = run.checkpoints.restore(run.trainer.abstract_state, save_id)[0]
    return set_step(restored, step)
