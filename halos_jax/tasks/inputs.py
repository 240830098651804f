"""What a run was started with: `workdir/inputs.json`, the fingerprints of its data and weights.

    {"data.train": [{"name": "", "size": 812, "whole": "..."}],
     "model.path": [{"name": "config.json", ...}, {"name": "model.safetensors", ...}]}

Names are those inside of a folder. A resume compares, in a second or two for any size: small files
whole, large ones by fixed blocks.
"""

import contextlib
import dataclasses
import glob
import importlib.util
import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from halos_jax import processes, storage
from halos_jax.config import Config, ConfigError, places, roles, schema
from halos_jax.config.kinds import REWARD_KINDS
from halos_jax.config.rewards import PartConfig, RewardConfig
from halos_jax.config.tasks import TASKS, is_scored
from halos_jax.data.records.fields import RecordError
from halos_jax.data.records.sources import find_folder, is_taken, list_set_files, may_read
from halos_jax.models.files import hf
from halos_jax.models.hf.families import ModelError
from halos_jax.policies import source
from halos_jax.storage import WorkdirError
from halos_jax.workdir import fingerprints
from halos_jax.workdir.changes import FILE, read_plain
from halos_jax.workdir.fingerprints import Verdict
from halos_jax.workdir.intact import FINAL, INPUTS
from halos_jax.workdir.ledger import Ledger
from halos_jax.workdir.trees import is_read

logger = logging.getLogger(__name__)

# Bytes read whole at a start: of each file of a model, and of all data together. The data are read
# whole anyway a moment later.
_MODEL_LIMIT, _DATA_LIMIT = 1 << 24, 1 << 29

Files = Mapping[str, list[tuple[str, Path]]]  # field -> (name, path) of its files


@dataclasses.dataclass(frozen=True)
class Change:
    """A file that is not what it was when the run was started.

    "new" is one that was not there, "inserted" data that are longer, but not at their end alone.
    """

    field: str
    path: Path
    verdict: Verdict | Literal["new", "inserted"]

    def __str__(self) -> str:
        said = {
            "missing": "is missing",
            "grown": "has grown",
            "new": "was not there",
            "changed": "holds something else than it did",
            "inserted": "holds something else than it did, with more: not at its end alone",
        }
        return f"{self.field}: {self.path} {said[self.verdict]}"


def check_inputs(
    ledger: Ledger,
    config: Config,
    *,
    is_begun: bool,
    may_grow: Collection[str] = (),
    policy: Path | None = None,
) -> list[Change]:
    """Record the fingerprints of what a run reads or, when it goes on, compare them.

    To be called before any of it is read, by every process; the others wait for process 0.

    Args:
      config: with the models in place of the workdirs of runs.
      is_begun: whether the run has left anything that depends on its inputs.
      may_grow: fields whose files may have grown; they are then recorded as they are now.
      policy: a file that stands for the policy, where that is a checkpoint of a run.

    Returns:
      What has grown, on process 0. The user's own code may change too: that is said.

    Raises:
      ConfigError: listing every file that is not what it was; or where the workdir lies among the
        data.
    """

    def check() -> list[Change]:
        return _check(ledger, config, is_begun, may_grow, policy) if ledger.is_writer else []

    return processes.run_on_first(check) or []


def _check(
    ledger: Ledger,
    config: Config,
    is_begun: bool,
    may_grow: Collection[str],
    policy: Path | None,
) -> list[Change]:
    path = ledger.workdir / INPUTS
    known = _drop_unread(_read(path) if is_begun and ledger.find(path) else {}, config)
    files, code = list_inputs(config), _list_code(config)
    if policy is not None:
        files["model.path"] = [("", policy)]
    found = compare_inputs(known, files, _count_sources(ledger.workdir))
    grown = [one for one in found if one.field in may_grow and one.verdict in ("grown", "new")]
    _refuse([one for one in found if one not in grown], ledger.workdir, may_grow)
    edited = compare_inputs(known, code)
    for one in edited:
        logger.warning("%s when the run was started; from here on that counts", one)
    is_new = not (files.keys() | code.keys()) <= known.keys() or _lacks(known, files)
    if grown or edited or is_new:
        storage.write_json_atomic(path, _describe({**files, **code}), note=ledger.note_file)
    return grown


