"""The tasks that stand alone, one after the other on each other's files, killed and carried on."""

import json
import signal

import pytest

from halos_jax.models.files import hf
from halos_jax.workdir import manifests

CHAIN = (
    "task=pipeline",
    "pipeline.tasks=('sample','label','align')",
    "pipeline.overrides.label.data.train={workdir}/sample/samples.jsonl",
    "pipeline.overrides.align.data.train={workdir}/label/feedback.jsonl",
    "pipeline.overrides.align.data.eval=",
    "sampling.num_prompts=6",
)


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sample_label_align_killed_in_each(program, finished, tmp_path):
    whole, killed = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    code, _, errors = program.run(whole, *CHAIN, trace=tmp_path / "trace")
    assert (code, errors) == (0, "")
    # What the first round of the online run has sampled, scored and made pairs of.
    online = finished[0] / "rounds" / "0001"
    ours, theirs = (
        {name: folder / f"{name}.jsonl" for name in ("samples", "scores", "feedback")}
        for folder in (whole / "label", online)
    )
    ours["samples"] = whole / "sample" / "samples.jsonl"
    assert ours["samples"].read_bytes() == theirs["samples"].read_bytes()
    rewards = [[line["reward"] for line in read_lines(x["scores"])] for x in (ours, theirs)]
    # A shard is scored by itself here: other shapes, other rounding.
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-5)
    keys = ("prompt_id", "label", "ids_A", "ids_B")
    pairs = [[[p[k] for k in keys] for p in read_lines(x["feedback"])] for x in (ours, theirs)]
    assert pairs[0] == pairs[1]
    manifest = manifests.load_manifest(whole / "label")
    assert manifest.metrics["feedback_pairs"] > 0 and manifest.next_stage is None

    events = (tmp_path / "trace").read_text().splitlines()
    points = [
        next(event for event in events if part in event)
        for part in (
            "before replace sample/samples.shard-0001.jsonl",
            "after replace sample/samples.jsonl",
            "before replace label/scores.shard-0001.jsonl",
            "after replace label/scored.jsonl",
            "before train_step 2",
        )
    ]
    for point in points:
        # In a process that finds the stages before it done, it happens at the start.
        names = (point, f"start: {point.partition(': ')[2]}")
        signals = dict.fromkeys(names, signal.SIGKILL)
        code, _, errors = program.run(killed, *CHAIN, signals=signals)
        assert code == -signal.SIGKILL, (point, errors)
    code, output, errors = program.run(killed, *CHAIN)
    assert (code, errors) == (0, "") and output.count("nothing to do") == 2
    for path in ("sample/samples.jsonl", "label/feedback.jsonl", "label/scored.jsonl"):
        assert (killed / path).read_bytes() == (whole / path).read_bytes(), path
    final = [folder / "align" / "final" / "model.safetensors" for folder in (killed, whole)]
    assert final[0].read_bytes() == final[1].read_bytes()
    assert not list(killed.rglob("*.shard-*"))
    check_verified(program, killed)


def check_verified(program, workdir) -> None:
    """Check that mode=verify goes through a pipeline task by task, and finds what was edited."""
    hashes = ("mode=verify", "verify.derive=false")
    code, output, errors = program.run(workdir, *CHAIN, *hashes)
    assert (code, errors) == (0, "") and ", 0 differs, " in output
    found = json.loads((workdir / "verification.json").read_text())["findings"]
    places = {one["place"].split()[0] for one in found if one["outcome"] == "passed"}
    assert places >= {"sample", "label", "align"}
    samples = workdir / "sample" / "samples.jsonl"
    samples.write_text(samples.read_text().replace('"output": "', '"output": "x', 1))
    code, output, errors = program.run(workdir, *CHAIN, *hashes)
    assert code == 1 and errors.startswith("VerificationError: ")
    wrong = [line.split()[:2] for line in output.splitlines() if "  differs  " in line]
    assert wrong == [["sample", "files"], ["label", "inputs"]]


def test_the_policy_of_an_unfinished_run_is_exported_and_measured(program, tmp_path):
    run = tmp_path / "run"
    code, _, _ = program.run(run, signals={"1 train: before train_step 3": signal.SIGKILL})
    assert code == -signal.SIGKILL
    before = sorted((run / "checkpoints").rglob("*"))
    exported = tmp_path / "exported"
    arguments = ("task=export", f"model.path={run}", f"export.output={exported}")
    code, output, errors = program.run(tmp_path / "export", *arguments)
    assert (code, errors) == (0, "")
    assert "is the workdir of a run: using checkpoint" in output
    assert hf.load_decoder_config(str(exported)).num_labels == 0
    assert sorted((run / "checkpoints").rglob("*")) == before

    feedback = run / "rounds" / "0001" / "feedback.jsonl"
    arguments = ("task=eval", "eval.on=feedback", f"data.eval={feedback}", f"model.path={run}")
    code, output, errors = program.run(tmp_path / "eval", *arguments)
    assert (code, errors) == (0, "")
    metrics = json.loads((tmp_path / "eval" / "result.json").read_text())["metrics"]
    # 0 of the policy that the run started with; of which pairs it is right, few steps decide.
    assert metrics["rewards_eval/margins"] > 0.05 and "rewards_eval/accuracies" in output

    code, _, errors = program.run(tmp_path / "other", "task=export", f"model.path={tmp_path}")
    assert code == 1 and len(errors.splitlines()) <= 3
