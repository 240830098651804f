"""The tasks that train once, on fixed data: SFT, reward modelling, offline alignment."""

import dataclasses
import functools
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from halos_jax import sharding
from halos_jax.checkpoints.position import Position
from halos_jax.checkpoints.saver import Saver
from halos_jax.checkpoints.space import require_room
from halos_jax.checkpoints.store import Checkpoints, open_checkpoints
from halos_jax.config import Config
from halos_jax.config.kinds import ITEM_KINDS
from halos_jax.config.tasks import TASKS
from halos_jax.console import compiling
from halos_jax.console.stages import describe_stage
from halos_jax.course.rates import warn_of_rate, warn_of_standstill
from halos_jax.data.chat.closing import close_items
from halos_jax.data.chat.renderer import Renderer
from halos_jax.data.datasets import warn_of_benchmarks
from halos_jax.data.items import load_items, warn_of_classes
from halos_jax.data.lengths import make_lengths
from halos_jax.data.selection import Selection, select_eval, select_train
from halos_jax.devices import explain_memory
from halos_jax.losses import Loss, get_loss
from halos_jax.metrics import WALL_TIME, read_metrics
from halos_jax.models.hf.positions import refuse_longer
from halos_jax.packing.batches import count_steps
from halos_jax.packing.layout import LayoutMemory
from halos_jax.policies import final, source
from halos_jax.policies.branch import take_over
from halos_jax.policies.fixed import add_fixed
from halos_jax.policies.policy import Policy, load_frozen, load_start, start_policy
from halos_jax.policies.reference import attach_reference, count_room
from halos_jax.policies.teacher import load_teacher
from halos_jax.report.live import Reporter, report_on
from halos_jax.rounds.context import seed_batches
from halos_jax.rounds.outcome.decisions import find_first
from halos_jax.rounds.proof.lineage import warn_of_sampler
from halos_jax.tasks.handing import hand_on, hand_on_again
from halos_jax.tasks.inputs import check_inputs, list_inputs
from halos_jax.training import loop as training
from halos_jax.training.balance import report_balance
from halos_jax.training.followers import take_exported
from halos_jax.training.loop import Dataset, Trainer
from halos_jax.training.optim import keep_warmup
from halos_jax.training.rounding import warn_of_rounding
from halos_jax.types import Item, Params, TrainState
from halos_jax.workdir import runs
from halos_jax.workdir.interrupt import StopSignal
from halos_jax.workdir.workspace import Workspace, open_workspace

logger = logging.getLogger(__name__)

_PAGE_EVERY = 60.0  # seconds between two versions of report.html in the course of training


def run_training(config: Config, stop: StopSignal) -> dict[str, float]:
    """Run or resume one of the tasks "sft", "reward_model" and "align".

    The trained model is exported to `config.workdir/final`.

    Returns:
      The last evaluation's metrics; without a held-out set, the last training step's.
    """
    with open_workspace(config, stop) as workspace:
        if runs.is_complete(workspace.info):
            workspace.update_trackers()
            logger.info("%s is complete: nothing to do", workspace.workdir)
            hand_on_again(workspace)
            return _last_metrics(workspace.workdir)
        stop.place = f"task {config.task}"
        workspace = workspace.with_config(source.use_final(workspace.config))
        check_inputs(workspace.ledger, workspace.config, is_begun=workspace.info.is_resumed)
        checkpoints = open_checkpoints(
            workspace.workdir / "checkpoints",
            keep=config.checkpoint.keep,
            ledger=workspace.ledger,
        )
        checkpoints.keep_rounds(find_first(config))
        with report_on(workspace) as reporter:
            try:
                _train(workspace, checkpoints, reporter)
            finally:
                checkpoints.close()
            runs.end_segments(workspace.info)
        return _last_metrics(workspace.workdir)


@dataclasses.dataclass(frozen=True)
class Course:
    """What a run trains, and on what; made by `make_course`.

    `cuts` are the earlier values of `data.n_examples`: each ends a part of the order of the items.
    """

    workspace: Workspace
    policy: Policy
    trainer: Trainer
    items: Sequence[Item]
    cuts: Sequence[int]


def make_course(workspace: Workspace) -> Course:
    """Load the policy's parts and the training items; lay out the schedule."""
    config, loss = workspace.config, choose_loss(workspace.config)
    policy = _start_policy(config, loss)
    items = _load_items(config, loss, policy)
    values = workspace.history.list_values("data.n_examples")
    cuts = [count for count in values[:-1] if count]
    config, steps = _lay_out(workspace, len(items), cuts)
    workspace = workspace.with_config(config)
    return Course(workspace, policy, _make_trainer(workspace, policy, loss, steps), items, cuts)


def plan_course(course: Course) -> Dataset:
    """Plan all steps of a run."""
    config = course.workspace.config
    round = config.train.round
    return training.make_dataset(
        course.trainer,
        course.items,
        seed=seed_batches(config.seed, round) if round else config.seed,
        epochs=config.train.epochs,
        max_items=config.data.n_examples,
        cuts=course.cuts,
        recurring="train" if round else "",
    )


