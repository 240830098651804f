"""Which policy drew the data of a task that is started by hand."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from halos_jax.rounds.proof import lineage
from halos_jax.rounds.proof.origin import Origin
from halos_jax.storage import hash_file
from halos_jax.workdir.manifests import FileRecord, Manifest, save_manifest


def write(folder: Path, sampled_by: dict, *names: str) -> list[Path]:
    """Write files and a manifest that has their hashes; return their paths."""
    folder.mkdir(parents=True)
    paths = [folder / name for name in names]
    for path in paths:
        path.write_text("{}\n")
    files = {path.name: FileRecord(hash_file(path), 1) for path in paths}
    save_manifest(folder, Manifest(1, files=files, sampled_by=sampled_by))
    return paths


def test_a_file_is_of_the_policy_that_its_manifest_names(tmp_path, caplog):
    drawn = {"samples.jsonl": "aa", "eval.jsonl": "bb"}
    names = ("samples.jsonl", "eval.jsonl", "feedback.jsonl", "scores.jsonl")
    paths = write(tmp_path / "one", drawn, *names)
    assert [lineage.find_sampler([path]) for path in paths] == ["aa", "bb", "aa", "aa"]
    (start,) = write(tmp_path / "zero", {"eval.jsonl": "bb"}, "feedback.jsonl")
    assert lineage.find_sampler([start]) == "bb"
    (old,) = write(tmp_path / "old", {}, "samples.jsonl")
    assert lineage.find_sampler([paths[0], paths[2]]) == "aa"
    assert lineage.find_sampler([paths[0], old]) == lineage.find_sampler([old]) == ""
    assert lineage.find_sampler([]) == "" and caplog.text == ""
    with caplog.at_level("INFO"):
        assert lineage.find_sampler(paths[:2]) == ""
    assert "drawn by 2 policies: none is recorded" in caplog.text
    other = tmp_path / "one" / "own.jsonl"
    other.write_text("{}\n")
    assert lineage.find_sampler([other]) == lineage.find_sampler([tmp_path / "own.jsonl"]) == ""
    paths[0].write_text("{} \n")
    assert lineage.find_sampler(paths[:1]) == ""
    assert "samples.jsonl was changed after its run wrote it" in caplog.text
    (tmp_path / "one" / "manifest.json").write_text("{}")
    assert lineage.find_sampler(paths[2:3]) == ""


def test_what_is_made_of_samples_carries_on_who_drew_them():
    assert lineage.carry_on("aa", "x", "y") == {"sampled_by": {"x": "aa", "y": "aa"}}
    assert lineage.carry_on("", "x") == {}


@pytest.mark.parametrize(
    ("old", "logps", "start", "said"),
    [
        (True, (), "cc", True),
        (True, (), "aa", False),
        (False, (), "cc", False),
        (True, (1.0,), "cc", False),
    ],
)
def test_another_policy_at_the_start_than_the_sampler_is_told(
    tmp_path, monkeypatch, caplog, old, logps, start, said
):
    paths = write(tmp_path / "one", {"samples.jsonl": "aa"}, "feedback.jsonl")
    monkeypatch.setattr(lineage, "identify", lambda params, *_: Origin(params["w"]))
    loss = SimpleNamespace(old=old, name="dapo")
    trainer = SimpleNamespace(loss=loss, frozen=None, decoder=None)
    items = [SimpleNamespace(old_logps=logps)]
    lineage.warn_of_sampler(trainer, items, paths, lambda: {"w": start})
    assert ("drawn by the policy aa and have no log-probabilities" in caplog.text) == said
    assert ("the run starts from cc: loss dapo takes that" in caplog.text) == said
