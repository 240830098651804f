"""Sample and score a round extent by extent, until it has `feedback.min_examples`.

    samples.extent-0000.jsonl, scores.extent-0000.jsonl    an extent, until the round's are written

An extent's files and the decision on it are committed by one write of the manifest. So a run that
is killed does at most one extent again, of which finished shards of samples are on disk. The
round's own files are then those of a round that had all these prompts from the start.
"""

import dataclasses
import logging
from collections.abc import Sequence

from halos_jax.data import datasets
from halos_jax.data.records import formats as records
from halos_jax.models.lora import merge_adapter
from halos_jax.once import say_once
from halos_jax.rewards.labels import (
    Labels,
    join_labels,
    label_samples,
    make_score_rows,
    read_labels,
)
from halos_jax.rounds import stages
from halos_jax.rounds.context import Run, StageResult
from halos_jax.rounds.pending import commit_extent, commit_stage, open_stage
from halos_jax.rounds.progress import Progress, commit_pending, identify_start
from halos_jax.rounds.proof.origin import Origin, check_alike, name_sampled
from halos_jax.rounds.proof.rescore import Rescoring, make_rescoring
from halos_jax.rounds.refill import extents as ranges
from halos_jax.rounds.refill.extents import Extent
from halos_jax.training.followers import take_policy
from halos_jax.types import Sample
from halos_jax.workdir.manifests import Manifest, round_folder

logger = logging.getLogger(__name__)


def gather(run: Run, progress: Progress, manifest: Manifest) -> Manifest:
    """Do the stages "sample" and "score" of a round that may get further prompts.

    Returns its manifest with both; its range is final.
    """
    while not ranges.has_ended(manifest):
        samples, origin = sample_extent(run, progress, manifest)
        commit_pending(run, progress)
        run.stop.check()
        manifest = score_extent(run, manifest, samples, origin)
        progress.budget = progress.budget.open(manifest.round, manifest.start, manifest.stop)
    return join_extents(run, progress, manifest)


def sample_extent(run: Run, progress: Progress, manifest: Manifest) -> tuple[list[Sample], Origin]:
    """Sample the prompts of the range that no extent has yet; say what they are drawn from."""
    known, round = ranges.read_extents(manifest), manifest.round
    prompts = run.prompts[known[-1].stop if known else manifest.start : manifest.stop]
    with open_stage(run, round, _name_stage("sample", len(known))) as stage:
        origin = identify_start(run, progress, manifest)
        policy = merge_adapter(take_policy(progress.state.params), run.trainer.frozen)
        samples = stages.sample_prompts(
            run.rollouts,
            policy,
            prompts,
            round_folder(run.workdir, round),
            round=round,
            label=_name("samples", len(known)),
            origin=origin,
            logps_of=_make_rescoring(run, progress, manifest).prompts,
        )
        tokens = sum(len(one.response_ids) for one in samples)
        stage.tell(samples=len(samples), tokens=tokens)
    return samples, origin


def score_extent(
    run: Run, manifest: Manifest, samples: Sequence[Sample], origin: Origin
) -> Manifest:
    """Score an extent and commit it, with the decision whether another one follows."""
    folder, number = round_folder(run.workdir, manifest.round), len(ranges.read_extents(manifest))
    names = [f"{_name(kind, number)}.jsonl" for kind in ("samples", "scores")]
    with open_stage(run, manifest.round, _name_stage("score", number)) as stage:
        stage.tell(samples=len(samples))
        labels = label_samples(run.rollouts.scorer, samples, run.config.reward)
        rows = map(records.sample_to_record, samples)
        stages.write_rows(run.workspace, folder / names[0], rows)
        stages.write_rows(run.workspace, folder / names[1], make_score_rows(samples, labels))
    before, known = _read_extents(run, manifest)
    rewards = [*known.rewards, *labels.rewards]
    scored = [
        dataclasses.replace(sample, reward=reward)
        for sample, reward in zip([*before, *samples], rewards, strict=True)
    ]
    _, counts = stages.make_feedback(run.config, scored, manifest.round)
    examples = ranges.count_examples(run.config.feedback, run.trainer.loss, counts)
    stop, ended = ranges.extend(
        run.config.feedback,
        manifest,
        examples,
        end=run.budget.end(len(run.prompts)),
        shard=run.config.sampling.shard_prompts,
    )
    _report(run, manifest, examples, stop, ended)
    decisions = ranges.add_extent(manifest, Extent(manifest.stop, examples, labels.counts), ended)
    prompts = datasets.identify_prompts(run.prompts[manifest.start : stop])
    manifest = dataclasses.replace(manifest, stop=stop, prompts=prompts)
    result = StageResult(dict.fromkeys(names, len(samples)), {}, decisions)
    manifest = commit_extent(run, manifest, result, **name_sampled(origin, names[0]))
    if run.workspace.is_writer:
        stages.remove_shards(folder, _name("samples", number))
    return manifest


