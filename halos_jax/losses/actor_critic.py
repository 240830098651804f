"""Proximal policy optimisation: a policy and a critic that says what reward is still to come.

V is the value head's estimate at each response token, before the token is chosen; V_old is V as it
was when the answers were collected, at the start of the round (or of an offline run), and fixed
since. The reward stands on a response's last token.
"""

import math
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float32

from halos_jax.losses.correction import weigh_tokens
from halos_jax.losses.registry import register
from halos_jax.losses.sequences import (
    PerToken,
    Scalar,
    Sums,
    count_and_sum,
    count_and_sum_tokens,
    spread_to_tokens,
    sum_by_sequence,
    weighted_sum,
)
from halos_jax.losses.terms import LossInputs, LossTerms, Statistics
from halos_jax.types import MEMBER, Array, Batch

_ONE = math.nextafter(1.0, 2.0)  # limits are exclusive, and a share may be 1
_ANY = (0.0, math.inf)
_Linear: TypeAlias = tuple[jax.Array, jax.Array]  # (a, b), of the function a y + b


def measure_returns(
    inputs: LossInputs, batch: Batch, *, gamma: float = 0.99, lam: float = 0.95
) -> Statistics:
    """Return (sum, count) of advantages, their squares, returns and V_old over response tokens."""
    advantages = estimate_advantages(inputs.old_values, batch, gamma=gamma, lam=lam)
    tokens = {
        "advantages": advantages,
        "squares": advantages**2,
        "returns": discount_rewards(batch, gamma=gamma),
        "values": inputs.old_values,
    }
    return {name: count_and_sum_tokens(x, batch, MEMBER) for name, x in tokens.items()}


@register(
    "ppo",
    reference=True,
    old=True,
    value=True,
    per="token",
    items="answer",
    statistics=measure_returns,
    limits={
        "cliprange": (1e-9, math.inf),
        "cliprange_value": _ANY,
        "critic_coef": _ANY,
        "KL_coef": _ANY,
        "gamma": (0.0, _ONE),
        "lam": (0.0, _ONE),
    },
)
def ppo(
    inputs: LossInputs,
    batch: Batch,
    *,
    cliprange: float = 0.5,
    cliprange_value: float = 0.0,
    critic_coef: float = 0.01,
    KL_coef: float = 0.1,
    gamma: float = 0.99,
    lam: float = 0.95,
    gae_returns: bool = False,
) -> LossTerms:
    """Proximal policy optimisation (Schulman et al. 2017, equations 7 and 9) as HALOs has it.

    `max(-A rho, -A clip(rho, 1 - cliprange, 1 + cliprange)) + critic_coef (V - G)^2 / 2
    + KL_coef (p - r)`, the mean over the step's response tokens. rho = e^(p - old) with the policy
    that sampled, r is the reference. A are the generalised advantages, whitened over the step; G is
    the discounted reward, or with `gae_returns` A + V_old before whitening, as the paper has it.
    `cliprange_value` > 0 also takes the critic's error with V within that distance of V_old, and
    the larger of the two counts. Passes over the collected answers: `train.epochs`.
    """
    advantages = estimate_advantages(inputs.old_values, batch, gamma=gamma, lam=lam)
    returns = discount_rewards(batch, gamma=gamma)
    goals = advantages + inputs.old_values if gae_returns else returns
    whitened = _whiten(advantages, inputs.statistics)
    ratios = jnp.exp(inputs.ratios)
    clipped = jnp.clip(ratios, 1 - cliprange, 1 + cliprange)
    policy = weigh_tokens(jnp.maximum(-whitened * ratios, -whitened * clipped), inputs, batch)
    critic = (inputs.values - goals) ** 2
    if cliprange_value:
        step = jnp.clip(inputs.values - inputs.old_values, -cliprange_value, cliprange_value)
        critic = jnp.maximum(critic, (inputs.old_values + step - goals) ** 2)
    divergence = inputs.policy - inputs.reference
    tokens = policy + critic_coef * critic / 2 + KL_coef * divergence
    metrics = _measure_ppo(inputs, batch, returns, goals) | {
        "loss/policy": count_and_sum_tokens(policy, batch, MEMBER),
        "loss/critic": count_and_sum_tokens(critic / 2, batch, MEMBER),
        "clipfrac/policy": count_and_sum_tokens(
            (-whitened * clipped > -whitened * ratios).astype(ratios.dtype), batch, MEMBER
        ),
        "rewards/KL": count_and_sum_tokens(divergence, batch, MEMBER),
    }
    return LossTerms(weighted_sum(sum_by_sequence(tokens, batch), batch, MEMBER), metrics)


