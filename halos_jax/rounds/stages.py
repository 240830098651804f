"""The stages of a round. Each reads what the stage before left on disk and leaves its own file."""

import dataclasses
import functools
import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from halos_jax.config import Config
from halos_jax.data import records
from halos_jax.data.chat import Renderer
from halos_jax.data.tokenize import Lengths, make_pair_items
from halos_jax.metrics import MetricWriter, make_progress
from halos_jax.rewards.feedback import FeedbackResult, make_preferences
from halos_jax.rewards.scorers import Scorer
from halos_jax.rounds.checkpoints import Checkpoints
from halos_jax.rounds.interrupt import Interrupted, StopSignal
from halos_jax.sampling.sampler import Sampler, sample_shard
from halos_jax.training import loop as training
from halos_jax.training.loop import Dataset, Trainer
from halos_jax.types import Item, Preference, Prompt, Sample, TrainState

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that the stages of an online run share."""

    config: Config
    workdir: Path
    mesh: Mesh
    renderer: Renderer
    sampler: Sampler
    scorer: Scorer
    rules: Mapping[str, Scorer]  # further scorers of the held-out samples, by name
    trainer: Trainer
    checkpoints: Checkpoints
    writer: MetricWriter
    stop: StopSignal
    prompts: Sequence[Prompt]
    held_out: Sequence[Prompt]
    is_writer: bool

    @functools.cached_property
    def lengths(self) -> Lengths:
        return Lengths(self.config.sampling.max_prompt_length, self.config.train.max_length)


def sample_prompts(
    run: Run, params: Any, prompts: Sequence[Prompt], folder: Path, *, round: int, label: str
) -> list[Sample]:
    """Sample `prompts` shard by shard; a shard on disk is taken as it is.

    Shard files stand in `folder` as `LABEL.shard-0000.jsonl` until the stage is committed.
    """
    size = run.config.sampling.shard_prompts
    per_prompt = run.config.sampling.num_samples_per_prompt
    weights, samples = None, []
    bar = make_progress(len(prompts) * per_prompt, label, enabled=run.config.progress)
    for number, start in enumerate(range(0, len(prompts), size)):
        run.stop.check()
        path = folder / f"{label}.shard-{number:04d}.jsonl"
        if not path.exists():
            # One copy of the weights in the sampler's layout, made when the first shard needs it.
            weights = run.sampler.unstack(params) if weights is None else weights
            shard = sample_shard(
                run.sampler,
                weights,
                prompts[start : start + size],
                seed=run.config.seed,
                round=round,
                generator=run.config.model.path,
                on_sample=bar.update,
            )
            if run.is_writer:
                records.write_records(path, map(records.sample_to_record, shard))
            wait_for_all(f"sampled {path.name}")
        else:
            shard = _read_samples(path)
            bar.update(len(shard))
        samples += shard
    bar.close()
    return samples


def sample_stage(run: Run, params: Any, prompts: Sequence[Prompt], folder: Path, round: int):
    """Write samples.jsonl; return its record count and counts of the samples."""
    samples = sample_prompts(run, params, prompts, folder, round=round, label="samples")
    _write(run, folder / "samples.jsonl", map(records.sample_to_record, samples))
    lengths = [len(sample.response_ids) for sample in samples]
    truncated = sum(sample.finish_reason == "length" for sample in samples)
    return {"samples.jsonl": len(samples)}, {
        "samples": len(samples),
        "response_tokens_mean": float(np.mean(lengths)),
        "truncated": truncated,
    }


def score_stage(run: Run, folder: Path):
    """Write scores.jsonl, one reward a sample."""
    samples = _read_samples(folder / "samples.jsonl")
    rewards = run.scorer(samples)
    rows = [
        {
            "prompt_id": sample.prompt.prompt_id,
            "sample_id": sample.sample_id,
            "reward": reward,
            "type": "score",
        }
        for sample, reward in zip(samples, rewards, strict=True)
    ]
    _write(run, folder / "scores.jsonl", rows)
    return {"scores.jsonl": len(rows)}, {"reward_train_mean": float(np.mean(rewards))}


def feedback_stage(run: Run, folder: Path, round: int):
    """Write feedback.jsonl from samples and scores."""
    samples = _read_samples(folder / "samples.jsonl")
    rewards = [
        float(record["reward"]) for _, record in records.read_records(folder / "scores.jsonl")
    ]
    scored = [
        dataclasses.replace(sample, reward=reward)
        for sample, reward in zip(samples, rewards, strict=True)
    ]
    result = _make_feedback(run, scored, round)
    _write_feedback(run, folder, result, round)
    counts = {f"feedback_{name}": value for name, value in result.counts.items()}
    return {"feedback.jsonl": len(result.preferences)}, counts


def train_stage(
    run: Run,
    state: TrainState,
    folder: Path,
    *,
    round: int,
    start: int,
    held_out: Dataset | None,
    load_reference: Callable[[], Any],
) -> TrainState:
    """Train on the round's feedback from its step `start` on, and start saving the result.

    Args:
      load_reference: returns the reference's params; they are freed when their log-probs are known.
    """
    items = make_pair_items(_read_preferences(folder), run.renderer, run.lengths)
    first_step = int(state.step) - start
    if not items:
        logger.warning("round %d has no pairs to train on (all were ties): nothing changes", round)
    else:
        seed = zlib.crc32(f"{run.config.seed} {round}".encode())
        dataset = training.make_dataset(
            run.trainer, items, seed=seed, epochs=run.config.train.epochs
        )
        logger.info(
            "round %d: %d pairs, %d steps, packed fill %.0f %%",
            round,
            len(items),
            len(dataset.plan),
            100 * dataset.plan.fill,
        )
        if run.trainer.loss.reference:
            dataset = training.add_reference(
                run.trainer, dataset, load_reference(), label=f"reference {round}"
            )
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
    run.checkpoints.save(int(state.step), state, {"round": round, "in_stage": False})
    return state


def after_step(run: Run, state: TrainState, done: int, *, round: int, total: int) -> None:
    """Save inside a stage where it is due, or because the run must stop."""
    every = run.config.checkpoint.every
    stopping = run.stop.received(int(done))
    if done < total and (stopping or (every and done % every == 0)):
        run.writer.flush()
        position = {"round": round, "in_stage": True, "stage_step": done}
        run.checkpoints.save(int(state.step), state, position)
        if stopping:
            run.checkpoints.finish()
            raise Interrupted("stopped by SIGTERM; run the same command again to carry on")


def evaluate_stage(run: Run, params: Any, folder: Path, *, round: int, step: int):
    """Sample and score the held-out prompts; write eval.jsonl, in round 0 their feedback too.

    Every evaluation draws with the same keys (those of round 0), so that two rounds differ by
    their policies and not by their luck.
    """
    samples = sample_prompts(run, params, run.held_out, folder, round=0, label="eval")
    rewards = run.scorer(samples)
    scored = [
        dataclasses.replace(sample, reward=reward)
        for sample, reward in zip(samples, rewards, strict=True)
    ]
    _write(run, folder / "eval.jsonl", map(records.sample_to_record, scored))
    files = {"eval.jsonl": len(scored)}
    metrics = {"reward_eval": float(np.mean(rewards))}
    for name, scorer in run.rules.items():
        metrics[f"reward_eval/{name}"] = float(np.mean(scorer(samples)))
    metrics["response_tokens_eval"] = float(np.mean([len(s.response_ids) for s in samples]))
    if round == 0:
        result = _make_feedback(run, scored, 0)
        _write_feedback(run, folder, result, 0)
        files["feedback.jsonl"] = len(result.preferences)
    run.writer.write(step, {"round": round, **metrics})
    run.writer.flush()  # before the manifest says that the stage is done
    return files, metrics


def make_held_out_items(run: Run, folder: Path) -> list[Item]:
    """Return the held-out pairs: the SFT policy's samples of the held-out prompts, labelled."""
    return make_pair_items(_read_preferences(folder), run.renderer, run.lengths)


