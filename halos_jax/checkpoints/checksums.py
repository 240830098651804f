"""Checksums of the arrays of a checkpoint, one for each chunk that is stored, on any mesh.

A chunk is what one device holds of an array; it is known by its bounds in the whole array, so that
it is found again whatever the mesh on which the array is restored:

    {"params/embed": [[[[0, 16], [0, 8]], "xxh64 of the chunk's bytes, row by row"], ...], ...}
"""

import concurrent.futures
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import xxhash
from jax.experimental import multihost_utils

from halos_jax import processes

Bounds = tuple[tuple[int, int], ...]
Sums = Mapping[str, Sequence[tuple[Any, str]]]  # name -> (bounds, checksum) of its chunks

_THREADS = 8


def compute(arrays: Mapping[str, jax.Array]) -> dict[str, list[tuple[Bounds, str]]]:
    """Return the checksums of all chunks of `arrays`; the same on every process, all of which call.

    Each process reads its own devices; what it reads, a save that follows need not read again.
    """
    arrays = {
        name: one if isinstance(one, jax.Array) else jnp.asarray(one)
        for name, one in arrays.items()
    }
    chunks = [(name, bounds) for name, one in arrays.items() for bounds in _list_chunks(one)]
    found = _add_over_processes(processes.run_on_all(lambda: _hash_own(arrays, chunks)))
    sums: dict[str, list[tuple[Bounds, str]]] = {name: [] for name in arrays}
    for (name, bounds), value in zip(chunks, found, strict=True):
        sums[name].append((bounds, f"{int(value):016x}"))
    return sums


def _hash_own(
    arrays: Mapping[str, jax.Array], chunks: Sequence[tuple[str, Bounds]]
) -> npt.NDArray[np.uint64]:
    """Return the checksums of those chunks that this process is to read, 0 for the others."""
    for array in arrays.values():
        for shard in _own_shards(array):
            shard.data.copy_to_host_async()
    place = {chunk: index for index, chunk in enumerate(chunks)}
    found = np.zeros([len(chunks)], np.uint64)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        pending = {}
        for name, array in arrays.items():
            for shard in _own_shards(array):
                index = place[name, _to_bounds(shard.index, array.shape)]
                pending[index] = pool.submit(_hash, np.asarray(shard.data))
        for index, future in pending.items():
            found[index] = future.result()
    return found


def find_wrong(arrays: Mapping[str, jax.Array | np.ndarray], sums: Sums) -> list[str]:
    """Return the names of those arrays that have a chunk with another checksum than `sums` say.

    The same on every process, all of which call. A chunk is looked at where a device holds it
    whole; an array that was cut otherwise is brought together first.
    """
    names = sorted(arrays.keys() & sums.keys())
    wrong, failure = np.zeros([len(names)], np.uint64), None
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for index, name in enumerate(names):
            # One array at a time: each is a copy in the host's memory.
            array, wanted = arrays[name], _to_wanted(sums[name])
            if isinstance(array, jax.Array) and _is_cut_otherwise(array, wanted):
                array = _bring_together(array)  # which all processes do, whatever has failed
            try:
                checks = [
                    (pool.submit(_hash, chunk), expected)
                    for chunk, expected in _own_chunks(array, wanted)
                ]
                wrong[index] = sum(check.result() != expected for check, expected in checks)
            except Exception as error:
                failure = failure or error
    if any(isinstance(array, jax.Array) for array in arrays.values()):
        processes.fail_together(failure)
        wrong = _add_over_processes(wrong)
    elif failure is not None:
        raise failure
    return [name for name, count in zip(names, wrong, strict=True) if count]


def _to_wanted(sums: Sequence[tuple[Any, str]]) -> dict[Bounds, int]:
    """Return the chunks of an array with their checksums, from what a record says of them."""
    return {
        tuple((int(start), int(stop)) for start, stop in bounds): int(text, 16)
        for bounds, text in sums
    }


def _own_shards(array: jax.Array) -> list[Any]:
    return [shard for shard in array.addressable_shards if shard.replica_id == 0]


def _list_chunks(array: jax.Array) -> list[Bounds]:
    indices = array.sharding.devices_indices_map(array.shape).values()
    return sorted({_to_bounds(index, array.shape) for index in indices})


def _to_bounds(index: Sequence[slice], shape: Sequence[int]) -> Bounds:
    return tuple(one.indices(size)[:2] for one, size in zip(index, shape, strict=True))


def _find_holders(array: jax.Array, wanted: Iterable[Bounds]) -> dict[Bounds, Any]:
    """Return, for each chunk, the first device that holds all of it, or None."""
    indices = array.sharding.devices_indices_map(array.shape)
    return {bounds: _find_holder(bounds, indices, array.shape) for bounds in wanted}


def _is_cut_otherwise(array: jax.Array, wanted: Iterable[Bounds]) -> bool:
    """Tell whether some chunk lies on no device whole; the same on every process."""
    return None in _find_holders(array, wanted).values()


def _own_chunks(
    array: jax.Array | np.ndarray, wanted: Mapping[Bounds, int]
) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (chunk, its checksum) for the chunks that this process is to look at."""
    if isinstance(array, np.ndarray):
        yield from ((_cut(array, bounds), expected) for bounds, expected in wanted.items())
        return
    holders = _find_holders(array, wanted)
    for shard in array.addressable_shards:
        held = [bounds for bounds in wanted if holders[bounds] == shard.device]
        if not held:
            continue
        data = _fetch(shard.data)
        first = [start for start, _ in _to_bounds(shard.index, array.shape)]
        for bounds in held:
            inside = [(a - skip, b - skip) for (a, b), skip in zip(bounds, first, strict=True)]
            yield _cut(data, tuple(inside)), wanted[bounds]


def _find_holder(bounds: Bounds, indices: Mapping[Any, Any], shape: Sequence[int]) -> Any:
    """Return the first device that holds all of a chunk, or None."""
    for device in sorted(indices, key=lambda one: one.id):
        held = _to_bounds(indices[device], shape)
        if all(a <= c and d <= b for (a, b), (c, d) in zip(held, bounds, strict=True)):
            return device
    return None


def _bring_together(array: jax.Array) -> np.ndarray:
    if array.is_fully_addressable:
        return _fetch(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _fetch(array: jax.Array) -> np.ndarray:
    """Return the host's copy of an array, which the array itself does not keep."""
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return np.asarray(array)
    return np.asarray(jax.device_put(array, host))


def _cut(array: np.ndarray, bounds: Bounds) -> np.ndarray:
    return array[tuple(slice(start, stop) for start, stop in bounds)]


def _hash(chunk: np.ndarray) -> int:
    flat = np.ascontiguousarray(chunk).reshape(-1)
    return xxhash.xxh3_64_intdigest(flat.view(np.uint8).data if flat.size else b"")


def _add_over_processes(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Add up what the processes have found, each in places of its own."""
    if jax.process_count() == 1:
        return values
    halves = np.ascontiguousarray(values).view(np.uint32)  # jax has no 64 bits
    gathered = multihost_utils.process_allgather(halves)
    joined: npt.NDArray[np.uint64] = np.bitwise_or.reduce(np.asarray(gathered), axis=0).view(
        np.uint64
    )
    return joined
