"""The online loop: rounds of sample -> score -> feedback -> train -> evaluate, resumed anywhere."""

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from halos_jax import sharding, storage
from halos_jax.checkpoints.store import open_checkpoints
from halos_jax.config import Config, ConfigError
from halos_jax.data import datasets
from halos_jax.devices import explain_memory
from halos_jax.losses import get_loss
from halos_jax.metrics import MetricWriter
from halos_jax.models.hf.positions import refuse_longer
from halos_jax.models.lora import merge_adapter
from halos_jax.packing.layout import LayoutMemory
from halos_jax.policies import final, source
from halos_jax.policies.start import load_frozen, load_policy, refuse_classifier
from halos_jax.rewards.function_scorer import check_records, make_rules
from halos_jax.rewards.scorers import make_scorer
from halos_jax.rounds import cuts, stages
from halos_jax.rounds.order import load_order, save_order
from halos_jax.rounds.outlook import find_place, has_new_prompts, lay_out, make_budget
from halos_jax.rounds.position import (
    Position,
    load_round_start,
    restore_position,
    sft_loader,
)
from halos_jax.rounds.prompts import load_prompts
from halos_jax.rounds.report import format_rounds, last_round, report_round
from halos_jax.rounds.rewind import rewind
from halos_jax.rounds.stages import Run
from halos_jax.sampling.sampler import make_sampler
from halos_jax.tasks.inputs import check_inputs
from halos_jax.training import loop as training
from halos_jax.training.followers import take_exported, take_policy
from halos_jax.training.loop import Dataset
from halos_jax.training.optim import warn_of_rounding
from halos_jax.training.state import count_bytes
from halos_jax.workdir import state as states
from halos_jax.workdir.interrupt import Interrupted, StopSignal
from halos_jax.workdir.state import Manifest, round_folder
from halos_jax.workdir.timing import time_stage

logger = logging.getLogger(__name__)


def run_online(config: Config, stop: StopSignal) -> dict[str, float]:
    """Run, or carry on, online alignment; return the held-out metrics of the last round.

    Everything is under `config.workdir`; the last policy is exported to `workdir/final`.
    """
    info = states.join_run(config)
    try:
        if states.is_complete(info) and not has_new_prompts(info.config, info.workdir):
            states.verify_run(info.workdir)
            for change in info.history.pick("growing"):
                logger.info("%s; for rounds not trained yet, of which there are none", change)
            logger.info("%s is complete: nothing to do", info.workdir)
            last = last_round(info.workdir)
            return dict(states.load_manifest(round_folder(info.workdir, last)).metrics)
        mesh = sharding.make_mesh(config.mesh)
        with storage.explain_run_errors(info.workdir), jax.set_mesh(mesh):
            config = source.use_final(info.config)
            check_inputs(info.ledger, config, is_begun=info.is_resumed, may_grow=("data.train",))
            run, position = _make_run(config, info, mesh, stop)
            try:
                metrics = _run_rounds(run, position)
                states.end_segments(info)
                return metrics
            except Interrupted:
                _settle(run, position)  # what is done of the round before counts
                raise
            finally:
                run.checkpoints.close()
    finally:
        info.close()


def _run_rounds(run: Run, position: Position) -> dict[str, float]:
    budget, num_rounds = run.budget, run.budget.count_rounds(len(run.prompts))
    held_out: Dataset | None = None
    for round in range(num_rounds + 1):
        plan = budget.plan_round(max(round, 1), len(run.prompts))
        manifest = _open_round(run, round, plan)
        run.layouts.load(manifest.layouts)
        folder = round_folder(run.workdir, round)
        if round == 1:
            with explain_memory("train", "the pass over held-out feedback", run.config):
                held_out = _load_held_out(run, position)
        manifest = _run_round(run, position, manifest, folder, held_out)
        if position.settle is None:
            report_round(run.workdir, manifest, num_rounds)
        if round and run.config.rounds.export_each:
            manifest = _settle(run, position) or manifest
            _export_round(run, position, round, folder)
    run.writer.flush()
    manifest = _settle(run, position) or manifest
    folder = final.export_final(
        take_exported(position.state),
        run.trainer.decoder,
        run.config.model,
        run.renderer,
        run.workdir,
        ledger=run.ledger,
        frozen=run.trainer.frozen,
    )
    logger.info(
        "the last policy is in %s; round 0 is the SFT policy:\n%s",
        folder,
        format_rounds(run.workdir),
    )
    return dict(manifest.metrics)


