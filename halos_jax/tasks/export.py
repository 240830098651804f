"""`task=export`: a policy, or a checkpoint of a run, as a folder in Hugging Face format."""

import logging
from pathlib import Path

from halos_jax.config import Config
from halos_jax.models.spec import count_params
from halos_jax.policies import final
from halos_jax.policies.policy import load_trained
from halos_jax.policies.source import find_workdir
from halos_jax.rounds.context import StageResult
from halos_jax.tasks.handing import hand_on
from halos_jax.tasks.job import Job, open_job
from halos_jax.workdir.intact import FINAL
from halos_jax.workdir.interrupt import StopSignal

logger = logging.getLogger(__name__)


def run_export(config: Config, stop: StopSignal) -> dict[str, float]:
    """Export the policy that `config.model` names, in `export.dtype`; return its size.

    Where `model.path` is the workdir of a run, this exports checkpoint `model.checkpoint`. The
    default is the model that a finished run has exported, and the newest checkpoint of an
    unfinished one. The folder is `export.output`, or else `final/` in this job's workdir, which
    can then serve as the `model.path` of another task. It appears whole or not at all.
    """
    with open_job(config, stop) as job:
        output, path = config.export.output, config.model.path
        folder = (Path(output).expanduser() if output else job.workdir / FINAL).absolute()
        if not job.is_complete:
            _export(job, folder)
        is_named = job.policy.startswith(("checkpoint", "round"))
        what = f"It is {job.policy} of the run." if is_named else ""
        hand_on(job.workspace, folder, of=find_workdir(path), what=what)
        return job.metrics


def _export(job: Job, output: Path) -> None:
    settings = job.config.export
    policy = job.find_policy()
    job.begin(inputs="", policy=policy.source, output=output, field="export.output")
    params, frozen = load_trained(policy, job.mesh)
    final.export_policy(
        params,
        policy,
        output,
        frozen=frozen,
        ledger=job.workspace.ledger,
        dtype=final.choose_dtype(settings.dtype, policy),
        read_at=policy.source.read_at,
    )
    logger.info("%s of %s is in %s", policy.source.name, policy.source.path, output)
    files, metrics = {str(output / "config.json"): 1}, {"parameters": count_params(policy.decoder)}
    job.commit("export", StageResult(files, metrics))
