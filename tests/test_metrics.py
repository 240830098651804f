import json
import logging
import math
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from halos_jax import metrics, processes
from halos_jax.metrics import (
    MetricsError,
    MetricWriter,
    NonFiniteError,
    Record,
    read_metrics,
)
from halos_jax.storage import WorkdirError


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "time", SimpleNamespace(time=lambda: 1000.0))
    return tmp_path / "metrics.jsonl"


def steps(path):
    return [record["step"] for record in read_metrics(path)]


def write_steps(path, numbers, **options):
    writer = MetricWriter(path, **options)
    for step in numbers:
        writer.write(step, {"loss/train": jnp.float32(step / 2)})
    writer.close()


def test_records_are_flat_json_numbers_under_the_names_given(path):
    writer = MetricWriter(path)
    metrics = {
        "loss/train": jnp.float32(0.6931472),
        "rewards_train/margins": jnp.bfloat16(0.5),
        "counters/examples": jnp.int32(64),
        "counters/lr": 5e-6,
        "examples_per_second": np.float64(12.5),
        "grad_norm": jnp.ones((1,)),
    }
    writer.write(1, metrics)
    writer.close()
    (line,) = path.read_text().splitlines()
    record = json.loads(line)
    assert list(record) == ["step", "wall_time", *metrics] and record["wall_time"] == 1000.0
    assert all(type(value) in (int, float) for value in record.values())
    assert record["loss/train"] == float(np.float32(0.6931472))
    assert record["rewards_train/margins"] == 0.5
    assert record["counters/examples"] == 64 and record["counters/lr"] == 5e-6
    assert read_metrics(path) == [record]


def test_metrics_are_read_one_step_late(path):
    """At the write of step k only the arrays of step k - 1 are turned into host values."""
    read = []

    class Scalar:
        def __init__(self, value):
            self.value = value

        def __array__(self, dtype=None, copy=None):
            read.append(self.value)
            return np.array(self.value)

    writer = MetricWriter(path)
    for step in (1, 2, 3):
        writer.write(step, {"loss/train": Scalar(step / 2)})
        assert read == [earlier / 2 for earlier in range(1, step)]
        assert steps(path) == list(range(1, step))
    writer.flush()
    assert read == [0.5, 1.0, 1.5]
    assert steps(path) == [1, 2, 3]
    writer.close()  # nothing is held any more
    assert steps(path) == [1, 2, 3]


def test_a_resumed_run_writes_no_step_twice(path):
    write_steps(path, [1, 2, 3, 4, 5])
    before = path.read_text()
    write_steps(path, [4, 5, 6], resume_step=3)
    assert steps(path) == [1, 2, 3, 4, 5, 6]
    assert path.read_text().startswith(before)
    assert not list(path.parent.glob("*.partial"))
    write_steps(path, [1], resume_step=-1)
    assert steps(path) == [1]


def test_opening_without_a_resume_step_appends(path):
    write_steps(path, [1, 2])
    write_steps(path, [3])
    assert steps(path) == [1, 2, 3]


def test_a_repeated_evaluation_at_the_checkpoint_is_written_once(path):
    writer = MetricWriter(path)
    writer.write(3, {"loss/train": 0.5})
    writer.write(3, {"loss/eval": 0.25, "round": 1})
    writer.close()
    writer = MetricWriter(path, resume_step=3)
    writer.write(3, {"loss/eval": 0.25, "round": 1})
    writer.write(3, {"loss/eval": 0.125, "round": 2})  # a round that trained no step
    writer.write(4, {"loss/train": 0.4})
    writer.close()
    records = [(r["step"], r.get("loss/eval"), r.get("round")) for r in read_metrics(path)]
    assert records == [(3, None, None), (3, 0.25, 1), (3, 0.125, 2), (4, None, None)]


def test_a_record_of_a_round_that_is_repeated_after_other_stages_is_written_once(path):
    first, again = {"round": 3, "samples": 12, "seconds/sample": 1.5}, {"round": 3, "samples": 12}
    writer = MetricWriter(path)
    writer.write(6, first)
    writer.close()
    writer = MetricWriter(path, resume_step=6)
    writer.write(6, again)
    writer.close()
    assert [record["seconds/sample"] for record in read_metrics(path)] == [1.5]


@pytest.mark.parametrize("resume_step", [None, 2])
def test_a_torn_last_line_is_dropped(path, resume_step):
    write_steps(path, [1, 2, 3])
    whole = path.read_text()
    last = len(whole.splitlines()[-1]) + 1
    for cut in range(1, last + 1):
        path.write_text(whole[:-cut])
        assert steps(path) == [1, 2]
        write_steps(path, [3], resume_step=resume_step)
        assert path.read_text() == whole