def complete_course(
    course: Course, dataset: Dataset, state: TrainState | None, checkpoints: Checkpoints
) -> tuple[Dataset, Dataset | None]:
    """Return the data with what the starting policy says of it, and the held-out data.

    Args:
      state: the train state if no step has been taken yet.
      checkpoints: those of the run, of which the first is what a branch starts from.
    """
    config, trainer, policy = course.workspace.config, course.trainer, course.policy
    held_out = _load_held_out(config, trainer, policy)
    with explain_memory("train", f"task {config.task}", config):
        start_params = functools.cache(
            functools.partial(_load_start_params, trainer, policy, state, checkpoints)
        )
        files = list_inputs(config).get("data.train", ())
        warn_of_sampler(trainer, dataset.items, [path for _, path in files], start_params)
        return add_fixed(trainer, dataset, held_out, start_params, policy)


def _train(workspace: Workspace, checkpoints: Checkpoints, reporter: Reporter) -> None:
    course = make_course(workspace)
    workspace, trainer, policy = course.workspace, course.trainer, course.policy
    config = workspace.config
    warn_of_rate(config, policy.decoder)
    state, start = _restore(trainer, policy, checkpoints)
    workspace.begin_segment(step=start)
    workspace.begin_execution()
    dataset = plan_course(course)
    is_trained = start >= len(dataset.plan)
    require_room(workspace.workdir, trainer.abstract_state, is_trained=is_trained)
    logger.info(
        "%d examples, %d steps, packed fill %.0f %%; mesh %s",
        len(course.items),
        len(dataset.plan),
        100 * dataset.plan.fill,
        sharding.describe(workspace.mesh),
    )
    dataset, held_out = complete_course(course, dataset, state if start == 0 else None, checkpoints)
    with explain_memory("train", f"task {config.task}", config):
        writer = workspace.open_metrics(resume_step=start)
        saver = Saver(checkpoints, writer, workspace.stop, config.checkpoint.every)
        began = time.monotonic()
        state = training.run_steps(
            trainer,
            state,
            dataset,
            held_out=held_out,
            writer=writer,
            start=start,
            on_step=functools.partial(
                _finish_step, saver, reporter, trainer.layouts, total=len(dataset.plan)
            ),
            label=config.task,
        )
        writer.close()
    _report_steps(config, len(dataset.plan) - start, time.monotonic() - began)
    warn_of_standstill(config, workspace.workdir)
    folder = final.export_final(
        take_exported(state),
        policy,
        workspace.workdir,
        ledger=workspace.ledger,
        frozen=trainer.frozen,
        dtype=final.choose_dtype(config.export.dtype, policy),
        read_at=config.reward.read_at,
    )
    logger.info("the trained model is in %s", folder)
    hand_on(workspace)


def _report_steps(config: Config, steps: int, seconds: float) -> None:
    told = describe_stage(seconds, {"steps": steps}, compiled=compiling.take_seconds())
    logger.info("%s: %s", config.task, told)


def _start_policy(config: Config, loss: Loss) -> Policy:
    """Return the policy that the run starts from, with a score head if the loss needs scores."""
    policy = attach_reference(start_policy(config), config)
    if loss.needs == "scores":
        policy = policy.with_head()
    else:
        policy.refuse_classifier(config.model.path)
    refuse_longer(policy.decoder, {"train.max_length": config.train.max_length})
    return policy


def _load_items(config: Config, loss: Loss, policy: Policy) -> Sequence[Item]:
    """Load the training items, and warn about doubtful ones."""
    data, positions = config.data, policy.decoder.max_positions
    warn_of_benchmarks(data.train)
    chosen = select_train(data, config.seed)
    items = load_fixed_items(config, loss, policy.renderer, data.train, chosen, positions=positions)
    kind = ITEM_KINDS[loss.items]
    if kind.has_classes:
        warn_of_classes(items, data.train)
    if kind.is_weighed:
        report_balance(items, config.loss)
    return items


def _load_held_out(config: Config, trainer: Trainer, policy: Policy) -> Dataset | None:
    if not config.data.held_out:
        return None
    items = load_fixed_items(
        config,
        trainer.loss,
        policy.renderer,
        config.data.held_out,
        select_eval(config.data),
        positions=policy.decoder.max_positions,
    )
    return training.make_dataset(trainer, items, seed=None)


def _make_trainer(workspace: Workspace, policy: Policy, loss: Loss, steps: int) -> Trainer:
    """Return the trainer for a run of `steps` optimizer steps; it heeds a request to stop."""
    config, mesh, decoder = workspace.config, workspace.mesh, policy.decoder
    frozen = load_frozen(policy, mesh)
    if frozen is None:  # an adapter starts at 0: no update is rounded away
        warn_of_rounding(config.optimizer, decoder.params_dtype)
    teacher = load_teacher(config, loss, policy, mesh)
    trainer = training.make_trainer(
        config,
        decoder,
        loss,
        mesh,
        total_steps=steps,
        frozen=frozen,
        teacher=teacher,
        room=count_room(policy, mesh),
    )
    return dataclasses.replace(trainer, check=workspace.stop.check)


