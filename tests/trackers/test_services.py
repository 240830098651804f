import dataclasses
import math
import sys
from types import SimpleNamespace

import pytest

from halos_jax.trackers import services
from halos_jax.trackers.points import Point, Samples, Session
from halos_jax.trackers.services import (
    TensorBoard,
    Trackio,
    WeightsAndBiases,
    format_table,
    is_logged_in,
)

TABLE = Samples(("prompt", "reward"), (("user: a", 0.5),))
POINTS = [
    Point(0, 0, 10.0, {"round": 0, "reward_eval": 0.25}, TABLE),
    Point(1, 0, 11.0, {"round": 0, "seconds": 2.5}),  # of the same step and round
    Point(2, 1, 12.0, {"loss/train": 0.5, "logps": math.nan}),
]


@pytest.fixture
def session(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return Session(tmp_path / "trackers", "project", "run", "0ca1", True, {"seed": 1}, sent=2)


@pytest.fixture
def wandb(monkeypatch):
    """Return a stand-in for wandb, which keeps the rows of each `init` apart."""
    found = SimpleNamespace(sessions=[], has_key=False, on_server=0)

    def init(**options):
        run = SimpleNamespace(options=options, rows=[], axes=[], step=found.on_server)
        run.log = lambda row, step, commit: run.rows.append((step, row))
        run.define_metric = lambda *names, **more: run.axes.append((names, more))
        run.finish = lambda: run.rows.append("finish")
        found.sessions.append(run)
        return run

    found.init, found.Settings, found.Table = init, dict, lambda columns, data: (columns, data)
    found.login = lambda prompt, verify: found.has_key
    monkeypatch.setitem(sys.modules, "wandb", found)
    return found


def log_all(tracker):
    for point in POINTS:
        if point.number >= tracker.known:
            tracker.log(point)
    tracker.close()


def read_events(folder):
    """Return (name, step, value, time) of each scalar, and (name, text) of each text."""
    from tensorboardX.proto.event_pb2 import Event

    scalars, texts = [], []
    (path,) = folder.iterdir()
    data = path.read_bytes()
    while data:  # a record: its length (8 bytes), 4 bytes, its bytes, 4 bytes
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]
        for value in event.summary.value:
            if value.HasField("tensor"):
                texts.append((value.tag, value.tensor.string_val[0].decode()))
            else:
                scalars.append((value.tag, event.step, value.simple_value, event.wall_time))
    return scalars, texts


def test_event_files_have_each_point_once_however_often_they_are_written(session):
    pytest.importorskip("tensorboardX", reason="part of the extra `test`")
    for _ in range(2):
        log_all(TensorBoard(session))
    scalars, texts = read_events(session.folder / "tensorboard")
    assert scalars[:-1] == [
        ("round", 0, 0.0, 10.0),
        ("reward_eval", 0, 0.25, 10.0),
        ("seconds", 0, 2.5, 11.0),
        ("loss/train", 1, 0.5, 12.0),
    ]
    assert scalars[-1][:2] == ("logps", 1) and math.isnan(scalars[-1][2])
    assert texts == [("held_out_samples/text_summary", format_table(TABLE))]


def test_an_offline_run_of_wandb_is_written_anew_under_the_same_id(session, wandb):
    old = session.folder / "wandb" / "offline-run-20260101_000000-0ca1"
    other = session.folder / "wandb" / "offline-run-20260101_000000-ffff"
    for folder in (old, other):
        folder.mkdir(parents=True)
    log_all(WeightsAndBiases(session))
    assert not old.exists() and other.exists()
    (run,) = wandb.sessions
    expected = {"id": "0ca1", "resume": "allow", "mode": "offline", "dir": str(session.folder)}
    assert expected.items() <= run.options.items()
    assert run.options["project"] == "project" and run.options["config"] == {"seed": 1}
    assert (("*",), {"step_metric": "step"}) in run.axes
    assert [row[0] for row in run.rows[:-1]] == [0, 1, 2] and run.rows[-1] == "finish"
    first, second = run.rows[0][1], run.rows[1][1]
    assert first.pop("held_out_samples") == (["prompt", "reward"], [["user: a", 0.5]])
    assert first == {"step": 0, "wall_time": 10.0, "round": 0, "reward_eval": 0.25}
    assert second == {"step": 0, "wall_time": 11.0, "round": 0, "seconds": 2.5}


def test_an_offline_run_of_wandb_that_was_synchronised_is_gone_on_with(session, wandb):
    old = session.folder / "wandb" / "offline-run-20260101_000000-0ca1"
    old.mkdir(parents=True)
    (old / "run-0ca1.wandb.synced").touch()
    log_all(WeightsAndBiases(session))
    assert old.exists() and [row[0] for row in wandb.sessions[0].rows[:-1]] == [2]


def test_the_service_says_which_points_it_has(session, wandb):
    wandb.on_server = 1
    log_all(WeightsAndBiases(dataclasses.replace(session, offline=False)))
    assert wandb.sessions[0].options["mode"] is None
    assert [row[0] for row in wandb.sessions[0].rows[:-1]] == [1, 2]


def test_wandb_needs_an_account_unless_it_is_offline(session, wandb, monkeypatch):
    assert not is_logged_in()
    wandb.has_key = True
    assert is_logged_in()
    wandb.has_key = False
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert is_logged_in()


def test_trackio_goes_on_where_its_database_ends(session, monkeypatch):
    rows, asked = [], []

    def init(**options):
        asked.append(options)
        return SimpleNamespace(
            _next_step=1,
            log=lambda row, step: rows.append((step, row)),
            finish=lambda: rows.append("finish"),
        )

    package = SimpleNamespace(init=init, Table=lambda dataframe: dataframe)
    monkeypatch.setitem(sys.modules, "trackio", package)
    log_all(Trackio(session))
    expected = {"project": "project", "name": "run-0ca1", "resume": "allow", "space_id": None}
    assert expected.items() <= asked[0].items()
    second = {"optimizer_step": 0, "wall_time": 11.0, "round": 0, "seconds": 2.5}
    assert rows[0] == (1, second) and rows[1][0] == 2 and rows[2] == "finish"


def test_nothing_in_a_response_is_markup():
    text = format_table(Samples(("response", "reward"), (("<b>|*x*\n`[a](b)`", None),)))
    assert text.splitlines() == [
        "| response | reward |",
        "| --- | --- |",
        "| &#60;b&#62;&#124;&#42;x&#42;<br>&#96;&#91;a&#93;&#40;b&#41;&#96; |  |",
    ]
    assert services.TABLE == "held_out_samples"
