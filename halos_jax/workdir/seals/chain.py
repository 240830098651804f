"""The chain of a run's manifests: each complete one is sealed with a hash of all that led to it.

    "chain": {
      "previous": the digest of the round before; "" for the first,
      "config": the hash of what the config says of results, as it was in this round,
      "defaults": the name of the defaults that are left out there (`defaults.py`),
      "inputs": {"data.train": the hash of its fingerprints in inputs.json, ...},
      "rows": {"count": 6, "sha256": "..."}     the rows of metrics.jsonl for the round's steps,
      "checkpoint": the hash of the checksums of the checkpoint at the round's end,
      "digest": the hash of all of these and of the manifest itself,
      "added": {"files": ["test.jsonl"], ...}   what was added to it when it was complete,
      "added_digest": the hash of that and of the digest
    }

Nothing in it depends on times, paths or names of hosts: two runs that are equal to the bit have the
same digests, and a run that was killed and resumed has those of one that never was.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from halos_jax.config import Config, roles, schema
from halos_jax.metrics import is_time
from halos_jax.workdir.changes import History
from halos_jax.workdir.intact import INPUTS
from halos_jax.workdir.manifests import Manifest
from halos_jax.workdir.seals.defaults import is_of_results, list_defaults, name_defaults

_ASIDE = ("chain", "segments", "version")  # of a manifest: what its digest is not of
METRICS = "metrics.jsonl"


def seal(manifest: Manifest, previous: str, facts: Mapping[str, Any]) -> Manifest:
    """Return a complete manifest with its link of the chain.

    Args:
      previous: the digest of the manifest before it.
      facts: what else the digest is of, such as the hash of the config.
    """
    chain = {"previous": previous, **facts}
    return dataclasses.replace(manifest, chain={**chain, "digest": _compute(manifest, chain)})


def extend(before: Manifest, after: Manifest) -> Manifest:
    """Return `after`, a sealed manifest with more in it, with the hash of what was added."""
    if not before.chain:
        return after
    old, new = _to_plain(before), _to_plain(after)
    added = {
        name: sorted(value.keys() - old.get(name, {}).keys())
        for name, value in new.items()
        if isinstance(value, dict) and value.keys() - old.get(name, {}).keys()
    }
    chain = {**before.chain, "added": added}
    chain["added_digest"] = _compute_added(new, chain)
    return dataclasses.replace(after, chain=chain)


def find_broken(manifest: Manifest, previous: str | None = None) -> list[str]:
    """Return a line for each part of a sealed manifest's link that does not hold.

    Args:
      previous: the digest that the manifest before it has; None: not looked at.
    """
    chain, wrong = dict(manifest.chain), []
    facts = {name: one for name, one in chain.items() if name not in _COMPUTED}
    if previous is not None and chain.get("previous") != previous:
        wrong.append(f"it follows {_show(chain.get('previous'))}, not {_show(previous)}")
    if chain.get("digest") != _compute(manifest, facts):
        wrong.append("its digest is not that of its content")
    if "added" in chain and chain.get("added_digest") != _compute_added(_to_plain(manifest), chain):
        wrong.append("the digest of what was added to it is another one")
    return wrong


def find_digest(manifest: Manifest | None) -> str:
    """Return the digest of a manifest; "" if there is none."""
    return str(manifest.chain.get("digest", "")) if manifest is not None else ""


def find_steps(before: Manifest | None, manifest: Manifest) -> tuple[int, int]:
    """Return the steps that were done before a round and after it, from its manifest and that of
    the round before."""
    first = before.metrics.get("steps_done", 0) if before is not None else 0
    return first, manifest.metrics.get("steps_done", first)


def find_head(manifests: Sequence[Manifest]) -> str:
    """Return one hash of all sealed manifests of a run, in their order; "" if there are none."""
    links = [
        [one.chain["digest"], one.chain.get("added_digest", "")] for one in manifests if one.chain
    ]
    return _hash(links) if links else ""


_COMPUTED = ("digest", "added", "added_digest")


def _compute(manifest: Manifest, facts: Mapping[str, Any]) -> str:
    plain = _to_plain(manifest)
    for field, names in manifest.chain.get("added", {}).items():
        plain[field] = {key: one for key, one in plain.get(field, {}).items() if key not in names}
    plain = {field: value for field, value in plain.items() if value}
    return _hash([dict(facts), plain])


def _compute_added(plain: Mapping[str, Any], chain: Mapping[str, Any]) -> str:
    values = {
        field: {name: plain.get(field, {}).get(name) for name in names}
        for field, names in chain["added"].items()
    }
    return _hash([chain["digest"], values])


def _to_plain(manifest: Manifest) -> dict[str, Any]:
    """Return what a digest is of; empty fields are left out, as later versions may have more."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(manifest)))
    plain["origin"] = {name: one for name, one in plain["origin"].items() if name != "workdir"}
    return {name: value for name, value in plain.items() if name not in _ASIDE and value}


