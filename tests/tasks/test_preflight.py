"""What can be known before a run begins is said then, all of it together; nothing is written."""

import dataclasses
import json
import logging

import pytest

from halos_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    EvalConfig,
    ExportConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PipelineConfig,
    RewardConfig,
    RoundsConfig,
    SamplingConfig,
    to_dict,
)
from halos_jax.config.rewards import ScorerConfig
from halos_jax.data.chat.loading import load_tokenizer
from halos_jax.data.datasets import load_prompts, order_prompts
from halos_jax.tasks.preflight import check_start, is_made, run_check

RULE = "halos_jax.data.toy:score_by_rule"
ANSWER = "halos_jax.rewards.functions:exact_answer"


def make_config(toy, workdir, task="online", **changes) -> Config:
    source = str(toy / ("sft.jsonl" if task == "sft" else "pairs.jsonl"))
    if task in ("online", "sample", "eval"):
        source = str(toy / "prompts.jsonl")
    config = Config(
        task=task,
        workdir=str(workdir),
        model=ModelConfig(path=str(toy / "policy")),
        reward=RewardConfig(kind="function", function=RULE),
        data=DataConfig(train=source, eval=source if task == "eval" else ""),
        sampling=SamplingConfig(max_prompt_length=32, max_tokens=8),
    )
    return dataclasses.replace(config, **changes)


def fail(config, *, with_data=True) -> str:
    with pytest.raises(ConfigError) as caught:
        check_start(config, with_data=with_data)
    return str(caught.value)


@pytest.mark.parametrize(
    "task", ["online", "sft", "reward_model", "align", "sample", "eval", "export", "toy_data"]
)
def test_what_is_right_passes_and_leaves_nothing(toy, tmp_path, caplog, task):
    check_start(make_config(toy, tmp_path / "a" / "run", task), with_data=True)
    assert list(tmp_path.iterdir()) == []
    is_low = "optimizer.learning_rate=2e-06 is low for loss" in caplog.text  # it is the default
    assert is_low == (task in ("sft", "reward_model"))