def test_a_torn_line_inside_the_file_is_an_error(path):
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: not a metrics record"):
        read_metrics(path)
    path.write_text('{"step": 1}\n{"loss/train": 1.0}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: .*step"):
        MetricWriter(path)


@pytest.mark.parametrize(("name", "value"), [("loss/train", math.nan), ("grad_norm", math.inf)])
def test_a_non_finite_loss_stops_the_run(path, name, value):
    writer = MetricWriter(path)
    writer.write(6, {"loss/train": 0.5, "grad_norm": 1.0})
    writer.write(7, {"loss/train": 0.5, "grad_norm": 1.0, name: jnp.float32(value)})
    with pytest.raises(NonFiniteError, match=rf"step 7: {name} is (nan|inf);.*checkpoint is kept"):
        writer.write(8, {"loss/train": 0.5})
    # The record is there for whoever looks for the cause, and the file is still JSON.
    json.loads(path.read_text().splitlines()[-1], parse_constant=lambda name: pytest.fail(name))
    assert math.isnan(read_metrics(path)[-1][name])


def test_other_metrics_may_be_non_finite(path):
    writer = MetricWriter(path)
    writer.write(1, {"loss/train": 0.5, "loss/eval": math.nan})
    writer.close()
    assert math.isnan(read_metrics(path)[0]["loss/eval"])


def test_processes_without_a_file_still_stop(capsys):
    writer = MetricWriter(None)
    writer.write(1, {"loss/train": jnp.float32(jnp.nan)})
    with pytest.raises(NonFiniteError, match="step 1"):
        writer.flush()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("value", ["0.5", np.ones(2), None, {"a": 1}])
def test_what_is_not_one_number_is_refused(path, value):
    writer = MetricWriter(path)
    writer.write(1, {"x": value})
    with pytest.raises(TypeError, match="metric 'x'"):
        writer.flush()


def test_the_console_gets_a_short_line_of_an_evaluation_every_few_seconds(
    path, monkeypatch, caplog
):
    """Steps and rounds are for the files; the second evaluation comes too soon."""
    caplog.set_level(logging.INFO)
    times = iter([10.0, 11.0, 14.9, 16.0, 17.0])
    monkeypatch.setattr(metrics, "time", SimpleNamespace(time=times.__next__))
    writer = MetricWriter(path, console=True)
    long = {f"logps_eval/{number}": 0.5 for number in range(40)}
    writer.write(0, {"loss/eval": 0.69314, "rewards_eval/accuracies": 0.5, **long})
    writer.write(1, {"loss/train": 0.5})
    writer.write(2, {"loss/eval": 0.6})
    writer.write(3, {"loss/eval": 0.25, "rewards_eval/margins": 0.125})
    writer.write(3, {"round": 1, "reward_eval": 0.5})
    writer.close()
    assert caplog.messages == [
        "step 0: held-out loss 0.6931, accuracy 0.5",
        "step 3: held-out loss 0.25, margin 0.125",
    ]


class Memory:
    """A sink that keeps what it is told."""

    def __init__(self, target, last=()):
        self.calls, self.target, self._last = [], target, last

    def resume(self, step):
        self.calls.append(("resume", step))
        return self._last

    def write(self, record):
        self.calls.append(record)

    def flush(self):
        self.calls.append("flush")

    def close(self):
        self.calls.append("close")


def test_a_sink_of_ones_own_gets_every_record_and_the_place_to_go_on_from(path, monkeypatch):
    made = []

    def make(target):
        made.append(Memory(target, last=[Record(3, {"loss/eval": 0.25}, 0.0)]))
        return made[-1]

    monkeypatch.setitem(metrics.SINKS, "memory", make)
    times = iter([10.0, 11.0, 12.0])
    monkeypatch.setattr(metrics, "time", SimpleNamespace(time=times.__next__))
    writer = MetricWriter(path, console=True, resume_step=3)
    writer.write(3, {"loss/eval": 0.25})  # which the sink has
    writer.write(4, {"loss/train": jnp.float32(0.5)})
    writer.write(5, {"loss/train": jnp.float32(jnp.inf), "round": 1})
    with pytest.raises(NonFiniteError):
        writer.close()
    (sink,) = made
    assert (sink.target.path, sink.target.console) == (path, True)
    assert sink.calls == [
        ("resume", 3),
        Record(4, {"loss/train": 0.5}, 11.0),
        Record(5, {"loss/train": math.inf, "round": 1}, 12.0),
        "close",
    ]
    assert steps(path) == [4, 5]  # and so does the file


def test_sinks_are_closed_whatever_one_of_them_does(path, monkeypatch):
    made = []

    class Broken(Memory):
        def close(self):
            super().close()
            raise OSError("gone")

    def add(kind):
        def make(target):
            made.append(kind(target))
            return made[-1]

        return make

    monkeypatch.setitem(metrics.SINKS, "first", add(Memory))
    monkeypatch.setitem(metrics.SINKS, "second", add(Broken))
    writer = MetricWriter(path)
    with pytest.raises(OSError, match="gone"):
        writer.close()
    assert [sink.calls for sink in made] == [[("resume", None), "flush", "close"]] * 2
    writer.close()  # nothing is left to be closed
    assert len(made[0].calls) == 3


def test_a_file_that_one_process_cannot_read_stops_them_all(path, monkeypatch):
    asked = []

    def run_on_all(action, *kinds):
        asked.append(kinds)
        return action()

    monkeypatch.setattr(processes, "run_on_all", run_on_all)
    path.write_text("no record\n")
    with pytest.raises(MetricsError):
        MetricWriter(path)
    MetricWriter(None)  # a process without a file takes part
    assert asked == [(MetricsError, WorkdirError)] * 2


def test_the_times_of_a_run_are_known_by_their_names():
    """Two runs that compute the same differ in nothing else."""
    assert all(map(metrics.is_time, ("wall_time", "mfu", "seconds/train", "tokens_per_second")))
    assert not any(map(metrics.is_time, ("loss/train", "round", "response_tokens_mean")))
