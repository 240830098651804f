"""Files changed at random, through the whole program: it ends well, or by one message.

What is accepted is held against other parsers at each kind's own door, in `test_folder_fuzz` and
`test_record_fuzz`. Here it is what a user sees: an exit code of 0 or 1, no traceback, a message
that names the file, and no record that is left out.
"""

import json
import random
import re
import shutil
from collections import Counter

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from halos_jax.models.files import peft
from halos_jax.models.files.weight_files import INDEX, SINGLE
from tests.e2e.file_changes import change_bytes, change_json, change_safetensors
from tests.e2e.test_record_fuzz import mutate

CHANGES = 100  # of each kind
# A quoted message of the program's own, as `main` shows it.
MESSAGE = re.compile(r"^(Config|Record|Model|Reward|Workdir|User)Error: ", re.MULTILINE)
RECORDS = [
    {"prompt": "cab", "completion": "abc", "source": "source text"},
    {"messages": [{"role": "user", "content": "cab"}, {"role": "assistant", "content": "abc"}]},
    {"instruction": "ca", "input": "b", "output": "abc"},
    {"conversations": [{"from": "human", "value": "cab"}, {"from": "gpt", "value": "abc"}]},
    {"prompt": "cab", "chosen": "abc", "rejected": "cba", "score_chosen": 2, "score_rejected": 1},
    {"text": "abc", "meta": {"url": "url text"}},
]


def copy_policy(inputs, folder):
    shutil.copytree(inputs / "policy", folder / "model")
    return folder / "model"


def prepare_records(inputs, folder):
    records = folder / "records.jsonl"
    records.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    arguments = ("mode=check", "task=sft", "data.eval=", f"data.train={records}")
    return {records: change_records}, arguments


def prepare_config(inputs, folder):
    model = copy_policy(inputs, folder)
    arguments = ("mode=check", "data.eval=", f"model.path={model}")
    return {model / "config.json": change_json}, arguments


def prepare_tokenizer(inputs, folder):
    model = copy_policy(inputs, folder)
    files = {model / f"{name}.json": change_json for name in ("tokenizer", "tokenizer_config")}
    files |= {model / "chat_template.jinja": change_bytes}
    arguments = ("mode=check", "data.eval=", f"model.path={model}")
    return {file: how for file, how in files.items() if file.exists()}, arguments


def prepare_safetensors(inputs, folder):
    model = copy_policy(inputs, folder)
    return {model / SINGLE: change_safetensors}, ("task=export", f"model.path={model}")


def prepare_index(inputs, folder):
    model = copy_policy(inputs, folder)
    return {split_weights(model): change_json}, ("task=export", f"model.path={model}")


def prepare_adapter(inputs, folder):
    adapter = write_adapter(folder / "adapter")
    files = {adapter / peft.CONFIG: change_json, adapter / peft.WEIGHTS: change_safetensors}
    sft = ("task=sft", "data.eval=", "data.max_train=2", f"data.train={inputs / 'sft.jsonl'}")
    return files, (*sft, f"lora.path={adapter}", "checkpoint.every=0")


KINDS = [prepare_records, prepare_config, prepare_tokenizer, prepare_safetensors, prepare_index]
KINDS += [prepare_adapter]


def split_weights(model):
    """Put the weights into two files with an index; return that."""
    tensors = load_file(model / SINGLE)
    (model / SINGLE).unlink()
    weight_map = {}
    for number in range(2):
        part = dict(list(tensors.items())[number::2])
        save_file(part, model / f"part-{number}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, f"part-{number}.safetensors")
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return model / INDEX


def write_adapter(folder):
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / peft.CONFIG).write_text(json.dumps(config | {"bias": "none", "lora_dropout": 0.0}))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    shapes = {f"{prefix}A.weight": (2, 32), f"{prefix}B.weight": (32, 2)}
    made = {name: np.full(shape, 0.01, np.float32) for name, shape in shapes.items()}
    save_file(made, folder / peft.WEIGHTS)
    return folder


def change_records(data, rng):
    """Return the file with one of its lines changed."""
    lines = data.splitlines()
    number = rng.randrange(len(lines))
    lines[number] = mutate(json.loads(lines[number]), rng)
    return b"\n".join(lines) + b"\n"


def try_change(program, file, data, arguments, workdir):
    """Run the program; return "accepted" or "refused", or raise AssertionError."""
    shutil.rmtree(workdir, ignore_errors=True)
    code, output, errors = program.run(workdir, *arguments)
    shown = f"{file.name}: {data[:2000]!r}\nexit {code}\n{output[-2000:]}\n{errors[-3000:]}"
    assert "Traceback" not in errors + output, shown
    assert "left out" not in output, shown  # nothing is, unless data.skip_bad says so
    if code == 0:
        return "accepted"
    assert code == 1 and MESSAGE.search(errors), shown
    assert str(file.parent) in errors or file.name in errors, shown
    assert len(errors) < 3000 and len(errors.strip().split("\n")) <= 8, shown
    return "refused"


@pytest.mark.slow
@pytest.mark.parametrize("prepare", KINDS)
def test_a_changed_file_is_read_or_refused_by_one_message(
    program, inputs, tmp_path, capsys, prepare
):
    rng, counts, run = random.Random(5), Counter(), tmp_path / "run"
    files, arguments = prepare(inputs, tmp_path)
    whole = {file: file.read_bytes() for file in files}
    assert try_change(program, next(iter(files)), b"", arguments, run) == "accepted"
    for number in range(CHANGES):
        file = list(files)[number % len(files)]
        data = files[file](whole[file], rng)
        file.write_bytes(data)
        counts[try_change(program, file, data, arguments, run)] += 1
        file.write_bytes(whole[file])
    with capsys.disabled():
        print(f"\n{prepare.__name__}: {dict(counts)}, 0 tracebacks", flush=True)
    assert counts["accepted"] and counts["refused"] and counts.total() == CHANGES
