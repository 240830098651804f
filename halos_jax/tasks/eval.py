"""`task=eval`: how good a policy is on held-out data, by itself or against another policy.

workdir/result.json           policy, data and every metric
workdir/eval.jsonl            the scored samples (`eval.on=samples`)
workdir/against/eval.jsonl    those of the policy of `eval.against`, for the same prompts, with the
                              same keys
workdir/pairs.jsonl           both, side by side (`rounds/outcome/comparison.py`)
workdir/comparison.json       win rates and differences
"""

import dataclasses
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from halos_jax import sharding, storage
from halos_jax.config import Config, ConfigError, RewardConfig
from halos_jax.console.values import show_metrics
from halos_jax.data import datasets
from halos_jax.data.chat.template_door import keep_shown
from halos_jax.data.records import formats as records
from halos_jax.data.selection import select_eval
from halos_jax.losses import get_loss
from halos_jax.models.hf.positions import refuse_longer
from halos_jax.models.lora import merge_adapter
from halos_jax.policies.against import load_policy
from halos_jax.policies.policy import Policy, load_reference, load_trained
from halos_jax.policies.reference import attach_reference, load_sft
from halos_jax.policies.source import find_origin, use_final
from halos_jax.policies.teacher import load_teacher
from halos_jax.report.live import report_on
from halos_jax.rewards.held_out import (
    check_held_out,
    find_relative,
    list_scorers,
    make_scorers,
    name_scorer,
)
from halos_jax.rewards.labels import gives_rewards
from halos_jax.rewards.scorers import make_scorer
from halos_jax.rounds import cuts, evaluation, stages
from halos_jax.rounds.context import Rollouts, StageResult
from halos_jax.rounds.evaluation import Evaluation
from halos_jax.rounds.outcome.comparison import Relative, Side, write_comparison
from halos_jax.rounds.proof.origin import Origin, check_source, identify
from halos_jax.tasks.job import Job, open_job
from halos_jax.tasks.label import render_sample
from halos_jax.tasks.sample import make_rollouts
from halos_jax.tasks.train import load_fixed_items
from halos_jax.training import loop as training
from halos_jax.training.loop import Dataset, Trainer
from halos_jax.training.reference import refer
from halos_jax.types import Item, Prompt
from halos_jax.workdir.intact import AGAINST
from halos_jax.workdir.interrupt import StopSignal

logger = logging.getLogger(__name__)

RESULT = "result.json"
THEIRS = f"{AGAINST}/{evaluation.EVAL}"


def run_evaluation(config: Config, stop: StopSignal) -> dict[str, float]:
    """Evaluate the policy of `config.model` on `data.eval`; return the metrics.

    With `eval.on="samples"` the policy answers the held-out prompts, drawing with the same keys as
    the evaluations of an online run, and `reward` and its rules score the answers; so does the
    policy of `eval.against`, if there is one, and the two are compared. With "feedback"
    the metrics are those of `loss` on held-out feedback, compared with `eval.reference`.
    """
    with open_job(config, stop) as job:
        if not job.is_complete:
            with report_on(job.workspace):
                evaluate_job(job)
        return job.metrics


def evaluate_job(job: Job) -> None:
    """Do the stage of a job that is left."""
    if job.config.eval.on == "samples":
        _evaluate_samples(job)
    else:
        _evaluate_feedback(job)


@dataclasses.dataclass(frozen=True)
class Entrant:
    """A policy that is to answer the held-out prompts, and the folder that its answers go to."""

    policy: Policy
    rollouts: Rollouts
    prompts: list[Prompt]
    folder: Path


def _evaluate_samples(job: Job) -> None:
    data = job.config.data
    prompts = datasets.load_prompts(data.eval, select_eval(data))
    if data.skip_bad:
        prompts = check_held_out(job.config, prompts, skip=True)
    first = enter(job, job.find_policy(), prompts)
    second = None
    if job.config.eval.against:
        second = enter(job, job.find_against(first.policy), prompts, job.config.eval.against)
    job.begin(
        inputs=datasets.identify_prompts(first.prompts),
        policy=first.policy.source,
        against=second.policy.source if second is not None else None,
    )
    entrants = [first] if second is None else [first, second]
    for one in entrants:
        check_held_out(one.rollouts.config, one.prompts)
    if second is None:
        found, origin = _answer(job, first)
        done = StageResult({evaluation.EVAL: len(found.samples)}, found.metrics)
        drawn = {evaluation.EVAL: origin.fingerprint}
    else:
        done, drawn = _compete(job, first, second)
    _write_result(job, first.policy, len(first.prompts), done, sampled_by=drawn)
    for one in entrants if job.workspace.is_writer else ():
        stages.remove_shards(one.folder, "eval")


