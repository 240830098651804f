"""The stages of a round. Each reads the files of the stages before it and writes its own file."""

import dataclasses
import functools
import logging
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from halos_jax import sharding
from halos_jax.checkpoints.position import Position
from halos_jax.config import Config
from halos_jax.config.kinds import FEEDBACK_TYPES, ITEM_KINDS
from halos_jax.config.tasks import load
from halos_jax.console.bars import make_progress
from halos_jax.console.stages import show_count
from halos_jax.data.items import load_items
from halos_jax.data.records import formats as records
from halos_jax.data.records import reading
from halos_jax.devices import explain_memory
from halos_jax.packing.transforms import NOTHING
from halos_jax.rewards.feedback_report import report_feedback
from halos_jax.rewards.labels import (
    average_rewards,
    gives_rewards,
    label_samples,
    make_score_rows,
    measure_labels,
    read_scores,
)
from halos_jax.rounds.context import Rollouts, Run, StageResult, seed_batches
from halos_jax.rounds.cuts import measure_samples, report_samples
from halos_jax.rounds.outlook import measure_progress
from halos_jax.rounds.proof import origin as origins
from halos_jax.rounds.proof.origin import UNKNOWN, Origin
from halos_jax.rounds.proof.rescore import NO_RESCORING, Rescoring, drop_logps
from halos_jax.rounds.replay.choose import FILE as REPLAY
from halos_jax.rounds.replay.choose import choose_replayed
from halos_jax.rounds.watch import before
from halos_jax.sampling.sampler import sample_shard
from halos_jax.training import loop as training
from halos_jax.training.balance import report_balance
from halos_jax.training.loop import Dataset
from halos_jax.training.optim import decays_by_budget
from halos_jax.training.proximal import add_proximal
from halos_jax.types import Item, Params, Prompt, Sample, TrainState
from halos_jax.workdir.intact import MANIFEST
from halos_jax.workdir.manifests import Manifest, round_folder
from halos_jax.workdir.workspace import Workspace

logger = logging.getLogger(__name__)

_LARGE = 1 << 28  # bytes of a round's samples that are too many to be kept in memory


def sample_prompts(
    run: Rollouts,
    params: Params,
    prompts: Sequence[Prompt],
    folder: Path,
    *,
    round: int,
    label: str,
    origin: Origin = UNKNOWN,
    logps_of: Collection[str] = (),
) -> list[Sample]:
    """Sample from `prompts` shard by shard; shards that are on disk are not sampled again.

    The shards are kept in `folder` as `LABEL.shard-0000.jsonl` until the stage is committed.

    Args:
      origin: what the sampler must hold (else: OriginError); shards of another one are made again.
      logps_of: ids of prompts whose samples have `logps` in any case.
    """
    size = run.config.sampling.shard_prompts
    per_prompt = run.config.sampling.num_samples_per_prompt
    weights, samples = None, []
    bar = make_progress(
        len(prompts) * per_prompt, label, unit="samples", enabled=run.config.progress
    )

    def count(finished: int) -> None:
        bar.update(finished)
        run.stop.check()  # a shard that is not complete is sampled again

    for number, start in enumerate(range(0, len(prompts), size)):
        run.stop.check()
        path = folder / f"{label}.shard-{number:04d}.jsonl"
        asked = prompts[start : start + size]
        shard = origins.find_shard(path, asked, per_prompt, origin)
        # No process may write the file until all have looked for it: they must all agree.
        sharding.wait_for_all(f"looked for {path.name}")
        if shard is None:
            with explain_memory("sample", f"sampling ({label}, round {round})", run.config):
                if weights is None:  # made once: a copy of them in the sampler's layout
                    weights = origins.unstack(
                        run.sampler, params, origin, f"{label}, round {round}"
                    )
                shard = sample_shard(
                    run.sampler,
                    weights,
                    asked,
                    seed=run.config.seed,
                    round=round,
                    generator=run.config.sampling.generator or run.config.model.path,
                    logps_of=logps_of,
                    on_sample=count,
                )
            write_shard(run.workspace, path, origins.mark_rows(shard, origin))
        else:
            bar.update(len(shard))
        samples += shard
    bar.close()
    return samples


def sample_stage(
    run: Rollouts,
    params: Params,
    prompts: Sequence[Prompt],
    folder: Path,
    round: int,
    origin: Origin = UNKNOWN,
    rescoring: Rescoring = NO_RESCORING,
) -> StageResult:
    """Write samples.jsonl; return its number of records, and metrics of the samples."""
    samples = sample_prompts(
        run,
        params,
        prompts,
        folder,
        round=round,
        label="samples",
        origin=origin,
        logps_of=rescoring.prompts,
    )
    return rescoring.add_to(write_samples(run, samples, folder, round), samples)


def write_samples(
    run: Rollouts, samples: Sequence[Sample], folder: Path, round: int
) -> StageResult:
    """Write samples.jsonl with a round's samples; see `sample_stage`."""
    report_samples(run.sampler, samples, f"round {round}" if round else "samples")
    kept = drop_logps(run.config, samples)
    write_rows(run.workspace, folder / "samples.jsonl", map(records.sample_to_record, kept))
    return StageResult({"samples.jsonl": len(samples)}, measure_samples(samples))