def estimate_advantages(values: PerToken, batch: Batch, *, gamma: float, lam: float) -> PerToken:
    """Generalised advantages f32[rows, P] (Schulman et al. 2016, equation 16); 0 at padding.

    `delta_t = reward_t + gamma V_(t+1) - V_t` and `A_t = delta_t + gamma lam A_(t+1)`, where V and
    A are 0 behind a response's last token.

    Args:
      values: V, f32[rows, P].
    """
    real, last = _find_ends(batch)
    values = jnp.where(real, values, 0.0)
    following = jnp.where(last, 0.0, jnp.roll(values, -1, axis=-1))
    deltas = jnp.where(real, _place_rewards(batch) + gamma * following - values, 0.0)
    return _sum_backwards(deltas, jnp.where(last, 0.0, gamma * lam))


def discount_rewards(batch: Batch, *, gamma: float) -> PerToken:
    """Return `sum over s >= t of gamma^(s-t) reward_s`: f32[rows, P], 0 at padding."""
    _, last = _find_ends(batch)
    return _sum_backwards(_place_rewards(batch), jnp.where(last, 0.0, gamma))


def _find_ends(batch: Batch) -> tuple[Bool[Array, "rows P"], Bool[Array, "rows P"]]:
    """Return bool[rows, P]: real positions, and those behind which another sequence begins."""
    # A row's positions hold its responses one behind the other, each from its first token on.
    last = batch.sequence != jnp.roll(batch.sequence, -1, axis=-1)
    return batch.is_response, last.at[:, -1].set(True)


def _place_rewards(batch: Batch) -> PerToken:
    real, last = _find_ends(batch)
    return jnp.where(real & last, spread_to_tokens(batch.sequences.reward, batch), 0.0)


def _sum_backwards(
    x: Float32[Array, "rows P"], factors: Float32[Array, "rows P"]
) -> Float32[Array, "rows P"]:
    """Solve `y_t = x_t + factor_t y_(t+1)` along the last axis, in logarithmic depth."""

    def join(later: _Linear, earlier: _Linear) -> _Linear:
        return later[0] * earlier[0], earlier[1] + earlier[0] * later[1]

    sums: jax.Array = jax.lax.associative_scan(join, (factors, x), reverse=True, axis=x.ndim - 1)[1]
    return sums


def _whiten(
    advantages: Float32[Array, "rows P"], statistics: Statistics
) -> Float32[Array, "rows P"]:
    mean, squares = (_average(statistics[name]) for name in ("advantages", "squares"))
    return (advantages - mean) * jax.lax.rsqrt(jnp.maximum(squares - mean**2, 0.0) + 1e-8)


def _average(part: tuple[Scalar, Scalar]) -> Scalar:
    return part[0] / jnp.maximum(part[1], 1.0)


def _measure_ppo(inputs: LossInputs, batch: Batch, returns: PerToken, goals: PerToken) -> Sums:
    statistics = inputs.statistics
    tokens = {
        "loss/entropy": inputs.entropies,
        "loss/policykl": inputs.old - inputs.policy,
        "returns/mean": returns,
        "returns/var": (returns - _average(statistics["returns"])) ** 2,
        "val/vpred": inputs.values,
        "val/error": (inputs.values - goals) ** 2,
        "val/mean": inputs.old_values,
        "val/var": (inputs.old_values - _average(statistics["values"])) ** 2,
        "rewards/unclamped": inputs.unclamped,
    }
    sequence_ratios = jnp.exp(sum_by_sequence(inputs.ratios, batch))
    return {name: count_and_sum_tokens(x, batch, MEMBER) for name, x in tokens.items()} | {
        "loss/seqratio": count_and_sum(sequence_ratios, batch, MEMBER),
        "rewards/scores": count_and_sum(batch.sequences.reward, batch, MEMBER),
    }
