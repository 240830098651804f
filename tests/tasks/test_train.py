"""SFT, reward model and offline alignment learn, and carry on bit for bit."""

import dataclasses
import json
import random
from pathlib import Path
from shutil import rmtree

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from halos_jax.config import (
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    SamplingConfig,
    TrainConfig,
)
from halos_jax.data.chat.loading import load_renderer
from halos_jax.data.selection import select_eval, select_train
from halos_jax.devices import DeviceError
from halos_jax.metrics import is_time, read_metrics
from halos_jax.models.files import hf
from halos_jax.models.hf.families import ModelError
from halos_jax.tasks import train as single
from halos_jax.tasks.train import choose_loss, run_training
from halos_jax.workdir import workspace
from halos_jax.workdir.interrupt import Interrupted, StopSignal


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Write pairs that one look tells apart: good answers are of early letters, bad ones late."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    for name, count in (("pairs", 48), ("eval", 24)):
        with open(folder / f"{name}.jsonl", "w") as file:
            for _ in range(count):
                record = {"prompt": "".join(rng.sample("abcdefgh", 4))}
                for field, letters in (("chosen", "abcd"), ("rejected", "efgh")):
                    record[field] = "".join(rng.choices(letters, k=rng.randint(2, 5)))
                file.write(json.dumps(record) + "\n")
    return folder


def make_config(toy, workdir, task, source, held_out, **changes) -> Config:
    config = Config(
        task=task,
        workdir=str(workdir),
        progress=False,
        model=ModelConfig(path=str(toy / "policy"), compute_dtype="float32", remat="none"),
        data=DataConfig(train=str(source), eval=str(held_out)),
        sampling=SamplingConfig(max_prompt_length=12),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0),
        train=TrainConfig(batch_size=16, max_length=24, eval_every=0, row_multiple=64, epochs=2),
    )
    return dataclasses.replace(config, **changes)


def run(config) -> dict[str, float]:
    return run_training(config, StopSignal())


def eval_values(workdir, name) -> list[float]:
    return [line[name] for line in read_metrics(workdir / "metrics.jsonl") if name in line]


class StopAfter(StopSignal):
    """A signal that comes during a certain step."""

    def __init__(self, step):
        super().__init__()
        self._step = step

    def received(self, step):
        return step >= self._step


@pytest.mark.parametrize("task", ["sft", "align"])
def test_sequences_beyond_the_models_angles_are_refused(toy, tmp_path, data, short, task):
    pairs = (data / "pairs.jsonl", data / "eval.jsonl")
    config = make_config(toy, tmp_path / "run", task, *pairs, model=short)
    with pytest.raises(ModelError, match=r"train\.max_length: got 24, allowed: 12 at most"):
        run(config)


