"""What is found of a workdir that somebody, or a kill, has changed between two starts."""

import json
import os

import pytest

from halos_jax import storage
from halos_jax.config import Config
from halos_jax.data.records import formats as records
from halos_jax.metrics import MetricWriter, read_metrics
from halos_jax.storage import WorkdirError
from halos_jax.workdir import manifests, runs
from halos_jax.workdir.intact import find_damage
from halos_jax.workdir.ledger import open_ledger
from halos_jax.workdir.manifests import Manifest, round_folder


@pytest.fixture
def workdir(tmp_path):
    """Return the workdir of a run that was stopped while it sampled round 1."""
    with_ledger(tmp_path, begin)
    return tmp_path


def with_ledger(workdir, do) -> None:
    info = runs.open_run(workdir, Config())
    try:
        do(workdir, info.ledger)
    finally:
        info.close()


def begin(workdir, ledger) -> None:
    folder = round_folder(workdir, 0)
    folder.mkdir(parents=True)
    records.write_records(folder / "eval.jsonl", [{"a": 1}, {"a": 2}])
    files = {"eval.jsonl": 2}
    manifests.commit_stage(folder, Manifest(round=0), "evaluate", files=files, ledger=ledger)
    write_metrics(workdir, ledger, [1, 2])
    folder = round_folder(workdir, 1)
    folder.mkdir()
    shard = folder / "samples.shard-0000.jsonl"
    records.write_records(shard, [{"b": 1}, {"b": 2}], note=ledger.note_file)


def write_metrics(workdir, ledger, steps) -> None:
    writer = MetricWriter(workdir / "metrics.jsonl", note=ledger.note_prefix)
    for step in steps:
        writer.write(step, {"x": 0.5})
    writer.close()


def start(workdir) -> None:
    runs.open_run(workdir, Config()).close()


# Name -> what it does to the lines of a file; None deletes it.
EDITS = {
    "bit": lambda lines: [bytes([lines[0][0] ^ 1]) + lines[0][1:], *lines[1:]],
    "dropped": lambda lines: lines[1:],
    "doubled": lambda lines: [lines[0], *lines],
    "swapped": lambda lines: [lines[1], lines[0], *lines[2:]],
    "truncated": lambda lines: [*lines[:-1], lines[-1][:-3]],
    "emptied": lambda lines: [],
    "deleted": None,
}


def edit(path, name) -> None:
    if EDITS[name] is None:
        path.unlink()
    else:
        path.write_bytes(b"".join(EDITS[name](path.read_bytes().splitlines(keepends=True))))


def test_an_untouched_workdir_is_opened_without_a_word(workdir, caplog):
    before = {path: path.read_bytes() for path in workdir.rglob("*.json*")}
    for _ in range(2):
        start(workdir)
    assert {path: path.read_bytes() for path in workdir.rglob("*.json*")} == before
    assert not caplog.records


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("file", ["config.json", "rounds/0000/manifest.json"])
def test_a_changed_file_is_refused_by_name(workdir, file, name):
    before = (workdir / file).read_bytes()
    edit(workdir / file, name)
    with pytest.raises(WorkdirError, match=rf"{file}.*start.*--config.workdir=DIR"):
        start(workdir)
    (workdir / file).write_bytes(before)
    os.utime(workdir / file, (0, 0))
    start(workdir)  # it is the content that counts


@pytest.mark.parametrize("name", EDITS)
def test_changed_metrics_are_refused_and_missing_ones_said(workdir, name, caplog):
    edit(workdir / "metrics.jsonl", name)
    if name != "deleted":
        with pytest.raises(WorkdirError, match=r"metrics.jsonl.*move metrics.jsonl away"):
            start(workdir)
        (workdir / "metrics.jsonl").unlink()
    start(workdir)
    assert caplog.text.count("metrics.jsonl is missing: the run goes on without") == 1
    caplog.clear()
    with_ledger(workdir, lambda workdir, ledger: write_metrics(workdir, ledger, [3]))
    start(workdir)
    assert [line["step"] for line in read_metrics(workdir / "metrics.jsonl")] == [3]
    assert not caplog.records


def test_lines_since_the_last_save_are_cut_off(workdir):
    """Steps that no checkpoint knows are done again, whatever stands there of them."""
    whole = (workdir / "metrics.jsonl").read_bytes()
    for more in (b'{"step": 3, "x": 0.25}\n', b'{"step": 2, "x": 0.25}\n{"st', b"nonsense"):
        (workdir / "metrics.jsonl").write_bytes(whole + more)
        start(workdir)
        assert (workdir / "metrics.jsonl").read_bytes() == whole


@pytest.mark.parametrize("name", EDITS)
def test_a_changed_shard_is_made_again_and_a_missing_one_too(workdir, name, caplog):
    shard = round_folder(workdir, 1) / "samples.shard-0000.jsonl"
    edit(shard, name)
    start(workdir)
    assert not shard.exists()
    assert caplog.text.count("made again") == (name != "deleted")


@pytest.mark.parametrize("place", ["eval.shard-0000.jsonl", "against/eval.shard-0000.jsonl"])
def test_a_changed_shard_of_either_policy_of_an_evaluation_is_made_again(workdir, place, caplog):
    def write(workdir, ledger):
        (workdir / place).parent.mkdir(exist_ok=True)
        records.write_records(workdir / place, [{"c": 1}, {"c": 2}], note=ledger.note_file)

    with_ledger(workdir, write)
    start(workdir)
    assert (workdir / place).exists() and "made again" not in caplog.text
    edit(workdir / place, "bit")
    start(workdir)
    assert not (workdir / place).exists() and caplog.text.count("made again") == 1


