import errno

import pytest

from halos_jax.checkpoints import failures
from halos_jax.checkpoints.failures import CheckpointError, DamagedError
from halos_jax.checkpoints.shelf import Shelf
from halos_jax.workdir.ledger import no_ledger


@pytest.fixture
def shelf(tmp_path):
    """A shelf with the checkpoints 3 and 5."""
    for save_id in (3, 5):
        (tmp_path / f"{save_id:08d}").mkdir()
    return Shelf(tmp_path, 1, no_ledger(tmp_path), is_writer=False)


def test_damage_names_what_is_left(shelf, tmp_path):
    error = failures.explain_damage(shelf, 5, "its record\nis short")
    assert isinstance(error, DamagedError)
    assert str(error) == (
        f"{tmp_path}/00000005 is incomplete or corrupt (its record is short); there are others: "
        "00000003; put its files back, or start a new run with --config.workdir=DIR"
    )
    (tmp_path / "00000003").rmdir()
    assert "no other one is left" in str(failures.explain_damage(shelf, 5, "gone"))


def test_a_mismatch_lists_every_array(tmp_path):
    error = failures.explain_mismatch(tmp_path, ["a: missing", "b: extra"])
    assert type(error) is CheckpointError
    assert str(error).splitlines()[:3] == [
        f"{tmp_path} does not fit this run: 2 array(s) differ:",
        "  - a: missing",
        "  - b: extra",
    ]


def test_a_write_that_fails_says_whether_the_disk_is_full(shelf):
    full = OSError(errno.ENOSPC, "No space left on device")
    text = str(failures.explain_write(shelf, 6, full, size=3 << 30))
    assert "checkpoint 00000005" in text and "3.0 GiB" in text
    text = str(failures.explain_write(shelf, 6, OSError(errno.EIO, "broken"), size=1))
    assert "00000006 could not be written (OSError: [Errno 5] broken)" in text


def test_what_memory_errors_are():
    assert failures.is_out_of_memory(MemoryError())
    assert failures.is_out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: 3 GiB"))
    assert not failures.is_out_of_memory(OSError("RESOURCE"))


def test_a_long_reason_keeps_its_end():
    assert failures.shorten("a\n  b") == "a b"
    text = failures.shorten("x" * 1000 + "the end")
    assert len(text) == 405 and text.endswith("the end")
