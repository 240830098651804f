"""The teacher of a run: a frozen language model that the policy is compared with at every token."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from halos_jax.losses.terms import Divergence
from halos_jax.models import decoder, divergence
from halos_jax.models.divergence import Comparison, Divergences
from halos_jax.models.spec import DecoderConfig
from halos_jax.types import Batch, Params


@struct.dataclass
class Teacher:
    """A teacher, whose embedding and head have as many rows as the policy's.

    `words` is the size of the vocabulary that the two share: rows from there on are padding.
    """

    params: Params
    config: DecoderConfig = struct.field(pytree_node=False)
    words: int = struct.field(pytree_node=False)


def compute_divergences(
    params: Params, batch: Batch, teacher: Teacher, asked: Divergence, config: DecoderConfig
) -> Divergences:
    """Return the divergences of the policy from the teacher at a batch's response tokens, and the
    tokens' log-probabilities under both; 0 at padding.

    Args:
      params: of the policy, as the decoder reads them.
    """
    fixed = jax.lax.stop_gradient(teacher.params)
    plain = dataclasses.replace(teacher.config, remat="none")
    comparison = Comparison(
        asked,
        teacher.words,
        chunk=config.head_chunk,
        softcap=config.logit_softcap,
        teacher_softcap=plain.logit_softcap,
        keep=config.head_remat is False,
    )
    found = divergence.compute_divergences(
        decoder.encode_responses(params, batch, config),
        decoder.get_head(params, config),
        decoder.encode_responses(fixed, batch, plain),
        decoder.get_head(fixed, plain),
        batch.target,
        comparison,
    )
    return Divergences(*(jnp.where(batch.is_response, values, 0.0) for values in found))
