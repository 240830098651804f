"""What a stage was executed on, in the manifest of its round."""

import dataclasses
import json

import jax
import pytest

import halos_jax
from halos_jax import sharding
from halos_jax.config import Config, MeshConfig, TrainConfig
from halos_jax.workdir import execution, manifests
from halos_jax.workdir.execution import Executions, Start
from halos_jax.workdir.ledger import open_ledger
from halos_jax.workdir.manifests import Manifest, round_folder

ONE, TWO, THREE = ({"device": name, "deterministic": True} for name in ("a", "b", "c"))


def describe(config=Config()):
    return execution.describe_execution(config, sharding.make_mesh(config.mesh))


def test_the_record_says_what_may_change_bits(monkeypatch):
    jax.devices()  # started before there are flags that it does not know
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp/x --xla_b=2 --xla_a='1 2'")
    found = describe(Config(mesh=MeshConfig(fsdp=2), train=TrainConfig(tokens_per_device=64)))
    assert (found["platform"], found["devices"], found["processes"]) == ("cpu", 8, 1)
    assert found["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1}
    assert found["device"].endswith(" cores") and found["deterministic"] is True
    assert found["flags"] == {"XLA_FLAGS": ["--xla_a=1 2", "--xla_b=2"]}
    assert found["settings"]["train.tokens_per_device"] == 64
    assert found["settings"]["model.remat"] == "auto" and "seed" not in found["settings"]
    versions = found["versions"]
    assert versions["jax"] == jax.__version__ and versions["halos_jax"] == halos_jax.__version__
    assert versions["code"] == execution.hash_code() and "runtime" in versions
    assert found["switches"]["jax_enable_x64"] is False
    assert json.loads(json.dumps(found)) == found


def test_records_differ_by_path():
    one, other = describe(), describe(Config(mesh=MeshConfig(tensor=2)))
    assert execution.find_differences(one, one) == {}
    assert execution.find_differences(one, other) == {
        "mesh.data": (8, 4),
        "mesh.tensor": (1, 2),
        "settings.mesh.tensor": (1, 2),
    }
    assert execution.are_equal_to_the_bit(one, one)
    assert not execution.are_equal_to_the_bit(one, other)
    assert not execution.are_equal_to_the_bit({"deterministic": False}, {"deterministic": False})


def test_a_start_is_noted_if_it_is_another_execution(tmp_path):
    config, ledger = Config(task="online"), open_ledger(tmp_path)
    mesh = sharding.make_mesh(config.mesh)
    first = execution.begin_execution(ledger, config, mesh)
    assert [(one.round, one.stage) for one in first.starts] == [(0, "evaluate")]
    written = (tmp_path / execution.FILE).read_bytes()
    assert execution.begin_execution(ledger, config, mesh) == first
    assert (tmp_path / execution.FILE).read_bytes() == written
    manifests.save_manifest(round_folder(tmp_path, 0), Manifest(0, stages=("evaluate",)))
    manifests.save_manifest(round_folder(tmp_path, 1), Manifest(1, stages=("sample",)))
    changed = dataclasses.replace(config, train=TrainConfig(row_multiple=64))
    found = execution.begin_execution(ledger, changed, mesh)
    assert [(one.round, one.stage) for one in found.starts] == [(0, "evaluate"), (1, "score")]
    assert execution.read_starts(tmp_path) == found.starts
    assert ledger.find(tmp_path / execution.FILE)["size"] > len(written)


def test_the_next_stage_of_a_run(tmp_path):
    assert execution.find_next(tmp_path, "online") == (0, "evaluate")
    assert execution.find_next(tmp_path, "sample") == (0, "sample")
    manifest = Manifest(0, task="sample", stages=("sample", "score"))
    manifests.save_manifest(tmp_path, manifest)
    assert execution.find_next(tmp_path, "sample") == (0, "write")
    manifests.save_manifest(tmp_path, dataclasses.replace(manifest, stages=()))
    assert execution.find_next(tmp_path, "sample") == (0, "sample")
    done = ("sample", "score", "write")
    manifests.save_manifest(tmp_path, dataclasses.replace(manifest, stages=done))
    assert execution.find_next(tmp_path, "sample") == (0, "")
    for round, stages in enumerate([("evaluate",), ("sample", "score", "feedback")]):
        folder = round_folder(tmp_path, round)
        folder.mkdir(parents=True)
        manifests.save_manifest(folder, Manifest(round, stages=stages))
    assert execution.find_next(tmp_path, "online") == (1, "train")


def test_a_stage_names_every_execution_that_may_have_begun_it():
    starts = (Start(0, "evaluate", ONE), Start(1, "sample", TWO), Start(1, "train", THREE))
    found = Executions(starts)
    assert found.list_for(1, "sample") == [ONE, THREE]
    assert found.list_for(1, "score") == [ONE, THREE]
    assert found.list_for(1, "feedback") == [THREE]
    assert found.list_for(1, "train") == [TWO, THREE]
    assert found.list_for(1, "evaluate") == [TWO, THREE]
    assert found.list_for(2, "sample") == [TWO, THREE]
    assert found.list_for(2, "feedback") == [THREE]
    assert found.list_for(1, "test") == [ONE, TWO, THREE]
    assert found.list_for(2, "test") == [THREE]
    assert Executions(starts[:2]).list_for(1, "sample") == [ONE, TWO]
    assert Executions().list_for(1, "sample") == []


def test_a_stage_names_only_what_has_left_a_part_of_it():
    kept = ((1, "sample"), (1, "train"))
    starts = (Start(0, "evaluate", ONE), Start(1, "sample", TWO, kept=kept[:1]))
    assert Executions(starts).list_for(1, "sample") == [ONE, TWO]
    assert Executions(starts).list_for(1, "score") == [TWO]
    assert Executions(starts).list_for(1, "test") == [TWO]
    found = Executions((*starts, Start(1, "train", THREE, kept=kept[1:])))
    assert found.list_for(1, "train") == [TWO, THREE]
    assert found.list_for(1, "evaluate") == [THREE]


def make_round(workdir, round, *files, **fields):
    """Save a manifest, and empty files beside it."""
    folder = round_folder(workdir, round)
    manifests.save_manifest(folder, Manifest(round, **fields))
    for name in files:
        (folder / name).write_text("")


ALL = manifests.stages_of(1)
UP_TO_FEEDBACK = ALL[:3]


@pytest.mark.parametrize(
    ("next", "trained", "parts", "expected"),
    [
        # A finished run that is extended by newer code: nothing of its next round had begun.
        ((3, "sample"), (2, 0), {}, []),
        ((3, "sample"), (2, 0), {3: ["samples.shard-0000.jsonl"]}, [(3, "sample"), (3, "score")]),
        ((3, "sample"), (2, 0), {2: ["test.shard-0000.jsonl"]}, [(2, "test")]),
        ((2, "train"), (1, 0), {}, []),
        ((2, "train"), (1, 5), {}, [(2, "train")]),
        ((2, "train"), (2, 0), {3: ["samples.shard-0000.jsonl"]}, [
            (3, "sample"), (3, "score"), (2, "train")
        ]),
        ((2, "train"), (1, 0), {2: ["signs.shard-0000.jsonl"]}, [(2, "train"), (2, "evaluate")]),
    ],
)  # fmt: skip
def test_what_is_kept_of_an_execution_before_is_on_disk(tmp_path, next, trained, parts, expected):
    make_round(tmp_path, 0, stages=("evaluate",))
    for round in range(1, next[0] + 1):
        stages = ALL if round < next[0] else UP_TO_FEEDBACK if next[1] == "train" else ()
        if round < next[0] or stages or round in parts:
            make_round(tmp_path, round, stages=stages)
    for round, names in parts.items():
        round_folder(tmp_path, round).mkdir(exist_ok=True, parents=True)
        for name in names:
            (round_folder(tmp_path, round) / name).write_text("")
    found = execution.list_kept(tmp_path, "online", Start(*next, ONE), trained)
    assert list(found) == expected


def test_extents_of_a_round_are_kept(tmp_path):
    files = {"samples-0001.jsonl": manifests.FileRecord("ab", 3)}
    make_round(tmp_path, 1, files=files)
    found = execution.list_kept(tmp_path, "online", Start(1, "sample", ONE), (0, 0))
    assert found == ((1, "sample"), (1, "score"))


def test_a_job_keeps_the_shards_of_its_stage(tmp_path):
    start = Start(0, "score", ONE)
    assert execution.list_kept(tmp_path, "label", start, (0, 0)) == ()
    (tmp_path / "scores.shard-0000.jsonl").write_text("")
    assert execution.list_kept(tmp_path, "label", start, (0, 0)) == ((0, "score"),)


def test_starts_are_read_as_they_were_written(tmp_path):
    lines = [{"round": 0, "stage": "a", "execution": ONE}]  # of an earlier version
    lines += [{**lines[0], "defaults": {"seed": 0}, "kept": [[1, "train"]]}]
    (tmp_path / execution.FILE).write_text("".join(json.dumps(one) + "\n" for one in lines))
    before, now = execution.read_starts(tmp_path)
    assert before == Start(0, "a", ONE) and before.kept is None
    assert now == Start(0, "a", ONE, {"seed": 0}, ((1, "train"),))
    assert list(execution.read_defaults(tmp_path).values()) == [{"seed": 0}]


def test_a_start_with_other_defaults_is_noted(tmp_path, monkeypatch):
    config, ledger = Config(task="online"), open_ledger(tmp_path)
    mesh = sharding.make_mesh(config.mesh)
    (first,) = execution.begin_execution(ledger, config, mesh).starts
    assert first.defaults["sampling.temperature"] == 0.7 and first.kept == ()
    other = {**first.defaults, "sampling.temperature": 0.8}
    monkeypatch.setattr(execution, "list_defaults", lambda config: other)
    found = execution.begin_execution(ledger, config, mesh).starts
    assert [one.defaults for one in found] == [first.defaults, other]
    assert execution.read_starts(tmp_path) == found


def test_a_manifest_holds_each_record_once(tmp_path):
    found = Executions((Start(1, "sample", ONE), Start(1, "score", TWO)))
    manifest = Manifest(1)
    for stage in ("sample", "score", "feedback"):
        updates = execution.make_updates(found, manifest, stage)
        manifest = manifests.commit_stage(tmp_path, manifest, stage, **updates)
    one, two = map(execution.name_record, (ONE, TWO))
    assert manifest.executions == {one: ONE, two: TWO}
    assert manifest.executed == {"sample": (two,), "score": (one, two), "feedback": (two,)}
    assert manifests.load_manifest(tmp_path) == manifest
    assert execution.find_executions(manifest, "score") == [ONE, TWO]
    assert execution.find_executions(manifest, "train") == []
    assert execution.make_updates(Executions(), manifest, "train") == {}


def test_a_manifest_of_a_version_without_executions_is_read(tmp_path):
    manifests.save_manifest(tmp_path, Manifest(1))
    path = tmp_path / "manifest.json"
    plain = json.loads(path.read_text())
    assert plain.pop("executions") == {} and plain.pop("executed") == {}
    path.write_text(json.dumps(plain))
    assert manifests.load_manifest(tmp_path) == Manifest(1)


def test_processes_that_do_not_write_know_what_the_first_has_noted(tmp_path, monkeypatch):
    config, ledger = Config(task="online"), open_ledger(tmp_path)
    mesh = sharding.make_mesh(config.mesh)
    first = execution.begin_execution(ledger, config, mesh)
    monkeypatch.setattr(execution.processes, "run_on_first", lambda action: None)
    changed = dataclasses.replace(config, train=TrainConfig(row_multiple=64))
    assert execution.begin_execution(ledger, changed, mesh) == first
