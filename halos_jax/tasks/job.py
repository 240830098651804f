"""A task that stands alone: its workdir, what it was started on, and how far it has come.

    workdir/config.json      as of every run
    workdir/manifest.json    the task's inputs, the stages that are done, the files' hashes

The manifest is there before any result is, so that a job which is carried on cannot mix the results
of two inputs or two policies.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from halos_jax import sharding, storage
from halos_jax.config import Config, ConfigError
from halos_jax.config.tasks import TASKS
from halos_jax.policies.source import Source
from halos_jax.rewards.scorers import Scorer
from halos_jax.sampling.sampler import Sampler
from halos_jax.tasks.inputs import check_inputs
from halos_jax.workdir import state as states
from halos_jax.workdir.interrupt import StopSignal
from halos_jax.workdir.ledger import Ledger
from halos_jax.workdir.state import Manifest

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Job:
    """An open job; made by `open_job`. It has what `stages.Sampling` asks for once that is made."""

    config: Config
    workdir: Path
    mesh: Mesh
    stop: StopSignal
    is_writer: bool
    manifest: Manifest | None
    ledger: Ledger
    sampler: Sampler | None = None
    scorer: Scorer | None = None
    rules: Mapping[str, Scorer] = dataclasses.field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether every stage is done; that there is nothing to do is logged."""
        complete = self.manifest is not None and self.manifest.next_stage is None
        if complete:
            logger.info("%s is complete: nothing to do", self.workdir)
        return complete

    @property
    def policy(self) -> str:
        """What the job has sampled so far was sampled by; empty where it has not begun."""
        return self.manifest.policy if self.manifest else ""

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics of the stages that are done."""
        return dict(self.manifest.metrics)

    def begin(
        self,
        *,
        inputs: str,
        policy: Source | None = None,
        output: Path | None = None,
        field: str = "",
    ) -> None:
        """Write down what the job works on, or check that it still does.

        Args:
          inputs: identity of the input records.
          policy: where the policy comes from, if the job has one.
          output: what the job will leave outside of the workdir; it must not be there before.
          field: the config's field that names `output`.

        Raises:
          ConfigError: where the inputs have changed, or a model, or `output` is taken.
        """
        reads, record = self.config, None
        if policy is not None:
            reads, record = dataclasses.replace(reads, model=policy.settings), policy.record
        check_inputs(self.ledger, reads, is_begun=self.manifest is not None, policy=record)
        if self.manifest is not None:
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
        sharding.wait_for_all("begin the job")  # every process has looked before one writes
        name = policy.name if policy is not None else ""
        self.manifest = Manifest(
            round=0, seed=self.config.seed, prompts=inputs, policy=name, task=self.config.task
        )
        if self.is_writer:
            states.save_manifest(self.workdir, self.manifest, self.ledger)

    def commit(self, stage: str, **updates: Any) -> None:
        """Record that a stage is done; arguments as of `states.commit_stage`."""
        updates |= {"is_writer": self.is_writer, "ledger": self.ledger}
        self.manifest = states.commit_stage(self.workdir, self.manifest, stage, **updates)


@contextlib.contextmanager
def open_job(config: Config, stop: StopSignal) -> Iterator[Job]:
    """Open the job in `config.workdir`, new or to be carried on, with its mesh the current one.

    Raises:
      WorkdirError: as `states.open_run`.
      ManifestError: where its manifest, or a file that it names, has changed.
    """
    stop.place = f"task {config.task}"
    info = states.join_run(config)
    try:
        mesh = sharding.make_mesh(config.mesh)
        with storage.explain_run_errors(info.workdir), jax.set_mesh(mesh):
            manifest = states.load_manifest(info.workdir)
            if manifest is not None:
                states.verify_files(info.workdir, manifest)
            if manifest is None or manifest.next_stage is not None:
                states.begin_segment(info, stages=list(manifest.stages) if manifest else [])
            sharding.wait_for_all("open the job")  # before a process begins it
            yield Job(info.config, info.workdir, mesh, stop, info.is_writer, manifest, info.ledger)
    finally:
        info.close()


def _data_field(config: Config) -> str:
    return TASKS[config.task].data
