"""A whole online run that trains an adapter: killed and resumed, exported, continued."""

import json
import math
import signal

import numpy as np
from safetensors.numpy import load_file

from tests.e2e.origins import assert_drawn_by_the_policy
from tests.e2e.test_resume import assert_same_run, read_metrics, run_to_the_end

LORA = ("lora.rank=4", "lora.alpha=8", "lora.dropout=0.2", "optimizer.learning_rate=0.03")
POINTS = [
    "0 evaluate: after sample_shard 0",
    "1 train: before train_step 2",
    "2 sample: after sample_shard 2",
    "2 train: after train_step 5",
    "export: before _write_tensors export",
]


def test_a_killed_adapter_run_ends_as_one_that_was_not(program, inputs, tmp_path):
    whole = tmp_path / "whole"
    code, output, errors = program.run(whole, *LORA)
    assert (code, errors) == (0, ""), output
    died = run_to_the_end(program, tmp_path / "killed", POINTS, *LORA)
    assert len(died) >= 4, died
    assert_same_run(tmp_path / "killed", whole)

    assert_drawn_by_the_policy(whole, base=True)

    # The reference is the base: before the first step the two agree.
    first = [record for record in read_metrics(whole).values() if record["step"] == 0]
    (loss,) = [record["loss/eval"] for record in first if "loss/eval" in record]
    assert abs(loss - math.log(2)) < 1e-6

    # A checkpoint holds the adapter and its moments alone.
    (checkpoint,) = (whole / "checkpoints").iterdir()
    record = json.loads((checkpoint / "round" / "metadata").read_text())
    names = [name for name in record["arrays"] if name.startswith("params/")]
    assert len(names) == 14 and all("_lora_" in name for name in names)
    assert all("_lora_" in name for name in record["arrays"] if "/layers/" in name)

    # Exported from its checkpoint by a task that computes otherwise, it is the same, to the bit.
    source = (f"model.path={whole}", f"model.checkpoint={int(checkpoint.name)}")
    arguments = ("task=export", *source, "model.compute_dtype=bfloat16")
    code, _, errors = program.run(tmp_path / "export", *arguments)
    assert (code, errors) == (0, "")
    for path in (path for path in (whole / "final").rglob("*") if path.is_file()):
        # These are of the workdir that they were written in; the adapter's card is not.
        if path.relative_to(whole / "final").as_posix() in ("certificate.json", "README.md"):
            continue
        again = tmp_path / "export" / path.relative_to(whole)
        assert again.read_bytes() == path.read_bytes(), path
    # So is its loss, against the base that the run knows of.
    feedback = f"data.eval={whole / 'rounds' / '0000' / 'feedback.jsonl'}"
    arguments = ("task=eval", "eval.on=feedback", feedback, *source)
    code, _, errors = program.run(tmp_path / "eval", *arguments)
    assert (code, errors) == (0, "")
    records = [record for record in read_metrics(whole).values() if "loss/eval" in record]
    result = json.loads((tmp_path / "eval" / "result.json").read_text())
    assert abs(result["metrics"]["loss/eval"] - records[-1]["loss/eval"]) < 1e-6

    # What is exported is base + adapter, tensor by tensor, and it has moved.
    base, merged = (
        load_file(folder / "model.safetensors") for folder in (inputs / "policy", whole / "final")
    )
    adapter = load_file(whole / "final" / "adapter" / "adapter_model.safetensors")
    assert base.keys() == merged.keys()
    moved = 0
    for name, weight in base.items():
        prefix = f"base_model.model.{name.removesuffix('weight')}"
        if f"{prefix}lora_A.weight" in adapter:
            a, b = (adapter.pop(f"{prefix}lora_{end}.weight") for end in "AB")
            expected = weight + 2.0 * (b.astype(np.float64) @ a)
            np.testing.assert_allclose(merged[name], expected, atol=1e-6)
            moved += np.abs(merged[name] - weight).max() > 1e-3
        else:
            np.testing.assert_array_equal(merged[name], weight)
    assert not adapter and moved == 7


def test_a_killed_reward_model_with_an_adapter_ends_the_same(program, tmp_path):
    rows = [
        {"prompt": letters, "chosen": "aaa", "rejected": "ccc"}
        for letters in ("bcd", "cbe", "dgf", "ehg", "fba", "gcb", "hda", "iec")
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = ("task=reward_model", f"data.train={tmp_path / 'pairs.jsonl'}", "data.eval=")
    for name, points in (("whole", []), ("killed", ["before train_step 3"])):
        signals = dict.fromkeys(points, signal.SIGKILL)
        code, output, errors = program.run(
            tmp_path / name, *LORA, *task, "train.epochs=2", signals=signals
        )
        if points and code == -signal.SIGKILL:
            code, output, errors = program.run(tmp_path / name, *LORA, *task, "train.epochs=2")
        assert (code, errors) == (0, ""), output
    files = ("model.safetensors", "adapter/adapter_model.safetensors")
    for file in files:
        found, expected = (tmp_path / name / "final" / file for name in ("killed", "whole"))
        assert found.read_bytes() == expected.read_bytes()
    adapter = load_file(tmp_path / "whole" / "final" / files[1])
    merged = load_file(tmp_path / "whole" / "final" / files[0])
    score = adapter["base_model.model.score.weight"]
    np.testing.assert_array_equal(score, merged["score.weight"])


def test_an_unknown_target_is_one_error_that_lists_the_layers(program, tmp_path):
    code, _, errors = program.run(
        tmp_path / "run", "lora.rank=4", "lora.targets=('query','q_proj')"
    )
    assert code == 1
    assert errors.startswith("ModelError: lora.targets: got 'query'; allowed: 'all-linear' alone")
    code, _, errors = program.run(tmp_path / "run", "lora.rank=4", "lora.path=somewhere")
    assert code == 1 and "lora.rank: got 4, but the adapter of lora.path has a rank" in errors
