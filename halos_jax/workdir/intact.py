"""Check that a workdir is as its run left it, before any of its files are read again."""

import hashlib
import json
import logging
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from halos_jax.storage import WorkdirError, hash_file, hash_start
from halos_jax.workdir import ledger as ledgers
from halos_jax.workdir import trees
from halos_jax.workdir.ledger import Ledger

logger = logging.getLogger(__name__)

# Files of lines for people; a run can go on without them.
REPORTS = ("metrics.jsonl", "timings.jsonl")
MANIFEST = "manifest.json"
PAGE = "report.html"  # about the run, for people; see `halos_jax/report`
COMPARISON = "comparison.html"  # with other runs, the same
FINDINGS = "verification.json"  # what a verification has found; see `halos_jax/audit`
INPUTS = "inputs.json"  # fingerprints of the run's inputs, see `inputs.py`
PROMPTS = "prompts.json"  # the order of the prompts, see `order.py`
FINAL = "final"  # the export at the end of a run
AGAINST = "against"  # what the second policy of an evaluation writes
# The first version of the manifest format in which runs have a ledger.
LEDGER_VERSION = 2


def open_workdir(workdir: Path, ledger: Ledger, *, remade: Collection[str] = ()) -> None:
    """Check the workdir of a resumed run, or adopt one from a version without ledgers."""
    if ledger.is_empty:
        adopt_workdir(workdir, ledger)
    else:
        check_workdir(workdir, ledger, remade=remade)


def check_workdir(workdir: Path, ledger: Ledger, *, remade: Collection[str] = ()) -> None:
    """Check every file and folder in the ledger; files that manifests name are checked elsewhere.

    After a killed process, a last ledger line that was written but not acted on is undone, and
    lines that were added to a report since the last save are cut off. Shards that are not as they
    were written are deleted, to be made again. A warning is logged for each of these, and for a
    missing report or exported model.

    Args:
      remade: folders that the task makes again if they are damaged; they are not refused.

    Raises:
      WorkdirError: listing every file that is missing, changed, or not from this run.
    """
    wrong = []
    for name, entry in list(ledger.entries.items()):
        if _is_shard(name) or _is_checkpoint(name):
            continue
        if name in remade and (workdir / name).exists():
            ledger.undo(name)  # if it was never replaced, the old folder is whole
            continue
        problem = ledgers.check_entry(workdir, name, entry)
        if problem is None or ledger.undo(name) or name in remade:
            continue
        if "files" in entry and not (workdir / name).exists():
            logger.warning("%s, an exported model, is missing", workdir / name)
            ledger.note_gone(workdir / name)
            continue
        if name in REPORTS and not (workdir / name).exists():
            logger.warning(
                "%s is missing: the run goes on without its lines up to here", workdir / name
            )
            ledger.note_prefix(workdir / name, 0, hashlib.sha256().hexdigest())
            continue
        wrong.append(problem)
    strange = [path for path in find_manifests(workdir) if ledger.find(path) is None]
    wrong += [f"{ledger.name(path)} is not of this run" for path in strange]
    if wrong:
        raise _changed(workdir, wrong)
    _cut_reports(workdir, ledger)
    _drop_changed_shards(workdir, ledger)


def adopt_workdir(workdir: Path, ledger: Ledger) -> None:
    """Accept the files of a run from a version without ledgers as they are, and log that.

    Raises:
      WorkdirError: if the run did have a ledger, which is now missing.
    """
    if _had_ledger(workdir):
        raise WorkdirError(
            f"{workdir / ledgers.FILE} is missing, the record of the run's files; put it back, "
            "or start a new run with --config.workdir=DIR"
        )
    names = ["config.json", *REPORTS]
    paths = [workdir / name for name in names if (workdir / name).exists()]
    for path in [*paths, *find_manifests(workdir), *list_shards(workdir)]:
        if path.name == "metrics.jsonl":
            size = path.read_bytes().rfind(b"\n") + 1
            ledger.note_prefix(path, size, hash_start(path, size))
        else:
            ledger.note_file(path, path.stat().st_size, hash_file(path))
    for folder in [workdir / "final", *sorted(workdir.glob("rounds/*/model"))]:
        if folder.is_dir():
            ledger.note_tree(folder, folder)
    logger.warning(
        "%s was begun by a version that kept no record of what it wrote: its files are taken as "
        "they are, and are checked from now on",
        workdir,
    )


