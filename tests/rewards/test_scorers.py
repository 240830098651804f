"""Scorers: each sample's reward is its own, whatever stands beside it."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from safetensors.numpy import load_file, save_file

from halos_jax import sharding
from halos_jax.config import (
    Config,
    ConfigError,
    MeshConfig,
    ModelConfig,
    RewardConfig,
    SamplingConfig,
    ToyConfig,
    TrainConfig,
)
from halos_jax.config.rewards import JudgeConfig
from halos_jax.data.chat.loading import load_renderer
from halos_jax.data.toy import make_toy_data
from halos_jax.devices import DeviceError
from halos_jax.models import decoder, spec
from halos_jax.models.files import export, folders, hf
from halos_jax.models.hf.families import ModelError
from halos_jax.packing.batches import build_batch, plan_batches
from halos_jax.packing.layout import LayoutMemory
from halos_jax.rewards import scorers
from halos_jax.rewards.scorers import RewardError, cut_at_sentence, make_scorer
from halos_jax.types import FINISH_LENGTH, FINISH_STOP, MEMBER, Item, Prompt, Sample, Turn
from tests.reward_parts import with_parts

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "head_dim": 8}
SMALL |= {"num_key_value_heads": 1, "num_hidden_layers": 1, "initializer_range": 0.3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with policy/, reward/ and other/, whose tokenizer has another template."""
    folder = tmp_path_factory.mktemp("models")
    make_toy_data(folder, ToyConfig(num_sft=1, num_pairs=1, num_prompts=1, num_eval=1), seed=0)
    file = folder / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | SMALL))
    language_model = hf.load_decoder_config(str(folder / "base"))
    for name, labels in (("policy", 0), ("reward", 1)):
        config = dataclasses.replace(language_model, num_labels=labels, init_std=0.3)
        params = spec.init_params(jax.random.key(labels), config)
        export.save_model(params, config, folder / name, source=folder / "base")
    with folders.replace_folder(folder / "other") as partial:
        for path in (folder / "reward").iterdir():
            (partial / path.name).write_bytes(path.read_bytes())
        tokenizer = load_renderer(str(folder / "reward")).tokenizer
        template = tokenizer.chat_template
        # This one has a word before every question.
        tokenizer.chat_template = template.replace("{% else %}", "{% else %}sort ")
        assert tokenizer.chat_template != template
        export.replace_tokenizer(partial, tokenizer)
    return folder


@pytest.fixture(scope="module")
def renderer(folder):
    return load_renderer(str(folder / "policy"))


