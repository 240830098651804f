"""Objectives of reward models."""

import jax

from halos_jax.losses.registry import LossInputs, LossTerms, register
from halos_jax.losses.sequences import count_and_sum, take_partner, weighted_sum
from halos_jax.types import CHOSEN, REJECTED, Batch


@register("bradley-terry", needs="scores")
def bradley_terry(inputs: LossInputs, batch: Batch) -> LossTerms:
    """Pairwise logistic loss `-log sigmoid(s_c - s_j)` (Bradley & Terry 1952; Ouyang et al. 2022,
    equation 1)."""
    margins = inputs.scores - take_partner(inputs.scores, batch)
    return LossTerms(
        weighted_sum(-jax.nn.log_sigmoid(margins), batch, CHOSEN),
        {
            "rewards/chosen": count_and_sum(inputs.scores, batch, CHOSEN),
            "rewards/rejected": count_and_sum(inputs.scores, batch, REJECTED),
            "rewards/margins": count_and_sum(margins, batch, CHOSEN),
            "rewards/accuracies": count_and_sum((margins > 0).astype(margins.dtype), batch, CHOSEN),
        },
    )