def remove_shards(folder: Path, label: str) -> None:
    """Delete the shard files of a stage that is committed."""
    for path in folder.glob(f"{label}.shard-*.jsonl"):
        path.unlink()


def wait_for_all(what: str) -> None:
    """Wait until every process of the job is here, so that files of process 0 can be read."""
    if jax.process_count() > 1:
        jax.experimental.multihost_utils.sync_global_devices(what)


def _make_feedback(run: Run, scored: Sequence[Sample], round: int) -> FeedbackResult:
    return make_preferences(
        list(scored),
        mode=run.config.feedback.mode,
        threshold=run.config.feedback.threshold,
        seed=run.config.seed,
        round=round,
    )


def _write_feedback(run: Run, folder: Path, result: FeedbackResult, round: int) -> None:
    rows = (
        records.preference_to_record(preference, seed=run.config.seed, round=round)
        for preference in result.preferences
    )
    _write(run, folder / "feedback.jsonl", rows)


def _write(run: Run, path: Path, rows) -> None:
    if run.is_writer:
        records.write_records(path, rows)
    wait_for_all(f"wrote {path.name}")


def _read_samples(path: Path) -> list[Sample]:
    return [
        records.sample_from_record(record, file=str(path), line=line)
        for line, record in records.read_records(path)
    ]


def _read_preferences(folder: Path) -> list[Preference]:
    path = folder / "feedback.jsonl"
    return [
        records.preference_from_record(record, file=str(path), line=line)
        for line, record in records.read_records(path, allow_empty=True)  # a round of ties alone
    ]