def _show(digest: object) -> str:
    return f"{digest[:12]}..." if isinstance(digest, str) and digest else "nothing"


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# --------------------------------------------------------------------------- what it is of


def hash_config(history: History, round: int, defaults: Mapping[str, Any] | None = None) -> str:
    """Return the hash of what a config says of results, as it was in a round.

    Fields with their default are left out, so that a start that spells out a default of the loss
    gives the same; so are paths, whose content is hashed instead, and how much a run computes.

    Args:
      defaults: those of the version that sealed the round; a field that is not among them was
        added by a later one. None: that version recorded none, and had those of this one.
    """
    config, now, found = history.config, list_defaults(history.config), {}
    changed = {path for segment in history.segments for path in segment["changed"]}
    changed |= {one.path for one in history.changes}
    known = now if defaults is None else defaults
    for path, value in schema.flatten(schema.to_plain(config)):
        if path in changed and roles.find_mark(Config, path).role_in(config.task) == "tuning":
            value = history.value_in(path, round)
        is_covered = path in known or (path not in now and is_of_results(path, config))
        if is_covered and value != known.get(path):
            found[path] = value
    return _hash(found)


def describe_config(history: History, round: int) -> dict[str, str]:
    """Return what a seal that is made now says of the config: its hash, the name of defaults."""
    defaults = list_defaults(history.config)
    config = hash_config(history, round, defaults)
    return {"config": config, "defaults": name_defaults(defaults)}


def hash_inputs(workdir: Path) -> dict[str, str]:
    """Return a hash for each field whose files have fingerprints in inputs.json."""
    path = workdir / INPUTS
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {
        field: _hash([{key: one[key] for key in one if key != "path"} for one in entries])
        for field, entries in sorted(known.items())
    }


def hash_rows(workdir: Path, first: int = 0, last: int | None = None) -> dict[str, Any]:
    """Return number and SHA-256 of the rows of metrics.jsonl for the steps after `first` to `last`.

    Rows of a whole round, which have a "round", are left out: the manifest has their values. The
    row of step 0, before all training, belongs to the steps after 0. Times are left out, and so is
    the order, in which rows of one step may come after a resume.

    Args:
      last: None: the rows of all steps.
    """
    path, rows = workdir / METRICS, []
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else ():
        row = json.loads(line)
        if "round" not in row and (last is None or _is_between(row["step"], first, last)):
            kept = {name: value for name, value in row.items() if not is_time(name)}
            rows.append(json.dumps(kept, sort_keys=True))
    digest = hashlib.sha256("".join(f"{row}\n" for row in sorted(rows)).encode())
    return {"count": len(rows), "sha256": digest.hexdigest()}


def _is_between(step: int, first: int, last: int) -> bool:
    return first < step <= last or step == first == 0 < last


def hash_sums(sums: Mapping[str, Any] | None) -> str:
    """Return the hash of the checksums of a checkpoint's arrays; "" if there is no checkpoint."""
    return "" if sums is None else _hash(sums)
