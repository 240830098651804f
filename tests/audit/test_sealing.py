"""What shows that a manifest without a seal was completed by a version that seals."""

import dataclasses
import json

import pytest

from halos_jax.audit import sealing
from halos_jax.workdir.manifests import load_manifest, save_manifest

NEW = ("executed", "executions", "sampled_by", "trained", "chain")
START = {"round": 1, "stage": "train", "execution": {}}


def unseal(made, round, *, keep=(), **fields):
    """Rewrite a manifest without its seal, and without the fields that came with seals."""
    folder = made.workdir / "rounds" / f"{round:04d}"
    save_manifest(folder, dataclasses.replace(load_manifest(folder), chain={}, **fields))

    def change(plain):
        for name in set(NEW) - set(keep):
            del plain[name]

    made.edit_json(f"rounds/{round:04d}/manifest.json", change)
    return load_manifest(folder)


@pytest.fixture
def earlier(made):
    """Return a run whose config.json is of a version before seals."""
    made.edit_json("config.json", lambda plain: plain.pop("verify"))
    return made


def test_of_an_earlier_version_there_is_nothing(earlier):
    manifest = unseal(earlier, 1)
    assert sealing.explain_missing(earlier.open(), manifest) is None


@pytest.mark.parametrize(
    ("fields", "keep", "said"),
    [
        ({"executed": {"evaluate": ("e",)}}, ("executed",), "what it was executed on"),
        ({"trained": "ff"}, ("trained",), "what it was executed on"),
        ({}, ("chain",), "fields that versions that seal write"),
        ({}, ("sampled_by",), "fields that versions that seal write"),
    ],
)
def test_a_manifest_shows_what_wrote_it(earlier, fields, keep, said):
    manifest = unseal(earlier, 1, keep=keep, **fields)
    assert said in sealing.explain_missing(earlier.open(), manifest)


def test_the_test_of_a_later_version_seals_nothing(earlier):
    """It is added to the manifest of a round that an earlier version completed."""
    manifest = unseal(earlier, 1, keep=NEW, executed={"test": ("e",)}, sampled_by={"test": "ff"})
    assert sealing.explain_missing(earlier.open(), manifest) is None


@pytest.mark.parametrize(
    ("start", "found"),
    [({}, True), ({"round": 2}, False), ({"stage": ""}, False)],
)
def test_what_was_completed_after_the_first_start_that_is_noted_was_sealed(earlier, start, found):
    manifest = unseal(earlier, 1)
    (earlier.workdir / "executions.jsonl").write_text(json.dumps(START | start) + "\n")
    said = sealing.explain_missing(earlier.open(), manifest)
    assert said == ("by executions.jsonl, a version that seals completed it" if found else None)


def test_a_config_of_a_version_that_seals_comes_with_its_executions(made):
    manifest = unseal(made, 1)
    said = sealing.explain_missing(made.open(), manifest)
    assert said == "config.json is of a version that seals; its executions.jsonl is missing"
    (made.workdir / "executions.jsonl").write_text(json.dumps(START | {"round": 2}) + "\n")
    assert sealing.explain_missing(made.open(), manifest) is None