def enter(job: Job, policy: Policy, prompts: list[Prompt], against: str = "") -> Entrant:
    """Prepare a policy's answers; errors in the policy or the prompts are raised here.

    Args:
      against: what the second policy is called in the records; "" for the first one.
    """
    rollouts = make_rollouts(job, policy, name=against)
    if job.config.eval.against:
        rollouts = dataclasses.replace(
            rollouts, workspace=rollouts.workspace.with_config(_drop_relative(rollouts.config))
        )
    sampler, data = rollouts.sampler, job.config.data
    prompts = keep_shown(prompts, sampler.renderer, skip=data.skip_bad)
    cuts.check_prompts(sampler, (data.eval, prompts))
    return Entrant(policy, rollouts, prompts, job.workdir / AGAINST if against else job.workdir)


def _answer(job: Job, one: Entrant) -> tuple[Evaluation, Origin]:
    """Sample and score a policy's answers, and write them down; return what drew them, too."""
    config, sampler, stop = one.rollouts.config, one.rollouts.sampler, one.rollouts.stop
    rollouts = dataclasses.replace(
        one.rollouts,
        scorer=make_scorer(config, job.mesh, sampler.renderer, stop.check),
        scorers=make_scorers(config, job.mesh, sampler.renderer, stop.check),
    )
    trained, frozen = load_policy(one.policy, job.mesh)
    origin = identify(trained, frozen, one.policy.decoder)
    check_source(one.policy.source, origin.fingerprint)
    params = merge_adapter(trained, frozen)
    if job.workspace.is_writer:
        one.folder.mkdir(exist_ok=True)
    found = evaluation.evaluate_prompts(rollouts, params, one.prompts, one.folder, origin=origin)
    stages.write_rows(job.workspace, one.folder / evaluation.EVAL, found.to_records())
    return found, origin


# --------------------------------------------------------------------------- two policies


def _compete(job: Job, first: Entrant, second: Entrant) -> tuple[StageResult, dict[str, str]]:
    """Let both policies answer, and compare them; return the result and what drew each file.

    One policy is in memory at a time.
    """
    found, drawn, sides = list[Evaluation](), dict[str, str](), list[Side]()
    for name, one in zip((evaluation.EVAL, THEIRS), (first, second), strict=True):
        made, origin = _answer(job, one)
        own = dict(made.scores)
        if gives_rewards(one.rollouts.config.reward):
            own[""] = [sample.reward for sample in made.samples]
        found.append(made)
        drawn[name] = origin.fingerprint
        sides.append(Side(_describe(one, origin), made.samples, own))
    if len(set(drawn.values())) == 1:
        logger.warning(
            "eval.against: both policies have the same weights (%.12s), so the same random numbers "
            "give the same answers",
            drawn[THEIRS],
        )
    relative = _find_relative(job, first, second, sides)
    compared = write_comparison(job.workspace, sides[0], sides[1], relative)
    files = {name: len(one.samples) for name, one in zip(drawn, found, strict=True)}
    theirs = {
        re.sub(r"_eval(?=/|$)", "_against", name, count=1): value
        for name, value in found[1].metrics.items()
    }
    metrics = {**compared.metrics, **found[0].metrics, **theirs}
    return StageResult(files | dict(compared.files), metrics), drawn


def _describe(one: Entrant, origin: Origin) -> dict[str, str | int]:
    source = one.policy.source
    return {
        "name": source.path,
        "model": source.name,
        "fingerprint": origin.fingerprint,
        "prompts": len(one.prompts),
    }


def _drop_relative(config: Config) -> Config:
    """Return the config without rewards that compare samples, which are asked of pairs alone."""
    relative = find_relative(config)
    scorers = {name: one for name, one in config.eval.scorers.items() if name not in relative}
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, scorers=scorers))
    if "" not in relative:
        return config
    # What is left of it: its rules, and how many samples the scorers may leave without a score.
    names = ("rules", "completions", "max_unlabelled")
    kept = {name: getattr(config.reward, name) for name in names}
    return dataclasses.replace(config, reward=RewardConfig(kind="none", **kept))


def _find_relative(
    job: Job, first: Entrant, second: Entrant, sides: Sequence[Side]
) -> dict[str, Relative]:
    """Return the rewards that compare samples, for pairs of one sample of either policy."""
    config = use_final(dataclasses.replace(job.config, model=first.policy.settings))
    own = first.rollouts.sampler.renderer
    samples = sides[1].samples
    if second.rollouts.sampler.renderer.fingerprint != own.fingerprint:
        # A scorer reads the tokens of one policy: the other's answers are rendered anew.
        limit = config.sampling.max_prompt_length
        samples = [render_sample(one, own, limit) for one in samples]
    rewards = {"": config} | list_scorers(config)
    found = {}
    for name in sorted(find_relative(config)):
        with name_scorer(name):
            scorer = make_scorer(rewards[name], job.mesh, own, job.workspace.stop.check)
        found[name] = Relative(scorer, rewards[name], sides[0].samples, samples)
    return found


