"""mode=report: write the page of a workdir, or one that compares several."""

import logging
from collections.abc import Sequence
from pathlib import Path

import jax

from halos_jax.config import Config, ConfigError, expand_pipeline
from halos_jax.report.comparison import compare_runs
from halos_jax.report.live import write_report
from halos_jax.report.page import render, write_page
from halos_jax.report.recorded import read_run
from halos_jax.storage import explain_os_errors
from halos_jax.workdir import changes
from halos_jax.workdir.intact import COMPARISON, PAGE

logger = logging.getLogger(__name__)


def run_report(config: Config) -> None:
    """Write the page that `mode=report` asks for; process 0 alone does.

    For a pipeline, each of its tasks that has begun gets its page.

    Raises:
      ConfigError: if there is no run in a workdir.
      WorkdirError: if the page cannot be written.
    """
    if jax.process_index():
        return
    workdir, output = Path(config.workdir), Path(config.report.output or "")
    if config.report.workdirs:
        workdirs = [workdir, *map(Path, config.report.workdirs)]
        compare_workdirs(workdirs, output if config.report.output else workdir / COMPARISON)
        return
    stages = [workdir]
    if config.task == "pipeline":
        stages = _list_begun(config)
        if config.report.output and len(stages) > 1:
            raise ConfigError(
                f"report.output: got {config.report.output!r}, but the pipeline in {workdir} has "
                f"{len(stages)} tasks with a page each; leave it empty, or name the workdir of one"
            )
    for stage in stages:
        path = output if config.report.output else stage / PAGE
        with explain_os_errors(path):
            write_report(stage, path)
        logger.info("the page about %s is in %s", stage, path)


def compare_workdirs(workdirs: Sequence[str | Path], path: str | Path) -> None:
    """Write a page that compares runs, by their workdirs.

    Raises:
      ConfigError: if there is no run in one of them.
      WorkdirError: if the page cannot be written.
    """
    page = render(compare_runs([read_run(Path(one)) for one in workdirs]))
    with explain_os_errors(path):
        write_page(page, Path(path))
    logger.info("the comparison of %s is in %s", ", ".join(map(str, workdirs)), path)


def _list_begun(config: Config) -> list[Path]:
    """Return the workdirs of the pipeline's tasks that have begun."""
    folders = [Path(step.workdir) for step in expand_pipeline(config)]
    begun = [one for one in folders if (one / changes.FILE).is_file()]
    if not begun:
        raise ConfigError(
            f"workdir: got {config.workdir!r}, where no task of the pipeline has begun; allowed: "
            "the workdir of a run"
        )
    return begun
