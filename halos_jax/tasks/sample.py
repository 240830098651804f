"""`task=sample`: a policy's answers to a file of prompts, for `label`, AlpacaEval or people.

    workdir/samples.jsonl      every sample, with its tokens, as in a round of `online`
    workdir/scores.jsonl       their rewards, if only the best are kept (`sampling.best_of`)
    workdir/best.jsonl         the best sample of each prompt
    workdir/alpacaeval.json    what `alpaca_eval --model_outputs` reads (`sampling.format`)

If `sampling.output` is set, the result (one of the last two, or the samples) is written there.
"""

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from halos_jax import sharding, storage
from halos_jax.config import Config, ConfigError
from halos_jax.data import datasets
from halos_jax.data.chat.template_door import keep_shown
from halos_jax.data.records import formats as records
from halos_jax.data.records.fields import RecordError
from halos_jax.data.records.unread import Skips
from halos_jax.data.selection import select_train
from halos_jax.losses import settle_sampling
from halos_jax.models.lora import merge_adapter
from halos_jax.policies import source
from halos_jax.policies.policy import Policy, load_trained
from halos_jax.rewards.function_scorer import check_records
from halos_jax.rewards.labels import read_scores
from halos_jax.rewards.scorers import make_scorer
from halos_jax.rounds import cuts, stages
from halos_jax.rounds.context import Rollouts, StageResult
from halos_jax.rounds.order import spread_passes
from halos_jax.rounds.proof.origin import check_source, identify, name_sampled
from halos_jax.sampling.sampler import make_sampler
from halos_jax.tasks import scoring
from halos_jax.tasks.job import Job, open_job
from halos_jax.types import Prompt, Sample
from halos_jax.workdir.interrupt import StopSignal

logger = logging.getLogger(__name__)


def run_sampling(config: Config, stop: StopSignal) -> dict[str, float]:
    """Sample from the prompts of `data.train`, or resume doing so; return counts and means.

    The prompts are taken in the order of an online run with the same seed:
    `sampling.num_prompts` of them, after the first `rounds.num_skip`. With the same policy and
    prompts the samples are, bit for bit, those that round `sampling.round` of that run would draw.
    """
    with open_job(config, stop) as job:
        if not job.is_complete:
            draw_samples(job)
        return job.metrics


def draw_samples(job: Job) -> None:
    """Do the stages of a job that are left."""
    ordered = load_ordered(job.config)
    prompts = select_prompts(job.config, ordered)
    output = output_path(job.config, job.workdir)
    check_instructions(job.config, prompts)  # before hours of sampling
    # Errors in the policy or the reward must be raised before the job begins.
    policy = job.find_policy()
    rollouts = make_rollouts(job, policy)
    config, renderer = rollouts.config, rollouts.sampler.renderer
    needed = config.rounds.num_skip + len(prompts)
    ordered = keep_shown(ordered, renderer, skip=config.data.skip_bad, count=needed)
    prompts = select_prompts(config, ordered)
    cuts.check_prompts(rollouts.sampler, (config.data.train, prompts))
    if config.sampling.best_of and (job.manifest is None or "score" not in job.manifest.stages):
        check_records(config.reward, prompts)
        scorer = make_scorer(config, job.mesh, renderer, rollouts.stop.check)
        rollouts = dataclasses.replace(rollouts, scorer=scorer)
    job.begin(
        inputs=datasets.identify_prompts(prompts),
        policy=policy.source,
        output=output,
        field="sampling.output",
    )
    if job.next_stage == "sample":
        logger.info("%d prompts; mesh %s", len(prompts), sharding.describe(job.mesh))
        trained, frozen = load_trained(policy, job.mesh)
        origin = identify(trained, frozen, policy.decoder)
        check_source(policy.source, origin.fingerprint)
        params = merge_adapter(trained, frozen)
        round = job.config.sampling.round
        done = stages.sample_stage(rollouts, params, prompts, job.workdir, round, origin)
        del params, trained, frozen
        job.commit("sample", done, **name_sampled(origin, "samples.jsonl"))
    if job.workspace.is_writer:
        stages.remove_shards(job.workdir, "samples")
    if job.next_stage == "score":
        _score(job, rollouts)
    if job.workspace.is_writer:
        scoring.remove_score_shards(job.workdir)
    _write_output(job, output)


