"""The ledger: what it knows of a file at every instant, and which changes to it are seen."""

import errno
import hashlib
import itertools
import json
import os

import pytest

from halos_jax import storage
from halos_jax.storage import WorkdirError
from halos_jax.workdir import ledger as ledgers
from halos_jax.workdir.ledger import no_ledger, open_ledger, read_ledger


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def put(ledger, name, data: bytes) -> None:
    storage.write_bytes_atomic(ledger.workdir / name, data, note=ledger.note_file)


def check(ledger, name):
    return ledgers.check_entry(ledger.workdir, name, ledger.entries[name])


@pytest.fixture
def filled(tmp_path):
    """Return the ledger of four lines about three files."""
    ledger = open_ledger(tmp_path)
    put(ledger, "a.json", b"1")
    put(ledger, "b/c.json", b"22")
    (tmp_path / "grows.jsonl").write_bytes(b"one\ntwo\n")
    ledger.note_prefix(tmp_path / "grows.jsonl", 4, sha256(b"one\n"))
    put(ledger, "a.json", b"333")
    return ledger


def test_the_last_line_of_a_path_says_what_it_holds(filled, tmp_path):
    for ledger in (filled, open_ledger(tmp_path), read_ledger(tmp_path)):
        assert ledger.entries == {
            "a.json": {"size": 3, "sha256": sha256(b"333")},
            "b/c.json": {"size": 2, "sha256": sha256(b"22")},
            "grows.jsonl": {"prefix": 4, "sha256": sha256(b"one\n")},
        }
        assert [check(ledger, name) for name in ledger.entries] == [None] * 3
        assert ledger.find(tmp_path / "b" / "c.json")["size"] == 2
        assert ledger.find(tmp_path / "other") is None and not ledger.is_empty
        assert (len(ledger.chains), ledger.head) == (4, filled.head)
    lines = [json.loads(line) for line in (tmp_path / ledgers.FILE).open()]
    assert [line["path"] for line in lines] == ["a.json", "b/c.json", "grows.jsonl", "a.json"]
    assert [line["chain"] for line in lines] == list(filled.chains)


def test_a_file_that_has_changed_is_said(filled, tmp_path):
    (tmp_path / "a.json").write_bytes(b"334")
    assert check(filled, "a.json").startswith(f"a.json has sha256 {sha256(b'334')[:12]}...")
    (tmp_path / "a.json").write_bytes(b"3333")
    assert check(filled, "a.json") == "a.json has 4 bytes, expected 3"
    (tmp_path / "b" / "c.json").unlink()
    assert check(filled, "b/c.json") == "b/c.json is missing"
    # What a file has grown by since is not known yet; that its start is the same is.
    (tmp_path / "grows.jsonl").write_bytes(b"one\n2")
    assert check(filled, "grows.jsonl") is None
    (tmp_path / "grows.jsonl").write_bytes(b"ONE\ntwo\n")
    assert "grows.jsonl has sha256" in check(filled, "grows.jsonl")
    (tmp_path / "grows.jsonl").write_bytes(b"on")
    assert check(filled, "grows.jsonl") == "grows.jsonl has 2 bytes, expected 4 or more"


def test_a_path_outside_of_the_workdir_has_its_whole_name(tmp_path):
    ledger = open_ledger(tmp_path)
    (tmp_path / "run").mkdir()
    inner = open_ledger(tmp_path / "run")
    assert ledger.name(tmp_path / "x" / "y") == "x/y"
    assert inner.name(tmp_path / "x") == str(tmp_path / "x")


def test_what_is_known_already_takes_no_line(filled, tmp_path):
    before = (tmp_path / ledgers.FILE).read_bytes()
    put(filled, "a.json", b"333")
    filled.note_gone(tmp_path / "never")
    assert (tmp_path / ledgers.FILE).read_bytes() == before


def test_readers_and_no_ledger_write_nothing(filled, tmp_path):
    before = (tmp_path / ledgers.FILE).read_bytes()
    put(read_ledger(tmp_path), "d.json", b"4")
    assert (tmp_path / ledgers.FILE).read_bytes() == before
    put(no_ledger(tmp_path / "new"), "d.json", b"4")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["d.json"]


def test_two_runs_that_write_the_same_have_other_chains(tmp_path):
    heads = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        ledger = open_ledger(tmp_path / name)
        put(ledger, "a.json", b"1")
        heads.add(ledger.head)
    assert len(heads) == 2


