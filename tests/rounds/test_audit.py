"""An audit reads everything whole, and changes nothing."""

import jax.numpy as jnp

from halos_jax.checkpoints.store import open_checkpoints
from halos_jax.data.records import formats as records
from halos_jax.rounds.audit import audit_workdir
from halos_jax.workdir import manifests
from halos_jax.workdir.ledger import open_ledger
from halos_jax.workdir.manifests import Manifest, round_folder


def test_everything_that_is_wrong_is_listed(tmp_path):
    ledger, folder = open_ledger(tmp_path), round_folder(tmp_path, 0)
    folder.mkdir(parents=True)
    records.write_records(folder / "eval.jsonl", [{"a": 1}])
    files = {"eval.jsonl": 1}
    manifests.commit_stage(folder, Manifest(round=0), "evaluate", files=files, ledger=ledger)
    (tmp_path / "final").mkdir()
    weights = tmp_path / "final" / "model.safetensors"
    with open(weights, "wb") as file:
        file.truncate(1 << 26)
    ledger.note_tree(tmp_path / "final", tmp_path / "final")
    checkpoints = open_checkpoints(tmp_path / "checkpoints", keep=1, ledger=ledger)
    checkpoints.save(1, {"w": jnp.zeros(2)}, {})
    checkpoints.close()
    ledger.note_file(folder / "samples.shard-0000.jsonl", 1, "gone since")
    before = (tmp_path / "ledger.jsonl").read_bytes()
    assert audit_workdir(tmp_path) == []
    with open(weights, "r+b") as file:  # between the blocks that a start looks at
        file.seek((1 << 20) * 9 + 500_000)
        file.write(b"1")
    (folder / "eval.jsonl").write_text('{"a": 2}\n')
    record = tmp_path / "checkpoints" / "00000001" / "round" / "metadata"
    record.write_text(record.read_text().replace('"step": 1', '"step": 2'))
    wrong = audit_workdir(tmp_path)
    assert len(wrong) == 3 and wrong[0] == "final/model.safetensors is damaged"
    assert "eval.jsonl has sha256" in wrong[1] and "00000001: ValueError" in wrong[2]
    assert (tmp_path / "ledger.jsonl").read_bytes() == before
