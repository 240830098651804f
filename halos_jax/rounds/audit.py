"""Read every file that a workdir's ledger and manifests name in full, and list what is wrong."""

from pathlib import Path

from halos_jax.checkpoints.shelf import Shelf
from halos_jax.workdir import intact, manifests, trees
from halos_jax.workdir import ledger as ledgers
from halos_jax.workdir.manifests import ManifestError


def audit_workdir(workdir: Path) -> list[str]:
    """Return a line for each file that is not as it was written; change nothing.

    Exported models are read in full, however large. Only the records of checkpoints are read;
    their arrays are checked when they are restored.

    Raises:
      WorkdirError: if the ledger itself is not as it was written.
    """
    ledger = ledgers.read_ledger(workdir)
    wrong = []
    for name, entry in ledger.entries.items():
        if "files" in entry:
            wrong += trees.find_wrong(workdir / name, entry["files"], whole=True)
        elif ".shard-" not in name or (workdir / name).exists():  # or a shard, now gone
            wrong += filter(None, [ledgers.check_entry(workdir, name, entry)])
    for path in intact.find_manifests(workdir):
        try:
            manifest = manifests.load_manifest(path.parent)
            if manifest is not None:
                manifests.verify_files(path.parent, manifest)
        except ManifestError as error:
            wrong.append(str(error))
    shelf = Shelf(workdir / "checkpoints", 1, ledger, is_writer=False)
    for save_id in shelf.ids():
        reason = shelf.check(save_id)
        wrong += [f"{shelf.path(save_id)}: {reason}"] if reason else []
    return wrong
