"""Where a run stands: the policy at hand, and those that it still compares with."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from halos_jax.checkpoints.failures import CheckpointError
from halos_jax.checkpoints.store import Checkpoints
from halos_jax.policies.start import load_start
from halos_jax.rounds.stages import Run
from halos_jax.training import loop as training
from halos_jax.training.loop import Trainer
from halos_jax.types import TrainState
from halos_jax.workdir.state import Manifest

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Position:
    """Where a run stands: the policy at hand and the last round whose training it has seen."""

    state: TrainState
    round: int  # rounds trained completely
    stage_step: int = 0  # steps already taken in the next round
    # Commits the round that is trained; to be called when its checkpoint should be on disk.
    settle: Callable[[], Manifest] | None = None
    is_restored: bool = True  # from a checkpoint


def restore_position(trainer: Trainer, checkpoints: Checkpoints) -> Position:
    """Return the policy of the newest checkpoint, or the SFT checkpoint where there is none."""
    found = checkpoints.restore_newest(trainer.abstract_state)
    if found is None:
        return Position(
            training.start_state(trainer, load_start(trainer)), round=0, is_restored=False
        )
    state, record = found
    trainer.layouts.load(record["layouts"])
    if record["in_stage"]:
        logger.info("carrying on in round %d after step %d", record["round"], record["stage_step"])
        return Position(state, record["round"] - 1, record["stage_step"])
    logger.info("carrying on after round %d", record["round"])
    return Position(state, record["round"])


def sft_loader(run: Run, position: Position) -> Callable[[], Any]:
    """Return what loads the SFT params; before the first step the policy is a copy of them."""
    if int(position.state.step) == 0:
        return lambda: position.state.params
    return lambda: load_start(run.trainer)


def load_round_start(run: Run, position: Position, round: int) -> Any:
    """Return the params with which `round` has started to train, wherever in it the run stands.

    A checkpoint inside of the round stands beside the one at the end of the round before, which
    goes only when this round is complete; before the first round there is the SFT checkpoint.
    """
    if position.stage_step == 0:
        return position.state.params
    if round == 1:
        return training.add_value_head(run.trainer, load_start(run.trainer))
    checkpoint = run.checkpoints.find_round_end(round - 1)
    if checkpoint is None:
        raise CheckpointError(
            f"{run.workdir / 'checkpoints'}: the checkpoint at the end of round {round - 1} is "
            f"gone, but round {round}, which is half trained, compares with its policy; put it "
            "back, or delete the newer checkpoints too and run the same command again"
        )
    return run.checkpoints.restore_params(run.trainer.abstract_state.params, checkpoint)
