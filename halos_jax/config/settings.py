"""The configuration: one frozen schema, its defaults, and the door that every config passes.

Presets (`configs/*.py`) return an `ml_collections.ConfigDict` made by `default()`. The rest of the
package sees only the frozen dataclasses that `freeze()` makes of it; `freeze()` collects all
errors of a config and raises them together.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from ml_collections import ConfigDict

from halos_jax.config import bounds, limits, places, schema
from halos_jax.config.rewards import RewardConfig
from halos_jax.config.roles import aside
from halos_jax.config.sections import (
    BenchConfig,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ExportConfig,
    FeedbackConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PipelineConfig,
    RoundsConfig,
    SamplingConfig,
    ToyConfig,
    TrainConfig,
)
from halos_jax.config.tasks import STAGES, Mode
from halos_jax.config.tasks import Task as Task
from halos_jax.errors import UserError

Settings: TypeAlias = ConfigDict | Mapping[str, Any]  # what a preset returns, before `freeze`


class ConfigError(UserError, ValueError):
    """All errors of a config in one message."""


@dataclasses.dataclass(frozen=True)
class Config:
    """All that a run is asked to do."""

    task: Task = "online"  # what is computed
    # "check": look for what is wrong as a start does, without reading weights; nothing is written
    mode: Mode = aside("run")
    workdir: str = aside("runs/default", "path")  # folder of the run: results and checkpoints
    seed: int = 0  # of all random numbers: orders, samples, new weights, dropout
    progress: bool = aside(True)  # progress bars on the console
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    reward: RewardConfig = RewardConfig()
    data: DataConfig = DataConfig()
    rounds: RoundsConfig = RoundsConfig()
    sampling: SamplingConfig = SamplingConfig()
    feedback: FeedbackConfig = FeedbackConfig()
    # `name`, and the keyword arguments of that loss; of "sum" a section for each loss
    loss: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"name": "dpo"})
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    export: ExportConfig = ExportConfig()
    toy: ToyConfig = ToyConfig()
    bench: BenchConfig = BenchConfig()
    pipeline: PipelineConfig = PipelineConfig()


def default() -> ConfigDict:
    """Return the default configuration as a ConfigDict, for presets to change."""
    # Types are for `freeze()` to check, which knows which fields take a number or a word.
    return ConfigDict(schema.to_plain(Config()), type_safe=False)


def to_dict(config: Config) -> dict[str, Any]:
    """Return `config` as plain nested dicts and lists, fit for JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(schema.to_plain(config)))
    return plain


def freeze(
    config: Settings,
    *,
    errors: Iterable[str] = (),
    checks: Iterable[Callable[[Config], Iterable[str]]] = (),
) -> Config:
    """Make the frozen `Config` of `config`, or raise every error found.

    The stages of a pipeline are checked as well, so that the last one cannot die of a typo after
    the first ones have run.

    Args:
      config: what a preset returned, after command-line overrides.
      errors: errors already found (by `apply_overrides`, say), to be raised with the others.
      checks: further checks, each a function from a Config to error lines. A field with a bad
        value has its default when they run.

    Raises:
      ConfigError: with one line an error: what, got, allowed, what to change.
    """
    found, checks = list(errors), (_check, *checks)
    plain = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    frozen: Config = places.expand_homes(schema.build(Config, plain, found))
    # A field whose value is already known to be bad has its default now: say nothing of that, nor
    # of the part of a reward that it stands in, and nothing at all where the task is unknown, since
    # most limits depend on it.
    bad = {line.partition(":")[0] for line in found}
    members = [schema.split_member(Config, path) for path in bad]
    hidden = tuple(f"{one[0]}." for one in members if one)
    if "task" not in bad:
        found += [
            line
            for line in _run(checks, frozen)
            if line.partition(":")[0] not in bad and not line.startswith(hidden)
        ]
    for stage, plain in _pipeline_stages(frozen):
        lines: list[str] = []
        built = places.expand_homes(schema.build(Config, plain, lines))
        lines += _run(checks, built)
        found += [f"pipeline.overrides.{stage}: {line}" for line in lines if line not in found]
    if found:
        listed = "\n".join(f"  - {line}" for line in found)
        count = "1 error" if len(found) == 1 else f"{len(found)} errors"
        raise ConfigError(f"{count} in the configuration:\n{listed}")
    return frozen


def expand_pipeline(config: Config) -> list[Config]:
    """Return the config of each stage of a frozen pipeline, in the order of its tasks.

    A stage is the pipeline's config with its own task, the workdir `workdir/<task>` and the
    overrides of that task. An override of the loss replaces the whole loss: the hyperparameters
    of one mean nothing to another.
    """
    built = (schema.build(Config, plain, []) for _, plain in _pipeline_stages(config))
    return [places.expand_homes(stage) for stage in built]


def _pipeline_stages(config: Config) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yield (task, plain config) of each stage; nothing where the task is another."""
    if config.task != "pipeline":
        return
    for task in config.pipeline.tasks:
        override = config.pipeline.overrides.get(task, {})
        if task not in STAGES or not isinstance(override, Mapping):
            continue
        plain = schema.to_plain(config) | {"task": task, "workdir": f"{config.workdir}/{task}"}
        del plain["pipeline"]
        yield task, _merge(plain, schema.to_plain(override), config.workdir)


def _merge(plain: dict[str, Any], override: Mapping[str, Any], workdir: str) -> dict[str, Any]:
    merged = dict(plain)
    for key, value in override.items():
        if isinstance(value, str):
            value = value.replace("{workdir}", workdir)
        if isinstance(value, Mapping) and isinstance(plain.get(key), Mapping) and key != "loss":
            value = _merge(plain[key], value, workdir)
        merged[key] = value
    return merged


def _check(config: Config) -> Iterable[str]:
    values = dict(schema.flatten(schema.to_plain(config)))
    for name, part in config.reward.parts.items():
        whole = schema.flatten(schema.to_plain(part), f"reward.parts.{name}.")
        values |= dict(whole)
    yield from bounds.find_violations(config)
    yield from limits.find_violations(values)
    yield from places.find_violations(config)
    tasks = config.pipeline.tasks
    if config.task == "pipeline" and not tasks:
        yield "pipeline.tasks: got (), allowed: one task or more"
    for name in sorted(set(tasks)):
        if name not in STAGES:
            yield f"pipeline.tasks: got {name!r}, allowed: {', '.join(STAGES)}"
        elif tasks.count(name) > 1:
            yield f"pipeline.tasks: got {name!r} twice, but a stage's workdir has the task's name"
    for name, override in config.pipeline.overrides.items():
        if name not in STAGES:
            yield f"pipeline.overrides.{name}: unknown task, allowed: {', '.join(STAGES)}"
        if not isinstance(override, Mapping):
            yield f"pipeline.overrides.{name}: got {override!r}, allowed: sections of fields"


def _run(checks: Iterable[Callable[[Config], Iterable[str]]], config: Config) -> list[str]:
    lines: list[str] = []
    for check in checks:
        try:
            lines += check(config)
        except ConfigError as error:
            lines.append(str(error))
    return lines
