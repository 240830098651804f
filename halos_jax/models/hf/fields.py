"""Readers of the fields that the config.json of every family shares.

Each takes the Hugging Face config, its gaps filled with the family's defaults, and appends what
this decoder cannot run to `errors`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from halos_jax.json_text import JsonObject
from halos_jax.models.activations import NAMES
from halos_jax.models.hf.rope_fields import FULL, WINDOWED, read_rope
from halos_jax.models.spec import ClampedGate, ExpertsConfig

HFConfig = Mapping[str, Any]

_SIZES = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "num_heads": "num_attention_heads",
    "d_mlp": "intermediate_size",
}


def read_architecture(hf_config: HFConfig, errors: list[str]) -> JsonObject:
    """Return the fields of DecoderConfig that are named alike in all families."""
    std = hf_config.get("initializer_range")
    return {
        **_read_sizes(hf_config, errors),
        "norm_eps": hf_config.get("rms_norm_eps", 1e-6),
        "tie_embeddings": bool(hf_config.get("tie_word_embeddings", False)),
        "init_std": 0.02 if std is None else std,
        "qkv_bias": bool(hf_config.get("attention_bias", False)),
        "out_bias": bool(hf_config.get("attention_bias", False)),
        "mlp_bias": bool(hf_config.get("mlp_bias", False)),
        "activation": _read_activation(hf_config, errors),
        "rope": read_rope(hf_config, errors),
    }


def read_experts(hf_config: HFConfig, errors: list[str], d_mlp: str) -> ExpertsConfig | None:
    """Return the mixture of experts; `d_mlp` names the field with the size of one of them."""
    # Mixtral writes the first name, Qwen the second; so do defaults, which the first overrules.
    number = hf_config.get("num_local_experts", hf_config.get("num_experts"))
    sizes = {"num_experts": number}
    sizes |= {name: hf_config.get(name) for name in ("num_experts_per_tok", d_mlp)}
    found = [
        f"{name}: got {value!r}, allowed: a positive integer"
        for name, value in sizes.items()
        if not isinstance(value, int) or value < 1
    ]
    if not found and sizes["num_experts_per_tok"] > number:
        found = [f"num_experts_per_tok: got {sizes['num_experts_per_tok']}, allowed: {number} at"]
        found[0] += " most, the number of experts"
    if found:
        errors += found
        return None
    number, per_token, size = sizes.values()
    return ExpertsConfig(number, per_token, size, bool(hf_config.get("norm_topk_prob")))


def read_clamped_gate(hf_config: HFConfig, errors: list[str]) -> ClampedGate | None:
    """Return the clamped gate of gpt-oss's experts."""
    values = {name: hf_config.get(name) for name in ("swiglu_alpha", "swiglu_limit")}
    found = [
        f"{name}: got {value!r}, allowed: a number above 0"
        for name, value in values.items()
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0
    ]
    errors += found
    return None if found else ClampedGate(*(float(value or 0) for value in values.values()))


def _read_sizes(hf_config: HFConfig, errors: list[str]) -> dict[str, int]:
    fields = {}
    for ours, theirs in _SIZES.items():
        value = hf_config.get(theirs)
        if isinstance(value, int) and value > 0:
            fields[ours] = value
        else:
            errors.append(f"{theirs}: got {value!r}, allowed: a positive integer")
    if len(fields) < len(_SIZES):
        return {}
    heads = fields["num_heads"]
    fields["num_kv_heads"] = hf_config.get("num_key_value_heads") or heads
    fields["head_dim"] = hf_config.get("head_dim") or fields["d_model"] // heads
    if heads % fields["num_kv_heads"]:
        errors.append(
            f"num_key_value_heads: got {fields['num_kv_heads']}, allowed: a divisor of "
            f"num_attention_heads = {heads}"
        )
    return fields


def _read_activation(hf_config: HFConfig, errors: list[str]) -> str:
    name = hf_config.get("hidden_act", "silu")
    if not isinstance(name, str) or name not in NAMES:
        allowed = ", ".join(map(repr, NAMES))
        errors.append(f"hidden_act: got {name!r}, allowed: {allowed}")
        return "silu"
    return NAMES[name]


def read_windows(
    hf_config: HFConfig, errors: list[str], layer_types: Sequence[str]
) -> tuple[int, ...]:
    """Return the window of each layer (0: none); () where no layer has one."""
    window = hf_config.get("sliding_window")
    if unknown := sorted(set(layer_types) - {WINDOWED, FULL}):
        errors.append(f"layer_types: got {', '.join(unknown)}, allowed: {WINDOWED}, {FULL}")
    if len(layer_types) != hf_config.get("num_hidden_layers"):
        errors.append(f"layer_types: got {len(layer_types)} of them, allowed: one for each layer")
    if WINDOWED not in layer_types:
        return ()
    if not isinstance(window, int) or window < 1:
        errors.append(f"sliding_window: got {window!r}, allowed: a positive integer")
        return ()
    return tuple(window if kind == WINDOWED else 0 for kind in layer_types)


def read_unrotated(hf_config: HFConfig, errors: list[str]) -> tuple[bool, ...]:
    """Return for each layer whether it has no rotary embedding (NoPE)."""
    count, listed = hf_config.get("num_hidden_layers") or 0, hf_config.get("no_rope_layers")
    if listed is None:  # every so many-th layer
        period = hf_config.get("no_rope_layer_interval")
        if not isinstance(period, int) or period < 1:
            errors.append(f"no_rope_layer_interval: got {period!r}, allowed: a positive integer")
            return (False,) * count
        listed = [int((layer + 1) % period != 0) for layer in range(count)]
    # In spite of its name, 1 stands for a layer with a rotary embedding.
    if (
        not isinstance(listed, list | tuple)
        or len(listed) < count
        or any(entry not in (0, 1) for entry in listed)
    ):
        errors.append(
            f"no_rope_layers: got {listed!r}, allowed: for each layer 1 (it has a rotary "
            "embedding) or 0 (it has none)"
        )
        return (False,) * count
    return tuple(not entry for entry in listed[:count])


def get_layer_types(hf_config: HFConfig, is_windowed: Callable[[int], bool]) -> list[str]:
    """Return `layer_types`, or those that `is_windowed(layer)` makes where there are none."""
    found = hf_config.get("layer_types")
    if found is not None:
        return list(found)
    return [
        WINDOWED if is_windowed(layer) else FULL
        for layer in range(hf_config.get("num_hidden_layers") or 0)
    ]
