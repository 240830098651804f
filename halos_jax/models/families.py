"""The model families: how each Hugging Face config and checkpoint maps to the one decoder.

A family is one entry of `FAMILIES`, under its Hugging Face `model_type`: a function from the
Hugging Face config to fields of `DecoderConfig`, its inverse, and a key table from our paths to
the checkpoint's tensor names and layouts.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from halos_jax.config import ModelConfig
from halos_jax.models.spec import DecoderConfig, RopeConfig

HFConfig = Mapping[str, Any]
Index = tuple[slice, ...]


class ModelError(ValueError):
    """A model folder, or something in it, that cannot be used; the message says why."""


# --------------------------------------------------------------------------- tensors


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One array of a layer (or of the whole model) as it stands in a checkpoint.

    `axes` gives, for each axis of the checkpoint's tensor, the axes of ours that are flattened
    into it: ((1, 2), (0,)) is a weight [N * H, D] of our array [D, N, H]. In `name`, "{layer}"
    stands for the number of the layer.
    """

    name: str
    axes: tuple[tuple[int, ...], ...]

    def shape_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the checkpoint's shape for our `shape` (without the layer axis)."""
        return tuple(math.prod(shape[axis] for axis in group) for group in self.axes)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Return our whole array in the checkpoint's layout."""
        order = [axis for group in self.axes for axis in group]
        return array.transpose(order).reshape(self.shape_of(array.shape))

    def read(
        self, shape: tuple[int, ...], index: Index, get: Callable[[Index], np.ndarray]
    ) -> np.ndarray:
        """Return `ours[index]`, where `get` reads a block of the checkpoint's tensor.

        Only the wanted rows of each group's first axis are read; what else `index` cuts away is
        cut afterwards.
        """
        bounds = [cut.indices(size)[:2] for cut, size in zip(index, shape)]
        block, sizes, cut_after = [], [], []
        for first, *rest in self.axes:
            inner = math.prod(shape[axis] for axis in rest)
            start, stop = bounds[first]
            block.append(slice(start * inner, stop * inner))
            sizes += [stop - start, *(shape[axis] for axis in rest)]
            cut_after += [slice(None), *(slice(*bounds[axis]) for axis in rest)]
        order = [axis for group in self.axes for axis in group]
        wanted = get(tuple(block)).reshape(sizes)[tuple(cut_after)]
        return wanted.transpose(np.argsort(order))


VECTOR = ((0,),)
MATRIX = ((0,), (1,))
TRANSPOSED = ((1,), (0,))  # torch keeps [out, in]
TO_HEADS = ((1, 2), (0,))  # [D, N, H] as [N * H, D]
FROM_HEADS = ((2,), (0, 1))  # [N, H, D] as [D, N * H]


# --------------------------------------------------------------------------- families


@dataclasses.dataclass(frozen=True)
class Family:
    """What there is to know of one Hugging Face `model_type`.

    `read` returns the architecture fields of DecoderConfig and the list of what it cannot use;
    `write` returns a Hugging Face config that `read` maps back to the same fields.
    """

    language_model: str  # names of the two architectures in `transformers`
    classifier: str
    read: Callable[[HFConfig], tuple[dict[str, Any], list[str]]]
    write: Callable[[DecoderConfig], dict[str, Any]]
    tensors: Mapping[str, Tensor]


def make_decoder_config(hf_config: HFConfig, settings: ModelConfig | None = None) -> DecoderConfig:
    """Return the decoder of a Hugging Face config, to be run as `settings` says.

    Both spellings are read: that of transformers 4 (`rope_theta`, `rope_scaling`) and that of
    5 (`rope_parameters`).

    Raises:
      ModelError: with everything in `hf_config` that this decoder does not have.
    """
    family = get_family(hf_config)
    fields, errors = family.read(hf_config)
    fields["num_labels"] = _read_num_labels(hf_config, family, errors)
    if hf_config.get("quantization_config"):
        errors.append("quantization_config: got quantized weights; allowed: none")
    if errors:
        lines = "\n  ".join(errors)
        raise ModelError(
            f"config.json: the {hf_config['model_type']!r} decoder of halos_jax cannot run this "
            f"model:\n  {lines}\nUse a model without these features."
        )
    if settings is not None:
        for name in ("params_dtype", "compute_dtype", "attention", "remat", "head_chunk"):
            fields[name] = getattr(settings, name)
    return DecoderConfig(**fields)


def get_family(hf_config: HFConfig) -> Family:
    """Return the family of a Hugging Face config; ModelError where there is none."""
    model_type = hf_config.get("model_type")
    if model_type not in FAMILIES:
        raise ModelError(
            f"config.json: model_type: got {model_type!r}, allowed: {', '.join(FAMILIES)}; use a "
            "model of one of these families"
        )
    return FAMILIES[model_type]


def make_hf_config(
    config: DecoderConfig, dtype: str, source: HFConfig | None = None
) -> dict[str, Any]:
    """Return the Hugging Face config for weights of `config` stored as `dtype`.

    It is that of `source`, with what the weights determine set anew; without a source it is a
    Llama config.

    Raises:
      ModelError: where `source` describes another architecture than `config`.
    """
    family = get_family(source) if source else FAMILIES["llama"]
    made = dict(source) if source else family.write(config)
    made["architectures"] = [family.classifier if config.num_labels else family.language_model]
    made["vocab_size"] = config.vocab_size
    made["tie_word_embeddings"] = config.tie_embeddings
    # transformers before 4.56 knows only "torch_dtype"; every later version reads both.
    made["dtype" if "dtype" in made else "torch_dtype"] = dtype
    _write_num_labels(made, config.num_labels)
    _check_equal(config, make_decoder_config(made))
    return made


