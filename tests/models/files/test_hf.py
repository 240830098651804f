"""Import against checkpoints written by hand and by transformers; every refusal."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from halos_jax.config import ModelConfig
from halos_jax.models import spec
from halos_jax.models.files import hf
from halos_jax.models.hf.families import ModelError

SETTINGS = ModelConfig(params_dtype="float32", compute_dtype="float32")
HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 20,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}
HEAD, Q1 = "lm_head.weight", "model.layers.1.self_attn.q_proj.weight"


def make_tensors(dtype=np.float32):
    """Return a random checkpoint of HF_CONFIG under transformers' names, [out, in]."""
    shapes = {"model.embed_tokens": (48, 16), "model.norm": (16,), "lm_head": (48, 16)}
    for layer in range(3):
        shapes |= {
            f"model.layers.{layer}.{name}": shape
            for name, shape in {
                "input_layernorm": (16,),
                "self_attn.q_proj": (24, 16),
                "self_attn.k_proj": (12, 16),
                "self_attn.v_proj": (12, 16),
                "self_attn.o_proj": (16, 24),
                "post_attention_layernorm": (16,),
                "mlp.gate_proj": (20, 16),
                "mlp.up_proj": (20, 16),
                "mlp.down_proj": (16, 20),
            }.items()
        }
    random = np.random.default_rng(0)
    return {f"{name}.weight": random.normal(size=s).astype(dtype) for name, s in shapes.items()}


def convert(tensors, num_layers=3, heads=4, kv_heads=2):
    """Return a checkpoint in our layout, spelled out array by array."""

    def stack(name):
        return [tensors[f"model.layers.{layer}.{name}.weight"] for layer in range(num_layers)]

    def split(name, count):
        return np.stack([w.T.reshape(w.shape[1], count, -1) for w in stack(name)])

    attention = "self_attn"
    layers = {
        "attention_norm": np.stack(stack("input_layernorm")),
        "mlp_norm": np.stack(stack("post_attention_layernorm")),
        "q": split(f"{attention}.q_proj", heads),
        "k": split(f"{attention}.k_proj", kv_heads),
        "v": split(f"{attention}.v_proj", kv_heads),
        "o": np.stack([w.T.reshape(heads, -1, w.shape[0]) for w in stack(f"{attention}.o_proj")]),
        **{name: np.stack([w.T for w in stack(f"mlp.{name}_proj")]) for name in _MLP},
    }
    outer = {"embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
    outer["score"] = "score"
    found = {our: tensors.get(f"{their}.weight") for our, their in outer.items()}
    return {"layers": layers, **{our: value for our, value in found.items() if value is not None}}


_MLP = ("gate", "up", "down")


def write_model(folder, tensors, metadata=None, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**HF_CONFIG, **changes}))
    save_file(tensors, folder / "model.safetensors", metadata=metadata)
    return str(folder)


def load(path, mesh, settings=SETTINGS, **options):
    return hf.load_params(path, hf.load_decoder_config(path, settings), mesh, **options)


def assert_equal(got, expected):
    got, expected = (traverse_util.flatten_dict(tree, sep="/") for tree in (got, expected))
    assert got.keys() == expected.keys()
    for name in got:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


def test_every_array_on_one_device_and_on_eight(tmp_path, mesh, mesh1):
    tensors = make_tensors()
    path = write_model(tmp_path / "model", tensors)
    config = hf.load_decoder_config(path, SETTINGS)
    wide = jax.make_mesh((1, 4, 2), mesh.axis_names, axis_types=mesh.axis_types)
    for where in (mesh1, mesh, wide):
        params = hf.load_params(path, config, where)
        assert_equal(params, convert(tensors))
        assert jax.tree.map(lambda x: x.sharding, params) == spec.params_shardings(config, where)


@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
def test_types_are_converted_as_numpy_does(tmp_path, mesh, stored, asked):
    tensors = make_tensors(stored)
    path = write_model(tmp_path / "model", tensors)
    params = load(path, mesh, dataclasses.replace(SETTINGS, params_dtype=asked))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {asked}
    assert_equal(params, jax.tree.map(lambda x: x.astype(asked), convert(tensors)))


