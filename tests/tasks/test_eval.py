"""`task=eval` measures what the runs themselves measure."""

import dataclasses
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from halos_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    EvalConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RoundsConfig,
    SamplingConfig,
    TrainConfig,
)
from halos_jax.config.rewards import JudgeConfig, ScorerConfig
from halos_jax.config.schema import flatten, to_plain
from halos_jax.models.hf.families import ModelError
from halos_jax.tasks import eval as eval_task
from halos_jax.tasks.eval import run_evaluation
from halos_jax.tasks.export import run_export
from halos_jax.tasks.online import run_online
from halos_jax.tasks.train import run_training
from halos_jax.tasks.versus.compare import run_comparison
from halos_jax.training.loop import Trainer
from halos_jax.workdir import manifests
from halos_jax.workdir.interrupt import StopSignal


def make_config(toy, workdir, task, **changes) -> Config:
    config = Config(
        task=task,
        workdir=str(workdir),
        seed=3,
        progress=False,
        model=ModelConfig(path=str(toy / "policy"), compute_dtype="float32", remat="none"),
        reward=RewardConfig(
            kind="function",
            function="halos_jax.data.toy:score_by_rule",
            rules=("tests.tasks.test_label:score_letters",),
        ),
        data=DataConfig(train=str(toy / "prompts.jsonl"), eval=str(toy / "eval.jsonl"), max_eval=5),
        rounds=RoundsConfig(total_prompts=2, prompts_per_round=2),
        sampling=SamplingConfig(
            num_samples_per_prompt=2, max_prompt_length=10, max_tokens=4, slots=8, chunk=4
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        train=TrainConfig(batch_size=8, max_length=16, row_multiple=64),
    )
    return dataclasses.replace(config, **changes)


def test_samples_are_scored_as_the_online_run_scores_them(toy, tmp_path):
    run_online(make_config(toy, tmp_path / "online", "online"), StopSignal())
    for round, path in ((0, toy / "policy"), (1, tmp_path / "online")):
        workdir = tmp_path / f"eval{round}"
        config = make_config(toy, workdir, "eval")
        model = dataclasses.replace(config.model, path=str(path))
        metrics = run_evaluation(dataclasses.replace(config, model=model), StopSignal())
        folder = manifests.round_folder(tmp_path / "online", round)
        expected = manifests.load_manifest(folder).metrics
        assert metrics == {name: expected[name] for name in metrics}
        assert {"reward_eval", "reward_eval/score_letters", "response_tokens_eval"} <= set(metrics)
        result = json.loads((workdir / "result.json").read_text())
        assert result == {
            "policy": str(path),
            "model": "model" if round == 0 else "final",
            "data": str(toy / "eval.jsonl"),
            "examples": 5,
            "metrics": metrics,
        }
        lines = [json.loads(line) for line in (workdir / "eval.jsonl").open()]
        theirs = [json.loads(line) for line in (folder / "eval.jsonl").open()]
        assert [line["response_ids"] for line in lines] == [t["response_ids"] for t in theirs]
        assert not list(workdir.glob("*.shard-*"))
        assert run_evaluation(dataclasses.replace(config, model=model), StopSignal()) == metrics
        mark = manifests.load_manifest(workdir).sampled_by
        assert mark == {"eval.jsonl": manifests.load_manifest(folder).sampled_by["eval.jsonl"]}
    check_duel(make_config(toy, tmp_path / "duel", "eval"), tmp_path / "online")


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_duel(config, online):
    """The last policy of a run against what it started from is round 1 against round 0."""
    rounds = [manifests.round_folder(online, round) for round in (0, 1)]
    own = [manifests.load_manifest(folder) for folder in rounds]
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=str(online)),
        eval=EvalConfig(against="sft"),
    )
    metrics, workdir = run_evaluation(config, StopSignal()), Path(config.workdir)
    names = {"eval.jsonl": 1, "against/eval.jsonl": 0}
    for name, round in names.items():
        drawn = [row["response_ids"] for row in read(workdir / name)]
        assert drawn == [row["response_ids"] for row in read(rounds[round] / "eval.jsonl")]
    manifest = manifests.load_manifest(workdir)
    assert (manifest.policy, manifest.reference) == ("final", "sft")
    assert manifest.sampled_by == {
        name: own[round].sampled_by["eval.jsonl"] for name, round in names.items()
    }
    wins = {name: value for name, value in own[1].metrics.items() if name.startswith("win_rate")}
    assert len(wins) >= 6 and wins == {name: metrics[name] for name in wins}
    assert metrics["reward_against"] == own[0].metrics["reward_eval"]
    gain = metrics["reward_eval"] - metrics["reward_against"]
    assert metrics["reward_gain"] == pytest.approx(gain)
    record = json.loads((workdir / "comparison.json").read_text())
    assert (record["pairs"], record["second"]["model"]) == (10, "sft")
    assert not list(workdir.rglob("*.shard-*"))
    files = Config(
        task="compare",
        workdir=str(workdir.with_name("files")),
        progress=False,
        reward=config.reward,
        data=DataConfig(eval=str(rounds[1] / "eval.jsonl")),
        eval=EvalConfig(second_samples=str(rounds[0] / "eval.jsonl")),
    )
    compared = run_comparison(files, StopSignal())
    assert wins == {name: compared[name] for name in wins}


