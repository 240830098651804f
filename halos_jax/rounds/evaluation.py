"""Held-out evaluation: the policy's samples for prompts it is not trained on, scored and compared.

rounds/0003/eval.jsonl    scored samples for the held-out prompts, every `rounds.eval_every`-th
                          round; `scores` are those of `eval.scorers` and `reward.rules`
rounds/0000/test.jsonl    the same for `data.test`: of the policy that the run starts from, and,
rounds/0004/test.jsonl    in the folder of its round, of the policy that final/ holds
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from halos_jax.config import Config, SamplingConfig
from halos_jax.data.records import formats as records
from halos_jax.data.records import reading
from halos_jax.losses import settle_sampling
from halos_jax.rewards.feedback_report import report_feedback
from halos_jax.rewards.held_out import find_relative
from halos_jax.rewards.labels import (
    Labels,
    Scorer,
    average_rewards,
    gives_rewards,
    label_samples,
    measure_labels,
)
from halos_jax.rounds import stages
from halos_jax.rounds.context import Rollouts, Run, StageResult
from halos_jax.rounds.cuts import report_samples
from halos_jax.rounds.proof.origin import UNKNOWN, Origin
from halos_jax.sampling.sampler import make_sampler
from halos_jax.signs.intervals import estimate_clustered_share, estimate_mean, name_estimate
from halos_jax.signs.wins import estimate_wins
from halos_jax.types import FINISH_LENGTH, Params, Prompt, Sample
from halos_jax.workdir.manifests import Manifest, round_folder

EVAL, TEST = "eval.jsonl", "test.jsonl"
_NOUNS = {"eval": "held-out prompts", "test": "test prompts"}

Split = Literal["eval", "test"]

Scores = Mapping[str, list[float | None]]  # name of a scorer -> the score of each sample


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Samples with their rewards, their scores by each further scorer, and metrics of them."""

    samples: list[Sample]
    scores: Scores
    metrics: dict[str, float]

    def to_records(self) -> list[dict[str, Any]]:
        """Return the records of eval.jsonl or test.jsonl."""
        rows = [records.sample_to_record(sample) for sample in self.samples]
        for index, row in enumerate(rows if self.scores else ()):
            row["scores"] = {name: values[index] for name, values in self.scores.items()}
        return rows


# --------------------------------------------------------------------------- stages


def list_due(run: Run, manifest: Manifest) -> tuple[Split, ...]:
    """Return what a round evaluates: the held-out prompts ("eval"); in round 0 the test, too.

    The held-out prompts are due in every `rounds.eval_every`-th round, in round 0 and in the last.
    """
    round, every = manifest.round, run.config.rounds.eval_every
    is_last = manifest.stop >= run.budget.end(len(run.prompts))
    is_due = bool(run.held_out) and (round % every == 0 or is_last)
    due: list[Split] = ["eval"] if is_due else []
    return (*due, "test") if round == 0 and run.test else tuple(due)


def evaluate_stage(
    run: Run,
    params: Params,
    folder: Path,
    due: Sequence[Split],
    *,
    round: int,
    step: int,
    origin: Origin = UNKNOWN,
) -> StageResult:
    """Sample and score the prompts that are `due`; write eval.jsonl, and test.jsonl in round 0.

    Round 0 turns the scores into feedback.jsonl, too. Every evaluation draws with the same keys
    (those of round 0), so that rounds differ only in their policies, not in their random draws.
    """
    files: dict[str, int] = {}
    metrics: dict[str, float] = {}
    if "eval" in due:
        found = evaluate_prompts(run.rollouts, params, run.held_out, folder, origin=origin)
        metrics |= found.metrics | (_compare(run, found, "eval") if round else {})
        stages.write_rows(run.workspace, folder / EVAL, found.to_records())
        files[EVAL] = len(found.samples)
        if round == 0:
            rows, counts = stages.make_feedback(run.config, found.samples, 0)
            report_feedback("held-out prompts", counts, found.samples, run.config)
            stages.write_rows(run.workspace, folder / "feedback.jsonl", rows)
            files["feedback.jsonl"] = len(rows)
    if "test" in due:
        tested = _test(run, params, folder, round, origin)
        files |= tested.files
        metrics |= tested.metrics
    run.writer.write(step, {"round": round, **metrics})
    run.writer.flush()  # before the manifest says that the stage is done
    return StageResult(files, metrics)


def count_samples(done: StageResult) -> int:
    """Return how many samples an evaluation has drawn and scored."""
    return sum(count for name, count in done.files.items() if name in (EVAL, TEST))


def final_test_stage(
    run: Run, params: Params, folder: Path, *, round: int, step: int, origin: Origin = UNKNOWN
) -> StageResult:
    """Sample and score the test prompts with the final policy, that of `round`; write test.jsonl.

    The draws are those of round 0, so that the two differ only in their policies.
    """
    done = _test(run, params, folder, round, origin)
    run.writer.write(step, {"round": round, **done.metrics})
    run.writer.flush()
    return done


def _test(run: Run, params: Params, folder: Path, round: int, origin: Origin) -> StageResult:
    rollouts = make_test_rollouts(run.rollouts)
    found = evaluate_prompts(rollouts, params, run.test, folder, split="test", origin=origin)
    metrics = found.metrics | (_compare(run, found, "test") if round else {})
    stages.write_rows(run.workspace, folder / TEST, found.to_records())
    return StageResult({TEST: len(found.samples)}, metrics)


