"""A standalone task (no rounds): its workdir, its inputs, and which of its stages are done.

    workdir/config.json      as in every run
    workdir/manifest.json    the task's inputs, the stages that are done, the files' hashes

The manifest is written before any result, so a resumed job cannot mix the results of two inputs or
two policies.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from halos_jax import sharding
from halos_jax.config import Config, ConfigError
from halos_jax.config.tasks import TASKS, Task
from halos_jax.policies.against import find_against
from halos_jax.policies.policy import Policy, find_policy
from halos_jax.policies.source import Source
from halos_jax.rounds.context import NOTHING, StageResult
from halos_jax.tasks.inputs import check_inputs
from halos_jax.workdir import manifests
from halos_jax.workdir.interrupt import StopSignal
from halos_jax.workdir.manifests import Manifest
from halos_jax.workdir.seals import chain
from halos_jax.workdir.workspace import Workspace, open_workspace

logger = logging.getLogger(__name__)

# The tasks of the pipeline that a task is one of; empty: of none.
_others: ContextVar[tuple[Task, ...]] = ContextVar("_others", default=())


@dataclasses.dataclass
class Job:
    """An open job; made by `open_job`. `manifest` is None until the job has begun."""

    workspace: Workspace
    manifest: Manifest | None

    @property
    def config(self) -> Config:
        return self.workspace.config

    @property
    def workdir(self) -> Path:
        return self.workspace.workdir

    @property
    def mesh(self) -> Mesh:
        return self.workspace.mesh

    @property
    def next_stage(self) -> str | None:
        """The first stage that is not done yet, or None if all are. The job must have begun."""
        return self._begun.next_stage

    @property
    def policy(self) -> str:
        """Which policy of `model.path` it works on, as `Source.name` says; it must have begun."""
        return self._begun.policy

    @property
    def _begun(self) -> Manifest:
        if self.manifest is None:
            raise RuntimeError(f"the job in {self.workdir} has not begun")
        return self.manifest

    @property
    def is_complete(self) -> bool:
        """Whether every stage is done; if so, log that there is nothing to do."""
        complete = self.manifest is not None and self.manifest.next_stage is None
        if complete:
            logger.info("%s is complete: nothing to do", self.workdir)
        return complete

    def find_policy(self) -> Policy:
        """Return the policy that the job works on; a resumed job keeps the one it began with."""
        config, recorded = self.config, self.manifest.policy if self.manifest else ""
        control = config.data.control
        return find_policy(config.model, control=control, recorded=recorded, seed=config.seed)

    def find_against(self, first: Policy) -> Policy:
        """Return the policy that `first` is compared with; as `find_policy`."""
        recorded = self.manifest.reference if self.manifest else ""
        return find_against(self.config, first, recorded=recorded)

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics of the stages that are done."""
        return dict(self._begun.metrics)

    def begin(
        self,
        *,
        inputs: str,
        policy: Source | None = None,
        against: Source | None = None,
        output: Path | None = None,
        field: str = "",
    ) -> None:
        """Record what the job works on or, on resume, check that it is still the same.

        Args:
          inputs: a hash that identifies the input records.
          policy: where the policy comes from, if the job has one.
          against: where the policy comes from that it is compared with.
          output: the result's path outside the workdir, if any; it must not exist yet.
          field: the config field that names `output`.

        Raises:
          ConfigError: if the inputs or a model have changed, or `output` exists already.
        """
        reads = self.config
        if policy is not None:
            reads = dataclasses.replace(reads, model=policy.settings)
        if against is not None:
            second = dataclasses.replace(reads.eval, against=against.settings.path)
            reads = dataclasses.replace(reads, eval=second)
        check_inputs(
            self.workspace.ledger,
            reads,
            is_begun=self.manifest is not None,
            policy=policy.record if policy is not None else None,
            against=against.record if against is not None else None,
        )
        if self.manifest is not None:
            self.workspace.begin_execution()
            if self.manifest.prompts != inputs:
                raise ConfigError(
                    f"{_data_field(self.config)}: its records are not those that the job in "
                    f"{self.workdir} was started with; put the data back as they were, or start a "
                    "new job with --config.workdir=DIR"
                )
            return
        if output is not None and output.exists():
            raise ConfigError(
                f"{field}: {output} exists already; allowed: a new name; move it away, or set "
                f"--config.{field}=PATH"
            )
        sharding.wait_for_all("begin the job")  # every process must have looked before any writes
        self.workspace.begin_execution()
        self.manifest = Manifest(
            round=0,
            seed=self.config.seed,
            prompts=inputs,
            policy=policy.name if policy is not None else "",
            reference=against.name if against is not None else "",
            task=self.config.task,
        )
        if self.workspace.is_writer:
            manifests.save_manifest(self.workdir, self.manifest, self.workspace.ledger)

    def commit(self, stage: str, done: StageResult = NOTHING, **updates: Any) -> None:
        """Record that a stage is done, with `updates` of fields; see `manifests.commit_stage`."""
        self.manifest = manifests.commit_stage(
            self.workdir,
            self._begun,
            stage,
            files=done.files,
            metrics=done.metrics,
            is_writer=False,
            ledger=self.workspace.ledger,
            **self.workspace.name_execution(self._begun, stage),
            **updates,
        )
        if not self.workspace.is_writer:
            return
        if self.next_stage is None:
            facts = {
                **chain.describe_config(self.workspace.history, 0),
                "inputs": chain.hash_inputs(self.workdir),
            }
            self.manifest = chain.seal(self.manifest, "", facts)
        manifests.save_manifest(self.workdir, self.manifest, self.workspace.ledger)


@contextlib.contextmanager
def open_job(config: Config, stop: StopSignal) -> Iterator[Job]:
    """Open a new or resumed job in `config.workdir`, and make its mesh the current one.

    Raises:
      WorkdirError: as `open_workspace`.
      ManifestError: if its manifest, or a file that the manifest names, has changed.
    """
    stop.place = f"task {config.task}"
    _warn_of_unread(config)
    with open_workspace(config, stop) as workspace:
        manifest = manifests.load_manifest(workspace.workdir)
        if manifest is not None:
            manifests.verify_files(workspace.workdir, manifest)
        if manifest is None or manifest.next_stage is not None:
            workspace.begin_segment(stages=list(manifest.stages) if manifest else [])
        sharding.wait_for_all("open the job")  # all must have opened it before any begins
        yield Job(workspace, manifest)


@contextlib.contextmanager
def read_by_others(tasks: Sequence[Task]) -> Iterator[None]:
    """Say nothing inside the block of fields that a task does not read, but one of `tasks` does."""
    token = _others.set(tuple(tasks))
    try:
        yield
    finally:
        _others.reset(token)


def _warn_of_unread(config: Config) -> None:
    """Say that held-out and test prompts are set apart by tasks that train alone."""
    others = [TASKS[one] for one in _others.get()]
    trains = any(one.trains for one in others)
    is_read = {
        "data.holdout": trains,
        "data.test": any("data.test" in one.reads for one in others),
    }
    for path, value in (("data.holdout", config.data.holdout), ("data.test", config.data.test)):
        if value and not is_read[path]:
            logger.warning(
                "%s=%s: task=%s does not read it; it sets prompts apart in a run that trains",
                path,
                value,
                config.task,
            )
    if config.trackers.names and not trains:
        logger.warning(
            "trackers.names=%s: task=%s writes no metrics.jsonl, so trackers get nothing",
            config.trackers.names,
            config.task,
        )


def _data_field(config: Config) -> str:
    return TASKS[config.task].data
