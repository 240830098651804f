"""Which examples of earlier rounds a round trains on beside its own (`feedback.replay`).

    rounds/0003/replay.jsonl    records of feedback.jsonl of earlier rounds, with "replayed_round"
    "decisions": {"replay": {"examples": 5, "rounds": {"1": 3, "2": 2}}}

Earlier rounds are those that the policy at the start of the round comes from: not one that the
guard went back from, since a policy that is no longer wanted may have drawn its samples.

The records are copies, with the log-probabilities of the policies that sampled them: whatever a
later start keeps of the earlier rounds, a round has in its own folder what it trains on.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from halos_jax import storage
from halos_jax.config import Config
from halos_jax.console.stages import show_count
from halos_jax.data.records import reading
from halos_jax.data.records.formats import digest
from halos_jax.rounds.budget import count_replayed
from halos_jax.rounds.context import StageResult
from halos_jax.rounds.outcome.decisions import find_start
from halos_jax.workdir import manifests
from halos_jax.workdir.manifests import ManifestError, round_folder

logger = logging.getLogger(__name__)

FILE = "replay.jsonl"
NAME = "replay"  # in `Manifest.decisions`
ROUND = "replayed_round"  # in the records

Rows = Sequence[Mapping[str, Any]]


class Replayed(NamedTuple):
    """What a round replays: records, how many examples they are, and of each earlier round."""

    rows: Rows
    examples: int
    rounds: Mapping[str, int]

    def add_to(self, done: StageResult) -> StageResult:
        """Return the result of the feedback stage with what the round replays."""
        chosen = {NAME: {"examples": self.examples, "rounds": dict(self.rounds)}}
        return StageResult(
            {**done.files, FILE: len(self.rows)},
            {**done.metrics, "feedback_replayed": self.examples},
            {**done.decisions, **chosen},
        )


def choose_replayed(config: Config, workdir: Path, round: int, fresh: Rows) -> Replayed:
    """Choose at random, without repetition, among the examples of the rounds that lead to `round`.

    They are so many that they make up `feedback.replay` of all examples, or all that there are.
    Which ones depends on (seed, round) and the earlier rounds' feedback alone.

    Args:
      fresh: the records of the round's own feedback.

    Raises:
      ManifestError: if the feedback of an earlier round is gone or not as the round wrote it.
    """
    known: list[tuple[str, int, Rows]] = []
    for before in list_sources(workdir, round):
        path = find_file(workdir, before, "feedback.jsonl")
        rows = [row for _, row in reading.read_records(path, allow_empty=True)]
        for number, example in enumerate(_split(config, rows)):
            known.append((digest("replay", config.seed, round, before, number), before, example))
    count = count_replayed(len(_split(config, fresh)), config.feedback.replay, len(known))
    chosen = sorted(sorted(known, key=lambda one: one[0])[:count], key=lambda one: one[1])
    rounds = {str(before): 0 for _, before, _ in chosen}
    for _, before, _ in chosen:
        rounds[str(before)] += 1
    found = [{**row, ROUND: before} for _, before, example in chosen for row in example]
    sources = ", ".join(f"{number} of round {before}" for before, number in rounds.items())
    logger.info(
        "round %d: %s of earlier rounds beside its own (feedback.replay=%g)%s",
        round,
        show_count(count, "examples"),
        config.feedback.replay,
        f": {sources}" if sources else "",
    )
    return Replayed(found, count, rounds)


def list_sources(workdir: Path, round: int) -> list[int]:
    """Return the rounds whose training the policy at the start of `round` has had, in order."""
    found, before = list[int](), find_start(workdir, round)
    while before:
        found.append(before)
        before = find_start(workdir, before)
    return found[::-1]


def _split(config: Config, rows: Rows) -> list[Rows]:
    """Return the records of each example: a record by itself, or all of a prompt's samples."""
    if config.feedback.type in ("pairwise", "binary"):
        return [[row] for row in rows]
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["prompt_id"], []).append(row)
    return list(groups.values())


def find_file(workdir: Path, round: int, name: str) -> Path:
    """Return a file of an earlier round, once it is known to be as the round wrote it.

    Raises:
      ManifestError: if it is not, or gone.
    """
    folder = round_folder(workdir, round)
    path, manifest = folder / name, manifests.load_manifest(folder)
    record = None if manifest is None else manifest.files.get(name)
    if record is None or not path.is_file() or storage.hash_file(path) != record.sha256:
        raise ManifestError(
            f"{path}: is gone or not as round {round} wrote it, and feedback.replay trains on "
            "examples of earlier rounds; put the original file back, or start a new run with "
            "--config.workdir=DIR"
        )
    return path


def read_replayed(folder: Path) -> list[Mapping[str, Any]]:
    """Return the records that the round of `folder` replays; none if it replays nothing."""
    path = folder / FILE
    return [row for _, row in reading.read_records(path, allow_empty=True)] if path.exists() else []