def find_manifests(workdir: Path) -> list[Path]:
    """Return the manifests in a workdir: one per round, or that of a standalone task."""
    found = [workdir / MANIFEST, *sorted(workdir.glob(f"rounds/*/{MANIFEST}"))]
    return [path for path in found if path.exists()]


def list_shards(workdir: Path) -> list[Path]:
    """Return the finished shards of stages that are under way, in order."""
    places = ("*.jsonl", "rounds/*/*.jsonl", f"{AGAINST}/*.jsonl")
    found = [path for place in places for path in workdir.glob(place)]
    return [path for path in sorted(found) if _is_shard(path.name)]


def _cut_reports(workdir: Path, ledger: Ledger) -> None:
    for path in (workdir / name for name in REPORTS):
        known = (ledger.find(path) or {"prefix": 0}).get("prefix")
        if known is not None and path.exists() and path.stat().st_size > known:
            os.truncate(path, known)


def _drop_changed_shards(workdir: Path, ledger: Ledger) -> None:
    for path in list_shards(workdir):
        entry, name = ledger.find(path), ledger.name(path)
        if entry is None or ledgers.check_entry(workdir, name, entry):
            logger.warning("%s: a part of a stage is not as it was written: made again", path)
            path.unlink()


def _is_shard(name: str) -> bool:
    return ".shard-" in name and name.endswith(".jsonl")


def _is_checkpoint(name: str) -> bool:
    return name.startswith("checkpoints/")  # checked when they are read


def _had_ledger(workdir: Path) -> bool:
    """Tell whether anything in the workdir was written by a run with a ledger."""
    for path in find_manifests(workdir):
        version = _read_field(path, "version")
        if isinstance(version, int) and version >= LEDGER_VERSION:
            return True
    records = workdir.glob("checkpoints/*/round/metadata")
    return any(_read_field(path, "ledger") for path in records)


def _read_field(path: Path, name: str) -> Any:
    # If a file cannot be read, the code that needs it will report that.
    try:
        return json.loads(path.read_bytes())[name]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _changed(workdir: Path, wrong: list[str]) -> WorkdirError:
    reports = [name for name in REPORTS if any(line.startswith(f"{name} ") for line in wrong)]
    moved = (
        f" (or move {' and '.join(reports)} away: the run goes on without its lines)"
        if reports
        else ""
    )
    return WorkdirError(
        f"{workdir}: files are not as the run left them: {'; '.join(wrong)}; put the original "
        f"files back{moved}, or start a new run with --config.workdir=DIR"
    )


def is_complete(workdir: Path, ledger: Ledger) -> bool:
    """Tell whether the run in `workdir` has nothing left to do.

    That is the case if its export is as it was written. A damaged export is logged, and the run
    makes it again from its last checkpoint.

    Raises:
      WorkdirError: if something else is in the place of the export.
    """
    folder = workdir / FINAL
    entry = ledger.find(folder)
    if entry is None:
        if folder.exists() and not ledger.is_empty:
            raise WorkdirError(
                f"workdir: {folder} is not of this run, which puts its export there; move it away"
            )
        return folder.is_dir()  # a run from before there were ledgers
    wrong = find_damage(folder, ledger)
    for line in wrong:
        logger.warning("%s: %s", workdir, line)
    return not wrong


def find_damage(folder: Path, ledger: Ledger) -> list[str]:
    """Return a line for each file of an export that is not as the ledger says."""
    entry = ledger.find(folder)
    if entry is None:
        return []
    if not folder.is_dir():
        return [f"{folder.name}/ is missing"]
    return trees.find_wrong(folder, entry["files"])
