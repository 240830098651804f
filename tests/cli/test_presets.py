"""Presets are read, and what is none says why, with its line."""

import importlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from halos_jax.cli import presets
from halos_jax.cli.presets import (
    explain_absent,
    find_folder,
    list_presets,
    load_preset,
    read_summary,
)
from halos_jax.config import Config, ConfigError, to_dict

GOOD = "from halos_jax.config import default\n\n\ndef get_config(name='a'):\n    "
GOOD += "config = default()\n    config.workdir = name\n    return config\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.py").write_text(GOOD)
    return tmp_path


def test_a_preset_is_read_with_its_argument(folder):
    assert load_preset("good.py").workdir == "a"
    assert load_preset(f"{folder}/good.py:x:y").workdir == "x:y"
    with pytest.raises(AttributeError):  # a typo in a later change is an error
        load_preset("good.py").worktree = "b"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("def get_config(:\n", "raised SyntaxError: invalid syntax at bad.py:1"),
        ("import numpyy\n", "raised ModuleNotFoundError: No module named 'numpyy' at bad.py:1"),
        ("\ndef get_config():\n    return 1 / 0\n", "division by zero at bad.py:3"),
        ("def get_config():\n    return undefined\n", "raised NameError: "),
        ("x = 1\n", "raised AttributeError: "),
        ("import sys\nsys.exit(0)\n", "called sys.exit(0) at bad.py:2"),
        ("def get_config():\n    pass\n", "whose get_config() returns NoneType; allowed: a Python"),
        ("def get_config():\n    return {}\n", "whose get_config() returns dict"),
    ],
)
def test_a_preset_that_fails_says_where(folder, text, expected):
    (folder / "bad.py").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_preset("bad.py")
    assert str(caught.value).startswith("--config: got 'bad.py', ") and expected in str(
        caught.value
    )


def test_a_preset_that_takes_no_argument(folder):
    (folder / "bad.py").write_text("def get_config():\n    pass\n")
    with pytest.raises(
        ConfigError, match=r"got bad.py:x, but .* takes no argument; leave out ':x'"
    ):
        load_preset("bad.py:x")


def test_a_file_that_is_not_there_lists_the_presets(folder):
    with pytest.raises(ConfigError) as caught:
        load_preset("configs/onlinedpo.py")
    message = str(caught.value)
    assert message.startswith("--config: got 'configs/onlinedpo.py', which cannot be read as a pre")
    assert "there is no such file" in message and "did you mean" in message
    assert (
        "did you mean 'online_dpo'? " in message and "gsm8k" in message and "quickstart" in message
    )
    with pytest.raises(ConfigError, match=r"is a folder\); presets in .*: good$"):
        load_preset(".")
    with pytest.raises(ConfigError, match=r"no such file\); did you mean 'good.py'\? presets in"):
        load_preset("gode.py")
    with pytest.raises(ConfigError, match=r"no such file\); presets in .*ppo"):  # none is near
        load_preset("nosuch")
    with pytest.raises(ConfigError, match="did you mean 'reward_model'"):  # not of what is here
        load_preset("rewardmodel")
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"folder\); a run is --config=run/config.json; presets"):
        load_preset("run")


def test_the_presets_are_those_of_the_folder(folder):
    assert list_presets(folder) == ["good"]
    assert {"online_dpo", "online_kto", "quickstart"} <= set(list_presets())
    assert "online_dpo" in explain_absent()


def test_the_config_of_a_run_is_read_for_the_workdir_that_it_lies_in(folder):
    run = folder / "moved"
    run.mkdir()
    plain = to_dict(Config(seed=3, workdir="before", loss={"name": "kto", "beta": 0.2}))
    del plain["verify"]  # of a version that did not have this section
    (run / "config.json").write_text(json.dumps(plain | {"segments": [{"round": 1}]}))
    config = load_preset("moved/config.json")
    assert config.seed == 3
    assert (config.workdir, config.loss.to_dict()) == ("moved", {"name": "kto", "beta": 0.2})
    assert config.verify.round == "all" and "segments" not in config
    (run / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="which no run has written"):
        load_preset("moved/config.json")


@pytest.fixture
def new_folder():
    """Forget where the presets are, before and after a test that moves them."""
    find_folder.cache_clear()
    yield
    find_folder.cache_clear()


def test_a_preset_of_the_package_is_found_by_its_name_from_anywhere(folder):
    for name in ("quickstart", "quickstart.py", "configs/quickstart.py"):
        assert load_preset(name).task == "pipeline", name
    assert [load_preset(name).loss.name for name in ("align", "align:kto")] == ["dpo", "kto"]
    with pytest.raises(ConfigError, match=r"got 'align:ipo'.*got 'ipo', allowed: dpo, kto at "):
        load_preset("align:ipo")
    (folder / "quickstart").mkdir()  # a workdir of that name
    assert load_preset("quickstart").task == "pipeline"
    (folder / "quickstart.py").write_text(GOOD)  # a file of one's own comes first
    assert load_preset("quickstart.py").workdir == "a"
    with pytest.raises(ConfigError, match="there is no such file"):
        load_preset("other/quickstart.py")
    for file in folder.glob("*.py"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"did you mean 'quickstart'\?"):
        load_preset("quickstrat")


def test_presets_are_found_where_an_installation_put_them(tmp_path, monkeypatch, new_folder):
    site, share = tmp_path / "lib" / "site", tmp_path / "share" / "halos_jax" / "configs"
    info = site / "halos_jax-0.1.0.dist-info"
    for made in (info, share):
        made.mkdir(parents=True)
    (share / "quickstart.py").write_text(GOOD)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: halos_jax\nVersion: 0.1.0\n")
    (info / "RECORD").write_text("../../share/halos_jax/configs/quickstart.py,,\n")
    monkeypatch.setattr(presets, "__file__", str(site / "halos_jax" / "cli" / "presets.py"))
    monkeypatch.setattr(sys, "path", [str(site)])
    importlib.invalidate_caches()
    assert find_folder() == share.resolve()
    assert list_presets() == ["quickstart"] and load_preset("quickstart").workdir == "a"
    find_folder.cache_clear()
    monkeypatch.setattr(sys, "path", [])
    importlib.invalidate_caches()
    assert list_presets() == []


def test_a_wheel_has_the_presets(tmp_path):
    """Where an installer puts what is below .data/data: the prefix of the environment."""
    source = Path(__file__).parents[2]
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(source / name, tmp_path)
    for name in ("halos_jax", "configs"):
        shutil.copytree(source / name, tmp_path / name, ignore=shutil.ignore_patterns("*.pyc"))
    build = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    wheel = tmp_path / "dist" / done.stdout.splitlines()[-1]
    names = zipfile.ZipFile(wheel).namelist()
    for preset in list_presets():
        found = [one for one in names if one.endswith(f"/share/halos_jax/configs/{preset}.py")]
        assert len(found) == 1 and ".data/data/" in found[0]
    assert not [name for name in names if name.startswith("configs/")]
    assert "halos_jax/console/logs.py" in names


def test_the_summary_of_a_file(tmp_path):
    file = tmp_path / "a.py"
    file.write_text('"""One.\n\nTwo."""\nraise SystemExit\n')
    assert read_summary(file) == "One."
    file.write_text("x = 1\n")
    assert read_summary(file) == read_summary(tmp_path / "none.py") == ""
