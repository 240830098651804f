"""Where a run goes on from."""

import gc
from types import SimpleNamespace

import pytest

from halos_jax.checkpoints.failures import CheckpointError
from halos_jax.config import BranchConfig, Config
from halos_jax.losses import get_loss
from halos_jax.packing.layout import Layout, LayoutMemory
from halos_jax.rounds import progress
from halos_jax.rounds.budget import Budget, RoundPlan
from halos_jax.rounds.context import StageResult
from halos_jax.rounds.pending import PendingRound
from halos_jax.rounds.proof.origin import Origin
from halos_jax.training import loop as training
from halos_jax.types import TrainState
from halos_jax.workdir import manifests
from halos_jax.workdir.manifests import Manifest, round_folder
from tests.rounds.stand_ins import PROMPTS, make_run

PPO = {"name": "ppo"}
BRANCH = Config(branch=BranchConfig(workdir="other"))


def test_the_policy_comes_from_the_newest_checkpoint():
    trainer = SimpleNamespace(abstract_state=None, layouts=LayoutMemory())
    known = LayoutMemory()
    known.keep("train", Layout(1, 2, 64, 32, 2, ((4, 64),)))

    def restore(record):
        record |= {"layouts": known.to_record(), "step": 9}
        checkpoints = SimpleNamespace(restore_newest=lambda abstract: ("state", record))
        found = progress.restore_progress(trainer, None, checkpoints)
        return found.state, found.round, found.stage_step

    assert restore({"round": 3, "in_stage": False}) == ("state", 3, 0)
    assert restore({"round": 3, "in_stage": True, "stage_step": 5}) == ("state", 2, 5)
    assert trainer.layouts.find("train") == known.find("train")


def test_the_policy_of_a_rounds_start_comes_back_wherever_the_run_stands(tmp_path, monkeypatch):
    asked = []
    checkpoints = SimpleNamespace(
        find_round_end=lambda round: {2: 7}.get(round),
        restore_params=lambda abstract, save_id: asked.append(save_id) or "of round 2",
    )
    trainer = SimpleNamespace(
        abstract_state=SimpleNamespace(params=None), loss=get_loss(PPO), frozen="base"
    )
    run = SimpleNamespace(
        trainer=trainer, checkpoints=checkpoints, workdir=tmp_path, policy="policy", mesh="mesh"
    )
    run.config = Config()
    state = SimpleNamespace(params="now")

    def load(round, stage_step):
        at = progress.Progress(state, round - 1, stage_step)
        return progress.load_round_start(run, at, round)

    assert load(3, 0) == "now" and not asked  # before the first step
    assert load(3, 4) == "of round 2" and asked == [7]
    monkeypatch.setattr(progress, "load_start", lambda *given: " ".join(("sft of", *given)))
    monkeypatch.setattr(training, "add_value_head", lambda trainer, params: f"{params} + head")
    assert load(1, 4) == "sft of policy mesh base + head"
    with pytest.raises(CheckpointError, match=r"the checkpoint at the end of round 4 is gone"):
        load(5, 1)
    # What a branch starts from is a checkpoint of its own.
    run.config = BRANCH
    checkpoints.find_round_end = lambda round: {0: 1}.get(round)
    assert load(1, 4) == "of round 2" and asked == [7, 1]


def test_the_sft_policy_is_loaded_anew_once_a_step_is_taken(monkeypatch):
    monkeypatch.setattr(progress, "load_sft", lambda policy, mesh, frozen: f"sft of {policy.name}")
    sft = SimpleNamespace(load=lambda load: f"copy of {load()}")
    own, other = (
        SimpleNamespace(name=name, reference=reference)
        for name, reference in (("own", None), ("other", "model.reference"))
    )
    for config, policy, step, expected in (
        (Config(), own, 0, "at hand"),
        (Config(), own, 1, "copy of sft of own"),
        (Config(), other, 0, "copy of sft of other"),
        (BRANCH, own, 0, "copy of sft of own"),
    ):
        run = SimpleNamespace(
            trainer=SimpleNamespace(frozen="base"), policy=policy, mesh="mesh", sft=sft
        )
        run.config = config
        state = SimpleNamespace(step=step, params="at hand")
        # Rounds without pairs take no step.
        assert progress.sft_loader(run, progress.Progress(state, 3))() == expected


def test_a_round_that_has_begun_keeps_its_range_and_the_next_one_is_chosen(tmp_path, monkeypatch):
    asked = []

    def choose(config, budget, done, available):
        assert available == len(PROMPTS)
        asked.append((budget.opened, [(one.round, dict(one.metrics)) for one in done]))
        return 3, {"auto": {"prompts": 3}}

    monkeypatch.setattr(progress, "choose_prompts_per_round", choose)
    run = make_run(workdir=tmp_path, prompts=PROMPTS, budget=Budget(4, 2))
    at = progress.Progress(SimpleNamespace(step=0), 0, budget=Budget(4, 2))
    for manifest in (Manifest(0), Manifest(1, start=0, stop=1)):
        folder = round_folder(tmp_path, manifest.round)
        folder.mkdir(parents=True)
        manifests.save_manifest(folder, manifest)
    assert progress.plan_round(run, at, 1) == (RoundPlan(0, 1), {}) and not asked
    at.budget = at.budget.open(1, 0, 1)
    # Round 1 is not committed yet: what its evaluation has measured is seen all the same.
    at.pending = PendingRound(Manifest(1), StageResult({}, {"reward_eval": 0.5}))
    assert progress.plan_round(run, at, 2) == (RoundPlan(1, 4), {"auto": {"prompts": 3}})
    assert asked == [(((0, 1),), [(0, {}), (1, {"reward_eval": 0.5})])]
    at.budget = at.budget.open(2, 1, 4)
    assert progress.plan_round(run, at, 3)[0].is_empty


def test_a_policy_is_read_from_the_devices_once_as_long_as_it_stays(monkeypatch):
    read, manifest = [], Manifest(3)
    monkeypatch.setattr(progress, "identify", lambda params, *_: read.append(1) or Origin(params))
    monkeypatch.setattr(progress, "find_before", lambda *given: Manifest(2))
    monkeypatch.setattr(progress, "take_policy", lambda params: params)
    run = SimpleNamespace(
        trainer=SimpleNamespace(frozen=None),
        policy=SimpleNamespace(decoder=None),
        workspace=SimpleNamespace(name_execution=lambda *given: {}),
    )
    at = progress.Progress(TrainState(3, "end of round 2", ()), 2)
    assert progress.identify_end(run, at, Manifest(2))[0].fingerprint == "end of round 2"
    for _ in range(2):
        assert progress.identify_start(run, at, manifest).fingerprint == "end of round 2"
    assert len(read) == 1
    # Another state, if only by a restore at the same step, is read; the one before is not kept.
    kept = at.identified[0]
    at.state = TrainState(3, "restored", ())
    gc.collect()
    assert kept() is None
    assert progress.identify_start(run, at, manifest).fingerprint == "restored"
    assert len(read) == 2
    before, at.state = at.state, TrainState(3, "trained", ())
    assert progress.identify_start(run, at, manifest).fingerprint == "trained"
    assert before.params == "restored" and len(read) == 3
