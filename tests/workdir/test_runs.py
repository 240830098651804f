"""A run's workdir: created, resumed, locked, refused."""

import errno
import json
import logging
import os

import pytest

from halos_jax import storage
from halos_jax.config import Config, MeshConfig, RoundsConfig, SamplingConfig, TrainConfig
from halos_jax.rounds.order import Order, save_order
from halos_jax.storage import WorkdirError
from halos_jax.workdir import manifests, runs
from halos_jax.workdir.manifests import Manifest


def write(folder, name, text="{}\n"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def fail_with(code):
    def fail(*_args, **_kwargs):
        raise OSError(code, os.strerror(code))

    return fail


def test_first_start_and_resume(tmp_path):
    workdir, config = tmp_path / "runs" / "one", Config(seed=3)
    run = runs.open_run(workdir, config)
    assert not run.is_resumed and run.workdir == workdir
    assert json.loads((workdir / "config.json").read_text())["seed"] == 3
    run.close()
    write(workdir, "x.json.partial")
    write(workdir, "metrics.jsonl")
    run = runs.open_run(workdir, config)
    assert run.is_resumed
    assert not (workdir / "x.json.partial").exists()
    run.close()


def test_a_changed_config_is_refused_with_every_change(tmp_path):
    runs.open_run(tmp_path, Config()).close()
    write(tmp_path / "rounds" / "0000", "eval.jsonl")
    changed = Config(seed=1, train=TrainConfig(batch_size=64))
    with pytest.raises(WorkdirError) as error:
        runs.open_run(tmp_path, changed)
    assert "seed: 0 -> 1" in str(error.value)
    assert "train.batch_size: 32 -> 64" in str(error.value)
    runs.open_run(tmp_path, Config()).close()  # the refusal has released the lock


def test_a_config_that_the_run_has_died_of_may_be_mended(tmp_path):
    runs.open_run(tmp_path, Config()).close()
    (tmp_path / "checkpoints").mkdir()
    info = runs.open_run(tmp_path, Config())
    save_order(Order([], (0,), is_new=True), tmp_path, info.ledger.note_file)
    info.close()
    pages = ("report.html", "comparison.html", "verification.json")
    for name in ("journal.jsonl", "executions.jsonl", *pages):  # what is said of its end
        write(tmp_path, name)
    runs.open_run(tmp_path, Config(seed=1)).close()
    assert not (tmp_path / "prompts.json").exists()  # the order is another one
    assert not (tmp_path / "executions.jsonl").exists()  # nothing was executed in them
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1
    (tmp_path / "checkpoints" / "00000001").mkdir()
    with pytest.raises(WorkdirError, match="seed: 1 -> 2"):
        runs.open_run(tmp_path, Config(seed=2))
    # Somebody else's config.json is not taken for one of ours.
    write(tmp_path / "model", "config.json", '{"model_type": "llama"}')
    with pytest.raises(WorkdirError, match=r"holds a config\.json that no run has written"):
        runs.open_run(tmp_path / "model", Config())


def test_a_field_that_may_change_is_taken_over(tmp_path):
    runs.open_run(tmp_path, Config()).close()
    write(tmp_path, "metrics.jsonl")
    info = runs.open_run(tmp_path, Config(progress=False))
    runs.begin_segment(info, step=0)
    info.close()
    assert json.loads((tmp_path / "config.json").read_text())["progress"] is False


def test_the_manifest_says_what_changed_while_its_round_was_under_way(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder, manifest = manifests.round_folder(tmp_path, 1), Manifest(round=1)
    info = runs.open_run(tmp_path, Config())
    write(folder, "samples.jsonl")
    manifest = manifests.commit_stage(
        folder, manifest, "sample", files={"samples.jsonl": 1}, ledger=info.ledger
    )
    assert manifests.load_manifest(folder).segments == ()
    for number in range(2):
        storage.write_bytes_atomic(
            folder / f"scores.shard-000{number}.jsonl", b"{}\n", note=info.ledger.note_file
        )
    info.close()
    changed = Config(sampling=SamplingConfig(slots=4), mesh=MeshConfig(fsdp=2))
    info = runs.open_run(tmp_path, changed)
    runs.begin_segment(info, round=1, step=0, grown={"data.train": ["8 prompts", "9 prompts"]})
    assert (
        "0001/scores.shard-0000.jsonl and 1 more: made before these changes, and kept; "
        "the rest is made with them"
    ) in caplog.text
    segment = {
        "round": 1,
        "step": 0,
        "changed": {
            "data.train": ["8 prompts", "9 prompts"],
            "mesh.fsdp": [1, 2],
            "sampling.slots": [256, 4],
        },
    }
    for is_writer in (False, True):
        done = manifests.commit_stage(
            folder, manifest, "score", ledger=info.ledger, is_writer=is_writer
        )
        assert done.segments == (segment,)
    assert manifests.load_manifest(folder) == done
    later = manifests.commit_stage(
        manifests.round_folder(tmp_path, 1), done, "feedback", ledger=info.ledger
    )
    assert later.segments == (segment,)
    other = manifests.round_folder(tmp_path, 2)
    other.mkdir()
    assert (
        manifests.commit_stage(other, Manifest(round=2), "sample", ledger=info.ledger).segments
        == ()
    )
    info.close()


def test_signs_may_be_switched_off_on_the_way(tmp_path):
    """As a device without memory for them advises."""
    runs.open_run(tmp_path, Config()).close()
    write(tmp_path, "metrics.jsonl")
    rounds = RoundsConfig(watch_samples=0, rescore_samples=0, rescore_mean=1.0)
    info = runs.open_run(tmp_path, Config(rounds=rounds))
    runs.begin_segment(info, round=1, step=2)
    info.close()
    (segment,) = json.loads((tmp_path / "config.json").read_text())["segments"]
    assert segment["changed"] == {"rounds.watch_samples": [128, 0]}


def test_a_corrupt_config_file_is_one_clear_error(tmp_path):
    for text in ("{", "[]"):
        write(tmp_path, "config.json", text)
        with pytest.raises(WorkdirError, match=r"config.json is not the JSON object"):
            runs.open_run(tmp_path, Config())


def test_processes_that_do_not_write_take_no_lock_and_no_files(tmp_path):
    reader = runs.open_run(tmp_path / "new", Config(), is_writer=False)
    assert not (tmp_path / "new").exists() and not reader.is_resumed
    writer = runs.open_run(tmp_path, Config())
    assert runs.open_run(tmp_path, Config(), is_writer=False).is_resumed
    with pytest.raises(WorkdirError, match="seed: 0 -> 1"):
        runs.open_run(tmp_path, Config(seed=1), is_writer=False)
    writer.close()


def test_a_file_in_place_of_the_workdir_or_its_parent(tmp_path):
    write(tmp_path, "file")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(WorkdirError, match="a file stands where a folder is needed"):
            runs.open_run(workdir, Config())


def test_a_parent_that_cannot_be_made(tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "unmounted" / "disk")
    with pytest.raises(WorkdirError, match=r"dangling.*--config.workdir=DIR"):
        runs.open_run(tmp_path / "dangling" / "run", Config())


@pytest.mark.parametrize(
    ("code", "function", "advice"),
    [
        (errno.ENOSPC, "fsync", "free some space"),
        (errno.ENOSPC, "replace", "free some space"),
        (errno.ENOSPC, "pwrite", "free some space"),
        (errno.EDQUOT, "replace", "quota"),
        (errno.EROFS, "mkdir", "read-only"),
        (errno.EACCES, "open", "write permission"),
    ],
)
def test_a_workdir_that_cannot_be_written(tmp_path, monkeypatch, code, function, advice):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail_with(code))
        with pytest.raises(WorkdirError) as error:
            runs.open_run(workdir, Config())
    assert advice in str(error.value) and str(workdir) in str(error.value)
    assert os.strerror(code) in str(error.value)
    runs.open_run(workdir, Config()).close()  # nothing was left locked or half done


@pytest.mark.skipif(os.geteuid() == 0, reason="permission bits do not bind root")
def test_a_read_only_workdir(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(WorkdirError, match="write permission"):
        runs.open_run(tmp_path, Config())
    tmp_path.chmod(0o700)
