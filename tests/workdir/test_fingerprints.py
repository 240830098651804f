"""Fingerprints tell the same, grown and changed files apart, whatever the size."""

import json
import os

import pytest

from halos_jax.workdir import fingerprints
from halos_jax.workdir.fingerprints import BLOCK_BYTES, BLOCKS, compare, fingerprint

LINES = [json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(40)]


def write(path, lines):
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize(
    ("lines", "verdict"),
    [
        (LINES, "same"),
        (LINES + LINES[:1], "grown"),
        (LINES[::-1], "changed"),
        (LINES[:20], "changed"),
        (LINES[:-1], "changed"),
        ([LINES[0], *LINES], "changed"),
        ([*LINES[:9], LINES[9].replace("9", "8"), *LINES[10:]], "changed"),
        ([], "changed"),
        (LINES * 2, "grown"),
    ],
)
def test_what_has_become_of_a_small_file(tmp_path, lines, verdict):
    path = write(tmp_path / "a.jsonl", LINES)
    known = fingerprint(path, whole_limit=1 << 20)
    assert known.keys() == {"size", "whole"}
    write(path, lines)
    os.utime(path, (0, 0))
    assert compare(path, known) == verdict
    moved = path.rename(tmp_path / "b.jsonl")
    assert (compare(moved, known), compare(path, known)) == (verdict, "missing")


def test_a_large_file_is_known_by_its_header_and_fixed_blocks(tmp_path):
    """Of a file of 1 GiB, whose bytes are holes, 4 MiB are read; what is in them is seen."""
    path, size, header = tmp_path / "model.safetensors", 1 << 30, 300_000
    with open(path, "wb") as file:
        file.write((header - 8).to_bytes(8, "little"))
        file.truncate(size)
    known = fingerprint(path, whole_limit=1 << 20)
    assert known.keys() == {"size", "blocks"} and compare(path, known) == "same"
    step = (size - BLOCK_BYTES) / (BLOCKS - 1)
    seen = [8, header - 1, int(step) + 1000, int(step * 17) + 3, size - 1]
    unseen = [int(step * 17.5)]
    for place in seen + unseen:
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(b"\1")
        assert compare(path, known) == ("changed" if place in seen else "same"), place
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(b"\0")
    for change, verdict in ((1, "grown"), (-1, "changed")):
        os.truncate(path, size + change)
        assert compare(path, known) == verdict
        os.truncate(path, size)


def test_all_are_read_in_their_order_and_the_smallest_whole(tmp_path):
    paths = []
    for name, size in (("a", 900), ("b", 10), ("c", 600), ("d", 2000)):
        paths.append(tmp_path / name)
        paths[-1].write_bytes(os.urandom(size))
    found = fingerprints.fingerprint_all(paths, whole_limit=1000, total_limit=1000)
    kinds = ["whole" if "whole" in one else "blocks" for one in found]
    assert kinds == ["blocks", "whole", "whole", "blocks"]
    assert [one["size"] for one in found] == [900, 10, 600, 2000]
    assert fingerprints.compare_all(list(zip(paths, found, strict=True))) == ["same"] * 4
    assert fingerprints.hash_all(paths)[1:3] == [found[1]["whole"], found[2]["whole"]]
    paths[2].write_bytes(b"")
    paths[3].unlink()
    verdicts = fingerprints.compare_all(list(zip(paths, found, strict=True)))
    assert verdicts == ["same", "same", "changed", "missing"]


def test_an_empty_file_has_a_fingerprint(tmp_path):
    path = write(tmp_path / "a", [])
    known = fingerprint(path, whole_limit=0)
    assert compare(path, known) == "same"
    write(path, ["x"])
    assert compare(path, known) == "grown"
