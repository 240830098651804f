"""What a run was started with: `workdir/inputs.json`, the fingerprints of its data and weights.

    {"data.train": [{"name": "", "size": 812, "whole": "..."}],
     "model.path": [{"name": "config.json", ...}, {"name": "model.safetensors", ...}]}

A name is relative to the folder that holds the file. A resumed run compares the fingerprints, which
takes a second or two at any size: small files are read whole, large ones in fixed blocks.
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
from halos_jax.config.rewards import PartConfig, RewardConfig, ScorerConfig
from halos_jax.config.tasks import TASKS, is_scored
from halos_jax.data.records.fields import RecordError
from halos_jax.data.records.sources import find_folder, is_taken, list_set_files, may_read
from halos_jax.models.files.folders import is_read
from halos_jax.models.hf.families import ModelError
from halos_jax.policies import source
from halos_jax.policies.against import SFT
from halos_jax.storage import WorkdirError
from halos_jax.workdir import fingerprints
from halos_jax.workdir.changes import FILE, read_plain
from halos_jax.workdir.fingerprints import Verdict
from halos_jax.workdir.intact import INPUTS
from halos_jax.workdir.ledger import Ledger

logger = logging.getLogger(__name__)

# How many bytes are read whole at a start: per model file, and over all data files together. The
# data are about to be read in full anyway.
_MODEL_LIMIT, _DATA_LIMIT = 1 << 24, 1 << 29

Files = Mapping[str, list[tuple[str, Path]]]  # field -> (name, path) of its files


@dataclasses.dataclass(frozen=True)
class Change:
    """A file that is not what it was when the run was started.

    The verdict "new" means that the file was not there, "inserted" that the data are longer, and
    not only at their end.
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
            "inserted": "holds something else than it did, and more, not only at its end",
        }
        return f"{self.field}: {self.path} {said[self.verdict]}"


def check_inputs(
    ledger: Ledger,
    config: Config,
    *,
    is_begun: bool,
    may_grow: Collection[str] = (),
    policy: Path | None = None,
    against: Path | None = None,
) -> list[Change]:
    """Record the fingerprints of a new run's inputs, or compare those of a resumed one.

    Every process calls this before it reads any input; the others wait for process 0.

    Args:
      config: its model paths lead to models; workdirs of runs are resolved already.
      is_begun: whether the run has written anything that depends on its inputs.
      may_grow: fields whose files may have grown; `record_growth` records these.
      policy: the file to fingerprint in place of the policy, if that is a run's checkpoint;
        against: the same of the policy that it is compared with.

    Returns:
      The files that have grown, on process 0. A change in the user's own code is only logged.

    Raises:
      ConfigError: listing every file that has changed; or if the workdir lies in a data folder.
    """

    named = {"model.path": policy, "eval.against": against}
    records = {field: [("", path)] for field, path in named.items() if path is not None}

    def check() -> list[Change]:
        return _check(ledger, config, is_begun, may_grow, records) if ledger.is_writer else []

    return processes.run_on_first(check) or []


def _check(
    ledger: Ledger, config: Config, is_begun: bool, may_grow: Collection[str], records: Files
) -> list[Change]:
    path = ledger.workdir / INPUTS
    known = _drop_unread(_read(path) if is_begun and ledger.find(path) else {}, config)
    files, code = list_inputs(config) | dict(records), list_code(config)
    found = compare_inputs(known, files, _count_sources(ledger.workdir))
    grown = [one for one in found if one.field in may_grow and one.verdict in ("grown", "new")]
    _refuse([one for one in found if one not in grown], ledger.workdir, may_grow)
    edited = compare_inputs(known, code)
    for one in edited:
        since = "since" if one.verdict in ("grown", "missing") else "when"
        logger.warning(
            "%s %s the run was started; the run goes on with the new version", one, since
        )
    waiting = {one.field: known[one.field] for one in grown}  # see `record_growth`
    files = {field: named for field, named in files.items() if field not in waiting}
    is_new = not (files.keys() | code.keys()) <= known.keys() or _lacks(known, files)
    if edited or is_new:
        described = {**_describe({**files, **code}), **waiting}
        storage.write_json_atomic(path, described, note=ledger.note_file)
    return grown


def record_growth(ledger: Ledger, config: Config, grown: Sequence[Change]) -> None:
    """Record the fields of `grown`, from `check_inputs`, as they are now. All processes call this.

    It comes after the growth was noted in config.json: until then nothing has used it, and a run
    that is killed in between begins with the files that inputs.json has.
    """

    def record() -> None:
        names = {one.field for one in grown}
        files = {field: named for field, named in list_inputs(config).items() if field in names}
        if files and ledger.is_writer:
            path = ledger.workdir / INPUTS
            described = {**_read(path), **_describe(files)}
            storage.write_json_atomic(path, described, note=ledger.note_file)

    processes.run_on_first(record)


