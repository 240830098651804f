"""The end of a run: which policy it exports, and why it has ended."""

import dataclasses
import logging
from pathlib import Path

import jax

from halos_jax.checkpoints.failures import CheckpointError
from halos_jax.config import Config
from halos_jax.course.best import REWARD, Best, read_best
from halos_jax.course.guard import find_beyond
from halos_jax.course.verdicts import describe_beyond, describe_stop
from halos_jax.policies.policy import load_start
from halos_jax.rounds.context import Run
from halos_jax.rounds.order import count_known
from halos_jax.rounds.outcome.decisions import (
    compare_rounds,
    find_stop,
    find_verdict,
    keeps_best,
    list_done,
    name_start,
)
from halos_jax.rounds.outcome.table import last_round
from halos_jax.rounds.outlook import has_new_prompts, make_budget
from halos_jax.rounds.progress import Progress
from halos_jax.training.followers import take_exported, take_policy
from halos_jax.types import Params
from halos_jax.workdir import manifests
from halos_jax.workdir.manifests import Manifest, round_folder

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Ending:
    """What a run exports: the params of a round's policy, and the words for which it is."""

    params: Params
    round: int
    name: str


def take_final(run: Run, progress: Progress) -> Ending:
    """Return the policy to export at the end of a run.

    It is that of the best round if the run has kept it, and else the last one.

    Raises:
      CheckpointError: if the checkpoint of the best round is gone or damaged.
    """
    last = last_round(run.workdir)
    report_stop(run.config, run.workdir, last)
    manifest = manifests.load_manifest(round_folder(run.workdir, last))
    best = read_best(manifest)
    keeps = keeps_best(run.config, is_evaluated=bool(run.held_out))
    if keeps and best is None and run.held_out:
        logger.warning(
            "final/ holds the last policy: the run was begun without rounds.keep_best, so the "
            "checkpoints of earlier rounds were not kept"
        )
    is_chosen = keeps and best is not None and best.reward is not None
    _report_beyond(run, best.round if best is not None and is_chosen else last, last)
    at_last = best is not None and best.round == progress.round
    if keeps and manifest is not None and best is not None and best.reward is not None:
        _report_best(run.workdir, best, manifest, name_start(run.config))
        if not at_last:
            return _restore_best(run, progress, best.round)
    return Ending(take_exported(progress.state), last, "the last policy")


def _restore_best(run: Run, progress: Progress, round: int) -> Ending:
    """Return the policy of an earlier round, from its checkpoint or, for round 0, from the start.

    The train state is deleted before: a device may have no room for both.
    """
    is_saved = round > 0 or bool(run.config.branch.workdir)
    save_id = run.checkpoints.find_round_end(round) if is_saved else None
    if is_saved and save_id is None:
        raise CheckpointError(
            f"{run.workdir / 'checkpoints'}: the checkpoint of the best round, {round}, is gone; "
            "put it back, or set --config.rounds.keep_best=false to export the last policy"
        )
    jax.tree.map(lambda leaf: leaf.delete(), progress.state)
    if not is_saved:
        params = load_start(run.policy, run.mesh, run.trainer.frozen)
        return Ending(params, 0, name_start(run.config))
    abstract = take_policy(run.trainer.abstract_state.params)
    restored: Params = run.checkpoints.restore_policy(abstract, save_id)
    name = f"the policy of round {round}, the best," if round else name_start(run.config)
    return Ending(restored, round, name)


def report_stop(config: Config, workdir: Path, last: int) -> None:
    """Warn that the guard has ended the run after round `last`, if it has."""
    verdict = find_stop(config, workdir, last + 1)
    if verdict is not None:
        logger.warning("%s", describe_stop(verdict, last, is_last=_is_used_up(config, workdir)))


def _report_beyond(run: Run, round: int, last: int) -> None:
    """Warn if the policy of `round`, which is exported after round `last`, is beyond a bound."""
    broken = find_beyond(run.config.guard, list_done(run.workdir, last)).get(round)
    if broken:
        logger.warning("%s", describe_beyond(round, broken))


def _report_best(workdir: Path, best: Best, last: Manifest, start: str) -> None:
    """Log which round is the best, and by how much it is better than the last and than round 0,
    whose policy is `start`, in words."""
    parts, first = [], f"round 0, {'SFT' if 'SFT' in start else 'the branch'}"
    for other, name in ((last.round, f"round {last.round}, the last"), (0, first)):
        change = None if other == best.round else compare_rounds(workdir, best.round, other)
        if change is not None:
            low, high = change.low, change.high
            parts.append(f"{change.value:+.4f} [{low:.4f}, {high:.4f}] against {name}")
    if best.round == 0 and best.of <= 1:
        logger.warning(
            "no round after round 0 was evaluated: final/ holds %s; lower "
            "rounds.eval_every, or set --config.rounds.keep_best=false for the last policy",
            start,
        )
    elif best.round == 0:
        logger.warning(
            "no round was better than %s (%s %.4f): final/ holds that policy; lower "
            "optimizer.learning_rate, or set --config.rounds.keep_best=false for the last policy",
            start,
            REWARD,
            best.reward,
        )
    logger.info(
        "best round: %d, the best of %d (%s %.4f%s); the best of several noisy rounds is "
        "flattered: measure it on other prompts",
        best.round,
        best.of,
        REWARD,
        best.reward,
        "".join(f", {part}" for part in parts),
    )


def has_more(config: Config, workdir: Path) -> bool:
    """Tell whether a complete run has more to do now, without a change of its budget."""
    return has_new_prompts(config, workdir) or _is_released(config, workdir)


def _is_released(config: Config, workdir: Path) -> bool:
    """Tell whether the guard had ended the run before its last round, but now does not any more."""
    rounds = last_round(workdir)
    if find_verdict(workdir, rounds).action != "stop" or count_known(workdir) is None:
        return False
    is_last = _is_used_up(config, workdir)
    return not is_last and find_stop(config, workdir, rounds + 1) is None


def _is_used_up(config: Config, workdir: Path) -> bool:
    """Tell whether the rounds that have begun have used up the budget, as far as is known."""
    known = count_known(workdir)
    if known is None:
        return False
    available = known * config.rounds.passes
    return last_round(workdir) >= make_budget(config, workdir).count_rounds(available)
