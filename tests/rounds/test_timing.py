"""Stage times: what is written, what is read back, what a failure leaves."""

import pytest

from halos_jax.rounds import timing


def test_a_stage_that_ends_well_leaves_a_line_and_others_none(tmp_path, monkeypatch):
    clock = iter([100.0, 103.5, 104.0, 200.0, 201.0, 300.0, 302.0])
    monkeypatch.setattr(timing.time, "time", lambda: next(clock))
    with timing.time_stage(tmp_path, 1, "sample"):
        pass
    with pytest.raises(RuntimeError), timing.time_stage(tmp_path, 1, "score"):
        raise RuntimeError
    with timing.time_stage(tmp_path, 1, "train"):
        pass
    with timing.time_stage(None, 1, "evaluate"):  # a process that writes nothing
        pass
    assert timing.read_times(tmp_path) == [
        {"round": 1, "stage": "sample", "start": 100.0, "end": 103.5},
        {"round": 1, "stage": "train", "start": 200.0, "end": 201.0},
    ]
    assert timing.format_times(tmp_path, 1) == "sample 3.5 s, train 1.0 s, between 96.5 s"
    assert timing.format_times(tmp_path, 2) == ""
    with open(tmp_path / timing.FILE, "a") as stream:
        stream.write('{"round": 1, "sta')
    assert len(timing.read_times(tmp_path)) == 2
    monkeypatch.undo()
    for _ in range(2):  # carried on, the first line is lost with the torn one
        with timing.time_stage(tmp_path, 1, "score"):
            pass
    stages = [one["stage"] for one in timing.read_times(tmp_path)]
    assert stages == ["sample", "train", "score"]


def test_there_need_be_no_file(tmp_path):
    assert timing.read_times(tmp_path) == []
