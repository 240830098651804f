"""mode=report."""

import pytest

from halos_jax.config import Config, ConfigError, PipelineConfig, ReportConfig
from halos_jax.report.command import run_report
from halos_jax.storage import WorkdirError
from tests.report.written_runs import write_config, write_run


def ask(workdir, *workdirs, output="", **fields):
    report = ReportConfig(workdirs=tuple(map(str, workdirs)), output=str(output))
    run_report(Config(mode="report", workdir=str(workdir), report=report, **fields))


def test_the_page_of_a_workdir(tmp_path):
    write_run(tmp_path / "one")
    ask(tmp_path / "one")
    ask(tmp_path / "one", output=tmp_path / "pages" / "one.html")
    assert (tmp_path / "one" / "report.html").exists() and (
        tmp_path / "pages" / "one.html"
    ).exists()


def test_several_workdirs_are_compared(tmp_path):
    for name in ("one", "two"):
        write_run(tmp_path / name)
    ask(tmp_path / "one", tmp_path / "two")
    text = (tmp_path / "one" / "comparison.html").read_text()
    assert "one · two" in text and not (tmp_path / "one" / "report.html").exists()


def test_a_pipeline_has_a_page_for_each_task_that_has_begun(tmp_path):
    pipeline = PipelineConfig(tasks=("sft", "online"))
    with pytest.raises(ConfigError, match="no task of the pipeline has begun"):
        ask(tmp_path, task="pipeline", pipeline=pipeline)
    write_config(tmp_path / "sft", task="sft")
    ask(tmp_path, task="pipeline", pipeline=pipeline)
    assert (tmp_path / "sft" / "report.html").exists() and not (tmp_path / "online").exists()
    write_run(tmp_path / "online")
    with pytest.raises(ConfigError, match="2 tasks with a page each"):
        ask(tmp_path, output=tmp_path / "x.html", task="pipeline", pipeline=pipeline)


def test_what_cannot_be_done_is_said(tmp_path):
    with pytest.raises(ConfigError, match="where no run has been"):
        ask(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match="a file stands where a folder is needed"):
        ask(write_run(tmp_path / "one"), output=tmp_path / "file" / "page.html")
