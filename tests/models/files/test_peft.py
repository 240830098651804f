"""Adapters in PEFT's format: there and back, what peft makes of them, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from halos_jax.config import LoraConfig
from halos_jax.models import lora, spec
from halos_jax.models.files import hf, peft
from halos_jax.models.files.export import save_model
from halos_jax.models.hf import families
from halos_jax.models.hf.families import ModelError
from halos_jax.models.hf.family_table import FAMILIES
from tests.logits import compute_logits, encode_rows

SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2, "hidden_act": "silu", "rms_norm_eps": 1e-5}
CASES = {
    "llama": GROUPED | {"attention_bias": True},
    "phi3": GROUPED,  # fused: q, k, v one behind the other
    "gpt_neox": {},  # fused: head by head
    "gpt_oss": GROUPED | {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 5},
    "gemma2": GROUPED | {"head_dim": 8, "sliding_window": 5, "tie_word_embeddings": True},
}
TOKENS = np.random.default_rng(0).integers(1, 61, (3, 9))
LENGTHS = jnp.array([9, 9, 9])


def make_base(folder, family, *, num_labels=0):
    """Write a model of random weights; return its DecoderConfig and Family."""
    fields = SMALL | CASES[family]
    name = FAMILIES[family].classifier if num_labels else FAMILIES[family].language_model
    labels = {"id2label": {str(n): f"LABEL_{n}" for n in range(num_labels)}} if num_labels else {}
    source = {"model_type": family, "architectures": [name]} | fields | labels
    config = families.make_decoder_config(source)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(source))
    params = jax.tree.map(lambda x: x * 3, spec.init_params(jax.random.key(0), config))
    save_model(params, config, folder / "model", source=folder)
    return families.make_decoder_config(hf.read_hf_config(folder / "model"))


def make_frozen(folder, config, family, mesh, **settings):
    settings = LoraConfig(**({"rank": 3, "alpha": 5.0, "dropout": 0.0} | settings))
    adapter = lora.make_adapter(settings, config, FAMILIES[family], seed=0)
    return lora.Frozen(hf.load_params(str(folder / "model"), config, mesh), adapter)


def draw(frozen, config, mesh):
    """Return an adapter of random arrays, all of them."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, leaf.dtype),
        lora.abstract_trained(config, mesh, frozen.adapter),
    )


def read_back(path, folder, config, family, mesh):
    """Return (frozen, params) of the adapter at `path`, as a run reads it."""
    adapter = peft.read_adapter(str(path), config, FAMILIES[family], dropout=0.0, seed=0)
    frozen = lora.Frozen(hf.load_params(str(folder / "model"), config, mesh), adapter)
    return frozen, peft.load_adapter(str(path), frozen, config, FAMILIES[family], mesh)


def run(params, frozen, config):
    whole = lora.attach_adapter(params, frozen)
    if not config.num_labels:
        return np.asarray(compute_logits(whole, TOKENS, LENGTHS, config))
    hidden = encode_rows(whole, TOKENS, LENGTHS, config)
    return np.asarray(hidden[:, -1] @ whole["score"].T)


@pytest.mark.parametrize(
    ("family", "settings", "num_labels"),
    [
        ("llama", {}, 0),
        ("llama", {"targets": ("q_proj", "down_proj"), "rslora": True}, 1),
        ("phi3", {}, 0),
        ("gpt_neox", {}, 0),
    ],
)
def test_what_is_written_is_read_again(tmp_path, mesh, family, settings, num_labels):
    config = make_base(tmp_path / "base", family, num_labels=num_labels)
    frozen = make_frozen(tmp_path / "base", config, family, mesh, **settings)
    params = draw(frozen, config, mesh)
    base = str(tmp_path / "base" / "model")
    peft.write_adapter(params, frozen, config, tmp_path / "out", base=base)
    again, found = read_back(tmp_path / "out", tmp_path / "base", config, family, mesh)
    assert again.adapter == frozen.adapter
    jax.tree.map(np.testing.assert_array_equal, found, params)
    wanted = lora.abstract_trained(config, mesh, frozen.adapter)
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, wanted)
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == base


