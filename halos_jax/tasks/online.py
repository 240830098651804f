"""The online loop: rounds of sample -> score -> feedback -> train -> evaluate.

A run can be stopped and resumed at any point.
"""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable

from halos_jax.config import Config
from halos_jax.console.values import find_width
from halos_jax.course.rates import warn_of_rate
from halos_jax.devices import explain_memory
from halos_jax.models.lora import merge_adapter
from halos_jax.policies import final, source
from halos_jax.report.live import report_on
from halos_jax.rounds import evaluation, stages
from halos_jax.rounds.budget import NO_PROMPTS
from halos_jax.rounds.context import NOTHING, Run, StageResult
from halos_jax.rounds.outcome.decisions import decide, find_stop
from halos_jax.rounds.outcome.ending import Ending, has_more, report_stop, take_final
from halos_jax.rounds.outcome.fallback import fall_back
from halos_jax.rounds.outcome.table import count_tokens, format_rounds, last_round
from halos_jax.rounds.pending import (
    PendingRound,
    commit_round,
    commit_stage,
    commit_test,
    open_round,
    open_stage,
)
from halos_jax.rounds.progress import (
    Progress,
    commit_pending,
    find_before,
    identify_end,
    identify_start,
    load_round_start,
    plan_round,
    sft_loader,
)
from halos_jax.rounds.proof.origin import Origin, check_samples, identify, name_sampled
from halos_jax.rounds.proof.rescore import make_rescoring
from halos_jax.rounds.refill import extents
from halos_jax.rounds.refill.gather import gather, remove_extents
from halos_jax.rounds.report import record_round, report_end, report_resumed, report_round
from halos_jax.rounds.setup import make_run
from halos_jax.rounds.watch import after, before
from halos_jax.tasks.handing import hand_on, hand_on_again
from halos_jax.tasks.inputs import check_inputs, record_growth
from halos_jax.training import loop as training
from halos_jax.training.followers import take_exported, take_policy
from halos_jax.training.loop import Dataset
from halos_jax.types import Params, TrainState
from halos_jax.workdir import manifests, runs
from halos_jax.workdir.changes import list_segments
from halos_jax.workdir.interrupt import Interrupted, StopSignal
from halos_jax.workdir.manifests import Manifest, round_folder
from halos_jax.workdir.workspace import Workspace, open_workspace

logger = logging.getLogger(__name__)


def run_online(config: Config, stop: StopSignal) -> dict[str, float]:
    """Run or resume online alignment; return the held-out metrics of the last round.

    Everything is under `config.workdir`; the last policy, or with `rounds.keep_best` that of the
    best round, is exported to `workdir/final`.
    """
    with open_workspace(config, stop) as workspace:
        info = workspace.info
        if runs.is_complete(info) and not has_more(workspace.config, workspace.workdir):
            workspace.update_trackers()
            metrics = _report_complete(workspace)
            hand_on_again(workspace)
            return metrics
        workspace = workspace.with_config(source.use_final(workspace.config))
        grown = check_inputs(
            workspace.ledger,
            workspace.config,
            is_begun=info.is_resumed,
            may_grow=("data.train",),
        )
        run, progress = make_run(workspace)
        noted = [one["changed"] for one in list_segments(workspace.workdir, progress.round + 1)]
        used = [one for one in grown if any(one.field in changed for changed in noted)]
        record_growth(workspace.ledger, workspace.config, used)
        warn_of_rate(workspace.config, run.policy.decoder)
        with report_on(workspace) as reporter:
            run = dataclasses.replace(run, on_round=reporter.update)
            try:
                metrics = run_rounds(run, progress)
                runs.end_segments(info)
                return metrics
            except Interrupted:
                commit_pending(run, progress)  # the round before is done: keep it
                raise
            finally:
                run.checkpoints.close()


