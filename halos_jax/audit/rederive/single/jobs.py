"""Tasks without rounds made again: each against the inputs that it names.

"sample", "label", "eval" and "compare" are done once more, in a folder of their own, with the
recorded answers as their shards; a few shards are drawn again. Of "sft", "reward_model" and "align"
the first steps are taken again, or all of them.
"""

import dataclasses
import json
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax

from halos_jax import sharding
from halos_jax.audit.findings import Finding, compare, differs, not_checked, passed
from halos_jax.audit.opened import Opened
from halos_jax.audit.rederive import same, samples, steps
from halos_jax.audit.rederive.attempts import attempt, hush
from halos_jax.audit.rederive.compare import (
    Amount,
    Difference,
    Tolerance,
    compare_rows,
    compare_values,
    drop_shares,
    judge,
)
from halos_jax.audit.rederive.feedback import drop_later
from halos_jax.audit.rederive.judges import answer_from_cache
from halos_jax.audit.rederive.rewards import explain_lost, find_tolerance, read_rows
from halos_jax.audit.rederive.samples import Draws
from halos_jax.config import Config
from halos_jax.data.records import formats as records
from halos_jax.losses import get_loss
from halos_jax.models.lora import merge_adapter
from halos_jax.policies.against import load_policy
from halos_jax.policies.policy import Policy
from halos_jax.rounds.context import Rollouts
from halos_jax.rounds.evaluation import EVAL
from halos_jax.rounds.outcome import comparison
from halos_jax.tasks import eval as evaluating
from halos_jax.tasks import label, sample
from halos_jax.tasks.job import Job
from halos_jax.tasks.launch import use_copied_cache
from halos_jax.tasks.versus import compare as comparing
from halos_jax.training import loop as training
from halos_jax.training.loop import Trainer
from halos_jax.types import Prompt, Sample
from halos_jax.workdir.changes import History
from halos_jax.workdir.interrupt import StopSignal
from halos_jax.workdir.ledger import no_ledger
from halos_jax.workdir.manifests import Manifest
from halos_jax.workdir.runs import RunInfo
from halos_jax.workdir.workspace import Workspace

_DO: Mapping[str, Callable[[Job], None]] = {
    "sample": sample.draw_samples,
    "label": label.label_job,
    "eval": evaluating.evaluate_job,
    "compare": comparing.compare_job,
}
# The files with a task's answers: its policy's, and those of the one that it is compared with.
_ANSWERS = {"sample": ("samples.jsonl",), "eval": (EVAL, evaluating.THEIRS)}
_SHARDS = {"sample": "samples", "eval": "eval"}  # how their shards are called


@dataclasses.dataclass(frozen=True)
class Scored:
    """What re-scores the answers of a task; a `samples.Rescorer`."""

    trainer: Trainer
    policy: Policy


def open_copy(opened: Opened) -> Workspace:
    """Return a workspace in a folder of its own, with the config of the run's last start."""
    scratch = opened.closing.enter_context(tempfile.TemporaryDirectory(prefix="halos_jax-verify-"))
    config = dataclasses.replace(opened.config, mesh=opened.given.mesh, progress=False)
    config = answer_from_cache(config, opened.workdir)
    folder, mesh = Path(scratch), sharding.make_mesh(config.mesh)
    use_copied_cache(opened.workdir, folder)
    info = RunInfo(
        folder, True, True, History(config, (), opened.history.segments), no_ledger(folder)
    )
    return Workspace(config, info, mesh, StopSignal())


def check_job(opened: Opened, manifest: Manifest) -> list[Finding]:
    """Do a task again, as far as `config.verify` says, and compare all its files and metrics."""
    name = opened.config.task
    if manifest.next_stage is not None:
        return [not_checked(name, "made again", f"{manifest.next_stage} is not done yet")]
    workspace = open_copy(opened)
    lost = explain_lost(workspace.config)
    with jax.set_mesh(workspace.mesh), hush():
        found = list(_check_answers(opened, workspace, manifest))
        if lost:
            return [*found, not_checked("rewards", "scored again", lost)]
        return [*found, *attempt(name, lambda: _do_again(opened, workspace, manifest))]


