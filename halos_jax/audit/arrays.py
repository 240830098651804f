"""The arrays of the checkpoints, read whole and compared with their checksums."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from halos_jax.audit.findings import Finding, compare
from halos_jax.audit.opened import Opened
from halos_jax.checkpoints import saved
from halos_jax.checkpoints.failures import CheckpointError
from halos_jax.checkpoints.store import read_checkpoints

FOLDER = "checkpoints"


def check_arrays(opened: Opened) -> Iterator[Finding]:
    """Read each checkpoint into the host's memory, and compare it with its checksums."""
    folder = opened.workdir / FOLDER
    if not folder.is_dir():
        return
    checkpoints, wrong, size = read_checkpoints(folder), [], 0
    try:
        ids = checkpoints.list_ids()
        for save_id in ids:
            try:
                found = saved.read_record(saved.find_record(folder, save_id)).arrays
                checkpoints.restore(_make_template(found), save_id)
            except (CheckpointError, *saved.ERRORS) as error:
                if saved.find_record(folder, save_id).exists():  # else the run has just deleted it
                    wrong.append(f"{save_id:08d}: {error}")
            else:
                size += len(found)
    finally:
        checkpoints.close()
    what = "arrays have their checksums"
    yield compare("checkpoints", what, wrong, size, unit=f"arrays of {len(ids)}")


def _make_template(arrays: Mapping[str, Any]) -> Any:
    """Return a nested dict of arrays on the host, whose pages are not touched yet."""
    flat = {name: np.empty(shape, jnp.dtype(dtype)) for name, (shape, dtype) in arrays.items()}
    return traverse_util.unflatten_dict(flat, sep="/")