def _lay_out(workspace: Workspace, count: int, cuts: Sequence[int]) -> tuple[Config, int]:
    """Return the config, with the warm-up of the first start, and the steps over `count` items."""
    config, values = workspace.config, workspace.history.list_values
    size = config.train.batch_size
    first = count_steps(
        count,
        batch_size=size,
        epochs=values("train.epochs")[0],
        max_items=values("data.n_examples")[0],
    )
    steps = count_steps(
        count,
        batch_size=size,
        epochs=config.train.epochs,
        max_items=config.data.n_examples,
        cuts=cuts,
    )
    if config.data.n_examples > count * config.train.epochs:
        logger.warning(
            "data.n_examples: %d examples in %d epochs are fewer than %d: the run ends after them",
            count,
            config.train.epochs,
            config.data.n_examples,
        )
    optimizer = keep_warmup(config.optimizer, first, steps)
    return dataclasses.replace(config, optimizer=optimizer), steps


def _load_start_params(
    trainer: Trainer, policy: Policy, state: TrainState | None, checkpoints: Checkpoints
) -> Params:
    """Return the params that the run started with: those of `state` if it has taken no step."""
    if state is not None:
        params: Params = state.params
        return params
    first = checkpoints.find_round_end(0)  # of a branch
    if first is not None:
        restored: Params = checkpoints.restore_params(trainer.abstract_state.params, first)
        return restored
    start = load_start(policy, trainer.mesh, trainer.frozen)
    loaded: Params = training.add_value_head(trainer, start)
    return loaded


def choose_loss(config: Config) -> Loss:
    """Return the task's loss: its own if it has a fixed one, else that of the config.

    A task with a fixed loss uses the config's hyperparameters only if `loss.name` is that loss: in
    a pipeline they may be meant for a later stage.
    """
    name = TASKS[config.task].loss or config.loss["name"]
    return get_loss(config.loss if config.loss["name"] == name else {"name": name})


def _finish_step(
    saver: Saver,
    reporter: Reporter,
    layouts: LayoutMemory,
    state: TrainState,
    done: int,
    *,
    total: int,
) -> None:
    """Save after step `done` if a checkpoint is due, and always after the last step.

    The exported model can be made again from the last checkpoint.
    """

    def locate() -> Position:
        return Position(step=done, stage_step=done, layouts=layouts.to_record())

    saver.after_step(state, done, total, locate)
    if done == total:
        saver.writer.flush()
        saver.save(state, locate())
    reporter.update(every=_PAGE_EVERY)


def load_fixed_items(
    config: Config,
    loss: Loss,
    renderer: Renderer,
    path: str,
    selection: Selection,
    *,
    positions: int = 0,
) -> Sequence[Item]:
    """Return a file's items for the loss, cut to the config's lengths.

    `positions` is how many positions the model was made for (0: unknown); longer items are
    reported. Answers to be scored end at the token where the score is read (`reward.read_at`).
    """
    lengths = make_lengths(config, positions)
    control = config.data.control
    selection = dataclasses.replace(selection, margins=_wants_margins(loss))
    items = load_items(
        loss.items, path, renderer, lengths, selection, control=control, check_tokens=True
    )
    if loss.needs != "scores" or config.reward.read_at == "end_of_turn":
        return items
    return close_items(items, renderer, config.train.max_length)


def _wants_margins(loss: Loss) -> bool:
    """Tell whether the margin between a pair's scores should be that of its record's rewards."""
    arguments = getattr(loss.function, "keywords", {})
    return loss.needs == "scores" and bool(arguments.get("margin"))


def _restore(trainer: Trainer, policy: Policy, checkpoints: Checkpoints) -> tuple[TrainState, int]:
    found = checkpoints.restore_newest(trainer.abstract_state)
    if found is None and trainer.config.branch.workdir:
        take_over(trainer.config, trainer, checkpoints)
        found = checkpoints.restore_newest(trainer.abstract_state)
    if found is None:
        params = load_start(policy, trainer.mesh, trainer.frozen)
        return training.start_state(trainer, params), 0
    state, position = found[0], Position.from_dict(found[1])
    trainer.layouts.load(position.layouts)
    logger.info("carrying on after step %d", position.stage_step)
    return state, position.stage_step


def _last_metrics(workdir: Path) -> dict[str, float]:
    path = workdir / "metrics.jsonl"
    metrics: dict[str, float] = {}
    for record in read_metrics(path) if path.exists() else ():
        metrics |= {name: value for name, value in record.items() if np.isfinite(value)}
    metrics.pop(WALL_TIME, None)
    return metrics
