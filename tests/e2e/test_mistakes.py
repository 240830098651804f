"""Mistakes that people make, each with what is said of it: what, what was got, what to change.

They go through what a start does before it reads weights, in this process: the command line, the
preset, the config, and the checks of `mode=check`.
"""

import json
import sys
from pathlib import Path

import pytest

from halos_jax import config as config_lib
from halos_jax.cli.command_line import refuse_arguments, take_check
from halos_jax.cli.overrides import apply_overrides, split_overrides
from halos_jax.cli.presets import load_preset
from halos_jax.errors import UserError
from halos_jax.tasks import launch
from halos_jax.tasks.preflight import check_start

PRESET = Path(__file__).with_name("tiny.py")
REWARDS = """\
import sys


def bare(prompt): return 1.0
def third(prompt, response, answer): return 1.0
async def later(prompt, response): return 1.0
def batch(completions, solution, **kwargs): return [1.0] * len(completions)
"""
FILES = {
    "broken.jsonl": '{"prompt": "a"}\n{"prompt": "b"\n',
    "empty.jsonl": "",
    "text_only.jsonl": '{"text": "abc", "id": 7}\n',
    "assistant_last.jsonl": '{"prompt": [{"role": "assistant", "content": "x"}]}\n',
    "number.jsonl": '{"prompt": 7}\n',
    "prompts.jsonl": '{"prompt": "cab"}\n{"prompt": "bca"}\n',
    "long.jsonl": json.dumps({"prompt": "ab" * 40, "completion": "c"}) + "\n",
    "twice.jsonl": '{"prompt_id": "p", "prompt": "a"}\n{"prompt_id": "p", "prompt": "b"}\n',
    "mine.py": REWARDS,
    "fails.py": "import numpyy\n",
    "preset.py": "def get_config():\n    return 1 / 0\n",
    "prompt.jinja": "{{ turns }} {{ answer }}",
    "torn.jinja": "{% if turns %}",
}
FUNCTION = ("reward.kind=function", "reward.function=halos_jax.data.toy:score_by_rule")
JUDGE = ("reward.kind=judge", "reward.judge.model=m")
KEYLESS = (*JUDGE, "reward.judge.key_variable=")
SFT = ("task=sft", "data.eval=")

