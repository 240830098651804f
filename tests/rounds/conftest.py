"""A tiny model of the toy task, for the tests that run a whole task in this process."""

import json
import shutil

import jax
import pytest

from halos_jax.config import ModelConfig, ToyConfig
from halos_jax.data.toy import make_toy_data
from halos_jax.models import spec
from halos_jax.models.files import export, hf

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.1,
}


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Return a folder with the toy data, base/ (no weights) and policy/ (random weights)."""
    folder = tmp_path_factory.mktemp("toy")
    sizes = ToyConfig(num_sft=64, num_pairs=8, num_prompts=12, num_eval=16, mistakes=0.0)
    make_toy_data(folder, sizes, seed=0)
    file = folder / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | SMALL))
    config = hf.load_decoder_config(str(folder / "base"))
    params = spec.init_params(jax.random.key(0), config)
    export.save_model(params, config, folder / "policy", source=folder / "base")
    return folder


@pytest.fixture
def short(toy, tmp_path):
    """Return a policy whose rotary embedding holds for sequences of 12 tokens at most."""
    folder = tmp_path / "short"
    shutil.copytree(toy / "policy", folder)
    made = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 12}
    made["rope_scaling"] = {"rope_type": "dynamic", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(made))
    return ModelConfig(path=str(folder), compute_dtype="float32", remat="none")
