"""Feedback made again from samples, rewards, config and seed: the same bytes come out."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from halos_jax.audit.findings import Finding, compare, differs, passed
from halos_jax.audit.rederive.compare import EXACT, compare_values
from halos_jax.audit.rederive.replica import Replica
from halos_jax.audit.rederive.rewards import check_metrics, link, read_rows
from halos_jax.rounds import stages
from halos_jax.rounds.context import Run, StageResult
from halos_jax.rounds.refill import extents as ranges
from halos_jax.rounds.replay import choose as replay
from halos_jax.workdir.manifests import Manifest


def check_feedback(replica: Replica, run: Run, manifest: Manifest) -> list[Finding]:
    """Make a round's feedback again; compare feedback.jsonl byte for byte, and its counts."""
    recorded = replica.folder(manifest.round)
    folder = replica.make_folder(f"feedback-{manifest.round}")
    link(folder, recorded / "samples.jsonl", recorded / "scores.jsonl")
    done = stages.feedback_stage(run.rollouts, folder, manifest.round)
    files = [one / "feedback.jsonl" for one in (recorded, folder)]
    count = manifest.files["feedback.jsonl"].count
    what = "made again from samples and scores, byte for byte"
    if files[0].read_bytes() == files[1].read_bytes():
        found = passed("feedback", what, count, unit="records")
    else:
        found = compare_records(read_rows(files[0]), read_rows(files[1]), what)
    metrics = check_metrics("feedback", manifest, done, EXACT, is_same=True)
    return [found, metrics, *_check_replay(recorded, folder, manifest, done)]


def _check_replay(
    recorded: Path, made: Path, manifest: Manifest, done: StageResult
) -> Iterator[Finding]:
    """Choose again what the round replays; compare its records, and the manifest's decision."""
    if not (replay.FILE in manifest.files or replay.FILE in done.files):
        return
    rows = [
        read_rows(folder / replay.FILE) if (folder / replay.FILE).exists() else []
        for folder in (recorded, made)
    ]
    wrong = [] if rows[0] == rows[1] else ["the records are not those that follow"]
    known = {replay.NAME: manifest.decisions.get(replay.NAME)}
    difference = compare_values(known, dict(done.decisions))
    wrong += [difference.first] if difference.first else []
    what = "examples of earlier rounds, chosen again"
    yield compare("replay", what, wrong, len(rows[0]), unit="records")


# What earlier versions did not write into feedback with `sampling.keep_logps`.
_LATER = frozenset({"logps_A", "logps_B"})


def compare_records(
    recorded: list[dict[str, object]], made: list[dict[str, object]], what: str
) -> Finding:
    """Return the finding about feedback that was made again and has other bytes.

    Fields that the version which wrote it did not know are left out of the comparison, if no record
    has any of them.
    """
    count, known = len(recorded), drop_later(recorded, made)
    if known == recorded != made:
        why = f"an earlier version wrote it, without {' and '.join(sorted(_LATER))}"
        return passed("feedback", what, count, unit="records", why=why)
    return differs("feedback", what, _describe_first(recorded, known), count, unit="records")


def drop_later(
    recorded: list[dict[str, object]], made: list[dict[str, object]]
) -> list[dict[str, object]]:
    """Return the records made again without the later fields, if no recorded one has any."""
    if any(_LATER & row.keys() for row in recorded):
        return made
    return [{name: one for name, one in row.items() if name not in _LATER} for row in made]


def _describe_first(recorded: list[dict[str, object]], made: list[dict[str, object]]) -> str:
    if len(recorded) != len(made):
        return f"{len(recorded)} records, but {len(made)} follow"
    for line, (one, other) in enumerate(zip(recorded, made, strict=True), 1):
        difference = compare_values(one, other)
        if difference.first:
            return f"line {line}: {difference.first}"
    return "the same records, written otherwise"


def check_refill(run: Run, manifest: Manifest, replica: Replica) -> list[Finding]:
    """Decide again after each extent of a round whether another one follows."""
    extents = ranges.read_extents(manifest)
    if not extents:
        return []
    config, scored = run.config, stages.read_scored(replica.folder(manifest.round))
    count, wrong = config.sampling.num_samples_per_prompt, list[str]()
    for number, extent in enumerate(extents):
        known = scored[: (extent.stop - manifest.start) * count]
        _, counts = stages.make_feedback(config, known, manifest.round)
        examples = ranges.count_examples(config.feedback, run.trainer.loss, counts)
        before = _at_extent(manifest, number, extent.stop)
        stop, ended = ranges.extend(
            config.feedback,
            before,
            examples,
            end=run.budget.end(len(run.prompts)),
            shard=config.sampling.shard_prompts,
        )
        is_last = number + 1 == len(extents)
        follows = "" if not is_last else manifest.decisions[ranges.NAME]["ended"]
        to = manifest.stop if is_last else extents[number + 1].stop
        if (examples, stop, ended) != (extent.examples, to, follows):
            wrong.append(
                f"extent {number}: {examples} examples, then up to prompt {stop} ({ended or 'more'}"
                f") follow; recorded: {extent.examples}, {to} ({follows or 'more'})"
            )
    what = "whether the round gets further prompts"
    return [compare("decisions", what, wrong, len(extents), unit="extents")]


def _at_extent(manifest: Manifest, number: int, stop: int) -> Manifest:
    """Return the manifest as it was when extent `number` had been scored."""
    known = [dataclasses.asdict(one) for one in ranges.read_extents(manifest)[:number]]
    decisions = {ranges.NAME: {"extents": known, "ended": ""}}
    return dataclasses.replace(manifest, stop=stop, decisions=decisions)
