"""A round's manifest: opened, committed stage by stage, the last two when the policy is on disk."""

from types import SimpleNamespace

import pytest

from halos_jax.config import Config, ConfigError
from halos_jax.data.records.formats import write_records
from halos_jax.rounds import pending, stages
from halos_jax.rounds.budget import RoundPlan
from halos_jax.rounds.context import StageResult
from halos_jax.rounds.watch import before
from halos_jax.types import Prompt, Turn
from halos_jax.workdir import manifests, timing
from halos_jax.workdir.ledger import open_ledger
from halos_jax.workdir.manifests import Manifest, round_folder
from tests.rounds.stand_ins import PROMPTS, make_run


def test_prompts_that_have_changed_are_refused(tmp_path):
    """A round's range of the order means other prompts when the file has changed."""
    prompts = [Prompt(f"p{i}", (Turn("user", f"question {i}"),)) for i in range(4)]
    plan = RoundPlan(1, 3)

    def open_round(train, held_out, round):
        run = make_run(workdir=tmp_path, prompts=train, held_out=held_out, config=Config(seed=4))
        return pending.open_round(run, round, plan)

    first, held_out = prompts[:3], prompts[3:]
    for round, stage in ((0, "evaluate"), (1, "sample")):
        manifest = open_round(first, held_out, round)
        assert (manifest.seed, manifest.policy, manifest.stages) == (4, "sft", ())
        (round_folder(tmp_path, round) / "samples.jsonl").write_text("{}\n")
        files = {"samples.jsonl": 1}
        manifests.commit_stage(round_folder(tmp_path, round), manifest, stage, files=files)
        assert open_round(first, held_out, round).stages == (stage,)
    assert open_round(first, held_out, 1).start == 1
    # What its stages have left is looked at before it is read again.
    (round_folder(tmp_path, 1) / "samples.jsonl").write_text("{ }\n")
    with pytest.raises(manifests.ManifestError, match=r"rounds/0001.*samples.jsonl has sha256"):
        open_round(first, held_out, 1)
    (round_folder(tmp_path, 1) / "samples.jsonl").write_text("{}\n")
    # Prompts outside the round's range are free to change, those inside are not.
    assert open_round([prompts[3], *first[1:]], held_out, 1).stages == ("sample",)
    with pytest.raises(ConfigError, match=r"data\.train: its prompts are not those that round 1"):
        open_round([first[0], first[2], first[1]], held_out, 1)
    with pytest.raises(ConfigError, match=r"data\.eval: its prompts are not those that round 0"):
        open_round(first, prompts[2:], 0)


def test_a_pending_round_is_committed_when_its_checkpoint_is_on_disk(tmp_path):
    called, folder = [], round_folder(tmp_path, 2)
    folder.mkdir(parents=True)
    (folder / "eval.jsonl").write_text("{}\n")
    (folder / "eval.shard-0000.jsonl").touch()
    write_records(folder / before.FILE, [{"round": 2, "metrics": {"kl_sft": 1.5}}])

    def finish():
        called.append(manifests.load_manifest(folder))

    run = make_run(workdir=tmp_path, checkpoints=SimpleNamespace(finish=finish))
    manifest = Manifest(round=2)
    for stage in ("sample", "score", "feedback"):
        manifest = pending.commit_stage(run, manifest, stage)
    done = pending.PendingRound(manifest, StageResult({"eval.jsonl": 1}, {"reward_eval": 0.5}))
    committed = pending.commit_round(run, done)
    # It was waited for before the manifest said that the round is trained.
    assert called == [manifest] and manifest.next_stage == "train"
    # The signs of before the training are committed with it.
    assert committed.next_stage is None
    assert committed.metrics == {"kl_sft": 1.5, "reward_eval": 0.5}
    assert not (folder / before.FILE).exists()
    assert manifests.load_manifest(folder) == committed
    assert not (folder / "eval.shard-0000.jsonl").exists()
    # Committed up to its evaluation, there is no checkpoint to wait for.
    trained = manifests.commit_stage(folder, manifest, "train", metrics={"kl_sft": 1.5})
    again = pending.commit_round(run, pending.PendingRound(trained, done.evaluation))
    assert len(called) == 1 and again == committed


def test_a_stage_is_named_for_a_stop_and_timed(tmp_path):
    run = make_run(workdir=tmp_path, ledger=open_ledger(tmp_path))
    with pending.open_stage(run, 3, "train"):
        assert run.stop.place == "round 3, stage train" and not timing.read_times(tmp_path)
    [line] = timing.read_times(tmp_path)
    assert (line["round"], line["stage"]) == (3, "train")
    with pytest.raises(KeyboardInterrupt), pending.open_stage(run, 4, "train"):
        raise KeyboardInterrupt
    assert len(timing.read_times(tmp_path)) == 1


def test_what_is_decided_at_the_opening_is_on_disk_before_the_first_stage(tmp_path):
    run = make_run(workdir=tmp_path, prompts=PROMPTS, ledger=open_ledger(tmp_path))
    folder = round_folder(tmp_path, 1)
    pending.open_round(run, 1, RoundPlan(0, 2))
    assert manifests.load_manifest(folder) is None  # nothing is decided: nothing to keep
    opened = pending.open_round(run, 1, RoundPlan(0, 2), {"auto": {"prompts": 2}})
    assert manifests.load_manifest(folder) == opened and opened.stages == ()
    assert (opened.start, opened.stop, opened.decisions) == (0, 2, {"auto": {"prompts": 2}})
    # It is not decided again: the caller plans what the manifest says.
    assert pending.open_round(run, 1, RoundPlan(0, 2), {"auto": {"prompts": 9}}) == opened
    # The round before is trained again: what was opened behind it is forgotten, with the ledger.
    stages.forget_samples(run, 0)
    assert not folder.exists() and run.workspace.ledger.find(folder / "manifest.json") is None
