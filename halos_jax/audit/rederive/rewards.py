"""Scores made again by the run's reward: functions, rules, models, and judges from their cache."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from halos_jax.audit.findings import Finding, not_checked
from halos_jax.audit.rederive.compare import (
    EXACT,
    Amount,
    Tolerance,
    compare_rows,
    compare_values,
    drop_shares,
    drop_sums,
    judge,
)
from halos_jax.audit.rederive.judges import list_lost_caches, list_rewards
from halos_jax.audit.rederive.replica import Replica
from halos_jax.config import Config
from halos_jax.config.kinds import REWARD_KINDS
from halos_jax.data.records import reading
from halos_jax.rewards.labels import Labels, Scorer, join_labels, label_samples
from halos_jax.rounds import stages
from halos_jax.rounds.context import Rollouts, StageResult
from halos_jax.rounds.refill import extents as ranges
from halos_jax.types import Sample
from halos_jax.workdir.manifests import Manifest

# Of a reward model, whose score of a text depends on the batch that it is in.
_CLOSE = {"float32": Tolerance(1e-4, 1e-4), "bfloat16": Tolerance(0.02, 0.05)}


def find_tolerance(config: Config) -> Tolerance:
    """Return how far scores may be from those of another device; models alone round otherwise."""
    models = [one for one in list_rewards(config) if REWARD_KINDS[one.kind].by_tokens]
    dtypes = [one.compute_dtype for one in models]
    return max((_CLOSE[dtype] for dtype in dtypes), key=lambda one: one.relative, default=EXACT)


def explain_lost(config: Config) -> str:
    """Say which judge's answers are gone, so that its scores cannot be checked; "": none."""
    lost = list_lost_caches(config)
    return f"the judge's answers are gone: {', '.join(map(str, lost))}" if lost else ""


def check_scores(
    replica: Replica, rollouts: Rollouts, manifest: Manifest, *, is_same: bool
) -> list[Finding]:
    """Score a round's samples again; compare scores.jsonl and the metrics of the stage."""
    name, what = "rewards", "samples scored again"
    lost = explain_lost(rollouts.config)
    if lost:
        return [not_checked(name, what, lost, manifest.files["scores.jsonl"].count, "samples")]
    recorded = replica.folder(manifest.round)
    folder = replica.make_folder(f"scores-{manifest.round}")
    link(folder, recorded / "samples.jsonl")
    scored = dataclasses.replace(rollouts, scorer=_by_extents(rollouts, manifest))
    done = stages.score_stage(scored, folder)
    rows = read_rows(recorded / "scores.jsonl")
    made = read_rows(folder / "scores.jsonl")
    close = find_tolerance(rollouts.config)
    amount = Amount(len(rows), len(rows), "samples")
    found = judge(
        name,
        what,
        compare_rows(rows, made),
        compare_rows(rows, made, close),
        is_same=is_same,
        amount=amount,
    )
    return [found, check_metrics(name, manifest, done, close, is_same=is_same)]


def _by_extents(rollouts: Rollouts, manifest: Manifest) -> Scorer:
    """Return the scorer of a round: one call for each of its extents, as the run made."""
    extents = ranges.read_extents(manifest)
    if not extents:
        return rollouts.scorer
    count = rollouts.config.sampling.num_samples_per_prompt
    ends = [(extent.stop - manifest.start) * count for extent in extents]

    def score(samples: Sequence[Sample]) -> Labels:
        parts = [samples[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        labels = [label_samples(rollouts.scorer, part, rollouts.config.reward) for part in parts]
        joined = join_labels(labels)
        # The penalty of samples that were cut is subtracted once more.
        return dataclasses.replace(joined, rewards=joined.raw or joined.rewards, raw=[])

    return score


def check_metrics(
    name: str, manifest: Manifest, done: StageResult, close: Tolerance, *, is_same: bool
) -> Finding:
    """Compare the metrics that a stage gave again with those in the manifest."""
    known = {path: manifest.metrics.get(path) for path in done.metrics}
    return judge(
        name,
        "the manifest's metrics of them",
        compare_values(known, dict(done.metrics)),
        compare_values(drop_sums(drop_shares(known)), drop_sums(drop_shares(done.metrics)), close),
        is_same=is_same,
        amount=Amount(len(known), len(known), "metrics"),
    )


def link(folder: Path, *files: Path) -> None:
    """Link files into a folder under their own names."""
    for file in files:
        (folder / file.name).symlink_to(file.resolve())


def read_rows(path: Path) -> list[dict[str, object]]:
    """Return the records of a file, which may have none."""
    return [dict(record) for _, record in reading.read_records(path, allow_empty=True)]
