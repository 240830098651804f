"""A workdir as its checks see it: read once, never written, and not locked."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from halos_jax import config as config_lib
from halos_jax.config import Config
from halos_jax.config.tasks import TASKS
from halos_jax.errors import UserError
from halos_jax.storage import WorkdirError
from halos_jax.workdir import changes, intact, manifests
from halos_jax.workdir import ledger as ledgers
from halos_jax.workdir.changes import History
from halos_jax.workdir.ledger import Ledger
from halos_jax.workdir.manifests import Manifest


@dataclasses.dataclass(frozen=True)
class Opened:
    """The workdir of one task; made by `open_workdir`.

    Attributes:
      name: the task's name.
      history: the config of the run's last start, and its changes in the course of the run.
      given: the config of this command, of which only `verify`, `mesh` and what says how something
        is computed matter.
      ledger: empty if the run has none, or it cannot be read (then `problems` say so).
      manifests: those of the rounds, in order, or that of a single task; those that cannot be read
        are missing (and are among `problems`).
      problems: what could not be read, one line each.
      memory: what the checks of this workdir share with each other, such as a loaded policy.
      closing: what is closed behind the last check.
    """

    name: str
    workdir: Path
    history: History
    given: Config
    ledger: Ledger
    manifests: tuple[Manifest, ...]
    problems: tuple[str, ...] = ()
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)
    closing: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)

    @property
    def config(self) -> Config:
        """The config of the run's last start, as the workdir has it."""
        return self.history.config

    @property
    def is_online(self) -> bool:
        """Whether the run has rounds."""
        return bool(TASKS[self.config.task].first_stages)

    @property
    def is_finished(self) -> bool:
        """Whether the task has nothing left to do, as far as its files say."""
        if any(not one.get("exported", True) for one in self.history.segments):
            return False
        if TASKS[self.config.task].trains:
            return (self.workdir / intact.FINAL).is_dir()
        return bool(self.manifests) and self.manifests[-1].next_stage is None

    def folder(self, manifest: Manifest) -> Path:
        """Return the folder with the files of a manifest."""
        return (
            manifests.round_folder(self.workdir, manifest.round) if self.is_online else self.workdir
        )

    def list_derived(self) -> list[Manifest]:
        """Return the manifests whose results are to be derived again; see `verify.round`."""
        wanted = self.given.verify.round
        if not self.is_online or wanted == "all":
            return list(self.manifests)
        return [one for one in self.manifests if one.round == wanted]


def list_stages(config: Config) -> list[Config]:
    """Return the config of this command for each workdir to verify: several for a pipeline."""
    return config_lib.expand_pipeline(config) if config.task == "pipeline" else [config]


def open_workdir(given: Config) -> Opened:
    """Read the records of the workdir that a config names, without its results.

    Raises:
      WorkdirError: if there is no run in it.
      ConfigError: if its config is not one that this version can read.
    """
    workdir = Path(given.workdir)
    if not (workdir / changes.FILE).is_file():
        raise WorkdirError(
            f"workdir: {workdir} holds no run (no {changes.FILE}); set --config.workdir=DIR to the "
            "workdir of a run"
        )
    history = changes.read_recorded(workdir)
    problems = []
    try:
        ledger = ledgers.read_ledger(workdir)
    except WorkdirError as error:
        ledger, problems = ledgers.no_ledger(workdir), [str(error)]
    found = []
    for path in intact.find_manifests(workdir):
        try:
            manifest = manifests.load_manifest(path.parent)
        except UserError as error:
            problems.append(str(error))
            continue
        if manifest is None:
            continue
        found.append(manifest)
        if path.parent != workdir and path.parent.name != f"{manifest.round:04d}":
            problems.append(f"{path} is the manifest of round {manifest.round}")
    found.sort(key=lambda one: one.round)
    return Opened(
        history.config.task, workdir, history, given, ledger, tuple(found), tuple(problems)
    )


def list_places(opened: Opened) -> Iterator[tuple[str, Manifest]]:
    """Yield each manifest with the name of its place in the table."""
    for manifest in opened.manifests:
        yield (f"round {manifest.round}" if opened.is_online else opened.name), manifest
