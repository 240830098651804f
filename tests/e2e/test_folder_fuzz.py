"""Model folders changed at random, each kind of file at its door: refused by one message, or read.

What is accepted must equal what a parser of this file reads, and a field that is not read must be
named in a warning. The quick tests try a hundred changes of each kind, the slow one 10,000.
"""

import dataclasses
import json
import logging
import math
import random
from collections import Counter

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from halos_jax.config import ConfigError, ModelConfig
from halos_jax.data.chat.loading import load_renderer
from halos_jax.models.files import hf, peft
from halos_jax.models.files.weight_files import INDEX, SINGLE
from halos_jax.models.hf.families import ModelError, make_decoder_config
from halos_jax.models.hf.family_table import FAMILIES
from halos_jax.models.hf.schema import FIELDS
from halos_jax.models.spec import DecoderConfig
from tests.data.chat.test_loading import make_tokenizer
from tests.e2e.file_changes import change_bytes, change_json, change_safetensors, split_header

QUICK, SLOW = 100, 10_000
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 20,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "max_position_embeddings": 64,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
SHAPES = {
    "model.embed_tokens": (48, 16),
    "model.norm": (16,),
    "lm_head": (48, 16),
    **{
        f"model.layers.0.{name}": shape
        for name, shape in {
            "input_layernorm": (16,),
            "post_attention_layernorm": (16,),
            "self_attn.q_proj": (24, 16),
            "self_attn.k_proj": (12, 16),
            "self_attn.v_proj": (12, 16),
            "self_attn.o_proj": (16, 24),
            "mlp.gate_proj": (20, 16),
            "mlp.up_proj": (20, 16),
            "mlp.down_proj": (16, 20),
        }.items()
    },
}
TENSORS = {
    f"{name}.weight": np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for name, shape in SHAPES.items()
}
ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": False, "bias": "none"}
ADAPTER |= {"target_modules": ["q_proj"], "lora_dropout": 0.0, "use_dora": False}


# --------------------------------------------------------------------------- own parsers


def parse(data):
    """Return a JSON text's value, None where it is none or ambiguous."""

    def make(pairs):
        made = dict(pairs)
        if any(repr(made[key]) != repr(value) for key, value in pairs):
            raise ValueError
        return made

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=make)
    except (ValueError, RecursionError):
        return None


def is_exactly(value, kind):
    return type(value) is kind


