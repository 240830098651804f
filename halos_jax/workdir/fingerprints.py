"""Fingerprints of files: of all bytes for small files, of fixed blocks for large ones.

    {"size": 812, "whole": "xxh128 of all bytes"}
    {"size": 4976698672, "blocks": "xxh128 of the header and of 64 blocks"}

A fingerprint depends on the content alone, not on a file's time or name. If a file has only been
appended to, its first bytes still have the fingerprint of the old file.
"""

import concurrent.futures
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

import xxhash

# How many blocks are read, and of which size, if a file is too large to read whole at every start.
BLOCKS, BLOCK_BYTES = 64, 1 << 16
# A safetensors file begins with the length of its header, 8 bytes, and the header.
_LONGEST_HEADER = 1 << 24
_READERS = 16  # concurrent reads: on a network file system most of a read is waiting
_CHUNK = 1 << 22

Print = Mapping[str, Any]
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
Verdict = Literal["same", "grown", "changed", "missing"]


def fingerprint(path: Path, *, whole_limit: int, stop: int | None = None) -> dict[str, Any]:
    """Return the fingerprint of a file.

    Args:
      whole_limit: the size in bytes up to which a file is read whole.
      stop: treat the file as if it ended after this many bytes.
    """
    size = os.stat(path).st_size if stop is None else stop
    with open(path, "rb") as stream:
        if size <= whole_limit:
            return {"size": size, "whole": _hash_whole(stream, size)}
        return {"size": size, "blocks": _hash_blocks(stream, size)}


def fingerprint_all(
    paths: Iterable[Path], *, whole_limit: int, total_limit: int | None = None
) -> list[dict[str, Any]]:
    """Return the fingerprints of several files, in their order.

    Args:
      total_limit: how many bytes of files to read whole in all, beginning with the smallest files.
    """
    paths = list(paths)
    sizes = [os.stat(path).st_size for path in paths]
    limits = [whole_limit] * len(paths)
    if total_limit is not None:
        left = total_limit
        for index in sorted(range(len(paths)), key=sizes.__getitem__):
            left -= sizes[index]
            limits[index] = whole_limit if left >= 0 else 0
    return _map(
        lambda both: fingerprint(both[0], whole_limit=both[1]),
        list(zip(paths, limits, strict=True)),
    )


def compare(path: Path, known: Print) -> Verdict:
    """Compare a file with the fingerprint `known`.

    The verdict is "grown" if the file is longer but begins with its old content.
    """
    if not path.is_file():
        return "missing"
    size = os.stat(path).st_size
    if size < known["size"]:
        return "changed"
    limit = known["size"] if "whole" in known else 0
    found = fingerprint(path, whole_limit=limit, stop=known["size"])
    key = "whole" if "whole" in known else "blocks"
    if found.get(key) != known[key]:
        return "changed"
    return "same" if size == known["size"] else "grown"


def compare_all(pairs: Sequence[tuple[Path, Print]]) -> list[Verdict]:
    """Compare several files with their fingerprints; return the verdicts in the same order."""
    return _map(lambda both: compare(*both), pairs)


def hash_all(paths: Sequence[Path]) -> list[str]:
    """Return the xxh128 of all bytes of each file, in order, however large the files are."""

    def hash_one(path: Path) -> str:
        with open(path, "rb") as stream:
            return _hash_whole(stream, os.stat(path).st_size)

    return _map(hash_one, paths)


def _hash_whole(stream: BinaryIO, size: int) -> str:
    digest, left = xxhash.xxh3_128(), size
    while left > 0 and (data := stream.read(min(left, _CHUNK))):
        digest.update(data)
        left -= len(data)
    return digest.hexdigest()


def _hash_blocks(stream: BinaryIO, size: int) -> str:
    digest = xxhash.xxh3_128()
    header = 8 + int.from_bytes(stream.read(8), "little")
    places = [(0, min(header, size))] if header <= _LONGEST_HEADER else []
    last = size - BLOCK_BYTES
    places += [(max(last * index // (BLOCKS - 1), 0), BLOCK_BYTES) for index in range(BLOCKS)]
    for start, length in places:
        stream.seek(start)
        digest.update(stream.read(min(length, size - start)))
    return digest.hexdigest()


def _map(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(function, items))
