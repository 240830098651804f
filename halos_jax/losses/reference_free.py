"""Objectives on pairs that read the policy alone. Humanline has no log-ratio to clamp here."""

import jax
import jax.numpy as jnp

from halos_jax.losses.preference import preference_metrics
from halos_jax.losses.registry import register
from halos_jax.losses.sequences import (
    PerSequence,
    count_and_sum,
    mean_by_sequence,
    sum_by_sequence,
    take_partner,
    weighted_sum,
)
from halos_jax.losses.terms import LossInputs, LossTerms
from halos_jax.types import CHOSEN, Batch


@register("simpo")
def simpo(
    inputs: LossInputs, batch: Batch, *, beta: float = 10.0, gamma_beta_ratio: float = 0.3
) -> LossTerms:
    """Simple preference optimisation (Meng et al. 2024, equation 6).

    `-log sigmoid(beta (S_c - S_j - gamma_beta_ratio))` with S the mean log-probability by token;
    `rewards/*` are beta S.
    """
    rewards = beta * mean_by_sequence(inputs.policy, batch)
    margins = rewards - take_partner(rewards, batch) - beta * gamma_beta_ratio
    return _finish(-jax.nn.log_sigmoid(margins), rewards, inputs, batch)


@register("slic")
def slic(
    inputs: LossInputs, batch: Batch, *, beta: float = 1.0, lambda_coef: float = 0.1
) -> LossTerms:
    """Sequence likelihood calibration (Zhao et al. 2023, SLiC-HF) with an SFT term.

    `max(0, beta - log p(c) + log p(j)) - lambda_coef log p(c)`. Beta is a margin here, so
    `rewards/*` are log-probabilities.
    """
    logps = sum_by_sequence(inputs.policy, batch)
    losses = jax.nn.relu(beta - logps + take_partner(logps, batch)) - lambda_coef * logps
    return _finish(losses, logps, inputs, batch)


@register("orpo")
def orpo(inputs: LossInputs, batch: Batch, *, beta: float = 0.1) -> LossTerms:
    """Odds ratio preference optimisation (Hong et al. 2024, equations 4 to 7).

    `-S_c - beta log sigmoid(log odds(c) - log odds(j))` with S the mean log-probability by token,
    `odds = e^S / (1 - e^S)`, and beta the paper's lambda; `rewards/*` are beta S.
    """
    means = mean_by_sequence(inputs.policy, batch)
    # The odds of a response of probability 1 (an empty one, say) are infinite.
    safe = jnp.minimum(means, -1e-6)
    log_odds = safe - jnp.log(-jnp.expm1(safe))
    losses = -means - beta * jax.nn.log_sigmoid(log_odds - take_partner(log_odds, batch))
    return _finish(losses, beta * means, inputs, batch)


@register("nll", corrections=("none",))
def nll(inputs: LossInputs, batch: Batch) -> LossTerms:
    """Negative log-likelihood of the chosen response by token, averaged over the pairs: the SFT
    term that a weighted sum of losses may add."""
    means = mean_by_sequence(inputs.policy, batch)
    logps = sum_by_sequence(inputs.policy, batch)
    metrics = {"logps/chosen": count_and_sum(logps, batch, CHOSEN)}
    return LossTerms(weighted_sum(-means, batch, CHOSEN), metrics)


def _finish(
    losses: PerSequence, rewards: PerSequence, inputs: LossInputs, batch: Batch
) -> LossTerms:
    logps = sum_by_sequence(inputs.policy, batch)
    metrics = preference_metrics(rewards, logps, batch)
    return LossTerms(weighted_sum(losses, batch, CHOSEN), metrics)
