"""The model families: how Hugging Face configs and checkpoints map to the one decoder.

What there is to know of each family stands in `models.family_table`.
"""

import dataclasses
from collections.abc import Mapping

from halos_jax.config import ModelConfig
from halos_jax.config.execution import Execution
from halos_jax.errors import UserError
from halos_jax.json_text import JsonObject
from halos_jax.models import gating
from halos_jax.models.hf.family_table import FAMILIES, Family
from halos_jax.models.hf.fields import HFConfig
from halos_jax.models.hf.rope_fields import ROPE_FIELDS, check_rotation
from halos_jax.models.hf.schema import check_fields
from halos_jax.models.hf.tensors import Tensor, bind_tensors
from halos_jax.models.spec import DecoderConfig, RopeConfig, list_shapes


class ModelError(UserError, ValueError):
    """A model folder, or something in it, that cannot be used; the message says why."""


# Fields of a DecoderConfig that say how the model is run: those that it shares with `config.model`.
EXECUTION = tuple(field.name for field in dataclasses.fields(Execution))


def make_decoder_config(hf_config: HFConfig, settings: ModelConfig | None = None) -> DecoderConfig:
    """Return the decoder of a Hugging Face config, to be run as `settings` says.

    Both spellings are read: that of transformers 4 (`rope_theta`, `rope_scaling`) and that of
    5 (`rope_parameters`).

    Raises:
      ModelError: with everything in `hf_config` that this decoder does not have.
    """
    family = get_family(hf_config)
    faults: list[str] = []  # values of a wrong type, which no reader sees
    checked = check_fields(hf_config, faults)
    errors: list[str] = []
    fields = _read_fields(checked, family, errors)
    faulty = {line.partition(":")[0] for line in faults}
    errors = faults + [line for line in errors if line.partition(":")[0] not in faulty]
    if errors:
        lines = "\n  ".join(errors)
        raise ModelError(
            f"config.json: the {hf_config['model_type']!r} decoder of halos_jax cannot run this "
            f"model:\n  {lines}\nUse a model without these features."
        )
    if settings is not None:
        for name in EXECUTION:
            fields[name] = getattr(settings, name)
    return DecoderConfig(**fields)


def _read_fields(hf_config: HFConfig, family: Family, errors: list[str]) -> JsonObject:
    fields = family.read({**family.defaults, **hf_config}, errors)
    if gating.is_gated(hf_config, family):
        fields |= {"num_labels": 1, "gating": gating.read_gating(hf_config)}
    else:
        fields["num_labels"] = _read_num_labels(hf_config, family, errors)
    _check_quantization(hf_config, family, errors)
    if "head_dim" in fields and not errors:
        ropes = [fields["rope"], fields.get("local_rope") or fields["rope"]]
        check_rotation(fields["head_dim"], ropes, errors)
    return fields


def _check_quantization(hf_config: HFConfig, family: Family, errors: list[str]) -> None:
    found = hf_config.get("quantization_config")
    method = found.get("quant_method") if isinstance(found, Mapping) else found
    if found and method not in family.packings:
        allowed = " or ".join((*map(repr, family.packings), "none"))
        errors.append(
            f"quantization_config: got weights quantized by {method!r}; allowed: {allowed}; use "
            "the model's folder in bfloat16, or load this one in transformers with "
            "`dequantize=True` and save it"
        )


def get_family(hf_config: HFConfig) -> Family:
    """Return the family of a Hugging Face config; ModelError where there is none."""
    model_type = hf_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ModelError(
            f"config.json: model_type: got {model_type!r}, allowed: {', '.join(FAMILIES)}; use a "
            "model of one of these families"
        )
    return FAMILIES[model_type]


