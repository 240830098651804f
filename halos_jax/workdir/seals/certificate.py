"""The certificate of a run: a short file beside its exported weights, which mode=verify checks.

    workdir/final/certificate.json
    {
      "task": "online", "program": "halos_jax 0.1.0",
      "chain": {"manifests": 5, "head": "..."}     one hash of all manifests, in their order
      "config": "...", "inputs": {"data.train": "...", ...}
      "metrics": {"count": 24, "sha256": "..."},
      "weights": {"model.safetensors": "sha256", ...},
      "verified": null, or what a verification has found
      "sha256": the hash of all other fields
    }

The run itself writes it, with "verified": null, together with the weights; a verification of a
finished workdir replaces it. It has no signature: whoever makes a whole workdir anew can make one
for it. It is worth what the place is worth in which its head was published.
"""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import halos_jax
from halos_jax import storage
from halos_jax.workdir import changes, execution, intact, manifests
from halos_jax.workdir.seals import chain

FILE = "certificate.json"
_SEAL = "sha256"
_MARKS = ("<!-- certificate of the run -->", "<!-- end of the certificate -->")  # in a model card
_WEIGHTS = ("*.safetensors", "adapter/*.safetensors")


def find_certificate(workdir: Path) -> Path:
    """Return the path of the certificate in a workdir."""
    return workdir / intact.FINAL / FILE


def make_certificate(
    workdir: Path,
    folder: Path,
    *,
    count: int | None = None,
    verified: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the certificate of a run, from the files in its workdir.

    Args:
      folder: its exported weights, which may not have their name yet.
      count: how many manifests it is of; None: all that are complete.
      verified: what a verification has found; None: nobody has looked.
    """
    known = [manifests.load_manifest(path.parent) for path in intact.find_manifests(workdir)]
    sealed = sorted(
        (one for one in known if one is not None and one.chain), key=lambda one: one.round
    )[:count]
    history, last = changes.read_recorded(workdir), sealed[-1].round if sealed else 0
    defaults = execution.read_defaults(workdir)
    name = sealed[-1].chain.get("defaults", "") if sealed else next(reversed(defaults), "")
    made = {
        "task": history.config.task,
        "program": f"halos_jax {halos_jax.__version__}",
        "chain": {"manifests": len(sealed), "head": chain.find_head(sealed)},
        "config": chain.hash_config(history, last, defaults.get(name)),
        "inputs": chain.hash_inputs(workdir),
        "metrics": chain.hash_rows(workdir),
        "weights": _hash_weights(folder),
        "verified": dict(verified) if verified is not None else None,
    }
    return {**made, _SEAL: hash_certificate(made)}


def write_certificate(path: Path, certificate: Mapping[str, Any]) -> None:
    """Write or replace a certificate."""
    storage.write_json_atomic(path, certificate)


def read_certificate(path: Path) -> dict[str, Any] | None:
    """Read a certificate; None if there is none. It may have been changed: see `is_whole`.

    Raises:
      ValueError: if it is not a JSON object.
    """
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a JSON object")
    return found


def hash_certificate(certificate: Mapping[str, Any]) -> str:
    """Return the hash of all fields of a certificate but that for the hash itself."""
    rest = {name: value for name, value in certificate.items() if name != _SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def is_whole(certificate: Mapping[str, Any]) -> bool:
    """Tell whether a certificate's own hash is that of its fields."""
    return certificate.get(_SEAL) == hash_certificate(certificate)


def describe_certificate(made: Mapping[str, Any]) -> str:
    """Return a paragraph about a certificate for a model card."""
    verified, told = made["verified"], "Nobody has verified the run yet."
    if verified is not None:
        counts = verified["counts"]
        told = (
            f"The run that made these weights was verified on {verified['time'][:10]} "
            f"({verified['devices']} x {verified['device']}): {counts['passed']} checks passed, "
            f"{counts['not checked']} could not be made."
        )
    return "\n".join(
        (
            _MARKS[0],
            f"{told} The head of its chain is",
            f"`{made['chain']['head'] or made['sha256']}`; `{FILE}` beside this file "
            "has the hashes of the weights, the config and the inputs. Whoever has the workdir can "
            "check all of it: `python -m halos_jax.main --config=DIR/config.json "
            "--config.mode=verify`.",
            _MARKS[1],
        )
    )


def split_card(text: str) -> tuple[str, str]:
    """Return what stands in a model card before and after the paragraph about the certificate."""
    before, _, rest = text.partition(_MARKS[0])
    _, end, after = rest.partition(_MARKS[1])
    return (before, after) if end else (text, "\n")


def _hash_weights(folder: Path) -> dict[str, str]:
    paths = sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern))
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(storage.hash_file, paths))
    names = [path.relative_to(folder).as_posix() for path in paths]
    return dict(zip(names, hashes, strict=True))
