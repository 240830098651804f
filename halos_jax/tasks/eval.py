"""`task=eval`: how good a policy is on held-out data.

workdir/result.json   policy, data and every metric
workdir/eval.jsonl    the scored samples (`eval.on=samples`)
"""

import dataclasses
import logging
from collections.abc import Sequence

from halos_jax import sharding, storage
from halos_jax.config import Config, ConfigError
from halos_jax.data import datasets
from halos_jax.data.chat.template_door import keep_shown
from halos_jax.data.records import formats as records
from halos_jax.losses import get_loss
from halos_jax.models.hf.positions import refuse_longer
from halos_jax.policies import source, start
from halos_jax.policies.source import Source
from halos_jax.rewards.function_scorer import check_records, make_rules
from halos_jax.rewards.scorers import make_scorer
from halos_jax.rounds import cuts, stages
from halos_jax.tasks.job import Job, open_job
from halos_jax.tasks.sample import load_sampler
from halos_jax.tasks.train import load_fixed_items
from halos_jax.training import loop as training
from halos_jax.training.loop import Dataset, Trainer
from halos_jax.types import Item
from halos_jax.workdir.interrupt import StopSignal

logger = logging.getLogger(__name__)

RESULT = "result.json"


def run_evaluation(config: Config, stop: StopSignal) -> dict[str, float]:
    """Evaluate the policy of `config.model` on `data.eval`; return the metrics.

    With `eval.on="samples"` it answers the prompts, with the keys of every evaluation of an online
    run, and the answers are scored by `reward` and its rules. With "feedback" the metrics are
    those of `loss` on held-out feedback; its reference is `eval.reference`.
    """
    with open_job(config, stop) as job:
        if not job.is_complete:
            policy = source.find_source(config.model, recorded=job.policy)
            if config.eval.on == "samples":
                _evaluate_samples(job, policy)
            else:
                _evaluate_feedback(job, policy)
        return job.metrics


def _evaluate_samples(job: Job, policy: Source) -> None:
    data = job.config.data
    prompts = datasets.load_prompts(data.eval, datasets.select_eval(data))
    if data.skip_bad:
        prompts = check_records(job.config.reward, prompts, skip=True)
    load_sampler(job, policy)
    prompts = keep_shown(prompts, job.sampler.renderer, skip=data.skip_bad)
    cuts.check_prompts(job.sampler, (data.eval, prompts))
    job.begin(inputs=datasets.identify_prompts(prompts), policy=policy)
    check_records(job.config.reward, prompts)
    job.scorer = make_scorer(job.config, job.mesh, job.sampler.renderer, job.stop.check)
    job.rules = make_rules(job.config.reward)
    params = source.load_params(policy, job.sampler.decoder, job.mesh, job.config.seed)
    scored, metrics = stages.evaluate_prompts(job, params, prompts, job.workdir)
    stages.write_rows(job, job.workdir / "eval.jsonl", map(records.sample_to_record, scored))
    _write_result(job, policy, len(prompts), metrics, {"eval.jsonl": len(scored)})
    if job.is_writer:
        stages.remove_shards(job.workdir, "eval")


def _evaluate_feedback(job: Job, policy: Source) -> None:
    loss = get_loss(job.config.loss)
    decoder, renderer = source.load_decoder(policy, job.config.data.control)
    if loss.needs == "scores" and not decoder.num_labels:
        raise ConfigError(
            f"model.path: got {job.config.model.path!r}, a model without a classification head, "
            f"but loss {loss.name!r} evaluates scores; allowed: a reward model"
        )
    if loss.needs != "scores":
        start.refuse_classifier(decoder, job.config.model.path)
    refuse_longer(decoder, {"train.max_length": job.config.train.max_length})
    data = job.config.data
    items = load_fixed_items(
        job.config,
        loss,
        renderer,
        data.eval,
        datasets.select_eval(data),
        positions=decoder.max_positions,
    )
    job.begin(inputs=_identify(items), policy=policy)
    trainer = training.make_trainer(job.config, decoder, loss, job.mesh, total_steps=1)
    dataset = training.make_dataset(trainer, items, seed=None)
    if training.needs_reference(loss, items):
        dataset = _add_reference(job, policy, trainer, dataset)
    params, frozen = source.load_trained(policy, decoder, job.mesh, job.config.seed)
    metrics = training.evaluate(dataclasses.replace(trainer, frozen=frozen), params, dataset)
    _write_result(job, policy, len(items), metrics, {})


def _add_reference(job: Job, policy: Source, trainer: Trainer, dataset: Dataset) -> Dataset:
    """Return `dataset` with the log-probs of the reference, which has the policy's architecture."""
    path, run = job.config.eval.reference, source.find_origin(policy)
    if path:
        settings = dataclasses.replace(
            policy.settings, path=path, checkpoint="auto", random_init=False
        )
        reference = source.find_source(settings)
        params, frozen = source.load_trained(reference, trainer.decoder, job.mesh, job.config.seed)
        trainer = dataclasses.replace(trainer, frozen=frozen)
    elif run is not None:
        run = source.use_final(run)
        run = dataclasses.replace(job.config, model=run.model, lora=run.lora, seed=run.seed)
        own, _ = start.load_policy(run.model)
        # The rows of new tokens were made when the run began, and its base is held as it held it.
        decoder = dataclasses.replace(
            trainer.decoder, new_rows=own.new_rows, new_rows_init=own.new_rows_init
        )
        held = dataclasses.replace(decoder, compute_dtype=own.compute_dtype)
        path, frozen = run.model.path, start.load_frozen(run, held, job.mesh)
        trainer = dataclasses.replace(trainer, config=run, decoder=decoder, frozen=frozen)
        params = start.load_start(trainer)
    else:
        raise ConfigError(
            f"eval.reference: got '', but loss {job.config.loss['name']!r} compares with a "
            "reference, and model.path is not the workdir of the run that trained it; set "
            "--config.eval.reference=DIR to the model that the policy was trained from"
        )
    logger.info("reference: %s", path)
    return training.add_reference(trainer, dataset, params, label="reference")


def _identify(items: Sequence[Item]) -> str:
    return records.digest([len(items), sum(item.num_tokens for item in items)])


def _write_result(
    job: Job, policy: Source, examples: int, metrics: dict[str, float], files: dict[str, int]
) -> None:
    result = {
        "policy": policy.path,
        "model": policy.name,
        "data": job.config.data.eval,
        "examples": examples,
        "metrics": metrics,
    }
    if job.is_writer:
        storage.write_json_atomic(job.workdir / RESULT, result)
    sharding.wait_for_all("wrote the result")
    job.commit("evaluate", files=files | {RESULT: 1}, metrics=metrics)
    shown = ", ".join(f"{name} {value:.4f}" for name, value in sorted(metrics.items()))
    logger.info("%d examples of %s: %s", examples, job.config.data.eval, shown)