def make_hf_config(config: DecoderConfig, dtype: str, source: HFConfig | None = None) -> JsonObject:
    """Return the Hugging Face config for weights of `config` stored as `dtype`.

    It is that of `source`, with what the weights determine set anew; without a source it is a
    Llama config.

    Raises:
      ModelError: if `source` describes another architecture than `config`.
    """
    family = get_family(source) if source else FAMILIES["llama"]
    if source is None and config.rope.longest:
        raise ModelError(
            f"export: got no `source` for angles that hold up to {config.rope.longest:,} tokens, "
            "allowed: the folder that the weights came from; its config.json says what holds beyond"
        )
    made = dict(source) if source else _write_llama(config)
    if config.gating is None:
        name = family.classifier if config.num_labels else family.language_model
        made["architectures"] = [name]
        _write_num_labels(made, config.num_labels)
    made.pop("quantization_config", None)  # weights are exported as numbers
    made["vocab_size"] = config.vocab_size
    made["tie_word_embeddings"] = config.tie_embeddings
    # transformers before 4.56 knows only "torch_dtype"; every later version reads both.
    made["dtype" if "dtype" in made else "torch_dtype"] = dtype
    _check_equal(config, make_decoder_config(made))
    return made


def _check_equal(config: DecoderConfig, found: DecoderConfig) -> None:
    # The weights have the new rows; a limit to warn of is no part of what is computed.
    execution = {*EXECUTION, "new_rows", "new_rows_init", "unknown_rows", "max_positions"}
    lines = [
        f"{field.name}: the weights have {ours!r}, config.json has {theirs!r}"
        for field in dataclasses.fields(DecoderConfig)
        if field.name not in execution
        and (ours := getattr(config, field.name)) != (theirs := getattr(found, field.name))
    ]
    if lines:
        raise ModelError(
            "the config.json to be exported describes another model:\n  "
            + "\n  ".join(lines)
            + "\nGive the folder that the weights were loaded from as `source`."
        )


def _read_num_labels(hf_config: HFConfig, family: Family, errors: list[str]) -> int:
    names = hf_config.get("architectures") or [family.language_model]
    allowed: tuple[str, ...] = (family.language_model, family.classifier)
    if len(names) != 1 or names[0] not in allowed:
        allowed += (family.gated_classifier,) if family.gated_classifier else ()
        errors.append(f"architectures: got {list(names)}, allowed: one of {', '.join(allowed)}")
        return 0
    if names[0] == family.language_model:
        return 0
    labels = hf_config.get("num_labels") or len(hf_config.get("id2label") or ())
    labels = labels or 2  # a saved config leaves out the default, two labels
    if labels not in (1, 2):
        errors.append(
            f"num_labels: got {labels}, allowed: 1 (a score) or 2 (the score is label 1's logit)"
        )
    return labels


def _write_num_labels(made: JsonObject, num_labels: int) -> None:
    made.pop("num_labels", None)
    if len(made.get("id2label") or ()) == num_labels:
        return  # keep the names that the labels have
    made.pop("id2label", None)
    made.pop("label2id", None)
    if num_labels:
        made["id2label"] = {str(label): f"LABEL_{label}" for label in range(num_labels)}
        made["label2id"] = {f"LABEL_{label}": label for label in range(num_labels)}


def list_tensors(config: DecoderConfig, family: Family) -> dict[str, Tensor]:
    """Return, for each array of the params, where a checkpoint of `family` has it."""
    table = dict(family.tensors)
    if config.gating is not None:
        table |= gating.list_gating_tensors(config.gating)
    shapes = {path: shape[table[path].num_stacked :] for path, shape in list_shapes(config).items()}
    return bind_tensors(table, shapes)


def _write_llama(config: DecoderConfig) -> JsonObject:
    """Return a Llama config in the spelling of transformers 4, which 5 reads too."""
    return {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_mlp,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "max_position_embeddings": int(config.rope.original_max_length * config.rope.factor),
        "rope_theta": config.rope.theta,
        "rope_scaling": _write_rope(config.rope),
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }


def _write_rope(rope: RopeConfig) -> JsonObject | None:
    if rope.kind == "default":
        return None
    fields = {theirs: getattr(rope, ours) for ours, (theirs, _) in ROPE_FIELDS[rope.kind].items()}
    if rope.kind == "yarn":
        fields["attention_factor"] = rope.attention_factor
    return {"rope_type": rope.kind, **fields}
