"""How far a run is: the current policy, and the earlier policies that losses compare it with."""

import dataclasses
import logging
import weakref
from collections.abc import Callable
from typing import Any

from halos_jax import sharding
from halos_jax.checkpoints.failures import CheckpointError
from halos_jax.checkpoints.position import Position
from halos_jax.checkpoints.store import Checkpoints
from halos_jax.policies.branch import take_over
from halos_jax.policies.policy import Policy, load_start
from halos_jax.policies.reference import load_sft
from halos_jax.rounds.budget import Budget, RoundPlan
from halos_jax.rounds.context import Run
from halos_jax.rounds.outcome.decisions import find_start
from halos_jax.rounds.outlook import choose_prompts_per_round
from halos_jax.rounds.pending import PendingRound, commit_round
from halos_jax.rounds.proof.origin import UNKNOWN, Origin, check_policy, check_trained, identify
from halos_jax.rounds.report import report_round
from halos_jax.training import loop as training
from halos_jax.training.followers import take_exported, take_policy
from halos_jax.training.loop import Trainer
from halos_jax.types import Params, TrainState
from halos_jax.workdir import manifests
from halos_jax.workdir.manifests import Manifest, round_folder

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Progress:
    """How far a run is: the only mutable state of the loop of rounds.

    Attributes:
      state: the current policy with its optimizer.
      round: the last round whose training is complete.
      stage_step: optimizer steps taken in the next round.
      pending: a round that is trained and evaluated but not committed yet.
      is_restored: whether the policy came from a checkpoint.
      budget: that of the run, with the ranges of the rounds that have begun.
      identified: the state whose policy was identified last, not kept alive, and its origin.
    """

    state: TrainState
    round: int
    stage_step: int = 0
    pending: PendingRound | None = None
    is_restored: bool = True
    budget: Budget = Budget(1, 1)
    identified: tuple[Callable[[], TrainState | None], Origin] = (lambda: None, UNKNOWN)


def restore_progress(trainer: Trainer, policy: Policy, checkpoints: Checkpoints) -> Progress:
    """Restore the newest checkpoint, or start from the SFT checkpoint if there is none."""
    found = checkpoints.restore_newest(trainer.abstract_state)
    if found is None and trainer.config.branch.workdir:
        take_over(trainer.config, trainer, checkpoints)
        found = checkpoints.restore_newest(trainer.abstract_state)
    if found is None:
        params = load_start(policy, trainer.mesh, trainer.frozen)
        state = training.start_state(trainer, params)
        return Progress(state, round=0, is_restored=False)
    state, position = found[0], Position.from_dict(found[1])
    trainer.layouts.load(position.layouts)
    if position.in_stage:
        logger.info("carrying on in round %d after step %d", position.round, position.stage_step)
        return Progress(state, position.rounds_done, position.stage_step)
    logger.info("carrying on after round %d", position.round)
    return Progress(state, position.rounds_done)


def commit_pending(run: Run, progress: Progress) -> Manifest | None:
    """Commit and report the pending round, if there is one; return its manifest."""
    if progress.pending is None:
        return None
    pending, progress.pending = progress.pending, None
    manifest = commit_round(run, pending)
    report_round(run, manifest, progress.budget)
    return manifest


def plan_round(run: Run, progress: Progress, round: int) -> tuple[RoundPlan, dict[str, Any]]:
    """Return the range of `round`, and what the run decides about it by itself.

    A round that has begun keeps the range that its manifest has. The next one starts where it ends
    and gets as many prompts as `choose_prompts_per_round` says; its range is empty if the budget or
    the prompts are used up.
    """
    sharding.wait_for_all(f"plan round {round}")  # the rounds before are on disk, or pending
    manifest = manifests.load_manifest(round_folder(run.workdir, round))
    if manifest is not None:
        return RoundPlan(manifest.start, manifest.stop), {}
    least = progress.budget.plan_next(round, 1, len(run.prompts))
    if least.is_empty:
        return least, {}
    done = [
        progress.pending.as_committed
        if progress.pending is not None and progress.pending.manifest.round == before
        else manifests.load_manifest(round_folder(run.workdir, before))
        for before in range(round)
    ]
    known = [one for one in done if one is not None]
    available = len(run.prompts)
    size, decisions = choose_prompts_per_round(run.config, progress.budget, known, available)
    return progress.budget.plan_next(round, size, available), decisions


