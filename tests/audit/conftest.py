"""A run of two rounds, made by hand: its records are real, its samples mean nothing."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from halos_jax.audit.opened import Opened, open_workdir
from halos_jax.config import Config, ModelConfig, VerifyConfig
from halos_jax.data.records import formats as records
from halos_jax.workdir import changes, manifests
from halos_jax.workdir.changes import History
from halos_jax.workdir.ledger import open_ledger
from halos_jax.workdir.manifests import Manifest, round_folder


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


@pytest.fixture
def made(tmp_path) -> Made:
    """Return a finished run of rounds 0 to 2."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    config = Config(workdir=str(workdir), model=ModelConfig(path=str(tmp_path / "policy")))
    ledger = open_ledger(workdir)
    changes.write_history(workdir, History(config), note=ledger.note_file)
    for round in range(3):
        folder, manifest = round_folder(workdir, round), Manifest(round=round)
        folder.mkdir(parents=True)
        for stage in manifests.stages_of(round):
            name = f"{stage}.jsonl"
            records.write_records(folder / name, [{"a": number} for number in range(round + 2)])
            manifest = manifests.commit_stage(
                folder, manifest, stage, files={name: round + 2}, ledger=ledger
            )
    (workdir / "final").mkdir()
    (workdir / "final" / "config.json").write_text("{}\n")
    ledger.note_tree(workdir / "final", workdir / "final")
    return Made(config)
