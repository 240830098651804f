"""Folders that a run exports: which files are in them, and which are not as they were written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halos_jax.models.files.folders import is_read_inside
from halos_jax.workdir import fingerprints

# Files up to this size (bytes) are read whole at every start; of larger ones, only some blocks.
_LIMIT = 1 << 24
Files = Mapping[str, Mapping[str, Any]]


def describe_tree(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the fingerprints of all files under `folder`; large files get both kinds."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    found = fingerprints.fingerprint_all(paths, whole_limit=_LIMIT)
    wholes = fingerprints.hash_all(paths)
    return {
        path.relative_to(folder).as_posix(): {**one, "whole": whole}
        for path, one, whole in zip(paths, found, wholes, strict=True)
    }


def find_wrong(folder: Path, files: Files, *, whole: bool = False) -> list[str]:
    """Return a line for each file of a folder that differs from what `describe_tree` recorded.

    Args:
      whole: also read large files whole, which is slow.
    """
    names = list(files)
    known = [_choose(files[name], whole=whole) for name in names]
    pairs = [(folder / name, one) for name, one in zip(names, known, strict=True)]
    verdicts = fingerprints.compare_all(pairs)
    said = {"missing": "is missing", "grown": "has grown", "changed": "is damaged"}
    wrong = [
        f"{folder.name}/{name} {said[verdict]}"
        for name, verdict in zip(names, verdicts, strict=True)
        if verdict != "same"
    ]
    inside = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*"))]
    added = [name for name in inside if name not in files and is_read_inside(name)]
    return wrong + [f"{folder.name}/{name} was added" for name in added]


def _choose(known: Mapping[str, Any], *, whole: bool) -> dict[str, Any]:
    leave_out = "blocks" if whole or "blocks" not in known else "whole"
    return {key: value for key, value in known.items() if key != leave_out}