def _run_round(
    run: Run, position: Position, manifest: Manifest, folder: Path, held_out: Dataset | None
) -> Manifest:
    """Do the stages of a round that its manifest does not name.

    The checkpoint of the round's training is written while the held-out prompts and those of the
    next round are sampled. Until then `position.settle` is what commits the round.
    """
    round = manifest.round

    def commit(manifest: Manifest, stage: str, **done: Any) -> Manifest:
        done |= {"is_writer": run.is_writer, "ledger": run.ledger}
        done |= {"layouts": run.layouts.to_record()}
        return states.commit_stage(folder, manifest, stage, **done)

    def timed(stage: str):
        run.stop.place = f"round {round}, stage {stage}"
        return time_stage(run.ledger, round, stage)

    prompts = run.prompts[manifest.start : manifest.stop]
    if manifest.next_stage == "sample":
        with timed("sample"):
            files, metrics = stages.sample_stage(
                run, _merge(run, take_policy(position.state.params)), prompts, folder, round
            )
        _settle(run, position)
        manifest = commit(manifest, "sample", files=files, metrics=metrics)
    if "sample" in manifest.stages and run.is_writer:
        stages.remove_shards(folder, "samples")
    if manifest.next_stage == "score":
        run.stop.check()
        with timed("score"):
            files, metrics = stages.score_stage(run, folder)
        manifest = commit(manifest, "score", files=files, metrics=metrics)
    if manifest.next_stage == "feedback":
        with timed("feedback"):
            files, metrics = stages.feedback_stage(run, folder, round)
        manifest = commit(manifest, "feedback", files=files, metrics=metrics)
    if manifest.next_stage == "train" and position.round < round:
        run.stop.check()
        stages.forget_samples(run, round)
        explained = explain_memory("train", f"training of round {round}", run.config)
        with timed("train") as write_time, explained:
            position.state = stages.train_stage(
                run,
                position.state,
                folder,
                round=round,
                start=position.stage_step,
                held_out=held_out,
                load_sft=sft_loader(run, position),
                load_round_start=functools.partial(load_round_start, run, position, round),
            )
            write_time()  # when the save is done, nobody knows it any more
            stages.save_round(run, position.state, round)
        position.round, position.stage_step = round, 0
    if manifest.next_stage not in ("train", "evaluate"):
        stages.remove_eval_shards(run, folder)
        return manifest
    files, metrics = {}, {}
    if run.held_out:
        with timed("evaluate"):
            files, metrics = stages.evaluate_stage(
                run,
                _merge(run, take_exported(position.state)),
                folder,
                round=round,
                step=int(position.state.step),
            )

    def settle() -> Manifest:
        settled = manifest
        if settled.next_stage == "train":
            run.checkpoints.finish()
            settled = commit(settled, "train")
        settled = commit(settled, "evaluate", files=files, metrics=metrics)
        stages.remove_eval_shards(run, folder)
        return settled

    if manifest.next_stage == "evaluate":
        return settle()
    position.settle = settle
    return manifest


def _settle(run: Run, position: Position) -> Manifest | None:
    """Commit and report the round that is trained, if that is still to be done."""
    if position.settle is None:
        return None
    settle, position.settle = position.settle, None
    manifest = settle()
    report_round(run.workdir, manifest, run.budget.count_rounds(len(run.prompts)))
    return manifest


def _merge(run: Run, params: Any) -> Any:
    """Return the policy's params for the sampler; an adapter is added to its base there."""
    return merge_adapter(params, run.trainer.frozen)


def _export_round(run: Run, position: Position, round: int, folder: Path) -> None:
    """Export the policy of a round to `rounds/0003/model`, while it still is the one at hand."""
    model = folder / "model"
    at_its_end = position.round == round and not position.stage_step
    if not at_its_end or model.is_dir():
        return
    final.export_policy(
        take_exported(position.state),
        run.trainer.decoder,
        run.config.model,
        run.renderer,
        model,
        frozen=run.trainer.frozen,
        ledger=run.ledger,
    )
    logger.info("the policy of round %d is in %s", round, model)


# --------------------------------------------------------------------------- setting up


