"""Every command and every Python block of every document runs, at a size for a test."""

import ast
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from halos_jax.cli.overrides import apply_overrides, split_overrides
from halos_jax.cli.presets import load_preset
from halos_jax.config import default, freeze
from halos_jax.tasks.sample import make_alpacaeval_record
from halos_jax.types import Prompt, Sample, Turn
from tests.documents import (
    ROOT,
    Command,
    list_commands,
    list_documents,
    read_blocks,
)
from tests.e2e.stand_ins import make_stand_ins, prepare

with tempfile.TemporaryDirectory() as _folder:
    ALL = list(list_commands(Path(_folder)))
COMMANDS = list({(one.words, one.stdin): one for one in ALL}.values())  # of equal ones the last
MAIN = [one for one in COMMANDS if one.is_main]
OTHERS = [one for one in COMMANDS if not one.is_main]
PYTHON = [one for path in list_documents() for one in read_blocks(path) if one.language == "python"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def place_of(one) -> str:
    return one.place


@pytest.fixture(scope="module")
def stand_ins(inputs, tmp_path_factory):
    """Return the folder of the stand-ins."""
    return make_stand_ins(inputs, tmp_path_factory.mktemp("stand_ins") / "files")


def run(program, prepared, *more: str) -> str:
    """Run a prepared command; return what it has printed."""
    arguments = [*prepared.arguments, *more]
    secret = {"OPENAI_API_KEY": "a-key"}
    code, output, errors = program.run_with(arguments, prepared.workdir, environment=secret)
    assert (code, errors) == (0, ""), f"{errors}\n{output}\n{shlex.join(arguments)}"
    return output


def check_config(arguments: list[str]) -> None:
    """Raise ConfigError where the config of a command is wrong."""
    flags, overrides = split_overrides(arguments)
    config = load_preset(flags[0].removeprefix("--config="))
    freeze(config, errors=apply_overrides(config, overrides))


@pytest.mark.parametrize("command", MAIN, ids=place_of)
def test_nothing_is_wrong_with_a_documented_command(command, program, stand_ins, judge):
    if "--help" in command.words:
        code, output, _ = program.run_with(command.words[3:], stand_ins)
        assert code == 0 and "online" in output
        return
    prepared = prepare(command.words, stand_ins, stand_ins / "runs", judge)
    check_config(prepared.arguments)
    if not prepared.is_elsewhere:
        assert "nothing to mend" in run(program, prepared, "--config.mode=check")


@pytest.mark.slow
@pytest.mark.parametrize("document", sorted({one.document for one in ALL if one.is_main}))
def test_documented_commands_run_one_after_the_other(document, program, stand_ins, judge, tmp_path):
    (tmp_path / "runs").mkdir()
    commands = dict.fromkeys(one.words for one in ALL if one.is_main and one.document == document)
    commands.pop(("python", "-m", "halos_jax.main", "--help"), None)
    for words in commands:
        prepared = prepare(words, stand_ins, tmp_path / "runs", judge)
        if prepared.is_elsewhere:
            continue
        if "configs/bench.py" in words[3]:  # it compiles steps itself, which a fork observes
            process = program.start_with(*prepared.arguments)
            assert process.communicate()[1] == "" and process.returncode == 0
        else:
            run(program, prepared)
        assert list(prepared.workdir.iterdir()), words


def test_a_name_without_a_stand_in_is_an_error(stand_ins, judge):
    words = ("python", "-m", "halos_jax.main", "--config=configs/online_dpo.py")
    for more, line in (
        ("--config.data.train=nobody_has.jsonl", "data.train: 'nobody_has.jsonl' has no stand-in"),
        ("--config.model.path=org/model", "model.path: 'org/model' has no stand-in"),
        ("--config.train.steps=3", "train.steps: unknown"),
        ("--verbose", "a flag without a stand-in"),
    ):
        with pytest.raises(ValueError, match=line):
            prepare((*words, more), stand_ins, stand_ins / "runs", judge)


# --------------------------------------------------------------------------- other programs


def check_install(command: Command, stand_ins: Path) -> None:
    """Check that `pip install` asks for extras that there are."""
    assert command.words[1:2] == ("install",)
    wanted = [word for word in command.words[2:] if not word.startswith("-")]
    for requirement in wanted:
        name, _, extras = requirement.rstrip("]").partition("[")
        if command.document == "halos_jax/guide/OTHER_PROGRAMS.md":  # of other people's programs
            assert name in ("lm-eval", "torch", "accelerate", "alpaca_eval", "setuptools<81")
            continue
        assert name in (".", PROJECT["name"])
        assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])


def check_script(command: Command, stand_ins: Path) -> None:
    """Check that a script is there and is shell; arguments of the tests are pytest's."""
    script, *arguments = command.words[1:]
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)
    if Path(script).name == "test.sh":
        check_pytest(Command(command.place, ("pytest", *arguments)), stand_ins)
    elif arguments:
        check_config([f"--config={ROOT}/configs/quickstart.py", *arguments])


def check_pytest(command: Command, stand_ins: Path) -> None:
    """Check that pytest has the options and the repository the files, but for tests/a/test_b.py."""
    options = {"-x": 0, "-q": 0, "-k": 1, "-m": 1, "-n": 1}
    words = list(command.words[1:])
    while words:
        word = words.pop(0)
        if word.startswith("-"):
            del words[: options[word]]
        else:
            assert word == "tests/a/test_b.py" or (ROOT / word.partition("::")[0]).exists(), word


