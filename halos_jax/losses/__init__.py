"""Objectives: pure functions of log-probabilities, found by name in one registry."""

from halos_jax.losses import (
    actor_critic,
    distillation,
    groups,
    penalised,
    preference,
    reference_free,
    reward,
    supervised,
    unpaired,
)
from halos_jax.losses.registry import (
    Loss,
    check_loss,
    fill_defaults,
    get_loss,
    list_losses,
    register,
)
from halos_jax.losses.requirements import (
    check_evaluation,
    check_exact,
    check_feedback,
    check_mixture,
    check_reference,
    find_mixture,
    needs_exact,
    reads_drawn,
    settle_sampling,
)
from halos_jax.losses.sequences import average_metrics
from halos_jax.losses.terms import LossInputs, LossTerms, Statistics

__all__ = [
    "Loss",
    "LossInputs",
    "LossTerms",
    "Statistics",
    "actor_critic",
    "average_metrics",
    "check_evaluation",
    "check_exact",
    "check_feedback",
    "check_loss",
    "check_mixture",
    "check_reference",
    "distillation",
    "fill_defaults",
    "find_mixture",
    "get_loss",
    "groups",
    "list_losses",
    "needs_exact",
    "penalised",
    "preference",
    "reads_drawn",
    "reference_free",
    "register",
    "reward",
    "settle_sampling",
    "supervised",
    "unpaired",
]
