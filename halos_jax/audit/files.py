"""The static checks: hashes of files, the chain of the ledger, the records of checkpoints."""

from collections.abc import Iterator
from pathlib import Path

from halos_jax import storage
from halos_jax.audit.findings import Finding, compare, differs, not_checked, passed
from halos_jax.audit.opened import Opened
from halos_jax.checkpoints.shelf import Shelf
from halos_jax.workdir import intact, manifests, trees
from halos_jax.workdir import ledger as ledgers
from halos_jax.workdir.manifests import Manifest


def check_records(opened: Opened) -> Iterator[Finding]:
    """Tell whether the ledger and all manifests can be read, and how far the run is."""
    what = "the ledger and the manifests can be read"
    total = len(opened.manifests) + 1
    yield compare("records", what, opened.problems, total, unit="records")
    if not opened.is_finished:
        yield not_checked("records", "the rest of the run", describe_rest(opened))


def describe_rest(opened: Opened) -> str:
    """Return which part of an unfinished run there is nothing to check of yet."""
    if not opened.manifests:
        return "the run is under way, or was stopped, before its end"
    last = opened.manifests[-1]
    if last.next_stage is None:
        return "the run is under way, or was stopped, and has no final/ yet"
    where = f"round {last.round}" if opened.is_online else f"task {opened.name}"
    left = manifests.stages_of(last.round, last.task)[len(last.stages) :]
    return f"{where} is under way, or was stopped: {', '.join(left)} are not done"


def check_ledger(opened: Opened) -> Iterator[Finding]:
    """Compare every file, folder and checkpoint that the ledger names with what it says."""
    if opened.ledger.is_empty:
        if not opened.problems:
            yield _explain_no_ledger(opened)
        return
    lines = len(opened.ledger.chains)
    yield passed("ledger", "each line's hash follows from the line before", lines, unit="lines")
    names = [name for name, entry in opened.ledger.entries.items() if _is_checked(opened, name)]
    wrong = []
    for name in names:
        problem = _check_name(opened, name)
        wrong += [problem] if problem else []
    known = {opened.ledger.name(path) for path in intact.find_manifests(opened.workdir)}
    strange = [name for name in sorted(known) if opened.ledger.find(opened.workdir / name) is None]
    wrong += [f"{name} is not of this run" for name in strange]
    yield compare("ledger", "files are as they were written", wrong, len(names), unit="files")


def _is_checked(opened: Opened, name: str) -> bool:
    if name.startswith("checkpoints/"):
        return False
    return ".shard-" not in name or (opened.workdir / name).exists()


def _check_name(opened: Opened, name: str) -> str | None:
    """Return what is wrong with a file, or None; a run may be writing it at this moment."""
    problem = _check_entry(opened.workdir, name, opened.ledger)
    if problem is None:
        return None
    newest = ledgers.read_ledger(opened.workdir)
    if newest.head != opened.ledger.head:
        problem = _check_entry(opened.workdir, name, newest)
    return None if newest.is_pending(name) else problem


def _check_entry(workdir: Path, name: str, ledger: ledgers.Ledger) -> str | None:
    entry = ledger.entries[name]
    if "files" in entry:
        return "; ".join(trees.find_wrong(workdir / name, entry["files"], whole=True)) or None
    return ledgers.check_entry(workdir, name, entry)


def _explain_no_ledger(opened: Opened) -> Finding:
    what = "the hashes of all files"
    if any(one.version >= intact.LEDGER_VERSION for one in opened.manifests):
        return differs("ledger", what, f"{ledgers.FILE} is missing, though the run wrote one")
    return not_checked("ledger", what, "the run was begun by a version that kept none")


def check_files(opened: Opened, manifest: Manifest) -> Iterator[Finding]:
    """Compare the files of a manifest with their hashes and numbers of records."""
    folder, wrong = opened.folder(manifest), []
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif (found := storage.hash_file(path)) != record.sha256:
            wrong.append(f"{name} has sha256 {found[:12]}..., expected {record.sha256[:12]}...")
        elif path.suffix == ".jsonl" and (lines := _count_lines(path)) != record.count:
            wrong.append(f"{name} has {lines} records, expected {record.count}")
    count = len(manifest.files)
    yield compare("files", "files have the hashes of the manifest", wrong, count, unit="files")


def _count_lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def check_checkpoints(opened: Opened) -> Iterator[Finding]:
    """Compare the record of each checkpoint with the ledger; its arrays are not read here."""
    shelf = Shelf(opened.workdir / "checkpoints", 1, opened.ledger, is_writer=False)
    ids = shelf.ids()
    if not ids and not shelf.missing():
        return
    wrong = [f"{shelf.path(one).name}: {reason}" for one in ids if (reason := shelf.check(one))]
    wrong += [f"{shelf.path(one).name} is missing" for one in shelf.missing()]
    yield compare("checkpoints", "records are those of this run", wrong, len(ids), unit="records")
