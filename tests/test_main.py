"""The entry point: what a command line becomes, which task runs, how it ends."""

import io
import subprocess
import sys
from types import SimpleNamespace

import pytest
from absl import app

from halos_jax import config as config_lib
from halos_jax import main
from halos_jax.checkpoints.failures import CheckpointError
from halos_jax.cli.overrides import apply_overrides, split_overrides
from halos_jax.config import ConfigError
from halos_jax.data.records.fields import RecordError
from halos_jax.metrics import MetricsError, NonFiniteError
from halos_jax.models.hf.families import ModelError
from halos_jax.rewards.scorers import RewardError
from halos_jax.storage import WorkdirError
from halos_jax.workdir.interrupt import Interrupted
from halos_jax.workdir.manifests import ManifestError

EXPLAINED = [
    CheckpointError,
    ConfigError,
    ManifestError,
    MetricsError,
    ModelError,
    NonFiniteError,
    RecordError,
    RewardError,
    WorkdirError,
]


def test_overrides_are_taken_from_the_command_line_and_parsed_by_the_schema():
    arguments = [
        "main",
        "--config=configs/quickstart.py",
        "--config.train.batch_size=7",
        "--config.workdir",
        "runs/a",
        "--config.optimizer.learning_rate=1e-4",
        "--other=1",
    ]
    rest, overrides = split_overrides(arguments)
    assert rest == ["main", "--config=configs/quickstart.py", "--other=1"]
    config = config_lib.default()
    assert apply_overrides(config, overrides) == []
    assert (config.train.batch_size, config.workdir) == (7, "runs/a")
    assert config.optimizer.learning_rate == 1e-4


@pytest.mark.parametrize("kind", EXPLAINED, ids=lambda kind: kind.__name__)
def test_an_error_that_explains_itself_is_one_line_and_exit_code_1(monkeypatch, capsys, kind):
    def fail(*_, **__):
        raise kind("what, got, allowed")

    monkeypatch.setattr(app, "run", fail)
    monkeypatch.setattr(sys, "argv", ["main"])
    with pytest.raises(SystemExit) as caught:
        main.run()
    assert caught.value.code == 1
    assert capsys.readouterr().err == f"{kind.__name__}: what, got, allowed\n"


def test_a_stop_has_an_exit_code_of_its_own_and_a_fault_its_traceback(monkeypatch, capsys):
    errors = [Interrupted("run me again"), ValueError("ours")]

    def fail(*_, **__):
        raise errors.pop(0)

    monkeypatch.setattr(app, "run", fail)
    monkeypatch.setattr(sys, "argv", ["main"])
    with pytest.raises(SystemExit) as caught:
        main.run()
    assert caught.value.code == 75 and "run me again" in capsys.readouterr().err
    with pytest.raises(ValueError, match="ours"):
        main.run()


def test_what_is_no_flag_is_refused_and_a_preset_is_needed(monkeypatch, capsys):
    for given, expected in (
        ("configs/quickstart.py", "allowed: --config=configs/quickstart.py"),
        ("--lr=1e-5", "fields are set as --config.optimizer.learning_rate=1e-5"),
    ):
        monkeypatch.setattr(sys, "argv", ["main", given])
        with pytest.raises(SystemExit) as caught:
            main.run()
        assert caught.value.code == 1 and expected in capsys.readouterr().err
    monkeypatch.setattr(main, "_CONFIG", SimpleNamespace(value=None))
    with pytest.raises(ConfigError, match=r"--config: got nothing, .* online_dpo, .*quickstart"):
        main.main([])


def test_the_end_of_the_machines_memory_is_one_message(monkeypatch, capsys):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(app, "run", fail)
    monkeypatch.setattr(sys, "argv", ["main"])
    with pytest.raises(SystemExit) as caught:
        main.run()
    assert caught.value.code == 1
    assert "this machine's own memory is used up; use less" in capsys.readouterr().err


def test_help_that_nobody_reads_to_its_end_is_no_error(tmp_path):
    """As in `--help | head`: the reader closes the pipe."""
    script = f"{sys.executable} -m halos_jax.main --help 2> {tmp_path / 'errors'} | true"
    run = subprocess.run(["bash", "-o", "pipefail", "-c", script], check=False)
    assert (run.returncode, (tmp_path / "errors").read_text()) == (0, "")


def test_a_character_that_the_terminal_lacks_is_written_as_its_number(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["main", "--help"])
    monkeypatch.setattr(main, "make_help", lambda *_: "reward 2.20 ±0.67")
    main.run()
    assert written.getvalue() == b"reward 2.20 \\xb10.67\n"