def run_rounds(run: Run, progress: Progress) -> dict[str, float]:
    """Do all remaining rounds and export the last or best policy; return the last metrics.

    Round 0 only evaluates the SFT policy; that also produces the held-out feedback. Each later
    round begins where the one before ended, until the budget or the prompts are used up.
    """
    held_out: Dataset | None = None
    report_resumed(run)
    for round in itertools.count():
        if find_stop(run.config, run.workdir, round) is not None:
            break
        plan, decisions = plan_round(run, progress, round) if round else (NO_PROMPTS, {})
        if round and plan.is_empty:
            break
        run = fall_back(run, progress, round)
        manifest = open_round(run, round, plan, decisions)
        if round:
            progress.budget = progress.budget.open(round, manifest.start, manifest.stop)
        run.layouts.load(manifest.layouts)
        if round == 1:
            with explain_memory("train", "the pass over held-out feedback", run.config):
                held_out = load_held_out(run, sft_loader(run, progress))
        is_told = manifest.next_stage is None  # by the process that has done it
        manifest = run_round(run, progress, manifest, held_out)
        if is_told and manifest.metrics.get("steps_done") == int(progress.state.step):
            record_round(run, manifest)  # which it may have been killed before
        elif progress.pending is None and not is_told:
            report_round(run, manifest, progress.budget)
        if round and run.config.rounds.export_each:
            manifest = commit_pending(run, progress) or manifest
            _export_round(run, progress, round)
    run.writer.flush()
    manifest = commit_pending(run, progress) or manifest
    step = int(progress.state.step)
    ending = take_final(run, progress)
    tested = _test_final(run, ending, step)
    _export_final(run, ending)
    return {**manifest.metrics, **tested}


def run_round(
    run: Run, progress: Progress, manifest: Manifest, held_out: Dataset | None
) -> Manifest:
    """Do the remaining stages of a round; return its manifest.

    The checkpoint of the round is written in the background, while the held-out prompts and those
    of the next round are sampled. Until it is on disk, the round is `progress.pending`.
    """
    round, folder = manifest.round, round_folder(run.workdir, manifest.round)
    if manifest.next_stage == "sample" and extents.is_on(run.config.feedback):
        manifest = gather(run, progress, manifest)
    if manifest.next_stage == "sample":
        manifest = _sample(run, progress, manifest)
    stages.remove_sample_shards(run, manifest)
    remove_extents(run, manifest)
    if manifest.next_stage in ("score", "feedback", "train"):  # which read them
        check_samples(manifest, "samples.jsonl", find_before(run, progress, round))
    if manifest.next_stage == "score":
        run.stop.check()
        with open_stage(run, round, "score") as stage:
            done = stages.score_stage(run.rollouts, folder)
            stage.tell(samples=done.files["scores.jsonl"])
        manifest = commit_stage(run, manifest, "score", done)
    if manifest.next_stage == "feedback":
        with open_stage(run, round, "feedback"):
            done = stages.feedback_stage(run.rollouts, folder, round)
        manifest = commit_stage(run, manifest, "feedback", done)
    if manifest.next_stage == "train" and progress.round < round:
        run.stop.check()
        stages.forget_samples(run, round)
        explained = explain_memory("train", f"training of round {round}", run.config)
        with open_stage(run, round, "train") as stage, explained:
            began = int(progress.state.step)
            progress.state = _train(run, progress, round, held_out)
            stage.tell(steps=int(progress.state.step) - began)
            stage.write_time()  # before the save: after it the stage is never repeated
            stages.save_round(run, progress.state, round)
        progress.round, progress.stage_step = round, 0
    if manifest.next_stage not in ("train", "evaluate"):
        stages.remove_eval_shards(run, manifest)
        return manifest
    trained, sampled = identify_end(run, progress, manifest)
    done = _evaluate(run, progress, manifest, sampled)
    # With the signs of before, which are committed later: decisions are made on all of them.
    signs = before.read_before(folder).metrics
    metrics = {**signs, **done.metrics, "steps_done": int(progress.state.step)}
    done = decide(run, manifest, done._replace(metrics=metrics))
    pending = PendingRound(manifest, done, trained, sampled)
    if manifest.next_stage == "evaluate" or pending.is_final:
        return commit_round(run, pending)
    progress.pending = pending
    return manifest


def _sample(run: Run, progress: Progress, manifest: Manifest) -> Manifest:
    """Sample from a round's prompts; commit that, and the round before."""
    round, folder = manifest.round, round_folder(run.workdir, manifest.round)
    prompts = run.prompts[manifest.start : manifest.stop]
    with open_stage(run, round, "sample") as stage:
        origin = identify_start(run, progress, manifest)
        policy = merge_adapter(take_policy(progress.state.params), run.trainer.frozen)
        rescoring = make_rescoring(run, progress.state, prompts, round)
        done = stages.sample_stage(
            run.rollouts, policy, prompts, folder, round, origin, rescoring=rescoring
        )
        stage.tell(samples=done.metrics["samples"], tokens=count_tokens(done.metrics))
        del policy
    commit_pending(run, progress)
    drawn = name_sampled(origin, "samples.jsonl")
    return commit_stage(run, manifest, "sample", done, **drawn)


