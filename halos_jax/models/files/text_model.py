"""The text model in a folder of a model of text and images: its config, and its tensors.

What is loaded, trained and exported is the text model alone, under the names that it has by itself.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from halos_jax.json_text import JsonObject
from halos_jax.models.files.weight_files import Tensors
from halos_jax.models.hf.families import ModelError

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Composite:
    """A model with a text model in it, under its `model_type`.

    `architectures` maps the names of the whole to those of the text model; `prefixes` maps the
    beginnings of its tensors' names to those of the text model's; all of the rest that begins with
    one of `others` is not the text model's.
    """

    model_type: str  # of the text model
    architectures: Mapping[str, str]
    prefixes: Mapping[str, str]
    others: tuple[str, ...]
    defaults: Mapping[str, Any]  # of the text model's sizes, which a nested config leaves out


_GEMMA3_IMAGES = ("vision_tower", "multi_modal_projector")
COMPOSITES = {
    "gemma3": Composite(
        "gemma3_text",
        {
            "Gemma3ForConditionalGeneration": "Gemma3ForCausalLM",
            "Gemma3ForSequenceClassification": "Gemma3TextForSequenceClassification",
        },
        # As files have them, and as the parts of the model are called in transformers 4.52 on.
        {"language_model.": "", "model.language_model.": "model."},
        tuple(f"{outer}{part}." for outer in ("", "model.") for part in _GEMMA3_IMAGES),
        {
            "vocab_size": 262_208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "max_position_embeddings": 131_072,
        },
    )
}
INSIDE = "model.language_model."  # the text model's "model." as a part of any of these
# What stands beside the text model's config and holds for it; there it counts first.
_OUTSIDE = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "num_labels"),
    *("id2label", "label2id", "tie_word_embeddings", "quantization_config"),
    "transformers_version",
)


def find_composite(hf_config: Mapping[str, Any]) -> Composite | None:
    """Return what kind of composite a config is of; None for a text model's own."""
    model_type = hf_config.get("model_type")
    return COMPOSITES.get(model_type) if isinstance(model_type, str) else None


def take_text_config(hf_config: Mapping[str, Any]) -> JsonObject:
    """Return the config of the text model of a composite; any other config as it is.

    Raises:
      ModelError: if a composite has none, or one of another kind.
    """
    composite = find_composite(hf_config)
    if composite is None:
        return dict(hf_config)
    inner = hf_config.get("text_config")
    if not isinstance(inner, dict):
        raise ModelError(f"config.json: text_config: got {inner!r}, allowed: an object")
    if inner.get("model_type", composite.model_type) != composite.model_type:
        raise ModelError(
            f"config.json: text_config.model_type: got {inner['model_type']!r}, allowed: "
            f"{composite.model_type!r}; use a model of this kind"
        )
    outside = {name: hf_config[name] for name in _OUTSIDE if hf_config.get(name) is not None}
    names = hf_config.get("architectures") or list(composite.architectures)[:1]
    if isinstance(names, list):
        known = composite.architectures
        names = [known.get(name, name) if isinstance(name, str) else name for name in names]
    made = {**composite.defaults, **inner, **outside, "architectures": names}
    return made | {"model_type": composite.model_type}


def take_text_tensors(hf_config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Return the tensors of a composite's text model by their own names; of any other, all."""
    composite = find_composite(hf_config)
    if composite is None:
        return tensors
    kept, others = {}, 0
    for name, tensor in tensors.items():
        if name.startswith(composite.others):
            others += 1
            continue
        found = next((old for old in composite.prefixes if name.startswith(old)), "")
        own = composite.prefixes.get(found, "") + name.removeprefix(found)
        if own in kept:
            raise ModelError(
                f"{name}: the tensor {own!r} of the text model stands under two names, allowed: "
                "one; copy the model again"
            )
        kept[own] = tensor
    if others:
        logger.info("%d tensors of images are left out: the text model is read", others)
    return kept
