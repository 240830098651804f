"""Make a small record of a run's workdir: what the study's notebook draws from."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Of the metrics of each optimizer step.
STEP_METRICS = (
    "step",
    "counters/lr",
    "grad_norm",
    "loss/train",
    "rewards_train/margins",
    "rewards_train/accuracies",
    "rewards_train/chosen",
    "rewards_train/rejected",
    "rewards_train/KL_estimate",
    "rewards_train/advantage",
)
DIGITS = 5  # significant ones


def collect_run(workdir: Path) -> dict[str, Any]:
    """Return what is on disk of a run, be it complete or cut.

    Returns:
      A record with `config`; `rounds`, a list of records with the manifest's numbers, decisions and
      metrics, and `held_out` and `test`, how many samples of each prompt were right; `steps`, name
      -> value of each step; `times`; and for a task without rounds, `result`.
    """
    record: dict[str, Any] = {
        "config": name_places(read_json(workdir / "config.json")),
        "rounds": [collect_round(folder) for folder in sorted(workdir.glob("rounds/[0-9]*"))],
        "steps": collect_steps(read_lines(workdir / "metrics.jsonl")),
        "times": collect_times(read_lines(workdir / "timings.jsonl")),
        "is_complete": (workdir / "final").is_dir() or (workdir / "result.json").exists(),
    }
    record["rounds"] = [one for one in record["rounds"] if one]
    if (workdir / "result.json").exists():
        record["result"] = name_places(shorten(read_json(workdir / "result.json")))
        record["right"] = count_right(read_lines(workdir / "eval.jsonl"))
    return record


def collect_round(folder: Path) -> dict[str, Any]:
    """Return the record of one round; an empty one if nothing of it is committed."""
    manifest = read_json(folder / "manifest.json")
    if not manifest:
        return {}
    kept = ("round", "start", "stop", "stages", "metrics", "decisions")
    record = {name: shorten(manifest[name]) for name in kept if name in manifest}
    for name, file in (("held_out", "eval.jsonl"), ("test", "test.jsonl")):
        if file in manifest["files"]:
            record[name] = count_right(read_lines(folder / file))
    return record


def count_right(samples: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return how many samples of each prompt have reward 1, in the order of the prompts' ids.

    The ids sort alike in every run on the same prompts, so that runs can be compared prompt by
    prompt. `right` has a character a prompt, its number in base 36.
    """
    counts: dict[str, list[int]] = {}
    tokens, cut = 0, 0
    for sample in samples:
        count = counts.setdefault(sample["prompt_id"], [0, 0])
        count[0] += sample.get("reward") == 1
        count[1] += 1
        tokens += len(sample.get("response_ids") or ())
        cut += sample.get("finish_reason") == "length"
    each = {asked for _, asked in counts.values()}
    total = sum(asked for _, asked in counts.values())
    return {
        "right": "".join(_DIGITS[counts[name][0]] for name in sorted(counts)),
        "samples": max(each, default=0),
        "response_tokens": round(tokens / total, 1) if total else None,
        "cut": round(cut / total, 4) if total else None,
    }


_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def read_right(text: str) -> list[int]:
    """Return the counts that `count_right` has written."""
    return [int(one, 36) for one in text]


def collect_steps(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return name -> value of each optimizer step, for the lines that are of a step."""
    steps = [line for line in lines if "loss/train" in line]
    found = [name for name in STEP_METRICS if any(name in line for line in steps)]
    return {name: [shorten(line.get(name)) for line in steps] for name in found}


def collect_times(lines: Iterable[Mapping[str, Any]]) -> list[list[Any]]:
    """Return [round, stage, seconds] of each stage."""
    return [[line["round"], line["stage"], round(line["end"] - line["start"], 2)] for line in lines]


def shorten(value: Any) -> Any:
    """Return JSON with its floats rounded to five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {name: shorten(one) for name, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [shorten(one) for one in value]
    return value


def name_places(value: Any) -> Any:
    """Return JSON with the last name alone of each absolute path: the rest is of one machine."""
    if isinstance(value, str) and value.startswith("/"):
        return Path(value).name
    if isinstance(value, Mapping):
        return {name: name_places(one) for name, one in value.items()}
    return [name_places(one) for one in value] if isinstance(value, list) else value


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; an empty record if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def read_lines(path: Path) -> list[Any]:
    """Return the records of a JSON Lines file, without a last line that is not whole."""
    if not path.exists():
        return []
    *whole, _ = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in whole if line]