def _evaluate(run: Run, progress: Progress, manifest: Manifest, origin: Origin) -> StageResult:
    """Evaluate the policy where the round is due for it; measure how stale its samples are."""
    round, done = manifest.round, NOTHING
    due = evaluation.list_due(run, manifest)
    if due:
        with open_stage(run, round, "evaluate") as stage:
            policy, folder = _take_policy(run, progress), round_folder(run.workdir, round)
            step = int(progress.state.step)
            done = evaluation.evaluate_stage(
                run, policy, folder, due, round=round, step=step, origin=origin
            )
            stage.tell(samples=evaluation.count_samples(done))
            del policy
    return after.add_staleness(run, progress.state, done, round)


def _take_policy(run: Run, progress: Progress) -> Params:
    """Return the current policy as it is evaluated and exported: averaged, its adapter merged."""
    policy: Params = merge_adapter(take_exported(progress.state), run.trainer.frozen)
    return policy


def _train(run: Run, progress: Progress, round: int, held_out: Dataset | None) -> TrainState:
    return stages.train_stage(
        run,
        progress.state,
        round_folder(run.workdir, round),
        round=round,
        start=progress.stage_step,
        held_out=held_out,
        load_sft=sft_loader(run, progress),
        load_round_start=functools.partial(load_round_start, run, progress, round),
    )


def load_held_out(run: Run, load_sft: Callable[[], Params]) -> Dataset | None:
    """Return the held-out feedback, which is fixed for the run, with the reference's log-probs.

    `load_sft` returns the params of the reference "sft".
    """
    if not run.held_out:
        return None
    items = stages.load_feedback_items(run, round_folder(run.workdir, 0))
    if not items:
        logger.warning("no held-out feedback (all ties): the loss is not evaluated during training")
        return None
    dataset = training.make_dataset(run.trainer, items, seed=None)
    if not training.needs_reference(run.trainer.loss, items):
        return dataset
    return training.add_reference(run.referring, dataset, load_sft(), label="reference eval")


def _test_final(run: Run, ending: Ending, step: int) -> dict[str, float]:
    """Score the final policy on the test prompts, if that is left; return its test's metrics.

    They are added to the manifest of the round that the policy is of.
    """
    folder = round_folder(run.workdir, ending.round)
    manifest = manifests.load_manifest(folder)
    if manifest is None:
        return {}
    if run.test and evaluation.TEST not in manifest.files:
        with open_stage(run, ending.round, "test") as stage:
            origin = identify(ending.params, run.trainer.frozen, run.policy.decoder)
            policy = merge_adapter(ending.params, run.trainer.frozen)
            done = evaluation.final_test_stage(
                run, policy, folder, round=ending.round, step=step, origin=origin
            )
            stage.tell(samples=evaluation.count_samples(done))
            del policy
        manifest = commit_test(run, manifest, done, origin)
    stages.remove_eval_shards(run, manifest)
    return {name: value for name, value in manifest.metrics.items() if "_test" in name}


def _export_round(run: Run, progress: Progress, round: int) -> None:
    """Export the policy of a round to `rounds/0003/model`, before the next round trains it."""
    model = round_folder(run.workdir, round) / "model"
    at_its_end = progress.round == round and not progress.stage_step
    if not at_its_end or model.is_dir():
        return
    final.export_policy(
        take_exported(progress.state),
        run.policy,
        model,
        frozen=run.trainer.frozen,
        dtype=final.choose_dtype(run.config.export.dtype, run.policy),
        ledger=run.workspace.ledger,
    )
    logger.info("the policy of round %d is in %s", round, model)


def _export_final(run: Run, ending: Ending) -> None:
    folder = final.export_final(
        ending.params,
        run.policy,
        run.workdir,
        ledger=run.workspace.ledger,
        frozen=run.trainer.frozen,
        dtype=final.choose_dtype(run.config.export.dtype, run.policy),
    )
    report_end(run, f"{ending.name} is in {folder}")
    hand_on(run.workspace)


def _report_complete(workspace: Workspace) -> dict[str, float]:
    """Verify a complete run, log that it is complete, and return the metrics of its last round."""
    manifests.verify_run(workspace.workdir)
    for change in workspace.history.pick("growing"):
        logger.info("%s; this is for rounds not trained yet, but there are none left", change)
    table = format_rounds(workspace.workdir, width=find_width())
    logger.info("%s is complete: nothing to do\n%s", workspace.workdir, table)
    last = manifests.load_manifest(round_folder(workspace.workdir, last_round(workspace.workdir)))
    report_stop(workspace.config, workspace.workdir, last_round(workspace.workdir))
    return dict(last.metrics) if last is not None else {}
