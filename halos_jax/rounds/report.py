"""What an online run says to people: its budget, a line a stage, the table of rounds, its end."""

import logging
from collections.abc import Callable, Mapping

from halos_jax.config import Config
from halos_jax.console import compiling
from halos_jax.console.stages import describe_stage
from halos_jax.console.values import find_width
from halos_jax.course.advice import RoundSigns, list_new_hints
from halos_jax.course.budget_text import (
    RoundDone,
    RoundSize,
    describe_budget,
    describe_rest,
    find_pace,
    find_traps,
)
from halos_jax.course.verdicts import scale_rate
from halos_jax.losses import get_loss
from halos_jax.packing.batches import count_steps
from halos_jax.rounds.budget import Budget, expect_examples, list_examples
from halos_jax.rounds.context import Run
from halos_jax.rounds.outcome.decisions import name_start
from halos_jax.rounds.outcome.table import Row, format_rounds, last_round, read_rows
from halos_jax.rounds.outlook import read_signs
from halos_jax.workdir import manifests
from halos_jax.workdir.manifests import Manifest, round_folder

logger = logging.getLogger(__name__)

_ROWS = 12  # of the table that is shown after a round: the newest

# What the stages before training say in a round's manifest. The rest, which is the signs and the
# evaluation, is in the metrics since it was measured.
_COUNTS = ("samples", "truncated", "response_tokens_mean", "prompt_pass", "steps_done")


def report_budget(
    config: Config, budget: Budget, num_prompts: int, epochs: Callable[[int], int]
) -> None:
    """Log what the run will use, and warn of numbers that are known to spoil a run.

    Args:
      config: with the warm-up that the run was started with.
      num_prompts: how many prompts a pass has, enough for a round.
      epochs: maps the number of a round to how many epochs it trains.
    """
    sizes = list_sizes(config, budget, num_prompts * config.rounds.passes, epochs)
    for line in describe_budget(config, sizes, num_prompts):
        logger.info("%s", line)
    for line in find_traps(config, sizes):
        logger.warning("%s", line)


def list_sizes(
    config: Config, budget: Budget, num_prompts: int, epochs: Callable[[int], int]
) -> list[RoundSize]:
    """Return what each round that has prompts will use at most; see `report_budget`.

    `num_prompts` is how many the order of all passes has.
    """
    items, per_prompt = get_loss(config.loss).items, config.sampling.num_samples_per_prompt
    counts = list_examples(
        budget,
        num_prompts,
        lambda prompts: expect_examples(prompts, per_prompt, config.feedback, items),
        config.feedback.replay,
    )
    sizes = []
    for round, examples in enumerate(counts, 1):
        prompts = budget.plan_round(round, num_prompts).num_prompts
        steps = count_steps(examples, batch_size=config.train.batch_size, epochs=epochs(round))
        sizes.append(RoundSize(prompts, examples, steps))
    return sizes


def report_stage(run: Run, round: int, stage: str, seconds: float, did: Mapping[str, int]) -> None:
    """Log that a stage is done; see `describe_stage`."""
    compiled = compiling.take_seconds()
    run.compiled[round] = run.compiled.get(round, 0.0) + compiled
    left = _estimate_rest(run)
    told = describe_stage(seconds, did, compiled=compiled, left=left)
    logger.info("round %d, %s: %s", round, stage, told)


def report_round(run: Run, manifest: Manifest, budget: Budget) -> None:
    """Log a finished round: the table so far, what is left of the run, and advice.

    The table has the newest rounds alone if there are many.

    Args:
      budget: the run's, with the ranges of the rounds that have begun.
    """
    round, config = manifest.round, run.config
    sizes = list_sizes(config, budget, len(run.prompts), lambda _: config.train.epochs)
    table = format_rounds(run.workdir, last=round, most=_ROWS, width=find_width())
    logger.info("round %d of %d is done:\n%s", round, len(sizes), table)
    done = [_sum_up(run, row) for row in read_rows(run.workdir, round) if row.manifest.round]
    rest = describe_rest(config, done, sizes[round:], sum(one.steps for one in sizes))
    if rest:
        logger.info("%s", rest)
    for hint in list_new_hints(config, list_signs(run, round))[-1]:
        logger.info("advice: %s", hint.text)
    record_round(run, manifest)
    run.on_round()


