"""Objectives: pure functions of log-probabilities, found by name in one registry."""

from halos_jax.losses import groups, preference, reference_free, reward, supervised, unpaired
from halos_jax.losses.registry import (
    Loss,
    LossInputs,
    LossTerms,
    Statistics,
    check_feedback,
    check_loss,
    get_loss,
    list_losses,
    register,
)

__all__ = [
    "Loss",
    "LossInputs",
    "LossTerms",
    "Statistics",
    "check_feedback",
    "check_loss",
    "get_loss",
    "groups",
    "list_losses",
    "preference",
    "reference_free",
    "register",
    "reward",
    "supervised",
    "unpaired",
]