@pytest.fixture(scope="module")
def one_device():
    return jax.make_mesh(
        (1, 1, 1), sharding.MESH_AXES, (AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )


def make_config(folder, name="reward", tokens=256, **changes) -> Config:
    reward = RewardConfig(
        path=str(folder / name), compute_dtype="float32", max_length=32, read_at="end_of_turn"
    )
    return Config(
        progress=False,
        # The policy computes in another dtype than the reward model.
        model=ModelConfig(path=str(folder / "policy"), compute_dtype="bfloat16"),
        reward=dataclasses.replace(reward, **changes),
        train=TrainConfig(tokens_per_device=tokens, row_multiple=64),
    )


def make_samples(renderer, answers=("abc", "abd", "b", "cabd", "ba")):
    samples = []
    for number, letters in enumerate(("cab", "dacb", "ba")):
        turns = (Turn("user", letters),)
        ids = renderer.render_prompt(turns, 12)
        for sample_id, answer in enumerate(answers[number:]):
            finished = sample_id != 1
            samples.append(
                Sample(
                    prompt=Prompt(f"p{number}", turns, {"level": number}),
                    sample_id=sample_id,
                    output=answer,
                    prompt_ids=ids,
                    response_ids=renderer.render_response(answer, finished=finished),
                    finish_reason=FINISH_STOP if finished else FINISH_LENGTH,
                )
            )
    return samples


def score_alone(folder, samples, mesh) -> list[float]:
    """Score each sample as the one sequence of a row of its own."""
    settings = ModelConfig(compute_dtype="float32", remat="none")
    config = hf.load_decoder_config(str(folder / "reward"), settings)
    params = hf.load_params(str(folder / "reward"), config, mesh)
    compute = jax.jit(lambda batch: decoder.compute_scores(params, batch, config))
    scores = []
    for sample in samples:
        responses = (np.asarray(sample.response_ids, np.int32),)
        item = Item(np.asarray(sample.prompt_ids, np.int32), responses, (MEMBER,))
        plan = plan_batches([item], batch_size=1, num_rows=1, tokens_per_row=64, row_multiple=64)
        batch = jax.tree.map(lambda x: x[0], build_batch([item], plan, 0))
        scores.append(float(compute(batch)[0, 0]))
    return scores


def test_scores_are_those_of_each_sample_alone_in_any_order_and_packing(
    folder, renderer, one_device
):
    samples = make_samples(renderer)
    expected = np.array(score_alone(folder, samples, one_device))
    assert len(set(expected.round(4))) == len(samples)
    for tokens in (256, 40):
        score = make_scorer(make_config(folder, tokens=tokens), one_device, renderer)
        np.testing.assert_allclose(score(samples), expected, rtol=1e-4, atol=1e-5)
    order = np.random.default_rng(0).permutation(len(samples))
    shuffled = score([samples[index] for index in order])
    np.testing.assert_allclose(shuffled, expected[order], rtol=1e-4, atol=1e-5)


def test_many_devices_give_the_same_scores(folder, renderer, one_device):
    samples = make_samples(renderer)
    expected = score_alone(folder, samples, one_device)
    many = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(many):
        found = make_scorer(make_config(folder), many, renderer)(samples)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_equal_samples_are_scored_once_and_tie_exactly(folder, renderer, one_device, monkeypatch):
    samples = make_samples(renderer, answers=("abc", "b", "abc", "abc", "b"))
    scored = []

    def spy(run, params, given, *rest, original=scorers._score_items):
        scored.extend(given)
        return original(run, params, given, *rest)

    monkeypatch.setattr(scorers, "_score_items", spy)
    rewards = make_scorer(make_config(folder), one_device, renderer)(samples)
    by_tokens = {}
    for sample, reward in zip(samples, rewards, strict=True):
        by_tokens.setdefault((sample.prompt_ids, sample.response_ids), set()).add(reward)
    # Sample 1 of each prompt is cut off, so the same text is not the same tokens.
    assert len(scored) == len(by_tokens) < len(samples)
    assert all(len(values) == 1 for values in by_tokens.values())


def test_memory_that_ends_in_scoring_says_what_to_lower(folder, renderer, one_device, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(scorers, "_score_items", fail)
    scorer = make_scorer(make_config(folder), one_device, renderer)
    with pytest.raises(DeviceError, match=r"in scoring by the .* lower train\.tokens_per_device"):
        scorer(make_samples(renderer))


def test_another_template_gets_the_same_turns_rendered_by_its_own(folder, renderer, one_device):
    samples = make_samples(renderer)
    own = load_renderer(str(folder / "other"))
    rendered = []
    for one in samples:
        ids = own.render_response(one.output, finished=one.finish_reason == FINISH_STOP)
        prompt = own.render_prompt(one.prompt.turns, 32)
        rendered.append(dataclasses.replace(one, prompt_ids=prompt, response_ids=ids))
    assert rendered[0].prompt_ids != samples[0].prompt_ids
    expected = score_alone(folder, rendered, one_device)
    found = make_scorer(make_config(folder, "other"), one_device, renderer)(samples)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", ["end_of_turn", "template_end"])
def test_another_template_gets_the_turns_that_the_policy_saw(folder, renderer, one_device, place):
    history = (Turn("user", "abcd"), Turn("assistant", "dcba"))
    samples = make_samples(renderer)
    longer = [
        dataclasses.replace(
            one, prompt=dataclasses.replace(one.prompt, turns=(*history, *one.prompt.turns))
        )
        for one in samples
    ]
    config = make_config(folder, "other", read_at=place)
    score = lambda length: make_scorer(  # noqa: E731
        dataclasses.replace(config, sampling=SamplingConfig(max_prompt_length=length)),
        one_device,
        renderer,
    )
    # So short that the history is dropped; long enough for it.
    np.testing.assert_array_equal(score(12)(longer), score(12)(samples))
    assert (np.array(score(99)(longer)) != np.array(score(99)(samples))).all()


def test_batches_of_a_reward_model_keep_the_shapes_that_are_known(folder, renderer, one_device):
    samples, layouts = make_samples(renderer), LayoutMemory()
    part = {"kind": "model", "path": str(folder / "reward")}
    config = make_config(folder)
    config = dataclasses.replace(config, reward=with_parts(config.reward, {"a": part, "b": part}))
    score = make_scorer(config, one_device, renderer, layouts=layouts)
    score(samples)
    first = layouts.to_record()
    assert first.keys() == {"reward a", "reward b"}
    score(samples[:-3])
    assert layouts.to_record() == first


def test_a_judge_is_made_with_what_stops_the_run(monkeypatch):
    made = lambda config, check, is_known: (check, is_known)  # noqa: E731
    monkeypatch.setattr(scorers, "make_judge_scorer", made)
    monkeypatch.setattr(scorers, "probe_judge", lambda config: True)
    check = lambda: None  # noqa: E731
    # Samples that are there already are asked about at once, without a probe.
    for task, is_known in (("online", True), ("eval", True), ("label", False)):
        config = Config(task=task, reward=RewardConfig(kind="judge"))
        assert make_scorer(config, None, None, check) == (check, is_known)
    monkeypatch.setattr(scorers, "make_model_scorer", lambda *arguments: arguments[-1])
    assert make_scorer(Config(reward=RewardConfig()), None, None, check) is check


def test_a_reward_model_never_reads_the_policys_prefix(folder, renderer, one_device):
    """What tells the policy how to answer is no part of what is judged, neither once nor twice."""
    plain = make_samples(renderer)
    expected = score_alone(folder, plain, one_device)
    prefix = renderer.render_prefix("ab")
    assert prefix
    prefixed = [dataclasses.replace(one, prompt_ids=one.prompt_ids + prefix) for one in plain]
    config = make_config(folder)
    config = dataclasses.replace(
        config, sampling=dataclasses.replace(config.sampling, prefix="ab", max_prompt_length=12)
    )
    found = make_scorer(config, one_device, renderer)(prefixed)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_cut_and_counted(folder, renderer, one_device, caplog):
    samples = make_samples(renderer)
    score = make_scorer(make_config(folder, max_length=7), one_device, renderer)
    cut = [
        dataclasses.replace(s, response_ids=s.response_ids[: max(7 - len(s.prompt_ids), 1)])
        for s in samples
    ]
    assert cut != samples
    np.testing.assert_allclose(
        score(samples), score_alone(folder, cut, one_device), rtol=1e-4, atol=1e-5
    )
    assert "positions" not in caplog.text  # of which the toy model has 128
    scorers._report_positions(samples, 7)
    assert f"of {len(samples)} sequences" in caplog.text
    changed = sum(one != other for one, other in zip(samples, cut, strict=True))
    assert f"{changed} of {len(samples)} samples are longer than reward.max_length=7" in caplog.text


def test_a_gate_that_is_read_where_the_prompt_ends(folder, renderer, one_device, tmp_path):
    """Prompts that do not end as the model expects would be weighed by the wrong state."""
    end = renderer.render_prompt((Turn("user", "cab"),), 12)[-1:]
    base = folder / "reward"
    for name, pattern in {"armo": end, "other": (1, 2)}.items():
        config = json.loads((base / "config.json").read_text())
        config |= {"architectures": ["LlamaForRewardModelWithGating"], "num_objectives": 3}
        config |= {"gating_n_hidden": 1, "gating_token_pattern": pattern, "initializer_range": 1.0}
        source = tmp_path / f"source-{name}"
        source.mkdir()
        for path in base.iterdir():
            (source / path.name).write_bytes(path.read_bytes())
        (source / "config.json").write_text(json.dumps(config))
        spec_of = hf.load_decoder_config(str(source))
        params = spec.init_params(jax.random.key(0), spec_of)
        export.save_model(params, spec_of, tmp_path / name, source=source)
    samples = make_samples(renderer)
    rewards = make_scorer(make_config(folder, path=str(tmp_path / "armo")), one_device, renderer)(
        samples
    )
    assert len(set(rewards)) == len(samples)
    broken = make_scorer(make_config(folder, path=str(tmp_path / "other")), one_device, renderer)
    with pytest.raises(RewardError, match=r"at the tokens \(1, 2\) that end one .* got \("):
        broken(samples)


def test_models_that_cannot_score(folder, renderer, one_device, tmp_path):
    with pytest.raises(ModelError, match=r"reward\.path: got .* without a class"):
        make_scorer(make_config(folder, "policy"), one_device, renderer)
    shutil.copytree(folder / "reward", tmp_path / "broken")
    weights = load_file(folder / "reward" / "model.safetensors")
    save_file(
        weights | {"score.weight": weights["score.weight"] * np.nan},
        tmp_path / "broken" / "model.safetensors",
    )
    broken = make_config(folder, path=str(tmp_path / "broken"))
    samples = make_samples(renderer)
    with pytest.raises(RewardError, match=rf"{len(samples)} non-finite scores of {len(samples)}"):
        make_scorer(broken, one_device, renderer)(samples)


# --------------------------------------------------------------------------- functions


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """Make functions importable from a module `judge`."""
    (tmp_path / "judge.py").write_text(
        "import numpy as np\n"
        "def length(prompt, response): return np.float32(len(response))\n"
        "def level(prompt, response, record): return record['level'] + 10 * len(prompt)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_parts_are_made_and_added(renderer, functions):
    parts = {
        "long": {"function": "judge:length", "weight": 2.0},
        "level": {"function": "judge:level", "normalise": "file"},
    }
    reward = with_parts(RewardConfig(kind="function"), parts)
    samples = make_samples(renderer, answers=("abc", "b", "a"))
    labels = make_scorer(Config(reward=reward), None, renderer)(samples)
    assert labels.parts["long"] == [3.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    level = np.array([10.0] * 3 + [11.0] * 2 + [12.0])
    expected = 2 * np.array(labels.parts["long"]) + (level - level.mean()) / level.std()
    np.testing.assert_allclose(labels.rewards, expected, rtol=1e-12)
    parts["level"] = {"function": "judge:level", "arguments": {"x": 1}}
    with pytest.raises(ConfigError, match=r"reward\.parts\.level: reward\.arguments: got {'x': 1}"):
        make_scorer(Config(reward=with_parts(reward, parts)), None, renderer)


def test_a_judge_is_a_scorer_like_any_other(renderer, functions, server, tmp_path):
    server.reply = lambda question, before: f"Final Score: {question.count('b')}"
    prompt = tmp_path / "prompt.jinja"
    prompt.write_text("{{ response }}")
    judge = JudgeConfig(url=server.url, model="m", key_variable="", prompt=str(prompt))
    reward = RewardConfig(kind="judge", judge=judge)
    samples = make_samples(renderer, answers=("abc", "bb", "a"))
    config = Config(workdir=str(tmp_path / "run"), progress=False, reward=reward)
    expected = [1.0, 2.0, 0.0, 2.0, 0.0, 0.0]
    assert make_scorer(config, None, renderer)(samples) == expected
    parts = {"b": {"weight": 2.0}, "long": {"kind": "function", "function": "judge:length"}}
    config = dataclasses.replace(config, reward=with_parts(reward, parts))
    labels = make_scorer(config, None, renderer)(samples)
    assert labels.rewards == [5.0, 6.0, 1.0, 6.0, 1.0, 1.0] and labels.parts["b"] == expected
    # One a text, in the first run and never again, and a probe of each.
    assert len(server.bodies) == 3 + 2


def test_an_error_inside_a_function_names_its_part_and_not_its_file(renderer, functions, tmp_path):
    (tmp_path / "my_reward.py").write_text("def broken(prompt, response): raise KeyError('mine')\n")
    parts = {"own": {"function": "my_reward:broken"}}
    reward = with_parts(RewardConfig(kind="function"), parts)
    scorer = make_scorer(Config(reward=reward), None, renderer)
    with pytest.raises(RewardError) as caught:
        scorer(make_samples(renderer))
    message = str(caught.value)
    assert message.startswith("reward.parts.own.function 'my_reward:broken' raised KeyError")
    assert "my_reward.py:1, for prompt p0, sample 0" in message


@pytest.mark.parametrize(
    ("output", "cut"),
    [
        ("One. Two! Three", "One. Two!"),
        ("It costs 3.50", "It costs 3."),
        ("Why?\n\nBecause. ", None),
        ("no end", None),
        ("Is it?\nYes, and", "Is it?"),
    ],
)
def test_a_cut_at_the_last_sentence_ends_there(renderer, output, cut):
    (sample,) = make_samples(renderer, answers=("abc",))[:1]
    sample = dataclasses.replace(sample, output=output, finish_reason=FINISH_LENGTH)
    found = cut_at_sentence(sample, renderer)
    if cut is None:
        assert found is sample
        return
    assert found.output == cut and found.finish_reason == FINISH_STOP
    assert found.response_ids == tuple(renderer.render_response(cut, finished=True))


def test_the_scorer_sees_the_cut_only_where_it_is_asked_for(renderer, functions):
    sample = dataclasses.replace(make_samples(renderer)[0], output="abc. de")
    reward = RewardConfig(kind="function", function="judge:length")
    assert make_scorer(Config(reward=reward), None, renderer)([sample]) == [7.0]
    reward = dataclasses.replace(reward, cut_at_sentence=True)
    assert make_scorer(Config(reward=reward), None, renderer)([sample]) == [4.0]
