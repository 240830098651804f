"""What an online run has still to do: its rounds, its steps, and prompts that have been added."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from halos_jax.checkpoints.position import Position
from halos_jax.checkpoints.store import Checkpoints
from halos_jax.config import Config, ConfigError
from halos_jax.course.advice import RoundSigns
from halos_jax.course.round_size import DECISION, choose_size, expect_size
from halos_jax.course.verdicts import read_verdict
from halos_jax.errors import UserError
from halos_jax.losses import get_loss
from halos_jax.rewards.held_out import has_fixed_mean
from halos_jax.rounds.budget import Budget, describe_shortage, expect_examples, expect_steps
from halos_jax.rounds.order import Order, count_known, load_order
from halos_jax.training.optim import has_unknown_steps, keep_warmup
from halos_jax.workdir import manifests
from halos_jax.workdir.changes import History
from halos_jax.workdir.manifests import Manifest

logger = logging.getLogger(__name__)


def make_budget(config: Config, workdir: Path) -> Budget:
    """Return the budget of the run in `workdir`, with the ranges of the rounds that have begun."""
    rounds, opened = config.rounds, list[tuple[int, int]]()
    while manifest := manifests.load_manifest(manifests.round_folder(workdir, len(opened) + 1)):
        opened.append((manifest.start, manifest.stop))
    return Budget(rounds.total_prompts, expect_size(config), rounds.num_skip, tuple(opened))


def has_new_prompts(config: Config, workdir: Path) -> bool:
    """Tell whether prompts were added to a complete run that had ended for lack of them."""
    known, rounds = count_known(workdir), config.rounds
    if known is None or known * rounds.passes >= rounds.num_skip + rounds.total_prompts:
        return False
    try:
        return load_order(config, workdir).is_new
    except UserError as error:  # a complete run no longer needs its data
        logger.info("%s", error)
        return False


def find_place(checkpoints: Checkpoints) -> dict[str, int]:
    """Return the round that a run resumes in, and its optimizer steps so far."""
    if checkpoints.latest() is None:
        return {"round": 1, "step": 0}
    position = Position.from_dict(checkpoints.read_round_state())
    return {"round": position.rounds_done + 1, "step": position.step}


def choose_prompts_per_round(
    config: Config, budget: Budget, done: Sequence[Manifest], num_prompts: int
) -> tuple[int, dict[str, Any]]:
    """Return how many prompts the next round gets, and what the manifest is to say of the choice.

    What is returned beside the number becomes `decisions` of the round's manifest, which is written
    before the round's first sample. A resume reads it from there and does not choose again.

    Args:
      budget: the ranges of all rounds before, and what is left: a prompt or more.
      done: the manifests of round 0 and of all rounds before, with the metrics of their evaluation.
      num_prompts: how many prompts the order of all passes has.
    """
    size = config.rounds.prompts_per_round
    if size != "auto":
        return size, {}
    left = budget.end(num_prompts) - budget.used
    rate = config.optimizer.learning_rate
    chosen = choose_size(config, [read_signs(one, rate, config) for one in done], left)
    logger.info("round %d gets %d prompts: %s", len(done), chosen.prompts, chosen.reason)
    return chosen.prompts, {DECISION: chosen.to_record()}


def read_signs(manifest: Manifest, rate: float, config: Config) -> RoundSigns:
    """Return what advice is given by: the round's signs, its prompts, the config's learning rate.

    The prompts are those that were decided for the round, if that was a decision. A held-out
    reward that says nothing of one policy against another is no sign.
    """
    decided = manifest.decisions.get(DECISION, {}).get("prompts")
    prompts = manifest.stop - manifest.start if decided is None else decided
    metrics = dict(manifest.metrics)
    for end in ("", "/low", "/high") if has_fixed_mean(config.reward) else ():
        metrics.pop(f"reward_eval{end}", None)
    verdict = read_verdict(manifest)
    back_to = verdict.to if verdict.action == "retry" else None
    return RoundSigns(manifest.round, prompts, rate, metrics, back_to=back_to)


def refuse_no_rounds(budget: Budget, num_prompts: int, passes: int) -> None:
    """Raise ConfigError if so many passes over `num_prompts` leave none for any round."""
    if not budget.count_rounds(num_prompts * passes):
        spread = f" in each of {passes} passes" if passes > 1 else ""
        raise ConfigError(
            f"rounds.num_skip: got {budget.num_skip}, but data.train has {num_prompts} "
            f"prompts{spread}, so none is left for a round; allowed: fewer than there are; lower "
            "it, or add prompts"
        )


def lay_out(
    config: Config, history: History, budget: Budget, num_prompts: int, order: Order
) -> tuple[Config, int]:
    """Return the config, with the warm-up of the first start, and the run's total of steps.

    If the run decides on the way how many steps it takes, they are those expected at its start.

    Args:
      num_prompts: how many prompts of the order can be used, each of them once in a pass.
      order: tells how many prompts were added after the first start.

    Raises:
      ConfigError: if there is no prompt for any round.
    """
    passes = config.rounds.passes
    refuse_no_rounds(budget, num_prompts, passes)
    shortage = describe_shortage(budget, num_prompts, passes)
    if shortage:
        logger.warning("%s", shortage)
    items = get_loss(config.loss).items

    def count(budget: Budget, prompts: int, epochs: Callable[[int], int]) -> int:
        return expect_steps(
            budget,
            prompts,
            examples=lambda number: expect_examples(
                number, config.sampling.num_samples_per_prompt, config.feedback, items
            ),
            batch_size=config.train.batch_size,
            epochs=epochs,
            replay=config.feedback.replay,
        )

    available = num_prompts * passes
    steps = count(budget, available, lambda round: history.value_in("train.epochs", round))
    total, epochs, passes = (
        history.list_values(path)[0]
        for path in ("rounds.total_prompts", "train.epochs", "rounds.passes")
    )
    at_start = dataclasses.replace(budget, total_prompts=total, opened=())
    added = len(order.prompts) - order.at_start
    first = count(at_start, max(num_prompts - added, 0) * passes, lambda round: epochs)
    if has_unknown_steps(config):
        return config, first
    optimizer = keep_warmup(config.optimizer, first, steps)
    return dataclasses.replace(config, optimizer=optimizer), steps


def measure_progress(budget: Budget, folder: Path, available: int) -> tuple[float, float]:
    """Return the shares of the run's prompts before a round and after it.

    Args:
      folder: the round's.
      available: how many prompts the run has, in all passes.
    """
    manifest = manifests.load_manifest(folder)
    if manifest is None:
        raise RuntimeError(f"{folder} has no manifest, though its feedback is to be trained on")
    return budget.measure(manifest.start, manifest.stop, available)
