"""The training loop: optimizer steps over planned batches, with evaluations in between."""

import concurrent.futures
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from halos_jax import sharding
from halos_jax.config import Config
from halos_jax.console.bars import make_progress
from halos_jax.console.values import describe_step
from halos_jax.losses import Loss, average_metrics, reads_drawn
from halos_jax.metrics import MetricWriter
from halos_jax.models.lora import Frozen, abstract_trained
from halos_jax.models.spec import DecoderConfig
from halos_jax.models.value import abstract_value_params, init_value_params
from halos_jax.packing.batches import Plan, build_batch, plan_batches, split_logps
from halos_jax.packing.layout import LayoutMemory
from halos_jax.packing.token_values import Collected, TokenValues, refuse_unsampled
from halos_jax.training import inputs, optim, step
from halos_jax.training.followers import Followers, take_averaged
from halos_jax.training.pace import StepClock, measure_work
from halos_jax.training.profile import Profiler
from halos_jax.training.rounding import MovedWatch, choose_watched
from halos_jax.training.state import init_state, make_abstract_state
from halos_jax.training.teacher import Teacher
from halos_jax.types import Batch, Item, Params, TrainState


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The compiled functions of a run, and what they were compiled for."""

    config: Config
    decoder: DecoderConfig
    loss: Loss
    mesh: Mesh
    optimizer: optax.GradientTransformation
    abstract_state: TrainState
    train_step: step.TrainStep
    eval_step: step.EvalStep
    logps: Callable[[Params, Frozen | None, Batch], jax.Array]
    collect: Callable[[Params, Frozen | None, Batch], tuple[jax.Array, jax.Array]]
    frozen: Frozen | None = None  # the base of an adapter; None: all params are trained
    teacher: Teacher | None = None  # that the loss compares the policy with, if it has one
    # Called between batches while there is nothing to save; an error that it raises stops the run.
    check: Callable[[], None] = lambda: None
    watched: range = range(0)  # steps of the run whose `moved_params` are averaged and judged
    layouts: LayoutMemory = dataclasses.field(default_factory=LayoutMemory)
    profiler: Profiler = dataclasses.field(default_factory=lambda: Profiler(".", 0))


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Items with their plan of batches.

    `reference_logps` are there if the loss has a reference; `old`, the log-probs and values when
    the items were collected, if it has a value head; `proximal_logps`, those of the policy at the
    start, if they stand in for those of the policy that sampled (see `proximal`); `progress`, the
    shares of the run's prompts that are used before its first step and after its last one, if the
    learning rate follows them.
    """

    items: Sequence[Item]
    plan: Plan
    reference_logps: TokenValues | None = None
    old: Collected | None = None
    proximal_logps: TokenValues | None = None
    recurring: str = ""  # name under which its layout is reused, see `make_dataset`
    progress: tuple[float, float] | None = None

    def progress_at(self, step: int) -> float | None:
        """The share of the run's prompts that are used before a step: it grows evenly."""
        if self.progress is None:
            return None
        start, stop = self.progress
        return start + (stop - start) * step / len(self.plan)


