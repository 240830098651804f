"""Find the model that a path stands for: a Hugging Face folder or id, or the workdir of a run.

A workdir stands for its exported model, `final/`. If a task asks for a certain checkpoint, or may
start from an unfinished run, the workdir stands for that checkpoint, or for the newest one.
"""

import dataclasses
import json
import logging
from pathlib import Path

from halos_jax.checkpoints.position import Position
from halos_jax.checkpoints.saved import find_record
from halos_jax.checkpoints.store import read_checkpoints
from halos_jax.config import Config, ConfigError, ModelConfig, RewardConfig, schema
from halos_jax.config.tasks import TASKS, is_scored
from halos_jax.models.files import hf
from halos_jax.models.hf import families
from halos_jax.workdir import changes
from halos_jax.workdir.intact import FINAL, find_damage
from halos_jax.workdir.ledger import read_ledger

logger = logging.getLogger(__name__)

_CHECKPOINT = "checkpoint "


@dataclasses.dataclass(frozen=True)
class Source:
    """A policy on disk: a model in Hugging Face format at `settings.path`, or a run's checkpoint.

    `path` is the path that the user gave. `settings` are those of the config, with the path,
    tokenizer and template that belong to the policy. If the policy comes from a run, `run` is that
    run's config, `workdir` its folder, and `position` where in the run it stands, if that is known.
    `label` is its name, if it is none of the usual ones.
    """

    path: str
    settings: ModelConfig
    workdir: Path | None = None
    run: Config | None = None
    checkpoint: int | None = None
    position: Position | None = None
    label: str = ""

    @property
    def name(self) -> str:
        """Which model at `path` it is, for manifests: "model", "final" or "checkpoint 7"."""
        if self.checkpoint is not None:
            return f"{_CHECKPOINT}{self.checkpoint}"
        if self.label:
            return self.label
        return "final" if self.workdir else "model"

    @property
    def record(self) -> Path | None:
        """The file with the checkpoint's record; None if the policy is no checkpoint."""
        if self.checkpoint is None or self.workdir is None:
            return None
        return find_record(self.workdir / "checkpoints", self.checkpoint)

    @property
    def read_at(self) -> str:
        """`reward.read_at` of the run whose checkpoint it is; "" if it is no checkpoint."""
        return self.run.reward.read_at if self.run and self.checkpoint is not None else ""


def is_workdir(path: str) -> bool:
    """Tell whether `path` is the workdir of a run, by the config.json in it."""
    file = Path(path).expanduser() / "config.json"
    try:
        plain = json.loads(file.read_text(encoding="utf-8")) if path else None
    except (OSError, ValueError):
        return False
    return isinstance(plain, dict) and {"task", "workdir"} <= plain.keys()


def find_folder(path: str) -> Path:
    """Return the folder whose files a path to a model stands for; of a run, that of its export.

    Raises:
      ModelError: if it is no folder and no model of the hub that is on this machine.
    """
    if is_workdir(path):
        return Path(path) / FINAL
    return Path(path) / "model" if is_round(path) else hf.resolve_model(path)


def use_final(config: Config) -> Config:
    """Return `config` with every path to a run's workdir replaced by that of its exported model.

    Rewards that the task has no use for stay as they are: for an earlier task of a pipeline their
    models may not be there yet.

    Raises:
      ConfigError: if the run has not exported a model yet.
    """
    model = dataclasses.replace(
        config.model,
        path=find_model("model.path", config.model.path),
        tokenizer=find_model("model.tokenizer", config.model.tokenizer),
        reference=find_model("model.reference", config.model.reference),
    )
    found = dataclasses.replace(config, model=model)
    if is_scored(config):
        found = dataclasses.replace(found, reward=_use_final_rewards(config.reward))
    if not TASKS[config.task].watches:
        return found
    scorers = {
        name: dataclasses.replace(one, path=find_model(f"eval.scorers.{name}.path", one.path))
        for name, one in config.eval.scorers.items()
    }
    return dataclasses.replace(found, eval=dataclasses.replace(config.eval, scorers=scorers))


