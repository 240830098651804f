"""The fields of config.json that decide what is computed: the type of each, and what is not read.

This is the door of a model's config: behind it the readers of `hf_fields` and `family_table` meet
values of the right type or none. A field that a reader reads stands here.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from halos_jax.json_text import JsonObject


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a field may be: its words in an error message, and the test."""

    allowed: str
    fits: Callable[[Any], bool]


def _whole(low: int, high: int) -> Kind:
    allowed = f"an integer from {low:,} to {high:,}"
    return Kind(allowed, lambda value: type(value) is int and low <= value <= high)


def _number(low: float, high: float) -> Kind:
    """Return the kind of a number above `low`, up to `high`; a NaN is neither."""
    allowed = f"a number above {low:g}, {high:g} at most"
    return Kind(allowed, lambda value: type(value) in (int, float) and low < value <= high)


def _all(kind: Kind, words: str) -> Kind:
    return Kind(
        f"a list of {words}",
        lambda value: isinstance(value, list | tuple) and all(map(kind.fits, value)),
    )


def _or_null(kind: Kind) -> Kind:
    return Kind(f"{kind.allowed}, or null", lambda value: value is None or kind.fits(value))


def _split_words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TEXT = Kind("a string", lambda value: isinstance(value, str))
_FLAG = _or_null(Kind("true or false", lambda value: isinstance(value, bool)))
_OBJECT = _or_null(Kind("an object", lambda value: isinstance(value, Mapping)))
_SHARE, _POSITIVE = _number(0, 1), _number(0, 1e9)
_LENGTH = _whole(1, 2**31 - 1)  # in tokens
_THETA = _number(1, 1e15)
# Beyond these no model is; a list with an entry a layer must not fill the memory.
_LAYERS, _WIDTH, _HEADS, _ROWS = (_whole(1, 2**power) for power in (12, 24, 16, 28))

FIELDS: dict[str, Kind] = {
    "model_type": _TEXT,
    "architectures": _or_null(_all(_TEXT, "strings")),
    "num_labels": _or_null(_whole(0, 2**16)),
    "id2label": _OBJECT,
    "quantization_config": _OBJECT,
    **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), _WIDTH),
    **dict.fromkeys(("num_key_value_heads", "head_dim"), _or_null(_HEADS)),
    **dict.fromkeys(("num_attention_heads", "num_experts", "num_local_experts"), _HEADS),
    "num_experts_per_tok": _HEADS,
    "vocab_size": _ROWS,
    "num_hidden_layers": _LAYERS,
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "rotary_pct"), _SHARE),
    "partial_rotary_factor": _or_null(_SHARE),
    "initializer_range": _or_null(_number(-1e-12, 100)),
    **dict.fromkeys(("hidden_act", "hidden_activation"), _or_null(_TEXT)),
    **dict.fromkeys(("attention_bias", "mlp_bias", "tie_word_embeddings"), _FLAG),
    **dict.fromkeys(("norm_topk_prob", "use_parallel_residual", "use_sliding_window"), _FLAG),
    "use_bidirectional_attention": _FLAG,
    **dict.fromkeys(("rope_theta", "rope_local_base_freq"), _or_null(_THETA)),
    "rotary_emb_base": _THETA,
    **dict.fromkeys(("rope_parameters", "rope_scaling"), _OBJECT),
    **dict.fromkeys(("sliding_window", "max_position_embeddings"), _or_null(_LENGTH)),
    "original_max_position_embeddings": _or_null(_LENGTH),
    "max_window_layers": _whole(0, 2**31),
    "sliding_window_pattern": _LAYERS,
    "layer_types": _or_null(_all(_TEXT, "strings")),
    "no_rope_layers": _or_null(_all(_whole(0, 1), "0 and 1")),
    "no_rope_layer_interval": _whole(1, 2**31),
    "mlp_only_layers": _or_null(_all(_whole(0, 2**12), "numbers of layers")),
    "decoder_sparse_step": _whole(1, 2**31),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), _or_null(_POSITIVE)),
    **dict.fromkeys(("query_pre_attn_scalar", "swiglu_alpha", "swiglu_limit"), _POSITIVE),
    **dict.fromkeys(("num_objectives", "gating_hidden_dim"), _WIDTH),
    "gating_n_hidden": _LAYERS,
    "gating_temperature": _POSITIVE,
    "gating_token_pattern": _all(_whole(0, 2**31), "token ids"),
}
# Of `rope_scaling` and `rope_parameters`, and of the objects by type of layer in the latter.
ROPE: dict[str, Kind] = {
    **dict.fromkeys(("rope_type", "type"), _TEXT),
    "rope_theta": _or_null(_THETA),
    "partial_rotary_factor": _or_null(_SHARE),
    **dict.fromkeys(("factor", "attention_factor"), _or_null(_POSITIVE)),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor"), _POSITIVE),
    **dict.fromkeys(("beta_fast", "beta_slow"), _or_null(_POSITIVE)),
    **dict.fromkeys(("mscale", "mscale_all_dim"), _or_null(_number(-1e-12, 1e9))),
    "truncate": _FLAG,
    "original_max_position_embeddings": _or_null(_LENGTH),
    **dict.fromkeys(("short_factor", "long_factor"), _all(_POSITIVE, "numbers above 0")),
}
_LAYER_TYPES = ("sliding_attention", "full_attention")