def list_inputs(config: Config) -> dict[str, list[tuple[str, Path]]]:
    """Return the files of every field of a config that the task reads, with their names.

    A data set of the hub is the files that `datasets` keeps it in.
    """
    found = {}
    for field, text, kind in roles.list_places(config):
        if _is_read(field, config):
            if kind == "source":
                files = list(_list_data(field, text, Path(config.workdir).resolve()))
            elif kind == "model":
                weights = TASKS[config.task].policy != "tokenizer" or "reward" in field
                files = list(_list_model(text, weights=weights))
            else:
                files = [("", Path(text))] if os.path.isfile(text) else []
            found[field] = files
    return found


def compare_inputs(
    known: Mapping[str, list[Mapping[str, Any]]],
    files: Files,
    counts: Mapping[str, int] | None = None,
) -> list[Change]:
    """Return what of the files is not as their fingerprints in `known` say.

    A field that is not known is another field's spelling, and has nothing to be compared with.

    Args:
      counts: how many sources the fields of data had at the start before, where that is known.
    """
    pairs, changes = [], []
    for field, entries in known.items():
        if field not in files:
            continue
        now = dict(files[field])
        for entry in entries:
            path = now.pop(entry["name"], None)
            if path is None:
                changes.append(Change(field, Path(entry["path"]), "missing"))
            else:
                pairs.append((field, path, entry))
        # A version that did not look at data sets of the hub has recorded no file of theirs.
        sources = {_number_source(entry["name"]) for entry in entries}
        count = (counts or {}).get(field)
        changes += [
            Change(field, path, "new")
            for name, path in now.items()
            if not field.startswith("data.")
            or (number := _number_source(name)) in sources
            or (count is not None and int(number) >= count)
        ]
    verdicts = fingerprints.compare_all([(path, entry) for _, path, entry in pairs])
    for (field, path, entry), verdict in zip(pairs, verdicts, strict=True):
        if verdict == "changed" and field.startswith("data.") and _is_longer(path, entry):
            changes.append(Change(field, path, "inserted"))
        elif verdict != "same":
            changes.append(Change(field, path, verdict))
    return changes


def _number_source(name: str) -> str:
    """Return which source of a field a file is of, by the name that it is recorded under."""
    return name.partition(":")[0]


def _count_sources(workdir: Path) -> dict[str, int]:
    """Return how many sources the fields of data had when the run was last started."""
    if not (workdir / FILE).exists():
        return {}
    before = schema.flatten(read_plain(workdir / FILE).get("data", {}))
    return {
        f"data.{name}": len(places.split_names(text, "source"))
        for name, text in before
        if isinstance(text, str)
    }


def _lacks(known: Mapping[str, list[Mapping[str, Any]]], files: Files) -> bool:
    """Tell whether some file is not recorded."""
    return any(
        name not in {entry["name"] for entry in known.get(field, [])}
        for field, named in files.items()
        for name, _ in named
    )


def _is_longer(path: Path, entry: Mapping[str, Any]) -> bool:
    return bool(path.stat().st_size > entry["size"])


def _drop_unread(known: Mapping[str, list[Any]], config: Config) -> dict[str, list[Any]]:
    """Return what is known without the files that a version which took all of a folder recorded."""
    kept = dict(known)
    for field, text, kind in roles.list_places(config):
        names = places.split_names(text, "source") if kind == "source" else []

        def is_wanted(name: str, kind: str = kind, names: Sequence[str] = names) -> bool:
            if kind == "model":
                return not name or is_read(name)
            number, _, inside = name.partition(":")
            if not inside or not int(number) < len(names):
                return True
            folder = find_folder(names[int(number)])
            return not folder or may_read(folder, inside)

        if kind in ("model", "source") and field in kept:
            kept[field] = [entry for entry in kept[field] if is_wanted(entry["name"])]
    return kept


def _is_read(field: str, config: Config) -> bool:
    if roles.find_mark(Config, field).role == "aside" or field.endswith(".output"):
        return False
    if field.startswith("reward."):
        return is_scored(config) and _is_of_part(field, config)
    # All other fields are another task's of a pipeline.
    names = TASKS[config.task].reads
    return any(field == name or field.startswith(f"{name}.") for name in names)


def _is_of_part(field: str, config: Config) -> bool:
    """Tell whether a place of the reward is one that its kind reads."""
    for prefix, one in _list_rewards(config).items():
        for start in ("reward.", prefix):  # a part has the reward's own where it sets none
            names = [f"{start}{name}" for name in REWARD_KINDS[one.kind].reads]
            if any(field == name or field.startswith(f"{name}.") for name in names):
                return True
    return False


