"""The page of a run under way."""

import logging
import threading
import types

import pytest

from halos_jax.config import Config, ReportConfig
from halos_jax.report import live
from halos_jax.report.live import Reporter, report_on, write_report
from tests.report.written_runs import write_run


def make_workspace(workdir, *, enabled=True, is_writer=True):
    config = Config(report=ReportConfig(enabled=enabled))
    return types.SimpleNamespace(workdir=workdir, config=config, is_writer=is_writer)


def test_the_page_is_in_the_workdir(tmp_path):
    path = write_report(write_run(tmp_path))
    assert path == tmp_path / "report.html" and "Is it learning?" in path.read_text()


def test_updates_return_at_once_and_many_of_them_are_one():
    begun, go, count = threading.Event(), threading.Event(), []

    def write():
        begun.set()
        assert go.wait(10)
        count.append(1)

    reporter = Reporter(write)
    reporter.update()
    assert begun.wait(10)
    for _ in range(5):
        reporter.update()
    assert count == []
    go.set()
    reporter.close()
    assert len(count) == 2  # the one under way, and one for all that came meanwhile


def test_the_last_update_is_written_before_the_end():
    written, states = [], ["new"]
    reporter = Reporter(lambda: written.append(states[-1]))
    reporter.update()
    states.append("last")
    reporter.update()
    reporter.close()
    assert written[-1] == "last"


def test_an_error_is_said_once_and_the_run_goes_on(caplog):
    def fail():
        raise PermissionError("no room")

    reporter = Reporter(fail)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            reporter.update()
            reporter._write_once()
        reporter.close()
    (said,) = caplog.messages
    assert "PermissionError: no room" in said and "report.enabled=false" in said


def test_updates_within_a_time_are_left_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    reporter = Reporter(lambda: None)
    asked = []
    monkeypatch.setattr(reporter._wanted, "set", lambda: asked.append(now[0]))
    monkeypatch.setattr(reporter, "_thread", threading.current_thread())
    for now[0] in (1.0, 59.0, 60.0, 61.0, 130.0):
        reporter.update(every=60.0)
    assert asked == [60.0, 130.0]


@pytest.mark.parametrize("switches", [{"enabled": False}, {"is_writer": False}])
def test_no_page_where_it_is_switched_off_or_on_other_processes(tmp_path, switches):
    with report_on(make_workspace(write_run(tmp_path), **switches)) as reporter:
        reporter.update()
    assert not (tmp_path / "report.html").exists()


def test_the_page_is_written_at_the_end_of_a_run_and_where_it_breaks_off(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for name, error in (("whole", None), ("broken", RuntimeError("loss is nan"))):
        workdir = write_run(tmp_path / name)
        try:
            with report_on(make_workspace(workdir)):
                if error:
                    raise error
        except RuntimeError as raised:
            assert raised is error
        assert (workdir / "report.html").exists()
        assert caplog.messages[-1] == f"the page about it is {workdir / 'report.html'}"


def test_a_run_that_breaks_off_before_its_first_step_leaves_none(tmp_path):
    with pytest.raises(RuntimeError), report_on(make_workspace(tmp_path)):
        raise RuntimeError("no data")
    assert not (tmp_path / "report.html").exists()


def test_an_end_that_comes_while_an_update_is_taken_up_is_noticed(monkeypatch):
    reporter = Reporter(lambda: None)
    clear = reporter._wanted.clear

    def close_and_clear():
        reporter._is_closing = True  # what `close` does before it waits
        reporter._wanted.set()
        clear()

    monkeypatch.setattr(reporter._wanted, "clear", close_and_clear)
    reporter.update()
    assert reporter._thread is not None
    reporter._thread.join(10)
    assert not reporter._thread.is_alive()