def _check_equal(config: DecoderConfig, found: DecoderConfig) -> None:
    execution = {"params_dtype", "compute_dtype", "attention", "remat", "head_chunk"}
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
    allowed = (family.language_model, family.classifier)
    if len(names) != 1 or names[0] not in allowed:
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


def _write_num_labels(made: dict[str, Any], num_labels: int) -> None:
    made.pop("num_labels", None)
    if len(made.get("id2label") or ()) == num_labels:
        return  # keep the names that the labels have
    made.pop("id2label", None)
    made.pop("label2id", None)
    if num_labels:
        made["id2label"] = {str(label): f"LABEL_{label}" for label in range(num_labels)}
        made["label2id"] = {f"LABEL_{label}": label for label in range(num_labels)}


# --------------------------------------------------------------------------- llama


def _read_llama(hf_config: HFConfig) -> tuple[dict[str, Any], list[str]]:
    required = {
        "vocab_size": "vocab_size",
        "num_layers": "num_hidden_layers",
        "d_model": "hidden_size",
        "num_heads": "num_attention_heads",
        "d_mlp": "intermediate_size",
    }
    errors, fields = [], {}
    for ours, theirs in required.items():
        value = hf_config.get(theirs)
        if isinstance(value, int) and value > 0:
            fields[ours] = value
        else:
            errors.append(f"{theirs}: got {value!r}, allowed: a positive integer")
    for name in ("attention_bias", "mlp_bias"):
        if hf_config.get(name):
            errors.append(f"{name}: got True, allowed: False")
    if (activation := hf_config.get("hidden_act", "silu")) not in ("silu", "swish"):
        errors.append(f"hidden_act: got {activation!r}, allowed: 'silu'")
    rope = _read_rope(hf_config, errors)
    if not errors:
        heads = fields["num_heads"]
        fields["num_kv_heads"] = hf_config.get("num_key_value_heads") or heads
        fields["head_dim"] = hf_config.get("head_dim") or fields["d_model"] // heads
        if heads % fields["num_kv_heads"]:
            errors.append(
                f"num_key_value_heads: got {fields['num_kv_heads']}, allowed: a divisor of "
                f"num_attention_heads = {heads}"
            )
    return {
        **fields,
        "norm_eps": hf_config.get("rms_norm_eps", 1e-6),
        "tie_embeddings": bool(hf_config.get("tie_word_embeddings", False)),
        "init_std": hf_config.get("initializer_range", 0.02),
        "rope": rope,
    }, errors


def _read_rope(hf_config: HFConfig, errors: list[str]) -> RopeConfig:
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or hf_config.get("rope_theta") or 10_000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", hf_config.get("partial_rotary_factor", 1.0)) != 1.0:
        errors.append("partial_rotary_factor: allowed: 1.0")
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind != "llama3":
        errors.append(f"rope type: got {kind!r}, allowed: 'default', 'llama3'")
        return RopeConfig()
    if missing := [name for name in _LLAMA3_ROPE.values() if name not in rope]:
        errors.append(f"rope of type 'llama3': {', '.join(missing)} missing")
        return RopeConfig()
    values = {ours: rope[theirs] for ours, theirs in _LLAMA3_ROPE.items()}
    return RopeConfig(theta=theta, kind="llama3", **values)


_LLAMA3_ROPE = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_length": "original_max_position_embeddings",
}


def _write_llama(config: DecoderConfig) -> dict[str, Any]:
    """Return a Llama config in the spelling of transformers 4, which 5 reads too."""
    rope, scaling = config.rope, None
    if rope.kind == "llama3":
        scaling = {theirs: getattr(rope, ours) for ours, theirs in _LLAMA3_ROPE.items()}
        scaling["rope_type"] = "llama3"
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
        "max_position_embeddings": int(rope.original_max_length * rope.factor),
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "attention_bias": False,
        "mlp_bias": False,
    }


_LLAMA_LAYER = {
    "attention_norm": ("input_layernorm", VECTOR),
    "q": ("self_attn.q_proj", TO_HEADS),
    "k": ("self_attn.k_proj", TO_HEADS),
    "v": ("self_attn.v_proj", TO_HEADS),
    "o": ("self_attn.o_proj", FROM_HEADS),
    "mlp_norm": ("post_attention_layernorm", VECTOR),
    "gate": ("mlp.gate_proj", TRANSPOSED),
    "up": ("mlp.up_proj", TRANSPOSED),
    "down": ("mlp.down_proj", TRANSPOSED),
}

_LLAMA_TENSORS = {
    "embed": Tensor("model.embed_tokens.weight", MATRIX),
    **{
        f"layers/{ours}": Tensor(f"model.layers.{{layer}}.{theirs}.weight", axes)
        for ours, (theirs, axes) in _LLAMA_LAYER.items()
    },
    "final_norm": Tensor("model.norm.weight", VECTOR),
    "head": Tensor("lm_head.weight", MATRIX),
    "score": Tensor("score.weight", MATRIX),
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        language_model="LlamaForCausalLM",
        classifier="LlamaForSequenceClassification",
        read=_read_llama,
        write=_write_llama,
        tensors=_LLAMA_TENSORS,
    ),
}
