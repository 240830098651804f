"""A checkpoint that is lost takes the rounds after it along, and nothing before them."""

import dataclasses
import shutil

import pytest

from halos_jax.checkpoints.failures import CheckpointError
from halos_jax.data.records import formats as records
from halos_jax.rounds.replay.choose import read_replayed
from halos_jax.rounds.rewind import rewind
from halos_jax.storage import hash_file
from halos_jax.workdir import intact, manifests
from halos_jax.workdir.ledger import open_ledger
from halos_jax.workdir.manifests import FileRecord, Manifest, round_folder
from halos_jax.workdir.seals import chain

FILES = {
    "sample": "samples.jsonl",
    "score": "scores.jsonl",
    "feedback": "feedback.jsonl",
    "evaluate": "eval.jsonl",
}

NAMES = {"train": ("kl_sft", "kl_sft/low"), "evaluate": ("reward_eval", "kl_stale", "steps_done")}


@pytest.fixture
def ledger(tmp_path):
    """Return the ledger of a run of three rounds, in the fourth of which is sampled."""
    ledger = open_ledger(tmp_path)
    for round in range(4):
        folder = round_folder(tmp_path, round)
        folder.mkdir(parents=True)
        manifest = Manifest(round=round)
        for stage in manifests.stages_of(round):
            name = FILES.get(stage)
            if name:
                records.write_records(folder / name, [{"round": round}])
            manifest = manifests.commit_stage(
                folder,
                manifest,
                stage,
                files={name: 1} if name else {},
                metrics=dict.fromkeys(NAMES.get(stage, (stage,)), 1.0),
                decisions={"guard": {}, "best": {}} if stage == "evaluate" else {"auto": 1},
                ledger=ledger,
            )
    folder = round_folder(tmp_path, 4)
    folder.mkdir()
    shard = folder / "samples.shard-0000.jsonl"
    records.write_records(shard, [{}], note=ledger.note_file)
    return ledger


def stages(workdir):
    found = [manifests.load_manifest(round_folder(workdir, round)) for round in range(5)]
    return [len(one.stages) if one else None for one in found]


def test_a_run_whose_checkpoint_is_there_is_left_alone(ledger, tmp_path, caplog):
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json*")}
    rewind(tmp_path, ledger, 3, has_checkpoint=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json*")} == before
    assert not caplog.records


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_later_rounds_are_forgotten_and_the_next_keeps_its_samples(
    ledger, tmp_path, trained, caplog
):
    rewind(tmp_path, ledger, trained, has_checkpoint=True)
    expected = [1] + [5] * trained + [3] + [None] * (3 - trained)
    assert stages(tmp_path) == expected
    assert f"done again from round {trained + 1} on" in caplog.text
    folder = round_folder(tmp_path, trained + 1)
    manifest = manifests.load_manifest(folder)
    assert manifest.next_stage == "train"
    assert list(manifest.metrics) == ["sample", "score", "feedback"]
    assert manifest.decisions == {"auto": 1}  # what was decided at its end is decided again
    names = {"samples.jsonl", "scores.jsonl", "feedback.jsonl", "manifest.json"}
    assert {path.name for path in folder.iterdir()} == names
    left = sorted(path.name for path in (tmp_path / "rounds").iterdir())
    assert left == [f"{round:04d}" for round in range(trained + 2)]
    manifests.verify_run(tmp_path)
    intact.check_workdir(tmp_path, open_ledger(tmp_path))


def test_what_a_round_replays_is_kept_with_its_feedback(ledger, tmp_path):
    folder = round_folder(tmp_path, 2)
    manifest = manifests.load_manifest(folder)
    records.write_records(folder / "replay.jsonl", [{"replayed_round": 1}])
    files = {**manifest.files, "replay.jsonl": FileRecord(hash_file(folder / "replay.jsonl"), 1)}
    decisions = {**manifest.decisions, "replay": {"examples": 1, "rounds": {"1": 1}}}
    manifest = dataclasses.replace(manifest, files=files, decisions=decisions)
    manifests.save_manifest(folder, manifest, ledger)
    rewind(tmp_path, ledger, 1, has_checkpoint=True)
    assert read_replayed(folder) == [{"replayed_round": 1}]
    found = manifests.load_manifest(folder)
    assert found.next_stage == "train" and found.files["replay.jsonl"] == files["replay.jsonl"]
    assert found.decisions["replay"] == decisions["replay"]


def test_without_any_checkpoint_nothing_is_thrown_away(ledger, tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint is left, but 3 round"):
        rewind(tmp_path, ledger, 0, has_checkpoint=False)
    assert stages(tmp_path) == [1, 5, 5, 5, None]


@pytest.mark.parametrize("trained", [1, 2])
def test_killed_while_it_deletes_a_model_it_is_carried_on(ledger, tmp_path, trained, monkeypatch):
    model = round_folder(tmp_path, 3) / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).write_text(name)
    ledger.note_tree(model, model)

    def remove_a_part(folder, **_):
        next(path for path in sorted(folder.rglob("*")) if path.is_file()).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        # Of what stands behind round 3 nothing is exported.
        shutil.rmtree(round_folder(tmp_path, 4))
        patch.setattr("halos_jax.rounds.rewind.shutil.rmtree", remove_a_part)
        rewind(tmp_path, ledger, trained, has_checkpoint=True)
    ledger = open_ledger(tmp_path)
    intact.check_workdir(tmp_path, ledger)
    rewind(tmp_path, ledger, trained, has_checkpoint=True)
    assert stages(tmp_path)[trained + 1 : 4] == [3] + [None] * (2 - trained)
    assert not model.exists()


def test_a_test_goes_with_the_policy_that_was_tested(ledger, tmp_path):
    folder = round_folder(tmp_path, 3)
    records.write_records(folder / "test.jsonl", [{}])
    manifest = manifests.update_manifest(
        folder,
        manifests.load_manifest(folder),
        files={"test.jsonl": 1},
        metrics={"reward_test": 1.0, "reward_test/low": 0.5},
        ledger=ledger,
    )
    assert manifest.next_stage is None and "test.jsonl" in manifest.files
    manifests.save_manifest(folder, chain.seal(manifest, "", {}), ledger)
    rewind(tmp_path, ledger, 2, has_checkpoint=True)
    found = manifests.load_manifest(folder)
    assert list(found.metrics) == ["sample", "score", "feedback"]
    assert "test.jsonl" not in found.files and not (folder / "test.jsonl").exists()
    assert found.chain == {}  # it is sealed again when it is complete again
