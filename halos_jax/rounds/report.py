"""Reports of an online run for people: its budget, a row per round, and a table of all rounds."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from halos_jax.config import Config
from halos_jax.course.advice import RoundSigns, list_new_hints
from halos_jax.course.budget_text import (
    RoundDone,
    RoundSize,
    describe_budget,
    describe_rest,
    find_traps,
)
from halos_jax.course.verdicts import scale_rate
from halos_jax.losses import get_loss
from halos_jax.packing.batches import count_steps
from halos_jax.rounds.budget import Budget, expect_examples
from halos_jax.rounds.context import Run
from halos_jax.rounds.outlook import read_signs
from halos_jax.workdir import changes, manifests
from halos_jax.workdir.manifests import Manifest, round_folder
from halos_jax.workdir.timing import format_times, read_times

logger = logging.getLogger(__name__)

_NONE = "-"  # in a cell without a value
_LONGEST_HEADER = 20


def report_budget(
    config: Config, budget: Budget, num_prompts: int, epochs: Callable[[int], int]
) -> None:
    """Log what the run will use, and warn of numbers that are known to spoil a run.

    Args:
      config: with the warm-up that the run was started with.
      num_prompts: how many prompts the order has, enough for a round.
      epochs: maps the number of a round to how many epochs it trains.
    """
    sizes = list_sizes(config, budget, num_prompts, epochs)
    for line in describe_budget(config, sizes):
        logger.info("%s", line)
    for line in find_traps(config, sizes):
        logger.warning("%s", line)


def list_sizes(
    config: Config, budget: Budget, num_prompts: int, epochs: Callable[[int], int]
) -> list[RoundSize]:
    """Return what each round that has prompts will use at most; see `report_budget`."""
    items, per_prompt = get_loss(config.loss).items, config.sampling.num_samples_per_prompt
    sizes = []
    for round in range(1, budget.count_rounds(num_prompts) + 1):
        prompts = budget.plan_round(round, num_prompts).num_prompts
        examples = expect_examples(prompts, per_prompt, config.feedback, items)
        steps = count_steps(examples, batch_size=config.train.batch_size, epochs=epochs(round))
        sizes.append(RoundSize(prompts, examples, steps))
    return sizes


def report_round(run: Run, manifest: Manifest, budget: Budget) -> None:
    """Log a finished round: its row of the table, its times, and what is left of the run.

    Args:
      budget: the run's, with the ranges of the rounds that have begun.
    """
    round, config = manifest.round, run.config
    sizes = list_sizes(config, budget, len(run.prompts), lambda _: config.train.epochs)
    lines = format_rounds(run.workdir, last=round).splitlines()
    logger.info("round %d of %d done:\n%s\n%s", round, len(sizes), lines[0], lines[-1])
    times = format_times(run.workdir, round)
    if times:
        logger.info("time of round %d: %s", round, times)
    done = [_sum_up(row) for row in _read_rows(run.workdir, round) if row.manifest.round]
    rest = describe_rest(config, done, sizes[round:], sum(one.steps for one in sizes))
    if rest:
        logger.info("%s", rest)
    for hint in list_new_hints(config, list_signs(run, round))[-1]:
        logger.info("advice: %s", hint.text)


def report_end(run: Run, result: str) -> None:
    """Log the result of the run, the table of all rounds, and the advice that they gave.

    `result` says which policy is where.
    """
    signs = list_signs(run, last_round(run.workdir))
    logger.info("%s; round 0 is the SFT policy:\n%s", result, format_rounds(run.workdir))
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


def format_rounds(workdir: Path, *, last: int | None = None) -> str:
    """Return a table of the rounds up to `last`, or of all: their budget, rewards and signs.

    A column is there if any of these rounds has a value for it. `halos_jax/course/README.md` says
    what the columns are.
    """
    rows = _read_rows(workdir, last_round(workdir) if last is None else last)
    chosen = _choose_columns(rows, _list_scorers(workdir))
    columns = {name[:_LONGEST_HEADER]: read for name, read in chosen.items()}
    cells = [[read(row) for row in rows] for read in columns.values()]
    shown = [
        [name, *(cell or _NONE for cell in column)]
        for name, column in zip(columns, cells, strict=True)
        if any(column)
    ]
    widths = [max(map(len, column)) for column in shown]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in zip(*shown, strict=True)
    )


def last_round(workdir: Path) -> int:
    """Return the number of the newest round in `workdir`."""
    names = [path.name for path in (workdir / "rounds").iterdir()]
    return max(int(name) for name in names if name.isdigit())  # skip files like .DS_Store


# --------------------------------------------------------------------------- the table


class _Row(NamedTuple):
    """A round of the table; `steps` and `seconds` are None where they are not known."""

    manifest: Manifest
    steps: int | None
    seconds: float | None

    @property
    def metrics(self) -> Mapping[str, Any]:
        return self.manifest.metrics

    @property
    def prompts(self) -> int:
        return self.manifest.stop - self.manifest.start

    @property
    def examples(self) -> int:
        counts = [self.metrics.get(f"feedback_{name}", 0) for name in ("pairs", "examples")]
        return sum(counts) if self.manifest.round else 0


def _read_rows(workdir: Path, last: int) -> list[_Row]:
    """Read the rounds from 0 to `last` that have begun."""
    found = [manifests.load_manifest(round_folder(workdir, round)) for round in range(last + 1)]
    times, rows = read_times(workdir), list[_Row]()
    before: int | None = 0
    for manifest in found:
        if manifest is None:
            continue
        total: int | None = manifest.metrics.get("steps_done")
        spans = [one["end"] - one["start"] for one in times if one["round"] == manifest.round]
        steps = None if total is None or before is None else total - before
        rows.append(_Row(manifest, steps, sum(spans) if spans else None))
        before = total
    return rows


def _sum_up(row: _Row) -> RoundDone:
    return RoundDone(row.prompts, row.examples, row.steps or 0, row.seconds or 0.0)


_Read = Callable[[_Row], str]  # the text of a cell; "" if the round has no value


def _list_scorers(workdir: Path) -> list[str]:
    """Return the names of `eval.scorers`, `reward.rules` and `reward.parts` of the run."""
    path = workdir / changes.FILE
    plain = changes.read_plain(path) if path.exists() else {}
    reward = plain.get("reward", {})
    rules = [rule.rpartition(":")[2] for rule in reward.get("rules", ())]
    return [*plain.get("eval", {}).get("scorers", ()), *rules, *reward.get("parts", ())]


def _choose_columns(rows: Sequence[_Row], scorers: Sequence[str]) -> dict[str, _Read]:
    """Return header -> reader of every column, of which some may have no value in any round."""
    known = {name for row in rows for name in row.metrics}

    def first(*names: str) -> str:
        return next((name for name in names if name in known), "")

    scorer = first(*[f"reward_eval/{name}" for name in scorers])
    return {
        "round": lambda row: str(row.manifest.round),
        "prompts": lambda row: str(row.prompts),
        "examples": lambda row: str(row.examples),
        "steps": lambda row: "" if row.steps is None else str(row.steps),
        "reward_eval": lambda row: _show_estimate(row, "reward_eval"),
        "win": _reader("win_rate_eval", ".2f"),
        scorer.removeprefix("reward_eval/"): lambda row: _show_estimate(row, scorer),
        "test": lambda row: _show_estimate(row, "reward_test"),
        "kl": _reader(first("kl_sft", "kl_sampled"), "z.2f"),
        "margin": _reader("fresh_margin", "+z.3f"),
        "ties": _reader("tied_share", ".2f"),
        "cut": _show_cut,
        "tokens": _reader(first("response_tokens_eval", "response_tokens_mean"), ".1f"),
        "stale": _reader(first("kl_stale", "kl_sampled_stale"), "z.2f"),
        "seconds": lambda row: "" if row.seconds is None else f"{row.seconds:.1f}",
    }


def _reader(name: str, form: str) -> _Read:
    """Return a reader of one metric."""
    return lambda row: format(row.metrics[name], form) if name in row.metrics else ""


def _show_estimate(row: _Row, name: str) -> str:
    """Return "0.250 ±0.021": a mean and, where it is known, half of its 95 % interval."""
    if name not in row.metrics:
        return ""
    shown = f"{row.metrics[name]:z.3f}"
    if f"{name}/low" not in row.metrics:
        return shown
    return f"{shown} ±{(row.metrics[f'{name}/high'] - row.metrics[f'{name}/low']) / 2:.3f}"


def _show_cut(row: _Row) -> str:
    """Return the share of the round's samples that the token limit has cut."""
    samples = row.metrics.get("samples", 0)
    return f"{row.metrics['truncated'] / samples:.2f}" if samples else ""