# --------------------------------------------------------------------------- answers


def _check_answers(opened: Opened, workspace: Workspace, manifest: Manifest) -> Iterator[Finding]:
    """Check the answers of a policy, and put them where the task looks for its shards."""
    task = opened.config.task
    job = Job(workspace, manifest)
    first: Policy | None = None
    for file in _ANSWERS.get(task, ()):
        if file not in manifest.files:
            continue
        draws = _read_draws(opened.workdir / file, workspace.config, task)
        folder = (workspace.workdir / file).parent
        folder.mkdir(exist_ok=True)
        _put_shards(workspace, draws, _SHARDS[task], folder)
        policy = job.find_policy() if first is None else job.find_against(first)
        name = workspace.config.eval.against if first is not None else ""
        first = first or policy
        rollouts = sample.make_rollouts(job, policy, name=name)
        yield from attempt(draws.check, partial(_check_prompts, rollouts, draws))
        if opened.given.verify.samples:
            again = partial(_draw_again, opened, job, policy, rollouts, draws)
            yield from attempt(draws.check, partial(again, folder))


def _check_prompts(rollouts: Rollouts, draws: Draws) -> list[Finding]:
    return [samples.check_prompts(rollouts, [draws])]


def _read_draws(path: Path, config: Config, task: str) -> Draws:
    rows = [{name: one for name, one in row.items() if name != "scores"} for row in read_rows(path)]
    found = [
        records.sample_from_record(row, file=str(path), line=line)
        for line, row in enumerate(rows, 1)
    ]
    prompts: dict[str, Prompt] = {}
    for one in found:
        prompts.setdefault(one.prompt.prompt_id, one.prompt)
    round = config.sampling.round if task == "sample" else 0
    check = "samples" if task == "sample" else "held-out samples"
    return Draws(check, round, list(prompts.values()), found)


def _put_shards(workspace: Workspace, draws: Draws, label: str, folder: Path) -> None:
    size = workspace.config.sampling.shard_prompts
    for number, _ in enumerate(range(0, len(draws.prompts), size)):
        shard: list[Sample] = [
            dataclasses.replace(one, reward=None) for one in draws.take_shard(number, size).samples
        ]
        path = folder / f"{label}.shard-{number:04d}.jsonl"
        records.write_records(path, map(records.sample_to_record, shard))


def _draw_again(
    opened: Opened, job: Job, policy: Policy, rollouts: Rollouts, draws: Draws, folder: Path
) -> list[Finding]:
    depth, config = opened.given.verify, job.config
    loss = get_loss({"name": "sft"})
    trainer = training.make_trainer(config, policy.decoder, loss, job.mesh, total_steps=1)
    seed = zlib.crc32(f"{depth.seed} {draws.check}".encode())
    size = config.sampling.shard_prompts
    folder = folder / "again"
    folder.mkdir()
    stage = "sample" if config.task == "sample" else "evaluate"
    manifest = opened.manifests[0]
    drawn = samples.check_drawn(
        Scored(trainer, policy),
        rollouts,
        merge_adapter(*load_policy(policy, job.mesh)),
        [draws],
        samples.choose_shards([draws], size, depth.samples, seed),
        is_same=same.is_same(job.workspace, manifest, stage),
        folder=folder,
    )
    return [drawn]


# --------------------------------------------------------------------------- files


