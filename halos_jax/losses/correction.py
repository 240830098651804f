"""Corrections for stale or foreign data: weights, without gradient, of pairs, answers or tokens.

p is the policy, mu the policy that sampled, C is `correction_cap`. "wpo" weighs an example by how
likely its answers are under the policy itself, the others by how much likelier they are than under
the policy that sampled, C at most:

- wpo: w(y) = exp of the mean over y of log p(y_t) - log sum_v p(v)^2, and a pair has the product of
  its two answers' (Zhou et al. 2024, WPO, equation 2, with its "sampled" alignment: the weight of
  an answer that p samples does not depend on p's entropy);
- sequence_tis: min(prod_t rho_t, C), the product over an answer, or over both of a pair;
- token_tis: min(rho_t, C) for each token (Yao et al. 2025).

Of a loss on pairs rho = p / mu, with p as it is at each step: "sequence_tis" multiplies the pair's
loss, "token_tis" the gradient that each token's log-probability gets, and no value. A loss with a
ratio to the old policy has that of p to q, the policy at the start of the round, and rho = q / mu:
both modes multiply the tokens' gain, as in TRL, but neither a KL term nor a critic's error. Weights
are not normalised: a step's mean is over its examples or tokens, as without them.

Metrics: `correction/weight` is the mean weight, `correction/truncated` the share that C truncates,
`correction/effective` the effective sample size, (sum w)^2 / sum w^2, as a share of the number.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Float32

from halos_jax.config.kinds import ItemKind
from halos_jax.losses.sequences import (
    PerSequence,
    PerToken,
    Sums,
    compute_ratios,
    count_and_sum,
    count_and_sum_tokens,
    mean_by_sequence,
    spread_to_tokens,
    sum_by_sequence,
    take_partner,
)
from halos_jax.losses.terms import LossInputs
from halos_jax.types import CHOSEN, MEMBER, REJECTED, TARGET, Array, Batch

Mode: TypeAlias = Literal["none", "wpo", "token_tis", "sequence_tis"]

TRUNCATED: tuple[Mode, ...] = ("token_tis", "sequence_tis")
MODES: tuple[Mode, ...] = ("none", "wpo", *TRUNCATED)
# Settings of every loss that has a mode besides "none".
DEFAULTS: Mapping[str, str | float] = {"correction": "none", "correction_cap": 2.0}
LIMITS = {"correction_cap": (1.0, math.inf)}

# The roles whose sequences have a weight each: of a pair, whose two have the same, one counts.
_ROLES: Mapping[ItemKind, int] = {"pair": CHOSEN, "unpaired": TARGET}


@dataclasses.dataclass(frozen=True)
class Correction:
    """A mode with its cap, bound to a loss: what its examples are, and whether it has a ratio to
    the old policy."""

    mode: Mode = "none"
    cap: float = 2.0
    items: ItemKind = "pair"
    old: bool = False

    @property
    def is_truncated(self) -> bool:
        """Whether it needs the log-probabilities of the policy that sampled."""
        return self.mode in TRUNCATED


def list_modes(needs: str, items: ItemKind, old: bool) -> tuple[Mode, ...]:
    """Return what the correction of a loss may be: weights of pairs, or ratios to the policy that
    sampled."""
    if needs == "logps" and items == "pair":
        return MODES
    return ("none", *TRUNCATED) if old else ("none",)


def refuse(name: str, allowed: tuple[Mode, ...], path: str, value: object) -> str:
    """Return the error line for a correction, or its cap, that the loss `name` cannot have."""
    what = "the correction of" if path.endswith("_cap") else "allowed with"
    return (
        f"{path}: got {value!r}, {what} loss {name!r}: {', '.join(map(repr, allowed))}; 'wpo' is "
        "for losses on pairs and kto, 'token_tis' and 'sequence_tis' for losses on pairs and those "
        "with a ratio to the policy that sampled"
    )


def refuse_mixture(parts: Mapping[str, Mapping[str, object]]) -> list[str]:
    """Return the error line for losses of a sum with different corrections, if they differ.

    Args:
      parts: name -> settings, of those that can have one.
    """
    chosen = [
        tuple(part.get(key, default) for key, default in DEFAULTS.items())
        for part in parts.values()
    ]
    if len(set(chosen)) < 2:
        return []
    listed = ", ".join(f"{name} {mode}" for name, (mode, _) in zip(parts, chosen, strict=True))
    return [
        f"loss: 'sum' got losses of different corrections ({listed}), allowed: one correction and "
        "correction_cap for all that can have one"
    ]


def correct(
    correction: Correction, inputs: LossInputs, batch: Batch
) -> tuple[LossInputs, Batch, Sums]:
    """Return what a loss reads with the weights in it, and their metrics.

    Weights of examples are factors of those in the batch; those of a pair's tokens scale the
    gradient of `policy`; those of a loss with a ratio to the old policy become `inputs.weights`.
    """
    if correction.mode == "none":
        return inputs, batch, {}
    if correction.mode == "token_tis":
        return _correct_tokens(correction, inputs, batch)
    if correction.mode == "wpo":
        aligned = jax.lax.stop_gradient(inputs.policy - inputs.alignment)
        logs, cap = mean_by_sequence(aligned, batch), math.inf
    else:
        logs, cap = sum_by_sequence(_compare(correction, inputs, batch), batch), correction.cap
    if correction.items == "pair":
        logs += take_partner(logs, batch)
    weights, counted = _truncate(logs, cap)
    role = _ROLES.get(correction.items, MEMBER)
    metrics = {name: count_and_sum(part, batch, role) for name, part in counted.items()}
    if correction.old:
        inputs = dataclasses.replace(inputs, weights=spread_to_tokens(weights, batch))
        return inputs, batch, metrics
    weighed = dataclasses.replace(batch.sequences, weight=batch.sequences.weight * weights)
    return inputs, dataclasses.replace(batch, sequences=weighed), metrics


def _correct_tokens(
    correction: Correction, inputs: LossInputs, batch: Batch
) -> tuple[LossInputs, Batch, Sums]:
    """Do what `correct` does, for weights of tokens."""
    weights, counted = _truncate(_compare(correction, inputs, batch), correction.cap)
    roles = (CHOSEN, REJECTED) if correction.items == "pair" else (MEMBER,)
    metrics: Sums = {}
    for name, part in counted.items():
        sums = [count_and_sum_tokens(part, batch, role) for role in roles]
        metrics[name] = jax.tree.map(lambda *parts: jnp.sum(jnp.stack(parts)), *sums)
    if correction.old:
        return dataclasses.replace(inputs, weights=weights), batch, metrics
    # The value stays as it is to the last bit, since what is scaled is 0.
    still = jax.lax.stop_gradient(inputs.policy)
    scaled = still + weights * (inputs.policy - still)
    return dataclasses.replace(inputs, policy=scaled), batch, metrics


def _compare(correction: Correction, inputs: LossInputs, batch: Batch) -> PerToken:
    """Return log rho of each token f32[rows, P], as a constant; 0 at padding."""
    now = jax.lax.stop_gradient(inputs.old if correction.old else inputs.policy)
    return compute_ratios(now, inputs.sampled, batch)


def _truncate(
    logs: Float32[Array, "rows n"], cap: float
) -> tuple[Float32[Array, "rows n"], dict[str, Float32[Array, "rows n"]]]:
    """Return the weights `min(e^logs, cap)`, and what is counted of them by metric."""
    weights = jnp.exp(jnp.minimum(logs, math.log(cap)))
    counted = {"correction/weight": weights, "correction/squares": weights**2}
    if math.isfinite(cap):
        counted["correction/truncated"] = (logs > math.log(cap)).astype(logs.dtype)
    return weights, counted


def weigh_tokens(values: PerToken, inputs: LossInputs, batch: Batch) -> PerToken:
    """Return the tokens' gain f32[rows, P] times the weights of a correction, if there is one."""
    return values if inputs.weights is None else values * inputs.weights


def weigh_sequences(values: PerSequence, inputs: LossInputs, batch: Batch) -> PerSequence:
    """Return the sequences' gain f32[rows, sequences] times the mean weight of their tokens."""
    return values if inputs.weights is None else values * mean_by_sequence(inputs.weights, batch)
