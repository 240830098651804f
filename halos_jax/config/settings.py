"""The configuration: one frozen schema, its defaults, and the check that every config must pass.

Presets (`configs/*.py`) return an `ml_collections.ConfigDict` made by `default()`. The rest of the
package sees only the frozen dataclasses that `freeze()` makes from it. `freeze()` collects all
errors in a config and raises them together.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from annotated_types import Ge
from ml_collections import ConfigDict

from halos_jax.config import bounds, limits, places, schema
from halos_jax.config.bounds import NonNegativeFloat, NonNegativeInt
from halos_jax.config.rewards import FeedbackConfig, RewardConfig
from halos_jax.config.roles import aside, place
from halos_jax.config.sections import (
    BenchConfig,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ExportConfig,
    GuardConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PipelineConfig,
    RoundsConfig,
    SamplingConfig,
    ToyConfig,
    TrackersConfig,
    TrainConfig,
)
from halos_jax.config.tasks import PIPELINE_TASKS, TASKS, Mode
from halos_jax.config.tasks import Task as Task
from halos_jax.errors import UserError

Settings: TypeAlias = ConfigDict | Mapping[str, Any]  # a config as a preset returns it


class ConfigError(UserError, ValueError):
    """All errors in a config, as one message."""


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """The page about a run, report.html in its workdir."""

    enabled: bool = aside(True)  # write it after each round and at the end of a task
    # mode=report: workdirs of further runs, to compare that of `workdir` with
    workdirs: tuple[str, ...] = aside(())
    # mode=report: the page to write; empty: report.html, or comparison.html, in the workdir
    output: str = aside("", "path")


@dataclasses.dataclass(frozen=True)
class BranchConfig:
    """The policy of another run to start from, for task=online and task=align."""

    # Workdir of that run, which is only read; `model.path` stays the model that it began with
    workdir: str = place("", "path")
    # Round of an online run whose policy to start from; 0: the newest one with a checkpoint
    round: NonNegativeInt = 0
    # Whether to take over the optimizer's moments too, and an average or a moving reference; the
    # schedule begins anew in any case
    optimizer: bool = True


@dataclasses.dataclass(frozen=True)
class VerifyConfig:
    """What mode=verify makes again, besides comparing all hashes."""

    derive: bool = aside(True)  # make results again; False: compare hashes alone
    # The one round whose results are made again
    round: NonNegativeInt | Literal["all"] = aside("all")
    samples: Annotated[int, Ge(-1)] = aside(8)  # random samples of a round to make again; -1: all
    steps: Annotated[int, Ge(-1)] = aside(1)  # first steps of a round to take again; -1: all
    seed: int = aside(0)  # seed of the random choice
    # Train policies again, from the SFT checkpoint on, whose checkpoints are deleted
    replay: bool = aside(False)
    # File for the findings; empty: verification.json in the workdir
    output: str = aside("", "path")


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run is asked to do."""

    task: Task = "online"  # what to compute
    # "run": run the task; "check": make the checks of a start, without reading weights or writing
    # anything; "show": print the config and what a run would do; "verify": check what a finished or
    # running workdir holds; "report": write the page about the run, or compare runs
    mode: Mode = aside("run")
    workdir: str = aside("runs/default", "path")  # folder for the run's results and checkpoints
    seed: int = 0  # seed of everything random: orders, samples, new weights, dropout
    progress: bool = aside(True)  # show progress bars on the console
    # Minutes without any step, sample or score after which the stacks of all threads are printed,
    # and the run goes on; 0: never
    hang_minutes: NonNegativeFloat = aside(30.0)
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    reward: RewardConfig = RewardConfig()
    data: DataConfig = DataConfig()
    rounds: RoundsConfig = RoundsConfig()
    guard: GuardConfig = GuardConfig()
    sampling: SamplingConfig = SamplingConfig()
    feedback: FeedbackConfig = FeedbackConfig()
    # The loss: its `name` and its keyword arguments; for name="sum", a section for each loss
    loss: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"name": "dpo"})
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    branch: BranchConfig = BranchConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    export: ExportConfig = ExportConfig()
    toy: ToyConfig = ToyConfig()
    bench: BenchConfig = BenchConfig()
    pipeline: PipelineConfig = PipelineConfig()
    verify: VerifyConfig = VerifyConfig()
    report: ReportConfig = ReportConfig()
    trackers: TrackersConfig = TrackersConfig()


def default() -> ConfigDict:
    """Return the default configuration as a ConfigDict, for presets to change."""
    # `freeze()` checks the types: it knows which fields take either a number or a word.
    return ConfigDict(schema.to_plain(Config()), type_safe=False)


def to_dict(config: Config) -> dict[str, Any]:
    """Return `config` as plain nested dicts and lists that JSON can hold."""
    plain: dict[str, Any] = json.loads(json.dumps(schema.to_plain(config)))
    return plain


