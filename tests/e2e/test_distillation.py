"""Whole runs that learn from a teacher: online without any reward, on files, as a measurement."""

import dataclasses
import json
import shutil
import signal

import jax
import pytest

from halos_jax.models import spec
from halos_jax.models.files import export, hf
from halos_jax.workdir import manifests

ONLINE = ("loss.name=gkd", "loss.beta=1", "feedback.type=samples", "reward.kind=none")


@pytest.fixture(scope="module")
def teacher(inputs, tmp_path_factory):
    """Return a deeper model of the same tokenizer, whose vocabulary is padded further."""
    folder = tmp_path_factory.mktemp("teacher")
    config = hf.load_decoder_config(str(inputs / "base"))
    wide = dataclasses.replace(config, num_layers=2, vocab_size=config.vocab_size + 6)
    base = shutil.copytree(inputs / "base", folder / "base")
    plain = json.loads((base / "config.json").read_text())
    plain |= {"num_hidden_layers": 2, "vocab_size": wide.vocab_size}
    (base / "config.json").write_text(json.dumps(plain))
    params = spec.init_params(jax.random.key(6), dataclasses.replace(wide, init_std=0.2))
    export.save_model(params, wide, folder / "model", source=base)
    return folder / "model"


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_metric(workdir, name: str) -> list[float]:
    return [line[name] for line in read_lines(workdir / "metrics.jsonl") if name in line]


def test_online_without_a_reward_killed_and_resumed(program, teacher, tmp_path):
    copy = shutil.copytree(teacher, tmp_path / "teacher")
    options = (*ONLINE, f"model.teacher={copy}", "lora.rank=2", "lora.dropout=0")
    workdir, killed = tmp_path / "run", tmp_path / "killed"
    code, output, errors = program.run(workdir, *options)
    assert (code, errors) == (0, ""), output
    for round in (1, 2):
        folder = workdir / "rounds" / f"{round:04d}"
        feedback, samples = (read_lines(folder / f"{x}.jsonl") for x in ("feedback", "samples"))
        assert feedback == samples and len(samples) == 18
        assert {line["reward"] for line in read_lines(folder / "scores.jsonl")} == {None}
        manifest = manifests.load_manifest(folder)
        metrics = manifest.metrics
        read = manifest.chain["inputs"]  # each round says which teacher it was
        assert read["model.teacher"] and read["model.teacher"] != read["model.path"]
        assert metrics["feedback_examples"] == 18
        assert not [name for name in metrics if name.startswith("reward")]
    assert len(read_metric(workdir, "loss/train")) == 2 * 9
    assert min(read_metric(workdir, "loss/train")) > 0
    held_out = read_metric(workdir, "loss/eval")
    assert held_out[-1] < held_out[0]
    assert read_metric(workdir, "rewards_train/log_ratio")
    assert not read_metric(workdir, "reward_eval")

    signals = {"2 train: before train_step 13": signal.SIGKILL}
    assert program.run(killed, *options, signals=signals)[0] == -signal.SIGKILL
    weights = copy / "model.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    code, output, errors = program.run(killed, *options)
    assert code != 0 and f"model.teacher: {weights} holds something else than it did" in errors
    weights.write_bytes(original)
    code, _, errors = program.run(killed, *options)
    assert (code, errors) == (0, "")
    for file in ("final/model.safetensors", "rounds/0002/feedback.jsonl", "rounds/0002/eval.jsonl"):
        assert (killed / file).read_bytes() == (workdir / file).read_bytes(), file


def test_a_file_of_every_kind_of_answer_and_an_evaluation(program, teacher, tmp_path):
    rows = [
        {"prompt": "bca", "completion": "abc"},
        {"prompt": "cab", "chosen": "abc", "rejected": "cab"},
        {"messages": [{"role": "user", "content": "ba"}, {"role": "assistant", "content": "ab"}]},
    ]
    rows += [
        {"type": "sample", "prompt_id": "5", "sample_id": number, "prompt": "da", "output": "ad"}
        | ({"reward": 0.5} if number else {})
        for number in range(3)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shared = ("loss.name=gkd", "loss.beta=0", f"model.teacher={teacher}")
    options = (
        *shared,
        f"data.train={tmp_path / 'train.jsonl'}",
        f"data.eval={tmp_path / 'train.jsonl'}",
    )
    code, output, errors = program.run(
        tmp_path / "run", "task=align", "train.epochs=4", "train.batch_size=3", *options
    )
    assert (code, errors) == (0, ""), output
    # One of a conversation, two of the pair, three equal samples, four times each.
    assert read_metric(tmp_path / "run", "counters/stage_examples")[-1] == 4 * 7
    losses = read_metric(tmp_path / "run", "loss/eval")
    assert losses[-1] < 0.9 * losses[0]

    for model, expected in ((tmp_path / "run", losses[-1]), (program.inputs / "policy", losses[0])):
        folder = tmp_path / f"eval_{model.name}"
        code, output, errors = program.run(
            folder, "task=eval", "eval.on=feedback", f"model.path={model}", *options
        )
        assert (code, errors) == (0, ""), output
        metrics = json.loads((folder / "result.json").read_text())["metrics"]
        assert metrics["loss/eval"] == pytest.approx(expected, rel=1e-4)


def test_what_makes_no_sense_is_one_error_before_anything_runs(program, teacher, tmp_path):
    wrong = {
        ("loss.name=gkd", "feedback.type=samples"): "model.teacher: got '', but loss 'gkd'",
        (f"model.teacher={teacher}",): "but loss 'dpo' has no teacher; allowed: ''",
        ("loss.name=gkd", f"model.teacher={teacher}"): "feedback.type: got 'pairwise', but loss",
        (*ONLINE, f"model.teacher={teacher}", "rounds.reference=round_start"): "has no reference",
        (*ONLINE, f"model.teacher={program.inputs / 'reward'}"): "scores texts and writes none",
        (*ONLINE, f"model.teacher={teacher}", "rounds.keep_best=true"): "reward.kind='none' scores",
    }
    for options, said in wrong.items():
        code, _, errors = program.run(tmp_path / "run", *options, "mode=check")
        assert code == 1 and said in errors, errors
