"""What is exported ends elsewhere as it ends here, and is scored as it is here."""

import json

import jax
import numpy as np
import pytest

from halos_jax import sharding
from halos_jax.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    SamplingConfig,
    TrainConfig,
)
from halos_jax.data.chat.loading import load_renderer
from halos_jax.models.files import hf
from halos_jax.policies.policy import find_policy
from halos_jax.rewards.scorers import make_scorer
from halos_jax.sampling.sampler import make_sampler, sample_shard
from halos_jax.tasks.train import run_training
from halos_jax.types import FINISH_LENGTH, FINISH_STOP, Prompt, Sample, Turn
from halos_jax.workdir.interrupt import StopSignal
from tests.data.chat.test_template import SPECIAL, TEMPLATES, make_tokenizer
from tests.models.hf.test_family_table import CASES, SMALL

QUESTIONS = ("what is 1?", "what is 2?", "what is 3?", "what is 4?")
OWN = TEMPLATES["chatml"].replace("<|im_end|>", "<|end|>")
# Kind -> the tokenizer's template, its end token, special tokens, a template file, added tokens.
KINDS = {
    "instruct": (TEMPLATES["chatml"], "<|im_end|>", SPECIAL, "", ()),
    "base": (TEMPLATES["chatml"], "</s>", SPECIAL, "", ()),
    "base, default": (None, "</s>", SPECIAL, "", ()),
    "base, own": (None, "</s>", SPECIAL, OWN, ()),
    "base, added": (None, "</s>", SPECIAL[:2], "", ("<|im_start|>", "<|im_end|>")),
    "base, text": (None, "</s>", SPECIAL[:2], "", ()),  # the end marker is no token
    "thinker": (TEMPLATES["qwq"], "<|im_end|>", SPECIAL, "", ()),
}


def make_model(folder, family, kind):
    """Write a random model of transformers, whose files know of the tokenizer's eos alone."""
    torch = pytest.importorskip("torch")
    import transformers

    template, eos, special, _, _ = KINDS[kind]
    tokenizer = make_tokenizer(template, special)
    tokenizer.eos_token = eos
    tokenizer.save_pretrained(folder)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0, "bos_token_id": None}
    sizes = {"vocab_size": 288, "max_position_embeddings": 256, "initializer_range": 0.05}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **(SMALL | CASES[family][0] | sizes | ids))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def make_config(folder, task, model, records, **changes) -> Config:
    (folder / "train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return Config(
        task=task,
        workdir=str(folder / "run"),
        progress=False,
        model=ModelConfig(path=str(model), compute_dtype="float32", remat="none", **changes),
        data=DataConfig(train=str(folder / "train.jsonl")),
        sampling=SamplingConfig(max_prompt_length=100),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0),
        train=TrainConfig(batch_size=4, max_length=160, epochs=50, row_multiple=64, log_every=50),
    )


def sample_here(folder, mesh):
    """Return what our sampler draws greedily from an exported model, and its prompts' ids."""
    policy = find_policy(ModelConfig(path=str(folder), compute_dtype="float32"))
    decoder, renderer = policy.decoder, policy.renderer
    settings = SamplingConfig(
        num_samples_per_prompt=1, temperature=0.0, max_tokens=40, max_prompt_length=100, slots=8
    )
    prompts = [Prompt(text, (Turn("user", text),)) for text in QUESTIONS]
    with jax.set_mesh(mesh):
        sampler = make_sampler(settings, renderer, decoder, mesh)
        weights = sampler.unstack(hf.load_params(str(folder), decoder, mesh))
        return sample_shard(sampler, weights, prompts, seed=0, round=1)


def check_generation(folder, mesh, *, text=False):
    torch = pytest.importorskip("torch")
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    samples = sample_here(folder, mesh)
    for sample in samples:
        chat = [{"role": "user", "content": sample.prompt.turns[0].content}]
        ids = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert tuple(ids["input_ids"][0].tolist()) == sample.prompt_ids
        options = {"tokenizer": tokenizer} if text else {}
        with torch.no_grad():
            found = model.generate(**ids, max_new_tokens=40, do_sample=False, **options)
        assert tuple(found[0, len(sample.prompt_ids) :].tolist()) == sample.response_ids
    assert {sample.finish_reason for sample in samples} == {FINISH_STOP}, "nothing was learned"
    assert all(sample.output.strip().endswith("!") for sample in samples)


@pytest.fixture
def one_device(monkeypatch, mesh1):
    """Let a task run on one device, and return its mesh.

    On the eight virtual devices, on a loaded machine of two cores, XLA has ended the process here
    ("Aborted") after a collective operation had waited 40 s for all of them. Why it waits is not
    known; on one device it has not been seen. What is exported from a mesh is held in
    `tests/models/files/test_export.py`.
    """
    monkeypatch.setattr(sharding, "make_mesh", lambda config: mesh1)
    return mesh1


def run(tmp_path, mesh, family, kind):
    model = make_model(tmp_path / "model", family, kind)
    *_, template, added = KINDS[kind]
    changes = {"added_tokens": added}
    if template:
        (tmp_path / "own.jinja").write_text(template)
        changes["chat_template"] = str(tmp_path / "own.jinja")
    records = [{"prompt": text, "completion": f"it is {text[8]}!"} for text in QUESTIONS]
    config = make_config(tmp_path, "sft", model, records, **changes)
    run_training(config, StopSignal())
    check_generation(tmp_path / "run" / "final", mesh, text=kind == "base, text")


def test_generation_ends_elsewhere_as_here(tmp_path, one_device):
    run(tmp_path, one_device, "qwen2", "base")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", CASES)
def test_generation_of_every_family_ends_elsewhere_as_here(tmp_path, one_device, family, kind):
    run(tmp_path, one_device, family, kind)


@pytest.mark.slow
def test_a_reward_model_is_scored_elsewhere_as_here(tmp_path, one_device):
    torch = pytest.importorskip("torch")
    import transformers

    model = make_model(tmp_path / "model", "qwen2", "instruct")
    records = [{"prompt": text, "chosen": "yes!", "rejected": "no"} for text in QUESTIONS]
    run_training(make_config(tmp_path, "reward_model", model, records), StopSignal())
    final = tmp_path / "run" / "final"
    assert json.loads((final / "config.json").read_text())["halos_jax_read_at"] == "template_end"
    renderer = load_renderer(str(final))
    samples = []
    for number, text in enumerate(("yes!", "no", "maybe")):
        turns = (Turn("user", QUESTIONS[0]),)
        reason = FINISH_LENGTH if text == "maybe" else FINISH_STOP
        ids = renderer.render_response(text, finished=text != "maybe")
        prompt = renderer.render_prompt(turns, 100)
        samples.append(Sample(Prompt("p", turns), number, text, prompt, ids, reason))
    config = make_config(tmp_path, "label", model, records)
    config = Config(
        progress=False,
        reward=RewardConfig(path=str(final), compute_dtype="float32"),
        sampling=config.sampling,
        train=config.train,
    )
    with jax.set_mesh(one_device):
        scores = make_scorer(config, one_device, renderer)(samples)
    tokenizer = transformers.AutoTokenizer.from_pretrained(final)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(final).eval()
    expected = []
    for sample in samples:
        chat = [{"role": "user", "content": QUESTIONS[0]}]
        chat.append({"role": "assistant", "content": sample.output})
        ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            expected.append(float(classifier(**ids).logits[0, 0]))
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-3)
    assert scores[0] > scores[1] + 1, "nothing was learned"
