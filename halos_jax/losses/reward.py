"""Objectives of reward models."""

import math

import jax

from halos_jax.losses.registry import register
from halos_jax.losses.sequences import count_and_sum, take_partner, weighted_sum
from halos_jax.losses.terms import LossInputs, LossTerms
from halos_jax.types import CHOSEN, REJECTED, Batch


@register(
    "bradley-terry",
    needs="scores",
    limits={"margin": (0.0, math.inf), "center_coefficient": (0.0, math.inf)},
)
def bradley_terry(
    inputs: LossInputs, batch: Batch, *, margin: float = 0.0, center_coefficient: float = 0.0
) -> LossTerms:
    """Pairwise logistic loss `-log sigmoid(s_c - s_j - margin (r_c - r_j))
    + center_coefficient (s_c + s_j)^2`.

    Bradley & Terry 1952, Ouyang et al. 2022, equation 1. The margin, from the rewards `r` that the
    pair's record has (none: 0), is that of Llama 2 (Touvron et al. 2023, equation 2). The last term
    keeps scores around zero, which the first leaves open (Eisenstein et al. 2023).
    """
    scores, partners = inputs.scores, take_partner(inputs.scores, batch)
    rewards = batch.sequences.reward
    margins = scores - partners
    wanted = margin * (rewards - take_partner(rewards, batch))
    losses = -jax.nn.log_sigmoid(margins - wanted)
    losses += center_coefficient * (scores + partners) ** 2
    metrics = {
        "rewards/chosen": count_and_sum(scores, batch, CHOSEN),
        "rewards/rejected": count_and_sum(scores, batch, REJECTED),
        "rewards/margins": count_and_sum(margins, batch, CHOSEN),
        "rewards/accuracies": count_and_sum((margins > 0).astype(margins.dtype), batch, CHOSEN),
    }
    if margin:
        metrics["rewards/wanted_margins"] = count_and_sum(wanted, batch, CHOSEN)
    return LossTerms(weighted_sum(losses, batch, CHOSEN), metrics)