def list_inputs(config: Config) -> dict[str, list[tuple[str, Path]]]:
    """Return the files, with their names, behind each config field that the task reads.

    A hub data set is listed as the files in which `datasets` caches it.
    """
    found = {}
    for field, text, kind in roles.list_places(config):
        if _is_read(field, config):
            if kind == "source":
                files = list(_list_data(field, text, Path(config.workdir).resolve()))
            elif text == SFT and field == "eval.against":
                files = []  # the path is in the config of another run
            elif kind == "model":
                weights = TASKS[config.task].policy != "tokenizer" or field.startswith("reward.")
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
    """Return the files that differ from their fingerprints in `known`.

    A field that is missing from `known` is skipped: there is nothing to compare it with.

    Args:
      counts: how many sources each data field had at the last start, where that is known.
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
        # Older versions did not fingerprint hub data sets and so recorded no files for them.
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
    """Return the number of the source that a file belongs to, read from its recorded name."""
    return name.partition(":")[0]


def _count_sources(workdir: Path) -> dict[str, int]:
    """Return how many sources each data field had when the run was last started."""
    if not (workdir / FILE).exists():
        return {}
    before = schema.flatten(read_plain(workdir / FILE).get("data", {}))
    return {
        f"data.{name}": len(places.split_names(text, "source"))
        for name, text in before
        if isinstance(text, str)
    }


def _lacks(known: Mapping[str, list[Mapping[str, Any]]], files: Files) -> bool:
    """Tell whether any file has no recorded fingerprint."""
    return any(
        name not in {entry["name"] for entry in known.get(field, [])}
        for field, named in files.items()
        for name, _ in named
    )


def _is_longer(path: Path, entry: Mapping[str, Any]) -> bool:
    return bool(path.stat().st_size > entry["size"])


def _drop_unread(known: Mapping[str, list[Any]], config: Config) -> dict[str, list[Any]]:
    """Return `known` without files that are not read: older versions recorded whole folders."""
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
    if field.startswith(("reward.", "eval.scorers.")):
        return is_scored(config) and _is_of_part(field, config)
    # Any other field belongs to another task of the pipeline.
    names = TASKS[config.task].reads
    return any(field == name or field.startswith(f"{name}.") for name in names)


def _is_of_part(field: str, config: Config) -> bool:
    """Tell whether the kind of this reward (or part of it) reads the field."""
    for prefix, one in _list_rewards(config).items():
        # A part falls back on the reward's own field.
        for start in {"reward." if prefix.startswith("reward.") else prefix, prefix}:
            names = [f"{start}{name}" for name in REWARD_KINDS[one.kind].reads]
            if any(field == name or field.startswith(f"{name}.") for name in names):
                return True
    return False


def _list_rewards(config: Config) -> dict[str, RewardConfig | PartConfig | ScorerConfig]:
    """Map the prefix of the field names ("reward.", say) to the reward, or to each of its parts.

    Scorers of held-out samples are among them, if the task has such samples.
    """
    found: dict[str, RewardConfig | PartConfig | ScorerConfig] = {
        f"reward.parts.{name}.": one for name, one in config.reward.parts.items()
    }
    scorers = config.eval.scorers if TASKS[config.task].watches else {}
    others = {f"eval.scorers.{name}.": one for name, one in scorers.items()}
    return (found or {"reward.": config.reward}) | others


def _list_data(field: str, text: str, workdir: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files of a source; for a folder, only those that its reader takes."""
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
            with contextlib.suppress(RecordError):  # the reader reports what is wrong
                for stored in list_set_files(name):
                    yield f"{before}{os.path.basename(stored)}", Path(stored)


def _list_model(text: str, *, weights: bool) -> Iterator[tuple[str, Path]]:
    try:
        folder = source.find_folder(text)
    except ModelError:
        return  # the reader reports what is wrong
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        is_wanted = is_read(path.name) and (weights or path.suffix != ".safetensors")
        if path.is_file() and is_wanted:
            yield path.name, path


def list_code(config: Config) -> dict[str, list[tuple[str, Path]]]:
    """Map each field that names functions of the user's own to the files that hold them."""
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
        return None  # this package itself
    try:
        spec = importlib.util.find_spec(name)
    except Exception:  # the import itself reports what is wrong
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
    except (OSError, ValueError) as error:  # unlikely: the ledger has just verified it
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
            f"the inputs of the run in {workdir} have changed since it was started:\n{listed}\n"
            f"{advice}, or start a new run with --config.workdir=DIR"
        )
