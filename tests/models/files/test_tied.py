"""A head stored under a config that ties: read where it is another, as transformers 5 reads it."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from halos_jax.config import ModelConfig
from halos_jax.models.files import export, hf
from halos_jax.models.files.tied import has_own_head, share_embedding
from halos_jax.models.hf.family_table import FAMILIES
from tests.logits import compute_logits

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LLAMA = FAMILIES["llama"]
TOKENS = np.random.default_rng(0).integers(3, 61, (2, 9))


class Stored:
    """A tensor as an opened file has it."""

    def __init__(self, values):
        self.values = values

    def get_shape(self):
        return list(self.values.shape)

    def __getitem__(self, index):
        return self.values[index]


def test_a_head_is_its_own_where_one_bit_differs():
    values = np.random.default_rng(0).normal(size=(10_000, 2)).astype(ml_dtypes.bfloat16)
    values[3] = np.nan
    other = values.copy()
    both = {EMBED: Stored(values), HEAD: Stored(other)}
    assert not has_own_head(both, LLAMA)
    other[9_999, 1] += 1
    assert has_own_head(both, LLAMA)
    assert has_own_head({**both, HEAD: Stored(values[:-1])}, LLAMA)
    whole = values[4:].astype(np.float32)
    assert not has_own_head({EMBED: Stored(values[4:]), HEAD: Stored(whole)}, LLAMA)
    assert not has_own_head({EMBED: Stored(values)}, LLAMA)
    assert not has_own_head({HEAD: Stored(values)}, LLAMA)


def test_a_head_alone_is_the_embedding_too():
    alone = {HEAD: Stored(np.ones((2, 2))), "x": 1}
    assert share_embedding(alone, LLAMA) == {EMBED: alone[HEAD], "x": 1}
    both = {HEAD: 1, EMBED: 2}
    assert share_embedding(both, LLAMA) == both


@pytest.fixture
def tied(tmp_path):
    """Write a tied model of transformers; return its folder and a change of its tensors."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")

    def change(edit):
        file = tmp_path / "model" / "model.safetensors"
        tensors = dict(load_file(file))
        edit(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        return tmp_path / "model"

    return change


def run_theirs(folder):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def run_ours(folder, mesh):
    settings = ModelConfig(params_dtype="float32", compute_dtype="float32")
    config = hf.load_decoder_config(str(folder), settings)
    params = hf.load_params(str(folder), config, mesh)
    return compute_logits(params, TOKENS, np.array([9, 9]), config), params, config


def test_another_head_is_read_said_and_exported_untied(tied, tmp_path, mesh1, caplog):
    head = np.random.default_rng(1).normal(size=(61, 32)).astype(np.float32)
    folder = tied(lambda tensors: tensors.update({HEAD: head}))
    logits, params, config = run_ours(folder, mesh1)
    np.testing.assert_array_equal(params["head"], head)
    np.testing.assert_allclose(logits, run_theirs(folder), rtol=1e-4, atol=1e-5)
    assert f"{folder}: has a head of its own though config.json ties it" in caplog.text
    export.save_model(params, config, tmp_path / "out", source=folder)
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )
    np.testing.assert_allclose(run_theirs(tmp_path / "out"), logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(run_ours(tmp_path / "out", mesh1)[0], logits)


@pytest.mark.parametrize("kind", ["equal", "head alone", "embedding alone"])
def test_one_array_under_one_name_or_two_stays_tied(tied, mesh1, kind, caplog):
    def edit(tensors):
        if kind != "embedding alone":
            tensors[HEAD] = tensors[EMBED].copy()
        if kind == "head alone":
            del tensors[EMBED]

    folder = tied(edit)
    logits, params, config = run_ours(folder, mesh1)
    assert config.tie_embeddings and "head" not in params and "own" not in caplog.text
    np.testing.assert_allclose(logits, run_theirs(folder), rtol=1e-4, atol=1e-5)


def test_drawn_weights_and_folders_without_any_are_as_config_json_says(tied):
    folder = tied(lambda tensors: tensors.update({HEAD: np.ones((61, 32), np.float32)}))
    drawn = ModelConfig(path=str(folder), random_init=True)
    assert hf.load_decoder_config(str(folder), drawn).tie_embeddings
    (folder / "model.safetensors").unlink()
    assert hf.load_decoder_config(str(folder)).tie_embeddings
