"""Hugging Face configs in every spelling, what is refused, and the layouts of the key table."""

import json

import pytest

from halos_jax.config import ModelConfig
from halos_jax.models import spec
from halos_jax.models.hf import families
from halos_jax.models.hf.families import ModelError, make_decoder_config, make_hf_config
from halos_jax.models.spec import RopeConfig

# The config.json of a Llama 3.2 1B, in the spelling of transformers 4.
LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
LLAMA3_ROPE = RopeConfig(500_000.0, "llama3", 32.0, 1.0, 4.0, 8192)


def without(config, *names, **changes):
    return {name: value for name, value in config.items() if name not in names} | changes


def test_llama_1b_is_read():
    config = make_decoder_config(LLAMA_1B)
    assert (config.num_layers, config.d_model, config.d_mlp) == (16, 2048, 8192)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (32, 8, 64)
    assert config.tie_embeddings and config.num_labels == 0 and config.norm_eps == 1e-5
    assert config.rope == LLAMA3_ROPE
    assert spec.count_params(config) == 1_235_814_400  # as on the model's card


def test_both_spellings_of_rope_are_the_same_model():
    rope = {**LLAMA_1B["rope_scaling"], "rope_theta": 500000.0}
    new = without(LLAMA_1B, "rope_scaling", "rope_theta", rope_parameters=rope, dtype="bfloat16")
    assert make_decoder_config(new) == make_decoder_config(LLAMA_1B)
    old_type = without(LLAMA_1B["rope_scaling"], "rope_type", type="llama3")
    assert make_decoder_config({**LLAMA_1B, "rope_scaling": old_type}).rope == LLAMA3_ROPE
    plain = without(LLAMA_1B, "rope_scaling", rope_scaling=None)
    assert make_decoder_config(plain).rope == RopeConfig(theta=500_000.0)
    bare = without(LLAMA_1B, "rope_scaling", "rope_theta")
    assert make_decoder_config(bare).rope == RopeConfig(theta=10_000.0)


def test_absent_fields_take_their_llama_defaults():
    config = make_decoder_config(
        without(
            LLAMA_1B,
            "head_dim",
            "num_key_value_heads",
            "tie_word_embeddings",
            "architectures",
            "rms_norm_eps",
            "hidden_act",
        )
    )
    assert (config.head_dim, config.num_kv_heads) == (64, 32)
    assert not config.tie_embeddings and config.norm_eps == 1e-6 and config.num_labels == 0


def test_settings_decide_how_it_runs():
    settings = ModelConfig(
        params_dtype="bfloat16",
        compute_dtype="float32",
        attention="xla",
        remat="full",
        head_remat=False,
        unroll_layers=True,
        head_chunk=64,
    )
    default = ModelConfig()
    for name in families.EXECUTION:
        assert getattr(settings, name) != getattr(default, name), "one that could get lost"
        assert getattr(make_decoder_config(LLAMA_1B, settings), name) == getattr(settings, name)
    config = make_decoder_config(LLAMA_1B, settings)
    assert (config.params_dtype, config.compute_dtype) == ("bfloat16", "float32")
    assert (config.attention, config.remat, config.head_chunk) == ("xla", "full", 64)


@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        ({}, 2),  # transformers leaves out its default
        ({"id2label": {"0": "score"}}, 1),
        ({"id2label": {"0": "bad", "1": "good"}}, 2),
        ({"num_labels": 1}, 1),
    ],
)
def test_labels_of_a_classifier(fields, labels):
    classifier = {**LLAMA_1B, "architectures": ["LlamaForSequenceClassification"], **fields}
    assert make_decoder_config(classifier).num_labels == labels
    assert make_decoder_config({**LLAMA_1B, **fields}).num_labels == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 0}, "num_experts: got 0, allowed: an integer from 1 to 65,536"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size: got null, allowed: an int"),
        ({"num_experts": 4}, "num_experts_per_tok: got 8, allowed: 4 at most, the number"),
        ({"mlp_only_layers": [0]}, "got layers without experts; allowed: () and 1, experts in"),
        ({"decoder_sparse_step": 2}, "got layers without experts"),
    ],
)
def test_mixtures_that_are_refused(fields, message):
    made = {**LLAMA_1B, "model_type": "qwen3_moe", "architectures": None, "rope_scaling": None}
    assert make_decoder_config(made).experts.num_experts == 128
    with pytest.raises(ModelError) as caught:
        make_decoder_config(made | fields)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt9"}, "model_type: got 'gpt9', allowed: "),
        ({"model_type": None}, "model_type: got None"),
        ({"hidden_act": "prelu"}, "hidden_act: got 'prelu', allowed: 'silu'"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
            "rope of type 'longrope': short_factor: got 1 numbers, allowed: 32, one for each pair",
        ),
        ({"rope_scaling": {"type": "spiral"}}, "rope type: got 'spiral', allowed: 'default', "),
        ({"rope_scaling": {"type": "yarn"}}, "rope of type 'yarn': factor missing"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        ({"hidden_size": None}, "hidden_size: got null, allowed: an integer from 1"),
        ({"head_dim": 63}, "head_dim: got 63, of which 63 are rotated, allowed: 1 or more"),
        ({"num_key_value_heads": 5}, "num_key_value_heads: got 5, allowed: a divisor"),
        ({"architectures": ["LlamaForTokenClassification"]}, "LlamaForTokenClassification"),
        (
            {"architectures": ["LlamaForSequenceClassification"], "num_labels": 3},
            "num_labels: got 3",
        ),
        ({"quantization_config": {"bits": 4}}, "got weights quantized by None; allowed: none; use"),
        (
            {"quantization_config": {"quant_method": "mxfp4"}},
            "quantization_config: got weights quantized by 'mxfp4'; allowed: none; use the model's",
        ),
    ],
)
def test_what_the_decoder_lacks_is_refused(fields, message):
    with pytest.raises(ModelError) as caught:
        make_decoder_config({**LLAMA_1B, **fields})
    assert message in str(caught.value)


