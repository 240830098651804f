"""mode=verify: make all checks of a workdir, print what they have found, and write it down."""

import dataclasses
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from halos_jax import sharding, storage
from halos_jax.audit import certificate
from halos_jax.audit.findings import (
    Finding,
    count_outcomes,
    differs,
    format_summary,
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
from halos_jax.workdir import changes, intact

logger = logging.getLogger(__name__)

FILE = intact.FINDINGS
# What reading a file raises that is not as a run writes it.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


class VerificationError(UserError, RuntimeError):
    """A workdir is not what its run wrote, or its results do not follow from its files."""


def run_verify(config: Config) -> None:
    """Verify a workdir for `mode=verify`: print a summary, and write `verification.json`.

    Raises:
      VerificationError: if anything differs and no rule allows it.
      WorkdirError: if there is no run in the workdir.
      ConfigError: if its config is not one that this version can read.
    """
    started = time.time()
    findings = list(verify(config))
    if jax.process_index() == 0:
        print(format_summary(findings), flush=True)
        if written := _write(config, findings, time.time() - started):
            print(f"\nevery check: {written}", flush=True)
    counts = count_outcomes(findings)
    said = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    if counts["differs"]:
        wrong = [one for one in findings if one.outcome == "differs"]
        raise VerificationError(
            f"{config.workdir}: {said}; the first: {wrong[0].place}, {wrong[0].check}: "
            f"{wrong[0].why}; the table has all of them; put the original files back, or do not "
            "trust what the run has left"
        )
    logger.info("verified %s: %s", config.workdir, said)


def verify(config: Config) -> Iterator[Finding]:
    """Yield the findings of all checks of a task, or of the tasks of a pipeline one by one."""
    for stage in list_stages(config):
        workdir = Path(stage.workdir)
        if config.task == "pipeline" and not (workdir / changes.FILE).is_file():
            why = f"{workdir} holds no run: it has not begun, or its task keeps no records"
            lacking = not_checked("records", "the workdir of the task", why)
            yield dataclasses.replace(lacking, place=stage.task)
            continue
        opened = open_workdir(stage)
        found = list(verify_opened(opened))
        yield from found
        _renew(opened, found)


def verify_opened(opened: Opened) -> Iterator[Finding]:
    """Yield the findings of all checks of one workdir, in the order of `CHECKS`."""
    found = []
    with opened.closing:
        for one in _make_all(opened):
            found.append(one)
            yield one
    run = f"{certificate.__name__}:check_certificate"
    yield from _make(Check(certificate.NAME, run), opened.name, opened, found)


def _make_all(opened: Opened) -> Iterator[Finding]:
    for check in CHECKS:
        if check.tasks and opened.config.task not in check.tasks:
            continue
        if check.derives and not opened.given.verify.derive:
            why = "only hashes were asked for (verify.derive)"
            lacking = not_checked(check.name, "made again", why)
            yield dataclasses.replace(lacking, place=opened.name)
        elif check.per == "workdir":
            yield from _make(check, opened.name, opened)
        else:
            chosen = opened.list_derived() if check.derives else opened.manifests
            for place, manifest in list_places(opened):
                if manifest in chosen:
                    yield from _make(check, place, opened, manifest)


def _renew(opened: Opened, findings: list[Finding]) -> None:
    """Write the certificate of a finished run, on process 0; a workdir may be read-only."""
    if jax.process_index():
        return
    try:
        mesh = sharding.make_mesh(opened.given.mesh)
        path = certificate.renew_certificate(opened, findings, mesh)
    except WorkdirError as error:
        logger.warning("%s; the certificate stays as it is", error)
    else:
        if path is not None:
            logger.info("the certificate of the run is in %s", path)


def _make(check: Check, place: str, *arguments: Any) -> Iterator[Finding]:
    try:
        for finding in load(check.run)(*arguments):
            yield dataclasses.replace(finding, place=place)
    except (ConfigError, ModelError) as error:
        yield dataclasses.replace(not_checked(check.name, "an input", str(error)), place=place)
    except (UserError, *_UNREADABLE) as error:
        said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        yield dataclasses.replace(differs(check.name, "a file of the run", said), place=place)


def _write(config: Config, findings: list[Finding], seconds: float) -> Path | None:
    """Write all findings down; return where, or None if that cannot be."""
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
        return None
    return path