def test_what_config_json_says_and_is_not_read_is_said_once(tmp_path, caplog):
    said = {"num_key_value_head": 2, "use_cache": True, "halos_jax_read_at": "end_of_turn"}
    path = write_model(tmp_path / "model", make_tensors(), **said)
    for _ in range(2):
        hf.load_decoder_config(path, SETTINGS)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message == f"{path}/config.json: not read here: num_key_value_head = 2"


def test_shards_with_an_index(tmp_path, mesh):
    tensors = make_tensors()
    path = write_model(tmp_path / "model", tensors)
    (tmp_path / "model" / "model.safetensors").unlink()
    weight_map = {}
    for number in range(3):
        file = f"model-{number}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[number::3]}
        save_file(part, tmp_path / "model" / file)
        weight_map |= dict.fromkeys(part, file)
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert_equal(load(path, mesh), convert(tensors))

    (tmp_path / "model" / "model-1.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-1.safetensors: missing, though .* names it"):
        load(path, mesh)
    index.write_text("[]")
    with pytest.raises(ModelError, match=r"index.json: no 'weight_map'"):
        load(path, mesh)


def test_a_tied_head_and_old_rope_buffers_are_ignored(tmp_path, mesh1):
    tensors = make_tensors()
    inv_freq = np.ones(3, np.float32)
    tensors[HEAD] = tensors["model.embed_tokens.weight"].copy()
    stored = tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": inv_freq}
    path = write_model(tmp_path / "model", stored, tie_word_embeddings=True)
    del tensors[HEAD]
    assert_equal(load(path, mesh1), convert(tensors))


def test_a_language_model_becomes_a_reward_model(tmp_path, mesh, mesh1):
    tensors = make_tensors()
    path = write_model(tmp_path / "model", tensors)
    config = dataclasses.replace(hf.load_decoder_config(path, SETTINGS), num_labels=1)
    with pytest.raises(ModelError, match=r"score.weight: missing"):
        hf.load_params(path, config, mesh1)
    params = hf.load_params(path, config, mesh, allow_new=("score",))
    score = np.asarray(params.pop("score"))
    assert score.shape == (1, 16) and 0.005 < score.std() < 0.05
    del tensors[HEAD]
    assert_equal(params, convert(tensors))
    again = hf.load_params(path, config, mesh1, allow_new=("score",))
    np.testing.assert_array_equal(again["score"], score)


def test_a_stored_classifier_is_loaded_not_drawn(tmp_path, mesh1):
    tensors = make_tensors()
    del tensors[HEAD]
    tensors["score.weight"] = np.ones((2, 16), np.float32)
    path = write_model(
        tmp_path / "model", tensors, architectures=["LlamaForSequenceClassification"]
    )
    assert_equal(load(path, mesh1, allow_new=("score",)), convert(tensors))


def test_random_init_takes_only_the_architecture(tmp_path, mesh):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(HF_CONFIG))
    settings = dataclasses.replace(SETTINGS, path=str(folder), random_init=True)
    config = hf.load_decoder_config(str(folder), settings)
    params = hf.load_or_init_params(settings, config, mesh, 5)
    assert jax.tree.map(lambda x: x.sharding, params) == spec.params_shardings(config, mesh)
    expected = spec.init_params(jax.random.key(5), config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, expected)

    path = write_model(folder, make_tensors())
    settings = dataclasses.replace(settings, random_init=False)
    loaded = hf.load_or_init_params(settings, config, mesh, 5)
    assert_equal(loaded, load(path, mesh))


# --------------------------------------------------------------------------- refusals


def test_all_wrong_tensors_are_listed_together(tmp_path, mesh1):
    tensors = make_tensors()
    del tensors[HEAD], tensors["model.layers.2.mlp.up_proj.weight"]
    for layer in range(3):
        del tensors[f"model.layers.{layer}.mlp.down_proj.weight"]
    tensors[Q1] = np.zeros((24, 15), np.float32)
    tensors["model.norm.weight"] = np.zeros(16, np.int8)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(24, np.float32)
    path = write_model(tmp_path / "model", tensors)
    with pytest.raises(ModelError) as caught:
        load(path, mesh1)
    for line in (
        "lm_head.weight: missing",
        "model.layers.2.mlp.up_proj.weight: missing",
        "model.layers.*.mlp.down_proj.weight: missing (layers 0, 1, 2)",
        f"{Q1}: got shape (24, 15), config.json asks for (24, 16)",
        "model.norm.weight: got type I8, allowed: BF16, F16, F32, F64",
        "model.layers.0.self_attn.q_proj.bias: unexpected",
    ):
        assert f"\n  {line}\n" in str(caught.value)


