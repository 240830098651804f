"""Where a run's model comes from, and its data, by names that the Hugging Face Hub knows."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halos_jax.data.records.hub import HUB_SETS
from halos_jax.policies.hub import is_id
from halos_jax.policies.source import find_workdir
from halos_jax.workdir.intact import FINAL

_DEPTH = 20  # runs that one has come from another


@dataclasses.dataclass(frozen=True)
class Lineage:
    """What a run started from.

    Attributes:
      start: the model that it started from, by name; a run's, by that of its workdir.
      base: the model that the first of all those runs started from.
      runs: the names of the runs between `base` and this one, oldest first.
      is_drawn: whether the first of them drew new weights.
      start_id, base_id: their ids on the hub; "" for a folder of this machine.
    """

    start: str
    base: str
    runs: tuple[str, ...] = ()
    is_drawn: bool = False
    start_id: str = ""
    base_id: str = ""


def trace(plain: Mapping[str, Any]) -> Lineage:
    """Follow the models of a run's config, and of the runs before it, to the first."""
    first = path = _read_path(plain)
    runs = list[str]()
    while (workdir := _find_workdir(path)) is not None and len(runs) < _DEPTH:
        runs.insert(0, workdir.resolve().name)
        plain = json.loads((workdir / "config.json").read_text("utf-8"))
        path = _read_path(plain)
    is_drawn = bool(plain.get("model", {}).get("random_init"))
    return Lineage(
        start=runs[-1] if runs else name_place(first),
        base=name_place(path),
        runs=tuple(runs),
        is_drawn=is_drawn,
        start_id="" if is_drawn else find_id(first),
        base_id="" if is_drawn else find_id(path),
    )


def _read_path(plain: Mapping[str, Any]) -> str:
    return str(plain.get("model", {}).get("path", ""))


def _find_workdir(path: str) -> Path | None:
    """Return the workdir of the run that a path stands for: itself, or that of what is in it.

    That is its `final/`, the folder of a round, and the `model/` that a round has exported.
    """
    folder = Path(path).expanduser()
    if not path:
        return None
    inside = folder.parent if folder.name in (FINAL, "model") else folder
    return find_workdir(path) or find_workdir(str(inside))


def find_id(path: str) -> str:
    """Return a model's id on the hub; "" for a path of this machine."""
    is_path = path.count("/") > 1 or path[:1] in ("", ".", "/", "~")
    return "" if is_path or Path(path).expanduser().exists() or not is_id(path) else path


def find_sets(plain: Mapping[str, Any]) -> list[str]:
    """Return the ids of the hub's data sets that a run was trained on."""
    sources = str(plain.get("data", {}).get("train", "")).split(",")
    found = []
    for source in sources:
        name, at, _ = source.strip().rpartition("@")
        if not at or Path(source.strip()).exists() or Path(name).exists():
            continue
        known = HUB_SETS.get(name)
        found.append(str(known.arguments["path"]) if known else find_id(name.partition(":")[0]))
    return list(dict.fromkeys(filter(None, found)))


def name_place(path: str) -> str:
    """Return a path without the folders of this machine; an id of the hub stays as it is.

    >>> name_place("/home/me/data/pairs.jsonl"), name_place("org/name")
    ('pairs.jsonl', 'org/name')
    """
    if find_id(re.sub(r"(:[^/@]*)?@[^/]*$", "", path)) or not path:
        return path
    return re.sub(r"/+$", "", path).rpartition("/")[2] or path
