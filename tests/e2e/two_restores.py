"""One process of two that save checkpoints together, spoil them, and restore what is left.

Arguments: address of the coordinator, number of this process, folder, and what is done to the half
of the newest checkpoint that process 1 wrote: "deleted" or "flipped". Prints a JSON line for each
restore: {"step", "value"} or {"error": message}, with "seconds".
"""

import json
import logging
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from halos_jax.checkpoints.failures import CheckpointError
from halos_jax.checkpoints.store import open_checkpoints
from halos_jax.sharding import wait_for_all
from halos_jax.types import TrainState

SIZE = 1 << 20


def make_state(step: int) -> TrainState:
    """Return a state of one array of random numbers, half of it on each process."""
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(AxisType.Auto,))
    values = np.random.default_rng(step).random(SIZE, np.float32)

    def place(array: np.ndarray, *axes: str) -> jax.Array:
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return TrainState(place(np.array(step, np.int32)), {"w": place(values, "fsdp")}, ())


def spoil(checkpoint: Path, how: str) -> None:
    """Damage the files that process 1 has written the arrays to, and nothing else."""
    files = [path for path in checkpoint.glob("state/ocdbt.process_1/d/*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    assert largest.stat().st_size > SIZE, "the chunk is not in a file of its own process"
    if how == "deleted":
        largest.unlink()
    else:
        data = bytearray(largest.read_bytes())
        data[len(data) // 2] ^= 1
        largest.write_bytes(data)


def restore(checkpoints, state: TrainState) -> None:
    """Restore the newest checkpoint that is whole, and print what comes of it."""
    start = time.monotonic()
    try:
        found, record = checkpoints.restore_newest(state)
    except CheckpointError as error:
        line = {"error": str(error)}
    else:
        (own,) = found.params["w"].addressable_shards
        line = {"step": record["step"], "value": float(np.asarray(own.data)[7])}
    print(json.dumps(line | {"seconds": time.monotonic() - start}), flush=True)


def main() -> None:
    """Save twice; spoil and restore one after the other."""
    address, number, folder, how = sys.argv[1:]
    logging.basicConfig(level=logging.WARNING)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=int(number))
    checkpoints = open_checkpoints(folder, keep=2)
    state = make_state(0)
    for step in (1, 2):
        checkpoints.save(step, make_state(step), {"round": step, "in_stage": False})
    checkpoints.finish()
    for save_id in (2, 1):
        if number == "0":
            spoil(Path(folder) / f"{save_id:08d}", how)
        wait_for_all(f"spoilt {save_id}")
        restore(checkpoints, state)
    wait_for_all("end")


if __name__ == "__main__":
    main()
