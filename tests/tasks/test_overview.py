"""What a run is, in a few lines."""

import dataclasses
import shutil
from types import SimpleNamespace

import jax
import pytest

from halos_jax.config import (
    Config,
    DataConfig,
    EvalConfig,
    ExportConfig,
    FeedbackConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    RewardConfig,
    RoundsConfig,
    SamplingConfig,
    TrainConfig,
)
from halos_jax.config.rewards import PartConfig, ScorerConfig
from halos_jax.data.toy import run_toy_data
from halos_jax.tasks import overview
from halos_jax.tasks.overview import describe_machine, describe_place, describe_task, list_fields
from halos_jax.workdir import manifests, runs
from halos_jax.workdir.interrupt import StopSignal
from halos_jax.workdir.manifests import Manifest, round_folder

RULE = "halos_jax.data.toy:score_by_rule"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    config = Config(task="toy_data", workdir=str(folder))
    small = dataclasses.replace(config.toy, num_sft=4, num_pairs=2, num_prompts=4, num_eval=2)
    run_toy_data(dataclasses.replace(config, toy=small), StopSignal())
    return folder


def make_config(toy, workdir, **changes) -> Config:
    config = Config(
        workdir=str(workdir),
        model=ModelConfig(path=str(toy / "base"), compute_dtype="float32"),
        reward=RewardConfig(kind="function", function=RULE),
        data=DataConfig(train="prompts.jsonl", eval="eval.jsonl"),
        rounds=RoundsConfig(total_prompts=20, prompts_per_round=10),
        sampling=SamplingConfig(max_tokens=8),
        train=TrainConfig(batch_size=8, max_length=64),
        loss={"name": "dpo", "beta": 0.2},
        mesh=MeshConfig(data=jax.device_count()),
    )
    return dataclasses.replace(config, **changes)


def test_an_online_run_is_told_whole(toy, tmp_path):
    shown = describe_task(make_config(toy, "runs/first")).replace(str(toy), "TOY")
    assert " ".join(shown.split()) == " ".join(
        f"""\
task online: rounds of sampling, scoring, feedback and training
  model     TOY/base (llama, 303,744 parameters in float32, computed in float32)
  template  the tokenizer's own (chat_template.jinja)
  loss      dpo (beta=0.2); reference: sft
  reward    function {RULE}
  data      prompts.jsonl
  held out  eval.jsonl
  training  batches of 8, 1 epoch of at most 64 tokens an example; adamw, rate 2e-06 (constant)
  sampling  4 a prompt, at most 8 tokens, temperature 0.7, top-p 0.95
  rounds    10 prompts each
  guard     warns where the held-out reward falls
  final     the policy of the round with the highest held-out reward (rounds.keep_best=auto)
  mesh      data={jax.device_count()}, fsdp=1, tensor=1
  workdir   runs/first (metrics.jsonl, rounds/, checkpoints/, final/)
  start     new""".split()
    )
    assert max(map(len, shown.splitlines())) <= 100


def test_a_push_is_told_at_the_start(toy, tmp_path):
    pushed = describe_task(make_config(toy, tmp_path, export=ExportConfig(push_to_hub="me/x")))
    assert "pushed at the end to me/x (private)" in pushed


def test_exact_ratios_are_told_with_who_chose_them(toy, tmp_path):
    def tell(**fields):
        config = make_config(
            toy,
            tmp_path,
            loss={"name": "dapo"},
            feedback=FeedbackConfig(type="scalar"),
            sampling=SamplingConfig(**fields),
        )
        return overview._describe_sampling(config).partition("top-p ")[2]

    by_auto = "; exact ratios, by sampling.exact_ratios=auto for loss dapo"
    assert tell() == "0.95" + by_auto
    assert tell(top_k=500) == (
        f"0.95{by_auto}, with max_kept raised to top_k=500 (2.0 KiB a token)"
    )
    assert tell(exact_ratios=True) == "0.95; exact ratios"
    assert tell(exact_ratios=False) == "0.95"
    assert tell(temperature=1.0, top_p=1.0) == "1"
    config = make_config(toy, tmp_path, sampling=SamplingConfig(exact_ratios=False))
    runs.open_run(tmp_path, config).close()  # begun before "auto"
    (tmp_path / "metrics.jsonl").touch()
    assert tell() == "0.95"
    (tmp_path / "config.json").write_text("[]")  # which the line about the start says
    assert tell() == "0.95" + by_auto


def test_each_task_tells_what_it_has(toy, tmp_path):
    lora = LoraConfig(rank=4)  # of alpha 4 x rank
    sft = describe_task(make_config(toy, tmp_path, task="sft", lora=lora, data=DataConfig("x")))
    assert "LoRA of rank 4, alpha 16" in sft and "\n  loss      sft\n" in sft
    assert "none: nothing is evaluated" in sft and "reward" not in sft and "sampling" not in sft
    model = ModelConfig(path="nobody/nothing-of-the-hub")
    sample = describe_task(make_config(toy, tmp_path, task="sample", model=model))
    assert "nobody/nothing-of-the-hub (not on this machine yet)" in sample
    assert "training" not in sample and "loss" not in sample
    bench = describe_task(make_config(toy, tmp_path, task="bench"))
    assert bench.splitlines()[1:] == [f"  workdir  {tmp_path}"]


