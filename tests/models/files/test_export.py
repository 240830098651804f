"""Export: bit-identical round trips, what transformers makes of it, and atomicity."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors import safe_open

from halos_jax.config import ModelConfig
from halos_jax.models import spec
from halos_jax.models.files import export, hf
from halos_jax.models.files.export import save_model
from halos_jax.models.hf.families import ModelError
from halos_jax.models.spec import DecoderConfig, RopeConfig

CONFIG = DecoderConfig(
    vocab_size=48,
    num_layers=3,
    d_model=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    d_mlp=20,
    rope=RopeConfig(500_000.0, "llama3", 4.0, 1.0, 4.0, 64),
)


def make_params(mesh, config=CONFIG, seed=0):
    """Return random params (norms too) on `mesh`."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jax.device_put(
            random.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding
        ),
        spec.abstract_params(config, mesh),
    )


def assert_equal(got, expected):
    got, expected = (traverse_util.flatten_dict(tree, sep="/") for tree in (got, expected))
    assert got.keys() == expected.keys()
    for name in got:
        assert got[name].dtype == expected[name].dtype, name
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


def read_bytes(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def load(folder, mesh, dtype="float32"):
    settings = ModelConfig(params_dtype=dtype, compute_dtype="float32")
    config = hf.load_decoder_config(str(folder), settings)
    return hf.load_params(str(folder), config, mesh), config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"num_labels": 2}])
def test_import_export_import_changes_no_bit(tmp_path, mesh, mesh1, changes, dtype):
    config = dataclasses.replace(CONFIG, params_dtype=dtype, **changes)
    params = make_params(mesh, config)
    save_model(params, config, tmp_path / "a", source=None)
    loaded, read = load(tmp_path / "a", mesh1, dtype)
    assert_equal(loaded, params)
    with jax.set_mesh(mesh1):
        save_model(loaded, read, tmp_path / "b", source=tmp_path / "a")
    assert read_bytes(tmp_path / "a") == read_bytes(tmp_path / "b")  # 8 devices against 1


