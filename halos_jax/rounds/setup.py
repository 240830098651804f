"""Set up an online run from its config and from the current contents of its workdir."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping

from halos_jax import sharding
from halos_jax.checkpoints.space import require_room
from halos_jax.checkpoints.store import Checkpoints, open_checkpoints
from halos_jax.config import Config
from halos_jax.console.stages import show_count
from halos_jax.course.limits import warn_of_idle
from halos_jax.losses import get_loss, settle_sampling
from halos_jax.models.hf.positions import refuse_longer
from halos_jax.models.lora import Frozen
from halos_jax.packing.layout import LayoutMemory
from halos_jax.policies.branch import pin_round
from halos_jax.policies.policy import Policy, load_frozen, start_policy
from halos_jax.policies.reference import attach_reference, count_room
from halos_jax.policies.teacher import load_teacher
from halos_jax.rewards.held_out import make_scorers
from halos_jax.rewards.scorers import make_scorer
from halos_jax.rounds.context import Rollouts, Run
from halos_jax.rounds.order import load_order, refuse_late, save_order, spread_passes
from halos_jax.rounds.outcome.decisions import find_first, find_needed, keeps_best, lower_rate
from halos_jax.rounds.outlook import find_place, lay_out, make_budget
from halos_jax.rounds.progress import Progress, restore_progress
from halos_jax.rounds.prompts import check_lengths, load_prompts
from halos_jax.rounds.report import report_budget
from halos_jax.rounds.rewind import rewind
from halos_jax.sampling.sampler import make_sampler
from halos_jax.training import loop as training
from halos_jax.training.loop import Trainer
from halos_jax.training.rounding import warn_of_rounding
from halos_jax.training.teacher import Teacher
from halos_jax.workdir.workspace import Workspace

logger = logging.getLogger(__name__)


def make_run(workspace: Workspace) -> tuple[Run, Progress]:
    """Load the parts of the run in an open workspace, and how far it is.

    Raises:
      ConfigError, ModelError, RecordError: if config, model and data do not fit together.
      CheckpointError: if rounds are done but no checkpoint is left.
    """
    config, workdir = pin_round(workspace.config), workspace.workdir
    policy = attach_reference(start_policy(config), config)
    policy.refuse_classifier(config.model.path)
    refuse_longer(policy.decoder, {"train.max_length": config.train.max_length})
    budget, order = make_budget(config, workdir), load_order(config, workdir)
    loaded = load_prompts(config, policy.renderer, budget.limit, order)
    refuse_late(order, loaded.train, budget.used)
    prompts = spread_passes(loaded.train, config, budget.limit)

    def lay_out_from(place: Mapping[str, int]) -> tuple[Config, int]:
        history = workspace.plan_segment(grown=order.growth, **place)
        now = make_budget(config, workdir)
        laid_out, steps = lay_out(config, history, now, len(loaded.train), order)
        return lower_rate(laid_out, workdir, place["round"]), steps

    keeps = keeps_best(config, is_evaluated=bool(loaded.held_out))
    checkpoints, grows = _open_checkpoints(workspace, keeps=keeps)
    laid_out, trainer, progress = _restore(workspace, policy, checkpoints, lay_out_from)
    workspace.begin_execution((progress.round, progress.stage_step))
    workspace.begin_segment(grown=order.growth, **find_place(checkpoints))
    workspace = laid_out
    if workspace.is_writer:
        save_order(order, workdir, workspace.ledger.note_file)
    rounds = budget.count_rounds(len(prompts))
    logger.info(
        "%d prompts, %d held out, %d for the test; %s; mesh %s",
        *map(len, loaded),
        show_count(rounds, "rounds"),
        sharding.describe(workspace.mesh),
    )
    warn_of_idle(workspace.config, rounds)
    report_budget(workspace.config, budget, len(loaded.train), _read_epochs(workspace))
    is_trained = progress.round >= rounds
    require_room(workdir, trainer.abstract_state, is_trained=is_trained, checkpoints=grows)
    _go_back(workspace, checkpoints, progress, keeps=keeps)
    layouts = LayoutMemory()
    run = Run(
        workspace=workspace,
        rollouts=make_rollouts(workspace, policy, layouts),
        policy=policy,
        trainer=trainer,
        checkpoints=checkpoints,
        writer=workspace.open_metrics(int(progress.state.step)),
        prompts=prompts,
        held_out=loaded.held_out,
        test=loaded.test,
        layouts=layouts,
        budget=budget,
        remake=functools.partial(_remake, workspace, policy, trainer, lay_out_from),
    )
    check_lengths(run.rollouts.sampler, config, loaded.cut(budget.num_skip, budget.limit, config))
    progress.budget = budget
    return run, progress


def _read_epochs(workspace: Workspace) -> Callable[[int], int]:
    """Return a function that gives the epochs of a round, as the history has them."""
    return functools.partial(workspace.history.value_in, "train.epochs")


def _open_checkpoints(workspace: Workspace, *, keeps: bool) -> tuple[Checkpoints, int]:
    """Open a run's checkpoints; return them, and by how many they may grow.

    If the run `keeps` the best round's, none is deleted yet: see `_go_back`.
    """
    config, ledger = workspace.config, workspace.ledger
    folder = workspace.workdir / "checkpoints"
    checkpoints = open_checkpoints(folder, keep=config.checkpoint.keep, ledger=ledger)
    if not keeps:
        checkpoints.keep_rounds(find_first(config))
        return checkpoints, 1 + len(find_first(config))
    checkpoints.keep_rounds(None)
    most = 3 if config.guard.action == "retry" else 2
    return checkpoints, min(max(most + 1 - len(checkpoints.list_ids()), 1), most)


def _go_back(
    workspace: Workspace, checkpoints: Checkpoints, progress: Progress, *, keeps: bool
) -> None:
    """Undo the rounds whose checkpoints are lost; then delete the checkpoints nothing needs."""
    config, workdir = workspace.config, workspace.workdir
    rewind(workdir, workspace.ledger, progress.round, has_checkpoint=progress.is_restored)
    sharding.wait_for_all("go back to the last round that is there")
    if keeps:
        checkpoints.keep_rounds(find_needed(config, workdir, progress.round))


def _restore(
    workspace: Workspace,
    policy: Policy,
    checkpoints: Checkpoints,
    lay_out_from: Callable[[Mapping[str, int]], tuple[Config, int]],
) -> tuple[Workspace, Trainer, Progress]:
    """Return the workspace and trainer for the rest of the run, and how far the run is.

    The schedule depends on where the run resumes. If the newest checkpoint is damaged, that is
    earlier than expected, so it is known only after the restore; until then, changes since the
    last start are not recorded.
    """
    frozen = load_frozen(policy, workspace.mesh)  # once: it may fill most of a device
    loss = get_loss(workspace.config.loss)
    teacher = load_teacher(workspace.config, loss, policy, workspace.mesh)
    place = find_place(checkpoints)
    config, steps = lay_out_from(place)
    laid_out = workspace.with_config(config)
    trainer = make_run_trainer(laid_out, policy, frozen, teacher, steps)
    progress = restore_progress(trainer, policy, checkpoints)
    found = find_place(checkpoints)
    if found != place:
        config, steps = lay_out_from(found)
        laid_out = workspace.with_config(config)
        again = make_run_trainer(laid_out, policy, frozen, teacher, steps)
        trainer = dataclasses.replace(again, layouts=trainer.layouts)
    return laid_out, trainer, progress


def _remake(
    workspace: Workspace,
    policy: Policy,
    trainer: Trainer,
    lay_out_from: Callable[[Mapping[str, int]], tuple[Config, int]],
    place: Mapping[str, int],
) -> tuple[Workspace, Trainer]:
    """Return the workspace and trainer for the rest of a run that goes on from `place`."""
    config, steps = lay_out_from(place)
    laid_out = workspace.with_config(config)
    made = make_run_trainer(laid_out, policy, trainer.frozen, trainer.teacher, steps)
    return laid_out, dataclasses.replace(made, layouts=trainer.layouts)


def make_run_trainer(
    workspace: Workspace,
    policy: Policy,
    frozen: Frozen | None,
    teacher: Teacher | None,
    steps: int,
) -> Trainer:
    """Return the trainer for a run of `steps` optimizer steps; it heeds a request to stop."""
    config, mesh, decoder = workspace.config, workspace.mesh, policy.decoder
    if frozen is None:  # an adapter starts at 0: no update is rounded away
        warn_of_rounding(config.optimizer, decoder.params_dtype)
    trainer = training.make_trainer(
        config,
        decoder,
        get_loss(config.loss),
        mesh,
        total_steps=steps,
        frozen=frozen,
        teacher=teacher,
        room=count_room(policy, mesh),
    )
    return dataclasses.replace(trainer, check=workspace.stop.check)


def make_rollouts(workspace: Workspace, policy: Policy, layouts: LayoutMemory) -> Rollouts:
    config, mesh, stop = workspace.config, workspace.mesh, workspace.stop
    renderer = policy.renderer
    return Rollouts(
        workspace,
        sampler=make_sampler(settle_sampling(config), renderer, policy.decoder, mesh),
        scorer=make_scorer(config, mesh, renderer, stop.check, layouts),
        scorers=make_scorers(config, mesh, renderer, stop.check, layouts),
    )
