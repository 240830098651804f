"""What --help shows."""

import re
import sys

import pytest

from halos_jax import main
from halos_jax.cli import help as cli_help
from halos_jax.cli.presets import list_presets
from halos_jax.config import Config, ConfigError, schema
from halos_jax.config.kinds import FEEDBACK_TYPES
from halos_jax.config.tasks import MODES, TASKS


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["main", *arguments])
    main.run()  # it returns: the exit code is 0
    return capsys.readouterr().out


def test_the_program_is_on_one_screen(monkeypatch, capsys):
    shown = run(monkeypatch, capsys, "--help")
    lines = shown.splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 110
    assert lines[0].startswith("python -m halos_jax.main --config=PRESET")
    for name, row in {**TASKS, **MODES}.items():
        assert re.search(rf"^  {name} +{re.escape(row.summary)}$", shown, re.MULTILINE)
    for name in list_presets():
        assert f"\n  {name} " in shown
    assert re.search(
        r"\n  quickstart +The whole loop on a toy task, from nothing, on two CPU", shown
    )
    assert "--config=PRESET --help" in shown and "README.md" in shown
    assert "--help=losses, --help=rewards" in shown
    codes = "0 done; 1 error; 75 stopped, run it again to go on; 130 Ctrl-C, nothing saved"
    assert lines[-2] == f"Exit codes: {codes}"


def test_a_presets_help_lists_every_field_with_its_default_and_its_bound(monkeypatch, capsys):
    arguments = ("--config=configs/quickstart.py", "--config.train.batch_size=7", "--help")
    shown = run(monkeypatch, capsys, *arguments)
    for path in schema.leaf_types(Config):
        assert re.search(rf"^{re.escape(path)}: .*; default ", shown, re.MULTILINE), path
    assert "\ntrain.batch_size: an integer, 1 or more; default 32; here 7\n    Examples (" in shown
    assert "\noptimizer.beta1: a finite number, 0 or more, less than 1; default 0.9" in shown
    types = ", ".join(map(repr, FEEDBACK_TYPES))
    assert f"\nfeedback.type: {types}; default 'pairwise'" in shown
    assert "; here loss.name=" in shown


@pytest.mark.parametrize("flag", ["-h", "-help", "--helpfull", "--helpshort", "-?"])
def test_every_way_to_ask_is_understood(flag):
    assert cli_help.takes_help(["--config=x.py", flag])
    assert not cli_help.takes_help(["--config=help.py", "help"])


def test_a_wrong_preset_or_field_is_an_error_as_ever(tmp_path):
    with pytest.raises(ConfigError, match="there is no such file"):
        cli_help.make_help(["--config", str(tmp_path / "none.py"), "--help"], [])
    with pytest.raises(ConfigError, match=r"train\.bach_size: unknown field"):
        cli_help.make_help(["--config=configs/bench.py"], [("train.bach_size", "3")])


def test_a_topic_is_told_by_itself(monkeypatch, capsys):
    shown = run(monkeypatch, capsys, "--help=exit", "--config=none.py")
    assert shown.splitlines()[0] == "Exit codes:" and "\n   75  stopped by a signal" in shown
    with pytest.raises(ConfigError, match="got 'loses', allowed: losses, rewards, presets, data"):
        cli_help.make_help(["--help=loses"], [])
