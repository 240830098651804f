"""Readers of the rotary embedding in config.json, in the spelling of transformers 4 or 5.

The former is `rope_theta` with a `rope_scaling`; the latter has both in `rope_parameters`, of some
families by the type of layer. Where a config has both, they must say the same: transformers takes
`rope_scaling`, and loses the rest.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from halos_jax.json_text import JsonObject
from halos_jax.models.spec import RopeConfig

# RopeConfig field -> name in config.json, for each kind of scaling; True where it must be there.
ROPE_FIELDS: dict[str, dict[str, tuple[str, bool]]] = {
    "default": {},
    "linear": {"factor": ("factor", True)},
    "llama3": {
        "factor": ("factor", True),
        "low_freq_factor": ("low_freq_factor", True),
        "high_freq_factor": ("high_freq_factor", True),
        "original_max_length": ("original_max_position_embeddings", True),
    },
    "yarn": {
        "factor": ("factor", True),
        "original_max_length": ("original_max_position_embeddings", True),
        "beta_fast": ("beta_fast", False),
        "beta_slow": ("beta_slow", False),
        "truncate": ("truncate", False),
    },
    "longrope": {
        "factors": ("short_factor", True),
        "longest": ("original_max_position_embeddings", True),
    },
    # Up to the model's own length these are the angles of "default".
    "dynamic": {"longest": ("max_position_embeddings", True)},
}
WINDOWED, FULL = "sliding_attention", "full_attention"
# For a family that reads its rotary embedding in its own way.
NO_ROPE = {"rope_parameters": None, "rope_scaling": None}

_FIELDS = ("rope_scaling", "rope_parameters")
_CONFLICT = "one of the two, or the same in both (transformers takes rope_scaling alone)"

HFConfig = Mapping[str, Any]


def read_rope(
    hf_config: HFConfig, errors: list[str], *, renamed: Mapping[str, str] | None = None
) -> RopeConfig:
    """Return the rotary embedding of a model in which all layers have the same.

    `renamed` are further names of kinds, which the family has.
    """
    written = {name: hf_config[name] for name in _FIELDS if hf_config.get(name)}
    found: list[str] = []
    for name, rope in written.items():
        if nested := [key for key in (FULL, WINDOWED) if key in rope]:
            found.append(f"{name}: got {nested[0]!r} in it, allowed: one embedding for all layers")
    said: list[Mapping[str, Any]] = [*written.values()] or [{}]
    ropes = [_make_rope(rope, hf_config, found, renamed or {}) for rope in said]
    errors += dict.fromkeys(found)
    if len(set(ropes)) > 1 and not found:
        errors.append(f"rope_scaling: got another one than rope_parameters, allowed: {_CONFLICT}")
    return ropes[0]


def read_two_ropes(hf_config: HFConfig, errors: list[str]) -> dict[str, RopeConfig]:
    """Return the rotary embeddings of the layers without and with a window.

    transformers 5 keeps them by the type of layer; in 4 a scaling was that of the layers without.
    """
    nested, scaling = (hf_config.get(name) or {} for name in reversed(_FIELDS))
    if strange := [name for name in nested if name not in (FULL, WINDOWED)]:
        errors.append(
            f"rope_parameters: got {strange[0]!r} in it, allowed: {FULL!r} and {WINDOWED!r}, an "
            "object for each type of layer"
        )
    full = nested.get(FULL) or {}
    theta = hf_config.get("rope_local_base_freq") or hf_config.get("rope_theta")
    ropes = {
        "rope": _make_rope({**full, **scaling}, hf_config, errors, {}),
        "local_rope": _make_rope(
            nested.get(WINDOWED) or {}, {**hf_config, "rope_theta": theta}, errors, {}
        ),
    }
    if full and scaling and _make_rope(full, hf_config, [], {}) != ropes["rope"]:
        errors.append(
            f"rope_scaling: got another one than rope_parameters.{FULL}, allowed: one of the two, "
            "or the same in both"
        )
    return ropes


def _make_rope(
    rope: Mapping[str, Any], hf_config: HFConfig, errors: list[str], renamed: Mapping[str, str]
) -> RopeConfig:
    said = rope.get("rope_type", rope.get("type", "default"))
    kind = renamed.get(said, said)
    if kind not in ROPE_FIELDS:
        errors.append(f"rope type: got {kind!r}, allowed: {', '.join(map(repr, ROPE_FIELDS))}")
        return RopeConfig()
    rope = _fill_lengths(rope, kind, hf_config)
    fields: JsonObject = {}
    for ours, (theirs, required) in ROPE_FIELDS[kind].items():
        if rope.get(theirs) is not None:
            fields[ours] = rope[theirs]
        elif required:
            errors.append(f"rope of type {kind!r}: {theirs} missing")
    fraction = rope.get("partial_rotary_factor", hf_config.get("partial_rotary_factor"))
    fields["fraction"] = 1.0 if fraction is None else fraction
    if kind == "yarn" and "factor" in fields:
        fields["attention_factor"] = _yarn_attention_factor(rope)
    if kind == "llama3" and not fields.get("low_freq_factor", 0) < fields.get(
        "high_freq_factor", math.inf
    ):
        errors.append(
            f"rope of type 'llama3': high_freq_factor: got {fields['high_freq_factor']}, allowed: "
            f"more than low_freq_factor = {fields['low_freq_factor']}"
        )
    if kind == "longrope":
        _finish_longrope(fields, rope, hf_config, errors)
    return RopeConfig(
        theta=float(rope.get("rope_theta") or hf_config.get("rope_theta") or 10_000.0),
        kind="default" if kind == "dynamic" else kind,
        **fields,
    )


def _fill_lengths(rope: Mapping[str, Any], kind: str, hf_config: HFConfig) -> JsonObject:
    """Return `rope` with the lengths that transformers takes from the config around it."""
    original, model = "original_max_position_embeddings", "max_position_embeddings"
    filled = {**rope, model: hf_config.get(model)}
    if kind in ("llama3", "yarn", "longrope"):
        # What the config says counts before what its rope does, and null for nothing.
        said = (hf_config.get(original), rope.get(original), hf_config.get(model))
        filled[original] = next((length for length in said if length is not None), None)
    return filled


def _finish_longrope(
    fields: JsonObject, rope: Mapping[str, Any], hf_config: HFConfig, errors: list[str]
) -> None:
    """Complete the fields of LongRoPE (Ding et al. 2024): one factor a pair, and a temperature."""
    width = hf_config.get("head_dim") or (
        (hf_config.get("hidden_size") or 0) // (hf_config.get("num_attention_heads") or 1)
    )
    pairs = int(width * fields["fraction"]) // 2
    for name in ("short_factor", "long_factor"):
        count = len(rope.get(name) or ())
        if count != pairs:
            errors.append(
                f"rope of type 'longrope': {name}: got {count} numbers, allowed: {pairs}, one for "
                "each pair of rotated dimensions"
            )
    fields["factors"] = tuple(map(float, fields.get("factors", ())))
    original, factor = fields.get("longest"), rope.get("factor")
    if original is None:
        return
    if factor is None:
        factor = (rope.get("max_position_embeddings") or original) / original
    fields["attention_factor"] = rope.get("attention_factor")
    if fields["attention_factor"] is None:
        stretched = factor > 1 and original > 1
        fields["attention_factor"] = (
            math.sqrt(1 + math.log(factor) / math.log(original)) if stretched else 1.0
        )


def _yarn_attention_factor(rope: Mapping[str, Any]) -> float:
    """Return what YaRN multiplies queries and keys by: 0.1 ln(factor) + 1 if not said."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def temper(weight: float) -> float:
        return 0.1 * weight * math.log(rope["factor"]) + 1 if rope["factor"] > 1 else 1.0

    top, bottom = rope.get("mscale"), rope.get("mscale_all_dim")
    return temper(top) / temper(bottom) if top and bottom else temper(1.0)


def check_rotation(head_dim: int, ropes: Sequence[RopeConfig], errors: list[str]) -> None:
    """Append an error where a rotary embedding turns nothing, or has half of a pair left over."""
    for rope in dict.fromkeys(ropes):
        size = int(head_dim * rope.fraction)
        if size < 1 or (size == head_dim and size % 2):  # an odd part is rounded up, and fits
            errors.append(
                f"head_dim: got {head_dim}, of which {size} are rotated, allowed: 1 or more that "
                "are rotated, and an even number where all are"
            )
