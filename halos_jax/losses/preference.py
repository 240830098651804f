"""Objectives on pairs that compare the policy with a reference.

R is the sum over a response of the log-ratios `log p - log r` (clamped under humanline), mean R
their mean by token; c is the chosen and j the rejected response. The metrics `rewards/*` are
implicit rewards: beta times what the loss reads, R or mean R.

To read a loss to its last sum, this file and `sequences.py` are enough: `compute_ratios` makes
`inputs.ratios`, `take_share` divides the value that a loss returns.
"""

import jax
import jax.numpy as jnp

from halos_jax.losses.registry import register
from halos_jax.losses.sequences import (
    PerSequence,
    Sums,
    count_and_sum,
    count_and_sum_tokens,
    mean_by_sequence,
    sum_by_sequence,
    take_partner,
    weighted_sum,
)
from halos_jax.losses.terms import LossInputs, LossTerms
from halos_jax.types import CHOSEN, REJECTED, Batch

_HALF = {"epsilon": (0.0, 0.5)}


@register("dpo", reference=True)
def dpo(inputs: LossInputs, batch: Batch, *, beta: float = 0.1) -> LossTerms:
    """Direct preference optimisation (Rafailov et al. 2023, equation 7).

    `-log sigmoid(beta (R_c - R_j))`.
    """
    rewards = beta * sum_by_sequence(inputs.ratios, batch)
    return _finish(-jax.nn.log_sigmoid(_margins(rewards, batch)), rewards, inputs, batch)


@register("dpo_norm", reference=True)
def dpo_norm(inputs: LossInputs, batch: Batch, *, beta: float = 5.0) -> LossTerms:
    """DPO on log-ratios averaged by token (Lambert et al. 2024, Tulu 3).

    `-log sigmoid(beta (mean R_c - mean R_j))`.
    """
    rewards = beta * mean_by_sequence(inputs.ratios, batch)
    return _finish(-jax.nn.log_sigmoid(_margins(rewards, batch)), rewards, inputs, batch)


@register("cdpo", reference=True, limits={"epsilon": (0.0, 1.0)})
def cdpo(inputs: LossInputs, batch: Batch, *, beta: float = 0.1, epsilon: float = 0.2) -> LossTerms:
    """DPO for labels of which a share `epsilon` is flipped (Mitchell 2023, conservative DPO).

    `(1 - epsilon) dpo(c, j) + epsilon dpo(j, c)`.
    """
    rewards = beta * sum_by_sequence(inputs.ratios, batch)
    margins = _margins(rewards, batch)
    right, flipped = -jax.nn.log_sigmoid(margins), -jax.nn.log_sigmoid(-margins)
    return _finish((1 - epsilon) * right + epsilon * flipped, rewards, inputs, batch)


@register("robust", reference=True, limits=_HALF)
def robust(
    inputs: LossInputs, batch: Batch, *, beta: float = 0.1, epsilon: float = 0.1
) -> LossTerms:
    """DPO unbiased under a share `epsilon` of flipped labels (Chowdhury et al. 2024, rDPO).

    `((1 - epsilon) dpo(c, j) - epsilon dpo(j, c)) / (1 - 2 epsilon)`.
    """
    rewards = beta * sum_by_sequence(inputs.ratios, batch)
    margins = _margins(rewards, batch)
    right, flipped = -jax.nn.log_sigmoid(margins), -jax.nn.log_sigmoid(-margins)
    losses = ((1 - epsilon) * right - epsilon * flipped) / (1 - 2 * epsilon)
    return _finish(losses, rewards, inputs, batch)


@register("ipo", reference=True, limits={"tau": (1e-6, float("inf"))})
def ipo(inputs: LossInputs, batch: Batch, *, tau: float = 0.1) -> LossTerms:
    """Identity preference optimisation (Azar et al. 2023, equation 17), averaged by token.

    `(mean R_c - mean R_j - 1 / (2 tau))^2`; `rewards/*` are tau mean R.
    """
    ratios = mean_by_sequence(inputs.ratios, batch)
    losses = (_margins(ratios, batch) - 1 / (2 * tau)) ** 2
    return _finish(losses, tau * ratios, inputs, batch)


@register("hinge", reference=True)
def hinge(inputs: LossInputs, batch: Batch, *, beta: float = 0.1) -> LossTerms:
    """Hinge on the implicit rewards, as of RSO (Liu et al. 2023, hinge-norm).

    `max(0, 1 - beta (R_c - R_j))`.
    """
    rewards = beta * sum_by_sequence(inputs.ratios, batch)
    return _finish(jax.nn.relu(1 - _margins(rewards, batch)), rewards, inputs, batch)


@register("apo_zero", reference=True)
def apo_zero(inputs: LossInputs, batch: Batch, *, beta: float = 0.1) -> LossTerms:
    """Anchored preference optimisation (D'Oosterlinck et al. 2024, equation 7): chosen responses
    become likelier and rejected ones less likely. `sigmoid(beta R_j) - sigmoid(beta R_c)`."""
    rewards = beta * sum_by_sequence(inputs.ratios, batch)
    likely = jax.nn.sigmoid(rewards)
    return _finish(-_margins(likely, batch), rewards, inputs, batch)