def _list_rewards(config: Config) -> dict[str, RewardConfig | PartConfig]:
    """Return the reward, or its parts, by what the names of its fields begin with."""
    parts = config.reward.parts
    return {f"reward.parts.{name}.": one for name, one in parts.items()} or {
        "reward.": config.reward
    }


def _list_data(field: str, text: str, workdir: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files of a source; of a folder those that its reader takes."""
    for number, name in enumerate(places.split_names(text, "source")):
        before = f"{number}:"
        folder = find_folder(name)
        if os.path.isfile(name):
            yield before, Path(name)
        elif folder:
            for path in sorted(Path(folder).rglob("*")):
                inside = path.relative_to(folder).as_posix()
                if not (path.is_file() and may_read(folder, inside)):
                    continue
                if not path.resolve().is_relative_to(workdir):
                    yield f"{before}{inside}", path
                elif is_taken(name, inside):
                    raise ConfigError(
                        f"workdir: got {str(workdir)!r}, which lies in {field}={name!r}, so that "
                        f"the run would read its own files ({inside}) as records; allowed: a "
                        "folder outside of it"
                    )
        elif any(sign in name for sign in "*?["):
            for matched in sorted(glob.glob(name, recursive=True)):
                if os.path.isfile(matched):
                    yield f"{before}{os.path.basename(matched)}", Path(matched)
        else:
            with contextlib.suppress(RecordError):  # who reads it says what is wrong
                for stored in list_set_files(name):
                    yield f"{before}{os.path.basename(stored)}", Path(stored)


def _list_model(text: str, *, weights: bool) -> Iterator[tuple[str, Path]]:
    try:
        is_run = source.is_workdir(text)
        folder = Path(text) / FINAL if is_run else hf.resolve_model(text)
    except ModelError:
        return  # who reads it says what is wrong
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        is_wanted = is_read(path.name) and (weights or path.suffix != ".safetensors")
        if path.is_file() and is_wanted:
            yield path.name, path


def _list_code(config: Config) -> dict[str, list[tuple[str, Path]]]:
    """Return the files of the user's functions, by the field that names them."""
    named = {}
    if is_scored(config):
        for prefix, one in _list_rewards(config).items():
            named[f"{prefix}function"] = [one.function] if REWARD_KINDS[one.kind].function else []
        named["reward.rules"] = list(config.reward.rules)
    found = {}
    for field, functions in named.items():
        modules = dict.fromkeys(name.partition(":")[0] for name in functions)
        found[field] = [(name, path) for name in modules if (path := _find_module(name))]
    return {field: files for field, files in found.items() if files}


def _find_module(name: str) -> Path | None:
    if name.partition(".")[0] == __name__.partition(".")[0]:
        return None  # of this package
    try:
        spec = importlib.util.find_spec(name)
    except Exception:  # what is wrong with it is said when it is imported
        return None
    origin = spec.origin if spec is not None else None
    return Path(origin) if origin is not None and os.path.isfile(origin) else None


def _describe(files: Files) -> dict[str, list[dict[str, Any]]]:
    described = {}
    for field, named in files.items():
        is_data = field.startswith("data.")
        prints = fingerprints.fingerprint_all(
            [path for _, path in named],
            whole_limit=_DATA_LIMIT if is_data else _MODEL_LIMIT,
            total_limit=_DATA_LIMIT if is_data else None,
        )
        described[field] = [
            {"name": name, "path": str(path), **found}
            for (name, path), found in zip(named, prints, strict=True)
        ]
    return described


def _read(path: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        known: dict[str, list[dict[str, Any]]] = json.loads(path.read_text(encoding="utf-8"))
        return known
    except (OSError, ValueError) as error:  # the ledger has seen it a moment ago
        raise WorkdirError(f"{path} cannot be read ({error}); check the disk") from error


def _refuse(changes: list[Change], workdir: Path, may_grow: Collection[str]) -> None:
    if changes:
        advice = "put the files back as they were"
        if any(one.verdict == "inserted" and one.field in may_grow for one in changes):
            advice += (
                ", move records that were added elsewhere to the end of their file or into a file "
                "of their own (the run goes on with those)"
            )
        listed = "\n".join(f"  - {one}" for one in changes)
        raise ConfigError(
            f"what the run in {workdir} was started with has changed:\n{listed}\n"
            f"{advice}, or start a new run with --config.workdir=DIR"
        )