def run_python(command: Command, stand_ins: Path) -> None:
    """Run a Python program that stands in a here-document, or see that a script is there."""
    if command.words[1] != "-":
        assert (ROOT / command.words[1]).is_file(), command.words
        return
    arguments = [str(stand_ins / "policy") if word == "DIR" else word for word in command.words[2:]]
    done = subprocess.run(
        [sys.executable, "-", *arguments],
        input=command.stdin,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "GiB" in done.stdout, done.stderr


def check_tool(command: Command, stand_ins: Path) -> None:
    """Check that a tool comes with the tests."""
    wanted = " ".join(PROJECT["optional-dependencies"]["test"])
    assert command.words[0] in wanted, command.words


def read_yaml(document: str) -> list[dict]:
    return [yaml.safe_load(one.text) for one in read_blocks(document) if one.language == "yaml"]


def check_lm_eval(command: Command, stand_ins: Path) -> None:
    """Check that the page has the task, and that it reads fields of the questions' records."""
    options = _pair(command.words[1:])
    (task,) = [one for one in read_yaml(command.document) if "task" in one]
    assert options["--tasks"] == task["task"] and "--apply_chat_template" in command.words
    (file,) = task["dataset_kwargs"]["data_files"].values()
    record = json.loads((stand_ins / file).read_text().splitlines()[0])
    for text in (task["doc_to_text"], task["doc_to_target"]):
        assert re.match(r"{{(\w+)", text)[1] in record
    assert task["generation_kwargs"]["until"] == []  # the model's own end tokens alone


def check_alpaca_eval(command: Command, stand_ins: Path) -> None:
    """Check that the annotator's template has what a record of ours gives."""
    options = _pair(command.words[1:])
    (annotators,) = [one for one in read_yaml(command.document) if "task" not in one]
    (template,) = [
        one.text
        for one in read_blocks(command.document)
        if one.language == "text" and "{instruction}" in one.text
    ]
    (annotator,) = annotators.values()
    folder = Path(options["--annotators_config"])
    assert folder.is_absolute() and annotator["prompt_template"] == f"{folder.name}/prompt.txt"
    fields = set(re.findall(r"{(\w+)}", template))
    assert fields == {"instruction", "output_1", "output_2"}
    sample = Sample(Prompt("1", (Turn("user", "a"),)), 0, "b", (), (), "stop", generator="c")
    record = make_alpacaeval_record(sample, "d")
    assert {"instruction", "output", "generator"} <= record.keys()
    assert all(isinstance(value, str) for value in record.values())


def _pair(words: Sequence[str]) -> dict[str, str]:
    """Return the options that have a value."""
    return {
        one: other
        for one, other in itertools.pairwise(words)
        if one.startswith("--") and not other.startswith("--")
    }


HANDLERS = {
    "alpaca_eval": check_alpaca_eval,
    "bash": check_script,
    "codespell": check_tool,
    "lm_eval": check_lm_eval,
    "mypy": check_tool,
    "pip": check_install,
    "pre-commit": check_tool,
    "pytest": check_pytest,
    "python": run_python,
    "ruff": check_tool,
}


@pytest.mark.parametrize("command", OTHERS, ids=place_of)
def test_other_documented_commands_could_run(command, stand_ins):
    HANDLERS[command.words[0]](command, stand_ins)


# --------------------------------------------------------------------------- Python

# A block that changes a config, as a preset.
CHANGED = """
from configs.online_dpo import get_config as get_preset

def get_config():
    config = get_preset()
    config.model.path, config.data.train = "DIR_OR_HUB_ID", "prompts.jsonl"
{}
    return config
"""
# First line of a block that is no program by itself -> where it is tested.
QUOTED = {
    '@register("cal_dpo"': "tests/losses/test_preference.py",
    'FORMULAS["cal_dpo"]': "tests/losses/test_preference.py",
}


@pytest.mark.parametrize("block", PYTHON, ids=place_of)
def test_a_python_block_runs(block, program, stand_ins, judge, tmp_path):
    first = block.text.splitlines()[0]
    for start, file in QUOTED.items():
        if first.startswith(start):
            assert block.document in (ROOT / file).read_text()
            return
    if first.startswith("@register"):
        check_quotes(block.text)
        return
    text = block.text.replace("runs/first/final", str(stand_ins / "policy"))
    names = {"config": default()}
    exec(compile(text, block.place, "exec"), names)
    if "get_config" in names:
        (tmp_path / "preset.py").write_text(text)
        words = ("python", "-m", "halos_jax.main", f"--config={tmp_path}/preset.py")
        prepared = prepare(words, stand_ins, tmp_path, judge)
        run(program, prepared, "--config.mode=check")
    if "score" in names:
        right, wrong = (names["score"]([], text, {"keyword": "Sky"}) for text in ("the sky", "no"))
        assert right > wrong
    if names["config"] != default():
        (tmp_path / "preset.py").write_text(f"{CHANGED.format(textwrap.indent(text, '    '))}\n")
        words = ("python", "-m", "halos_jax.main", f"--config={tmp_path}/preset.py")
        prepared = prepare(words, stand_ins, tmp_path, judge)
        run(program, prepared, "--config.mode=check")


def check_quotes(text: str) -> None:
    """Check that the functions of a block stand in the files that it names, word for word."""
    sources = {"": "halos_jax/data/records/hub.py"}
    file = sources[""]
    for part in text.split("\n\n\n"):
        if part.startswith("# and in "):
            head, _, part = part.partition("\n")
            file = head.removeprefix("# and in ")
        ast.parse(part)
        assert part.strip() in (ROOT / file).read_text(), part