def _use_final_rewards(reward: RewardConfig) -> RewardConfig:
    path = find_model("reward.path", reward.path)
    parts = {
        name: dataclasses.replace(
            part,
            path=path
            if part.path == reward.path
            else find_model(f"reward.parts.{name}.path", part.path),
        )
        for name, part in reward.parts.items()
    }
    return dataclasses.replace(reward, path=path, parts=parts)


def find_source(settings: ModelConfig, *, recorded: str = "") -> Source:
    """Find the policy that `settings` name.

    Args:
      recorded: the `name` that this job found when it began, so that a resumed job keeps its
        policy even if the policy's run has gone on since.

    Raises:
      ConfigError: if `settings` ask for a checkpoint but the path is not a workdir, or if the
        workdir holds no model yet.
      CheckpointError: if there is no such checkpoint.
    """
    path, wanted = settings.path, settings.checkpoint
    if is_round(path):
        return _find_round(settings, recorded)
    if not is_workdir(path):
        if wanted != "auto":
            raise ConfigError(
                f"model.checkpoint: got {wanted}, but model.path={path!r} is not the workdir of a "
                "run; allowed for a Hugging Face model: 'auto'"
            )
        return Source(path, settings)
    workdir = Path(path).expanduser()
    if recorded.startswith(_CHECKPOINT):
        wanted = int(recorded.removeprefix(_CHECKPOINT))
    run = read_config(workdir)
    if wanted == "auto" and _has_final("model.path", workdir):
        folder = str(workdir / FINAL)
        logger.info("model.path: %s is the workdir of a run: using %s", path, folder)
        return Source(path, dataclasses.replace(settings, path=folder), workdir, run)
    checkpoints = read_checkpoints(workdir / "checkpoints")
    try:
        if wanted == "auto" and checkpoints.latest() is None:
            raise ConfigError(
                f"model.path: {path} is the workdir of a run that has neither a checkpoint nor "
                f"{FINAL}/ yet; wait for its first checkpoint, or set model.path to a model"
            )
        checkpoint = checkpoints.find(None if wanted == "auto" else wanted)
        position = Position.from_dict(checkpoints.read_round_state(checkpoint))
    finally:
        checkpoints.close()
    logger.info(
        "model.path: %s is the workdir of a run: using checkpoint %d (step %d)",
        path,
        checkpoint,
        position.step,
    )
    return Source(path, _settings_of(settings, run), workdir, run, checkpoint, position)


def is_round(path: str) -> bool:
    """Tell whether `path` is the folder of a round in a run's workdir, such as DIR/rounds/0003."""
    folder = Path(path).expanduser()
    inside = bool(path) and folder.name.isdigit() and folder.parent.name == "rounds"
    return inside and is_workdir(str(folder.parent.parent))


def find_workdir(path: str) -> Path | None:
    """Return the workdir of the run that `path` is, or is the folder of a round of; else None."""
    folder = Path(path).expanduser()
    if is_workdir(path):
        return folder
    return folder.parent.parent if is_round(path) else None


def _find_round(settings: ModelConfig, recorded: str) -> Source:
    """Return the policy at the end of the round whose folder is `settings.path`.

    It is the model that `rounds.export_each` has left there, else a checkpoint that is still there.
    """
    folder = Path(settings.path).expanduser()
    workdir, round = folder.parent.parent, int(folder.name)
    if settings.checkpoint != "auto":
        raise ConfigError(
            f"model.checkpoint: got {settings.checkpoint}, but model.path={settings.path!r} is the "
            "folder of a round; allowed: 'auto'"
        )
    if not round:
        raise ConfigError(
            f"model.path: {settings.path} is the folder of round 0, whose policy the run in "
            f"{workdir} started from; allowed: the path of that model; as what a policy is "
            "compared with, --config.eval.against=sft"
        )
    run, label = read_config(workdir), f"round {round}"
    exported = folder / "model"
    if not recorded.startswith(_CHECKPOINT) and _is_exported("model.path", exported, workdir):
        own = dataclasses.replace(settings, path=str(exported))
        return Source(settings.path, own, workdir, run, label=label)
    checkpoints = read_checkpoints(workdir / "checkpoints")
    try:
        for checkpoint in reversed(checkpoints.list_ids()):
            position = Position.from_dict(checkpoints.read_round_state(checkpoint))
            if position.round == round and not position.in_stage:
                own = _settings_of(settings, run)
                return Source(settings.path, own, workdir, run, checkpoint, position)
    finally:
        checkpoints.close()
    raise ConfigError(
        f"model.path: {settings.path} has neither a model/ nor a checkpoint any more; set "
        "--config.rounds.export_each=true or a larger --config.checkpoint.keep in a run whose "
        "rounds are to be compared; held-out samples of all rounds are in their eval.jsonl, for "
        "task=compare"
    )


