"""How many positions a model was made for, as its config.json says, and how many it can have."""

from collections.abc import Mapping
from typing import Any

from halos_jax.models.hf.families import ModelError
from halos_jax.models.spec import DecoderConfig

_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len")


def find_max_positions(hf_config: Mapping[str, Any]) -> int:
    """Return the length of the longest sequences that a model was made for, 0 where unknown.

    Where the rotary embedding is stretched, that is its original length times the factor, if the
    config does not name a larger one: not all models that are stretched say their new length.
    """
    config = hf_config.get("text_config", hf_config)
    config = config if isinstance(config, Mapping) else hf_config
    found = [_read(config.get(name)) for name in _NAMES]
    for field in ("rope_scaling", "rope_parameters"):
        scaling = config.get(field)
        if isinstance(scaling, Mapping):
            original = _read(scaling.get("original_max_position_embeddings"))
            factor = scaling.get("factor")
            if original and isinstance(factor, (int, float)) and 1 <= factor < 1e6:
                found.append(int(original * factor))
    return max(found)


def _read(value: object) -> int:
    return value if type(value) is int and value > 0 else 0


def refuse_longer(decoder: DecoderConfig, lengths: Mapping[str, int]) -> None:
    """Raise a ModelError where sequences may become longer than a rotary embedding holds for.

    Beyond that the angles of all tokens are others, those of a prompt that stands once for several
    answers and of keys that are cached too: no sequence may come there.

    Args:
      lengths: field, or fields, of the configuration -> tokens that they allow.
    """
    ropes = [decoder.rope, decoder.local_rope or decoder.rope]
    longest = min((rope.longest for rope in ropes if rope.longest), default=0)
    lines = [
        f"{name}: got {length:,}, allowed: {longest:,} at most, since the model's rotary embedding "
        "is another one in longer sequences (rope_scaling in its config.json)"
        for name, length in lengths.items()
        if 0 < longest < length
    ]
    if lines:
        raise ModelError("\n".join(lines))
