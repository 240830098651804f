"""Objectives on demonstrations."""

from halos_jax.losses.registry import LossInputs, LossTerms, register
from halos_jax.losses.sequences import count_and_sum, sum_by_sequence, weighted_sum
from halos_jax.types import TARGET, Batch


@register("sft", per="token", items="target")
def sft(inputs: LossInputs, batch: Batch) -> LossTerms:
    """Negative log-likelihood of the responses, in nats per response token of the step."""
    sequence_logps = sum_by_sequence(inputs.policy, batch)
    return LossTerms(
        -weighted_sum(sequence_logps, batch, TARGET),
        {"logps/chosen": count_and_sum(sequence_logps, batch, TARGET)},
    )