def _evaluate_feedback(job: Job) -> None:
    config, policy, loss = job.config, job.find_policy(), get_loss(job.config.loss)
    decoder, data = policy.decoder, config.data
    if loss.needs == "scores" and not decoder.num_labels:
        raise ConfigError(
            f"model.path: got {config.model.path!r}, a model without a classification head, "
            f"but loss {loss.name!r} evaluates scores; allowed: a reward model"
        )
    if loss.needs != "scores":
        policy.refuse_classifier(config.model.path)
    refuse_longer(decoder, {"train.max_length": config.train.max_length})
    selection, positions = select_eval(data), decoder.max_positions
    items = load_fixed_items(
        config, loss, policy.renderer, data.eval, selection, positions=positions
    )
    job.begin(inputs=_identify(items), policy=policy.source)
    teacher = load_teacher(config, loss, policy, job.mesh)
    trainer = training.make_trainer(config, decoder, loss, job.mesh, total_steps=1, teacher=teacher)
    dataset = training.make_dataset(trainer, items, seed=None)
    if training.needs_reference(loss, items):
        dataset = _add_reference(job, policy, trainer, dataset)
    params, frozen = load_trained(policy, job.mesh)
    metrics = training.evaluate(dataclasses.replace(trainer, frozen=frozen), params, dataset)
    _write_result(job, policy, len(items), StageResult({}, metrics))


def _add_reference(job: Job, policy: Policy, trainer: Trainer, dataset: Dataset) -> Dataset:
    """Return `dataset` with the log-probs of the reference.

    It has the policy's architecture, unless it is that of the run's own `model.reference`.
    """
    path, run = job.config.eval.reference, find_origin(policy.source)
    if not path and run is None:
        raise ConfigError(
            f"eval.reference: got '', but loss {job.config.loss['name']!r} compares with a "
            "reference, and model.path is not the workdir of the run that trained it; set "
            "--config.eval.reference=DIR to the model that the policy was trained from"
        )
    if not path and run is not None and run.model.reference:
        model = dataclasses.replace(job.config.model, reference=run.model.reference)
        given = attach_reference(policy, dataclasses.replace(job.config, model=model))
        trainer = refer(trainer, None if given.reference is None else given.reference.decoder)
        params = load_sft(given, job.mesh, None)
    else:
        params, frozen = load_reference(policy, job.mesh, path=path, run=run)
        trainer = dataclasses.replace(trainer, frozen=frozen)
    return training.add_reference(trainer, dataset, params, label="reference")


def _identify(items: Sequence[Item]) -> str:
    return records.digest([len(items), sum(item.num_tokens for item in items)])


def _write_result(
    job: Job, policy: Policy, examples: int, done: StageResult, **updates: Any
) -> None:
    result = {
        "policy": policy.source.path,
        "model": policy.source.name,
        **({"against": job.config.eval.against} if job.config.eval.against else {}),
        "data": job.config.data.eval,
        "examples": examples,
        "metrics": done.metrics,
    }
    if job.workspace.is_writer:
        storage.write_json_atomic(job.workdir / RESULT, result)
    sharding.wait_for_all("wrote the result")
    job.commit("evaluate", StageResult({**done.files, RESULT: 1}, done.metrics), **updates)
    shown = ", ".join(show_metrics(dict(sorted(done.metrics.items()))))
    logger.info("%d examples of %s: %s", examples, job.config.data.eval, shown)


def check_eval(values: Mapping[str, Any]) -> Iterable[str]:
    """Yield an error line for each field that says with what to compare, but is not used."""
    against, second = values["eval.against"], values["eval.second_samples"]
    if against and values["eval.on"] != "samples":
        yield (
            f"eval.against: got {against!r}, allowed with eval.on={values['eval.on']!r}: ''; two "
            "policies are compared by their samples (eval.on=samples)"
        )
    if values["eval.against_checkpoint"] != "auto" and not against:
        yield (
            f"eval.against_checkpoint: got {values['eval.against_checkpoint']}, allowed without "
            "eval.against: 'auto'"
        )
    if second:
        yield (
            f"eval.second_samples: got {second!r}, allowed with task='eval': ''; two files of "
            "samples are compared by task='compare'"
        )
