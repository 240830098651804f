"""All logits of short sequences, formed whole: what tests compare the program's parts with."""

import functools

import jax
import jax.numpy as jnp

from halos_jax.models import decoder
from halos_jax.models.attention.backends import attend_rows
from halos_jax.models.head import project_logits
from halos_jax.models.spec import DecoderConfig
from halos_jax.types import Params


def encode_rows(
    params: Params, tokens: jax.Array, lengths: jax.Array, config: DecoderConfig
) -> jax.Array:
    """Return the hidden states `[rows, T, D]` of one right-padded sequence a row."""
    attend = functools.partial(attend_rows, lengths=lengths)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return decoder.run_layers(params, tokens, positions, attend, config)


def compute_logits(
    params: Params, tokens: jax.Array, lengths: jax.Array, config: DecoderConfig
) -> jax.Array:
    """Return all logits f32[rows, T, V] of one right-padded sequence a row."""
    hidden = encode_rows(params, tokens, lengths, config)
    return project_logits(hidden, decoder.get_head(params, config), config.logit_softcap)
