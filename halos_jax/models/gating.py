"""The reward head of ArmoRM (Wang et al. 2024, arXiv 2406.12845): several objectives and a gate.

A linear layer reads a reward for each of several objectives (helpfulness, verbosity, ...) from the
last token. A gating network reads from the prompt how much each of them counts here.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from halos_jax.models.hf.family_table import Family
from halos_jax.models.hf.tensors import MATRIX, TRANSPOSED, VECTOR, Tensor
from halos_jax.models.lookup import take_positions
from halos_jax.models.spec import GatingConfig
from halos_jax.types import Batch, Params

# "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n" of Llama 3: the end of every prompt.
_LLAMA3_PROMPT_END = (128009, 128006, 78191, 128007, 271)
_SIZES = {
    "num_objectives": "num_objectives",
    "num_hidden": "gating_n_hidden",
    "hidden_dim": "gating_hidden_dim",
}


def is_gated(hf_config: Mapping[str, Any], family: Family) -> bool:
    """Tell whether a Hugging Face config is one of a model with this head."""
    return list(hf_config.get("architectures") or ()) == [family.gated_classifier]


def read_gating(hf_config: Mapping[str, Any]) -> GatingConfig:
    """Return the head of a Hugging Face config, which `hf_schema.check_fields` has checked."""
    default = GatingConfig()
    fields = {ours: hf_config.get(name, getattr(default, ours)) for ours, name in _SIZES.items()}
    temperature = hf_config.get("gating_temperature", default.temperature)
    end = tuple(hf_config.get("gating_token_pattern", _LLAMA3_PROMPT_END))
    return GatingConfig(**fields, temperature=temperature, prompt_end=end)


def list_gating_tensors(gating: GatingConfig) -> dict[str, Tensor]:
    """Return where a checkpoint has each array of the head."""
    tensors = {
        "objectives": Tensor("regression_layer.weight", MATRIX),
        "transform": Tensor("reward_transform_matrix", MATRIX),
        "gating/scale": Tensor("gating.logit_scale", VECTOR),
    }
    for layer in range(gating.num_hidden + 1):
        name = f"gating.layers.{layer}"
        tensors[f"gating/weight_{layer}"] = Tensor(f"{name}.weight", TRANSPOSED)
        tensors[f"gating/bias_{layer}"] = Tensor(f"{name}.bias", VECTOR)
    return tensors


def compute_gated_scores(
    params: Params, hidden: jax.Array, batch: Batch, gating: GatingConfig
) -> jax.Array:
    """Return the scores f32[rows, sequences]: rewards, decorrelated, weighed and summed."""
    rewards, weights = compute_objectives(params, hidden, batch, gating)
    transformed = jnp.einsum(
        "rno,op->rnp", rewards, params["transform"], preferred_element_type=jnp.float32
    )
    return jnp.sum(weights * transformed, axis=-1)


def compute_objectives(
    params: Params, hidden: jax.Array, batch: Batch, gating: GatingConfig
) -> tuple[jax.Array, jax.Array]:
    """Return the rewards and the gate's weights f32[rows, sequences, objectives].

    Args:
      hidden: `[rows, T, D]`, the batch's states.
    """
    at_last = take_positions(hidden, batch.sequences.last)
    rewards = jnp.einsum(
        "rnd,od->rno",
        at_last,
        params["objectives"].astype(hidden.dtype),
        preferred_element_type=jnp.float32,
    )
    # The published model reads the state at the first of the tokens that end a prompt.
    at_prompt = take_positions(hidden, _find_prompt_ends(batch) - (len(gating.prompt_end) - 1))
    return rewards, _run_network(params["gating"], at_prompt, gating)


def _find_prompt_ends(batch: Batch) -> jax.Array:
    """Return where in its row each sequence's prompt ends: i32[rows, sequences]."""
    count = batch.sequences.last.shape[-1]

    def find(predictor: jax.Array, sequence: jax.Array) -> jax.Array:
        return jax.ops.segment_min(predictor, sequence, count + 1)[:count]

    # It predicts the first response token; where there is none, it is the last token itself.
    return jnp.minimum(jax.vmap(find)(batch.source, batch.sequence), batch.sequences.last)


def _run_network(network: dict[str, jax.Array], x: jax.Array, gating: GatingConfig) -> jax.Array:
    x = x.astype(jnp.float32)
    for layer in range(gating.num_hidden + 1):
        weight, bias = (network[f"{name}_{layer}"].astype(x.dtype) for name in ("weight", "bias"))
        x = x @ weight + bias
        if layer < gating.num_hidden:
            x = jax.nn.relu(x)
    return jax.nn.softmax(x / gating.temperature, axis=-1) * network["scale"].astype(x.dtype)
