"""A run as its workdir has it: read without the lock, and without anything being changed."""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from halos_jax.config import Config, ConfigError, schema
from halos_jax.course.advice import RoundSigns
from halos_jax.course.verdicts import scale_rate
from halos_jax.errors import UserError
from halos_jax.metrics import MetricsError, read_metrics
from halos_jax.rounds.outlook import read_signs
from halos_jax.workdir import changes, execution, journal, manifests
from halos_jax.workdir.changes import History
from halos_jax.workdir.intact import FINAL, MANIFEST
from halos_jax.workdir.journal import Journal
from halos_jax.workdir.manifests import Manifest, round_folder
from halos_jax.workdir.timing import read_times

METRICS = "metrics.jsonl"


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What a workdir says of a run that is finished, stopped or under way.

    Attributes:
      plain: its config.json, without the segments.
      history: the config as this version of the program reads it, with its changes; None if it
        cannot (then `problems` says why).
      rounds: the manifests of an online run, from round 0 on, without gaps.
      task: the manifest of a task without rounds; None if it has none.
      metrics: the records of metrics.jsonl.
      times: the records of timings.jsonl.
      execution: what the newest start was executed on; empty if nothing says so.
      problems: what could not be read, a line each.
    """

    workdir: Path
    plain: Mapping[str, Any]
    history: History | None
    rounds: tuple[Manifest, ...] = ()
    task: Manifest | None = None
    metrics: tuple[Mapping[str, float], ...] = ()
    times: tuple[Mapping[str, Any], ...] = ()
    journal: Journal = dataclasses.field(default_factory=Journal)
    execution: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def config(self) -> Config | None:
        return None if self.history is None else self.history.config

    @property
    def name(self) -> str:
        """The last part of the workdir, with the folder above it where that says more."""
        parts = self.workdir.resolve().parts
        is_stage = parts[-1] == self.plain.get("task") and len(parts) > 1
        return "/".join(parts[-2:] if is_stage else parts[-1:])

    @property
    def is_complete(self) -> bool:
        """Whether the run has left its result, as far as its files tell."""
        if self.task is not None:
            return self.task.next_stage is None
        last = self.rounds[-1] if self.rounds else None
        is_done = last is None or last.next_stage is None
        return is_done and (self.workdir / FINAL).is_dir()

    def list_signs(self) -> list[RoundSigns]:
        """Return what advice is given by, of each round; empty if the config cannot be read."""
        return list(self._signs)

    @functools.cached_property
    def _signs(self) -> list[RoundSigns]:
        if self.history is None:
            return []
        found = []
        for one in self.rounds:
            rate: float = self.history.value_in("optimizer.learning_rate", one.round)
            signs = read_signs(one, rate, self.history.config)
            found.append(signs._replace(factor=scale_rate(self.rounds[: one.round])))
        return found


def read_run(workdir: Path) -> Recorded:
    """Read what a workdir says of its run.

    Raises:
      ConfigError: if there is no run in the folder.
    """
    path = workdir / changes.FILE
    if not path.is_file():
        raise ConfigError(
            f"workdir: got {str(workdir)!r}, where no run has been; allowed: the workdir of a run, "
            "which holds a config.json"
        )
    plain = changes.read_plain(path)
    if not changes.is_run(plain):
        raise ConfigError(
            f"workdir: got {str(workdir)!r}, whose config.json no run has written; allowed: the "
            "workdir of a run"
        )
    problems: list[str] = []
    history = _read_history(plain, problems)
    rounds = tuple(_read_rounds(workdir, problems))
    return Recorded(
        workdir,
        changes.drop_segments(plain),
        history,
        rounds,
        None if rounds else _try_manifest(workdir, problems),
        tuple(_read_metrics(workdir / METRICS, problems)),
        tuple(read_times(workdir)),
        journal.read_journal(workdir),
        _read_execution(workdir, problems),
        tuple(problems),
    )


def _read_history(plain: Mapping[str, Any], problems: list[str]) -> History | None:
    errors: list[str] = []
    config: Config = schema.build(Config, changes.drop_segments(plain), errors)
    if errors:
        problems.append(
            "this version of the program cannot read the run's config, so there is no advice: "
            + "; ".join(errors)
        )
        return None
    segments: tuple[Mapping[str, Any], ...] = tuple(plain.get("segments", ()))
    return History(config, (), segments)


def _read_rounds(workdir: Path, problems: list[str]) -> Iterator[Manifest]:
    round = 0
    while (folder := round_folder(workdir, round)).is_dir():
        manifest = _try_manifest(folder, problems)
        if manifest is None:
            return
        yield manifest
        round += 1


def _try_manifest(folder: Path, problems: list[str]) -> Manifest | None:
    try:
        return manifests.load_manifest(folder)
    except UserError as error:
        problems.append(f"{folder.name}/{MANIFEST}: {error}")
        return None


def _read_metrics(path: Path, problems: list[str]) -> list[dict[str, float]]:
    try:
        return read_metrics(path) if path.is_file() else []
    except MetricsError as error:
        problems.append(str(error))
        return []


def _read_execution(workdir: Path, problems: list[str]) -> Mapping[str, Any]:
    try:
        starts = execution.read_starts(workdir)
    except (ValueError, TypeError) as error:
        problems.append(f"{execution.FILE}: {error}")
        return {}
    return starts[-1].execution if starts else {}


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects in a file of lines; one that is cut off or is no object is left out.

    A file that is not there has no lines.
    """
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value
