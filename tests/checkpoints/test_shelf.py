"""Checkpoints that are missed, or of another run; what stays is tested with `Checkpoints`."""

import contextlib
import json
import shutil
import threading
import time

import jax.numpy as jnp
import pytest

from halos_jax.checkpoints.failures import CheckpointError
from halos_jax.checkpoints.shelf import Shelf
from halos_jax.checkpoints.store import open_checkpoints
from halos_jax.workdir.ledger import open_ledger

END = {"round": 1, "in_stage": False}


def make_state() -> dict:
    return {"w": jnp.arange(8.0), "step": jnp.int32(2)}


def test_a_checkpoint_that_is_gone_or_of_another_run_is_missed(tmp_path, caplog):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        ledger = open_ledger(tmp_path / name)
        ledger.note_prefix(tmp_path / name / "metrics.jsonl", 0, "")
        checkpoints = open_checkpoints(tmp_path / name / "checkpoints", keep=2, ledger=ledger)
        for step in (2, 3):
            checkpoints.save(step, make_state(), END)
        checkpoints.close()
    folder = tmp_path / "one" / "checkpoints"

    def restore():
        ledger = open_ledger(tmp_path / "one")
        reopened = open_checkpoints(folder, keep=2, ledger=ledger)
        try:
            return reopened.restore_newest(make_state())
        finally:
            reopened.close()

    assert restore()[1]["step"] == 3 and not caplog.records
    shutil.rmtree(folder / "00000002")
    (tmp_path / "two" / "checkpoints" / "00000002").rename(folder / "00000002")
    assert restore()[1]["step"] == 2
    assert "its record is not the one that was written" in caplog.text
    shutil.rmtree(folder / "00000001")
    with pytest.raises(CheckpointError, match=r"00000001 is missing, and no other"):
        restore()


def test_an_id_is_never_used_again(tmp_path):
    ledger = open_ledger(tmp_path)
    shelf = Shelf(tmp_path / "checkpoints", 1, ledger, True)
    shelf.clear()
    assert shelf.next_id() == 1
    for save_id in (3, 4):
        shelf.path(save_id).mkdir()
        ledger.note(shelf.path(save_id), record="x")
    shelf.set_aside(4)
    assert (shelf.ids(), shelf.missing(), shelf.next_id()) == ([3], [], 5)
    shutil.rmtree(shelf.path(3))
    assert shelf.missing() == [3]
    shelf.forget([3])
    assert shelf.missing() == [] and shelf.next_id() == 5


def test_nothing_is_pickled_and_what_is_no_json_fails_at_once(tmp_path):
    checkpoints = open_checkpoints(tmp_path, keep=1)
    with pytest.raises(TypeError):
        checkpoints.save(0, make_state(), {"loss": jnp.ones(2)})
    assert list(tmp_path.iterdir()) == []
    checkpoints.save(0, make_state(), END)
    checkpoints.close()
    json.loads((tmp_path / "00000001" / "round" / "metadata").read_text())
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pkl", ".pickle", ".npy")]


def test_what_a_failed_save_still_writes_goes_too(tmp_path):
    """Threads of Orbax outlive the error: they make files while the folder is being removed."""
    doomed = tmp_path / "checkpoints" / "00000002.orbax-checkpoint-tmp" / "state"
    doomed.mkdir(parents=True)
    stop = time.monotonic() + 0.3

    def write():
        with contextlib.suppress(OSError):
            while time.monotonic() < stop:
                (doomed / str(time.monotonic_ns())).touch()

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    Shelf(tmp_path / "checkpoints", 1, open_ledger(tmp_path), True).clear()
    assert not list((tmp_path / "checkpoints").iterdir())
    for thread in threads:
        thread.join()


def names(folder):
    return sorted(int(path.name) for path in folder.iterdir())


def test_the_ends_of_rounds_that_are_named_stay_until_others_are(tmp_path):
    checkpoints, state = open_checkpoints(tmp_path, keep=1), make_state()

    def save(round, in_stage=False):
        checkpoints.save(2, state, {"round": round, "in_stage": in_stage})
        checkpoints.finish()
        return names(tmp_path)

    checkpoints.keep_rounds({2})
    assert [save(1), save(2), save(3, True), save(3)] == [[1], [2], [2, 3], [2, 4]]
    assert [save(4, True), save(4)] == [[2, 4, 5], [2, 6]]
    checkpoints.keep_rounds({4})
    assert names(tmp_path) == [6]
    checkpoints.keep_rounds(None)  # of all rounds, but none that was taken within one
    assert [save(5), save(6, True), save(6)] == [[6, 7], [6, 7, 8], [6, 7, 9]]
    assert checkpoints.find_round_end(5) == 7 and checkpoints.find_round_end(2) is None
    (tmp_path / "00000007" / "round" / "metadata").write_text("{")
    assert checkpoints.find_round_end(5) is None and checkpoints.find_round_end(4) == 6
    checkpoints.close()


def test_what_is_set_aside_stays_until_the_next_checkpoint_whatever_is_named(tmp_path):
    checkpoints, state = open_checkpoints(tmp_path, keep=1), make_state()
    checkpoints.keep_rounds(None)
    for round in (1, 2):
        checkpoints.save(2, state, {"round": round, "in_stage": False})
    checkpoints.finish()
    (tmp_path / "00000002" / "round" / "metadata").write_text("{")
    assert checkpoints.restore_newest(state)[1]["round"] == 1
    checkpoints.keep_rounds({1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001", "00000002.damaged"]
    checkpoints.close()
