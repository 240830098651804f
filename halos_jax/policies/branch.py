"""The policy of another run that a run starts from (`config.branch`): found, compared, taken over.

    checkpoints/00000001    its state, as the run's own at step 0 of round 0, with an "origin"

The other run's workdir is only read, and only at the start: the first checkpoint is kept as long as
the run lives, so that it can be resumed and verified when the other workdir is gone.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

from halos_jax.checkpoints.failures import CheckpointError
from halos_jax.checkpoints.position import Position
from halos_jax.checkpoints.shelf import find_sums
from halos_jax.checkpoints.store import Checkpoints, read_checkpoints
from halos_jax.config import Config, ConfigError
from halos_jax.config.tasks import TASKS
from halos_jax.losses import check_loss, get_loss
from halos_jax.models.files import hf
from halos_jax.policies import digest
from halos_jax.policies.source import find_model, is_workdir, read_config
from halos_jax.training.followers import take_policy
from halos_jax.training.loop import Trainer
from halos_jax.training.state import init_state, set_step
from halos_jax.types import TrainState
from halos_jax.workdir import manifests
from halos_jax.workdir.changes import is_same_place
from halos_jax.workdir.fingerprints import compare_all
from halos_jax.workdir.intact import FINAL, INPUTS, PROMPTS
from halos_jax.workdir.manifests import round_folder
from halos_jax.workdir.seals import chain

logger = logging.getLogger(__name__)

_ORIGINS = ("online", "align", "sft")  # tasks that a run may branch from
# Fields on which it depends what a checkpoint holds, and those that its moments depend on.
_POLICY = (
    "model.params_dtype",
    "model.random_init",
    "model.added_tokens",
    "model.pad_vocab_to",
    "lora.rank",
    "lora.targets",
    "lora.rslora",
    "lora.base",
)
_OPTIMIZER = ("optimizer.name", "optimizer.moments_dtype")


@dataclasses.dataclass(frozen=True)
class Branch:
    """The checkpoint of another run that a run starts from; made by `find_branch`.

    Attributes:
      run: the config of that run's last start.
      position: where the checkpoint was taken: at the end of a round, or of a task without rounds.
      trained: the fingerprint that the round's manifest has of its policy; "": there is none.
      digest: the digest of that manifest.
    """

    workdir: Path
    run: Config
    save_id: int
    position: Position
    trained: str = ""
    digest: str = ""


def find_problems(config: Config) -> list[str]:
    """Return error lines for fields of a branch where nothing reads them."""
    branch, task, lines = config.branch, config.task, list[str]()
    if branch.workdir and task != "pipeline" and not TASKS[task].has_reference:
        lines.append(
            f"branch.workdir: got {branch.workdir!r}, allowed with task={task!r}: ''; a run of "
            "task='online' or 'align' starts from another one; to sample, evaluate or export its "
            "policy, set model.path to that workdir"
        )
    if not branch.workdir and (branch.round or not branch.optimizer):
        lines.append(
            f"branch.round, branch.optimizer: got {branch.round}, {branch.optimizer}, allowed "
            "without branch.workdir: 0, True; set --config.branch.workdir=DIR"
        )
    if config.train.round and task not in ("align", "pipeline"):
        lines.append(
            f"train.round: got {config.train.round}, allowed with task={task!r}: 0; it is for "
            "task='align', the training of a round by hand"
        )
    return lines


def find_branch(config: Config) -> Branch:
    """Find the checkpoint that `config.branch` names, and compare its run with this one.

    Raises:
      ConfigError: if there is none, or the run cannot go on from it, field by field.
      CheckpointError: if its record is damaged.
    """
    workdir = Path(config.branch.workdir).expanduser()
    if not is_workdir(config.branch.workdir):
        raise ConfigError(
            f"branch.workdir: got {config.branch.workdir!r}, allowed: the workdir of a run, with "
            "its config.json"
        )
    if workdir.resolve() == Path(config.workdir).expanduser().resolve():
        raise ConfigError(
            f"branch.workdir: got {config.branch.workdir!r}, which is the workdir of this run; "
            "allowed: that of another one; set --config.workdir=DIR to a new folder"
        )
    run = read_config(workdir)
    if run.task not in _ORIGINS:
        raise ConfigError(
            f"branch.workdir: got {config.branch.workdir!r}, a run of task={run.task!r}; allowed: "
            f"one of {', '.join(map(repr, _ORIGINS))}"
        )
    wrong = [*_compare(config, run), *_compare_models(config, run, workdir)]
    if wrong:
        raise ConfigError("\n".join(wrong))
    checkpoints = read_checkpoints(workdir / "checkpoints")
    try:
        save_id = _choose_checkpoint(config, run, checkpoints)
        position = Position.from_dict(checkpoints.read_round_state(save_id))
    finally:
        checkpoints.close()
    manifest = manifests.load_manifest(round_folder(workdir, position.round or 0))
    if run.task != "online" or manifest is None:
        return Branch(workdir, run, save_id, position)
    ends = (manifest.trained, chain.find_digest(manifest))
    return Branch(workdir, run, save_id, position, *ends)


def _choose_checkpoint(config: Config, run: Config, checkpoints: Checkpoints) -> int:
    """Return the checkpoint at the end of `branch.round`, or of a task without rounds."""
    workdir, wanted = config.branch.workdir, config.branch.round
    ids = checkpoints.list_ids()
    positions = {one: Position.from_dict(checkpoints.read_round_state(one)) for one in ids}
    if run.task != "online":
        if wanted:
            raise ConfigError(
                f"branch.round: got {wanted}, but {workdir} is a run of task={run.task!r}, which "
                "has no rounds; allowed: 0"
            )
        if not ids or not (Path(workdir).expanduser() / FINAL).is_dir():
            raise ConfigError(
                f"branch.workdir: got {workdir!r}, a run that has not finished, or has no "
                "checkpoint left; allowed: one that has; run it to its end"
            )
        return ids[-1]
    ends = {one.round: save_id for save_id, one in positions.items() if not one.in_stage}
    ends.pop(0, None)  # what that run itself started from
    rounds = sorted(number for number in ends if number is not None)
    found = ends.get(wanted or (rounds[-1] if rounds else 0))
    if found is None:
        there = ", ".join(map(str, rounds)) or "none"
        raise ConfigError(
            f"branch.round: got {wanted or 'the newest'}, but {workdir} has no checkpoint at the "
            f"end of that round (a run keeps its checkpoint.keep={run.checkpoint.keep} newest ones "
            f"and that of the best round); allowed: {there}, or a run with a larger checkpoint.keep"
        )
    return found


def _compare(config: Config, run: Config) -> Iterator[str]:
    """Yield a line for each field that decides what the checkpoint holds and differs."""
    where = config.branch.workdir
    names = [*_POLICY, *(_OPTIMIZER if config.branch.optimizer else ())]
    if config.lora.rank or config.lora.path:
        names.append("model.compute_dtype")  # of the base
    values = {name: (attrgetter(name)(config), attrgetter(name)(run)) for name in names}
    alphas = [one.lora.alpha or 4.0 * one.lora.rank for one in (config, run)]
    values["lora.alpha"] = (alphas[0], alphas[1])
    if config.model.random_init:
        values["seed"] = (config.seed, run.seed)
    for name in ("lora.path", "model.tokenizer"):
        texts = (
            find_model(name, attrgetter(name)(config)),
            find_model(name, attrgetter(name)(run)),
        )
        if not is_same_place(*texts, "model"):
            values[name] = texts
    for name, (ours, theirs) in values.items():
        if ours != theirs:
            advice = "; or set --config.branch.optimizer=false" if name in _OPTIMIZER else ""
            yield (
                f"{name}: got {ours!r}, but the run in {where} has {theirs!r}; allowed with "
                f"branch.workdir: the same{advice}"
            )
    if check_loss(config.loss) or check_loss(run.loss):
        return
    heads = [get_loss(one.loss).value and one.task != "sft" for one in (config, run)]
    if heads[0] != heads[1]:
        yield (
            f"loss.name: got {config.loss['name']!r}, but the run in {where} has the loss "
            f"{run.loss['name']!r}: one of them has a value head and the other none; allowed with "
            "branch.workdir: a loss that has one where the other has one"
        )
    for name, has in (("train.ema_decay", _has_average), ("rounds.reference", _moves)):
        if config.branch.optimizer and has(config) != has(run):
            ours, theirs = attrgetter(name)(config), attrgetter(name)(run)
            yield (
                f"{name}: got {ours!r}, but the run in {where} has {theirs!r}, so that the states "
                "of the two hold other parts; allowed with branch.optimizer: what holds the same; "
                "or set --config.branch.optimizer=false"
            )


def _has_average(config: Config) -> bool:
    return bool(config.train.ema_decay)


def _moves(config: Config) -> bool:
    moves = config.rounds.reference == "previous_step" and config.task != "sft"
    return moves and get_loss(config.loss).reference


def _compare_models(config: Config, run: Config, workdir: Path) -> Iterator[str]:
    """Yield a line if `model.path` is not the model that the other run began with.

    It may also be that run itself, whose `final/` has the same architecture and tokenizer, if the
    reference is named: `model.path` would else be it, by the way.
    """
    ours = config.model.path
    is_itself = is_same_place(ours, str(workdir), "model") or is_same_place(
        ours, str(workdir / FINAL), "model"
    )
    is_adapter = bool(config.lora.rank or config.lora.path)
    if is_itself and not is_adapter:
        if config.model.reference or config.rounds.reference != "sft":
            return
        yield (
            f"model.path: got {ours!r}, the run to branch from, which would become the reference; "
            f"allowed: the model that it began with, {run.model.path!r}, or a reference of its own "
            "with --config.model.reference=DIR"
        )
        return
    known = _read_inputs(workdir / INPUTS)
    folder = hf.resolve_model(find_model("model.path", ours))
    entries = [(folder / one["name"], one) for one in known.get("model.path", ())]
    if any(verdict != "same" for verdict in compare_all(entries)):
        yield (
            f"model.path: got {ours!r}, which is not the model that the run in "
            f"{config.branch.workdir} began with, {run.model.path!r}; allowed with branch.workdir: "
            "that model; for another reference set --config.model.reference=DIR"
        )


def _read_inputs(path: Path) -> dict[str, Any]:
    """Return the fingerprints in a run's inputs.json; {} if it has none, of an older version."""
    try:
        known: object = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError as error:
        known = error
    if not isinstance(known, dict):
        raise ConfigError(
            f"branch.workdir: {path} is not the JSON object that a run writes; put the file back"
        )
    return known


