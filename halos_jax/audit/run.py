"""mode=verify: make all checks of a workdir, print what they have found, and write it down."""

import dataclasses
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from halos_jax import storage
from halos_jax.audit.findings import (
    Finding,
    count_outcomes,
    differs,
    format_table,
    not_checked,
    to_record,
)
from halos_jax.audit.opened import Opened, list_places, list_stages, open_workdir
from halos_jax.audit.table import CHECKS, Check
from halos_jax.config import Config, ConfigError
from halos_jax.config.tasks import load
from halos_jax.errors import UserError
from halos_jax.models.hf.families import ModelError
from halos_jax.storage import WorkdirError

logger = logging.getLogger(__name__)

FILE = "verification.json"
# What reading a file raises that is not as a run writes it.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


class VerificationError(UserError, RuntimeError):
    """A workdir is not what its run wrote, or its results do not follow from its files."""


def run_verify(config: Config) -> None:
    """Verify a workdir for `mode=verify`: print a table, and write `verification.json`.

    Raises:
      VerificationError: if anything differs and no rule allows it.
      WorkdirError: if there is no run in the workdir.
      ConfigError: if its config is not one that this version can read.
    """
    started = time.time()
    findings = list(verify(config))
    if jax.process_index() == 0:
        print(format_table(findings), flush=True)
        _write(config, findings, time.time() - started)
    counts = count_outcomes(findings)
    said = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    if counts["differs"]:
        wrong = [one for one in findings if one.outcome == "differs"]
        raise VerificationError(
            f"{config.workdir}: {said}; the first: {wrong[0].place}, {wrong[0].check}: "
            f"{wrong[0].why}; the table lists all of them; put the original files back, or do not "
            "trust what the run has left"
        )
    logger.info("verified %s: %s", config.workdir, said)


def verify(config: Config) -> Iterator[Finding]:
    """Yield the findings of all checks of a task, or of the tasks of a pipeline one by one."""
    for stage in list_stages(config):
        workdir = Path(stage.workdir)
        if config.task == "pipeline" and not workdir.is_dir():
            lacking = not_checked("records", "the workdir of the task", f"{workdir} is not there")
            yield dataclasses.replace(lacking, place=stage.task)
            continue
        yield from verify_opened(open_workdir(stage))


def verify_opened(opened: Opened) -> Iterator[Finding]:
    """Yield the findings of all checks of one workdir, in the order of `CHECKS`."""
    with opened.closing:
        yield from _verify_opened(opened)


def _verify_opened(opened: Opened) -> Iterator[Finding]:
    for check in CHECKS:
        if check.tasks and opened.config.task not in check.tasks:
            continue
        if check.per == "workdir":
            yield from _make(check, opened.name, opened)
            continue
        chosen = opened.list_derived() if check.derives else opened.manifests
        for place, manifest in list_places(opened):
            if manifest in chosen:
                yield from _make(check, place, opened, manifest)


def _make(check: Check, place: str, *arguments: Any) -> Iterator[Finding]:
    try:
        for finding in load(check.run)(*arguments):
            yield dataclasses.replace(finding, place=place)
    except (ConfigError, ModelError) as error:
        yield dataclasses.replace(not_checked(check.name, "an input", str(error)), place=place)
    except (UserError, *_UNREADABLE) as error:
        said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        yield dataclasses.replace(differs(check.name, "a file of the run", said), place=place)


def _write(config: Config, findings: list[Finding], seconds: float) -> None:
    path = Path(config.verify.output or Path(config.workdir) / FILE)
    record = {
        "workdir": config.workdir,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds, 3),
        "settings": dataclasses.asdict(config.verify),
        "counts": count_outcomes(findings),
        "findings": [to_record(one) for one in findings],
    }
    try:
        storage.write_json_atomic(path, record)
    except WorkdirError as error:
        logger.warning("%s; what was found is not written down", error)