def test_a_reward_of_parts_and_a_second_scorer_are_named(toy, tmp_path):
    parts = {
        "good": PartConfig(weight=0.5, kind="function", function=RULE),
        "long": PartConfig(weight=-1.0, path="length-model"),
    }
    scorers = {"judge": ScorerConfig(path="second")}
    config = make_config(
        toy,
        tmp_path,
        reward=RewardConfig(parts=parts, rules=(RULE,)),
        eval=EvalConfig(scorers=scorers),
    )
    line = overview._describe_reward(config)
    assert line == (
        f"0.5 x good (function {RULE}) + -1 x long (model length-model); rules for the log: {RULE}"
        "; second scorers of held-out samples: judge (model second)"
    )


def test_where_a_resume_goes_on(toy, tmp_path):
    config = make_config(toy, tmp_path / "run")
    assert describe_place(config) == "new"
    runs.join_run(config).close()
    for round, stages, place in (
        (0, 1, "round 0 is done; goes on after it"),
        (1, 0, "goes on in round 1, stage sample"),
        (1, 3, "goes on in round 1, stage train"),
        (1, 5, "rounds 0 to 1 are done; goes on after it"),
    ):
        folder = round_folder(tmp_path / "run", round)
        folder.mkdir(parents=True, exist_ok=True)
        done = manifests.stages_of(round)[:stages]
        manifests.save_manifest(folder, Manifest(round=round, stages=done))
        assert describe_place(config) == place
    (tmp_path / "run" / "final").mkdir()
    assert (
        describe_place(config) == "rounds 0 to 1 are done; complete, unless it was given more to do"
    )
    rounds = config.rounds
    total = rounds.total_prompts
    more = dataclasses.replace(rounds, total_prompts=total + rounds.prompts_per_round)
    assert describe_place(dataclasses.replace(config, rounds=more)) == (
        "rounds 0 to 1 are done; goes on, with more to do: rounds.total_prompts: "
        f"{total} -> {more.total_prompts}"
    )
    refused = describe_place(dataclasses.replace(config, seed=1))
    assert refused.startswith("refused: ") and "seed: 0 -> 1" in refused


def test_where_a_task_without_rounds_goes_on(toy, tmp_path):
    config = make_config(toy, tmp_path, task="sft")
    (tmp_path / "checkpoints" / "00000002").mkdir(parents=True)
    assert describe_place(config) == "goes on from its newest checkpoint"
    (tmp_path / "final").mkdir()
    assert describe_place(config) == "complete, unless it was given more to do"
    manifests.save_manifest(tmp_path, Manifest(round=0, task="sample", stages=("sample",)))
    assert describe_place(config) == "done: sample; goes on with score"


def test_a_workdir_that_cannot_be_read_is_said(tmp_path):
    (tmp_path / "mine").write_text("mine")
    place = describe_place(Config(workdir=str(tmp_path / "mine")))
    assert place.startswith("refused: it cannot be read (") and "Not a directory" in place


def test_the_machine_is_told_with_its_memory(monkeypatch):
    device = SimpleNamespace(
        device_kind="NVIDIA H200", memory_stats=lambda: {"bytes_limit": 3 * 2**30}
    )
    monkeypatch.setattr(jax, "devices", lambda: [device] * 8)
    monkeypatch.setattr(jax, "local_devices", lambda: [device] * 4)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    facts = dict(describe_machine())
    assert facts["devices"] == "8 x NVIDIA H200, 3.0 GiB each, of 2 processes"
    assert f"jax {jax.__version__}" in facts["versions"]


def test_mode_show_prints_everything_and_starts_nothing(toy, tmp_path, capsys, monkeypatch):
    config = make_config(toy, tmp_path / "run", mode="show")
    overview.run_show(config)
    shown = capsys.readouterr().out
    assert "\ntask online: " in shown and "\n  start     new\n" in shown
    assert "budget: 2 rounds of 10 prompts, 20 in all" in shown
    assert "\n* train.batch_size = 8\n" in shown and "\n  train.epochs = 1\n" in shown
    assert not (tmp_path / "run").exists() and "learning_rate=2e-06 is low" not in shown
    overview.run_show(make_config(toy, tmp_path / "sft", task="sft"))
    shown = capsys.readouterr().out
    assert "\nwarning: optimizer.learning_rate=2e-06 is low for loss 'sft' on all weights" in shown
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    overview.run_show(config)
    assert capsys.readouterr().out == ""  # process 0 speaks


def test_fields_that_are_not_at_their_default_are_marked():
    lines = list_fields(Config(seed=3))
    assert "* seed = 3" in lines and "  task = 'online'" in lines


def test_a_loss_is_shown_with_its_teacher_or_its_reference():
    config = Config(loss={"name": "gkd", "beta": 1}, model=ModelConfig(teacher="big"))
    assert overview._describe_loss(config, config.loss) == "gkd (beta=1); teacher: big"
    config = dataclasses.replace(config, loss={"name": "dpo"}, model=ModelConfig())
    assert overview._describe_loss(config, config.loss) == "dpo; reference: sft"


def test_a_tokenizer_that_cannot_be_read_is_left_to_what_loads_it(toy, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(toy / "base", model)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    (model / "tokenizer_config.json").write_text('{"chat_template": "a", "chat_template": "b"}')
    broken = ModelConfig(path=str(model), compute_dtype="float32")
    shown = describe_task(make_config(toy, "runs/first", model=broken))
    assert "template  none in the model's folder: the default one" in shown
