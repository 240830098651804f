"""`task=label`: rewards for a file of samples, and the feedback made from them.

workdir/scores.jsonl     a reward for each sample; null if it could not be labelled
workdir/scored.jsonl     the samples with their rewards
workdir/feedback.jsonl   what `feedback.type` asks for: pairs, judgements or scored samples
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from halos_jax.config import Config, ConfigError
from halos_jax.config.kinds import REWARD_KINDS
from halos_jax.data.chat.loading import load_policy_renderer
from halos_jax.data.chat.renderer import Renderer
from halos_jax.data.chat.template_door import keep_shown, make_shown
from halos_jax.data.datasets import load_samples
from halos_jax.data.records import formats as records
from halos_jax.data.records.edits import make_edits
from halos_jax.data.records.fields import NO_EDITS, Edits, RecordError
from halos_jax.data.records.unread import Skips
from halos_jax.data.selection import Selection
from halos_jax.data.token_ids import check_ids
from halos_jax.policies import source
from halos_jax.rewards.feedback_report import report_feedback
from halos_jax.rewards.function_scorer import check_records
from halos_jax.rewards.labels import read_scores
from halos_jax.rewards.read_at import load_reward_renderer
from halos_jax.rewards.scorers import make_scorer
from halos_jax.rounds import cuts, stages
from halos_jax.rounds.context import StageResult
from halos_jax.rounds.proof.lineage import carry_on, find_sampler
from halos_jax.tasks import scoring
from halos_jax.tasks.inputs import list_inputs
from halos_jax.tasks.job import Job, open_job
from halos_jax.types import FINISH_STOP, Sample, Turn
from halos_jax.workdir.interrupt import StopSignal

logger = logging.getLogger(__name__)


def run_labelling(config: Config, stop: StopSignal) -> dict[str, float]:
    """Label the samples of `data.train`, or resume doing so; return counts and means.

    A reward that a record has already is ignored. Samples that cannot be labelled are left out of
    the feedback and counted. A reward model scores the samples' own tokens if `model.path` names
    the model that wrote them; otherwise the text is rendered by the reward model's renderer.
    """
    check_tokenizer(config)
    with open_job(config, stop) as job:
        if not job.is_complete:
            label_job(job)
        return job.metrics


def label_job(job: Job) -> None:
    """Do the stages of a job that are left."""
    data = job.config.data
    samples = read_all_samples(data.train, data.train_split, make_edits(data))
    unscored = job.manifest is None or job.manifest.next_stage == "score"
    config, renderer = job.config, None
    if unscored or data.skip_bad:  # report bad records before the job begins
        samples = _keep_answered(config, samples)
        config = source.use_final(config)
        renderer = find_renderer(config)
        samples = keep_rendered(config, samples, renderer)
    names = [[one.prompt.prompt_id, one.sample_id, one.output] for one in samples]
    scorer = None
    if unscored:
        scorer = make_scorer(config, job.mesh, renderer, job.workspace.stop.check)
    if scorer is not None and config.feedback.max_length_gap:  # before anything is scored
        _make_feedback(job, [dataclasses.replace(one, reward=None) for one in samples])
    job.begin(inputs=records.digest(names))
    if scorer is not None:
        logger.info("%d samples of %d prompts", len(samples), len({name for name, *_ in names}))
        shown = samples if renderer is None else render_samples(samples, renderer, config)
        job.commit("score", scoring.write_scores(job.workspace.with_config(config), scorer, shown))
    if job.workspace.is_writer:
        scoring.remove_score_shards(job.workdir)
    _write_feedback(job, samples)


def _keep_answered(config: Config, samples: list[Sample]) -> list[Sample]:
    """Return the samples whose records hold what the reward needs; see `check_records`."""
    prompts = [one.prompt for one in samples]
    kept = {id(one) for one in check_records(config.reward, prompts, skip=config.data.skip_bad)}
    return [one for one in samples if id(one.prompt) in kept]


def keep_rendered(config: Config, samples: list[Sample], renderer: Renderer | None) -> list[Sample]:
    """Return the samples whose tokens the tokenizer knows and whose prompts the template accepts.

    Raises:
      RecordError: for the first sample with unknown tokens, unless bad records are left out. If
        they are not, a prompt that the template refuses fails later, when it is rendered.
    """
    path, skip = config.data.train, config.data.skip_bad
    if renderer is None:
        return samples
    if _knows_writer(config):
        skips = Skips(allowed=skip)
        samples = check_ids(samples, renderer, skips.add)
        skips.require(path, len(samples))
        skips.report(path, len(samples), "left")
    return keep_shown(samples, renderer, skip=True) if skip else samples


def read_all_samples(path: str, split: str = "", edits: Edits = NO_EDITS) -> list[Sample]:
    """Read the samples of a source (see `data/records/sources.py`), or of one `split` of it.

    Raises:
      RecordError: for a bad record, for two samples of a prompt with the same id, and for two
        prompts with the same id. If bad records are left out, the later of the two is dropped.
    """
    seen: set[tuple[str, int]] = set()
    turns: dict[str, tuple[Turn, ...]] = {}
    skips, kept = Skips(allowed=edits.skip), []
    for sample in load_samples(path, Selection(split=split, edits=edits)):
        key = (sample.prompt.prompt_id, sample.sample_id)
        place = sample.prompt.place or path
        if turns.setdefault(key[0], sample.prompt.turns) != sample.prompt.turns:
            skips.add(
                RecordError(
                    f"{place}: got prompt_id {key[0]!r} for two conversations, allowed: an id of "
                    "its own for each; renumber them, or label the files one by one"
                )
            )
        elif key in seen:
            skips.add(
                RecordError(
                    f"{place}: got sample {key[1]} of prompt {key[0]} twice, allowed: one sample "
                    "for each prompt_id and sample_id; renumber them"
                )
            )
        else:
            seen.add(key)
            kept.append(sample)
    skips.report(path, len(kept), "left")
    return kept


def _knows_writer(config: Config) -> bool:
    """Tell whether the config names the model that wrote the samples' tokens."""
    return bool(config.model.path or config.model.tokenizer)