def test_all_errors_come_together():
    with pytest.raises(ModelError) as caught:
        make_decoder_config(
            {**LLAMA_1B, "rope_scaling": {"type": "su"}, "hidden_act": "prelu", "vocab_size": -1}
        )
    for name in ("rope type", "hidden_act", "vocab_size"):
        assert name in str(caught.value)


@pytest.mark.parametrize("labels", [0, 1, 2])
@pytest.mark.parametrize("rope", [RopeConfig(theta=1e6), LLAMA3_ROPE], ids=["default", "llama3"])
def test_a_written_config_is_read_back(rope, labels):
    config = spec.DecoderConfig(
        vocab_size=97,
        num_layers=3,
        d_model=24,
        num_heads=4,
        num_kv_heads=2,
        head_dim=10,
        d_mlp=40,
        norm_eps=3e-6,
        tie_embeddings=True,
        num_labels=labels,
        rope=rope,
    )
    written = json.loads(json.dumps(make_hf_config(config, "float32")))
    assert make_decoder_config(written) == config


def test_a_source_config_keeps_what_the_weights_do_not_say():
    source = {**LLAMA_1B, "bos_token_id": 7, "transformers_version": "4.45.0"}
    reward_model = make_decoder_config(
        {**source, "architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    )
    made = make_hf_config(reward_model, "float32", source)
    assert made["bos_token_id"] == 7 and made["rope_scaling"] == LLAMA_1B["rope_scaling"]
    assert made["architectures"] == ["LlamaForSequenceClassification"]
    assert made["id2label"] == {"0": "LABEL_0"} and made["label2id"] == {"LABEL_0": 0}
    assert made["torch_dtype"] == "float32" and "dtype" not in made
    assert source["architectures"] == ["LlamaForCausalLM"]  # not edited in place

    back = make_hf_config(make_decoder_config(source), "bfloat16", made)
    assert "id2label" not in back and back["architectures"] == ["LlamaForCausalLM"]


def test_angles_that_end_are_not_written_without_their_source():
    dynamic = {"rope_scaling": {"type": "dynamic", "factor": 4.0}}
    config = make_decoder_config(LLAMA_1B | dynamic)
    assert make_hf_config(config, "float32", LLAMA_1B | dynamic)["rope_scaling"]["factor"] == 4.0
    with pytest.raises(ModelError, match=r"no `source` for angles that hold up to 131,072 tokens"):
        make_hf_config(config, "float32")


def test_a_source_of_another_model_is_refused():
    config = make_decoder_config({**LLAMA_1B, "num_hidden_layers": 15})
    with pytest.raises(ModelError, match="the weights have 15, config"):
        make_hf_config(config, "float32", LLAMA_1B)


def test_a_family_s_defaults_fill_what_its_config_leaves_out():
    gemma = {**without(LLAMA_1B, "head_dim", "tie_word_embeddings"), "rope_scaling": None}
    gemma["architectures"] = ["Gemma2ForCausalLM"]
    config = make_decoder_config({**gemma, "model_type": "gemma2"})
    assert config.head_dim == 256 and config.tie_embeddings
    assert config.windows == (4096, 0) * 8
    assert (config.attention_softcap, config.logit_softcap) == (50.0, 30.0)
    gemma["architectures"] = ["Gemma3ForCausalLM"]
    config = make_decoder_config({**gemma, "model_type": "gemma3_text"})
    assert config.windows == (*(4096,) * 5, 0, *(4096,) * 5, 0, *(4096,) * 4)
    # This config says rope_theta, as those on the hub do.
    assert (config.rope.theta, config.local_rope.theta) == (500_000.0, 10_000.0)


def test_gpt_oss_is_read_as_the_hub_has_it():
    """The config.json of gpt-oss-20b, as far as it says more than the family's defaults."""
    made = {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "vocab_size": 201088,
        "num_hidden_layers": 24,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_attention_heads": 64,
        "num_local_experts": 32,
        "experts_per_token": 4,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
        "quantization_config": {"quant_method": "mxfp4"},
    }
    config = make_decoder_config(made)
    assert (config.num_kv_heads, config.head_dim, config.windows) == (8, 64, (128, 0) * 12)
    assert config.rope == RopeConfig(
        150_000.0,
        "yarn",
        32.0,
        original_max_length=4096,
        truncate=False,
        attention_factor=1.3465735902799727,
    )
    assert config.experts == spec.ExpertsConfig(32, 4, 2880, bias=True)
    assert config.clamped_gate == spec.ClampedGate(1.702, 7.0)
    assert config.sinks and config.qkv_bias and config.out_bias and not config.tie_embeddings
    assert spec.count_params(config) == 20_914_757_184  # as on the model's card
    bare = {name: value for name, value in made.items() if name != "rope_scaling"}
    assert make_decoder_config(bare) == config
    unknown = made | {"quantization_config": {"quant_method": "fp8"}}
    with pytest.raises(ModelError, match="quantized by 'fp8'; allowed: 'mxfp4' or none"):
        make_decoder_config(unknown)
