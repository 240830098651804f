"""The record of a checkpoint is what was written, or an error."""

import json

import numpy as np
import pytest

from halos_jax.checkpoints import saved

ARRAYS = {"w": np.zeros([2, 3], np.float32)}
SUMS = {"w": [(((0, 2), (0, 3)), "00000000000000ff")]}


def write(path, record):
    path.write_text(json.dumps(record))
    return path


def test_a_record_comes_back(tmp_path):
    record = saved.make_record({"round": 3, "in_stage": True}, ARRAYS, SUMS, "abc")
    found = saved.read_record(write(tmp_path / "metadata", record))
    assert found.round_state == {"round": 3, "in_stage": True} and found.is_in_stage
    assert found.arrays == {"w": ((2, 3), "float32")}
    assert found.sums == {"w": [[[[0, 2], [0, 3]], "00000000000000ff"]]}
    assert found.ledger == "abc"
    assert saved.find_record("c", 7).as_posix() == "c/00000007/round/metadata"


def test_every_change_is_refused(tmp_path):
    record = saved.make_record({"round": 3, "in_stage": False}, ARRAYS, SUMS, "abc")
    text = json.dumps(record)
    digits = [at for at, sign in enumerate(text) if sign.isdigit()]
    assert len(digits) > 60
    for at in digits:
        changed = text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]
        (tmp_path / "metadata").write_text(changed)
        with pytest.raises(saved.ERRORS):
            saved.read_record(tmp_path / "metadata")
    for name in record:
        write(tmp_path / "metadata", {key: one for key, one in record.items() if key != name})
        with pytest.raises(saved.ERRORS):
            saved.read_record(tmp_path / "metadata")
    for text in ("", "[]", "{", "null"):
        (tmp_path / "metadata").write_text(text)
        with pytest.raises(saved.ERRORS):
            saved.read_record(tmp_path / "metadata")


def test_a_record_from_before_checksums_is_read(tmp_path):
    record = {"format": 1, "round_state": {"round": 1}, "arrays": {"w": [[2], "int32"]}}
    found = saved.read_record(write(tmp_path / "metadata", record))
    assert (found.sums, found.ledger, found.arrays) == ({}, "", {"w": ((2,), "int32")})


def test_what_is_no_json_fails_at_once():
    with pytest.raises(TypeError):
        saved.make_record({"loss": np.ones(2)}, ARRAYS, {}, "")