def find_renderer(config: Config) -> Renderer | None:
    """Return the renderer of the model that wrote the samples, else that of the reward model."""
    if _knows_writer(config):
        return load_policy_renderer(config.model, config.data.control)
    alone = REWARD_KINDS[config.reward.kind].by_tokens and not config.reward.parts
    return load_reward_renderer(config.reward) if alone else None


def render_samples(samples: Sequence[Sample], renderer: Renderer, config: Config) -> list[Sample]:
    """Return the samples with the tokens to score; log how many prompts were cut."""
    tokens, known = config.sampling.max_prompt_length, _knows_writer(config)
    rendered = [one.prompt for one in samples if not (known and one.prompt_ids)]
    cuts.count_cut(renderer, rendered, tokens, config.data.train)
    return make_shown(
        lambda found: [render_sample(one, renderer, tokens, is_own=known) for one in found],
        list(samples),
        renderer,
    )


def check_tokenizer(config: Config) -> None:
    """Refuse a reward that needs the samples' tokens if the config names no tokenizer for them."""
    reward = config.reward
    if _knows_writer(config):
        return
    by_model = any(REWARD_KINDS[part.kind].by_tokens for part in reward.parts.values())
    if by_model or (reward.cut_at_sentence and not REWARD_KINDS[reward.kind].by_tokens):
        reason = "a model in reward.parts" if by_model else "reward.cut_at_sentence"
        raise ConfigError(
            f"model.path: got '', but {reason} needs the tokenizer of the samples; set "
            "--config.model.path=DIR, or model.tokenizer alone"
        )


def render_sample(
    sample: Sample, renderer: Renderer, tokens: int, *, is_own: bool = False
) -> Sample:
    """Return the sample with the tokens to score: its own, if they are those of the renderer.

    Args:
      tokens: at most so many of the prompt.
      is_own: whether the renderer is that of the model that wrote the sample.
    """
    prompt_ids = sample.prompt_ids if is_own else ()
    response_ids = sample.response_ids if is_own else ()
    finished = sample.finish_reason == FINISH_STOP
    return dataclasses.replace(
        sample,
        prompt_ids=prompt_ids or tuple(renderer.render_prompt(sample.prompt.turns, tokens)),
        response_ids=response_ids
        or tuple(renderer.render_response(sample.output, finished=finished)),
    )


def _write_feedback(job: Job, samples: Sequence[Sample]) -> None:
    scored = read_scores(job.workdir / scoring.SCORES, samples)
    stages.write_rows(
        job.workspace, job.workdir / "scored.jsonl", map(records.sample_to_record, scored)
    )
    rows, counts = _make_feedback(job, scored)
    stages.write_rows(job.workspace, job.workdir / "feedback.jsonl", rows)
    feedback = job.workdir / "feedback.jsonl"
    report_feedback(job.config.data.train, counts, scored, job.config)
    logger.info("%d %s records are in %s", len(rows), job.config.feedback.type, feedback)
    files = {"scored.jsonl": len(scored), "feedback.jsonl": len(rows)}
    metrics = {f"feedback_{name}": count for name, count in counts.items()}
    sampler = find_sampler(path for _, path in list_inputs(job.config).get("data.train", ()))
    job.commit("feedback", StageResult(files, metrics), **carry_on(sampler, *files))


def _make_feedback(
    job: Job, scored: Sequence[Sample]
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Return the records of feedback and their counts; name the source in an error."""
    try:
        return stages.make_feedback(job.config, scored, job.config.sampling.round)
    except ValueError as error:
        raise RecordError(f"{job.config.data.train}: {error}") from error