_MIXTURES, _GEMMAS = ("mixtral", "qwen3_moe", "gpt_oss"), ("gemma2", "gemma3_text")
_SWITCHED = ("qwen2", "qwen3", "qwen3_moe", "smollm3")  # have `use_sliding_window`
# Of the fields that not every family reads, the families that do.
READERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok"), _MIXTURES),
    **dict.fromkeys(("moe_intermediate_size", "norm_topk_prob"), ("qwen3_moe",)),
    **dict.fromkeys(("mlp_only_layers", "decoder_sparse_step"), ("qwen3_moe",)),
    **dict.fromkeys(("layer_norm_eps", "rotary_pct", "rotary_emb_base"), ("gpt_neox",)),
    "use_parallel_residual": ("gpt_neox",),
    **dict.fromkeys(("query_pre_attn_scalar", "sliding_window_pattern"), _GEMMAS),
    **dict.fromkeys(("hidden_activation", "use_bidirectional_attention"), _GEMMAS),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), _GEMMAS),
    "rope_local_base_freq": ("gemma3_text", "olmo3"),
    **dict.fromkeys(("swiglu_alpha", "swiglu_limit"), ("gpt_oss",)),
    **dict.fromkeys(("no_rope_layers", "no_rope_layer_interval"), ("smollm3",)),
    **dict.fromkeys(("num_objectives", "gating_hidden_dim", "gating_n_hidden"), ("llama",)),
    **dict.fromkeys(("gating_temperature", "gating_token_pattern"), ("llama",)),
    "use_sliding_window": _SWITCHED,
    "max_window_layers": ("qwen2", "qwen3"),
    "sliding_window": (*_SWITCHED, *_GEMMAS, "mistral", "mixtral", "olmo3", "gpt_oss", "phi3"),
    "layer_types": ("qwen2", "qwen3", *_GEMMAS, "olmo3", "gpt_oss", "smollm3"),
}