def record_round(run: Run, manifest: Manifest) -> None:
    """Write what the table says of a round, and nothing else has written, to the metrics."""
    row = read_rows(run.workdir, manifest.round)[-1]
    values: dict[str, float] = {
        name: value
        for name, value in row.metrics.items()
        if name.startswith(("feedback_", "unlabelled_train")) or name in _COUNTS
    }
    values |= {f"seconds/{stage}": seconds for stage, seconds in row.times.items()}
    if row.seconds is not None:
        values["seconds"] = row.seconds
    if row.tokens_per_second is not None:
        values["sampled_tokens_per_second"] = row.tokens_per_second
    run.writer.write(row.metrics.get("steps_done", 0), {"round": manifest.round, **values})
    run.writer.flush()


def report_resumed(run: Run) -> None:
    """Log the table of a run that goes on, once; its rounds are not told again."""
    rounds = run.workdir / "rounds"
    rows = read_rows(run.workdir, last_round(run.workdir)) if rounds.is_dir() else []
    done = [row.manifest.round for row in rows if row.is_done]
    if done:
        table = format_rounds(run.workdir, last=max(done), width=find_width())
        logger.info("done before:\n%s", table)


def report_end(run: Run, result: str) -> None:
    """Log the result of the run, its table where not all of it has been shown, and its advice.

    `result` says which policy is where.
    """
    last = last_round(run.workdir)
    signs = list_signs(run, last)
    # The table after the last round is whole, unless it was cut or a test came after it.
    is_new = last >= _ROWS or bool(run.test)
    table = f":\n{format_rounds(run.workdir, width=find_width())}" if is_new else ""
    logger.info("%s; round 0 is %s%s", result, name_start(run.config), table)
    for one, hints in zip(signs, list_new_hints(run.config, signs), strict=True):
        for hint in hints:
            logger.info("advice of round %d: %s", one.round, hint.text)


def list_signs(run: Run, last: int) -> list[RoundSigns]:
    """Return what advice is given by of each round up to `last`."""
    found = [manifests.load_manifest(round_folder(run.workdir, one)) for one in range(last + 1)]

    def read(one: Manifest) -> RoundSigns:
        asked: float = run.workspace.history.value_in("optimizer.learning_rate", one.round)
        signs = read_signs(one, asked, run.config)
        return signs._replace(factor=scale_rate(found[: one.round]))

    return [read(one) for one in found if one is not None]


def _estimate_rest(run: Run) -> float | None:
    """Return for how many seconds the run will go on, by the pace of its finished rounds.

    What a round has compiled in this process does not count, nor the first round if there is a
    later one: its tracing is not known.
    """
    rows = read_rows(run.workdir, last_round(run.workdir))
    done = [row for row in rows if row.is_done and row.manifest.round]
    pace = find_pace([_sum_up(run, row) for row in done])
    if pace is None:
        return None
    left = run.budget.end(len(run.prompts)) - done[-1].manifest.stop
    spent = sum(row.seconds or 0.0 for row in rows if not row.is_done)
    return max(pace * left - spent, 0.0)


def _sum_up(run: Run, row: Row) -> RoundDone:
    """Return what a round has used, without the time that it compiled: later ones will not."""
    seconds = max((row.seconds or 0.0) - run.compiled.get(row.manifest.round, 0.0), 0.0)
    examples = row.examples + row.metrics.get("feedback_replayed", 0)
    return RoundDone(row.prompts, examples, row.steps or 0, seconds)
