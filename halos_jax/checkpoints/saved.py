"""The record of a checkpoint: one JSON object beside the arrays, in the same commit.

format        2; format 1, of an older version, has only the round state
round_state   the position in the run at which it was taken
arrays        name -> shape and dtype
sums          name -> checksums of the stored chunks, see `checksums.py`
ledger        the chain of the run's ledger at that time
sha256        the hash of all other fields
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
# The errors that `read_record` raises if a record is not as it was written.
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
    """Return the file that holds a checkpoint's record."""
    return Path(folder) / f"{save_id:08d}" / "round" / "metadata"


def make_record(
    round_state: Mapping[str, Any], arrays: Mapping[str, Any], sums: Mapping[str, Any], ledger: str
) -> dict[str, Any]:
    """Return the record for a checkpoint of `arrays`; TypeError if it would not be JSON."""
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
    """Read the record of a checkpoint; raise one of `ERRORS` if it is not as it was written."""
    # Read it as plain JSON rather than with Orbax, which would also read the arrays' metadata.
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
