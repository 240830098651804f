"""The text model of a model of text and images: loaded, exported and adapted as itself."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from halos_jax.config import LoraConfig, ModelConfig
from halos_jax.models import lora
from halos_jax.models.files import export, hf, peft
from halos_jax.models.files.text_model import take_text_config, take_text_tensors
from halos_jax.models.hf.families import ModelError
from halos_jax.models.hf.family_table import FAMILIES
from tests.logits import compute_logits, encode_rows

TOKENS = np.random.default_rng(0).integers(3, 58, (2, 9))
LENGTHS = np.array([9, 9])
TEXT = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"],
}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
PUBLISHED = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    | {"model_type": "gemma3_text", "sliding_window": 1024}
    | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1152},
}


def write(folder, kind="ConditionalGeneration"):
    """Write a random model of text and images; return it."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    config = transformers.Gemma3Config(
        text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, image_token_index=60
    )
    config.num_labels = 1
    model = getattr(transformers, f"Gemma3For{kind}")(config).eval()
    model.save_pretrained(folder)
    return model


def run_theirs(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def load(folder, mesh):
    settings = ModelConfig(params_dtype="float32", compute_dtype="float32")
    config = hf.load_decoder_config(str(folder), settings)
    return hf.load_params(str(folder), config, mesh), config


def run(params, config):
    return np.asarray(compute_logits(params, TOKENS, LENGTHS, config))


def test_the_published_config_leaves_out_what_the_class_has():
    made = take_text_config(PUBLISHED)
    assert made["architectures"] == ["Gemma3ForCausalLM"] and made["eos_token_id"] == [1, 106]
    assert (made["model_type"], made["vocab_size"]) == ("gemma3_text", 262_208)
    config = hf.families.make_decoder_config(made)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
    assert config.rope.kind == "linear" and config.windows[:6] == (1024,) * 5 + (0,)
    assert hf.find_max_positions(made) == 131_072


def test_text_is_run_and_exported_as_by_transformers(tmp_path, mesh1, caplog):
    expected = run_theirs(write(tmp_path / "model"))
    caplog.set_level("INFO")
    params, config = load(tmp_path / "model", mesh1)
    assert "tensors of images are left out" in caplog.text
    logits = run(params, config)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)

    export.save_model(params, config, tmp_path / "out", source=tmp_path / "model")
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (made["model_type"], made["architectures"]) == ("gemma3_text", ["Gemma3ForCausalLM"])
    import transformers

    text = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    assert type(text).__name__ == "Gemma3ForCausalLM"
    np.testing.assert_allclose(run_theirs(text.eval()), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(run(*load(tmp_path / "out", mesh1)), logits)


def test_every_spelling_of_the_names_is_read(tmp_path, mesh1):
    write(tmp_path / "model")
    expected = run(*load(tmp_path / "model", mesh1))
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    inside = {
        name.replace("language_model.model.", "model.language_model.")
        if name.startswith("language_model.")
        else f"model.{name}": value
        for name, value in tensors.items()
    }
    save_file(inside, file)
    np.testing.assert_array_equal(run(*load(tmp_path / "model", mesh1)), expected)
    twice = {"language_model.model.norm.weight": 1, "model.language_model.norm.weight": 2}
    with pytest.raises(ModelError, match=r"'model.norm.weight' of the text model stands under two"):
        take_text_tensors(PUBLISHED, twice)


def test_a_classifier_has_its_score(tmp_path, mesh1):
    expected = run_theirs(write(tmp_path / "model", "SequenceClassification"))
    params, config = load(tmp_path / "model", mesh1)
    assert config.num_labels == 1
    hidden = encode_rows(params, TOKENS, LENGTHS, config)
    np.testing.assert_allclose(hidden[:, -1] @ params["score"].T, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "down_proj")])
def test_an_adapter_fits_the_whole_model_for_peft(tmp_path, mesh1, targets):
    theirs = pytest.importorskip("peft")
    base = write(tmp_path / "model")
    params, config = load(tmp_path / "model", mesh1)
    family = FAMILIES["gemma3_text"]
    settings = LoraConfig(rank=3, alpha=5.0, dropout=0.0, targets=targets)
    frozen = lora.Frozen(params, lora.make_adapter(settings, config, family, seed=0))
    rng = np.random.default_rng(1)
    adapter = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, leaf.dtype),
        lora.abstract_trained(config, mesh1, frozen.adapter),
    )
    path = str(tmp_path / "model")
    peft.write_adapter(adapter, frozen, config, tmp_path / "adapter", base=path)
    merged = theirs.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ours = run(lora.attach_adapter(adapter, frozen), config)
    np.testing.assert_allclose(run_theirs(merged), ours, rtol=1e-4, atol=1e-5)
    names = {name for name, _ in merged.named_parameters() if "lora_" in name}
    assert len(names) == 2 * 2 * len(frozen.adapter.modules)  # none of the images' part

    read = peft.read_adapter(str(tmp_path / "adapter"), config, family, dropout=0.0, seed=0)
    assert read == dataclasses.replace(frozen.adapter, dropout=0.0)
    again = peft.load_adapter(str(tmp_path / "adapter"), frozen, config, family, mesh1)
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_config": None}, "text_config: got None, allowed: an object"),
        ({"text_config": [1]}, r"text_config: got \[1\], allowed: an object"),
        ({"text_config": {"model_type": "llama"}}, "text_config.model_type: got 'llama', allowed"),
        ({"text_config": {"model_type": ["x"]}}, r"text_config.model_type: got \['x'\], allowed"),
        ({"architectures": ["Gemma3Model"]}, r"architectures: got \['Gemma3Model'\], allowed"),
        ({"architectures": "Gemma3Model"}, "architectures: got 'Gemma3Model', allowed: a list"),
        ({"architectures": [[1]]}, r"architectures: got \[\[1\]\], allowed: a list of strings"),
    ],
)
def test_what_is_no_text_model_is_refused(fields, message):
    with pytest.raises(ModelError, match=message):
        hf.families.make_decoder_config(take_text_config(PUBLISHED | fields))