def select_prompts(config: Config, ordered: list[Prompt]) -> list[Prompt]:
    """Return the prompts that the task samples from, given all prompts in an online run's order.

    They are those of all passes, `rounds.passes`, one after the other.

    Raises:
      RecordError: if `rounds.num_skip` leaves none.
    """
    start, count = config.rounds.num_skip, config.sampling.num_prompts
    needed = start + count if count else len(ordered) * config.rounds.passes
    chosen = spread_passes(ordered, config, needed)[start : start + count if count else None]
    if not chosen:
        raise RecordError(
            f"{config.data.train}: got {len(ordered)} prompts, but rounds.num_skip={start} "
            "skips them all; lower --config.rounds.num_skip"
        )
    return chosen


def load_listed(config: Config) -> list[Prompt]:
    """Return the prompts of `data.train` in the order of its records."""
    chosen = select_train(config.data, config.seed)
    return datasets.load_prompts(config.data.train, chosen)


def load_ordered(config: Config) -> list[Prompt]:
    """Return the prompts of `data.train` in the order of an online run.

    If bad records are left out, so are prompts that the reward or the format cannot be used with.
    """
    ordered = datasets.order_prompts(load_listed(config), config.seed)
    if config.data.skip_bad:
        ordered = check_instructions(config, ordered, skip=True)
        if config.sampling.best_of:
            ordered = check_records(config.reward, ordered, skip=True)
    return ordered


def check_instructions(
    config: Config, prompts: list[Prompt], *, skip: bool = False
) -> list[Prompt]:
    """Return the prompts that the output format can represent; see `read_instruction`.

    Raises:
      RecordError: for the first prompt that it cannot, unless `skip`: then such prompts are left
        out, and the log says how many.
    """
    if config.sampling.format != "alpacaeval":
        return prompts
    skips, kept = Skips(allowed=skip), []
    for prompt in prompts:
        try:
            read_instruction(prompt)
        except RecordError as error:
            skips.add(error)
        else:
            kept.append(prompt)
    skips.require(config.data.train, len(kept))
    skips.report(config.data.train, len(kept), "left")
    return kept


def make_rollouts(job: Job, policy: Policy, *, name: str = "") -> Rollouts:
    """Return the sampler of the job's policy, with the policy's own model settings.

    In the records the policy is called `name`, or as the user named it: `sampling.generator`, else
    the path.
    """
    policy.refuse_classifier(job.config.model.path)
    generator = name or job.config.sampling.generator or job.config.model.path
    config = dataclasses.replace(
        source.use_final(dataclasses.replace(job.config, model=policy.settings)),
        sampling=dataclasses.replace(job.config.sampling, generator=generator),
    )
    settings = settle_sampling(config)
    sampler = make_sampler(settings, policy.renderer, policy.decoder, job.mesh)
    return Rollouts(job.workspace.with_config(config), sampler)


def output_path(config: Config, workdir: Path) -> Path | None:
    """Return the file that gets the result; None if samples.jsonl itself is the result."""
    settings = config.sampling
    if settings.output:
        output = Path(settings.output).expanduser().absolute()
        if output in [(workdir / name).absolute() for name in ("samples.jsonl", scoring.SCORES)]:
            raise ConfigError(
                f"sampling.output: got {output}, where the task keeps all samples or their scores; "
                "allowed: any other file"
            )
        return output
    if settings.format == "alpacaeval":
        return (workdir / "alpacaeval.json").absolute()
    return (workdir / "best.jsonl").absolute() if settings.best_of else None


def choose_best(samples: Sequence[Sample]) -> list[Sample]:
    """Return the sample with the highest reward for each prompt; in a tie, the first.

    A prompt without any rewarded sample is left out.
    """
    best: dict[str, Sample] = {}
    for sample in samples:
        held = best.get(sample.prompt.prompt_id)
        if sample.reward is None:
            continue
        if held is None or held.reward is None or sample.reward > held.reward:
            best[sample.prompt.prompt_id] = sample
    return list(best.values())


