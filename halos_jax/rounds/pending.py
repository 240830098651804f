"""Commit the stages of a round: each round has one manifest, replaced after every stage."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from halos_jax import sharding, storage
from halos_jax.checkpoints.shelf import find_sums
from halos_jax.config import Config, ConfigError
from halos_jax.console import compiling
from halos_jax.course.best import read_best
from halos_jax.course.verdicts import read_verdict
from halos_jax.data import datasets
from halos_jax.policies.branch import read_origin
from halos_jax.rounds.budget import RoundPlan
from halos_jax.rounds.context import NOTHING, Run, StageResult
from halos_jax.rounds.outcome.decisions import (
    find_needed,
    find_start,
    name_policy,
    report_verdict,
)
from halos_jax.rounds.prompts import name_held_out
from halos_jax.rounds.proof.origin import UNKNOWN, Origin, name_sampled
from halos_jax.rounds.report import report_stage
from halos_jax.rounds.stages import remove_eval_shards
from halos_jax.rounds.watch import before
from halos_jax.workdir import manifests
from halos_jax.workdir.manifests import Manifest, round_folder
from halos_jax.workdir.seals import chain
from halos_jax.workdir.timing import time_stage

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PendingRound:
    """A round that is trained and evaluated, while its checkpoint may not be on disk yet.

    Attributes:
      manifest: the round's manifest as it is on disk: it names the stages up to feedback.
      evaluation: the result of the round's evaluation.
      origin: what the next round samples from: the policy at the round's end.
      sampled: what drew the samples of the evaluation.
    """

    manifest: Manifest
    evaluation: StageResult
    origin: Origin = UNKNOWN
    sampled: Origin = UNKNOWN

    @property
    def as_committed(self) -> Manifest:
        """The manifest with what the evaluation adds to it, apart from stages and files."""
        return dataclasses.replace(
            self.manifest,
            metrics={**self.manifest.metrics, **self.evaluation.metrics},
            decisions={**self.manifest.decisions, **self.evaluation.decisions},
            trained=self.origin.fingerprint,
        )

    @property
    def is_final(self) -> bool:
        """Whether the guard has decided that the next round does not go on from this one."""
        return read_verdict(self.as_committed).is_final


def open_round(
    run: Run, round: int, plan: RoundPlan, decisions: Mapping[str, Any] = MappingProxyType({})
) -> Manifest:
    """Return the round's manifest: the one on disk, after checks, or else a new one.

    `decisions` are what the run has chosen about the new round before its first stage: they are on
    disk, with the range, before anything follows from them.
    """
    folder = round_folder(run.workdir, round)
    if run.workspace.is_writer:
        with storage.explain_os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            storage.remove_partials(folder)
    sharding.wait_for_all(f"open round {round}")
    manifest = manifests.load_manifest(folder)
    prompts = run.prompts[plan.start : plan.stop] if round else [*run.held_out, *run.test]
    identity = datasets.identify_prompts(prompts)
    if manifest is None:
        start = find_start(run.workdir, round)
        previous = name_policy(run.config, start)
        reference = name_reference(run.config, previous, run.workdir)
        manifest = Manifest(
            round=round,
            seed=run.config.seed,
            start=plan.start if round else 0,
            stop=plan.stop if round else 0,
            prompts=identity,
            policy=previous,
            reference=reference,
            decisions=dict(decisions),
            origin={} if round else read_origin(run.checkpoints),
            layouts=run.layouts.to_record(),
        )
        if decisions and run.workspace.is_writer:
            manifests.save_manifest(folder, manifest, run.workspace.ledger)
        return manifest
    if manifest.prompts != identity:
        raise ConfigError(
            f"{_name_source(run, round)}: its prompts are not those that round "
            f"{round} of {run.workdir} was started with; put the data back as they were, or start "
            "a new run with --config.workdir=DIR (rounds.num_skip leaves out prompts at the start)"
        )
    manifests.verify_files(folder, manifest)
    return manifest


def name_reference(config: Config, policy: str, workdir: Path) -> str:
    """Return the name that a manifest has for the reference of a round.

    That of `model.reference` has the hash of its files' fingerprints in inputs.json.

    Args:
      policy: the name of what the round starts from.
    """
    kind = config.rounds.reference
    if not config.model.reference:
        return {"sft": "sft", "round_start": policy}.get(kind, kind)
    return f"model.reference {chain.hash_inputs(workdir).get('model.reference', '')[:32]}".strip()


def _name_source(run: Run, round: int) -> str:
    if round:
        return "data.train"
    return name_held_out(run.config) + (" or data.test" if run.test else "")


@dataclasses.dataclass
class OpenStage:
    """A stage under way. `write_time` records its time before its end; see `time_stage`."""

    write_time: Callable[[], None]
    done: Mapping[str, int] | None = None

    def tell(self, **done: int) -> None:
        """Say at the end of the stage what it has done: noun -> count; see `report_stage`."""
        self.done = done


@contextlib.contextmanager
def open_stage(run: Run, round: int, stage: str) -> Iterator[OpenStage]:
    """Time the block as `stage`; if the run is stopped inside it, the message names the stage."""
    run.stop.place = f"round {round}, stage {stage}"
    began = time.monotonic()
    compiling.take_seconds()  # what was compiled before is not of this stage
    with time_stage(run.workspace.ledger, round, stage) as write_time:
        opened = OpenStage(write_time)
        yield opened
    if opened.done is not None and run.workspace.is_writer:
        report_stage(run, round, stage, time.monotonic() - began, opened.done)


def commit_stage(
    run: Run,
    manifest: Manifest,
    stage: str,
    done: StageResult = NOTHING,
    *,
    is_saved: bool = True,
    **updates: Any,
) -> Manifest:
    """Record in the round's manifest that `stage` is done; return the new manifest.

    If it is not saved, it is on disk only when the stage after it is committed. `updates` are of
    other fields.
    """
    return manifests.commit_stage(
        round_folder(run.workdir, manifest.round),
        manifest,
        stage,
        files=done.files,
        metrics=done.metrics,
        decisions=done.decisions,
        layouts=run.layouts.to_record(),
        is_writer=run.workspace.is_writer and is_saved,
        ledger=run.workspace.ledger,
        **run.workspace.name_execution(manifest, stage),
        **updates,
    )


def commit_extent(run: Run, manifest: Manifest, done: StageResult, **updates: Any) -> Manifest:
    """Record an extent of a round whose first stage is under way; return the new manifest."""
    return manifests.update_manifest(
        round_folder(run.workdir, manifest.round),
        manifest,
        files=done.files,
        decisions=done.decisions,
        layouts=run.layouts.to_record(),
        is_writer=run.workspace.is_writer,
        ledger=run.workspace.ledger,
        **updates,
    )


def commit_test(run: Run, manifest: Manifest, done: StageResult, origin: Origin) -> Manifest:
    """Add the test of the final policy to the manifest of its round, which is complete."""
    folder = round_folder(run.workdir, manifest.round)
    tested = manifests.update_manifest(
        folder,
        manifest,
        files=done.files,
        metrics=done.metrics,
        is_writer=False,
        ledger=run.workspace.ledger,
        **run.workspace.name_execution(manifest, "test"),
        **name_sampled(origin, *done.files),
    )
    if run.workspace.is_writer:
        tested = chain.extend(manifest, tested)
        manifests.save_manifest(folder, tested, run.workspace.ledger)
    remove_eval_shards(run, tested)
    return tested


def commit_round(run: Run, pending: PendingRound) -> Manifest:
    """Wait until the round's checkpoint is on disk, then commit the round's last two stages.

    Only then are the checkpoints deleted that nothing needs any more.
    """
    manifest = pending.manifest
    if manifest.next_stage == "train":
        run.checkpoints.finish()
        signs = before.read_before(round_folder(run.workdir, manifest.round))
        trained = pending.origin.fingerprint
        manifest = commit_stage(run, manifest, "train", signs, trained=trained)
    drawn = [name for name in pending.evaluation.files if name != "feedback.jsonl"]
    manifest = commit_stage(
        run,
        manifest,
        "evaluate",
        pending.evaluation,
        is_saved=False,
        trained=pending.origin.fingerprint,
        **name_sampled(pending.sampled, *drawn),
    )
    if run.workspace.is_writer:
        manifest = _seal(run, manifest)
        folder = round_folder(run.workdir, manifest.round)
        manifests.save_manifest(folder, manifest, run.workspace.ledger)
    sharding.wait_for_all(f"commit round {manifest.round}")
    if read_best(manifest) is not None:
        needed = find_needed(run.config, run.workdir, manifest.round)
        run.checkpoints.keep_rounds(needed)
    if read_verdict(manifest).action != "none":
        is_last = manifest.stop >= run.budget.end(len(run.prompts))
        report_verdict(manifest, is_last=is_last)
    remove_eval_shards(run, manifest)
    return manifest


def _seal(run: Run, manifest: Manifest) -> Manifest:
    """Return the manifest of a complete round with its link of the run's chain."""
    before = manifests.load_manifest(round_folder(run.workdir, manifest.round - 1))
    facts = {
        **chain.describe_config(run.workspace.history, manifest.round),
        "inputs": chain.hash_inputs(run.workdir),
        "rows": chain.hash_rows(run.workdir, *chain.find_steps(before, manifest)),
        "checkpoint": chain.hash_sums(find_sums(run.workdir / "checkpoints", manifest.round)),
    }
    return chain.seal(manifest, chain.find_digest(before), facts)
