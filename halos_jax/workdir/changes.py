"""Changes to the config of a resumed run: each is refused, or reported and recorded.

    workdir/config.json    the config of the last start; "segments" lists earlier changes, each
                           with the place in the run where it took effect

A change takes effect when it is recorded, once the run knows where it resumes. Until then the file
holds the previous config, so a process that dies in between leaves nothing half done.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from halos_jax import config as config_lib
from halos_jax import losses, storage
from halos_jax.config import Config, places, roles, schema
from halos_jax.config.roles import Mark
from halos_jax.storage import Note
from halos_jax.workdir.intact import INPUTS

logger = logging.getLogger(__name__)

FILE = "config.json"
_SEGMENTS = "segments"
_ABSENT = "(absent)"
_ENDS = "guard."  # fields on which it depends where a run ends
_EXACT = "sampling.exact_ratios"
# Field whose default has become "auto" -> what runs begun before that had by default.
BEFORE_AUTO: Mapping[str, Any] = {_EXACT: False}


@dataclasses.dataclass(frozen=True)
class Change:
    """A field that differs between two starts of a run."""

    path: str
    old: Any
    new: Any
    mark: Mark

    def __str__(self) -> str:
        return f"{self.path}: {self.old!r} -> {self.new!r}"


@dataclasses.dataclass(frozen=True)
class History:
    """The configs that a run was started with, now and before.

    Attributes:
      config: the config of this start. A path that is spelled differently but leads to the same
        place keeps its old spelling, and so does a loss whose defaults are written out or left
        out, so that records that contain it stay the same.
      changes: what differs from the last start and is not recorded yet.
      segments: the recorded changes, oldest first. Each has "changed", {path: [old, new]}, and the
        "round" and "step" where it took effect. If it may have given the run more to do,
        "exported" tells whether that is done.
    """

    config: Config
    changes: tuple[Change, ...] = ()
    segments: tuple[Mapping[str, Any], ...] = ()

    def pick(self, *wanted: roles.Role) -> list[Change]:
        """Return the changes to fields whose role in this task is one of `wanted`."""
        return [one for one in self.changes if one.mark.role_in(self.config.task) in wanted]

    @property
    def has_more(self) -> bool:
        """Whether the run has been extended (more prompts, more epochs) and has not done it yet."""
        return bool(_pick_more(self)) or not all(
            segment.get("exported", True) for segment in self.segments
        )

    def list_values(self, path: str) -> list[Any]:
        """Return all values that a field has had, starting with that of the first start."""
        values = [one["changed"][path] for one in self.segments if path in one["changed"]]
        values += [[one.old, one.new] for one in self.changes if one.path == path]
        if not values:
            return [_read_plain(self.config, path)]
        return [values[0][0], *(new for _, new in values)]

    def value_in(self, path: str, round: int) -> Any:
        """Return the value of a field for `round`, which must have begun.

        The segments of a task without rounds have none: all of them count.
        """
        found = self.list_values(path)[0]
        for segment in self.segments:
            if path in segment["changed"] and segment.get("round", 0) <= round:
                found = segment["changed"][path][1]
        return found


def _read_plain(config: Config, path: str) -> Any:
    """Return the value of a field as JSON holds it."""
    value: Any = config
    for name in path.split("."):
        value = value[name] if isinstance(value, Mapping) else getattr(value, name)
    return schema.to_plain(value)


def read_history(workdir: Path, config: Config) -> History:
    """Return the history in the `config.json` of `workdir`, which must exist.

    Raises:
      WorkdirError: if no run wrote that file.
    """
    recorded = read_plain(workdir / FILE)
    if not is_run(recorded):
        raise storage.WorkdirError(
            f"workdir: {workdir} holds a config.json that no run has written, such as that of a "
            "model; choose another folder with --config.workdir=DIR"
        )
    segments = tuple(recorded.pop(_SEGMENTS, ()))
    before = dict(schema.flatten(recorded))

    def keep_spelling(path: str, text: str, kind: roles.Place) -> str:
        old = before.get(path)
        return str(old) if is_same_place(old, text, kind) else text

    config = adopt_recorded(roles.map_places(config, keep_spelling), recorded)
    found = find_changes(recorded, config_lib.to_dict(config))
    return History(config, tuple(found), segments)


def read_recorded(workdir: Path) -> History:
    """Return the history in the `config.json` of `workdir`, with the config that it has.

    Raises:
      WorkdirError: if no run wrote that file.
      ConfigError: if its fields are not those of this version.
    """
    plain = read_plain(workdir / FILE)
    if not is_run(plain):
        raise storage.WorkdirError(
            f"workdir: {workdir / FILE} is not the file that a run writes; set "
            "--config.workdir=DIR to the workdir of a run"
        )
    lines: list[str] = []
    built: Config = schema.build(Config, drop_segments(plain), lines)
    if lines:
        raise config_lib.ConfigError(f"{workdir / FILE}: {'; '.join(lines)}")
    return History(built, segments=tuple(plain.get(_SEGMENTS, ())))


def read_plain(path: Path) -> dict[str, Any]:
    """Return the JSON object in a run's config.json, segments and all; WorkdirError otherwise.

    A field of `BEFORE_AUTO` that the run did not know has the value that it was computed with.
    """
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        plain = error
    if not isinstance(plain, dict):
        raise storage.WorkdirError(
            f"workdir: {path} is not the JSON object that a run writes ({plain}); put the file "
            "back, or start in another folder with --config.workdir=DIR"
        )
    if is_run(plain) and isinstance(sampling := plain.setdefault("sampling", {}), dict):
        sampling.setdefault("exact_ratios", BEFORE_AUTO[_EXACT])
    return plain


def adopt_recorded(config: Config, recorded: Mapping[str, Any]) -> Config:
    """Return the config of a start with the run's own values where it says nothing else.

    So it does not of defaults of a loss, written or not, nor of a field that is left to the run.

    Args:
      recorded: the plain config of the run's last start.
    """
    sampling, begun = config.sampling, dict(schema.flatten(recorded)).get(_EXACT)
    if sampling.exact_ratios == "auto" and isinstance(begun, bool):
        sampling = dataclasses.replace(sampling, exact_ratios=begun)
    given, loss = losses.fill_defaults(config.loss), recorded.get("loss")
    if not isinstance(loss, Mapping) or losses.fill_defaults(loss) != given:
        loss = config.loss
    return dataclasses.replace(config, sampling=sampling, loss=loss)


def is_run(plain: Mapping[str, Any]) -> bool:
    """Tell whether a config.json belongs to a run rather than, say, to a model."""
    return {"task", "workdir"} <= plain.keys()


def drop_segments(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's config.json without the segments."""
    return {name: value for name, value in plain.items() if name != _SEGMENTS}


