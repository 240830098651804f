"""Checksums of a checkpoint's arrays, one per stored chunk, which can be verified on any mesh.

A chunk is the part of an array on one device. It is identified by its bounds in the whole array, so
it can be found again on whatever mesh the array is restored:

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
    """Return the checksums of all chunks of `arrays`, the same on every process. All must call it.

    Each process reads from its own devices; a save that follows need not read the arrays again.
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
    """Return the checksums of the chunks that this process reads, and 0 for the others."""
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
    """Return the names of the arrays with a chunk whose checksum differs from that in `sums`.

    The result is the same on every process, and all must call this. A chunk is checked on a device
    that holds all of it. If no device does, the array was sharded differently when it was saved,
    and is gathered first.
    """
    names = sorted(arrays.keys() & sums.keys())
    wrong, failure = np.zeros([len(names)], np.uint64), None
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for index, name in enumerate(names):
            # One array at a time, since each is copied to the host's memory.
            array, wanted = arrays[name], _to_wanted(sums[name])
            if isinstance(array, jax.Array) and _is_cut_otherwise(array, wanted):
                array = _bring_together(array)  # on all processes, even after a failure
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
    """Return the chunks of an array with their checksums, parsed from a checkpoint's record."""
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
    """Tell whether no device holds all of some chunk; the same on every process."""
    return None in _find_holders(array, wanted).values()


def _own_chunks(
    array: jax.Array | np.ndarray, wanted: Mapping[Bounds, int]
) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (chunk, expected checksum) for the chunks that this process checks."""
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
    """Return a copy of an array on the host, without caching it in the array itself."""
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
    """Combine the processes' values; each process has filled in different places."""
    if jax.process_count() == 1:
        return values
    halves = np.ascontiguousarray(values).view(np.uint32)  # jax has no 64-bit types here
    gathered = multihost_utils.process_allgather(halves)
    joined: npt.NDArray[np.uint64] = np.bitwise_or.reduce(np.asarray(gathered), axis=0).view(
        np.uint64
    )
    return joined
