"""Objectives on single answers that are desirable or not.

R is the sum over a response of the log-ratios `log p - log r` (clamped under humanline). The
metrics `rewards/*` are implicit rewards, beta R; "chosen" are desirable answers, "rejected" others,
and `rewards/margins` (see `average_metrics`) is the mean of the former less that of the latter.
"""

import jax
import jax.numpy as jnp

from halos_jax.losses.registry import register
from halos_jax.losses.sequences import (
    PerSequence,
    Sums,
    count_and_sum,
    count_and_sum_class,
    count_tokens,
    sum_by_sequence,
    weighted_sum,
)
from halos_jax.losses.terms import LossInputs, LossTerms, Statistics
from halos_jax.types import MISMATCHED, TARGET, Batch


def measure_kl(inputs: LossInputs, batch: Batch) -> Statistics:
    """Return (sum, count) of R over the step's mismatched pairs of a prompt and an answer."""
    return {"kl": count_and_sum(sum_by_sequence(inputs.ratios, batch), batch, MISMATCHED)}


@register(
    "kto", reference=True, items="unpaired", statistics=measure_kl, corrections=("none", "wpo")
)
def kto(
    inputs: LossInputs,
    batch: Batch,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossTerms:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, equation 8).

    Desirable: `w_D (1 - sigmoid(beta (R - KL)))`; undesirable: `w_U (1 - sigmoid(beta (KL - R)))`.
    KL is the mean of R over the optimizer step's mismatched pairs, 0 at least, without gradient.
    """
    total, count = inputs.statistics["kl"]
    kl = jnp.maximum(total / jnp.maximum(count, 1.0), 0.0)
    rewards = sum_by_sequence(inputs.ratios, batch)
    desirable = batch.sequences.desirable
    margins = beta * jnp.where(desirable, rewards - kl, kl - rewards)
    losses = jnp.where(desirable, desirable_weight, undesirable_weight) * jax.nn.sigmoid(-margins)
    metrics = _measure_unpaired(beta * rewards, margins, inputs, batch)
    metrics["rewards/KL_estimate"] = (kl * count, count)
    return LossTerms(weighted_sum(losses, batch, TARGET), metrics)


def measure_classes(inputs: LossInputs, batch: Batch) -> Statistics:
    """Return (sum, count) of R over the step's desirable and over its undesirable answers."""
    ratios = sum_by_sequence(inputs.ratios, batch)
    return {
        "desirable": count_and_sum_class(ratios, batch, TARGET, desirable=True),
        "undesirable": count_and_sum_class(ratios, batch, TARGET, desirable=False),
    }


@register("bco", reference=True, items="unpaired", statistics=measure_classes)
def bco(inputs: LossInputs, batch: Batch, *, beta: float = 0.1) -> LossTerms:
    """Binary classifier optimisation (Jung et al. 2024) with the reward shift of this step.

    Desirable: `-log sigmoid(beta (R - delta))`; undesirable: `-log sigmoid(-beta (R - delta))`;
    delta is the mean of the two classes' means of R over the optimizer step, without gradient (the
    mean of one class where the other is absent). The paper averages delta over steps.
    """
    (good, num_good), (bad, num_bad) = (
        inputs.statistics[name] for name in ("desirable", "undesirable")
    )
    classes = jnp.maximum((num_good > 0).astype(good.dtype) + (num_bad > 0), 1.0)
    delta = (good / jnp.maximum(num_good, 1.0) + bad / jnp.maximum(num_bad, 1.0)) / classes
    rewards = sum_by_sequence(inputs.ratios, batch)
    margins = beta * jnp.where(batch.sequences.desirable, rewards - delta, delta - rewards)
    metrics = _measure_unpaired(beta * rewards, margins, inputs, batch)
    metrics["rewards/delta"] = (delta * (num_good + num_bad), num_good + num_bad)
    return LossTerms(weighted_sum(-jax.nn.log_sigmoid(margins), batch, TARGET), metrics)


def suggest_weights(num_desirable: int, num_undesirable: int) -> tuple[float, float]:
    """Return the range of `desirable_weight` that balances the classes where the other weight is 1.

    w_D n_D / (w_U n_U) should be within [1, 4/3] (Ethayarajh et al. 2024, equation 9).
    """
    if not (num_desirable and num_undesirable):
        return 1.0, 1.0
    even = num_undesirable / num_desirable
    return even, even * 4 / 3


def _measure_unpaired(
    rewards: PerSequence, margins: PerSequence, inputs: LossInputs, batch: Batch
) -> Sums:
    """Return the metrics; `margins` are distances to the right side of the reference point."""
    logps = sum_by_sequence(inputs.policy, batch)
    inside, tokens = sum_by_sequence(inputs.unclamped, batch), count_tokens(batch)
    metrics = {
        "rewards/signed_distance": count_and_sum(margins, batch, TARGET),
        "rewards/accuracies": count_and_sum((margins > 0).astype(margins.dtype), batch, TARGET),
    }
    for name, desirable in (("chosen", True), ("rejected", False)):
        metrics |= {
            f"rewards/{name}": count_and_sum_class(rewards, batch, TARGET, desirable=desirable),
            f"logps/{name}": count_and_sum_class(logps, batch, TARGET, desirable=desirable),
            f"rewards/{name}_unclamped": (
                count_and_sum_class(inside, batch, TARGET, desirable=desirable)[0],
                count_and_sum_class(tokens, batch, TARGET, desirable=desirable)[0],
            ),
        }
    return metrics
