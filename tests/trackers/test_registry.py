import dataclasses
import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest

from halos_jax.config import Config, TrackersConfig
from halos_jax.metrics import MetricWriter
from halos_jax.trackers import registry
from halos_jax.trackers.registry import find_problems, open_trackers

SESSIONS, NUMBERS = [], []


class Own:
    """A tracker of one's own, as a user writes it."""

    def __init__(self, session):
        self.known = session.sent
        SESSIONS.append(session)

    def log(self, point):
        NUMBERS.append(point.number)

    def close(self):
        pass


@pytest.fixture
def own(monkeypatch):
    SESSIONS.clear()
    NUMBERS.clear()
    monkeypatch.setitem(sys.modules, "my_tracker", SimpleNamespace(Own=Own))
    return "my_tracker:Own"


def make_config(*names, **fields):
    fields = {"offline": True, **fields}
    return Config(trackers=TrackersConfig(names=names, **fields))


def run(config, workdir, steps, resume_step):
    path = workdir / "metrics.jsonl"
    sinks = open_trackers(config, path)
    writer = MetricWriter(path, resume_step=resume_step, sinks=sinks)
    for step in steps:
        writer.write(step, {"loss/train": 0.5})
    writer.close()


def test_a_class_of_ones_own_goes_on_in_the_same_run(own, tmp_path):
    workdir = tmp_path / "first"
    run(make_config(own), workdir, [1, 2, 3], -1)
    run(make_config(own), workdir, [3, 4], 2)
    assert NUMBERS == [0, 1, 2, 3]
    first, second = SESSIONS
    assert first.id == second.id and (first.sent, second.sent) == (0, 3)
    assert (first.project, first.run, first.offline) == ("halos_jax", "first", True)
    assert first.folder == workdir / "trackers" and first.config["task"] == "online"
    state = json.loads((workdir / "trackers" / "Own.json").read_text())
    assert state == {"project": "halos_jax", "id": first.id, "sent": 4}


def test_another_project_is_another_run_and_gets_everything(own, tmp_path):
    run(make_config(own), tmp_path, [1, 2], -1)
    run(make_config(own, project="other", run="mine"), tmp_path, [3], 2)
    assert SESSIONS[0].id != SESSIONS[1].id and SESSIONS[1].run == "mine"
    assert NUMBERS == [0, 1, 0, 1, 2]


def test_without_names_there_is_no_tracker(tmp_path):
    assert open_trackers(Config(), tmp_path / "metrics.jsonl") == []
    assert find_problems(Config()) == []


def test_a_missing_package_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = make_config("tensorboard", "wandb")
    said = find_problems(config)
    assert "the package tensorboardX is not installed; run: pip install tensorboardX" in said[0]
    assert "'wandb'" in said[1] and "pip install wandb" in said[1]
    assert find_problems(dataclasses.replace(config, mode="report")) == []


def test_wandb_without_an_account_is_an_error_before_the_run(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(registry, "is_logged_in", lambda: False)
    (said,) = find_problems(make_config("wandb", offline=False))
    assert "wandb login" in said and "trackers.offline=true" in said
    assert find_problems(make_config("wandb")) == []


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("mlflow",), "got 'mlflow', allowed: 'tensorboard', 'wandb', 'trackio', or a class"),
        (("my_tracker:None",), "has no 'None'"),
        (("my_tracker:Own", "my_tracker:Own"), "allowed: each tracker once"),
    ],
)
def test_a_name_that_is_no_tracker_is_refused(own, names, said):
    (line,) = find_problems(make_config(*names))
    assert line.startswith("trackers.names: got") and said in line