def _do_again(opened: Opened, workspace: Workspace, manifest: Manifest) -> Iterator[Finding]:
    """Do a task once more, and compare its files and metrics with the recorded ones."""
    task, config = opened.config.task, workspace.config
    outputs = {name: Path(name) for name in manifest.files if Path(name).is_absolute()}
    if config.sampling.output:
        made = workspace.workdir / f"output{Path(config.sampling.output).suffix}"
        settings = dataclasses.replace(config.sampling, output=str(made))
        workspace = workspace.with_config(dataclasses.replace(config, sampling=settings))
    begun = dataclasses.replace(
        manifest, stages=(), files={}, metrics={}, decisions={}, sampled_by={}, chain={}
    )
    job = Job(workspace, begun)
    _DO[task](job)
    again = job.manifest or begun
    records_of = list(manifest.executed)
    is_same = all(same.is_same(workspace, manifest, stage) for stage in records_of)
    close = _find_close(config, task)
    for name in manifest.files:
        recorded = outputs.get(name, opened.workdir / name)
        own = [one for one in again.files if Path(one).is_absolute()]
        path = workspace.workdir / name
        if name in outputs and own:
            path = Path(own[0])
        count = manifest.files[name].count
        yield _compare_files(recorded, path, count, close, is_same=is_same and bool(records_of))
    yield from _compare_marks(workspace, manifest, again.sampled_by)
    known, found = dict(manifest.metrics), dict(again.metrics)
    yield judge(
        task,
        "the manifest's metrics",
        compare_values(known, found),
        compare_values(drop_shares(known), drop_shares(found), close),
        is_same=is_same and bool(records_of),
        amount=Amount(len(known), len(known), "metrics"),
    )


def _compare_marks(
    workspace: Workspace, manifest: Manifest, again: Mapping[str, str]
) -> Iterator[Finding]:
    """Compare who drew the samples of each file with who has, or would have, drawn them now."""
    known, what = manifest.sampled_by, "policies that drew them"
    lost = [name for name in known if name not in again]
    if lost:
        why = f"{', '.join(lost)}: nothing says any more who drew what it is made of"
        yield not_checked("samples", what, why, len(lost), "policies")
    wrong = [
        f"{name}: {mark[:12]} is recorded, and {again[name][:12]} draws it"
        for name, mark in known.items()
        if name in again and again[name] != mark
    ]
    stage = "evaluate" if workspace.config.task == "eval" else "sample"
    made = same.explain_made(workspace.config.model, workspace, manifest, stage)
    if wrong and made:
        yield not_checked("samples", what, made, len(wrong), "policies")
    elif len(lost) < len(known):
        yield compare("samples", what, wrong, len(known) - len(lost), unit="policies")


def _find_close(config: Config, task: str) -> Tolerance:
    """Return how far numbers may be from those of other devices."""
    if task == "eval" and config.eval.on == "feedback":
        return steps.find_close(config.model.compute_dtype)
    return find_tolerance(config)


def _compare_files(
    recorded: Path, made: Path, count: int, close: Tolerance, *, is_same: bool
) -> Finding:
    name, what = recorded.name, "made again from the task's inputs"
    if not recorded.exists() or not made.exists():
        return differs(name, what, "it is not there, or was not made", count, unit="records")
    if recorded.read_bytes() == made.read_bytes():
        return passed(name, f"{what}, byte for byte", count, unit="records")
    if recorded.suffix != ".jsonl":
        exact = within = Difference("other bytes")
        if name in (evaluating.RESULT, comparison.COMPARISON):
            one, other = (json.loads(path.read_text(encoding="utf-8")) for path in (recorded, made))
            exact = compare_values(one, other)
            within = compare_values(_drop_counts(one), _drop_counts(other), close)
        return judge(name, what, exact, within, is_same=is_same, amount=Amount(1, 1, "files"))
    rows = [read_rows(recorded), read_rows(made)]
    rows[1] = drop_later(*rows)
    exact = compare_rows(rows[0], rows[1])
    within = compare_rows(rows[0], rows[1], close)
    return judge(name, what, exact, within, is_same=is_same, amount=Amount(count, count, "records"))


def _drop_counts(value: Any) -> Any:
    """Return JSON without what a near tie turns over: shares of comparisons, and their counts."""
    if not isinstance(value, Mapping):
        return value
    kept = {name: _drop_counts(one) for name, one in drop_shares(value).items()}
    return {name: one for name, one in kept.items() if name not in ("wins", "ties", "losses")}