def test_names_and_layout_are_those_of_peft(tmp_path, mesh):
    config = make_base(tmp_path / "base", "phi3")
    frozen = make_frozen(tmp_path / "base", config, "phi3", mesh, targets=("qkv_proj", "o_proj"))
    params = draw(frozen, config, mesh)
    base = str(tmp_path / "base" / "model")
    peft.write_adapter(params, frozen, config, tmp_path / "out", base=base)
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.self_attn."
    shapes = {name.removeprefix(prefix): x.shape for name, x in found.items() if prefix in name}
    assert shapes == {
        "qkv_proj.lora_A.weight": (3, 24),
        "qkv_proj.lora_B.weight": (24 + 12 + 12, 3),
        "o_proj.lora_A.weight": (3, 24),
        "o_proj.lora_B.weight": (24, 3),
    }
    layers = jax.tree.map(lambda x: np.asarray(x[1]), params["layers"])
    rows = [layers[f"{name}_lora_b"].reshape(3, -1).T for name in "qkv"]
    np.testing.assert_array_equal(found[f"{prefix}qkv_proj.lora_B.weight"], np.concatenate(rows))
    np.testing.assert_array_equal(
        found[f"{prefix}o_proj.lora_A.weight"], layers["o_lora_a"].reshape(-1, 3).T
    )
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["qkv_proj", "o_proj"]
    assert (settings["r"], settings["lora_alpha"], settings["task_type"]) == (3, 5.0, "CAUSAL_LM")


# --------------------------------------------------------------------------- against peft


def load_torch(folder, num_labels=0):
    import transformers

    name = "AutoModelForSequenceClassification" if num_labels else "AutoModelForCausalLM"
    return getattr(transformers, name).from_pretrained(folder / "model", dtype="float32").eval()


def run_torch(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize("family", CASES)
def test_peft_gives_the_logits_of_an_adapter_written_here(tmp_path, mesh1, family):
    pytest.importorskip("torch")
    theirs = pytest.importorskip("peft")
    config = make_base(tmp_path / "base", family)
    frozen = make_frozen(tmp_path / "base", config, family, mesh1)
    params = draw(frozen, config, mesh1)
    expected = run(params, frozen, config)
    base = str(tmp_path / "base" / "model")
    peft.write_adapter(params, frozen, config, tmp_path / "out", base=base)
    plain = run_torch(load_torch(tmp_path / "base"))
    model = theirs.PeftModel.from_pretrained(load_torch(tmp_path / "base"), tmp_path / "out")
    found = run_torch(model.eval())
    scale = np.abs(found).max()
    np.testing.assert_allclose(found, expected, atol=1e-4 * scale)
    assert np.abs(found - plain).max() > 0.1 * scale

    # Merged, exported and loaded without peft it is the same model.
    merged = lora.merge_adapter(params, frozen)
    save_model(merged, config, tmp_path / "merged" / "model", source=tmp_path / "base" / "model")
    np.testing.assert_allclose(run_torch(load_torch(tmp_path / "merged")), found, atol=1e-4 * scale)


@pytest.mark.parametrize(
    ("family", "num_labels", "targets"),
    [
        ("llama", 0, "all-linear"),
        ("gpt_neox", 0, "all-linear"),
        ("llama", 1, ["q_proj", "v_proj"]),
    ],
)
def test_an_adapter_of_peft_gives_its_logits_and_gradients(
    tmp_path, mesh1, family, num_labels, targets
):
    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("peft")
    config = make_base(tmp_path / "base", family, num_labels=num_labels)
    settings = theirs.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=bool(num_labels),
        target_modules=targets,
        task_type="SEQ_CLS" if num_labels else "CAUSAL_LM",
    )
    model = theirs.get_peft_model(load_torch(tmp_path / "base", num_labels), settings).eval()
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.2)
        assert weight.requires_grad == ("lora_" in name or "modules_to_save" in name)
    model.save_pretrained(tmp_path / "theirs")
    frozen, params = read_back(tmp_path / "theirs", tmp_path / "base", config, family, mesh1)
    found, expected = run(params, frozen, config), run_torch(model)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())

    # What they trained comes back out unchanged.
    base = str(tmp_path / "base" / "model")
    peft.write_adapter(params, frozen, config, tmp_path / "again", base=base)
    before, after = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "again")
    )
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)

    # The gradient of the adapter, and of nothing else, in the layout of the file.
    model(torch.tensor(TOKENS)).logits.square().mean().backward()
    gradient = jax.grad(lambda params: jnp.mean(jnp.square(run_traced(params, frozen, config))))
    peft.write_adapter(gradient(params), frozen, config, tmp_path / "gradient", base=base)
    ours = load_file(tmp_path / "gradient" / "adapter_model.safetensors")
    compared = 0
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            key = name.replace(".default", "").replace(".modules_to_save", "")
            wanted = weight.grad.numpy()
            np.testing.assert_allclose(ours[key], wanted, atol=3e-4 * np.abs(wanted).max())
            compared += 1
    assert compared == len(ours)