def make_trainer(
    config: Config,
    decoder: DecoderConfig,
    loss: Loss,
    mesh: Mesh,
    *,
    total_steps: int,
    frozen: Frozen | None = None,
    teacher: Teacher | None = None,
    room: int = 0,
) -> Trainer:
    """Make the trainer of a run that is expected to take `total_steps` optimizer steps.

    With `frozen`, the trained params (`params` everywhere) are an adapter on that base. A loss with
    a divergence needs its `teacher`; without one, RuntimeError is raised. `room` is as of
    `memory.choose_remat`.
    """
    if (loss.divergence is None) != (teacher is None):
        raise RuntimeError(f"loss {loss.name!r} got {'no' if teacher is None else 'a'} teacher")
    schedule = optim.make_run_schedule(config, total_steps)
    optimizer = optim.make_optimizer(config.optimizer, schedule)
    trained = abstract_trained(decoder, mesh, frozen.adapter if frozen else None)
    if loss.value:
        trained = {**trained, "value": abstract_value_params(decoder.d_model, mesh)}
    moving = config.rounds.reference == "previous_step" and loss.reference
    followers = Followers(config.rounds.sync_every if moving else 0, config.train.ema_decay)
    abstract = make_abstract_state(trained, optimizer, mesh, followers)
    plain = dataclasses.replace(decoder, remat="none")
    return Trainer(
        config=config,
        decoder=decoder,
        loss=loss,
        mesh=mesh,
        optimizer=optimizer,
        abstract_state=abstract,
        train_step=step.compile_train_step(
            abstract, loss, optimizer, schedule, decoder, mesh, followers, teacher, room
        ),
        eval_step=step.compile_eval_step(loss, plain, mesh, teacher),
        logps=inputs.compile_logps(plain, mesh),
        collect=inputs.compile_collect(plain, mesh),
        frozen=frozen,
        teacher=teacher,
        watched=choose_watched(config.optimizer, total_steps),
        profiler=Profiler(config.workdir, config.train.profile),
    )


def start_state(trainer: Trainer, params: Params) -> TrainState:
    """Return the state at step 0 around the policy's `params`, with a new value head if needed."""
    params = add_value_head(trainer, params)
    return init_state(params, trainer.optimizer, trainer.abstract_state)


def add_value_head(trainer: Trainer, params: Params) -> Params:
    """Return the policy's `params` with a newly initialised value head, if the loss has one."""
    if not trainer.loss.value:
        return params
    placed = {name: leaf.sharding for name, leaf in trainer.abstract_state.params["value"].items()}
    make = jax.jit(init_value_params, static_argnums=1, out_shardings=placed)
    return {**params, "value": make(jax.random.key(trainer.config.seed), trainer.decoder.d_model)}


def make_dataset(
    trainer: Trainer,
    items: Sequence[Item],
    *,
    seed: int | None,
    epochs: int = 1,
    max_items: int = 0,
    cuts: Sequence[int] = (),
    recurring: str = "",
) -> Dataset:
    """Plan the batches of `items`; `seed=None` keeps their order (evaluation).

    A data set that comes again every round, with other items, has a name, `recurring`. It reuses
    the layout that `trainer.layouts` holds under that name, so that no step is compiled again, and
    stores its own there. What the items were drawn from counts only for a loss that compares the
    policy with the one that sampled: to all others log-probabilities are the policy's own.

    Raises:
      ConfigError: if the loss corrects for the policy that sampled, and some items do not say how
        likely they were to it; or as `reads_drawn`.
    """
    if trainer.loss.sampled:
        refuse_unsampled(items)
    return _plan_items(
        trainer, items, recurring, seed=seed, epochs=epochs, max_items=max_items, cuts=cuts
    )


def _plan_items(
    trainer: Trainer, items: Sequence[Item], recurring: str, *, seed: int | None, **how: Any
) -> Dataset:
    if any(item.drawn for item in items) and not reads_drawn(trainer.loss):
        items = [dataclasses.replace(item, drawn=()) for item in items]
    train = trainer.config.train
    plan = plan_batches(
        items,
        batch_size=train.batch_size,
        num_rows=sharding.num_row_shards(trainer.mesh),
        tokens_per_row=train.tokens_per_device,
        row_multiple=train.row_multiple,
        seed=seed,
        known=trainer.layouts.find(recurring) if recurring else None,
        **how,
    )
    if recurring:
        trainer.layouts.keep(recurring, plan.layout)
    return Dataset(items, plan, recurring=recurring)


def needs_reference(loss: Loss, items: Sequence[Item], *, moving: bool = False) -> bool:
    """Tell whether training needs a pass for the reference's log-probs.

    The loss needs them for its reference, unless that is `moving` (it is in the train state then),
    or in place of old log-probs, if the items have none.
    """
    unknown = loss.old and not loss.value and not all(item.old_logps for item in items)
    return (loss.reference and not moving) or unknown