def pin_round(config: Config) -> Config:
    """Return the config of a run that begins, with the round that it branches from by its number.

    The other run may go on meanwhile: what is left out as used and the state that is taken over
    must be of one and the same round. After a start that was killed in between it is the one that
    this has taken over. Every process calls this.

    Raises:
      as `find_branch`.
    """
    if not config.branch.workdir or config.branch.round or _has_order(config):
        return config
    own, origin = Path(config.workdir) / "checkpoints", dict[str, Any]()
    if own.is_dir():
        checkpoints = read_checkpoints(own)
        try:
            origin = read_origin(checkpoints)
        finally:
            checkpoints.close()
    round = origin["round"] if origin else find_branch(config).position.round or 0
    return dataclasses.replace(config, branch=dataclasses.replace(config.branch, round=round))


def _has_order(config: Config) -> bool:
    return (Path(config.workdir) / PROMPTS).exists()


# --------------------------------------------------------------------------- the first checkpoint


def take_over(config: Config, trainer: Trainer, checkpoints: Checkpoints) -> TrainState:
    """Return the state that a branched run starts from, and save it as the run's first checkpoint.

    Params, and with `branch.optimizer` moments and followers, are those of the other run. The
    count of steps is 0, and so is that of the schedule; a count that belongs to moments goes on.

    Raises:
      ConfigError: as `find_branch`, or if its arrays are not those of this run.
    """
    branch = find_branch(config)
    origin = read_checkpoints(branch.workdir / "checkpoints")
    try:
        if config.branch.optimizer:
            state = origin.restore(trainer.abstract_state, branch.save_id)[0]
        else:
            params = origin.restore_params(trainer.abstract_state.params, branch.save_id)
            state = init_state(params, trainer.optimizer, trainer.abstract_state)
    except CheckpointError as error:
        raise ConfigError(f"branch.workdir: {error}") from error
    finally:
        origin.close()
    state = set_step(state, 0)
    found = digest.fingerprint(take_policy(state.params), trainer.frozen)
    if branch.trained and found != branch.trained:
        raise ConfigError(
            f"branch.workdir: the policy in {branch.workdir} is {found[:12]} here, but its round "
            f"ended with {branch.trained[:12]}; allowed: the base and the settings with which that "
            "run was trained, on devices that hold them alike"
        )
    record = describe_origin(config, branch, found)
    position = Position(0, 0, layouts=branch.position.layouts, origin=record)
    logger.info(
        "starting from %s of %s, at its step %d, %s the optimizer's moments",
        f"round {branch.position.round}" if branch.position.round else "the end",
        branch.workdir,
        branch.position.step,
        "with" if config.branch.optimizer else "without",
    )
    checkpoints.save(0, state, position.to_dict())
    checkpoints.finish()
    restored: TrainState = state
    return restored


def describe_origin(config: Config, branch: Branch, fingerprint: str) -> dict[str, Any]:
    """Return what a branched run records of where its first state comes from."""
    return {
        "workdir": os.path.abspath(branch.workdir),
        "task": branch.run.task,
        "round": branch.position.round or 0,
        "step": branch.position.step,
        "checkpoint": branch.save_id,
        "optimizer": config.branch.optimizer,
        "fingerprint": fingerprint,
        "sums": hash_policy(branch.workdir, branch.save_id),
        "manifest": branch.digest,
    }


def hash_policy(workdir: Path, save_id: int) -> str:
    """Return the hash of the checksums of the params in a checkpoint; "" if it is gone."""
    sums = find_sums(workdir / "checkpoints", save_id=save_id)
    if sums is None:
        return ""
    return chain.hash_sums({name: one for name, one in sums.items() if name.startswith("params/")})


def read_origin(checkpoints: Checkpoints) -> dict[str, Any]:
    """Return the record of where a run's first state comes from; {} if it is no branch."""
    save_id = checkpoints.find_round_end(0)
    if save_id is None:
        return {}
    return dict(Position.from_dict(checkpoints.read_round_state(save_id)).origin)
