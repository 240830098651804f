"""What is done with an export: a card that is the user's once it is edited, a push, no error."""

import json
import logging
import types

import pytest
from huggingface_hub import ModelCard

from halos_jax.config import Config, ExportConfig
from halos_jax.policies import hub
from halos_jax.tasks.handing import hand_on, hand_on_again
from tests.report.written_runs import write_run


@pytest.fixture
def workspace(tmp_path):
    folder = write_run(tmp_path / "run") / "final"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"dtype": "float32"}))
    return make(tmp_path / "run")


def make(workdir, *, is_writer=True, **export):
    config = Config(export=ExportConfig(**export))
    return types.SimpleNamespace(workdir=workdir, is_writer=is_writer, config=config)


def read(workspace, name="README.md"):
    return (workspace.workdir / "final" / name).read_text()


def test_the_card_is_written_once_and_follows_the_run(workspace):
    hand_on(workspace)
    first = (workspace.workdir / "final" / "README.md").stat()
    hand_on_again(workspace)
    assert (workspace.workdir / "final" / "README.md").stat().st_mtime_ns == first.st_mtime_ns
    hand_on(make(workspace.workdir, license="mit"))
    assert ModelCard(read(workspace)).data.license == "mit"


def test_an_edited_card_stays(workspace, caplog):
    hand_on(workspace)
    path = workspace.workdir / "final" / "README.md"
    mine = read(workspace).replace("---\n", "---\nlicense: mit\n", 1)
    path.write_text(mine)
    with caplog.at_level(logging.INFO):
        hand_on(make(workspace.workdir, license="apache-2.0"))
    assert read(workspace) == mine and "was edited, and stays as it is" in caplog.text


def test_an_adapter_gets_a_card_too(workspace):
    adapter = workspace.workdir / "final" / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    hand_on(workspace)
    assert ModelCard(read(workspace, "adapter/README.md")).data.library_name == "peft"


def test_other_processes_write_and_push_nothing(workspace, monkeypatch):
    monkeypatch.setattr(hub, "push", pytest.fail)
    hand_on_again(make(workspace.workdir, is_writer=False, push_to_hub="me/x"))
    assert not (workspace.workdir / "final" / "README.md").exists()


def test_a_card_that_fails_is_a_warning_and_the_export_is_pushed(workspace, caplog, monkeypatch):
    pushed = []
    monkeypatch.setattr(hub, "push", lambda folder, settings: pushed.append(folder))
    (workspace.workdir / "config.json").write_text("no JSON")
    hand_on(workspace)
    assert "the model card could not be written" in caplog.text
    assert pushed == [workspace.workdir / "final"]


def test_a_dtype_that_comes_too_late_is_said(workspace, caplog):
    hand_on_again(make(workspace.workdir, dtype="float32"))
    assert "stays in" not in caplog.text
    hand_on_again(make(workspace.workdir, dtype="bfloat16"))
    assert "stays in float32: export.dtype=bfloat16 is for exports to come" in caplog.text