def add_reference(trainer: Trainer, dataset: Dataset, params: Params, *, label: str) -> Dataset:
    """Return `dataset` with the reference's log-probs, computed under `params` in one pass."""
    name = f"{dataset.recurring} pass" if dataset.recurring else ""
    logps = compute_logps(trainer, dataset.items, params, recurring=name, label=label)
    return dataclasses.replace(dataset, reference_logps=logps)


def compute_logps(
    trainer: Trainer, items: Sequence[Item], params: Params, *, recurring: str = "", label: str
) -> TokenValues:
    """Return the log-probs of the items' targets under `params`, computed in one pass.

    Args:
      params: as those that are trained: of an adapter, if there is one, or of the whole policy.
      recurring: as of `make_dataset`.
    """
    (logps,) = _pass_over(
        trainer,
        items,
        lambda batch: (trainer.logps(params, trainer.frozen, batch),),
        recurring=recurring,
        label=label,
    )
    return logps


def add_collected(
    trainer: Trainer, dataset: Dataset, params: Params, *, seed: int, label: str
) -> Dataset:
    """Return `dataset` with the log-probs and values of its items under `params`.

    They stay the same in all epochs. `seed` is the seed of the dropout.
    """
    logps, values = _pass_over(
        trainer,
        dataset.items,
        lambda batch: trainer.collect(params, trainer.frozen, batch),
        recurring=f"{dataset.recurring} pass" if dataset.recurring else "",
        label=label,
    )
    proximal = logps if trainer.loss.sampled else None
    return dataclasses.replace(dataset, old=Collected(logps, values, seed), proximal_logps=proximal)


def _pass_over(
    trainer: Trainer,
    items: Sequence[Item],
    run: Callable[[Batch], tuple[jax.Array, ...]],
    *,
    recurring: str,
    label: str,
) -> list[TokenValues]:
    """Return the token values of all items; `run` gives them for a batch, f32[m, rows, P] each."""
    single = plan_pass(trainer, items, recurring=recurring)
    found: list[dict[int, tuple[np.ndarray, ...]]] = []
    bar = make_progress(len(single.plan), label, unit="batches", enabled=trainer.config.progress)
    started = map(run, stream_batches(trainer.mesh, single))
    for number, results in enumerate(inputs.read_behind(started)):
        trainer.check()
        found = found or [{} for _ in results]
        for known, result in zip(found, results, strict=True):
            known.update(split_logps(single.plan, number, items, result))
        bar.update(1)
    bar.close()
    return [[known[index] for index in range(len(known))] for known in found]


def plan_pass(trainer: Trainer, items: Sequence[Item], *, recurring: str = "") -> Dataset:
    """Plan a pass over `items` that trains nothing; see `make_dataset`."""
    # The order does not matter here, so items are shuffled to make the batches equally large.
    return _plan_items(trainer, items, recurring, seed=0)


def stream_batches(mesh: Mesh, dataset: Dataset, *, start: int = 0) -> Iterator[Batch]:
    """Yield the batches from step `start` on; a thread builds and transfers them ahead of time."""

    def make(number: int) -> Batch:
        batch = build_batch(
            dataset.items,
            dataset.plan,
            number,
            reference_logps=dataset.reference_logps,
            old=dataset.old,
            proximal_logps=dataset.proximal_logps,
            progress=dataset.progress_at(number),
        )
        placed: Batch = sharding.put_batch(batch, mesh, leading=1)
        return placed

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        ahead = [
            pool.submit(make, number) for number in range(start, min(start + 2, len(dataset.plan)))
        ]
        for number in range(start, len(dataset.plan)):
            batch = ahead.pop(0).result()
            if number + 2 < len(dataset.plan):
                ahead.append(pool.submit(make, number + 2))
            yield batch