def score_stage(run: Rollouts, folder: Path) -> StageResult:
    """Write scores.jsonl, a reward per sample; null for samples that could not be labelled."""
    samples = read_samples(folder / "samples.jsonl")
    labels = label_samples(run.scorer, samples, run.config.reward)
    rows = make_score_rows(samples, labels)
    write_rows(run.workspace, folder / "scores.jsonl", rows)
    if not gives_rewards(run.config.reward):
        return StageResult({"scores.jsonl": len(rows)}, {})
    metrics = {"reward_train_mean": average_rewards(labels.rewards)}
    return StageResult({"scores.jsonl": len(rows)}, metrics | measure_labels(labels, "train"))


def feedback_stage(run: Rollouts, folder: Path, round: int) -> StageResult:
    """Write feedback.jsonl from samples and scores, and replay.jsonl from earlier rounds."""
    scored = read_scored(folder)
    rows, counts = make_feedback(run.config, scored, round)
    report_feedback(f"round {round}", counts, scored, run.config)
    write_rows(run.workspace, folder / "feedback.jsonl", rows)
    metrics = {f"feedback_{name}": count for name, count in counts.items()}
    done = StageResult({"feedback.jsonl": len(rows)}, metrics)
    if run.config.feedback.replay:
        found = choose_replayed(run.config, run.workspace.workdir, round, rows)
        write_rows(run.workspace, folder / REPLAY, found.rows)
        done = found.add_to(done)
    return done


def train_stage(
    run: Run,
    state: TrainState,
    folder: Path,
    *,
    round: int,
    start: int,
    held_out: Dataset | None,
    load_sft: Callable[[], Params],
    load_round_start: Callable[[], Params],
) -> TrainState:
    """Train on the round's feedback, starting at step `start` of the round.

    Args:
      load_sft, load_round_start: return the params of the reference "sft", and those that the
        round started with. They are freed as soon as their log-probs or values are computed.
    """
    items = load_feedback_items(run, folder)
    first_step = int(state.step) - start
    if not items:
        noun = ITEM_KINDS[run.trainer.loss.items].noun
        logger.warning("round %d has no %s to train on: the policy stays as it is", round, noun)
    dataset = prepare_round(run, items, folder, round, load_sft, load_round_start)
    if start == 0:
        run.writer.write(first_step, {"round": round, **before.read_before(folder).metrics})
    if dataset is not None:
        state = training.run_steps(
            run.trainer,
            state,
            dataset,
            held_out=held_out,
            writer=run.writer,
            start=start,
            first_step=first_step,
            on_step=functools.partial(after_step, run, round=round, total=len(dataset.plan)),
            label=f"train {round}",
        )
    run.writer.flush()
    return state


def prepare_round(
    run: Run,
    items: Sequence[Item],
    folder: Path,
    round: int,
    load_sft: Callable[[], Params],
    load_round_start: Callable[[], Params],
) -> Dataset | None:
    """Do what comes before a round's first step: return its dataset, if there are items, with what
    other policies say of them and of those it replays; and write down its fresh samples' signs."""
    sft = functools.cache(lambda: load_sft())  # for the reference and for the signs
    seed = seed_batches(run.config.seed, round)
    dataset, logps, replays = None, None, run.config.feedback.replay
    if items:
        more = load_feedback_items(run, folder, REPLAY) if replays else []
        every = [*items, *more]
        dataset = training.make_dataset(
            run.trainer, every, seed=seed, epochs=run.config.train.epochs, recurring="train"
        )
        logger.info(
            "round %d: %s, %s, packed fill %.0f %%",
            round,
            show_count(len(every), ITEM_KINDS[run.trainer.loss.items].noun),
            show_count(len(dataset.plan), "steps"),
            100 * dataset.plan.fill,
        )
        if decays_by_budget(run.config):
            dataset = dataclasses.replace(
                dataset, progress=measure_progress(run.budget, folder, len(run.prompts))
            )
        reference = run.config.rounds.reference
        moving = reference == "previous_step"
        if training.needs_reference(run.trainer.loss, every, moving=moving):
            # Only `sft` may hold the params, which are in memory beside the train state.
            is_start = reference == "round_start"
            trainer = run.trainer if is_start else run.referring
            params, label = load_round_start() if is_start else sft(), f"reference {round}"
            dataset = training.add_reference(trainer, dataset, params, label=label)
            del params
            # Signs are of the policies themselves, whatever the sampler drew from.
            is_plain = not is_start and dataset.plan.layout.kept == NOTHING
            logps = dataset.reference_logps if is_plain else None
    fresh, samples = (logps[: len(items)] if logps and replays else logps), read_scored(folder)
    signs = before.measure_before(run, samples, items, fresh, sft, round=round)
    if signs is not None:
        write_shard(run.workspace, folder / before.FILE, [signs])
    del sft
    if dataset is not None and run.trainer.loss.value:
        dataset = training.add_collected(
            run.trainer, dataset, load_round_start(), seed=seed, label=f"values {round}"
        )
    elif dataset is not None:
        known = dataset.reference_logps if run.config.rounds.reference == "round_start" else None
        label = f"start of round {round}"
        dataset = add_proximal(run.trainer, dataset, load_round_start, known=known, label=label)
    return dataset