@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_a_truncated_file_is_named(tmp_path, mesh1, size):
    path = write_model(tmp_path / "model", make_tensors())
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ModelError) as caught:
        load(path, mesh1)
    assert str(file) in str(caught.value) and "truncated or damaged" in str(caught.value)


def test_a_damaged_header_is_named(tmp_path, mesh1):
    path = write_model(tmp_path / "model", make_tensors())
    file = tmp_path / "model" / "model.safetensors"
    stored = file.read_bytes()
    file.write_bytes(stored[:8] + b"x" * 32 + stored[40:])
    with pytest.raises(ModelError, match=r"header.* bytes and is truncated or damaged: download"):
        load(path, mesh1)


def test_pickled_weights_and_empty_folders_are_refused(tmp_path, mesh1):
    path = write_model(tmp_path / "model", make_tensors())
    file = tmp_path / "model" / "model.safetensors"
    file.rename(file.with_name("pytorch_model.bin"))
    with pytest.raises(ModelError, match=r"got pytorch_model.bin\. Other formats are not read"):
        load(path, mesh1)
    (tmp_path / "model" / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"got no weight file"):
        load(path, mesh1)
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config.json: cannot be read as JSON"):
        load(path, mesh1)
    (tmp_path / "model" / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"config.json: got list, allowed: an object"):
        load(path, mesh1)
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config.json: missing"):
        load(path, mesh1)


@pytest.mark.parametrize("path", ["", "no/such-model", "/no/such/folder", "../gone"])
def test_neither_folder_nor_hub_id(path):
    with pytest.raises(ModelError) as caught:
        hf.resolve_model(path)
    assert f"model {path!r} not found: there is no such folder" in str(caught.value)
    assert "repo_type" not in str(caught.value) or path in ("", "no/such-model")
    assert "hub" in str(caught.value) and "\n" not in str(caught.value)


def test_a_hub_id_is_downloaded_without_code_or_pickles(tmp_path, monkeypatch):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(hf.huggingface_hub, "snapshot_download", download)
    assert hf.resolve_model("owner/model") == tmp_path
    assert asked["name"] == "owner/model"
    repository = ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"]
    unwanted = ["model.py", "pytorch_model.bin", "a.pkl", "original/consolidated.safetensors"]
    kept = hf.huggingface_hub.utils.filter_repo_objects(
        [*repository, *unwanted],
        allow_patterns=list(asked["allow_patterns"]),
        ignore_patterns=asked["ignore_patterns"],
    )
    assert list(kept) == repository


# --------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("shard_size", ["5GB", "6KB"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["tied", "untied", "classifier"])
def test_what_transformers_saves_is_loaded(tmp_path, mesh, kind, dtype, shard_size):
    torch = pytest.importorskip("torch")
    import transformers

    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = transformers.LlamaConfig(
        **{
            name: HF_CONFIG[name]
            for name in HF_CONFIG
            if name not in ("architectures", "rope_theta")
        }
        | {"tie_word_embeddings": kind == "tied", "rope_parameters": scaling}
    )
    config.num_labels = 1 if kind == "classifier" else 2
    made = {
        "classifier": transformers.LlamaForSequenceClassification,
    }.get(kind, transformers.LlamaForCausalLM)(config)
    made = made.to(getattr(torch, dtype))
    made.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "6KB")

    ours = hf.load_decoder_config(str(tmp_path), dataclasses.replace(SETTINGS, params_dtype=dtype))
    assert ours.rope.kind == "llama3" and ours.rope.theta == 500_000 and ours.rope.factor == 4
    assert ours.num_labels == (1 if kind == "classifier" else 0)
    assert ours.tie_embeddings == (kind == "tied")
    tensors = {
        name: value.to(torch.float32).numpy().astype(dtype)
        for name, value in made.state_dict().items()
        if not (kind == "tied" and name == HEAD)
    }
    assert_equal(hf.load_params(str(tmp_path), ours, mesh), convert(tensors))
    stored = {name for file in tmp_path.glob("*.safetensors") for name in load_file(file)}
    assert stored == set(tensors)
