"""Objectives on groups that bound the ratio to the policy that sampled and keep to a reference.

A is the advantage of a sample over its group, rho = e^(p - old) the ratio of the policy's
probability of a token to that under the policy that sampled; humanline clamps its logarithm. A is
divided by the group's deviation + 1e-4 (see `groups`).

The KL term is `beta (e^(r-p) - (r-p) - 1)` of each token with the reference r; with beta = 0 there
is none, and no reference is read. `unbiased_kl` multiplies it by rho, which makes its gradient that
of the divergence itself (DeepSeek-V3.2; TRL's default).

`aggregation` of a step's tokens: "token", the mean over all of them (TRL's dapo and bnpo, verl's
token-mean); "sequence", the mean over a response's tokens, then over the responses (TRL's grpo,
verl's seq-mean-token-mean); "constant", a response's sum divided by `max_tokens`, then the mean
over the responses (TRL's dr_grpo).

Metrics: besides those of `groups`, `rewards/KL` is the mean of the KL term over the tokens, without
beta, and `clipfrac/policy` the share of the tokens whose ratio was clipped.
"""

import math
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Bool

from halos_jax.losses.correction import weigh_tokens
from halos_jax.losses.groups import (
    center_rewards,
    measure_deviation,
    measure_groups,
    size_groups,
)
from halos_jax.losses.registry import register
from halos_jax.losses.sequences import (
    PerSequence,
    PerToken,
    Scalar,
    Sums,
    count_and_sum_tokens,
    count_tokens,
    spread_to_tokens,
    sum_by_sequence,
    weighted_sum,
)
from halos_jax.losses.terms import LossInputs, LossTerms
from halos_jax.types import MEMBER, Array, Batch

Aggregation: TypeAlias = Literal["token", "sequence", "constant"]

_ANY = (0.0, math.inf)
_PENALISED = {"beta": _ANY, "max_tokens": (1.0, math.inf)}


@register(
    "grpo_clip",
    reference=True,
    old=True,
    penalty="beta",
    items="group",
    limits={**_PENALISED, "epsilon_low": (0.0, 1.0), "epsilon_high": _ANY, "delta": _ANY},
)
def grpo_clip(
    inputs: LossInputs,
    batch: Batch,
    *,
    beta: float = 0.04,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float = 0.0,
    unbiased_kl: bool = False,
    aggregation: Aggregation = "sequence",
    max_tokens: float = 1024.0,
    sample_deviation: bool = False,
) -> LossTerms:
    """Group relative policy optimisation (Shao et al. 2024, equations 3 and 4) as published: the
    ratio is to the policy that sampled, and the KL term is to the reference.

    `-min(A rho, A clip(rho, 1 - epsilon_low, 1 + epsilon_high))` + the KL term. `delta` > 0 bounds
    rho in the first of the two (INTELLECT-2), which matters where A < 0: verl's `clip_ratio_c`.
    """
    advantages = center_rewards(batch) / (measure_deviation(batch, sample_deviation) + 1e-4)
    spread, ratio = spread_to_tokens(advantages, batch), jnp.exp(inputs.ratios)
    clipped = jnp.clip(ratio, 1 - epsilon_low, 1 + epsilon_high)
    bounded = jnp.minimum(ratio, delta) if delta else ratio
    gain = jnp.minimum(spread * bounded, spread * clipped)
    outside = ((spread > 0) & (ratio > 1 + epsilon_high)) | (
        (spread < 0) & (ratio < 1 - epsilon_low)
    )
    penalty = _penalise(inputs, batch, beta=beta, unbiased=unbiased_kl)
    value = _aggregate(
        beta * penalty - weigh_tokens(gain, inputs, batch), batch, aggregation, max_tokens
    )
    shown = penalty if beta else None
    return LossTerms(value, _measure_clipped(advantages, outside, shown, inputs, batch))


