"""A reward model's score is that of transformers, for the templates of all families."""

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from halos_jax import sharding
from halos_jax.config import Config, ModelConfig, RewardConfig, SamplingConfig, TrainConfig
from halos_jax.data.chat.loading import load_renderer
from halos_jax.data.chat.template_options import set_options
from halos_jax.models import spec
from halos_jax.models.files import export
from halos_jax.models.spec import DecoderConfig
from halos_jax.rewards import read_at
from halos_jax.rewards.read_at import READ_AT, make_preparer
from halos_jax.rewards.scorers import make_scorer
from halos_jax.types import FINISH_LENGTH, FINISH_STOP, Prompt, Sample, Turn
from tests.data.chat.test_template import SPECIAL, TEMPLATES, make_tokenizer

GEMMA = (
    "<s>{% for m in messages %}<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
ALL = TEMPLATES | {"gemma": GEMMA, "none": None}
TINY = {"vocab_size": 320, "num_layers": 1, "d_model": 16, "num_heads": 2, "num_kv_heads": 1}
DECODER = DecoderConfig(**TINY, head_dim=8, d_mlp=24, num_labels=1, init_std=0.5)


@pytest.fixture(scope="module")
def one_device():
    axes = (AxisType.Auto,) * 3
    return jax.make_mesh((1, 1, 1), sharding.MESH_AXES, axes, devices=jax.devices()[:1])


def make_model(folder, template, *, pad=None, mark=None, seed=0):
    """Write a random classifier with a tokenizer of the template."""
    tokenizer = make_tokenizer(template)
    params = spec.init_params(jax.random.key(seed), DECODER)
    export.save_model(params, DECODER, folder, source=None)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"pad_token_id": None if pad is None else tokenizer.convert_tokens_to_ids(pad)}
    config |= {READ_AT: mark} if mark else {}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_config(folder, **reward) -> Config:
    reward = RewardConfig(path=str(folder), compute_dtype="float32", **reward)
    return Config(
        progress=False,
        model=ModelConfig(compute_dtype="float32"),
        reward=reward,
        sampling=SamplingConfig(max_prompt_length=400),
        train=TrainConfig(tokens_per_device=512, row_multiple=64, max_length=400),
    )


