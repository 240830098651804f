"""The tasks that train once, on fixed data: SFT, a reward model, offline alignment."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from halos_jax import sharding, storage
from halos_jax.checkpoints.store import Checkpoints, open_checkpoints
from halos_jax.config import Config
from halos_jax.config.tasks import TASKS
from halos_jax.data.chat.closing import close_items
from halos_jax.data.chat.renderer import Renderer
from halos_jax.data.datasets import Selection, select_eval, select_train, warn_of_benchmarks
from halos_jax.data.items import load_items, warn_of_classes
from halos_jax.data.lengths import make_lengths
from halos_jax.devices import explain_memory
from halos_jax.losses import Loss, get_loss
from halos_jax.metrics import MetricWriter, read_metrics
from halos_jax.models.hf.positions import refuse_longer
from halos_jax.packing.batches import count_steps
from halos_jax.policies import final, source
from halos_jax.policies.start import load_frozen, load_policy, load_start, refuse_classifier
from halos_jax.tasks.inputs import check_inputs
from halos_jax.training import loop as training
from halos_jax.training.balance import report_balance
from halos_jax.training.followers import take_exported
from halos_jax.training.loop import Dataset, Trainer
from halos_jax.training.optim import keep_warmup, warn_of_rounding
from halos_jax.training.state import count_bytes
from halos_jax.types import Item, TrainState
from halos_jax.workdir import state as states
from halos_jax.workdir.interrupt import StopSignal

logger = logging.getLogger(__name__)


def run_training(config: Config, stop: StopSignal) -> dict[str, float]:
    """Run, or carry on, one of the tasks "sft", "reward_model" and "align".

    The trained model is exported to `config.workdir/final`.

    Returns:
      The last evaluation's metrics, or the last training step's where there is no held-out set.
    """
    info = states.join_run(config)
    try:
        if states.is_complete(info):
            logger.info("%s is complete: nothing to do", info.workdir)
            return _last_metrics(info.workdir)
        mesh = sharding.make_mesh(config.mesh)
        with storage.explain_run_errors(info.workdir), jax.set_mesh(mesh):
            config = source.use_final(info.config)
            check_inputs(info.ledger, config, is_begun=info.is_resumed)
            checkpoints = open_checkpoints(
                info.workdir / "checkpoints", keep=config.checkpoint.keep, ledger=info.ledger
            )
            try:
                _train(config, info, mesh, checkpoints, stop)
            finally:
                checkpoints.close()
            states.end_segments(info)
        return _last_metrics(info.workdir)
    finally:
        info.close()


def _train(
    config: Config,
    info: states.RunInfo,
    mesh: Mesh,
    checkpoints: Checkpoints,
    stop: StopSignal,
) -> None:
    stop.place = f"task {config.task}"
    loss = choose_loss(config)
    decoder, renderer = load_policy(config.model, config.data.control)
    if loss.needs == "scores":
        decoder = dataclasses.replace(decoder, num_labels=decoder.num_labels or 1)
    else:
        refuse_classifier(decoder, config.model.path)
    refuse_longer(decoder, {"train.max_length": config.train.max_length})
    warn_of_benchmarks(config.data.train)
    chosen = select_train(config.data, config.seed)
    items = load_fixed_items(
        config, loss, renderer, config.data.train, chosen, positions=decoder.max_positions
    )
    if loss.items in ("unpaired", "controlled"):
        warn_of_classes(items, config.data.train)
    if loss.items == "unpaired":
        report_balance(items, config.loss)
    states.begin_segment(info, step=_find_step(checkpoints))
    cuts = [count for count in info.history.list_values("data.n_examples")[:-1] if count]
    config, steps = _lay_out(config, info, len(items), cuts)
    frozen = load_frozen(config, decoder, mesh)
    if frozen is None:  # an adapter starts at zero, where no update is too small
        warn_of_rounding(config.optimizer, decoder.params_dtype)
    trainer = training.make_trainer(config, decoder, loss, mesh, total_steps=steps, frozen=frozen)
    storage.require_space(info.workdir, count_bytes(trainer.abstract_state.params), "the result")
    trainer = dataclasses.replace(trainer, check=stop.check)
    state, start = _restore(trainer, checkpoints)
    dataset = training.make_dataset(
        trainer,
        items,
        seed=config.seed,
        epochs=config.train.epochs,
        max_items=config.data.n_examples,
        cuts=cuts,
    )
    logger.info(
        "%d examples, %d steps, packed fill %.0f %%; mesh %s",
        len(items),
        len(dataset.plan),
        100 * dataset.plan.fill,
        sharding.describe(mesh),
    )
    held_out = None
    if config.data.eval:
        eval_items = load_fixed_items(
            config,
            loss,
            renderer,
            config.data.eval,
            select_eval(config.data),
            positions=decoder.max_positions,
        )
        held_out = training.make_dataset(trainer, eval_items, seed=None)
    with explain_memory("train", f"task {config.task}", config):
        dataset, held_out = _add_fixed(trainer, dataset, held_out, state if start == 0 else None)
        writer = MetricWriter(
            info.workdir / "metrics.jsonl" if info.is_writer else None,
            console=info.is_writer,
            console_every=config.train.log_every,
            resume_step=start,
            note=info.ledger.note_prefix,
        )
        state = training.run_steps(
            trainer,
            state,
            dataset,
            held_out=held_out,
            writer=writer,
            start=start,
            on_step=_make_saver(config, checkpoints, writer, stop, len(dataset.plan)),
            label=config.task,
        )
        writer.close()
    folder = final.export_final(
        take_exported(state),
        decoder,
        config.model,
        renderer,
        info.workdir,
        ledger=info.ledger,
        frozen=frozen,
        read_at=config.reward.read_at,
    )
    logger.info("the trained model is in %s", folder)


def _find_step(checkpoints: Checkpoints) -> int:
    """Return the step that the run goes on after."""
    if checkpoints.latest() is None:
        return 0
    return int(checkpoints.read_round_state()["stage_step"])


def _lay_out(
    config: Config, info: states.RunInfo, count: int, cuts: Sequence[int]
) -> tuple[Config, int]:
    """Return the config with the warm-up of the run's start, and its steps over `count` items."""
    values = info.history.list_values
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