def find_start(settings: ModelConfig, run: Config) -> Source:
    """Return what a run started from, as it reads it, computed as `settings` say."""
    own = _settings_of(settings, run)
    # Round 0 of a run that branches off is of the policy that it has taken over.
    place = None if run.branch.workdir else Position(step=0, round=0)
    return Source(run.model.path, own, Path(run.workdir), run, position=place, label="sft")


def find_origin(source: Source) -> Config | None:
    """Return the config of the run that trained the policy, however often it was exported since.

    None if that run is not known.
    """
    run = source.run
    while run is not None and not TASKS[run.task].trains:
        path = run.model.path
        run = read_config(Path(path).expanduser()) if is_workdir(path) else None
    return run


def read_config(workdir: Path) -> Config:
    """Return the config of the run in `workdir`; ConfigError if this version cannot read it."""
    plain = changes.drop_segments(changes.read_plain(workdir / changes.FILE))
    errors: list[str] = []
    config: Config = schema.build(Config, plain, errors)
    if errors:
        raise ConfigError(
            f"{workdir / 'config.json'} is not of this version: {'; '.join(errors)}; export the "
            "model with the version that wrote it"
        )
    return config


def _settings_of(settings: ModelConfig, run: Config) -> ModelConfig:
    """Return the run's settings, but compute and render as `settings` say."""
    own = use_final(run).model
    # The dtype of the params is fixed: it is the one that the run stored them in.
    execution = [name for name in families.EXECUTION if name != "params_dtype"]
    return dataclasses.replace(
        own,
        tokenizer=settings.tokenizer or own.tokenizer,
        chat_template=settings.chat_template or own.chat_template,
        chat_template_options={**own.chat_template_options, **settings.chat_template_options},
        **{name: getattr(settings, name) for name in execution},
    )


def _has_final(field: str, workdir: Path) -> bool:
    """Tell whether the run in `workdir`, which may still be going on, has exported its model."""
    return _is_exported(field, workdir / FINAL, workdir)


def _is_exported(field: str, folder: Path, workdir: Path) -> bool:
    """Tell whether the run in `workdir` has written the model `folder`.

    Raises:
      ConfigError: if the export is not as the run wrote it.
    """
    wrong = find_damage(folder, read_ledger(workdir))
    if wrong:
        raise ConfigError(
            f"{field}: {workdir} is the workdir of a run whose export is not as it was written: "
            f"{'; '.join(wrong)}; put the files back, or run that run's command again, which "
            "makes the export again"
        )
    return folder.is_dir()


def find_model(field: str, path: str) -> str:
    """Return `path`, or the exported model's path if it is a run's workdir.

    `field` is the config field that holds `path`, for messages.

    Raises:
      ConfigError: if the run has not exported a model yet.
    """
    if not is_workdir(path):
        return path
    workdir = Path(path).expanduser()
    if not _has_final(field, workdir):
        raise ConfigError(
            f"{field}: {path} is the workdir of a run that has not finished, so there is no "
            f"{FINAL}/ in it; run it to its end, or export one of its checkpoints with "
            f"--config.task=export --config.model.path={path}"
        )
    folder = str(workdir / FINAL)
    logger.info("%s: %s is the workdir of a run: using %s", field, path, folder)
    return folder
