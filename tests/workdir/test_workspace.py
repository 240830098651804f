"""A task's workspace: locked, with its mesh, and closed whatever happens."""

import dataclasses
import json
import logging
import sys
from types import SimpleNamespace
from typing import ClassVar

import jax
import pytest

from halos_jax.config import Config, MeshConfig, TrackersConfig, TrainConfig
from halos_jax.once import say_once
from halos_jax.storage import WorkdirError
from halos_jax.workdir import runs
from halos_jax.workdir.interrupt import StopSignal
from halos_jax.workdir.journal import read_journal
from halos_jax.workdir.workspace import open_workspace


def test_a_workspace_is_locked_and_has_the_current_mesh(tmp_path):
    config = Config(workdir=str(tmp_path / "run"), mesh=MeshConfig(data=2, fsdp=4, tensor=1))
    stop = StopSignal()
    with open_workspace(config, stop) as found:
        assert (found.workdir, found.config, found.stop) == (tmp_path / "run", config, stop)
        assert found.is_writer and found.ledger.is_writer
        assert dict(found.mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
        assert jax.sharding.get_abstract_mesh().shape == found.mesh.abstract_mesh.shape
        with pytest.raises(WorkdirError, match="in use by another job"):
            runs.join_run(config)
    runs.join_run(config).close()


def test_what_was_said_once_is_counted_in_the_journal(tmp_path):
    config = Config(workdir=str(tmp_path))
    logger = logging.getLogger("halos_jax.here")
    with open_workspace(config, StopSignal()):
        for round in (1, 2, 3):
            say_once(logger, "round %d: %d samples were cut", round, 5 * round)
    texts = [one["text"] for one in read_journal(tmp_path).warnings]
    assert texts == [
        "round 1: 5 samples were cut",
        "said once, it came 2 times more, the last: round 3: 15 samples were cut",
    ]


def test_the_lock_goes_with_an_error_which_the_file_systems_are_explained(tmp_path):
    config = Config(workdir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="mine"), open_workspace(config, StopSignal()):
        raise ValueError("mine")
    with pytest.raises(WorkdirError, match="run"), open_workspace(config, StopSignal()) as found:
        (found.workdir / "missing" / "file").write_text("x")
    runs.join_run(config).close()


def test_another_config_leaves_the_run_as_it_is(tmp_path):
    config = Config(workdir=str(tmp_path / "run"))
    with open_workspace(config, StopSignal()) as found:
        other = found.with_config(dataclasses.replace(config, seed=9))
        assert other.config.seed == 9 and other.info is found.info
        assert found.history.config.seed == 0


def test_metrics_go_on_after_the_step_of_the_checkpoint(tmp_path):
    config = Config(workdir=str(tmp_path / "run"), train=TrainConfig(log_every=100))
    with open_workspace(config, StopSignal()) as found:
        for resume_step, values in ((-1, [(1, 0.5), (2, 0.4)]), (1, [(2, 0.3)])):
            writer = found.open_metrics(resume_step)
            for step, loss in values:
                writer.write(step, {"loss/train": loss})
            writer.close()
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["loss/train"] for line in lines] == [0.5, 0.3]
        assert found.ledger.find(tmp_path / "run" / "metrics.jsonl") is not None


class Recorder:
    """A tracker that notes which steps it gets, and that it was closed."""

    seen: ClassVar[list] = []

    def __init__(self, session):
        self.known = session.sent

    def log(self, point):
        self.seen.append(point.step)

    def close(self):
        self.seen.append("closed")


def test_trackers_follow_the_metrics_and_are_closed_with_the_workspace(tmp_path, monkeypatch):
    Recorder.seen.clear()
    monkeypatch.setitem(sys.modules, "my_tracker", SimpleNamespace(Recorder=Recorder))
    config = Config(
        workdir=str(tmp_path / "run"), trackers=TrackersConfig(names=("my_tracker:Recorder",))
    )
    with (
        pytest.raises(ValueError, match="mine"),
        open_workspace(config, StopSignal()) as found,
    ):
        writer = found.open_metrics(-1)
        for step in (1, 2):
            writer.write(step, {"loss/train": 0.5})
        writer.flush()
        raise ValueError("mine")
    assert Recorder.seen == [1, 2, "closed"]
    with open_workspace(config, StopSignal()) as found:
        found.open_metrics(2).write(3, {"loss/train": 0.5})  # which is killed before it is written
    assert Recorder.seen == [1, 2, "closed", "closed"]
    (tmp_path / "run" / "trackers" / "Recorder.json").unlink()
    with open_workspace(config, StopSignal()) as found:
        found.update_trackers()
    assert Recorder.seen[4:] == [1, 2, "closed"]


def test_a_segment_is_planned_without_a_trace_and_then_begun(tmp_path):
    first = Config(workdir=str(tmp_path / "run"))
    with open_workspace(first, StopSignal()):
        (tmp_path / "run" / "metrics.jsonl").touch()
    changed = dataclasses.replace(first, train=TrainConfig(tokens_per_device=64))
    with open_workspace(changed, StopSignal()) as found:
        planned = found.plan_segment(round=2, step=5)
        assert found.history.changes and not found.history.segments
        recorded = json.loads((tmp_path / "run" / "config.json").read_text())
        assert recorded["train"]["tokens_per_device"] == 16384 and "segments" not in recorded
        found.begin_segment(round=2, step=5)
        assert found.history == planned
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert recorded["segments"] == [dict(planned.segments[0])]
    assert (recorded["segments"][0]["round"], recorded["segments"][0]["step"]) == (2, 5)
