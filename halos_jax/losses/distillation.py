"""Objectives that compare the policy with a teacher, another language model."""

import math

from halos_jax.losses.registry import register
from halos_jax.losses.sequences import (
    count_and_sum,
    count_and_sum_tokens,
    sum_by_sequence,
    weighted_sum,
)
from halos_jax.losses.terms import Divergence, LossInputs, LossTerms
from halos_jax.types import TARGET, Batch


@register(
    "gkd",
    per="token",
    items="output",
    divergence=Divergence(),
    limits={"beta": (0.0, math.nextafter(1.0, 2.0)), "temperature": (1e-3, math.inf)},
)
def gkd(inputs: LossInputs, batch: Batch) -> LossTerms:
    """Generalised knowledge distillation (Agarwal et al. 2023, GKD).

    The divergence of the policy's next-token distribution from the teacher's, over the whole
    vocabulary, in nats per response token of the step: with `beta` 0 KL(teacher || policy), with 1
    KL(policy || teacher), between the generalised Jensen-Shannon divergence; `temperature` divides
    the logits of both. There is no gradient through the sampling of the responses.
    """
    losses = sum_by_sequence(inputs.divergences, batch)
    logps = {"policy": inputs.policy, "teacher": inputs.teacher}
    sums = {
        f"logps/{name}": count_and_sum(sum_by_sequence(values, batch), batch, TARGET)
        for name, values in logps.items()
    }
    ratios = count_and_sum_tokens(inputs.policy - inputs.teacher, batch, TARGET)
    return LossTerms(weighted_sum(losses, batch, TARGET), sums | {"rewards/log_ratio": ratios})