# Arguments; those without dashes stand for --config.ARGUMENT. What the message has in it.
MISTAKES = [
    # the command line
    (["--lr=1e-5"], ["--lr: unknown flag", "--config.optimizer.learning_rate=1e-5"]),
    (["--output_dir", "runs/x"], ["fields are set as --config.workdir=runs/x"]),
    (["--model_name_or_path=m"], ["--config.model.path=m"]),
    (["+-++loss.beta=0.2"], ["HALOs' Hydra syntax", "--config.loss.beta=0.2"]),
    (["+-loss=kto"], ["got arguments ['loss=kto']", "--config.loss.name=kto", "From HALOs"]),
    (["+-train.batch_size=4"], ["no dashes; here --config.train.batch_size=4"]),
    (["+-configs/quickstart.py"], ["allowed: --config=configs/quickstart.py"]),
    (["--config=configs/onlinedpo.py"], ["there is no such file", "did you mean", "'online_dpo'",
                                         "gsm8k"]),
    (["--config={tmp}"], ["is a folder"]),
    (["--config={tmp}/preset.py"], ["division by zero", "preset.py:2", "get_config()"]),
    (["--config={tmp}/fails.py"], ["No module named 'numpyy'", "fails.py:1"]),
    (["train.batch_size"],
     ["train.batch_size: got no value; write --config.train.batch_size=VALUE"]),
    # names of fields
    (["optimizer.lr=1"], ["optimizer.lr: unknown field; did you mean 'optimizer.learning_rate'?"]),
    (["lr=1"], ["lr: unknown field; did you mean 'optimizer.learning_rate'?"]),
    (["train.wd=1"], ["did you mean 'optimizer.weight_decay'?"]),
    (["train.bs=1"], ["did you mean 'train.batch_size'?"]),
    (["optimizer.num_train_epochs=1"], ["did you mean 'train.epochs'?"]),
    (["beta=0.2"], ["beta: unknown field; did you mean 'loss.beta'?"]),
    (["model.max_seq_length=9"], ["did you mean 'train.max_length'?"]),
    (["sampling.max_new_tokens=9"], ["did you mean 'sampling.max_tokens'?"]),
    (["sampling.n=9"], ["did you mean 'sampling.num_samples_per_prompt'?"]),
    (["train.gradient_checkpointing=true"], ["did you mean 'model.remat'?"]),
    (["train.learning_rate=1"], ["did you mean 'optimizer.learning_rate'?"]),
    (["train.batchsize=1"], ["did you mean 'train.batch_size'?"]),
    (["train=4"], ["train: is a section, not a field; set one of its fields"]),
    (["zzz=4"], ["zzz: unknown field; see halos_jax/config/sections.py"]),
    # values
    (["task=dpo"], ["task: got 'dpo', allowed: 'online', 'sft'"]),
    (["loss.name=dop"], ["loss.name: got 'dop'", "dpo"]),
    (["loss.betta=0.1"], ["betta", "beta"]),
    (["train.batch_size=4.5"], ["train.batch_size: got '4.5', allowed: an integer"]),
    (["optimizer.learning_rate=1e-5f"], ["got '1e-5f', allowed: a finite number"]),
    (["optimizer.learning_rate=0"], ["optimizer.learning_rate: got 0", "greater than 0"]),
    (["sampling.top_p=95"], ["sampling.top_p: got 95", "above 0, 1 at most"]),
    (["model.compute_dtype=fp16"], ["got 'fp16', allowed: 'float32', 'bfloat16'"]),
    (["progress=maybe"], ["got 'maybe', allowed: True or False"]),
    (["mesh.data=2", "mesh.fsdp=2"], ["mesh:", "devices"]),
    (["sampling.num_samples_per_prompt=1"], ["got 1, allowed: 2 or more", "compares the samples"]),
    (["train.max_length=9"], ["train.max_length: got 9, but sampling.max_prompt_length"]),
    (["feedback.threshold=median"], ["allowed: 'auto' or a number of 0 or more"]),
    (["lora.targets=q_proj"], ["lora.rank=0 trains all weights"]),
    (["workdir="], ["workdir: got '', allowed: a folder"]),
    # the model
    (["model.path=/no/such/model"], ["'/no/such/model' not found", "config.json and"]),
    (["model.path={inputs}/reward"], ["a model that scores texts", "--config.reward.path"]),
    (["model.path={tmp}"], ["config.json"]),
    (["model.chat_template={tmp}/absent.jinja"], ["absent.jinja"]),
    (["lora.rank=4", "lora.targets=q_prj"], ["q_prj", "q_proj"]),
    # the reward
    (["reward.path={inputs}/policy"], ["reward.path", "without a classification head"]),
    (["reward.path=/no/such/model"], ["'/no/such/model' not found"]),
    (["reward.kind=function"], ["reward.function: got '', but reward.kind='function' needs it"]),
    (["reward.kind=function", "reward.function=mine.py:bare"],
     ["for a file, set PYTHONPATH=. and --config.reward.function=mine:bare"]),
    (["reward.kind=function", "reward.function=mine.bare"], ["did you mean 'mine:bare'?"]),
    (["reward.kind=function", "reward.function=mine:bar"],
     ["module 'mine' has no 'bar'", "did you mean 'bare'?"]),
    (["reward.kind=function", "reward.function=absent:f"],
     ["no module 'absent'", "PYTHONPATH=DIR"]),
    (["reward.kind=function", "reward.function=fails:f"],
     ["No module named 'numpyy'", "fails.py:1"]),
    (["reward.kind=function", "reward.function=mine:bare"],
     ["whose parameters are (prompt)", "f(prompt turns, response text)", "as in TRL"]),
    (["reward.kind=function", "reward.function=mine:third"],
     ["whose parameters are (prompt, response, answer)", "record=..."]),
    (["reward.kind=function", "reward.function=mine:later"], ["is an async function"]),
    (["reward.kind=function", "reward.function=mine:batch"],
     ["its parameters solution need fields of the records"]),
    (["reward.kind=function", "reward.function=halos_jax.rewards.functions:exact_answer"],
     ["field 'answer': got nothing"]),
    ([*FUNCTION, "reward.arguments.x=1"], ["reward.arguments: got {'x': 1}", "does not take"]),
    ([*FUNCTION, "reward.rules=absent:f"], ["reward.rules: got 'absent:f'"]),
    ([*JUDGE, "reward.judge.key_variable=NO_SUCH_KEY"], ["variable NO_SUCH_KEY holds nothing"]),
    ([*JUDGE, "reward.judge.key_variable=sk-abc"], ["never the key"]),
    ([*KEYLESS, "reward.judge.url=http://127.0.0.1:9/v1"], ["nothing listens at 127.0.0.1:9"]),
    ([*KEYLESS, "reward.judge.url=localhost:8000"], ["got what is no plain address", "http(s)://"]),
    ([*KEYLESS, "reward.judge.prompt={tmp}/prompt.jinja"],
     ["prompt.jinja uses answer, allowed: ", "response"]),
    ([*KEYLESS, "reward.judge.prompt={tmp}/torn.jinja"], ["torn.jinja line 1"]),
    ([*KEYLESS, "reward.judge.prompt={tmp}/absent.jinja"], ["absent.jinja", "cannot be read"]),
    # the data
    (["data.train={tmp}/absent.jsonl"], ["absent.jsonl"]),
    (["data.train={tmp}/broken.jsonl"], ["broken.jsonl line 2"]),
    (["data.train={tmp}/empty.jsonl"], ["empty.jsonl"]),
    (["data.train={tmp}/number.jsonl"], ["number.jsonl line 1: field 'prompt': got 7"]),
    (["data.train={tmp}/assistant_last.jsonl"], ["assistant_last.jsonl line 1", "the user"]),
    (["data.train={tmp}/text_only.jsonl"], ["text_only.jsonl line 1", "prompt"]),
    (["data.train={tmp}/twice.jsonl"], ["twice.jsonl line 2", "prompt_id"]),
    (["data.eval={inputs}/prompts.jsonl"], ["data.eval: ", "of its prompts are in data.train too"]),
    (["task=align", "data.eval=", "data.train={tmp}/prompts.jsonl"],
     ["prompts.jsonl line 1: field 'chosen'", "task=online makes pairs", "rejected"]),
    ([*SFT, "data.train={tmp}/prompts.jsonl"], ["prompts.jsonl line 1", "completion"]),
    ([*SFT, "data.train={tmp}/long.jsonl", "sampling.max_prompt_length=60"],
     ["train.max_length: got 16", "long.jsonl line 1 has 60 tokens", "lower sampling.max_pr"]),
    (["sampling.max_prompt_length=1", "train.max_length=99"],
     ["max_length: got 1", "the chat template of ", "raise sampling.max_prompt_length"]),
    # the machine
    (["workdir={tmp}/mine.py/run"], ["mine.py is a file"]),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return the current folder, with the files, also on the Python path."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in {"mine", "fails"} & (set(sys.modules) - before):
        del sys.modules[name]


def start(arguments: list[str]) -> None:
    """Do what the program does with a command line before it reads weights."""
    argv, overrides = take_check(*split_overrides(["main", *arguments]))
    refuse_arguments(argv[1:], ("config", "help"))
    preset = [one.partition("=")[2] for one in argv if one.startswith("--config=")][-1]
    config = load_preset(preset)
    errors = apply_overrides(config, overrides)
    frozen = config_lib.freeze(config, errors=errors, checks=[launch._check_objective])
    lines = launch._check_devices(frozen)
    if lines:
        raise config_lib.ConfigError("\n".join(lines))
    check_start(frozen, with_data=True)


def make_arguments(given: list[str], inputs: Path, folder: Path) -> list[str]:
    """Return a command line on the tiny preset; "+-" before an argument keeps it as it is."""
    filled = [one.replace("{inputs}", str(inputs)).replace("{tmp}", str(folder)) for one in given]
    base = [f"--config={PRESET}:{inputs}", f"--config.workdir={folder / 'run'}"]
    base += ["--config.train.batch_size=8", "--config.lora.dropout=0.05"]
    for one in filled:
        if one.startswith("+-"):
            base.append(one[2:])
        else:
            base.append(one if one.startswith("--") or "/" in one[:1] else f"--config.{one}")
    return base


def test_the_preset_itself_has_nothing_wrong(inputs, folder):
    start(make_arguments([], inputs, folder))
    assert not (folder / "run").exists()


@pytest.mark.parametrize("given, expected", MISTAKES, ids=lambda one: " ".join(one)[:60])
def test_a_mistake_is_one_message_that_says_what_to_change(inputs, folder, given, expected):
    if given[0] == "--output_dir":
        arguments = [*make_arguments([], inputs, folder), *given]
    else:
        arguments = make_arguments(given, inputs, folder)
    with pytest.raises(UserError) as caught:
        start(arguments)
    message = str(caught.value)
    missing = [part for part in expected if part not in message]
    assert missing == [], message
    assert not (folder / "run").exists()  # nothing is begun
    assert len(message.split("\n")) <= 2 and len(message) < 1000, message


def test_there_are_many_of_them():
    assert len(MISTAKES) >= 75