def test_strange_files_are_not_taken_for_the_runs(workdir, caplog):
    folder = round_folder(workdir, 1)
    (folder / "samples.shard-0001.jsonl").write_text('{"b": 3}\n')
    start(workdir)
    assert not (folder / "samples.shard-0001.jsonl").exists() and "made again" in caplog.text
    manifests.save_manifest(folder, Manifest(round=1))
    with pytest.raises(WorkdirError, match=r"rounds/0001/manifest.json is not of this run"):
        start(workdir)


def test_a_manifest_that_is_rolled_back_is_refused(workdir):
    folder = round_folder(workdir, 1)

    def commit(workdir, ledger):
        manifest = Manifest(round=1)
        for stage in ("sample", "score"):
            manifest = manifests.commit_stage(folder, manifest, stage, ledger=ledger)
            kept.append((folder / "manifest.json").read_bytes())
        write_metrics(workdir, ledger, [3])

    kept = []
    with_ledger(workdir, commit)
    (folder / "manifest.json").write_bytes(kept[0])
    with pytest.raises(WorkdirError, match=r"rounds/0001/manifest.json has "):
        start(workdir)


def test_a_commit_is_done_or_not_wherever_it_is_killed(workdir, monkeypatch):
    """Stop a commit at each call that touches the disk: the next start finds nothing wrong."""

    class Stopped(BaseException):
        pass

    folder, seen = round_folder(workdir, 1), []
    for stop_at in range(40):
        calls = 0

        def stopping(function, limit=stop_at):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls > limit:
                    raise Stopped
                return function(*args, **kwargs)

            return call

        info = runs.open_run(workdir, Config())
        manifest = manifests.load_manifest(folder) or Manifest(round=1)
        stage = manifest.next_stage or "evaluate"
        with monkeypatch.context() as patch:
            for name in ("open", "write", "fsync", "replace", "close"):
                patch.setattr(os, name, stopping(getattr(os, name)))
            try:
                manifests.commit_stage(folder, manifest, stage, ledger=info.ledger)
                is_stopped = False
            except Stopped:
                is_stopped = True
        info.close()
        start(workdir)
        found = manifests.load_manifest(folder)
        seen.append((is_stopped, found is not None and stage in found.stages))
        if not is_stopped:
            break
    assert set(seen) == {(True, False), (True, True), (False, True)}


def test_a_deleted_ledger_is_refused(workdir):
    (workdir / "ledger.jsonl").unlink()
    with pytest.raises(WorkdirError, match=r"ledger.jsonl is missing.*put it back"):
        start(workdir)
    # A run without manifests leaves its mark in its checkpoints.
    for manifest in workdir.rglob("manifest.json"):
        manifest.unlink()
    record = workdir / "checkpoints" / "00000001" / "round" / "metadata"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"ledger": "abc"}))
    with pytest.raises(WorkdirError, match=r"ledger.jsonl is missing"):
        start(workdir)


def test_the_last_lines_of_a_ledger_are_missed(workdir):
    ledger = workdir / "ledger.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4  # config, manifest, metrics, shard
    ledger.write_bytes(lines[0])
    with pytest.raises(WorkdirError, match=r"rounds/0000/manifest.json is not of this run"):
        start(workdir)


def test_a_run_from_before_ledgers_is_taken_as_it_is_and_said_so_once(workdir, caplog):
    (workdir / "ledger.jsonl").unlink()
    path = round_folder(workdir, 0) / "manifest.json"
    storage.write_json_atomic(path, json.loads(path.read_text()) | {"version": 1})
    with open(workdir / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 3, "x": 0.5}\n{"st')
    for _ in range(2):
        start(workdir)
    assert caplog.text.count("kept no record") == 1
    assert len(read_metrics(workdir / "metrics.jsonl")) == 3
    assert (round_folder(workdir, 1) / "samples.shard-0000.jsonl").exists()
    # From now on it is guarded as any other.
    edit(path, "bit")
    with pytest.raises(WorkdirError, match=r"manifest.json has "):
        start(workdir)


def test_a_run_that_has_left_nothing_may_be_begun_anew(tmp_path):
    start(tmp_path)
    runs.open_run(tmp_path, Config(seed=1)).close()
    assert open_ledger(tmp_path).entries["config.json"]["sha256"] == storage.hash_file(
        tmp_path / "config.json"
    )
    start_again = runs.open_run(tmp_path, Config(seed=1))
    assert not start_again.is_resumed
    start_again.close()


def test_an_export_that_was_announced_over_a_whole_one_is_taken_back(workdir, caplog):
    """A run that grew was killed between the ledger's line and the exchange of the folders."""
    final, new = workdir / "final", workdir / "new"
    for folder, text in ((final, "old"), (new, "new")):
        folder.mkdir()
        (folder / "model.safetensors").write_text(text)
    with_ledger(workdir, lambda workdir, ledger: ledger.note_tree(final, final))
    with_ledger(workdir, lambda workdir, ledger: ledger.note_tree(final, new))
    assert find_damage(final, open_ledger(workdir)) == ["final/model.safetensors is damaged"]
    start(workdir)
    assert find_damage(final, open_ledger(workdir)) == []
    # One that was exchanged stays as the last line says, and one that is neither is left to others.
    with_ledger(workdir, lambda workdir, ledger: ledger.note_tree(final, new))
    for text, wrong in (("new", []), ("bad", ["final/model.safetensors is damaged"])):
        (final / "model.safetensors").write_text(text)
        start(workdir)
        assert find_damage(final, open_ledger(workdir)) == wrong
    assert not caplog.records