PROMPTS = ((Turn("user", "2+2?"),), (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")))
ANSWERS = ("four", "no idea", " four \n", "<think>\nadd\n</think>\n\nfour", "", "a<|im_end|>\nb")


def make_samples(renderer):
    samples = []
    for number, turns in enumerate(PROMPTS):
        for sample_id, answer in enumerate(ANSWERS):
            finished = sample_id != 1
            ids = renderer.render_response(answer, finished=finished) or (1,)
            prompt = renderer.render_prompt(turns, 400)
            reason = FINISH_STOP if finished else FINISH_LENGTH
            samples.append(
                Sample(Prompt(str(number), turns), sample_id, answer, prompt, ids, reason)
            )
    return samples


def render_by_transformers(folder, sample, **options):
    """Return the ids that a card's own code would give the model."""
    tokenizer = load_renderer(str(folder)).tokenizer
    chat = [{"role": turn.role, "content": turn.content} for turn in sample.prompt.turns]
    chat.append({"role": "assistant", "content": sample.output})
    template = load_renderer(str(folder)).template
    return tokenizer.apply_chat_template(chat, chat_template=template, return_dict=False, **options)


@pytest.mark.parametrize(("name", "pad"), [("chatml", None), ("mistral", "</s>")])
def test_scores_are_those_of_transformers(tmp_path, one_device, name, pad):
    torch = pytest.importorskip("torch")
    import transformers

    folder = make_model(tmp_path / "model", ALL[name], pad=pad)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    renderer = load_renderer(str(folder))
    samples = [one for one in make_samples(renderer) if "<|im_end|>" not in one.output]
    expected = []
    with torch.no_grad():
        for sample in samples:
            ids = torch.tensor([render_by_transformers(folder, sample)])
            expected.append(float(model(ids).logits[0, 0]))
    scores = make_scorer(make_config(folder), one_device, renderer)(samples)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("policy", "pad"), [("same", None), ("other", None), ("same", "</s>")])
def test_what_is_read_is_the_templates_own_rendering(tmp_path, name, policy, pad):
    folder = make_model(tmp_path / "model", ALL[name], pad=pad)
    own = load_renderer(str(folder))
    other = make_model(tmp_path / "other", ALL["llama 3"])
    policy = own if policy == "same" else load_renderer(str(other))
    samples = make_samples(policy)
    prepared = make_preparer(make_config(folder), policy, own)(samples)
    for sample, ready in zip(samples, prepared, strict=True):
        assert ready.prompt_ids and ready.response_ids
        if "<|im_end|>" not in sample.output:
            expected = render_by_transformers(folder, sample)
            while pad and expected[-1] == own.tokenizer.convert_tokens_to_ids(pad):
                expected.pop()  # transformers reads at the last token that is no padding
            assert list(ready.prompt_ids + ready.response_ids) == expected
    # Samples of one prompt share it, where its template lets them.
    shared = {one.prompt_ids for one in prepared if one.output and "think" not in one.output}
    assert len(shared) <= (3 if name in ("qwq", "magistral", "qwen 3 thinking") else 2)


def test_a_marker_that_somebody_typed_ends_nothing(tmp_path):
    folder = make_model(tmp_path / "model", ALL["chatml"])
    own = load_renderer(str(folder))
    (sample,) = [one for one in make_samples(own)[:6] if "<|im_end|>" in one.output]
    end = own.tokenizer.convert_tokens_to_ids("<|im_end|>")
    (ready,) = make_preparer(make_config(folder), own, own)([sample])
    assert ready.response_ids.count(end) == 1 and ready.response_ids[-2] == end


def test_the_very_tokens_of_a_policy_with_the_same_template_are_scored(tmp_path):
    """Sampled tokens need not be those that their text is read as."""
    folder = make_model(tmp_path / "model", ALL["chatml"])
    own = load_renderer(str(folder))
    sample = make_samples(own)[0]
    end, eos = own.tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
    strange = (7, 300, 8)
    prepare = make_preparer(make_config(folder), own, own)
    for ending in ((end,), (eos,), ()):  # of the last, a limit: all end as the template
        one = dataclasses.replace(sample, response_ids=(*strange, *ending))
        (ready,) = prepare([one])
        assert ready.prompt_ids == sample.prompt_ids
        assert ready.response_ids == (*strange, *own.end_ids) and own.end_ids[0] == end
    # A template that writes the text otherwise gets the text, and so does one behind a prefix.
    trimmed = dataclasses.replace(sample, output=" four", response_ids=strange)
    llama = make_model(tmp_path / "llama", ALL["llama 3"])
    other = load_renderer(str(llama))
    (ready,) = make_preparer(make_config(llama), other, other)([trimmed])
    assert ready.response_ids == other.render_response("four")
    config = make_config(folder)
    config = dataclasses.replace(
        config, sampling=dataclasses.replace(config.sampling, prefix="<think>")
    )
    (ready,) = make_preparer(config, own, own)([one])
    assert list(ready.prompt_ids + ready.response_ids) == render_by_transformers(folder, one)


@pytest.mark.parametrize(
    ("mark", "setting", "closed"),
    [
        (None, "auto", True),
        ("template_end", "auto", True),
        ("end_of_turn", "auto", False),
        ("end_of_turn", "template_end", True),
        (None, "end_of_turn", False),
    ],
)
def test_where_a_model_was_trained_it_is_read(tmp_path, mark, setting, closed):
    folder = make_model(tmp_path / "model", ALL["chatml"], mark=mark)
    own = load_renderer(str(folder))
    samples = make_samples(own)[:2]
    finished, cut = make_preparer(make_config(folder, read_at=setting), own, own)(samples)
    if closed:
        assert finished.response_ids == (*samples[0].response_ids, *own.end_ids[1:])
        assert cut.response_ids == (*samples[1].response_ids, *own.end_ids)
    else:
        assert [finished, cut] == samples
    other = load_renderer(str(make_model(tmp_path / "other", ALL["llama 3"])))
    again = make_preparer(make_config(folder, read_at=setting), other, own)(make_samples(other)[:2])
    assert [one.response_ids for one in again] == [finished.response_ids, cut.response_ids]


def test_padding_that_ends_the_template_is_not_read_and_said(tmp_path, caplog):
    folder = make_model(tmp_path / "model", ALL["mistral"], pad="</s>")
    own = load_renderer(str(folder))
    with caplog.at_level(logging.INFO):
        prepare = make_preparer(make_config(folder), own, own)
    assert "padding token is also the last of its template" in caplog.text
    (ready,) = prepare(make_samples(own)[:1])
    assert own.tokenizer.decode(ready.response_ids) == " four"
    caplog.clear()
    with caplog.at_level(logging.INFO):
        folder = make_model(tmp_path / "chatml", ALL["chatml"], pad="</s>")
        own = load_renderer(str(folder))
        make_preparer(make_config(folder), own, own)
    assert "padding" not in caplog.text and "read at the last token of its template" in caplog.text


def test_what_does_not_fit_leaves_the_end_of_the_prompt(tmp_path):
    folder = make_model(tmp_path / "model", ALL["chatml"])
    own = load_renderer(str(folder))
    other = load_renderer(str(make_model(tmp_path / "other", ALL["llama 3"])))
    long = (Turn("user", "x" * 100), Turn("assistant", "b"), Turn("user", "last"))
    sample = dataclasses.replace(make_samples(other)[0], prompt=Prompt("p", long))
    (ready,) = make_preparer(make_config(folder, max_length=40), other, own)([sample])
    assert ready.prompt_ids == own.render_prompt(long[-1:], 99)


def test_options_of_the_reward_models_template_are_its_own(tmp_path):
    folder = make_model(tmp_path / "model", TEMPLATES["qwen 3"])
    options = {"enable_thinking": False}
    reward = RewardConfig(path=str(folder), chat_template_options=options)
    renderer = read_at.load_reward_renderer(reward)
    assert renderer.template == set_options(TEMPLATES["qwen 3"], options)
    plain = read_at.load_reward_renderer(RewardConfig(path=str(folder)))
    assert plain.template == TEMPLATES["qwen 3"]
    assert set(SPECIAL) <= set(plain.tokenizer.get_vocab())
