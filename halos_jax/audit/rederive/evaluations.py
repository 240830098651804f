"""Evaluations made again: the recorded answers to held-out prompts are scored and measured."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from halos_jax.audit.findings import Finding, not_checked, passed
from halos_jax.audit.rederive.compare import Amount, compare_rows, judge
from halos_jax.audit.rederive.feedback import compare_records
from halos_jax.audit.rederive.replica import Replica
from halos_jax.audit.rederive.rewards import (
    check_metrics,
    explain_lost,
    find_tolerance,
    read_rows,
)
from halos_jax.audit.rederive.samples import Draws
from halos_jax.data.records import formats as records
from halos_jax.rounds import evaluation, stages
from halos_jax.rounds.context import Rollouts, Run
from halos_jax.rounds.evaluation import EVAL, TEST, Split
from halos_jax.types import Prompt, Sample
from halos_jax.workdir.manifests import Manifest

_FILES: dict[Split, str] = {"eval": EVAL, "test": TEST}
_CHECKS: dict[Split, str] = {"eval": "held-out", "test": "test"}


def list_splits(manifest: Manifest) -> list[Split]:
    """Return what was evaluated in a round, as far as its manifest names files of it."""
    return [split for split, file in _FILES.items() if file in manifest.files]


def find_prompts(run: Run, split: Split) -> Sequence[Prompt]:
    """Return the prompts of an evaluation."""
    return run.held_out if split == "eval" else run.test


def make_rollouts(run: Run, split: Split) -> Rollouts:
    """Return what sampled and scored an evaluation."""
    return run.rollouts if split == "eval" else evaluation.make_test_rollouts(run.rollouts)


def read_drawn(replica: Replica, run: Run, manifest: Manifest, split: Split) -> Draws:
    """Return the recorded samples of an evaluation."""
    samples = _read_scored(replica.folder(manifest.round) / _FILES[split])
    return Draws(f"{_CHECKS[split]} samples", 0, find_prompts(run, split), samples)


def _read_scored(path: Path) -> list[Sample]:
    rows = [{name: one for name, one in row.items() if name != "scores"} for row in read_rows(path)]
    return [
        records.sample_from_record(row, file=str(path), line=line)
        for line, row in enumerate(rows, 1)
    ]


def check_evaluation(
    replica: Replica, run: Run, manifest: Manifest, split: Split, *, is_same: bool
) -> list[Finding]:
    """Score the recorded answers again; compare their file, and the metrics of the manifest."""
    name, file = _CHECKS[split], _FILES[split]
    what = "answers scored again by the reward and all scorers"
    lost = explain_lost(run.config)
    if lost:
        return [not_checked(name, what, lost, manifest.files[file].count, "samples")]
    drawn = read_drawn(replica, run, manifest, split)
    folder = replica.make_folder(f"{split}-{manifest.round}")
    _put_shards(run, folder, drawn, split)
    if split == "eval":
        done = evaluation.evaluate_stage(run, {}, folder, ("eval",), round=manifest.round, step=0)
    else:
        done = evaluation.final_test_stage(run, {}, folder, round=manifest.round, step=0)
    recorded = replica.folder(manifest.round)
    rows, made = read_rows(recorded / file), read_rows(folder / file)
    close = find_tolerance(run.config)
    found = judge(
        name,
        what,
        compare_rows(rows, made),
        compare_rows(rows, made, close),
        is_same=is_same,
        amount=Amount(len(rows), len(rows), "samples"),
    )
    findings = [found, check_metrics(name, manifest, done, close, is_same=is_same)]
    if "feedback.jsonl" in done.files:
        findings.append(_check_feedback(run, recorded, folder, manifest, drawn))
    return findings


def _put_shards(run: Run, folder: Path, drawn: Draws, split: Split) -> None:
    """Write the recorded samples as the shards that the stage looks for."""
    size = run.config.sampling.shard_prompts
    for number, _ in enumerate(range(0, len(drawn.prompts), size)):
        shard = drawn.take_shard(number, size).samples
        rows = (records.sample_to_record(dataclasses.replace(one, reward=None)) for one in shard)
        records.write_records(folder / f"{split}.shard-{number:04d}.jsonl", rows)


def _check_feedback(
    run: Run, recorded: Path, folder: Path, manifest: Manifest, drawn: Draws
) -> Finding:
    """Make the feedback on held-out samples again, which the run's loss is evaluated on."""
    name, what = "feedback", "of the held-out samples, made again byte for byte"
    rows, _ = stages.make_feedback(run.config, drawn.samples, 0)
    made, known = folder / "feedback-again.jsonl", recorded / "feedback.jsonl"
    records.write_records(made, rows)
    count = manifest.files["feedback.jsonl"].count
    if made.read_bytes() == known.read_bytes():
        return passed(name, what, count, unit="records")
    return compare_records(read_rows(known), read_rows(made), what)