@register("apo_down", reference=True)
def apo_down(inputs: LossInputs, batch: Batch, *, beta: float = 0.1) -> LossTerms:
    """Anchored preference optimisation (D'Oosterlinck et al. 2024, equation 8), for a policy better
    than the chosen responses: both become less likely, the rejected ones more so.
    `sigmoid(beta R_c) - sigmoid(beta (R_c - R_j))`."""
    rewards = beta * sum_by_sequence(inputs.ratios, batch)
    losses = jax.nn.sigmoid(rewards) - jax.nn.sigmoid(_margins(rewards, batch))
    return _finish(losses, rewards, inputs, batch)


@register("sppo", reference=True, limits={"beta": (1e-9, float("inf"))})
def sppo(inputs: LossInputs, batch: Batch, *, beta: float = 0.001) -> LossTerms:
    """Self-play preference optimisation (Wu et al. 2024, equation 4.7) with hard labels: the chosen
    response wins for certain. `(R_c - 1 / (2 beta))^2 + (R_j + 1 / (2 beta))^2`; 1 / beta is the
    paper's eta."""
    ratios = sum_by_sequence(inputs.ratios, batch)
    goal = 1 / (2 * beta)
    losses = (ratios - goal) ** 2 + (take_partner(ratios, batch) + goal) ** 2
    return _finish(losses, beta * ratios, inputs, batch)


@register("exo", reference=True, limits={"epsilon": (1e-9, 1.0)})
def exo(inputs: LossInputs, batch: Batch, *, beta: float = 0.1, epsilon: float = 1e-3) -> LossTerms:
    """Efficient exact optimisation on pairs (Ji et al. 2024, equation 16): the reverse KL
    divergence of the policy's preference, sigmoid(beta (R_c - R_j)), from labels smoothed by
    `epsilon`."""
    rewards = beta * sum_by_sequence(inputs.ratios, batch)
    margins = _margins(rewards, batch)
    right = jax.nn.log_sigmoid(margins) - jnp.log1p(-epsilon)
    flipped = jax.nn.log_sigmoid(-margins) - jnp.log(epsilon)
    losses = jax.nn.sigmoid(margins) * right + jax.nn.sigmoid(-margins) * flipped
    return _finish(losses, rewards, inputs, batch)


@register("nca", reference=True)
def nca(inputs: LossInputs, batch: Batch, *, beta: float = 0.1) -> LossTerms:
    """Noise contrastive alignment on pairs (Chen et al. 2024).

    `-log sigmoid(beta R_c) - (log sigmoid(-beta R_c) + log sigmoid(-beta R_j)) / 2`.
    """
    rewards = beta * sum_by_sequence(inputs.ratios, batch)
    noise = jax.nn.log_sigmoid(-rewards)
    losses = -jax.nn.log_sigmoid(rewards) - (noise + take_partner(noise, batch)) / 2
    return _finish(losses, rewards, inputs, batch)


@register("rpo", reference=True)
def rpo(inputs: LossInputs, batch: Batch, *, beta: float = 0.1, alpha: float = 1.0) -> LossTerms:
    """DPO with an SFT term on the chosen response (Pang et al. 2024, equation 1).

    `dpo(c, j) - alpha log p(c) / |c|`.
    """
    rewards = beta * sum_by_sequence(inputs.ratios, batch)
    losses = -jax.nn.log_sigmoid(_margins(rewards, batch))
    losses -= alpha * mean_by_sequence(inputs.policy, batch)
    return _finish(losses, rewards, inputs, batch)


def _margins(values: PerSequence, batch: Batch) -> PerSequence:
    return values - take_partner(values, batch)


def _finish(
    losses: PerSequence, rewards: PerSequence, inputs: LossInputs, batch: Batch
) -> LossTerms:
    """Sum `losses f32[rows, sequences]`, read where the sequence is chosen, and add the metrics."""
    logps = sum_by_sequence(inputs.policy, batch)
    metrics = preference_metrics(rewards, logps, batch) | {
        "rewards/chosen_unclamped": count_and_sum_tokens(inputs.unclamped, batch, CHOSEN),
        "rewards/rejected_unclamped": count_and_sum_tokens(inputs.unclamped, batch, REJECTED),
    }
    return LossTerms(weighted_sum(losses, batch, CHOSEN), metrics)


def preference_metrics(rewards: PerSequence, sequence_logps: PerSequence, batch: Batch) -> Sums:
    """Return the metrics of pairs from implicit rewards and sequences' log-probabilities."""
    margins = rewards - take_partner(rewards, batch)
    return {
        "rewards/chosen": count_and_sum(rewards, batch, CHOSEN),
        "rewards/rejected": count_and_sum(rewards, batch, REJECTED),
        "rewards/margins": count_and_sum(margins, batch, CHOSEN),
        "rewards/accuracies": count_and_sum((margins > 0).astype(rewards.dtype), batch, CHOSEN),
        "logps/chosen": count_and_sum(sequence_logps, batch, CHOSEN),
        "logps/rejected": count_and_sum(sequence_logps, batch, REJECTED),
    }
