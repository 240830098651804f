"""Objectives on pairs."""

import jax

from halos_jax.losses.registry import LossInputs, LossTerms, register
from halos_jax.losses.sequences import count_and_sum, sum_by_sequence, take_partner, weighted_sum
from halos_jax.types import CHOSEN, REJECTED, Batch


@register("dpo", reference=True)
def dpo(inputs: LossInputs, batch: Batch, *, beta: float = 0.1) -> LossTerms:
    """Direct preference optimisation (Rafailov et al. 2023, equation 7).

    `-log sigmoid(beta (R_c - R_j))` with `R = log p(y|x) - log r(y|x)`; the metrics
    `rewards/*` are implicit rewards, beta R.
    """
    sequence_logps = sum_by_sequence(inputs.policy, batch)
    rewards = beta * (sequence_logps - sum_by_sequence(inputs.reference, batch))
    margins = rewards - take_partner(rewards, batch)
    losses = -jax.nn.log_sigmoid(margins)
    return LossTerms(
        weighted_sum(losses, batch, CHOSEN), preference_metrics(rewards, sequence_logps, batch)
    )


def preference_metrics(rewards: jax.Array, sequence_logps: jax.Array, batch: Batch) -> dict:
    """Return the metrics of pairs from implicit rewards and log-probabilities f32[rows, N]."""
    margins = rewards - take_partner(rewards, batch)
    return {
        "rewards/chosen": count_and_sum(rewards, batch, CHOSEN),
        "rewards/rejected": count_and_sum(rewards, batch, REJECTED),
        "rewards/margins": count_and_sum(margins, batch, CHOSEN),
        "rewards/accuracies": count_and_sum((margins > 0).astype(rewards.dtype), batch, CHOSEN),
        "logps/chosen": count_and_sum(sequence_logps, batch, CHOSEN),
        "logps/rejected": count_and_sum(sequence_logps, batch, REJECTED),
    }