def _make_run(
    config: Config, info: states.RunInfo, mesh: Mesh, stop: StopSignal
) -> tuple[Run, Position]:
    decoder, renderer = load_policy(config.model, config.data.control)
    refuse_classifier(decoder, config.model.path)
    refuse_longer(decoder, {"train.max_length": config.train.max_length})
    budget, order = make_budget(config, info.workdir), load_order(config, info.workdir)
    needed = budget.num_skip + budget.total_prompts
    prompts, held_out = load_prompts(config, renderer, needed, order)
    check_records(config.reward, [*prompts, *held_out])
    checkpoints = open_checkpoints(
        info.workdir / "checkpoints", keep=config.checkpoint.keep, ledger=info.ledger
    )
    states.begin_segment(info, grown=order.growth, **find_place(checkpoints))
    if info.is_writer:
        save_order(order, info.workdir, info.ledger.note_file)
    loss = get_loss(config.loss)
    config, steps = lay_out(config, info.history, budget, len(prompts), order)
    frozen = load_frozen(config, decoder, mesh)
    if frozen is None:  # an adapter starts at zero, where no update is too small
        warn_of_rounding(config.optimizer, decoder.params_dtype)
    trainer = training.make_trainer(config, decoder, loss, mesh, total_steps=steps, frozen=frozen)
    storage.require_space(info.workdir, count_bytes(trainer.abstract_state), "a checkpoint")
    trainer = dataclasses.replace(trainer, check=stop.check)
    logger.info(
        "%d prompts, %d held out; %d rounds; mesh %s",
        len(prompts),
        len(held_out),
        budget.count_rounds(len(prompts)),
        sharding.describe(mesh),
    )
    position = restore_position(trainer, checkpoints)
    rewind(info.workdir, info.ledger, position.round, has_checkpoint=position.is_restored)
    metrics_path = info.workdir / "metrics.jsonl" if info.is_writer else None
    resume_step, layouts = int(position.state.step), LayoutMemory()
    run = Run(
        config=config,
        workdir=info.workdir,
        mesh=mesh,
        renderer=renderer,
        sampler=make_sampler(config.sampling, renderer, decoder, mesh),
        scorer=make_scorer(config, mesh, renderer, stop.check, layouts),
        rules=make_rules(config.reward),
        trainer=trainer,
        checkpoints=checkpoints,
        writer=MetricWriter(
            metrics_path,
            console=info.is_writer,
            console_every=config.train.log_every,
            resume_step=resume_step,
            note=info.ledger.note_prefix,
        ),
        stop=stop,
        prompts=prompts,
        held_out=held_out,
        is_writer=info.is_writer,
        ledger=info.ledger,
        layouts=layouts,
        budget=budget,
    )
    used = prompts[budget.num_skip : budget.num_skip + budget.total_prompts]
    cuts.check_prompts(run.sampler, (config.data.train, used), (config.data.eval, held_out))
    return run, position


def _open_round(run: Run, round: int, plan) -> Manifest:
    """Return the round's manifest as it stands on disk, checked, or a new one."""
    folder = round_folder(run.workdir, round)
    if run.is_writer:
        with storage.explain_os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            storage.remove_partials(folder)
    sharding.wait_for_all(f"open round {round}")
    manifest = states.load_manifest(folder)
    prompts = run.prompts[plan.start : plan.stop] if round else run.held_out
    identity = datasets.identify_prompts(prompts)
    if manifest is None:
        previous = f"round-{round - 1:04d}" if round > 1 else "sft"
        reference = run.config.rounds.reference
        return Manifest(
            round=round,
            seed=run.config.seed,
            start=plan.start if round else 0,
            stop=plan.stop if round else 0,
            prompts=identity,
            policy=previous,
            reference={"sft": "sft", "round_start": previous}.get(reference, reference),
            layouts=run.layouts.to_record(),
        )
    if manifest.prompts != identity:
        raise ConfigError(
            f"{'data.train' if round else 'data.eval'}: its prompts are not those that round "
            f"{round} of {run.workdir} was started with; put the data back as they were, or start "
            "a new run with --config.workdir=DIR (rounds.num_skip leaves out prompts at the start)"
        )
    states.verify_files(folder, manifest)
    return manifest


def _load_held_out(run: Run, position: Position) -> Dataset | None:
    """Return the held-out feedback, fixed for the run, with the reference's log-probs."""
    if not run.held_out:
        return None
    items = stages.load_feedback_items(run, round_folder(run.workdir, 0))
    if not items:
        logger.warning("no held-out feedback (all ties): there is no evaluation while training")
        return None
    dataset = training.make_dataset(run.trainer, items, seed=None)
    if not training.needs_reference(run.trainer.loss, items):
        return dataset
    params = sft_loader(run, position)()
    return training.add_reference(run.trainer, dataset, params, label="reference eval")