def _add_fixed(
    trainer: Trainer, dataset: Dataset, held_out: Dataset | None, state: TrainState | None
) -> tuple[Dataset, Dataset | None]:
    """Add what the policy that the run starts with says of the data, where the loss needs it.

    `state` is the train state where no step is taken yet; else that policy is loaded.
    """
    config, loss = trainer.config, trainer.loss
    moving = config.rounds.reference == "previous_step"
    needed = training.needs_reference(loss, dataset.items, moving=moving)
    needed_eval = held_out is not None and training.needs_reference(loss, held_out.items)
    if not (needed or needed_eval or loss.value):
        return dataset, held_out
    if state is not None:
        params = state.params
    else:
        params = training.add_value_head(trainer, load_start(trainer))
    if needed:
        dataset = training.add_reference(trainer, dataset, params, label="reference")
    if needed_eval:
        held_out = training.add_reference(trainer, held_out, params, label="reference eval")
    if loss.value:
        dataset = training.add_collected(trainer, dataset, params, seed=config.seed, label="values")
    return dataset, held_out


def choose_loss(config: Config) -> Loss:
    """Return the loss of the task: that of the config, unless the task has one of its own.

    Then the config's hyperparameters are used where they are those of that loss. In a pipeline
    they may be those of a later stage.
    """
    name = TASKS[config.task].loss or config.loss["name"]
    return get_loss(config.loss if config.loss["name"] == name else {"name": name})


def _make_saver(
    config: Config, checkpoints: Checkpoints, writer: MetricWriter, stop: StopSignal, total: int
) -> Callable[[TrainState, int], None]:
    """Return what saves after a step: where that is due or the run must stop, and after the last.

    From the last checkpoint the exported model can be made again.
    """

    def save(state: TrainState, done: int) -> None:
        stopping = done < total and stop.received(done)
        due = config.checkpoint.every and done % config.checkpoint.every == 0
        if done == total or stopping or due:
            writer.flush()
            checkpoints.save(done, state, {"in_stage": False, "stage_step": done})
        if stopping:
            checkpoints.finish()
            stop.interrupt(step=done)

    return save


def load_fixed_items(
    config: Config,
    loss: Loss,
    renderer: Renderer,
    path: str,
    selection: Selection,
    *,
    positions: int = 0,
) -> Sequence[Item]:
    """Return the items of the loss that are in a file, cut to the config's lengths.

    `positions` is what the model was made for, 0 for unknown: longer items are said. Answers that
    are to be scored end where `reward.read_at` says that the score is read.
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
    """Say whether the scores of a pair shall differ as the rewards in its record do."""
    arguments = getattr(loss.function, "keywords", {})
    return loss.needs == "scores" and bool(arguments.get("margin"))


def _restore(trainer: Trainer, checkpoints: Checkpoints) -> tuple[TrainState, int]:
    found = checkpoints.restore_newest(trainer.abstract_state)
    if found is None:
        return training.start_state(trainer, load_start(trainer)), 0
    state, record = found
    logger.info("carrying on after step %d", record["stage_step"])
    return state, record["stage_step"]


def _last_metrics(workdir: Path) -> dict[str, float]:
    path = workdir / "metrics.jsonl"
    metrics: dict[str, float] = {}
    for record in read_metrics(path) if path.exists() else ():
        metrics |= {name: value for name, value in record.items() if np.isfinite(value)}
    return metrics