def write_history(workdir: Path, history: History, *, note: Note | None = None) -> None:
    """Write the config of this start and the recorded segments to config.json."""
    plain = config_lib.to_dict(history.config)
    if history.segments:
        plain[_SEGMENTS] = list(history.segments)
    storage.write_json_atomic(workdir / FILE, plain, note=note)


def find_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """List the fields in which two plain configs differ, by path.

    A field that a config of an older version lacks counts as having had its default, and so does
    a hyperparameter of the loss that is left out.
    """
    before, after = (
        dict(schema.flatten(schema.drop_shared(Config, one))) for one in fill_loss(old, new)
    )
    fixed = schema.leaf_types(Config)
    defaults = schema.flatten(schema.to_plain(Config()))
    before = {path: value for path, value in defaults if path in fixed} | before
    found = []
    for path in sorted(before.keys() | after.keys()):
        one, other = before.get(path, _ABSENT), after.get(path, _ABSENT)
        mark = roles.find_mark(Config, path)
        if one != other and not is_same_place(one, other, mark.place):
            found.append(Change(path, one, other, mark))
    return found


def fill_loss(*configs: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Return plain configs, with the defaults of their loss if it is one and the same."""
    given = [one.get("loss") for one in configs]
    known = [one for one in given if isinstance(one, Mapping)]
    if len(known) < len(given) or len({one.get("name") for one in known}) > 1:
        return configs
    return tuple(
        {**one, "loss": losses.fill_defaults(loss)}
        for one, loss in zip(configs, known, strict=True)
    )


def refuse_changes(workdir: Path, history: History) -> None:
    """Raise a WorkdirError that lists all changes that are not allowed, if there are any."""
    lines = []
    for one in history.changes:
        role = one.mark.role_in(history.config.task)
        if role == "result" and not (one.mark.place and _is_known(workdir, one.path)):
            lines.append(str(one) + (" (another place)" if one.mark.place else ""))
        elif role == "growing" and not _has_grown(one):
            lines.append(f"{one} (it may only grow)")
    if lines:
        listed = "\n".join(f"  - {line}" for line in lines)
        raise storage.WorkdirError(
            f"workdir: {workdir} holds a run with another configuration; changed:\n{listed}\n"
            "set them back, or start a new run with --config.workdir=DIR; --help=resume lists the "
            "fields that may change"
        )


def describe_changes(history: History) -> list[str]:
    """Return a line for the log for each change that takes effect now."""
    lines = []
    for one in history.changes:
        role = one.mark.role_in(history.config.task)
        if role == "execution":
            lines.append(f"{one}; the results may differ in their last bits")
            if _draws_by_place(history.config) and not one.path.startswith("sampling."):
                lines[-1] += ", and lora.dropout drops others"
        elif role == "tuning":
            lines.append(f"{one}; from here on")
        elif role == "growing":
            adds = _adds(one, history)
            more = "the run goes on with more" if adds else "for rounds not trained yet"
            lines.append(f"{one}; {more}")
        elif role == "result" and one.mark.place:
            lines.append(f"{one}; its content is the same")
    return lines


def describe_kept(history: History, shards: Sequence[Path]) -> str:
    """Return a line about shards that were made before the changes of this start and are kept.

    The line is "" if nothing that shards depend on has changed. It is "" too if their size has
    changed: then their reader reports which of them are made again.
    """
    changed = [one.path for one in history.pick("execution")]
    if not (changed and shards) or "sampling.shard_prompts" in changed:
        return ""
    names = f"{shards[0].parent.name}/{shards[0].name}"
    more = f" and {len(shards) - 1} more" if len(shards) > 1 else ""
    return f"{names}{more}: made before these changes, and kept; the rest is made with them"


def list_segments(workdir: Path, round: int) -> tuple[dict[str, Any], ...]:
    """Return the recorded segments that belong to a round that is under way, or to a task.

    A segment that began when only the round's evaluation was left has the next round's number.
    """
    if not (workdir / FILE).exists():
        return ()
    segments = read_plain(workdir / FILE).get(_SEGMENTS, ())
    return tuple(
        {key: value for key, value in one.items() if key != "exported"}
        for one in segments
        if one.get("round", round) >= round
    )


def record_changes(history: History, grown: Mapping[str, Any], **where: Any) -> History:
    """Return the history with a new segment at `where` for the changes that affect results.

    Args:
      grown: what else has grown, such as the data, as path -> [before, after].
    """
    matter = history.pick("execution", "tuning", "growing")
    if not (matter or grown):
        return dataclasses.replace(history, changes=())
    segment = {**where, "changed": {**{one.path: [one.old, one.new] for one in matter}, **grown}}
    if grown or _pick_more(history) or any(one.path.startswith(_ENDS) for one in matter):
        segment["exported"] = False
    is_known = segment in history.segments[-1:]  # from a start that was killed before it went on
    segments = history.segments if is_known else (*history.segments, segment)
    return dataclasses.replace(history, changes=(), segments=segments)


def close_segments(history: History) -> History:
    """Return the history with every extension of the run marked as done."""
    segments = [
        segment | {"exported": True} if "exported" in segment else segment
        for segment in map(dict, history.segments)
    ]
    return dataclasses.replace(history, segments=tuple(segments))


def _pick_more(history: History) -> list[Change]:
    return [one for one in history.pick("growing") if _adds(one, history)]


def _adds(change: Change, history: History) -> bool:
    """Tell whether the growth of a field gives a complete run more to do."""
    # More epochs of an online run do not: rounds that are trained stay as they are.
    return (history.config.task, change.path) != ("online", "train.epochs")


def _draws_by_place(config: Config) -> bool:
    """Tell whether a step depends on the position of an example in its batch."""
    return bool((config.lora.rank or config.lora.path) and config.lora.dropout)


def _is_known(workdir: Path, path: str) -> bool:
    """Tell whether inputs.json has fingerprints for a path, to compare another place with."""
    try:
        return bool(json.loads((workdir / INPUTS).read_text(encoding="utf-8")).get(path))
    except (OSError, ValueError, AttributeError):
        return False


def _has_grown(change: Change) -> bool:
    old, new = change.old, change.new
    if not (isinstance(old, int) and isinstance(new, int)):
        return False
    if change.mark.zero_is_all and 0 in (old, new):
        return new == 0
    return new > old


def is_same_place(old: object, new: object, kind: roles.Place) -> bool:
    """Tell whether two paths lead to one place, despite links, ~, relative parts or a slash."""
    if not kind or not (isinstance(old, str) and isinstance(new, str)) or not (old and new):
        return False
    pairs = [
        [os.path.realpath(os.path.expanduser(name)) for name in places.split_names(text, kind)]
        for text in (old, new)
    ]
    return pairs[0] == pairs[1]
