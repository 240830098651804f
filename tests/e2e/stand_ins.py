"""Stand-ins for what the commands of documents name: models, data sets of the hub, sizes.

A command keeps its preset and its fields. What cannot be had in a test is replaced field by field;
a name without a stand-in is an error, so that no documented command goes untested.
"""

import dataclasses
import gzip
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from halos_jax.cli.overrides import apply_overrides, split_overrides
from halos_jax.cli.presets import load_preset
from halos_jax.config import Config, roles, schema

# No field of a command is larger than here.
SIZES = {
    "bench.steps": 1,
    "data.holdout": 4,
    "data.max_eval": 4,
    "data.max_test": 4,
    "lora.rank": 4,
    "reward.max_length": 128,
    "rounds.num_skip": 4,
    "rounds.prompts_per_round": 4,
    "rounds.total_prompts": 8,
    "sampling.chunk": 3,
    "sampling.max_prompt_length": 96,
    "sampling.max_tokens": 6,
    "sampling.num_prompts": 4,
    "sampling.num_samples_per_prompt": 4,
    "sampling.shard_prompts": 2,
    "sampling.slots": 8,
    "toy.num_eval": 4,
    "toy.num_pairs": 16,
    "toy.num_prompts": 16,
    "toy.num_sft": 16,
    "train.batch_size": 2,
    "train.max_length": 128,
    "train.row_multiple": 64,
}
# What a CPU does faster.
FIXED = {
    "progress": False,
    "model.compute_dtype": "float32",
    "model.remat": "none",
    "reward.compute_dtype": "float32",
}
MODELS = {
    "model.path": "policy",
    "model.reference": "policy",
    "model.teacher": "policy",
    "reward.path": "reward",
}
# Text in a field -> file or folder among the stand-ins; what stands before "@" for hub data sets.
NAMES = {
    "prompts.jsonl": "prompts.jsonl",
    "questions.jsonl": "prompts.jsonl",
    "test_questions.jsonl": "held_out.jsonl",
    "held_out.jsonl": "held_out.jsonl",
    "test.jsonl": "held_out.jsonl",
    "conversations.jsonl": "conversations.jsonl",
    "pairs.jsonl": "pairs.jsonl",
    "openai/gsm8k:main@train": "questions.jsonl",
    "openai/gsm8k:main@test": "held_out_questions.jsonl",
    "shp@train": "pairs.jsonl",
    "shp@test": "eval_pairs.jsonl",
    "ultrabin@train": "pairs.jsonl",
    "runs/sample/samples.jsonl": "samples.jsonl",
    "runs/label/feedback.jsonl": "pairs.jsonl",
    "runs/sample-2/samples.jsonl": "samples.jsonl",
    "runs/label-2/feedback.jsonl": "pairs.jsonl",
    "runs/align": "policy",
    "first_samples.jsonl": "samples.jsonl",
    "second_samples.jsonl": "samples.jsonl",
    "sft": "policy",
    "runs/first": "policy",
    "runs/sft": "policy",
    "runs/reward": "reward",
}
PLACEHOLDERS = ("DIR", "DIR_OR_HUB_ID")
# Arguments of presets.
ARGUMENTS = {"FOLDER": "{folder}", "case=NAME": "case=tiny", "case=all": "case=tiny"}
# A machine of other kinds, other hosts: such a command is checked as far as its config goes.
ELSEWHERE = {"mesh.distributed": True}
ADDRESS = "https://HOST/v1"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A command's arguments with its stand-ins, and whether this machine can run it."""

    arguments: list[str]
    workdir: Path
    is_elsewhere: bool


def make_stand_ins(inputs: Path, folder: Path) -> Path:
    """Make the files behind `NAMES` and the folder of configs/alpacaeval.py; return `folder`."""
    for name in ("policy", "reward", "base"):
        shutil.copytree(inputs / name, folder / name)
    template = folder / "policy" / "chat_template.jinja"
    template.write_text("{%- if enable_thinking %}{% endif %}" + template.read_text())
    letters = [json.loads(line)["prompt"] for line in _read(inputs / "prompts.jsonl")]
    answers = [{"prompt": turns, "answer": "#### 7", "keyword": "a"} for turns in letters]
    _write(folder / "prompts.jsonl", answers[:12])
    _write(folder / "held_out.jsonl", answers[12:16])
    questions = [{"question": one["prompt"][0]["content"], "answer": "7"} for one in answers]
    _write(folder / "questions.jsonl", questions[:12])
    _write(folder / "held_out_questions.jsonl", questions[12:16])
    chats = [{"messages": [*turns, {"role": "assistant", "content": "abc"}]} for turns in letters]
    _write(folder / "conversations.jsonl", chats)
    for name in ("pairs.jsonl", "eval_pairs.jsonl"):
        shutil.copy(inputs / name, folder)
    for name, source in (("train", "pairs"), ("test", "eval_pairs")):
        packed = gzip.compress((inputs / f"{source}.jsonl").read_bytes())
        (folder / f"feedback_{name}.jsonl.gz").write_bytes(packed)
    samples = [
        {"prompt_id": str(i), "sample_id": j, "prompt": turns, "output": "abc"[j:]}
        for i, turns in enumerate(letters[:4])
        for j in range(2)
    ]
    _write(folder / "samples.jsonl", samples)
    shutil.copy(folder / "prompts.jsonl", folder / "prompts_train.jsonl")
    shutil.copy(folder / "held_out.jsonl", folder / "prompts_test.jsonl")
    return folder


