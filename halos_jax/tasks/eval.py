"""`task=eval`: how good a policy is on held-out data.

workdir/result.json   policy, data and every metric
workdir/eval.jsonl    the scored samples (`eval.on=samples`)
"""

import dataclasses
import logging
from collections.abc import Sequence

from halos_jax import sharding, storage
from halos_jax.config import Config, ConfigError
from halos_jax.console.values import show_metrics
from halos_jax.data import datasets
from halos_jax.data.chat.template_door import keep_shown
from halos_jax.data.records import formats as records
from halos_jax.data.selection import select_eval
from halos_jax.losses import get_loss
from halos_jax.models.hf.positions import refuse_longer
from halos_jax.policies.policy import Policy, load_params, load_reference, load_trained
from halos_jax.policies.reference import attach_reference, load_sft
from halos_jax.policies.source import find_origin
from halos_jax.policies.teacher import load_teacher
from halos_jax.report.live import report_on
from halos_jax.rewards.held_out import check_held_out, make_scorers
from halos_jax.rewards.scorers import make_scorer
from halos_jax.rounds import cuts, evaluation, stages
from halos_jax.rounds.context import StageResult
from halos_jax.tasks.job import Job, open_job
from halos_jax.tasks.sample import make_rollouts
from halos_jax.tasks.train import load_fixed_items
from halos_jax.training import loop as training
from halos_jax.training.loop import Dataset, Trainer
from halos_jax.training.reference import refer
from halos_jax.types import Item
from halos_jax.workdir.interrupt import StopSignal

logger = logging.getLogger(__name__)

RESULT = "result.json"


def run_evaluation(config: Config, stop: StopSignal) -> dict[str, float]:
    """Evaluate the policy of `config.model` on `data.eval`; return the metrics.

    With `eval.on="samples"` the policy answers the held-out prompts, drawing with the same keys as
    the evaluations of an online run, and `reward` and its rules score the answers. With "feedback"
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


def _evaluate_samples(job: Job) -> None:
    data = job.config.data
    prompts = datasets.load_prompts(data.eval, select_eval(data))
    if data.skip_bad:
        prompts = check_held_out(job.config, prompts, skip=True)
    policy = job.find_policy()
    rollouts = make_rollouts(job, policy)
    config, sampler = rollouts.config, rollouts.sampler
    prompts = keep_shown(prompts, sampler.renderer, skip=data.skip_bad)
    cuts.check_prompts(sampler, (data.eval, prompts))
    job.begin(inputs=datasets.identify_prompts(prompts), policy=policy.source)
    check_held_out(config, prompts)
    rollouts = dataclasses.replace(
        rollouts,
        scorer=make_scorer(config, job.mesh, sampler.renderer, rollouts.stop.check),
        scorers=make_scorers(config, job.mesh, sampler.renderer, rollouts.stop.check),
    )
    params = load_params(policy, job.mesh)
    found = evaluation.evaluate_prompts(rollouts, params, prompts, job.workdir)
    stages.write_rows(job.workspace, job.workdir / evaluation.EVAL, found.to_records())
    files = {evaluation.EVAL: len(found.samples)}
    _write_result(job, policy, len(prompts), StageResult(files, found.metrics))
    if job.workspace.is_writer:
        stages.remove_shards(job.workdir, "eval")


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


def _write_result(job: Job, policy: Policy, examples: int, done: StageResult) -> None:
    result = {
        "policy": policy.source.path,
        "model": policy.source.name,
        "data": job.config.data.eval,
        "examples": examples,
        "metrics": done.metrics,
    }
    if job.workspace.is_writer:
        storage.write_json_atomic(job.workdir / RESULT, result)
    sharding.wait_for_all("wrote the result")
    job.commit("evaluate", StageResult({**done.files, RESULT: 1}, done.metrics))
    shown = ", ".join(show_metrics(dict(sorted(done.metrics.items()))))
    logger.info("%d examples of %s: %s", examples, job.config.data.eval, shown)
