import json
import math
import threading
import time

import pytest

from halos_jax.metrics import MetricWriter
from halos_jax.trackers import follower
from halos_jax.trackers.follower import Follower
from halos_jax.trackers.points import Samples


class Service:
    """A tracker that keeps its points in a list, which outlives it."""

    def __init__(self, points, known=0, fails_at=None):
        self.points, self.known, self._fails_at = points, known, fails_at
        self.is_closed = False

    def log(self, point):
        if point.number == self._fails_at:
            raise OSError("no network")
        self.points.append(point)

    def close(self):
        self.is_closed = True


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(follower, "_PAUSE", 0.001)
    return tmp_path / "metrics.jsonl"


def run(path, steps, service, resume_step=None, **more):
    sink = Follower("service", path, lambda: service, **more)
    writer = MetricWriter(path, resume_step=resume_step, sinks=[sink])
    for step in steps:
        writer.write(step, {"loss/train": step / 2, "logps": math.nan})
    writer.close()
    return service


def test_the_tracker_gets_the_lines_of_the_file_under_their_names(path):
    service = run(path, [1, 2, 3], Service([]))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [point.number for point in service.points] == [0, 1, 2]
    assert [point.step for point in service.points] == [1, 2, 3]
    assert [point.wall_time for point in service.points] == [line["wall_time"] for line in lines]
    assert all(list(point.values) == ["loss/train", "logps"] for point in service.points)
    assert [point.values["loss/train"] for point in service.points] == [0.5, 1.0, 1.5]
    assert math.isnan(service.points[0].values["logps"]) and service.is_closed


def test_a_resumed_run_sends_what_the_service_lacks(path):
    """It was killed at step 5, of which the service has seen 4, and goes on from step 2."""
    points = run(path, [1, 2, 3, 4, 5], Service([])).points[:4]
    sent = []
    run(path, [3, 4, 5, 6], Service(points, known=4), resume_step=2, note_sent=sent.append)
    assert [point.number for point in points] == [0, 1, 2, 3, 4, 5]
    assert [point.step for point in points] == [1, 2, 3, 4, 5, 6]
    assert sent[-1] == 6


def test_a_service_that_is_made_anew_gets_everything(path):
    run(path, [1, 2, 3], Service([]))
    again = run(path, [3, 4], Service([]), resume_step=2)
    assert [point.step for point in again.points] == [1, 2, 3, 4]


def test_an_incomplete_line_waits_for_its_end(path):
    path.write_bytes(b'{"step": 1}\n{"step": 2')
    service = Service([])
    sink = Follower("service", path, lambda: service)
    sink.resume(None)
    deadline = time.monotonic() + 10
    while not service.points and time.monotonic() < deadline:
        time.sleep(0.001)
    with open(path, "ab") as file:
        file.write(b"}\n")
    sink.close()
    assert [(point.number, point.step) for point in service.points] == [(0, 1), (1, 2)]
    assert math.isnan(service.points[0].wall_time)


@pytest.mark.parametrize("fault", ["open", "log"])
def test_an_error_is_said_once_and_the_run_goes_on(path, fault, caplog):
    service = Service([], fails_at=1)

    def open_tracker():
        if fault == "open":
            raise SystemExit("no account")
        return service

    writer = MetricWriter(path, sinks=[Follower("service", path, open_tracker)])
    for step in (1, 2, 3, 4):
        writer.write(step, {"loss/train": 0.5})
        writer.flush()
    writer.close()
    assert len(path.read_text().splitlines()) == 4
    (said,) = [text for text in caplog.messages if "service" in text]
    cause = "SystemExit: no account" if fault == "open" else "OSError: no network"
    assert cause in said and "the run goes on" in said
    assert service.is_closed == (fault == "log")


def test_the_end_of_a_run_does_not_wait_for_ever(path, monkeypatch, caplog):
    monkeypatch.setattr(follower, "PATIENCE", 0.01)
    hangs = threading.Event()
    sink = Follower("service", path, lambda: hangs.wait(30) and Service([]))
    writer = MetricWriter(path, sinks=[sink])
    writer.write(1, {"loss/train": 0.5})
    writer.close()
    hangs.set()
    assert "service has not taken all metrics" in caplog.text
    sink.close()  # which nothing follows
    assert len(caplog.messages) == 1


def test_the_samples_of_a_point_come_with_it(path):
    table = Samples(("reward",), ((0.5,),))
    service = run(
        path,
        [1, 2],
        Service([]),
        read_samples=lambda point: table if point.step == 2 else None,
    )
    assert [point.samples for point in service.points] == [None, table]
