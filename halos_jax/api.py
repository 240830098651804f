"""The package from Python: what the command line does, and each stage of a round by hand.

    import halos_jax
    from halos_jax import FeedbackConfig, RewardConfig, SamplingConfig

    config = halos_jax.load_preset("configs/online_dpo.py")
    config.model.path, config.workdir = "runs/sft", "runs/first"
    metrics = halos_jax.run(config)

    policy = halos_jax.load_policy("runs/sft")
    samples = halos_jax.sample(policy, prompts, SamplingConfig(num_samples_per_prompt=4))
    scored = halos_jax.score(samples, RewardConfig(path="runs/reward"), policy)
    feedback = halos_jax.make_feedback(scored, FeedbackConfig(type="pairwise"))
    trained = halos_jax.train(policy, feedback, halos_jax.Config(loss={"name": "dpo", "beta": 0.1}))
    halos_jax.export(trained.policy, "my_model")

A bad argument raises a UserError that says what to change. `run` saves its progress in its workdir
and resumes from there; the stages by hand save nothing.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from halos_jax import config as config_lib
from halos_jax import devices, sharding
from halos_jax.cli.presets import load_preset
from halos_jax.config import (
    Config,
    ConfigError,
    FeedbackConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    RewardConfig,
    SamplingConfig,
)
from halos_jax.config import default as default_config
from halos_jax.config.bounds import find_violations
from halos_jax.console.logs import start_logging
from halos_jax.data.asked import check_type, read_asked, read_samples, write_feedback
from halos_jax.data.chat.loading import load_renderer
from halos_jax.data.datasets import load_prompts
from halos_jax.data.items import load_items
from halos_jax.data.lengths import make_lengths
from halos_jax.data.records import formats as records
from halos_jax.data.records.fields import RecordError
from halos_jax.devices import explain_memory
from halos_jax.losses import check_loss, check_reference, get_loss
from halos_jax.losses.requirements import check_given_reference, check_teacher
from halos_jax.metrics import MetricWriter, read_metrics
from halos_jax.models.hf.positions import refuse_longer
from halos_jax.models.lora import Frozen, merge_adapter
from halos_jax.packing.batches import count_steps
from halos_jax.policies import final
from halos_jax.policies.fixed import add_fixed
from halos_jax.policies.policy import Policy, find_policy, load_frozen, load_start, load_trained
from halos_jax.policies.reference import attach_reference, count_room
from halos_jax.policies.source import use_final
from halos_jax.policies.teacher import load_teacher
from halos_jax.rewards.feedback_report import report_feedback
from halos_jax.rewards.labels import Scorer, average_rewards, gives_rewards, label_samples
from halos_jax.rewards.own_scorer import guard_scorer
from halos_jax.rewards.scorers import make_scorer
from halos_jax.rounds import cuts, stages
from halos_jax.rounds.outcome.table import format_rounds
from halos_jax.sampling.sampler import make_sampler, sample_shard
from halos_jax.tasks.launch import freeze_checked, launch
from halos_jax.training import loop as training
from halos_jax.training.followers import take_exported
from halos_jax.types import Judgement, Params, Preference, Prompt, Sample

# Of type "pairwise", "binary" or "scalar" (the samples with their rewards).
Feedback = Sequence[Preference] | Sequence[Judgement] | Sequence[Sample]

_LOADED = "what load_policy returns"

__all__ = [
    "LoadedPolicy",
    "Trained",
    "default_config",
    "evaluate",
    "export",
    "format_rounds",
    "load_policy",
    "load_preset",
    "load_prompts",
    "load_renderer",
    "make_feedback",
    "run",
    "sample",
    "score",
    "start_logging",
    "train",
]


@dataclasses.dataclass(frozen=True)
class LoadedPolicy:
    """A policy with its weights on the devices.

    Attributes:
      policy: its files, architecture, tokenizer and chat template.
      params: the trainable params: all of the model's, or an adapter's.
      frozen: the base of that adapter; None without an adapter.
      mesh: the devices that hold it.
    """

    policy: Policy
    params: Params
    frozen: Frozen | None
    mesh: Mesh


class Trained(NamedTuple):
    """What `train` returns: the new policy, and metrics per step, as in metrics.jsonl."""

    policy: LoadedPolicy
    history: list[dict[str, float]]


def run(config: config_lib.Settings | Config) -> dict[str, float]:
    """Do what `python -m halos_jax.main` does with a config; return the task's last metrics.

    It makes the same checks and writes the same files. After SIGTERM or the first Ctrl-C the run
    stops at the next point from which it can be resumed; a second Ctrl-C ends the process at once.

    Args:
      config: from `load_preset` or `default_config`; or plain dicts, or a Config.

    Raises:
      UserError: for anything that the user can fix. Its subclass Interrupted means that the run was
        stopped: call `run` again to resume it.
    """
    return launch(freeze_checked(config))


def load_policy(
    path: str,
    *,
    lora: LoraConfig | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
    **settings: Any,
) -> LoadedPolicy:
    """Load a policy: a folder or hub id in Hugging Face format, or the workdir of a run.

    Args:
      lora: the adapter to train on top of it; None: train all params.
      seed: for weights that are in no file and so are drawn.
      mesh: by default that of `sharding.make_mesh`, with all devices in one group.
      settings: fields of `config.model`, such as `checkpoint=7` or `compute_dtype="float32"`.

    Raises:
      ConfigError, ModelError, CheckpointError: if there is no such policy, or a field is wrong.
    """
    known = {field.name for field in dataclasses.fields(ModelConfig)} - {"path"}
    if unknown := sorted(settings.keys() - known):
        raise ConfigError(f"model: got {', '.join(unknown)}; allowed: {', '.join(sorted(known))}")
    fields = Config(model=ModelConfig(path=path, **settings), lora=lora or LoraConfig())
    fields = config_lib.check_fields(fields)
    devices.find_devices()
    mesh = mesh if mesh is not None else sharding.make_mesh(MeshConfig())
    policy = find_policy(fields.model, seed=seed)
    policy.refuse_classifier(path)
    with jax.set_mesh(mesh):
        if lora is None:
            return LoadedPolicy(policy, *load_trained(policy, mesh), mesh)
        if policy.source.checkpoint is not None:
            raise ConfigError(
                f"lora: got an adapter for a checkpoint of {path!r}; allowed: for a model in "
                "Hugging Face format, such as the run's final/, or what export leaves"
            )
        policy = dataclasses.replace(policy, lora=fields.lora)
        frozen = load_frozen(policy, mesh)
        return LoadedPolicy(policy, load_start(policy, mesh, frozen), frozen, mesh)


def sample(
    policy: LoadedPolicy,
    prompts: Sequence[Prompt | str],
    settings: SamplingConfig = SamplingConfig(),
    *,
    seed: int = 0,
    round: int = 1,
) -> list[Sample]:
    """Draw `settings.num_samples_per_prompt` samples for each prompt, in the order of the prompts.

    They are, bit for bit, those of `task=sample` with the same prompts, seed and round. No loss is
    known here, so `exact_ratios="auto"` is off.

    Args:
      prompts: from `load_prompts`, or texts, each taken as a user's turn.

    Raises:
      ConfigError: if a setting is out of its bounds.
      RecordError: if a prompt is given twice, or the chat template refuses one.
    """
    check_type("policy", policy, LoadedPolicy, _LOADED)
    settings = config_lib.complete(Config(sampling=settings)).sampling
    _refuse(
        *find_violations(settings, "sampling."),
        *sharding.check_divisible(policy.mesh, sampling__slots=settings.slots),
    )
    asked = read_asked(prompts)
    generator = settings.generator or policy.policy.source.path
    config = Config(sampling=settings, model=policy.policy.settings)
    sampler = make_sampler(settings, policy.policy.renderer, policy.policy.decoder, policy.mesh)
    cuts.check_prompts(sampler, ("prompts", asked))
    samples: list[Sample] = []
    with jax.set_mesh(policy.mesh), explain_memory("sample", "sampling", config):
        weights = sampler.unstack(merge_adapter(policy.params, policy.frozen))
        for start in range(0, len(asked), settings.shard_prompts):
            shard = asked[start : start + settings.shard_prompts]
            samples += sample_shard(
                sampler, weights, shard, seed=seed, round=round, generator=generator
            )
    return samples


def score(
    samples: Sequence[Sample], reward: RewardConfig | Scorer, policy: LoadedPolicy | None = None
) -> list[Sample]:
    """Return the samples with their rewards; None for a sample that could not be labelled.

    Args:
      reward: a reward model, function or judge, described as in `config.reward`; or a function
        that maps the samples to their rewards.
      policy: the policy that wrote the samples. A reward model needs it.

    Raises:
      RewardError: if more samples than `reward.max_unlabelled` get no reward.
    """
    samples = read_samples(samples)
    check_type("reward", reward, (RewardConfig, Callable), "a RewardConfig, or a function")
    check_type("policy", policy, (LoadedPolicy, type(None)), _LOADED)
    if not samples:
        return []
    if not isinstance(reward, RewardConfig):
        labels = label_samples(guard_scorer(reward), samples, RewardConfig())
    else:
        reward = config_lib.check_fields(Config(reward=reward)).reward
        if not gives_rewards(reward):
            _refuse("reward.kind: got 'none', which scores no sample; allowed here: any other kind")
        model = policy.policy.settings if policy else ModelConfig()
        config = use_final(Config(task="label", reward=reward, model=model))
        mesh = policy.mesh if policy else sharding.make_mesh(MeshConfig())
        renderer = policy.policy.renderer if policy else None
        with jax.set_mesh(mesh):
            labels = label_samples(make_scorer(config, mesh, renderer), samples, reward)
    return [
        dataclasses.replace(one, reward=found)
        for one, found in zip(samples, labels.rewards, strict=True)
    ]


def make_feedback(
    scored: Sequence[Sample],
    settings: FeedbackConfig = FeedbackConfig(),
    *,
    seed: int = 0,
    round: int = 1,
) -> Feedback:
    """Turn the rewards of samples into feedback, as `config.feedback` describes it.

    Returns:
      Preferences for "pairwise", Judgements for "binary", the samples themselves for "scalar", and
      for any other type what its records are. The log says how many are left out (ties, samples
      without a reward).

    Raises:
      RecordError: if these samples cannot be turned into such feedback.
    """
    config = config_lib.check_fields(Config(feedback=settings, seed=seed))
    scored = read_samples(scored)
    try:
        rows, counts = stages.make_feedback(config, scored, round)
    except ValueError as error:
        raise RecordError(f"samples: {error}") from error
    report_feedback("samples", counts, scored, config)
    return cast(Feedback, [records.feedback_from_record(row) for row in rows])


def train(
    policy: LoadedPolicy, feedback: Feedback, config: Config = Config(), *, held_out: Feedback = ()
) -> Trained:
    """Train a copy of a policy on feedback with `config.loss`, as `task=align` does.

    The reference is `policy` itself, which is left unchanged, or that of `model.reference`. Of
    `config` only `loss`, `optimizer`, `train`, `rounds.reference`, the token limits, the seed and,
    for a teacher or a reference, `model` are read.

    Args:
      held_out: feedback to evaluate on before, during and after training.

    Raises:
      ConfigError: if a field that is read cannot have its value, or there is no feedback.
      RecordError: if the feedback is not of the type that the loss trains on.
    """
    check_type("policy", policy, LoadedPolicy, _LOADED)
    config = config_lib.complete(config)
    _refuse(
        *check_loss(config.loss),
        *check_reference(config.loss, config.rounds.reference, task="align"),
        *check_given_reference(config, task="align"),
        *check_teacher(config.loss, config.model.teacher, task="align", has_loss=True),
        *find_violations(config),
        *sharding.check_divisible(policy.mesh, train__batch_size=config.train.batch_size),
        *([] if feedback else ["feedback: got none, allowed: one or more"]),
    )
    loss, decoder, mesh = get_loss(config.loss), policy.policy.decoder, policy.mesh
    if loss.needs == "scores":
        raise ConfigError(
            f"loss.name: got {loss.name!r}, which trains a reward model; allowed: run(config) with "
            "config.task='reward_model'"
        )
    refuse_longer(decoder, {"train.max_length": config.train.max_length})
    attached = attach_reference(policy.policy, config)
    explained = explain_memory("train", "training", config)
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh), explained:
        items, others = (
            _make_items(policy, config, one, Path(folder) / name)
            for name, one in (("feedback.jsonl", feedback), ("held_out.jsonl", held_out))
        )
        size, epochs = config.train.batch_size, config.train.epochs
        steps = count_steps(len(items), batch_size=size, epochs=epochs)
        teacher = load_teacher(config, loss, policy.policy, mesh)
        make = functools.partial(training.make_trainer, room=count_room(attached, mesh))
        trainer = make(
            config, decoder, loss, mesh, total_steps=steps, frozen=policy.frozen, teacher=teacher
        )
        # A step donates the buffers of its state, but the policy's belong to the caller.
        state = training.start_state(trainer, jax.tree.map(jnp.copy, policy.params))
        dataset = training.make_dataset(trainer, items, seed=config.seed, epochs=epochs)
        evaluated = training.make_dataset(trainer, others, seed=None) if others else None
        dataset, evaluated = add_fixed(trainer, dataset, evaluated, lambda: state.params, attached)
        writer = MetricWriter(Path(folder) / "metrics.jsonl")
        state = training.run_steps(trainer, state, dataset, held_out=evaluated, writer=writer)
        writer.close()
        history = read_metrics(Path(folder) / "metrics.jsonl")
    return Trained(dataclasses.replace(policy, params=take_exported(state)), history)


def evaluate(
    policy: LoadedPolicy,
    prompts: Sequence[Prompt | str],
    reward: RewardConfig | Scorer,
    settings: SamplingConfig = SamplingConfig(),
    *,
    seed: int = 0,
) -> dict[str, float]:
    """Return the mean reward of a policy's samples, drawn with the keys of all evaluations."""
    scored = score(sample(policy, prompts, settings, seed=seed, round=0), reward, policy)
    tokens = [len(one.response_ids) for one in scored]
    return {
        "reward_eval": average_rewards([one.reward for one in scored]),
        "response_tokens_eval": sum(tokens) / len(tokens),
    }


def export(policy: LoadedPolicy, folder: str | Path, *, dtype: str | None = None) -> Path:
    """Write a policy as a new model folder in Hugging Face format, with its tokenizer.

    Args:
      dtype: of the stored weights, such as "bfloat16"; None: that of the params.

    Raises:
      ModelError: if the folder holds anything but an earlier export, or a weight is not finite.
    """
    check_type("policy", policy, LoadedPolicy, _LOADED)
    with jax.set_mesh(policy.mesh):
        return final.export_policy(
            policy.params, policy.policy, Path(folder), frozen=policy.frozen, dtype=dtype
        )


def _refuse(*lines: str) -> None:
    """Raise a ConfigError that lists `lines`, if there are any."""
    if lines:
        raise ConfigError("\n".join(lines))


def _make_items(policy: LoadedPolicy, config: Config, feedback: Feedback, path: Path) -> list[Any]:
    """Return items for the loss, made from records just as in a round."""
    if not feedback:
        return []
    write_feedback(path, feedback, config.seed)
    lengths = make_lengths(config, policy.policy.decoder.max_positions)
    kind, control = get_loss(config.loss).items, config.data.control
    return list(load_items(kind, str(path), policy.policy.renderer, lengths, control=control))
