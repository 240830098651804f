"""Workdirs as runs leave them, small enough to be written in a test."""

import dataclasses
import json
from pathlib import Path

from halos_jax.config import Config, schema
from halos_jax.workdir.manifests import FileRecord, Manifest, round_folder, save_manifest, stages_of


def write_lines(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_config(workdir: Path, **fields) -> Path:
    """Write the config of an online run; `fields` by paths with "__" between their parts."""
    workdir.mkdir(parents=True, exist_ok=True)
    plain = schema.to_plain(Config()) | {"workdir": str(workdir)}
    for path, value in fields.items():
        section, _, name = path.rpartition("__")
        (plain[section] if section else plain)[name] = value
    (workdir / "config.json").write_text(json.dumps(plain))
    return workdir


def write_round(workdir: Path, round: int, *, files=None, **fields) -> Manifest:
    """Write a complete round: its manifest, and `files` by their names, as rows."""
    folder = round_folder(workdir, round)
    for name, rows in (files or {}).items():
        write_lines(folder / name, rows)
    records = {name: FileRecord("", len(rows)) for name, rows in (files or {}).items()}
    policy = f"round-{round - 1:04d}" if round > 1 else "sft"
    manifest = Manifest(
        round=round,
        start=10 * (round - 1) if round else 0,
        stop=10 * round,
        policy=policy,
        stages=stages_of(round),
        files=records,
    )
    manifest = dataclasses.replace(manifest, **fields)
    folder.mkdir(parents=True, exist_ok=True)
    save_manifest(folder, manifest)
    return manifest


def make_sample(prompt: str, number: int, output: str = "yes", reward=None, **fields):
    """Return the record of a sample, as in samples.jsonl or eval.jsonl."""
    record = {
        "prompt_id": prompt,
        "sample_id": number,
        "output": output,
        "prompt": [{"role": "user", "content": f"question {prompt}"}],
        "response_ids": [1] * len(output.split()),
        "finish_reason": "stop",
    }
    return record | ({} if reward is None else {"reward": reward}) | fields


def estimate(name: str, value: float, half: float):
    """Return a metric with its interval."""
    return {name: value, f"{name}/low": value - half, f"{name}/high": value + half}


def write_run(workdir: Path, **fields) -> Path:
    """Write a run of two rounds that learns: 2 held-out prompts, 2 samples each."""
    write_config(workdir, **fields)
    for round, rewards in enumerate(((0, 0), (0, 1), (1, 1))):
        held_out = [
            make_sample(prompt, number, f"answer {number} of round {round}", float(reward))
            for prompt in ("a", "b")
            for number, reward in enumerate(rewards)
        ]
        files = {"eval.jsonl": held_out}
        metrics = estimate("reward_eval", sum(rewards) / 2, 0.1)
        metrics |= estimate("response_tokens_eval", 5.0, 0.1)
        if round:
            asked = [make_sample("t", number, f"drawn {number}") for number in range(3)]
            scores = [
                {"prompt_id": "t", "sample_id": number, "reward": float(number)}
                for number in range(3)
            ]
            pair = {"type": "pairwise_feedback", "prompt_id": "t", "label": 0}
            pair |= {"sample_id_A": 0, "sample_id_B": 2}
            files |= {"samples.jsonl": asked, "scores.jsonl": scores, "feedback.jsonl": [pair]}
            metrics |= estimate("kl_sft", 0.5 * (round - 1), 0.1)
            metrics |= estimate("fresh_margin", 0.01, 0.02)
            metrics |= estimate("win_rate_eval", 0.75, 0.1)
            metrics |= {"feedback_pairs": 1, "steps_done": round}
        decisions = {"best": {"round": round, "reward": 1.0, "of": round + 1}}
        write_round(workdir, round, files=files, metrics=metrics, decisions=decisions)
    write_lines(
        workdir / "metrics.jsonl",
        [{"step": step, "loss/train": 0.7 - 0.1 * step} for step in (1, 2)],
    )
    write_lines(
        workdir / "timings.jsonl",
        [{"round": 1, "stage": "sample", "start": 0.0, "end": 2.0}],
    )
    return workdir
