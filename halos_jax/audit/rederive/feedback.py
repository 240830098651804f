"""Feedback made again from samples, rewards, config and seed: the same bytes come out."""

import dataclasses

from halos_jax.audit.findings import Finding, compare, differs, passed
from halos_jax.audit.rederive.compare import EXACT, compare_values
from halos_jax.audit.rederive.replica import Replica
from halos_jax.audit.rederive.rewards import check_metrics, link, read_rows
from halos_jax.rounds import stages
from halos_jax.rounds.context import Run
from halos_jax.rounds.refill import extents as ranges
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
        rows = [read_rows(file) for file in files]
        why = _describe_first(*rows)
        found = differs("feedback", what, why, count, unit="records")
    return [found, check_metrics("feedback", manifest, done, EXACT, is_same=True)]


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