def test_feedback_gives_the_loss_of_the_training_run(toy, tmp_path):
    """The reference of a run's policy is what the run started from, unless another is named."""
    pairs = DataConfig(train=str(toy / "pairs.jsonl"), eval=str(toy / "eval_pairs.jsonl"))
    align = make_config(toy, tmp_path / "align", "align", data=pairs)
    # Of its new tokens, which every softmax sees, the reference has the rows that it had there.
    own = dataclasses.replace(align.model, added_tokens=("<|new|>",), added_tokens_init="random")
    align = dataclasses.replace(align, model=own)
    trained = run_training(align, StopSignal())
    feedback = EvalConfig(on="feedback")
    config = make_config(toy, tmp_path / "eval", "eval", data=pairs, eval=feedback)
    with pytest.raises(ConfigError, match=r"eval\.reference: got '', but loss 'dpo' compares"):
        run_evaluation(config, StopSignal())
    model = dataclasses.replace(config.model, path=str(tmp_path / "align"))
    export = Config(task="export", workdir=str(tmp_path / "export"), model=model)
    run_export(export, StopSignal())
    for name in ("align", "export"):
        model = dataclasses.replace(config.model, path=str(tmp_path / name))
        workdir = str(tmp_path / f"eval-{name}")
        metrics = run_evaluation(
            dataclasses.replace(config, workdir=workdir, model=model), StopSignal()
        )
        assert "rewards_eval/accuracies" in metrics
        assert metrics == pytest.approx({name: trained[name] for name in metrics}, abs=1e-6)
    assert metrics["loss/eval"] != pytest.approx(math.log(2), abs=1e-4)
    itself = EvalConfig(on="feedback", reference=str(tmp_path / "align"))
    config = dataclasses.replace(config, workdir=str(tmp_path / "eval3"), eval=itself, model=model)
    assert run_evaluation(config, StopSignal())["loss/eval"] == pytest.approx(math.log(2))


class Seen(Exception):
    """Ends a task when what it hands on is known."""


def test_an_adapter_is_evaluated_on_its_base(toy, tmp_path, monkeypatch):
    frozen = object()

    def evaluate(trainer, params, dataset):
        assert (trainer.frozen, params) == (frozen, "adapter")
        raise Seen

    monkeypatch.setattr(eval_task, "load_trained", lambda *given: ("adapter", frozen))
    monkeypatch.setattr(eval_task.training, "evaluate", evaluate)
    pairs = DataConfig(eval=str(toy / "eval_pairs.jsonl"))
    changes = {"eval": EvalConfig(on="feedback"), "loss": {"name": "simpo"}}
    with pytest.raises(Seen):
        run_evaluation(
            make_config(toy, tmp_path, "eval", data=pairs, **changes),
            StopSignal(),
        )


