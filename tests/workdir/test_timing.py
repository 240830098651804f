"""Stage times: what is written, what is read back, what a failure leaves."""

import pytest

from halos_jax.workdir import intact, timing
from halos_jax.workdir.ledger import open_ledger, read_ledger


def times(folder):
    return [(one["stage"], one["start"], one["end"]) for one in timing.read_times(folder)]


def test_a_stage_that_ends_well_leaves_a_line_and_others_none(tmp_path, monkeypatch):
    clock = iter([100.0, 103.5, 104.0, 200.0, 200.5, 201.0, 300.0])
    monkeypatch.setattr(timing.time, "time", lambda: next(clock))
    ledger = open_ledger(tmp_path)
    with timing.time_stage(ledger, 1, "sample"):
        pass
    with pytest.raises(RuntimeError), timing.time_stage(ledger, 1, "score"):
        raise RuntimeError
    with timing.time_stage(ledger, 1, "train") as write:
        write()  # what a process leaves that is killed from here on
        assert times(tmp_path)[-1] == ("train", 200.0, 200.5)
    with timing.time_stage(read_ledger(tmp_path), 1, "evaluate"):  # another process of the job
        pass
    assert timing.read_times(tmp_path) == [
        {"round": 1, "stage": "sample", "start": 100.0, "end": 103.5},
        {"round": 1, "stage": "train", "start": 200.0, "end": 201.0},
    ]
    assert timing.format_times(tmp_path, 1) == "sample 3.5 s, train 1.0 s, between 96.5 s"
    assert timing.format_times(tmp_path, 2) == ""
    intact.check_workdir(tmp_path, open_ledger(tmp_path))


def test_a_stage_that_is_done_once_more_replaces_its_line(tmp_path, monkeypatch):
    clock = iter(float(second) for second in range(20))
    monkeypatch.setattr(timing.time, "time", lambda: next(clock))
    ledger = open_ledger(tmp_path)
    for round, stage in ((1, "sample"), (1, "score"), (2, "score"), (1, "score")):
        with timing.time_stage(ledger, round, stage):
            pass
    assert times(tmp_path) == [("sample", 0.0, 1.0), ("score", 4.0, 5.0), ("score", 6.0, 7.0)]
    assert [one["round"] for one in timing.read_times(tmp_path)] == [1, 2, 1]


def test_lines_that_are_none_are_passed_over(tmp_path):
    with timing.time_stage(open_ledger(tmp_path), 1, "sample"):
        pass
    with open(tmp_path / timing.FILE, "a") as stream:
        stream.write('{"round": 1, "stage": "train"}\n[]\n{"round": 1, "sta')
    assert len(timing.read_times(tmp_path)) == 1


def test_there_need_be_no_file(tmp_path):
    assert timing.read_times(tmp_path) == []