def test_shards_and_their_index(tmp_path, mesh):
    params = make_params(mesh)
    save_model(params, CONFIG, tmp_path / "whole", source=None)
    save_model(params, CONFIG, tmp_path / "split", source=None, max_shard_bytes=5000)
    files = sorted((tmp_path / "split").glob("*.safetensors"))
    assert len(files) > 2 and not (tmp_path / "split" / "model.safetensors").exists()
    index = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * spec.count_params(CONFIG)
    found = {}
    for number, file in enumerate(files, 1):
        assert file.name == f"model-{number:05d}-of-{len(files):05d}.safetensors"
        with safe_open(file, "numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
            names = list(opened.keys())
            found |= dict.fromkeys(names, file.name)
            size = sum(opened.get_tensor(name).nbytes for name in names)
            assert size <= 5000 or len(names) == 1
    assert found == index["weight_map"]
    assert_equal(load(tmp_path / "split", mesh)[0], load(tmp_path / "whole", mesh)[0])


def test_export_to_another_dtype(tmp_path, mesh):
    params = make_params(mesh)
    save_model(params, CONFIG, tmp_path / "model", source=None, dtype="bfloat16")
    loaded, _ = load(tmp_path / "model", mesh, "bfloat16")
    assert_equal(loaded, jax.tree.map(lambda x: np.asarray(x).astype("bfloat16"), params))
    assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    with pytest.raises(ModelError, match=r"export dtype: got 'int8', allowed: float32"):
        save_model(params, CONFIG, tmp_path / "other", source=None, dtype="int8")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_dtype_of_a_model_is_found_as_transformers_finds_it(tmp_path, mesh1):
    """By config.json, and without a word of it there by the first tensor."""
    params = make_params(mesh1)
    for dtype in ("float32", "bfloat16"):
        folder = tmp_path / dtype
        save_model(params, CONFIG, folder, source=None, dtype=dtype)
        assert export.find_dtype(folder) == dtype
        path = folder / "config.json"
        plain = json.loads(path.read_text())
        del plain["torch_dtype"]
        path.write_text(json.dumps(plain))
        assert export.find_dtype(folder) == dtype
        for given, expected in (("float16", "float16"), ("float8_e4m3fn", "")):
            path.write_text(json.dumps({**plain, "dtype": given}))
            assert export.find_dtype(folder) == expected


def test_tokenizer_files_travel_and_nothing_else(tmp_path, mesh1):
    source = tmp_path / "source"
    save_model(make_params(mesh1), CONFIG, source, source=None)
    taken = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    taken += ["chat_template.jinja", "generation_config.json", "tokenizer.model", "merges.txt"]
    for name in [*taken, "modeling.py", "pytorch_model.bin", "README.md", "optimizer.json"]:
        (source / name).write_text(name)
    config = dataclasses.replace(CONFIG, num_labels=1)
    save_model(make_params(mesh1, config), config, tmp_path / "out", source=source)
    copied = {
        file.name: file.read_text() for file in (tmp_path / "out").iterdir() if file.name in taken
    }
    assert copied == {name: name for name in taken}
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {*taken, "config.json", "model.safetensors", "halos_jax.json"}
    assert load(tmp_path / "out", mesh1)[1].num_labels == 1


# --------------------------------------------------------------------------- atomicity


def test_an_interrupted_export_leaves_the_old_model(tmp_path, mesh1, monkeypatch):
    old, new = make_params(mesh1, seed=1), make_params(mesh1, seed=2)
    folder = tmp_path / "out" / "model"
    fetch, calls = export.fetch_array, []

    def fail_late(*args):
        calls.append(args)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return fetch(*args)

    monkeypatch.setattr(export, "fetch_array", fail_late)
    with pytest.raises(KeyboardInterrupt):
        save_model(old, CONFIG, folder, source=None)
    assert list(folder.parent.iterdir()) == []
    save_model(old, CONFIG, folder, source=None)
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        save_model(new, CONFIG, folder, source=None)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert_equal(load(folder, mesh1)[0], old)


def test_the_source_is_not_replaced(tmp_path, mesh1):
    params = make_params(mesh1)
    save_model(params, CONFIG, tmp_path / "sft", source=None)
    with pytest.raises(ModelError, match="is the model that the export starts from"):
        save_model(params, CONFIG, tmp_path / "sft", source=tmp_path / "sft")
    assert [path.name for path in tmp_path.iterdir()] == ["sft"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("path", "layer", "name"),
    [
        ("embed", (), "model.embed_tokens.weight"),
        ("layers/down", (1,), r"model.layers.1.mlp.down_proj.weight"),
        ("final_norm", (), "model.norm.weight"),
    ],
)
def test_weights_that_are_not_finite_are_never_exported(tmp_path, mesh1, path, layer, name, value):
    flat = traverse_util.flatten_dict(make_params(mesh1), sep="/")
    flat[path] = flat[path].at[(*layer, -1)].set(value)
    params = traverse_util.unflatten_dict(flat, sep="/")
    with pytest.raises(ModelError, match=rf"export: {name} has values that are NaN or infinite"):
        save_model(params, CONFIG, tmp_path / "model", source=None)
    assert list(tmp_path.iterdir()) == []


def test_a_type_too_narrow_for_the_weights_is_refused(tmp_path, mesh1):
    params = make_params(mesh1)
    params["embed"] = params["embed"].at[3, 3].set(1e5)
    save_model(params, CONFIG, tmp_path / "wide", source=None, dtype="bfloat16")
    with pytest.raises(ModelError, match=r"embed_tokens.weight has .* infinite as float16"):
        save_model(params, CONFIG, tmp_path / "narrow", source=None, dtype="float16")


# --------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("changes", "from_source"),
    [({}, True), ({"tie_embeddings": True}, True), ({"num_labels": 1}, True), ({}, False)],
)
def test_transformers_reloads_the_same_state(tmp_path, mesh, changes, dtype, from_source):
    torch = pytest.importorskip("torch")
    import transformers

    config = dataclasses.replace(CONFIG, params_dtype=dtype, **changes)
    name = "LlamaForSequenceClassification" if config.num_labels else "LlamaForCausalLM"
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 4.0}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    theirs = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        intermediate_size=20,
        rms_norm_eps=1e-5,
        tie_word_embeddings=config.tie_embeddings,
        max_position_embeddings=256,
        rope_parameters=rope | {"original_max_position_embeddings": 64},
    )
    theirs.num_labels = config.num_labels or 2
    model = getattr(transformers, name)(theirs).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "a")
    params, read = load(tmp_path / "a", mesh, dtype)
    save_model(params, read, tmp_path / "b", source=tmp_path / "a" if from_source else None)

    again, info = getattr(transformers, name).from_pretrained(
        tmp_path / "b", dtype="auto", output_loading_info=True
    )
    assert not any(info.values()), info
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for key in before:
        assert before[key].dtype == after[key].dtype and torch.equal(before[key], after[key]), key
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        one, other = (each.eval()(tokens).logits for each in (model, again))
    # Of the same numbers; torch's kernels may round them by where in memory they lie.
    torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2 * float(one.abs().max()))
    assert again.config.num_labels == theirs.num_labels