def make_test_rollouts(run: Rollouts) -> Rollouts:
    """Return what draws samples for the test prompts, with the sampling options of `eval`."""
    settings = choose_test_sampling(run.config)
    if settings == run.config.sampling:
        return run
    sampler, mesh = run.sampler, run.workspace.mesh
    # As the run's other samples: what is drawn at a temperature of its own decides nothing.
    is_exact = settle_sampling(run.config).exact_ratios
    settings = dataclasses.replace(settings, exact_ratios=is_exact)
    return dataclasses.replace(
        run,
        workspace=run.workspace.with_config(dataclasses.replace(run.config, sampling=settings)),
        sampler=make_sampler(settings, sampler.renderer, sampler.decoder, mesh),
    )


def choose_test_sampling(config: Config) -> SamplingConfig:
    """Return the sampling options for `data.test`: those of `sampling`, changed as `eval` says."""
    settings, heat = config.sampling, config.eval.test_temperature
    temperature = settings.temperature if isinstance(heat, str) else heat
    samples = config.eval.test_samples or (1 if temperature == 0 else 0)
    return dataclasses.replace(
        settings,
        temperature=temperature,
        num_samples_per_prompt=samples or settings.num_samples_per_prompt,
    )


# --------------------------------------------------------------------------- measuring


def evaluate_prompts(
    run: Rollouts,
    params: Params,
    prompts: Sequence[Prompt],
    folder: Path,
    *,
    split: Split = "eval",
    origin: Origin = UNKNOWN,
) -> Evaluation:
    """Sample and score prompts that are not trained on, with the keys of round 0.

    `split` is "eval" or "test": what the shards are called, and the last word of the metrics.
    `origin` is the policy that `params` should be.
    """
    samples = stages.sample_prompts(
        run, params, prompts, folder, round=0, label=split, origin=origin
    )
    report_samples(run.sampler, samples, _NOUNS[split])
    labels = label_samples(run.scorer, samples, run.config.reward)
    scored = [
        dataclasses.replace(sample, reward=reward)
        for sample, reward in zip(samples, labels.rewards, strict=True)
    ]
    metrics: dict[str, float] = {}
    if gives_rewards(run.config.reward):
        metrics[f"reward_{split}"] = average_rewards(labels.rewards)
        metrics |= measure_labels(labels, split)
    shown = {"": labels.rewards, **labels.parts}
    if labels.raw:
        shown["unpenalised"] = labels.raw
    scores: dict[str, list[float | None]] = {}
    for name, scorer in run.scorers.items():
        scores[name], counts = _score(scorer, samples, f"{split}/{name}")
        metrics[f"reward_{split}/{name}"] = average_rewards(scores[name])
        metrics |= counts
    metrics = _measure_intervals(samples, shown | scores, split) | metrics
    return Evaluation(scored, scores, metrics)


def _score(
    scorer: Scorer, samples: Sequence[Sample], place: str
) -> tuple[list[float | None], dict[str, int]]:
    """Return the scores of a further scorer, and its counts that are not 0."""
    found = scorer(samples)
    labels = found if isinstance(found, Labels) else Labels(list(found))
    counts = {"unlabelled": labels.unlabelled, **labels.counts}
    return labels.rewards, {f"{name}_{place}": count for name, count in counts.items() if count}


def _measure_intervals(samples: Sequence[Sample], lists: Scores, split: Split) -> dict[str, float]:
    """Return the means of rewards, lengths and cut samples with intervals clustered by prompt."""
    prompts = [sample.prompt.prompt_id for sample in samples]
    metrics: dict[str, float] = {}
    for name, values in lists.items():
        known = [(one, prompt) for one, prompt in zip(values, prompts) if one is not None]
        if known:
            rewards, owners = zip(*known, strict=True)
            path = f"reward_{split}/{name}" if name else f"reward_{split}"
            metrics |= name_estimate(path, estimate_mean(rewards, owners))
    cut = [float(sample.finish_reason == FINISH_LENGTH) for sample in samples]
    lengths = [float(len(sample.response_ids)) for sample in samples]
    metrics |= name_estimate(f"truncated_{split}", estimate_clustered_share(cut, prompts))
    metrics |= name_estimate(f"response_tokens_{split}", estimate_mean(lengths, prompts))
    return metrics


# --------------------------------------------------------------------------- against round 0


def _compare(run: Run, found: Evaluation, split: Split) -> dict[str, float]:
    """Return the win rates against round 0: by the reward, and by each further scorer.

    Sample i of a prompt is compared with sample i of it in round 0. There is none for scores that
    compare samples of one policy alone (`find_relative`).
    """
    path = round_folder(run.workdir, 0) / (EVAL if split == "eval" else TEST)
    state = path.stat()
    before = _read_scores(path, (state.st_ino, state.st_size, state.st_mtime_ns))
    rows = [before.get((one.prompt.prompt_id, one.sample_id), {}) for one in found.samples]
    prompts = [one.prompt.prompt_id for one in found.samples]
    relative, metrics = find_relative(run.config), dict[str, float]()
    scores = {"": [one.reward for one in found.samples], **found.scores}
    for name, values in scores.items():
        others = [row.get("scores", {}).get(name) if name else row.get("reward") for row in rows]
        wins = estimate_wins(values, others, prompts)
        if wins is not None and name not in relative:
            path_of = f"win_rate_{split}/{name}" if name else f"win_rate_{split}"
            metrics |= name_estimate(path_of, wins)
    return metrics


@functools.lru_cache(maxsize=2)  # every evaluation needs them; of "eval" and of "test"
def _read_scores(
    path: Path, known: tuple[int, int, int]
) -> Mapping[tuple[str, int], Mapping[str, Any]]:
    """Return "reward" and "scores" of each sample in a file, by its prompt and its number."""
    return {
        (row["prompt_id"], row["sample_id"]): {
            name: row[name] for name in ("reward", "scores") if name in row
        }
        for _, row in reading.read_records(path)
    }
