"""The table of model families: what sets each apart.

A family is one entry of `FAMILIES`, under its Hugging Face `model_type`: the names of its two
architectures, the defaults of its config, a reader from the Hugging Face config to fields of
`DecoderConfig`, and a key table (`models.key_tables`) from our paths to the checkpoint's tensors.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from halos_jax.json_text import JsonObject
from halos_jax.models.hf.fields import (
    HFConfig,
    get_layer_types,
    read_architecture,
    read_clamped_gate,
    read_experts,
    read_unrotated,
    read_windows,
)
from halos_jax.models.hf.key_tables import (
    GEMMA_LAYER,
    GPT_NEOX_LAYER,
    GPT_NEOX_OUTER,
    GPT_OSS_LAYER,
    LLAMA_LAYER,
    LLAMA_OUTER,
    MIXTRAL_LAYER,
    OLMO2_LAYER,
    PHI3_LAYER,
    QWEN3_LAYER,
    QWEN3_MOE_LAYER,
    make_table,
)
from halos_jax.models.hf.rope_fields import NO_ROPE, read_rope, read_two_ropes
from halos_jax.models.hf.tensors import Tensor

Fields = JsonObject


@dataclasses.dataclass(frozen=True)
class Family:
    """What there is to know of one Hugging Face `model_type`.

    `read` returns the architecture fields of DecoderConfig and appends what it cannot use to the
    list of errors; `tensors` has every path that a model of the family may have.
    """

    language_model: str  # names of the two architectures in `transformers`
    classifier: str
    read: Callable[[HFConfig, list[str]], Fields]
    tensors: Mapping[str, Tensor]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    buffers: tuple[str, ...] = ("rotary_emb.inv_freq",)  # endings of what is stored but no weight
    gated_classifier: str = ""  # name of the architecture with the head of `models.gating`
    packings: tuple[str, ...] = ()  # methods of quantization that an import turns back


# --------------------------------------------------------------------------- readers


def _read_llama(hf_config: HFConfig, errors: list[str]) -> Fields:
    return read_architecture(hf_config, errors)


def _read_mistral(hf_config: HFConfig, errors: list[str]) -> Fields:
    # transformers ignores `layer_types` here: all layers have the window, or none.
    always = {**hf_config, "layer_types": None}
    layer_types = get_layer_types(always, lambda layer: bool(hf_config.get("sliding_window")))
    windows = read_windows(hf_config, errors, layer_types)
    return {**read_architecture(hf_config, errors), "windows": windows}


def _read_qwen2(hf_config: HFConfig, errors: list[str]) -> Fields:
    qwen3 = _read_qwen3(hf_config, errors)
    return {**qwen3, "qk_norm": "none", "qkv_bias": True, "out_bias": False}


def _read_qwen3(hf_config: HFConfig, errors: list[str]) -> Fields:
    windowed = hf_config.get("use_sliding_window") and hf_config.get("sliding_window")
    first = hf_config["max_window_layers"] if windowed else 0
    layer_types = get_layer_types(hf_config, lambda layer: bool(windowed and layer >= first))
    windows = read_windows(hf_config, errors, layer_types)
    return {**read_architecture(hf_config, errors), "windows": windows, "qk_norm": "head"}


def _read_gemma2(hf_config: HFConfig, errors: list[str]) -> Fields:
    if hf_config.get("use_bidirectional_attention"):
        errors.append("use_bidirectional_attention: got True, allowed: False")
    # Some configs have a `hidden_act` as well, which transformers ignores.
    activation = hf_config.get("hidden_activation") or "gelu_pytorch_tanh"
    architecture = read_architecture({**hf_config, "hidden_act": activation}, errors)
    period = hf_config["sliding_window_pattern"]
    layer_types = get_layer_types(hf_config, lambda layer: (layer + 1) % period != 0)
    return {
        **architecture,
        "norm": "rms_offset",
        "post_norm": True,
        "scale_embeddings": True,
        "windows": read_windows(hf_config, errors, layer_types),
        "attention_scale": hf_config["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": hf_config.get("attn_logit_softcapping") or 0.0,
        "logit_softcap": hf_config.get("final_logit_softcapping") or 0.0,
    }


def _read_gemma3(hf_config: HFConfig, errors: list[str]) -> Fields:
    # transformers does not apply the soft cap of attention that a config of it may have.
    gemma2 = _read_gemma2({**hf_config, **NO_ROPE, "attn_logit_softcapping": None}, errors)
    return {**gemma2, **read_two_ropes(hf_config, errors), "qk_norm": "head"}


def _read_gpt_neox(hf_config: HFConfig, errors: list[str]) -> Fields:
    same = {
        **hf_config,
        "rms_norm_eps": hf_config["layer_norm_eps"],
        "rope_theta": hf_config["rotary_emb_base"],
        "partial_rotary_factor": hf_config["rotary_pct"],
    }
    return {
        **read_architecture(same, errors),
        "norm": "layer",
        "parallel_residual": hf_config["use_parallel_residual"],
        "gated_mlp": False,
        "mlp_bias": True,
    }


def _read_olmo2(hf_config: HFConfig, errors: list[str]) -> Fields:
    architecture = read_architecture(hf_config, errors)
    return {**architecture, "pre_norm": False, "post_norm": True, "qk_norm": "all"}


def _read_olmo3(hf_config: HFConfig, errors: list[str]) -> Fields:
    layer_types = get_layer_types(hf_config, lambda layer: (layer + 1) % 4 != 0)
    windows = read_windows(hf_config, errors, layer_types)
    olmo2 = _read_olmo2({**hf_config, **NO_ROPE}, errors)
    return {**olmo2, **read_two_ropes(hf_config, errors), "windows": windows}


def _read_mixtral(hf_config: HFConfig, errors: list[str]) -> Fields:
    experts = read_experts({**hf_config, "norm_topk_prob": True}, errors, "intermediate_size")
    return {**_read_mistral(hf_config, errors), "experts": experts}


def _read_qwen3_moe(hf_config: HFConfig, errors: list[str]) -> Fields:
    if hf_config.get("mlp_only_layers") or hf_config.get("decoder_sparse_step", 1) != 1:
        errors.append(
            "mlp_only_layers, decoder_sparse_step: got layers without experts; allowed: () and 1, "
            "experts in every layer"
        )
    # All layers have the window, or none, as in Mistral.
    windowed = hf_config.get("use_sliding_window")
    same = hf_config if windowed else {**hf_config, "sliding_window": None}
    experts = read_experts(hf_config, errors, "moe_intermediate_size")
    return {**_read_mistral(same, errors), "qk_norm": "head", "experts": experts}


def _read_gpt_oss(hf_config: HFConfig, errors: list[str]) -> Fields:
    layer_types = get_layer_types(hf_config, lambda layer: layer % 2 == 0)
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or _GPT_OSS_ROPE
    architecture = read_architecture({**hf_config, "rope_parameters": rope}, errors)
    experts = read_experts({**hf_config, "norm_topk_prob": True}, errors, "intermediate_size")
    return {
        **architecture,
        "windows": read_windows(hf_config, errors, layer_types),
        "sinks": True,
        "experts": experts and dataclasses.replace(experts, bias=True),
        "clamped_gate": read_clamped_gate(hf_config, errors),
    }


def _read_smollm3(hf_config: HFConfig, errors: list[str]) -> Fields:
    unrotated = read_unrotated(hf_config, errors)
    windowed = hf_config.get("use_sliding_window") and hf_config.get("sliding_window")
    layer_types = get_layer_types(hf_config, lambda layer: bool(windowed and unrotated[layer]))
    windows = read_windows(hf_config, errors, layer_types)
    architecture = read_architecture(hf_config, errors)
    return {**architecture, "windows": windows, "unrotated": unrotated}


def _read_phi3(hf_config: HFConfig, errors: list[str]) -> Fields:
    rope = read_rope(hf_config, errors, renamed={"su": "longrope", "yarn": "longrope"})
    return {**_read_mistral({**hf_config, **NO_ROPE}, errors), "rope": rope}


# --------------------------------------------------------------------------- defaults

_GEMMA_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
}

_GPT_OSS_ROPE = {"rope_type": "yarn", "factor": 32.0, "truncate": False} | {
    "original_max_position_embeddings": 4096
}

# --------------------------------------------------------------------------- families

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        "LlamaForSequenceClassification",
        _read_llama,
        make_table(LLAMA_OUTER, "model.layers", LLAMA_LAYER),
        gated_classifier="LlamaForRewardModelWithGating",
    ),
    "mistral": Family(
        "MistralForCausalLM",
        "MistralForSequenceClassification",
        _read_mistral,
        make_table(LLAMA_OUTER, "model.layers", LLAMA_LAYER),
        {"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        "Qwen2ForSequenceClassification",
        _read_qwen2,
        make_table(LLAMA_OUTER, "model.layers", LLAMA_LAYER),
        {"num_key_value_heads": 32, "max_window_layers": 28, "sliding_window": 4096},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "Qwen3ForSequenceClassification",
        _read_qwen3,
        make_table(LLAMA_OUTER, "model.layers", QWEN3_LAYER),
        {
            "num_key_value_heads": 32,
            "max_window_layers": 28,
            "sliding_window": 4096,
            "head_dim": 128,
        },
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        "MixtralForSequenceClassification",
        _read_mixtral,
        make_table(LLAMA_OUTER, "model.layers", MIXTRAL_LAYER),
        {"rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0, "num_key_value_heads": 8}
        | {"num_experts": 8, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeForSequenceClassification",
        _read_qwen3_moe,
        make_table(LLAMA_OUTER, "model.layers", QWEN3_MOE_LAYER),
        {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
        | {"sliding_window": 4096, "num_key_value_heads": 4},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        "Gemma2ForSequenceClassification",
        _read_gemma2,
        make_table(LLAMA_OUTER, "model.layers", GEMMA_LAYER),
        {
            **_GEMMA_DEFAULTS,
            "sliding_window_pattern": 2,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        "Gemma3TextForSequenceClassification",
        _read_gemma3,
        make_table(LLAMA_OUTER, "model.layers", GEMMA_LAYER),
        {
            **_GEMMA_DEFAULTS,
            "sliding_window_pattern": 6,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        "GPTNeoXForSequenceClassification",
        _read_gpt_neox,
        make_table(GPT_NEOX_OUTER, "gpt_neox.layers", GPT_NEOX_LAYER),
        {
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "rotary_emb_base": 10_000.0,
            "rotary_pct": 0.25,
            "use_parallel_residual": True,
            "attention_bias": True,
        },
        ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"),
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        "Olmo2ForSequenceClassification",
        _read_olmo2,
        make_table(LLAMA_OUTER, "model.layers", OLMO2_LAYER),
        {"rms_norm_eps": 1e-5},
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        "Olmo3ForSequenceClassification",
        _read_olmo3,
        make_table(LLAMA_OUTER, "model.layers", OLMO2_LAYER),
        {"rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "sliding_window": 4096},
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        "GptOssForSequenceClassification",
        _read_gpt_oss,
        make_table(LLAMA_OUTER, "model.layers", GPT_OSS_LAYER),
        {"rms_norm_eps": 1e-5, "rope_theta": 150_000.0, "num_key_value_heads": 8, "head_dim": 64}
        | {"num_experts": 128, "num_experts_per_tok": 4, "attention_bias": True}
        | {"sliding_window": 128, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        packings=("mxfp4",),
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        "SmolLM3ForSequenceClassification",
        _read_smollm3,
        make_table(LLAMA_OUTER, "model.layers", LLAMA_LAYER),
        {"rope_theta": 2_000_000.0, "num_key_value_heads": 4, "tie_word_embeddings": True}
        | {"no_rope_layer_interval": 4},
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        "Phi3ForSequenceClassification",
        _read_phi3,
        make_table(LLAMA_OUTER, "model.layers", PHI3_LAYER),
        {"rms_norm_eps": 1e-5}
        | dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings"), 4096),
    ),
}
