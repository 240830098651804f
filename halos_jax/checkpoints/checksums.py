"""Checksums of the arrays of a checkpoint, one for each chunk that is stored, on any mesh.

A chunk is what one device holds of an array; it is known by its bounds in the whole array, so that
it is found again whatever the mesh on which the array is restored:

    {"params/embed": [[[[0, 16], [0, 8]], "xxh64 of the chunk's bytes, row by row"], ...], ...}
"""

import concurrent.futures
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from jax.experimental import multihost_utils

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
    for array in arrays.values():
        for shard in _own_shards(array):
            shard.data.copy_to_host_async()
    chunks = [(name, bounds) for name, one in arrays.items() for bounds in _list_chunks(one)]
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
    found = _add_over_processes(found)
    sums: dict[str, list[tuple[Bounds, str]]] = {name: [] for name in arrays}
    for (name, bounds), value in zip(chunks, found, strict=True):
        sums[name].append((bounds, f"{int(value):016x}"))
    return sums


def find_wrong(arrays: Mapping[str, jax.Array | np.ndarray], sums: Sums) -> list[str]:
    """Return the names of those arrays that have a chunk with another checksum than `sums` say.

    The same on every process, all of which call. A chunk is looked at where a device holds it
    whole; an array that was cut otherwise is brought together first.
    """
    names = sorted(arrays.keys() & sums.keys())
    wrong = np.zeros([len(names)], np.uint64)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for index, name in enumerate(names):
            # One array at a time: each is a copy in the host's memory.
            checks = [
                (pool.submit(_hash, chunk), expected)
                for chunk, expected in _own_chunks(arrays[name], sums[name])
            ]
            wrong[index] = sum(check.result() != int(text, 16) for check, text in checks)
    if any(isinstance(array, jax.Array) for array in arrays.values()):
        wrong = _add_over_processes(wrong)
    return [name for name, count in zip(names, wrong, strict=True) if count]


def _own_shards(array: jax.Array) -> list[Any]:
    return [shard for shard in array.addressable_shards if shard.replica_id == 0]


def _list_chunks(array: jax.Array) -> list[Bounds]:
    indices = array.sharding.devices_indices_map(array.shape).values()
    return sorted({_to_bounds(index, array.shape) for index in indices})


def _to_bounds(index: Sequence[slice], shape: Sequence[int]) -> Bounds:
    return tuple(one.indices(size)[:2] for one, size in zip(index, shape, strict=True))


def _own_chunks(array: jax.Array | np.ndarray, sums: Sequence) -> Iterator[tuple[np.ndarray, str]]:
    """Yield (chunk, its checksum) for the chunks that this process is to look at."""
    wanted = [(tuple(map(tuple, bounds)), expected) for bounds, expected in sums]
    if isinstance(array, np.ndarray):
        yield from ((_cut(array, bounds), expected) for bounds, expected in wanted)
        return
    holders = {
        bounds: _find_holder(bounds, array.sharding.devices_indices_map(array.shape), array.shape)
        for bounds, _ in wanted
    }
    if None in holders.values():
        whole = _bring_together(array)
        yield from ((_cut(whole, bounds), expected) for bounds, expected in wanted)
        return
    for shard in array.addressable_shards:
        held = [one for one in wanted if holders[one[0]] == shard.device]
        data = _fetch(shard.data) if held else None
        first = [start for start, _ in _to_bounds(shard.index, array.shape)]
        for bounds, expected in held:
            inside = [(a - skip, b - skip) for (a, b), skip in zip(bounds, first, strict=True)]
            yield _cut(data, tuple(inside)), expected


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
    return multihost_utils.process_allgather(array, tiled=True)


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
    return xxhash.xxh3_64_intdigest(flat.view(np.uint8) if flat.size else b"")


def _add_over_processes(values: np.ndarray) -> np.ndarray:
    """Add up what the processes have found, each in places of its own."""
    if jax.process_count() == 1:
        return values
    halves = np.ascontiguousarray(values).view(np.uint32)  # jax has no 64 bits
    gathered = multihost_utils.process_allgather(halves)
    return np.bitwise_or.reduce(np.asarray(gathered), axis=0).view(np.uint64)