def _read(path: Path) -> list[str]:
    return path.read_text().splitlines()


def _write(path: Path, records: list[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def prepare(words: tuple[str, ...], folder: Path, runs: Path, url: str) -> Prepared:
    """Return a command of the program with stand-ins for all that it names.

    Args:
      words: the command, "python -m halos_jax.main --config=FILE.py ..." in parts.
      folder: of `make_stand_ins`.
      runs: folder for the workdirs; what an earlier command has left there is its own stand-in.
      url: of a judge.

    Raises:
      ValueError: where something has no stand-in, or a field is unknown.
    """
    flags, overrides = split_overrides(list(words[3:]))
    if len(flags) != 1 or not flags[0].startswith("--config="):
        raise ValueError(f"{flags}: a flag without a stand-in")
    file, colon, argument = flags[0].removeprefix("--config=").partition(":")
    if file.startswith("runs/"):
        file = f"{_make_run(file.removesuffix('/config.json'), folder, runs)}/config.json"
    preset = f"{file}{colon}{ARGUMENTS.get(argument, argument).format(folder=folder)}"
    config = load_preset(preset)
    errors = apply_overrides(config, overrides)
    if errors:
        raise ValueError("\n".join(errors))
    flat = dict(schema.flatten(config.to_dict()))
    changed = dict(FIXED)
    if flat["branch.workdir"]:  # of a run with checkpoints: see test_branch.py
        overrides = [(path, value) for path, value in overrides if not path.startswith("branch.")]
        flat |= {"branch.workdir": "", "branch.round": 0, "branch.optimizer": True}
    for path, value in flat.items():
        replaced = _replace(path, value, folder, runs, url)
        if replaced != value:
            changed[path] = replaced
    if flat["mode"] == "verify":
        changed = {}  # a config that differs from the run's would be found
    workdir = runs / Path(flat["workdir"]).name
    changed["workdir"] = str(workdir)
    more = [f"--config.{path}={_spell(value)}" for path, value in changed.items()]
    known = [f"--config.{path}={value}" for path, value in overrides]
    elsewhere = any(flat[path] == value for path, value in ELSEWHERE.items())
    return Prepared([f"--config={preset}", *known, *more], workdir, elsewhere)


def _make_run(name: str, folder: Path, runs: Path) -> Path:
    """Return the workdir of a run that has just begun, unless an earlier command has made one."""
    workdir = runs / name.removeprefix("runs/")
    if not workdir.exists():
        config = load_preset("configs/online_dpo.py")
        changed = {"model.path": "policy", "reward.path": "reward", "data.train": "prompts.jsonl"}
        values = {path: str(folder / file) for path, file in changed.items()}
        apply_overrides(config, [*values.items(), ("workdir", str(workdir))])
        workdir.mkdir(parents=True)
        (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    return workdir


def _replace(path: str, value: Any, folder: Path, runs: Path, url: str) -> Any:
    """Return what stands in for the value of a field, of a stage's override too."""
    field = path.split(".", 3)[-1] if path.startswith("pipeline.overrides.") else path
    if field == "report.workdirs" and value:
        return ",".join(str(_make_run(name, folder, runs)) for name in value)
    if field in SIZES and type(value) is int:
        return min(value, SIZES[field])
    if value == ADDRESS:
        return url
    mark = roles.find_mark(Config, field)
    if not mark.place or not isinstance(value, str) or not value or field == "workdir":
        return value
    parts = value.split(",") if mark.place == "source" else [value]
    return ",".join(_find(field, part, folder, runs) for part in parts)


def _find(field: str, text: str, folder: Path, runs: Path) -> str:
    if text.startswith(("{workdir}", str(folder))):
        return text
    made = runs / text.removeprefix("runs/")
    if text.startswith("runs/") and (made.is_file() or (made / "final").is_dir()):
        return str(made)
    if text in PLACEHOLDERS:
        scores = field.startswith(("reward.", "eval.scorers."))
        section = "reward.path" if scores else field
        return str(folder / MODELS[section])
    if text not in NAMES:
        raise ValueError(f"{field}: {text!r} has no stand-in in {__name__}.NAMES")
    return str(folder / NAMES[text])


def _spell(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def list_placeholders() -> Iterator[str]:
    """Yield every text that has a stand-in."""
    yield from (*NAMES, *PLACEHOLDERS, *ARGUMENTS, ADDRESS)