def run_traced(params, frozen, config):
    whole = lora.attach_adapter(params, frozen)
    if not config.num_labels:
        return compute_logits(whole, TOKENS, LENGTHS, config)
    return encode_rows(whole, TOKENS, LENGTHS, config)[:, -1] @ whole["score"].T


# --------------------------------------------------------------------------- what is refused


@pytest.fixture
def written(tmp_path, mesh1):
    """Return a function that changes an adapter's files and reads it."""
    config = make_base(tmp_path / "base", "llama")
    frozen = make_frozen(tmp_path / "base", config, "llama", mesh1, targets=("q_proj",))
    base = str(tmp_path / "base" / "model")
    peft.write_adapter(draw(frozen, config, mesh1), frozen, config, tmp_path / "out", base=base)

    def change(tensors=lambda tensors: tensors, **settings):
        file = tmp_path / "out" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
        file = tmp_path / "out" / "adapter_model.safetensors"
        save_file(tensors(load_file(file)), file)
        with pytest.raises(ModelError) as error:
            read_back(tmp_path / "out", tmp_path / "base", config, "llama", mesh1)
        return str(error.value)

    return change


def test_adapters_of_other_kinds_are_refused_with_all_reasons(written):
    message = written(peft_type="IA3", use_dora=True, r=0, init_lora_weights="pissa")
    for line in (
        "peft_type: got 'IA3', allowed: 'LORA'",
        "use_dora: got True, allowed: false or null",
        "init_lora_weights: got 'pissa', allowed: True",
        "r: got 0, allowed: an integer above 0",
    ):
        assert f"\n  {line}" in message
    assert message.endswith("Use a plain LoRA adapter, or merge this one into its base with peft.")


def test_tensors_that_do_not_fit_are_listed(written):
    q = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"

    def damage(tensors):
        del tensors[q.format(1, "B")]
        for layer in range(2):
            tensors[q.format(layer, "A")] = np.zeros((3, 7), np.float32)
        return tensors | {"base_model.model.lm_head.lora_A.weight": np.zeros((3, 24), np.float32)}

    lines = [line.strip() for line in written(damage).splitlines()]
    assert lines[1:-1] == [
        q.format(1, "B") + ": missing",
        "base_model.model.lm_head.lora_A.weight: unexpected",
        q.format("*", "A") + ": got shape (3, 7), allowed: (3, 24) (layers 0, 1)",
    ]


def test_a_folder_without_an_adapter_says_what_is_missing(tmp_path, mesh1):
    config = make_base(tmp_path / "base", "llama")
    read = lambda: peft.read_adapter(  # noqa: E731
        str(tmp_path / "base"), config, FAMILIES["llama"], dropout=0.0, seed=0
    )
    with pytest.raises(ModelError, match=r"adapter_config\.json: missing"):
        read()
    (tmp_path / "base" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8})
    )
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors: missing; save the adapter"):
        read()