@register(
    "cispo",
    reference=True,
    old=True,
    penalty="beta",
    items="group",
    limits={**_PENALISED, "epsilon_low": (0.0, math.nextafter(1.0, 2.0)), "epsilon_high": _ANY},
)
def cispo(
    inputs: LossInputs,
    batch: Batch,
    *,
    beta: float = 0.0,
    epsilon_low: float = 1.0,
    epsilon_high: float = 4.0,
    unbiased_kl: bool = False,
    aggregation: Aggregation = "token",
    max_tokens: float = 1024.0,
    sample_deviation: bool = False,
) -> LossTerms:
    """Clipped importance sampling weights (MiniMax-M1 2025, equations 4 and 5): every token keeps a
    gradient, and the clipped ratio, without gradient, is its weight.

    `-A clip(rho, 1 - epsilon_low, 1 + epsilon_high) log p` + the KL term. As in the paper the
    weight has no lower bound unless `epsilon_low` < 1. Its upper bound is 5 by default (ScaleRL),
    which TRL calls epsilon_high itself.
    """
    advantages = center_rewards(batch) / (measure_deviation(batch, sample_deviation) + 1e-4)
    spread, ratio = spread_to_tokens(advantages, batch), jax.lax.stop_gradient(inputs.ratios)
    ratio = jnp.exp(ratio)
    weights = jnp.clip(ratio, 1 - epsilon_low, 1 + epsilon_high)
    gain = jnp.where(batch.is_response, weights * spread * inputs.policy, 0.0)
    penalty = _penalise(inputs, batch, beta=beta, unbiased=unbiased_kl)
    value = _aggregate(
        beta * penalty - weigh_tokens(gain, inputs, batch), batch, aggregation, max_tokens
    )
    outside = weights != ratio
    shown = penalty if beta else None
    return LossTerms(value, _measure_clipped(advantages, outside, shown, inputs, batch))


@register(
    "sapo",
    reference=True,
    old=True,
    penalty="beta",
    items="group",
    limits={**_PENALISED, "tau_positive": (1e-6, math.inf), "tau_negative": (1e-6, math.inf)},
)
def sapo(
    inputs: LossInputs,
    batch: Batch,
    *,
    beta: float = 0.0,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
    unbiased_kl: bool = False,
    aggregation: Aggregation = "sequence",
    max_tokens: float = 1024.0,
    sample_deviation: bool = False,
) -> LossTerms:
    """Soft adaptive policy optimisation (Gao et al. 2025, equations 5 and 6): a smooth gate in
    place of the clip, steeper where A is not above 0.

    `-A sigmoid(tau (rho - 1)) 4 / tau` + the KL term; tau is `tau_positive` where A > 0, else
    `tau_negative`.
    """
    advantages = center_rewards(batch) / (measure_deviation(batch, sample_deviation) + 1e-4)
    spread, ratio = spread_to_tokens(advantages, batch), jnp.exp(inputs.ratios)
    tau = jnp.where(spread > 0, tau_positive, tau_negative)
    gain = spread * jax.nn.sigmoid(tau * (ratio - 1)) * 4 / tau
    penalty = _penalise(inputs, batch, beta=beta, unbiased=unbiased_kl)
    value = _aggregate(
        beta * penalty - weigh_tokens(gain, inputs, batch), batch, aggregation, max_tokens
    )
    shown = penalty if beta else None
    return LossTerms(value, _measure_clipped(advantages, None, shown, inputs, batch))


def _penalise(inputs: LossInputs, batch: Batch, *, beta: float, unbiased: bool) -> PerToken:
    """Return the estimate k3 of each token's divergence from the reference: f32[rows, P].

    It is 0 where `beta` is, since no reference is read then, and at padding.
    """
    if not beta:
        return jnp.zeros_like(inputs.ratios)
    gap = jnp.where(batch.is_response, inputs.reference - inputs.policy, 0.0)
    divergence = jnp.exp(gap) - gap - 1
    return divergence * jnp.exp(inputs.ratios) if unbiased else divergence


def _aggregate(
    tokens: PerToken, batch: Batch, aggregation: Aggregation, max_tokens: float
) -> Scalar:
    """Sum the losses of tokens f32[rows, P] to what is divided by the step's tokens ("token"), or
    else by its groups."""
    losses = sum_by_sequence(tokens, batch)
    if aggregation == "token":
        return weighted_sum(losses, batch, MEMBER)
    length = jnp.maximum(count_tokens(batch), 1.0) if aggregation == "sequence" else max_tokens
    return weighted_sum(losses / length / size_groups(batch), batch, MEMBER)


def _measure_clipped(
    advantages: PerSequence,
    outside: Bool[Array, "rows P"] | None,
    penalty: PerToken | None,
    inputs: LossInputs,
    batch: Batch,
) -> Sums:
    """Return the metrics of a loss that may have a KL term, or bounds that tokens lie `outside`."""
    metrics = measure_groups(advantages, inputs, batch)
    if penalty is not None:
        metrics["rewards/KL"] = count_and_sum_tokens(penalty, batch, MEMBER)
    if outside is not None:
        share = outside.astype(inputs.ratios.dtype)
        metrics["clipfrac/policy"] = count_and_sum_tokens(share, batch, MEMBER)
    return metrics