def check_config(data, config: DecoderConfig, warnings):
    """Hold a decoder against what config.json says, field by field."""
    read = parse(data)
    heads = read["num_attention_heads"]
    expected = {
        "vocab_size": read["vocab_size"],
        "d_model": read["hidden_size"],
        "num_layers": read["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": read.get("num_key_value_heads") or heads,
        "head_dim": read.get("head_dim") or read["hidden_size"] // heads,
        "d_mlp": read["intermediate_size"],
    }
    for name, value in expected.items():
        assert is_exactly(value, int) and getattr(config, name) == value > 0, name
    assert config.norm_eps == read.get("rms_norm_eps", 1e-6)
    assert config.init_std == read.get("initializer_range", 0.02)
    for name, value in (("rms_norm_eps", config.norm_eps), ("rope_theta", config.rope.theta)):
        assert is_exactly(read.get(name, 1.0), float) or type(read[name]) in (int, type(None))
        assert math.isfinite(value) and value > 0
    for name, value in (
        ("tie_word_embeddings", config.tie_embeddings),
        ("attention_bias", config.qkv_bias),
    ):
        assert read.get(name, False) in (True, False, None) and value == bool(read.get(name))
        assert type(read.get(name, False)) in (bool, type(None))
    rope = read.get("rope_scaling") or read.get("rope_parameters") or {}
    assert config.rope.factor == rope.get("factor", 1.0) or config.rope.kind == "default"
    theta = rope.get("rope_theta") or read.get("rope_theta") or 10_000.0
    assert config.rope.theta == theta
    unknown = [name for name in read if name not in CONFIG and name not in FIELDS]
    unknown += [name for name in rope if name.startswith("new_")]
    for name in unknown:
        assert any(name in line for line in warnings), f"{name} is dropped in silence"


def read_tensors(data):
    """Return what a safetensors file holds: name -> (type, array of its bytes, shape)."""
    header, rest = split_header(data)
    found = {}
    for name, one in parse(header).items():
        if name != "__metadata__":
            start, stop = one["data_offsets"]
            found[name] = (one["dtype"], rest[start:stop], one["shape"])
    return found


def check_params(data, params):
    """Hold loaded params against the bytes of the file."""
    numbers = {"F32": np.float32, "F64": np.float64, "F16": np.float16}
    found = {
        name: np.frombuffer(raw, numbers[dtype]).reshape(shape).astype(np.float32)
        for name, (dtype, raw, shape) in read_tensors(data).items()
        if name in TENSORS
    }
    assert found.keys() == TENSORS.keys()
    layer = "model.layers.0."
    pairs = {
        "model.embed_tokens.weight": params["embed"],
        "lm_head.weight": params["head"],
        "model.norm.weight": params["final_norm"],
        f"{layer}mlp.up_proj.weight": params["layers"]["up"][0].T,
        f"{layer}mlp.gate_proj.weight": params["layers"]["gate"][0].T,
        f"{layer}mlp.down_proj.weight": params["layers"]["down"][0].T,
        f"{layer}input_layernorm.weight": params["layers"]["attention_norm"][0],
        f"{layer}post_attention_layernorm.weight": params["layers"]["mlp_norm"][0],
        f"{layer}self_attn.q_proj.weight": params["layers"]["q"][0].reshape(16, 24).T,
        f"{layer}self_attn.k_proj.weight": params["layers"]["k"][0].reshape(16, 12).T,
        f"{layer}self_attn.v_proj.weight": params["layers"]["v"][0].reshape(16, 12).T,
        f"{layer}self_attn.o_proj.weight": params["layers"]["o"][0].reshape(24, 16).T,
    }
    assert pairs.keys() == found.keys()
    for name, got in pairs.items():
        np.testing.assert_array_equal(np.asarray(got), found[name], err_msg=name)


def check_renderer(folder, renderer, warnings):
    """Hold a renderer against the tokenizer's files."""
    read = {
        name: parse((folder / name).read_bytes())
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    }
    tokenizer, said = renderer.tokenizer, " ".join(warnings)
    core = read["tokenizer.json"]
    written = dict(core["model"]["vocab"])
    written |= {token["content"]: token["id"] for token in core.get("added_tokens") or []}
    found = tokenizer.get_vocab()
    assert all(found.get(token) == number for token, number in written.items()) or (
        "other ids than in" in said
    )
    for name in ("bos_token", "eos_token"):
        token = read["tokenizer_config.json"].get(name)
        token = token["content"] if isinstance(token, dict) else token
        assert token is None or isinstance(token, str)
        assert getattr(tokenizer, name) == token or name in said
    eos = read["generation_config.json"].get("eos_token_id")
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    assert all(is_exactly(number, int) for number in eos) and renderer.stop_ids >= {*eos}
    for name, known in (("tokenizer_config.json", "eos_token"), ("generation_config.json", "eos")):
        for field in read[name]:
            if field in ("eos_tokenx", "eos_tokens", "eos_token_idx", "eos_token_ids"):
                assert field in said, f"{field} is dropped in silence ({known})"
    known = {"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"}
    for token in core.get("added_tokens") or []:
        assert all(key in said for key in token.keys() - known), "a key of a token is dropped"
    template = (folder / "chat_template.jinja").read_bytes().decode()
    # The library reads text, in which every mark of a line's end is one. So does Jinja: the text
    # as it stands in the file means the same, to the letter.
    assert renderer.template == template.replace("\r\n", "\n").replace("\r", "\n")
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    for chat in (turns, turns[:1]):
        options = {"add_generation_prompt": len(chat) == 1, "tokenize": False}
        shown = tokenizer.apply_chat_template(chat, chat_template=template, **options)
        assert renderer.tokenizer.apply_chat_template(chat, **options) == shown


def check_adapter(data, adapter):
    read = parse(data)
    assert is_exactly(read["r"], int) and adapter.rank == read["r"]
    assert type(read["lora_alpha"]) in (int, float) and adapter.alpha == read["lora_alpha"]
    assert type(read.get("use_rslora")) in (bool, type(None))
    assert adapter.rslora == bool(read.get("use_rslora"))
    assert {module.name for module in adapter.modules} == {"self_attn.q_proj"}
    for name, value in read.items():
        assert name in ADAPTER or not value or name in ("r", "lora_alpha"), name


# --------------------------------------------------------------------------- the doors


class Warnings(logging.Handler):
    """Keeps what is said."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def write_model(folder, tensors=TENSORS):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


def fuzz_config(folder, mesh):
    (write_model(folder) / SINGLE).unlink()
    settings = ModelConfig(random_init=True)

    def run(data, warnings):
        hf._warn_once.cache_clear()
        config = hf.load_decoder_config(str(folder), settings)
        check_config(data, config, warnings)

    return {folder / "config.json": change_json}, run


def fuzz_safetensors(folder, mesh):
    config = hf.load_decoder_config(str(write_model(folder)))
    config = dataclasses.replace(config, params_dtype="float32")

    def run(data, warnings):
        check_params(data, hf.load_params(str(folder), config, mesh))

    return {folder / SINGLE: change_safetensors}, run


def fuzz_index(folder, mesh):
    config = hf.load_decoder_config(str(write_model(folder)))
    config = dataclasses.replace(config, params_dtype="float32")
    whole = (folder / SINGLE).read_bytes()
    (folder / SINGLE).unlink()
    names = list(TENSORS)
    weight_map = {}
    for number in range(3):
        part = {name: TENSORS[name] for name in names[number::3]}
        save_file(part, folder / f"part-{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"part-{number}.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    def run(data, warnings):
        check_params(whole, hf.load_params(str(folder), config, mesh))
        read = parse(data)["weight_map"]
        assert all(read[name] == weight_map[name] for name in read), "another file was believed"

    return {folder / INDEX: change_json}, run


def fuzz_tokenizer(folder, mesh):
    folder.mkdir()
    make_tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [257, 259], "top_p": 0.9}')

    def run(data, warnings):
        check_renderer(folder, load_renderer(str(folder)), warnings)

    changes = dict.fromkeys(("tokenizer.json", "tokenizer_config.json"), change_json)
    changes |= {"generation_config.json": change_json, "chat_template.jinja": change_bytes}
    return {folder / name: change for name, change in changes.items()}, run


def fuzz_adapter(folder, mesh):
    folder.mkdir()
    (folder / peft.CONFIG).write_text(json.dumps(ADAPTER))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = {f"{prefix}A.weight": (2, 16), f"{prefix}B.weight": (24, 2)}
    drawn = {name: np.ones(shape, np.float32) for name, shape in tensors.items()}
    save_file(drawn, folder / peft.WEIGHTS)
    config, family = make_decoder_config(CONFIG), FAMILIES["llama"]

    def run(data, warnings):
        adapter = peft.read_adapter(str(folder), config, family, dropout=0.0, seed=0)
        check_adapter((folder / peft.CONFIG).read_bytes(), adapter)
        found = read_tensors((folder / peft.WEIGHTS).read_bytes())
        assert all(dtype in ("F64", "F32", "F16", "BF16") for dtype, _, _ in found.values())

    return {folder / peft.CONFIG: change_json, folder / peft.WEIGHTS: change_safetensors}, run


KINDS = [fuzz_config, fuzz_safetensors, fuzz_index, fuzz_tokenizer, fuzz_adapter]


def try_changes(make, folder, mesh, count, seed=0):
    """Try changes of the files at a door; return how many were accepted and refused."""
    changes, run = make(folder, mesh)
    whole = {file: file.read_bytes() for file in changes}
    logger, handler = logging.getLogger("halos_jax"), Warnings()
    logger.addHandler(handler)
    rng, counts = random.Random(seed), Counter()
    try:
        for number in range(count):
            file = list(changes)[number % len(changes)]
            data = changes[file](whole[file], rng)
            file.write_bytes(data)
            handler.lines.clear()
            try:
                run(data, handler.lines)
                counts["accepted"] += 1
            except (ModelError, ConfigError) as error:
                assert str(error).strip(), "an error without a message"
                counts["refused"] += 1
            except BaseException as error:
                error.add_note(f"{file.name}, change {number}: {data[:3000]!r}")
                raise
            file.write_bytes(whole[file])
    finally:
        logger.removeHandler(handler)
    return counts


@pytest.fixture
def mesh_of_one():
    return jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:1])


@pytest.mark.parametrize("make", KINDS)
def test_a_changed_file_is_refused_or_read_as_it_stands(make, tmp_path, mesh_of_one):
    counts = try_changes(make, tmp_path / "model", mesh_of_one, QUICK)
    assert counts["accepted"] and counts["refused"] and counts.total() == QUICK


@pytest.mark.slow
@pytest.mark.parametrize("make", KINDS)
def test_ten_thousand_changes_of_each_kind(make, tmp_path, mesh_of_one, capsys):
    counts = try_changes(make, tmp_path / "model", mesh_of_one, SLOW, seed=1)
    with capsys.disabled():
        print(f"\n{make.__name__}: {dict(counts)}, 0 raw, 0 dropped, 0 of a wrong type")
    assert counts["accepted"] and counts["refused"] and counts.total() == SLOW