# What a config says beside: of generation, of training elsewhere, of files, of where the score of a
# reward model is read (`rewards.read_at`). None of it changes what a forward pass computes.
_BESIDE = _split_words(
    """
    _name_or_path _sliding_window_pattern _attn_implementation attn_implementation auto_map dtype
    torch_dtype transformers_version use_cache cache_implementation tokenizer_class name_or_path
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id label2id
    chunk_size_feed_forward classifier_dropout is_decoder is_encoder_decoder add_cross_attention
    cross_attention_hidden_size output_attentions output_hidden_states output_router_logits
    return_dict problem_type pretraining_tp prefix pruned_heads tie_encoder_decoder torchscript
    task_specific_params finetuning_task tf_legacy_loss use_bfloat16 router_aux_loss_coef
    unsloth_version unsloth_fixed initial_context_length experts_per_token
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    halos_jax_read_at
    """
)
# What changes training elsewhere where it is above 0, and is not done here.
_NOISE = _split_words("attention_dropout hidden_dropout resid_pdrop embd_pdrop router_jitter_noise")
# What a family's config may say and transformers does not do.
_UNREAD_OF: dict[str, tuple[str, ...]] = {"gemma3_text": ("attn_logit_softcapping",)}


def check_fields(hf_config: Mapping[str, Any], errors: list[str]) -> JsonObject:
    """Return the config without the fields of a wrong type, of which `errors` gets a line each.

    A field that the model's family does not read may have any value.
    """
    faulty = set()
    for name, value in hf_config.items():
        if name in FIELDS and not FIELDS[name].fits(value):
            faulty.add(name)
            if not is_read(name, hf_config):
                continue
            errors.append(_describe(name, value, FIELDS[name]))
        elif name in ("rope_parameters", "rope_scaling") and value:
            found = [_describe(*one) for one in _check_rope(name, value)]
            errors += found
            faulty |= {name} if found else set()
    return {name: value for name, value in hf_config.items() if name not in faulty}


def is_read(name: str, hf_config: Mapping[str, Any]) -> bool:
    """Return whether the family of a config reads the field `name` of it."""
    family, readers = hf_config.get("model_type"), READERS.get(name)
    if readers is None or not isinstance(family, str):
        return True
    if name in ("sliding_window", "max_window_layers") and family in _SWITCHED:
        types = hf_config.get("layer_types")
        named = isinstance(types, list | tuple) and _LAYER_TYPES[0] in types
        return family in readers and bool(hf_config.get("use_sliding_window") or named)
    return family in readers


def _describe(name: str, value: object, kind: Kind) -> str:
    text = repr(value)
    shown = "null" if value is None else text if len(text) <= 80 else f"{text[:77]}..."
    return f"{name}: got {shown}, allowed: {kind.allowed}"


def _check_rope(path: str, rope: Mapping[str, Any]) -> Iterator[tuple[str, Any, Kind]]:
    for name, value in rope.items():
        inner = f"{path}.{name}"
        if name in _LAYER_TYPES:
            if not _OBJECT.fits(value):
                yield inner, value, _OBJECT
            elif value:
                yield from _check_rope(inner, value)
        elif name in ROPE and not ROPE[name].fits(value):
            yield inner, value, ROPE[name]


def list_unread(hf_config: Mapping[str, Any]) -> list[str]:
    """Return what a config has that is not read here, as "name = value"."""
    family = str(hf_config.get("model_type"))
    found = [(name, value) for name, value in hf_config.items() if _is_unread(name, value, family)]
    for name in _UNREAD_OF.get(family, ()):
        found += [(name, hf_config[name])] if hf_config.get(name) else []
    for name in ("rope_parameters", "rope_scaling"):
        found += _list_unread_rope(name, hf_config.get(name) or {})
    shown = ((name, repr(value)) for name, value in found)
    return [f"{name} = {text if len(text) <= 40 else text[:37] + '...'}" for name, text in shown]


def _is_unread(name: str, value: object, family: str) -> bool:
    if name in FIELDS:
        return bool(value) and family not in READERS.get(name, (family,))
    return name not in _BESIDE and (name not in _NOISE or bool(value))


def _list_unread_rope(path: str, rope: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in rope.items():
        if name in _LAYER_TYPES:
            yield from _list_unread_rope(f"{path}.{name}", value or {})
        elif name not in ROPE:
            yield f"{path}.{name}", value