def test_sft_lowers_the_loss_and_a_resume_is_exact(toy, tmp_path, caplog):
    train = TrainConfig(
        batch_size=16, max_length=24, eval_every=3, row_multiple=64, epochs=2, log_every=100
    )
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    changes = {"train": train, "checkpoint": CheckpointConfig(every=2), "mesh": mesh}
    files = (toy / "sft.jsonl", toy / "eval.jsonl")
    whole = make_config(toy, tmp_path / "whole", "sft", *files, **changes)
    metrics = run(whole)
    losses = eval_values(tmp_path / "whole", "loss/eval")
    assert len(losses) == 4 and losses[-1] == metrics["loss/eval"] < 0.7 * losses[0]

    halves = make_config(toy, tmp_path / "halves", "sft", *files, **changes)
    for step in (3, 6):
        with pytest.raises(Interrupted):
            run_training(halves, StopAfter(step))
        (saved,) = (tmp_path / "halves" / "checkpoints").iterdir()
        assert not (tmp_path / "halves" / "final").exists() and saved.name.isdigit()
    run(halves)
    found, expected = (
        (tmp_path / name / "final" / "model.safetensors").read_bytes()
        for name in ("halves", "whole")
    )
    assert found == expected
    records = [
        [
            {k: v for k, v in record.items() if not is_time(k)}
            for record in read_metrics(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("halves", "whole")
    ]
    assert records[0] == records[1]
    # Run once more, it has nothing to do and says what it said.
    assert run(whole)["loss/eval"] == metrics["loss/eval"]
    # A damaged or deleted export is made again from the last checkpoint, to the same bytes.
    weights = tmp_path / "whole" / "final" / "model.safetensors"
    for damage in (lambda: weights.write_bytes(expected[:-9]), lambda: rmtree(weights.parent)):
        damage()
        steps = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
        run(whole)
        assert weights.read_bytes() == expected
        assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == steps
    assert "final/model.safetensors is damaged" in caplog.text
    assert "final/ is missing" in caplog.text
    kept = tmp_path / "whole" / "final.damaged-1" / "model.safetensors"
    assert kept.read_bytes() == expected[:-9]


def test_what_a_training_task_hands_on(toy, tmp_path, monkeypatch):
    seen, load, restore = {}, single.load_items, single._restore

    def load_items(kind, path, renderer, lengths, selection, **options):
        seen[Path(path).name] = selection, options["check_tokens"]
        return load(kind, path, renderer, lengths, selection, **options)

    class Writer:
        def __init__(self, path, **options):
            seen["writer"] = options["resume_step"]

        def close(self):
            """Nothing was opened."""

    def run_steps(trainer, state, dataset, *, held_out, start, **others):
        seen["steps"] = start, len(dataset.plan), len(held_out.items)
        return state

    monkeypatch.setattr(single, "load_items", load_items)
    monkeypatch.setattr(workspace, "MetricWriter", Writer)
    monkeypatch.setattr(single, "_restore", lambda *given: (restore(*given)[0], 2))
    monkeypatch.setattr(single.training, "run_steps", run_steps)
    monkeypatch.setattr(single.final, "export_final", lambda *given, **options: tmp_path)
    data = DataConfig(
        train=str(toy / "sft.jsonl"),
        eval=str(toy / "eval.jsonl"),
        max_train=40,
        max_eval=10,
        n_examples=72,
    )
    run(make_config(toy, tmp_path / "run", "sft", "", "", data=data, seed=6))
    expected = {"sft.jsonl": select_train(data, 6), "eval.jsonl": select_eval(data)}
    assert {name: seen[name] for name in expected} == {
        name: (selection, True) for name, selection in expected.items()
    }
    # Of two epochs of 40 examples 72, in steps of about 16, go on after the second.
    assert seen["steps"] == (2, 5, 10) and seen["writer"] == 2


@pytest.mark.parametrize("task", ["sft", "align"])
def test_what_is_held_out_of_fixed_data_is_evaluated_and_not_trained_on(
    toy, tmp_path, monkeypatch, caplog, task
):
    """At a rate that is too low for SFT, and a held-out loss that stands still: both are said."""
    seen = {}
    slow = OptimizerConfig(learning_rate=2e-6)

    def run_steps(trainer, state, dataset, *, held_out, **others):
        for name, one in (("train", dataset), ("held", held_out)):
            seen[name] = {tuple(item.prompt_ids) for item in one.items}
        rows = [{"step": step, "loss/eval": loss} for step, loss in ((0, 1.5), (4, 1.499))]
        metrics = Path(trainer.config.workdir) / "metrics.jsonl"
        metrics.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return state

    monkeypatch.setattr(single.training, "run_steps", run_steps)
    monkeypatch.setattr(single.final, "export_final", lambda *given, **options: tmp_path)
    source = toy / ("sft.jsonl" if task == "sft" else "pairs.jsonl")
    sides = []
    for seed in (0, 1):
        data = DataConfig(train=str(source), holdout=3)
        changes = {"data": data, "seed": seed, "optimizer": slow}
        run(make_config(toy, tmp_path / str(seed), task, "", "", **changes))
        assert len(seen["held"]) == 3 and seen["train"] and not seen["held"] & seen["train"]
        sides.append(seen["held"])
    assert sides[0] == sides[1]
    assert ("learning_rate=2e-06 is low for loss 'sft'" in caplog.text) == (task == "sft")
    assert "the held-out loss hardly changed: 1.5000 at the start, 1.4990 after 4" in caplog.text


def test_a_reward_model_learns_to_tell_answers_apart(toy, data, tmp_path):
    files = (data / "pairs.jsonl", data / "eval.jsonl")
    metrics = run(make_config(toy, tmp_path, "reward_model", *files))
    assert metrics["rewards_eval/accuracies"] > 0.9
    exported = json.loads((tmp_path / "final" / "config.json").read_text())
    assert exported["architectures"] == ["LlamaForSequenceClassification"]
    assert hf.load_decoder_config(str(tmp_path / "final")).num_labels == 1
    # The trunk was the language model's, the head is new; both have moved.
    before, after = (
        load_file(folder / "model.safetensors") for folder in (toy / "policy", tmp_path / "final")
    )
    assert after["score.weight"].shape == (1, 32)
    assert not np.array_equal(
        before["model.embed_tokens.weight"], after["model.embed_tokens.weight"]
    )


@pytest.mark.parametrize(
    ("task", "read_at", "closed"),
    [
        ("reward_model", "auto", True),
        ("reward_model", "end_of_turn", False),
        ("align", "auto", False),
    ],
)
def test_answers_that_are_scored_end_where_they_are_read(
    toy, data, tmp_path, task, read_at, closed
):
    """A template that ends a conversation with a space behind the marker."""
    template = load_renderer(str(toy / "policy")).template
    (tmp_path / "own.jinja").write_text(template.replace("{% endfor %}", "{{ ' ' }}{% endfor %}"))
    renderer = load_renderer(str(toy / "policy"), str(tmp_path / "own.jinja"))
    config = make_config(toy, tmp_path / "run", task, data / "pairs.jsonl", "")
    config = dataclasses.replace(config, reward=RewardConfig(read_at=read_at))
    items = single.load_fixed_items(
        config, choose_loss(config), renderer, config.data.train, select_train(config.data, 0)
    )
    end = renderer.end_ids if closed else renderer.end_ids[:1]
    assert len(renderer.end_ids) == 2 and len(items) == 48
    assert {tuple(one[-len(end) :]) for item in items for one in item.responses} == {end}


def test_a_task_with_a_loss_of_its_own_takes_the_hyperparameters_of_that_loss(toy, tmp_path):
    loss = {"name": "bradley-terry", "margin": 2.0}
    config = make_config(toy, tmp_path, "reward_model", "", "", loss=loss)
    assert choose_loss(config).function.keywords == {"margin": 2.0}
    # Those of another loss, which a later stage of a pipeline may train with, mean nothing to it.
    for task, name in (("reward_model", "bradley-terry"), ("sft", "sft")):
        other = dataclasses.replace(config, task=task, loss={"name": "dpo", "beta": 0.5})
        assert choose_loss(other).name == name and not choose_loss(other).function.keywords
    assert choose_loss(dataclasses.replace(config, task="align")).name == "bradley-terry"


def test_align_raises_the_margin_of_pairs_never_trained_on(toy, data, tmp_path):
    files = (data / "pairs.jsonl", data / "eval.jsonl")
    config = make_config(toy, tmp_path, "align", *files, loss={"name": "dpo", "beta": 0.1})
    run(config)
    accuracies = eval_values(tmp_path, "rewards_eval/accuracies")
    losses = eval_values(tmp_path, "loss/eval")
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6) and accuracies[0] == 0
    assert accuracies[-1] > 0.9 and losses[-1] < 0.5


def test_align_without_held_out_data_carries_on_with_the_same_reference(toy, data, tmp_path):
    """After a resume the reference is the model at the start, not the half-trained one."""
    whole, halves = (
        make_config(toy, tmp_path / name, "align", data / "pairs.jsonl", "")
        for name in ("whole", "halves")
    )
    metrics = run(whole)
    assert "loss/eval" not in metrics and metrics["loss/train"] < np.log(2)
    with pytest.raises(Interrupted):
        run_training(halves, StopAfter(2))
    run(halves)
    found, expected = (
        (Path(config.workdir) / "final" / "model.safetensors").read_bytes()
        for config in (halves, whole)
    )
    assert found == expected


def test_a_run_goes_on_with_what_it_was_started_with_alone(toy, data, tmp_path):
    """Half trained, it refuses pairs in another order, and goes on when they are back."""
    pairs = tmp_path / "pairs.jsonl"
    before = (data / "pairs.jsonl").read_text()
    pairs.write_text(before)
    config = make_config(toy, tmp_path / "run", "align", pairs, "")
    with pytest.raises(Interrupted):
        run_training(config, StopAfter(1))
    lines = before.splitlines(keepends=True)
    for edited in (lines[::-1], lines[:24], lines * 2, lines[1:] + lines[:1]):
        pairs.write_text("".join(edited))
        with pytest.raises(ConfigError, match=r"data\.train: .*pairs.jsonl h"):
            run(config)
    pairs.write_text(before)
    run(config)


def test_another_template_is_trained_on_and_exported(toy, tmp_path):
    template = load_renderer(str(toy / "policy")).template.replace("{% else %}", "{% else %}sort ")
    (tmp_path / "own.jinja").write_text(template)
    config = make_config(toy, tmp_path / "run", "sft", toy / "sft.jsonl", "")
    settings = dataclasses.replace(config.model, chat_template=str(tmp_path / "own.jinja"))
    sampling = SamplingConfig(max_prompt_length=16)
    run(dataclasses.replace(config, model=settings, sampling=sampling))
    assert load_renderer(str(tmp_path / "run" / "final")).template == template


def test_sft_on_conversations_ends_after_its_examples(toy, tmp_path):
    talk = [("user", "abcd"), ("assistant", "ab"), ("user", "dcba"), ("assistant", "cd")]
    messages = [{"role": role, "content": content} for role, content in talk]
    source = tmp_path / "talks.jsonl"
    source.write_text((json.dumps({"messages": messages}) + "\n") * 12)
    data = DataConfig(train=str(source), n_examples=20)
    train = TrainConfig(batch_size=8, max_length=64, eval_every=0, row_multiple=64, epochs=3)
    config = make_config(toy, tmp_path / "run", "sft", source, "", data=data, train=train)
    run(config)
    steps = [
        line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss/train" in line
    ]
    assert [line["counters/stage_examples"] for line in steps] == [6, 12, 20]
    assert steps[-1]["loss/train"] < steps[0]["loss/train"]


def test_an_adapter_on_a_four_bit_base_learns_and_a_resume_is_exact(toy, tmp_path):
    pytest.importorskip("qwix")
    changes = {"lora": LoraConfig(rank=4, base="nf4", dropout=0.1)}
    whole, halves = (
        make_config(toy, tmp_path / name, "sft", toy / "sft.jsonl", toy / "eval.jsonl", **changes)
        for name in ("whole", "halves")
    )
    run(whole)
    losses = eval_values(tmp_path / "whole", "loss/eval")
    assert losses[-1] < 0.9 * losses[0]
    with pytest.raises(Interrupted):
        run_training(halves, StopAfter(3))
    run(halves)
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        found, expected = (tmp_path / name / "final" / file for name in ("halves", "whole"))
        assert found.read_bytes() == expected.read_bytes()


def test_memory_that_ends_in_training_names_the_task(toy, data, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(single.training, "run_steps", fail)
    config = make_config(toy, tmp_path, "sft", data / "pairs.jsonl", "")
    with pytest.raises(DeviceError, match=r"in task sft .*; lower train\.tokens_per_device"):
        run(config)


@pytest.mark.parametrize(("dtype", "rank"), [("bfloat16", 0), ("bfloat16", 2), ("float32", 0)])
def test_weights_that_bfloat16_will_not_move_are_said(
    toy, data, tmp_path, monkeypatch, caplog, dtype, rank
):
    def stop(*_, **__):
        raise Interrupted

    monkeypatch.setattr(single.training, "make_trainer", stop)
    config = make_config(toy, tmp_path, "sft", data / "pairs.jsonl", "")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, params_dtype=dtype),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=5e-7),
        lora=LoraConfig(rank=rank),
    )
    with pytest.raises(Interrupted):
        run(config)
    assert ("bfloat16 rounds away" in caplog.text) == (dtype == "bfloat16" and not rank)
