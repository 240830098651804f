"""Objectives on groups: all samples of a prompt with their rewards, in one item.

A is the advantage of a sample over its group, rho the ratio of the policy's probability of a token
to that under the reference (grpo, as HALOs has it) or under the policy that sampled (the others);
humanline clamps its logarithm. With few optimizer steps a round the latter is the papers' form.
Where A is divided by the group's deviation, that is the population's (divided by n, as in HALOs);
`sample_deviation` takes the sample's (by n - 1, as in TRL).

Metrics: `rewards/advantage` is the mean of |A| over the samples, `rewards/weighted_advantage` that
of |A rho| over their tokens, both HALOs'; `rewards/scores` are the scorer's own.
"""

import jax
import jax.numpy as jnp

from halos_jax.losses.correction import weigh_sequences, weigh_tokens
from halos_jax.losses.registry import register
from halos_jax.losses.sequences import (
    PerSequence,
    PerToken,
    Sums,
    count_and_sum,
    count_and_sum_tokens,
    mean_by_sequence,
    spread_to_tokens,
    sum_by_sequence,
    sum_over_group,
    weighted_sum,
)
from halos_jax.losses.terms import LossInputs, LossTerms
from halos_jax.types import MEMBER, Batch


@register("grpo", reference=True, per="token", items="group")
def grpo(
    inputs: LossInputs,
    batch: Batch,
    *,
    beta: float = 0.01,
    epsilon: float = 0.01,
    sample_deviation: bool = False,
) -> LossTerms:
    """Group relative policy optimisation (Shao et al. 2024, equations 3 and 4) as HALOs has it.

    `-min(A rho, A clip(rho, 1 - epsilon, 1 + epsilon)) + beta (e^(r-p) - (r-p) - 1)`, the mean over
    the step's response tokens; rho = e^(p-r), and A is divided by the group's deviation + 0.01. The
    paper's own is "grpo_clip".
    """
    advantages = center_rewards(batch) / (measure_deviation(batch, sample_deviation) + 0.01)
    gain = _clip_gain(advantages, inputs.ratios, batch, epsilon, epsilon)
    gap = jnp.where(batch.is_response, inputs.reference - inputs.policy, 0.0)
    divergence = jnp.exp(gap) - gap - 1
    losses = sum_by_sequence(beta * divergence - gain, batch)
    metrics = measure_groups(advantages, inputs, batch)
    metrics["rewards/KL"] = count_and_sum_tokens(divergence, batch, MEMBER)
    return LossTerms(weighted_sum(losses, batch, MEMBER), metrics)


@register("dapo", old=True, per="token", items="group")
def dapo(
    inputs: LossInputs,
    batch: Batch,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.28,
    sample_deviation: bool = False,
) -> LossTerms:
    """Decoupled clip (Yu et al. 2025, equation 8): a wider interval upwards, no KL term.

    `-min(A rho, A clip(rho, 1 - epsilon_low, 1 + epsilon_high))`, the mean over the step's response
    tokens; A is divided by the group's deviation.
    """
    advantages = center_rewards(batch) / (measure_deviation(batch, sample_deviation) + 1e-4)
    gain = _clip_gain(advantages, inputs.ratios, batch, epsilon_low, epsilon_high)
    gain = weigh_tokens(gain, inputs, batch)
    value = -weighted_sum(sum_by_sequence(gain, batch), batch, MEMBER)
    return LossTerms(value, measure_groups(advantages, inputs, batch))


@register("dr_grpo", old=True, items="group", limits={"max_tokens": (1.0, float("inf"))})
def dr_grpo(
    inputs: LossInputs, batch: Batch, *, epsilon: float = 0.2, max_tokens: float = 1024.0
) -> LossTerms:
    """GRPO without its two biases (Liu et al. 2025, Dr. GRPO): A is not divided by the deviation,
    and a response's sum is divided by the constant `max_tokens` instead of by its length.

    `-sum of min(A rho, A clip(rho, 1 - epsilon, 1 + epsilon)) / max_tokens`, averaged by group.
    """
    advantages = center_rewards(batch)
    gain = _clip_gain(advantages, inputs.ratios, batch, epsilon, epsilon)
    gain = weigh_tokens(gain, inputs, batch)
    losses = -sum_by_sequence(gain, batch) / max_tokens
    value = weighted_sum(losses / size_groups(batch), batch, MEMBER)
    return LossTerms(value, measure_groups(advantages, inputs, batch))


