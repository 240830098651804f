"""What the stages of a round share, and what each of them returns."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from jax.sharding import Mesh

from halos_jax.checkpoints.saver import Saver
from halos_jax.checkpoints.store import Checkpoints
from halos_jax.config import Config
from halos_jax.data.lengths import Lengths, make_lengths
from halos_jax.metrics import MetricWriter
from halos_jax.packing.layout import LayoutMemory
from halos_jax.policies.host_copy import HostCopy
from halos_jax.policies.policy import Policy
from halos_jax.rewards.labels import Labels, Scorer
from halos_jax.rounds.budget import Budget
from halos_jax.sampling.sampler import Sampler
from halos_jax.training.loop import Trainer
from halos_jax.training.reference import refer
from halos_jax.types import Prompt, Sample
from halos_jax.workdir.interrupt import StopSignal
from halos_jax.workdir.workspace import Workspace


class StageResult(NamedTuple):
    """What a stage returns: the number of records in each file, and metrics for people.

    `decisions` are what the stage has chosen by itself, for the manifest.

    Example:
      StageResult({"feedback.jsonl": 512}, {"feedback_pairs": 512, "feedback_ties": 3})
    """

    files: Mapping[str, int]
    metrics: Mapping[str, Any]
    decisions: Mapping[str, Any] = MappingProxyType({})


NOTHING = StageResult({}, {})


def refuse_scores(samples: Sequence[Sample]) -> Labels:
    """Stand in for the scorer in a task that only samples: raise RuntimeError."""
    raise RuntimeError(f"no reward was made to score {len(samples)} samples")


def seed_batches(seed: int, round: int) -> int:
    """Return the seed of the order in which a round's examples are taken, from the run's seed."""
    return zlib.crc32(f"{seed} {round}".encode())


def do_nothing() -> None:
    """Stand in for what a run does after a round, in a run that does nothing."""


def refuse_remake(place: Mapping[str, int]) -> tuple[Workspace, Trainer]:
    """Stand in for what makes a run's trainer anew, in a run without: raise RuntimeError."""
    raise RuntimeError(f"nothing was given to make a trainer at {place}")


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """What draws samples from a policy and scores them, in a round or in a standalone task.

    `scorers` are additional ones, by name, for held-out samples (`rewards/held_out.py`).
    """

    workspace: Workspace
    sampler: Sampler
    scorer: Scorer = refuse_scores
    scorers: Mapping[str, Scorer] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> Config:
        return self.workspace.config

    @property
    def stop(self) -> StopSignal:
        return self.workspace.stop


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that the stages of an online run share."""

    workspace: Workspace
    rollouts: Rollouts
    policy: Policy  # that the run starts from
    trainer: Trainer
    checkpoints: Checkpoints
    writer: MetricWriter
    prompts: Sequence[Prompt]
    held_out: Sequence[Prompt]
    test: Sequence[Prompt] = ()
    layouts: LayoutMemory = dataclasses.field(default_factory=LayoutMemory)  # reward model
    sft: HostCopy = dataclasses.field(default_factory=HostCopy)  # params of the reference "sft"
    budget: Budget = Budget(1, 1)
    on_round: Callable[[], None] = do_nothing  # called when a round is done and on disk
    # Round -> seconds that this process has compiled in it
    compiled: dict[int, float] = dataclasses.field(default_factory=dict)
    # Makes workspace and trainer as a resume from that "round" and "step" does.
    remake: Callable[[Mapping[str, int]], tuple[Workspace, Trainer]] = refuse_remake

    @property
    def config(self) -> Config:
        return self.workspace.config

    @property
    def workdir(self) -> Path:
        return self.workspace.workdir

    @property
    def stop(self) -> StopSignal:
        return self.workspace.stop

    @property
    def mesh(self) -> Mesh:
        return self.workspace.mesh

    @property
    def num_rounds(self) -> int:
        """How many rounds were expected to have prompts when this process opened the run."""
        return self.budget.count_rounds(len(self.prompts))

    @functools.cached_property
    def referring(self) -> Trainer:
        """The trainer with which the log-probabilities of the reference "sft" are computed."""
        other = self.policy.reference
        return refer(self.trainer, None if other is None else other.decoder)

    @functools.cached_property
    def lengths(self) -> Lengths:
        return make_lengths(self.config, self.trainer.decoder.max_positions)

    @functools.cached_property
    def saver(self) -> Saver:
        return Saver(self.checkpoints, self.writer, self.stop, self.config.checkpoint.every)
