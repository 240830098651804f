import contextlib
import dataclasses
import errno
import hashlib
import json
import os

import pytest

from halos_jax import storage
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


def test_a_manifest_of_a_version_without_segments_is_read(tmp_path):
    plain = {key: value for key, value in GOOD.items() if key != "segments"}
    write(tmp_path, "manifest.json", json.dumps(plain))
    assert manifests.load_manifest(tmp_path) == Manifest(round=1)
