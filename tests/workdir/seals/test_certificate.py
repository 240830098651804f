"""The certificate: what it has the hashes of, and its own."""

import hashlib
import json

import pytest

from halos_jax.config import Config
from halos_jax.workdir import changes
from halos_jax.workdir.changes import History
from halos_jax.workdir.manifests import Manifest, round_folder, save_manifest
from halos_jax.workdir.seals import certificate, chain


@pytest.fixture
def workdir(tmp_path):
    """Return a workdir of two sealed rounds and an export."""
    changes.write_history(tmp_path, History(Config(seed=4, workdir=str(tmp_path))))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss/train": 0.5}\n')
    before = ""
    for round in (0, 1):
        manifest = chain.seal(Manifest(round=round), before, {"config": "c"})
        before = manifest.chain["digest"]
        round_folder(tmp_path, round).mkdir(parents=True)
        save_manifest(round_folder(tmp_path, round), manifest)
    (tmp_path / "final" / "adapter").mkdir(parents=True)
    (tmp_path / "final" / "model.safetensors").write_bytes(b"abc")
    (tmp_path / "final" / "adapter" / "adapter_model.safetensors").write_bytes(b"d")
    return tmp_path


def test_its_fields(workdir):
    made = certificate.make_certificate(workdir, workdir / "final")
    assert made["weights"] == {
        "adapter/adapter_model.safetensors": hashlib.sha256(b"d").hexdigest(),
        "model.safetensors": hashlib.sha256(b"abc").hexdigest(),
    }
    assert made["chain"]["manifests"] == 2 and len(made["chain"]["head"]) == 64
    assert made["metrics"]["count"] == 1 and made["verified"] is None
    assert certificate.is_whole(made)
    first = certificate.make_certificate(workdir, workdir / "final", count=1)
    assert first["chain"]["manifests"] == 1 and first["chain"] != made["chain"]


def test_it_is_the_same_wherever_the_workdir_lies(workdir, tmp_path_factory):
    moved = tmp_path_factory.mktemp("moved") / "run"
    made = certificate.make_certificate(workdir, workdir / "final")
    workdir.rename(moved)
    assert certificate.make_certificate(moved, moved / "final") == made


@pytest.mark.parametrize("name", ["task", "config", "weights", "verified", "sha256"])
def test_a_field_that_was_edited_breaks_it(workdir, name):
    made = certificate.make_certificate(workdir, workdir / "final", verified={"time": "now"})
    path = certificate.find_certificate(workdir)
    certificate.write_certificate(path, made)
    found = certificate.read_certificate(path)
    assert found == made and certificate.is_whole(found)
    assert not certificate.is_whole({**found, name: "other"})
    assert certificate.hash_certificate(found) == found["sha256"]


def test_what_is_not_one(workdir):
    path = certificate.find_certificate(workdir)
    assert path == workdir / "final" / "certificate.json"
    assert certificate.read_certificate(path) is None
    path.write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="is not a JSON object"):
        certificate.read_certificate(path)
