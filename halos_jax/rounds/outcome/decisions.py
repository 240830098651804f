"""What a run decides at the end of a round, and how long that holds.

The decisions are committed with the round's evaluation. A resume reads them and does not decide
again; only a stop is looked at anew, under the bounds that hold now, since nothing but the end of
the run follows from it.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from halos_jax.config import Config
from halos_jax.course.best import DECISION as BEST
from halos_jax.course.best import REWARD, choose_best, find_highest, read_best, read_number
from halos_jax.course.falls import compare_paired
from halos_jax.course.guard import find_return, is_on, judge
from halos_jax.course.verdicts import (
    CHANGE,
    NO_VERDICT,
    Verdict,
    describe_verdict,
    make_change,
    read_verdict,
    scale_rate,
)
from halos_jax.course.verdicts import DECISION as GUARD
from halos_jax.data.records.reading import read_records
from halos_jax.rewards.held_out import has_fixed_mean
from halos_jax.rounds.context import Run, StageResult
from halos_jax.signs.intervals import Estimate
from halos_jax.workdir import manifests
from halos_jax.workdir.manifests import Manifest, round_folder

logger = logging.getLogger(__name__)

NAMES = (GUARD, BEST)  # of the decisions at the end of a round


def keeps_best(config: Config, *, is_evaluated: bool) -> bool:
    """Tell whether the checkpoint of the best round is kept and its policy exported."""
    if config.rounds.keep_best == "auto":
        return is_evaluated and not has_fixed_mean(config.reward)
    return config.rounds.keep_best


def list_done(workdir: Path, last: int) -> list[Manifest]:
    """Return the manifests of the rounds up to `last`, without those that have none."""
    found = [manifests.load_manifest(round_folder(workdir, round)) for round in range(last + 1)]
    return [one for one in found if one is not None]


def decide(
    run: Run,
    manifest: Manifest,
    evaluation: StageResult,
    is_kept: Callable[[int], bool] | None = None,
) -> StageResult:
    """Return the result of a round's evaluation with what the run decides at the round's end.

    All rounds before it must be committed.

    Args:
      is_kept: tells whether the policy of a round may still be had; None: its checkpoint must be
        there now.
    """
    config, is_evaluated = run.config, bool(run.held_out)
    is_compared = is_evaluated and not has_fixed_mean(config.reward)
    merged = {**manifest.metrics, **evaluation.metrics}
    now = dataclasses.replace(manifest, metrics=merged)
    before, found = list_done(run.workdir, manifest.round - 1), dict[str, Any]()
    if keeps_best(config, is_evaluated=is_evaluated):
        explicit = config.rounds.keep_best is True or config.guard.action == "retry"
        best = choose_best([*before, now], begin=explicit)
        found |= {} if best is None else {BEST: best.to_record()}
    if manifest.round and is_on(config.guard, is_evaluated=is_compared):
        falls = config.guard.fall and is_compared
        change = _measure_change(run.workdir, before, now) if falls else {}
        now = dataclasses.replace(now, decisions={**now.decisions, **found, GUARD: change})
        done = [*before, now]
        back = _find_return(run, done, is_kept) if config.guard.action == "retry" else 0
        verdict = judge(config.guard, done, best=back)
        found[GUARD] = verdict.to_record() | change
    return evaluation._replace(decisions={**evaluation.decisions, **found})


def _find_return(
    run: Run, done: Sequence[Manifest], is_kept: Callable[[int], bool] | None = None
) -> int:
    """Return the round to go back to after the last of the rounds `done`; see `decide`."""

    def is_there(round: int) -> bool:
        return round == done[-1].round or run.checkpoints.find_round_end(round) is not None

    return find_return(run.config.guard, done, is_kept=is_kept or is_there)


def report_verdict(manifest: Manifest, *, is_last: bool = False) -> None:
    """Warn of the bounds that a round has broken; `is_last`: with it the budget is used up."""
    verdict = read_verdict(manifest)
    if verdict.action != "none":
        logger.warning("%s", describe_verdict(verdict, manifest.round, is_last=is_last))


def find_verdict(workdir: Path, round: int) -> Verdict:
    """Return the verdict at the end of `round`; `NO_VERDICT` if it has none."""
    if round < 1:
        return NO_VERDICT
    return read_verdict(manifests.load_manifest(round_folder(workdir, round)))


def find_start(workdir: Path, round: int) -> int:
    """Return the round whose policy `round` starts from; 0: the SFT policy."""
    verdict = find_verdict(workdir, round - 1)
    if verdict.action == "retry" and verdict.to is not None:
        return verdict.to
    return max(round - 1, 0)


def find_stop(config: Config, workdir: Path, round: int) -> Verdict | None:
    """Return the verdict that ends the run before `round`; None: it goes on.

    A round that has begun goes on. The verdict must hold under the bounds of `config`, too: they
    may have been changed since.
    """
    has_begun = manifests.load_manifest(round_folder(workdir, round)) is not None
    if has_begun or find_verdict(workdir, round - 1).action != "stop":
        return None
    done = list_done(workdir, round - 1)
    verdict = judge(config.guard, done, best=0)
    return verdict if verdict.action == "stop" else None


def lower_rate(config: Config, workdir: Path, round: int) -> Config:
    """Return a config with the learning rate that `round` has after those before it."""
    factor = scale_rate(list_done(workdir, round - 1))
    if factor == 1:
        return config
    rate = config.optimizer.learning_rate * factor
    optimizer = dataclasses.replace(config.optimizer, learning_rate=rate)
    return dataclasses.replace(config, optimizer=optimizer)


def find_needed(config: Config, workdir: Path, trained: int) -> frozenset[int]:
    """Return the rounds whose checkpoints must be there, if `trained` is the last that is done.

    They are the best one and those that a run goes back to once more if it resumes from one of the
    newest `checkpoint.keep` checkpoints; and with guard.action="retry" the best ones within the
    bounds, with and without the last one, of whose policy the next round tells more.
    """
    done = [one for one in list_done(workdir, trained) if not one.next_stage]
    best = read_best(done[-1]) if done else None
    needed = {best.round} if best else set()
    if config.guard.action == "retry":
        kept = {one.round for one in done if read_best(one) is not None}
        needed |= {
            find_return(config.guard, known, is_kept=kept.__contains__)
            for known in (done, done[:-1])
        }
    first = max(trained - config.checkpoint.keep + 1, 1)
    needed |= {find_start(workdir, round + 1) for round in range(first, trained + 1)}
    # Round 0 of a branch is what it started from, which nothing else holds.
    return frozenset(needed - {0}) | find_first(config)


def find_first(config: Config) -> frozenset[int]:
    """Return {0} if what a run starts from is a checkpoint of its own, which is always kept."""
    return frozenset({0} if config.branch.workdir else ())


def name_start(config: Config) -> str:
    """Return the words for the policy that a run starts from, which is that of round 0."""
    return "the policy of the branch" if config.branch.workdir else "the SFT policy"


def name_policy(config: Config, start: int) -> str:
    """Return the name that manifests have for the policy of round `start`, which a round begins
    with; of round 0: "sft", or "branch" if it is that of another run."""
    if start:
        return f"round-{start:04d}"
    return "branch" if config.branch.workdir else "sft"


def _measure_change(workdir: Path, before: Sequence[Manifest], now: Manifest) -> dict[str, Any]:
    """Return the change of the held-out reward against its highest so far; {}: it is not known."""
    highest, count = find_highest(before, REWARD)
    if highest is None or read_number(now, REWARD) is None:
        return {}
    change = compare_rounds(workdir, now.round, highest.round, chosen_from=count)
    return {} if change is None else {CHANGE: make_change(highest.round, change)}


def compare_rounds(workdir: Path, now: int, best: int, *, chosen_from: int = 1) -> Estimate | None:
    """Return the held-out reward of round `now` less that of `best`; see `compare_paired`."""
    rewards = (read_rewards(round_folder(workdir, round) / "eval.jsonl") for round in (now, best))
    return compare_paired(*rewards, chosen_from=chosen_from)


def read_rewards(path: Path) -> Mapping[str, Sequence[float]]:
    """Return the rewards in a file of scored samples, by prompt; {} if there is no file.

    Those of the files that were read last are kept: the best round is compared with every one.
    """
    if not path.exists():
        return {}
    state = path.stat()
    return _read_rewards(path, (state.st_ino, state.st_size, state.st_mtime_ns))


@functools.lru_cache(maxsize=4)
def _read_rewards(path: Path, known: tuple[int, int, int]) -> Mapping[str, Sequence[float]]:
    rewards: dict[str, list[float]] = {}
    for _, record in read_records(path, allow_empty=True):
        if record.get("reward") is not None:
            rewards.setdefault(str(record["prompt_id"]), []).append(float(record["reward"]))
    return rewards