def test_a_check_says_that_a_push_would_fail(toy, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    export = ExportConfig(push_to_hub="me/model")
    run_check(make_config(toy, tmp_path / "run", "export", export=export))
    assert "no token of the Hugging Face Hub" in caplog.text


def test_a_check_of_an_online_run_tells_its_budget(toy, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    rounds = RoundsConfig(total_prompts=3, prompts_per_round=2, num_skip=1)
    slow = OptimizerConfig(learning_rate=5e-8)
    check_start(make_config(toy, tmp_path / "run", rounds=rounds, optimizer=slow), with_data=True)
    assert "budget: 2 rounds of 1 to 2 prompts, 3 in all" in caplog.text
    assert "optimizer.learning_rate=5e-08 is low for loss 'dpo'" in caplog.text
    auto = RoundsConfig(
        total_prompts=3,
        prompts_per_round="auto",
        min_prompts_per_round=1,
        max_prompts_per_round=2,
    )
    check_start(make_config(toy, tmp_path / "run", rounds=auto), with_data=True)
    assert "3 in all (expected; rounds.prompts_per_round=auto chooses 1 to 2)" in caplog.text


def test_feedback_and_samples_are_read_as_their_tasks_read_them(toy, tmp_path):
    on = EvalConfig(on="feedback")
    data = DataConfig(eval=str(toy / "pairs.jsonl"))
    check_start(make_config(toy, tmp_path / "x", "eval", eval=on, data=data), with_data=True)
    (tmp_path / "samples.jsonl").write_text("{}\n")
    data = DataConfig(train=str(tmp_path / "samples.jsonl"))
    # Samples of any model are checked too, where `model.path` is left empty.
    for model in (ModelConfig(path=str(toy / "policy")), ModelConfig()):
        config = make_config(toy, tmp_path / "x", "label", data=data, model=model)
        assert "samples.jsonl line 1" in fail(config)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"reward": RewardConfig(kind="function", function="absent_module:f")},
         "reward.function: got 'absent_module:f', which cannot be imported"),
        ({"reward": RewardConfig(kind="function", function=RULE, rules=("absent_module:f",))},
         "reward.rules: got 'absent_module:f'"),
        ({"reward": RewardConfig(kind="function", function=ANSWER)}, "field 'answer': got nothing"),
        ({"eval": EvalConfig(scorers={"a": ScorerConfig(kind="function", function="absent:f")})},
         "eval.scorers.a.function: got 'absent:f', which cannot be imported"),
        ({"eval": EvalConfig(scorers={"a": ScorerConfig(path="/no/such/model")})},
         "model '/no/such/model' not found"),
        ({"eval": EvalConfig(scorers={"a": ScorerConfig(path="policy")})},
         "eval.scorers.a.path: got "),
        ({"lora": LoraConfig(rank=2, targets=("q_prj",))}, "q_proj"),
        ({"model": ModelConfig(path="/no/such/model")}, "/no/such/model"),
        ({"sampling": SamplingConfig(max_prompt_length=1)}, "raise sampling.max_prompt_length"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_an_online_run(toy, tmp_path, monkeypatch, changes, expected):
    monkeypatch.chdir(toy)
    message = fail(make_config(toy, tmp_path / "run", **changes))
    assert (
        message.startswith("1 error found before anything was run:\n  - ") and expected in message
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("task", ["online", "sample"])
def test_prompts_that_the_run_does_not_sample_are_not_refused(toy, tmp_path, task):
    """The template refuses two prompts, of which one is behind those that are sampled."""
    lines = (toy / "prompts.jsonl").read_text().splitlines()[:6]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    data = DataConfig(train=str(tmp_path / "prompts.jsonl"))
    config = make_config(toy, tmp_path / "run", task, data=data)
    ordered = order_prompts(load_prompts(data.train), config.seed)
    bad = [ordered[number].turns[-1].content for number in (1, 5)]

    def refuse(texts):
        own = load_tokenizer(str(toy / "policy")).chat_template
        path = tmp_path / f"{len(texts)}.jinja"
        check = f"{{%- for m in messages if m.content in {texts!r} -%}}"
        path.write_text(check + "{{ raise_exception('no') }}{%- endfor -%}" + own)
        return ModelConfig(path=str(toy / "policy"), chat_template=str(path))

    config = dataclasses.replace(
        config,
        model=refuse(bad),
        rounds=RoundsConfig(total_prompts=3, prompts_per_round=3),
        sampling=dataclasses.replace(config.sampling, num_prompts=3),
    )
    assert "prompts.jsonl line" in fail(config)
    skipping = dataclasses.replace(config, data=dataclasses.replace(data, skip_bad=True))
    check_start(skipping, with_data=True)
    behind = dataclasses.replace(config, rounds=RoundsConfig(2, prompts_per_round=2, num_skip=2))
    assert "prompts.jsonl line" in fail(behind)  # the first are looked at too, as a run does
    check_start(dataclasses.replace(config, model=refuse(bad[1:])), with_data=True)


def test_a_language_model_for_a_reward_and_a_dead_judge(toy, tmp_path):
    reward = RewardConfig(path=str(toy / "policy"))
    assert "a model without a classification head" in fail(
        make_config(toy, tmp_path / "run", reward=reward)
    )
    judge = dataclasses.replace(
        reward.judge, url="http://127.0.0.1:9/v1", key_variable="", model="m"
    )
    reward = RewardConfig(kind="judge", judge=judge)
    message = fail(make_config(toy, tmp_path / "run", reward=reward))
    assert "reward.judge.url: nothing listens at 127.0.0.1:9" in message


def test_a_place_that_cannot_be_written_and_a_run_of_another_config(toy, tmp_path):
    (tmp_path / "file").write_text("mine")
    message = fail(make_config(toy, tmp_path / "file" / "run"))
    assert f"{tmp_path / 'file'} is a file" in message
    workdir = tmp_path / "run"
    workdir.mkdir()
    config = make_config(toy, workdir)
    plain = to_dict(dataclasses.replace(config, seed=7))
    (workdir / "config.json").write_text(json.dumps(plain))
    check_start(config, with_data=False)  # it died before it had left anything
    (workdir / "metrics.jsonl").write_text("")
    assert "seed: 7 -> 0" in fail(config)


def test_the_last_stage_of_a_pipeline_is_checked_before_the_first(toy, tmp_path):
    workdir = tmp_path / "run"
    stages = PipelineConfig(
        tasks=("sft", "online"),
        overrides={
            "sft": {"data": {"train": str(toy / "sft.jsonl")}},
            "online": {
                "model": {"path": "{workdir}/sft/final"},
                "reward": {"function": "absent_module:f"},
            },
        },
    )
    config = make_config(toy, workdir, task="pipeline", pipeline=stages)
    message = fail(config, with_data=False)
    assert "1 error found" in message
    assert "pipeline.overrides.online: reward.function: got 'absent_module:f'" in message
    overrides = {**stages.overrides, "online": {"model": {"path": "{workdir}/sft/final"}}}
    good = dataclasses.replace(stages, overrides=overrides)
    check_start(dataclasses.replace(config, pipeline=good), with_data=True)
    # A branch of a stage that is still to come needs its own data, and no more.
    overrides = {**stages.overrides, "online": {"branch": {"workdir": "{workdir}/sft"}}}
    branch = dataclasses.replace(stages, overrides=overrides)
    check_start(dataclasses.replace(config, pipeline=branch), with_data=True)
    none = DataConfig(train=str(tmp_path / "none.jsonl"))
    assert "none.jsonl" in fail(dataclasses.replace(config, pipeline=branch, data=none))


def test_all_that_is_wrong_is_said_together(toy, tmp_path):
    reward = RewardConfig(kind="function", function="absent_module:f")
    changes = {"reward": reward, "model": ModelConfig(path="/no/such/model")}
    message = fail(make_config(toy, tmp_path / "run", **changes))
    assert message.startswith("2 errors found") and message.count("\n  - ") == 2


def test_a_path_is_made_where_a_stage_before_leaves_its_files(tmp_path):
    assert is_made(str(tmp_path / "sft" / "final"), [tmp_path / "sft"])
    assert not is_made(str(tmp_path / "sft2"), [tmp_path / "sft"]) and not is_made("", [tmp_path])


@pytest.mark.parametrize("task", ["online", "sample"])
def test_a_check_refuses_to_leave_out_all_prompts(toy, tmp_path, task):
    count = len(load_prompts(str(toy / "prompts.jsonl")))
    for skip in (count, count + 1):
        config = make_config(
            toy, tmp_path / "run", task, rounds=RoundsConfig(4, prompts_per_round=2, num_skip=skip)
        )
        assert f"rounds.num_skip{'=' if task == 'sample' else ': got '}{skip}" in fail(config)
    check_start(
        dataclasses.replace(
            config, rounds=RoundsConfig(4, prompts_per_round=2, num_skip=count - 1)
        ),
        with_data=True,
    )


def test_a_file_in_the_place_of_a_folder_and_a_folder_in_that_of_a_file(toy, tmp_path):
    (tmp_path / "file").write_text("mine")
    message = fail(make_config(toy, tmp_path / "file"), with_data=False)
    assert f"workdir: {tmp_path / 'file'} is a file, but" in message
    config = make_config(toy, tmp_path / "run", "sample")

    def with_output(path):
        sampling = dataclasses.replace(config.sampling, output=str(path))
        return dataclasses.replace(config, sampling=sampling)

    assert f"sampling.output: {tmp_path} is a folder" in fail(with_output(tmp_path))
    check_start(with_output(tmp_path / "file"), with_data=False)  # it is written over


def test_held_out_and_test_prompts_are_checked_as_the_run_takes_them(toy, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    source = str(toy / "prompts.jsonl")
    rounds = RoundsConfig(total_prompts=9, prompts_per_round=9)
    data = DataConfig(train=source, holdout=4, test=str(toy / "eval.jsonl"))
    check_start(make_config(toy, tmp_path / "run", data=data, rounds=rounds), with_data=True)
    assert "8 prompts are enough" in caplog.text or "8 in all" in caplog.text  # of 12
    twice = dataclasses.replace(data, test=source)
    assert "data.test: 8 of its prompts are in data.train too" in fail(
        make_config(toy, tmp_path / "run", data=twice)
    )
    few = dataclasses.replace(data, holdout=12)
    assert "data.holdout: got 12, but data.train has 12" in fail(
        make_config(toy, tmp_path / "run", data=few)
    )
    scorers = {"right": ScorerConfig(kind="function", function=ANSWER)}
    lacking = make_config(toy, tmp_path / "run", data=data, eval=EvalConfig(scorers=scorers))
    message = fail(lacking)
    assert "eval.scorers.right.function" in message and "field 'answer': got nothing" in message


@pytest.mark.parametrize("task", ["sft", "reward_model", "align"])
def test_a_holdout_of_fixed_data_is_checked(toy, tmp_path, task):
    config = make_config(toy, tmp_path / "run", task)
    data = dataclasses.replace(config.data, holdout=2)
    check_start(dataclasses.replace(config, data=data), with_data=True)
    data = dataclasses.replace(config.data, holdout=1000)
    assert "data.holdout: got 1000, but" in fail(dataclasses.replace(config, data=data))
