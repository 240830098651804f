"""The Python API: lazy, not shadowed by a room, and the same numbers as the tasks give."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import halos_jax
from halos_jax import (
    Config,
    DataConfig,
    FeedbackConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RoundsConfig,
    SamplingConfig,
    TrainConfig,
    UserError,
)
from halos_jax.config.rewards import PartConfig
from halos_jax.data.datasets import order_prompts
from halos_jax.data.records.reading import read_records

PACKAGE = Path(halos_jax.__file__).parent
ROOMS = sorted(
    ".".join(file.relative_to(PACKAGE.parent).parts[:-1]) for file in PACKAGE.rglob("__init__.py")
)
SETTINGS = {"compute_dtype": "float32", "remat": "none"}
SAMPLING = SamplingConfig(
    num_samples_per_prompt=2, max_prompt_length=10, max_tokens=4, slots=8, chunk=4
)
REWARD_PART = {"kind": "function", "function": "halos_jax.data.toy:score_by_rule"}
REWARD = RewardConfig(**REWARD_PART)
TRAINING = Config(
    progress=False,
    loss={"name": "dpo", "beta": 0.5},
    sampling=SAMPLING,
    optimizer=OptimizerConfig(learning_rate=1e-2),
    train=TrainConfig(batch_size=8, max_length=16, row_multiple=64, eval_every=0),
)
ROUND_START = Config(
    rounds=RoundsConfig(reference="round_start"), train=TrainConfig(batch_size=7, epochs=0)
)


def run_python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_importing_the_package_and_its_configuration_imports_no_jax():
    code = (
        "import sys, halos_jax\nfrom halos_jax import Config, UserError\nprint(halos_jax.__all__)"
        "\nprint({'jax', 'transformers', 'orbax', 'flax'} & sys.modules.keys())"
    )
    names, imported = run_python(code).splitlines()
    assert imported == "set()" and {"run", "load_policy", "sample", "train"} <= set(eval(names))


def test_no_room_shadows_a_function_whatever_is_imported_first():
    rooms = "; ".join(f"import {name}" for name in (*ROOMS, "halos_jax.api", "halos_jax.main"))
    code = (
        f"{rooms}\nimport halos_jax\nfrom halos_jax import *\n"
        "kinds = {name: type(getattr(halos_jax, name)) for name in halos_jax.__all__}\n"
        "print([name for name, kind in kinds.items() if kind is type(halos_jax)])\n"
        "from halos_jax.data.chat import load_renderer as first\n"
        "from halos_jax.data.chat.loading import load_renderer as second\n"
        "print(first is second is halos_jax.load_renderer)\n"
        "try:\n    halos_jax.run({'task': 'sft'})\n"
        "except halos_jax.UserError as error:\n    print(error)"
    )
    shadowed, same, *message = run_python(code).splitlines()
    assert len(ROOMS) > 15 and shadowed == "[]" and same == "True"
    assert message[0] == "2 errors in the configuration:" and "model.path" in message[1]


def test_all_names_are_there_and_others_are_not():
    for name in halos_jax.__all__:
        assert getattr(halos_jax, name) is not None and name in dir(halos_jax)
    assert set(halos_jax.api.__all__) <= set(halos_jax.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        halos_jax.trian  # noqa: B018


@pytest.fixture(scope="module")
def policy(toy):
    return halos_jax.load_policy(str(toy / "policy"), **SETTINGS)


@pytest.fixture(scope="module")
def prompts(toy):
    return order_prompts(halos_jax.load_prompts(str(toy / "prompts.jsonl")), seed=3)[:6]


@pytest.fixture(scope="module")
def scored(policy, prompts):
    samples = halos_jax.sample(policy, prompts, SAMPLING, seed=3)
    return halos_jax.score(samples, REWARD, policy)


def test_the_stages_by_hand_give_what_the_tasks_give(toy, tmp_path, policy, prompts, scored):
    """The same samples, token by token, the same feedback, and the same weights, bit for bit."""
    model = ModelConfig(path=str(toy / "policy"), **SETTINGS)
    sampled = Config(
        task="sample",
        workdir=str(tmp_path / "sample"),
        seed=3,
        progress=False,
        model=model,
        data=DataConfig(train=str(toy / "prompts.jsonl")),
        sampling=dataclasses.replace(SAMPLING, num_prompts=len(prompts)),
    )
    assert halos_jax.run(sampled)["samples"] == len(scored) == 12
    rows = [row for _, row in read_records(tmp_path / "sample" / "samples.jsonl")]
    assert [row["response_ids"] for row in rows] == [list(one.response_ids) for one in scored]
    labelled = dataclasses.replace(
        sampled,
        task="label",
        workdir=str(tmp_path / "label"),
        data=DataConfig(train=str(tmp_path / "sample" / "samples.jsonl")),
        reward=REWARD,
        feedback=FeedbackConfig(type="binary", threshold=0.0),
    )
    halos_jax.run(labelled)
    feedback = halos_jax.make_feedback(scored, labelled.feedback, seed=3)
    rows = [row for _, row in read_records(tmp_path / "label" / "feedback.jsonl")]
    assert [row["label"] for row in rows] == [int(one.desirable) for one in feedback]

    aligned = dataclasses.replace(
        TRAINING,
        task="align",
        workdir=str(tmp_path / "align"),
        model=model,
        data=DataConfig(train=str(tmp_path / "label" / "feedback.jsonl")),
        loss={"name": "kto"},
    )
    metrics = halos_jax.run(aligned)
    before = np.asarray(policy.params["embed"])
    trained = halos_jax.train(policy, feedback, dataclasses.replace(TRAINING, loss={"name": "kto"}))
    assert trained.history[-1]["loss/train"] == pytest.approx(metrics["loss/train"], rel=1e-6)
    folder = halos_jax.export(trained.policy, tmp_path / "exported")
    found, expected = (
        load_file(path / "model.safetensors") for path in (folder, tmp_path / "align" / "final")
    )
    for name, weights in expected.items():
        np.testing.assert_array_equal(found[name], weights)
    # What was trained from is the caller's, and as it was.
    np.testing.assert_array_equal(np.asarray(policy.params["embed"]), before)
    again = halos_jax.load_policy(str(folder), **SETTINGS)
    np.testing.assert_array_equal(again.params["embed"], trained.policy.params["embed"])


def test_a_policy_learns_from_a_teacher_on_samples_without_rewards(toy, policy, prompts, tmp_path):
    samples = halos_jax.sample(policy, prompts, SAMPLING, seed=3)
    samples = halos_jax.make_feedback(samples, FeedbackConfig(type="samples"))
    assert [one.reward for one in samples] == [None] * 12
    model = ModelConfig(teacher=str(toy / "policy"), **SETTINGS)
    config = dataclasses.replace(TRAINING, loss={"name": "gkd", "beta": 1}, model=model)
    same = halos_jax.train(policy, samples, config)
    assert same.history[0]["loss/train"] == pytest.approx(0, abs=1e-6)
    moved = jax.tree.map(lambda leaf: leaf * 1.5, policy.params)
    other = halos_jax.train(dataclasses.replace(policy, params=moved), samples, config)
    losses = [row["loss/train"] for row in other.history if "loss/train" in row]
    assert losses[0] > 0.01
    with pytest.raises(UserError, match=r"model\.teacher: got '', but loss 'gkd'"):
        halos_jax.train(policy, samples, dataclasses.replace(config, model=ModelConfig()))


def test_a_scorer_of_ones_own_and_texts_as_prompts(policy):
    samples = halos_jax.sample(policy, ["cab", "dace"], SAMPLING)
    assert [one.prompt.turns[0].content for one in samples] == ["cab", "cab", "dace", "dace"]
    scored = halos_jax.score(samples, lambda found: [float(n) for n, _ in enumerate(found)])
    assert [one.reward for one in scored] == [0.0, 1.0, 2.0, 3.0]
    pairs = halos_jax.make_feedback(scored)
    assert [(one.chosen.sample_id, one.rejected.sample_id) for one in pairs] == [(1, 0), (1, 0)]
    metrics = halos_jax.evaluate(policy, ["cab", "dace"], REWARD, SAMPLING)
    assert 0 <= metrics["reward_eval"] <= 1 and 0 < metrics["response_tokens_eval"] <= 5


def test_what_is_wrong_is_said_as_on_the_command_line(policy, scored, tmp_path, toy):
    for call, message in (
        (lambda: halos_jax.load_policy("x", depth=3), "model: got depth; allowed: added_tokens"),
        (lambda: halos_jax.sample(policy, ["a", "a"], SAMPLING), "got one of them twice"),
        (
            lambda: halos_jax.score(scored, RewardConfig(kind="none")),
            r"reward\.kind: got 'none', which scores no sample; allowed here: any other kind",
        ),
        (lambda: halos_jax.train(policy, [], TRAINING), "feedback: got none, allowed: one or more"),
        (
            lambda: halos_jax.train(policy, scored, Config(loss={"name": "dpp"})),
            r"loss\.name: got 'dpp', allowed: .* dpo",
        ),
        (
            lambda: halos_jax.train(policy, scored, Config(loss={"name": "bradley-terry"})),
            "config.task='reward_model'",
        ),
        (
            lambda: halos_jax.sample(policy, ["a"], SamplingConfig(temperature=-1.0, slots=12)),
            r"sampling\.temperature: got -1\.0, allowed: 0 or more\nsampling\.slots: got 12",
        ),
        (
            lambda: halos_jax.train(policy, scored, ROUND_START),
            r"reference: .* no rounds; .*\ntrain\.epochs: got 0.*\ntrain\.batch_size: got 7",
        ),
        (lambda: halos_jax.run(Config(task="sft", workdir=str(tmp_path))), "model.path"),
        (
            lambda: halos_jax.load_policy(str(toy / "policy"), compute_dtype="float3"),
            r"model\.compute_dtype: got 'float3', allowed: 'float32', 'bfloat16'",
        ),
        (lambda: halos_jax.sample(policy, [" "], SAMPLING), "prompts: got ' ', allowed: Prompts"),
        (
            lambda: halos_jax.sample(policy, ["a"], SamplingConfig(temperature="hot", slots="8")),
            r"temperature: got 'hot', allowed: 0 or more\nsampling\.slots: got '8', allowed: 1 or",
        ),
        (lambda: halos_jax.evaluate(policy, [], RewardConfig()), "prompts: got none, allowed: one"),
        (lambda: halos_jax.train(policy, [1], TRAINING), r"got 1 \(int\), allowed: what `make_f"),
        (lambda: halos_jax.score(scored, RewardConfig(kind="jury")), r"reward\.kind: got 'jury'"),
        (lambda: halos_jax.score(scored, lambda found: [1.0]), "12 samples and gave 1 values"),
        (
            lambda: halos_jax.make_feedback(scored, FeedbackConfig(type="pairwis")),
            r"feedback\.type: got 'pairwis', allowed: 'pairwise'",
        ),
        # arguments, and parts of them, of another type
        (lambda: halos_jax.run(3), "config: got int, allowed: what a preset returns, a dict"),
        (lambda: halos_jax.sample("x", ["a"]), r"policy: got 'x' \(str\), allowed: what load_po"),
        (lambda: halos_jax.export(None, "x"), r"policy: got None \(NoneType\)"),
        (lambda: halos_jax.sample(policy, ["a"], {"slots": "x"}), "slots: got 'x', allowed: an in"),
        (lambda: halos_jax.sample(policy, ["a"], 3), "sampling: got 3, allowed: a section of f"),
        (lambda: halos_jax.score(scored, {"path": "x"}), "reward: got .*, allowed: a RewardConf"),
        (lambda: halos_jax.score(scored, None), r"reward: got None \(NoneType\)"),
        (lambda: halos_jax.score(scored, REWARD, "x"), r"policy: got 'x' \(str\)"),
        (lambda: halos_jax.score(["a"], REWARD), r"samples: got 'a' \(str\), allowed: Samples"),
        (lambda: halos_jax.make_feedback(3), r"samples: got 3 \(int\), allowed: a list of S"),
        (lambda: halos_jax.train(policy, scored, {}), "config: got dict, allowed: a Config"),
        (
            lambda: halos_jax.train(policy, scored, Config(train={"epochs": "x"})),
            r"train\.epochs: got 'x', allowed: an integer",
        ),
        (
            lambda: halos_jax.score(scored, RewardConfig(parts={"a": {"weight": "x"}})),
            r"reward\.parts\.a\.weight: got 'x', allowed: a finite number",
        ),
    ):
        with pytest.raises(UserError, match=message):
            call()
    assert not list(tmp_path.iterdir())
    assert halos_jax.score([], RewardConfig(path="nowhere"), policy) == []


def test_a_section_may_be_a_dict_of_its_fields(scored):
    """In every place in which a config has one: it means what the typed section means."""
    typed = RewardConfig(parts={"a": PartConfig(**REWARD_PART)})
    plain = RewardConfig(parts={"a": REWARD_PART}, judge={"model": "m"})
    assert halos_jax.score(scored, plain) == halos_jax.score(scored, typed)
    pairs = halos_jax.make_feedback(scored, FeedbackConfig(threshold=0.5))
    assert halos_jax.make_feedback(scored, {"threshold": 0.5}) == pairs


def test_a_config_dict_runs_and_what_is_complete_has_nothing_to_do(toy, tmp_path):
    config = halos_jax.default_config()
    config.task, config.workdir, config.progress = "export", str(tmp_path / "run"), False
    config.model.path = toy / "policy"  # a Path is as good as its text
    first = halos_jax.run(config)
    assert first["parameters"] > 0 and halos_jax.run(config) == first
    exported = json.loads((Path(config.workdir) / "final" / "config.json").read_text())
    assert exported["architectures"] == ["LlamaForCausalLM"]