def freeze(
    config: Settings,
    *,
    errors: Iterable[str] = (),
    checks: Iterable[Callable[[Config], Iterable[str]]] = (),
) -> Config:
    """Turn `config` into a frozen `Config`, or raise all of its errors.

    The tasks of a pipeline are checked as well, so that a typo in the last one does not come to
    light only after the others have run.

    Args:
      config: what a preset returned, after command-line overrides.
      errors: errors found earlier (for example by `apply_overrides`), to be raised with the others.
      checks: further checks, each a function from a Config to error lines. While they run, fields
        with a bad value have their defaults.

    Raises:
      ConfigError: with one line for each error: what, got, allowed, what to change.
    """
    found, checks = list(errors), (_check, *checks)
    if not isinstance(config, (ConfigDict, Mapping)):
        raise ConfigError(
            f"config: got {type(config).__name__}, allowed: what a preset returns, a dict of its "
            "fields, or a Config"
        )
    plain = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    frozen: Config = places.expand_homes(schema.build(Config, plain, found))
    # Fields with a bad value have their defaults now, so further errors about them, or about a part
    # of the reward that has one, would mislead. If the task is unknown, so would most checks.
    bad = {line.partition(":")[0] for line in found}
    members = [schema.split_member(Config, path) for path in bad]
    hidden = tuple(f"{one[0]}." for one in members if one)
    if "task" not in bad:
        found += [
            line
            for line in _run(checks, frozen)
            if line.partition(":")[0] not in bad and not line.startswith(hidden)
        ]
    for task, plain in _list_pipeline(frozen):
        lines: list[str] = []
        built = places.expand_homes(schema.build(Config, plain, lines))
        lines += _run(checks, built)
        found += [f"pipeline.overrides.{task}: {line}" for line in lines if line not in found]
    _raise(found)
    return frozen


def check_fields(config: Config) -> Config:
    """Check the type and the bounds of each field of a config that was made without `freeze()`.

    Its sections may be any part of what a task needs: what depends on the task is not looked at.
    They may be plain dicts, too; in what is returned they are not.

    Raises:
      ConfigError: with one line an error: what, got, allowed.
    """
    if not isinstance(config, Config):
        raise ConfigError(f"config: got {type(config).__name__}, allowed: a Config")
    found: list[str] = []
    built: Config = schema.build(Config, schema.to_plain(config), found)
    _raise([*found, *bounds.find_violations(built)])
    return built


def complete(config: Config) -> Config:
    """Return a config whose sections are typed, also those that were given as plain dicts.

    Raises:
      ConfigError: as `check_fields`, where there is such a section.
    """
    sections = [one for one in dataclasses.fields(Config) if dataclasses.is_dataclass(one.default)]
    typed = isinstance(config, Config) and all(
        isinstance(getattr(config, one.name), type(one.default)) for one in sections
    )
    return config if typed else check_fields(config)


def expand_pipeline(config: Config) -> list[Config]:
    """Return the config of each task of a frozen pipeline, in order.

    Each has the pipeline's config with its own task, the workdir `workdir/<task>` and the
    overrides for that task. An override of the loss replaces the whole loss, since one loss's
    hyperparameters mean nothing to another.
    """
    built = (schema.build(Config, plain, []) for _, plain in _list_pipeline(config))
    return [places.expand_homes(one) for one in built]


def _list_pipeline(config: Config) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yield (task, plain config) for each task of a pipeline; nothing for any other task."""
    if config.task != "pipeline":
        return
    tasks = config.pipeline.tasks
    exporting = {name for name, spec in TASKS.items() if spec.exports}
    last = [task for task in tasks if task in exporting][-1:]
    for task in tasks:
        override = config.pipeline.overrides.get(task, {})
        if task not in PIPELINE_TASKS or not isinstance(override, Mapping):
            continue
        plain = schema.to_plain(config) | {"task": task, "workdir": f"{config.workdir}/{task}"}
        del plain["pipeline"]
        if task not in last:  # what it leaves is for the tasks after it alone
            plain["export"] = plain["export"] | {"push_to_hub": ""}
            if config.export.dtype == "auto":
                plain["export"]["dtype"] = "params"
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
    for path, members in (
        ("reward.parts", config.reward.parts),
        ("eval.scorers", config.eval.scorers),
    ):
        for name, one in members.items():
            values |= dict(schema.flatten(schema.to_plain(one), f"{path}.{name}."))
    yield from bounds.find_violations(config)
    yield from limits.find_violations(values)
    yield from places.find_violations(config)
    tasks = config.pipeline.tasks
    if config.task == "pipeline" and not tasks:
        yield "pipeline.tasks: got (), allowed: one task or more"
    for name in sorted(set(tasks)):
        if name not in PIPELINE_TASKS:
            yield f"pipeline.tasks: got {name!r}, allowed: {', '.join(PIPELINE_TASKS)}"
        elif tasks.count(name) > 1:
            yield f"pipeline.tasks: got {name!r} twice, but each task's workdir has its name"
    for name, override in config.pipeline.overrides.items():
        if name not in PIPELINE_TASKS:
            yield f"pipeline.overrides.{name}: unknown task, allowed: {', '.join(PIPELINE_TASKS)}"
        if not isinstance(override, Mapping):
            yield f"pipeline.overrides.{name}: got {override!r}, allowed: sections of fields"


def _raise(lines: Sequence[str]) -> None:
    """Raise a ConfigError of the error lines, if there are any."""
    if lines:
        listed = "\n".join(f"  - {line}" for line in lines)
        count = "1 error" if len(lines) == 1 else f"{len(lines)} errors"
        raise ConfigError(f"{count} in the configuration:\n{listed}")


def _run(checks: Iterable[Callable[[Config], Iterable[str]]], config: Config) -> list[str]:
    lines: list[str] = []
    for check in checks:
        try:
            lines += check(config)
        except ConfigError as error:
            lines.append(str(error))
    return lines
