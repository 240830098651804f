"""A run of two rounds, made by hand: its records are real, its samples mean nothing."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from halos_jax import storage
from halos_jax.audit.opened import Opened, open_workdir
from halos_jax.config import Config, DataConfig, VerifyConfig
from halos_jax.data.records import formats as records
from halos_jax.metrics import MetricWriter
from halos_jax.workdir import changes, manifests
from halos_jax.workdir.changes import History
from halos_jax.workdir.fingerprints import fingerprint
from halos_jax.workdir.ledger import open_ledger
from halos_jax.workdir.manifests import Manifest, round_folder
from halos_jax.workdir.seals import certificate, chain


@dataclasses.dataclass(frozen=True)
class Made:
    """A run made by hand."""

    config: Config

    @property
    def workdir(self) -> Path:
        return Path(self.config.workdir)

    def open(self, **verify) -> Opened:
        """Open it with these fields of `config.verify`."""
        return open_workdir(dataclasses.replace(self.config, verify=VerifyConfig(**verify)))

    def edit(self, name: str, change: Callable[[str], str]) -> None:
        """Change the text of a file, which must make a difference."""
        path = self.workdir / name
        before = path.read_text()
        after = change(before)
        assert after != before, name
        path.write_text(after)

    def edit_json(self, name: str, change: Callable[[dict], None]) -> None:
        """Change a JSON object in place."""
        plain = json.loads((self.workdir / name).read_text())
        change(plain)
        (self.workdir / name).write_text(json.dumps(plain, indent=2))


CONFIG = Config(workdir="run", data=DataConfig(train="prompts.jsonl"))


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Path:
    """Return a folder with a run of three rounds and its data, whose paths are relative to it."""
    folder = tmp_path_factory.mktemp("template")
    with contextlib.chdir(folder):
        make_run(CONFIG, Path("prompts.jsonl"))
    return folder


@pytest.fixture
def made(template, tmp_path, monkeypatch) -> Made:
    """Return a copy of a finished run of rounds 0 to 2, in the current folder."""
    shutil.copytree(template, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return Made(CONFIG)


def make_run(config: Config, path: Path) -> None:
    """Make a finished run of rounds 0 to 2 on the prompts in a file."""
    workdir = Path(config.workdir)
    workdir.mkdir()
    ledger = open_ledger(workdir)
    changes.write_history(workdir, History(config), note=ledger.note_file)
    path.write_text('{"prompt": "a"}\n')
    entry = {"name": "0:", "path": str(path), **fingerprint(path, whole_limit=99)}
    inputs = {"data.train": [entry]}
    storage.write_json_atomic(workdir / "inputs.json", inputs, note=ledger.note_file)
    writer = MetricWriter(workdir / "metrics.jsonl", note=ledger.note_prefix)
    before = None
    for round in range(3):
        folder = round_folder(workdir, round)
        policy = "sft" if round < 2 else f"round-{round - 1:04d}"
        start, stop = max(round - 1, 0) * 4, round * 4
        manifest = Manifest(round=round, start=start, stop=stop, policy=policy)
        folder.mkdir(parents=True)
        for step in range(3 * round - 2, 3 * round + 1) if round else ():
            writer.write(step, {"loss/train": 1 / step})
        writer.flush()
        for stage in manifests.stages_of(round):
            name = f"{stage}.jsonl"
            records.write_records(folder / name, [{"a": number} for number in range(round + 2)])
            manifest = manifests.commit_stage(
                folder, manifest, stage, files={name: round + 2}, ledger=ledger
            )
        metrics = {**manifest.metrics, "steps_done": 3 * round}
        manifest = dataclasses.replace(manifest, metrics=metrics)
        facts = {
            "config": chain.hash_config(History(config), round),
            "inputs": chain.hash_inputs(workdir),
            "rows": chain.hash_rows(workdir, *chain.find_steps(before, manifest)),
            "checkpoint": "",
        }
        manifest = chain.seal(manifest, chain.find_digest(before), facts)
        manifests.save_manifest(folder, manifest, ledger)
        before = manifest
    writer.close()
    (workdir / "final").mkdir()
    (workdir / "final" / "config.json").write_text("{}\n")
    (workdir / "final" / "model.safetensors").write_bytes(bytes(99))
    ledger.note_tree(workdir / "final", workdir / "final")
    certificate.write_certificate(
        certificate.find_certificate(workdir),
        certificate.make_certificate(workdir, workdir / "final"),
    )