def test_the_reference_is_what_the_run_started_from(toy, tmp_path, monkeypatch):
    job = make_config(toy, tmp_path, "eval", eval=EvalConfig(on="feedback"))
    run = dataclasses.replace(job, task="align", seed=11, lora=LoraConfig(rank=4))

    def load_reference(policy, mesh, *, path, run):
        assert (policy.source, mesh, path, run.seed) == ("source", "mesh", "", 11)
        return "start", "base"

    def add_reference(trainer, dataset, params, *, label):
        assert (trainer.frozen, params, dataset) == ("base", "start", "data")
        raise Seen

    monkeypatch.setattr(eval_task, "find_origin", lambda source: run)
    monkeypatch.setattr(eval_task, "load_reference", load_reference)
    monkeypatch.setattr(eval_task.training, "add_reference", add_reference)
    trainer = Trainer(**dict.fromkeys(Trainer.__dataclass_fields__))
    with pytest.raises(Seen):
        eval_task._add_reference(
            SimpleNamespace(config=job, mesh="mesh"),
            SimpleNamespace(source="source"),
            trainer,
            "data",
        )


def test_sequences_beyond_the_models_angles_are_refused(toy, tmp_path, short):
    pairs = DataConfig(eval=str(toy / "eval_pairs.jsonl"))
    changes = {"eval": EvalConfig(on="feedback"), "model": short}
    config = make_config(toy, tmp_path / "eval", "eval", data=pairs, **changes)
    with pytest.raises(ModelError, match=r"train\.max_length: got 16, allowed: 12 at most"):
        run_evaluation(config, StopSignal())


def test_a_loss_of_scores_needs_a_reward_model(toy, tmp_path):
    pairs = DataConfig(eval=str(toy / "eval_pairs.jsonl"))
    changes = {"eval": EvalConfig(on="feedback"), "loss": {"name": "bradley-terry"}}
    config = make_config(toy, tmp_path / "eval", "eval", data=pairs, **changes)
    with pytest.raises(ConfigError, match="a model without a classification head, but loss 'brad"):
        run_evaluation(config, StopSignal())


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"against": "sft", "on": "feedback"}, r"eval\.against: got 'sft', allowed with eval\.on="),
        (
            {"against_checkpoint": 3},
            r"eval\.against_checkpoint: got 3, allowed without",
        ),
        ({"second_samples": "a"}, r"eval\.second_samples: .* are compared by task='compare'"),
    ],
)
def test_what_a_comparison_does_not_use_is_refused(fields, line):
    values = dict(flatten(to_plain(Config(task="eval", eval=EvalConfig(**fields)))))
    (found,) = eval_task.check_eval(values)
    assert re.match(line, found)


def test_rewards_that_compare_samples_are_left_to_the_pairs():
    judge = ScorerConfig(kind="judge", judge=JudgeConfig(mode="compare", model="m"))
    scorers = {"judge": judge, "rule": ScorerConfig(kind="function", function="a:b")}
    kept = {"rules": ("c:d",), "completions": "turns", "max_unlabelled": 0.5}
    reward = RewardConfig(kind="judge", judge=judge.judge, cut_at_sentence=True, **kept)
    config = Config(task="eval", reward=reward, eval=EvalConfig(scorers=scorers))
    found = eval_task._drop_relative(config)
    assert found.reward == RewardConfig(kind="none", **kept)
    assert dict(found.eval.scorers) == {"rule": scorers["rule"]}
    plain = dataclasses.replace(config, reward=RewardConfig(path="m"))
    assert eval_task._drop_relative(plain).reward == plain.reward
