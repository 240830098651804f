"""Key tables of the model families: path of our array -> the checkpoint's tensor, its layout."""

import dataclasses
from collections.abc import Mapping

from halos_jax.models.hf.tensors import (
    FROM_HEADS,
    HEADS,
    MATRIX,
    STACKED,
    TO_HEADS,
    TRANSPOSED,
    VECTOR,
    Tensor,
)

_QKV, _QKV_BIAS = (tuple(f"layers/{name}{end}" for name in "qkv") for end in ("", "_bias"))


def make_table(
    outer: Mapping[str, Tensor], prefix: str, layer: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return `outer` and `layer`, the latter under "layers/" here and under `prefix` there."""
    inner = {
        f"layers/{path}": dataclasses.replace(tensor, name=f"{prefix}.{{layer}}.{tensor.name}")
        for path, tensor in layer.items()
    }
    return {**outer, **inner}


_MLP = ("gate", "up", "down")
LLAMA_OUTER = {
    "embed": Tensor("model.embed_tokens.weight", MATRIX),
    "final_norm": Tensor("model.norm.weight", VECTOR),
    "head": Tensor("lm_head.weight", MATRIX),
    "score": Tensor("score.weight", MATRIX),
}
LLAMA_LAYER = {
    "attention_norm": Tensor("input_layernorm.weight", VECTOR),
    "o": Tensor("self_attn.o_proj.weight", FROM_HEADS),
    "o_bias": Tensor("self_attn.o_proj.bias", VECTOR),
    "mlp_norm": Tensor("post_attention_layernorm.weight", VECTOR),
    **{name: Tensor(f"self_attn.{name}_proj.weight", TO_HEADS) for name in "qkv"},
    **{f"{name}_bias": Tensor(f"self_attn.{name}_proj.bias", HEADS) for name in "qkv"},
    **{name: Tensor(f"mlp.{name}_proj.weight", TRANSPOSED) for name in _MLP},
    **{f"{name}_bias": Tensor(f"mlp.{name}_proj.bias", VECTOR) for name in _MLP},
}
QWEN3_LAYER = LLAMA_LAYER | {
    "q_norm": Tensor("self_attn.q_norm.weight", VECTOR),
    "k_norm": Tensor("self_attn.k_norm.weight", VECTOR),
}
GEMMA_LAYER = QWEN3_LAYER | {
    "attention_post_norm": Tensor("post_attention_layernorm.weight", VECTOR),
    "mlp_norm": Tensor("pre_feedforward_layernorm.weight", VECTOR),
    "mlp_post_norm": Tensor("post_feedforward_layernorm.weight", VECTOR),
}
OLMO2_LAYER = GEMMA_LAYER | {
    "q_norm": Tensor("self_attn.q_norm.weight", HEADS),
    "k_norm": Tensor("self_attn.k_norm.weight", HEADS),
}
PHI3_LAYER = LLAMA_LAYER | {
    **dict.fromkeys("qkv", Tensor("self_attn.qkv_proj.weight", TO_HEADS, _QKV)),
    **dict.fromkeys(
        ("gate", "up"),
        Tensor("mlp.gate_up_proj.weight", TRANSPOSED, ("layers/gate", "layers/up")),
    ),
}

_EXPERT_NAMES = ("expert_gate", "expert_up", "expert_down")


def _make_experts(block: str, names: tuple[str, str, str]) -> dict[str, Tensor]:
    return {
        "router": Tensor(f"{block}.gate.weight", TRANSPOSED),
        **{
            ours: Tensor(f"{block}.experts.{{expert}}.{name}.weight", TRANSPOSED)
            for ours, name in zip(_EXPERT_NAMES, names, strict=True)
        },
    }


MIXTRAL_LAYER = LLAMA_LAYER | _make_experts("block_sparse_moe", ("w1", "w3", "w2"))
QWEN3_MOE_LAYER = QWEN3_LAYER | _make_experts("mlp", ("gate_proj", "up_proj", "down_proj"))

_EXPERTS = "mlp.experts"
GPT_OSS_LAYER = LLAMA_LAYER | {
    "sinks": Tensor("self_attn.sinks", VECTOR),
    "router": Tensor("mlp.router.weight", TRANSPOSED),
    "router_bias": Tensor("mlp.router.bias", VECTOR),
    "expert_down": Tensor(f"{_EXPERTS}.down_proj", STACKED),
    "expert_down_bias": Tensor(f"{_EXPERTS}.down_proj_bias", MATRIX),
    **dict.fromkeys(
        ("expert_gate", "expert_up"),
        Tensor(
            f"{_EXPERTS}.gate_up_proj",
            STACKED,
            ("layers/expert_gate", "layers/expert_up"),
            by_head=True,
            fused_axis=2,
        ),
    ),
    **dict.fromkeys(
        ("expert_gate_bias", "expert_up_bias"),
        Tensor(
            f"{_EXPERTS}.gate_up_proj_bias",
            MATRIX,
            ("layers/expert_gate_bias", "layers/expert_up_bias"),
            by_head=True,
            fused_axis=1,
        ),
    ),
}

GPT_NEOX_OUTER = {
    "embed": Tensor("gpt_neox.embed_in.weight", MATRIX),
    "final_norm": Tensor("gpt_neox.final_layer_norm.weight", VECTOR),
    "final_norm_bias": Tensor("gpt_neox.final_layer_norm.bias", VECTOR),
    "head": Tensor("embed_out.weight", MATRIX),
    "score": Tensor("score.weight", MATRIX),
}
_FUSED = "attention.query_key_value"
GPT_NEOX_LAYER = {
    "attention_norm": Tensor("input_layernorm.weight", VECTOR),
    "attention_norm_bias": Tensor("input_layernorm.bias", VECTOR),
    "o": Tensor("attention.dense.weight", FROM_HEADS),
    "o_bias": Tensor("attention.dense.bias", VECTOR),
    "mlp_norm": Tensor("post_attention_layernorm.weight", VECTOR),
    "mlp_norm_bias": Tensor("post_attention_layernorm.bias", VECTOR),
    "up": Tensor("mlp.dense_h_to_4h.weight", TRANSPOSED),
    "up_bias": Tensor("mlp.dense_h_to_4h.bias", VECTOR),
    "down": Tensor("mlp.dense_4h_to_h.weight", TRANSPOSED),
    "down_bias": Tensor("mlp.dense_4h_to_h.bias", VECTOR),
    **dict.fromkeys("qkv", Tensor(f"{_FUSED}.weight", TO_HEADS, _QKV, by_head=True)),
    **dict.fromkeys(
        ("q_bias", "k_bias", "v_bias"), Tensor(f"{_FUSED}.bias", HEADS, _QKV_BIAS, by_head=True)
    ),
}
