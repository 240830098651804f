"""The fields of adapter_config.json: the type of each, and the variants of LoRA that are refused.

A field that is not known here is refused unless it is off: a newer variant computes something else.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from halos_jax.models.hf.schema import Kind

# Values that turn a variant off, by their types too: 0 is not False here.
_OFF: tuple[Any, ...] = (None, False, {}, [])


def _one_of(*allowed: Any) -> Kind:
    words = " or ".join("null" if value is None else repr(value) for value in allowed)
    return Kind(words, lambda value: _is_one(value, allowed))


def _is_one(value: object, allowed: tuple[Any, ...]) -> bool:
    return any(type(value) is type(one) and value == one for one in allowed)


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


_TEXT = Kind("a string or null", lambda value: value is None or isinstance(value, str))
_FLAG = Kind("true, false or null", lambda value: value is None or isinstance(value, bool))
_NAMES = Kind(
    "names (a string or a list of strings), or null",
    lambda value: value is None or isinstance(value, str) or _is_names(value),
)
_LAYERS = Kind(
    "a number of a layer or a list of them, or null",
    lambda value: value is None or _is_numbers(value if isinstance(value, list) else [value]),
)
_SHARE = Kind(
    "a number of 0 or more, below 1", lambda value: type(value) in (int, float) and 0 <= value < 1
)

REQUIRED: dict[str, Kind] = {
    "r": Kind("an integer above 0", lambda value: type(value) is int and 0 < value <= 2**16),
    "lora_alpha": Kind(
        "a number above 0", lambda value: type(value) in (int, float) and 0 < value <= 1e9
    ),
}
FIELDS: dict[str, Kind] = {
    "peft_type": _one_of("LORA"),
    "task_type": _TEXT,
    "use_rslora": _FLAG,
    "bias": _one_of("none", None),
    # Of the others, what the weights are when training starts, and so the base, is another.
    "init_lora_weights": _one_of(True, False, None, "gaussian", "orthogonal"),
    "lora_dropout": _SHARE,
    **dict.fromkeys(("target_modules", "exclude_modules", "modules_to_save"), _NAMES),
    **dict.fromkeys(("layers_to_transform",), _LAYERS),
    "layers_pattern": _NAMES,
}
# What says nothing of the arithmetic: where it comes from, and how other programs hold it.
_BESIDE = {"auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
_BESIDE |= {"megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config"}
_BESIDE |= {"lora_ga_config", "qalora_group_size", "runtime_config", "ensure_weight_tying"}


def list_faults(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each field that cannot be run: of a wrong type, or of another variant."""
    for name, kind in REQUIRED.items():
        if not kind.fits(settings.get(name)):
            yield f"{name}: got {_show(settings.get(name))}, allowed: {kind.allowed}"
    for name, value in settings.items():
        if name in FIELDS and not FIELDS[name].fits(value):
            yield f"{name}: got {_show(value)}, allowed: {FIELDS[name].allowed}"
        elif not (name in FIELDS or name in REQUIRED or name in _BESIDE or _is_one(value, _OFF)):
            yield f"{name}: got {_show(value)}, allowed: false or null"


def _show(value: object) -> str:
    text = repr(value)
    return "null" if value is None else text if len(text) <= 80 else f"{text[:77]}..."
