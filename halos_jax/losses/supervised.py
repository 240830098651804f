"""Objectives on demonstrations."""

from halos_jax.losses.registry import register
from halos_jax.losses.sequences import (
    count_and_sum,
    count_and_sum_class,
    sum_by_sequence,
    weighted_sum,
)
from halos_jax.losses.terms import LossInputs, LossTerms
from halos_jax.types import TARGET, Batch


@register("sft", per="token", items="target")
def sft(inputs: LossInputs, batch: Batch) -> LossTerms:
    """Negative log-likelihood of the responses, in nats per response token of the step."""
    sequence_logps = sum_by_sequence(inputs.policy, batch)
    return LossTerms(
        -weighted_sum(sequence_logps, batch, TARGET),
        {"logps/chosen": count_and_sum(sequence_logps, batch, TARGET)},
    )


@register("csft", per="token", items="controlled")
def csft(inputs: LossInputs, batch: Batch) -> LossTerms:
    """SFT on good and bad answers alike, told apart by a control token (Korbak et al. 2023).

    `-log p(y | x, token)`, in nats per response token of the step. The token (`data.good_token`,
    `data.bad_token`) stands where the answer begins, as a part of the prompt: it is given, never
    predicted. Sample the trained policy with `sampling.prefix` set to the good one.
    """
    logps = sum_by_sequence(inputs.policy, batch)
    return LossTerms(
        -weighted_sum(logps, batch, TARGET),
        {
            "logps/chosen": count_and_sum_class(logps, batch, TARGET, desirable=True),
            "logps/rejected": count_and_sum_class(logps, batch, TARGET, desirable=False),
        },
    )
