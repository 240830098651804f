"""What a loss is given and what it returns."""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

from flax import struct
from jaxtyping import Float32

from halos_jax.losses.sequences import Scalar, Sums
from halos_jax.types import Array

Statistics: TypeAlias = Sums  # over a whole optimizer step


@dataclasses.dataclass(frozen=True)
class Divergence:
    """A divergence between the next-token distributions of the policy and of a teacher.

    Attributes:
      beta: 0: KL(teacher || policy), "forward"; 1: KL(policy || teacher), "reverse"; between: the
        generalised Jensen-Shannon divergence with a mixture of 1 - beta of the policy.
      temperature: the logits of both are divided by it.
    """

    beta: float = 0.5
    temperature: float = 1.0


@struct.dataclass
class LossInputs:
    """What the models say about a batch; a loss never sees a model.

    `policy`, `reference` and `old` (the policy that sampled, or with a correction that at the start
    of the round) are token log-probabilities in nats; `scores` are a classifier's logits. `ratios`
    are policy - old, or policy - reference, 0 at padding and clamped under humanline; `unclamped`
    is 1 where they are strictly inside of its interval. `values` are those of a value head,
    `old_values` the same when the answers were collected (in evaluation: now), `entropies` the
    policy's, for metrics. `divergences` are those from a teacher, over the whole vocabulary,
    `teacher` its log-probabilities. A correction reads `sampled`, the log-probabilities under the
    policy that sampled, and `alignment`, log sum_v p(v)^2 of the policy's distributions; what it
    makes of them may be `weights`. `statistics` are sums over the whole optimizer step. The leading
    m is there before the microbatches are taken apart.

    A field's type is what a loss finds that has asked for it with `register`; others find None.

    Example:
      >>> logps = jnp.array([[-1.5, -2.0]])
      >>> inputs = LossInputs(policy=logps, reference=logps - 0.5)
      >>> (inputs.policy - inputs.reference).tolist(), inputs.scores
      ([[0.5, 0.5]], None)
    """

    policy: Float32[Array, "*m rows P"] = struct.field(default=None)
    reference: Float32[Array, "*m rows P"] = struct.field(default=None)
    scores: Float32[Array, "*m rows sequences"] = struct.field(default=None)
    old: Float32[Array, "*m rows P"] = struct.field(default=None)
    ratios: Float32[Array, "*m rows P"] = struct.field(default=None)
    unclamped: Float32[Array, "*m rows P"] = struct.field(default=None)
    values: Float32[Array, "*m rows P"] = struct.field(default=None)
    old_values: Float32[Array, "*m rows P"] = struct.field(default=None)
    entropies: Float32[Array, "*m rows P"] = struct.field(default=None)
    divergences: Float32[Array, "*m rows P"] = struct.field(default=None)
    teacher: Float32[Array, "*m rows P"] = struct.field(default=None)
    sampled: Float32[Array, "*m rows P"] = struct.field(default=None)
    alignment: Float32[Array, "*m rows P"] = struct.field(default=None)
    weights: Float32[Array, "*m rows P"] = struct.field(default=None)
    statistics: dict[str, tuple[Float32[Array, "*m"], Float32[Array, "*m"]]] = struct.field(
        default=None
    )


@struct.dataclass
class LossTerms:
    """Sums over a batch: `value` is divided by the step's examples or tokens, and each metric's
    (sum, count) only when all microbatches have been added up."""

    value: Scalar
    metrics: Sums


Objective: TypeAlias = Callable[..., LossTerms]
Measure: TypeAlias = Callable[..., Statistics]