def run_steps(
    trainer: Trainer,
    state: TrainState,
    dataset: Dataset,
    *,
    held_out: Dataset | None,
    writer: MetricWriter,
    start: int = 0,
    first_step: int = 0,
    on_step: Callable[[TrainState, int], None] = lambda state, done: None,
    label: str = "train",
) -> TrainState:
    """Train over `dataset` from its step `start` on; return the state after its last step.

    Args:
      held_out: the evaluation set, evaluated before the run's first step, every `train.eval_every`
        steps and after the last step; with `train.ema_decay`, on the moving average.
      first_step: optimizer steps that the run took before this stage.
      on_step: called after each step with the state and the number of steps done in this stage; it
        may save, and it may raise an error to stop the run.
    """
    config = trainer.config
    total = len(dataset.plan)
    if held_out and first_step + start == 0:
        trainer.check()
        writer.write(0, evaluate(trainer, take_averaged(state), held_out))
    bar = make_progress(total, label, unit="steps", enabled=config.progress)
    bar.update(start)
    seen = sum(len(row) for step_rows in dataset.plan.steps[:start] for row in step_rows)
    clock, watch = _make_clock(trainer), MovedWatch(trainer.watched)
    before: dict[str, jax.Array | float] = {}
    with contextlib.closing(trainer.profiler):  # a trace is there even if a step raises an error
        for number, batch in enumerate(stream_batches(trainer.mesh, dataset, start=start), start):
            state, metrics = trainer.train_step(state, trainer.frozen, batch)
            trainer.profiler.step(metrics)
            taken = first_step + number + 1
            named: dict[str, jax.Array | float] = {
                _rename(name, "train"): value for name, value in metrics.items()
            }
            items = [dataset.items[one] for row in dataset.plan.steps[number] for one in row]
            examples = len(items)
            seen += examples
            named |= {"counters/updates": taken, "counters/stage_examples": seen}
            named |= clock.rate
            writer.write(taken, named)
            watch.see(taken, metrics)
            clock.tick(examples, *_measure_work(trainer, items))
            due = config.train.eval_every and taken % config.train.eval_every == 0
            if held_out and (due or number + 1 == total):
                writer.write(taken, evaluate(trainer, take_averaged(state), held_out))
                clock = _make_clock(trainer)
            on_step(state, number + 1)
            if not bar.disable and (taken % config.train.log_every == 0 or number + 1 == total):
                # The metrics of the step before: the writer has waited for them already.
                bar.set_postfix_str(describe_step(before), refresh=False)
                bar.update(number + 1 - bar.n)
            before = named
    watch.finish()
    bar.close()
    return state


def _make_clock(trainer: Trainer) -> StepClock:
    return StepClock(trainer.mesh, trainer.decoder.compute_dtype)


def _measure_work(trainer: Trainer, items: Sequence[Item]) -> tuple[int, float]:
    return measure_work(items, trainer.decoder, adapter=trainer.frozen is not None)


def evaluate(trainer: Trainer, params: Params, dataset: Dataset) -> dict[str, float]:
    """Return the metrics of `dataset` under `params`, averaged over all its examples."""
    sums = [
        trainer.eval_step(params, trainer.frozen, batch)
        for batch in stream_batches(trainer.mesh, dataset)
    ]
    totals = jax.tree.map(
        lambda *parts: float(sum(np.asarray(part, np.float64) for part in parts)), *sums
    )
    means = average_metrics(totals, np)
    return {_rename(name, "eval"): float(mean) for name, mean in means.items()}


def _rename(name: str, split: str) -> str:
    """Give a metric its public name: "rewards/chosen" -> "rewards_train/chosen"."""
    if name == "loss":
        return f"loss/{split}"
    section, slash, rest = name.partition("/")
    sections = ["rewards", "logps", "loss"]
    if split == "eval":  # in training these keep HALOs' names
        sections += ["clipfrac", "returns", "val", "correction"]
    return f"{section}_{split}/{rest}" if slash and section in sections else name
