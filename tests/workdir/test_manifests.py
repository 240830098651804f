import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os

import pytest

from halos_jax import storage
from halos_jax.config import Config, MeshConfig, SamplingConfig, TrainConfig
from halos_jax.rounds.order import Order, save_order
from halos_jax.storage import WorkdirError
from halos_jax.workdir import manifests
from halos_jax.workdir.manifests import Manifest, ManifestError


def write(folder, name, text="{}\n"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def fail_with(code):
    def fail(*_args, **_kwargs):
        raise OSError(code, os.strerror(code))

    return fail


# --------------------------------------------------------------------------- manifests


def test_a_round_is_committed_stage_by_stage(tmp_path):
    folder = manifests.round_folder(tmp_path, 3)
    assert folder == tmp_path / "rounds" / "0003"
    assert manifests.load_manifest(folder) is None
    manifest = Manifest(round=3, seed=7, start=8, stop=12, policy="save 2", reference="sft")
    for stage in ("sample", "score", "feedback", "train", "evaluate"):
        assert manifest.next_stage == stage
        files = {} if stage == "train" else {f"{stage}.jsonl": 1}
        for name in files:
            write(folder, name, f"{stage}\n")
        manifest = manifests.commit_stage(
            folder, manifest, stage, files=files, metrics={f"{stage}/x": 0.5}
        )
        assert manifests.load_manifest(folder) == manifest
    assert manifest.next_stage is None
    assert manifest.stages == manifests.STAGES
    assert set(manifest.metrics) == {f"{stage}/x" for stage in manifests.STAGES}
    assert manifest.files["score.jsonl"].sha256 == hashlib.sha256(b"score\n").hexdigest()
    assert (manifest.start, manifest.stop, manifest.policy) == (8, 12, "save 2")
    manifests.verify_files(folder, manifest)


def test_round_zero_only_evaluates(tmp_path):
    write(tmp_path, "eval.jsonl")
    manifest = Manifest(round=0)
    assert manifest.next_stage == "evaluate"
    done = manifests.commit_stage(
        tmp_path, manifest, "evaluate", files={"eval.jsonl": 1}, policy="sft"
    )
    assert done.next_stage is None and manifests.load_manifest(tmp_path).policy == "sft"


@pytest.mark.parametrize("stage", ["score", "evaluate", "smaple"])
def test_stages_out_of_order_are_refused(tmp_path, stage):
    with pytest.raises(ManifestError, match=f"got stage '{stage}'.*next stage is 'sample'"):
        manifests.commit_stage(tmp_path, Manifest(round=1), stage)
    assert manifests.load_manifest(tmp_path) is None


def test_a_stage_without_its_files_is_refused(tmp_path):
    with pytest.raises(ManifestError, match=r"has not written samples.jsonl"):
        manifests.commit_stage(tmp_path, Manifest(round=1), "sample", files={"samples.jsonl": 4})
    assert manifests.load_manifest(tmp_path) is None


def test_other_processes_compute_the_same_manifest_and_write_nothing(tmp_path):
    write(tmp_path, "samples.jsonl")
    arguments = (tmp_path, Manifest(round=1), "sample")
    other = manifests.commit_stage(*arguments, files={"samples.jsonl": 1}, is_writer=False)
    assert manifests.load_manifest(tmp_path) is None
    assert manifests.commit_stage(*arguments, files={"samples.jsonl": 1}) == other


def test_changed_and_missing_files_are_listed_together(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        write(tmp_path, name)
    files = {"a.jsonl": 1, "b.jsonl": 1, "c.jsonl": 1}
    manifest = manifests.commit_stage(tmp_path, Manifest(round=1), "sample", files=files)
    write(tmp_path, "a.jsonl", "{} \n")
    (tmp_path / "c.jsonl").unlink()
    with pytest.raises(ManifestError) as error:
        manifests.verify_files(tmp_path, manifest)
    assert "a.jsonl has sha256" in str(error.value) and "c.jsonl is missing" in str(error.value)
    assert "b.jsonl" not in str(error.value)


GOOD = dataclasses.asdict(Manifest(round=1))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        json.dumps({**GOOD, "stages": ["train"]}),
        json.dumps({**GOOD, "version": 99}),
        json.dumps({**GOOD, "surprise": 1}),
        json.dumps({**GOOD, "files": {"a": {}}}),
    ],
)
def test_a_corrupt_manifest_is_one_clear_error(tmp_path, text):
    write(tmp_path, "manifest.json", text)
    with pytest.raises(ManifestError, match=r"manifest.json is not a readable manifest"):
        manifests.load_manifest(tmp_path)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_manifest(tmp_path, monkeypatch, function):
    write(tmp_path, "samples.jsonl")
    write(tmp_path, "scores.jsonl")
    old = manifests.commit_stage(tmp_path, Manifest(round=1), "sample", files={"samples.jsonl": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail_with(errno.ENOSPC))
        with pytest.raises(WorkdirError, match=r"No space left.*free some space"):
            manifests.commit_stage(tmp_path, old, "score", files={"scores.jsonl": 1})
    assert manifests.load_manifest(tmp_path) == old
    storage.remove_partials(tmp_path)
    assert not list(tmp_path.glob("*.partial"))
    new = manifests.commit_stage(tmp_path, old, "score", files={"scores.jsonl": 1})
    assert manifests.load_manifest(tmp_path) == new


def test_a_crash_at_any_write_leaves_the_old_or_the_new_manifest(tmp_path, monkeypatch):
    """Stop the writer at each call that touches the disk; what is read is one of the two."""

    class Stopped(BaseException):
        pass

    write(tmp_path, "samples.jsonl")
    write(tmp_path, "scores.jsonl")
    seen = set()
    for stop_at in range(12):
        (tmp_path / "manifest.json").unlink(missing_ok=True)
        old = manifests.commit_stage(
            tmp_path, Manifest(round=1), "sample", files={"samples.jsonl": 1}
        )
        calls = 0

        def stopping(function, limit=stop_at):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls > limit:
                    raise Stopped
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in ("open", "fsync", "replace", "close"):
                patch.setattr(os, name, stopping(getattr(os, name)))
            with contextlib.suppress(Stopped):
                manifests.commit_stage(tmp_path, old, "score", files={"scores.jsonl": 1})
        found = manifests.load_manifest(tmp_path)
        assert found.stages in (("sample",), ("sample", "score"))
        seen.add(found.stages)
    assert len(seen) == 2


# --------------------------------------------------------------------------- the workdir


def test_first_start_and_resume(tmp_path):
    workdir, config = tmp_path / "runs" / "one", Config(seed=3)
    run = manifests.open_run(workdir, config)
    assert not run.is_resumed and run.workdir == workdir
    assert json.loads((workdir / "config.json").read_text())["seed"] == 3
    run.close()
    write(workdir, "x.json.partial")
    write(workdir, "metrics.jsonl")
    run = manifests.open_run(workdir, config)
    assert run.is_resumed
    assert not (workdir / "x.json.partial").exists()
    run.close()


def test_a_changed_config_is_refused_with_every_change(tmp_path):
    manifests.open_run(tmp_path, Config()).close()
    write(tmp_path / "rounds" / "0000", "eval.jsonl")
    changed = Config(seed=1, train=TrainConfig(batch_size=64))
    with pytest.raises(WorkdirError) as error:
        manifests.open_run(tmp_path, changed)
    assert "seed: 0 -> 1" in str(error.value)
    assert "train.batch_size: 32 -> 64" in str(error.value)
    manifests.open_run(tmp_path, Config()).close()  # the refusal has released the lock


def test_a_config_that_the_run_has_died_of_may_be_mended(tmp_path):
    manifests.open_run(tmp_path, Config()).close()
    (tmp_path / "checkpoints").mkdir()
    info = manifests.open_run(tmp_path, Config())
    save_order(Order([], (0,), is_new=True), tmp_path, info.ledger.note_file)
    info.close()
    manifests.open_run(tmp_path, Config(seed=1)).close()
    assert not (tmp_path / "prompts.json").exists()  # the order is another one
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1
    (tmp_path / "checkpoints" / "00000001").mkdir()
    with pytest.raises(WorkdirError, match="seed: 1 -> 2"):
        manifests.open_run(tmp_path, Config(seed=2))
    # Somebody else's config.json is not taken for one of ours.
    write(tmp_path / "model", "config.json", '{"model_type": "llama"}')
    with pytest.raises(WorkdirError, match=r"holds a config\.json that no run has written"):
        manifests.open_run(tmp_path / "model", Config())


def test_a_field_that_may_change_is_taken_over(tmp_path):
    manifests.open_run(tmp_path, Config()).close()
    write(tmp_path, "metrics.jsonl")
    info = manifests.open_run(tmp_path, Config(progress=False))
    manifests.begin_segment(info, step=0)
    info.close()
    assert json.loads((tmp_path / "config.json").read_text())["progress"] is False


def test_the_manifest_says_what_changed_while_its_round_was_under_way(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder, manifest = manifests.round_folder(tmp_path, 1), Manifest(round=1)
    info = manifests.open_run(tmp_path, Config())
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
    info = manifests.open_run(tmp_path, changed)
    manifests.begin_segment(info, round=1, step=0, grown={"data.train": ["8 prompts", "9 prompts"]})
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


def test_a_manifest_of_a_version_without_segments_is_read(tmp_path):
    plain = {key: value for key, value in GOOD.items() if key != "segments"}
    write(tmp_path, "manifest.json", json.dumps(plain))
    assert manifests.load_manifest(tmp_path) == Manifest(round=1)


def test_a_corrupt_config_file_is_one_clear_error(tmp_path):
    for text in ("{", "[]"):
        write(tmp_path, "config.json", text)
        with pytest.raises(WorkdirError, match=r"config.json is not the JSON object"):
            manifests.open_run(tmp_path, Config())


def test_processes_that_do_not_write_take_no_lock_and_no_files(tmp_path):
    reader = manifests.open_run(tmp_path / "new", Config(), is_writer=False)
    assert not (tmp_path / "new").exists() and not reader.is_resumed
    writer = manifests.open_run(tmp_path, Config())
    assert manifests.open_run(tmp_path, Config(), is_writer=False).is_resumed
    with pytest.raises(WorkdirError, match="seed: 0 -> 1"):
        manifests.open_run(tmp_path, Config(seed=1), is_writer=False)
    writer.close()


def test_a_file_in_place_of_the_workdir_or_its_parent(tmp_path):
    write(tmp_path, "file")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(WorkdirError, match="a file stands where a folder is needed"):
            manifests.open_run(workdir, Config())


def test_a_parent_that_cannot_be_made(tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "unmounted" / "disk")
    with pytest.raises(WorkdirError, match=r"dangling.*--config.workdir=DIR"):
        manifests.open_run(tmp_path / "dangling" / "run", Config())


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
            manifests.open_run(workdir, Config())
    assert advice in str(error.value) and str(workdir) in str(error.value)
    assert os.strerror(code) in str(error.value)
    manifests.open_run(workdir, Config()).close()  # nothing was left locked or half done


@pytest.mark.skipif(os.geteuid() == 0, reason="permission bits do not bind root")
def test_a_read_only_workdir(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(WorkdirError, match="write permission"):
        manifests.open_run(tmp_path, Config())
    tmp_path.chmod(0o700)