def edits(lines: list[bytes]):
    """Yield (name, lines) of every change to a ledger but for lines cut off at its end."""
    for index, line in enumerate(lines):
        for at in range(len(line) - 1):
            flipped = bytes([*line[:at], line[at] ^ 1, *line[at + 1 :]])
            yield f"bit {index} {at}", [*lines[:index], flipped, *lines[index + 1 :]]
        yield f"doubled {index}", [*lines[: index + 1], *lines[index:]]
        if index + 1 < len(lines):
            yield f"dropped {index}", [*lines[:index], *lines[index + 1 :]]
            yield (
                f"torn {index}",
                [*lines[:index], line[:9] + lines[index + 1], *lines[index + 2 :]],
            )
    for one, two in itertools.combinations(range(len(lines)), 2):
        swapped = list(lines)
        swapped[one], swapped[two] = lines[two], lines[one]
        yield f"swapped {one} {two}", swapped


def test_a_line_that_is_changed_dropped_doubled_or_moved_is_refused(filled, tmp_path):
    path = tmp_path / ledgers.FILE
    lines = path.read_bytes().splitlines(keepends=True)
    count = 0
    for name, edited in edits(lines):
        path.write_bytes(b"".join(edited))
        with pytest.raises(WorkdirError, match=r"ledger.jsonl:\d: not as the run wrote it"):
            pytest.fail(f"{name}: {read_ledger(tmp_path).entries}")
        count += 1
    assert count > 500


def test_a_torn_last_line_is_one_that_was_not_written(filled, tmp_path):
    path = tmp_path / ledgers.FILE
    lines = path.read_bytes().splitlines(keepends=True)
    for cut in (1, 5, len(lines[-1]) - 1):
        path.write_bytes(b"".join(lines)[:-cut])
        assert read_ledger(tmp_path).entries["a.json"]["size"] == 1
        ledger = open_ledger(tmp_path)
        assert path.read_bytes() == b"".join(lines[:-1])
        ledger.note_file(tmp_path / "a.json", 3, sha256(b"333"))
        assert path.read_bytes() == b"".join(lines)


def test_what_was_announced_and_not_done_is_taken_back_once(filled, tmp_path):
    """A kill between the line and the file leaves the file of before, and no later line."""
    filled.note_file(tmp_path / "a.json", 1, sha256(b"4"))
    filled.note_file(tmp_path / "new.json", 1, sha256(b"5"))
    ledger = open_ledger(tmp_path)
    assert not ledger.undo("a.json")  # not the last line: something was written after it
    assert ledger.undo("new.json") and ledger.find(tmp_path / "new.json") is None
    ledger.note_file(tmp_path / "b" / "c.json", 1, sha256(b"4"))
    ledger = open_ledger(tmp_path)
    assert check(ledger, "b/c.json") and ledger.undo("b/c.json")
    assert open_ledger(tmp_path).entries["b/c.json"] == {"size": 2, "sha256": sha256(b"22")}
    # A file that is neither the new nor the old one is somebody else's.
    ledger.note_file(tmp_path / "b" / "c.json", 1, sha256(b"4"))
    (tmp_path / "b" / "c.json").write_bytes(b"23")
    assert not open_ledger(tmp_path).undo("b/c.json")


def test_a_removal_that_was_not_done_is_taken_back(filled, tmp_path):
    filled.note_gone(tmp_path / "a.json")
    assert check(filled, "a.json") == "a.json is there again"
    ledger = open_ledger(tmp_path)
    assert ledger.undo("a.json") and ledger.find(tmp_path / "a.json")["size"] == 3
    ledger.note_gone(tmp_path / "a.json")
    (tmp_path / "a.json").unlink()
    ledger = open_ledger(tmp_path)
    assert check(ledger, "a.json") is None and ledger.find(tmp_path / "a.json") is None


@pytest.mark.parametrize("function", ["write", "fsync"])
def test_a_full_disk_leaves_no_half_line(filled, tmp_path, monkeypatch, function):
    before = (tmp_path / ledgers.FILE).read_bytes()

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(WorkdirError, match="free some space"):
            filled.note_file(tmp_path / "d.json", 1, "")
    assert (tmp_path / ledgers.FILE).read_bytes() == before
    put(filled, "d.json", b"4")
    assert open_ledger(tmp_path).head == filled.head


def test_a_line_that_has_happened_is_kept_though_the_one_before_fits_too(tmp_path):
    """A folder that has grown by a file which no reader takes is both."""
    ledger, folder = open_ledger(tmp_path), tmp_path / "final"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    ledger.note_tree(folder, folder)
    (folder / "README.md").write_text("new")
    ledger.note_tree(folder, folder)
    assert not ledger.undo("final")
    assert set(ledger.find(folder)["files"]) == {"README.md", "config.json"}