def find_before(run: Run, progress: Progress, round: int) -> Manifest | None:
    """Return the manifest of the round that `round` starts from: for the first one, of round 0."""
    before, pending = find_start(run.workdir, round), progress.pending
    if pending is not None and pending.manifest.round == before:
        return pending.as_committed
    return manifests.load_manifest(round_folder(run.workdir, before))


def identify_start(run: Run, progress: Progress, manifest: Manifest) -> Origin:
    """Return what a round samples from: the current policy, which should be that of the round.

    Raises:
      OriginError: if it is not the policy that the round before ended with.
    """
    found = _identify_current(run, progress)
    now = dataclasses.replace(manifest, **run.workspace.name_execution(manifest, "sample"))
    before = find_before(run, progress, manifest.round)
    check_policy(manifest.round, found.fingerprint, before, now)
    return found


def identify_end(run: Run, progress: Progress, manifest: Manifest) -> tuple[Origin, Origin]:
    """Return the policy at the end of a round, and the average of it that is evaluated, if any.

    Raises:
      OriginError: if the round has been trained before, and to another policy.
    """
    state = progress.state
    found = _identify_current(run, progress)
    check_trained(manifest, found.fingerprint)
    return found, found if state.ema is None else _identify(run, take_exported(state))


def _identify_current(run: Run, progress: Progress) -> Origin:
    """Return the origin of the current policy, read from the devices once as long as it stays.

    What changes it in memory afterwards is found in the sampler's weights.
    """
    state, (known, origin) = progress.state, progress.identified
    if known() is not state:
        origin = _identify(run, take_policy(state.params))
        progress.identified = (weakref.ref(state), origin)
    return origin


def _identify(run: Run, params: Params) -> Origin:
    return identify(params, run.trainer.frozen, run.policy.decoder)


def sft_loader(run: Run, progress: Progress) -> Callable[[], Params]:
    """Return a function that gives the params of the reference "sft".

    Before the first step they are those of the policy, unless the reference is another model.
    """
    is_own = run.policy.reference is None and not run.config.branch.workdir
    if int(progress.state.step) == 0 and is_own:
        return lambda: _params(progress)
    return lambda: run.sft.load(lambda: load_sft(run.policy, run.mesh, run.trainer.frozen))


def load_round_start(run: Run, progress: Progress, round: int) -> Params:
    """Return the params that `round` started training with, even in the middle of the round.

    They are in the checkpoint at the end of the previous round, or of the one that the run went
    back to, which is kept until this round is complete; round 1 starts from the SFT checkpoint, or
    from that of the run that this one branched from.
    """
    if progress.stage_step == 0:
        return _params(progress)
    before = find_start(run.workdir, round)
    if before == 0 and not run.config.branch.workdir:
        start = load_start(run.policy, run.mesh, run.trainer.frozen)
        params: Params = training.add_value_head(run.trainer, start)
        return params
    checkpoint = run.checkpoints.find_round_end(before)
    if checkpoint is None:
        raise CheckpointError(
            f"{run.workdir / 'checkpoints'}: the checkpoint at the end of round {before} is "
            f"gone, but round {round}, which is half trained, compares with its policy; put it "
            "back, or delete the newer checkpoints too and run the same command again"
        )
    restored: Params = run.checkpoints.restore_params(run.trainer.abstract_state.params, checkpoint)
    return restored


def _params(progress: Progress) -> Params:
    params: Params = progress.state.params
    return params