@register("gspo", old=True, items="group")
def gspo(
    inputs: LossInputs,
    batch: Batch,
    *,
    epsilon_low: float = 3e-4,
    epsilon_high: float = 4e-4,
    sample_deviation: bool = False,
) -> LossTerms:
    """Group sequence policy optimisation (Zheng et al. 2025, equation 5): one ratio a response, the
    geometric mean of its tokens'.

    `-min(A s, A clip(s, 1 - epsilon_low, 1 + epsilon_high))`, averaged by group.
    """
    advantages = center_rewards(batch) / (measure_deviation(batch, sample_deviation) + 1e-4)
    ratio = jnp.exp(mean_by_sequence(inputs.ratios, batch))
    clipped = jnp.clip(ratio, 1 - epsilon_low, 1 + epsilon_high)
    gain = jnp.minimum(advantages * ratio, advantages * clipped)
    losses = -weigh_sequences(gain, inputs, batch)
    value = weighted_sum(losses / size_groups(batch), batch, MEMBER)
    return LossTerms(value, measure_groups(advantages, inputs, batch))


@register("rloo", reference=True, items="group")
def rloo(inputs: LossInputs, batch: Batch, *, beta: float = 0.05) -> LossTerms:
    """REINFORCE with the other samples as the baseline (Ahmadian et al. 2024).

    `-A log p(y)`, averaged by group; A is the reward less `beta R`, less the mean of that over the
    group's other samples, without gradient. R is the log-ratio to the reference. A sample alone in
    its group has nothing to be compared with: A = 0.
    """
    penalty = beta * sum_by_sequence(jax.lax.stop_gradient(inputs.ratios), batch)
    size = size_groups(batch)
    advantages = center_rewards(batch, penalty) * size / jnp.maximum(size - 1, 1.0)
    losses = -advantages * sum_by_sequence(inputs.policy, batch)
    metrics = measure_groups(advantages, inputs, batch)
    return LossTerms(weighted_sum(losses / size, batch, MEMBER), metrics)


def size_groups(batch: Batch) -> PerSequence:
    """Return the samples of each sequence's group: f32[rows, sequences], 1 at padding."""
    return jnp.maximum(sum_over_group(jnp.ones_like(batch.sequences.reward), batch), 1.0)


def center_rewards(batch: Batch, penalty: PerSequence | float = 0.0) -> PerSequence:
    """Return rewards f32[rows, sequences], less a penalty, less their group's mean."""
    rewards = batch.sequences.reward - penalty
    return rewards - sum_over_group(rewards, batch) / size_groups(batch)


def measure_deviation(batch: Batch, sample: bool) -> PerSequence:
    """Return the standard deviation of each sequence's group: f32[rows, sequences].

    The squares' sum is divided by n, or of a `sample` by n - 1; alone a sequence deviates by 0.
    """
    size = size_groups(batch)
    divisor = jnp.maximum(size - 1, 1.0) if sample else size
    return jnp.sqrt(sum_over_group(center_rewards(batch) ** 2, batch) / divisor)


def _clip_gain(
    advantages: PerSequence, log_ratios: PerToken, batch: Batch, low: float, high: float
) -> PerToken:
    """Return the clipped surrogate `min(A rho, A clip(rho))` of each token: f32[rows, P]."""
    spread, ratio = spread_to_tokens(advantages, batch), jnp.exp(log_ratios)
    return jnp.minimum(spread * ratio, spread * jnp.clip(ratio, 1 - low, 1 + high))


def measure_groups(advantages: PerSequence, inputs: LossInputs, batch: Batch) -> Sums:
    """Return the metrics of groups from their advantages f32[rows, sequences]."""
    weighted = jnp.abs(spread_to_tokens(advantages, batch)) * jnp.exp(inputs.ratios)
    return {
        "rewards/scores": count_and_sum(batch.sequences.reward, batch, MEMBER),
        "rewards/groupsize": count_and_sum(size_groups(batch), batch, MEMBER),
        "rewards/advantage": count_and_sum(jnp.abs(advantages), batch, MEMBER),
        "rewards/weighted_advantage": count_and_sum_tokens(weighted, batch, MEMBER),
        "rewards/unclamped": count_and_sum_tokens(inputs.unclamped, batch, MEMBER),
        "logps/members": count_and_sum(sum_by_sequence(inputs.policy, batch), batch, MEMBER),
    }
