"""MXFP4 by hand and against transformers, in any slice, and through import and export."""

import json
import logging

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from halos_jax.config import ModelConfig
from halos_jax.models.files import export, hf, mxfp4
from halos_jax.models.hf.families import ModelError

EXPERTS, D, F, LAYERS = 4, 96, 64, 2
CONFIG = {
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "vocab_size": 37,
    "num_hidden_layers": LAYERS,
    "hidden_size": D,
    "intermediate_size": F,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "sliding_window": 5,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
}


class Stored(np.ndarray):
    """An array that answers like a tensor of safetensors."""

    def get_shape(self):
        return list(self.shape)

    def get_dtype(self):
        return "U8" if self.dtype == np.uint8 else "F32"


def store(array):
    return np.asarray(array).view(Stored)


def draw_packed(random, *shape):
    """Return random blocks and scales of a matrix `[..., rows, columns]`."""
    *rows, columns = shape
    blocks = random.integers(0, 256, (*rows, columns // 32, 16), np.uint8)
    return blocks, random.integers(120, 127, (*rows, columns // 32), np.uint8)


def test_sixteen_values_the_lower_half_of_a_byte_first():
    blocks = np.arange(0, 256, 17, dtype=np.uint8)  # 0x00, 0x11, ..., each value twice
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    for scale, factor in ((127, 1.0), (128, 2.0), (0, 2.0**-127), (252, 2.0**125)):
        found = mxfp4.unpack(blocks[None], np.array([scale], np.uint8))
        expected = np.repeat(values, 2) * factor
        np.testing.assert_array_equal(found.reshape(-1).astype(np.float64), expected)
    blocks = np.full((1, 16), 0x72, np.uint8)
    found = mxfp4.unpack(blocks, np.array([127], np.uint8)).astype(np.float64)
    np.testing.assert_array_equal(found, [1, 6] * 16)


def test_every_slice_is_that_of_the_whole():
    torch = pytest.importorskip("torch")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = draw_packed(np.random.default_rng(0), EXPERTS, 6, D)
    whole = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales)).float().numpy()
    packed = mxfp4.Packed(store(blocks), store(scales))
    assert packed.get_shape() == list(whole.shape) == [EXPERTS, D, 6]
    random = np.random.default_rng(1)
    for _ in range(50):
        cuts = [np.sort(random.choice(size + 1, 2, replace=False)) for size in whole.shape]
        index = tuple(slice(*map(int, cut)) for cut in cuts)
        np.testing.assert_array_equal(packed[index].astype(np.float32), whole[index])
    everything = (slice(None),) * 3
    np.testing.assert_array_equal(packed[everything].astype(np.float32), whole)


def make_tensors():
    """Return a checkpoint with experts in MXFP4, and the same with their numbers."""
    torch = pytest.importorskip("torch")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    random = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (37, D), "model.norm.weight": (D,)}
    shapes["lm_head.weight"] = (37, D)
    for layer in range(LAYERS):
        shapes |= {
            f"model.layers.{layer}.{name}": shape
            for name, shape in {
                "input_layernorm.weight": (D,),
                "post_attention_layernorm.weight": (D,),
                "self_attn.sinks": (4,),
                **{f"self_attn.{name}_proj.weight": (16, D) for name in "kv"},
                **{f"self_attn.{name}_proj.bias": (16,) for name in "kv"},
                "self_attn.q_proj.weight": (32, D),
                "self_attn.q_proj.bias": (32,),
                "self_attn.o_proj.weight": (D, 32),
                "self_attn.o_proj.bias": (D,),
                "mlp.router.weight": (EXPERTS, D),
                "mlp.router.bias": (EXPERTS,),
                "mlp.experts.gate_up_proj_bias": (EXPERTS, 2 * F),
                "mlp.experts.down_proj_bias": (EXPERTS, D),
            }.items()
        }
    plain = {
        name: (0.3 * random.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()
    }
    packed = dict(plain)
    for layer in range(LAYERS):
        for name, shape in (("gate_up", (EXPERTS, 2 * F, D)), ("down", (EXPERTS, D, F))):
            full = f"model.layers.{layer}.mlp.experts.{name}_proj"
            blocks, scales = draw_packed(random, *shape)
            packed |= {f"{full}_blocks": blocks, f"{full}_scales": scales}
            made = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales))
            plain[full] = made.float().numpy()
    return packed, plain


def write(folder, tensors, **changes):
    folder.mkdir()
    config = {name: value for name, value in (CONFIG | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def load(path, mesh):
    config = hf.load_decoder_config(path, ModelConfig(params_dtype="float32"))
    return hf.load_params(path, config, mesh), config


def test_import_and_export_hold_the_numbers(tmp_path, mesh, mesh1, caplog):
    caplog.set_level(logging.INFO)
    packed, plain = make_tensors()
    source = write(tmp_path / "packed", packed)
    expected, _ = load(write(tmp_path / "plain", plain, quantization_config=None), mesh1)
    assert "MXFP4" not in caplog.text
    params, config = load(source, mesh)
    assert caplog.text.count("weights in MXFP4 are read as numbers, and exported as such") == 1
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    export.save_model(params, config, tmp_path / "ours", source=tmp_path / "packed")
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert written.keys() == plain.keys()
    for name, value in plain.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)
    made = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert "quantization_config" not in made and made["head_dim"] == 8
    again, _ = load(str(tmp_path / "ours"), mesh1)
    jax.tree.map(np.testing.assert_array_equal, again, expected)


def test_halves_that_do_not_fit_are_named():
    blocks, scales = draw_packed(np.random.default_rng(0), EXPERTS, 6, D)
    tensors = {
        "lone_blocks": store(blocks),
        "other_scales": store(scales),
        "short_blocks": store(blocks[:, :5]),
        "short_scales": store(scales),
        "float_blocks": store(blocks),
        "float_scales": store(scales.astype(np.float32)),
        "good_blocks": store(blocks),
        "good_scales": store(scales),
        "weight": store(scales),
    }
    with pytest.raises(ModelError) as caught:
        mxfp4.unpack_tensors(tensors)
    lines = str(caught.value).split("\n")
    assert [line.strip().split(":")[0] for line in lines[1:-1]] == [
        "float",
        "lone_scales",
        "other_blocks",
        "short",
    ]
    assert "got blocks (4, 5, 3, 16) and scales (4, 6, 3) of type U8" in lines[4]
    assert "of type F32 and U8" in lines[1] and "folder in bfloat16" in lines[-1]
    kept = mxfp4.unpack_tensors({name: tensors[name] for name in list(tensors)[-3:]})
    assert kept.keys() == {"good", "weight"} and kept["good"].get_shape() == [EXPERTS, D, 6]


def test_a_packed_tensor_of_another_size_is_refused(tmp_path, mesh1):
    packed, _ = make_tensors()
    name = "model.layers.1.mlp.experts.down_proj"
    packed[f"{name}_blocks"] = packed[f"{name}_blocks"][:, :32]
    packed[f"{name}_scales"] = packed[f"{name}_scales"][:, :32]
    path = write(tmp_path / "model", packed)
    with pytest.raises(ModelError, match=r"down_proj: got shape \(4, 64, 32\), config.json asks"):
        load(path, mesh1)