def join_extents(run: Run, progress: Progress, manifest: Manifest) -> Manifest:
    """Write the round's files from those of its extents, and commit both of its stages."""
    samples, labels = _read_extents(run, manifest)
    folder = round_folder(run.workdir, manifest.round)
    check_alike(manifest)
    # The penalty of samples that were cut is subtracted once more, so the scores before it count.
    known = dataclasses.replace(labels, rewards=labels.raw or labels.rewards, raw=[])
    sampled = stages.write_samples(run.rollouts, samples, folder, manifest.round)
    more = _make_rescoring(run, progress, manifest).run(samples)
    scored = stages.score_stage(
        dataclasses.replace(run.rollouts, scorer=lambda asked: known), folder
    )
    metrics = {**manifest.metrics, **more.metrics, **ranges.measure_refill(manifest)}
    sampled = sampled._replace(files={**sampled.files, **more.files})
    # Both in one write: until then the manifest names the extents' files, which both are made of.
    marks = set(manifest.sampled_by.values())
    drawn = {"samples.jsonl": marks.pop()} if marks else {}
    manifest = dataclasses.replace(manifest, files={}, metrics=metrics, sampled_by=drawn)
    manifest = commit_stage(run, manifest, "sample", sampled, is_saved=False)
    return commit_stage(run, manifest, "score", scored)


def _make_rescoring(run: Run, progress: Progress, manifest: Manifest) -> Rescoring:
    """Return the re-scoring of the round, of samples in its first extent."""
    known = ranges.read_extents(manifest)
    first = run.prompts[manifest.start : known[0].stop if known else manifest.stop]
    return make_rescoring(run, progress.state, first, manifest.round)


def remove_extents(run: Run, manifest: Manifest) -> None:
    """Delete the files of the round's extents, once those of the round are committed."""
    if "score" in manifest.stages and run.workspace.is_writer:
        folder = round_folder(run.workdir, manifest.round)
        for path in sorted(folder.glob("*.extent-*.jsonl")):
            path.unlink()


def _name(kind: str, number: int) -> str:
    return f"{kind}.extent-{number:04d}"


def _name_stage(stage: str, number: int) -> str:
    return f"{stage} extension {number}" if number else stage


def _report(run: Run, manifest: Manifest, examples: int, stop: int, ended: str) -> None:
    wanted, used = run.config.feedback.min_examples, manifest.stop - manifest.start
    if ended == ranges.ENOUGH:
        if ranges.read_extents(manifest):
            logger.info(
                "round %d: %d prompts give %d examples, enough", manifest.round, used, examples
            )
    elif ended:
        say_once(
            logger,
            "round %d: %d prompts give %d of feedback.min_examples=%d examples, and it gets no "
            "more prompts: %s",
            manifest.round,
            used,
            examples,
            wanted,
            {
                ranges.MOST: "it has had feedback.max_prompts_factor="
                f"{run.config.feedback.max_prompts_factor:g} times its share",
                ranges.USED_UP: "the budget or the prompts are used up",
            }[ended],
        )
    else:
        logger.info(
            "round %d: %d prompts give %d of feedback.min_examples=%d examples: %d more prompts",
            manifest.round,
            used,
            examples,
            wanted,
            stop - manifest.stop,
        )


def _read_extents(run: Run, manifest: Manifest) -> tuple[list[Sample], Labels]:
    """Return the samples of the committed extents, and their labels."""
    folder = round_folder(run.workdir, manifest.round)
    samples, labels = list[Sample](), list[Labels]()
    for number, extent in enumerate(ranges.read_extents(manifest)):
        found = stages.read_samples(folder / f"{_name('samples', number)}.jsonl")
        scores = read_labels(folder / f"{_name('scores', number)}.jsonl", found)
        samples += found
        labels.append(dataclasses.replace(scores, counts=extent.counts))
    return samples, join_labels(labels)