def make_alpacaeval_record(sample: Sample, dataset: str) -> dict[str, Any]:
    """Return one element of the JSON array that `alpaca_eval --model_outputs` reads."""
    return {
        "dataset": dataset,
        "datasplit": "eval",
        "instruction": read_instruction(sample.prompt),
        "output": sample.output,
        "generator": sample.generator,
    }


def read_instruction(prompt: Prompt) -> str:
    """Return the instruction by which AlpacaEval identifies a prompt: its only user turn.

    Raises:
      RecordError: if there are further turns, other than a system prompt.
    """
    turns = [turn for turn in prompt.turns if turn.role != "system"]
    if len(turns) != 1:
        place = f"{prompt.place}: " if prompt.place else ""
        raise RecordError(
            f"{place}prompt {prompt.prompt_id}: got {len(turns)} turns, but "
            "sampling.format='alpacaeval' has one instruction a record; allowed: one turn of the "
            "user; take the others out of data.train, or set --config.sampling.format=samples"
        )
    return turns[0].content


def _score(job: Job, rollouts: Rollouts) -> None:
    if not job.config.sampling.best_of:
        job.commit("score")
        return
    rollouts.stop.check()
    samples = stages.read_samples(job.workdir / "samples.jsonl")
    job.commit("score", scoring.write_scores(rollouts.workspace, rollouts.scorer, samples))


def _write_output(job: Job, output: Path | None) -> None:
    settings, metrics = job.config.sampling, dict[str, float]()
    if output is None:
        job.commit("write")
        logger.info("the samples are in %s", job.workdir / "samples.jsonl")
        return
    samples = stages.read_samples(job.workdir / "samples.jsonl")
    if settings.best_of:
        samples = choose_best(read_scores(job.workdir / scoring.SCORES, samples))
        metrics = {"best": len(samples)}
        if samples:
            metrics["reward_best"] = float(np.mean([one.reward for one in samples]))
    with storage.explain_os_errors(output):
        if job.workspace.is_writer:
            output.parent.mkdir(parents=True, exist_ok=True)
        if settings.format == "alpacaeval":
            # Keep the order of the prompts' file: alpaca_eval's max_instances relies on it.
            places = {one.prompt_id: at for at, one in enumerate(load_listed(job.config))}
            samples.sort(key=lambda sample: places[sample.prompt.prompt_id])
            dataset = name_dataset(job.config.data.train)
            rows = [make_alpacaeval_record(sample, dataset) for sample in samples]
            if job.workspace.is_writer:
                storage.write_json_atomic(output, rows)
            sharding.wait_for_all("wrote the output")
        else:
            stages.write_rows(job.workspace, output, map(records.sample_to_record, samples))
    job.commit("write", StageResult({str(output): len(samples)}, metrics))
    logger.info("%d samples are in %s", len(samples), output)


def name_dataset(path: str) -> str:
    """Name the data set of a source: the id of a hub data set, a file's name without suffixes."""
    return path if "@" in path else Path(path).name.partition(".")[0]


def check_sample(values: Mapping[str, Any]) -> Iterable[str]:
    """Yield an error line for each bad setting of the output of task=sample."""
    if values["sampling.format"] == "samples":
        return
    passes = values["rounds.passes"]
    if passes > 1:
        yield (
            f"rounds.passes: got {passes}, but sampling.format='alpacaeval' has one output an "
            "instruction; allowed: 1"
        )
    output, samples = values["sampling.output"], values["sampling.num_samples_per_prompt"]
    if output and not output.endswith(".json"):
        yield (
            f"sampling.output: got {output!r}, but alpaca_eval tells the format from the name; "
            "allowed for sampling.format='alpacaeval': a name that ends with .json"
        )
    if samples > 1 and not values["sampling.best_of"]:
        yield (
            f"sampling.num_samples_per_prompt: got {samples}, but sampling.format='alpacaeval' has "
            "one output an instruction; allowed: 1, or --config.sampling.best_of=true"
        )
