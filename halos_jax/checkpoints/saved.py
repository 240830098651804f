"""What a checkpoint says of itself: one JSON object beside the arrays, in the same commit.

format        2; 1 is of a version without what stands below
round_state   where in the run it was taken
arrays        name -> shape and dtype
sums          name -> checksums of the stored chunks, see `checksums.py`
ledger        the chain of the run's ledger when it was taken
sha256        of all the rest
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halos_jax.checkpoints.arrays import describe_array

FORMAT = 2
_READABLE = (1, 2)
# What `read_record` raises where a record is not as it was written.
ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError)


@dataclasses.dataclass(frozen=True)
class Saved:
    """The record of a checkpoint, read and checked; made by `read_record`."""

    round_state: Mapping[str, Any]
    arrays: Mapping[str, tuple[tuple[int, ...], str]]
    sums: Mapping[str, Any]
    ledger: str

    @property
    def is_in_stage(self) -> bool:
        return bool(self.round_state.get("in_stage"))


def find_record(folder: str | Path, save_id: int) -> Path:
    """Return the file of a checkpoint with its record."""
    return Path(folder) / f"{save_id:08d}" / "round" / "metadata"


def make_record(
    round_state: Mapping[str, Any], arrays: Mapping[str, Any], sums: Mapping[str, Any], ledger: str
) -> dict[str, Any]:
    """Return the JSON object of a checkpoint of `arrays`; TypeError where it is none."""
    record = {
        "format": FORMAT,
        "round_state": dict(round_state),
        "arrays": {name: describe_array(leaf) for name, leaf in arrays.items()},
        "sums": dict(sums),
        "ledger": ledger,
    }
    text = json.dumps(record | {"sha256": _hash(record)}, allow_nan=False)
    made: dict[str, Any] = json.loads(text)
    return made


def read_record(path: Path) -> Saved:
    """Read the record of a checkpoint; one of `ERRORS` where it is not as it was written."""
    # Plain JSON, read without Orbax, which would look at the arrays' metadata too.
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["format"] not in _READABLE:
        raise ValueError(f"its format is {record['format']}, this program reads {_READABLE}")
    if (record["format"] >= FORMAT or "sha256" in record) and record.pop("sha256") != _hash(record):
        raise ValueError("its record has another hash than when it was written")
    if not isinstance(record["round_state"], dict):
        raise ValueError("its round state is not a JSON object")
    arrays = {
        name: (tuple(shape), dtype) for name, (shape, dtype) in dict(record["arrays"]).items()
    }
    return Saved(record["round_state"], arrays, record.get("sums", {}), record.get("ledger", ""))


def _hash(record: Mapping[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