def save_round(run: Run, state: TrainState, round: int) -> None:
    """Start to save the train state at the end of a round's training."""
    run.saver.save(state, _locate(run, state, round))


def after_step(run: Run, state: TrainState, done: int, *, round: int, total: int) -> None:
    """Save within the train stage if a checkpoint is due or the run must stop."""
    run.saver.after_step(
        state, done, total, lambda: _locate(run, state, round, in_stage=True, stage_step=done)
    )


def _locate(
    run: Run, state: TrainState, round: int, *, in_stage: bool = False, stage_step: int = 0
) -> Position:
    layouts = run.trainer.layouts.to_record()
    return Position(int(state.step), round, in_stage, stage_step, layouts)


def load_feedback_items(run: Run, folder: Path, name: str = "feedback.jsonl") -> list[Item]:
    """Return the training items of a round's feedback, or of what it replays.

    In round 0 they are the held-out items: the SFT policy's labelled samples of held-out prompts.
    """
    path = folder / name
    if not path.stat().st_size:  # a round of ties alone, or the first one, which replays nothing
        return []
    kind, control = run.trainer.loss.items, run.config.data.control
    items = load_items(kind, str(path), run.policy.renderer, run.lengths, control=control)
    if ITEM_KINDS[kind].is_weighed and name != REPLAY:
        report_balance(items, run.config.loss)
    return items


def remove_shards(folder: Path, label: str) -> None:
    """Delete the shards of a committed stage."""
    for path in folder.glob(f"{label}.shard-*.jsonl"):
        path.unlink()


def remove_sample_shards(run: Run, manifest: Manifest) -> None:
    """Delete the shards of the round's samples, once the sample stage is committed."""
    if "sample" in manifest.stages and run.workspace.is_writer:
        remove_shards(round_folder(run.workdir, manifest.round), "samples")


def remove_eval_shards(run: Run, manifest: Manifest) -> None:
    """Delete the shards of a committed round's evaluation, and of the signs before training.

    Those of its test go once the test is committed: the final policy's comes after the last round.
    """
    labels = ("eval", "signs", *(("test",) if "test.jsonl" in manifest.files else ()))
    for label in labels if run.workspace.is_writer else ():
        remove_shards(round_folder(run.workdir, manifest.round), label)


def forget_samples(run: Run, round: int) -> None:
    """Delete what the policy of a round has sampled already, before that round is trained again.

    On some devices training again gives a slightly different policy.
    """
    if run.workspace.is_writer:
        remove_shards(round_folder(run.workdir, round), "eval")
        following = round_folder(run.workdir, round + 1)
        if (following / MANIFEST).exists():  # it has been opened
            run.workspace.ledger.note_gone(following / MANIFEST)
            (following / MANIFEST).unlink()
        shutil.rmtree(following, ignore_errors=True)
    sharding.wait_for_all(f"forget samples of round {round}")


def make_feedback(
    config: Config, scored: Sequence[Sample], round: int
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Return the feedback records that `config.feedback` asks for, and counts of them."""
    rows, counts = load(FEEDBACK_TYPES[config.feedback.type].make)(config, scored, round)
    return rows, counts


def write_rows(workspace: Workspace, path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a stage's file on process 0; the other processes wait until it is there."""
    if workspace.is_writer:
        records.write_records(path, rows)
    sharding.wait_for_all(f"wrote {path.name}")


def write_shard(workspace: Workspace, path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a shard of a stage's file, as `write_rows`; the ledger lists it until it is removed."""
    if workspace.is_writer:
        records.write_records(path, rows, note=workspace.ledger.note_file)
    sharding.wait_for_all(f"wrote {path.name}")


def read_scored(folder: Path) -> list[Sample]:
    """Read a round's samples with their rewards.

    Those of the round that was read last are kept, where they are not very many: the stages of a
    round ask for the same ones, and reading them takes long beside a step of a small model.
    """
    found = [folder / name for name in ("samples.jsonl", "scores.jsonl")]
    states = [path.stat() for path in found]
    if states[0].st_size > _LARGE:
        return _read_scored(folder)
    known = tuple((one.st_ino, one.st_size, one.st_mtime_ns) for one in states)
    return list(_keep_scored(folder, known))


@functools.lru_cache(maxsize=1)
def _keep_scored(folder: Path, known: tuple[tuple[int, int, int], ...]) -> list[Sample]:
    return _read_scored(folder)


def _read_scored(folder: Path) -> list[Sample]:
    return read_scores(folder / "scores.jsonl", read_samples(folder / "samples.jsonl"))


def read_samples(path: Path) -> list[Sample]:
    """Read samples from a file that `write_rows` has written."""
    return [
        records.sample_from_record(record, file=str(path), line=line)
        for line, record in reading.read_records(path)
    ]
